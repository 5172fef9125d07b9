"""System calls as data: a table made in Python, carried out by calls.c without a line of Python.

Where a process has just been forked from a large interpreter, Python is dear: whatever it looks at it writes to, be it
a reference count, and each page so written must be copied first. A sandbox's init is therefore no Python at all.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Any

from sandrun.linux import process
from sandrun.linux.libc import SYS

LIBRARY = "libcalls.so"
"""Beside this module: what `gcc` made of calls.c (hatch_build.py)."""

COPY, EQUAL, CLOSE_FOREIGN, PLACE = -1, -2, -3, -4
SUCCESS, ANYTHING = -1_000_001, -1_000_002
JOB, COLLECTOR = 1, 2
AT_FDCWD = -100  # <linux/fcntl.h>
_SLOTS = 32


class Slot(int):
    """A number that is known, or changes, only when a table is carried out."""


CONTROL, GATE, SIGNALS, WISHES, OUTPUTS, ROLE, TID = (Slot(number) for number in range(7))
"""calls.c knows these by number."""
SYNC, STORAGE, SNAPSHOT, PROC, INIT_ID, JOB_ID, SEEN, SCRATCH, TREE, READY = (Slot(number) for number in range(7, 17))
ENTRIES = tuple(Slot(number) for number in range(17, _SLOTS))


TITLE = ctypes.create_string_buffer(8192)
"""A text for a table's `copy`: what ps(1) shall show of the next process. What is in the table is its address."""


class Slots:
    """The values of all slots; those that were not set are -1."""

    def __init__(self) -> None:
        self.array = (ctypes.c_int64 * _SLOTS)(*[-1] * _SLOTS)

    def __getitem__(self, slot: int) -> int:
        return self.array[slot]

    def __setitem__(self, slot: int, value: int) -> None:
        self.array[slot] = value


class _Call(ctypes.Structure):
    """struct call of calls.c."""

    _fields_ = (
        ("argument", ctypes.c_uint64 * 6),
        ("slotted", ctypes.c_uint64),
        ("number", ctypes.c_int64),
        ("store", ctypes.c_int64),
        ("expected", ctypes.c_int64),
        ("step", ctypes.c_char_p),
        ("about", ctypes.c_char_p),
    )


class _Failure(ctypes.Structure):
    _fields_ = (("step", ctypes.c_char_p), ("about", ctypes.c_char_p), ("error", ctypes.c_int64))


class _Table(ctypes.Structure):
    _fields_ = (("calls", ctypes.c_void_p), ("n", ctypes.c_uint64))


class Calls:
    """A table of calls, in the order in which they are made. The first that fails ends it.

    Attributes:
        step: the name of what is added next, for its failure.
        filter: the seccomp program that it loads, empty for none.
    """

    def __init__(self) -> None:
        self.step = ""
        self.filter = b""
        self._calls: list[_Call] = []
        self._kept: list[Any] = []
        self._array: Any = None

    def call(
        self, name: str, *arguments: Any, about: str = "", store: Slot | None = None, expected: int = SUCCESS
    ) -> None:
        """Make system call `name`. Arguments are integers, slots, bytes, None or ctypes buffers.

        `store` is the slot that gets what it returns. It fails if that is not `expected`: a number, SUCCESS, ANYTHING.
        """
        self._put(SYS[name], arguments, f"{name}: {about}" if about else name, store, expected)

    def copy(self, to: int, data: Any, n: int) -> None:
        """Write over the own memory at the address `to`."""
        self._put(COPY, (to, data, n), "copy")

    def equal(self, buffer: int | bytes, wanted: bytes, *, error: int, about: str) -> None:
        """Fail with `error` unless the buffer begins with what is wanted."""
        self._put(EQUAL, (buffer, wanted, len(wanted), error), about)

    def buffer(self, n: int, content: bytes = b"") -> int:
        """The address of `n` bytes that a call may write to."""
        return self._keep(ctypes.create_string_buffer(content, n))

    def close_foreign(self, own: Iterable[int]) -> None:
        """Close all descriptors from 3 on but those in the slots `own`."""
        self._put(CLOSE_FOREIGN, (sum(1 << slot for slot in own),), "close_range")

    def _put(
        self, number: int, arguments: tuple[Any, ...], about: str, store: Slot | None = None, expected: int = SUCCESS
    ) -> None:
        call = _Call(number=number, store=-1 if store is None else store, expected=expected)
        call.step, call.about = self.step.encode(), about.encode(errors="backslashreplace")
        for place, value in enumerate(arguments):
            if isinstance(value, Slot):
                call.slotted |= 1 << place
            elif isinstance(value, bytes):
                value = self._keep(ctypes.create_string_buffer(value))
            elif value is None:
                value = 0
            elif not isinstance(value, int):
                value = self._keep(value)
            call.argument[place] = value & 0xFFFFFFFFFFFFFFFF
        self._calls.append(call)
        self._array = None

    def _keep(self, buffer: Any) -> int:
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def place(self, where: int, slot: Slot) -> None:
        """Put a slot's value, as an int, into a buffer."""
        self._put(PLACE, (where, slot), "place")

    def table(self) -> _Table:
        """What calls.c gets of it."""
        if self._array is None:
            self._array = (_Call * len(self._calls))(*self._calls)
        return _Table(ctypes.addressof(self._array), len(self._calls))

    def run(self, slots: Slots | None = None) -> None:
        """Make the calls in this process. Raises: OSError of the first that fails."""
        failed = _Failure()
        if _run(ctypes.byref(self.table()), (slots or Slots()).array, ctypes.byref(failed)) != 0:
            text = failed.about.decode()
            raise OSError(failed.error, f"{text}: {os.strerror(failed.error)}" if failed.error else text)


class Tables:
    """What a sandbox's init does, the job's process, init when it has forked that one, and the collector.

    Attributes:
        filter: the seccomp program that the job's process loads, empty for none.
    """

    def __init__(self, init: Calls, job: Calls, confined: Calls, collector: Calls) -> None:
        self._kept = (init, job, confined, collector)
        self.filter = job.filter
        self.array = (_Table * 4)(*(calls.table() for calls in self._kept))


def spawn(tables: Tables, slots: Slots, *, cgroup_fd: int | None) -> tuple[int, int]:
    """Clone PID 1 of a new PID namespace. It is a sandbox's init and never comes back here; what it forks does, when it
    has carried out its table: the job's process, and the collector when the job is over. The slot ROLE tells which.

    Returns: (pid, pidfd) in the caller, (0, -1) in what init forked.
    Raises: OSError as process.clone3.
    """

    def clone(arguments: Any, size: int) -> int:
        slots[TID] = arguments.child_tid
        result: int = _spawn(ctypes.byref(arguments), size, tables.array, slots.array)
        return result

    return process.clone3(process.CLONE_NEWPID, cgroup_fd=cgroup_fd, make=clone)


def _load() -> ctypes.PyDLL:
    """By a memory file: where this module lies in an archive, so does the library."""
    loader: Any = __spec__.loader  # of a file or of an archive: both have what importlib.abc.ResourceLoader has
    data: bytes = loader.get_data(os.path.join(os.path.dirname(__file__), LIBRARY))
    descriptor = os.memfd_create("sandrun", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        return ctypes.PyDLL(f"/proc/self/fd/{descriptor}")  # with the GIL held: nothing else may run around a fork
    finally:
        os.close(descriptor)


_library = _load()
_run = _library["run"]
_run.argtypes, _run.restype = [ctypes.c_void_p] * 3, ctypes.c_int64
_spawn = _library["spawn"]
_spawn.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p]
_spawn.restype = ctypes.c_int64
