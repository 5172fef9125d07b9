"""Control groups: one flat cgroup a sandbox, on cgroup v1, v2 and hybrid hosts.

    <own cgroup>/                   per hierarchy; on v2 the server itself moves to <own cgroup>/own first
        sandrun-<pid>/              one server's tree; flock(2) on the directory says that its owner lives
            z0/                     one zygote's subtree
                own/                the zygote
                j17/                a sandbox

What is used from where:

    memory, pids        the v1 hierarchy if the controller is mounted there, else v2
    CPU time            v2 cpu.stat, which needs no controller; pure v1: cpuacct.usage
    CPU share           v1 cpu if there are limits on v1, else v2 cpu: the same for each sandbox; used where it is
    freeze and kill     v2 cgroup.freeze and cgroup.kill, which need no controller; pure v1: the freezer and SIGKILL

A process enters by writing "0" to v1 `tasks` descriptors (`cgroup.procs` takes a lock that stalls for an RCU grace
period) and by clone3(CLONE_INTO_CGROUP) on v2. See cgroups(7), cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable
from typing import Self

from sandrun.errors import MissingLayer
from sandrun.linux.hierarchy import (
    DIRECTORY,
    OWN,
    PREFIX,
    RETRY_SECONDS,
    Hierarchy,
    detect,
    enable_below,
    end_trees,
    enter_leaf,
    kill_all,
    remove_leftovers,
    undelegated,
    write,
    write_file,
)

__all__ = ["Cgroup", "Cgroups", "Group", "detect", "enter_leaf", "remove_leftovers", "swap_active", "undelegated"]

LAYERS = ("memory", "pids", "cpu")
POLLIN, POLLPRI = 1, 2  # <poll.h>
PAGE = os.sysconf("SC_PAGE_SIZE")

_UNIT = "systemd-run --scope" if os.geteuid() == 0 else "systemd-run --user --scope"
DELEGATE = f'Fix: run in a delegated unit: {_UNIT} -p Delegate=yes COMMAND (docs/operating.md, "cgroups")'
_NO_SWAP = "Fix: swapoff -a, or boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1)"


def swap_active() -> bool:
    """True if the host could write a page to a swap device."""
    try:
        fd = os.open("/proc/swaps", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # a kernel without swap
    try:
        return os.read(fd, 4096).count(b"\n") > 1  # the first line is a heading
    finally:
        os.close(fd)


class Cgroups:
    """One server's cgroups. `close()`, or leaving the `with` block, ends and removes all of them.

    Attributes:
        mode: "v2", "v1", "hybrid" or "none"; with "none" every operation does nothing and usage is unknown.
        hierarchy: where things are.
        missing: the layers out of memory, pids, cpu, swap that are not in force (they were waived).
    """

    def __init__(self, hierarchy: Hierarchy, name: str, directories: list[int], missing: frozenset[str]) -> None:
        self.mode = hierarchy.mode
        self.hierarchy = hierarchy
        self.missing = missing
        self.name = name
        self.directories = directories
        self.groups: dict[str, Group] = {}
        purposes = ("memory", "pids", "cpu", "control")
        self.memory, self.pids, self.cpu, self.control = (hierarchy.where.get(purpose, -1) for purpose in purposes)
        self.unified = next((index for index, tree in enumerate(hierarchy.trees) if tree.version == 2), -1)
        self.memory_v2 = self.memory >= 0 and self.memory == self.unified
        self.cpu_v2 = self.cpu >= 0 and self.cpu == self.unified
        self.control_v2 = self.control >= 0 and self.control == self.unified
        self.share = hierarchy.where.get("share", self.unified)
        self.share_file, self.small_share = ("cpu.shares", 256) if "share" in hierarchy.where else ("cpu.weight", 25)
        self.has_swap_max = self.memory_v2 and self._has(self.memory, "memory.swap.max")
        self.has_memsw = not self.memory_v2 and self._has(self.memory, "memory.memsw.limit_in_bytes")
        self.memory_peak = "memory.peak" if self.memory_v2 else "memory.max_usage_in_bytes"
        self.has_memory_peak = self._has(self.memory, self.memory_peak)  # v2: Linux 5.19
        self.has_tasks_peak = self._has(self.pids, "pids.peak")  # Linux 6.1

    @classmethod
    def create(cls, waived: Iterable[str] = ()) -> Cgroups:
        """Make this server's tree, after moving the server out of the way where v2 asks for it.

        Raises: MissingLayer for one of memory, pids, cpu, swap that cannot be had and is not in `waived`.
        """
        waived = frozenset(waived)
        hierarchy = detect()
        try:
            try:
                return cls._create(hierarchy, waived)
            except MissingLayer:
                if hierarchy.mode != "hybrid":
                    raise
                # the v2 tree may be read-only: freezer and cpuacct then
                return cls._create(detect(use_v2=False), waived)
        except MissingLayer:
            if not waived.issuperset(LAYERS):
                raise
            return cls._create(Hierarchy("none", (), {}), waived)

    @classmethod
    def _create(cls, hierarchy: Hierarchy, waived: frozenset[str]) -> Cgroups:
        missing = _check_layers(hierarchy, waived)
        needed = next((layer for layer in LAYERS if layer not in waived), "cgroup")
        directory = undelegated(hierarchy)
        if directory is not None:
            raise MissingLayer(needed, f"cgroup {directory} belongs to systemd and is not delegated to us", DELEGATE)
        directories: list[int] = []
        try:
            enter_leaf(hierarchy)
            enable_below(hierarchy, "")
            name, directories = _make_root(hierarchy)
            self = cls(hierarchy, name, directories, missing)
            enable_below(hierarchy, f"/{name}")
            self._close_swap(waived)
        except OSError as error:
            if directories:
                self.close()
            bases = ", ".join(tree.base for tree in hierarchy.trees)
            raise MissingLayer(needed, f"cgroups below {bases} cannot be made: {error}", DELEGATE) from error
        except MissingLayer:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def group(self, name: str) -> Group:
        """Make the subtree of one zygote. Raises: OSError."""
        group = self.groups[name] = Group(self, name)
        return group

    def remove_leftovers(self) -> int:
        """End the trees of dead servers; ours stays, as we hold its lock. Returns: how many servers' trees are gone."""
        return remove_leftovers(self.hierarchy)

    def close(self) -> None:
        """End and remove everything. Raises: OSError EBUSY if something still lives after 2 s."""
        for group in self.groups.values():
            group.close_files()
        self.groups.clear()
        directories, self.directories = self.directories, []
        try:
            if directories:
                end_trees([(tree, f"{tree.base}/{self.name}") for tree in self.hierarchy.trees])
        finally:
            for directory in directories:  # last, as the lock keeps others from removing it at the same time
                os.close(directory)

    def swap_closed(self) -> bool:
        """True if no page of a sandbox can reach a swap device: there is none, or v2 memory.swap.max is 0."""
        return self.has_swap_max or not swap_active()

    def _has(self, index: int, file: str) -> bool:
        """True if the kernel has this file: some came late, some need swap accounting."""
        if index < 0:
            return False
        try:
            os.stat(file, dir_fd=self.directories[index])
        except FileNotFoundError:
            return False
        return True

    def _close_swap(self, waived: frozenset[str]) -> None:
        if self.memory_v2:
            own = f"{self.hierarchy.trees[self.memory].base}/{OWN}/memory.swap.max"
            if self.has_swap_max and os.path.exists(own):
                write_file(own, "0")  # the server holds uploads and logs of jobs
        elif self.memory >= 0:
            # children inherit both; below a parent with oom_kill_disable a job would hang at its limit
            for file in ("memory.swappiness", "memory.oom_control"):
                if self._has(self.memory, file):
                    write_file(file, "0", directory=self.directories[self.memory])
        if not self.swap_closed():
            if "swap" not in waived:
                details = f"the host has active swap and its cgroups ({self.mode}) cannot keep jobs out of it"
                raise MissingLayer("swap", details, _NO_SWAP)
            self.missing |= {"swap"}


