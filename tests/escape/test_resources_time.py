"""Wall clock and CPU time, whatever a job does with signals; and the end of a job, which is its entrypoint's."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import host, serving
from tests.escape.limits import metadata, need, other_client
from tests.escape.probing import IN_PLACE, Inside, held
from tests.serving import Api

DEAF = """
import os, signal, sys, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
open("written", "w").write("before")
print("begun", flush=True)
"""
WAYS = {
    "sleeps": "time.sleep(60)",
    "spins": "while True: pass",
    "spins in many": "for _ in range(20):\n    if os.fork() == 0: break\nwhile True: pass",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "is stopped, and all its children": """
for _ in range(5):
    if os.fork() == 0:
        break
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
""",
    "waits for a child that is stopped": """
if os.fork() == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
os.wait()
""",
    "waits in vfork": """
import ctypes
libc = ctypes.CDLL(None)
if libc.vfork() == 0:  # its parent sleeps, deaf to all but SIGKILL, until it is gone
    libc.pause()
""",
    "waits for a lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "reads an empty pipe": "os.read(os.pipe()[0], 1)",
    "fills a pipe": "reader, writer = os.pipe()\nwhile True: os.write(writer, bytes(65536))",
    "leaves a child in a session of its own": "if os.fork() == 0:\n    os.setsid()\ntime.sleep(60)",
}


def assert_timeout(result: dict[str, Any], limit: float) -> None:
    assert (result["outcome"], result["status"], result["exit_code"]) == ("timeout", "failed", None), result
    assert limit <= metadata(result)["wall_seconds"] < limit + host.within(1)
    assert result["stdout"] == "begun\n"
    (kept,) = result["output_files"]
    assert base64.b64decode(kept["content_base64"]) == b"before"


@pytest.mark.requirement(21)
@pytest.mark.parametrize("way", WAYS)
def test_job_cannot_outlive_its_wall_limit_when_it(way: str, api: Api, running_server: serving.Server) -> None:
    """All signals ignored and blocked; what it wrote before is kept."""
    began = time.monotonic()
    result = api.run(DEAF + WAYS[way], timeout=1, outputs=["written"])
    assert_timeout(result, 1)
    assert time.monotonic() - began < host.within(4)
    assert running_server.idle()


@contextlib.contextmanager
def frozen(process: host.Process) -> Iterator[None]:
    """Freeze the cgroup of a job from outside, as for its budget; thaw what is left of it."""
    for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"):
            file, values = Path(f"{mount}{path}/cgroup.freeze"), ("1", "0")
            if names == "freezer":
                file, values = Path(f"{mount}{path}/freezer.state"), ("FROZEN", "THAWED")
            elif number != "0":
                continue
            if "sandrun-" in path and file.exists():
                file.write_text(values[0])
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        file.write_text(values[1])
                return
    raise AssertionError("the job is in no cgroup that can be frozen")


@pytest.mark.root
@pytest.mark.requirement(21)
def test_frozen_job_cannot_outlive_its_wall_limit(api: Api, running_server: serving.Server) -> None:
    """Init is frozen with it: it is thawed to end the job, and what was written is kept."""
    need(api, "cpu")
    code = "open('written', 'w').write('before')\nprint('begun', flush=True)\ntime.sleep(60)\n"
    with held(Inside(IN_PLACE, api), running_server, code, timeout=2, outputs=["written"]) as job:
        job.wait_for("begun")
        with frozen(job.process):
            result = job.wait()
    assert (result["outcome"], result["stdout"]) == ("timeout", "begun\n")
    assert [(kept["path"], kept["size"]) for kept in result["output_files"]] == [("written", 6)]
    assert 2 <= metadata(result)["wall_seconds"] < 2 + host.within(1)
    assert running_server.idle()


@pytest.mark.requirement(21)
def test_stopped_by_itself_and_continued_loses_nothing(api: Api) -> None:
    code = """
import os, signal, time
child = os.fork()
if child == 0:
    time.sleep(0.3)
    os.kill(os.getppid(), signal.SIGCONT)
    os._exit(0)
os.kill(os.getpid(), signal.SIGSTOP)
print("on")
"""
    assert api.run(code, timeout=20)["stdout"] == "on\n"


# ---- CPU time ----------------------------------------------------------------------------------------------

SPIN = "while True: pass\n"
CPU_WAYS = {
    "alone": SPIN,
    "in four processes": "import os\nos.fork(); os.fork()\n" + SPIN,
    "in a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\ntime.sleep(60)\n",
    "in the kernel": "import os\nwhile True: os.read(os.open('/dev/zero', 0), 1 << 20); os.closerange(3, 9)\n",
    "in processes that are soon gone": """
import os
while True:
    if os.fork() == 0:
        for _ in range(200_000): pass
        os._exit(0)
    os.wait()
""",
    "in threads": """
import threading
for _ in range(3):
    threading.Thread(target=lambda: exec("while True: pass")).start()
