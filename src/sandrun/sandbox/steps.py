"""Building a sandbox: ordered lists whose names are the error messages.

A step that fails ends the job as `setup_failed` with its name, errno and object; no step warns and goes on. Layers that
the operator waived are data of the `Nest` (an empty filter, a flag that is not there), and the report shows them.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Final

from sandrun.linux import capabilities, landlock, process, seccomp
from sandrun.linux.calls import (
    ANYTHING,
    CONTROL,
    ENTRIES,
    GATE,
    INIT_ID,
    NUMBER,
    PROC,
    READY,
    SCRATCH,
    SEEN,
    SIGNALS,
    SNAPSHOT,
    STORAGE,
    SYNC,
    Calls,
    Tables,
)
from sandrun.sandbox import rootfs
from sandrun.sandbox.spec import INIT_UID, JOB_UID, Nest

Step = tuple[str, Callable[[Calls, Nest], None]]
"""A name, and what adds its system calls to a table (linux/calls.py)."""

HOST_NAME = b"sandbox"


class StepFailed(Exception):
    """What is Python's part failed; `__cause__` is the kernel's refusal."""

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


# ---- init --------------------------------------------------------------------------------------------------


def name_init(calls: Calls, nest: Nest) -> None:
    title = "sandrun: sandbox "
    where, text = process.title(title)
    calls.copy(where, text, len(text))
    calls.decimal(where + len(title), NUMBER)
    calls.call("memfd_create", b"snapshot", os.MFD_CLOEXEC, store=SNAPSHOT)
    calls.call("eventfd2", 0, os.EFD_CLOEXEC, store=READY)


def enter_cgroup(calls: Calls, nest: Nest) -> None:
    for entry in ENTRIES[: nest.entries]:
        calls.call("write", entry, b"0", 1, about="tasks", expected=1)
        calls.call("close", entry)


def close_foreign(calls: Calls, nest: Nest) -> None:
    """Only the sandbox's own descriptors and 0-2 stay: a zygote's socket here would be a way to the spawner."""
    calls.close_foreign((CONTROL, GATE, STORAGE, SYNC, SNAPSHOT, READY))


def unshare_namespaces(calls: Calls, nest: Nest) -> None:
    calls.call("unshare", nest.namespaces)


def name_host(calls: Calls, nest: Nest) -> None:
    if nest.namespaces & process.CLONE_NEWUTS:
        calls.call("sethostname", HOST_NAME, len(HOST_NAME))
        calls.call("setdomainname", b"(none)", 6)


def attach_storage(calls: Calls, nest: Nest) -> None:
    if nest.shared_uid:  # else it comes from the spawner
        rootfs.add_new_storage(calls)
    rootfs.add_storage(calls)


def mount_proc(calls: Calls, nest: Nest) -> None:
    rootfs.add_proc(calls, nest.masked)


def become_init(calls: Calls, nest: Nest) -> None:
    calls.call("setsid")
    if not nest.shared_uid:
        calls.call("setresgid", INIT_ID, INIT_ID, INIT_ID)
        calls.call("setresuid", INIT_ID, INIT_ID, INIT_ID)


def enter_user_namespace(calls: Calls, nest: Nest) -> None:
    """The job's own user namespace: it owns no other namespace, so no capability in it reaches any of the walls.

    Two ids take a map written from outside by a process with CAP_SETUID there: the zygote. user_namespaces(7).
    """
    if not nest.shared_uid:
        calls.call("unshare", process.CLONE_NEWUSER)
        calls.call("write", SYNC, b"u", 1, expected=1)
        answer = calls.buffer(1)
        calls.call("read", SYNC, answer, 1, about="the zygote wrote no id maps", expected=1)
        calls.equal(answer, b"m", error=0, about="the zygote wrote no id maps")
        _check_ids(calls, INIT_UID)
    calls.call("close", SYNC)


def limit_init(calls: Calls, nest: Nest) -> None:
    """KILL to end the job's processes, SETUID and SETGID to start them: in the job's user namespace, no more.

    With one uid none of these: the same user may signal the job, and the job makes the user namespace itself. It maps
    the parent's uid 0, so its maker must have had CAP_SETFCAP (Linux 5.12); init drops that when the job is forked.
    """
    capabilities.add_drop_bounding(calls)
    if nest.shared_uid:
        capabilities.add_keep(calls, ("CAP_SETFCAP",))
    else:
        capabilities.add_keep(calls, ("CAP_KILL", "CAP_SETUID", "CAP_SETGID"))
    calls.call("prctl", process.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # else the filter would need CAP_SYS_ADMIN
    calls.call("prctl", process.PR_SET_DUMPABLE, 0, 0, 0, 0)  # /proc/1/mem and its like are closed to the job


INIT_STEPS: Final[tuple[Step, ...]] = (
    ("start", name_init),
    ("cgroup", enter_cgroup),  # before all that takes memory: from here on it is the job's
    ("descriptors", close_foreign),
    ("namespaces", unshare_namespaces),  # owned by the zygote's user namespace, above the job's
    ("host name", name_host),
    ("storage", attach_storage),  # needs CAP_SYS_ADMIN over the mount namespace, which the lines below give up
    ("proc", mount_proc),
    ("init user", become_init),  # before the user namespace, whose maps then show nothing of the zygote's uid 0
    ("user namespace", enter_user_namespace),
    ("init capabilities", limit_init),
)
"""What init does before it forks the job's process."""


