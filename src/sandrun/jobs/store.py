"""The RAM that uploads, logs and outputs may use, and when jobs are forgotten: after their time, or oldest first.

Everything of a job lives here and nowhere else: no disk, no swap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from sandrun.errors import NotFound, Overloaded
from sandrun.jobs.clients import Client

ADMISSION_SHARE = 0.75
"""The part of the budget that uploads may fill: the rest is for the logs and outputs of what already runs."""
RETRY_SECONDS = 10


class Account:
    """The bytes held for one upload, and then for the job that it becomes. `close` gives all of them back, once."""

    __slots__ = ("_ledger", "client", "closed", "held")

    def __init__(self, ledger: Ledger, client: Client) -> None:
        self._ledger = ledger
        self.client = client
        self.held = 0
        self.closed = False

    def take(self, size: int) -> None:
        """Hold `size` bytes more, for something that can still be refused.

        Raises: Overloaded, naming whose share is full.
        """
        self._ledger.take(self, size)

    def grant(self, size: int) -> bool:
        """Hold `size` bytes more for a job that runs; False if they cannot be had, and the bytes must be dropped."""
        return self._ledger.grant(self, size)

    def give_back(self, size: int) -> None:
        self._ledger.give_back(self, size)

    def close(self) -> None:
        if not self.closed:
            self._ledger.give_back(self, self.held)
            self.closed = True


class Ledger:
    """Who holds how much. `evict` is asked to make room before anything is refused."""

    def __init__(self, budget_bytes: int, client_bytes: int, evict: Callable[[Client | None], bool]) -> None:
        """`evict` forgets the oldest ended job (of that client, if one is given); False if there is none."""
        self.budget_bytes = budget_bytes
        self.client_bytes = client_bytes
        self.used_bytes = 0
        self._clients: dict[int, int] = {}
        self._evict = evict

    def used_by(self, client: Client) -> int:
        return self._clients.get(client.tag, 0)

    def take(self, account: Account, size: int) -> None:
        if not self._make_room(account, size, ADMISSION_SHARE):
            own = self.used_by(account.client) + size > self.client_bytes * ADMISSION_SHARE
            whose = "this client's share of the server's memory" if own else "the server's memory for jobs"
            raise Overloaded(f"{whose} is full", retry_after_seconds=RETRY_SECONDS, client_at_fault=own)
        self._hold(account, size)

    def grant(self, account: Account, size: int) -> bool:
        if account.closed or not self._make_room(account, size, 1.0):
            return False
        self._hold(account, size)
        return True

    def give_back(self, account: Account, size: int) -> None:
        size = min(size, account.held)
        account.held -= size
        self.used_bytes -= size
        left = self._clients.get(account.client.tag, 0) - size
        if left > 0:
            self._clients[account.client.tag] = left
        else:
            self._clients.pop(account.client.tag, None)

    def _hold(self, account: Account, size: int) -> None:
        account.held += size
        self.used_bytes += size
        self._clients[account.client.tag] = self.used_by(account.client) + size

    def _make_room(self, account: Account, size: int, share: float) -> bool:
        """A client over its own share pays with its own oldest jobs, never with another's."""
        own, whole = self.client_bytes * share, self.budget_bytes * share
        if size > own or size > whole:
            return False
        while self.used_by(account.client) + size > own:
            if not self._evict(account.client):
                return False
        while self.used_bytes + size > whole:
            if not self._evict(None):
                return False
        return True


class Kept(Protocol):
    """What the store must know of a job."""

    @property
    def id(self) -> str: ...
    @property
    def client(self) -> Client: ...
    @property
    def ttl_seconds(self) -> float:
        """How long it is kept after it ended or was last looked at."""


J = TypeVar("J", bound=Kept)


SPARE_DEADLINES = 64
"""Deadlines of jobs that are gone, before they are swept out."""


class Store(Generic[J]):
    """All jobs by id. Ended ones are forgotten when their time is over, or oldest first when room is needed."""

    def __init__(
        self,
        budget_bytes: int,
        client_bytes: int,
        *,
        forget: Callable[[J], None],
        call_at: Callable[[float, Callable[[], None]], object],
        clock: Callable[[], float],
    ) -> None:
        """`forget` must `remove` the job and close its account. `call_at` and `clock` are the event loop's."""
        self.ledger = Ledger(budget_bytes, client_bytes, self._evict)
        self._forget = forget
        self._call_at = call_at
        self._clock = clock
        self._jobs: dict[str, J] = {}
        self._ended: dict[str, float] = {}  # id -> when it is forgotten; the order is that of their ends
        self._deadlines: list[tuple[float, str]] = []
        self._wake_at: float | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def jobs(self) -> list[J]:
        return list(self._jobs.values())

    def open(self, client: Client) -> Account:
        """An account without a byte, for something that is being received."""
        return Account(self.ledger, client)

    def add(self, job: J) -> None:
        self._jobs[job.id] = job

    def get(self, job_id: str) -> J:
        """The job, whose time starts anew. Raises: NotFound."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound("no such job, or it has been erased")
        if job_id in self._ended:  # its entry in the heap stays as it is and is moved when it comes up
            self._ended[job_id] = self._clock() + job.ttl_seconds
        return job

    def settle(self, job: J) -> None:
        """The job has ended: from now on it may be forgotten."""
        if job.id not in self._jobs or job.id in self._ended:
            return
        deadline = self._clock() + job.ttl_seconds
        self._ended[job.id] = deadline
        heapq.heappush(self._deadlines, (deadline, job.id))
        self._arm()

    def remove(self, job: J) -> bool:
        """Forget it; False if it was not there."""
        if self._ended.pop(job.id, None) is not None and len(self._deadlines) > 2 * len(self._ended) + SPARE_DEADLINES:
            self._deadlines = [(deadline, job_id) for job_id, deadline in self._ended.items()]  # no id outlives its job
            heapq.heapify(self._deadlines)
        return self._jobs.pop(job.id, None) is not None

    def _evict(self, client: Client | None) -> bool:
        for job_id in self._ended:
            job = self._jobs[job_id]
            if client is None or job.client.tag == client.tag:
                self._forget(job)
                return True
        return False

    def _arm(self) -> None:
        """One timer for the earliest deadline. An earlier one replaces none: the later simply finds nothing to do."""
        if self._deadlines and (self._wake_at is None or self._deadlines[0][0] < self._wake_at):
            self._wake_at = self._deadlines[0][0]
            self._call_at(self._wake_at, self._expire)

    def _expire(self) -> None:
        now = self._clock()
        self._wake_at = None
        while self._deadlines and self._deadlines[0][0] <= now:
            _, job_id = heapq.heappop(self._deadlines)
            deadline = self._ended.get(job_id)
            if deadline is None:
                continue
            if deadline > now:
                heapq.heappush(self._deadlines, (deadline, job_id))
            else:
                self._forget(self._jobs[job_id])
        self._arm()
