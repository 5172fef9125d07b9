"""The spawner's event loop: epoll and a heap of timers. No asyncio: privileged code stays small enough to read."""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable

SPARE_TIMERS = 64
"""Cancelled timers stay in the heap until there are more of them than of others, and than these."""


class Timer:
    """A call at a time of CLOCK_MONOTONIC."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Loop:
    """`refused` is called with a handler and the OSError that it raised; without one the error goes on."""

    def __init__(self, refused: Callable[[Callable[[], None], OSError], None]) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._timers: list[Timer] = []
        self._dropped = 0  # of them
        self._refused = refused

    def watch(self, descriptor: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call `handler` whenever `descriptor` is ready for `events`."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Before the descriptor is closed; no effect on one that is not watched."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self.at(time.monotonic() + seconds, call)

    def at(self, when: float, call: Callable[[], None]) -> Timer:
        timer = Timer(when, call)
        heapq.heappush(self._timers, timer)
        return timer

    def drop(self, timer: Timer | None) -> None:
        """Cancel a timer; no effect on one that has run."""
        if timer is None or timer.call is None:
            return
        timer.call = None
        self._dropped += 1
        if self._dropped > SPARE_TIMERS and self._dropped > len(self._timers) // 2:
            self._timers = [timer for timer in self._timers if timer.call is not None]
            heapq.heapify(self._timers)
            self._dropped = 0

    def turn(self) -> None:
        """Wait for something to happen, and see to it."""
        while self._timers and (self._timers[0].call is None or self._timers[0].when <= time.monotonic()):
            timer = heapq.heappop(self._timers)
            call, timer.call = timer.call, None
            if call is not None:
                self._call(call)
            else:
                self._dropped -= 1
        wait = max(0.0, self._timers[0].when - time.monotonic()) if self._timers else -1
        events = [(descriptor, self._handlers.get(descriptor)) for descriptor, _ in self._epoll.poll(wait)]
        for descriptor, handler in events:
            # a handler before this one may have closed the descriptor, and another taken its number
            if handler is not None and self._handlers.get(descriptor) is handler:
                self._call(handler)

    def _call(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except OSError as error:
            self._refused(handler, error)
