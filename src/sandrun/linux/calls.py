"""System calls as data: a table made in Python, carried out by calls.c without a line of Python.

Where a process has just been forked from a large interpreter, Python is dear: whatever it looks at it writes to, be it
a reference count, and each page so written must be copied first, and is kept as it was by whoever was forked before. A
sandbox's init is therefore no Python at all, and a zygote next to none once it is warm.
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

COPY, EQUAL, CLOSE_FOREIGN, PLACE, DECIMAL = -1, -2, -3, -4, -5
SUCCESS, ANYTHING = -1_000_001, -1_000_002
JOB, COLLECTOR = 1, 2
AT_FDCWD = -100  # <linux/fcntl.h>
_SLOTS = 32


class Slot(int):
    """A number that is known, or changes, only when a table is carried out."""


CONTROL, GATE, SIGNALS, WISHES, OUTPUTS, ROLE, SYNC, STORAGE, INIT_ID, JOB_ID, NUMBER, SIZE = map(Slot, range(12))
ENTRIES = tuple(map(Slot, range(12, 24)))
"""calls.c knows these by number, and fills most of them with what the spawner tells of a sandbox."""
SNAPSHOT, PROC, SEEN, SCRATCH, TREE, READY = map(Slot, range(24, 30))


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

    def decimal(self, where: int, slot: Slot) -> None:
        """Write a slot's value into a buffer, as text of up to 20 digits without an end."""
        self._put(DECIMAL, (where, slot), "decimal")

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


class _ForkServer(ctypes.Structure):
    """struct fork_server of calls.c."""

    _fields_ = (
        ("connection", ctypes.c_int64),
        ("ended", ctypes.c_int64),
        ("tables", ctypes.c_void_p),
        ("entries", ctypes.c_uint64),
        ("tid", ctypes.c_uint64),
        ("init_uid", ctypes.c_int64),
        ("job_uid", ctypes.c_int64),
        ("before_fork", ctypes.c_void_p),
        ("after_fork", ctypes.c_void_p),
    )


class ForkServer:
    """Forks sandboxes as the spawner asks for them, with hardly a page written to.

    `uids` are init's and the job's inside, for id maps written from here; None where a sandbox writes its own.
    `entries` is how many v1 `tasks` descriptors come with each. Sets SIGCHLD aside, `process.child_descriptor`.
    """

    def __init__(self, connection: int, tables: Tables, *, entries: int, uids: tuple[int, int] | None) -> None:
        init_uid, job_uid = uids or (-1, -1)
        self._server = _ForkServer(
            connection=connection, ended=process.child_descriptor(), entries=entries, tid=process.thread_number() or 0,
            init_uid=init_uid, job_uid=job_uid, before_fork=process.BEFORE_FORK, after_fork=process.AFTER_FORK,
        )  # fmt: skip
        self._reference = ctypes.byref(self._server)
        self.slots = Slots()
        self.use(tables)

    def use(self, tables: Tables) -> None:
        self.tables = tables
        self._server.tables = ctypes.addressof(tables.array)

    def serve(self) -> bool:
        """Fork one sandbox's init, when the spawner wants it. Init never comes back here. What it forks does, when it
        has carried out its table: the job's process, and the collector when the job is over. It is told True, and
        `slots` has its values; ROLE tells which of the two it is.

        Ends the process when the spawner is gone, or does not keep to the table of messages.
        """
        if _serve(self._reference, self.slots.array) != 0:
            return False
        process.after_fork_child()
        return True


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
_serve = _library["serve"]
_serve.argtypes, _serve.restype = [ctypes.c_void_p] * 2, ctypes.c_int64
