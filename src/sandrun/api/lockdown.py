"""The walls around the api process itself, raised after everything is imported and bound, before it hears a client.

A hole in HTTP, TLS, multipart or JSON must yield a process without privilege, without files, that can start nothing and
call nobody. As root: a user of its own and a read-only view of the host's files. Rootless it shares its user with the
jobs' parents, so Landlock and this filter are the only walls that it has; `/health` says which are up.

Each wall is read back. One that cannot be had is a refusal to start, unless its layer is waived; a kernel without
Landlock is no refusal (the design does not require it), but it is told.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sandrun.errors import MissingLayer
from sandrun.linux import capabilities, landlock, mounts, process, seccomp

UNUSABLE = "/nonexistent/no-temporary-files"
"""Where `tempfile` is sent: nothing that a client sends may be spooled to a disk, not by any library either."""

CLONE_THREAD = 0x00010000  # <linux/sched.h>
CLONE_NEW_ANY = (
    process.CLONE_NEWNS
    | process.CLONE_NEWCGROUP
    | process.CLONE_NEWUTS
    | process.CLONE_NEWIPC
    | process.CLONE_NEWUSER
    | process.CLONE_NEWPID
    | process.CLONE_NEWNET
)
SOCK_DGRAM = 2
SOCK_TYPE = 0xF

REFUSED: tuple[tuple[str, str], ...] = (
    ("execve execveat fork vfork", "it starts threads and nothing else"),
    ("ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise", "other processes are none of its"),
    ("kill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal", "rootless, the jobs' parents have the same uid"),
    ("socket connect bind", "it answers; it never calls: not D-Bus, not a metadata service, not the local network"),
    ("setns unshare mount umount2 pivot_root chroot", "its view of the host stays the one that it was given"),
    ("move_mount open_tree fsopen fsmount fsconfig fspick mount_setattr", "the same by the newer calls"),
    ("bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register", "kernel surface of no use"),
    ("keyctl add_key request_key", "keyrings outlive processes"),
    ("init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff", "never"),
    ("open_by_handle_at mknod mknodat acct quotactl syslog settimeofday clock_settime adjtimex", "never"),
)
"""Calls that end with EPERM, and why. All others are allowed: what libraries need is not ours to list call by call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the lockdown needs to know.

    Attributes:
        user: account to become as root; `uid` if there is none of that name.
        uid: first id of the range that is nobody's.
        waived: layers that may be missing.
        parent: pid whose death ends this process, 0 for none.
    """

    user: str = "sandrun"
    uid: int = 1879048192
    waived: frozenset[str] = frozenset()
    parent: int = 0


@dataclass(slots=True, kw_only=True)
class Report:
    """What is in force, read back; `/health` shows it.

    Attributes:
        mounts: "read-only", or "host" rootless, where a mount namespace cannot be had without a user namespace.
        landlock: its ABI, None without.
        missing: layers that are not in force.
    """

    uid: int = -1
    gid: int = -1
    capabilities: str = ""
    no_new_privs: bool = False
    seccomp: str | None = None
    mounts: str = "host"
    landlock: int | None = None
    missing: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


Step = Callable[[Wanted, Report], None]


def no_core(wanted: Wanted, report: Report) -> None:
    """A core file would put clients' bytes on a disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def no_temporary_files(wanted: Wanted, report: Report) -> None:
    tempfile.tempdir = UNUSABLE
    if os.path.lexists(UNUSABLE):
        raise FileExistsError(errno.EEXIST, f"{UNUSABLE} exists")


def own_mounts(wanted: Wanted, report: Report) -> None:
    """A mount namespace in which everything is read-only."""
    if os.geteuid() != 0:
        return
    process.unshare(process.CLONE_NEWNS)
    # Slave, not private: what the operator unmounts later must not stay mounted, and busy, for our sake.
    mounts.set_attributes("/", propagation=mounts.MS_SLAVE, recursive=True)
    mounts.set_attributes("/", set=mounts.MOUNT_ATTR_RDONLY, recursive=True)
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, "mount_setattr: / is still writable")
    report.mounts = "read-only"


def bounding_set(wanted: Wanted, report: Report) -> None:
    """Needs CAP_SETPCAP, which the next steps give up. Rootless, no_new_privs makes the set meaningless."""
    if os.geteuid() == 0:
        capabilities.drop_bounding()


def become_user(wanted: Wanted, report: Report) -> None:
    if os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(wanted.user)
            uid, gid = entry.pw_uid, entry.pw_gid
        except KeyError:
            uid = gid = wanted.uid
        os.setgroups([])  # groups and gid before uid: leaving uid 0 loses CAP_SETGID
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    ids = (*os.getresuid(), *os.getresgid())
    if 0 in ids or len(set(ids[:3])) != 1 or len(set(ids[3:])) != 1:
        raise PermissionError(errno.EPERM, f"setresuid: the ids are {ids}")
    report.uid, report.gid = ids[0], ids[3]


def no_capabilities(wanted: Wanted, report: Report) -> None:
    capabilities.clear()
    sets = capabilities.read()
    report.capabilities = " ".join(f"{name}={value:x}" for name, value in sets.items())
    if sets["inh"] or sets["prm"] or sets["eff"] or sets["amb"] or (report.mounts == "read-only" and sets["bnd"]):
        raise PermissionError(errno.EPERM, f"capset: {report.capabilities}")


