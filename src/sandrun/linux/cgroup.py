"""Control groups: one flat cgroup a sandbox, on cgroup v1, v2 and hybrid hosts.

    <own cgroup>/                   per hierarchy; on v2 the server itself moves to <own cgroup>/own first
        sandrun-<pid>/              one server's tree; flock(2) on the directory says that its owner lives
            z0/                     one zygote's subtree
                own/                the zygote
                j17/                a sandbox

What is used from where:

    memory, pids        the v1 hierarchy if the controller is mounted there, else v2
    CPU time            v2 cpu.stat, which needs no controller; pure v1: cpuacct.usage
    freeze and kill     v2 cgroup.freeze and cgroup.kill, which need no controller; pure v1: the freezer and SIGKILL

A process enters by writing "0" to v1 `tasks` descriptors (`cgroup.procs` takes a lock that stalls for an RCU grace period) and by
clone3(CLONE_INTO_CGROUP) on v2. See cgroups(7), cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import time
from collections.abc import Iterable

from sandrun.errors import MissingLayer

PREFIX = "sandrun-"
OWN = "own"
LAYERS = ("memory", "pids", "cpu")
POLLIN, POLLPRI = 1, 2  # <poll.h>
PAGE = os.sysconf("SC_PAGE_SIZE")
RETRY_SECONDS = 0.001  # between two attempts at a cgroup that is still emptying

_LEFTOVER = re.compile(PREFIX + r"[0-9]+(-[0-9]+)?")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_DELEGATE = 'run it in a delegated unit: systemd-run --scope -p Delegate=yes COMMAND (docs/operating.md, "cgroups")'


class Tree:
    """One mounted hierarchy.

    Attributes:
        version: 1 or 2.
        controllers: v1: those mounted together here; v2: those that may be enabled below `base`.
        mount: where the hierarchy is mounted.
        base: the directory of this process's own cgroup; on v2, of the parent of `own/` once moved there.
    """

    __slots__ = ("base", "controllers", "mount", "version")

    def __init__(self, version: int, controllers: frozenset[str], mount: str, base: str) -> None:
        self.version = version
        self.controllers = controllers
        self.mount = mount
        self.base = base

    def __repr__(self) -> str:
        return f"Tree(v{self.version}, {','.join(sorted(self.controllers))}, {self.base})"


class Hierarchy:
    """What this host offers.

    Attributes:
        mode: "v2", "v1", "hybrid" (memory or pids on v1, a v2 tree beside it) or "none".
        trees: those that a sandbox needs a directory in; no tree twice.
        where: for each of memory, pids, cpu (accounting), control (freeze and kill): an index into `trees`.
    """

    __slots__ = ("mode", "trees", "where")

    def __init__(self, mode: str, trees: tuple[Tree, ...], where: dict[str, int]) -> None:
        self.mode = mode
        self.trees = trees
        self.where = where


def detect(*, use_v2: bool = True) -> Hierarchy:
    """Read from /proc which hierarchies are mounted and where in them this process is. Nothing is changed."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mountinfo = file.read()
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        memberships = file.read()
    trees = find_trees(mountinfo, memberships)
    unified = next((tree for tree in trees if tree.version == 2), None) if use_v2 else None
    if unified is not None:
        unified.controllers = frozenset(_read_file(f"{unified.base}/cgroup.controllers").split())
    return choose([tree for tree in trees if tree.version == 1], unified)


def choose(v1: list[Tree], unified: Tree | None) -> Hierarchy:
    """Decide which hierarchy serves which purpose."""
    trees: list[Tree] = []
    where: dict[str, int] = {}

    def take(purpose: str, tree: Tree | None) -> None:
        if tree is not None:
            if tree not in trees:
                trees.append(tree)
            where[purpose] = trees.index(tree)

    def on_v1(controller: str) -> Tree | None:
        return next((tree for tree in v1 if controller in tree.controllers), None)

    for controller in ("memory", "pids"):
        tree = on_v1(controller)
        if tree is None and unified is not None and controller in unified.controllers:
            tree = unified
        take(controller, tree)
    limits_on_v1 = any(tree.version == 1 for tree in trees)
    take("cpu", unified or on_v1("cpuacct"))
    take("control", unified or on_v1("freezer"))
    if unified is not None:
        mode = "hybrid" if limits_on_v1 else "v2"
    else:
        mode = "v1" if trees else "none"
    return Hierarchy(mode, tuple(trees), where)


