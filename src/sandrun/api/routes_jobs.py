"""Taking jobs on, telling how they stand, stopping and erasing them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandrun.api.context import Context
from sandrun.api.problems import Refused
from sandrun.api.requests import WAIT_SECONDS, Parameters, body_pieces, preferred, until_gone
from sandrun.api.responses import Answer, Json, Pieces
from sandrun.api.routes import EVENTS, JOB_ID, Body, Call, Parameter
from sandrun.api.streams import SILENCE_SECONDS, STREAMS, Item, follow
from sandrun.api.upload import receive_upload
from sandrun.jobs.job import Job
from sandrun.jobs.request import RunRequest, parse_run
from sandrun.jobs.result import JobResult
from sandrun.model import RUN_BODY_BYTES, Status, parse_manifest

SMALL_BODY_BYTES = 32 * 1024
"""Up to this much JSON is parsed in the event loop: a thread would cost more than the work."""
EXPANSION = 4
"""How many times its size a body takes while it is being parsed: bytes, text, values, files."""

RUN_KINDS = ("application/json", "application/x-www-form-urlencoded", "")
"""Content types of /run. curl -d sends the second; a page of another site could too, and is stopped by its Origin."""


class Submitted(msgspec.Struct, frozen=True):
    """A job was taken on.

    Attributes:
        job_id: the only credential for all that follows.
        position: place in the queue, from 1; null once it has left it.
    """

    job_id: str
    job_tag: str
    status: Status
    position: int | None


class RunContent(msgspec.Struct, frozen=True):
    """Bytes that are no text."""

    base64: str


class RunBody(msgspec.Struct, omit_defaults=True, frozen=True):
    """A whole job. `code` alone works: python3, 30 seconds, no outputs. For the schema; `jobs.request` reads it."""

    code: str
    interpreter: str | None = None
    files: dict[str, str | RunContent] | None = None
    args: list[str] | None = None
    env: dict[str, str] | None = None
    stdin: str | RunContent | None = None
    outputs: list[str] | None = None
    timeout: float | None = None
    memory_mb: int | None = None
    cpu_seconds: float | None = None
    processes: int | None = None
    environment: str | None = None
    fresh_interpreter: bool | None = None
    keep: bool | None = None


class JobCalls:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.service = context.service

    async def submit(self, request: Request) -> Response:
        client = self.context.client(request)
        account = self.service.open_account(client)
        try:
            upload = await receive_upload(request, account, self._check_manifest)
        except BaseException:
            account.close()
            raise
        # From here on the service owns account and descriptor, whatever happens.
        job = await until_gone(
            request.receive, self.service.submit(client, upload.archive_fd, upload.manifest, account)
        )
        submitted = Submitted(job.id, job.tag, job.status, self.service.position(job))
        return Json(submitted, 202, {"location": f"/jobs/{job.id}"})

    def _check_manifest(self, manifest: bytes) -> None:
        """Refuse early. A large one waits for the thread that looks at the archive."""
        if len(manifest) <= SMALL_BODY_BYTES:
            parse_manifest(manifest, self.context.ceilings)

    async def run(self, request: Request) -> Response:
        client = self.context.client(request)
        asked = await self._read_run(request)
        if preferred(request, ("application/json", "text/event-stream")) == "text/event-stream":
            job = await until_gone(request.receive, self.service.run(client, asked))
            return Pieces(self._run_events(job), "text/event-stream", done=partial(self.service.dismiss, job))

        async def whole() -> Response:
            job = await self.service.run(client, asked)
            try:
                await self.service.wait(job)
                return Json(self.service.result(job, logs=True))
            finally:
                self.service.dismiss(job)

        return await until_gone(request.receive, whole())

    async def _read_run(self, request: Request) -> RunRequest:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in RUN_KINDS:
            raise Refused(415, "unsupported_media_type", "send application/json", field="Content-Type")
        client = self.context.client(request)
        body = bytearray()
        account = self.service.open_account(client)
        try:
            async for piece in body_pieces(request, RUN_BODY_BYTES, "body"):
                body += piece
                if len(body) > SMALL_BODY_BYTES:
                    account.take(EXPANSION * len(body) - account.held)
            if len(body) <= SMALL_BODY_BYTES:
                return parse_run(bytes(body), self.context.ceilings)
            return await self.context.threads.run(client, partial(parse_run, bytes(body), self.context.ceilings))
        finally:
            account.close()

    async def _run_events(self, job: Job) -> AsyncIterator[bytes]:
        """The job's id, its frames, and the result in the place of their end."""
        yield _event("job", Submitted(job.id, job.tag, job.status, self.service.position(job)))
        async for item in follow(job, dict.fromkeys(STREAMS, 0), silence=SILENCE_SECONDS):
            if item is None:
                yield b": still here\n\n"
            elif getattr(item, "event", None) != "end":
                yield _event("log", item)
        if not job.erased:
            yield _event("result", self.service.result(job, logs=True))

    async def status(self, request: Request) -> Response:
        job = self.service.get(request.path_params["job_id"])
        wait = Parameters(request).number("wait", WAIT_SECONDS)
        if wait and not job.status.ended:
            deadline = time.monotonic() + wait
            await until_gone(request.receive, self.service.wait(job, deadline - time.monotonic()))
        return Json(self.service.result(job))

    async def cancel(self, request: Request) -> Response:
        job = self.service.get(request.path_params["job_id"])
        await self.service.cancel(job)
        return Json(self.service.result(job))

    async def delete(self, request: Request) -> Response:
        self.service.erase(self.service.get(request.path_params["job_id"]))
        return Answer(b"", "application/json", 204)

    def calls(self) -> list[Call]:
        result = (Body(type=JobResult, about="The result object."),)
        wait = Parameter(
            name="wait",
            about="Seconds to wait for the job's end before answering (long poll).",
            schema={"type": "number", "minimum": 0, "maximum": WAIT_SECONDS, "default": 0},
        )
        status = {
            "method": "GET",
            "about": "How a job stands: the result object, complete once `status` is completed or failed.",
            "handler": self.status,
            "answers": {200: result},
            "problems": (400, 404),
            "parameters": (JOB_ID, wait),
        }
        return [
            Call(
                method="POST",
                path="/run",
                name="run",
                about="Run a program and answer with its result; one that fails is a result too. Closing the "
                "connection cancels it. Erased when answered unless `keep`.",
                handler=self.run,
                body=(Body(type=RunBody, about="`code` alone works."),),
                answers={200: (*result, EVENTS)},
                problems=(400, 413, 415, 429),
            ),
            Call(
                method="POST",
                path="/submit",
                name="submit",
                about="Take on a job: a gzip'd tar, and a manifest as a part or as job.json in the archive.",
                handler=self.submit,
                body=(
                    Body(
                        kind="multipart/form-data",
                        schema={
                            "type": "object",
                            "required": ["files"],
                            "properties": {
                                "files": {"type": "string", "contentMediaType": "application/gzip"},
                                "manifest": {"type": "string", "contentMediaType": "application/json"},
                            },
                        },
                    ),
                ),
                answers={202: (Body(type=Submitted),)},
                problems=(400, 413, 415, 429),
            ),
            Call(path="/status/{job_id}", name="status", **status),  # type: ignore[arg-type]
            Call(path="/jobs/{job_id}", name="job", **status),  # type: ignore[arg-type]
            Call(
                method="POST",
                path="/jobs/{job_id}/cancel",
                name="cancel",
                about="Stop a job and keep what it wrote. No effect on one that has ended.",
                handler=self.cancel,
                answers={200: result},
                problems=(404,),
                parameters=(JOB_ID,),
            ),
            Call(
                method="DELETE",
                path="/jobs/{job_id}",
                name="delete",
                about="Stop a job if it runs, and erase all of it.",
                handler=self.delete,
                answers={204: ()},
                problems=(404,),
                parameters=(JOB_ID,),
            ),
        ]


_encoder = msgspec.json.Encoder()


def _event(name: str, value: Item | Submitted | JobResult) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encoder.encode(value))
