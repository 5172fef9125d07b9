"""Live logs over WebSocket and SSE: exact, resumable, each reader at its own pace (design.md section 6)."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import aclosing
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from sandrun.api import streams
from sandrun.api.guard import Bounds
from sandrun.model import LOG_BYTES, MIB, Outcome
from tests.service.api_world import World, world

NO_JOB = "0" * 32


def following(api: World, job_id: str, query: str = "", **options: Any) -> connect:
    url = f"ws://127.0.0.1:{api.served.port}/logs/{job_id}/stream{query}"
    return connect(url, proxy=None, compression=None, close_timeout=1, **options)


async def frames(stream: ClientConnection) -> list[dict[str, Any]]:
    return [json.loads(frame) async for frame in stream]


def joined(items: list[dict[str, Any]], stream: str = "stdout", start: int = 0) -> bytes:
    """The bytes of one stream; each frame must begin where the one before it ended."""
    data = b""
    for item in items:
        if item.get("stream") == stream and "event" not in item:
            assert item["offset"] == start + len(data)
            data += base64.b64decode(item["base64"]) if "base64" in item else item["text"].encode()
    return data


async def test_websocket_brings_each_line_as_it_is_written_and_then_the_end(api: World) -> None:
    job_id, sandbox = await api.submit()
    async with following(api, job_id) as stream:
        for line in ("one\n", "zwei ü\n"):
            sandbox.write("stdout", line.encode())
            async with asyncio.timeout(1):
                assert json.loads(await stream.recv())["text"] == line
        sandbox.write("stderr", b"oops")
        assert json.loads(await stream.recv()) == {"stream": "stderr", "offset": 0, "text": "oops"}
        sandbox.end(Outcome.EXITED, exit_code=4)
        assert json.loads(await stream.recv()) == {
            "event": "end",
            "status": "failed",
            "outcome": "exited",
            "exit_code": 4,
        }
        await stream.wait_closed()
    assert stream.close_code == 1000


async def test_events_bring_the_same_as_the_websocket(api: World) -> None:
    job_id = await api.finished(stdout=b"out\n" * 100, stderr=b"\xff")
    async with following(api, job_id) as stream:
        expected = await frames(stream)
    for path in (f"/logs/{job_id}", f"/logs/{job_id}/stream"):
        answer = await api.http.get(path, headers={"Accept": "text/event-stream"})
        assert answer.headers["content-type"] == "text/event-stream"
        events = [block.removeprefix("data: ") for block in answer.text.split("\n\n") if block]
        assert [json.loads(event) for event in events] == expected


@pytest.mark.requirement(33)
async def test_bytes_that_are_no_text_come_exactly(api: World) -> None:
    data = b"\xffabc\xc3" + bytes(range(256)) * 200 + "ü漢😀".encode() * 3000 + b"\xf0\x9f"
    job_id = await api.finished(stdout=data)
    for query in ("", "?encoding=base64", "?stream=stdout"):
        async with following(api, job_id, query) as stream:
            assert joined(await frames(stream)) == data


@pytest.mark.requirement(33)
async def test_character_cut_in_two_writes_is_one_character(api: World) -> None:
    job_id, sandbox = await api.submit()
    async with following(api, job_id) as stream:
        received: list[dict[str, Any]] = []
        for byte in "a漢😀é".encode():
            sandbox.write("stdout", bytes([byte]))
            await asyncio.sleep(0.03)
        sandbox.end()
        received = await frames(stream)
    assert all("base64" not in item for item in received)
    assert "".join(item.get("text", "") for item in received) == "a漢😀é"


async def test_reader_goes_on_where_it_stopped(api: World) -> None:
    data = "grüß dich\n".encode() * 5000
    job_id = await api.finished(stdout=data, stderr=b"e" * 100)
    async with following(api, job_id) as stream:
        first = json.loads(await stream.recv())
    offset = first["offset"] + len(first["text"].encode())
    async with following(api, job_id, f"?stdout={offset}&stderr=100") as stream:
        rest = await frames(stream)
    assert first["text"].encode() + joined(rest, start=offset) == data
    assert joined(rest, "stderr", 100) == b""


async def test_reader_of_one_stream_gets_no_other(api: World) -> None:
    job_id = await api.finished(stdout=b"out", stderr=b"err")
    async with following(api, job_id, "?stream=stderr") as stream:
        assert [item.get("stream") for item in await frames(stream)] == ["stderr", None]


async def test_many_small_writes_come_in_few_frames(api: World) -> None:
    job_id, sandbox = await api.submit()
    async with following(api, job_id) as stream:
        for number in range(500):
            sandbox.write("stdout", b"%d\n" % number)
            await asyncio.sleep(0.001)
        sandbox.end()
        received = await frames(stream)
    assert joined(received) == b"".join(b"%d\n" % number for number in range(500))
    assert len(received) < 120


@pytest.mark.requirement(33)
async def test_what_was_not_kept_is_told_as_a_gap(api: World) -> None:
    job_id, sandbox = await api.submit()
    await api.write(sandbox, "stdout", b"x" * (LOG_BYTES + 1000))
    await asyncio.sleep(0.05)
    sandbox.end()
    async with following(api, job_id, f"?stdout={LOG_BYTES - 10}") as stream:
        received = await frames(stream)
    assert joined(received, start=LOG_BYTES - 10) == b"x" * 10
    assert received[-2] == {"event": "gap", "stream": "stdout", "offset": LOG_BYTES, "bytes": 1000}
    assert received[-1]["event"] == "end"


async def test_reader_that_stands_still_holds_up_nobody() -> None:
    async with world(bounds=Bounds(unread_seconds=0.5)) as api:
        job_id, sandbox = await api.submit()
        lines: list[dict[str, Any]] = []

        async def read_along() -> None:
            async with following(api, job_id) as stream:
                lines.extend(await frames(stream))

        async with aclosing(await api.served.connect(receive_buffer=4096)) as still:
            still.send(f"GET /logs/{job_id} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
            await asyncio.sleep(0.05)
            reader = asyncio.create_task(read_along())
            async with asyncio.timeout(20):
                await api.write(sandbox, "stdout", b"y" * (9 * MIB))  # more than socket buffers take
                sandbox.end()
                await reader
                assert joined(lines) == b"y" * (9 * MIB)
                await api.until(lambda: len(api.served.registry) <= 1)  # the one that submitted


async def test_hundred_readers_all_get_everything(api: World) -> None:
    async with world(bounds=Bounds(client_connections=200)) as api:
        job_id, sandbox = await api.submit()

        async def read_along() -> bytes:
            async with following(api, job_id) as stream:
                return joined(await frames(stream))

        readers = [asyncio.create_task(read_along()) for _ in range(100)]
        for number in range(20):
            sandbox.write("stdout", b"line %d\n" % number)
            await asyncio.sleep(0.01)
        await api.until(lambda: len(api.served.registry) >= 100)
        sandbox.end()
        expected = b"".join(b"line %d\n" % number for number in range(20))
        assert set(await asyncio.gather(*readers)) == {expected}


async def test_reader_of_an_erased_job_hears_of_it(api: World) -> None:
    job_id, sandbox = await api.submit()
    sandbox.write("stdout", b"x")
    async with following(api, job_id) as stream:
        assert json.loads(await stream.recv())["text"] == "x"
        await api.http.delete(f"/jobs/{job_id}")
        assert [item["event"] for item in await frames(stream)] == ["erased"]
    sandbox.end(Outcome.CANCELLED)


async def test_reader_who_leaves_costs_nothing_more(api: World) -> None:
    job_id, sandbox = await api.submit()
    for _ in range(5):
        async with following(api, job_id):
            pass
        async with api.http.stream("GET", f"/logs/{job_id}", headers={"Accept": "text/event-stream"}):
            pass
    await api.http.aclose()
    await api.until(lambda: not api.served.registry and not api.served.server.server_state.tasks)
    sandbox.end()


async def test_client_that_talks_to_the_log_is_ended(api: World) -> None:
    job_id, sandbox = await api.submit()
    async with asyncio.timeout(10), following(api, job_id) as stream:
        for _ in range(streams.IDLE_MESSAGES + 10):
            await stream.send("hello?")
        await stream.wait_closed()
    assert stream.close_code == 1008
    sandbox.end()


async def test_silent_stream_of_events_gets_comments(api: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandrun.api.routes_results.SILENCE_SECONDS", 0.05)
    job_id, sandbox = await api.submit()
    async with api.http.stream("GET", f"/logs/{job_id}", headers={"Accept": "text/event-stream"}) as answer:
        async for piece in answer.aiter_bytes():
            assert piece.startswith(b": ")
            break
    sandbox.end()


@pytest.mark.requirement(30)
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (f"/logs/{NO_JOB}/stream", {}, 404),
        ("/logs/x/stream", {}, 404),
        ("/status/x", {}, 404),
        ("/", {}, 404),
        (f"/logs/{NO_JOB}/stream", {"Host": "evil.example"}, 421),
    ],
)
async def test_handshake_that_is_refused_is_told_why(
    api: World, path: str, headers: dict[str, str], status: int
) -> None:
    lines = {
        "Host": "localhost",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        **headers,
    }
    head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    reply = await api.served.exchange(head.encode() + b"\r\n")
    assert reply.status == status
    assert reply.json["error"] in ("not_found", "unknown_host")
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.requirement(30)
async def test_page_of_another_site_cannot_follow(api: World) -> None:
    job_id = await api.finished(stdout=b"x")
    with pytest.raises(InvalidStatus) as refused:
        async with following(api, job_id, origin="http://evil.example"):
            pass
    assert refused.value.response.status_code == 403
    async with following(api, job_id, origin=f"http://127.0.0.1:{api.served.port}") as stream:
        assert (await frames(stream))[-1]["event"] == "end"


@pytest.mark.requirement(35)
async def test_streams_end_when_the_server_drains(api: World) -> None:
    job_id, sandbox = await api.submit()
    async with following(api, job_id) as stream:
        draining = asyncio.create_task(api.service.drain(5))
        await asyncio.sleep(0.05)
        sandbox.write("stdout", b"last words")
        sandbox.end()
        received = await frames(stream)
        await draining
    assert joined(received) == b"last words"
    assert received[-1]["event"] == "end"
    assert stream.close_code == 1000


async def test_open_websocket_is_told_of_a_stop(api: World) -> None:
    job_id, sandbox = await api.submit()
    async with following(api, job_id) as stream:
        for connection in list(api.served.server.server_state.connections):
            connection.shutdown()
        await stream.wait_closed()
    assert stream.close_code == 1012
    sandbox.end()