""",
}


@pytest.mark.requirement(21)
@pytest.mark.parametrize("way", CPU_WAYS)
def test_job_cannot_use_more_cpu_than_its_limit(way: str, api: Api) -> None:
    """Of all its processes together, dead ones too."""
    need(api, "cpu")
    result = api.run("print('begun', flush=True)\n" + CPU_WAYS[way], cpu_seconds=0.4, timeout=30)
    assert (result["outcome"], result["status"], result["exit_code"]) == ("cpu_limit", "failed", None)
    assert result["stdout"] == "begun\n"
    assert 0.4 <= metadata(result)["cpu_seconds"] < 0.4 + host.within(0.2)


@pytest.mark.requirement(21)
def test_time_asleep_is_no_cpu_time(api: Api) -> None:
    need(api, "cpu")
    result = api.run("import time; time.sleep(2); print('slept')", cpu_seconds=1)
    assert (result["outcome"], result["stdout"]) == ("exited", "slept\n")
    assert metadata(result)["cpu_seconds"] < 1  # in user-mode Linux a moment that its host takes away counts


@pytest.mark.requirement(21)
def test_wall_limit_comes_first_if_it_is_shorter(api: Api) -> None:
    need(api, "cpu")
    result = api.run(SPIN, cpu_seconds=20, timeout=1)
    assert result["outcome"] == "timeout"
    assert metadata(result)["cpu_seconds"] <= 1 + host.within(0.5)


# ---- the end of the entrypoint -----------------------------------------------------------------------------

DAEMON = """
import os, time
def daemonise():
    \"\"\"True in a process that has left session, group, directory and parent behind.\"\"\"
    if os.fork():
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    return True
"""


@pytest.mark.requirement(22, 31)
def test_daemon_is_dead_before_outputs_are_read(api: Api, running_server: serving.Server) -> None:
    """It writes ten thousand lines a second; none is written after the last one that was collected."""
    code = (
        DAEMON
        + """
if daemonise():
    with open("/job/grows", "w", buffering=1) as file:
        for number in range(10 ** 9):
            file.write(f"{number}\\n")
            if number == 100:
                open("/job/ready", "w").close()
while not os.path.exists("ready"):
    time.sleep(0.001)
"""
    )
    began = time.monotonic()
    result = api.run(code, outputs=["grows"], keep=True, timeout=30)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert time.monotonic() - began < host.within(5)
    assert running_server.idle(0.5)
    (file,) = result["output_files"]
    content = api.download(result["job_id"], "grows")
    assert len(content) == file["size"]
    numbers = content.split()
    assert numbers[:101] == [str(number).encode() for number in range(101)]
    assert result["outputs_omitted"] == 0


@pytest.mark.requirement(22)
@pytest.mark.parametrize("deaf", ["", DEAF])
def test_holder_of_stdout_does_not_hold_up_the_end(deaf: str, api: Api, running_server: serving.Server) -> None:
    code = DAEMON + f"if daemonise():\n    exec({deaf!r})\n    time.sleep(60)\nprint('over', flush=True)\n"
    began = time.monotonic()
    result = api.run(code, timeout=30)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert "over\n" in result["stdout"]
    assert time.monotonic() - began < host.within(5)
    assert running_server.idle(0.5)


@pytest.mark.requirement(22)
def test_what_the_entrypoint_leaves_running_cannot_write_later(api: Api) -> None:
    code = (
        DAEMON
        + """
if daemonise():
    time.sleep(0.2)
    open("/job/late", "w").close()
    print("late", flush=True)
"""
    )
    result = api.run(code, outputs=["late"], timeout=30)
    assert (result["stdout"], result["output_files"]) == ("", [])


@pytest.mark.requirement(22)
def test_job_is_over_when_its_entrypoint_is_killed(api: Api) -> None:
    result = api.run("import os, time\nif os.fork() == 0: time.sleep(60)\nos.kill(os.getpid(), 9)\n", timeout=30)
    assert (result["outcome"], result["signal"], result["exit_code"]) == ("signaled", 9, None)
    assert metadata(result)["wall_seconds"] < host.within(5)


@pytest.mark.requirement(23)
def test_signal_to_all_ends_that_job_alone(api: Api, running_server: serving.Server) -> None:
    """kill(-1) reaches what kill(2) says: everything of the PID namespace but its init and the caller."""
    code = """
import os, signal
children = []
for _ in range(3):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.pause()
    children.append(child)
os.kill(-1, signal.SIGKILL)
print([os.WTERMSIG(os.waitpid(child, 0)[1]) for child in children])
"""
    before = {running_server.part(word).pid for word in ("api", "spawner", "zygote")}
    with other_client(running_server.url) as other:
        bystander = other.submit({"main.py": "import time; time.sleep(1); print('unharmed')"}, entrypoint="main.py")
        assert serving.wait_until(lambda: other.http.get(f"/status/{bystander}").json()["status"] == "running", 10)
        assert api.run(code)["stdout"] == "[9, 9, 9]\n"
        group = api.run("import os, signal; os.fork(); os.kill(0, signal.SIGKILL)")
        assert (group["outcome"], group["signal"]) == ("signaled", 9)
        assert other.wait(bystander)["outcome"] == "exited"
        assert other.logs(bystander) == "unharmed\n"
    assert {running_server.part(word).pid for word in ("api", "spawner", "zygote")} == before


@pytest.mark.requirement(7)
def test_orphans_are_reaped(api: Api) -> None:
    """A hundred orphans one after the other, with room for ten: none stays as a zombie."""
    code = """
import os, time
for _ in range(100):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.001)
        os._exit(0)
    os.wait()
    time.sleep(0.002)
def states():
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[0]
            except OSError:
                pass
end = time.monotonic() + 5
while "Z" in (found := list(states())) and time.monotonic() < end:
    time.sleep(0.01)
print("Z" in found)
"""
    result = api.run(code, processes=10, timeout=30)
    assert (result["stdout"], result["stderr"]) == ("False\n", "")
