"""The requests of the API without any I/O: both clients send what is built here, and read answers with `results`."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict
from urllib.parse import quote, urlsplit

from sandrun.client.pack import pack_directory
from sandrun.client.results import LogEnd, LogPart, decode_object, read_frame
from sandrun.errors import ConfigError, InvalidInput, ProtocolError, ServerError
from sandrun.model import OutputFile, show

DEFAULT_URL = "http://127.0.0.1:8443"
ANSWER_SECONDS = 60.0
"""How long a server may be silent on a request that has nothing to wait for."""
WAIT_SECONDS = 30
"""How long one long-poll asks the server to hold its answer."""
RUN_QUEUE_SECONDS = 30


class ManifestFields(TypedDict, total=False):
    """The fields of a manifest by their own names; see docs/api.md for units and ranges."""

    entrypoint: str
    interpreter: str
    args: Iterable[str]
    env: Mapping[str, str]
    stdin: str
    outputs: Iterable[str]
    timeout: float
    memory_mb: int
    cpu_seconds: float
    processes: int
    environment: str
    fresh_interpreter: bool


class RunFields(TypedDict, total=False):
    """What `/run` takes beside `code`. `files` and `stdin` may be bytes."""

    interpreter: str
    args: Iterable[str]
    env: Mapping[str, str]
    stdin: str | bytes
    files: Mapping[str, str | bytes]
    outputs: Iterable[str]
    timeout: float
    memory_mb: int
    cpu_seconds: float
    processes: int
    environment: str
    fresh_interpreter: bool
    keep: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        target: path and query, quoted.
        answer_seconds: how long the server may stay silent before we give up.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    answer_seconds: float = ANSWER_SECONDS


def run(code: str, fields: RunFields) -> Request:
    body: dict[str, Any] = {"code": code, **{key: value for key, value in fields.items() if value is not None}}
    if "stdin" in body:
        body["stdin"] = _content(body["stdin"])
    if "files" in body:
        body["files"] = {path: _content(content) for path, content in body["files"].items()}
    _listed(body)
    timeout = body.get("timeout", 30)
    patience = timeout if isinstance(timeout, (int, float)) else 0
    return Request(
        method="POST",
        target="/run",
        headers={"Content-Type": "application/json", "Accept": "application/json"},
        content=_json(body),
        answer_seconds=patience + RUN_QUEUE_SECONDS + ANSWER_SECONDS,
    )


def submit(
    source: str | os.PathLike[str] | bytes, manifest: Mapping[str, Any] | None, fields: ManifestFields
) -> Request:
    """`source` is a directory or the bytes of an archive. Without a manifest the archive's own `job.json` counts."""
    archive = source if isinstance(source, bytes) else pack_directory(source)
    merged = {**(manifest or {}), **{key: value for key, value in fields.items() if value is not None}}
    _listed(merged)
    boundary = f"sandrun-{secrets.token_hex(16)}"
    parts = []
    if merged:  # first, so that the server can refuse before it takes the files
        parts += [
            f'--{boundary}\r\nContent-Disposition: form-data; name="manifest"\r\n'
            "Content-Type: application/json\r\n\r\n".encode(),
            _json(merged),
            b"\r\n",
        ]
    parts += [
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="files.tar.gz"\r\n'
        "Content-Type: application/gzip\r\n\r\n".encode(),
        archive,
        f"\r\n--{boundary}--\r\n".encode(),
    ]
    return Request(
        method="POST",
        target="/submit",
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        content=b"".join(parts),
    )


def result(job_id: str, *, wait_seconds: int = 0) -> Request:
    query = f"?wait={wait_seconds}" if wait_seconds else ""
    return Request(method="GET", target=f"/jobs/{_id(job_id)}{query}", answer_seconds=wait_seconds + ANSWER_SECONDS)


def poll_seconds(left: float) -> int:
    """How long to have the next long-poll wait, `left` seconds before the caller's patience ends."""
    return max(1, min(WAIT_SECONDS, math.ceil(left)))


def choose(files: Sequence[OutputFile], paths: Iterable[str] | None) -> list[OutputFile]:
    """The files that `paths` name, all if it is None. Raises: InvalidInput for a path that is not among them."""
    if paths is None:
        return list(files)
    known = {file.path: file for file in files}
    chosen = []
    for path in paths:
        if path not in known:
            raise InvalidInput("path", f"{show(path, 200)} is not among the outputs of this job")
        chosen.append(known[path])
    return chosen


