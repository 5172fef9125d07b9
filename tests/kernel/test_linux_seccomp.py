"""Filters: what the compiled program answers, by interpreting it, and what the kernel makes of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.linux import capabilities, process, seccomp
from sandrun.linux.libc import MACHINE
from sandrun.linux.seccomp import ALLOW, ERRNO, KILL_PROCESS, Arg, Filter, arg
from tests.kernel.children import Died, errno_of, in_child

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[MACHINE]
ARCH_I386 = 0x40000003
X32 = 0x40000000
_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]


def call(number: int, *arguments: int) -> int:
    """The errno that a system call answers, 0 for success."""
    result = _syscall(ctypes.c_long(number), *[ctypes.c_ulong(argument) for argument in arguments])
    return ctypes.get_errno() if result == -1 else 0


def number(name: str) -> int:
    found = seccomp.resolve(name)
    assert found is not None
    return found


def answer(program: bytes, nr: int, arguments: tuple[int, ...] = (), arch: int = ARCH) -> int:
    """What the kernel would return for this call: an interpreter of the classic BPF that our filters are made of."""
    data = struct.pack("=IIQ6Q", nr, arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    a = at = 0
    while True:
        operation, jt, jf, k = code[at]
        at += 1
        if operation == 0x20:
            [a] = struct.unpack_from("=I", data, k)
        elif operation == 0x54:
            a &= k
        elif operation == 0x05:
            at += k
        elif operation == 0x15:
            at += jt if a == k else jf
        elif operation == 0x25:
            at += jt if a > k else jf
        elif operation == 0x35:
            at += jt if a >= k else jf
        elif operation == 0x06:
            return int(k)
        else:
            raise AssertionError(f"unexpected instruction {operation:#x}")


def under(program: bytes, probe):
    """Run `probe` in a child under `program`."""

    def loaded():
        process.set_no_new_privs()
        seccomp.load(program)
        return probe()

    return in_child(loaded)


# --- the rules


def test_first_rule_that_holds_decides():
    rules = Filter(ERRNO(errno.ENOSYS))
    rules.add(ERRNO(1), "kill", arg(0).equals(1))
    rules.add(ERRNO(2), "kill", arg(0).equals(1), arg(1).equals(9))
    rules.add(ERRNO(3), "kill", arg(0).differs(2), arg(1).with_any(0b110))
    rules.add(ALLOW, "kill")
    program = rules.export()
    kill = number("kill")
    assert answer(program, kill, (1, 9)) == ERRNO(1)
    assert answer(program, kill, (3, 2)) == ERRNO(3)
    assert answer(program, kill, (2, 2)) == ALLOW
    assert answer(program, kill, (3, 1)) == ALLOW
    assert answer(program, number("read"), (1,)) == ERRNO(errno.ENOSYS)


def test_call_none_of_whose_conditions_hold_gets_the_default():
    rules = Filter(ERRNO(errno.ENOSYS))
    rules.add(ALLOW, "prctl", arg(0).equals(15))
    rules.add(ALLOW, "prctl", arg(0).equals(16))
    program = rules.export()
    assert [answer(program, number("prctl"), (option,)) for option in (15, 16, 17)] == [
        ALLOW,
        ALLOW,
        ERRNO(errno.ENOSYS),
    ]


@pytest.mark.requirement(6)
@pytest.mark.parametrize("upper", [0, 1 << 32, 0xFFFFFFFF << 32])
def test_only_the_low_32_bits_of_an_argument_count(upper):
    rules = Filter(ALLOW)
    rules.add(ERRNO(1), "kill", arg(0).equals(1))
    rules.add(ERRNO(2), "ioctl", arg(1).differs(0x5413))
    rules.add(ERRNO(3), "clone", arg(0).with_any(process.CLONE_NEWUSER))
    rules.add(ERRNO(4), "socketpair", arg(0).masked(0xFF, 0x101))
    program = rules.export()
    assert answer(program, number("kill"), (upper | 1,)) == ERRNO(1)
    assert answer(program, number("kill"), (upper | 2,)) == ALLOW
    assert answer(program, number("ioctl"), (0, upper | 0x5413)) == ALLOW
    assert answer(program, number("ioctl"), (0, upper | 0x5412)) == ERRNO(2)
    assert answer(program, number("clone"), (upper | process.CLONE_NEWUSER | 17,)) == ERRNO(3)
    assert answer(program, number("clone"), (upper | 17,)) == ALLOW
    assert answer(program, number("socketpair"), (upper | 0xA01,)) == ERRNO(4)


def test_negative_values_compare_as_the_kernel_sees_them():
    rules = Filter(ALLOW)
    rules.add(ERRNO(1), "kill", arg(0).equals(-1))
    program = rules.export()
    assert answer(program, number("kill"), (0xFFFFFFFF,)) == ERRNO(1)
    assert answer(program, number("kill"), (2**64 - 1,)) == ERRNO(1)


comparisons = st.builds(
    lambda position, mask, value, equal: seccomp.Comparison(position, mask, value & mask, equal),
    st.integers(0, 5),
    st.sampled_from([0xFFFFFFFF, 1, 0x80000000, 0xF0]),
    st.sampled_from([0, 1, 0x10, 0x80000000, 0xFFFFFFFF]),
    st.booleans(),
)
words = st.sampled_from([0, 1, 0x10, 0x11, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 32 | 1])


@pytest.mark.requirement(6)
@settings(max_examples=150, deadline=None, database=None)
@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(["kill", "ioctl", "clone", "prctl"]), st.integers(1, 9), st.lists(comparisons, min_size=1)
        ),
        max_size=12,
    ),
    plain=st.sets(st.sampled_from(["kill", "ioctl", "read", "write", "openat"])),
    called=st.sampled_from(["kill", "ioctl", "clone", "prctl", "read", "write", "openat", "close"]),
    arguments=st.tuples(words, words, words, words, words, words),
)
def test_program_says_what_the_rules_say(rules, plain, called, arguments):
    default = ERRNO(errno.ENOSYS)
    compiled = Filter(default)
    expected = ALLOW if called in plain else default
    for name, code, conditions in reversed(rules):
        if name == called and all(
            (arguments[position] & 0xFFFFFFFF & mask == value) is equal for position, mask, value, equal in conditions
        ):
            expected = ERRNO(code)
    for name, code, conditions in rules:
        compiled.add(ERRNO(code), name, *conditions)
    for name in plain:
        compiled.add(ALLOW, name)
    assert answer(compiled.export(), number(called), arguments) == expected


def test_one_call_may_have_more_rules_than_a_short_jump_can_skip():
    rules = Filter(ERRNO(errno.ENOSYS))
    for option in range(200):
        rules.add(ERRNO(1 + option), "prctl", arg(0).equals(option), arg(1).masked(0xF, 3))
    rules.add(ALLOW, "read")
    program = rules.export()
    assert len(program) // 8 > 800
    assert answer(program, number("prctl"), (199, 3)) == ERRNO(200)
    assert answer(program, number("read")) == ALLOW


def test_rule_behind_an_unconditional_one_is_refused():
    rules = Filter(ERRNO(errno.ENOSYS))
    rules.add(ALLOW, "kill")
    with pytest.raises(ValueError, match="kill: an earlier rule"):
        rules.add(ERRNO(1), "kill", arg(0).equals(1))


def test_call_that_does_not_exist_here_is_told_and_left_out():
    rules = Filter(ERRNO(errno.ENOSYS))
    assert rules.add(ALLOW, "no_such_call") is False
    assert seccomp.resolve("no_such_call") is None
    assert rules.add(ALLOW, 5000) is True  # by number, where libseccomp is older than the kernel
    assert answer(rules.export(), 5000) == ALLOW


def test_program_too_long_for_the_kernel_is_refused():
    rules = Filter(ALLOW)
    for option in range(1500):
        rules.add(ERRNO(1), "prctl", arg(0).equals(option))
    with pytest.raises(OverflowError, match="at most 4096"):
        rules.export()


@pytest.mark.requirement(5)
@pytest.mark.parametrize("action", [ALLOW, ERRNO(errno.EPERM)])
@pytest.mark.skipif(MACHINE != "x86_64", reason="i386 and x32 are x86-64's foreign ABIs")
def test_every_call_of_a_foreign_abi_is_killed(action):
    rules = Filter(action)
    rules.add(ALLOW, "getpid")
    rules.add(ALLOW, "kill", arg(0).differs(1))
    program = rules.export()
    assert {answer(program, nr, (2,), ARCH_I386) for nr in range(600)} == {KILL_PROCESS}
    assert {answer(program, X32 | nr, (2,)) for nr in range(600)} == {KILL_PROCESS}


# --- in the kernel


@pytest.mark.requirement(3)
def test_loaded_filter_is_in_force_and_told():
    rules = Filter(ALLOW)
    rules.add(ERRNO(errno.EDOM), "mkdir")
    rules.add(ERRNO(errno.EDOM), "mkdirat")
    program = rules.export()
    assert seccomp.mode() == seccomp.MODE_DISABLED
    assert errno_of(os.mkdir, "/") == errno.EEXIST
    assert under(program, lambda: (errno_of(os.mkdir, "/"), seccomp.mode())) == (errno.EDOM, seccomp.MODE_FILTER)


@pytest.mark.requirement(4)
def test_filter_holds_in_children_and_after_execve():
    rules = Filter(ALLOW)
    rules.add(ERRNO(errno.EDOM), "mkdir")
    rules.add(ERRNO(errno.EDOM), "mkdirat")

    def probe():
        return subprocess.run(["mkdir", "/tmp/never"], capture_output=True, text=True, env={"LC_ALL": "C"}).stderr

    assert os.strerror(errno.EDOM) in under(rules.export(), probe)


@pytest.mark.requirement(6)
def test_kernel_ignores_upper_bits_and_so_does_the_filter():
    """dup3 of descriptors that are not open stands for any call with int arguments."""
    dup3 = number("dup3")
    rules = Filter(ALLOW)
    rules.add(ERRNO(errno.EDOM), "dup3", arg(0).equals(9001))
    program = rules.export()
    probe = lambda: [call(dup3, first, 9002, 0) for first in (9001, 1 << 32 | 9001, 9003)]  # noqa: E731
    assert probe() == [errno.EBADF] * 3
    assert under(program, probe) == [errno.EDOM, errno.EDOM, errno.EBADF]


@pytest.mark.requirement(5)
@pytest.mark.skipif(MACHINE != "x86_64", reason="x32 is x86-64's")
def test_x32_call_kills():
    getpid = number("getpid")
    rules = Filter(ALLOW)
    assert in_child(lambda: call(X32 | getpid)) in (0, errno.ENOSYS)  # by the kernel's configuration
    with pytest.raises(Died) as caught:
        under(rules.export(), lambda: call(X32 | getpid))
    assert caught.value.signal == signal.SIGSYS


def i386_getpid() -> int:
    """getpid by `int 0x80`, the call of a 32-bit program, out of this 64-bit one."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())


