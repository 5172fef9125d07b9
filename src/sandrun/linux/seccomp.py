"""seccomp filters: compiled once with libseccomp, loaded as bytes without it.

libseccomp knows the calls' numbers on each architecture, refuses foreign ones and builds a binary tree. What it can't
say is "these values EPERM, all others allowed": its "not equal" looks at 64 bits, and the kernel at the low 32 of an
int. So calls with argument rules are decided by a few instructions of our own in front of libseccomp's program.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from sandrun.linux.calls import Calls
from sandrun.linux.libc import MACHINE, SYS, syscall

KILL_PROCESS = 0x80000000  # <linux/seccomp.h>
KILL_THREAD = 0x00000000
TRAP = 0x00030000
USER_NOTIF = 0x7FC00000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000

LIBRARY_FIX = "apt-get install libseccomp2"
KERNEL_FIX = "use a kernel with CONFIG_SECCOMP_FILTER=y"

MODE_DISABLED, MODE_STRICT, MODE_FILTER = 0, 1, 2

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[MACHINE]  # <linux/audit.h>
_LOW_32 = 0xFFFFFFFF
_SET_MODE_FILTER = 1
_GET_ACTION_AVAILABLE = 2
_ATTR_ACT_BADARCH, _ATTR_CTL_NNP, _ATTR_CTL_OPTIMIZE = 2, 3, 8  # <seccomp.h>, enum scmp_filter_attr
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k
_LOAD, _AND, _JUMP_EQUAL, _JUMP, _RETURN = 0x20, 0x54, 0x15, 0x05, 0x06
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARGUMENTS = 0, 4, 16  # struct seccomp_data, little-endian
_MOST_INSTRUCTIONS = 4096  # BPF_MAXINSNS


def ERRNO(code: int) -> int:  # noqa: N802  the kernel's and libseccomp's own name
    """The action "refuse the call with this errno"."""
    return 0x00050000 | (code & 0xFFFF)


class Comparison(NamedTuple):
    """One condition on the low 32 bits of an argument: `argument & mask == value`, or the contrary of it."""

    argument: int
    mask: int
    value: int
    equal: bool


class Arg(NamedTuple):
    """Argument `position` (from 0) of a call; its methods make the conditions of a rule, all on the low 32 bits."""

    position: int

    def equals(self, value: int) -> Comparison:
        """The argument is `value`."""
        return Comparison(self.position, _LOW_32, value & _LOW_32, True)

    def differs(self, value: int) -> Comparison:
        """The argument is anything but `value`."""
        return Comparison(self.position, _LOW_32, value & _LOW_32, False)

    def masked(self, mask: int, value: int) -> Comparison:
        """The argument's bits under `mask` are `value`."""
        return Comparison(self.position, mask & _LOW_32, value & mask & _LOW_32, True)

    def without(self, bits: int) -> Comparison:
        """The argument has none of `bits`."""
        return Comparison(self.position, bits & _LOW_32, 0, True)

    def with_any(self, bits: int) -> Comparison:
        """The argument has at least one of `bits`."""
        return Comparison(self.position, bits & _LOW_32, 0, False)


arg = Arg


class _Library:
    """libseccomp.so.2 by its soname (finding it by name would run ldconfig or gcc), opened on first use: after that an
    exported program needs it no more."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)

        def function(name: str, result: Any, *arguments: Any) -> Any:
            bound = library[name]
            bound.restype, bound.argtypes = result, arguments
            return bound

        context, unsigned = ctypes.c_void_p, ctypes.c_uint32
        self.init = function("seccomp_init", context, unsigned)
        self.release = function("seccomp_release", None, context)
        self.attr_set = function("seccomp_attr_set", ctypes.c_int, context, ctypes.c_int, unsigned)
        self.rule_add = function(
            "seccomp_rule_add_array", ctypes.c_int, context, unsigned, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
        )
        self.export_bpf = function("seccomp_export_bpf", ctypes.c_int, context, ctypes.c_int)
        self.resolve_name = function("seccomp_syscall_resolve_name", ctypes.c_int, ctypes.c_char_p)
        version = function("seccomp_version", ctypes.POINTER(ctypes.c_uint * 3))
        self.version: tuple[int, ...] = tuple(version().contents)


_opened: list[_Library] = []


def _library() -> _Library:
    if not _opened:
        _opened.append(_Library())
    return _opened[0]


def library_version() -> str:
    """libseccomp's version. Raises: OSError if it is not installed."""
    return ".".join(map(str, _library().version))


def resolve(name: str) -> int | None:
    """The number of the call `name` here; None if this architecture has none, or libseccomp is older than the call."""
    number: int = _library().resolve_name(name.encode())
    return number if number >= 0 else None  # -1: unknown; below: a name that other architectures have


def _checked(what: str, result: int) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


