"""All outputs of a job as one tar.gz, made piece by piece out of RAM. The same files give the same bytes."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence

from sandrun.jobs.job import StoredOutput

READ_BYTES = 256 * 1024
PIECE_BYTES = 64 * 1024
LEVEL = 1
"""Outputs are fetched once, over a network that is seldom slower than deflate."""


class Packer:
    """`next_piece` until it returns None; in a thread, as it compresses."""

    def __init__(self, outputs: Sequence[StoredOutput]) -> None:
        self._outputs = sorted(outputs, key=lambda output: output.path)
        self._pieces = self._pack()

    def next_piece(self) -> bytes | None:
        """At most about READ_BYTES of work. Raises: NotFound if the job is erased meanwhile."""
        return next(self._pieces, None)

    def _pack(self) -> Iterator[bytes]:
        # A gzip member has a time and a name in its head; zlib's own head has neither.
        compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        for plain in self._tar():
            if piece := compressor.compress(plain):
                yield piece
        yield compressor.flush()

    def _tar(self) -> Iterator[bytes]:
        gathered = bytearray()
        for output in self._outputs:
            entry = tarfile.TarInfo(output.path)
            entry.size = output.size
            gathered += entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "replace")
            offset = 0
            while offset < output.size:
                gathered += output.read(offset, READ_BYTES)
                offset += READ_BYTES
                if len(gathered) >= PIECE_BYTES:
                    yield bytes(gathered)
                    gathered.clear()
            gathered += bytes(-output.size % tarfile.BLOCKSIZE)
        gathered += bytes(2 * tarfile.BLOCKSIZE)
        yield bytes(gathered)
