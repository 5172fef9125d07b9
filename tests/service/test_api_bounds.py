"""Bounds that hold before a body is whole, and time that runs out though something still comes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from typing import Any

import pytest

from sandrun.api import guard, routes_jobs, upload
from sandrun.jobs.memfile import SEALS
from sandrun.spawner.client import Order
from tests.service.api_server import listening
from tests.service.api_world import world
from tests.service.spawner_double import SandboxDouble, SpawnerDouble

pytestmark = pytest.mark.requirement(30)

PART = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="x"\r\n\r\n'


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the body and answers with 204."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def chunked(path: bytes, *pieces: bytes, kind: bytes = b"application/json") -> bytes:
    """The beginning of a request whose body does not end."""
    lines = (b"POST %s HTTP/1.1" % path, b"Host: localhost", b"Content-Type: " + kind, b"Transfer-Encoding: chunked")
    return b"\r\n".join(lines) + b"\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


async def test_body_that_never_ends_gets_408() -> None:
    """It comes as fast as it must, for ever."""
    bounds = guard.Bounds(body_seconds=0.5, body_grace_seconds=0.2, body_bytes_per_second=100)
    async with (
        listening(nothing, bounds, interval=0.05) as server,
        asyncio.timeout(3),
        contextlib.aclosing(await server.connect()) as connection,
    ):
        connection.send(chunked(b"/"))
        answer = asyncio.create_task(connection.reply())
        while not answer.done():
            connection.send(b"32\r\n" + b"x" * 50 + b"\r\n")
            await asyncio.sleep(0.02)
        assert answer.result().status == 408


async def test_idle_connection_is_closed() -> None:
    async with listening(nothing, guard.Bounds(), interval=0.05) as server, asyncio.timeout(3):
        server.server.config.timeout_keep_alive = 0  # seconds after an answer
        async with contextlib.aclosing(await server.connect()) as connection:
            connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await connection.reply()).status == 204
            assert await connection.ended() == b""


async def test_run_body_is_refused_as_soon_as_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_jobs, "RUN_BODY_BYTES", 100_000)
    async with world() as api, contextlib.aclosing(await api.served.connect()) as connection:
        connection.send(chunked(b"/run", b'{"code": "', *[b"x" * 10_000] * 11))
        reply = await connection.reply()
        assert (reply.status, reply.json["field"]) == (413, "body")
        assert api.service.counts["store_used_bytes"] == 0


async def test_files_are_refused_as_soon_as_they_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "ARCHIVE_BYTES", 100_000)
    async with world() as api, contextlib.aclosing(await api.served.connect()) as connection:
        kind = b"multipart/form-data; boundary=b"
        connection.send(chunked(b"/submit", PART % b"files", *[b"x" * 10_000] * 12, kind=kind))
        reply = await connection.reply()
        assert (reply.status, reply.json["field"]) == (413, "files")
        assert api.service.counts["store_used_bytes"] == 0


class SealsSeen(SpawnerDouble):
    """Looks at what it is handed, which is closed soon."""

    def __init__(self) -> None:
        super().__init__()
        self.seals: list[int] = []

    def start(self, order: Order) -> SandboxDouble:
        given = [order.archive_fd, *([order.stdin_fd] if order.stdin_fd is not None else [])]
        self.seals += [fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) for descriptor in given]
        return super().start(order)


@pytest.mark.requirement(27)
async def test_what_a_sandbox_is_handed_was_sealed_before_it_was_looked_at() -> None:
    """Nobody, we neither, can change an archive between its check and its unpacking."""
    spawner = SealsSeen()
    async with world(spawner=spawner) as api:
        _, sandbox = await api.submit(stdin="input")
        sandbox.end()
        asked = asyncio.create_task(api.http.post("/run", json={"code": "x", "stdin": "input"}))
        sandbox = await api.next_sandbox()
        sandbox.begin()
        sandbox.end_outputs()
        sandbox.end()
        assert (await asked).status_code == 200
    assert spawner.seals == [SEALS] * 4
