"""The result object: the same from `/run`, `/status`, the SDK and `--json` (docs/api.md).

Plain data, which msgspec encodes; `isolation` is JSON already. What is not known yet, or cannot be measured on this
host, is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from sandrun.model import LimitHit, Outcome, OutputFile, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """Bytes of each stream that were dropped, because it was longer than LOG_BYTES or the store was full."""

    stdout: int = 0
    stderr: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionMetadata:
    """When and with what a job ran.

    Attributes:
        submitted_at, started_at, ended_at: UTC, RFC 3339 with milliseconds and `Z`.
        queue_seconds: from admission until its sandbox was asked for.
        wall_seconds, cpu_seconds, memory_peak_bytes, processes_peak: as the kernel measured them.
        charged_seconds, throttled_seconds: CPU taken from the client's budget, time frozen for it; None without one.
        environment: name of the package set; None is the bare interpreter.
    """

    submitted_at: str
    started_at: str | None = None
    ended_at: str | None = None
    queue_seconds: float | None = None
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    charged_seconds: float | None = None
    throttled_seconds: float | None = None
    memory_peak_bytes: int | None = None
    processes_peak: int | None = None
    interpreter: str
    environment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job ended `setup_failed`: the step by its name, and the kernel's answer, 0 if it was not the kernel."""

    step: str
    errno: int
    details: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """All that is told of a job.

    Attributes:
        job_tag: first 12 hex digits of SHA-256(job_id): what logs and metrics carry instead of the id.
        position: place in the queue from 1, None once it has left it.
        stdout, stderr: text, invalid UTF-8 replaced; only in `/run`'s answer, else None.
        output_files: without `content_base64` but in `/run`'s answer, for files up to 64 KiB and 1 MiB together.
        outputs_omitted: files that matched but were left out: too many, too large, unreadable, or the store was full.
        isolation: what was measured of the sandbox's walls; empty until the job has ended.
        violations: calls that were refused; None where they are not counted.
        failure: only with the outcome `setup_failed`.
    """

    job_id: str
    job_tag: str
    status: Status
    outcome: Outcome | None = None
    exit_code: int | None = None
    signal: int | None = None
    position: int | None = None
    stdout: str | None = None
    stderr: str | None = None
    truncated: Truncated = field(default_factory=Truncated)
    limits_hit: list[LimitHit] = field(default_factory=list)
    execution_metadata: ExecutionMetadata
    output_files: list[OutputFile] = field(default_factory=list)
    outputs_omitted: int = 0
    isolation: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
    violations: list[dict[str, Any]] | None = None
    failure: Failure | None = None