class Group:
    """One zygote's subtree.

    Attributes:
        own: the cgroup of the zygote itself.
    """

    def __init__(self, cgroups: Cgroups, name: str) -> None:
        self.cgroups = cgroups
        self.name = name
        self.owner: tuple[int, int] | None = None
        self.directories: list[int] = []
        self.members: dict[str, Cgroup] = {}
        try:
            for parent in cgroups.directories:
                os.mkdir(name, 0o755, dir_fd=parent)
                self.directories.append(os.open(name, DIRECTORY, dir_fd=parent))
            enable_below(cgroups.hierarchy, f"/{cgroups.name}/{name}")
            self.own = self.create(OWN)
        except BaseException:
            self.close()
            raise

    def chown(self, uid: int, gid: int) -> None:
        """Let `uid` start processes here: it gets `cgroup.procs` of the subtree and of all sandboxes made from now on.

        clone3(CLONE_INTO_CGROUP) asks for write access to that file of the new cgroup and of the common ancestor.
        Without CAP_CHOWN the files become writable for all; another user still lacks the common ancestor's file.
        Raises: OSError.
        """
        self.owner = (uid, gid)
        if self.cgroups.unified >= 0:
            _give(self.directories[self.cgroups.unified], uid, gid)

    def create(self, name: str) -> Cgroup:
        """Make the cgroup of one sandbox, without limits yet. Raises: OSError."""
        cgroup = self.members[name] = Cgroup(self, name)
        return cgroup

    def close(self, timeout: float = 2.0) -> None:
        """Kill the zygote and all its sandboxes, remove the subtree.

        Raises: OSError EBUSY if something still lives after `timeout` seconds.
        """
        self.close_files()
        self.cgroups.groups.pop(self.name, None)
        trees = self.cgroups.hierarchy.trees
        if trees:
            end_trees([(tree, f"{tree.base}/{self.cgroups.name}/{self.name}") for tree in trees], timeout)

    def close_files(self) -> None:
        """Close all descriptors of the subtree and of what is in it."""
        for cgroup in self.members.values():
            cgroup.close_files()
        self.members.clear()
        for directory in self.directories:
            os.close(directory)
        self.directories.clear()


