"""What a process says about itself to the kernel, new processes, and namespaces."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

from sandrun.linux import libc
from sandrun.linux.libc import SYS, bind, syscall

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_GET_SECCOMP = 21
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_GET_TID_ADDRESS = 40
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLONE_NEWNS = 0x00020000  # <linux/sched.h>
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x00000080  # clone3 and unshare only: in clone(2) these bits are the exit signal
CLONE_PIDFD = 0x00001000
CLONE_CHILD_CLEARTID = 0x00200000
CLONE_CHILD_SETTID = 0x01000000
CLONE_INTO_CGROUP = 0x200000000

SIGSET_BYTES = 8

NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts", "cgroup")  # names in /proc/PID/ns

_prctl = bind("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)
_unshare = bind("unshare", ctypes.c_int)
_setns = bind("setns", ctypes.c_int, ctypes.c_int)


def set_no_new_privs() -> None:
    """Make execve(2) unable to raise privileges, for this process and all it starts, for good. See prctl(2).

    Raises: OSError EINVAL on a kernel before 3.5; the caller gives up, as a set-uid program could then gain privileges.
    """
    _prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # EINVAL unless the three spare arguments are 0


def get_no_new_privs() -> bool:
    """Whether execve(2) can no longer raise privileges here."""
    return _prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1


def set_dumpable(dumpable: bool) -> None:
    """Forbid or allow core dumps, ptrace(2), and that others of the same uid read /proc/PID/{mem,environ,fd}.

    execve(2) makes a process dumpable again, a change of uid makes it undumpable.
    """
    _prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def get_dumpable() -> bool:
    """Whether others of the same uid may look into this process."""
    return _prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 1


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process signal `number` when the thread that made it ends; 0 forgets it.

    A change of uid or gid clears it, so it is set after the last one. That the parent died before this call goes
    unnoticed: the caller looks for end-of-file on something that the parent holds.
    """
    _prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def child_descriptor() -> int:
    """Block SIGCHLD, and have it read from a descriptor instead: a handler would be every child's too. signalfd(2)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    mask = (1 << signal.SIGCHLD - 1).to_bytes(SIGSET_BYTES, sys.byteorder)
    return libc.syscall(SYS["signalfd4"], -1, mask, SIGSET_BYTES, os.O_CLOEXEC | os.O_NONBLOCK)


def set_child_subreaper() -> None:
    """Adopt the orphans among this process's descendants, as PID 1 does."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_name(name: str) -> None:
    """Name this thread in /proc/PID/comm; the kernel keeps 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0)


def _find_areas() -> tuple[int, int, int, int] | None:
    """Where this process's argv and environment strings lie, start and end of each; None without /proc."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may hold spaces and parentheses
    except OSError:
        return None
    arguments, their_end, environment, its_end = (int(field) for field in fields[48 - 3 : 52 - 3])  # proc(5), from 1
    return (arguments, their_end, environment, its_end) if 0 < arguments < their_end else None


# Looked up at import: a forked child keeps the address, but may have no /proc of its own process any more.
_areas = _find_areas()


PF_EXITING = 0x00000004  # <linux/sched.h>, set before anything of the process is taken apart


def is_exiting(pid: int) -> bool:
    """Whether a process has begun to die, however long the kernel takes; proc_pid_stat(5), field 9.

    Raises: FileNotFoundError if there is none.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        return bool(int(file.read().rpartition(b")")[2].split()[6]) & PF_EXITING)


def title(text: str) -> tuple[int, bytes]:
    """What to write where, for /proc/self/cmdline, and so ps(1), to read `text`.

    It replaces argv's strings; what does not fit is cut.
    Raises: OSError ENOENT if /proc was not there when this module was imported.
    """
    if _areas is None:
        raise FileNotFoundError(2, "/proc/self/stat does not tell where the arguments are")
    start, end, _, _ = _areas
    shown = text.encode()[: max(end - start - 2, 0)]
    # A last byte of argv that is not NUL tells the kernel that this is a title: it then shows the text up to the first
    # NUL, not the whole area (setproctitle(3); fs/proc/base.c, get_mm_cmdline).
    return start, shown.ljust(end - start - 1, b"\0") + b"."


def set_title(text: str) -> None:
    """Have ps(1) show `text` for this process. Raises: as `title`."""
    libc.poke(*title(text))


def set_environment_area(environment: Mapping[str, str]) -> None:
    """Have /proc/self/environ show `environment`, as much of it as there was room for at exec, and nothing else.

    No variable of the first environment may be in use any more: the strings of environ(7) lie there.
    """
    if _areas is None:
        return
    _, _, start, end = _areas
    text = b"".join(f"{name}={value}".encode(errors="surrogateescape") + b"\0" for name, value in environment.items())
    if end > start:
        libc.poke(start, text[: end - start].ljust(end - start, b"\0"))


class _CloneArgs(ctypes.Structure):
    """struct clone_args of <linux/sched.h>, all that Linux 5.7 knows (88 bytes)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls",
            "set_tid", "set_tid_size", "cgroup",
        )
    )  # fmt: skip


