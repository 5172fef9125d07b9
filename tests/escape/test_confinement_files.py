"""The file tree of a job: what it may not read, what is not there, and that three places alone can be written."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandrun.sandbox import rootfs
from tests.escape.probing import PYTHON, Call, Inside, call, known, outside, outside_answers, succeeded
from tests.serving import Api

HERE = -100
O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_PATH, O_DIRECTORY = 1, 2, 0o100, 0o1000, 0o10000000, 0o200000


def opening(path: str, flags: int = 0) -> Call:
    return call("openat", HERE, f"s:{path}", flags, 0o600)


# ---- reading -----------------------------------------------------------------------------------------------

CLOSED = {path: opening(path) for path in ("/etc/passwd", "/etc/shadow")}
ABSENT = {
    path: opening(path)
    for path in (
        "/home", "/root", "/sys", "/run", "/var", "/srv", "/boot", "/mnt", "/media", "/opt", "/usr/local/src",
        "/usr/local/etc", "/etc/hostname", "/etc/machine-id", "/etc/fstab", "/etc/sudoers", "/etc/ssh",
        "/etc/ssl/private", "/etc/crontab", "/etc/environment", "/var/lib/dbus/machine-id", "/run/systemd",
        "/sys/class/net", "/sys/fs/cgroup", "/sys/kernel", "/proc/1/status", "/dev/kmsg", "/dev/mem", "/dev/vda",
        "/dev/sda", "/dev/tty", "/dev/ptmx", "/dev/pts", "/dev/console", "/dev/fuse", "/dev/kvm", "/dev/net/tun",
        "/dev/loop0", "/dev/mqueue", "/dev/hugepages", "/dev/log", "/dev/vsock", "/dev/userfaultfd",
        str(Path(__file__)), os.path.expanduser("~/.ssh"), "/.dockerenv",
    )
}  # fmt: skip


@pytest.mark.requirement(9)
def test_password_files_are_permission_denied(inside_any: Inside) -> None:
    assert inside_any.answers(CLOSED) == dict.fromkeys(CLOSED, "EACCES")
    assert outside_answers(CLOSED)["/etc/passwd"] == "ok"


@pytest.mark.requirement(9, 11, 14)
def test_the_hosts_files_are_not_there(inside_any: Inside) -> None:
    assert inside_any.answers(ABSENT) == dict.fromkeys(ABSENT, "ENOENT")
    assert {"/home", "/root", "/sys", "/var", "/etc/fstab", str(Path(__file__))} <= {
        path for path in ABSENT if os.path.exists(path)
    }


ESCAPES = {
    "dots": opening("/job/../../../../../../../../../home"),
    "dots from the work directory": opening("../../../../../home"),
    "proc root": opening("/proc/self/root/home"),
    "proc cwd": opening("/proc/self/cwd/../home"),
    "thread root": opening("/proc/thread-self/root/../home"),
    "root of pid 1": opening("/proc/1/root/home"),
    "a descriptor of pid 1": opening("/proc/1/fd/3"),
    "the zygote's stage": opening("/.stage/anything"),
    "old root": opening("/..//home"),
}


@pytest.mark.requirement(9)
def test_no_path_leads_out(inside_any: Inside) -> None:
    assert inside_any.answers(ESCAPES) == dict.fromkeys(ESCAPES, "ENOENT")


@pytest.mark.requirement(9)
def test_top_of_the_tree_is_an_exact_list(inside: Inside) -> None:
    seen = set(inside.says("surroundings.py")["folders"]["/"])
    links = {name for name in rootfs.TOP_LINKS if os.path.lexists(f"/{name}")}
    own = {".caches", ".empty", ".stage", "dev", "environments", "etc", "job", "proc", "tmp", "usr"}
    assert seen == own | links


@pytest.mark.requirement(9, 14)
def test_etc_is_ours(inside: Inside) -> None:
    seen = set(inside.says("surroundings.py")["folders"]["/etc"])
    trees = {name.partition("/")[0] for name, _ in rootfs.ETC_TREES}
    assert seen <= {*rootfs.ETC_FILES, *rootfs.ETC_TEXTS, *rootfs.ETC_CLOSED, *trees}
    assert {"passwd", "shadow", "group", "nsswitch.conf", "hosts"} <= seen


# ---- writing -----------------------------------------------------------------------------------------------

WRITES: dict[str, tuple[Call, str, str]] = {
    # what, the call, the answer inside, the answer outside
    "open a program": (opening("/usr/bin/env", O_WRONLY), "EACCES", ""),
    "open a file": (opening("/usr/lib/os-release", O_RDWR), "EACCES", "ok"),
    "truncate": (call("truncate", "s:/usr/nonexistent", 0), "ENOENT", "ENOENT"),
    "create in /usr": (call("mkdirat", HERE, "s:/usr/probe", 0o700), "EROFS", ""),
    "create in /": (call("mkdirat", HERE, "s:/probe", 0o700), "EROFS", ""),
    "create in /etc": (call("mkdirat", HERE, "s:/etc/probe", 0o700), "EROFS", ""),
    "create in /dev": (call("mkdirat", HERE, "s:/dev/probe", 0o700), "EROFS", ""),
    "create in /environments": (call("mkdirat", HERE, "s:/environments/probe", 0o700), "EROFS", ""),
    "create in /proc": (call("mkdirat", HERE, "s:/proc/probe", 0o700), "ENOENT|EROFS", ""),
    "link into /usr": (call("symlinkat", "s:x", HERE, "s:/usr/probe"), "EROFS", ""),
    "remove": (call("unlinkat", HERE, "s:/usr/bin/env", 0), "EROFS", ""),
    "remove a device": (call("unlinkat", HERE, "s:/dev/null", 0), "EROFS", ""),
    "remove the work directory": (call("unlinkat", HERE, "s:/job", 0x200), "EROFS", ""),
    "rename": (call("renameat2", HERE, "s:/usr/bin", HERE, "s:/usr/probe", 0), "EROFS", ""),
    "chmod": (call("fchmodat", HERE, "s:/usr/bin/env", 0o777), "EROFS", ""),
    "chmod a device": (call("fchmodat", HERE, "s:/dev/null", 0o777), "EROFS", ""),
    "chmod the root": (call("fchmodat", HERE, "s:/", 0o777), "EROFS", ""),
    "touch": (call("utimensat", HERE, "s:/usr/bin/env", 0, 0), "EROFS", ""),
    "touch a device": (call("utimensat", HERE, "s:/dev/null", 0, 0), "EROFS", ""),
    "open the null device": (opening("/dev/null", O_RDWR), "ok", "ok"),
    "write in the work directory": (opening("/job/made", O_CREAT | O_WRONLY), "ok", ""),
    "write in /tmp": (opening("/tmp/made", O_CREAT | O_WRONLY), "ok", "ok"),
    "write in /dev/shm": (opening("/dev/shm/made", O_CREAT | O_WRONLY), "ok", ""),
    "hard link of the host's file": (call("linkat", HERE, "s:/usr/bin/env", HERE, "s:/tmp/probe", 0), "EXDEV", ""),
    "the program itself": (opening("/proc/self/exe", O_WRONLY), "EACCES|ETXTBSY", "ETXTBSY"),
    "the program itself, cut": (opening("/proc/self/exe", O_RDWR | O_TRUNC), "EACCES|ETXTBSY|EROFS", "ETXTBSY"),
    "sysctl": (opening("/proc/sys/kernel/hostname", O_WRONLY), "EACCES|EROFS", "ok"),
    "oom_score_adj": (opening("/proc/self/oom_score_adj", O_WRONLY), "EROFS", "ok"),
    "uid_map": (opening("/proc/self/uid_map", O_WRONLY), "EROFS", "ok"),
    "sysrq": (opening("/proc/sysrq-trigger", O_WRONLY), "EACCES|EROFS|ENOENT", ""),
    "its memory": (opening("/proc/self/mem", O_RDWR), "EROFS", "ok"),
    "comm": (opening("/proc/self/comm", O_WRONLY), "EROFS", "ok"),
    "attributes": (opening("/proc/self/attr/current", O_WRONLY), "EROFS|ENOENT", ""),
}  # fmt: skip


@pytest.mark.requirement(7, 9)
def test_writes_are_refused_but_in_three_places(inside_any: Inside) -> None:
    calls = known({what: row[0] for what, row in WRITES.items()})
    answers = inside_any.answers(calls)
    if inside_any.kind.compiled:  # this program is the job's own file
        answers["the program itself"] = answers["the program itself, cut"] = "ETXTBSY"
    wrong = {what: answer for what, answer in answers.items() if answer not in WRITES[what][1].split("|")}
    assert not wrong


@pytest.mark.root
@pytest.mark.requirement(7, 9)
def test_writes_are_allowed_outside() -> None:
    calls = known({what: row[0] for what, row in WRITES.items() if row[2]})
    answers = outside_answers(calls)
    Path("/tmp/made").unlink(missing_ok=True)
    assert answers == {what: WRITES[what][2] for what in calls}


DEVICES = {f"/dev/{name}" for name in rootfs.DEVICES}


@pytest.mark.requirement(9)
def test_nothing_else_in_the_whole_tree_is_writable(insides: dict[str, Inside], api: Api) -> None:
    """Every folder is tried, every file is asked."""
    found = insides["in-place"].says("writable.py", timeout=120)
    assert found["seen"] > 1000
    assert found["by trying"] == ["/dev/shm", "/job", "/tmp"]
    assert set(found["claimed"]) == {"/dev/shm", "/job", "/job/main.py", "/tmp", *DEVICES}
    assert found["proc"] == []


NO_SPACE = """
import errno, json, os
said = {}
for place in ("/job", "/tmp", "/dev/shm"):
    free = os.statvfs(place)
    said[place] = [free.f_blocks * free.f_frsize, free.f_files]
