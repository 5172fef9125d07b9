"""Which cgroup hierarchies this host has, where in them we are, and trees of cgroups that a dead server left behind.

See cgroups(7), cgroup-v2.rst. `linux.cgroup` makes and uses the cgroups of one server.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import time

PREFIX = "sandrun-"
OWN = "own"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
RETRY_SECONDS = 0.001  # between two attempts at a cgroup that is still emptying

_LEFTOVER = re.compile(PREFIX + r"[0-9]+(-[0-9]+)?")


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
        where: for each of memory, pids, cpu (accounting), control (freeze and kill), and on v1 share (of CPU time, the
            same for each sandbox however many its processes; on v2 `enable_below` sees to it): an index into `trees`.
    """

    __slots__ = ("mode", "trees", "where")

    def __init__(self, mode: str, trees: tuple[Tree, ...], where: dict[str, int]) -> None:
        self.mode = mode
        self.trees = trees
        self.where = where

    def serves(self, tree: Tree, purpose: str) -> bool:
        """True if `purpose`, a key of `where`, is served by `tree`."""
        return purpose in self.where and self.trees[self.where[purpose]] is tree

    def limits_on(self, tree: Tree) -> bool:
        """True if `tree` serves limits, not only accounting or control."""
        return self.serves(tree, "memory") or self.serves(tree, "pids")


def detect(*, use_v2: bool = True) -> Hierarchy:
    """Read from /proc which hierarchies are mounted and where in them this process is. Nothing is changed."""
    trees = find_trees(read_file("/proc/self/mountinfo"), read_file("/proc/self/cgroup"))
    unified = next((tree for tree in trees if tree.version == 2), None) if use_v2 else None
    if unified is not None:
        unified.controllers = frozenset(read_file(f"{unified.base}/cgroup.controllers").split())
    v1 = [tree for tree in trees if tree.version == 1]
    return choose([tree for tree in v1 if tree.controllers != {"cpu"} or os.access(tree.base, os.W_OK)], unified)


def choose(v1: list[Tree], unified: Tree | None) -> Hierarchy:
    """Decide which hierarchy serves which purpose; the table is at the top of `linux.cgroup`."""
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
        on_v2 = unified if unified is not None and controller in unified.controllers else None
        take(controller, on_v1(controller) or on_v2)
    limits_on_v1 = any(tree.version == 1 for tree in trees)
    take("cpu", unified or on_v1("cpuacct"))
    take("control", unified or on_v1("freezer"))
    if limits_on_v1:
        take("share", on_v1("cpu"))
    if unified is not None:
        mode = "hybrid" if limits_on_v1 else "v2"
    else:
        mode = "v1" if trees else "none"
    return Hierarchy(mode, tuple(trees), where)


def find_trees(mountinfo: str, memberships: str) -> list[Tree]:
    """Match the text of /proc/self/mountinfo with that of /proc/self/cgroup, proc_pid_mountinfo(5) and cgroups(7).

    A mount may show only a part of its hierarchy (a bind mount, or a mount made in another cgroup namespace): its root
    field is taken off the membership path, and a mount that does not show our own cgroup is passed over.
    """
    paths: dict[frozenset[str], str] = {}
    for line in memberships.splitlines():
        number, names, path = line.split(":", 2)
        paths[frozenset() if number == "0" else frozenset(names.split(","))] = path
    found: dict[frozenset[str], Tree] = {}
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields, (kind, _, options) = mount.split(" "), filesystem.split(" ")[:3]
        if kind == "cgroup2":
            key: frozenset[str] | None = frozenset()
        elif kind == "cgroup":
            key = next((names for names in paths if names and names <= set(options.split(","))), None)
        else:
            continue
        if key is None or key not in paths or key in found:
            continue
        point, below = _unescape(fields[4]), _below(paths[key], _unescape(fields[3]))
        if below is None:
            continue
        if kind == "cgroup2":
            below = below.removesuffix("/" + OWN)
        found[key] = Tree(2 if kind == "cgroup2" else 1, key, point, point + below)
    return list(found.values())


