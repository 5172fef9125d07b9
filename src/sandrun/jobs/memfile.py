"""Sealed memory files: how files and input reach a sandbox without a disk, and unchanged ever after."""

from __future__ import annotations

import errno
import fcntl
import os

from sandrun.errors import Overloaded

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


def sealed(name: str, data: bytes) -> int:
    """A descriptor at offset 0 of a memory file that holds `data` and that nobody can change. See memfd_create(2).

    Raises: Overloaded when the process has no descriptor, or the host no memory, to spare.
    """
    descriptor = -1
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if error.errno in _USED_UP:
            reason = "the server has no descriptor or memory to spare"
            raise Overloaded(reason, retry_after_seconds=5, client_at_fault=False) from error
        raise
    return descriptor
