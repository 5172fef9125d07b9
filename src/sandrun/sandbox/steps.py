"""Building a sandbox: ordered lists whose names are the error messages.

A step that fails ends the job as `setup_failed` with its name, errno and object; no step warns and goes on. Layers that
the operator waived are data of the `Nest` (an empty filter, a flag that is not there), and the report shows them.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from typing import Final

from sandrun.linux import capabilities, landlock, process, seccomp
from sandrun.sandbox import rootfs
from sandrun.sandbox.spec import INIT_UID, JOB_UID, Spec, close

Step = tuple[str, Callable[[Spec], None]]

HOST_NAME = b"sandbox"


class StepFailed(Exception):
    """A step failed; `__cause__` is the kernel's refusal."""

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


def take(steps: tuple[Step, ...], spec: Spec) -> None:
    """Run steps from top to bottom. Raises: StepFailed from the first that fails."""
    for name, apply in steps:
        try:
            apply(spec)
        except BaseException as error:
            raise StepFailed(name) from error


# ---- init --------------------------------------------------------------------------------------------------


def enter_cgroup(spec: Spec) -> None:
    for entry in spec.entries:
        os.write(entry, b"0")
        os.close(entry)
    spec.entries = []


def close_foreign(spec: Spec) -> None:
    """Only the sandbox's own descriptors and 0-2 stay: a zygote's socket here would be a way to the spawner."""
    first = 3
    for own in spec.descriptors():
        process.close_range(first, own - 1)
        first = own + 1
    process.close_range(first, 0xFFFFFFFF)


def unshare_namespaces(spec: Spec) -> None:
    process.unshare(spec.nest.namespaces)


def name_host(spec: Spec) -> None:
    if spec.nest.namespaces & process.CLONE_NEWUTS:
        process.sethostname(HOST_NAME)
        process.setdomainname(b"(none)")


def attach_storage(spec: Spec) -> None:
    if spec.storage < 0:
        spec.storage = rootfs.new_storage(spec.storage_bytes, owner=0, noswap=False)
    rootfs.attach_storage(spec.storage, spec.job_id)
    spec.storage = -1


def mount_proc(spec: Spec) -> None:
    spec.proc = rootfs.mount_proc(spec.nest.masked)


def become_init(spec: Spec) -> None:
    os.setsid()
    if not spec.nest.shared_uid:
        os.setresgid(spec.init_id, spec.init_id, spec.init_id)
        os.setresuid(spec.init_id, spec.init_id, spec.init_id)


def enter_user_namespace(spec: Spec) -> None:
    """The job's own user namespace: it owns no other namespace, so no capability in it reaches any of the walls.

    Two ids take a map written from outside by a process with CAP_SETUID there: the zygote. user_namespaces(7).
    """
    if not spec.nest.shared_uid:
        process.unshare(process.CLONE_NEWUSER)
        os.write(spec.sync, b"u")
        if os.read(spec.sync, 1) != b"m":
            raise OSError(0, "the zygote wrote no id maps")
        if os.getresuid() != (INIT_UID,) * 3 or os.getresgid() != (INIT_UID,) * 3:
            raise OSError(0, f"the id maps show uid {os.getresuid()}, gid {os.getresgid()}")
    close(spec.sync)
    spec.sync = -1


def limit_init(spec: Spec) -> None:
    """KILL to end the job's processes, SETUID and SETGID to start them: in the job's user namespace, no more.

    With one uid none of these: the same user may signal the job, and the job makes the user namespace itself. It maps
    the parent's uid 0, so its maker must have had CAP_SETFCAP (Linux 5.12); init drops that when the job is forked.
    """
    capabilities.drop_bounding()
    if spec.nest.shared_uid:
        capabilities.keep(("CAP_SETFCAP",))
    else:
        capabilities.keep(("CAP_KILL", "CAP_SETUID", "CAP_SETGID"))
    process.set_no_new_privs()  # else the filter would need CAP_SYS_ADMIN
    process.set_dumpable(False)  # /proc/1/mem and its like are closed to the job, with one uid too


INIT_STEPS: Final[tuple[Step, ...]] = (
    ("cgroup", enter_cgroup),  # first: all memory from here on is the job's
    ("descriptors", close_foreign),
    ("namespaces", unshare_namespaces),  # owned by the zygote's user namespace, above the job's
    ("host name", name_host),
    ("storage", attach_storage),  # needs CAP_SYS_ADMIN over the mount namespace, which the lines below give up
    ("proc", mount_proc),
    ("init user", become_init),  # before the user namespace, whose maps then show nothing of the zygote's uid 0
    ("user namespace", enter_user_namespace),
    ("init capabilities", limit_init),
)


# ---- job and collector -------------------------------------------------------------------------------------


