"""What a job writes to stdout and stderr: kept up to LOG_BYTES, then counted and dropped (requirement 33).

Readers ask by offset, so a slow one never holds up the job and misses nothing that was kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from sandrun.jobs.wakeup import Wakeup
from sandrun.model import LOG_BYTES


class LogBuffer:
    """One stream of one job.

    Attributes:
        total: bytes that the job wrote.
        truncated: how many of them were dropped; what is kept is always the beginning of the stream.
        ended: no more will come.
    """

    __slots__ = ("_changed", "_data", "_digest", "_grant", "ended", "total", "truncated")

    def __init__(self, changed: Wakeup, grant: Callable[[int], bool]) -> None:
        """`changed` is woken by every append and by the end; `grant` asks the store for bytes."""
        self._data = bytearray()
        self._digest = hashlib.sha256()
        self._changed = changed
        self._grant = grant
        self.total = 0
        self.truncated = 0
        self.ended = False

    @property
    def kept(self) -> int:
        """How many bytes can be read: offsets 0 to `kept`."""
        return len(self._data)

    def append(self, data: bytes) -> None:
        """Keep what still fits, count the rest. Nothing is kept after the first dropped byte: there are no holes."""
        self.total += len(data)
        if not self.truncated:
            room = LOG_BYTES - len(self._data)
            kept = data if len(data) <= room else data[:room]
            if kept and self._grant(len(kept)):
                self._data += kept
                self._digest.update(kept)
                self.truncated = self.total - len(self._data)
                self._changed.wake()
                return
        self.truncated = self.total - len(self._data)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._changed.wake()

    def read(self, offset: int = 0, most: int = LOG_BYTES) -> bytes:
        """At most `most` kept bytes from `offset` on; empty beyond the end."""
        return bytes(memoryview(self._data)[offset : offset + most])

    async def wait_for_more(self, offset: int, seconds: float | None = None) -> bool:
        """Until there is something to read at `offset`, or nothing more will come, or (False) `seconds` are over.

        Each change of the job starts `seconds` anew: it bounds silence, not the stream.
        """
        while len(self._data) <= offset and not self.ended:
            if not await self._changed.wait(seconds):
                return False
        return True

    @property
    def sha256(self) -> str:
        """Of the bytes that were kept."""
        return self._digest.hexdigest()

    def text(self) -> str:
        """All kept bytes as text, invalid UTF-8 replaced."""
        return self._data.decode("utf-8", "replace")

    def erase(self) -> None:
        """Forget the content and wake the readers, who then find the end."""
        self._data = bytearray()
        self.end()
