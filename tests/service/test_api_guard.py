"""Connections within bounds: what breaks one gets an answer of ours, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import pytest

from sandrun.api.guard import Bounds
from tests.service.api_server import Connection, Listening, listening

pytestmark = [pytest.mark.requirement(30), pytest.mark.usefixtures("no_new_descriptors")]

QUICK = Bounds(
    header_seconds=0.3,
    body_grace_seconds=0.3,
    body_bytes_per_second=1000,
    body_bytes=100_000,
    unread_seconds=0.5,
    linger_seconds=0.2,
    client_connections=4,
    connections=6,
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(body: bytes = b"", *headers: bytes, path: bytes = b"/", length: int | None = None) -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", *headers]
    if not any(h.lower().startswith(b"transfer-encoding") for h in headers):
        lines.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Echo:
    """Tells what it was asked. `/slow` answers when it is told to, `/large` with more than any buffer takes."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.asked: list[str] = []
        self.gone: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self.websocket(scope, receive, send)
            return
        self.asked.append(scope["path"])
        body = b""
        if scope["path"] != "/early":
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.gone.append(scope["path"])
                    return
                body += message["body"]
                if not message["more_body"]:
                    break
        if scope["path"] == "/slow":
            await self.go_on.wait()
        head = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        told = json.dumps({"path": scope["path"], "body": len(body), "headers": head}).encode()
        if scope["path"] == "/large":
            told = bytes(64 << 20)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(told))],
            }
        )
        await send({"type": "http.response.body", "body": told})

    async def websocket(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                message = await receive()
                if message["type"] == "websocket.disconnect":
                    return
                for _ in range(2000 if message.get("text") == "flood" else 1):
                    await send({"type": "websocket.send", "text": "x" * 60_000})
        finally:
            self.gone.append("websocket")


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo) -> Any:
    async with listening(echo, QUICK, interval=0.05) as served:
        yield served
        async with asyncio.timeout(3):  # no connection outlives its client
            while len(served.registry):
                await asyncio.sleep(0.02)


async def test_request_within_bounds_is_answered_and_connection_kept(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        for size in (0, 5, 90_000):
            connection.send(post(b"x" * size))
            reply = await connection.reply()
            assert (reply.status, reply.json["body"]) == (200, size)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\x00" * 100,
        b"GET / HTTP/1.1\nHost: localhost\n\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"FETCH / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET ftp://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=range(15),
)
async def test_what_is_not_http_gets_400_and_the_end(server: Listening, echo: Echo, request_bytes: bytes) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(request_bytes)
        reply = await connection.reply()
        assert reply.status == 400
        assert reply.json["error"] == "bad_request"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "server" not in reply.headers
        assert await connection.ended() == b""
    assert echo.asked == []
    assert server.security == [("request_refused", "127.0.0.1", {"status": 400})]


