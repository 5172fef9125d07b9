"""Every folder of examples/, sent by the SDK to a real server: the same comes out as when its program runs outside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandrun.client import Client, LogEnd, LogPart, Result, pack_directory
from sandrun.model import Ceilings, Outcome, Status, parse_manifest
from tests import packages, serving

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())

pytestmark = pytest.mark.requirement(36)


@dataclass
class Ran:
    """What became of an example: result, both streams as text, and outputs by path."""

    result: Result
    stdout: str
    stderr: str
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def client(running_server: serving.Server) -> Iterator[Client]:
    with Client(running_server.url) as client:
        yield client


def run(client: Client, folder: Path, into: Path) -> Ran:
    """Send a folder as it is, with its job.json, and fetch all that it leaves."""
    job = client.submit(folder).job_id
    result = client.wait(job, seconds=180)
    logs = client.logs(job)
    assert result.status is Status.COMPLETED, (result, logs.stdout[-2000:], logs.stderr[-2000:])
    assert (result.outcome, result.exit_code, result.limits_hit) == (Outcome.EXITED, 0, ())
    client.download(job, into)
    files = {file.path: (into / file.path).read_bytes() for file in result.output_files}
    client.delete(job)
    return Ran(result, logs.stdout.decode(), logs.stderr.decode(), files)


def run_outside(name: str, folder: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """The same program with the same arguments on this host, in a copy of the folder."""
    shutil.copytree(folder, into)
    manifest = parse_manifest((EXAMPLES / name / "job.json").read_bytes(), Ceilings())
    interpreter = "/usr/bin/python3" if manifest.interpreter == "python3" else manifest.interpreter
    return subprocess.run(
        [interpreter, manifest.entrypoint, *manifest.args],
        cwd=into,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(into), **manifest.env},
        check=True,
        capture_output=True,
        text=True,
    )


def test_every_example_has_a_manifest_and_a_line_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert len(NAMES) >= 12
    for name in NAMES:
        manifest = parse_manifest((EXAMPLES / name / "job.json").read_bytes(), Ceilings())
        assert (EXAMPLES / name / manifest.entrypoint).is_file()
        assert f"`{name}/`" in readme


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("report", {"chart.svg", "summary.txt"}),
        pytest.param("c-program", {"primes.txt"}, marks=pytest.mark.needs("gcc")),
        pytest.param("pipeline", {"report/errors.txt", "report/hours.txt", "report/pages.txt"}, marks=pytest.mark.once),
        pytest.param("node", {"out/sorted.json"}, marks=pytest.mark.needs("node")),
        pytest.param("perl", {"words.tsv"}, marks=pytest.mark.needs("perl")),
        ("multiprocessing", {"mandelbrot.pgm"}),
        ("sqlite", {"library.db"}),
    ],
)
def test_example_does_inside_what_it_does_outside(name: str, outputs: set[str], client: Client, tmp_path: Path) -> None:
    outside = run_outside(name, EXAMPLES / name, tmp_path / "outside")
    inside = run(client, EXAMPLES / name, tmp_path / "inside")
    assert inside.stdout == outside.stdout
    assert inside.stderr == outside.stderr
    assert outputs <= inside.files.keys()
    for path, content in inside.files.items():
        assert content == (tmp_path / "outside" / path).read_bytes(), path
    if name != "node":
        assert inside.files.keys() == outputs


def test_report_draws_a_line_for_each_region_of_thousands_of_rows(client: Client, tmp_path: Path) -> None:
    ran = run(client, EXAMPLES / "report", tmp_path)
    drawing = ET.fromstring(ran.files["chart.svg"])
    assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    assert ran.files["summary.txt"].decode() in ran.stdout
    rows = (EXAMPLES / "report" / "sales.csv").read_text().count("\n") - 1
    assert rows >= 3000
    assert f"{rows - 7} sales" in ran.stdout
    assert ran.stderr.count("has no price") == 7


@pytest.mark.needs("gcc")
def test_program_compiled_inside_counts_the_primes(client: Client, tmp_path: Path) -> None:
    assert "148933 primes up to 2000000" in run(client, EXAMPLES / "c-program", tmp_path).stdout


@pytest.mark.once
def test_pipeline_goes_through_fifty_megabytes(client: Client, tmp_path: Path) -> None:
    ran = run(client, EXAMPLES / "pipeline", tmp_path)
    requests, size = map(int, re.findall(r"\d+", ran.stdout.splitlines()[0]))
    assert size >= 50_000_000
    pages = [line.split() for line in ran.files["report/pages.txt"].decode().splitlines()]
    assert sum(int(count) for _, count, _ in pages) == requests


def test_asyncio_starts_and_kills_subprocesses(client: Client, tmp_path: Path) -> None:
    outside = run_outside("asyncio-subprocess", EXAMPLES / "asyncio-subprocess", tmp_path / "outside")
    inside = run(client, EXAMPLES / "asyncio-subprocess", tmp_path / "inside")
    assert sorted(inside.stdout.splitlines()) == sorted(outside.stdout.splitlines())
    assert "exit codes: [0, 0, 3]" in inside.stdout
    assert "sleep was killed: -9" in inside.stdout
    assert inside.files == {}


def test_multiprocessing_runs_four_workers_at_once(client: Client, tmp_path: Path) -> None:
    ran = run(client, EXAMPLES / "multiprocessing", tmp_path)
    assert ran.stdout == "240 rows by 4 workers\n"
    peak = ran.result.metadata["processes_peak"]
    assert peak is None or peak >= 5


def test_sqlite_database_can_be_opened_afterwards(client: Client, tmp_path: Path) -> None:
    ran = run(client, EXAMPLES / "sqlite", tmp_path)
    assert "Charlotte Brontë" in ran.stdout
    (tmp_path / "copy.db").write_bytes(ran.files["library.db"])
    database = sqlite3.connect(tmp_path / "copy.db")
    try:
        assert database.execute("SELECT count(*) FROM loan").fetchone() == (20000,)
    finally:
        database.close()


@pytest.mark.once
@pytest.mark.requirement(33)
def test_lines_arrive_while_the_job_writes_them(client: Client) -> None:
    job = client.submit(EXAMPLES / "live-log").job_id
    arrived: list[tuple[float, int]] = []
    text = {"stdout": "", "stderr": ""}
    end = None
    for item in client.follow(job):
        if isinstance(item, LogPart):
            text[item.stream] += item.text
            ticks = len(re.findall(r"^tick .*\n", text["stdout"], re.MULTILINE))
            arrived.append((time.monotonic(), ticks))
        else:
            end = item
    assert end == LogEnd(status=Status.COMPLETED, outcome=Outcome.EXITED, exit_code=0)
    printed = [float(at) for at in re.findall(r"tick \d+ at ([\d.]+) s", text["stdout"])]
    assert len(printed) == 40
    assert text["stdout"].endswith("done\n")
    assert text["stderr"].splitlines() == [f"{count} ticks so far" for count in (10, 20, 30, 40)]
    begun = arrived[0][0] - printed[0]
    for tick, at in enumerate(printed):
        seen = next(when for when, ticks in arrived if ticks > tick)
        assert seen - begun - at < 1.0, f"tick {tick} came {seen - begun - at:.2f} s late"
    assert arrived[-1][0] - arrived[0][0] > 9
    logs = client.logs(job)
    assert (logs.stdout.decode(), logs.stderr.decode()) == (text["stdout"], text["stderr"])
    client.delete(job)


@pytest.mark.requirement(27, 31)
def test_thousand_files_go_in_and_as_many_come_out(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "thousand-files"
    shutil.copytree(EXAMPLES / "thousand-files", folder)
    subprocess.run([sys.executable, "make_input.py"], cwd=folder, check=True)
    assert sum(len(names) for _, _, names in os.walk(folder)) == 1000
    ran = run(client, folder, tmp_path / "inside")
    assert ran.stdout == "997 files, the squares add up to 329845486\n"
    assert len(ran.files) == 997
    assert all(content == b"%d\n" % int(path[8:12]) ** 2 for path, content in ran.files.items())


@pytest.mark.once
@pytest.mark.requirement(27)
def test_ninety_megabytes_go_in(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "ninety-megabytes"
    shutil.copytree(EXAMPLES / "ninety-megabytes", folder)
    subprocess.run([sys.executable, "make_input.py"], cwd=folder, check=True)
    assert len(pack_directory(folder)) > 85_000_000
    with open(folder / "data.bin", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    report = json.loads(run(client, folder, tmp_path / "inside").files["report.json"])
    assert (report["bytes"], report["sha256"]) == (90_000_000, digest)


# ---- environments ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def client_of(environment: str) -> Iterator[Client]:
    with (
        packages.state_directory(environment) as state,
        serving.running("--state-dir", state) as server,
        Client(server.url) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def data_client() -> Iterator[Client]:
    with client_of("data") as client:
        yield client


@pytest.fixture(scope="module")
def web_client() -> Iterator[Client]:
    with client_of("web") as client:
        yield client


@pytest.mark.once
def test_numpy_pandas_and_matplotlib_make_a_picture(data_client: Client, tmp_path: Path) -> None:
    ran = run(data_client, EXAMPLES / "data-science", tmp_path)
    assert ran.files.keys() == {"weather.png", "monthly.csv"}
    picture = ran.files["weather.png"]
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1000, 500)
    assert len(picture) > 20_000
    months = ran.files["monthly.csv"].decode().splitlines()
    assert months[0] == "month,min,mean,max"
    assert len(months) == 13
    assert re.search(r"numpy \d.*, pandas \d.*, matplotlib \d", ran.stdout)
    assert ran.result.metadata["environment"] == "data"


def test_job_cannot_write_to_its_environment(web_client: Client) -> None:
    code = """
import errno, os, requests
file = requests.__file__
path = os.path.dirname(file)
assert path.startswith("/environments/web/"), path
for attempt in (lambda: open(path + "/planted", "w"), lambda: os.unlink(file), lambda: os.chmod(path, 0o777)):
    try:
        attempt()
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    result = web_client.run(code, environment="web")
    assert (result.stdout, result.stderr) == ("EROFS\n" * 3, "")


def test_job_without_the_environment_does_not_see_it(web_client: Client) -> None:
    result = web_client.run("import os; print(os.listdir('/environments'))\nimport requests")
    assert result.stdout == "[]\n"
    assert result.stderr is not None
    assert "No module named 'requests'" in result.stderr


def test_server_tells_its_environments_with_packages_and_digest(web_client: Client) -> None:
    import httpx2

    (told,) = [
        one for one in httpx2.get(f"{web_client.url}/environments").json()["environments"] if one["name"] == "web"
    ]
    assert set(packages.PACKAGES["web"]) <= told["packages"].keys()
    assert re.fullmatch(r"[0-9a-f]{64}", told["digest"])