def find_trees(mountinfo: str, memberships: str) -> list[Tree]:
    """Match the text of /proc/self/mountinfo with that of /proc/self/cgroup, proc_pid_mountinfo(5) and cgroups(7).

    A mount may show only a part of its hierarchy (a bind mount, or a mount made in another cgroup namespace): its root field
    is taken off the membership path, and a mount that does not show our own cgroup is passed over.
    """
    paths: dict[frozenset[str], str] = {}
    for line in memberships.splitlines():
        number, names, path = line.split(":", 2)
        paths[frozenset() if number == "0" and not names else frozenset(names.split(","))] = path
    trees: list[Tree] = []
    seen: set[frozenset[str]] = set()
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(" "), filesystem.split(" ")
        if kind[0] not in ("cgroup", "cgroup2"):
            continue
        options = frozenset(kind[-1].split(","))
        version = 2 if kind[0] == "cgroup2" else 1
        key = frozenset() if version == 2 else next((names for names in paths if names and names <= options), None)
        if key is None or key not in paths or key in seen:
            continue
        root, point = _unescape(fields[3]), _unescape(fields[4])
        below = _below(paths[key], root)
        if below is None:
            continue
        seen.add(key)
        if version == 2 and below.endswith("/" + OWN):
            below = below[: -len(OWN) - 1]
        trees.append(Tree(version, key, point, (point + below).rstrip("/") or "/"))
    return trees


