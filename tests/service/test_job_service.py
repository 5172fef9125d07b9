"""The job service in orders of events that a real spawner does not give on demand."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from typing import Any, cast

import msgspec
import pytest

from sandrun.errors import InvalidInput, NotFound, Overloaded
from sandrun.jobs import intake, running, service
from sandrun.jobs.config import JobsConfig
from sandrun.jobs.job import Job
from sandrun.jobs.memfile import sealed
from sandrun.jobs.request import run_request_from
from sandrun.jobs.service import JobService
from sandrun.model import LOG_BYTES, MIB, Ceilings, LimitHit, Outcome, Status
from sandrun.spawner.client import SpawnerClient
from tests.service.spawner_double import SandboxDouble, SpawnerDouble

pytestmark = pytest.mark.usefixtures("no_new_descriptors")


class World:
    """A service over a spawner that the test plays. One place on the host, unless `config` says more."""

    def __init__(self, **config: Any) -> None:
        self.spawner = SpawnerDouble()
        defaults = {"active_per_core": 1.0, "store_bytes": 64 * MIB}
        self.service = JobService(cast(SpawnerClient, self.spawner), JobsConfig(**defaults | config))
        self.alice = self.service.client("192.0.2.1")
        self.bob = self.service.client("192.0.2.2")

    async def run(self, code: str = "print('hello')", **fields: Any) -> Job:
        request = run_request_from({"code": code, **fields}, Ceilings())
        return await self.service.run(self.alice, request)

    async def submit(self, archive: bytes | None = None, **manifest: Any) -> Job:
        text = json.dumps({"entrypoint": "main.py", **manifest}).encode()
        return await self.service.submit(self.alice, sealed("upload", archive or tar(**{"main.py": b"x"})), text)

    def sandbox(self, number: int = -1) -> SandboxDouble:
        return self.spawner.sandboxes[number]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)

    def assert_empty(self) -> None:
        """Nothing is kept, held, queued or running."""
        counts = self.service.counts
        assert counts["queued"] == counts["running"] == counts["known"] == counts["store_used_bytes"] == 0
        scheduler = self.service._scheduler
        assert (scheduler._reserved, scheduler._waiting, scheduler._places) == (0, {}, {})


@pytest.fixture
async def new_world() -> AsyncIterator[Callable[..., World]]:
    made: list[World] = []

    def make(**config: Any) -> World:
        made.append(World(**config))
        return made[-1]

    yield make
    for world in made:
        world.service.close()
        world.spawner.close()
        for sandbox in world.spawner.sandboxes:
            if not sandbox.ended.done():
                sandbox.end()
        await asyncio.sleep(0.01)
        world.assert_empty()


@pytest.fixture
async def world(new_world: Callable[..., World]) -> World:
    return new_world()


def tar(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


# ---- from start to verdict ----


async def test_job_starts_in_the_step_of_the_loop_that_brought_it(world: World):
    job = await world.run(stdin="in", args=["a"], env={"B": "c"})
    assert job.status is Status.RUNNING
    spec = json.loads(world.sandbox().spec)
    assert (spec["entrypoint"], spec["interpreter"]) == ("main.py", "python3")
    assert (spec["args"], spec["env"], spec["fresh"]) == (["a"], {"B": "c"}, False)
    assert world.sandbox().stdin == b"in"
    assert b"print('hello')" in world.sandbox().archive
    assert not world.sandbox().order.collect


async def test_result_tells_what_the_job_did(world: World):
    job = await world.run()
    world.sandbox().begin()
    world.sandbox().write("stdout", b"hello\n")
    world.sandbox().write("stderr", b"\xff")
    await asyncio.sleep(0)
    world.sandbox().end(exit_code=3, limits_hit=(LimitHit.PROCESSES,), isolation=b'{"inside":{"uid":1000}}')
    assert await world.service.wait(job, 5)
    result = world.service.result(job, logs=True)
    assert (result.status, result.outcome, result.exit_code) == (Status.FAILED, Outcome.EXITED, 3)
    assert (result.stdout, result.stderr, result.limits_hit) == ("hello\n", "\ufffd", [LimitHit.PROCESSES])
    times = result.execution_metadata
    assert times.wall_seconds == 0.5
    assert times.cpu_seconds == 0.25
    assert times.started_at is not None
    assert times.ended_at is not None
    assert times.submitted_at <= times.started_at <= times.ended_at
    decoded = msgspec.json.decode(msgspec.json.encode(result))
    assert decoded["isolation"] == {"inside": {"uid": 1000}}
    assert decoded["job_tag"] == sha256(job.id.encode()).hexdigest()[:12]
    assert decoded["execution_metadata"]["interpreter"] == "python3"
    assert world.service.result(job).stdout is None


async def test_all_that_was_written_is_there_when_the_report_overtakes_it(world: World):
    job = await world.run()
    world.sandbox().write("stdout", b"x" * 60_000)
    world.sandbox().end()  # before the loop has looked at the pipe
    assert await world.service.wait(job, 5)
    assert job.stdout.kept == 60_000
    assert job.stdout.sha256 == sha256(b"x" * 60_000).hexdigest()


async def test_pipe_that_outlives_its_job_does_not_hold_up_the_verdict(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "END_OF_FILE_SECONDS", 0.02)
    job = await world.run()
    world.sandbox().write("stdout", b"so far")
    world.sandbox().report()
    assert not await world.service.wait(job, 0.005)
    assert await world.service.wait(job, 5)
    assert job.stdout.read() == b"so far"
    assert job.status is Status.COMPLETED


@pytest.mark.requirement(34)
async def test_report_that_never_comes_ends_the_job_as_lost(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "OVERDUE_SECONDS", -0.95)
    job = await world.run(timeout=1)
    assert await world.service.wait(job, 5)
    assert job.outcome is Outcome.WORKER_LOST
    assert world.sandbox().cancels == 1
    world.sandbox().end()  # too late
    await asyncio.sleep(0.01)
    assert job.outcome is Outcome.WORKER_LOST
    assert (await world.run()).status is Status.RUNNING


@pytest.mark.requirement(17)
async def test_failed_step_is_named_without_host_paths(world: World):
    job = await world.run()
    failed = {"step": "pivot_root", "errno": errno.EINVAL, "details": "/srv/sandrun/z1: Invalid argument"}
    world.sandbox().end(Outcome.SETUP_FAILED, failed=failed)
    assert await world.service.wait(job, 5)
    failure = world.service.result(job).failure
    assert failure is not None
    assert (failure.step, failure.errno, failure.details) == ("pivot_root", errno.EINVAL, "Invalid argument")
    assert world.service.result(job).execution_metadata.started_at is None


@pytest.mark.requirement(33)
async def test_output_beyond_what_is_kept_is_drained_and_told(world: World):
    job = await world.run()
    for _ in range(LOG_BYTES // 60_000 + 10):
        world.sandbox().write("stdout", b"x" * 60_000)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    world.sandbox().end()
    assert await world.service.wait(job, 5)
    assert job.stdout.kept == LOG_BYTES
    assert job.limits_hit == (LimitHit.OUTPUT,)
    assert world.service.result(job).truncated.stdout == job.stdout.total - LOG_BYTES > 0


async def test_upload_is_charged_until_it_is_unpacked(world: World):
    job = await world.submit()
    held = job.account.held
    world.sandbox().begin()
    await asyncio.sleep(0)
    assert job.account.held == held - len(tar(**{"main.py": b"x"}))


# ---- outputs ----


async def test_outputs_are_kept_hashed_and_small_ones_inline(world: World):
    job = await world.run(outputs=["*"])
    assert world.sandbox().order.collect
    world.sandbox().write_output(b"plot.png", b"PN", b"G")
    world.sandbox().write_output(b"a/empty")
    world.sandbox().end_outputs(omitted=2)
    world.sandbox().end()
    assert await world.service.wait(job, 5)
    assert job.outputs["plot.png"].data == b"PNG"
    assert job.outputs["plot.png"].read(1, 1) == b"N"
    result = world.service.result(job, logs=True)
    assert result.outputs_omitted == 2
    (png,) = (file for file in result.output_files if file.path == "plot.png")
    assert (png.size, png.sha256, png.content_base64) == (3, sha256(b"PNG").hexdigest(), "UE5H")
    assert all(file.content_base64 is None for file in world.service.result(job).output_files)


async def test_inline_outputs_are_bounded_one_by_one_and_together(world: World):
    job = await world.run(outputs=["*"])
    for number in range(18):
        world.sandbox().write_output(b"%02d" % number, b"x" * 32_000, b"x" * 32_000)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
    world.sandbox().write_output(b"large", b"x" * 60_000)
    await asyncio.sleep(0.002)
    world.sandbox().end_outputs()
    world.sandbox().end()
    assert await world.service.wait(job, 5)
    inline = [f.path for f in world.service.result(job, logs=True).output_files if f.content_base64 is not None]
    assert inline == [f"{number:02d}" for number in range(16)]


@pytest.mark.requirement(31)
async def test_malformed_outputs_leave_what_came_whole(world: World):
    job = await world.run(outputs=["*"])
    world.sandbox().write_output(b"good", b"1")
    world.sandbox().write("outputs", b"\xff" * 100)
    world.sandbox().end()
    assert await world.service.wait(job, 5)
    assert list(job.outputs) == ["good"]
    assert job.outputs_omitted == 1
    assert job.status is Status.COMPLETED


async def test_outputs_cut_short_are_told(world: World):
    job = await world.run(outputs=["*"])
    world.sandbox().write_output(b"half", b"1", complete=False)
    world.sandbox().end(Outcome.TIMEOUT)
    assert await world.service.wait(job, 5)
    assert (dict(job.outputs), job.outputs_omitted) == ({}, 1)


@pytest.mark.requirement(31)
@pytest.mark.parametrize(
    ("outcome", "outputs", "omitted"),
    [
        (Outcome.EXITED, ["*"], 1),
        (Outcome.EXITED, [], 0),
        (Outcome.TIMEOUT, ["*"], 1),
        (Outcome.WORKER_LOST, ["*"], 0),
        (Outcome.SETUP_FAILED, ["*"], 0),
    ],
)
async def test_collector_that_failed_is_told_from_a_job_without_outputs(
    world: World, outcome: Outcome, outputs: list[str], omitted: int
):
    """Not one byte came, not even the end; a lost job's outcome says it all."""
    job = await world.run(outputs=outputs)
    world.sandbox().end(outcome)
    assert await world.service.wait(job, 5)
    assert (dict(job.outputs), job.outputs_omitted) == ({}, omitted)


