"""What the tests look at from outside: processes, namespaces, cgroups and mounts of this host, read from /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts", "cgroup")
_OF_A_SERVER = re.compile(r"sandrun-[0-9]+(-[0-9]+)?")
USER_MODE = "User Mode Linux" in Path("/proc/cpuinfo").read_text()
"""Each fork, page fault and end of a process is work of this kernel's own host: a hundred ends take a second."""


def within(seconds: float) -> float:
    """The time in which something is promised to be over: `seconds`, or ten times that in user-mode Linux."""
    return seconds * 10 if USER_MODE else seconds


@dataclass(frozen=True, slots=True)
class Process:
    """A process by pid *and* start time, since a pid is soon another's."""

    pid: int
    started: int
    parent: int
    state: str

    @property
    def alive(self) -> bool:
        """A zombie is dead: it holds nothing but its number, and its parent may be slow to reap it."""
        now = process(self.pid)
        return now is not None and now.started == self.started and now.state not in "ZX"

    @property
    def title(self) -> str:
        try:
            with open(f"/proc/{self.pid}/cmdline", "rb") as f:
                return f.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""

    @property
    def pid_depth(self) -> int:
        """How many PID namespaces deep it lives; 0 when it is gone."""
        return len(self._pids())

    @property
    def pid_inside(self) -> int:
        """Its pid in the innermost of them."""
        return int((self._pids() or ["0"])[-1])

    def _pids(self) -> list[str]:
        try:
            with open(f"/proc/{self.pid}/status") as f:
                found = re.search(r"^NSpid:\s+(.*)$", f.read(), re.MULTILINE)
        except OSError:
            return []
        return found[1].split() if found else []

    def descriptors(self) -> list[str]:
        """What it has open, as far as we may look."""
        try:
            names = os.listdir(f"/proc/{self.pid}/fd")
        except OSError:
            return []
        found = []
        for name in names:
            try:
                found.append(os.readlink(f"/proc/{self.pid}/fd/{name}"))
            except OSError:
                continue
        return found

    def namespaces(self) -> dict[str, str]:
        """Those of its namespaces that are not ours, by kind; only what we may read."""
        found = {}
        for kind in NAMESPACES:
            try:
                name = os.readlink(f"/proc/{self.pid}/ns/{kind}")
            except OSError:
                continue
            if name != os.readlink(f"/proc/self/ns/{kind}"):
                found[kind] = name
        return found


def process(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read().decode(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid=pid, started=int(fields[19]), parent=int(fields[1]), state=fields[0])


def processes() -> list[Process]:
    return [p for name in os.listdir("/proc") if name.isdigit() and (p := process(int(name)))]


def descendants(pid: int) -> list[Process]:
    """All live processes below `pid`, itself not included."""
    children: dict[int, list[Process]] = {}
    for p in processes():
        children.setdefault(p.parent, []).append(p)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [p.pid for p in below]
    return [p for p in found if p.state not in "ZX"]


class Rooms:
    """The PID namespaces of some processes but our own, held by descriptors: else a number is soon another's.

    Whoever lives in one of them dies with its PID 1, and with the last one go its mounts and other namespaces.
    """

    def __init__(self, members: Iterable[Process]) -> None:
        self._held: dict[int, int] = {}
        ours = os.stat("/proc/self/ns/pid").st_ino
        for member in members:
            try:
                descriptor = os.open(f"/proc/{member.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # gone, or not ours to look at
                continue
            number = os.fstat(descriptor).st_ino
            if number == ours or number in self._held:
                os.close(descriptor)
            else:
                self._held[number] = descriptor

    def inhabitants(self) -> list[Process]:
        found = []
        for p in processes():
            try:
                if os.stat(f"/proc/{p.pid}/ns/pid").st_ino in self._held and p.alive:
                    found.append(p)
            except OSError:
                continue
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()


def own_cgroups(pids: set[int]) -> list[str]:
    """Directories `sandrun-<pid>` of these pids, in every cgroup hierarchy."""
    found = []
    wanted = {f"sandrun-{pid}" for pid in pids}
    for top, names, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(top, n) for n in names if n in wanted]
        names[:] = [n for n in names if not _OF_A_SERVER.fullmatch(n)]  # a unit may be called sandrun-something too
    return found


def mounts() -> set[str]:
    """Mount points of our own mount namespace."""
    with open("/proc/self/mountinfo") as f:
        return {line.split()[4] for line in f}


def controllers() -> dict[str, str]:
    """Which hierarchy each cgroup controller is mounted in: {"memory": "v1", ...}."""
    found: dict[str, str] = {}
    with open("/proc/self/mountinfo") as f:
        for line in f:
            before, _, after = line.partition(" - ")
            fstype, _, options = after.split()[:3]
            where = before.split()[4]
            if fstype == "cgroup2":
                try:
                    with open(f"{where}/cgroup.controllers") as names:
                        found.update(dict.fromkeys(names.read().split(), "v2"))
                except OSError:
                    continue
            elif fstype == "cgroup":
                found.update(dict.fromkeys(options.split(","), "v1"))
    return {name: where for name, where in found.items() if name in ("memory", "pids", "cpu", "cpuacct", "freezer")}


def cgroup_version() -> str:
    """ "v1", "v2" or "none": where the memory and pids controllers are."""
    where = controllers()
    both = {where.get("memory"), where.get("pids")}
    return both.pop() or "none" if len(both) == 1 else "none"


def user_namespaces_work() -> bool:
    """Whether a user namespace of our own gives us capabilities (Ubuntu's AppArmor rule takes them away)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import ctypes

            libc = ctypes.CDLL(None, use_errno=True)
            code = 0 if libc.unshare(0x10000000) == 0 and libc.unshare(0x00020000) == 0 else 1  # NEWUSER, then NEWNS
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0
