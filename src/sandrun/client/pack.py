"""A directory as an archive for `/submit`: gzip'd tar, the same bytes for the same files on every machine.

Owners and times are left out, the order is that of the paths. Every file is packed, or the directory is refused: only
what is named `__pycache__` or `.git` is left behind, for a server takes 1000 members and neither is ever input.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Collection, Iterator, Mapping

from sandrun.errors import InvalidInput
from sandrun.model import ARCHIVE_BYTES, ARCHIVE_MEMBERS, check_path, show

LEFT_BEHIND = frozenset({"__pycache__", ".git"})
_LEVEL = 4
"""Of gzip: half the time of its default, within a few per cent of its size."""


def pack_directory(directory: str | os.PathLike[str]) -> bytes:
    """Pack all below `directory`: regular files, empty directories, and symbolic links that stay inside.

    Raises: InvalidInput naming the first path that no server would take; OSError if something cannot be read.
    """
    root = os.fspath(directory)
    if not os.path.isdir(root):
        raise InvalidInput("files", f"{show(root, 200)} is not a directory")
    archive = _Archive()
    for path, status in _walk(root):
        full = os.path.join(root, path)
        if stat.S_ISREG(status.st_mode):
            archive.add_file(
                path, _read(full, ARCHIVE_BYTES - archive.size + 1), executable=bool(status.st_mode & 0o111)
            )
        elif stat.S_ISLNK(status.st_mode):
            archive.add_link(path, os.readlink(full))
        elif stat.S_ISDIR(status.st_mode):
            archive.add_directory(path)
        else:
            raise InvalidInput("files", f"{show(path, 200)} is neither a file, a directory nor a symbolic link")
    return archive.close()


def pack_files(files: Mapping[str, bytes | str], *, executable: Collection[str] = ()) -> bytes:
    """Pack files that exist in memory only. Raises: InvalidInput for a path that no server would take."""
    archive = _Archive()
    for path in sorted(files):
        content = files[path]
        archive.add_file(path, content.encode() if isinstance(content, str) else content, executable=path in executable)
    return archive.close()


def _walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Paths relative to `root`, in order. Directories only where they are empty: a file implies those above it."""
    pending = [""]
    while pending:
        directory = pending.pop()
        names = sorted(name for name in os.listdir(os.path.join(root, directory)) if name not in LEFT_BEHIND)
        if not names and directory:
            yield directory, os.lstat(os.path.join(root, directory))
        below = []
        for name in names:
            path = os.path.join(directory, name)
            status = os.lstat(os.path.join(root, path))
            if stat.S_ISDIR(status.st_mode):
                below.append(path)
            else:
                yield path, status
        pending.extend(reversed(below))


def _read(path: str, most: int) -> bytes:
    # O_NONBLOCK: a FIFO that took the file's place since lstat would hang us here.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        return stream.read(most)


class _Archive:
    """Counts as the server will, so that a directory too large is refused before it is sent."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=self._buffer, mtime=0)
        self._tar = tarfile.TarFile(fileobj=self._gzip, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8")
        self.size = 0
        self._members = 0

    def add_file(self, path: str, content: bytes, *, executable: bool) -> None:
        self.size += len(content)
        if self.size > ARCHIVE_BYTES:
            raise InvalidInput(
                "files", f"{show(path, 200)}: the files have more than {ARCHIVE_BYTES >> 20} MiB together"
            )
        member = self._member(path, tarfile.REGTYPE, 0o755 if executable else 0o644)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))

    def add_directory(self, path: str) -> None:
        self._tar.addfile(self._member(path, tarfile.DIRTYPE, 0o755))

    def add_link(self, path: str, target: str) -> None:
        climbed = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if os.path.isabs(target) or climbed == ".." or climbed.startswith("../"):
            raise InvalidInput("files", f"{show(path, 200)} is a symbolic link out of the directory: {show(target)}")
        member = self._member(path, tarfile.SYMTYPE, 0o777)
        member.linkname = target
        self._tar.addfile(member)

    def close(self) -> bytes:
        if not self._members:
            raise InvalidInput("files", "there is nothing to send")
        self._tar.close()
        self._gzip.close()
        return self._buffer.getvalue()

    def _member(self, path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        self._members += 1
        if self._members > ARCHIVE_MEMBERS:
            raise InvalidInput("files", f"there are more than {ARCHIVE_MEMBERS} files, directories and links")
        member = tarfile.TarInfo(check_path(path, "files"))
        member.type = kind
        member.mode = mode
        return member
