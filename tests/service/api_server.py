"""The HTTP layer on a real socket, in the test's own loop; requests are written byte by byte where that matters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sandrun.api import guard, main
from sandrun.config import Config

Event = tuple[str, str, dict[str, Any]]


@dataclass
class Listening:
    """A server that is listening.

    Attributes:
        security: the events that it would have logged for an operator.
    """

    port: int
    registry: guard.Registry
    server: main.Server
    security: list[Event] = field(default_factory=list)

    async def connect(self, address: str = "127.0.0.1", *, receive_buffer: int | None = None) -> Connection:
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.bind((address, 0))
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=raw)
        return Connection(reader, writer)

    async def exchange(self, *pieces: bytes, pause: float = 0.0) -> Reply:
        """Send the pieces on a new connection and read one answer; the connection is closed then."""
        async with contextlib.aclosing(await self.connect()) as connection:
            for piece in pieces:
                connection.send(piece)
                await asyncio.sleep(pause)
            return await connection.reply()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self, *, to_head: bool = False, seconds: float = 5.0) -> Reply:
        """The next answer. Raises: EOFError if the connection ends without one, TimeoutError."""
        async with asyncio.timeout(seconds):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                raise EOFError(error.partial) from None
            lines = head.decode("latin-1").split("\r\n")
            status = int(lines[0].split(" ")[1])
            headers = {}
            for line in lines[1:-2]:
                name, _, value = line.partition(": ")
                assert name.lower() not in headers, f"{name} stands twice"
                headers[name.lower()] = value
            if to_head or status in (204, 304):
                body = b""
            elif headers.get("transfer-encoding") == "chunked":
                body = b"".join([chunk async for chunk in self.chunks()])
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
        return Reply(status, headers, body)

    async def chunks(self) -> AsyncIterator[bytes]:
        while size := int((await self.reader.readline()).strip(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)

    async def ended(self, seconds: float = 5.0) -> bytes:
        """What comes until the server closes the connection. Raises: TimeoutError if it does not."""
        async with asyncio.timeout(seconds):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def aclose(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class QuickServer(main.Server):
    """Stops without uvicorn's pauses of a tenth of a second: there are hundreds of these."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        async with asyncio.timeout(5):
            while self.server_state.connections or self.server_state.tasks:
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def listening(app: Any, bounds: guard.Bounds | None = None, interval: float = 1.0) -> AsyncIterator[Listening]:
    """Serve `app` on a free loopback port; `interval` is how often connections are looked at."""
    events: list[Event] = []
    registry = guard.Registry(
        bounds or guard.Bounds(), lambda event, address, **fields: events.append((event, address, fields)), interval
    )
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = QuickServer(main.uvicorn_config(Config(), app, registry), lambda: None)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0)
        yield Listening(port, registry, server, events)
    finally:
        server.stopping.set()
        await task
