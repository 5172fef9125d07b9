"""The system calls a job may make, as a table: each row says why.

A call that the table does not name, because it is newer than the table or exists nowhere, answers ENOSYS, so programs
take the path that they have for older kernels. What we know and forbid answers EPERM, unless a library copes better
with another errno. Calls of another architecture (i386, x32) end the process. Nothing else kills: a refusal is an
exception in the program, which can tell its user.

The rows of one call are tried from top to bottom, the first whose conditions hold decides. Conditions look at the low
32 bits of an argument: the upper ones of an `int` are not the kernel's argument, so a program could hide there.

The groups were measured: by strace over typical programs, then by leaving one call out after the other. The core runs
python3, numpy, pandas and perl; with `events` node and asyncio; with `files` and `process` bash, gcc, ruby, subprocess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from errno import EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM
from typing import NamedTuple

from sandrun.linux.libc import MACHINE
from sandrun.linux.seccomp import ALLOW, ERRNO, Comparison, Filter, arg, resolve

CLONE_NEW_ANY = 0x7E020000  # <linux/sched.h>: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
CLONE_PARENT = 0x00008000
AF_UNIX = 1
INIT = 1  # the pid of our init, as the job sees it

TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO = 0x5401, 0x540F, 0x5413, 0x541B, 0x5421  # <asm-generic/ioctls.h>
FIONCLEX, FIOCLEX, TCGETS2 = 0x5450, 0x5451, 0x802C542A
TIOCSTI, TIOCLINUX, TIOCSETD = 0x5412, 0x541C, 0x5423
FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_FSSETXATTR = 0x40086602, 0x40046602, 0x401C5820  # <linux/fs.h>

F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW = range(8)  # <asm-generic/fcntl.h>
F_SETOWN, F_SETSIG, F_SETOWN_EX, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 8, 10, 15, 36, 37, 38
F_SETLEASE, F_NOTIFY, F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ, F_GET_SEALS = 1024, 1026, 1030, 1031, 1032, 1034

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME = 1, 2, 3, 15, 16  # <linux/prctl.h>
PR_GET_SECCOMP, PR_CAPBSET_READ, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 21, 23, 38, 39

# Calls that aarch64 never had; their *at, p* and 3 forms serve there.
_ONLY_X86 = frozenset(
    "access alarm arch_prctl chmod creat dup2 epoll_wait fork getpgrp link lstat mkdir open pause pipe poll readlink"
    " rename rmdir stat symlink time unlink vfork".split()
)


class Rule(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the call, as in syscalls(2).
        errno: 0 if the call is allowed, else what it answers.
        conditions: all must hold for this row to decide; () always does.
        why: the reason, for a reader of the table and of `sandrun policy`.
        group: "core", "files", "process", "events", "node", "init" or "refused".
    """

    name: str
    errno: int
    conditions: tuple[Comparison, ...]
    why: str
    group: str = ""


def Allow(name: str, why: str) -> Rule:  # noqa: N802  a row of the table reads like a class
    """The call is allowed with any arguments."""
    return Rule(name, 0, (), why)


def AllowIf(name: str, *conditions: Comparison, why: str) -> Rule:  # noqa: N802
    """The call is allowed if all conditions hold; a later row says what happens otherwise."""
    return Rule(name, 0, conditions, why)


def Refuse(name: str, errno: int, *conditions: Comparison, why: str) -> Rule:  # noqa: N802
    """The call answers `errno` if all conditions hold."""
    return Rule(name, errno, conditions, why)


