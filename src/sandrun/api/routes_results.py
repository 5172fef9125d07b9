"""What a job wrote: logs, and the files that it left."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandrun.api.archive import Packer
from sandrun.api.context import Context
from sandrun.api.requests import Parameters, preferred
from sandrun.api.responses import PIECE_BYTES, Answer, Json, Pieces, disposition
from sandrun.api.routes import ENCODING, EVENTS, JOB_ID, OFFSETS, STREAM, Body, Call, Parameter
from sandrun.api.streams import SILENCE_SECONDS, STREAMS, as_events, follow, serve_websocket
from sandrun.errors import Conflict, InvalidInput, NotFound
from sandrun.jobs.job import Job, StoredOutput
from sandrun.jobs.logs import LogBuffer
from sandrun.jobs.result import Truncated
from sandrun.model import OutputFile, Status


class Offsets(msgspec.Struct, frozen=True):
    """Where to go on reading, in bytes."""

    stdout: int
    stderr: int


class Logs(msgspec.Struct, frozen=True):
    """Both streams as text, invalid UTF-8 replaced; null for one that was not asked for."""

    stdout: str | None
    stderr: str | None
    next: Offsets
    truncated: Truncated
    status: Status


class OutputList(msgspec.Struct, frozen=True):
    """The files that can be downloaded."""

    files: list[OutputFile]
    omitted: int


class ResultCalls:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.service = context.service

    # ---- logs ----

    async def logs(self, request: Request) -> Response:
        job = self.service.get(request.path_params["job_id"])
        parameters = Parameters(request)
        offsets = _chosen_offsets(parameters)
        offered = ("text/plain", "application/json", "application/octet-stream", "text/event-stream")
        kind = preferred(request, offered)
        if kind == "text/event-stream":
            return self._events(job, offsets, parameters)
        if kind == "application/json":
            return await self._logs_as_json(request, job, offsets)
        if kind == "application/octet-stream":
            if len(offsets) != 1:
                raise InvalidInput("stream", "exact bytes are of one stream; accepted: stdout, stderr")
            ((name, offset),) = offsets.items()
            buffer: LogBuffer = getattr(job, name)
            headers = {"content-disposition": disposition(f"{name}.log")}
            return Pieces(_bytes_of(buffer, offset, buffer.kept), kind, headers)
        return Pieces(_text_of(job, offsets), "text/plain; charset=utf-8")

    async def follow_logs(self, request: Request) -> Response:
        """What an SSE client gets at the WebSocket's address."""
        job = self.service.get(request.path_params["job_id"])
        parameters = Parameters(request)
        return self._events(job, _chosen_offsets(parameters), parameters)

    def _events(self, job: Job, offsets: dict[str, int], parameters: Parameters) -> Response:
        exact = parameters.choice("encoding", ("utf-8", "base64")) == "base64"
        return Pieces(as_events(follow(job, offsets, exact=exact, silence=SILENCE_SECONDS)), "text/event-stream")

    async def _logs_as_json(self, request: Request, job: Job, offsets: dict[str, int]) -> Response:
        ends = {name: max(offsets.get(name, 0), getattr(job, name).kept) for name in STREAMS}
        pieces = {name: getattr(job, name).read(offset) for name, offset in offsets.items()}

        def answer() -> Response:
            texts = {name: data.decode("utf-8", "replace") for name, data in pieces.items()}
            return Json(
                Logs(
                    stdout=texts.get("stdout"),
                    stderr=texts.get("stderr"),
                    next=Offsets(**ends),
                    truncated=Truncated(stdout=job.stdout.truncated, stderr=job.stderr.truncated),
                    status=job.status,
                )
            )

        if sum(map(len, pieces.values())) <= PIECE_BYTES:
            return answer()
        return await self.context.threads.run(self.context.client(request), answer)

    async def websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request({**scope, "type": "http", "method": "GET"})
        job = self.service.get(scope["path_params"]["job_id"])
        parameters = Parameters(request)
        exact = parameters.choice("encoding", ("utf-8", "base64")) == "base64"
        items = follow(job, _chosen_offsets(parameters), exact=exact)
        await serve_websocket(items, scope, receive, send)

    # ---- outputs ----

    async def outputs(self, request: Request) -> Response:
        job = self._ended(request)
        files = [OutputFile(path=o.path, size=o.size, sha256=o.sha256) for o in job.outputs.values()]
        return Json(OutputList(files, job.outputs_omitted))

    async def download_all(self, request: Request) -> Response:
        job = self._ended(request)
        pieces = self._packed(request, list(job.outputs.values()))
        return Pieces(pieces, "application/gzip", {"content-disposition": disposition(f"outputs-{job.tag}.tar.gz")})

    async def _packed(self, request: Request, outputs: list[StoredOutput]) -> AsyncIterator[bytes]:
        client = self.context.client(request)
        packer = Packer(outputs)
        while (piece := await self.context.threads.run(client, packer.next_piece)) is not None:
            yield piece

    async def download(self, request: Request) -> Response:
        job = self._ended(request)
        output = job.outputs.get(request.path_params["path"])
        if output is None:
            raise NotFound("the job left no file of this name that matches its outputs")
        headers = {"content-disposition": disposition(output.path), "etag": f'"{output.sha256}"'}
        if output.size <= PIECE_BYTES:
            return Answer(output.data, "application/octet-stream", headers=headers)
        return Pieces(_bytes_of(output, 0, output.size), "application/octet-stream", headers, size=output.size)

    def _ended(self, request: Request) -> Job:
        job = self.service.get(request.path_params["job_id"])
        if not job.status.ended:
            raise Conflict(f"the job is {job.status}; outputs are collected at its end")
        return job

    def calls(self) -> list[Call]:
        file_body = Body(kind="application/octet-stream", schema={"type": "string", "format": "binary"})
        path = Parameter(
            name="path", about="As /outputs lists it, percent-encoded.", schema={"type": "string"}, where="path"
        )
        follow_about = (
            "Follow the logs as they are written. A WebSocket handshake gets text frames, anything else SSE: "
            '`{"stream","offset","text"}` (or `"base64"`), at last `{"event":"end",…}`.'
        )
        return [
            Call(
                method="GET",
                path="/logs/{job_id}",
                name="logs",
                about="What the job wrote so far. Exact bytes of one stream with Accept: application/octet-stream.",
                handler=self.logs,
                answers={
                    200: (
                        Body(kind="text/plain", schema={"type": "string"}),
                        Body(type=Logs),
                        file_body,
                        EVENTS,
                    )
                },
                problems=(400, 404),
                parameters=(JOB_ID, STREAM, *OFFSETS, ENCODING),
            ),
            Call(
                method="GET",
                path="/logs/{job_id}/stream",
                name="follow",
                about=follow_about,
                handler=self.follow_logs,
                answers={200: (EVENTS,)},
                problems=(400, 404),
                parameters=(JOB_ID, STREAM, *OFFSETS, ENCODING),
            ),
            Call(
                method="GET",
                path="/outputs/{job_id}",
                name="outputs",
                about="The files that the job left and that match its `outputs`.",
                handler=self.outputs,
                answers={200: (Body(type=OutputList),)},
                problems=(404, 409),
                parameters=(JOB_ID,),
            ),
            Call(
                method="GET",
                path="/download/{job_id}",
                name="download_all",
                about="All outputs as one tar.gz; the same job gives the same bytes.",
                handler=self.download_all,
                answers={200: (Body(kind="application/gzip", schema={"type": "string", "format": "binary"}),)},
                problems=(404, 409),
                parameters=(JOB_ID,),
            ),
            Call(
                method="GET",
                path="/download/{job_id}/{path:output}",
                name="download",
                about="One output.",
                handler=self.download,
                answers={200: (file_body,)},
                problems=(404, 409),
                parameters=(JOB_ID, path),
            ),
        ]


def _chosen_offsets(parameters: Parameters) -> dict[str, int]:
    chosen = parameters.choice("stream", ("both", *STREAMS))
    return {name: parameters.integer(name) for name in (STREAMS if chosen == "both" else (chosen,))}


async def _bytes_of(source: LogBuffer | StoredOutput, offset: int, end: int) -> AsyncIterator[bytes]:
    """From `offset` to `end`; shorter, and so broken off, if the job is erased meanwhile."""
    while offset < end:
        piece = source.read(offset, min(PIECE_BYTES, end - offset))
        if not piece:
            raise NotFound("the job has been erased")
        offset += len(piece)
        yield piece


async def _text_of(job: Job, offsets: dict[str, int]) -> AsyncIterator[bytes]:
    """One stream after the other as UTF-8, what is none replaced."""
    for name, offset in offsets.items():
        buffer: LogBuffer = getattr(job, name)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        async for piece in _bytes_of(buffer, offset, buffer.kept):
            yield decoder.decode(piece).encode()
            await asyncio.sleep(0)
        if rest := decoder.decode(b"", final=True):
            yield rest.encode()
