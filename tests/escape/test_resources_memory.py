"""One memory limit over everything that a job can hold memory by, and nothing of it left afterwards."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from sandrun.model import MIB
from tests import host, serving
from tests.escape.limits import FILL, meminfo, metadata, need, returns_to
from tests.serving import Api

pytestmark = pytest.mark.requirement(18)


@pytest.fixture(autouse=True)
def _limited(shared_api: Api) -> None:
    need(shared_api, "memory")


def assert_memory_limit(result: dict[str, Any], most_mb: int = 512) -> None:
    assert (result["outcome"], result["status"]) == ("memory_limit", "failed"), result
    assert result["exit_code"] is None
    assert metadata(result)["memory_peak_bytes"] <= most_mb * MIB


# ---- what counts -------------------------------------------------------------------------------------------

HOLDERS = {
    "heap": "kept = [bytearray(b'x') * (1 << 20) for _ in range(MB)]",
    "shared mapping": """
import mmap
kept = mmap.mmap(-1, MB << 20)
for at in range(0, MB << 20, 4096):
    kept[at] = 1
""",
    "private mapping of zeros": """
import mmap
kept = mmap.mmap(-1, MB << 20, flags=mmap.MAP_PRIVATE)
for at in range(0, MB << 20, 4096):
    kept[at] = 1
""",
    "thread stacks": """
import threading, time
threading.stack_size(32 << 20)
def use(depth):
    return use(depth - 1) if depth else time.sleep(100)
import sys; sys.setrecursionlimit(10 ** 6)
kept = bytearray(b"x") * ((MB - 40) << 20)
for _ in range(40):
    threading.Thread(target=use, args=(50_000,), daemon=True).start()
time.sleep(20)
""",
    "files and heap together": FILL
    + """