@pytest.mark.requirement(5)
@pytest.mark.skipif(MACHINE != "x86_64", reason="i386 is x86-64's")
def test_i386_call_kills():
    try:
        answered = in_child(i386_getpid)
    except Died:
        answered = None
    if answered != 1:  # user-mode Linux takes it for a 64-bit call, a kernel without 32-bit calls for a fault
        pytest.skip("this kernel answers no 32-bit calls, so there is nothing to refuse")
    with pytest.raises(Died) as caught:
        under(Filter(ALLOW).export(), i386_getpid)
    assert caught.value.signal == signal.SIGSYS


def test_filter_without_no_new_privs_needs_privilege():
    program = Filter(ALLOW).export()

    def probe():
        capabilities.clear()
        return errno_of(seccomp.load, program)

    assert in_child(probe) == errno.EACCES


@pytest.mark.requirement(17)
@pytest.mark.parametrize("program", [b"", b"\0" * 8, b"x" * 800])
def test_what_is_not_a_program_is_refused(program):
    with pytest.raises(OSError, match="seccomp: Invalid argument"):
        under(program, lambda: None)


def test_arguments_are_named_by_position():
    assert Arg(3).equals(7) == arg(3).equals(7) == seccomp.Comparison(3, 0xFFFFFFFF, 7, True)
    assert seccomp.library_version().startswith("2.")