chunk = bytes(1 << 20)
with open("/tmp/big", "wb", buffering=0) as file:
    try:
        while True:
            file.write(chunk)
    except OSError as error:
        said["full"] = errno.errorcode[error.errno]
for place in ("/job", "/tmp", "/dev/shm"):
    try:
        open(f"{place}/more", "wb", buffering=0).write(chunk)
        said["more in " + place] = "ok"
    except OSError as error:
        said["more in " + place] = errno.errorcode[error.errno]
os.unlink("/tmp/big")
count = 0
os.mkdir("/tmp/many")
try:
    while True:
        os.close(os.open(f"/tmp/many/{count}", os.O_CREAT))
        count += 1
except OSError as error:
    said["inodes"] = errno.errorcode[error.errno]
said["count"] = count
print(json.dumps(said))
"""


@pytest.mark.requirement(9, 18, 24)
def test_the_three_places_are_one_bounded_store(insides: dict[str, Inside], api: Api) -> None:
    """Full is ENOSPC and no more: the job goes on, and does not run into its memory limit."""
    result = succeeded(insides["in-place"].run(NO_SPACE, memory_mb=128, timeout=60, outputs=["nothing"]))
    said: dict[str, Any] = json.loads(result["stdout"])
    sizes = {tuple(said[place]) for place in ("/job", "/tmp", "/dev/shm")}
    assert len(sizes) == 1
    size, inodes = sizes.pop()
    assert size < 128 << 20
    assert inodes <= 50_000
    assert said["full"] == said["inodes"] == "ENOSPC"
    assert {said[f"more in {place}"] for place in ("/job", "/tmp", "/dev/shm")} == {"ENOSPC"}
    assert said["count"] <= 50_000


# ---- /proc -------------------------------------------------------------------------------------------------

MASKED = (
    "kcore kallsyms keys key-users timer_list iomem ioports config.gz interrupts partitions diskstats cmdline sysvipc"
    " bus irq sysrq-trigger scsi acpi sched_debug kpagecount kpageflags kpagecgroup kmsg slabinfo vmallocinfo modules"
    " cgroups fs locks softirqs schedstat pressure swaps tty driver bootconfig sys/kernel/random/boot_id"
    " sys/kernel/core_pattern sys/fs/file-nr sys/fs/inode-state sys/dev sys/debug"
).split()
KEPT = "meminfo stat cpuinfo version loadavg uptime filesystems mounts self/status self/maps sys/kernel/pid_max".split()

READ = """
import json, os, sys
said = {}
for name in json.loads(sys.stdin.read()):
    path = "/proc/" + name
    try:
        said[name] = len(os.listdir(path)) if os.path.isdir(path) else len(open(path, "rb").read(4096))
    except OSError as error:
        said[name] = -error.errno
