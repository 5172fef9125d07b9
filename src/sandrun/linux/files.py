"""What files can do that the standard library does not offer."""

from __future__ import annotations

import ctypes
import os

from sandrun.linux.libc import bind

AT_FDCWD = -100  # <linux/fcntl.h>
RENAME_EXCHANGE = 2  # <linux/fs.h>

_renameat2 = bind("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def exchange(one: str, other: str) -> None:
    """Let two existing names of one file system change places, so that nobody ever finds either missing.

    See rename(2). Raises: OSError EINVAL where the file system cannot.
    """
    _renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