def die_with_parent(wanted: Wanted, report: Report) -> None:
    """After the last change of ids, which would make the kernel forget it."""
    process.set_dumpable(False)
    if wanted.parent:
        process.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != wanted.parent:
            raise ProcessLookupError(errno.ESRCH, "the supervisor is gone")


def no_new_privs(wanted: Wanted, report: Report) -> None:
    process.set_no_new_privs()
    report.no_new_privs = process.get_no_new_privs()
    if not report.no_new_privs:
        raise PermissionError(errno.EPERM, "prctl: no_new_privs is not set")


def restrict_files(wanted: Wanted, report: Report) -> None:
    """Reads below what Python is made of, writes to /dev/null, no signals and no abstract sockets beyond itself."""
    if not landlock.abi():
        report.missing.append("landlock")
        return
    readable = readable_paths()
    abi = landlock.restrict(readable, ["/dev/null"])
    if "/" not in readable and _opens("/"):
        raise PermissionError(errno.EPERM, "landlock_restrict_self: / can still be listed")
    report.landlock = abi


def install_filter(wanted: Wanted, report: Report) -> None:
    """Late, because the steps above use calls that it refuses. Threads started later inherit it."""
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise OSError(errno.EBUSY, f"seccomp: there are {len(threads)} threads already, which it would not hold for")
    program = filter_program()
    seccomp.load(program)
    if seccomp.mode() != seccomp.MODE_FILTER:
        raise OSError(errno.EPERM, "seccomp: no filter is in force")
    try:
        os.execv(UNUSABLE, ["probe"])
    except OSError as error:
        if error.errno != errno.EPERM:  # ENOENT: the call was looked at
            raise OSError(error.errno, "seccomp: execve is not refused") from None
    report.seccomp = hashlib.sha256(program).hexdigest()


STEPS: tuple[tuple[str, str, str, Step], ...] = (
    ("core files", "", "", no_core),
    ("temporary files", "", "", no_temporary_files),
    ("mount namespace", "mount", "Run Sandrun as full root or as an ordinary user.", own_mounts),
    ("bounding set", "capabilities", "Run Sandrun as full root or as an ordinary user.", bounding_set),
    ("user and groups", "uid", "Run Sandrun as full root or as an ordinary user.", become_user),
    ("capabilities", "capabilities", "Run Sandrun as full root or as an ordinary user.", no_capabilities),
    ("parent's death", "", "", die_with_parent),
    ("no_new_privs", "no-new-privs", "A kernel of 5.15 or later has it.", no_new_privs),
    ("Landlock", "landlock", "Boot with landlock in lsm=, or pass --allow-missing landlock.", restrict_files),
    ("seccomp", "seccomp", "Needs CONFIG_SECCOMP_FILTER in the kernel and the package libseccomp2.", install_filter),
)
"""Top to bottom is the order of events: step, layer by the name that `--allow-missing` takes, fix, what to do."""


def lock_down(wanted: Wanted) -> Report:
    """Raise the walls around this process, for good. It must have one thread, and have imported what it will need.

    Raises: MissingLayer naming the layer and the fix, for one that fails and is not waived. OSError for a step that is
        no layer. Either way the process is half confined and good for nothing but to end.
    """
    report = Report()
    for name, layer, fix, step in STEPS:
        try:
            step(wanted, report)
        except OSError as error:
            if not layer:
                raise OSError(error.errno, f"api: {name}: {error}") from error
            if layer not in wanted.waived:
                raise MissingLayer(layer, f"the HTTP process cannot confine itself ({name}: {error})", fix) from error
            report.missing.append(layer)
    return report


def filter_program() -> bytes:
    """The BPF program of `REFUSED`, with the rules that look at arguments."""
    refuse = seccomp.ERRNO(errno.EPERM)
    rules = seccomp.Filter(seccomp.ALLOW)
    rules.add(refuse, "clone", seccomp.arg(0).without(CLONE_THREAD))  # a process; fork(3) is this call too
    rules.add(refuse, "clone", seccomp.arg(0).with_any(CLONE_NEW_ANY))
    rules.add(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags are behind a pointer; on ENOSYS libc takes clone
    # A datagram pair can still send to any address, without connect: D-Bus, /dev/log, systemd's notify socket.
    rules.add(refuse, "socketpair", seccomp.arg(1).masked(SOCK_TYPE, SOCK_DGRAM))
    for names, _why in REFUSED:
        for name in names.split():
            rules.add(refuse, name)
    return rules.export()


def readable_paths() -> list[str]:
    """What Landlock lets this process read: the interpreter, its libraries, this package, what libc reads by itself."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    wanted: Iterable[str] = (
        *("/usr", "/lib", "/lib64", "/proc", "/dev/null", "/dev/urandom", "/dev/random"),
        *("/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/ssl"),
        *(sys.prefix, sys.base_prefix, here),
        *(path for path in sys.path if os.path.isabs(path)),
    )
    found: dict[str, None] = {}
    for path in wanted:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)  # as Landlock will: it may not be ours to reach
        except OSError:
            continue
        os.close(descriptor)
        found[path] = None
    return list(found)


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        return False
    return True