print(fill("/job/file", (MB // 2) << 20), flush=True)
kept = bytearray(b"x") * ((MB - MB // 2) << 20)
""",
    "files in a folder of shared memory and heap": FILL
    + """
print(fill("/dev/shm/file", (MB // 2) << 20), flush=True)
kept = bytearray(b"x") * ((MB - MB // 2) << 20)
""",
    "deleted files that are open": FILL
    + """
file = open("gone", "w+b", buffering=0)
os.unlink("gone")
for _ in range(MB // 2):
    file.write(bytes(1 << 20))
kept = bytearray(b"x") * ((MB - MB // 2) << 20)
""",
    "one child": """
import os
if os.fork() == 0:
    kept = [bytearray(b"x") * (1 << 20) for _ in range(MB)]
    os._exit(0)
os.wait()
""",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        kept = [bytearray(b"x") * (1 << 20) for _ in range(MB)]
    os._exit(0)
os.wait()
time.sleep(20)
""",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_job_cannot_hold_more_than_its_limit_by(holder: str, api: Api) -> None:
    """The same program passes with a quarter of it."""
    code = HOLDERS[holder]
    if "sleep(20)" not in code:
        assert api.run(code.replace("MB", "64"), memory_mb=256)["outcome"] == "exited"
    assert_memory_limit(api.run(code.replace("MB", "256"), memory_mb=256, timeout=30), 256)


def test_ten_children_of_80_mb_trip_a_limit_of_512(api: Api) -> None:
    code = """
import os, time
print("begun", flush=True)
open("written", "w").write("before")
for number in range(10):
    if os.fork() == 0:
        kept = bytearray(b"x") * (80 << 20)
        time.sleep(90)
time.sleep(90)
"""
    result = api.run(code, outputs=["written"], timeout=90)
    assert_memory_limit(result)
    assert metadata(result)["wall_seconds"] < host.within(10)
    assert result["stdout"] == "begun\n"
    (kept,) = result["output_files"]
    assert base64.b64decode(kept["content_base64"]) == b"before"


def test_six_children_of_80_mb_do_not(api: Api) -> None:
    code = """
import os
for number in range(6):
    if os.fork() == 0:
        kept = bytearray(b"x") * (80 << 20)
        os.read(0, 1)
        os._exit(0)
print([os.waitstatus_to_exitcode(os.wait()[1]) for number in range(6)])
"""
    result = api.run(code.replace("80 << 20", "70 << 20"))
    assert (result["outcome"], result["stdout"]) == ("exited", "[0, 0, 0, 0, 0, 0]\n")


def test_pipes_count(api: Api) -> None:
    """With 64 MB: 36 MB of heap fit, 28 MB in pipes fit, both do not."""
    heap = "kept = bytearray(b'x') * (36 << 20)\n"
    pipes = """
import os
ends = []
for _ in range(448):
    ends.append(os.pipe())
    os.set_blocking(ends[-1][1], False)
    os.write(ends[-1][1], bytes(65536))
"""
    for code in (heap, pipes):
        assert api.run(code, memory_mb=64)["outcome"] == "exited"
    assert_memory_limit(api.run(pipes + heap, memory_mb=64), 64)


def test_what_it_reads_from_the_hosts_disk_is_given_back(api: Api) -> None:
    """Page cache that a job brings in is its own, and no reason to end it: the kernel takes it back."""
    code = """
import os
total = 0
for folder, _, names in os.walk("/usr/lib"):
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.R_OK):
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    total += len(piece)
    if total > 200 << 20:
        break
print(total > 100 << 20)
"""
    result = api.run(code, memory_mb=64, timeout=60)
    assert (result["outcome"], result["stdout"]) == ("exited", "True\n"), result["stderr"]


# ---- the store of files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/job", "/tmp", "/dev/shm"])
def test_full_store_is_no_space_left_and_not_the_end(folder: str, api: Api) -> None:
    code = (
        FILL
        + f"""
done, errno = fill("{folder}/file")
print(done, errno)
try:
    os.mkdir("/job/more"); open("/job/more/x", "wb", buffering=0).write(b"x")
except OSError as error:
    print(error.errno)
os.truncate("{folder}/file", done - (1 << 20))
print(open("/job/small", "w").write("fits"))
fill("/tmp/rest")
"""
    )
    result = api.run(code, memory_mb=256)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0), result["stderr"]
    assert result["limits_hit"] == ["storage"]
    done, errno, again, written = result["stdout"].split()
    assert (errno, again, written) == ("28", "28", "4")
    assert 200 * MIB < int(done) < 256 * MIB


@pytest.mark.parametrize("memory_mb", [64, 512])
def test_store_is_smaller_than_the_limit(memory_mb: int, api: Api) -> None:
    result = api.run("import os; print(os.statvfs('.').f_blocks * os.statvfs('.').f_frsize)", memory_mb=memory_mb)
    assert int(result["stdout"]) == (memory_mb - 32) * MIB


def test_hole_in_a_mapped_file_is_a_bus_error_when_the_store_is_full(api: Api) -> None:
    """Not a hang: there is no other way to tell a program that a page cannot be had."""
    code = (
        FILL
        + """
import mmap
with open("sparse", "w+b") as file:
    file.truncate(1 << 20)
    mapped = mmap.mmap(file.fileno(), 0)
print(fill("file")[1], flush=True)
mapped[4096] = 1
"""
    )
    result = api.run(code, memory_mb=64)
    assert (result["outcome"], result["signal"], result["stdout"]) == ("signaled", 7, "28\n")


# ---- what becomes of the job -------------------------------------------------------------------------------


def test_job_ends_within_100_ms_of_the_kill_of_a_child(api: Api) -> None:
    """The parent lives on, and says when it saw the child die; the best of three, as the machine is others' too."""
    code = """
import os, time
child = os.fork()
if child == 0:
    kept = [bytearray(b"x") * (1 << 20) for _ in range(512)]
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
while True:
    os.write(1, b"%f\\n" % time.monotonic())
    time.sleep(0.002)
"""
    lived = []
    for _ in range(3):
        result = api.run(code, memory_mb=64, timeout=20)
        assert_memory_limit(result, 64)
        told = [float(line) for line in result["stdout"].split()]
        lived.append(told[-1] - told[0] if told else 0.0)
    assert min(lived) < 0.1, lived


def test_job_that_shrugs_off_the_kill_of_a_child_has_met_its_limit_all_the_same(api: Api) -> None:
    """It even exits with 0 at once."""
    code = """
import os
child = os.fork()
if child == 0:
    kept = [bytearray(b"x") * (1 << 20) for _ in range(512)]
os.waitpid(child, 0)
print("done", flush=True)
os._exit(0)
"""
    assert_memory_limit(api.run(code, memory_mb=64, timeout=20), 64)


def test_job_cannot_make_the_kernel_choose_another(api: Api) -> None:
    """oom_score_adj cannot be lowered: the file is read-only."""
    code = """
print(open("/proc/self/oom_score_adj").read().strip())
try:
    open("/proc/self/oom_score_adj", "w").write("-1000")
except OSError as error:
    print(error.errno)
"""
    assert api.run(code)["stdout"] == "1000\n30\n"


def test_server_goes_on_while_jobs_run_out_of_memory(api: Api, running_server: serving.Server) -> None:
    """Its own processes are not the kernel's choice, nor are the next job's."""
    before = {running_server.part(word).pid for word in ("api", "spawner", "zygote")}
    for _ in range(5):
        assert_memory_limit(api.run(HOLDERS["heap"].replace("MB", "128"), memory_mb=64), 64)
    assert {running_server.part(word).pid for word in ("api", "spawner", "zygote")} == before
    assert api.run("print(1)")["stdout"] == "1\n"


# ---- afterwards --------------------------------------------------------------------------------------------


@pytest.mark.requirement(19)
def test_shared_memory_of_the_host_returns(api: Api) -> None:
    """300 MB of files: there while the job runs, gone with it, though they were never deleted."""
    code = (
        FILL
        + """
import sys
print(fill("/job/file", 100 << 20), fill("/tmp/file", 100 << 20), fill("/dev/shm/file", 100 << 20), flush=True)
sys.stdin.read()
import time; time.sleep(1.5)
"""
    )
    before = meminfo("Shmem")
    result: dict[str, Any] = {}
    job = threading.Thread(target=lambda: result.update(api.run(code)))
    job.start()
    try:
        assert serving.wait_until(lambda: meminfo("Shmem") > before + 250 * MIB, 20)
    finally:
        job.join()
    assert result["stdout"] == f"({100 << 20}, 0) ({100 << 20}, 0) ({100 << 20}, 0)\n"
    assert returns_to(lambda: meminfo("Shmem"), before, 64 * MIB)


def dying_cgroups() -> int:
    """Memory cgroups that are removed but still hold memory, with all others: what v1 tells; on v2 exactly those."""
    try:
        with open("/sys/fs/cgroup/cgroup.stat") as file:
            return int(file.read().split("nr_dying_descendants ")[1].split()[0])
    except (OSError, IndexError):
        with open("/proc/cgroups") as file:
            return next(int(line.split()[2]) for line in file if line.startswith("memory\t"))


@pytest.mark.requirement(19)
@pytest.mark.root
def test_no_cgroup_outlives_its_memory(api: Api) -> None:
    """The files are gone before the cgroup that paid for them: else it would stay, dying, with their charge."""
    api.run("print(1)")
    before = dying_cgroups()
    for _ in range(12):
        assert api.run(FILL + "fill('file', 20 << 20)")["outcome"] == "exited"
    assert returns_to(dying_cgroups, before, 4, 20), (before, dying_cgroups())


@pytest.mark.requirement(19)
def test_memory_of_an_upload_is_accounted(start_server: Callable[..., serving.Server]) -> None:
    """Kept uploads fill the server's store: what does not fit is refused, and room comes back by erasing."""
    server = start_server("--store-bytes", str(64 * MIB), "--client-store-share", "1")
    big = serving.tarball({"main.py": "print(1)", "data": os.urandom(40 * MIB)})
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        first = api.submit({"main.py": "import time; time.sleep(60)"}, entrypoint="main.py")
        waiting = api.submit(big, entrypoint="main.py")  # in the queue behind it, and kept until it starts
        refused = http.post(
            "/submit",
            files={
                "manifest": ("m", json.dumps({"entrypoint": "main.py"}).encode(), "application/json"),
                "files": ("f", big, "application/gzip"),
            },
        )
        assert refused.status_code in (429, 503), refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert http.delete(f"/jobs/{waiting}").status_code == 204
        again = api.submit(big, entrypoint="main.py")
        for job_id in (first, again):
            assert http.delete(f"/jobs/{job_id}").status_code == 204
