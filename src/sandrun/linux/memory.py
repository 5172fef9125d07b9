"""How much memory the host has left, and how this process's own is mapped."""

from __future__ import annotations

import ctypes
import errno
import os
import re

from sandrun.linux import libc

MADV_COLLAPSE = 25
HUGE_BYTES = 2 << 20
"""Of a huge page on x86-64, and on aarch64 with pages of 4 KiB."""

_malloc_trim = libc.find("malloc_trim", ctypes.c_size_t)
_madvise = libc.bind("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_ANONYMOUS = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 +(?:\[heap\])?\n")


def available_bytes() -> int:
    """What can be had before the host reclaims what it needs. proc_meminfo(5) "MemAvailable" (Linux 3.14)."""
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(errno.ENOENT, "/proc/meminfo has no MemAvailable")


def trim() -> None:
    """Give the kernel back what libc has kept of freed memory. malloc_trim(3); another libc than glibc keeps little."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def collapse() -> int:
    """Put the memory that this process has written to into huge pages, where it lies close together.

    A fork copies, and the end of a process takes down, one entry for such a page instead of 512; a page of it that is
    written to later is still copied alone. madvise(2) "MADV_COLLAPSE" (Linux 6.1); where it is refused all stays as
    it is.

    Returns: how many huge pages there are now.
    """
    done = 0
    descriptor = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = b""
        while part := os.read(descriptor, 65536):
            text += part
    finally:
        os.close(descriptor)
    for found in _ANONYMOUS.finditer(text):
        start, end = int(found[1], 16), int(found[2], 16)
        for place in range(-(-start // HUGE_BYTES) * HUGE_BYTES, end - HUGE_BYTES + 1, HUGE_BYTES):
            try:
                _madvise(place, HUGE_BYTES, MADV_COLLAPSE)
                done += 1
            except OSError:
                continue  # nothing is there, or this kernel cannot do it
    return done