async def test_outputs_that_the_store_cannot_hold_are_dropped_and_told(new_world: Callable[..., World]):
    world = new_world(store_bytes=MIB, client_store_share=1.0)
    job = await world.run(outputs=["*"])
    world.sandbox().write_output(b"first", b"1")
    await asyncio.sleep(0.001)
    for _ in range(20):
        world.sandbox().write_output(b"second", b"x" * 60_000)
        await asyncio.sleep(0.001)
    world.sandbox().end()
    assert await world.service.wait(job, 5)
    assert "first" in job.outputs
    assert LimitHit.STORAGE in job.limits_hit
    assert job.outputs_omitted > 0
    assert world.service.counts["store_used_bytes"] <= MIB


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


# ---- what a signed statement will need ----


async def test_digests_are_those_of_what_went_in_and_out(world: World):
    job = await world.run(files={"in.txt": "data"}, stdin="x")
    world.sandbox().write("stdout", b"out")
    world.sandbox().end(isolation=b'{"b":1, "a":[true,null]}')
    await world.service.wait(job, 5)
    assert {file.path: file.sha256 for file in job.inputs}["in.txt"] == sha256(b"data").hexdigest()
    assert job.stdout.sha256 == sha256(b"out").hexdigest()
    assert job.stderr.sha256 == sha256(b"").hexdigest()
    assert job.stdin_sha256 == sha256(b"x").hexdigest()
    assert job.isolation_sha256 == sha256(b'{"a":[true,null],"b":1}').hexdigest()
    again = await world.run(files={"in.txt": "data"}, stdin="y") if job.status.ended else None
    assert again is not None
    assert len({job.manifest_sha256, again.manifest_sha256}) == 2
