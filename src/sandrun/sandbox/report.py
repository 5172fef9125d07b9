"""The isolation report: measured by the job's process itself when every wall stands, and by the spawner from outside.

Both look at what the kernel says, never at what was asked for. proc(5), namespaces(7), capabilities(7).
"""

from __future__ import annotations

import os
import resource
import socket
from typing import Any

try:  # hashlib would load OpenSSL into every job's process
    from _sha2 import sha256  # type: ignore[import-not-found]  # Python 3.12
except ImportError:
    from _sha256 import sha256  # type: ignore[import-not-found]

from sandrun.linux import process
from sandrun.sandbox import rootfs
from sandrun.sandbox.spec import JOB_UID, Spec

RLIMITS = ("CORE", "NOFILE", "MEMLOCK")
NAMESPACE_FLAGS = {
    "mnt": process.CLONE_NEWNS,
    "net": process.CLONE_NEWNET,
    "ipc": process.CLONE_NEWIPC,
    "uts": process.CLONE_NEWUTS,
    "cgroup": process.CLONE_NEWCGROUP,
}


def read_status(folder: str) -> dict[str, Any]:
    """Identity, capabilities and filter out of a process's /proc folder ("/proc/self", "/proc/41").

    Returns: uid and gid (real, effective, saved, file system), groups, capabilities by set as hexadecimal text,
    no_new_privs, seccomp mode and number of filters.
    """
    descriptor = os.open(f"{folder}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, 8192).decode(errors="replace")
    finally:
        os.close(descriptor)
    fields = dict(line.partition(":\t")[::2] for line in text.splitlines())
    return {
        "uid": [int(n) for n in fields["Uid"].split()],
        "gid": [int(n) for n in fields["Gid"].split()],
        "groups": [int(n) for n in fields["Groups"].split()],
        "capabilities": {name: fields[f"Cap{name}"].strip() for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")},
        "no_new_privs": int(fields["NoNewPrivs"]),
        "seccomp": int(fields["Seccomp"]),
        "seccomp_filters": int(fields.get("Seccomp_filters", "-1")),
    }


def read_namespaces(folder: str) -> dict[str, int]:
    """name -> inode of a process's namespaces: equal inodes are one namespace."""
    return {name: int(os.readlink(f"{folder}/ns/{name}").partition("[")[2][:-1]) for name in process.NAMESPACES}


def _read_mounts() -> list[list[str]]:
    """[place, type, options of the mount, options of the file system] for each mount, proc_pid_mountinfo(5)."""
    descriptor = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    found = []
    try:
        text = b""
        while part := os.read(descriptor, 65536):
            text += part
    finally:
        os.close(descriptor)
    for line in text.decode(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        found.append([fields[4], rest[0], fields[5], rest[2]])
    return found


def measure(spec: Spec) -> dict[str, Any]:
    """What the job's process sees of itself, just before it opens anything of the client's."""
    found = read_status("/proc/self")
    found["namespaces"] = read_namespaces("/proc/self")
    found["mounts"] = _read_mounts()
    own = {spec.gate, spec.snapshot}  # closed before the client's first instruction
    found["descriptors"] = sorted(set(list_descriptors()) - own)
    found["landlock"] = spec.landlock
    found["filter"] = sha256(spec.filter).hexdigest() if spec.filter else ""
    found["calls_that_pass"] = _try_forbidden_calls() if spec.nest.job_filter else None
    found["rlimits"] = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in RLIMITS}
    found["host_name"] = os.uname().nodename
    found["pid"] = os.getpid()
    found["work_directory"] = os.getcwd()
    return found


def _try_forbidden_calls() -> list[str]:
    """Those of two calls that every policy of ours refuses which were not: a filter in force may be another."""
    passed = []
    try:
        socket.socket().close()
        passed.append("socket")
    except PermissionError:
        pass
    try:
        process.unshare(0)  # which does nothing where it is allowed
        passed.append("unshare")
    except PermissionError:
        pass
    return passed


def list_descriptors() -> list[int]:
    """Open descriptors, without the one that reads the list."""
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return [number for name in os.listdir(folder) if (number := int(name)) != folder and _is_open(number)]
    finally:
        os.close(folder)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # listdir's own duplicate, closed again
        return False
    return True


ZERO = "0" * 16


def verify(found: dict[str, Any], spec: Spec) -> None:
    """Raises: OSError naming the field of the report that is not as it must be."""
    nest = spec.nest

    def expect(name: str, value: object, wanted: object) -> None:
        if value != wanted:
            raise OSError(0, f"{name} reads {value!r}, not {wanted!r}")

    expect("uid", found["uid"], [JOB_UID] * 4)
    expect("gid", found["gid"], [JOB_UID] * 4)
    for name, mask in found["capabilities"].items():
        expect(f"Cap{name}", mask, ZERO)
    expect("no_new_privs", found["no_new_privs"], 1)
    expect("landlock", found["landlock"], nest.landlock)
    if nest.job_filter:
        expect("seccomp", found["seccomp"], 2)
        expect("calls that pass", found["calls_that_pass"], [])
    expect("filter", found["filter"], nest.filter_digest)
    expect("descriptors", found["descriptors"], [0, 1, 2])
    devices = [f"/dev/{name}" for name in rootfs.DEVICES]
    for place, _kind, options, _ in found["mounts"]:
        flags = options.split(",")
        if "nosuid" not in flags:
            raise OSError(0, f"the mount at {place} is {options}, without nosuid")
        if "nodev" not in flags and place not in devices:
            raise OSError(0, f"the mount at {place} is {options}, without nodev")
        if "ro" not in flags and place not in ("/job", "/tmp", "/dev/shm"):
            raise OSError(0, f"the mount at {place} is {options}, not read-only")
    expect("work directory", found["work_directory"], "/job")


def verify_outside(
    found: dict[str, Any], *, outer: dict[str, int], flags: int, uid: int, sandboxed: bool, shared_uid: bool
) -> None:
    """The spawner's look at a job's process before it lets it go on.

    `outer` are the spawner's own namespaces, `uid` the host id that it must have. Raises: OSError naming what differs.
    """
    names = {"user", "pid"} | {name for name, flag in NAMESPACE_FLAGS.items() if flags & flag}
    for name in names:
        if found["namespaces"][name] == outer[name]:
            raise OSError(0, f"the {name} namespace is the host's")
    if found["uid"] != [uid] * 4 or (uid == 0 and not shared_uid):
        raise OSError(0, f"the host uid is {found['uid']}, not {uid}")
    if found["gid"] != [uid] * 4 and not shared_uid:
        raise OSError(0, f"the host gid is {found['gid']}, not {uid}")
    if found["groups"] and not shared_uid:
        raise OSError(0, f"it is in the host groups {found['groups']}")
    for name, mask in found["capabilities"].items():
        if mask != ZERO:
            raise OSError(0, f"Cap{name} is {mask}")
    if found["no_new_privs"] != 1:
        raise OSError(0, "no_new_privs is not set")
    if sandboxed and found["seccomp"] != 2:
        raise OSError(0, f"the seccomp mode is {found['seccomp']}")
