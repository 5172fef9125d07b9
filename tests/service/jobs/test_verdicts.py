"""From start to verdict, and what is kept of a job: orders of events that a real spawner does not give on demand."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Callable
from hashlib import sha256

import msgspec
import pytest

from sandrun.jobs import running
from sandrun.model import LOG_BYTES, MIB, LimitHit, Outcome, Status
from tests.service.job_world import World, tar

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