def new_session(spec: Spec) -> None:
    """No controlling terminal, so TIOCSTI has nothing to type into; and no process group shared with init."""
    os.setsid()


def offer_to_oom(spec: Spec) -> None:
    """The kernel takes the job's processes before it takes init, and with it verdict and outputs."""
    process.set_dumpable(True)  # else /proc/self belongs to another
    _write_proc(spec, "oom_score_adj", b"1000")


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


def set_rlimits(spec: Spec) -> None:
    """No RLIMIT_AS: node, the JVM and numpy reserve gigabytes that they never touch.

    RLIMIT_CORE is 0, or 1 where the host pipes cores into a program: a pipe gets one in spite of 0, core(5), and would
    carry the job's memory to the host's disk; 1 is the value at which the kernel refuses both (fs/coredump.c).
    """
    core = spec.nest.core_limit
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    for name, soft, hard in RLIMITS:
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:
            most = resource.getrlimit(number)[1]
            hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
            resource.setrlimit(number, (min(soft, hard), hard))


def limit_tasks(most: int) -> None:
    """A second limit of tasks, over the uid in the job's user namespace (Linux 5.14), thus over this job's alone.

    The cgroup's refuses a fork when all of the parent's memory has been copied already: a hundred processes that try
    on keep the kernel's locks on shared files busy, and others' starts waiting for seconds. This one refuses first.
    """
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def become_user(spec: Spec) -> None:
    if spec.nest.shared_uid:
        outer = os.getuid()
        process.unshare(process.CLONE_NEWUSER)
        _write_proc(spec, "setgroups", b"deny")  # gid_map is EPERM without, user_namespaces(7)
        _write_proc(spec, "gid_map", b"%d %d 1" % (JOB_UID, outer))
        _write_proc(spec, "uid_map", b"%d %d 1" % (JOB_UID, outer))
    os.setresgid(JOB_UID, JOB_UID, JOB_UID)  # gid before uid: leaving the uid loses CAP_SETGID
    os.setresuid(JOB_UID, JOB_UID, JOB_UID)
    if os.getresuid() != (JOB_UID,) * 3 or os.getresgid() != (JOB_UID,) * 3:
        raise OSError(0, f"uid {os.getresuid()}, gid {os.getresgid()} after the change")


def drop_bounding(spec: Spec) -> None:
    """Init has emptied it already, but with one uid a new user namespace has filled it again."""
    if spec.nest.shared_uid:
        capabilities.drop_bounding()


def drop_capabilities(spec: Spec) -> None:
    capabilities.clear()  # the inheritable set too, which a change of uid keeps, capabilities(7)
    process.set_no_new_privs()


def restrict_files(spec: Spec) -> None:
    """Reading anywhere in this root, which has nothing but what jobs may read; writing in the three places only."""
    if spec.nest.landlock:
        version = landlock.restrict(["/"], [*rootfs.WRITABLE, *(f"/dev/{name}" for name in rootfs.DEVICES)])
        try:
            os.close(os.open("self/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=spec.proc))
        except PermissionError:
            spec.landlock = version  # a mount that is below no path at all is closed: it is in force


def reset_process(spec: Spec) -> None:
    """What a process inherits silently: a server started with nohup hands SIGHUP ignored to its children."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    process.set_dumpable(True)  # its own /proc/self, which the change of uid has closed
    close(spec.proc)
    spec.proc = -1


def change_directory(spec: Spec) -> None:
    os.chdir(rootfs.WORK)
    if os.getcwd() != rootfs.WORK:  # "(unreachable)/..." would be the host's tree, getcwd(3)
        raise OSError(0, f"the work directory is {os.getcwd()!r}")


def install_filter(spec: Spec) -> None:
    if spec.nest.job_filter:
        seccomp.load(spec.nest.job_filter)
        spec.filter = spec.nest.job_filter


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
    ("seccomp", install_filter),  # last: the lines above use calls that it refuses
)


def become_collector(spec: Spec) -> None:
    """The job's identity under init's filter, which knows no unshare: with one uid, init's own without capabilities."""
    if not spec.nest.shared_uid:
        become_user(spec)


COLLECTOR_STEPS: Final[tuple[Step, ...]] = (
    ("user and groups", become_collector),
    ("capabilities", drop_capabilities),
    ("work directory", change_directory),
    ("seccomp", install_filter),
)


def _write_proc(spec: Spec, name: str, data: bytes) -> None:
    """One write(2) on a file of /proc/self: the kernel's refusal is not lost. Raises: OSError naming the file."""
    descriptor = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=spec.proc)
    try:
        os.write(descriptor, data)
    except OSError as error:
        raise OSError(error.errno or 0, f"/proc/self/{name}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(descriptor)
