"""Each limit by a program that asks for a little more than it: harmless even where the limit is missing.

The attacks in earnest are in test_resources_*.py. These are for `./scripts/test mutations`, which takes limits away.
"""

from __future__ import annotations

import os

import pytest

from sandrun.model import MIB
from tests import host
from tests.escape.limits import metadata, need
from tests.escape.probing import Inside, held
from tests.serving import Api, Server

TASKS = """
import threading
stop, made = threading.Event(), 1
for _ in range(12):
    try:
        threading.Thread(target=stop.wait).start()
        made += 1
    except RuntimeError:
        break
print(made)
stop.set()
"""


@pytest.mark.requirement(20)
def test_sixth_task_is_one_too_many(api: Api) -> None:
    need(api, "pids")
    result = api.run(TASKS, processes=5)
    assert (result["stdout"], result["limits_hit"]) == ("5\n", ["processes"])
    assert api.run(TASKS, processes=20)["stdout"] == "13\n"


@pytest.mark.requirement(18)
def test_160_mb_are_too_many_for_64(api: Api) -> None:
    need(api, "memory")
    code = "kept = bytearray(b'x') * (160 << 20); print('kept')"
    result = api.run(code, memory_mb=64)
    assert (result["outcome"], result["stdout"]) == ("memory_limit", "")
    assert metadata(result)["memory_peak_bytes"] <= 64 * MIB
    assert api.run(code)["stdout"] == "kept\n"


@pytest.mark.requirement(18)
def test_job_whose_child_was_killed_for_memory_is_ended(api: Api) -> None:
    """It does not wait for it, and would go on for a while."""
    need(api, "memory")
    code = """
import os, time
if os.fork() == 0:
    kept = bytearray(b"x") * (160 << 20)
    os._exit(0)
for _ in range(200):
    time.sleep(0.1)
print("went on")
"""
    result = api.run(code, memory_mb=64)
    assert (result["outcome"], result["stdout"]) == ("memory_limit", "")
    assert metadata(result)["wall_seconds"] < host.within(3)


@pytest.mark.requirement(21)
def test_twenty_seconds_are_too_many_for_one(api: Api) -> None:
    result = api.run("import time; open('made', 'w').write('x'); time.sleep(20)", timeout=1, outputs=["made"])
    assert result["outcome"] == "timeout"
    assert [file["path"] for file in result["output_files"]] == ["made"]
    assert 1 <= metadata(result)["wall_seconds"] < 1 + host.within(1)


@pytest.mark.requirement(21)
def test_three_seconds_of_cpu_are_too_many_for_a_third(api: Api) -> None:
    need(api, "cpu")
    result = api.run("import time\nwhile time.process_time() < 3: pass\n", cpu_seconds=0.3, timeout=20)
    assert result["outcome"] == "cpu_limit"
    assert metadata(result)["cpu_seconds"] < 0.3 + host.within(0.3)


@pytest.mark.requirement(24)
def test_store_tells_its_size_and_its_inodes(api: Api) -> None:
    code = "import os; s = os.statvfs('.'); print(s.f_blocks * s.f_frsize, s.f_files)"
    for memory_mb in (512, 128):  # as sandboxes are built, and changed
        assert api.run(code, memory_mb=memory_mb)["stdout"] == f"{(memory_mb - 32) * MIB} 50000\n"


@pytest.mark.requirement(22)
def test_child_that_outlives_the_entrypoint_says_nothing_more(api: Api) -> None:
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(10)
    print("late", flush=True)
    open("late", "w").close()
    os._exit(0)
"""
    result = api.run(code, outputs=["late"])
    assert (result["outcome"], result["stdout"], result["output_files"]) == ("exited", "", [])
    assert metadata(result)["wall_seconds"] < 10


@pytest.mark.root
@pytest.mark.requirement(7)
def test_process_1_leads_a_session_of_its_own(insides: dict[str, Inside], running_server: Server) -> None:
    with held(insides["in-place"], running_server) as job:
        init = job.init()
        assert os.getsid(init.pid) == init.pid
        assert os.getsid(job.process.pid) == job.process.pid