CORE = (
    Allow("read", why="input"),
    Allow("write", why="output"),
    Allow("readv", why="input into several buffers, musl's stdio"),
    Allow("writev", why="output from several buffers"),
    Allow("pread64", why="the dynamic loader, sqlite"),
    Allow("pwrite64", why="sqlite, linkers"),
    Allow("openat", why="every file; which ones is the mount namespace's business"),
    Allow("open", why="older programs, musl"),
    Allow("close", why="every descriptor"),
    Allow("fstat", why="stdio asks for the block size"),
    Allow("stat", why="older programs, musl"),
    Allow("lstat", why="older programs, musl"),
    Allow("newfstatat", why="stat of today's libc"),
    Allow("statx", why="node, Rust, coreutils"),
    Allow("lseek", why="seeking in files"),
    Allow("access", why="the dynamic loader asks for ld.so.preload"),
    Allow("faccessat2", why="access of today's libc"),
    Allow("readlink", why="realpath"),
    Allow("getcwd", why="relative paths"),
    Allow("chdir", why="cd; subprocess with cwd="),
    Allow("getdents64", why="listing directories"),
    Allow("mkdir", why="making directories on the job's tmpfs"),
    Allow("rmdir", why="temporary directories"),
    Allow("rename", why="atomic replacement of files"),
    Allow("unlink", why="temporary files"),
    Allow("unlinkat", why="shutil.rmtree, rm -r"),
    AllowIf("fcntl", arg(1).equals(F_DUPFD), why="copies of descriptors, shells"),
    AllowIf("fcntl", arg(1).equals(F_DUPFD_CLOEXEC), why="copies of descriptors, os.dup"),
    AllowIf("fcntl", arg(1).equals(F_GETFD), why="close-on-exec"),
    AllowIf("fcntl", arg(1).equals(F_SETFD), why="close-on-exec"),
    AllowIf("fcntl", arg(1).equals(F_GETFL), why="how a descriptor was opened, fdopen"),
    AllowIf("fcntl", arg(1).equals(F_SETFL), why="non-blocking, append"),
    AllowIf("fcntl", arg(1).equals(F_GETLK), why="record locks, sqlite"),
    AllowIf("fcntl", arg(1).equals(F_SETLK), why="record locks, sqlite"),
    AllowIf("fcntl", arg(1).equals(F_SETLKW), why="record locks, lockf"),
    AllowIf("fcntl", arg(1).equals(F_OFD_GETLK), why="locks of a descriptor"),
    AllowIf("fcntl", arg(1).equals(F_OFD_SETLK), why="locks of a descriptor"),
    AllowIf("fcntl", arg(1).equals(F_OFD_SETLKW), why="locks of a descriptor"),
    AllowIf("fcntl", arg(1).equals(F_GETPIPE_SZ), why="how much a pipe takes"),
    AllowIf("fcntl", arg(1).equals(F_GET_SEALS), why="whether a memory file may change"),
    Refuse("fcntl", EPERM, arg(1).equals(F_NOTIFY), why="tells who on the host uses the folders we share: dnotify"),
    Refuse("fcntl", EPERM, arg(1).equals(F_SETLEASE), why="holds up whoever opens a shared file for writing"),
    Refuse("fcntl", EPERM, arg(1).equals(F_SETOWN), why="signals past the rule on pid 1"),
    Refuse("fcntl", EPERM, arg(1).equals(F_SETOWN_EX), why="the same by its newer form"),
    Refuse("fcntl", EPERM, arg(1).equals(F_SETSIG), why="which signal that would be"),
    Refuse("fcntl", EPERM, arg(1).equals(F_SETPIPE_SZ), why="stdout's pipe counts against the server's user, pipe(7)"),
    Refuse("fcntl", EINVAL, why="the kernel's own answer to what it does not know"),
    AllowIf("ioctl", arg(1).equals(TCGETS), why="isatty"),
    AllowIf("ioctl", arg(1).equals(TCGETS2), why="isatty of newer libcs"),
    AllowIf("ioctl", arg(1).equals(TIOCGWINSZ), why="shutil.get_terminal_size"),
    AllowIf("ioctl", arg(1).equals(TIOCGPGRP), why="shells ask whether they have a terminal"),
    AllowIf("ioctl", arg(1).equals(FIONREAD), why="how much a pipe holds"),
    AllowIf("ioctl", arg(1).equals(FIONBIO), why="non-blocking, libuv and Python"),
    AllowIf("ioctl", arg(1).equals(FIOCLEX), why="close-on-exec, Python and libuv"),
    AllowIf("ioctl", arg(1).equals(FIONCLEX), why="subprocess with pass_fds="),
    Refuse("ioctl", EPERM, arg(1).equals(TIOCSTI), why="types into a terminal on behalf of its user"),
    Refuse("ioctl", EPERM, arg(1).equals(TIOCLINUX), why="pastes into a console"),
    Refuse("ioctl", EPERM, arg(1).equals(TIOCSETD), why="loads line disciplines, a rich source of kernel bugs"),
    Refuse("ioctl", EPERM, arg(1).equals(FS_IOC_SETFLAGS), why="immutable files could not be cleaned up"),
    Refuse("ioctl", EPERM, arg(1).equals(FS_IOC32_SETFLAGS), why="the same by its 32-bit number"),
    Refuse("ioctl", EPERM, arg(1).equals(FS_IOC_FSSETXATTR), why="the same by its newer form"),
    Refuse("ioctl", ENOTTY, why="drivers have thousands; ENOTTY is what a file without this one answers"),
    Allow("dup", why="redirection"),
    Allow("dup2", why="redirection"),
    Allow("pipe2", why="pipes"),
    Allow("poll", why="waiting for input; the interpreter's start"),
    Allow("mmap", why="every allocator and the dynamic loader"),
    Allow("munmap", why="every allocator"),
    Allow("mprotect", why="the dynamic loader, thread stacks, JIT compilers"),
    Allow("mremap", why="realloc of large blocks"),
    Allow("madvise", why="allocators give memory back"),
    Allow("brk", why="malloc"),
    Allow("rt_sigaction", why="signal handlers"),
    Allow("rt_sigprocmask", why="signal masks, around fork and thread creation"),
    Allow("rt_sigreturn", why="the way back from every signal handler"),
    Allow("sigaltstack", why="faulthandler, Go, node"),
    Allow("futex", why="every lock"),
    Allow("set_tid_address", why="libc's start"),
    Allow("set_robust_list", why="libc's start and every thread's"),
    Allow("rseq", why="libc's start and every thread's"),
    Allow("arch_prctl", why="thread-local storage on x86-64"),
    AllowIf("prlimit64", arg(0).equals(0), why="reads or lowers the caller's own limits, getrlimit of today's libc"),
    Refuse("prlimit64", EPERM, why="with a pid it reaches other processes"),
    Allow("getrandom", why="hash seeds, the random module"),
    Allow("clock_gettime", why="time, where the vDSO cannot serve"),
    Allow("clock_nanosleep", why="sleep"),
    Allow("nanosleep", why="sleep of older programs"),
    Allow("restart_syscall", why="the kernel goes on with a sleep by it, after a freeze or a stop"),
    Allow("getpid", why="never refused: with getpid refused, a shell's `kill $$` becomes kill(-1)"),
    Allow("gettid", why="never refused, like getpid"),
    Allow("getuid", why="who am I; the interpreter's start"),
    Allow("geteuid", why="who am I"),
    Allow("getgid", why="who am I"),
    Allow("getegid", why="who am I"),
    Allow("exit", why="the end of a thread"),
    Allow("exit_group", why="the end of a process"),
    Allow("execve", why="subprocess, shells, own executables; no_new_privs and nosuid take the danger out"),
    Allow("wait4", why="waiting for children"),
    AllowIf("clone", arg(0).without(CLONE_NEW_ANY | CLONE_PARENT), why="threads and fork, but no new namespaces"),
    Refuse("clone", EPERM, why="new namespaces give capabilities inside; CLONE_PARENT hands init a stranger as child"),
    Allow("uname", why="platform detection"),
    Allow("sysinfo", why="memory size, get_nprocs of libc"),
    Allow("sched_getaffinity", why="os.cpu_count, numpy's start"),
)