def logs(job_id: str, stream: str) -> Request:
    """One stream, exact bytes."""
    return Request(
        method="GET",
        target=f"/logs/{_id(job_id)}?stream={stream}",
        headers={"Accept": "application/octet-stream"},
    )


def outputs(job_id: str) -> Request:
    return Request(method="GET", target=f"/outputs/{_id(job_id)}")


def download(job_id: str, path: str) -> Request:
    return Request(method="GET", target=f"/download/{_id(job_id)}/{quote(path, safe='/')}")


def cancel(job_id: str) -> Request:
    return Request(method="POST", target=f"/jobs/{_id(job_id)}/cancel")


def delete(job_id: str) -> Request:
    return Request(method="DELETE", target=f"/jobs/{_id(job_id)}")


def _id(job_id: str) -> str:
    if not job_id or not job_id.isascii() or not job_id.isalnum() or len(job_id) > 128:
        raise InvalidInput("job_id", f"{show(job_id)} is not the id of a job")
    return job_id


def _content(content: str | bytes) -> Any:
    return {"base64": base64.b64encode(content).decode()} if isinstance(content, bytes) else content


def _listed(fields: dict[str, Any]) -> None:
    """Tuples, generators and the like as the lists that JSON has; a lone string stays for the server to refuse."""
    for key in ("args", "outputs"):
        if key in fields and not isinstance(fields[key], str):
            fields[key] = list(fields[key])


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput("manifest", f"cannot be written as JSON: {error}") from None


# ---- answers -----------------------------------------------------------------------------------------------


def raise_problem(status: int, body: bytes) -> None:
    """Raises: ServerError with the server's own words if `status` is an error."""
    if status < 400:
        return
    try:
        problem = decode_object(body, "error")
    except ProtocolError:
        problem = {"error": "unreadable", "details": f"the server answered with status {status} and no reason"}
    raise ServerError(status, problem)


def unreachable(url: str, error: BaseException) -> ServerError:
    """The server did not answer at all: status 0."""
    reason = re.sub(r"\A\[Errno \d+\] ", "", str(error)) or type(error).__name__
    return ServerError(0, {"error": "unreachable", "details": f"{url} does not answer: {reason}"})


# ---- where the server is -----------------------------------------------------------------------------------


def check_url(url: str | None) -> str:
    """The server's base URL: what is given, else SANDRUN_URL, else `DEFAULT_URL`. Raises: ConfigError."""
    url = url or os.environ.get("SANDRUN_URL") or DEFAULT_URL
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        parts.port  # noqa: B018 - raises on a port that is no number
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"{show(url, 200)} is not the URL of a server; accepted: http://HOST:PORT or https://HOST:PORT"
        )
    return url.rstrip("/")


def is_local(url: str) -> bool:
    """A loopback address, which no proxy of the environment's can reach for us."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


# ---- live logs ---------------------------------------------------------------------------------------------


class LogStream:
    """The state of one live stream over any number of connections: where each stream has got to, and the end."""

    RECONNECTS = 8
    """Connections in a row that bring nothing before we give up."""

    def __init__(self, url: str, job_id: str, *, stdout: int = 0, stderr: int = 0) -> None:
        self._base = "ws" + url.removeprefix("http") + f"/logs/{_id(job_id)}/stream"
        self._next = {"stdout": stdout, "stderr": stderr}
        self._failures = 0

    @property
    def url(self) -> str:
        """Where to connect to go on from here."""
        return f"{self._base}?stdout={self._next['stdout']}&stderr={self._next['stderr']}"

    def feed(self, frame: str | bytes) -> LogPart | LogEnd | None:
        item = read_frame(frame)
        self._failures = 0
        if isinstance(item, LogPart) and item.data:
            expected = self._next[item.stream]
            repeated = max(0, expected - item.offset)  # sent twice over a broken connection
            if repeated and repeated >= len(item.data):
                return None
            offset = item.offset + repeated
            self._next[item.stream] = item.offset + len(item.data)
            return LogPart(
                stream=item.stream, offset=offset, data=item.data[repeated:], skipped=max(0, offset - expected)
            )
        return item

    def pause_after_loss(self) -> float | None:
        """The connection broke: seconds until the next try, None to give up."""
        self._failures += 1
        if self._failures > self.RECONNECTS:
            return None
        return float(min(5.0, 0.1 * 2.0**self._failures))