class Cgroup:
    """The cgroup of one sandbox, or of a zygote. Files used more than once stay open until `remove()`.

    Attributes:
        name: of its directory in each hierarchy.
        oom_poll: the event to poll `oom_fd()` for.
    """

    __slots__ = (
        "_all", "_directories", "_files", "_group", "_memory_bytes", "_oom", "_removed", "_unified", "name", "oom_poll"
    )  # fmt: skip

    def __init__(self, group: Group, name: str) -> None:
        self.name = name
        self._group = group
        self._all = group.cgroups
        self._directories = group.directories
        self._files: dict[str, int] = {}
        self._memory_bytes = 0
        self._oom = -1
        self._unified = -1
        self._removed = 0
        self.oom_poll = POLLPRI if self._all.memory_v2 else POLLIN
        made = 0
        try:
            for directory in self._directories:
                os.mkdir(name, 0o755, dir_fd=directory)
                made += 1
            if self._all.unified >= 0:
                self._unified = os.open(name, DIRECTORY, dir_fd=self._directories[self._all.unified])
                if group.owner is not None:
                    _give(self._unified, *group.owner)
        except OSError:
            self.close_files()
            for directory in self._directories[:made]:
                os.rmdir(name, dir_fd=directory)
            raise

    def set_limits(self, memory_bytes: int, tasks: int) -> None:
        """Write the limits and read them back; the kernel may round memory down to pages. May be called again.

        Raises: OSError from the kernel, ERANGE if what is read back is not what was written.
        """
        all_ = self._all
        if all_.memory >= 0:
            rounded = memory_bytes // PAGE * PAGE
            if all_.memory_v2:
                self._set(all_.memory, "memory.max", memory_bytes, rounded)
                if all_.has_swap_max:
                    self._set(all_.memory, "memory.swap.max", 0, 0)
            else:
                files = ["memory.limit_in_bytes"]
                if all_.has_memsw:  # never below the memory limit (EINVAL), so it goes first upwards, last downwards
                    upwards = 0 < self._memory_bytes < memory_bytes
                    files.insert(0 if upwards else 1, "memory.memsw.limit_in_bytes")
                for file in files:
                    self._set(all_.memory, file, memory_bytes, rounded)
            self._memory_bytes = memory_bytes
        if all_.pids >= 0:
            self._set(all_.pids, "pids.max", tasks, tasks)

    def limits(self) -> dict[str, int | bool | None]:
        """What is in force, as the kernel tells it: memory_bytes and tasks (None: unlimited), swap_closed."""
        all_ = self._all
        memory_bytes = tasks = None
        swap_closed = not swap_active()
        if all_.memory >= 0:
            memory_bytes = _limit(self._read(all_.memory, "memory.max" if all_.memory_v2 else "memory.limit_in_bytes"))
            if all_.has_swap_max:
                swap_closed = swap_closed or self._read(all_.memory, "memory.swap.max").strip() == b"0"
        if all_.pids >= 0:
            tasks = _limit(self._read(all_.pids, "pids.max"))
        return {"memory_bytes": memory_bytes, "swap_closed": swap_closed, "tasks": tasks}

    def entry_fds(self) -> list[int]:
        """Descriptors to which a process of one thread writes b"0" to enter. The caller closes them. [] on pure v2."""
        fds: list[int] = []
        try:
            for index, directory in enumerate(self._directories):
                if index != self._all.unified:
                    fds.append(os.open(f"{self.name}/tasks", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def directory_fd(self) -> int | None:
        """The v2 directory for clone3(CLONE_INTO_CGROUP), None on pure v1. It stays ours."""
        return self._unified if self._unified >= 0 else None

    def cpu_usec(self) -> int | None:
        """CPU time used so far, user and system, in microseconds; None if nobody counts it."""
        all_ = self._all
        if all_.cpu < 0:
            return None
        if all_.cpu_v2:
            text = self._read(all_.cpu, "cpu.stat")  # "usage_usec N" is its first line
            return int(text[text.index(b" ") + 1 : text.index(b"\n")])
        return int(self._read(all_.cpu, "cpuacct.usage")) // 1000

    def usage(self) -> tuple[int | None, int | None, int | None, int | None]:
        """(cpu_usec, memory_peak bytes, memory_current bytes, tasks_peak); None where the kernel does not tell."""
        all_ = self._all
        memory_peak = memory_current = tasks_peak = None
        if all_.memory >= 0:
            file = "memory.current" if all_.memory_v2 else "memory.usage_in_bytes"
            memory_current = int(self._read(all_.memory, file))
            if all_.has_memory_peak:
                memory_peak = int(self._read(all_.memory, all_.memory_peak))
        if all_.has_tasks_peak:
            tasks_peak = int(self._read(all_.pids, "pids.peak"))
        return self.cpu_usec(), memory_peak, memory_current, tasks_peak

    def events(self) -> tuple[int, int]:
        """(processes killed for memory, forks refused for the task limit). Quietens `oom_fd()` until the next event.

        v1 tells of an OOM before it kills: after an event the first figure may stay 0 for a moment, so look again.
        """
        all_ = self._all
        oom_kills = refused = 0
        if self._oom >= 0:
            try:
                os.eventfd_read(self._oom)
            except BlockingIOError:
                pass
        if all_.memory >= 0:
            file = "memory.events" if all_.memory_v2 else "memory.oom_control"
            oom_kills = _field(self._read(all_.memory, file), b"oom_kill")
        if all_.pids >= 0:
            refused = _field(self._read(all_.pids, "pids.events"), b"max")
        return oom_kills, refused

    def oom_fd(self) -> int | None:
        """A descriptor that polls ready, for `oom_poll`, when memory ran out; it stays ours. None without a limit.

        On v2 other memory events make it ready too: `events()` tells which it was.
        """
        all_ = self._all
        if all_.memory < 0:
            return None
        if all_.memory_v2:
            self._read(all_.memory, "memory.events")  # only what comes after a read is news
            return self._files["memory.events"]
        if self._oom < 0:
            self._oom = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._read(all_.memory, "memory.oom_control")
            request = f"{self._oom} {self._files['memory.oom_control']}"
            write_file(f"{self.name}/cgroup.event_control", request, directory=self._directories[all_.memory])
        return self._oom

    def kill(self, timeout: float = 2.0) -> None:
        """SIGKILL all processes inside, frozen ones too. On v2 and hybrid one write, which does not wait for their end.

        Pure v1: frozen first, so that a fork bomb stands still, and thawed after the signal, as frozen v1 tasks do not
        die; repeated until empty. Raises: OSError; EBUSY if v1 tasks still live after `timeout` seconds.
        """
        all_ = self._all
        if all_.control < 0:
            return
        if all_.control_v2:
            write_file("cgroup.kill", "1", directory=self._unified)
            return
        tree = all_.hierarchy.trees[all_.control]
        procs = f"{tree.base}/{all_.name}/{self._group.name}/{self.name}/cgroup.procs"
        deadline = time.monotonic() + timeout
        while True:
            self.freeze(True)
            some = kill_all(procs)
            self.freeze(False)
            if not some:
                return
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"cgroup {self.name}: processes survive SIGKILL")
            time.sleep(RETRY_SECONDS)

    def give_way(self) -> None:
        """Have a quarter of the CPU time that a new sandbox gets, where CPU time is shared out. Raises: OSError."""
        all_ = self._all
        if all_.share >= 0:
            try:
                file = f"{self.name}/{all_.share_file}"
                write_file(file, str(all_.small_share), directory=self._directories[all_.share])
            except FileNotFoundError:
                pass  # v2 without its cpu controller

    def freeze(self, frozen: bool) -> None:
        """Stop, or continue, all processes inside; the kernel finishes it after the call. Raises: OSError."""
        all_ = self._all
        if all_.control < 0:
            return
        file = "cgroup.freeze" if all_.control_v2 else "freezer.state"
        fd = self._files.get(file)
        if fd is None:
            fd = self._open(all_.control, file, os.O_WRONLY)
        values = (b"0", b"1") if all_.control_v2 else (b"THAWED", b"FROZEN")
        write(fd, file, values[frozen])

    def populated(self) -> bool:
        """True if a process lives inside. False for mode "none", where nobody knows."""
        if self._unified >= 0:
            return _field(self._read(self._all.unified, "cgroup.events"), b"populated") != 0
        if not self._directories:
            return False
        # opened anew each time: v1 shows a reader of an open descriptor the list of a second ago
        fd = os.open(f"{self.name}/tasks", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directories[0])
        try:
            return os.read(fd, 64) != b""
        finally:
            os.close(fd)

    def remove(self, timeout: float = 2.0) -> None:
        """Remove the cgroup when its last process is reaped. Without success it may be called again.

        Raises: OSError EBUSY if that has not happened after `timeout` seconds (0: one attempt).
        """
        self.close_files()
        deadline = time.monotonic() + timeout
        while self._removed < len(self._directories):
            try:
                os.rmdir(self.name, dir_fd=self._directories[self._removed])
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
                time.sleep(RETRY_SECONDS)
                continue
            self._removed += 1
        self._group.members.pop(self.name, None)

    def close_files(self) -> None:
        """Close all descriptors; the cgroup itself stays."""
        for fd in (*self._files.values(), self._oom, self._unified):
            if fd >= 0:
                os.close(fd)
        self._files.clear()
        self._oom = self._unified = -1

    def _set(self, index: int, file: str, value: int, expected: int) -> None:
        fd = os.open(f"{self.name}/{file}", os.O_RDWR | os.O_CLOEXEC, dir_fd=self._directories[index])
        try:
            write(fd, file, b"%d" % value)
            found = os.pread(fd, 64, 0).strip()
        finally:
            os.close(fd)
        if found != b"%d" % expected:
            raise OSError(errno.ERANGE, f"cgroup {file}: wrote {value}, reads {found.decode()}")

    def _open(self, index: int, file: str, flags: int) -> int:
        fd = os.open(f"{self.name}/{file}", flags | os.O_CLOEXEC, dir_fd=self._directories[index])
        self._files[file] = fd
        return fd

    def _read(self, index: int, file: str) -> bytes:
        fd = self._files.get(file)
        if fd is None:
            fd = self._open(index, file, os.O_RDONLY)
        return os.pread(fd, 4096, 0)


def _check_layers(hierarchy: Hierarchy, waived: frozenset[str]) -> frozenset[str]:
    """The layers that this host does not have, if all of them are waived."""
    missing: set[str] = set()
    needs = {
        "memory": (("memory",), "memory controller"),
        "pids": (("pids",), "pids controller"),
        "cpu": (("cpu", "control"), "cpuacct and freezer controllers"),
    }
    for layer, (purposes, what) in needs.items():
        if not all(purpose in hierarchy.where for purpose in purposes):
            if layer not in waived:
                where = ", ".join(tree.base for tree in hierarchy.trees) or "any mounted hierarchy"
                raise MissingLayer(layer, f"no {what} in {where}", DELEGATE)
            missing.add(layer)
    return frozenset(missing)


def _make_root(hierarchy: Hierarchy) -> tuple[str, list[int]]:
    """Make and lock `sandrun-<pid>` in each hierarchy. A leftover or another PID namespace may have taken the name."""
    for attempt in range(100):
        name = f"{PREFIX}{os.getpid()}" + (f"-{attempt}" if attempt else "")
        directories: list[int] = []
        made: list[str] = []
        try:
            for tree in hierarchy.trees:
                path = f"{tree.base}/{name}"
                os.mkdir(path, 0o755)
                made.append(path)
                directories.append(os.open(path, DIRECTORY))
                fcntl.flock(directories[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(directories[-1]), os.stat(path)):
                    raise FileExistsError(errno.EEXIST, "another server has taken the name", path)
            return name, directories
        except OSError as error:
            for path in made:
                try:
                    os.rmdir(path)
                except OSError:
                    pass
            for directory in directories:
                os.close(directory)
            # between mkdir and flock, another server that starts may have taken ours for a leftover
            if not isinstance(error, FileExistsError | BlockingIOError | FileNotFoundError):
                raise
    raise OSError(errno.EEXIST, f"cgroup {PREFIX}{os.getpid()}: no free name")


def _give(directory: int, uid: int, gid: int) -> None:
    try:
        os.chown("cgroup.procs", uid, gid, dir_fd=directory)
    except PermissionError:
        os.chmod("cgroup.procs", 0o666, dir_fd=directory)


def _field(text: bytes, name: bytes) -> int:
    """The number behind `name` in a flat keyed file; 0 if it is not there."""
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    return 0


def _limit(text: bytes) -> int | None:
    """None for "max", and for v1's way to say so, the largest signed number of pages."""
    text = text.strip()
    return None if text == b"max" or int(text) >= 1 << 62 else int(text)
