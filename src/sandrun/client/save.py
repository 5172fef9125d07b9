"""Outputs onto this machine's disk: only below the directory asked for, only new files unless told otherwise.

The names are the job's, so the author of the job chose them; the content is proved by its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from types import TracebackType
from typing import Self

from sandrun.errors import InvalidInput, ProtocolError
from sandrun.model import OutputFile, show

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def local_path(path: str) -> str:
    """The name that a job gave a file, as a name for this machine: control characters as \\xNN.

    Raises: InvalidInput for one that would leave the directory.
    """
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts):
        raise InvalidInput("path", f"{show(path, 200)} is no path below a directory; it should not have been listed")
    return _UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", path)


class Saving:
    """One file on its way to disk. A `with` block that ends well leaves it complete, another one leaves nothing.

    Raises: FileExistsError unless `overwrite`; ProtocolError if the bytes are not those that were announced.
    """

    def __init__(self, directory: str | os.PathLike[str], file: OutputFile, *, overwrite: bool = False) -> None:
        self._file = file
        self._overwrite = overwrite
        self.path = os.path.join(os.fspath(directory), local_path(file.path))
        self._part = self.path
        if overwrite:
            self._part = os.path.join(os.path.dirname(self.path), f".sandrun-{secrets.token_hex(8)}.part")
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Self:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._stream = open(os.open(self._part, flags, 0o666), "wb")
        return self

    def write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._file.size:
            raise ProtocolError(f"{show(self._file.path, 200)}: more bytes came than were announced")
        self._hash.update(data)
        self._stream.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stream.close()
            if kind is None:
                if self._hash.hexdigest() != self._file.sha256:
                    raise ProtocolError(f"{show(self._file.path, 200)}: the bytes do not have the SHA-256 announced")
                if self._overwrite:
                    os.replace(self._part, self.path)
                return
        except BaseException:
            os.unlink(self._part)
            raise
        os.unlink(self._part)
