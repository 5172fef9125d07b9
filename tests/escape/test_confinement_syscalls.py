"""The kernel's surface: what is refused, with which errno, and that the same call is answered differently outside.

The arguments are harmless on purpose: outside they are answered by something else than EPERM, so what answers EPERM
inside is our filter and not the call itself. Where a kernel lacks a call, it can't tell the difference.
"""

from __future__ import annotations

import json
import os
import platform

import pytest

from tests.escape.probing import Call, Inside, call, known, outside_answers

AF_UNIX, AF_INET, AF_NETLINK, AF_PACKET, AF_ALG, AF_VSOCK, AF_TIPC = 1, 2, 16, 17, 38, 40, 30
HERE = -100  # AT_FDCWD
UPPER = 0x1_0000_0000
"""A bit that is not part of an `int` argument: the kernel does not look at it, a careless filter does."""
CLONE_NEW = {
    "NEWNS": 0x00020000,
    "NEWCGROUP": 0x02000000,
    "NEWUTS": 0x04000000,
    "NEWIPC": 0x08000000,
    "NEWUSER": 0x10000000,
    "NEWPID": 0x20000000,
    "NEWNET": 0x40000000,
}
SIGCHLD = 17

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="gates and numbers of x86-64")


def gate(number: int) -> Call:
    """A call by `int $0x80`, whose numbers are those of i386: 20 is getpid, which is writev on x86-64."""
    return Call("i386", (number, 0))


def named(*calls: Call) -> dict[str, Call]:
    """By their names, for tables in which a call stands once."""
    return known({str(one.name): one for one in calls})


def differing(calls: dict[str, Call], refusal: str) -> list[str]:
    """Those that answer the same outside by themselves."""
    return sorted(what for what, answer in outside_answers(calls).items() if answer == refusal)


# ---- forbidden: EPERM --------------------------------------------------------------------------------------

FORBIDDEN = named(
    call("socket", AF_UNIX, 1, 0),
    call("connect", -1, "z:16", 16),
    call("bind", -1, "z:16", 16),
    call("listen", -1, 0),
    call("accept", -1, 0, 0),
    call("accept4", -1, 0, 0, 0),
    call("ptrace", 0, 0, 0, 0),
    call("process_vm_readv", "self", 0, 0, 0, 0, 0),
    call("process_vm_writev", "self", 0, 0, 0, 0, 0),
    call("kcmp", "self", "self", 0, 0, 0),
    call("unshare", 0),
    call("setns", -1, 0),
    call("mount", "s:none", "s:/tmp", "s:tmpfs", 0, 0),
    call("umount2", "s:/nonexistent", 0),
    call("pivot_root", "s:/nonexistent", "s:/nonexistent"),
    call("chroot", "s:/"),
    call("open_tree", HERE, "s:/", 0),
    call("move_mount", -1, "s:x", -1, "s:x", 0),
    call("fsopen", "s:tmpfs", 0),
    call("fsconfig", -1, 99, 0, 0, 0),
    call("fsmount", -1, 0, 0),
    call("fspick", -1, "s:x", 0),
    call("mount_setattr", HERE, "s:/nonexistent", 0, "z:32", 32),
    call("keyctl", 0, -3, 0),
    call("add_key", 0, 0, 0, 0, 0),
    call("request_key", 0, 0, 0, 0),
    call("sethostname", "s:x", -1),
    call("setdomainname", "s:x", -1),
    call("clock_settime", -1, 0),
    call("adjtimex", "z:208"),
    call("clock_adjtime", 0, "z:208"),
    call("iopl", 0),
    call("ioperm", 0, 0, 0),
    call("modify_ldt", 0, "z:8", 0),
    call("personality", 0xFFFFFFFF),
    call("seccomp", 2, 0, "z:4"),
    call("capget", "z:8", "z:24"),
    call("capset", "z:8", "z:24"),
    call("setuid", -1),
    call("setgid", -1),
    call("setresuid", -1, -1, -1),
    call("setresgid", -1, -1, -1),
    call("getresuid", 0, 0, 0),
    call("setfsuid", -1),
    call("chown", "s:/nonexistent", -1, -1),
    call("fchown", -1, -1, -1),
    call("lchown", "s:/nonexistent", -1, -1),
    call("fchownat", HERE, "s:/nonexistent", -1, -1, 0),
    call("mknod", "s:/nonexistent/x", 0o10600, 0),
    call("mknodat", HERE, "s:/nonexistent/x", 0o10600, 0),
    call("name_to_handle_at", HERE, "s:/", "d:128,0", "z:8", 0),
    call("execveat", -1, "s:x", 0, 0, 0),
    call("memfd_create", "s:x", 0),
    call("inotify_init", 0),
    call("inotify_init1", 0),
    call("inotify_add_watch", -1, "s:/", 1),
    call("io_setup", 0, 0),
    call("io_destroy", 0),
    call("shmget", 0, 4096, 0o600),
    call("shmat", -1, 0, 0),
    call("shmctl", -1, 0, 0),
    call("semget", 0, 1, 0o600),
    call("semop", -1, 0, 0),
    call("msgget", 0, 0o600),
    call("msgsnd", -1, "z:16", 0, 0),
    call("mq_open", "s:x", 0, 0, 0),
    call("mq_unlink", "s:x"),
    call("tkill", "self", 0),
    call("rt_tgsigqueueinfo", 0, 0, 0, 0),
    call("timerfd_create", 1, 0),
    call("signalfd4", -1, "z:8", 8, 0),
    call("sendfile", -1, -1, 0, 0),
    call("splice", -1, 0, -1, 0, 1, 0),
    call("tee", -1, -1, 1, 0),
    call("vmsplice", -1, 0, 0, 0),
    call("readahead", -1, 0, 0),
    call("syncfs", -1),
    call("sync_file_range", -1, 0, 0, 0),
    call("mlock", 0, 0),
    call("mlockall", 0),
    call("mincore", 0, 0, 0),
    call("move_pages", 0, 0, 0, 0, 0, 0),
    call("sched_setaffinity", 0, 0, 0),
    call("sched_setscheduler", -1, 0, 0),
    call("setpriority", 0, 0, 0),
    call("ioprio_get", 1, 0),
    call("setsockopt", -1, 0, 0, 0, 0),
    call("getsockopt", -1, 0, 0, 0, 0),
    call("getpeername", -1, 0, 0),
)
"""What an ordinary process may call."""