FILES = (
    Allow("ftruncate", why="writing files anew; shared memory of multiprocessing"),
    Allow("truncate", why="os.truncate, node"),
    Allow("fsync", why="sqlite, careful writers"),
    Allow("fdatasync", why="sqlite"),
    Allow("link", why="hard links, only on the job's own tmpfs"),
    Allow("linkat", why="link of Go, Rust and coreutils"),
    Allow("symlink", why="symbolic links; nothing outside follows them"),
    Allow("symlinkat", why="symlink of Go, Rust and coreutils"),
    Allow("mkdirat", why="mkdir of Go and Rust"),
    Allow("readlinkat", why="readlink of Go, Rust and coreutils"),
    Allow("renameat", why="rename of Go and musl"),
    Allow("renameat2", why="mv of coreutils"),
    Allow("faccessat", why="access of Go and musl"),
    Allow("chmod", why="making a script executable; set-id bits are void on nosuid mounts"),
    Allow("fchmod", why="shutil.copymode, linkers"),
    Allow("fchmodat", why="chmod of Go, Rust and coreutils"),
    Allow("utimensat", why="shutil.copystat, touch, make"),
    Allow("flock", why="lock files"),
    Allow("statfs", why="free space"),
    Allow("fstatfs", why="libc's posix_fallocate"),
    Allow("fchdir", why="find, rm -r, fts"),
    Allow("umask", why="shells, tempfile"),
    Allow("creat", why="older programs"),
    Allow("copy_file_range", why="cp, shutil of newer Pythons"),
    Allow("listxattr", why="shutil.copystat looks for extended attributes"),
    Allow("llistxattr", why="the same without following links"),
    Allow("msync", why="mmap.flush"),
)