print(json.dumps(said))
"""


@pytest.mark.requirement(10, 14)
def test_what_tells_of_the_host_is_masked(inside: Inside) -> None:
    """Empty, not there, or closed."""
    said = json.loads(succeeded(inside.run(READ, stdin=json.dumps([*MASKED, *KEPT])))["stdout"])
    assert {name for name in MASKED if said[name] > 0} == set()
    assert {name for name in KEPT if said[name] <= 0} == set()
    harmless = [name for name in MASKED if name not in ("kmsg", "sysrq-trigger")]  # reading takes from the host's log
    told = json.loads(outside(READ, stdin=json.dumps(harmless)).stdout)
    assert len({name for name in harmless if told[name] > 0}) > 10  # this kernel has them


@pytest.mark.requirement(10)
def test_nothing_at_the_top_of_proc_is_neither_listed_nor_masked(inside: Inside) -> None:
    """A kernel may bring new files: what is not known is empty."""
    top = [name for name in os.listdir("/proc") if not name.isdigit() and name not in rootfs.SHOWN]
    said = json.loads(succeeded(inside.run(READ, stdin=json.dumps(top)))["stdout"])
    assert {name for name in top if said[name] > 0} == set()


@pytest.mark.requirement(10)
def test_job_sees_its_own_processes_alone(inside: Inside) -> None:
    """Not even init, which is another user's, or with one uid not dumpable."""
    found = inside.says("surroundings.py")["processes"]
    assert "1" not in found
    assert len(found) == (2 if "below" in inside.kind.name else 1), found


