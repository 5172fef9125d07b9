"""The file system of a sandbox: a read-only root made once a zygote, and what each sandbox mounts over it.

A zygote lives in this root itself, so a sandbox copies nine or so mounts instead of the host's, has no old root to
detach (50 µs), and the host's tree is not there to begin with. All is done with the capabilities of the zygote's
user namespace, root or not. mount_setattr(2), move_mount(2), pivot_root(2), mount_namespaces(7).
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from sandrun.linux import mounts, process
from sandrun.linux.calls import AT_FDCWD, JOB_ID, PROC, SIZE, STORAGE, TREE, Calls, Slot, Slots

WORK = "/job"
WRITABLE = (WORK, "/tmp", "/dev/shm")
"""The only places that a job can write to: one tmpfs, mounted thrice."""
CACHE_HOME, CONFIG_HOME = "/tmp/.cache", "/tmp/.config"
"""XDG's, of jobs; not below WORK, where they would be among the outputs."""
ENVIRONMENTS = "/environments"
EMPTY = "/.empty"
"""An empty file and an empty folder, read-only: what a masked path shows. Not /dev/null, which needs `dev`."""
STAGE = "/.stage"
CACHES = "/.caches"
"""What modules cached in /tmp when the zygote loaded them, read-only: in a sandbox's own /tmp are links to it."""
UNPRIVILEGED = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV
FIXED = UNPRIVILEGED | mounts.MOUNT_ATTR_RDONLY

DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}

TOP_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
LOCAL = ("bin", "lib", "lib64", "libexec", "share", "include")
"""What of /usr/local is there: not src, etc or games, where operators keep their own."""

ETC_FILES = "ld.so.cache localtime timezone mime.types protocols services debian_version os-release".split()
ETC_TREES = (
    ("alternatives", "awk, cc and others are links through it"),
    ("python3", "python3: debian_config"),
    ("python3.11", "python3.11: sitecustomize"),
    ("python3.12", "python3.12: sitecustomize"),
    ("python3.13", "python3.13: sitecustomize"),
    ("perl", "perl: Net/libnet.cfg, sitecustomize.pl"),
    ("php", "php: php.ini, conf.d"),
    ("R", "Rscript: Renviron, Makeconf"),
    ("ImageMagick-6", "convert: policy.xml"),
    ("fonts", "matplotlib, R: fontconfig"),
    ("ssl/openssl.cnf", "node, python3: hashlib through OpenSSL"),
    ("java-17-openjdk", "java: security policy"),
    ("java-21-openjdk", "java: security policy"),
)
"""Of the host's /etc what an interpreter cannot start without, with who wants it. Copied, never mounted."""
ETC_CLOSED = ("passwd", "shadow")
"""They exist and answer EACCES, as the customer's text promises."""
ETC_TEXTS = {
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "group": "sandbox:x:1000:\n",
    "resolv.conf": "",
}
COPY_BYTES = 1 << 20

SHOWN = """
    buddyinfo consoles cpuinfo crypto devices dma execdomains fb filesystems loadavg mdstat meminfo misc mounts mtrr net
    self stat sys thread-self uptime version zoneinfo
    """.split()
"""What stays at the top of /proc, beside processes: free, top, node's os.cpus() and the JVM read it and system calls
tell it too, or it tells nothing of host and jobs. All else is masked: the next kernel may have more of it."""
MASKED = "sys/kernel/random/boot_id sys/kernel/core_pattern sys/fs sys/dev sys/debug".split()
"""What is masked further down."""


class Sources(NamedTuple):
    """Detached copies of the host's trees, opened while its names can still be reached.

    Attributes:
        trees: where -> mount descriptor.
        links: name -> target of the links at the top (/bin -> usr/bin).
        etc: relative path -> bytes of a file, or the target of a link as str.
    """

    trees: dict[str, int]
    links: dict[str, str]
    etc: dict[str, bytes | str]


def open_sources(rootfs: str, environment: str | None = None, called: str = "") -> Sources:
    """Open what the root is made of; `rootfs` is "/" or the prefix of a system laid out for jobs.

    `environment` is a folder of the host's that will be /environments/`called`. Called in the zygote's mount
    namespace but before the change of uid, as either may lie below a folder that only its owner may enter.
    """
    trees: dict[str, int] = {}
    links: dict[str, str] = {}
    trees["/usr"] = _clone(os.path.join(rootfs, "usr"))
    local = os.path.join(rootfs, "usr/local")
    for name in LOCAL:
        if os.path.isdir(path := os.path.join(local, name)) and not os.path.islink(path):
            trees[f"/usr/local/{name}"] = _clone(path)
    for name in TOP_LINKS:
        path = os.path.join(rootfs, name)
        if os.path.islink(path):
            links[name] = os.readlink(path)
        elif os.path.isdir(path):
            trees[f"/{name}"] = _clone(path)
    for name in DEVICES:
        trees[f"/dev/{name}"] = mounts.open_tree(f"/dev/{name}", clone=True, recursive=False)
    if environment is not None:
        trees[f"{ENVIRONMENTS}/{called}"] = _clone(environment)
    return Sources(trees, links, _read_etc(os.path.join(rootfs, "etc")))