PROCESS = (
    Allow("vfork", why="subprocess, make, gcc"),
    Allow("fork", why="fork of musl"),
    Allow("getppid", why="never refused, like getpid"),
    Allow("getpgrp", why="shells"),
    Allow("getpgid", why="os.killpg(os.getpgid(child), ...)"),
    Allow("setpgid", why="shells' job control"),
    Allow("setsid", why="subprocess with start_new_session=; the job ends with all sessions in it"),
    Allow("getgroups", why="id(1), os.getgroups"),
    AllowIf("kill", arg(0).differs(INIT), why="signals to own processes; kill(-1) ends at the PID namespace"),
    Refuse("kill", EPERM, why="pid 1 is our init, which must live to report; holds where both have one uid too"),
    AllowIf("tgkill", arg(0).differs(INIT), why="raise, abort, pthread_kill"),
    Refuse("tgkill", EPERM, why="pid 1 is our init"),
    AllowIf("rt_sigqueueinfo", arg(0).differs(INIT), why="sigqueue"),
    Refuse("rt_sigqueueinfo", EPERM, why="pid 1 is our init"),
    AllowIf("prctl", arg(0).equals(PR_SET_NAME), why="names of threads"),
    AllowIf("prctl", arg(0).equals(PR_GET_NAME), why="names of threads"),
    AllowIf("prctl", arg(0).equals(PR_SET_PDEATHSIG), why="children that end with their parent"),
    AllowIf("prctl", arg(0).equals(PR_GET_PDEATHSIG), why="reading it back"),
    AllowIf("prctl", arg(0).equals(PR_GET_DUMPABLE), why="reading a flag"),
    AllowIf("prctl", arg(0).equals(PR_GET_SECCOMP), why="a job may see that it is confined"),
    AllowIf("prctl", arg(0).equals(PR_CAPBSET_READ), why="a job may see that it has no capabilities"),
    AllowIf("prctl", arg(0).equals(PR_SET_NO_NEW_PRIVS), why="is set already, and cannot be unset"),
    AllowIf("prctl", arg(0).equals(PR_GET_NO_NEW_PRIVS), why="a job may see that it is confined"),
    Refuse("prctl", EPERM, why="the others change dumpability, speculation, seccomp, capabilities"),
    Allow("getrusage", why="the time and resource modules, shells' `time`"),
    Allow("times", why="os.times, perl"),
    Allow("setitimer", why="signal.setitimer"),
    Allow("alarm", why="signal.alarm, timeout(1)"),
    Allow("pause", why="signal.pause"),
    Allow("rt_sigsuspend", why="timeout(1), make, sh's `wait`"),
    Allow("waitid", why="node, os.waitid"),
    Allow("sched_yield", why="spinning locks, OpenBLAS"),
    Allow("dup3", why="redirection of Go, Rust and bash"),
    Allow("pipe", why="older programs"),
    Allow("ppoll", why="waiting for input, Rust and perl"),
    Allow("clock_getres", why="time.get_clock_info"),
    Allow("gettimeofday", why="time, where the vDSO cannot serve"),
    Allow("time", why="time, where the vDSO cannot serve"),
)

