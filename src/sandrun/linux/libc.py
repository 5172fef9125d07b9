"""Kernel calls without a wrapper in the standard library, and the process's own memory.

`bind` is for functions that libc has, `syscall` for those that only the kernel has (glibc 2.36 knows neither clone3 nor
landlock). Both turn -1 into OSError.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from errno import EFAULT
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

# <asm/unistd.h>. Since 424 (Linux 5.1) a call has one number on all architectures.
_COMMON = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
_BY_MACHINE = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "rt_sigaction": 13, "rt_sigprocmask": 14, "getpid": 39, "chdir": 80,
        "getcwd": 79, "umask": 95, "setsid": 112,
        "setresuid": 117, "getresuid": 118, "setresgid": 119, "getresgid": 120, "capget": 125, "capset": 126,
        "pivot_root": 155, "prctl": 157, "mount": 165, "umount2": 166, "sethostname": 170, "setdomainname": 171,
        "exit_group": 231, "mkdirat": 258, "fchownat": 260, "fchmodat": 268, "openat": 257,
        "unshare": 272, "signalfd4": 289, "eventfd2": 290, "prlimit64": 302,
        "process_vm_readv": 310, "seccomp": 317, "memfd_create": 319,
    },
    "aarch64": {
        "getcwd": 17, "eventfd2": 19, "chdir": 49, "openat": 56, "umask": 166, "prlimit64": 261,
        "mkdirat": 34, "umount2": 39, "mount": 40, "pivot_root": 41, "fchmodat": 53, "fchownat": 54, "close": 57,
        "read": 63, "write": 64, "signalfd4": 74, "capget": 90, "capset": 91, "exit_group": 94, "unshare": 97,
        "rt_sigaction": 134, "rt_sigprocmask": 135, "setresgid": 149, "setresuid": 147, "getresuid": 148,
        "getresgid": 150, "setsid": 157, "sethostname": 161, "setdomainname": 162, "prctl": 167, "getpid": 172,
        "process_vm_readv": 270, "seccomp": 277, "memfd_create": 279,
    },
}  # fmt: skip

MACHINE = os.uname().machine
# A 32-bit interpreter on a 64-bit kernel has other numbers and other structures.
if MACHINE not in _BY_MACHINE or ctypes.sizeof(ctypes.c_void_p) != 8:
    raise ImportError(f"sandrun runs on 64-bit x86_64 and aarch64 Linux; this is {MACHINE}")

SYS: dict[str, int] = _COMMON | _BY_MACHINE[MACHINE]
_NAMES = {number: name for name, number in SYS.items()}


def bind(name: str, *argtypes: Any) -> Callable[..., int]:
    """Bind libc's `name` so that -1 becomes OSError. `_libc[name]` is a private copy; `_libc.name` is shared by all."""

    def check(result: int, function: object, arguments: object) -> int:
        if result == -1:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")
        return result

    function: Any = _libc[name]
    function.argtypes, function.restype, function.errcheck = argtypes, ctypes.c_int, check
    bound: Callable[..., int] = function
    return bound


def find(name: str, *argtypes: Any) -> Callable[..., int] | None:
    """`bind` for what only some libcs have; None if this one has it not."""
    return bind(name, *argtypes) if hasattr(_libc, name) else None


# PyDLL keeps the GIL: nothing else of this interpreter may run between a fork and its clean-up. c_void_p, because it
# takes integers of 64 bits, bytes, None, arrays and byref() alike; ctypes' default for an integer is a 32-bit int.
_syscall = ctypes.PyDLL(None, use_errno=True)["syscall"]
_syscall.argtypes, _syscall.restype = [ctypes.c_long, *[ctypes.c_void_p] * 6], ctypes.c_long


def syscall(
    number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0, *, what: object = None
) -> int:
    """Make system call `number` with the GIL held. Arguments are integers, bytes, None, ctypes arrays or byref().

    Raises: OSError whose text names the call and, if given, `what` it was about.
    """
    result: int = _syscall(number, a, b, c, d, e, f)
    if result == -1:
        raise failure(_NAMES.get(number, f"system call {number}"), what)
    return result


def failure(name: str, what: object = None) -> OSError:
    """The OSError of the call that just failed, out of ctypes' copy of errno."""
    code = ctypes.get_errno()
    return OSError(code, f"{name}: {os.strerror(code)}" if what is None else f"{name}: {what}: {os.strerror(code)}")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def peek(address: int, n: int) -> bytes | None:
    """Read `n` bytes of the own memory; None if any of it cannot be read, where a plain read would crash.

    Raises: OSError ENOSYS on a kernel without CONFIG_CROSS_MEMORY_ATTACH, or a filter's errno. process_vm_readv(2).
    """
    buffer = ctypes.create_string_buffer(n)
    local, remote = _Iovec(ctypes.addressof(buffer), n), _Iovec(address, n)
    try:
        got = syscall(SYS["process_vm_readv"], os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    except OSError as error:
        if error.errno == EFAULT:
            return None
        raise
    return buffer.raw if got == n else None  # it stops at the first page that it cannot read


def poke(address: int, data: bytes) -> None:
    """Write `data` over the own memory at `address`. A wrong address crashes the process: `peek` there first."""
    ctypes.memmove(address, data, len(data))
