"""Collecting a job's outputs inside the sandbox, as the job's user, all processes dead: requirements 24, 31, 32.

The tree is the job's work: a thousand levels deep, modes 000, sockets, links to anywhere. Each directory is opened by
its last component from its parent's descriptor, so that no link in any component is ever followed, and the way up is
checked. Few descriptors are open however deep the tree is. What it writes is untrusted to its reader, `jobs.outputs`.

The stream is frames, `FRAME` and then that many bytes:

    F   size as `SIZE`, then the path: a file begins
    D   a piece of its content, at most PIECE_BYTES
    E   it is complete (no bytes)
    X   it is not: reading failed, forget it (no bytes)
    Z   the end of the stream; the length is the number of files and directories that were left out instead
"""

from __future__ import annotations

import os
import re
import stat
import time
import zlib
from collections.abc import Iterator
from struct import Struct

FRAME = Struct(">cI")
SIZE = Struct(">Q")
BEGIN, DATA, COMPLETE, BROKEN, END = b"F", b"D", b"E", b"X", b"Z"
PIECE_BYTES = 128 << 10
PATH_BYTES = 4096

FILES = 10_000
ENTRIES = 50_000
"""The most that is looked at; the tmpfs has no more inodes."""
OUTPUT_BYTES = 256 << 20
"""The most of all files together, holes counted."""

_CLOCK_REALTIME_COARSE = 5  # <linux/time.h>; what time stamps are taken from
_CHECKSUM_BYTES = 256 << 10
_SEEN = Struct("<H?xIQQQ")  # path length, checksum counts, checksum, ctime, size, inode
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PRUNED = "__pycache__"


def snapshot(directory: str) -> bytes:
    """What is there before the job starts, so that `collect` can tell what it made or changed.

    Raises: OSError.
    """
    seen = bytearray()
    start = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    summed = 0
    latest = 0  # the latest ctime that nothing but waiting can tell from the job's first change
    walk = _Walk(directory, None)
    for path, status in walk:
        checksum = 0
        # Time stamps go by clock ticks, so a change within this tick would leave ctime as it is: compare the content.
        fresh = status.st_ctime_ns >= start
        if fresh and summed + status.st_size <= _CHECKSUM_BYTES:
            summed += status.st_size
            checksum = walk.checksum(status)
        elif fresh:
            fresh = False
            latest = max(latest, status.st_ctime_ns)
        name = os.fsencode(path)
        seen += _SEEN.pack(len(name), fresh, checksum, status.st_ctime_ns, status.st_size, status.st_ino)
        seen += name
    give_up = time.monotonic() + 0.05  # a tick is 10 ms at most; the wall clock may be set back meanwhile
    while latest and time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= latest and time.monotonic() < give_up:
        time.sleep(0.0005)
    return bytes(seen)


def collect(directory: str, patterns: tuple[str, ...] | None, before: bytes, out_fd: int) -> None:
    """Write the outputs below `directory` to `out_fd`, which blocks, as the stream that this module's head describes.

    `patterns`: globs over paths below the directory; one that matches a directory means all below it. None: every
    regular file that is not in the snapshot `before`, or differs from it in ctime, size or inode; no `__pycache__`.
    (tmpfs gives no new ctime when a file that was there before is changed through a shared mapping alone.)
    Raises: OSError, of writing (EPIPE: nobody wants it) alone. What cannot be read is left out and counted.
    """
    selection = Selection(patterns) if patterns is not None else None
    seen = _read_snapshot(before) if patterns is None else {}
    out = _Stream(out_fd)
    walk = _Walk(directory, _PRUNED if patterns is None else None)
    left_out = 0
    try:
        for path, status in walk:
            if selection is not None:
                if not selection.matches(path):
                    continue
            elif _is_unchanged(seen.get(path), status, walk):
                continue
            if not (out.files < FILES and out.send(walk, path, status)):
                left_out += 1
    except _Unreadable:
        left_out += 1
    out.end(left_out + walk.left_out)


_Seen = tuple[bool, int, int, int, int]  # as in _SEEN


def _read_snapshot(before: bytes) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    at = 0
    while at < len(before):
        length, counts, checksum, ctime, size, inode = _SEEN.unpack_from(before, at)
        at += _SEEN.size + length
        seen[os.fsdecode(before[at - length : at])] = (counts, checksum, ctime, size, inode)
    return seen


