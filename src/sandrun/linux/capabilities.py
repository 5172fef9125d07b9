"""Capability sets: what they hold, and giving them up. See capabilities(7)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

from sandrun.linux.libc import SYS, bind, syscall
from sandrun.linux.process import PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_CAPBSET_DROP, PR_CAPBSET_READ

NAMES = (       # <linux/capability.h>, in the order of their numbers
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(NAMES)}
CAP_KILL = NUMBERS["CAP_KILL"]
CAP_SETGID = NUMBERS["CAP_SETGID"]
CAP_SETUID = NUMBERS["CAP_SETUID"]
CAP_SETPCAP = NUMBERS["CAP_SETPCAP"]
CAP_SYS_ADMIN = NUMBERS["CAP_SYS_ADMIN"]

_prctl = bind("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)
_prctl_unchecked = ctypes.PyDLL(None)["prctl"]  # faster than `_prctl`, and a sandbox makes 41 calls
_prctl_unchecked.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

_VERSION_3 = 0x20080522  # 64 capabilities, in two halves
_header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)  # version, pid: this thread
# effective, permitted, inheritable: the low half of each, then the high half of each
_data = (ctypes.c_uint32 * 6)()
_nothing = (ctypes.c_uint32 * 6)()


def _find_last() -> int:
    number = -1
    try:
        while True:
            _prctl(PR_CAPBSET_READ, number + 1, 0, 0, 0)  # EINVAL: the kernel has never heard of it
            number += 1
    except OSError:
        return number


_LAST = _find_last()


def last_cap() -> int:
    """The highest capability that this kernel has, also where there is no /proc to tell it."""
    return _LAST


def drop_bounding() -> None:
    """Empty the bounding set: no program run from here on can gain a capability by execve(2).

    Raises: OSError EPERM without CAP_SETPCAP, so this comes before `clear`.
    """
    for number in range(_LAST + 1):
        if _prctl_unchecked(PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            _prctl(PR_CAPBSET_DROP, number, 0, 0, 0)


def clear() -> None:
    """Empty the effective, permitted, inheritable and ambient sets (the bounding set: `drop_bounding`), and look.

    Raises: OSError EPERM if the kernel reads back anything but nothing.
    """
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    syscall(SYS["capset"], _header, _nothing)
    _verify(0)


def keep(names: Iterable[str]) -> None:
    """Make the effective and the permitted set just `names`; inheritable and ambient become empty.

    Raises: OSError EPERM if one of them is not held now, or if the kernel reads back something else.
    """
    wanted = 0
    for name in names:
        wanted |= 1 << NUMBERS[name]
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    syscall(SYS["capset"], _header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0))
    _verify(wanted)


def _verify(wanted: int) -> None:
    """Read the sets back. The ambient set never exceeds permitted and inheritable, so it is empty here."""
    syscall(SYS["capget"], _header, _data)
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    if list(_data) != [low, low, 0, high, high, 0]:
        kept = [hex(word) for word in _data]
        raise OSError(errno.EPERM, f"capset: the kernel kept {kept} when asked for {wanted:#x}")


def read(pid: int | str = "self") -> dict[str, int]:
    """The five sets of a process as the kernel tells them in /proc/PID/status: bit masks `inh prm eff bnd amb`."""
    with open(os.path.join("/proc", str(pid), "status"), "rb") as file:
        return {
            line[3:6].decode().lower(): int(line.partition(b":")[2], 16) for line in file if line.startswith(b"Cap")
        }
