"""What this host gives to every sandbox: filters, namespaces, Landlock, swap. Read once, when the spawner starts."""

from __future__ import annotations

import os
from typing import Any

from sandrun.errors import MissingLayer, SetupError
from sandrun.linux import cgroup, ids, landlock, seccomp
from sandrun.sandbox import policy, report, rootfs

LAYER_OF = {"mnt": "mount", "cgroup": "cgroupns"}
"""Namespaces whose layer has another name than their file in /proc/PID/ns."""


class Walls:
    """Raises: MissingLayer for what cannot be had and is not waived.

    Attributes:
        filter: digest, number of calls and of instructions of the jobs' seccomp filter; empty where there is none.
        namespaces: CLONE_NEW* flags of what a sandbox unshares.
        landlock: ABI, 0 for none.
        noswap: tmpfs can be kept from swap by itself (Linux 6.4).
        swap_closed: no page of a job's reaches a swap device.
        missing: the waived layers that do not stand.
        uid_base: first host id of the sandboxes, None with one uid.
    """

    def __init__(self, cgroups: cgroup.Cgroups, waived: frozenset[str], uid_base: int, environments: int) -> None:
        self.waived = waived
        self.cgroup_mode = cgroups.mode
        self.swap_closed = cgroups.swap_closed()
        self.filter: dict[str, Any] = {}
        self.job_filter = self.init_filter = b""
        try:
            self._compile_filters()
        except MissingLayer:
            if "seccomp" not in waived:
                raise
        self.landlock = landlock.abi()
        self.namespaces = 0
        for name, flag in report.NAMESPACE_FLAGS.items():
            if LAYER_OF.get(name, name) not in waived or os.path.exists(f"/proc/self/ns/{name}"):
                self.namespaces |= flag
        self.outer = report.read_namespaces("/proc/self")
        self.noswap = False
        self.uid_base: int | None = None
        if os.geteuid() == 0:
            self.noswap = _takes_noswap()
            self.uid_base = ids.choose_base(uid_base, 1 + environments) + ids.BLOCK  # the first block is api's
        self.core_limit = 1 if _cores_are_piped() else 0
        self.missing = self._missing(cgroups)

    def block(self, number: int) -> int | None:
        """First host id of a zygote, by its number; None with one uid. Raises: SetupError if there is none left."""
        if self.uid_base is None:
            return None
        first = self.uid_base + ids.BLOCK * number
        if number + 2 > ids.STRIDE // ids.BLOCK or not ids.are_mapped(first, ids.BLOCK):
            raise SetupError("uid range", 0, f"no ids are left for environment {number} of this server")
        return first

    def _compile_filters(self) -> None:
        try:
            seccomp.probe()
        except OSError as error:
            details = f"this kernel has no filters: {error}"
            raise MissingLayer("seccomp", details, f"Fix: {seccomp.KERNEL_FIX}") from error
        jobs = policy.job_policy()
        try:
            self.job_filter, self.init_filter = jobs.compile(), policy.init_policy().compile()
        except OSError as error:
            raise MissingLayer("seccomp", str(error), f"Fix: {seccomp.LIBRARY_FIX}") from error
        self.filter = {
            "digest": jobs.digest,
            "calls": jobs.count,
            "instructions": len(self.job_filter) // 8,  # sizeof(struct sock_filter)
        }

    def _missing(self, cgroups: cgroup.Cgroups) -> list[str]:
        """The waived layers that do not stand: what was waived and can be had stands all the same."""
        gone = set(cgroups.missing)
        if not self.swap_closed:
            gone.add("swap")
        if not self.filter:
            gone.add("seccomp")
        if not self.landlock:
            gone.add("landlock")
        gone |= {LAYER_OF.get(n, n) for n, flag in report.NAMESPACE_FLAGS.items() if not self.namespaces & flag}
        return sorted(gone & self.waived)

    def describe(self) -> dict[str, Any]:
        """For FACTS."""
        return {
            "cgroup": self.cgroup_mode,
            "waived": self.missing,
            "uid": "shared" if self.uid_base is None else "own",
            "uid_base": self.uid_base,
            "filter": self.filter,
            "landlock": self.landlock,
            "swap_closed": self.swap_closed,
            "noswap": self.noswap,
        }

    def nest(self, interpreters: dict[str, list[str]], path: str, environment: str) -> dict[str, Any]:
        """Keyword arguments of `sandbox.spec.Nest`, as they go to a zygote."""
        return {
            "job_filter": self.job_filter.hex(),
            "init_filter": self.init_filter.hex(),
            "filter_digest": self.filter.get("digest", ""),
            "landlock": self.landlock,
            "namespaces": self.namespaces,
            "shared_uid": self.uid_base is None,
            "interpreters": interpreters,
            "path": path,
            "environment": environment,
            "core_limit": self.core_limit,
        }


def _takes_noswap() -> bool:
    try:
        os.close(rootfs.new_storage(1 << 20, owner=0, noswap=True))
    except OSError:
        return False
    return True


def _cores_are_piped() -> bool:
    try:
        with open("/proc/sys/kernel/core_pattern") as file:
            return file.read().startswith("|")
    except OSError:
        return True
