"""Processes and threads: exactly so many, whatever makes them, and what a fork bomb does to others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests import host, serving
from tests.escape.limits import metadata, need, other_client
from tests.escape.probing import IN_PLACE, Inside, held
from tests.serving import Api

pytestmark = pytest.mark.requirement(20)


@pytest.fixture(autouse=True)
def _limited(shared_api: Api) -> None:
    """Without a limit a bomb would be the host's."""
    need(shared_api, "pids")


THREADS = """
import os, threading
stop, made = threading.Event(), 0
threads = []
while True:
    thread = threading.Thread(target=stop.wait)
    try:
        thread.start()
    except RuntimeError:
        break
    made += 1
    threads.append(thread)
try:
    os.fork()
except OSError as error:
    print(made + 1, error.errno)
stop.set()
"""
PROCESSES = """
import os, signal
made = []
while True:
    try:
        child = os.fork()
    except OSError as error:
        print(len(made) + 1, error.errno)
        break
    if child == 0:
        signal.pause()
    made.append(child)
for child in made:
    os.kill(child, 9)
"""
MIXED = """
import os, signal, threading, time
children, stop = 0, threading.Event()
while True:
    try:
        if os.fork() == 0:
            threading.Thread(target=stop.wait).start()  # two tasks each
            signal.pause()
        children += 1
    except OSError as error:
        errno = error.errno
        break
    time.sleep(0.02)
tasks = sum(len(os.listdir(f"/proc/{name}/task")) for name in os.listdir("/proc") if name.isdigit() and name != "1")
print(tasks, errno)
os.kill(-1, 9)
"""


@pytest.mark.parametrize("code", [THREADS, PROCESSES], ids=["threads", "processes"])
@pytest.mark.parametrize("processes", [1, 2, 10, 100])
def test_tasks_are_exactly_as_many_as_asked_for(processes: int, code: str, api: Api) -> None:
    """Then EAGAIN; the job goes on."""
    result = api.run(code, processes=processes)
    assert (result["outcome"], result["exit_code"], result["stdout"]) == ("exited", 0, f"{processes} 11\n")
    assert result["limits_hit"] == ["processes"]
    if metadata(result)["processes_peak"] is not None:
        assert metadata(result)["processes_peak"] == processes


def test_threads_of_children_count(api: Api) -> None:
    result = api.run(MIXED, processes=20)
    assert result["outcome"] == "exited", result
    tasks, errno = result["stdout"].split()
    assert (int(tasks), errno) == (20, "11")
    assert result["limits_hit"] == ["processes"]


@pytest.mark.parametrize("fresh", [False, True])
def test_limit_is_the_same_in_a_fresh_interpreter(fresh: bool, api: Api) -> None:
    assert api.run(PROCESSES, processes=5, fresh_interpreter=fresh)["stdout"] == "5 11\n"


def test_job_within_its_limit_has_not_met_it(api: Api) -> None:
    code = """
import threading
threads = [threading.Thread(target=lambda: None) for _ in range(9)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    assert api.run(code, processes=10)["limits_hit"] == []


def test_node_and_shells_are_counted_alike(api: Api) -> None:
    code = "for i in 1 2 3 4 5 6; do sleep 1 & done; wait\n"
    result = api.run(code, interpreter="bash", processes=4, timeout=20)
    assert "fork" in result["stderr"]
    assert result["limits_hit"] == ["processes"]


# ---- bombs -------------------------------------------------------------------------------------------------

SESSIONS = "forks into sessions of their own, deaf to all signals"
BOMBS = {
    "forks": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    SESSIONS: """
import os, signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
""",
    "a generation after the other": """
import os
first = os.getpid()
for _ in range(30):
    try:
        if os.fork() == 0:
            break
    except OSError:  # the first ones' children are as many as there may be
        break
while True:
    try:
        if os.fork() and os.getpid() != first:
            os._exit(0)
    except OSError:
        pass
""",
    "threads": """
import threading, time
def spin():
    while True:
        try:
            threading.Thread(target=spin).start()
        except RuntimeError:
            pass
