"""No byte of a job reaches a disk: seen by the kernel's write counters, and by looking for a canary."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandrun.model import MIB
from tests import serving
from tests.escape.limits import need
from tests.serving import Api, Server

pytestmark = pytest.mark.requirement(26)

UPLOAD, FILES, OUTPUT, LOG = 24 * MIB, 48 * MIB, 16 * MIB, 4 * MIB

BUSY = f"""
import os
def written():
    return int(next(line.split()[1] for line in open("/proc/self/io") if line.startswith("write_bytes")))
before = written()
for folder in ("/job", "/tmp", "/dev/shm"):
    with open(folder + "/file", "wb") as file:
        file.write(os.urandom({FILES // 3}))
        file.flush()
        os.fsync(file.fileno())
with open("output", "wb") as file:
    file.write(os.urandom({OUTPUT}))
for _ in range({LOG // 65536}):
    os.write(1, b"x" * 65536)
os.write(2, b"%d\\n" % (written() - before))
"""


def busy_job(api: Api) -> str:
    """Upload, tmpfs, output, logs, download, deletion; what the job itself was counted."""
    packed = serving.tarball({"main.py": BUSY, "input": os.urandom(UPLOAD)})
    job_id = api.submit(packed, entrypoint="main.py", outputs=["output"], memory_mb=256)
    result = api.wait(job_id)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0), api.logs(job_id, "stderr")
    assert len(api.download(job_id, "output")) == OUTPUT
    assert len(api.logs(job_id)) == LOG
    counted = api.logs(job_id, "stderr").strip()
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204
    return counted


def counted_outside(folder: Path) -> int:
    """What the counter says of 1 MB written to this folder's file system, so that a 0 means something."""
    before = write_bytes(os.getpid())
    with open(folder / "file", "wb") as file:
        file.write(bytes(MIB))
        file.flush()
        os.fsync(file.fileno())
    return write_bytes(os.getpid()) - before


def write_bytes(pid: int) -> int:
    """What a process has had written to storage, /proc/PID/io; pages of a tmpfs are no part of it."""
    text = Path(f"/proc/{pid}/io").read_text()
    return int(text.split("write_bytes: ")[1].split()[0])


@pytest.mark.root
def test_server_and_job_write_nothing_by_their_own_counters(api: Api, running_server: Server, tmp_path: Path) -> None:
    """All but a few lines of the server's log."""
    if counted_outside(tmp_path) < MIB:
        pytest.skip("writes to this host's temporary directory are not counted by its kernel")
    busy_job(api)
    parts = [running_server.pid, *(running_server.part(word).pid for word in ("api", "spawner", "zygote"))]
    before = {pid: write_bytes(pid) for pid in parts}
    assert busy_job(api) == "0"
    told = {pid: write_bytes(pid) - before[pid] for pid in parts}
    assert sum(told.values()) <= 64 * 1024, told


def sectors() -> int:
    """512-byte units written to block devices so far, loop and RAM devices left out, proc_diskstats(5)."""
    total = 0
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if not fields[2].startswith(("loop", "ram", "zram", "dm-", "sr")):
            total += int(fields[9])
    return total


@pytest.mark.root
def test_disks_are_written_less_than_a_job_moves(api: Api) -> None:
    """Others write too: the quietest of a few tries counts."""
    if not Path("/proc/diskstats").read_text().strip():
        pytest.skip("this host has no block device")
    moved = []
    for _ in range(4):
        os.sync()
        before = sectors()
        busy_job(api)
        os.sync()
        moved.append((sectors() - before) * 512)
        if moved[-1] < min(OUTPUT, UPLOAD, FILES) // 2:
            return
        time.sleep(0.5)
    raise AssertionError(f"each time at least {min(moved)} bytes were written")


# ---- the canary --------------------------------------------------------------------------------------------

PLACES = ("/tmp", "/var", "/home", "/etc", "/core")


def changed_files(since: float, more: list[Path]) -> Iterator[Path]:
    """Regular files of file systems on disks that were written since."""
    memory = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - tmpfs " in line}
    for place in [*map(Path, PLACES), *more, Path.cwd()]:
        for folder, names, files in os.walk(place, onerror=lambda _: None):
            if folder in memory or "site-packages" in folder or "/.git" in folder:
                names.clear()
                continue
            for name in files:
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if status.st_mtime >= since and path.is_file() and not path.is_symlink():
                    yield path


def holds(path: Path, canary: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            rest = b""
            while piece := file.read(4 << 20):
                if canary in rest + piece:
                    return True
                rest = piece[-len(canary) :]
    except OSError:
        pass
    return False


def test_canary_is_found_nowhere(api: Api, running_server: Server) -> None:
    """In the upload, its file names, arguments, variables, input, files, logs, output, and in the memory of a crash."""
    since = time.time() - 2
    canary = f"canary{os.urandom(12).hex()}"
    code = """
import os, sys
canary = sys.argv[1]
kept = [canary * 1000]
for path in ("output", "/tmp/" + canary, "/dev/shm/" + canary, canary):
    open(path, "w").write(canary * 1000)
print(canary, os.environ["NAME"], sys.stdin.read(), open("input").read(), flush=True)
print(canary, file=sys.stderr, flush=True)
os.abort()
"""
    packed = serving.tarball({"main.py": code, "input": canary, f"{canary}.txt": canary * 1000})
    job_id = api.submit(
        packed,
        entrypoint="main.py",
        args=[canary],
        env={"NAME": canary},
        stdin=canary,
        outputs=["output", f"{canary}*"],
    )
    result = api.wait(job_id)
    assert (result["outcome"], result["signal"]) == ("signaled", 6)
    assert api.logs(job_id).count(canary) == 4
    assert api.download(job_id, "output").decode() == canary * 1000
    assert api.http.get(f"/download/{job_id}/{canary}").status_code == 200
    assert api.http.get(f"/download/{canary}").status_code == 404
    assert api.http.post("/run", json={"code": canary, "unknown": canary}).status_code == 400
    wanted = canary.encode()
    state = running_server.log.parent
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204
    found = [path for path in changed_files(since, [state]) if holds(path, wanted)]
    assert found == []
    assert holds(running_server.log, result["job_tag"].encode()), "the search finds what is there"


# ---- where it could go -------------------------------------------------------------------------------------


def test_job_leaves_no_core(api: Api) -> None:
    """Not where it stands, and not through the host's core_pattern: its limit cannot be raised."""
    code = """
import os, resource
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
print(soft, hard, flush=True)
try:
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
except (OSError, ValueError) as error:
    print(type(error).__name__, flush=True)
os.kill(os.getpid(), 11)
"""
    job_id = api.submit({"main.py": code}, entrypoint="main.py")
    result = api.wait(job_id)
    assert (result["outcome"], result["signal"], result["output_files"]) == ("signaled", 11, [])
    piped = Path("/proc/sys/kernel/core_pattern").read_text().startswith("|")
    assert api.logs(job_id).split() == [str(int(piped)), str(int(piped)), "ValueError"]


def test_all_that_a_job_can_write_to_is_in_memory(api: Api) -> None:
    mounts: list[list[str]] = api.run("pass")["isolation"]["inside"]["mounts"]
    writable = {place: kind for place, kind, options, _ in mounts if "rw" in options.split(",")}
    assert writable == {"/job": "tmpfs", "/tmp": "tmpfs", "/dev/shm": "tmpfs"}
    facts: dict[str, Any] = api.http.get("/health").json()["isolation"]
    assert facts["swap_closed"]
    if facts["noswap"]:
        assert all("noswap" in rest.split(",") for place, _, _, rest in mounts if place in writable)


@pytest.mark.root
@pytest.mark.v2
def test_memory_of_jobs_and_of_the_server_is_never_swapped(api: Api, running_server: Server) -> None:
    """Uploads, logs and outputs are in the HTTP process; a job's memory is in its cgroup."""
    need(api, "memory", "swap")
    for pid in (running_server.part("api").pid, running_server.sandboxes()[0][0].pid):
        path = Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition(":")[2]
        assert Path(f"/sys/fs/cgroup{path}/memory.swap.max").read_text() == "0\n"