TOOLS = """
listed=$(ps aux)  # no pipe: ps may look before wc is there
echo "$listed" | wc -l
ps axo args=
echo ---
free -b | awk '/Mem:/ { print $2 }'
echo ---
top -bn1 | head -1
echo ---
nproc
"""


@pytest.mark.needs("ps", "free", "top")
@pytest.mark.requirement(10)
def test_ps_free_and_top_work(api: Api) -> None:
    if subprocess.run(["ps", "-e"], capture_output=True).returncode:
        pytest.skip("ps does not work on this kernel (user-mode Linux), sandbox or not")
    told = subprocess.run(["sh", "-c", TOOLS], capture_output=True, text=True, timeout=60, check=False)
    if told.stderr:
        pytest.skip(f"they do not work on this host: {told.stderr}")
    result = succeeded(api.job({"main.sh": TOOLS}, entrypoint="main.sh"))
    assert result["stderr"] == ""
    ps, free, top, nproc = (part.strip() for part in result["stdout"].split("---"))
    lines, *commands = ps.splitlines()
    assert int(lines) == 3  # a head, the shell, and ps
    assert len(commands) == 2, commands
    assert "main.sh" in commands[0]
    assert int(free) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") or int(free) > 1 << 27
    assert top.startswith("top - ")
    assert int(nproc) == len(os.sched_getaffinity(0))


@pytest.mark.needs("node")
@pytest.mark.requirement(10)
def test_node_counts_cpus(api: Api) -> None:
    code = "const os = require('os'); console.log(os.cpus().length, os.totalmem() > 0, os.uptime() > 0)"
    result = succeeded(api.job({"main.js": code}, entrypoint="main.js"))
    assert result["stdout"] == f"{os.cpu_count()} true true\n"


OF_INIT = {
    name: opening(f"/proc/1/{name}")
    for name in ("mem", "maps", "exe", "environ", "root", "cwd", "fd", "ns/user", "cmdline", "status", "stat", "stack")
}


