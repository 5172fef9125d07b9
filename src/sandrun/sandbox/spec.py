"""What a zygote knows, and what one sandbox is built from: numbers and descriptors, nothing of any job's."""

from __future__ import annotations

import os

INIT_UID = 999
JOB_UID = 1000
"""As seen inside. On the host each sandbox has two ids of its own, or with one uid both are the user's."""


class Nest:
    """What all sandboxes of one zygote share; made by the spawner, not changed once the zygote is warm.

    Attributes:
        job_filter, init_filter: BPF programs; empty where there is none, which the operator waived.
        filter_digest: SHA-256 of the first, in hexadecimal.
        landlock: ABI to use, 0 for none.
        namespaces: CLONE_NEW* flags that a sandbox unshares after its PID namespace.
        shared_uid: one uid for init and job.
        interpreters: name -> argv prefix.
        path: value of PATH for jobs.
        environment: the folder of the package set inside, "" for the bare interpreter.
        masked: what is covered below /proc, and whether it is a folder.
        core_limit: RLIMIT_CORE, see `steps.set_rlimits`.
        caches: of the modules that the zygote has loaded, see `rootfs.link_caches`.
        variables: names of those that these modules looked for when they were loaded.
        rehearsal: an archive with one small file, see `job.REHEARSAL`.
        entries: how many v1 `tasks` files init enters its cgroup by.
    """

    __slots__ = (
        "caches", "core_limit", "entries", "environment", "filter_digest", "init_filter", "interpreters", "job_filter",
        "landlock", "masked", "namespaces", "path", "rehearsal", "shared_uid", "variables",
    )  # fmt: skip

    def __init__(
        self,
        *,
        job_filter: bytes,
        init_filter: bytes,
        filter_digest: str,
        landlock: int,
        namespaces: int,
        shared_uid: bool,
        interpreters: dict[str, list[str]],
        path: str,
        environment: str,
        masked: list[tuple[str, bool]],
        core_limit: int,
        entries: int,
    ) -> None:
        self.job_filter = job_filter
        self.init_filter = init_filter
        self.filter_digest = filter_digest
        self.landlock = landlock
        self.namespaces = namespaces
        self.shared_uid = shared_uid
        self.interpreters = interpreters
        self.path = path
        self.environment = environment
        self.masked = masked
        self.core_limit = core_limit
        self.entries = entries
        self.caches: list[tuple[str, bool]] = []
        self.variables: frozenset[str] = frozenset()
        self.rehearsal = b""


class Spec:
    """What the job's process, or the collector, has of its sandbox. Each descriptor is closed by whoever needs it last.

    Attributes:
        control: init's socket to the spawner. gate: the job process's, until it is the client's.
        snapshot: memory file with the state of the work directory after unpacking.
        landlock: the ABI that is in force for this process, 0 for none.
        filter: the program that this process has put itself under, empty for none.
    """

    __slots__ = ("control", "filter", "gate", "landlock", "nest", "snapshot")

    def __init__(self, nest: Nest, *, control: int, gate: int, snapshot: int, landlock: int, filter: bytes) -> None:
        self.nest = nest
        self.control = control
        self.gate = gate
        self.snapshot = snapshot
        self.landlock = landlock
        self.filter = filter


def close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