FORBIDDEN_TO_ROOT_TOO = named(
    call("setgroups", -1, 0),
    call("settimeofday", 0, 0),
    call("bpf", -1, 0, 0),
    call("perf_event_open", 0, 0, 0, 0, 0),
    call("userfaultfd", 0),
    call("init_module", 0, 0, 0),
    call("finit_module", -1, 0, 0),
    call("delete_module", 0, 0),
    call("kexec_load", 0, 0, 0, 0xFFFFFFFF),
    call("reboot", 0, 0, 0, 0),
    call("swapon", 0, 0xFFFFFFFF),
    call("swapoff", 0),
    call("acct", "s:/nonexistent/x"),
    call("syslog", 10, 0, 0),
    call("fanotify_init", 0xFFFFFFFF, 0),
    call("open_by_handle_at", -1, "z:16", 0),
    call("quotactl", 0x80000700, 0, 0, 0),
)
"""What root outside may call."""


@pytest.mark.requirement(5)
def test_forbidden_calls_are_operation_not_permitted(inside_any: Inside) -> None:
    assert inside_any.answers(FORBIDDEN) == dict.fromkeys(FORBIDDEN, "EPERM")
    assert inside_any.answers(FORBIDDEN_TO_ROOT_TOO) == dict.fromkeys(FORBIDDEN_TO_ROOT_TOO, "EPERM")


@pytest.mark.requirement(5)
def test_forbidden_calls_are_answered_outside() -> None:
    assert not differing(FORBIDDEN, "EPERM")


@pytest.mark.root
@pytest.mark.requirement(5)
def test_forbidden_calls_of_root_are_answered_outside() -> None:
    assert not differing(FORBIDDEN_TO_ROOT_TOO, "EPERM")


# ---- unknown, and those with a way around: ENOSYS ----------------------------------------------------------

