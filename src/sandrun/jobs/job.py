"""One job: what was asked, what it wrote, what became of it. All of it in RAM, all of it gone with `erase`."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from dataclasses import dataclass, replace

from sandrun.errors import NotFound
from sandrun.jobs.canonical import canonical
from sandrun.jobs.clients import Client
from sandrun.jobs.logs import LogBuffer
from sandrun.jobs.result import Failure
from sandrun.jobs.store import Account
from sandrun.jobs.wakeup import Wakeup
from sandrun.model import MIB, LimitHit, Manifest, Outcome, Status, Usage

DIGEST_OF_NOTHING = hashlib.sha256(b"").hexdigest()


def job_tag(job_id: str) -> str:
    """What stands for a job wherever its id must not: the id is the only credential, and no way leads back to it."""
    return hashlib.sha256(job_id.encode()).hexdigest()[:12]


class StoredOutput:
    """One file that the job left, held until the job is erased.

    Attributes:
        path: relative to the work directory; undecodable bytes are shown as \\xNN.
        sha256: of the content, in hex.
    """

    __slots__ = ("_data", "path", "sha256", "size")

    def __init__(self, path: str, data: bytes | bytearray, sha256: str) -> None:
        self.path = path
        self.size = len(data)
        self.sha256 = sha256
        self._data: bytes | bytearray | None = data

    @property
    def data(self) -> bytes:
        """All of it. Raises: NotFound once the job is erased."""
        return self.read(0, self.size)

    def read(self, offset: int, most: int) -> bytes:
        """A piece of it. Who sends a file asks piece by piece: holding all of it would keep erased bytes in RAM.

        Raises: NotFound once the job is erased.
        """
        if self._data is None:
            raise NotFound("the job has been erased")
        return bytes(memoryview(self._data)[offset : offset + most])

    def erase(self) -> None:
        self._data = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file that the client sent."""

    path: str
    size: int
    sha256: str


class Input:
    """What a job is started with: memory files, closed once and on every path.

    Attributes:
        archive_fd, stdin_fd: sealed; -1 when closed, `stdin_fd` None for no input.
        spec: JSON for init, opaque to the spawner.
        archive_bytes, stdin_bytes: the RAM that they take.
    """

    __slots__ = ("archive_bytes", "archive_fd", "spec", "stdin_bytes", "stdin_fd")

    def __init__(self, archive_fd: int = -1, archive_bytes: int = 0) -> None:
        self.archive_fd = archive_fd
        self.archive_bytes = archive_bytes
        self.stdin_fd: int | None = None
        self.stdin_bytes = 0
        self.spec = b""

    def close(self) -> None:
        if self.archive_fd >= 0:
            os.close(self.archive_fd)
            self.archive_fd = -1
        if self.stdin_fd is not None:
            os.close(self.stdin_fd)
            self.stdin_fd = None
        self.spec = b""


class Job:
    """One job of one client. Only JobService changes it; everyone may read it and wait on it.

    Attributes:
        id: 128 random bits in hex; who knows it may read, cancel and erase the job. Never logged, never listed.
        tag: what logs and metrics say instead; see `job_tag`.
        manifest: what was asked, without `stdin`, which is in a memory file.
        status: queued, running, and then completed (exited with 0) or failed; `status.ended` tells.
        keep: False for a `/run` that is erased when it is answered.
        erased: nothing is left of it; results and readers get NotFound.
        stdout, stderr: what it wrote.
        outputs: path -> file, complete once the job has ended.
        outputs_omitted: files that matched and were left out.
        storage_full: outputs were dropped because the server's memory was full.
        limits_hit: what it ran into without ending by it.
        isolation: what was measured of its walls, JSON, b"" until it has ended.
        inputs: what the client's files were.
        changed: woken whenever a log grows or ends, and whenever `status` changes.
        submitted, left_queue, started, ended: CLOCK_MONOTONIC seconds; `left_queue` is when its sandbox was asked for.
        submitted_at: seconds since 1970.
        memory_bytes: what its limit promises it: the scheduler's measure.
        ttl_seconds: how long the store keeps it once it has ended.
    """

    def __init__(
        self,
        client: Client,
        manifest: Manifest,
        given: Input,
        account: Account,
        inputs: tuple[InputFile, ...],
        *,
        keep: bool = True,
    ) -> None:
        self.id = secrets.token_hex(16)
        self.tag = job_tag(self.id)
        self.client = client
        self.stdin_sha256 = hashlib.sha256(manifest.stdin).hexdigest() if manifest.stdin else DIGEST_OF_NOTHING
        self.manifest = replace(manifest, stdin=b"") if manifest.stdin else manifest
        self.memory_bytes = manifest.memory_mb * MIB
        self.given = given
        self.account = account
        self.inputs = inputs
        self.keep = keep
        self.erased = False
        self.changed = Wakeup()
        self.stdout = LogBuffer(self.changed, account.grant)
        self.stderr = LogBuffer(self.changed, account.grant)
        self.outputs: dict[str, StoredOutput] = {}
        self.outputs_omitted = 0
        self.storage_full = False
        self.status = Status.QUEUED
        self.outcome: Outcome | None = None
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.usage: Usage | None = None
        self.limits_hit: tuple[LimitHit, ...] = ()
        self.isolation = b""
        self.failure: Failure | None = None
        self.submitted_at = time.time()
        self.submitted = time.monotonic()
        self.left_queue: float | None = None
        self.started: float | None = None
        self.ended: float | None = None
        self.ttl_seconds = 0.0

    @property
    def manifest_sha256(self) -> str:
        """Of the manifest with every default filled in, as canonical JSON (RFC 8785), `stdin` by its SHA-256."""
        asked = self.manifest
        return digest_of(
            {
                "args": asked.args,
                "cpu_seconds": asked.cpu_seconds,
                "entrypoint": asked.entrypoint,
                "env": asked.env,
                "environment": asked.environment,
                "fresh_interpreter": asked.fresh_interpreter,
                "interpreter": asked.interpreter,
                "memory_mb": asked.memory_mb,
                "outputs": asked.outputs,
                "processes": asked.processes,
                "stdin_sha256": self.stdin_sha256,
                "timeout": asked.timeout,
            }
        )

    @property
    def isolation_sha256(self) -> str:
        """Of the isolation report as canonical JSON."""
        return digest_of(json.loads(self.isolation or b"{}"))

    def unpacked(self) -> None:
        """The sandbox has made files of the archive, in the job's own memory, and closed it."""
        self.account.give_back(self.given.archive_bytes)
        self.given.archive_bytes = 0

    def release_input(self) -> None:
        """Nobody needs what the client sent any more."""
        self.given.close()
        self.unpacked()
        self.account.give_back(self.given.stdin_bytes)
        self.given.stdin_bytes = 0

    async def wait_ended(self, seconds: float | None = None) -> bool:
        """Until the job has ended or is erased, at most `seconds`. Returns whether it has."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not (self.status.ended or self.erased):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            await self.changed.wait(left)
        return True

    def erase(self) -> None:
        """Let go of everything that the client sent or its job made, and wake whoever waits for more."""
        self.erased = True
        self.given.close()
        self.stdout.erase()
        self.stderr.erase()
        for output in self.outputs.values():
            output.erase()
        self.outputs.clear()
        self.manifest = Manifest(entrypoint="", interpreter=self.manifest.interpreter)
        self.inputs = ()
        self.isolation = b""
        self.account.close()
        self.changed.wake()


def digest_of(value: object) -> str:
    """SHA-256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()
