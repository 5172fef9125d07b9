"""Mounts: the descriptor-based interface of Linux 5.2 and 5.12, and the classic one where it says things more briefly.

A mount that is only a descriptor ("detached") belongs to no tree yet, and goes away with its last descriptor.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

from sandrun.linux.calls import AT_FDCWD, SCRATCH, Calls, Slot
from sandrun.linux.libc import SYS, bind, failure, syscall

MS_RDONLY = 0x1  # <linux/mount.h>
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_UNBINDABLE = 0x20000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MNT_FORCE = 0x1
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

MOUNT_ATTR_RDONLY = 0x1  # not the numbers of MS_*
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

AT_EMPTY_PATH = 0x1000  # <linux/fcntl.h>
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

_FSOPEN_CLOEXEC = 0x1
_FSMOUNT_CLOEXEC = 0x1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSCONFIG_CMD_RECONFIGURE = 7
_FSPICK_CLOEXEC = 0x1
_FSPICK_EMPTY_PATH = 0x8
_OPEN_TREE_CLONE = 0x1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40

_mount = bind("mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_umount2 = bind("umount2", ctypes.c_char_p, ctypes.c_int)


def new_filesystem(fstype: str, options: Mapping[str, str | None], attr_flags: int = 0) -> int:
    """Make a detached mount of a new file system: fsopen(2), fsconfig(2), fsmount(2).

    `options` as in mount(8); the value of a plain flag is None. `attr_flags` are MOUNT_ATTR_*.
    The file system belongs to the namespaces that the caller is in now (proc: its own PID namespace).
    Returns: a close-on-exec descriptor for `move_mount`.
    Raises: OSError whose text has the option at fault and the file system's own words where it has any.
    """
    context = syscall(SYS["fsopen"], fstype.encode(), _FSOPEN_CLOEXEC, what=fstype)
    try:
        step = ""
        try:
            for key, value in options.items():
                if value is None:
                    step = key
                    syscall(SYS["fsconfig"], context, _FSCONFIG_SET_FLAG, key.encode(), None, 0)
                else:
                    step = f"{key}={value}"
                    syscall(SYS["fsconfig"], context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
            step = "create"
            syscall(SYS["fsconfig"], context, _FSCONFIG_CMD_CREATE, None, None, 0)
            step = "fsmount"
            return syscall(SYS["fsmount"], context, _FSMOUNT_CLOEXEC, attr_flags)
        except OSError as error:
            code = error.errno or 0
            told = _messages(context)
            words = f" ({told})" if told else ""
            raise OSError(code, f"fsconfig: {fstype}: {step}: {os.strerror(code)}{words}") from None
    finally:
        os.close(context)


def reconfigure(fd: int, options: Mapping[str, str]) -> None:
    """Change options of the file system that the mount `fd` shows, wherever it is mounted: fspick(2).

    Raises: OSError EPERM without CAP_SYS_ADMIN over the user namespace that it was made in, EINVAL for a tmpfs that
        holds more than its new size.
    """
    context = syscall(SYS["fspick"], fd, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH, what=fd)
    try:
        for key, value in options.items():
            syscall(SYS["fsconfig"], context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0, what=key)
        syscall(SYS["fsconfig"], context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0, what=str(options))
    finally:
        os.close(context)


def _messages(context: int) -> str:
    """What the file system said of a refusal: one message a read, "e " before an error, ENODATA at the end."""
    told: list[str] = []
    try:
        while len(told) < 16:
            told.append(os.read(context, 1024).decode(errors="replace").strip().removeprefix("e "))
    except OSError:
        pass
    return "; ".join(told)


def open_tree(path: str, *, clone: bool = True, recursive: bool = True, dirfd: int = AT_FDCWD) -> int:
    """Open the mount at `path`, as a detached copy (a bind mount without a place) unless `clone` is False.

    A `recursive` copy has the mounts below it too. The path "" means `dirfd` itself. Follows a symbolic link.
    Returns: a close-on-exec descriptor.
    Raises: OSError EPERM without CAP_SYS_ADMIN over the mount namespace. See open_tree(2).
    """
    flags = os.O_CLOEXEC | (0 if path else AT_EMPTY_PATH)
    if clone:
        flags |= _OPEN_TREE_CLONE | (AT_RECURSIVE if recursive else 0)
    return syscall(SYS["open_tree"], dirfd, os.fsencode(path), flags, what=path or dirfd)


def move_mount(fd: int, target: str, *, dirfd: int = AT_FDCWD) -> None:
    """Put the mount `fd` at `target`, or on `dirfd` itself if that is "". Never follows a symbolic link at the end."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if target else _MOVE_MOUNT_T_EMPTY_PATH)
    syscall(SYS["move_mount"], fd, b"", dirfd, os.fsencode(target), flags, what=target or dirfd)


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


