"""Which job runs next: first come, first served, within what the host can carry and what one client may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sandrun.errors import Overloaded
from sandrun.jobs.clients import Client

RETRY_SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much at once.

    Attributes:
        active: sandboxes that use CPU; one that sleeps gives its place back, and takes it again when it wakes.
        memory_bytes: the sum of their limits; one job alone may exceed it, or it would wait for ever.
        client_running: sandboxes of one client.
        queued, client_queued: jobs that wait, in all and of one client, those being admitted included.
    """

    active: int
    memory_bytes: int
    client_running: int
    queued: int
    client_queued: int


class Runnable(Protocol):
    """What the scheduler must know of a job."""

    @property
    def client(self) -> Client: ...
    @property
    def memory_bytes(self) -> int: ...


R = TypeVar("R", bound=Runnable)


class Scheduler(Generic[R]):
    """The queue and what has left it. Every change tries to start what may start: there is no timer."""

    def __init__(self, bounds: Bounds, start: Callable[[R], bool]) -> None:
        """`start` starts a job and returns True, or returns False for "not now": nothing more starts until `resume`."""
        self.bounds = bounds
        self._start = start
        self._queue: dict[R, None] = {}
        self._running: set[R] = set()
        self._active: set[R] = set()
        self._memory_bytes = 0
        self._waiting: dict[int, int] = {}  # client tag -> queued jobs and reservations
        self._places: dict[int, int] = {}  # client tag -> running jobs
        self._reserved = 0
        self._paused = False
        self._dispatching = False

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    def reserve(self, client: Client) -> None:
        """Hold a place in the queue for a job that is being admitted. `queue` or `give_up` must follow.

        Raises: Overloaded, naming whose bound is reached.
        """
        if self._waiting.get(client.tag, 0) >= self.bounds.client_queued:
            reason = f"this client already has {self.bounds.client_queued} jobs waiting"
            raise Overloaded(reason, retry_after_seconds=RETRY_SECONDS, client_at_fault=True)
        if len(self._queue) + self._reserved >= self.bounds.queued:
            raise Overloaded("the queue is full", retry_after_seconds=RETRY_SECONDS, client_at_fault=False)
        self._reserved += 1
        _count(self._waiting, client, 1)

    def give_up(self, client: Client) -> None:
        """Give a reservation back."""
        self._reserved -= 1
        _count(self._waiting, client, -1)

    def queue(self, job: R) -> None:
        """Turn a reservation into a place at the end of the queue. The job may have started when this returns."""
        self._reserved -= 1
        self._queue[job] = None
        self._dispatch()

    def remove(self, job: R) -> bool:
        """Take a job out of the queue; False if it was not in it."""
        if job not in self._queue:
            return False
        self._leave_queue(job)
        self._dispatch()  # it may have been the one that all others waited behind
        return True

    def release(self, job: R) -> None:
        """A job that was started is over."""
        if job in self._running:
            self._running.remove(job)
            self._active.discard(job)
            self._memory_bytes -= job.memory_bytes
            _count(self._places, job.client, -1)
            self._dispatch()

    def set_active(self, job: R, active: bool) -> None:
        """A running job has begun to sleep, or has woken. Waking ones are not held up: the bound is for starting."""
        if active and job in self._running:
            self._active.add(job)
        elif not active and job in self._active:
            self._active.remove(job)
            self._dispatch()

    def resume(self) -> None:
        """`start` said "not now": try again."""
        self._paused = False
        self._dispatch()

    def position(self, job: R) -> int | None:
        """From 1; None if the job is not in the queue."""
        if job not in self._queue:
            return None
        for number, other in enumerate(self._queue, 1):
            if other is job:
                return number
        return None

    def _leave_queue(self, job: R) -> None:
        del self._queue[job]
        _count(self._waiting, job.client, -1)

    def _next(self) -> R | None:
        """The first job whose client has a place left. A large one is waited for, not overtaken, or it would starve."""
        if len(self._active) >= self.bounds.active:
            return None
        for job in self._queue:
            if self._places.get(job.client.tag, 0) >= self.bounds.client_running:
                continue
            fits = self._memory_bytes + job.memory_bytes <= self.bounds.memory_bytes
            return job if fits or not self._running else None
        return None

    def _dispatch(self) -> None:
        if self._dispatching:  # `start` may end a job at once and so come back here
            return
        self._dispatching = True
        try:
            while not self._paused and (job := self._next()) is not None:
                self._running.add(job)
                self._active.add(job)
                self._memory_bytes += job.memory_bytes
                _count(self._places, job.client, 1)
                if self._start(job):
                    self._leave_queue(job)
                else:
                    self._paused = True
                    self.release(job)
        finally:
            self._dispatching = False


def _count(counts: dict[int, int], client: Client, change: int) -> None:
    left = counts.get(client.tag, 0) + change
    if left > 0:
        counts[client.tag] = left
    else:
        counts.pop(client.tag, None)