def wait_by_descriptor(calls: Calls, nest: Nest) -> None:
    """The end of a child is read from a descriptor, beside the spawner's messages; the zygote has blocked SIGCHLD.

    SIGINT alone has a handler, Python's. PID 1 is spared what it does not handle, signal(7).
    """
    calls.call("close", PROC)
    calls.call("close", GATE)
    calls.call("rt_sigaction", signal.SIGINT, bytes(32), None, process.SIGSET_BYTES)
    child = (1 << signal.SIGCHLD - 1).to_bytes(process.SIGSET_BYTES, sys.byteorder)
    calls.call("signalfd4", -1, child, process.SIGSET_BYTES, os.O_CLOEXEC | os.O_NONBLOCK, store=SIGNALS)


def give_up_capabilities(calls: Calls, nest: Nest) -> None:
    if nest.shared_uid:
        capabilities.add_keep(calls, ())


def install_init_filter(calls: Calls, nest: Nest) -> None:
    if nest.init_filter:
        seccomp.add_load(calls, nest.init_filter)


def release_job(calls: Calls, nest: Nest) -> None:
    calls.call("write", READY, (1).to_bytes(8, sys.byteorder), 8, expected=8)
    calls.call("close", READY)


CONFINE_STEPS: Final[tuple[Step, ...]] = (
    ("init", wait_by_descriptor),
    ("init capabilities", give_up_capabilities),
    ("init filter", install_init_filter),
    ("init confined", release_job),
)
"""What init does when it has forked the job's process."""

# ---- job and collector -------------------------------------------------------------------------------------


def new_session(calls: Calls, nest: Nest) -> None:
    """No controlling terminal, so TIOCSTI has nothing to type into; and no process group shared with init."""
    calls.call("close", CONTROL)
    calls.call("setsid")


