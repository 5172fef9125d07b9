"""Live logs: one source of frames for WebSocket and SSE, each reader at its own pace and offset.

A frame is `{"stream", "offset", "text"}`, or `"base64"` where the bytes are no UTF-8; its next offset is `offset` plus
its bytes. Readers read what the job's buffers keep, so a slow one holds up neither the job nor another reader. What a
job wrote beyond what is kept is told as `{"event": "gap", "stream", "offset", "bytes"}`, and the last frame is
`{"event": "end", "status", "outcome", "exit_code"}`.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import msgspec
from starlette.types import Receive, Scope, Send

from sandrun.api.problems import Gone
from sandrun.api.requests import until_gone
from sandrun.jobs.job import Job
from sandrun.jobs.logs import LogBuffer

FRAME_BYTES = 16 * 1024
BATCH_SECONDS = 0.02
"""After a small frame we wait so long for more: a job that prints line by line costs fifty frames a second, not all."""
SILENCE_SECONDS = 15.0
"""After so much silence an SSE stream gets a comment, or proxies take it for dead."""
STREAMS = ("stdout", "stderr")


class Frame(msgspec.Struct, omit_defaults=True, frozen=True):
    """A piece of a stream, as text or, where it is no UTF-8, as base64."""

    stream: str
    offset: int
    text: str | None = None
    base64: str | None = None


class Gap(msgspec.Struct, frozen=True):
    """Bytes of a stream that were not kept."""

    event: str
    stream: str
    offset: int
    bytes: int


class End(msgspec.Struct, frozen=True):
    """The job is over, and so is the stream."""

    event: str
    status: str
    outcome: str | None
    exit_code: int | None


class Erased(msgspec.Struct, frozen=True):
    """The job was erased while it was being followed: there is no end to tell."""

    event: str = "erased"


Item = Frame | Gap | End | Erased

_encoder = msgspec.json.Encoder()


async def follow(
    job: Job, offsets: dict[str, int], *, exact: bool = False, silence: float | None = None
) -> AsyncIterator[Item | None]:
    """The frames of the streams in `offsets` from these offsets on, then `End`.

    Args:
        exact: base64 for all, for readers that want bytes.
        silence: seconds without a frame after which None is yielded, again and again.
    """
    buffers: dict[str, LogBuffer] = {name: getattr(job, name) for name in offsets}
    following = dict(offsets)
    loop = asyncio.get_running_loop()
    while True:
        begun = loop.time()
        sent = 0
        for name, buffer in buffers.items():
            frame, size = take(name, buffer, following[name], exact=exact)
            if frame is not None:
                following[name] += size
                sent += size
                yield frame
        if sent:
            if sent < FRAME_BYTES and not job.status.ended:
                await asyncio.sleep(max(0.0, begun + BATCH_SECONDS - loop.time()))
            continue
        if job.status.ended or job.erased:
            break
        if not await job.changed.wait(silence):
            yield None
    if job.erased:
        yield Erased()
        return
    for name, buffer in buffers.items():
        if buffer.truncated:
            yield Gap("gap", name, buffer.kept, buffer.truncated)
    yield End("end", job.status, job.outcome, job.exit_code)


def take(name: str, buffer: LogBuffer, offset: int, *, exact: bool) -> tuple[Frame | None, int]:
    """The next frame of a stream and its size in bytes; None if there is nothing (yet), or but half a character."""
    data = buffer.read(offset, FRAME_BYTES)
    if not data:
        return None, 0
    if not exact:
        try:
            return Frame(name, offset, text=data.decode()), len(data)
        except UnicodeDecodeError as error:
            cut = error.start if error.reason == "unexpected end of data" else -1
            if cut > 0:
                return Frame(name, offset, text=data[:cut].decode()), cut
            if cut == 0 and not buffer.ended:
                return None, 0
    return Frame(name, offset, base64=base64.b64encode(data).decode()), len(data)


async def as_events(items: AsyncIterator[Item | None]) -> AsyncIterator[bytes]:
    """Server-sent events (HTML standard, 9.2): one `data:` line of JSON each, as JSON has no line breaks."""
    async for item in items:
        yield b": still here\n\n" if item is None else b"data: " + _encoder.encode(item) + b"\n\n"


IDLE_MESSAGES = 256
"""What a WebSocket client may send us, who listens to nothing of it, before we end it."""


async def serve_websocket(items: AsyncIterator[Item | None], scope: Scope, receive: Receive, send: Send) -> None:
    """Accept, send every item as a text frame, close with 1000."""
    heard = 0

    async def hear() -> dict[str, object]:
        nonlocal heard
        message = await receive()
        heard += 1
        return {"type": "websocket.disconnect"} if heard > IDLE_MESSAGES else dict(message)

    async def pump() -> None:
        async for item in items:
            if item is not None:
                await send({"type": "websocket.send", "text": _encoder.encode(item).decode()})

    await send({"type": "websocket.accept"})
    try:
        await until_gone(hear, pump())
    except Gone:
        if heard > IDLE_MESSAGES:
            await send({"type": "websocket.close", "code": 1008, "reason": "nothing is expected of the client"})
        return
    await send({"type": "websocket.close", "code": 1000})