def _below(path: str, root: str) -> str | None:
    """The part of `path` below `root`, "" or with a leading slash; None if it is not below."""
    root, path = root.rstrip("/"), path.rstrip("/")
    inside = path == root or path.startswith(root + "/")
    return path[len(root) :] if inside and ".." not in path[len(root) :].split("/") else None


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def undelegated(hierarchy: Hierarchy) -> str | None:
    """The v2 directory that we would have to change though systemd manages it; None if there is none.

    systemd marks a unit with Delegate=yes by an extended attribute of its directory, systemd.resource-control(5).
    """
    if not os.path.isdir("/run/systemd/system"):
        return None
    for tree in hierarchy.trees:
        if tree.version == 2 and hierarchy.limits_on(tree) and not _is_delegated(tree):
            return tree.base
    return None


def _is_delegated(tree: Tree) -> bool:
    directory = tree.base
    while directory != tree.mount and not directory.endswith((".service", ".scope", ".slice")):
        directory = os.path.dirname(directory)
    for name in ("trusted.delegate", "user.delegate"):  # systemd 246 sets the first, 251 the second
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            pass
    # a user's own manager sets neither
    return "/user@" in os.path.dirname(directory) and _users_manager_delegates(os.path.basename(directory))


def _users_manager_delegates(unit: str) -> bool:
    import subprocess  # only here: privileged processes need not carry it

    command = ("systemctl", "--user", "show", "--property=Delegate", "--value", "--", unit)
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return told.stdout.strip() == b"yes"


def enter_leaf(hierarchy: Hierarchy) -> None:
    """On v2, move all processes of our own cgroup to its child `own/`; elsewhere, do nothing.

    A v2 cgroup with processes cannot give controllers to its children (cgroup-v2.rst, "No Internal Process
    Constraint"). The real root, which has no cgroup.type, is free of that rule.
    Raises: OSError from the kernel.
    """
    for tree in hierarchy.trees:
        if tree.version != 2 or not hierarchy.limits_on(tree) or not os.path.exists(f"{tree.base}/cgroup.type"):
            continue
        try:
            os.mkdir(f"{tree.base}/{OWN}", 0o755)
        except FileExistsError:
            pass
        for _ in range(20):  # a process may fork between the list and its move
            pids = read_file(f"{tree.base}/cgroup.procs").split()
            if not pids:
                break
            for pid in pids:
                try:
                    write_file(f"{tree.base}/{OWN}/cgroup.procs", pid)
                except ProcessLookupError:
                    pass


def enable_below(hierarchy: Hierarchy, below: str) -> None:
    """On v2, give the controllers that we use to the children of each tree's `base` + `below`; `cpu` if it can be had.

    Raises: OSError EBUSY if processes are left there, ENOENT if the parent does not give the controller.
    """
    for tree in hierarchy.trees:
        if tree.version != 2 or not hierarchy.limits_on(tree):
            continue
        file = f"{tree.base}{below}/cgroup.subtree_control"
        enabled = read_file(file).split()
        for controller in ("memory", "pids"):
            if hierarchy.serves(tree, controller) and controller not in enabled:
                write_file(file, f"+{controller}")
        if "cpu" in tree.controllers and "cpu" not in enabled:
            try:
                write_file(file, "+cpu")
            except OSError:
                pass  # refused while real-time tasks run; nothing depends on it


def remove_leftovers(hierarchy: Hierarchy) -> int:
    """Kill what is in the trees of our user's dead servers, and remove these trees.

    They are looked for everywhere, as the dead server may have been started in another session, and in hierarchies that
    ours does not use, as it may have lived in another mode: its v1 freezer must be thawed, or nothing in it dies. A
    tree whose directory somebody holds a flock(2) on is in use.
    Returns: how many servers' trees are gone. Raises: OSError EBUSY if something survives SIGKILL.
    """
    found: dict[str, list[tuple[Tree, str]]] = {}
    locks: list[int] = []
    try:
        mounted = find_trees(read_file("/proc/self/mountinfo"), read_file("/proc/self/cgroup"))
        used = {tree.mount for tree in hierarchy.trees}
        for tree in (*hierarchy.trees, *(tree for tree in mounted if tree.mount not in used)):
            for path in _servers(tree.mount):
                try:
                    locks.append(os.open(path, DIRECTORY))
                    if os.fstat(locks[-1]).st_uid != os.geteuid():
                        continue
                    fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, FileNotFoundError, PermissionError):
                    continue  # its owner lives, or just removed it, or it is another user's
                found.setdefault(os.path.basename(path), []).append((tree, path))
        for places in found.values():
            end_trees(places)
    finally:
        for lock in locks:
            os.close(lock)
    return len(found)