NOT_THERE = named(
    call("clone3", "z:8", 8),
    call("openat2", HERE, "s:/", "q:0,0,0", 24),
    call("io_uring_setup", 0, 0),
    call("io_uring_enter", -1, 0, 0, 0, 0),
    call("io_uring_register", -1, 0, 0, 0),
    call("pidfd_open", "self", 0),
    call("pidfd_getfd", -1, 0, 0),
    call("pidfd_send_signal", -1, 0, 0, 0),
    call("epoll_pwait2", -1, 0, 0, 0, 0),
    call("fchmodat2", HERE, "s:/nonexistent", 0, 0),
    call("memfd_secret", -1),
    call("landlock_create_ruleset", 0, 0, 1),
    call("landlock_add_rule", -1, 0, 0, 0),
    call("landlock_restrict_self", -1, 0),
    call("pkey_alloc", -1, 0),
    call("pkey_free", -1),
    call("pkey_mprotect", 0, 0, 0, -1),
    call("close_range", 5, 4, 0),
    call("preadv2", -1, 0, 0, 0, 0, 0),
    call("timer_create", -1, 0, 0),
    call("process_madvise", -1, 0, 0, 0, 0),
    call("statmount", 0, 0, 0, 0),
    call("listmount", 0, 0, 0, 0),
    call("mseal", 0, 0, 0),
)
UNKNOWN = {str(number): call(number) for number in (480, 500, 511, 999, 1 << 20, 0x3FFFFFFF)}


@pytest.mark.requirement(5)
def test_unknown_calls_are_not_implemented(inside_any: Inside) -> None:
    calls = {**NOT_THERE, **UNKNOWN}
    assert inside_any.answers(calls) == dict.fromkeys(calls, "ENOSYS")


@pytest.mark.requirement(5)
def test_those_not_implemented_inside_are_so_outside() -> None:
    """A kernel may lack the newer ones, or what its makers left out."""
    lacking = set(differing(NOT_THERE, "ENOSYS"))
    assert not lacking & {"pidfd_open", "close_range", "clone3", "openat2", "timer_create", "preadv2"}
    assert len(lacking) < len(NOT_THERE) / 2


UNSUPPORTED = named(
    call("setxattr", "s:/nonexistent", "s:user.a", "s:x", 1, 0),
    call("removexattr", "s:/nonexistent", "s:user.a"),
    call("getxattr", "s:/nonexistent", "s:user.a", 0, 0),
    call("fallocate", -1, 0, 0, 1),
)


@pytest.mark.requirement(5)
def test_unsupported_calls_are_those_of_a_plain_file_system(inside_any: Inside) -> None:
    assert inside_any.answers(UNSUPPORTED) == dict.fromkeys(UNSUPPORTED, "ENOTSUP")
    assert not differing(UNSUPPORTED, "ENOTSUP")


# ---- other architectures: killed ---------------------------------------------------------------------------


@x86
@pytest.mark.requirement(5)
def test_x32_calls_kill(inside_any: Inside) -> None:
    calls = {f"x32 {number}": call(0x40000000 | number) for number in (0, 39, 41, 101, 520)}
    assert inside_any.answers(calls) == dict.fromkeys(calls, "SIGSYS")


@x86
@pytest.mark.requirement(5)
def test_i386_calls_kill(inside_any: Inside) -> None:
    calls = {f"i386 {number}": gate(number) for number in (20, 11, 26, 102)}  # getpid, execve, ptrace, socketcall
    if outside_answers(calls)["i386 20"] != "ok":
        pytest.skip("this kernel has no 32-bit calls")
    assert inside_any.answers(calls) == dict.fromkeys(calls, "SIGSYS")


@x86
@pytest.mark.requirement(5)
def test_x32_calls_do_not_kill_outside() -> None:
    calls = {f"x32 {number}": call(0x40000000 | number) for number in (39, 41)}
    assert "SIGSYS" not in outside_answers(calls).values()


