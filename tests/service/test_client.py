"""The SDK against a real server: each method, sync and async, on a job that really runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandrun.client import AsyncClient, Client, LogEnd, LogPart, pack_files
from sandrun.errors import InvalidInput, ServerError
from sandrun.model import Outcome, Status
from tests.serving import Api

SLOW = """
import sys, time
for i in range(5):
    print("line", i, flush=True)
    print("error", i, file=sys.stderr, flush=True)
    time.sleep(0.1)
"""
MAKER = """
import os, sys
os.makedirs("out/deep")
open("out/a.txt", "w").write("a" * 100)
open("out/deep/b.bin", "wb").write(bytes(range(256)) * 4096)
open(b"out/odd\\xff name\\n", "w").write("odd")
sys.stdout.buffer.write(b"raw \\xff\\n")
"""


@pytest.fixture
def client(api: Api, server: str) -> Iterator[Client]:
    with Client(server) as made:
        yield made


def test_run_gives_output_and_verdict(client: Client) -> None:
    result = client.run("import sys; print(input()); sys.exit(3)", stdin="hello\n", timeout=20)
    assert (result.stdout, result.stderr, result.exit_code) == ("hello\n", "", 3)
    assert result.outcome is Outcome.EXITED
    assert result.status is Status.FAILED
    assert not result.succeeded
    with pytest.raises(ServerError) as gone:  # erased when it was answered
        client.result(result.job_id)
    assert gone.value.status == 404


def test_run_takes_files_as_text_and_bytes(client: Client) -> None:
    code = "import sys; sys.stdout.write(repr(open('d/x', 'rb').read()) + open('y').read() + sys.argv[1])"
    result = client.run(code, files={"d/x": b"\xff\x00", "y": "text"}, args=("arg",))
    assert result.stdout == "b'\\xff\\x00'textarg"
    assert result.succeeded


def test_a_refusal_carries_the_servers_words(client: Client) -> None:
    with pytest.raises(ServerError) as refusal:
        client.run("x", timeout=9999)
    assert refusal.value.status == 400
    assert refusal.value.problem["field"] == "timeout"
    assert "9999" in str(refusal.value.problem["details"])


def test_a_directory_runs_and_its_outputs_come_back(client: Client, tmp_path: Path) -> None:
    source = tmp_path / "job"
    (source / "pkg" / "__pycache__").mkdir(parents=True)
    (source / "pkg" / "__pycache__" / "x.pyc").write_bytes(b"x")
    (source / "main.py").write_text(MAKER)
    job = client.submit(source, entrypoint="main.py", outputs=["out/**"])
    result = client.wait(job.job_id, seconds=60)
    assert result.succeeded, result
    assert client.logs(job.job_id).stdout == b"raw \xff\n"

    files = client.outputs(job.job_id)
    assert {file.size for file in files} == {3, 100, 1 << 20}
    saved = client.download(job.job_id, tmp_path / "saved")
    assert len(saved) == 3
    assert all(Path(path).is_relative_to(tmp_path / "saved") for path in saved)
    assert (tmp_path / "saved" / "out" / "a.txt").read_text() == "a" * 100
    big = (tmp_path / "saved" / "out" / "deep" / "b.bin").read_bytes()
    assert hashlib.sha256(big).hexdigest() == next(f.sha256 for f in files if f.size == 1 << 20)
    assert client.read(job.job_id, "out/a.txt") == b"a" * 100
    with pytest.raises(InvalidInput):
        client.download(job.job_id, tmp_path / "other", paths=["main.py"])

    client.delete(job.job_id)
    with pytest.raises(ServerError) as gone:
        client.outputs(job.job_id)
    assert gone.value.status == 404


def test_an_archive_with_its_own_manifest_runs(client: Client) -> None:
    archive = pack_files({"job.json": '{"entrypoint": "main.sh"}', "main.sh": "echo from the archive\n"})
    job = client.submit(archive)
    assert client.wait(job.job_id, seconds=60).succeeded
    assert client.logs(job.job_id).stdout == b"from the archive\n"


def test_logs_are_followed_live_to_the_end(client: Client) -> None:
    job = client.submit(pack_files({"main.py": SLOW}), entrypoint="main.py")
    began = time.monotonic()
    first = None
    seen = {"stdout": b"", "stderr": b""}
    items: list[LogPart | LogEnd] = []
    for item in client.follow(job.job_id):
        items.append(item)
        if isinstance(item, LogPart):
            assert item.offset == len(seen[item.stream])
            seen[item.stream] += item.data
            first = first or time.monotonic() - began
    assert seen["stdout"] == b"".join(b"line %d\n" % i for i in range(5))
    assert seen["stderr"] == b"".join(b"error %d\n" % i for i in range(5))
    assert items[-1] == LogEnd(status=Status.COMPLETED, outcome=Outcome.EXITED, exit_code=0)
    assert first is not None
    assert first < time.monotonic() - began - 0.2  # it came while the job ran
    rest = [item for item in client.follow(job.job_id, stdout=7, stderr=1000) if isinstance(item, LogPart)]
    assert b"".join(part.data for part in rest) == seen["stdout"][7:]


def test_following_what_is_no_job_is_404(client: Client) -> None:
    with pytest.raises(ServerError) as refusal:
        list(client.follow("0" * 32))
    assert refusal.value.status == 404


def test_a_cancelled_job_keeps_what_it_wrote(client: Client) -> None:
    code = "import time; print('begun', flush=True); time.sleep(60)"
    job = client.submit(pack_files({"main.py": code}), entrypoint="main.py")
    for item in client.follow(job.job_id):
        if isinstance(item, LogPart):
            break
    client.cancel(job.job_id)
    result = client.wait(job.job_id, seconds=20)
    assert result.outcome is Outcome.CANCELLED
    assert client.logs(job.job_id).stdout == b"begun\n"


async def test_the_asyncio_client_does_the_same(api: Api, server: str, tmp_path: Path) -> None:
    async with AsyncClient(server) as client:
        assert (await client.run("print(1)")).stdout == "1\n"
        job = await client.submit(
            pack_files({"main.py": MAKER + SLOW}), {"entrypoint": "main.py"}, outputs=["out/a.txt"]
        )
        items = [item async for item in client.follow(job.job_id)]
        assert isinstance(items[-1], LogEnd)
        assert (await client.wait(job.job_id)).succeeded
        assert [file.path for file in await client.outputs(job.job_id)] == ["out/a.txt"]
        assert await client.download(job.job_id, tmp_path) == [os.path.join(tmp_path, "out/a.txt")]
        assert (await client.logs(job.job_id)).stderr == b"".join(b"error %d\n" % i for i in range(5))
        assert len(await client.read(job.job_id, "out/a.txt")) == 100
        await client.cancel(job.job_id)
        await client.delete(job.job_id)
        with pytest.raises(ServerError):
            await client.result(job.job_id)
