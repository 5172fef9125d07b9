"""Reading the collector's stream, told in `sandbox.collect`. Its writer ran as the job: nothing in it is believed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sandrun.errors import ProtocolError
from sandrun.model import OutputFile
from sandrun.sandbox.collect import (
    BEGIN,
    BROKEN,
    COMPLETE,
    DATA,
    END,
    FILES,
    FRAME,
    OUTPUT_BYTES,
    PATH_BYTES,
    PIECE_BYTES,
    SIZE,
)


class OutputsParser:
    """Takes the stream in pieces of any length. Holds one file at a time; at most `OUTPUT_BYTES` pass through it.

    Attributes:
        omitted: files that did not come: left out by the collector, broken, or two that would be shown by one path.
        ended: whether the end of the stream was met.
        total: bytes met so far.
    """

    def __init__(self) -> None:
        self.omitted = 0
        self.ended = False
        self.total = 0
        self._frame = bytearray()  # a frame's head, then what BEGIN carries
        self._needed = FRAME.size
        self._data_left = 0  # of the DATA frame that is being read
        self._files = 0
        self._promised = 0
        self._shown: set[str] = set()
        self._size = 0  # what was promised of the file that is being read
        self._path: str | None = None  # None between files
        self._content = bytearray()
        self._digest = hashlib.sha256()

    def feed(self, piece: bytes) -> Iterator[tuple[OutputFile, bytearray]]:
        """Yield the files that `piece` completes, each with its content. Exhaust it before the next.

        Raises: ProtocolError: the stream is malformed; what was yielded before stands, no more can be read.
        """
        self.total += len(piece)
        rest = memoryview(piece)
        while rest:
            if self.ended:
                raise ProtocolError("outputs: data after the end")
            if self._data_left:
                taken = rest[: self._data_left]
                rest = rest[len(taken) :]
                self._data_left -= len(taken)
                self._content += taken  # it grows with what comes: a promised size costs nobody anything
                self._digest.update(taken)
                continue
            taken = rest[: self._needed - len(self._frame)]
            rest = rest[len(taken) :]
            self._frame += taken
            if len(self._frame) < self._needed:
                return
            kind, length = FRAME.unpack_from(self._frame)
            if kind == BEGIN and len(self._frame) == FRAME.size:
                if self._path is not None or not SIZE.size < length <= SIZE.size + PATH_BYTES:
                    raise ProtocolError("outputs: a file begins where it may not, or its path is too long")
                self._needed = FRAME.size + length
                continue
            if kind == BEGIN:
                self._begin(bytes(self._frame[FRAME.size :]))
            elif kind == DATA:
                if self._path is None or not 0 < length <= min(PIECE_BYTES, self._size - len(self._content)):
                    raise ProtocolError("outputs: content that no file has room for")
                self._data_left = length
            elif kind == END:
                if self._path is not None:
                    raise ProtocolError("outputs: the end, inside a file")
                self.omitted += length
                self.ended = True
            elif length or self._path is None:
                raise ProtocolError("outputs: a frame that has no meaning here")
            elif kind == COMPLETE:
                yield from self._complete()
            elif kind == BROKEN:
                self.omitted += 1
                self._path, self._content = None, bytearray()
            else:
                raise ProtocolError("outputs: a frame of unknown kind")
            self._frame.clear()
            self._needed = FRAME.size

    def _begin(self, told: bytes) -> None:
        (size,) = SIZE.unpack_from(told)
        path = told[SIZE.size :]
        self._files += 1
        self._promised += size
        if self._files > FILES or self._promised > OUTPUT_BYTES:
            raise ProtocolError("outputs: more files or bytes than there may be")
        if b"\0" in path or any(part in (b"", b".", b"..") for part in path.split(b"/")):
            raise ProtocolError("outputs: a path that is not one")
        self._path = path.decode("utf-8", "backslashreplace")
        self._content = bytearray()
        self._size = size
        self._digest = hashlib.sha256()

    def _complete(self) -> Iterator[tuple[OutputFile, bytearray]]:
        path, content = self._path, self._content
        if path is None or self._size != len(content):
            raise ProtocolError("outputs: a file is complete before all of it has come")
        self._path, self._content = None, bytearray()
        if path in self._shown:
            self.omitted += 1
            return
        self._shown.add(path)
        yield OutputFile(path=path, size=len(content), sha256=self._digest.hexdigest()), content