def _is_unchanged(known: _Seen | None, status: os.stat_result, walk: _Walk) -> bool:
    if known is None or known[2:] != (status.st_ctime_ns, status.st_size, status.st_ino):
        return False
    return not known[0] or known[1] == walk.checksum(status)


class _Unreadable(OSError):
    """The walk cannot go on; what it met so far stands."""


class _Walk:
    """Every regular file below `directory`, as path and status, and the means to open the one just met.

    Sorted within a directory, files first. Has one directory open at a time.
    Attributes:
        left_out: directories not entered (too long a path, or not readable) and entries beyond ENTRIES.
    """

    def __init__(self, directory: str, pruned: str | None) -> None:
        self._directory = directory
        self._pruned = pruned
        self._fd = -1
        self._name = ""
        self._entries = 0
        self.left_out = 0

    def __iter__(self) -> Iterator[tuple[str, os.stat_result]]:
        try:
            self._fd, status = _enter(self._directory, None)
            device = status.st_dev
            levels: list[
                tuple[list[str], str, int]
            ] = []  # directories to enter, path of this one with a slash, its inode
            prefix = ""
            while True:
                files, directories = self._list()
                for self._name in files:
                    entry = os.stat(self._name, dir_fd=self._fd, follow_symlinks=False)
                    path = prefix + self._name
                    if _is_too_long(path):
                        self.left_out += 1
                    elif stat.S_ISREG(entry.st_mode):
                        yield path, entry
                levels.append((directories, prefix, status.st_ino))
                while not (entered := self._enter_next(levels[-1], device)):
                    levels.pop()
                    if not levels:
                        return
                    self._leave(levels[-1][2])
                status, prefix = entered
        except OSError as error:
            raise _Unreadable from error
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _list(self) -> tuple[list[str], list[str]]:
        files: list[str] = []
        directories: list[str] = []
        with os.scandir(self._fd) as entries:
            for entry in entries:
                if self._entries >= ENTRIES:
                    self.left_out += 1
                    break
                self._entries += 1
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False) and entry.name != self._pruned:
                    directories.append(entry.name)
        files.sort()
        directories.sort(reverse=True)
        return files, directories

    def _enter_next(self, level: tuple[list[str], str, int], device: int) -> tuple[os.stat_result, str] | None:
        directories, prefix, _ = level
        while directories:
            name = directories.pop()
            path = f"{prefix}{name}/"
            if _is_too_long(path):
                self.left_out += 1
                continue
            try:
                fd, status = _enter(name, self._fd)
            except OSError:
                self.left_out += 1
                continue
            if status.st_dev != device:  # not ours: something that is mounted there
                os.close(fd)
                continue
            os.close(self._fd)
            self._fd = fd
            return status, path
        return None

    def _leave(self, inode: int) -> None:
        parent = os.open("..", _DIRECTORY_FLAGS, dir_fd=self._fd)
        os.close(self._fd)
        self._fd = parent
        if os.fstat(parent).st_ino != inode:  # somebody moved the directory: a process is alive that must not be
            raise OSError("the tree changes while it is read")

    def open(self, status: os.stat_result) -> int:
        """Open the file just met. Raises: OSError, also if it is not the one that `status` tells of."""
        try:
            fd = os.open(self._name, _FILE_FLAGS, dir_fd=self._fd)
        except PermissionError:
            os.chmod(self._name, 0o400, dir_fd=self._fd)  # a mode is no reason to lose an output: the file is ours
            fd = os.open(self._name, _FILE_FLAGS, dir_fd=self._fd)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) != (status.st_dev, status.st_ino):
            os.close(fd)
            raise OSError("the tree changes while it is read")
        return fd

    def checksum(self, status: os.stat_result) -> int:
        """CRC-32 of the file just met, 0 if it cannot be read: a hint, not a proof."""
        result = 0
        try:
            fd = self.open(status)
        except OSError:
            return 0
        try:
            while piece := os.read(fd, PIECE_BYTES):
                result = zlib.crc32(piece, result)
        except OSError:
            return 0
        finally:
            os.close(fd)
        return result


def _is_too_long(path: str) -> bool:
    return len(path) * 4 > PATH_BYTES and len(os.fsencode(path)) > PATH_BYTES


def _enter(name: str, parent: int | None) -> tuple[int, os.stat_result]:
    """Open a directory, whatever its mode: it is the job's, and so are we. Raises: OSError."""
    try:
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    try:
        status = os.fstat(fd)
        if not status.st_mode & stat.S_IXUSR:  # it can be listed, but what is in it cannot be reached
            os.fchmod(fd, 0o700)
    except OSError:
        os.close(fd)
        raise
    return fd, status


