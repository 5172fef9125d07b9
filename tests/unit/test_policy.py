"""The table of system calls, and the program that it compiles to, asked about every call number."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

import pytest

from sandrun.linux import seccomp
from sandrun.linux.libc import MACHINE
from sandrun.sandbox import policy
from sandrun.sandbox.policy import GROUPS, Policy, Rule, init_policy, job_policy
from tests import bpf

REQUIRED_CORE = """
    read write readv writev pread64 pwrite64 openat open close fstat stat lstat newfstatat statx lseek access faccessat2
    readlink getcwd chdir getdents64 mkdir rmdir rename unlink unlinkat fcntl ioctl dup dup2 pipe2 poll mmap munmap
    mprotect mremap madvise brk rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack futex set_tid_address
    set_robust_list rseq arch_prctl prlimit64 getrandom clock_gettime clock_nanosleep nanosleep restart_syscall getpid
    gettid getuid geteuid getgid getegid exit exit_group execve wait4 clone uname sysinfo sched_getaffinity
""".split()
ENOSYS_CALLS = """
    clone3 openat2 io_uring_setup io_uring_enter io_uring_register pidfd_open pidfd_send_signal pidfd_getfd epoll_pwait2
    fchmodat2 memfd_secret landlock_create_ruleset landlock_add_rule landlock_restrict_self pkey_alloc pkey_free
    pkey_mprotect
""".split()
EPERM_CALLS = """
    socket connect bind listen ptrace mount unshare setns bpf perf_event_open keyctl chroot kexec_load reboot
    init_module process_vm_readv userfaultfd open_by_handle_at seccomp setuid personality mknod umount2 pivot_root
""".split()
UNCONDITIONAL = [
    name for name in job_policy().allowed if not any(r.conditions for r in job_policy().rows if r.name == name)
]

on_x86 = pytest.mark.skipif(MACHINE != "x86_64", reason="call numbers of x86-64")


def number(name: str) -> int:
    found = seccomp.resolve(name)
    assert found is not None, name
    return found


def answer(name: str | int, *arguments: int, rules: Policy | None = None) -> int:
    """0 if the job's filter allows the call, else its errno."""
    program = (rules or job_policy()).compile()
    action, _ = bpf.decide(program, number(name) if isinstance(name, str) else name, arguments)
    if action == bpf.ALLOW:
        return 0
    assert action & 0xFFFF0000 == bpf.ERRNO, hex(action)
    return action & 0xFFFF


def by_name(rules: Policy) -> dict[str, list[Rule]]:
    found: dict[str, list[Rule]] = {}
    for rule in rules.rows:
        found.setdefault(rule.name, []).append(rule)
    return found


# --- the table


def test_core_is_the_list_that_was_promised():
    assert list(dict.fromkeys(rule.name for rule in GROUPS["core"])) == REQUIRED_CORE


@pytest.mark.parametrize("rules", [job_policy(), init_policy()], ids=["job", "init"])
def test_every_row_gives_a_reason_and_a_group(rules):
    assert [rule for rule in rules.rows if len(rule.why) < 4 or not rule.group] == []


@pytest.mark.parametrize("rules", [job_policy(), init_policy()], ids=["job", "init"])
def test_rows_of_a_call_stand_together_and_the_last_one_always_decides(rules):
    names = [rule.name for rule in rules.rows]
    runs = [name for name, before in zip(names, [None, *names], strict=False) if name != before]
    assert len(runs) == len(set(runs))
    for name, rows in by_name(rules).items():
        assert [bool(rule.conditions) for rule in rows] == [True] * (len(rows) - 1) + [False], name


@pytest.mark.requirement(5)
def test_every_call_that_libseccomp_knows_has_a_row():
    library = ctypes.CDLL("libseccomp.so.2")
    name_of = library["seccomp_syscall_resolve_num_arch"]
    name_of.restype, name_of.argtypes = ctypes.c_void_p, [ctypes.c_uint32, ctypes.c_int]
    known = {
        ctypes.cast(found, ctypes.c_char_p).value
        for arch in (bpf.X86_64, bpf.AARCH64)
        for number in range(457)  # Linux 6.6; what is newer answers ENOSYS by default
        if (found := name_of(arch, number))
    }
    assert len(known) > 300
    assert {name.decode() for name in known if name} - by_name(job_policy()).keys() == set()


def test_count_is_that_of_allowed_names():
    rules = job_policy()
    assert rules.count == len(rules.allowed) == len(set(rules.allowed))
    assert rules.count == sum(1 for rows in by_name(rules).values() if any(not rule.errno for rule in rows))
    assert rules.unresolved == ()


