"""Capability sets: what they hold, and giving them up. See capabilities(7)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from sandrun.linux.calls import Calls
from sandrun.linux.libc import bind
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

_VERSION_3 = 0x20080522  # 64 capabilities, in two halves
_header = struct.pack("=Ii", _VERSION_3, 0)  # version, pid: this thread
_SETS = struct.Struct("=6I")
"""effective, permitted, inheritable: the low half of each, then the high half of each."""


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


def add_drop_bounding(calls: Calls) -> None:
    """Add to a table: empty the bounding set. EPERM without CAP_SETPCAP, so this comes before `add_keep`."""
    for number in range(_LAST + 1):
        calls.call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)


def add_keep(calls: Calls, names: Iterable[str]) -> None:
    """Add to a table: make the effective and the permitted set just `names`; inheritable and ambient become empty.

    It fails with EPERM if one of them is not held, or if the kernel reads back something else.
    """
    wanted = 0
    for name in names:
        wanted |= 1 << NUMBERS[name]
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    sets = _SETS.pack(low, low, 0, high, high, 0)
    kept = calls.buffer(_SETS.size)
    calls.call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    calls.call("capset", _header, sets)
    calls.call("capget", _header, kept)  # the ambient set never exceeds permitted and inheritable, so it is empty
    calls.equal(kept, sets, error=errno.EPERM, about=f"capset: the kernel kept others than {wanted:#x}")


def drop_bounding() -> None:
    """Empty the bounding set: no program run from here on can gain a capability by execve(2).

    Raises: OSError EPERM without CAP_SETPCAP, so this comes before `clear`.
    """
    _dropping.run()


def clear() -> None:
    """Empty the effective, permitted, inheritable and ambient sets (the bounding set: `drop_bounding`), and look.

    Raises: OSError EPERM if the kernel reads back anything but nothing.
    """
    _clearing.run()


_dropping, _clearing = Calls(), Calls()
add_drop_bounding(_dropping)
add_keep(_clearing, ())


def read(pid: int | str = "self") -> dict[str, int]:
    """The five sets of a process as the kernel tells them in /proc/PID/status: bit masks `inh prm eff bnd amb`."""
    with open(os.path.join("/proc", str(pid), "status"), "rb") as file:
        return {
            line[3:6].decode().lower(): int(line.partition(b":")[2], 16) for line in file if line.startswith(b"Cap")
        }