def _below(path: str, root: str) -> str | None:
    """The part of `path` below `root`, "" or with a leading slash; None if it is not below."""
    root = root.rstrip("/")
    path = path.rstrip("/")
    if path == root:
        return ""
    if path.startswith(root + "/") and "/../" not in path + "/":
        return path[len(root) :]
    return None


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def is_delegated(tree: Tree) -> bool:
    """True if nobody else manages what is below `tree.base`: no systemd here, or its unit has Delegate=yes.

    systemd marks a delegated unit by an extended attribute of its directory, systemd.resource-control(5).
    """
    if not os.path.isdir("/run/systemd/system"):
        return True
    directory = tree.base
    while directory.startswith(tree.mount) and directory != tree.mount:
        if directory.endswith((".service", ".scope", ".slice")):
            break
        directory = os.path.dirname(directory)
    for name in ("trusted.delegate", "user.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            pass
    return False


def enter_leaf(hierarchy: Hierarchy) -> None:
    """On v2, move all processes of our own cgroup to its child `own/`; elsewhere, do nothing.

    A v2 cgroup with processes cannot give controllers to its children (cgroup-v2.rst, "No Internal Process Constraint"). The
    real root is free of that rule.
    Raises: OSError from the kernel.
    """
    for tree in hierarchy.trees:
        if tree.version != 2 or not _limits_here(hierarchy, tree) or not os.path.exists(f"{tree.base}/cgroup.type"):
            continue
        leaf = f"{tree.base}/{OWN}"
        try:
            os.mkdir(leaf, 0o755)
        except FileExistsError:
            pass
        for _ in range(20):  # a process may fork between the list and its move
            pids = _read_file(f"{tree.base}/cgroup.procs").split()
            if not pids:
                break
            for pid in pids:
                try:
                    _write_file(f"{leaf}/cgroup.procs", pid)
                except ProcessLookupError:
                    pass


def _limits_here(hierarchy: Hierarchy, tree: Tree) -> bool:
    return any(hierarchy.trees[hierarchy.where[name]] is tree for name in ("memory", "pids") if name in hierarchy.where)


def swap_active() -> bool:
    """True if the host could write a page to a swap device."""
    try:
        return len(_read_file("/proc/swaps").splitlines()) > 1
    except FileNotFoundError:
        return False  # a kernel without swap


def remove_leftovers(hierarchy: Hierarchy) -> int:
    """Kill what is in the trees of dead servers next to ours, and remove these trees.

    Returns: how many directories `sandrun-*` are gone, those of one server counted once a hierarchy.
    """
    removed = 0
    for tree in hierarchy.trees:
        for name in _directories(tree.base):
            if _LEFTOVER.fullmatch(name) is None:
                continue
            path = f"{tree.base}/{name}"
            try:
                directory = os.open(path, _DIRECTORY)
            except OSError:
                continue
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _kill_below(tree, path)
                _remove_below(path)
                removed += 1
            except BlockingIOError:
                pass  # its owner lives
            except FileNotFoundError:
                pass  # its owner, or another server that starts now, was quicker
            finally:
                os.close(directory)
    return removed


def _kill_below(tree: Tree, path: str) -> None:
    if tree.version == 2:
        _write_file(f"{path}/cgroup.kill", "1")
        return
    directories = [path, *_walk(path)]
    for directory in directories:
        kill_all(f"{directory}/cgroup.procs")
    if "freezer" in tree.controllers:
        for directory in directories:
            _write_file(f"{directory}/freezer.state", "THAWED")


def _remove_below(path: str, timeout: float = 2.0) -> None:
    for directory in [*reversed(_walk(path)), path]:
        _remove_directory(directory, None, timeout)


def _walk(path: str) -> list[str]:
    found: list[str] = []
    for name in _directories(path):
        found.append(f"{path}/{name}")
        found.extend(_walk(f"{path}/{name}"))
    return found


def _directories(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def kill_all(procs: str | int) -> bool:
    """SIGKILL every process that a `cgroup.procs` file (path or open descriptor) lists. True if there was none.

    A pid can be reused between list and kill: it is pinned by a pidfd, and signalled only if the list still has it after that.
    """

    def listed() -> set[int]:
        text = _read_file(procs) if isinstance(procs, str) else os.pread(procs, 1 << 20, 0).decode()
        return {int(pid) for pid in text.split()}

    pinned: dict[int, int] = {}
    try:
        for pid in listed():
            if pid > 1:  # 0: a process of a PID namespace that we do not see
                try:
                    pinned[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    pass
        if not pinned:
            return True
        for pid in listed() & pinned.keys():
            try:
                signal.pidfd_send_signal(pinned[pid], signal.SIGKILL)
            except ProcessLookupError:
                pass
        return False
    finally:
        for pidfd in pinned.values():
            os.close(pidfd)


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
        where, trees = hierarchy.where, hierarchy.trees
        self.memory, self.pids, self.cpu, self.control = (
            where.get(purpose, -1) for purpose in ("memory", "pids", "cpu", "control")
        )
        self.unified = next((index for index, tree in enumerate(trees) if tree.version == 2), -1)
        self.memory_v2 = self.memory >= 0 and self.memory == self.unified
        self.cpu_v2 = self.cpu >= 0 and self.cpu == self.unified
        self.control_v2 = self.control >= 0 and self.control == self.unified
        # which of the files that came with later kernels, or with swap accounting, are there
        self.has_swap_max = self.memory_v2 and self._has(self.memory, "memory.swap.max")
        self.has_memsw = not self.memory_v2 and self._has(self.memory, "memory.memsw.limit_in_bytes")
        self.peak_file = self._first(self.memory, "memory.peak" if self.memory_v2 else "memory.max_usage_in_bytes")
        self.tasks_peak_file = self._first(self.pids, "pids.peak")

    @classmethod
    def create(cls, waived: Iterable[str] = ()) -> Cgroups:
        """Make this server's tree, after moving the server out of the way where v2 asks for it.

        Raises: MissingLayer for one of memory, pids, cpu, swap that cannot be had and is not in `waived`; OSError.
        """
        waived = frozenset(waived)
        if waived.issuperset(LAYERS):
            return cls(Hierarchy("none", (), {}), "", [], frozenset((*LAYERS, "swap")))
        hierarchy = detect()
        try:
            return cls._create(hierarchy, waived)
        except MissingLayer:
            if hierarchy.mode != "hybrid":
                raise
            return cls._create(detect(use_v2=False), waived)  # the v2 tree may be read-only: freezer and cpuacct then

    @classmethod
    def _create(cls, hierarchy: Hierarchy, waived: frozenset[str]) -> Cgroups:
        missing = _check_layers(hierarchy, waived)
        for tree in hierarchy.trees:
            if tree.version == 2 and _limits_here(hierarchy, tree) and not is_delegated(tree):
                raise MissingLayer(
                    next(layer for layer in LAYERS if layer not in waived),
                    f"cgroup {tree.base} belongs to systemd and is not delegated",
                    f"Fix: {_DELEGATE}",
                )
        try:
            enter_leaf(hierarchy)
            _enable_below(hierarchy, [tree.base for tree in hierarchy.trees])
            name, directories = _make_root(hierarchy)
        except OSError as error:
            layer = next(layer for layer in LAYERS if layer not in waived)
            bases = ", ".join(tree.base for tree in hierarchy.trees)
            raise MissingLayer(layer, f"no cgroup can be made below {bases}: {error}", f"Fix: {_DELEGATE}") from error
        self = cls(hierarchy, name, directories, missing)
        try:
            _enable_below(hierarchy, [f"{tree.base}/{name}" for tree in hierarchy.trees])
            self._close_swap(waived)
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Cgroups:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def group(self, name: str) -> Group:
        """Make the subtree of one zygote. Raises: OSError."""
        group = self.groups[name] = Group(self, name)
        return group

    def remove_leftovers(self) -> int:
        """See the function of that name; our own tree is locked by ourselves, so it stays."""
        return remove_leftovers(self.hierarchy)

    def close(self) -> None:
        """End and remove everything. Raises: OSError EBUSY if something still lives after 2 s."""
        for group in list(self.groups.values()):
            group.close()
        for tree, directory in zip(self.hierarchy.trees, self.directories, strict=True):
            path = f"{tree.base}/{self.name}"
            try:
                _kill_below(tree, path)
                _remove_below(path)
            except FileNotFoundError:
                pass
            os.close(directory)  # last, as the lock keeps others from removing it at the same time
        self.directories = []
        self.hierarchy = Hierarchy("none", (), {})

    def _has(self, index: int, file: str) -> bool:
        if index < 0:
            return False
        try:
            os.stat(file, dir_fd=self.directories[index])
        except FileNotFoundError:
            return False
        return True

    def _first(self, index: int, file: str) -> str | None:
        return file if self._has(index, file) else None

    def _close_swap(self, waived: frozenset[str]) -> None:
        if self.memory >= 0 and not self.memory_v2:
            directory = self.directories[self.memory]
            # children inherit both; a parent with oom_kill_disable would let a job hang at its limit
            for file, value in (("memory.swappiness", "0"), ("memory.oom_control", "0")):
                if self._has(self.memory, file):
                    _write_at(directory, file, value)
        if not self.swap_closed() and "swap" not in self.missing:
            if "swap" not in waived:
                raise MissingLayer(
                    "swap",
                    f"the host has active swap and cgroup {self.mode} cannot keep jobs out of it",
                    "Fix: swapoff -a, or boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1)",
                )
            self.missing |= {"swap"}

    def swap_closed(self) -> bool:
        """True if no page of a sandbox can reach a swap device: there is none, or v2 memory.swap.max is 0."""
        return self.has_swap_max or not swap_active()


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
        self._removed = 0
        for parent in cgroups.directories:
            os.mkdir(name, 0o755, dir_fd=parent)
            self.directories.append(os.open(name, _DIRECTORY, dir_fd=parent))
        trees = cgroups.hierarchy.trees
        _enable_below(cgroups.hierarchy, [f"{tree.base}/{cgroups.name}/{name}" for tree in trees])
        self.own = self.create(OWN)

    def chown(self, uid: int, gid: int) -> None:
        """Let `uid` start processes in this subtree: give it `cgroup.procs` of the subtree and of all sandboxes to come.

        clone3(CLONE_INTO_CGROUP) asks for write access to that file of the new cgroup and of the common ancestor. Without
        CAP_CHOWN the files become writable for everybody; another user still lacks the common ancestor's file.
        Raises: OSError.
        """
        self.owner = (uid, gid)
        unified = self.cgroups.unified
        if unified >= 0:
            _give(self.directories[unified], "cgroup.procs", uid, gid)
            for name in self.members:
                _give(self.directories[unified], f"{name}/cgroup.procs", uid, gid)

    def create(self, name: str) -> Cgroup:
        """Make the cgroup of one sandbox, without limits yet. Raises: OSError."""
        cgroup = Cgroup(self, name)
        self.members[name] = cgroup
        return cgroup

    def kill(self) -> None:
        """Kill the zygote and all its sandboxes. Raises: OSError."""
        for cgroup in list(self.members.values()):
            cgroup.kill()

    def close(self, timeout: float = 2.0) -> None:
        """Kill all and remove the subtree. Raises: OSError EBUSY if something still lives after `timeout` seconds."""
        self.kill()
        for cgroup in list(self.members.values()):
            cgroup.remove(timeout)
        while self._removed < len(self.directories):
            parent = self.cgroups.directories[self._removed]
            _remove_directory(self.name, parent, timeout)
            os.close(self.directories[self._removed])
            self._removed += 1
        self.cgroups.groups.pop(self.name, None)


class Cgroup:
    """The cgroup of one sandbox, or of a zygote. Files used more than once stay open until `remove()`.

    Attributes:
        name: of its directory in each hierarchy.
        oom_poll: the event to poll `oom_fd()` for.
    """

    __slots__ = (
        "_all",
        "_directories",
        "_files",
        "_group",
        "_memory_bytes",
        "_oom",
        "_removed",
        "_unified",
        "name",
        "oom_poll",
    )

    def __init__(self, group: Group, name: str) -> None:
        self.name = name
        self._group = group
        self._all = group.cgroups
        self._directories = group.directories
        self._files: dict[str, int] = {}
        self._memory_bytes: int | None = None
        self._oom = -1
        self._unified = -1
        self._removed = 0
        self.oom_poll = POLLPRI if self._all.memory_v2 else POLLIN
        made = 0
        try:
            for directory in self._directories:
                os.mkdir(name, 0o755, dir_fd=directory)
                made += 1
            unified = self._all.unified
            if unified >= 0:
                self._unified = os.open(name, _DIRECTORY, dir_fd=self._directories[unified])
                if group.owner is not None:
                    _give(self._unified, "cgroup.procs", *group.owner)
        except OSError:
            self._close_files()
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
                if all_.has_memsw:
                    # the sum of memory and swap is never below the memory limit, EINVAL: the order depends on the direction
                    raised = self._memory_bytes is not None and memory_bytes > self._memory_bytes
                    files.insert(0 if raised else 1, "memory.memsw.limit_in_bytes")
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
        """Descriptors to which a process of one thread writes b"0" to enter; the caller owns and closes them. [] on pure v2."""
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
            memory_current = int(
                self._read(all_.memory, "memory.current" if all_.memory_v2 else "memory.usage_in_bytes")
            )
            if all_.peak_file is not None:
                memory_peak = int(self._read(all_.memory, all_.peak_file))
        if all_.tasks_peak_file is not None:
            tasks_peak = int(self._read(all_.pids, all_.tasks_peak_file))
        return self.cpu_usec(), memory_peak, memory_current, tasks_peak

    def events(self) -> tuple[int, int]:
        """(processes killed for memory, forks refused for the task limit). Makes `oom_fd()` quiet until the next event.

        v1 tells of an OOM before it kills: after an event the first figure may stay 0 for a moment, so look again.
        """
        all_ = self._all
        oom_kills = refused = 0
        if self._oom >= 0 and not all_.memory_v2:
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
        """A descriptor that polls ready, for `oom_poll`, when memory ran out; it stays ours. None without a memory limit.

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
            _write_at(self._directories[all_.memory], f"{self.name}/cgroup.event_control", request)
        return self._oom

    def kill(self, timeout: float = 2.0) -> None:
        """SIGKILL all processes inside, frozen ones too. On v2 and hybrid one write, which does not wait for their end.

        Pure v1: frozen first, so that a fork bomb stands still, and thawed after the signal, as frozen v1 tasks do not die;
        repeated until empty. Raises: OSError; EBUSY if v1 tasks still live after `timeout` seconds.
        """
        all_ = self._all
        if all_.control < 0:
            return
        if all_.control_v2:
            _write_at(self._unified, "cgroup.kill", "1")
            return
        deadline = time.monotonic() + timeout
        while True:
            self._read(all_.control, "cgroup.procs")
            self.freeze(True)
            empty = kill_all(self._files["cgroup.procs"])
            self.freeze(False)
            if empty:
                return
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"cgroup {self.name}: processes survive SIGKILL")
            time.sleep(RETRY_SECONDS)

    def freeze(self, frozen: bool) -> None:
        """Stop, or continue, all processes inside; the kernel finishes it after the call. Raises: OSError."""
        all_ = self._all
        if all_.control < 0:
            return
        file = "cgroup.freeze" if all_.control_v2 else "freezer.state"
        fd = self._files.get(file)
        if fd is None:
            fd = self._open(all_.control, file, os.O_RDWR)
        value = (b"1" if frozen else b"0") if all_.control_v2 else (b"FROZEN" if frozen else b"THAWED")
        _write(fd, file, value)

    def populated(self) -> bool:
        """True if a process lives inside. False for mode "none", where nobody knows."""
        all_ = self._all
        if not self._directories:
            return False
        if all_.unified >= 0:
            return _field(self._read(all_.unified, "cgroup.events"), b"populated") != 0
        return self._read(0, "tasks") != b""

    def remove(self, timeout: float = 2.0) -> None:
        """Remove the empty cgroup. Without success it may be called again.

        Raises: OSError EBUSY if a process still lives, or is not reaped, inside after `timeout` seconds.
        """
        self._close_files()
        while self._removed < len(self._directories):
            _remove_directory(self.name, self._directories[self._removed], timeout)
            self._removed += 1
        self._group.members.pop(self.name, None)

    def _set(self, index: int, file: str, value: int, expected: int) -> None:
        fd = os.open(f"{self.name}/{file}", os.O_RDWR | os.O_CLOEXEC, dir_fd=self._directories[index])
        try:
            _write(fd, file, b"%d" % value)
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

    def _close_files(self) -> None:
        for fd in (*self._files.values(), self._oom, self._unified):
            if fd >= 0:
                os.close(fd)
        self._files.clear()
        self._oom = self._unified = -1


def _check_layers(hierarchy: Hierarchy, waived: frozenset[str]) -> frozenset[str]:
    missing: frozenset[str] = frozenset()
    needs = {"memory": ("memory",), "pids": ("pids",), "cpu": ("cpu", "control")}
    for layer, purposes in needs.items():
        if not all(purpose in hierarchy.where for purpose in purposes):
            where = ", ".join(tree.base for tree in hierarchy.trees) or "any mounted hierarchy"
            what = {"memory": "memory controller", "pids": "pids controller", "cpu": "cpuacct or freezer controller"}[
                layer
            ]
            if layer not in waived:
                raise MissingLayer(layer, f"no {what} in {where}", f"Fix: {_DELEGATE}")
            missing |= {layer}
    return missing


def _make_root(hierarchy: Hierarchy) -> tuple[str, list[int]]:
    """Make and lock `sandrun-<pid>` in each hierarchy. Another pid namespace, or a leftover, may have taken the name."""
    for attempt in range(100):
        name = f"{PREFIX}{os.getpid()}" + (f"-{attempt}" if attempt else "")
        directories: list[int] = []
        made: list[str] = []
        try:
            for tree in hierarchy.trees:
                path = f"{tree.base}/{name}"
                os.mkdir(path, 0o755)
                made.append(path)
                directories.append(os.open(path, _DIRECTORY))
                fcntl.flock(directories[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(directories[-1]), os.stat(path)):
                    raise FileExistsError(errno.EEXIST, "removed as a leftover and made anew by another server", path)
            return name, directories
        except OSError as error:
            for directory in directories:
                os.close(directory)
            for path in made:
                try:
                    os.rmdir(path)
                except OSError:
                    pass
            # a server that starts now may have taken ours for a leftover between mkdir and flock
            if not isinstance(error, FileExistsError | BlockingIOError | FileNotFoundError):
                raise
    raise OSError(errno.EEXIST, f"cgroup {PREFIX}{os.getpid()}: no free name")


def _enable_below(hierarchy: Hierarchy, paths: list[str]) -> None:
    """On v2, give the controllers that we use to the children of `paths` (one for each tree); `cpu` only if it can be had."""
    for tree, path in zip(hierarchy.trees, paths, strict=True):
        if tree.version != 2:
            continue
        file = f"{path}/cgroup.subtree_control"
        enabled = set(_read_file(file).split())
        for controller in ("memory", "pids"):
            here = controller in hierarchy.where and hierarchy.trees[hierarchy.where[controller]] is tree
            if here and controller not in enabled:
                _write_file(file, f"+{controller}")
        if _limits_here(hierarchy, tree) and "cpu" in tree.controllers and "cpu" not in enabled:
            try:
                _write_file(file, "+cpu")
            except OSError:
                pass  # refused while real-time tasks run, and nothing here depends on it


def _give(directory: int, file: str, uid: int, gid: int) -> None:
    try:
        os.chown(file, uid, gid, dir_fd=directory)
    except PermissionError:
        os.chmod(file, 0o666, dir_fd=directory)


def _remove_directory(path: str, directory: int | None, timeout: float) -> None:
    """rmdir(2), again while it is EBUSY: a cgroup is busy until the last process in it is reaped."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            os.rmdir(path, dir_fd=directory)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(RETRY_SECONDS)


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


def _read_file(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts).decode()


def _write_file(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _write(fd, path, value.encode())
    finally:
        os.close(fd)


def _write_at(directory: int, file: str, value: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        _write(fd, file, value.encode())
    finally:
        os.close(fd)


def _write(fd: int, file: str, value: bytes) -> None:
    try:
        os.write(fd, value)
    except OSError as error:
        raise OSError(
            error.errno, f"cgroup {file}: cannot write {value.decode()}: {os.strerror(error.errno or 0)}"
        ) from None