EVENTS = (
    Allow("epoll_create1", why="asyncio, node, Go"),
    Allow("epoll_ctl", why="asyncio, node, Go"),
    Allow("epoll_wait", why="asyncio, node"),
    Allow("epoll_pwait", why="node, Go"),
    Allow("eventfd2", why="node, Go"),
    Allow("pselect6", why="select"),
    AllowIf("socketpair", arg(0).equals(AF_UNIX), why="asyncio, multiprocessing; both ends are the job's own"),
    Refuse("socketpair", EPERM, why="no other family makes pairs worth having: TIPC, AF_VSOCK"),
    Allow("sendto", why="send on a socketpair"),
    Allow("recvfrom", why="recv on a socketpair"),
    Allow("sendmsg", why="node's and multiprocessing's pipes, with descriptors"),
    Allow("recvmsg", why="node's and multiprocessing's pipes, with descriptors"),
    Allow("shutdown", why="the end of one direction of a socketpair"),
    Allow("getsockname", why="what kind of socket is it, Python and libuv"),
)

NODE = (Allow("membarrier", why="V8's code patching"),)


def refuse(errno: int, names: str, why: str) -> tuple[Rule, ...]:
    """A row for each of `names`, all for the same reason."""
    return tuple(Refuse(name, errno, why=why) for name in names.split())