_attributes = _MountAttr()
_attributes_pointer = ctypes.byref(_attributes)


def set_attributes(
    mount: str | int, *, set: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Change a mount, given by path or descriptor: MOUNT_ATTR_* to set and to clear, MS_PRIVATE, MS_SLAVE or MS_SHARED.

    `recursive` changes the mounts below it as well, all or none. Needs Linux 5.12, mount_setattr(2).
    Raises: OSError EPERM for clearing what an outer user namespace has locked.
    """
    _attributes.attr_set, _attributes.attr_clr, _attributes.propagation = set, clear, propagation
    dirfd, path, flags = (mount, b"", AT_EMPTY_PATH) if isinstance(mount, int) else (AT_FDCWD, os.fsencode(mount), 0)
    flags |= AT_RECURSIVE if recursive else 0
    syscall(SYS["mount_setattr"], dirfd, path, flags, _attributes_pointer, ctypes.sizeof(_attributes), what=mount)


# ---- the same as lines of a table --------------------------------------------------------------------------


def add_new_filesystem(
    calls: Calls, fstype: str, options: Mapping[str, str | Slot], attr_flags: int, store: Slot
) -> None:
    """`new_filesystem` into a slot. The value of an option may be the number in a slot."""
    calls.call("fsopen", fstype.encode(), _FSOPEN_CLOEXEC, about=fstype, store=SCRATCH)
    for key, value in options.items():
        about = fstype
        if isinstance(value, Slot):
            text: int | bytes = (buffer := calls.buffer(24))
            calls.decimal(buffer, value)
            about += f": {key}"
        else:
            text = value.encode()
            about += f": {key}={value}"
        calls.call("fsconfig", SCRATCH, _FSCONFIG_SET_STRING, key.encode(), text, 0, about=about)
    calls.call("fsconfig", SCRATCH, _FSCONFIG_CMD_CREATE, None, None, 0, about=f"{fstype}: create")
    calls.call("fsmount", SCRATCH, _FSMOUNT_CLOEXEC, attr_flags, about=fstype, store=store)
    calls.call("close", SCRATCH)


def add_open_tree(calls: Calls, tree: str | Slot, store: Slot) -> None:
    """`open_tree` of a path, or of the mount in a slot, cloned without what is below it."""
    flags = os.O_CLOEXEC | _OPEN_TREE_CLONE
    if isinstance(tree, Slot):
        calls.call("open_tree", tree, b"", flags | AT_EMPTY_PATH, store=store)
    else:
        calls.call("open_tree", AT_FDCWD, os.fsencode(tree), flags, about=tree, store=store)


def add_move_mount(calls: Calls, mount: Slot, target: str) -> None:
    """`move_mount` of the mount in a slot, which is closed."""
    calls.call("move_mount", mount, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH, about=target)
    calls.call("close", mount)


def add_set_attributes(calls: Calls, path: str, set: int) -> None:
    """`set_attributes`, to set only."""
    attributes = _MountAttr(attr_set=set)
    calls.call("mount_setattr", AT_FDCWD, os.fsencode(path), 0, attributes, ctypes.sizeof(attributes), about=path)


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Follows symbolic links in `target`."""
    try:
        _mount(_encoded(source), os.fsencode(target), _encoded(fstype), flags, _encoded(data))
    except OSError:
        raise failure("mount", f"{fstype or source} on {target}") from None


def umount(target: str, flags: int = 0) -> None:
    """umount2(2): MNT_DETACH takes the whole tree out of sight at once, and frees it when nobody uses it any more."""
    try:
        _umount2(os.fsencode(target), flags)
    except OSError:
        raise failure("umount2", target) from None


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)
