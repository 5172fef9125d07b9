"""What a server answers, as values. Whatever does not have the documented shape raises ProtocolError."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandrun.errors import ProtocolError
from sandrun.model import LimitHit, Outcome, OutputFile, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job was taken. `job_id` is the only credential for all that follows: keep it as one keeps a password."""

    job_id: str
    status: Status
    position: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result object of docs/api.md. What is not known yet is None.

    Attributes:
        position: place in the queue, from 1, while queued.
        stdout, stderr: text, from `run` only; for submitted jobs see `Client.logs`.
        truncated: bytes of each stream that were not kept.
        metadata: `execution_metadata`: times, usage, interpreter, environment.
        isolation: the walls as they were measured, from inside and from the host.
        failure: which wall could not be built, {"step", "errno", "details"}, for the outcome `setup_failed`.
        raw: the whole object as it came.
    """

    job_id: str
    job_tag: str
    status: Status
    outcome: Outcome | None
    exit_code: int | None
    signal: int | None
    position: int | None
    stdout: str | None
    stderr: str | None
    truncated: Mapping[str, int]
    limits_hit: tuple[LimitHit, ...]
    metadata: Mapping[str, Any]
    output_files: tuple[OutputFile, ...]
    isolation: Mapping[str, Any]
    failure: Mapping[str, Any] | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def ended(self) -> bool:
        return self.status.ended

    @property
    def succeeded(self) -> bool:
        return self.status is Status.COMPLETED


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """Both streams as they are now; exact bytes."""

    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """A piece of a live stream.

    Attributes:
        stream: "stdout" or "stderr".
        offset: of its first byte in the stream.
        data: empty if there is only something to tell of `skipped`.
        skipped: bytes before it that are lost: the job wrote more than is kept.
    """

    stream: str
    offset: int
    data: bytes
    skipped: int = 0

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    """The last of a live stream: the job is over."""

    status: Status
    outcome: Outcome | None
    exit_code: int | None


def decode_object(body: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        raise ProtocolError(f"{what}: the server did not answer with JSON; is it a Sandrun server?") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"{what}: the server answered with JSON of another shape; is it a Sandrun server?")
    return value


def read_submitted(body: bytes) -> Submitted:
    value = decode_object(body, "submit")
    with _shape("submit"):
        return Submitted(
            job_id=_text(value["job_id"]), status=Status(value["status"]), position=_optional_int(value.get("position"))
        )


def read_result(body: bytes) -> Result:
    value = decode_object(body, "result")
    with _shape("result"):
        outcome = value["outcome"]
        return Result(
            job_id=_text(value["job_id"]),
            job_tag=_text(value["job_tag"]),
            status=Status(value["status"]),
            outcome=None if outcome is None else Outcome(outcome),
            exit_code=_optional_int(value["exit_code"]),
            signal=_optional_int(value["signal"]),
            position=_optional_int(value["position"]),
            stdout=value["stdout"],
            stderr=value["stderr"],
            truncated=dict(value["truncated"]),
            limits_hit=tuple(LimitHit(hit) for hit in value["limits_hit"]),
            metadata=dict(value["execution_metadata"]),
            output_files=_files(value["output_files"]),
            isolation=dict(value["isolation"]),
            failure=value.get("failure"),
            raw=value,
        )


def read_outputs(body: bytes) -> tuple[OutputFile, ...]:
    value = decode_object(body, "outputs")
    with _shape("outputs"):
        return _files(value["files"])


def read_frame(frame: str | bytes) -> LogPart | LogEnd | None:
    """One frame of a live stream; None is an event that this version need not know."""
    value = decode_object(frame, "log stream")
    with _shape("log stream"):
        if value.get("event") == "end":
            outcome = value.get("outcome")
            return LogEnd(
                status=Status(value["status"]),
                outcome=None if outcome is None else Outcome(outcome),
                exit_code=_optional_int(value.get("exit_code")),
            )
        if value.get("event") not in (None, "gap"):
            return None
        if value["stream"] not in ("stdout", "stderr"):
            raise ValueError(value["stream"])
        if "event" in value:
            return LogPart(
                stream=value["stream"], offset=int(value["offset"]), data=b"", skipped=_positive(value["bytes"])
            )
        data = base64.b64decode(value["base64"], validate=True) if "base64" in value else _text(value["text"]).encode()
        return LogPart(stream=value["stream"], offset=int(value["offset"]), data=data)


class _shape:  # noqa: N801 - reads as a statement
    """Turns the errors of taking an object apart into one of ours."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KeyError, ValueError, TypeError, AttributeError, binascii.Error)):
            raise ProtocolError(
                f"{self._what}: the server's answer is not of the documented shape ({error})"
            ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _optional_int(value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{value!r} is no integer")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no count of bytes")
    return value


def _files(value: Any) -> tuple[OutputFile, ...]:
    return tuple(
        OutputFile(
            path=_text(item["path"]),
            size=int(item["size"]),
            sha256=_text(item["sha256"]),
            content_base64=item.get("content_base64"),
        )
        for item in value
    )
