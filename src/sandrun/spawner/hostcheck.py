"""`sandrun check`: what this host offers, layer by layer, and a throw-away sandbox that proves it.

Nothing is left: the namespaces are a child's, the sandbox goes with its spawner.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from sandrun.config import Config
from sandrun.linux import hierarchy, landlock, process, seccomp
from sandrun.linux.cgroup import DELEGATE, swap_active
from sandrun.sandbox import messages
from sandrun.spawner import protocol, supervisor


class Finding(NamedTuple):
    """`name` as `--allow-missing` has it, or of the check; `fix` is empty if all is well."""

    name: str
    ok: bool
    details: str
    fix: str


OLDEST_KERNEL = (5, 15)
SYSCTLS = (
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=65536"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or run as root",
    ),
)
NAMESPACES = (
    ("user", process.CLONE_NEWUSER, "USER_NS"),
    ("pid", process.CLONE_NEWPID, "PID_NS"),
    ("net", process.CLONE_NEWNET, "NET_NS"),
    ("mount", process.CLONE_NEWNS, "NAMESPACES"),
    ("ipc", process.CLONE_NEWIPC, "IPC_NS"),
    ("uts", process.CLONE_NEWUTS, "UTS_NS"),
    ("cgroupns", process.CLONE_NEWCGROUP, "CGROUPS"),
)
WAIVE = "or waive it: --allow-missing"


def check(config: Config) -> list[Finding]:
    """One finding a layer, in the order in which a sandbox is built, then the sandbox itself."""
    waived = config.waived
    found = [_kernel(), *_namespaces(), *_cgroups(), _swap(), _seccomp(), _landlock(), _uids(config)]
    return [*(_waive(finding) if finding.name in waived else finding for finding in found), _sandbox(config)]


def _waive(finding: Finding) -> Finding:
    return finding if finding.ok else finding._replace(ok=True, details=f"{finding.details}; waived")


def _kernel() -> Finding:
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    return Finding("kernel", numbers >= OLDEST_KERNEL, f"Linux {release}", "use Linux 5.15 or newer")


def _namespaces() -> list[Finding]:
    blocked = next(
        (fix for path, bad, fix in SYSCTLS if _read(path) == bad and (os.geteuid() or "restrict" not in path)), ""
    )
    found = []
    for name, flag, option in NAMESPACES:
        refused = _in_child(process.CLONE_NEWUSER | flag)
        fix = blocked or f"use a kernel with CONFIG_{option}=y, outside of a container that forbids namespaces"
        found.append(Finding(name, not refused, refused or "a new namespace can be made", fix))
    return found


def _cgroups() -> list[Finding]:
    found = hierarchy.detect()
    findings = []
    for layer in ("memory", "pids", "cpu"):
        index = found.where.get(layer)
        if index is None:
            findings.append(Finding(layer, False, f"no {layer} controller ({found.mode} cgroups)", DELEGATE))
            continue
        tree = found.trees[index]
        good = os.access(tree.base, os.W_OK) and hierarchy.undelegated(found) != tree.base
        details = f"cgroup v{tree.version} at {tree.base}" + ("" if good else ": not delegated to this user")
        findings.append(Finding(layer, good, details, f"{DELEGATE}, {WAIVE} cgroup"))
    return findings


def _swap() -> Finding:
    if not swap_active():
        return Finding("swap", True, "the host has no swap", "")
    found = hierarchy.detect()
    memory = found.where.get("memory")
    closed = memory is not None and found.trees[memory].version == 2
    details = "the host has swap" + ("; each sandbox gets memory.swap.max 0" if closed else "")
    return Finding("swap", closed, details, "swapoff -a, or boot with cgroup v2")


def _seccomp() -> Finding:
    fix = seccomp.KERNEL_FIX
    try:
        seccomp.probe()
        fix = seccomp.LIBRARY_FIX
        return Finding("seccomp", True, f"libseccomp {seccomp.library_version()}", "")
    except OSError as error:
        return Finding("seccomp", False, str(error), fix)


def _landlock() -> Finding:
    version = landlock.abi()
    return Finding("landlock", True, f"ABI {version}" if version else "not in this kernel; used where it is", "")


def _uids(config: Config) -> Finding:
    if os.geteuid() == 0:
        return Finding("uid", True, f"ids of its own for each sandbox, from {config.uid_base}", "")
    return Finding("uid", True, "one uid for all sandboxes, which every report says (uid: shared)", "")


def _sandbox(config: Config) -> Finding:
    """Build one, run 6 * 7 in it, and look at it from both sides."""
    settings = supervisor.settings_from(supervisor.claim_ids(config))
    settings = settings._replace(environments=(), interpreters=("python3",))
    pid, connection = supervisor.start_spawner(settings)
    try:
        message, _ = protocol.receive(connection, protocol.FROM_SPAWNER_BYTES)
    finally:
        connection.close()
        os.waitpid(pid, 0)
    if message[:1] == protocol.FACTS:
        isolation: dict[str, Any] = protocol.decode_facts(message)["isolation"]
        missing = f", without {', '.join(isolation['waived'])}" if isolation["waived"] else ""
        return Finding("sandbox", True, f"built, verified from inside and outside, and removed{missing}", "")
    step, number, details = messages.read_failure(message[1:])
    fix = details.partition("Fix: ")[2] or "mend what is missing above"
    return Finding("sandbox", False, f"step {step!r}: {details}" + (f" (errno {number})" if number else ""), fix)


def _in_child(flags: int) -> str:
    """Make namespaces in a forked child, which is then gone. Returns: what the kernel said, "" for success."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            process.unshare(flags)
        except BaseException as error:
            os.write(writer, str(error).encode()[:400])
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return os.read(reader, 400).decode(errors="replace")
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