spin()
""",
}


@pytest.mark.requirement(21)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_ends_with_its_job(bomb: str, api: Api, running_server: serving.Server) -> None:
    result = api.run("print('begun', flush=True)\n" + BOMBS[bomb], timeout=2)
    assert (result["outcome"], result["stdout"]) == ("timeout", "begun\n")
    assert metadata(result)["wall_seconds"] < 2 + host.within(1)
    assert ("processes" in result["limits_hit"]) or bomb == "a generation after the other"
    assert running_server.idle()


@pytest.mark.needs("bash")
def test_the_classic_bomb_ends_with_its_job(api: Api, running_server: serving.Server) -> None:
    result = api.run("bomb() { bomb | bomb & }; bomb; sleep 60\n", interpreter="bash", timeout=2)
    assert result["outcome"] in ("timeout", "exited"), result
    assert metadata(result)["wall_seconds"] < 2 + host.within(1)
    assert running_server.idle()


def test_bomb_whose_parent_exits_ends_with_it(api: Api, running_server: serving.Server) -> None:
    """The entrypoint is over at once, its children fork on."""
    code = "import os, time\nif os.fork() == 0:\n" + "".join(f"    {line}\n" for line in BOMBS["forks"].splitlines())
    result = api.run(code + "\ntime.sleep(0.3)\nprint('over', flush=True)\nos._exit(0)\n", timeout=20)
    assert (result["outcome"], result["exit_code"], result["stdout"]) == ("exited", 0, "over\n")
    assert metadata(result)["wall_seconds"] < 2 + host.within(1)
    assert running_server.idle()


SPINNERS = """
import os
for _ in range(99):
    if os.fork() == 0:
        os.setsid()
        break
while True:
    pass
"""
EXECS = """
import os, subprocess
for _ in range(40):
    if os.fork() == 0:
        os.setsid()
        break
while True:
    subprocess.run(["/bin/true"], check=False)
"""
STARTS = 20


def start_seconds(api: Api) -> float:
    """How long a small job takes from request to result: the median of some."""
    taken = []
    for _ in range(STARTS):
        time.sleep(0.05)  # so that each finds a sandbox ready, in calm and in storm
        began = time.monotonic()
        assert api.run("print(1)")["stdout"] == "1\n"
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


@pytest.mark.root
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(BOMBS["forks"], id="forks", marks=pytest.mark.once),
        pytest.param(BOMBS[SESSIONS], id=SESSIONS, marks=pytest.mark.once),
        pytest.param(SPINNERS, id="spins"),
        pytest.param(EXECS, id="execs", marks=pytest.mark.once),
    ],
)
def test_bomb_does_not_slow_the_start_of_anothers_job_by_more_than_twice(
    bomb: str, api: Api, running_server: serving.Server
) -> None:
    """The best of a few tries, as others use this machine too; the worst is what a tenant would feel of no wall."""
    ratios = []
    with other_client(running_server.url, 0) as other, other_client(running_server.url, 1) as bomber:
        start_seconds(other)
        for _ in range(8):
            calm = start_seconds(other)
            job_id = bomber.submit({"main.py": bomb}, entrypoint="main.py", timeout=60)
            assert serving.wait_until(lambda: len(running_server.busy()) > 1, 10)
            time.sleep(0.5)  # until it has grown
            storm = start_seconds(other)
            assert bomber.http.post(f"/jobs/{job_id}/cancel").status_code == 200
            assert bomber.wait(job_id)["outcome"] == "cancelled"
            ratios.append(storm / calm)
            if ratios[-1] <= 2:
                return
    raise AssertionError(f"slower by factors of {ratios}")


def share(pid: int) -> int:
    """Of CPU time beside its siblings, in per cent of what a new sandbox has; 0 where it is not shared out."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for folder in ("cpu", "cpu,cpuacct", "cpuacct,cpu", "", "unified"):
            for name, usual in (("cpu.shares", 1024), ("cpu.weight", 100)):
                file = Path("/sys/fs/cgroup", folder, path[1:], name)
                if "sandrun-" in path and file.exists() and (not names or "cpu" in names.split(",")):
                    return 100 * int(file.read_text()) // usual
    return 0


@pytest.mark.root
def test_job_that_has_run_for_a_while_yields_to_one_that_starts(
    start_server: Callable[..., serving.Server],
) -> None:
    """If it uses the CPU; all such jobs have the same share."""
    server = start_server("--parked-share", "0.05")
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        inside = Inside(IN_PLACE, Api(http))
        with held(inside, server, "while True: pass\n") as job:
            if not share(job.process.pid):
                pytest.skip("CPU time is not shared out between cgroups on this host")
            assert serving.wait_until(lambda: share(job.process.pid) == 25, 5), share(job.process.pid)

            def others() -> set[int]:
                return {share(m[0].pid) for m in server.sandboxes() if job.process.pid not in {p.pid for p in m}}

            assert serving.wait_until(lambda: others() == {100}, 10), others()  # parked when the job had been given one
        with held(inside, server, "time.sleep(1)\n") as job:
            time.sleep(0.6)
            assert share(job.process.pid) == 100
