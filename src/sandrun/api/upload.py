"""The body of `POST /submit`: multipart, straight from the socket into a sealed memory file, never a temporary one.

Parts in either order: `files` (one gzip'd tar) and perhaps `manifest` (JSON). A manifest that comes first is checked
before the files cost anything.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from starlette.requests import Request

from sandrun.api.problems import Refused
from sandrun.api.requests import body_pieces
from sandrun.errors import InvalidInput, Overloaded, TooLarge
from sandrun.jobs.memfile import SEALS
from sandrun.model import ARCHIVE_BYTES, MANIFEST_BYTES, show

ENVELOPE_BYTES = 64 * 1024
"""What boundaries and part headers may add."""
BODY_BYTES = ARCHIVE_BYTES + MANIFEST_BYTES + ENVELOPE_BYTES
PARTS = ("files", "manifest")

_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


class Account(Protocol):
    """Where the bytes of an upload are charged while they come in; see `jobs.store.Account`."""

    def take(self, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Upload:
    """A submission as it came.

    Attributes:
        archive_fd: a sealed memory file at offset 0, the caller's to close.
        manifest: the part's bytes; None if there was none.
    """

    archive_fd: int
    manifest: bytes | None


class MemoryFile:
    """A memory file that is filled and then sealed; `close` unless `seal` handed it on."""

    def __init__(self) -> None:
        self.size = 0
        with _overloaded_when_used_up():
            self._descriptor = os.memfd_create("upload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        with _overloaded_when_used_up():
            while left:
                left = left[os.write(self._descriptor, left) :]
        self.size += len(data)

    def seal(self) -> int:
        """Nobody can change it from now on, not we either. Returns the descriptor, the caller's now."""
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def _overloaded_when_used_up() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _USED_UP:
            raise
        reason = "the server has no descriptor or memory to spare"
        raise Overloaded(reason, retry_after_seconds=5, client_at_fault=False) from None


async def receive_upload(request: Request, account: Account, check_manifest: Callable[[bytes], None]) -> Upload:
    """Read the whole body.

    Args:
        account: charged for each piece before it is kept; the caller closes it if this raises.
        check_manifest: called as soon as the manifest is there; what it raises ends the upload.

    Raises: Refused, InvalidInput naming the part, TooLarge, Overloaded, Gone.
    """
    boundary = _boundary(request)
    parser = PushMultipartParser(boundary, max_header_size=4096, max_header_count=8, max_segment_count=len(PARTS) + 1)
    archive: MemoryFile | None = None
    manifest: bytearray | None = None
    part = ""
    try:
        async for piece in body_pieces(request, BODY_BYTES, "files"):
            for event in parser.parse(piece):
                if isinstance(event, MultipartSegment):
                    part = event.name or ""
                    if part not in PARTS:
                        accepted = " and ".join(PARTS)
                        raise InvalidInput(show(part), f"is not a part of a submission; accepted: {accepted}")
                    if (archive if part == "files" else manifest) is not None:
                        raise InvalidInput(part, "is sent twice")
                    if part == "files":
                        archive = MemoryFile()
                    else:
                        manifest = bytearray()
                elif event is None:
                    if part == "manifest" and manifest is not None:
                        check_manifest(bytes(manifest))
                elif part == "files" and archive is not None:
                    if archive.size + len(event) > ARCHIVE_BYTES:
                        raise TooLarge("files", ARCHIVE_BYTES)
                    account.take(len(event))
                    archive.write(event)
                elif manifest is not None:
                    if len(manifest) + len(event) > MANIFEST_BYTES:
                        raise InvalidInput("manifest", f"is larger than {MANIFEST_BYTES} bytes")
                    account.take(len(event))
                    manifest += event
        parser.close()  # raises if the last boundary never came
        if archive is None:
            raise InvalidInput("files", "is missing: send one gzip'd tar as the part `files`")
        return Upload(archive.seal(), None if manifest is None else bytes(manifest))
    except MultipartError:
        details = "this is not multipart/form-data as its Content-Type announces it, or it was cut short"
        raise Refused(400, "bad_request", details, field="body") from None
    finally:
        if archive is not None:
            archive.close()


def _boundary(request: Request) -> str:
    """Raises: Refused 415 unless the body is announced as multipart/form-data."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary: str = options.get("boundary", "")
    if kind != "multipart/form-data" or not 1 <= len(boundary) <= 200 or not boundary.isascii():
        details = "send multipart/form-data with the part `files` (curl -F files=@job.tar.gz -F manifest=@job.json)"
        raise Refused(415, "unsupported_media_type", details, field="Content-Type")
    return boundary