SMUGGLING = {
    "length and chunked": post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "two lengths": post(b"abc", b"Content-Length: 3"),
    "signed length": post(b"abc", b"Content-Length: +3").replace(b"\r\nContent-Length: 3\r\n", b"\r\n", 1),
    "list of lengths": post(b"abc").replace(b"Length: 3", b"Length: 3, 3"),
    "hexadecimal length": post(b"abc").replace(b"Length: 3", b"Length: 0x3"),
    "huge length": post(b"abc").replace(b"Length: 3", b"Length: 18446744073709551619"),
    "other coding": post(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"),
    "unknown coding": post(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"),
    "chunked twice": post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "identity after chunked": post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
    "vertical tab": post(b"0\r\n\r\n", b"Transfer-Encoding: \x0bchunked"),
    "space before colon": post(b"0\r\n\r\n", b"Transfer-Encoding : chunked"),
    "chunked in HTTP/1.0": post(b"0\r\n\r\n", b"Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "bare LF in chunk": post(b"1\nx\n0\n\n", b"Transfer-Encoding: chunked"),
    "hexadecimal prefix": post(b"0x1\r\nx\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "negative chunk": post(b"-1\r\nx\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "chunk longer than its size": post(b"1\r\nxx\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "body of an upgrade": post(b"GET /b HTTP/1.1\r\nHost: localhost\r\n\r\n", b"Upgrade: h2c", b"Connection: Upgrade"),
    "body of a WebSocket": post(b"abc", b"Upgrade: websocket", b"Connection: Upgrade"),
}


@pytest.mark.parametrize("shape", SMUGGLING)
async def test_smuggling_shape_gets_400_and_the_end(server: Listening, echo: Echo, shape: str) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(SMUGGLING[shape] + GET)
        reply = await connection.reply()
        assert reply.status == 400, reply
        assert await connection.ended() == b""
    assert "/b" not in echo.asked
    assert echo.asked in ([], ["/"])  # the application may have begun to read a body that then broke
    assert len(echo.asked) == len(echo.gone)


async def test_trailer_does_not_become_a_header(server: Listening) -> None:
    body = b"1\r\nx\r\n0\r\nHost: evil\r\nX-Late: 1\r\n\r\n"
    reply = await server.exchange(post(body, b"Transfer-Encoding: chunked"))
    assert reply.json["headers"] == {"host": "localhost", "transfer-encoding": "chunked"}


async def test_target_with_a_host_of_its_own_overrides_host_header(server: Listening) -> None:
    reply = await server.exchange(b"GET http://evil.example/a?b HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (reply.json["path"], reply.json["headers"]["host"]) == ("/a", "evil.example")


async def test_encoded_body_gets_415(server: Listening, echo: Echo) -> None:
    reply = await server.exchange(post(b"x", b"Content-Encoding: gzip"))
    assert reply.status == 415
    assert echo.asked == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2_000_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X" * 40_000,
        b"\r\n" * 20_000,
    ],
    ids=["target", "value", "endless value", "many", "name", "empty lines"],
)
async def test_too_much_header_gets_431_and_the_end(server: Listening, echo: Echo, request_bytes: bytes) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(request_bytes)
        assert (await connection.reply()).status == 431
        assert await connection.ended() == b""
    assert echo.asked == []


async def test_too_many_trailers_end_the_request(server: Listening, echo: Echo) -> None:
    body = b"1\r\nx\r\n0\r\n" + b"X: a\r\n" * 200
    reply = await server.exchange(post(body, b"Transfer-Encoding: chunked"))
    assert reply.status == 431
    assert echo.gone == ["/"]


async def test_announced_body_beyond_bound_gets_413_unread(server: Listening, echo: Echo) -> None:
    reply = await server.exchange(post(length=100_001))
    assert reply.status == 413
    assert echo.asked == []


async def test_chunked_body_beyond_bound_gets_413(server: Listening, echo: Echo) -> None:
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    reply = await server.exchange(post(chunk * 11, b"Transfer-Encoding: chunked"))
    assert reply.status == 413
    assert echo.gone == ["/"]


async def test_chunk_extensions_count_against_the_body(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(b"1;", b"Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(60):
                connection.send(b"a" * 10_000)
                await asyncio.sleep(0.005)
        assert (await connection.reply()).status in (400, 413)
    assert echo.gone == ["/"]


async def test_silent_connection_gets_408_and_the_end(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        assert (await connection.reply(seconds=2)).status == 408
        assert await connection.ended(2) == b""


async def test_dribbled_header_gets_408_in_the_same_time(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        begun = asyncio.get_running_loop().time()
        task = asyncio.create_task(dribble(connection, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1000, 0.02))
        assert (await connection.reply(seconds=2)).status == 408
        assert asyncio.get_running_loop().time() - begun < 10
        await task


async def test_empty_lines_do_not_keep_a_connection(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(GET)
        assert (await connection.reply()).status == 200
        task = asyncio.create_task(dribble(connection, b"\r\n" * 300, 0.02))
        assert (await connection.reply(seconds=2)).status == 408
        await task


async def test_dribbled_body_gets_408(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(length=5000))
        task = asyncio.create_task(dribble(connection, b"x" * 5000, 0.02))
        assert (await connection.reply(seconds=2)).status == 408
        await task
    assert echo.gone == ["/"]


async def test_body_that_begins_fast_and_then_dribbles_gets_408(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(b"x" * 50_000, length=90_000))
        task = asyncio.create_task(dribble(connection, b"x" * 1000, 0.02))
        assert (await connection.reply(seconds=3)).status == 408
        await task


async def test_slow_but_steady_body_is_taken(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(length=9000))
        for _ in range(30):
            connection.send(b"x" * 300)
            await asyncio.sleep(0.04)
        assert (await connection.reply()).json["body"] == 9000


async def test_long_answer_is_not_cut_by_request_deadlines(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(b"x", path=b"/slow"))
        await asyncio.sleep(1.0)
        echo.go_on.set()
        assert (await connection.reply()).status == 200


async def test_reader_that_takes_nothing_is_cut_off(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(GET.replace(b"/ ", b"/large ", 1))
        async with asyncio.timeout(3):
            while len(server.registry):
                await asyncio.sleep(0.05)


async def test_slow_reader_gets_everything(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(GET.replace(b"/ ", b"/large ", 1))
        got = 0
        while got < 64 << 20:
            piece = await connection.reader.read(4 << 20)
            assert piece
            got += len(piece)
            await asyncio.sleep(0.005)


async def test_one_client_has_a_bounded_number_of_connections(server: Listening) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            connection = await stack.enter_async_context(contextlib.aclosing(await server.connect("127.0.0.2")))
            connection.send(GET)
            assert (await connection.reply()).status == 200
        one_more = await stack.enter_async_context(contextlib.aclosing(await server.connect("127.0.0.2")))
        reply = await one_more.reply()
        assert (reply.status, reply.json["retry_after"], reply.headers["retry-after"]) == (429, 1, "1")
        other = await stack.enter_async_context(contextlib.aclosing(await server.connect("127.0.0.3")))
        other.send(GET)
        assert (await other.reply()).status == 200
    async with asyncio.timeout(2):
        while len(server.registry):
            await asyncio.sleep(0.01)


async def test_all_clients_together_have_a_bounded_number_of_connections(server: Listening) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(6):
            connection = await server.connect(f"127.0.1.{number + 1}")
            await stack.enter_async_context(contextlib.aclosing(connection))
            connection.send(GET)
            assert (await connection.reply()).status == 200
        one_more = await stack.enter_async_context(contextlib.aclosing(await server.connect("127.0.2.1")))
        reply = await one_more.reply()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")


async def test_pipelined_requests_are_answered_in_order_and_bounded(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(b"".join(GET.replace(b"/ ", b"/%d " % n, 1) for n in range(4)))
        assert [(await connection.reply()).json["path"] for _ in range(4)] == ["/0", "/1", "/2", "/3"]
        connection.send(GET * 50)
        taken = (await connection.ended()).count(b"HTTP/1.1 200 OK")
        assert 1 <= taken <= 6
    assert len(echo.asked) <= 10


async def test_garbage_behind_a_good_request_does_not_spoil_its_answer(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(b"abc", path=b"/slow") + b"\x00\x01garbage")
        await asyncio.sleep(0.5)
        echo.go_on.set()
        assert (await connection.reply()).json["body"] == 3
        assert await connection.ended() == b""


async def test_answer_before_the_body_leaves_a_usable_connection(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(post(b"x" * 10_000, path=b"/early", length=50_000))
        assert (await connection.reply()).status == 200
        connection.send(b"x" * 40_000 + GET)
        assert (await connection.reply()).status == 200


async def test_upgrade_that_is_not_offered_is_ignored(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        upgrade = b"GET /a HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        connection.send(upgrade + GET)
        assert (await connection.reply()).json["path"] == "/a"
        assert (await connection.reply()).json["path"] == "/"


def handshake(path: bytes = b"/ws", **changes: bytes | None) -> bytes:
    headers: dict[str, bytes | None] = {
        "Host": b"localhost",
        "Connection": b"Upgrade",
        "Upgrade": b"websocket",
        "Sec-WebSocket-Version": b"13",
        "Sec-WebSocket-Key": b"AAAAAAAAAAAAAAAAAAAAAA==",
    }
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    lines = [name.encode() + b": " + value for name, value in headers.items() if value is not None]
    return b"GET " + path + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        handshake(Sec_WebSocket_Version=b"8"),
        handshake(Sec_WebSocket_Version=None),
        handshake(Sec_WebSocket_Key=b"short"),
        handshake(Sec_WebSocket_Key=None),
        handshake().replace(b"GET", b"POST", 1),
        handshake().replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        handshake(b"/" + b"a" * 9000),
        handshake(X=b"a" * 9000),
        handshake(X="ä".encode()),
    ],
    ids=range(9),
)
async def test_handshake_that_is_none_gets_400(server: Listening, request_bytes: bytes) -> None:
    reply = await server.exchange(request_bytes)
    assert reply.status == 400
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_websocket_counts_as_a_connection_of_its_client(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(handshake())
        assert (await connection.reply(to_head=True)).status == 101
        await asyncio.sleep(1.0)  # beyond every deadline of a request
        assert len(server.registry) == 1
    async with asyncio.timeout(2):
        while len(server.registry) or "websocket" not in echo.gone:
            await asyncio.sleep(0.01)


async def test_websocket_reader_that_takes_nothing_is_cut_off(server: Listening, echo: Echo) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(handshake())
        assert (await connection.reply(to_head=True)).status == 101
        connection.send(b"\x81\x85\0\0\0\0flood")
        async with asyncio.timeout(5):
            while len(server.registry):
                await asyncio.sleep(0.05)


async def test_websocket_message_beyond_bound_ends_it(server: Listening) -> None:
    async with contextlib.aclosing(await server.connect()) as connection:
        connection.send(handshake())
        assert (await connection.reply(to_head=True)).status == 101
        connection.send(b"\x81\xff" + (1 << 20).to_bytes(8, "big") + b"\0\0\0\0")
        frame = await connection.ended()
        assert frame[:1] == b"\x88"
        assert int.from_bytes(frame[2:4], "big") == 1009


async def test_reset_connection_leaves_nothing(server: Listening, echo: Echo) -> None:
    for path in (b"/slow", b"/large", b"/"):
        connection = await server.connect()
        raw = connection.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.send(GET.replace(b"/ ", path + b" ", 1))
        await asyncio.sleep(0.05)
        connection.writer.transport.abort()
    echo.go_on.set()
    async with asyncio.timeout(2):
        while len(server.registry):
            await asyncio.sleep(0.01)


async def dribble(connection: Connection, data: bytes, pause: float) -> None:
    """One byte at a time, until all is sent or the other side has had enough."""
    for byte in data:
        if connection.reader.at_eof() or connection.writer.is_closing():
            return
        try:
            connection.send(bytes([byte]))
            await asyncio.sleep(pause)
        except ConnectionError:
            return
