"""Two jobs know nothing of each other: not while both run, and not one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from sandrun.linux.seccomp import resolve
from tests.escape.probing import PYTHON, Held, Inside, held, outside, succeeded
from tests.serving import Api, Server

pytestmark = pytest.mark.requirement(15)

MARK = "canary-5d1f"

LEAVE = f"""
import ctypes, errno, fcntl, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.shmat.restype = ctypes.c_void_p
said = {{}}


def attempt(name, function):
    if name in SKIP:
        return
    try:
        function()
        said[name] = "ok"
    except OSError as error:
        said[name] = errno.errorcode[error.errno]


def libc_call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def file(path):
    with open(path, "w") as f:
        f.write("{MARK}")


def bound(address, kind=socket.SOCK_STREAM):
    s = socket.socket(socket.AF_UNIX, kind)
    s.bind(address)
    s.listen()
    kept.append(s)


kept = []
for place in ("/job", "/tmp", "/dev/shm"):
    attempt("file in " + place, lambda: file(place + "/{MARK}"))
attempt("System V memory", lambda: libc_call("shmget", 0x5D1F, 4096, 0o1666))
attempt("System V semaphore", lambda: libc_call("semget", 0x5D1F, 1, 0o1666))
attempt("System V queue", lambda: libc_call("msgget", 0x5D1F, 0o1666))
attempt("POSIX queue", lambda: libc_call("mq_open", b"/{MARK}", os.O_CREAT | os.O_RDWR, 0o666, None))
attempt("key", lambda: libc_call("syscall", NUMBERS["add_key"], b"user", b"{MARK}", b"x", ctypes.c_size_t(1), -4))
attempt("abstract socket", lambda: bound("\\0{MARK}"))
attempt("socket in /tmp", lambda: bound("/tmp/{MARK}.sock"))
attempt("FIFO in /tmp", lambda: os.mkfifo("/tmp/{MARK}.fifo"))
attempt("flags of stdin", lambda: fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND))
attempt("position of stdin", lambda: os.lseek(0, 1, os.SEEK_SET))
attempt("time of /dev/null", lambda: os.utime("/dev/null", (1, 1)))
attempt("attribute", lambda: os.setxattr("/usr", "user.canary", b"x"))
attempt("notice", lambda: fcntl.fcntl(os.open("/usr/bin", os.O_RDONLY), fcntl.F_NOTIFY, 1))
attempt("lease", lambda: fcntl.fcntl(os.open("/usr/bin/env", os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK))
attempt("host name", lambda: socket.sethostname("{MARK}"))
os.environ["CANARY"] = "{MARK}"
print(json.dumps(said), flush=True)
if os.fork() == 0:
    libc.prctl(15, b"{MARK}", 0, 0, 0)
    os.read(HOLD, 1)
    os._exit(0)
"""

FIND = f"""
import ctypes, errno, fcntl, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
found = []
for folder in ("/job", "/tmp", "/dev/shm", "/dev", "/", "/dev/mqueue"):
    try:
        found += [folder + "/" + name for name in os.listdir(folder) if "{MARK}" in name]
    except OSError:
        pass
for name in ("shmget", "semget", "msgget"):
    arguments = (0x5D1F, 0) if name == "msgget" else (0x5D1F, 0, 0)
    if getattr(libc, name)(*arguments) != -1:
        found.append(name)
if libc.mq_open(b"/{MARK}", os.O_RDONLY) != -1:
    found.append("POSIX queue")
if libc.syscall(NUMBERS["request_key"], b"user", b"{MARK}", None, 0) != -1:
    found.append("key")
try:
    s = socket.socket(socket.AF_UNIX)
    s.connect("\\0{MARK}")
    found.append("abstract socket")
except OSError:
    pass
if fcntl.fcntl(0, fcntl.F_GETFL) & (os.O_NONBLOCK | os.O_APPEND):
    found.append("flags of stdin")
if os.lseek(0, 0, os.SEEK_CUR):
    found.append("position of stdin")
if os.stat("/dev/null").st_mtime == 1:
    found.append("time of /dev/null")
if "CANARY" in os.environ:
    found.append("environment")
for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
    try:
        if "{MARK}" in open(f"/proc/{{pid}}/comm").read():
            found.append("process")
    except OSError:
        pass
print(json.dumps(found))
"""


def complete(code: str, skip: tuple[str, ...] = ()) -> str:
    numbers = {name: resolve(name) for name in ("add_key", "request_key")}
    return f"import os\nNUMBERS, SKIP, (HOLD, HELD) = {numbers!r}, {skip!r}, os.pipe()\n{code}"


REFUSED = {
    "System V memory": "EPERM",
    "System V semaphore": "EPERM",
    "System V queue": "EPERM",
    "POSIX queue": "EPERM",
    "key": "EPERM",
    "abstract socket": "EPERM",
    "socket in /tmp": "EPERM",
    "FIFO in /tmp": "EPERM",
    "time of /dev/null": "EROFS",
    "attribute": "ENOTSUP",
    "notice": "EPERM",
    "lease": "EPERM",
    "host name": "EPERM",
}


def test_what_is_left_can_be_found_outside() -> None:
    """The same two programs, one after the other as two plain processes, find all that a job may not make."""
    both = f"""
import os, subprocess, sys, time
left, found = sys.argv[1:]
wait = "\\nimport sys\\nsys.stdin.read()"
hold = subprocess.Popen([{PYTHON!r}, "-c", left + wait], stdin=-1, stdout=-1)
hold.stdout.readline()
subprocess.run([{PYTHON!r}, "-c", found], stdin=subprocess.DEVNULL)
hold.stdin.close()
hold.wait()
for name in os.listdir("/dev/shm"):
    if "{MARK}" in name:
        os.unlink("/dev/shm/" + name)
"""
    leave = complete(LEAVE, ("file in /job", "file in /tmp", "time of /dev/null", "attribute", "lease", "notice"))
    leave = leave.replace("/tmp/", "/dev/shm/")
    ran = outside(both, leave, complete(FIND))
    assert ran.stdout, ran.stderr
    found = set(json.loads(ran.stdout))
    assert {"shmget", "semget", "msgget", "POSIX queue", "abstract socket", "process"} <= found, (found, ran.stderr)
    assert {f"/dev/shm/{MARK}", f"/dev/shm/{MARK}.sock", f"/dev/shm/{MARK}.fifo"} <= found


@pytest.fixture
def leaver(insides: dict[str, Inside], running_server: Server, api: Api) -> Iterator[Held]:
    with held(insides["in-place"], running_server, complete(LEAVE) + "time.sleep(100)\n") as job:
        job.wait_for("host name")
        yield job


def test_job_is_refused_what_it_could_leave(leaver: Held) -> None:
    said = json.loads(leaver.output())
    assert {name: said[name] for name in REFUSED} == REFUSED
    assert said["file in /tmp"] == said["file in /dev/shm"] == said["file in /job"] == "ok"
    assert said["flags of stdin"] == "ok"


def test_job_finds_nothing_of_one_that_runs(leaver: Held, inside: Inside) -> None:
    assert json.loads(succeeded(inside.run(complete(FIND)))["stdout"]) == []


def test_job_finds_nothing_of_the_one_before(inside: Inside, insides: dict[str, Inside], api: Api) -> None:
    succeeded(insides["in-place"].run(complete(LEAVE), outputs=["nothing"]))
    assert json.loads(succeeded(inside.run(complete(FIND)))["stdout"]) == []


@pytest.mark.root
def test_what_a_job_wrote_is_nowhere_on_the_host(leaver: Held) -> None:
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/var/lib/sandrun", "/run"):
        assert not [name for name in (os.listdir(folder) if os.path.isdir(folder) else []) if MARK in name]


SIGNAL = """
import errno, json, os, sys
said = {}
for pid in json.loads(sys.stdin.read()):
    try:
        os.kill(pid, 0)
        said[pid] = "ok"
    except OSError as error:
        said[pid] = errno.errorcode[error.errno]
    said[f"/proc/{pid}"] = os.path.exists(f"/proc/{pid}")
print(json.dumps(said))
"""


def test_job_cannot_name_a_process_outside(inside: Inside, leaver: Held) -> None:
    """The host's number of a sibling, of its init, of the server's parts, means nobody here."""
    pids = [leaver.process.pid, leaver.init().pid, leaver.server.pid]
    pids += [one.pid for one in leaver.server.descendants() if "sandbox" not in one.title]
    pids = [pid for pid in pids if pid > 20]  # low numbers exist in every namespace
    assert len(pids) >= 5
    said: dict[str, Any] = json.loads(succeeded(inside.run(SIGNAL, stdin=json.dumps(pids)))["stdout"])
    assert {said[str(pid)] for pid in pids} == {"ESRCH"}
    assert {said[f"/proc/{pid}"] for pid in pids} == {False}
    for pid in pids:
        if os.geteuid() == 0:
            os.kill(pid, 0)  # each of them is there


WATCH = """
import fcntl, json, os, signal, time
seen = []
signal.signal(signal.SIGIO, lambda *_: seen.append("dnotify"))
try:
    fcntl.fcntl(os.open("/usr/bin", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS | fcntl.DN_MULTISHOT)
except OSError as error:
    seen.append(error.errno)
print("ready", flush=True)
time.sleep(1)
print(json.dumps(seen))
"""


def test_job_is_not_told_what_others_read(insides: dict[str, Inside], running_server: Server, api: Api) -> None:
    """The folders that all jobs share are watched by nobody: not even by the oldest way, dnotify."""
    with held(insides["in-place"], running_server, WATCH) as job:
        job.wait_for("ready")
        for _ in range(3):
            subprocess.run([shutil.which("env") or "/usr/bin/env", "true"], check=True)
            os.listdir("/usr/bin")
        assert job.wait()["stdout"] == "ready\n[1]\n"


NO_VSOCK = """
import errno, json, socket
said = []
for attempt in (
    lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    lambda: socket.socketpair(socket.AF_VSOCK, socket.SOCK_STREAM),
    lambda: open("/dev/vsock"),
):
    try:
        attempt()
        said.append("ok")
    except OSError as error:
        said.append(errno.errorcode[error.errno])
print(json.dumps(said))
"""


def test_vsock_is_refused(inside: Inside) -> None:
    """No namespace divides it: two jobs, or a job and the hypervisor, could meet there."""
    assert json.loads(succeeded(inside.run(NO_VSOCK))["stdout"]) == ["EPERM", "EPERM", "ENOENT"]


DATAGRAM = """
import errno, json, os, socket
said = []
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
for address in ("\\0canary", "/tmp/x", "/dev/log", "/run/systemd/notify"):
    try:
        a.sendto(b"x", address)
        said.append("ok")
    except OSError as error:
        said.append(errno.errorcode[error.errno])
print(json.dumps(said))
"""


def test_datagrams_of_a_pair_reach_nobody_else(inside: Inside) -> None:
    """sendto needs no connect: an address that existed would be reached, but none is in this namespace or tree."""
    answers = json.loads(succeeded(inside.run(DATAGRAM))["stdout"])
    assert set(answers) <= {"ECONNREFUSED", "ENOENT", "EPERM", "EISCONN", "ENOTDIR"}
    assert "ok" not in answers
