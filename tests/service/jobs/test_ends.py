"""How jobs, and the service, end before they would have: cancelled, erased, forgotten, drained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sandrun.errors import NotFound, Overloaded
from sandrun.model import Outcome, Status
from tests.service.job_world import World

# ---- cancel, erase, forget ----


async def test_queued_job_that_is_cancelled_never_starts(world: World):
    await world.submit()
    job = await world.submit()
    await world.service.cancel(job)
    assert (job.status, job.outcome) == (Status.FAILED, Outcome.CANCELLED)
    assert job.given.archive_fd == -1
    world.sandbox().end()
    await asyncio.sleep(0.01)
    assert len(world.spawner.sandboxes) == 1


async def test_cancelled_job_keeps_what_it_wrote(world: World):
    job = await world.run()
    world.sandbox().write("stdout", b"so far")
    cancelling = asyncio.create_task(world.service.cancel(job))
    await world.until(lambda: world.sandbox().cancels)
    world.sandbox().end(Outcome.CANCELLED)
    await cancelling
    assert (job.outcome, job.stdout.read()) == (Outcome.CANCELLED, b"so far")
    await world.service.cancel(job)  # nothing more to do
    assert world.sandbox().cancels == 1


async def test_erased_job_is_gone_at_once_though_it_still_dies(world: World):
    job = await world.run(outputs=["*"])
    world.sandbox().write("stdout", b"secret")
    await asyncio.sleep(0.001)
    waiting = asyncio.create_task(world.service.wait(job))
    await asyncio.sleep(0)
    world.service.erase(job)
    assert world.sandbox().cancels == 1
    assert await asyncio.wait_for(waiting, 1)
    with pytest.raises(NotFound):
        world.service.get(job.id)
    with pytest.raises(NotFound):
        world.service.result(job)
    world.sandbox().write("stdout", b"more")
    world.sandbox().write_output(b"late", b"1")
    await asyncio.sleep(0.001)
    assert (job.stdout.read(), job.outputs) == (b"", {})
    assert world.service.counts["store_used_bytes"] == 0
    assert world.service.counts["running"] == 1
    world.sandbox().end(Outcome.CANCELLED)
    await world.until(lambda: world.service.counts["running"] == 0)


async def test_reader_of_an_output_hears_that_it_was_erased(world: World):
    job = await world.run(outputs=["*"])
    world.sandbox().write_output(b"a", b"1")
    world.sandbox().end_outputs()
    world.sandbox().end()
    await world.service.wait(job, 5)
    output = job.outputs["a"]
    world.service.erase(job)
    with pytest.raises(NotFound):
        output.read(0, 1)


async def test_answered_run_is_erased_unless_it_is_to_be_kept(world: World):
    for keep in (False, True):
        job = await world.run(keep=keep)
        world.sandbox().end()
        await world.service.wait(job, 5)
        world.service.dismiss(job)
        assert job.erased is not keep
        await asyncio.sleep(0.001)
    assert world.service.get(job.id) is job


async def test_run_whose_client_leaves_is_stopped(world: World):
    job = await world.run()
    world.service.dismiss(job)
    assert world.sandbox().cancels == 1
    assert job.erased


async def test_failed_and_completed_jobs_have_times_of_their_own(new_world: Callable[..., World]):
    world = new_world(failed_ttl_seconds=1, ttl_seconds=50)
    for code in (0, 1):
        job = await world.submit()
        world.sandbox().end(exit_code=code)
        await world.service.wait(job, 5)
        assert job.ttl_seconds == (1 if code else 50)
        await asyncio.sleep(0.001)
    await asyncio.sleep(1.1)
    assert world.service.counts["known"] == 1
    with pytest.raises(NotFound):
        world.service.get(job.id)


# ---- the end of the server ----


@pytest.mark.requirement(35)
async def test_drain_refuses_new_jobs_and_lets_running_ones_finish(world: World):
    first, second = await world.submit(), await world.submit()
    draining = asyncio.create_task(world.service.drain(5))
    await asyncio.sleep(0.001)
    for attempt in (world.run(), world.submit()):
        with pytest.raises(Overloaded, match="shutting down"):
            await attempt
    assert second.outcome is Outcome.WORKER_LOST
    assert not draining.done()
    world.sandbox().end()
    await asyncio.wait_for(draining, 1)
    assert first.outcome is Outcome.EXITED
    assert world.sandbox().cancels == 0


@pytest.mark.requirement(35)
async def test_drain_stops_what_outlives_the_grace(world: World):
    job = await world.submit()
    draining = asyncio.create_task(world.service.drain(0.02))
    await world.until(lambda: world.sandbox().cancels)
    world.sandbox().end(Outcome.CANCELLED)
    await asyncio.wait_for(draining, 1)
    assert job.outcome is Outcome.CANCELLED


async def test_run_that_waits_when_the_server_drains_is_told_to_come_back(world: World):
    await world.submit()
    task = asyncio.create_task(world.run())
    await world.until(lambda: world.service.counts["queued"])
    draining = asyncio.create_task(world.service.drain(0))
    with pytest.raises(Overloaded):
        await asyncio.wait_for(task, 1)
    world.sandbox().end(Outcome.CANCELLED)
    await draining
