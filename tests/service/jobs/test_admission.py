"""What is taken on, what waits, and what is refused with nothing kept."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from sandrun.errors import InvalidInput, Overloaded
from sandrun.jobs import intake, service
from sandrun.jobs.memfile import sealed
from sandrun.model import MIB, Outcome, Status
from tests.service.job_world import World, tar

# ---- the queue ----


async def test_next_job_starts_when_one_ends(world: World):
    first = await world.submit()
    second = await world.submit()
    assert (first.status, second.status) == (Status.RUNNING, Status.QUEUED)
    assert world.service.result(second).position == 1
    world.sandbox().end()
    assert await world.service.wait(first, 5)
    await asyncio.sleep(0)
    assert second.status is Status.RUNNING
    assert world.service.result(second).position is None


@pytest.mark.requirement(34)
async def test_jobs_of_a_dead_spawner_are_lost_and_waiting_ones_run_on_the_next(world: World):
    first, second = await world.submit(), await world.submit()
    world.spawner.lose()
    assert await world.service.wait(first, 5)
    assert (first.status, first.outcome) == (Status.FAILED, Outcome.WORKER_LOST)
    await world.until(lambda: world.spawner.attempts > 3)
    assert second.status is Status.QUEUED
    world.spawner.refuses = None
    await world.until(lambda: second.status is Status.RUNNING)


@pytest.mark.requirement(34)
async def test_job_that_cannot_be_started_for_want_of_descriptors_fails_alone(world: World):
    world.spawner.refuses = OSError(errno.EMFILE, "Too many open files")
    job = await world.submit()
    assert (job.outcome, job.given.archive_fd) == (Outcome.SETUP_FAILED, -1)
    assert job.failure is not None
    assert (job.failure.step, job.failure.errno) == ("start", errno.EMFILE)
    await asyncio.sleep(0)
    world.spawner.refuses = None
    assert (await world.run()).status is Status.RUNNING


async def test_run_that_waits_too_long_is_sent_away_with_nothing_kept(new_world: Callable[..., World]):
    world = new_world(run_queue_seconds=0.1)
    first = await world.submit()
    held = world.service.counts["store_used_bytes"]
    with pytest.raises(Overloaded, match=r"waited 0\.1 s") as refused:
        await asyncio.wait_for(world.run(), 5)
    assert not refused.value.client_at_fault
    assert refused.value.retry_after_seconds > 0
    assert world.service.counts["store_used_bytes"] == held
    assert (world.service.counts["queued"], world.service.counts["known"]) == (0, 1)
    assert first.status is Status.RUNNING


async def test_run_whose_client_leaves_while_it_waits_is_taken_out(world: World):
    await world.submit()
    task = asyncio.create_task(world.run())
    await world.until(lambda: world.service.counts["queued"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (world.service.counts["queued"], world.service.counts["known"]) == (0, 1)


async def test_run_that_waited_goes_on_when_it_is_its_turn(world: World):
    await world.submit()
    task = asyncio.create_task(world.run())
    await world.until(lambda: world.service.counts["queued"])
    world.sandbox().end()
    job = await asyncio.wait_for(task, 5)
    assert job.status is Status.RUNNING


async def test_client_over_its_queue_bound_is_refused_before_its_archive_is_read(new_world: Callable[..., World]):
    world = new_world(client_queued_jobs=1)
    await world.submit()
    await world.submit()
    with pytest.raises(Overloaded, match="1 jobs waiting"):
        await world.submit(b"not looked at")


# ---- refusals keep nothing ----


@pytest.mark.requirement(29)
@pytest.mark.parametrize(
    ("field", "archive", "manifest"),
    [
        ("files", b"not a tar", {"entrypoint": "main.py"}),
        ("entrypoint", None, {"entrypoint": "other.py"}),
        ("entrypoint", None, {}),
        ("interpreter", None, {"entrypoint": "main.py", "interpreter": "node"}),
        ("interpreter", None, {"entrypoint": "main.py", "interpreter": "cobol"}),
        ("environment", None, {"entrypoint": "main.py", "environment": "torch"}),
        ("memory_mb", tar(**{"main.py": b"", "large": b"\0" * (40 * MIB)}), {"entrypoint": "main.py", "memory_mb": 64}),
        ("timeout", None, {"entrypoint": "main.py", "timeout": 301}),
        ("manifest", None, None),
        ("args", None, {"entrypoint": "main.py", "args": ["x" * 100_000], "env": ["y" * 100_000]}),
    ],
)
async def test_refused_submission_leaves_nothing(
    world: World, field: str, archive: bytes | None, manifest: dict[str, Any] | None
):
    descriptor = sealed("upload", archive or tar(**{"main.py": b""}))
    text = None if manifest is None else json.dumps(manifest).encode()
    with pytest.raises(InvalidInput) as refused:
        await world.service.submit(world.alice, descriptor, text)
    assert refused.value.field in (field, "env" if field == "args" else field)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    world.assert_empty()


async def test_what_this_server_lacks_is_refused_with_what_it_has(world: World):
    with pytest.raises(InvalidInput, match="accepted: bash, python3"):
        await world.run(interpreter="perl")
    with pytest.raises(InvalidInput, match="accepted: data"):
        await world.run(environment="torch")
    with pytest.raises(InvalidInput, match=r"broken.* is withdrawn \(preload numpy: .*\); accepted: data$"):
        await world.run(environment="broken")
    assert (await world.run(environment="data")).status is Status.RUNNING


@pytest.mark.requirement(27)
async def test_run_with_conflicting_files_leaves_nothing(world: World):
    with pytest.raises(InvalidInput):
        await world.run(files={"a": "", "a/b": ""})
    world.assert_empty()


async def test_run_of_large_files_is_packed_in_a_thread_and_arrives(world: World):
    job = await world.run(files={"data": "y" * 200_000}, stdin="z" * 70_000)
    assert b"y" * 65_536 in world.sandbox().archive
    assert world.sandbox().stdin == b"z" * 70_000
    assert {file.path: file.size for file in job.inputs} == {"main.py": 14, "data": 200_000}


async def test_manifest_in_the_archive_is_taken(world: World):
    archive = tar(**{"main.py": b"", "job.json": b'{"entrypoint": "main.py", "timeout": 7}'})
    job = await world.service.submit(world.alice, sealed("upload", archive), None)
    assert job.manifest.timeout == 7


async def test_submission_whose_client_leaves_during_the_check_is_not_queued(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    checked = asyncio.Event()
    loop = asyncio.get_running_loop()
    check = intake.check_upload

    def slow(*args: Any) -> Any:
        loop.call_soon_threadsafe(checked.set)
        return check(*args)

    monkeypatch.setattr(service, "check_upload", slow)
    task = asyncio.create_task(world.submit())
    await checked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.assert_empty()


async def test_store_without_room_refuses_and_keeps_nothing(new_world: Callable[..., World]):
    world = new_world(store_bytes=MIB)
    with pytest.raises(Overloaded, match="share of the server's memory"):
        await world.run(stdin="x" * (MIB // 2))
    world.assert_empty()


async def test_account_of_an_upload_becomes_the_jobs(world: World):
    account = world.service.open_account(world.alice)
    archive = tar(**{"main.py": b""})
    account.take(len(archive))
    job = await world.service.submit(world.alice, sealed("upload", archive), b'{"entrypoint":"main.py"}', account)
    assert job.account is account
    assert len(archive) < account.held < len(archive) + 20_000


async def test_descriptors_used_up_are_told_as_overload(world: World, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(Overloaded, match="no descriptor or memory to spare"):
        await world.run()
    world.assert_empty()