def _clone(path: str) -> int:
    return mounts.open_tree(path, clone=True, recursive=True)


def _read_etc(etc: str) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}

    def take(relative: str) -> None:
        path = os.path.join(etc, relative)
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            return
        if stat.S_ISLNK(mode):
            if relative.startswith("alternatives/"):
                found[relative] = os.readlink(path)
                return
            if not os.path.isfile(path):
                return
        if stat.S_ISDIR(mode):
            for name in sorted(os.listdir(path)):
                take(f"{relative}/{name}")
        elif os.access(path, os.R_OK) and _is_small_and_public(os.stat(path)):
            with open(path, "rb") as file:
                found[relative] = file.read(COPY_BYTES)

    for name in ETC_FILES:
        take(name)
    for name, _why in ETC_TREES:
        take(name)
    found.update({name: text.encode() for name, text in ETC_TEXTS.items()})
    return found


def _is_small_and_public(status: os.stat_result) -> bool:
    """What anyone on the host may read, and no FIFO, at which we would wait for ever."""
    return stat.S_ISREG(status.st_mode) and status.st_mode & 0o004 != 0 and status.st_size <= COPY_BYTES


def build(sources: Sources) -> None:
    """Make the root, enter it, and leave the host's tree behind for good.

    Called as uid 0 of a user namespace that owns the mount namespace: files on a tmpfs need a mapped owner.
    Raises: OSError naming call and path.
    """
    mounts.mount(None, "/", None, mounts.MS_REC | mounts.MS_PRIVATE, None)  # nothing of ours shows on the host
    root = mounts.new_filesystem("tmpfs", {"size": "16m", "nr_inodes": "8192", "mode": "0755"}, UNPRIVILEGED)
    mounts.move_mount(root, "/tmp")  # any folder does: the host's own stays below, unseen
    os.close(root)
    os.chdir("/tmp")
    for path in (*WRITABLE, "/proc", "/etc", "/usr", STAGE, CACHES, f"{EMPTY}/folder", ENVIRONMENTS):
        os.makedirs(path[1:], 0o755, exist_ok=True)
    _write(f"{EMPTY}/file"[1:], b"", 0o444)
    for name, target in sources.links.items():
        os.symlink(target, name)
    _attach(sources.trees, local=False)
    local = mounts.new_filesystem("tmpfs", {"size": "64k", "mode": "0755"}, UNPRIVILEGED)
    if os.path.isdir("usr/local"):
        mounts.move_mount(local, "usr/local")
        _attach(sources.trees, local=True)
        mounts.set_attributes("usr/local", set=FIXED)
    os.close(local)
    for name, target in LINKS.items():
        os.symlink(target, f"dev/{name}")
    _write_etc(sources.etc)
    mounts.mount("proc", "proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, None)
    process.pivot_root(".", ".")  # the old root now lies over the new one, pivot_root(2) "NOTES"
    mounts.umount(".", mounts.MNT_DETACH)
    os.chdir("/")
    mounts.set_attributes("/", set=FIXED)


def _attach(trees: dict[str, int], *, local: bool) -> None:
    for path, tree in trees.items():
        if path.startswith("/usr/local/") != local:
            continue
        target = path[1:]
        device = path.startswith("/dev/")
        if device:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        else:
            os.makedirs(target, 0o755, exist_ok=True)
            mounts.set_attributes(tree, set=FIXED, recursive=True)
        mounts.move_mount(tree, target)
        if device:  # a device opens on a read-only mount all the same; only chmod and the like are refused
            mounts.set_attributes(target, set=FIXED & ~mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC)
        os.close(tree)


def _write_etc(etc: dict[str, bytes | str]) -> None:
    for relative, content in etc.items():
        path = f"etc/{relative}"
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        if isinstance(content, str):
            os.symlink(content, path)
        else:
            _write(path, content, 0o444)
    for name in ETC_CLOSED:
        _write(f"etc/{name}", b"", 0)


def _write(path: str, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(28, f"write {path}: cut short")
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


# ---- what a zygote mounts while it loads modules ------------------------------------------------------------

LENT_BYTES = 256 << 20
MOST_CACHED = 64
"""Each folder and file of a cache is a system call in every sandbox."""


def lend_storage() -> None:
    """Give the zygote the places that jobs can write to: modules look for them, and keep what is costly to find out."""
    slots, calls = Slots(), Calls()
    slots[STORAGE], slots[JOB_ID] = new_storage(LENT_BYTES, owner=0, noswap=False), 0
    add_storage(calls)
    calls.run(slots)


def take_storage() -> list[tuple[str, bool]]:
    """Take them back. What lies in the caches of /tmp stays, at `CACHES`.

    Returns: path and whether it is a folder, parents first, for `link_caches`.
    """
    found = [entry for place in (CACHE_HOME, CONFIG_HOME) for entry in _walk(place)]
    tree = mounts.open_tree("/tmp", clone=True, recursive=False)
    for path in reversed(WRITABLE):
        mounts.umount(path, mounts.MNT_DETACH)
    mounts.set_attributes(tree, set=FIXED | mounts.MOUNT_ATTR_NOEXEC)
    mounts.move_mount(tree, CACHES)
    os.close(tree)
    return found[:MOST_CACHED]


def _walk(path: str) -> list[tuple[str, bool]]:
    """`path` and what is below it, without what is not for everybody."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return []
    if stat.S_ISREG(mode) and mode & 0o004:
        return [(path, False)]
    if stat.S_ISDIR(mode) and mode & 0o005 == 0o005:
        below = [entry for name in sorted(os.listdir(path)) for entry in _walk(f"{path}/{name}")]
        return [(path, True), *below]
    return []


def link_caches(found: list[tuple[str, bool]]) -> None:
    """Fill a sandbox's /tmp with what `take_storage` returned."""
    for path, folder in found:
        if folder:
            os.mkdir(path, 0o755)
        else:
            os.symlink(f"{CACHES}/{path.removeprefix('/tmp/')}", path)


# ---- what each sandbox mounts ------------------------------------------------------------------------------

INODES = 50_000


def new_storage(size_bytes: int, *, owner: int, noswap: bool) -> int:
    """A detached tmpfs for one job; the caller owns the descriptor. `owner` is a uid and gid of the caller's namespace.

    `noswap` (Linux 6.4) is refused inside a user namespace, so in root mode the spawner makes it. tmpfs(5).
    """
    options = {"size": str(size_bytes), **_storage_options(owner)}
    if noswap:
        options["noswap"] = None  # type: ignore[assignment]
    return mounts.new_filesystem("tmpfs", options, UNPRIVILEGED)


def _storage_options(owner: int) -> dict[str, str]:
    return {"nr_inodes": str(INODES), "mode": "0755", "uid": str(owner), "gid": str(owner)}


def add_new_storage(calls: Calls) -> None:
    """`new_storage` of the size in the slot SIZE, into the slot STORAGE, for a sandbox that must make its own."""
    options: dict[str, str | Slot] = {"size": SIZE, **_storage_options(0)}
    mounts.add_new_filesystem(calls, "tmpfs", options, UNPRIVILEGED, STORAGE)


def add_storage(calls: Calls) -> None:
    """Mount a sandbox's tmpfs, of the slot STORAGE, at its three places. The first belongs to the slot JOB_ID."""
    mounts.add_move_mount(calls, STORAGE, STAGE)
    for name, mode in (("job", 0o755), ("tmp", 0o1777), ("shm", 0o1777)):
        path = f"{STAGE}/{name}".encode()
        calls.call("mkdirat", AT_FDCWD, path, 0o700, about=name)
        calls.call("fchmodat", AT_FDCWD, path, mode, about=name)
        if name == "job":
            calls.call("fchownat", AT_FDCWD, path, JOB_ID, JOB_ID, 0, about=name)
    for name, where in zip(("job", "tmp", "shm"), WRITABLE, strict=True):
        mounts.add_open_tree(calls, f"{STAGE}/{name}", TREE)
        mounts.add_move_mount(calls, TREE, where)
    calls.call("umount2", STAGE.encode(), mounts.MNT_DETACH, about=STAGE)


def add_proc(calls: Calls, masked: list[tuple[str, bool]]) -> None:
    """A /proc of the sandbox's own PID namespace, hiding others' processes, masked and read-only.

    The slot PROC gets a writable copy that is mounted nowhere, for the steps that follow.
    A proc mount in a user namespace is EPERM unless a full one is there already (the zygote's, below this one).
    proc(5) "hidepid" (by mount since Linux 5.8).
    """
    attributes = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC
    mounts.add_new_filesystem(calls, "proc", {"hidepid": "invisible"}, attributes, TREE)
    mounts.add_open_tree(calls, TREE, PROC)
    mounts.add_set_attributes(calls, "/proc", FIXED | mounts.MOUNT_ATTR_NOEXEC)  # the zygote's, covered by the next
    mounts.add_move_mount(calls, TREE, "/proc")
    for path, folder in masked:
        source = f"{EMPTY}/folder" if folder else f"{EMPTY}/file"
        calls.call("mount", source.encode(), path.encode(), None, mounts.MS_BIND, None, about=path)
    mounts.add_set_attributes(calls, "/proc", FIXED | mounts.MOUNT_ATTR_NOEXEC)


def find_masked() -> list[tuple[str, bool]]:
    """What is to be masked and others than root may read here, and whether it is a folder. Called once, in the zygote.

    Each is a mount in every sandbox (15 µs, with its end), so what tells nothing of host or jobs is not in the list.
    """
    found = []
    top = (name for name in sorted(os.listdir("/proc")) if not name.isdigit() and name not in SHOWN)
    for name in (*top, *MASKED):
        path = f"/proc/{name}"
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue
        if mode & 0o004 or stat.S_ISDIR(mode):  # /proc's owner is the host's root: the rest is EACCES as it is
            found.append((path, stat.S_ISDIR(mode)))
    return found