REFUSED = (
    # ENOSYS: libc and programs have a way for kernels without the call, and take it on this errno alone
    Refuse("clone3", ENOSYS, why="its flags are behind a pointer, where BPF can't look; libc falls back to clone"),
    Refuse("openat2", ENOSYS, why="its flags are behind a pointer; programs fall back to openat"),
    *refuse(ENOSYS, "io_uring_setup io_uring_enter io_uring_register", "makes calls that no filter sees"),
    *refuse(ENOSYS, "pidfd_open pidfd_getfd pidfd_send_signal", "signals past the rule on pid 1, steals descriptors"),
    Refuse("epoll_pwait2", ENOSYS, why="newer than what was measured; falls back to epoll_pwait"),
    Refuse("fchmodat2", ENOSYS, why="newer than what was measured; falls back to fchmodat"),
    Refuse("memfd_secret", ENOSYS, why="memory that our own tools cannot see"),
    *refuse(
        ENOSYS,
        "landlock_create_ruleset landlock_add_rule landlock_restrict_self",
        "a job needs no sandbox of its own; kernel surface",
    ),
    *refuse(ENOSYS, "pkey_alloc pkey_free pkey_mprotect", "V8 and libc do without protection keys"),
    Refuse("close_range", ENOSYS, why="subprocess closes one by one instead"),
    *refuse(ENOSYS, "preadv2 pwritev2", "libc falls back to readv and writev"),
    *refuse(
        ENOSYS,
        "timer_create timer_settime timer_gettime timer_getoverrun timer_delete",
        "POSIX timers had kernel bugs again and again; timeout(1) falls back to alarm on ENOSYS alone",
    ),
    *refuse(
        ENOSYS,
        "process_madvise process_mrelease set_mempolicy_home_node cachestat map_shadow_stack quotactl_fd"
        " futex_waitv futex_wake futex_wait futex_requeue",
        "newer than what was measured",
    ),
    # EOPNOTSUPP: the answer of a file system that does not do this
    *refuse(
        EOPNOTSUPP,
        "getxattr lgetxattr fgetxattr flistxattr setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr",
        "file capabilities and kernel memory; ls -l and cp -a go on as on a file system without them",
    ),
    Refuse("fallocate", EOPNOTSUPP, why="libc's posix_fallocate writes zeros instead; hole punching had kernel bugs"),
    # EPERM
    *refuse(EPERM, "socket connect bind listen accept accept4", "no network, not even a local one"),
    *refuse(EPERM, "getpeername setsockopt getsockopt recvmmsg sendmmsg", "options reach deep into network code"),
    *refuse(EPERM, "ptrace process_vm_readv process_vm_writev kcmp", "looks into and changes other processes"),
    *refuse(EPERM, "unshare setns", "new namespaces give capabilities inside"),
    *refuse(
        EPERM,
        "mount umount2 pivot_root chroot open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr",
        "the file tree stays as it was made",
    ),
    *refuse(EPERM, "bpf perf_event_open userfaultfd", "kernel surface with a long record of exploits"),
    *refuse(EPERM, "keyctl add_key request_key", "keyrings are shared between processes of one uid"),
    *refuse(
        EPERM,
        "init_module finit_module delete_module create_module query_module get_kernel_syms",
        "kernel modules",
    ),
    *refuse(EPERM, "kexec_load kexec_file_load reboot swapon swapoff acct quotactl", "administration of the host"),
    *refuse(EPERM, "sethostname setdomainname vhangup syslog nfsservctl", "administration of the host"),
    *refuse(EPERM, "settimeofday clock_settime adjtimex clock_adjtime", "the host's clocks"),
    *refuse(EPERM, "iopl ioperm modify_ldt", "the machine's ports and segments"),
    *refuse(EPERM, "personality uselib", "other ABIs, and address layout without randomness"),
    *refuse(EPERM, "seccomp", "filters of its own could answer calls in place of ours, or listen"),
    *refuse(EPERM, "capset capget", "there are none to have"),
    *refuse(
        EPERM,
        "setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups getresuid getresgid",
        "the user stays who it is",
    ),
    *refuse(EPERM, "chown fchown lchown fchownat", "files keep their owner"),
    *refuse(EPERM, "mknod mknodat", "devices; and a FIFO would hang whoever opens it"),
    *refuse(EPERM, "name_to_handle_at open_by_handle_at", "opens files past all directories: the Shocker attack"),
    *refuse(EPERM, "execveat memfd_create", "programs that are in no file"),
    *refuse(EPERM, "fanotify_init fanotify_mark inotify_init inotify_init1", "watching files; tail -f polls instead"),
    *refuse(EPERM, "inotify_add_watch inotify_rm_watch", "watching files"),
    *refuse(EPERM, "io_setup io_destroy io_getevents io_submit io_cancel io_pgetevents", "asynchronous I/O"),
    *refuse(
        EPERM,
        "shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl",
        "System V IPC; POSIX shared memory works",
    ),
    *refuse(EPERM, "mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr", "message queues"),
    *refuse(EPERM, "tkill rt_tgsigqueueinfo", "tgkill and rt_sigqueueinfo serve"),
    *refuse(EPERM, "rt_sigpending rt_sigtimedwait signalfd signalfd4", "not needed by what was measured"),
    *refuse(EPERM, "timerfd_create timerfd_settime timerfd_gettime getitimer", "not needed by what was measured"),
    *refuse(EPERM, "epoll_create epoll_ctl_old epoll_wait_old eventfd select", "newer forms serve"),
    *refuse(EPERM, "sendfile splice tee vmsplice readahead fadvise64", "copying without read and write; page cache"),
    *refuse(EPERM, "sync syncfs sync_file_range", "makes the host write its disks"),
    *refuse(EPERM, "mlock mlock2 mlockall munlock munlockall mincore", "memory the kernel cannot move; cache timing"),
    *refuse(EPERM, "remap_file_pages migrate_pages move_pages", "moving pages"),
    *refuse(EPERM, "mbind set_mempolicy get_mempolicy", "placement of memory; libnuma does without"),
    *refuse(
        EPERM,
        "sched_setaffinity sched_setscheduler sched_getscheduler sched_setparam sched_getparam sched_setattr"
        " sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval getcpu",
        "the scheduler is the host's",
    ),
    *refuse(EPERM, "setpriority getpriority ioprio_set ioprio_get", "the scheduler is the host's"),
    *refuse(EPERM, "getrlimit setrlimit", "prlimit64 serves"),
    *refuse(EPERM, "getsid get_robust_list lookup_dcookie preadv pwritev", "not needed by what was measured"),
    *refuse(EPERM, "utime utimes futimesat getdents ustat sysfs", "newer forms serve"),
    *refuse(EPERM, "set_thread_area get_thread_area", "32-bit programs only"),
    *refuse(
        EPERM,
        "_sysctl afs_syscall getpmsg putpmsg security tuxcall vserver",
        "numbers without a call behind them today",
    ),
)