class Filter:
    """Collects rules and compiles them. Calls of another architecture (i386, x32) are killed whatever the rules."""

    def __init__(self, default: int) -> None:
        """`default` is the action for calls without a rule, and for those none of whose conditions hold."""
        self.default = default
        self._plain: dict[int, int] = {}  # number -> action
        self._decided: dict[int, list[tuple[int, tuple[Comparison, ...]]]] = {}  # number -> rules in order

    def add(self, action: int, name: str | int, *comparisons: Comparison) -> bool:
        """Add a rule for the call `name` (or number): `action`, if all `comparisons` hold.

        The rules of one call are tried in the order in which they were added and the first that holds decides; one
        without comparisons always holds, and nothing may follow it.
        Returns: False, and nothing is added, if this architecture or libseccomp does not have the call.
        Raises: ValueError for a rule that can never be reached.
        """
        number = resolve(name) if isinstance(name, str) else name
        if number is None:
            return False
        if number in self._plain:
            raise ValueError(f"seccomp rule for {name}: an earlier rule without conditions hides it")
        if comparisons:
            self._decided.setdefault(number, []).append((action, comparisons))
        else:
            self._plain[number] = action
        return True

    def export(self) -> bytes:
        """Compile to the BPF program (an array of struct sock_filter) that `load` takes.

        Raises: OSError with libseccomp's errno; OverflowError if the program is longer than the kernel takes.
        """
        program = b"".join(_INSTRUCTION.pack(*instruction) for instruction in self._prologue()) + self._tree()
        if len(program) > _MOST_INSTRUCTIONS * _INSTRUCTION.size:
            raise OverflowError(f"seccomp filter: {len(program) // _INSTRUCTION.size} instructions, at most 4096")
        return program

    def _tree(self) -> bytes:
        """libseccomp's part: architecture, x32, and all calls without conditions, as a binary tree."""
        library = _library()
        context = library.init(self.default)
        if not context:
            raise OSError(errno.ENOMEM, "seccomp_init: failed")
        try:
            _checked("seccomp_attr_set: BADARCH", library.attr_set(context, _ATTR_ACT_BADARCH, KILL_PROCESS))
            _checked("seccomp_attr_set: NNP", library.attr_set(context, _ATTR_CTL_NNP, 0))
            if library.version >= (2, 5, 0):
                _checked("seccomp_attr_set: OPTIMIZE", library.attr_set(context, _ATTR_CTL_OPTIMIZE, 2))
            for number, action in self._plain.items():
                if action != self.default and number not in self._decided:  # EACCES: the default needs no rule
                    _checked(f"seccomp_rule_add: {number}", library.rule_add(context, action, number, 0, None))
            descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
            try:
                _checked("seccomp_export_bpf", library.export_bpf(context, descriptor))
                return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            finally:
                os.close(descriptor)
        finally:
            library.release(context)

    def _prologue(self) -> list[tuple[int, int, int, int]]:
        """Our part: decides the calls that have conditions, and falls through to libseccomp's for all others.

        It compares whole call numbers, so an x32 number (bit 30 set) is left to libseccomp's check.
        """
        if not self._decided:
            return []
        body: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _OFFSET_NUMBER)]
        for number, rules in self._decided.items():
            block = list(self._decide(rules, self._plain.get(number, self.default)))
            body += [(_JUMP_EQUAL, 1, 0, number), (_JUMP, 0, 0, len(block)), *block]  # jt and jf have but 8 bits
        return [
            (_LOAD, 0, 0, _OFFSET_ARCH),
            (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH),
            (_JUMP, 0, 0, len(body)),
            *body,
        ]

    @staticmethod
    def _decide(rules: list[tuple[int, tuple[Comparison, ...]]], otherwise: int) -> Iterator[tuple[int, int, int, int]]:
        """The instructions for one call; all paths end in a return."""
        for action, comparisons in rules:
            code: list[tuple[int, int, int, int]] = []
            for argument, mask, value, equal in reversed(comparisons):  # from the end: distances are known
                past = len(code) + 1  # to the next rule, over the return
                test = (_JUMP_EQUAL, 0, past, value) if equal else (_JUMP_EQUAL, past, 0, value)
                bits = [] if mask == _LOW_32 else [(_AND, 0, 0, mask)]
                code[:0] = [(_LOAD, 0, 0, _OFFSET_ARGUMENTS + 8 * argument), *bits, test]
            yield from code
            yield (_RETURN, 0, 0, action)
        yield (_RETURN, 0, 0, otherwise)


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def probe() -> None:
    """Raises: OSError if this kernel has no filters, or would not refuse by errno. seccomp(2), since Linux 4.14."""
    action = ctypes.c_uint32(ERRNO(0))
    syscall(SYS["seccomp"], _GET_ACTION_AVAILABLE, 0, ctypes.byref(action))


def load(program: bytes) -> None:
    """Put the calling thread, and all that it starts, under a compiled filter, for good. seccomp(2).

    Raises: OSError EACCES without no_new_privs (or CAP_SYS_ADMIN), EINVAL for what is not a program.
    """
    syscall(SYS["seccomp"], _SET_MODE_FILTER, 0, ctypes.byref(_fprog(program)))


def add_load(calls: Calls, program: bytes) -> None:
    """`load` as a line of a table."""
    calls.call("seccomp", _SET_MODE_FILTER, 0, _fprog(program))
    calls.filter = program


def _fprog(program: bytes) -> _SockFprog:
    return _SockFprog(len(program) // _INSTRUCTION.size, program)


def mode(pid: int | str = "self") -> int:
    """0 no filter, 1 strict, 2 filter, as the kernel tells in /proc/PID/status."""
    with open(os.path.join("/proc", str(pid), "status"), "rb") as file:
        for line in file:
            if line.startswith(b"Seccomp:"):
                return int(line.partition(b":")[2])
    raise OSError(errno.ENOSYS, "/proc/self/status: no line Seccomp: (kernel without CONFIG_SECCOMP)")