def _servers(mount: str) -> list[str]:
    """The directories of all servers, dead or alive, in a hierarchy."""
    found: list[str] = []
    todo = [mount]
    while todo:
        directory = todo.pop()
        try:
            names = _directories(directory)
        except OSError:  # removed meanwhile, or not ours to look into
            continue
        for name in names:
            (found if _LEFTOVER.fullmatch(name) else todo).append(f"{directory.rstrip('/')}/{name}")
    return found


def end_trees(places: list[tuple[Tree, str]], timeout: float = 2.0) -> None:
    """Kill everything in and below these directories, and remove them.

    Raises: OSError EBUSY if something still lives after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        for tree, path in places:
            try:
                _kill_below(tree, path)
            except FileNotFoundError:
                pass
        places = [(tree, path) for tree, path in places if not _removed(path)]
        if not places:
            return
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"cgroup {places[0][1]}: processes survive SIGKILL")
        time.sleep(RETRY_SECONDS)


def _kill_below(tree: Tree, path: str) -> None:
    if tree.version == 2:
        write_file(f"{path}/cgroup.kill", "1")
        return
    freezer = "freezer" in tree.controllers
    directories = [path, *_walk(path)]
    if freezer:  # a fork bomb stands still
        write_file(f"{path}/freezer.state", "FROZEN")
    for directory in directories:
        kill_all(f"{directory}/cgroup.procs")
    if freezer:  # frozen v1 tasks do not die
        for directory in directories:
            write_file(f"{directory}/freezer.state", "THAWED")


def _removed(path: str) -> bool:
    try:
        for directory in [*reversed(_walk(path)), path]:
            os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def kill_all(procs: str) -> bool:
    """SIGKILL every process that the file `procs` lists. Returns: False if there was none.

    A pid can be reused between list and kill: it is pinned by a pidfd, and killed if the list still has it after that.
    """
    pinned: dict[int, int] = {}
    listed = read_file(procs).split()
    try:
        for pid in map(int, listed):
            if pid > 0:  # 0 is a process of a PID namespace that we do not see
                try:
                    pinned[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    pass
        for pid in map(int, read_file(procs).split() if pinned else ()):
            if pid in pinned:
                try:
                    signal.pidfd_send_signal(pinned[pid], signal.SIGKILL)
                except ProcessLookupError:
                    pass
    finally:
        for pidfd in pinned.values():
            os.close(pidfd)
    return bool(listed)


def _walk(path: str) -> list[str]:
    """All directories below `path`, each after its parent."""
    found: list[str] = []
    for name in _directories(path):
        found.append(f"{path}/{name}")
        found.extend(_walk(f"{path}/{name}"))
    return found


def _directories(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def read_file(path: str) -> str:
    """All of a control file, however many pages the kernel makes it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    finally:
        os.close(fd)
    return os.fsdecode(b"".join(parts))


def write_file(path: str, value: str, *, directory: int | None = None) -> None:
    """One write(2) to a control file, below an open directory if given. Raises: OSError, file and value named."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        write(fd, path, value.encode())
    finally:
        os.close(fd)


def write(fd: int, file: str, value: bytes) -> None:
    """One write(2) to an open control file. Raises: OSError, file and value named."""
    try:
        os.write(fd, value)
    except OSError as error:
        code = error.errno or 0
        raise OSError(code, f"cgroup {file}: cannot write {value.decode()}: {os.strerror(code)}") from None