class _Stream:
    """The writing end of the frames; small ones are written together.

    Attributes:
        files: how many have begun.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = bytearray()
        self._bytes = 0
        self.files = 0

    def send(self, walk: _Walk, path: str, status: os.stat_result) -> bool:
        """Send the file that the walk has just met; False if it does not fit or cannot be read."""
        left = status.st_size
        if left > OUTPUT_BYTES - self._bytes:
            return False
        try:
            fd = walk.open(status)
        except OSError:
            return False
        try:
            self.files += 1
            self._bytes += left
            self._frame(BEGIN, SIZE.pack(left) + os.fsencode(path))
            while left:
                try:
                    piece = os.read(fd, min(left, PIECE_BYTES))
                except OSError:
                    break
                if not piece:
                    break
                left -= len(piece)
                self._frame(DATA, piece)
            self._frame(BROKEN if left else COMPLETE, b"")
        finally:
            os.close(fd)
        return not left

    def end(self, left_out: int) -> None:
        self._pending += FRAME.pack(END, left_out)
        self._flush()

    def _frame(self, kind: bytes, payload: bytes) -> None:
        self._pending += FRAME.pack(kind, len(payload))
        self._pending += payload
        if len(self._pending) >= PIECE_BYTES // 2:
            self._flush()

    def _flush(self) -> None:
        with memoryview(self._pending) as rest:
            written = 0
            while written < len(rest):
                written += os.write(self._fd, rest[written:])
        self._pending.clear()


# ---- globs -------------------------------------------------------------------------------------------------


class Selection:
    """Which paths a list of globs means: `*`, `?` and `[...]` within a component, `**` over any number of them.

    A glob that matches a directory means all below it; hidden names are names like others. However many stars a glob
    has, there is no blow-up: every star but the last is settled by the first place that fits.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        literal = set()
        self._globs = []
        for pattern in patterns:
            parts = [part for part in pattern.split("/") if part not in ("", ".")]
            if any(character in pattern for character in "*?["):
                self._globs.append(re.compile(_translate(parts), re.DOTALL))
            else:
                literal.add("/".join(parts))
        self._literal = frozenset(literal)
        self._below = tuple(path + "/" for path in literal)

    def matches(self, path: str) -> bool:
        """Whether `path`, in normal form, is meant."""
        if path in self._literal or path.startswith(self._below):
            return True
        return any(glob.match(path) for glob in self._globs)


def _translate(parts: list[str]) -> str:
    blocks: list[list[str]] = [[]]  # runs of components between `**`
    for part in parts:
        if part != "**":
            blocks[-1].append(_translate_component(part))
        elif blocks[-1] or len(blocks) == 1:
            blocks.append([])
    head, *others = ["/".join(block) for block in blocks]
    regex = head
    for block in others:
        if regex:
            regex += "/"
        regex += rf"(?>(?:[^/]++/)*?{block}(?=/|\Z))" if block else ".+"
    return regex + r"(?:/.*)?\Z"


def _translate_component(glob: str) -> str:
    fixed = [""]  # what stands between the stars, each of fixed length
    at = 0
    while at < len(glob):
        character = glob[at]
        at += 1
        if character == "*":
            if fixed[-1] or len(fixed) == 1:
                fixed.append("")
        elif character == "?":
            fixed[-1] += "[^/]"
        elif character == "[" and (end := glob.find("]", at + (2 if glob[at : at + 1] in ("!", "^") else 1))) >= 0:
            fixed[-1] += _translate_set(glob[at:end])
            at = end + 1
        else:
            fixed[-1] += re.escape(character)
    first, *others = fixed
    if not others:
        return first
    *middle, last = others
    return first + "".join(f"(?>[^/]*?{text})" for text in middle) + (f"[^/]*{last}" if last else "[^/]*+")


def _translate_set(content: str) -> str:
    negated = content[0] in "!^"
    if negated:
        content = content[1:]
    members = ""
    at = 0
    while at < len(content):
        if at + 2 < len(content) and content[at + 1] == "-":
            if content[at] <= content[at + 2]:
                members += f"{re.escape(content[at])}-{re.escape(content[at + 2])}"
            at += 3
        else:
            members += re.escape(content[at])
            at += 1
    if negated:
        return f"[^/{members}]"
    return f"(?:(?!/)[{members}])" if members else "(?!)"