def offer_to_oom(calls: Calls, nest: Nest) -> None:
    """The kernel takes the job's processes before it takes init, and with it verdict and outputs."""
    calls.call("prctl", process.PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to another
    _write_proc(calls, "oom_score_adj", b"1000")


RLIMITS = (
    ("NOFILE", 1024, 4096),
    ("MEMLOCK", 0, 0),  # tmpfs and anonymous memory are never swapped: nothing to lock
    ("MSGQUEUE", 0, 0),
    ("NICE", 0, 0),
    ("RTPRIO", 0, 0),
    ("RTTIME", 0, 0),
    ("SIGPENDING", 1024, 1024),
    ("STACK", 8 << 20, 64 << 20),
)


def set_rlimits(calls: Calls, nest: Nest) -> None:
    """No RLIMIT_AS: node, the JVM and numpy reserve gigabytes that they never touch.

    RLIMIT_CORE is 0, or 1 where the host pipes cores into a program: a pipe gets one in spite of 0, core(5), and would
    carry the job's memory to the host's disk; 1 is the value at which the kernel refuses both (fs/coredump.c).
    """
    core = nest.core_limit
    for name, soft, hard in (("CORE", core, core), *RLIMITS):
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            most = resource.getrlimit(number)[1]  # the zygote's is the job's
            hard = hard if most == resource.RLIM_INFINITY or name == "CORE" else min(hard, most)
            calls.call("prlimit64", 0, number, struct.pack("=2Q", min(soft, hard), hard), None, about=name)


def limit_tasks(most: int) -> None:
    """A second limit of tasks, over the uid in the job's user namespace (Linux 5.14), thus over this job's alone.

    The cgroup's refuses a fork when all of the parent's memory has been copied already: a hundred processes that try
    on keep the kernel's locks on shared files busy, and others' starts waiting for seconds. This one refuses first.
    """
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def become_user(calls: Calls, nest: Nest) -> None:
    if nest.shared_uid:
        outer = os.getuid()
        calls.call("unshare", process.CLONE_NEWUSER)
        _write_proc(calls, "setgroups", b"deny")  # gid_map is EPERM without, user_namespaces(7)
        _write_proc(calls, "gid_map", b"%d %d 1" % (JOB_UID, outer))
        _write_proc(calls, "uid_map", b"%d %d 1" % (JOB_UID, outer))
    calls.call("setresgid", JOB_UID, JOB_UID, JOB_UID)  # gid before uid: leaving the uid loses CAP_SETGID
    calls.call("setresuid", JOB_UID, JOB_UID, JOB_UID)
    _check_ids(calls, JOB_UID)


def drop_bounding(calls: Calls, nest: Nest) -> None:
    """Init has emptied it already, but with one uid a new user namespace has filled it again."""
    if nest.shared_uid:
        capabilities.add_drop_bounding(calls)


def drop_capabilities(calls: Calls, nest: Nest) -> None:
    capabilities.add_keep(calls, ())  # the inheritable set too, which a change of uid keeps, capabilities(7)
    calls.call("prctl", process.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def restrict_files(calls: Calls, nest: Nest) -> None:
    """Reading anywhere in this root, which has nothing but what jobs may read; writing in the three places only.

    A mount that is below no path at all is closed then: the slot SEEN gets the errno that says so.
    """
    if nest.landlock:
        landlock.add_restrict(calls, ["/"], [*rootfs.WRITABLE, *(f"/dev/{name}" for name in rootfs.DEVICES)])
        calls.call("openat", PROC, b"self/status", os.O_RDONLY | os.O_CLOEXEC, 0, store=SEEN, expected=ANYTHING)


def reset_process(calls: Calls, nest: Nest) -> None:
    """What a process inherits silently: a server started with nohup hands SIGHUP ignored to its children."""
    calls.call("rt_sigprocmask", signal.SIG_SETMASK, bytes(process.SIGSET_BYTES), None, process.SIGSET_BYTES)
    calls.call("umask", 0o022)
    calls.call("prctl", process.PR_SET_NAME, b"python3", 0, 0, 0)
    calls.call("prctl", process.PR_SET_DUMPABLE, 1, 0, 0, 0)  # its own /proc/self, which the change of uid has closed
    calls.call("close", PROC)


def change_directory(calls: Calls, nest: Nest) -> None:
    work = rootfs.WORK.encode() + b"\0"
    calls.call("chdir", work)
    where = calls.buffer(4096)
    calls.call("getcwd", where, 4096)
    calls.equal(where, work, error=0, about="the work directory is another")  # "(unreachable)/..." would be the host's


def wait_for_init(calls: Calls, nest: Nest) -> None:
    """Until init's own walls stand. If one fails init is gone, and with it this process: on a busy machine init may not
    have had a core when all that follows here is done, the client's code too."""
    calls.call("read", READY, calls.buffer(8), 8, expected=8)
    calls.call("close", READY)


def install_filter(calls: Calls, nest: Nest) -> None:
    if nest.job_filter:
        seccomp.add_load(calls, nest.job_filter)


JOB_STEPS: Final[tuple[Step, ...]] = (
    ("new session", new_session),
    ("oom_score_adj", offer_to_oom),
    ("resource limits", set_rlimits),
    ("user and groups", become_user),
    ("bounding set", drop_bounding),  # needs CAP_SETPCAP, which the next line gives up
    ("capabilities", drop_capabilities),
    ("landlock", restrict_files),  # needs no_new_privs, landlock(7)
    ("inherited state", reset_process),
    ("work directory", change_directory),
    ("init's walls", wait_for_init),
    ("seccomp", install_filter),  # last: the lines above use calls that it refuses
)


def become_collector(calls: Calls, nest: Nest) -> None:
    """The job's identity under init's filter, which knows no unshare: with one uid, init's own without capabilities."""
    if not nest.shared_uid:
        become_user(calls, nest)


COLLECTOR_STEPS: Final[tuple[Step, ...]] = (
    ("user and groups", become_collector),
    ("capabilities", drop_capabilities),
    ("work directory", change_directory),
    ("seccomp", install_filter),
)


def _write_proc(calls: Calls, name: str, data: bytes) -> None:
    """One write(2) on a file of /proc/self: the kernel's refusal is not lost."""
    about = f"/proc/self/{name}"
    calls.call("openat", PROC, f"self/{name}".encode(), os.O_WRONLY | os.O_CLOEXEC, 0, about=about, store=SCRATCH)
    calls.call("write", SCRATCH, data, len(data), about=about, expected=len(data))
    calls.call("close", SCRATCH)


def _check_ids(calls: Calls, wanted: int) -> None:
    ids = calls.buffer(12)
    for name in ("getresuid", "getresgid"):
        calls.call(name, ids, ids + 4, ids + 8)
        calls.equal(ids, struct.pack("=3I", *[wanted] * 3), error=0, about=f"{name} does not show {wanted}")


def tabulate(nest: Nest) -> Tables:
    """All that happens between the zygote's fork and the first line of Python in what comes of it."""
    return Tables(
        _tabulate(INIT_STEPS, nest),
        _tabulate(JOB_STEPS, nest),
        _tabulate(CONFINE_STEPS, nest),
        _tabulate(COLLECTOR_STEPS, nest, "collector: "),
    )


def _tabulate(steps: tuple[Step, ...], nest: Nest, prefix: str = "") -> Calls:
    calls = Calls()
    for name, add in steps:
        calls.step = prefix + name
        add(calls, nest)
    return calls
