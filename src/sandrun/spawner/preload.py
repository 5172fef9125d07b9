"""Loading an environment's modules in its zygote: once, for all jobs.

A module finds what it would find in a job: its variables, work directory, places to write to. What it does beyond
defining names must not outlast it: threads, processes, open files. What it looked at decides who may use it (`Nest`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator

from sandrun.sandbox import generators, job, report, rootfs
from sandrun.sandbox.spec import Nest
from sandrun.sandbox.steps import StepFailed

VARIABLES = {
    # A process with threads cannot be forked: the child has the locks that they held, not those who would give them
    # back. These libraries start one a core when they are loaded, or when they are first used.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "MPLBACKEND": "agg",  # what matplotlib ends up with in a job, after it has tried all that have windows
}
"""Beside the variables that jobs have; not seen by jobs."""

PATIENCE_SECONDS = 2.0
"""For threads that are about to end, as matplotlib's, which would tell that looking for fonts takes long."""


def load(names: list[str], libraries: list[str], nest: Nest) -> None:
    """Load modules, and note in `nest` what jobs have to know.

    Shared objects go first: mapped between the interpreter's own memory, they would keep it from being put together
    (`linux.memory.collapse`). One that is not there, or no more, is no matter: a module loads what it needs.

    Raises: StepFailed whose step names the module; its cause tells what is wrong with it.
    """
    step = "places to write"
    try:
        before = report.list_descriptors()
        rootfs.lend_storage()
        os.chdir(rootfs.WORK)
        sys.argv = [""]
        asked = _Asked(job.default_environment(nest) | VARIABLES)
        with _silence():
            for path in libraries:
                with contextlib.suppress(OSError):
                    ctypes.CDLL(path, os.RTLD_LOCAL)
            for name in names:
                step = f"preload {name}"
                __import__(name)
                _insist_on_one_thread()
        step = "preload"
        _insist_on_no_child()
        left = set(report.list_descriptors()) - set(before)
        if left:
            raise RuntimeError(f"open files are left: {sorted(os.readlink(f'/proc/self/fd/{one}') for one in left)}")
        step = "places to write"
        os.chdir("/")
        os.umask(0o022)
        nest.variables = asked.end()
        nest.caches = rootfs.take_storage()
    except BaseException as error:
        raise StepFailed(step) from error
    generators.find()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What is printed goes nowhere: neither into a pipe that nobody reads, nor into a buffer that a job would flush."""
    kept = [os.dup(1), os.dup(2)]
    nothing = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        for number in (1, 2):
            os.dup2(nothing, number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        ctypes.PyDLL(None).fflush(None)
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)
        os.close(nothing)


class _Asked(dict[bytes, bytes]):
    """Makes `variables` those of this process, and notes which of them, or which others, are asked for from then on."""

    def __init__(self, variables: dict[str, str]) -> None:
        os.environ.clear()
        os.environ.update(variables)
        self.kept: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
        super().__init__(self.kept)
        self.names: set[bytes] = set()
        os.environ._data = self  # type: ignore[attr-defined]

    def __getitem__(self, name: bytes) -> bytes:
        self.names.add(name)
        return super().__getitem__(name)

    def end(self) -> frozenset[str]:
        """Stop. Returns: the names."""
        self.kept.clear()
        self.kept.update(self)
        os.environ._data = self.kept  # type: ignore[attr-defined]
        return frozenset(map(os.fsdecode, self.names))


def _insist_on_one_thread() -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (count := len(os.listdir("/proc/self/task"))) > 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{count - 1} threads are left; a process with threads cannot be forked")
        time.sleep(0.01)


def _insist_on_no_child() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
    raise RuntimeError("a process is left that a module has started")