def test_call_unknown_to_an_old_libseccomp_is_reported_and_left_out(monkeypatch):
    resolve, job_count = seccomp.resolve, job_policy().count

    def old(name: str) -> int | None:
        return None if name in ("faccessat2", "clone3") else resolve(name)

    monkeypatch.setattr(seccomp, "resolve", old)
    monkeypatch.setattr(policy, "resolve", old)
    rules = job_policy()
    assert rules.unresolved == ("faccessat2",)
    assert "faccessat2" not in rules.allowed
    assert rules.count == job_count - 1
    rules.compile()
    monkeypatch.undo()
    assert answer("faccessat2", rules=rules) == errno.ENOSYS


# --- the program


@on_x86
def test_program_decides_every_number_as_the_table_says():
    rules = job_policy()
    program = rules.compile()
    certain = {number(name): rows[-1] for name, rows in by_name(rules).items() if len(rows) == 1}
    open_ = {number(name) for name, rows in by_name(rules).items() if len(rows) > 1}
    for call in [*range(1024), 0x3FFFFFFF]:
        if call in open_:
            continue
        rule = certain.get(call)
        expected = bpf.ERRNO | errno.ENOSYS if rule is None else bpf.ERRNO | rule.errno if rule.errno else bpf.ALLOW
        assert bpf.decide(program, call)[0] == expected, (call, rule)


@on_x86
@pytest.mark.requirement(5)
@pytest.mark.parametrize("rules", [job_policy(), init_policy()], ids=["job", "init"])
def test_other_architectures_and_x32_are_killed(rules):
    program = rules.compile()
    for call in range(600):
        for arch in (bpf.I386, bpf.AARCH64, 0):
            assert bpf.decide(program, call, arch=arch)[0] == bpf.KILL_PROCESS
        assert bpf.decide(program, 0x40000000 | call)[0] == bpf.KILL_PROCESS
    for call in (0x7FFFFFFF, 0x80000000, 0xFFFFFFFE):
        assert bpf.decide(program, call)[0] == bpf.KILL_PROCESS


@on_x86
@pytest.mark.requirement(5)
def test_refusals_have_the_promised_errno():
    assert {name: answer(name) for name in ENOSYS_CALLS} == dict.fromkeys(ENOSYS_CALLS, errno.ENOSYS)
    assert {name: answer(name) for name in EPERM_CALLS} == dict.fromkeys(EPERM_CALLS, errno.EPERM)


@on_x86
@pytest.mark.requirement(8, 38)
@pytest.mark.parametrize("name", ["getpid", "gettid", "getppid", "restart_syscall", "rt_sigreturn", "exit_group"])
def test_calls_whose_refusal_would_do_harm_are_allowed(name):
    assert answer(name) == 0
    assert answer(name, rules=init_policy()) == 0


HIGH = 0xABCD << 32  # what a program puts above the 32 bits that the kernel reads


@on_x86
@pytest.mark.requirement(6)
@pytest.mark.parametrize("high", [0, HIGH, 1 << 63])
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ioctl", (0, 0x5412), errno.EPERM),  # TIOCSTI
        ("ioctl", (0, 0x541C), errno.EPERM),  # TIOCLINUX
        ("ioctl", (0, 0x5423), errno.EPERM),  # TIOCSETD
        ("ioctl", (0, 0x40086602), errno.EPERM),  # FS_IOC_SETFLAGS
        ("ioctl", (0, 0x5401), 0),  # TCGETS
        ("ioctl", (0, 0x5760), errno.ENOTTY),  # IOC_WATCH_QUEUE_SET_SIZE
        ("ioctl", (0, 0x8910), errno.ENOTTY),  # SIOCGIFNAME
        ("clone", (0x01200011,), 0),  # fork
        ("clone", (0x003D0F00,), 0),  # pthread_create
        ("clone", (0x4111,), 0),  # vfork
        *(("clone", (1 << bit | 17,), errno.EPERM) for bit in (15, 17, 25, 26, 27, 28, 29, 30)),
        ("socketpair", (1, 1), 0),
        ("socketpair", (2, 1), errno.EPERM),
        ("socketpair", (30, 1), errno.EPERM),  # TIPC
        ("socketpair", (40, 1), errno.EPERM),  # AF_VSOCK
        ("prctl", (15,), 0),
        ("prctl", (38, 1), 0),
        *(("prctl", (option,), errno.EPERM) for option in (4, 8, 22, 24, 28, 36, 47, 52, 53, 59, 0x59616D61)),
        ("prlimit64", (0, 7), 0),
        ("prlimit64", (1, 7), errno.EPERM),
        ("prlimit64", (1000, 7), errno.EPERM),
        *((name, (1, 9), errno.EPERM) for name in ("kill", "tgkill", "rt_sigqueueinfo")),
        *((name, (2, 9), 0) for name in ("kill", "tgkill", "rt_sigqueueinfo")),
        ("kill", (0xFFFFFFFF, 9), 0),  # -1: everything in the PID namespace but init
        ("kill", (0, 9), 0),
    ],
)
def test_argument_rules_look_at_the_low_32_bits_and_only_at_them(name, arguments, expected, high):
    assert answer(name, *(value | high for value in arguments)) == expected


