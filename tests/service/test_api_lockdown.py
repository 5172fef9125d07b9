"""The walls around the HTTP process: each is up, each is noticed when it is not, and the server works behind them."""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import pkgutil
import resource
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.sync.client import connect

import sandrun.api
import sandrun.jobs
from sandrun.api import lockdown, main
from sandrun.errors import MissingLayer
from sandrun.linux import capabilities, landlock, mounts, process, seccomp
from tests.serving import tarball

ROOT = Path(__file__).parents[2]
AS_ROOT = os.geteuid() == 0
CERTIFICATE = ROOT / "tests" / "data" / "localhost.pem"


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, by way of JSON, in a child that ends with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps({"value": work()}).encode())
        except BaseException:
            os.write(writer, json.dumps({"raised": traceback.format_exc()[-3000:]}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        answer = json.loads(told.read() or b'{"raised": "the child died"}')
    os.waitpid(pid, 0)
    assert "raised" not in answer, answer["raised"]
    return answer["value"]


def behind_walls(work: Callable[[], Any]) -> Any:
    """`in_child`, after the lockdown."""

    def locked() -> Any:
        lockdown.lock_down(lockdown.Wanted())
        return work()

    return in_child(locked)


def code_of(attempt: Callable[[], Any]) -> str:
    """`ok`, or the errno by its name."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


# ---- each wall is up ---------------------------------------------------------------------------------------


def test_report_says_what_the_kernel_says() -> None:
    def look() -> dict[str, Any]:
        with open("/proc/self/status") as file:
            return dict(line.rstrip("\n").split(":\t", 1) for line in file)

    report, status = in_child(lambda: (lockdown.lock_down(lockdown.Wanted()).as_json(), look()))
    assert [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == ["0" * 16] * 4
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
    assert set(status["Uid"].split()) == {str(report["uid"])}
    assert set(status["Gid"].split()) == {str(report["gid"])}
    assert report["no_new_privs"] is True
    assert report["missing"] == ([] if landlock.abi() else ["landlock"])
    assert report["landlock"] == (landlock.abi() or None)
    assert report["mounts"] == ("read-only" if AS_ROOT else "host")
    if AS_ROOT:
        assert report["uid"] != 0
        assert status["CapBnd"] == "0" * 16
        assert status["Groups"].strip() == ""


CALLS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "start a program": ("execve", (0, 0, 0), "EFAULT"),
    "start a program by descriptor": ("execveat", (-1, 0, 0, 0, 0), "EFAULT"),
    "be traced": ("ptrace", (0, 0, 0, 0), "ok"),
    "read another's memory": ("process_vm_readv", (-1, 0, 0, 0, 0, 0), "ok"),
    "take another's descriptor": ("pidfd_getfd", (-1, 0, 0), "EBADF"),
    "signal": ("kill", (0, 0), "ok"),
    "make a socket": ("socket", (1, 1, 0), "ok"),
    "connect": ("connect", (-1, 0, 0), "EBADF"),
    "bind": ("bind", (-1, 0, 0), "EBADF"),
    "enter a namespace": ("setns", (-1, 0), "EBADF"),
    "leave its namespaces": ("unshare", (0,), "ok"),
    "load BPF": ("bpf", (-1, 0, 0), "EINVAL"),
    "use keyrings": ("keyctl", (6, 0), "EINVAL"),
    "use io_uring": ("io_uring_setup", (0, 0), "EFAULT"),
    "make a process by clone3": ("clone3", (0, 0), "EINVAL"),
}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 7


def call(name: str, arguments: tuple[int, ...]) -> str:
    number = seccomp.resolve(name)
    assert number is not None
    if _libc.syscall(number, *arguments, *(0,) * (6 - len(arguments))) == -1:
        return errno.errorcode[ctypes.get_errno()]
    return "ok"


@pytest.mark.parametrize("what", CALLS)
def test_process_cannot(what: str) -> None:
    name, arguments, outside = CALLS[what]
    assert in_child(lambda: call(name, arguments)) == outside
    assert behind_walls(lambda: call(name, arguments)) == ("ENOSYS" if name == "clone3" else "EPERM")


REFUSED_HERE = [
    name
    for names, _why in lockdown.REFUSED
    for name in names.split()
    if seccomp.resolve(name) is not None and name not in ("fork", "vfork")  # they return twice: see below
]


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_refused_call_is_in_the_filter(name: str) -> None:
    """By the filter without anything else, so that it is this which answers EPERM."""

    def probe() -> str:
        process.set_no_new_privs()
        seccomp.load(lockdown.filter_program())
        return call(name, ())

    assert in_child(probe) == "EPERM"


def test_process_cannot_make_processes_but_threads() -> None:
    def attempt() -> list[str]:
        ran: list[str] = []
        thread = threading.Thread(target=ran.append, args=("thread",))
        thread.start()
        thread.join()
        return [*ran, code_of(os.fork), code_of(lambda: os.posix_spawn("/bin/true", ["true"], {}))]

    assert behind_walls(attempt) == ["thread", "EPERM", "EPERM"]


def test_thread_is_behind_the_same_walls() -> None:
    def attempt() -> list[str]:
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(code_of(socket.socket)))
        thread.start()
        thread.join()
        return found

    assert behind_walls(attempt) == ["EPERM"]


def test_pair_of_sockets_cannot_send_elsewhere() -> None:
    def attempt() -> list[str]:
        return [
            code_of(partial(socket.socketpair, socket.AF_UNIX, kind))
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        ]

    assert in_child(attempt) == ["ok"] * 3
    assert behind_walls(attempt) == ["ok", "EPERM", "EPERM"]


@pytest.mark.requirement(26)
def test_process_cannot_write_a_file() -> None:
    def attempt() -> list[str]:
        create = os.O_CREAT | os.O_WRONLY | os.O_EXCL
        return [
            code_of(partial(os.open, f"{place}/sandrun-probe", create)) for place in ("/tmp", "/dev/shm", "/var/tmp")
        ]

    assert set(behind_walls(attempt)) <= {"EROFS", "EACCES"}
    assert behind_walls(lambda: code_of(lambda: os.open("/dev/null", os.O_WRONLY))) == "ok"


@pytest.mark.requirement(26)
def test_process_cannot_make_temporary_files() -> None:
    assert behind_walls(lambda: code_of(tempfile.TemporaryFile)) == "ENOENT"
    with open(tempfile.mkstemp()[1]) as proof:  # it could have outside
        os.unlink(proof.name)


@pytest.mark.requirement(26)
def test_process_leaves_no_core_file() -> None:
    assert behind_walls(lambda: resource.getrlimit(resource.RLIMIT_CORE)) == [0, 0]
    assert behind_walls(process.get_dumpable) is False


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")
def test_process_cannot_read_what_is_not_its_own() -> None:
    def attempt() -> list[str]:
        return [code_of(partial(os.open, path, os.O_RDONLY)) for path in ("/", "/etc/hostname", "/proc/self/status")]

    assert in_child(attempt) == ["ok", "ok", "ok"]
    assert behind_walls(attempt) == ["EACCES", "EACCES", "ok"]


@pytest.mark.root
def test_files_of_the_host_are_mounted_read_only() -> None:
    flags = behind_walls(lambda: [os.statvfs(path).f_flag & os.ST_RDONLY for path in ("/", "/proc", "/dev/shm")])
    assert flags == [os.ST_RDONLY] * 3
    assert not os.statvfs("/dev/shm").f_flag & os.ST_RDONLY, "the host's own mounts changed"


@pytest.mark.root
def test_account_of_the_given_name_is_used() -> None:
    import pwd

    uid = in_child(lambda: lockdown.lock_down(lockdown.Wanted(user="nobody")).uid)
    assert uid == pwd.getpwnam("nobody").pw_uid
    uid = in_child(lambda: lockdown.lock_down(lockdown.Wanted(user="no-such-account", uid=1879048193)).uid)
    assert uid == 1879048193


def test_process_dies_with_its_parent() -> None:
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            lockdown.lock_down(lockdown.Wanted(parent=parent))
            os.write(writer, b"up")
            threading.Event().wait(10)
            os._exit(1)
        os.close(writer)
        os.read(reader, 2)
        os.kill(os.getpid(), 9)
    os.close(writer)
    os.waitpid(middle, 0)
    with os.fdopen(reader, "rb") as end:
        ready, _, _ = select.select([end], [], [], 3)  # end of file: nobody holds the other end any more
        assert ready
        assert end.read() == b""


def test_parent_that_died_before_is_noticed() -> None:
    """The kernel signals a death that comes, not one that has come."""
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)

    def attempt() -> str:
        try:
            lockdown.lock_down(lockdown.Wanted(parent=gone))
        except OSError as error:
            return str(error)
        return "up"

    assert "the supervisor is gone" in in_child(attempt)


# ---- each is noticed when it is not ------------------------------------------------------------------------


def nothing(*arguments: Any, **options: Any) -> None:
    """Stands for a call that claims to have worked."""


BROKEN = [
    pytest.param(mounts, "set_attributes", "mount", marks=pytest.mark.root),
    pytest.param(capabilities, "drop_bounding", "capabilities", marks=pytest.mark.root),
    pytest.param(os, "setresuid", "uid", marks=pytest.mark.root),
    pytest.param(os, "setresgid", "uid", marks=pytest.mark.root),
    pytest.param(process, "set_no_new_privs", "no-new-privs"),
    pytest.param(
        landlock, "restrict", "landlock", marks=pytest.mark.skipif(not landlock.abi(), reason="no Landlock here")
    ),
    pytest.param(seccomp, "load", "seccomp"),
]


@pytest.mark.requirement(17)
@pytest.mark.parametrize(("module", "name", "layer"), BROKEN)
def test_wall_that_is_not_up_is_a_refusal_by_name(
    module: Any, name: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, nothing)

    def attempt(waived: frozenset[str]) -> list[Any]:
        try:
            return ["up", lockdown.lock_down(lockdown.Wanted(waived=waived)).missing]
        except MissingLayer as error:
            return [error.layer, bool(error.fix)]

    assert in_child(lambda: attempt(frozenset())) == [layer, True]
    if layer in ("landlock", "seccomp"):  # what comes after the others cannot work without them
        up, missing = in_child(lambda: attempt(frozenset({layer})))
        assert (up, set(missing)) == ("up", {layer} | (set() if landlock.abi() else {"landlock"}))


@pytest.mark.requirement(17)
def test_second_thread_is_a_refusal() -> None:
    def attempt() -> str:
        release = threading.Event()
        thread = threading.Thread(target=release.wait)
        thread.start()
        try:
            lockdown.lock_down(lockdown.Wanted())
        except MissingLayer as error:
            return error.layer
        finally:
            release.set()
        return "up"

    assert in_child(attempt) == "seccomp"


@pytest.mark.requirement(17)
def test_kernel_without_landlock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    report = in_child(lambda: lockdown.lock_down(lockdown.Wanted()).as_json())
    assert (report["landlock"], report["missing"]) == (None, ["landlock"])


# ---- the server works behind them --------------------------------------------------------------------------


def test_modules_can_be_imported_behind_the_walls() -> None:
    names = [
        f"{package.__name__}.{module.name}"
        for package in (sandrun.api, sandrun.jobs)
        for module in pkgutil.iter_modules(package.__path__)
    ]
    assert "sandrun.api.main" in names

    def attempt() -> list[str]:
        main.import_all()  # as the process does, while it may still read where they lie: a folder of root's, perhaps
        lockdown.lock_down(lockdown.Wanted())
        return [name for name in names if importlib.import_module(name).__name__ == name]

    assert in_child(attempt) == names


@pytest.fixture(params=["http", "https"])
def locked(request: pytest.FixtureRequest) -> Any:
    files = [str(CERTIFICATE)] * 2 if request.param == "https" else ["-", "-"]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.service.locked", *files],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child:
        yield request.param, json.loads(child.stdout.readline()), child
        child.stdin.close()
        assert child.wait(20) == 0


def test_server_works_behind_the_walls_and_needs_no_file(locked: Any) -> None:
    scheme, told, child = locked
    context = ssl.create_default_context(cafile=CERTIFICATE)
    base = f"127.0.0.1:{told['port']}"
    with httpx2.Client(base_url=f"{scheme}://{base}", verify=context, trust_env=False, timeout=20) as http:
        assert http.get("/health").json()["walls"] == told["walls"]
        assert http.get("/").status_code == 200
        assert http.get("/openapi.json").json()["openapi"] == "3.1.0"
        assert http.get("/nothing").status_code == 404
        assert http.get("/", headers={"Host": "xn--bcher-kva.example"}).status_code == 421
        run = http.post("/run", json={"code": "x", "files": {"big": "y" * 100_000}, "keep": True}).json()
        assert (run["status"], run["stdout"], run["stderr"]) == ("completed", "grüß dich\n", "�")
        assert http.post("/run", json={"code": 1}).status_code == 400
        assert http.post("/run", content=b"{" * 100_000).status_code == 400
        assert "event: result" in http.post("/run", json={"code": "x"}, headers={"Accept": "text/event-stream"}).text
        files = {"manifest": b'{"entrypoint": "main.py"}', "files": tarball({"main.py": "x"})}
        answer = http.post("/submit", files=files)
        assert answer.status_code == 202, answer.text
        job = answer.json()["job_id"]
        assert http.get(f"/status/{job}", params={"wait": 10}).json()["status"] == "completed"
        assert http.get(f"/logs/{job}").text == "grüß dich\n�"
        assert http.get(f"/download/{job}/out.txt").content == b"content"
        assert http.get(f"/download/{job}").content[:2] == b"\x1f\x8b"
        assert http.post("/submit", files={"files": b"not a tar"}).status_code == 400
        secure = context if scheme == "https" else None
        with connect(f"ws{scheme[4:]}://{base}/logs/{job}/stream", ssl=secure, proxy=None) as stream:
            frames = [json.loads(frame) for frame in stream]
        assert frames[-1]["event"] == "end"
        assert http.delete(f"/jobs/{job}").status_code == 204
    child.stdin.close()
    late = json.loads(child.stdout.readline())["late"]
    assert late == [], "imported behind the walls: add them to main.LATER_IMPORTS"


def test_imports_that_come_late_are_known() -> None:
    """A name that no library has any more would hide that another took its place."""
    missing = []
    for name in main.LATER_IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    assert set(missing) <= {"uvloop"}