# ---- arguments ---------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Call, str, str]] = {
    # what, the call, the answer inside, the answer outside ("" if it is not asked for there)
    "socket AF_INET": (call("socket", AF_INET, 1, 0), "EPERM", "ok"),
    "socket AF_NETLINK": (call("socket", AF_NETLINK, 3, 0), "EPERM", "ok"),
    "socket AF_PACKET": (call("socket", AF_PACKET, 3, 0), "EPERM", ""),
    "socket AF_ALG": (call("socket", AF_ALG, 5, 0), "EPERM", ""),
    "socket AF_VSOCK": (call("socket", AF_VSOCK, 1, 0), "EPERM", ""),
    "socket AF_UNIX with upper bits": (call("socket", AF_UNIX | UPPER, 1, 0), "EPERM", "ok"),
    "socketpair AF_UNIX": (call("socketpair", AF_UNIX, 1, 0, "z:8"), "ok", "ok"),
    "socketpair AF_UNIX with upper bits": (call("socketpair", AF_UNIX | UPPER, 1, 0, "z:8"), "ok", "ok"),
    "socketpair AF_INET": (call("socketpair", AF_INET, 1, 0, "z:8"), "EPERM", "ENOTSUP"),
    "socketpair AF_TIPC": (call("socketpair", AF_TIPC, 1, 0, "z:8"), "EPERM", ""),
    "socketpair AF_VSOCK": (call("socketpair", AF_VSOCK, 1, 0, "z:8"), "EPERM", ""),
    "ioctl TIOCSTI": (call("ioctl", "null", 0x5412, "z:8"), "EPERM", "ENOTTY"),
    "ioctl TIOCSTI with upper bits": (call("ioctl", "null", 0x5412 | UPPER, "z:8"), "EPERM", "ENOTTY"),
    "ioctl TIOCLINUX": (call("ioctl", "null", 0x541C, "z:8"), "EPERM", "ENOTTY"),
    "ioctl TIOCLINUX with upper bits": (call("ioctl", "null", 0x541C | UPPER << 8, "z:8"), "EPERM", "ENOTTY"),
    "ioctl TIOCSETD": (call("ioctl", "null", 0x5423, "z:8"), "EPERM", "ENOTTY"),
    "ioctl TIOCSETD with upper bits": (call("ioctl", "null", 0x5423 | UPPER, "z:8"), "EPERM", "ENOTTY"),
    "ioctl FS_IOC_SETFLAGS": (call("ioctl", "null", 0x40086602, "z:8"), "EPERM", "ENOTTY"),
    "ioctl FS_IOC_SETFLAGS with upper bits": (call("ioctl", "null", 0x40086602 | UPPER, "z:8"), "EPERM", "ENOTTY"),
    "ioctl of nobody": (call("ioctl", "null", 0xDEAD, "z:8"), "ENOTTY", "ENOTTY"),
    "ioctl TCGETS": (call("ioctl", "null", 0x5401, "z:64"), "ENOTTY", "ENOTTY"),
    "prlimit64 of itself by 0": (call("prlimit64", 0, 7, 0, "z:16"), "ok", "ok"),
    "prlimit64 by 0 with upper bits": (call("prlimit64", UPPER, 7, 0, "z:16"), "ok", "ok"),
    "prlimit64 with a pid": (call("prlimit64", "self", 7, 0, "z:16"), "EPERM", "ok"),
    "prlimit64 of pid 1": (call("prlimit64", 1, 7, 0, "z:16"), "EPERM", "ok"),
    "prctl PR_SET_NAME": (call("prctl", 15, "s:x", 0, 0, 0), "ok", "ok"),
    "prctl PR_SET_DUMPABLE": (call("prctl", 4, 1, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_SET_DUMPABLE with upper bits": (call("prctl", 4 | UPPER, 1, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_SET_KEEPCAPS": (call("prctl", 8, 0, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_SET_SECCOMP": (call("prctl", 22, 99, 0, 0, 0), "EPERM", "EINVAL"),
    "prctl PR_SET_SECUREBITS": (call("prctl", 28, 0, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_SET_TIMERSLACK": (call("prctl", 29, 0, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_SET_CHILD_SUBREAPER": (call("prctl", 36, 0, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_CAP_AMBIENT": (call("prctl", 47, 4, 0, 0, 0), "EPERM", "ok"),
    "prctl PR_SET_MM": (call("prctl", 35, 99, 0, 0, 0), "EPERM", ""),
    "prctl PR_SET_PTRACER": (call("prctl", 0x59616D61, -1, 0, 0, 0), "EPERM", ""),
    "fcntl F_NOTIFY": (call("fcntl", "null", 1026, 1), "EPERM", "ENOTDIR"),
    "fcntl F_NOTIFY with upper bits": (call("fcntl", "null", 1026 | UPPER, 1), "EPERM", "ENOTDIR"),
    "fcntl F_SETLEASE": (call("fcntl", "null", 1024, 99), "EPERM", "EINVAL"),
    "fcntl F_SETOWN": (call("fcntl", "null", 8, 1), "EPERM", "ok"),
    "fcntl F_SETOWN_EX": (call("fcntl", "null", 15, "d:1,1"), "EPERM", "ok"),
    "fcntl F_SETSIG": (call("fcntl", "null", 10, 9), "EPERM", "ok"),
    "fcntl F_SETPIPE_SZ": (call("fcntl", "null", 1031, 4096), "EPERM", "EBADF"),
    "fcntl F_GETFL": (call("fcntl", "null", 3, 0), "ok", "ok"),
    "fcntl of nobody": (call("fcntl", "null", 4242, 0), "EINVAL", "EINVAL"),
}


@pytest.mark.requirement(5, 6)
def test_arguments_decide_by_their_low_32_bits(inside_any: Inside) -> None:
    calls = known({what: row[0] for what, row in ARGUMENTS.items()})
    assert inside_any.answers(calls) == {what: ARGUMENTS[what][1] for what in calls}


@pytest.mark.requirement(6)
def test_arguments_are_answered_outside() -> None:
    calls = known({what: row[0] for what, row in ARGUMENTS.items() if row[2]})
    assert outside_answers(calls) == {what: ARGUMENTS[what][2] for what in calls}


CLONES = {
    **{name: call("clone", flag | SIGCHLD, 0, 0, 0, 0) for name, flag in CLONE_NEW.items()},
    **{
        f"{name} with upper bits": call("clone", flag | SIGCHLD | UPPER, 0, 0, 0, 0) for name, flag in CLONE_NEW.items()
    },
    "PARENT": call("clone", 0x8000 | SIGCHLD, 0, 0, 0, 0),
}


@pytest.mark.requirement(1, 6)
def test_clone_makes_no_namespace(inside_any: Inside) -> None:
    assert inside_any.answers({"fork": call("clone", SIGCHLD, 0, 0, 0, 0)}) == {"fork": "ok"}
    assert inside_any.answers(CLONES) == dict.fromkeys(CLONES, "EPERM")


@pytest.mark.requirement(6)
def test_clone_makes_namespaces_outside() -> None:
    assert outside_answers(CLONES) == dict.fromkeys(CLONES, "ok")


# ---- signals to PID 1 --------------------------------------------------------------------------------------

SIGNALS_TO_INIT = {
    "kill": call("kill", 1, 9),
    "kill with nothing": call("kill", 1, 0),
    "kill with upper bits": call("kill", 1 | UPPER, 9),
    "kill with all upper bits": call("kill", 1 | 0xFFFFFFFF_00000000, 9),
    "tgkill": call("tgkill", 1, 1, 9),
    "tgkill with upper bits": call("tgkill", 1 | UPPER, 1, 9),
    "rt_sigqueueinfo": call("rt_sigqueueinfo", 1, 9, "d:9,0,-1,0"),
    "rt_sigqueueinfo with upper bits": call("rt_sigqueueinfo", 1 | UPPER, 9, "d:9,0,-1,0"),
    "tkill": call("tkill", 1, 9),
    "rt_tgsigqueueinfo": call("rt_tgsigqueueinfo", 1, 1, 9, "d:9,0,-1,0"),
}


@pytest.mark.requirement(6, 7)
def test_process_1_takes_no_signal(inside_any: Inside) -> None:
    assert inside_any.answers(SIGNALS_TO_INIT) == dict.fromkeys(SIGNALS_TO_INIT, "EPERM")


@pytest.mark.requirement(6)
def test_process_1_takes_signals_outside() -> None:
    """PID 1 of a namespace survives SIGKILL from inside, but is sent it."""
    assert outside_answers(SIGNALS_TO_INIT) == dict.fromkeys(SIGNALS_TO_INIT, "ok")


@pytest.mark.requirement(8)
def test_who_am_i_is_never_refused(inside_any: Inside) -> None:
    calls = named(*(call(name) for name in ("getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid")))
    assert inside_any.answers(calls) == dict.fromkeys(calls, "ok")


# ---- what a program makes of it ----------------------------------------------------------------------------

SOCKETS = """
import json, socket, sys
said = {}
for name in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_VSOCK"):
    try:
        socket.socket(getattr(socket, name)).close()
        said[name] = "ok"
    except OSError as error:
        said[name] = f"{type(error).__name__} {error.errno}"
print(json.dumps(said))
"""


@pytest.mark.requirement(5, 15)
def test_socket_raises_permission_error(inside: Inside) -> None:
    """AF_VSOCK, which no namespace divides, too."""
    families = ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_VSOCK")
    assert json.loads(inside.run(SOCKETS)["stdout"]) == dict.fromkeys(families, "PermissionError 1")


def test_tables_name_calls_of_this_machine() -> None:
    """Most of the table is there, whatever the machine: a typo would be left out in silence."""
    assert len(FORBIDDEN) > 80
    assert len(NOT_THERE) == 24
    assert os.uname().machine in ("x86_64", "aarch64")
