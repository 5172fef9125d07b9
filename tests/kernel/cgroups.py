"""Cgroups for tests: as this host has them, and where it can, as pure v1; processes in them, and servers that die."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sandrun.linux import process
from sandrun.linux.cgroup import Cgroup, Cgroups
from sandrun.linux.hierarchy import Hierarchy, detect, remove_leftovers
from tests import host

MB = 1 << 20
GUEST = 1879048192  # a uid that is nobody


def host_modes() -> list[str]:
    found = [detect().mode]
    return [*found, "v1"] if found == ["hybrid"] else found


def hierarchy(mode: str) -> Hierarchy:
    return detect(use_v2=mode != "v1")


def directories(cgroups: Cgroups) -> list[Path]:
    return [Path(f"{tree.base}/{cgroups.name}") for tree in cgroups.hierarchy.trees]


def wait_until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + host.within(seconds)
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


def start(box: Cgroup, program: str) -> int:
    """Run a Python program inside, entered as a sandbox enters. Returns: its pid, to be reaped by the test."""
    entries = box.entry_fds()
    executed, signs = os.pipe()
    pid, pidfd = process.clone3(0, cgroup_fd=box.directory_fd())
    if pid == 0:
        try:
            for entry in entries:
                os.write(entry, b"0")
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", f"import os, time, signal\n{program}"])
        finally:
            os._exit(127)
    for fd in (*entries, pidfd, signs):
        os.close(fd)
    os.read(executed, 1)  # end of file: from here on it holds none of our descriptors
    os.close(executed)
    return pid


def end(pid: int) -> int:
    """Exit code, negative for a signal."""
    deadline = time.monotonic() + 10
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{pid} did not end")
        time.sleep(0.002)


@contextlib.contextmanager
def server_with_a_frozen_job(mode: str, directory: Path) -> Iterator[tuple[int, str, int]]:
    """A process with cgroups of its own. Yields: its pid, its tree's name, the job's pid. At the end it is dead."""
    told = directory / "told"
    server = os.fork()
    if server == 0:
        try:
            made = Cgroups._create(hierarchy(mode), frozenset())
            box = made.group("z0").create("j1")
            inside = start(box, "time.sleep(60)")
            box.freeze(True)
            (directory / "half").write_text(f"{made.name} {inside}")
            (directory / "half").rename(told)
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        wait_until(told.exists)
        name, inside_pid = told.read_text().split()
        yield server, name, int(inside_pid)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # the test has ended it
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
        remove_leftovers(hierarchy(mode))  # whatever the test came to


def is_dead(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
