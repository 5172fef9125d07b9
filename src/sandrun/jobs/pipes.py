"""Reading a running job's pipes without ever waiting for it, or letting it wait for us."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

PIECE_BYTES = 64 * 1024  # the capacity of a pipe
PIECES_AT_END = 64  # read in one go when a job is over, so that its end is told in the same step of the loop


class PipeReader:
    """Owns the read end of one pipe. Each piece goes to `take`; `closed` is set at end of file, and `at_end` called."""

    __slots__ = ("_at_end", "_descriptor", "_loop", "_take", "closed")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        descriptor: int,
        take: Callable[[bytes], None],
        at_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._descriptor = descriptor
        self._take = take
        self._at_end = at_end
        self.closed = False
        loop.add_reader(descriptor, self._read)

    def drain(self) -> None:
        """Read what is there now."""
        for _ in range(PIECES_AT_END):
            if self.closed or not self._read():
                return

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._at_end()

    def _read(self) -> bool:
        """One piece, so that a job that writes without end leaves room for others. False if there was none."""
        try:
            piece = os.read(self._descriptor, PIECE_BYTES)
        except BlockingIOError:
            return False
        if piece:
            self._take(piece)
        else:
            self.close()
        return True
