"""RAM is bounded, shared out between clients, and given back to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.errors import NotFound, Overloaded
from sandrun.jobs.clients import Client
from sandrun.jobs.store import ADMISSION_SHARE, Account, Store

ALICE, BOB = Client("192.0.2.1", 1), Client("192.0.2.2", 2)


@dataclass(eq=False)
class Job:
    id: str
    account: Account
    ttl_seconds: float = 100.0

    @property
    def client(self) -> Client:
        return self.account.client


@dataclass
class World:
    """A store in a time that only `pass_time` moves."""

    budget: int = 1000
    client_budget: int = 1000
    now: float = 0.0
    timers: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store: Store[Job] = Store(
            self.budget,
            self.client_budget,
            forget=self.forget,
            call_at=lambda when, call: self.timers.append((when, call)),
            clock=lambda: self.now,
        )

    def forget(self, job: Job) -> None:
        self.store.remove(job)
        job.account.close()
        self.forgotten.append(job.id)

    def ended(self, name: str, size: int, client: Client = ALICE, ttl: float = 100.0) -> Job:
        job = self.running(name, size, client, ttl)
        self.store.settle(job)
        return job

    def running(self, name: str, size: int, client: Client = ALICE, ttl: float = 100.0) -> Job:
        job = Job(name, self.store.open(client), ttl)
        job.account.take(size)
        self.store.add(job)
        return job

    def pass_time(self, to: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= to]:
            when, call = timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = when
            call()
        self.now = to


def test_unknown_and_erased_jobs_are_not_told_apart():
    world = World()
    job = world.ended("a", 1)
    world.forget(job)
    for job_id in ("a", "never was"):
        with pytest.raises(NotFound, match="no such job, or it has been erased"):
            world.store.get(job_id)


def test_ended_job_is_forgotten_when_its_time_is_over():
    world = World()
    world.ended("failed", 10, ttl=5)
    world.ended("completed", 10, ttl=60)
    world.pass_time(4.9)
    assert world.forgotten == []
    world.pass_time(5.1)
    assert world.forgotten == ["failed"]
    world.pass_time(60.1)
    assert world.forgotten == ["failed", "completed"]
    assert world.store.ledger.used_bytes == 0
    assert world.timers == []


def test_looking_at_a_job_starts_its_time_anew():
    world = World()
    world.ended("a", 10, ttl=60)
    world.pass_time(50)
    world.store.get("a")
    world.pass_time(109)
    assert world.forgotten == []
    world.pass_time(111)
    assert world.forgotten == ["a"]


def test_running_job_has_no_end_of_its_time():
    world = World()
    world.running("a", 10, ttl=1)
    world.pass_time(1000)
    assert world.store.get("a").id == "a"


def test_room_is_made_by_forgetting_the_oldest_ended_job():
    world = World()
    for name in ("one", "two", "three"):
        world.ended(name, 200)
    world.running("new", 400)
    assert world.forgotten == ["one", "two"]
    assert world.store.ledger.used_bytes == 600


def test_running_jobs_are_never_forgotten_for_room():
    world = World()
    world.running("a", 600)
    with pytest.raises(Overloaded, match="server's memory for jobs is full") as refused:
        world.store.open(BOB).take(200)
    assert not refused.value.client_at_fault
    assert world.forgotten == []


def test_clients_within_their_shares_stay_within_the_whole():
    world = World(client_budget=600)
    world.ended("a", 450)
    world.running("b", 400, BOB)
    assert world.forgotten == ["a"]
    assert world.store.ledger.used_bytes == 400
    account = world.store.open(ALICE)
    account.take(300)
    assert not account.grant(301)
    assert account.grant(300)


def test_client_over_its_share_pays_with_its_own_jobs_only():
    world = World(client_budget=400)
    world.ended("bob", 100, BOB)
    world.ended("alice", 200)
    world.running("alice again", 250)
    assert world.forgotten == ["alice"]
    with pytest.raises(Overloaded, match="this client's share") as refused:
        world.store.open(ALICE).take(200)
    assert refused.value.client_at_fault
    world.store.open(BOB).take(100)
    assert world.forgotten == ["alice"]


def test_uploads_leave_room_for_what_already_runs():
    world = World()
    job = world.running("a", int(1000 * ADMISSION_SHARE))
    with pytest.raises(Overloaded):
        world.store.open(BOB).take(1)
    assert job.account.grant(250)
    assert not job.account.grant(1)


def test_more_than_the_whole_budget_is_refused_without_forgetting_anything():
    world = World()
    world.ended("a", 100)
    with pytest.raises(Overloaded):
        world.store.open(BOB).take(5000)
    assert world.forgotten == []


def test_closed_account_gives_back_once_and_grants_nothing():
    world = World()
    account = world.store.open(ALICE)
    account.take(100)
    account.give_back(40)
    account.close()
    account.close()
    assert not account.grant(1)
    assert world.store.ledger.used_bytes == world.store.ledger.used_by(ALICE) == 0


def test_giving_back_more_than_is_held_gives_back_what_is_held():
    world = World()
    other = world.store.open(ALICE)
    other.take(50)
    account = world.store.open(ALICE)
    account.take(10)
    account.give_back(30)
    assert world.store.ledger.used_bytes == world.store.ledger.used_by(ALICE) == 50


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "grant", "back", "close", "settle"]), st.integers(0, 3), st.integers(0, 400)
        ),
        max_size=60,
    )
)
def test_ledger_is_the_sum_of_its_accounts_and_within_bounds(steps: list[tuple[str, int, int]]):
    world = World(client_budget=600)
    jobs = [world.running(str(n), 0, (ALICE, BOB)[n % 2]) for n in range(4)]
    for action, number, size in steps:
        job = jobs[number]
        try:
            if action == "take" and not job.account.closed:
                job.account.take(size)
            elif action == "grant":
                job.account.grant(size)
            elif action == "back":
                job.account.give_back(size)
            elif action == "settle":
                world.store.settle(job)
            else:
                world.forget(job)
        except Overloaded:
            pass
        ledger = world.store.ledger
        for client in (ALICE, BOB):
            assert ledger.used_by(client) == sum(job.account.held for job in jobs if job.client == client) <= 600
        assert ledger.used_bytes == ledger.used_by(ALICE) + ledger.used_by(BOB) <= 1000
