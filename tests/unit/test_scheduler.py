"""First come, first served, within what the host carries and one client may hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sandrun.errors import Overloaded
from sandrun.jobs.clients import Client
from sandrun.jobs.scheduler import Bounds, Scheduler

ALICE, BOB, CAROL = (Client(f"192.0.2.{n}", n) for n in (1, 2, 3))


@dataclass(eq=False)
class Job:
    name: str
    client: Client = ALICE
    memory_bytes: int = 10


@dataclass
class Host:
    """Starts whatever it is given, unless it was told to refuse."""

    started: list[str] = field(default_factory=list)
    refuses: bool = False

    def start(self, job: Job) -> bool:
        if not self.refuses:
            self.started.append(job.name)
        return not self.refuses


def make(**bounds: int) -> tuple[Scheduler[Job], Host]:
    all_bounds = {"active": 2, "memory_bytes": 1000, "client_running": 2, "queued": 100, "client_queued": 100}
    host = Host()
    return Scheduler(Bounds(**all_bounds | bounds), host.start), host


def put(scheduler: Scheduler[Job], *jobs: Job) -> None:
    for job in jobs:
        scheduler.reserve(job.client)
        scheduler.queue(job)


def test_jobs_start_in_the_order_of_their_coming():
    scheduler, host = make(active=1, client_running=1)
    jobs = [Job("a"), Job("b", BOB), Job("c")]
    put(scheduler, *jobs)
    assert host.started == ["a"]
    assert [scheduler.position(job) for job in jobs] == [None, 1, 2]
    scheduler.release(jobs[0])
    scheduler.release(jobs[1])
    assert host.started == ["a", "b", "c"]
    assert scheduler.queued == 0


def test_no_more_run_than_there_are_places():
    scheduler, host = make(active=2)
    put(scheduler, *(Job(str(n)) for n in range(5)))
    assert host.started == ["0", "1"]
    assert (scheduler.running, scheduler.queued) == (2, 3)


def test_the_promised_memory_is_bounded_and_a_large_job_is_not_overtaken():
    scheduler, host = make(active=9, client_running=9, memory_bytes=100)
    first, large, small = Job("first", memory_bytes=60), Job("large", memory_bytes=80), Job("small", BOB, 10)
    put(scheduler, first, large, small)
    assert host.started == ["first"]
    scheduler.release(first)
    assert host.started == ["first", "large", "small"]


def test_job_larger_than_all_memory_runs_alone():
    scheduler, host = make(memory_bytes=100)
    giant, other = Job("giant", memory_bytes=500), Job("other")
    put(scheduler, giant, other)
    assert host.started == ["giant"]
    scheduler.release(giant)
    assert host.started == ["giant", "other"]


def test_one_client_leaves_places_to_others():
    scheduler, host = make(active=4, client_running=1)
    put(scheduler, Job("a1"), Job("a2"), Job("b1", BOB), Job("c1", CAROL))
    assert host.started == ["a1", "b1", "c1"]


def test_client_over_its_queue_bound_is_at_fault_and_others_are_not_kept_out():
    scheduler, _ = make(active=1, client_queued=2)
    put(scheduler, Job("running"), Job("q1"), Job("q2"))
    with pytest.raises(Overloaded, match="2 jobs waiting") as refused:
        scheduler.reserve(ALICE)
    assert refused.value.client_at_fault
    put(scheduler, Job("b", BOB))


def test_full_queue_is_the_servers_fault_and_reservations_count():
    scheduler, _ = make(active=1, queued=2)
    put(scheduler, Job("running"), Job("q1"))
    scheduler.reserve(BOB)
    with pytest.raises(Overloaded, match="queue is full") as refused:
        scheduler.reserve(CAROL)
    assert not refused.value.client_at_fault
    scheduler.give_up(BOB)
    scheduler.reserve(CAROL)


def test_given_up_reservations_leave_nothing():
    scheduler, _ = make(client_queued=1, queued=1)
    for _ in range(10):
        scheduler.reserve(ALICE)
        scheduler.give_up(ALICE)
    put(scheduler, Job("a"))


def test_removing_the_job_that_others_wait_behind_lets_them_start():
    scheduler, host = make(active=9, client_running=9, memory_bytes=100)
    first, large, small = Job("first", memory_bytes=60), Job("large", memory_bytes=80), Job("small", memory_bytes=10)
    put(scheduler, first, large, small)
    assert scheduler.remove(large)
    assert host.started == ["first", "small"]
    assert not scheduler.remove(large)
    assert not scheduler.remove(first)


def test_refused_start_keeps_the_place_in_the_queue_until_it_is_tried_again():
    scheduler, host = make()
    host.refuses = True
    jobs = [Job("a"), Job("b", BOB)]
    put(scheduler, *jobs)
    assert (scheduler.running, scheduler.queued) == (0, 2)
    assert scheduler.position(jobs[0]) == 1
    host.refuses = False
    put(scheduler, Job("c", CAROL))
    assert host.started == []  # not before `resume`: each try costs the spawner a message
    scheduler.resume()
    assert host.started == ["a", "b"]


def test_job_that_ends_while_it_is_started_takes_no_place():
    ended: list[Job] = []

    def start(job: Job) -> bool:
        scheduler.release(job)
        ended.append(job)
        return True

    scheduler = Scheduler(Bounds(active=1, memory_bytes=99, client_running=1, queued=9, client_queued=9), start)
    put(scheduler, *(Job(str(n)) for n in range(3)))
    assert [job.name for job in ended] == ["0", "1", "2"]
    assert (scheduler.running, scheduler.queued) == (0, 0)


def test_releasing_twice_frees_one_place():
    scheduler, host = make(active=1)
    jobs = [Job(str(n)) for n in range(3)]
    put(scheduler, *jobs)
    scheduler.release(jobs[0])
    scheduler.release(jobs[0])
    assert host.started == ["0", "1"]


def test_a_sleeping_job_gives_its_place_back_and_takes_it_again():
    scheduler, host = make(active=1, client_running=9)
    first, second, third = Job("first"), Job("second"), Job("third")
    put(scheduler, first, second, third)
    scheduler.set_active(first, False)
    assert host.started == ["first", "second"]
    scheduler.set_active(first, True)
    scheduler.release(second)
    assert host.started == ["first", "second"]
    scheduler.release(first)
    assert host.started == ["first", "second", "third"]
