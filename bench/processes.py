"""What a running server holds: its processes with their memory, descriptors, namespaces, cgroups and mounts."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import machine

PARTS = ("supervisor", "spawner", "api", "zygote")
NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts", "cgroup")
SLABS = ("net_namespace", "pid_namespace", "user_namespace", "uts_namespace", "mnt_cache", "task_struct", "filp")


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    title: str

    @property
    def part(self) -> str:
        """supervisor, spawner, api, zygote, or sandbox."""
        for part in PARTS:
            if self.title.startswith(f"sandrun: {part}"):
                return part
        return "sandbox"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def tree(root: int) -> list[Process]:
    """`root` and all below it that live."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (text := _read(f"/proc/{name}/stat")):
            fields = text[text.rindex(")") + 2 :].split()
            if fields[0] not in "ZX":
                children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [(root, 0)]
    while todo:
        pid, parent = todo.pop()
        if title := _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip():
            found.append(Process(pid, parent, title))
        todo += [(child, pid) for child in children.get(pid, [])]
    return found


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size, summed, proc(5): shared pages count once."""
    total = 0
    for pid in pids:
        if found := re.search(r"^Pss:\s+(\d+) kB", _read(f"/proc/{pid}/smaps_rollup"), re.MULTILINE):
            total += int(found[1]) * 1024
    return total


def descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Of a process itself, and of its children that it has reaped, proc(5)."""
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return 0.0, 0.0
    fields = text[text.rindex(")") + 2 :].split()
    user, system, child_user, child_system = (int(word) for word in fields[11:15])
    return (user + system) / machine.TICKS, (child_user + child_system) / machine.TICKS


def namespaces(pids: Iterable[int]) -> set[str]:
    """Those in which these processes live and we do not."""
    found: set[str] = set()
    for pid in pids:
        for kind in (*NAMESPACES, "pid_for_children"):
            try:
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
            except OSError:
                continue
    return found - {os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}


def cgroups(supervisor: int, spawner: int) -> int:
    """Directories below the server's own cgroups, in all hierarchies."""
    count = 0
    for folder, names, _ in os.walk("/sys/fs/cgroup"):
        mine = [name for name in names if name in (f"sandrun-{supervisor}", f"sandrun-{spawner}")]
        for name in mine:
            count += sum(len(below) for _, below, _ in os.walk(os.path.join(folder, name)))
        names[:] = [name for name in names if not name.startswith("sandrun-")]
    return count


def kernel_cgroups() -> dict[str, int]:
    """How many the kernel holds of each controller, dead ones that are still referenced included: /proc/cgroups."""
    rows = (line.split() for line in _read("/proc/cgroups").splitlines() if not line.startswith("#"))
    return {row[0]: int(row[2]) for row in rows if row[0] in ("memory", "pids", "cpuacct")}


def slab_bytes() -> int:
    return machine.meminfo()["Slab"]


def slab_objects() -> dict[str, int]:
    """Active objects of the kernel's caches that a sandbox uses; {} where we may not look."""
    found = {}
    for line in _read("/proc/slabinfo").splitlines():
        words = line.split()
        if words and words[0] in SLABS:
            found[words[0]] = int(words[1])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What a server holds at one moment.

    Attributes:
        sandboxes: those that live; `processes`, `namespaces` and `cgroups` are without theirs where they can be told
            apart, see `count`.
        pss: bytes of supervisor, spawner, api and zygotes; `sandbox_pss` of the rest.
    """

    processes: int
    sandboxes: int
    sandbox_processes: int
    namespaces: int
    sandbox_namespaces: int
    cgroups: int
    mounts: int
    descriptors: dict[str, int]
    pss: int
    sandbox_pss: int
    slab: int
    kernel_cgroups: dict[str, int]
    slabs: dict[str, int]


def count(supervisor: int) -> Holdings:
    members = tree(supervisor)
    server = [p for p in members if p.part != "sandbox"]
    inside = [p for p in members if p.part == "sandbox"]
    zygotes = {p.pid for p in server if p.part == "zygote"}
    boxes = [p for p in inside if p.parent in zygotes]
    spawner = next((p.pid for p in server if p.part == "spawner"), 0)
    own = namespaces(p.pid for p in server)
    held: dict[str, int] = {}
    mounts = 0
    for p in server:
        held[p.part] = held.get(p.part, 0) + descriptors(p.pid)
        mounts += _read(f"/proc/{p.pid}/mountinfo").count("\n")
    return Holdings(
        processes=len(server),
        sandboxes=len(boxes),
        sandbox_processes=len(inside),
        namespaces=len(own),
        sandbox_namespaces=len(namespaces(p.pid for p in inside) - own),
        cgroups=cgroups(supervisor, spawner),
        mounts=mounts + Path("/proc/self/mountinfo").read_text().count("\n"),
        descriptors=held,
        pss=pss_bytes(p.pid for p in server),
        sandbox_pss=pss_bytes(p.pid for p in inside),
        slab=slab_bytes(),
        kernel_cgroups=kernel_cgroups(),
        slabs=slab_objects(),
    )


def settled(supervisor: int, seconds: float) -> Holdings:
    """`count` once the number of sandboxes has not changed for `seconds` / 4, or after `seconds`."""
    end = time.monotonic() + seconds
    last, since = -1, time.monotonic()
    while time.monotonic() < end:
        members = tree(supervisor)
        zygotes = {p.pid for p in members if p.part == "zygote"}
        now = sum(p.parent in zygotes for p in members)
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > seconds / 4:
            break
        time.sleep(seconds / 40)
    return count(supervisor)


def until(true: Callable[[], bool], seconds: float, step: float = 0.02) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return bool(true())
        time.sleep(step)
    return True
