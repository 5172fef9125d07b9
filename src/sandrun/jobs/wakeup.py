"""Wakes every coroutine that waits for something to change; costs nothing while nobody waits."""

from __future__ import annotations

import asyncio


class Wakeup:
    """A condition without a lock, for one event loop: look, and if there is nothing to see, `wait` and look again.

    Nothing can change between the look and the wait, as both are in one step of the loop.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        waiters = self._waiters
        if waiters:
            self._waiters = set()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait(self, seconds: float | None = None) -> bool:
        """Until the next `wake`, at most `seconds`. Returns whether it was woken."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.add(waiter)
        timer = loop.call_later(seconds, _expire, waiter) if seconds is not None else None
        try:
            await waiter
            return True
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
            if timer is not None:
                timer.cancel()


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
