"""What is told of a job: the result object to its client, one line to the log."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from sandrun.jobs.job import Job
from sandrun.jobs.result import ExecutionMetadata, JobResult, Truncated
from sandrun.model import INLINE_OUTPUT_BYTES, INLINE_OUTPUTS_BYTES, OutputFile
from sandrun.spawner.client import Ended

TELLING_STEPS = ("unpack", "snapshot")
"""Set-up steps whose errors may quote what a client sent: their text stays out of the log."""


def describe(job: Job, position: int | None, *, logs: bool) -> JobResult:
    """The result object of a job; see `JobService.result`."""
    usage = job.usage
    shown = []
    room = INLINE_OUTPUTS_BYTES
    for output in job.outputs.values():
        inline = None
        if logs and output.size <= min(INLINE_OUTPUT_BYTES, room):
            room -= output.size
            inline = base64.b64encode(output.data).decode()
        shown.append(OutputFile(path=output.path, size=output.size, sha256=output.sha256, content_base64=inline))
    return JobResult(
        job_id=job.id,
        job_tag=job.tag,
        status=job.status,
        outcome=job.outcome,
        exit_code=job.exit_code,
        signal=job.signal,
        position=position,
        stdout=job.stdout.text() if logs else None,
        stderr=job.stderr.text() if logs else None,
        truncated=Truncated(stdout=job.stdout.truncated, stderr=job.stderr.truncated),
        limits_hit=list(job.limits_hit),
        execution_metadata=ExecutionMetadata(
            submitted_at=_utc(job, job.submitted),
            started_at=_utc(job, job.started) if job.started is not None else None,
            ended_at=_utc(job, job.ended) if job.ended is not None else None,
            queue_seconds=round(job.left_queue - job.submitted, 6) if job.left_queue is not None else None,
            wall_seconds=usage.wall_seconds if usage is not None else None,
            cpu_seconds=usage.cpu_seconds if usage is not None else None,
            memory_peak_bytes=usage.memory_peak_bytes if usage is not None else None,
            processes_peak=usage.processes_peak if usage is not None else None,
            interpreter=job.manifest.interpreter,
            environment=job.manifest.environment,
        ),
        output_files=shown,
        outputs_omitted=job.outputs_omitted,
        isolation=msgspec.Raw(job.isolation or b"{}"),
        failure=job.failure,
    )


def log_fields(job: Job) -> dict[str, Any]:
    """What stays of a job in the log: tag, sizes, verdict, nothing of its content (requirement 26)."""
    return {
        "job": job.tag,
        "outcome": job.outcome,
        "exit_code": job.exit_code,
        "limits_hit": job.limits_hit,
        "stdout_bytes": job.stdout.total,
        "stderr_bytes": job.stderr.total,
        "outputs": len(job.outputs),
        "wall_seconds": job.usage and round(job.usage.wall_seconds, 6),
        "cpu_seconds": job.usage and job.usage.cpu_seconds,
    }


def log_end(fields: dict[str, Any], ended: Ended) -> None:
    """One line for a job's end. Why a sandbox could not be built names host paths, so only the log is told."""
    log = structlog.get_logger()
    if ended.failed is None:
        log.info("job_ended", **fields)
    else:
        told = {"step": ended.failed.get("step"), "errno": ended.failed.get("errno")}
        if told["step"] not in TELLING_STEPS:
            told["details"] = str(ended.failed.get("details"))[:1000]
        log.error("setup_failed", **fields, **told)


def _utc(job: Job, monotonic: float) -> str:
    moment = datetime.fromtimestamp(job.submitted_at + monotonic - job.submitted, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