@pytest.mark.requirement(7)
def test_process_1_cannot_be_looked_into(inside_any: Inside) -> None:
    assert inside_any.answers(OF_INIT) == dict.fromkeys(OF_INIT, "ENOENT")
    assert outside_answers(OF_INIT)["mem"] == "ok"


# ---- /dev --------------------------------------------------------------------------------------------------


@pytest.mark.requirement(11)
def test_devices_are_an_exact_list(inside: Inside) -> None:
    seen = inside.says("surroundings.py")
    assert seen["folders"]["/dev"] == sorted([*rootfs.DEVICES, *rootfs.LINKS, "shm"])
    assert seen["links"] == rootfs.LINKS
    assert seen["devices"] == {"null": [1, 3], "zero": [1, 5], "full": [1, 7], "random": [1, 8], "urandom": [1, 9]}


DEVICES_WORK = """
import os
assert os.read(os.open("/dev/zero", os.O_RDONLY), 3) == bytes(3)
for name in ("random", "urandom"):
    assert len(os.read(os.open("/dev/" + name, os.O_RDONLY), 16)) == 16
assert os.write(os.open("/dev/null", os.O_WRONLY), b"x") == 1
assert os.read(os.open("/dev/null", os.O_RDONLY), 1) == b""
try:
    os.write(os.open("/dev/full", os.O_WRONLY), b"x")
except OSError as error:
    print(error.errno)
print("out", file=open("/dev/stdout", "w"))
print("err", file=open("/dev/stderr", "w"))
print(open("/dev/stdin").read(), os.listdir("/dev/fd"))
"""


@pytest.mark.requirement(11, 36)
def test_devices_work(inside: Inside) -> None:
    """Also /dev/stdout and /dev/stderr, which are pipes of another user."""
    result = succeeded(inside.run(DEVICES_WORK, stdin="in"))
    assert result["stdout"].startswith("out\n28\nin ['0', '1', '2'")
    assert result["stderr"] == "err\n"


# ---- what would name the host ------------------------------------------------------------------------------


@pytest.mark.requirement(14)
def test_names_of_the_host_do_not_show(inside: Inside) -> None:
    seen = inside.says("surroundings.py")
    system, node, release, _, machine = seen["uname"]
    assert (node, seen["domain"]) == ("sandbox", "(none)")
    assert (system, release, machine) == ("Linux", platform.release(), platform.machine())
    text = str(seen)
    secrets = [Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id")]
    for secret in [path.read_text().strip() for path in secrets if path.exists()]:
        assert secret not in text
    if len(socket.gethostname()) > 4:
        assert socket.gethostname() not in text
    assert {line.split(":", 2)[2] for line in seen["cgroup"]} == {"/"}
    assert seen["keys"] == ["", ""]


# ---- set-uid programs --------------------------------------------------------------------------------------


@pytest.mark.requirement(3)
def test_set_uid_programs_are_harmless(inside: Inside) -> None:
    """Those of the host's /usr, and one that the job makes itself."""
    code = f"""
import json, os, shutil, subprocess
said = {{}}
found = [e.path for e in os.scandir("/usr/bin") if e.is_file(follow_symlinks=False) and e.stat().st_mode & 0o6000]
shutil.copy("{PYTHON}", "mine")
os.chmod("mine", 0o6755)
said["mode"] = oct(os.stat("mine").st_mode)
ask = "import os; print(os.getuid(), os.geteuid(), [l.split()[1] for l in open('/proc/self/status') if l[:3] in want])"
ask = "want = ('Cap', 'NoN'); " + ask
said["mine"] = subprocess.run(["./mine", "-c", ask], capture_output=True, text=True).stdout
said["found"] = found
for name in ("su", "sudo", "mount", "ping", "newuidmap"):
    if shutil.which(name):
        said[name] = subprocess.run([name, "-c", "id"], capture_output=True, stdin=subprocess.DEVNULL).returncode
print(json.dumps(said))
"""
    said = json.loads(succeeded(inside.run(code, outputs=["nothing"]))["stdout"])
    assert said["mine"] == f"1000 1000 {['0' * 16] * 5 + ['1']}\n"
    assert 0 not in [said[name] for name in ("su", "sudo", "mount") if name in said]