# What our init does after it is confined, beyond what a job may do. It starts children that confine themselves further.
INIT_ONLY = (
    Allow("kill", why="ends all that the entrypoint left behind"),
    Allow("tgkill", why="raise, abort"),
    Allow("rt_sigqueueinfo", why="as kill"),
    Allow("pidfd_open", why="a pid can be reused between wait and kill"),
    Allow("pidfd_send_signal", why="a pid can be reused between wait and kill"),
    Allow("rt_sigtimedwait", why="waits for SIGCHLD or a time-out"),
    Allow("signalfd4", why="SIGCHLD in one poll with the rest"),
    Allow("prctl", why="its children set no_new_privs and drop the bounding and ambient sets"),
    Allow("setresuid", why="its children become the job's user"),
    Allow("setresgid", why="its children become the job's group"),
    Allow("setgroups", why="its children leave all groups"),
    Allow("capset", why="its children give up all capabilities"),
    Allow("capget", why="reads back that they are gone"),
    Allow("seccomp", why="its children load the job's filter"),
    Allow("landlock_create_ruleset", why="its children restrict themselves"),
    Allow("landlock_add_rule", why="its children restrict themselves"),
    Allow("landlock_restrict_self", why="its children restrict themselves"),
    Allow("close_range", why="its children keep three descriptors"),
    Allow("memfd_create", why="buffers that are handed over as descriptors"),
    Allow("getsockopt", why="who sits at the other end"),
    Allow("getresuid", why="reads back that the user changed"),
    Allow("getresgid", why="reads back that the group changed"),
)
INIT_NEVER = refuse(EPERM, "execve execveat", "init is never another program")

GROUPS = {"core": CORE, "files": FILES, "process": PROCESS, "events": EVENTS, "node": NODE}


class Policy:
    """A table of rules, and the filter that it compiles to.

    Attributes:
        rows: all rules; those of one call stand together in the order in which they are tried.
        unresolved: allowed calls that this libseccomp does not know: they answer ENOSYS.
    """

    def __init__(self, rows: Iterable[Rule]) -> None:
        self.rows = tuple(rows)
        self._program = b""

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names of calls that are allowed on this machine, at least with some arguments, in the table's order."""
        names = dict.fromkeys(rule.name for rule in self.rows if rule.errno == 0)
        return tuple(name for name in names if resolve(name) is not None)

    @property
    def count(self) -> int:
        """How many calls are allowed on this machine, at least with some arguments."""
        return len(self.allowed)

    @property
    def unresolved(self) -> tuple[str, ...]:
        """Names of allowed calls that the installed libseccomp does not know. Those of other machines do not count."""
        absent = frozenset() if MACHINE == "x86_64" else _ONLY_X86
        names = dict.fromkeys(rule.name for rule in self.rows if rule.errno == 0)
        return tuple(name for name in names if name not in absent and resolve(name) is None)

    def compile(self) -> bytes:
        """The BPF program for `linux.seccomp.load`; always the same for the same table and libseccomp.

        Raises: OSError if libseccomp is not there, or refuses.
        """
        if not self._program:
            program = Filter(ERRNO(ENOSYS))
            for rule in self.rows:
                program.add(ERRNO(rule.errno) if rule.errno else ALLOW, rule.name, *rule.conditions)
            self._program = program.export()
        return self._program

    @property
    def digest(self) -> str:
        """SHA-256 of the BPF program, in hex."""
        return hashlib.sha256(self.compile()).hexdigest()


def job_policy() -> Policy:
    """What a job may do, whatever its interpreter; the unpacker and the collector run under it too."""
    rows = [rule._replace(group=group) for group, rules in GROUPS.items() for rule in rules]
    return Policy((*rows, *(rule._replace(group="refused") for rule in REFUSED)))


def init_policy() -> Policy:
    """What our init may do: what a job may and INIT_ONLY, but no execve.

    Filters add up: what init starts after loading this one cannot execve either. So the job is forked before.
    """
    own = [rule._replace(group="init") for rule in INIT_ONLY]
    never = [rule._replace(group="refused") for rule in INIT_NEVER]
    replaced = {rule.name for rule in (*own, *never)}
    return Policy((*(rule for rule in job_policy().rows if rule.name not in replaced), *own, *never))