@on_x86
def test_calls_without_argument_rules_are_decided_by_number_alone():
    """The kernel then answers from a bitmap and does not run the program, seccomp_cache_prepare since Linux 5.11."""
    program = job_policy().compile()
    assert len(UNCONDITIONAL) > 100
    for name in UNCONDITIONAL:
        assert bpf.decide(program, number(name)) == (bpf.ALLOW, {bpf.NUMBER, bpf.ARCH}), name


def test_program_is_short_and_a_tree():
    program = job_policy().compile()
    assert len(program) % 8 == 0
    assert len(program) // 8 < 700


def test_digest_is_the_same_every_time_and_everywhere():
    assert job_policy().digest == job_policy().digest
    assert job_policy().digest != init_policy().digest
    program = "from sandrun.sandbox.policy import *; print(job_policy().digest, init_policy().digest)"
    for seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "src"}
        told = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert told.stdout.split() == [job_policy().digest, init_policy().digest]


# --- init's own


@pytest.mark.requirement(7)
def test_init_may_do_what_a_job_may_but_not_become_another_program():
    job, init = set(job_policy().allowed), set(init_policy().allowed)
    assert job - init == {"execve"}
    if MACHINE == "x86_64":
        assert answer("execve", rules=init_policy()) == errno.EPERM
        assert answer("execveat", rules=init_policy()) == errno.EPERM
        assert answer("kill", 1, 0, rules=init_policy()) == 0


@pytest.mark.parametrize(
    "name", ["mount", "unshare", "setns", "ptrace", "socket", "bpf", "clone3", "pivot_root", "chroot"]
)
def test_init_has_no_other_powers(name):
    assert name not in init_policy().allowed


# --- aarch64, for which no machine is at hand


@pytest.fixture
def aarch64(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Have `linux.seccomp` resolve and compile for aarch64, as it would there."""
    library = ctypes.CDLL("libseccomp.so.2")
    real = seccomp._library()
    name_of = library["seccomp_syscall_resolve_num_arch"]
    name_of.restype, name_of.argtypes = ctypes.c_void_p, [ctypes.c_uint32, ctypes.c_int]
    number_of = library["seccomp_syscall_resolve_name_arch"]
    number_of.argtypes = [ctypes.c_uint32, ctypes.c_char_p]

    class There:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def init(self, default: int) -> int | None:
            context: int | None = real.init(default)
            for function, arch in (("seccomp_arch_add", bpf.AARCH64), ("seccomp_arch_remove", bpf.X86_64)):
                change = library[function]
                change.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
                assert change(context, arch) == 0
            return context

        def resolve_name(self, name: bytes) -> int:
            return int(number_of(bpf.AARCH64, name))

        def rule_add(self, context: int, action: int, number: int, *rest: object) -> int:
            """libseccomp takes the numbers of the machine that it runs on."""
            name = ctypes.cast(name_of(bpf.AARCH64, number), ctypes.c_char_p).value
            return int(real.rule_add(context, action, real.resolve_name(name), *rest))

    monkeypatch.setattr(seccomp, "_opened", [There()])
    monkeypatch.setattr(seccomp, "_AUDIT_ARCH", bpf.AARCH64)
    monkeypatch.setattr(policy, "MACHINE", "aarch64")
    return library


@on_x86
@pytest.mark.requirement(5, 6)
def test_on_aarch64_every_number_is_decided_as_the_table_says(aarch64):
    rules = job_policy()
    program = rules.compile()
    assert rules.unresolved == ()
    assert rules.count == len({rule.name for rule in rules.rows if not rule.errno} - policy._ONLY_X86)
    name_of = aarch64["seccomp_syscall_resolve_num_arch"]
    name_of.restype, name_of.argtypes = ctypes.c_void_p, [ctypes.c_uint32, ctypes.c_int]
    rows = by_name(rules)
    decided: set[str] = set()
    for call in range(1024):
        found = name_of(bpf.AARCH64, call)
        name = ctypes.cast(found, ctypes.c_char_p).value if found else None
        known = rows.get(name.decode(), []) if name else []
        if len(known) > 1:
            continue
        expected = (
            bpf.ALLOW if known and not known[0].errno else bpf.ERRNO | (known[0].errno if known else errno.ENOSYS)
        )
        assert bpf.decide(program, call, arch=bpf.AARCH64)[0] == expected, (call, name)
        decided.update(rule.name for rule in known)
        assert bpf.decide(program, call, arch=bpf.X86_64)[0] == bpf.KILL_PROCESS
    assert len(decided) > 280
    for conditional, arguments, code in (
        ("kill", (1, 9), errno.EPERM),
        ("clone", (1 << 28,), errno.EPERM),
        ("kill", (2,), 0),
    ):
        high = tuple(value | HIGH for value in arguments)
        action, _ = bpf.decide(program, number(conditional), high, bpf.AARCH64)
        assert action == (bpf.ERRNO | code if code else bpf.ALLOW)
