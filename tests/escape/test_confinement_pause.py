"""Stopping and continuing, or freezing and thawing, a job in the middle of any wait changes nothing but its time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import host
from tests.escape.probing import (
    COMPILED,
    IN_PLACE,
    PYTHONS,
    SHELL,
    Held,
    Inside,
    compiled,
    held,
    holding,
    new_token,
    program,
    succeeded,
)
from tests.serving import Api, Server

pytestmark = pytest.mark.requirement(38)

Pauser = Callable[[Held], Callable[[bool], None]]


def stopping(job: Held) -> Callable[[bool], None]:
    """By SIGSTOP and SIGCONT, to every process of the job."""
    stopped: list[host.Process] = []

    def pause(paused: bool) -> None:
        if paused:
            stopped.clear()  # their numbers may be others' by now
            with contextlib.suppress(AssertionError):  # the job is gone
                stopped.extend(job.processes())
        for one in stopped:  # to look for them again would take longer than the pause
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    return pause


def freezing(job: Held) -> Callable[[bool], None]:
    """By the v2 freezer of its cgroup, as a client's jobs are when its CPU budget is used up."""
    file = freezer(job)
    if file is None:
        pytest.skip("the job has no cgroup that could be frozen")

    def pause(paused: bool) -> None:
        with contextlib.suppress(OSError):  # the job is gone
            file.write_text("1" if paused else "0")

    return pause


def freezer(job: Held) -> Path | None:
    cgroups = [line.split(":", 2) for line in Path(f"{job.folder}/cgroup").read_text().splitlines()]
    own = next((path for _, names, path in cgroups if not names), "/")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        file = Path(left.split()[4] + own) / "cgroup.freeze"
        if right.startswith("cgroup2 ") and own != "/" and os.access(file, os.W_OK):
            return file
    return None


@contextlib.contextmanager
def paused_again_and_again(job: Held, pauser: Pauser) -> Iterator[list[int]]:
    """Every 150 ms for 50 ms; the list counts."""
    pause = pauser(job)
    times = [0]
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.1):
            pause(True)
            time.sleep(0.05)
            pause(False)
            times[0] += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield times
    finally:
        over.set()
        worker.join()
        pause(False)


@pytest.fixture(
    params=[pytest.param(stopping, id="stopped", marks=pytest.mark.once), pytest.param(freezing, id="frozen")]
)
def pauser(request: pytest.FixtureRequest, api: Api) -> Pauser:
    found: Pauser = request.param
    return found


def test_python_waits_are_as_long_as_they_should(
    pauser: Pauser, insides: dict[str, Inside], running_server: Server
) -> None:
    """One job of each kind at the same time; on one CPU two, for no more are let run."""
    kinds = PYTHONS if len(os.sched_getaffinity(0)) > 1 else (IN_PLACE, SHELL)
    code = program("waits.py").replace("from __future__ import annotations", "")
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(held(insides[kind.name], running_server, code)) for kind in kinds]
        with contextlib.ExitStack() as pausing:
            counts = [pausing.enter_context(paused_again_and_again(job, pauser)) for job in jobs]
            results = [job.wait() for job in jobs]
    assert all(times[0] > 10 for times in counts)
    for result in results:
        assert json.loads(succeeded(result)["stdout"].splitlines()[-1])["short"] == {}
        assert result["stderr"] == ""


def test_system_calls_go_on_where_they_were(
    pauser: Pauser, insides: dict[str, Inside], running_server: Server, api: Api
) -> None:
    """By restart_syscall(2), which the filter must let through."""
    token = new_token()
    files = COMPILED.job(compiled("waits.c"), {})
    with (
        holding(api, running_server, token, files, **{**COMPILED.manifest, "args": [token]}) as job,
        paused_again_and_again(job, pauser) as times,
    ):
        result = job.wait()
    assert times[0] > 10
    assert succeeded(result)["stdout"] == "done\n"


BASH = """
for i in 1 2 3; do sleep 0.3; done
sleep 0.3 & wait $!; echo wait $?
read -t 0.3 line < <(sleep 1); echo read $(( $? > 128 ))
sleep 0.5 | cat; echo pipe $?
timeout 0.3 sleep 5; echo timeout $?
"""
PERL = """
use Time::HiRes qw(time);
my $t = time;
select undef, undef, undef, 0.5;
print time - $t >= 0.49 ? "ok\\n" : "short\\n";
"""
NODE = "const t = Date.now(); setTimeout(() => console.log(Date.now() - t >= 499 ? 'ok' : 'short'), 500)"


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        pytest.param("main.sh", BASH, "wait 0\nread 1\npipe 0\ntimeout 124\n", id="bash"),
        pytest.param("main.pl", PERL, "ok\n", id="perl", marks=pytest.mark.needs("perl")),
        pytest.param("main.js", NODE, "ok\n", id="node", marks=pytest.mark.needs("node")),
    ],
)
def test_other_programs_wait_as_long_as_they_should(
    name: str, code: str, expected: str, pauser: Pauser, running_server: Server, api: Api
) -> None:
    more: dict[str, Any] = {"interpreter": "bash"} if name == "main.sh" else {}
    entrypoint = name.replace("main", token := new_token())
    with (
        holding(api, running_server, token, {entrypoint: code}, entrypoint=entrypoint, **more) as job,
        paused_again_and_again(job, pauser),
    ):
        result = job.wait()
    assert succeeded(result)["stdout"] == expected


def test_time_stopped_counts_for_the_wall_clock(insides: dict[str, Inside], running_server: Server, api: Api) -> None:
    """A job whose processes are all stopped is over at its limit all the same (requirement 21)."""
    with held(insides["in-place"], running_server, "time.sleep(1)\n", timeout=2) as job:
        stopping(job)(True)
        result = job.wait()
    assert result["outcome"] == "timeout"
    assert result["execution_metadata"]["wall_seconds"] < 2 + host.within(1)
