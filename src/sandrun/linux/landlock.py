"""Landlock: a second wall around files, and one around TCP, signals and abstract sockets. See landlock(7).

It only takes away, needs no privilege but no_new_privs, and holds for this process and all that it starts.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable

from sandrun.linux.calls import AT_FDCWD, SCRATCH, TREE, Calls
from sandrun.linux.libc import SYS, syscall

ACCESS_FS_EXECUTE = 1 << 0  # <linux/landlock.h>
ACCESS_FS_WRITE_FILE = 1 << 1
ACCESS_FS_READ_FILE = 1 << 2
ACCESS_FS_READ_DIR = 1 << 3
ACCESS_FS_REMOVE_DIR = 1 << 4
ACCESS_FS_REMOVE_FILE = 1 << 5
ACCESS_FS_MAKE_CHAR = 1 << 6
ACCESS_FS_MAKE_DIR = 1 << 7
ACCESS_FS_MAKE_REG = 1 << 8
ACCESS_FS_MAKE_SOCK = 1 << 9
ACCESS_FS_MAKE_FIFO = 1 << 10
ACCESS_FS_MAKE_BLOCK = 1 << 11
ACCESS_FS_MAKE_SYM = 1 << 12
ACCESS_FS_REFER = 1 << 13  # ABI 2, Linux 5.19
ACCESS_FS_TRUNCATE = 1 << 14  # ABI 3, Linux 6.2
ACCESS_FS_IOCTL_DEV = 1 << 15  # ABI 5, Linux 6.10
ACCESS_NET_BIND_TCP = 1 << 0  # ABI 4, Linux 6.7
ACCESS_NET_CONNECT_TCP = 1 << 1
SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # ABI 6, Linux 6.12
SCOPE_SIGNAL = 1 << 1

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_FIRST_ABI = ACCESS_FS_REFER - 1
_READ = ACCESS_FS_EXECUTE | ACCESS_FS_READ_FILE | ACCESS_FS_READ_DIR
_FOR_FILES = ACCESS_FS_EXECUTE | ACCESS_FS_WRITE_FILE | ACCESS_FS_READ_FILE | ACCESS_FS_TRUNCATE | ACCESS_FS_IOCTL_DEV
_NEVER = ACCESS_FS_MAKE_CHAR | ACCESS_FS_MAKE_BLOCK  # handled and given to no path: device nodes cannot be made


def _ask_abi() -> int:
    try:
        return syscall(SYS["landlock_create_ruleset"], None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):  # not built in; built in and not in the `lsm=` list
            return 0
        raise


_ABI: list[int] = []


def abi() -> int:
    """The version of Landlock that this kernel has, 0 for none. Asked once: a filter may refuse it later."""
    if not _ABI:
        _ABI.append(_ask_abi())
    return _ABI[0]


def handled_filesystem_rights(version: int) -> int:
    """The rights over files that Landlock of this ABI can take away."""
    rights = _FIRST_ABI
    for since, right in ((2, ACCESS_FS_REFER), (3, ACCESS_FS_TRUNCATE), (5, ACCESS_FS_IOCTL_DEV)):
        if version >= since:
            rights |= right
    return rights


def restrict(read_only: Iterable[str], read_write: Iterable[str], *, scope: bool = True, deny_tcp: bool = True) -> int:
    """Confine the calling thread, for good, to these paths (directories: with all below them).

    `read_only` may be read and executed; in `read_write` anything may be done but make device nodes. What is nowhere
    below them can't be opened, listed, made or removed (`stat` and `chdir` are not Landlock's), and nothing can be
    mounted. `scope` (ABI 6): no signal to a process, and no connection to an abstract socket, outside of what this
    thread starts. `deny_tcp` (ABI 4): no bind, no connect. What the kernel's version lacks is left out; before ABI 2
    moving a file to another directory is always refused (EXDEV).
    Returns: the ABI in force.
    Raises: OSError ENOSYS if there is no Landlock, ENOENT naming a path that is not there, EPERM without no_new_privs,
        E2BIG beyond 16 layers.
    """
    calls = Calls()
    version = add_restrict(calls, read_only, read_write, scope=scope, deny_tcp=deny_tcp)
    calls.run()
    return version


def add_restrict(
    calls: Calls, read_only: Iterable[str], read_write: Iterable[str], *, scope: bool = True, deny_tcp: bool = True
) -> int:
    """`restrict` as lines of a table. The paths must be there, and be what they will be."""
    version = abi()
    if not version:
        raise OSError(errno.ENOSYS, "landlock_create_ruleset: this kernel has no Landlock, or not in its lsm= list")
    rights = handled_filesystem_rights(version)
    attributes = struct.pack(
        "=QQQ",
        rights,
        ACCESS_NET_BIND_TCP | ACCESS_NET_CONNECT_TCP if deny_tcp and version >= 4 else 0,
        SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if scope and version >= 6 else 0,
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8  # as much as this kernel knows
    calls.call("landlock_create_ruleset", attributes, size, 0, store=SCRATCH)
    for path in read_only:
        _add_rule(calls, path, _READ)
    for path in read_write:
        _add_rule(calls, path, rights & ~_NEVER)
    calls.call("landlock_restrict_self", SCRATCH, 0)
    calls.call("close", SCRATCH)
    return version


def _add_rule(calls: Calls, path: str, rights: int) -> None:
    if not stat.S_ISDIR(os.stat(path).st_mode):
        rights &= _FOR_FILES  # EINVAL for a right that only a directory can have
    beneath = calls.buffer(12, struct.pack("=Qi", rights, -1))  # struct landlock_path_beneath_attr is packed
    calls.call("openat", AT_FDCWD, os.fsencode(path), os.O_PATH | os.O_CLOEXEC, 0, about=path, store=TREE)
    calls.place(beneath + 8, TREE)
    calls.call("landlock_add_rule", SCRATCH, _RULE_PATH_BENEATH, beneath, 0, about=path)
    calls.call("close", TREE)