_syscall = ctypes.PyDLL(None, use_errno=True)["syscall"]
_syscall.argtypes, _syscall.restype = [ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_long
_pidfd = ctypes.c_int(-1)
_clone_args = _CloneArgs(pidfd=ctypes.addressof(_pidfd), exit_signal=signal.SIGCHLD)
_before_fork = ctypes.pythonapi["PyOS_BeforeFork"]
after_fork_child = ctypes.pythonapi["PyOS_AfterFork_Child"]
_after_fork_parent = ctypes.pythonapi["PyOS_AfterFork_Parent"]
for _function in (_before_fork, after_fork_child, _after_fork_parent):
    _function.argtypes, _function.restype = [], None
BEFORE_FORK, AFTER_FORK = (
    ctypes.cast(function, ctypes.c_void_p).value for function in (_before_fork, _after_fork_parent)
)
"""Addresses of what CPython wants called around a fork(2) that is not its own."""


def thread_number() -> int | None:
    """Where libc keeps this thread's number. A fork lets the kernel renew it in the child, CLONE_CHILD_SETTID: where it
    is stale, two threads of the child may be taken for one by a recursive mutex.

    Returns: None on a kernel without CONFIG_CHECKPOINT_RESTORE.
    """
    address = ctypes.c_uint64(0)
    try:
        _prctl(PR_GET_TID_ADDRESS, ctypes.addressof(address), 0, 0, 0)
    except OSError:
        return None
    return address.value


def clone3(flags: int, *, cgroup_fd: int | None = None) -> tuple[int, int]:
    """fork(2) into new namespaces (`flags`, CLONE_NEW*) and into a v2 cgroup (a descriptor of its directory).

    Returns: (pid, pidfd) in the parent, (0, -1) in the child. The pidfd is close-on-exec.
    Only for a process with one thread: libc's own fork handlers (malloc's locks, pthread_atfork) do not run.
    Raises: OSError ENOSYS before Linux 5.3, E2BIG before 5.7; EACCES if the cgroup may not be entered, EAGAIN at
        a pids limit, EBUSY if the cgroup has controllers enabled for its children, ENOENT if cgroup namespaces hide it.
    """
    flags |= CLONE_PIDFD
    _clone_args.child_tid = thread_number() or 0
    if _clone_args.child_tid:
        flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID
    if cgroup_fd is not None:
        flags |= CLONE_INTO_CGROUP
    _clone_args.flags = flags
    _clone_args.cgroup = cgroup_fd or 0
    _before_fork()
    pid: int = _syscall(SYS["clone3"], ctypes.byref(_clone_args), ctypes.sizeof(_clone_args))
    if pid == 0:
        after_fork_child()
        return 0, -1
    if pid < 0:
        code = ctypes.get_errno()
        _after_fork_parent()
        raise OSError(code, f"clone3: {os.strerror(code)}")
    descriptor = _pidfd.value  # before the handlers, which may themselves fork
    _after_fork_parent()
    return pid, descriptor


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` (CLONE_NEW*) for new ones. A new PID namespace is for children only."""
    _unshare(flags)


def setns(descriptor: int, flags: int) -> None:
    """Enter the namespaces `flags` of a pidfd, or the one namespace of an open /proc/PID/ns file. See setns(2)."""
    _setns(descriptor, flags)


def pivot_root(new: str, old: str) -> None:
    """Make the mount at `new` the root, and the old root a mount at `old`. `(".", ".")` stacks them, pivot_root(2)."""
    syscall(SYS["pivot_root"], os.fsencode(new), os.fsencode(old), what=new)


def close_range(first: int, last: int) -> None:
    """Close all descriptors from `first` to `last`, both included, however many the limit says there can be."""
    if first <= last:
        syscall(SYS["close_range"], first, last, 0)
