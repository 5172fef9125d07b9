"""What uvicorn lacks against hostile connections: bounds on headers, bodies, silence and slowness (requirement 30).

`Guard` is uvicorn's protocol with these bounds, `GuardedWebSocket` the same for WebSockets. Both are in one `Registry`,
which counts the connections of each client and looks at all of them once a second: a request costs no timer of its own.

What breaks a bound gets 400, 408, 413, 429 or 431 if no answer has begun, then end of file, then a short while in which
we read and drop what the client still sends: closed at once, the kernel would answer it with RST, and the client would
lose our answer along with the connection.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.http11 import Request, Response

from sandrun.api.problems import Problem
from sandrun.jobs.clients import network_of
from sandrun.model import MIB

SECURITY_HEADERS = ((b"x-content-type-options", b"nosniff"),)
"""What every answer carries, whoever writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one connection, and one client, may take.

    Attributes:
        header_bytes: request line and headers together; trailers are counted again.
        header_seconds: from the first byte (or the connection, for the first request) to the end of the headers.
        body_bytes: the most that any call takes, whatever Content-Length says; calls have lower bounds of their own.
        body_grace_seconds: the window over which a body's speed is measured.
        body_bytes_per_second: the least average over each window, while we are reading.
        body_seconds: from the end of the headers to the end of the body, in all.
        unread_seconds: how long a client may take none of what we have for it.
        linger_seconds: how long after a refusal we still read and drop.
        pipelined: requests that may wait behind one that is being answered.
        client_connections: of one client (an IPv4 address, an IPv6 /64) at a time.
        connections: of all clients at a time.
    """

    header_bytes: int = 32 * 1024
    headers: int = 100
    header_seconds: float = 5.0
    body_bytes: int = 110 * MIB
    body_grace_seconds: float = 10.0
    body_bytes_per_second: int = 1024
    body_seconds: float = 1800.0
    unread_seconds: float = 30.0
    linger_seconds: float = 2.0
    pipelined: int = 4
    client_connections: int = 64
    connections: int = 1000


class Registry:
    """All connections of a server, counted by client and looked at once a second."""

    def __init__(self, bounds: Bounds, security: Callable[..., None], interval: float = 1.0) -> None:
        self.bounds = bounds
        self.security = security
        self.interval = interval
        self._open: dict[Guard | GuardedWebSocket, str] = {}
        self._counts: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Guard | GuardedWebSocket, client: str) -> int:
        """Count a connection until it is `remove`d. Returns the status to refuse it with, 0 if it is welcome."""
        count = self._counts.get(client, 0) + 1
        self._counts[client] = count
        self._open[connection] = client
        if self._timer is None:
            self._timer = connection.loop.call_later(self.interval, self._look, connection.loop)
        if count > self.bounds.client_connections:
            return 429
        return 503 if len(self._open) > self.bounds.connections else 0

    def remove(self, connection: Guard | GuardedWebSocket) -> None:
        client = self._open.pop(connection, None)
        if client is not None:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    def client(self, connection: Guard | GuardedWebSocket) -> str:
        return self._open.get(connection, "")

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for connection in list(self._open):
            connection.look(now)
        if self._open:
            self._timer = loop.call_later(self.interval, self._look, loop)


class _Closing:
    """Cuts off a client that leaves unread what was sent to it, before the close and after it."""

    __slots__ = ("_closing_since", "_paused", "bounds")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._closing_since: float | None = None
        self._paused: tuple[float, int] | None = None

    def paused(self, now: float, unsent: int) -> None:
        self._paused = (now, unsent)

    def resumed(self) -> None:
        self._paused = None

    def look(self, transport: asyncio.Transport, now: float) -> bool:
        """Returns whether the connection is at its end."""
        if transport.is_closing():  # asyncio flushes what is unsent, for ever if the peer does not read
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since > self.bounds.unread_seconds:
                transport.abort()
            return True
        if self._paused is not None:
            since, unsent = self._paused
            if now - since >= self.bounds.unread_seconds:
                left = transport.get_write_buffer_size()
                if unsent - left < self.bounds.body_bytes_per_second * self.bounds.unread_seconds:
                    transport.abort()
                    return True
                self._paused = (now, left)
        return False


FAREWELL_SECONDS = 0.5
"""How long an idle connection may take to close when the server stops."""

_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")  # 16 bytes, RFC 6455 4.1
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)", re.IGNORECASE)

WAITING, HEADERS, BODY, ANSWERING, DEAF = "waiting", "headers", "body", "answering", "deaf"


class _Stop(Exception):
    """Ends the parser's run; `Guard._verdict` says why."""


class Guard(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol within `Bounds`.

    Attributes:
        phase: what we wait for: a request, the rest of its headers, of its body, our own answer, or nothing any more.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        registry: Registry,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.registry = registry
        self.bounds = registry.bounds
        self.phase = WAITING
        self.since = self.loop.time()
        self._closing = _Closing(self.bounds)
        self._fresh = True  # no request yet: silence is told, not just ended
        self._head = 0  # bytes of request line and headers, raw
        self._fields = 0
        self._size = 0  # bytes of what is being read, as parsed: head, then body, then trailers
        self._received = 0  # bytes since the end of the headers, raw: chunk sizes and extensions are work too
        self._window = (0.0, 0)
        self._verdict: tuple[int, Problem] | None = None

    # ---- the connection ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        try:
            client = network_of(address)
        except Exception:  # a socket that is not IP, or that was reset before we could ask
            client = address
        status = self.registry.add(self, client)
        if status:
            self.registry.security("too_many_connections", address, status=status)
            whose = "this client has" if status == 429 else "all clients together have"
            self._refuse(status, "too_many_connections", f"{whose} too many connections open", retry_after=1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.registry.remove(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():  # TLS would wait for the other side to say good-bye
            self.loop.call_later(FAREWELL_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._closing.paused(self.loop.time(), self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._closing.resumed()

    def look(self, now: float) -> None:
        """Called once a second. Ends what is too slow."""
        if self._closing.look(self.transport, now):
            return
        waited = now - self.since
        if self.phase == DEAF:
            if waited > self.bounds.linger_seconds and not self._in_flight:
                self.transport.close()
        elif self.phase == HEADERS or (self.phase == WAITING and self._fresh):
            if waited > self.bounds.header_seconds:
                self._refuse(408, "timeout", f"no complete request within {self.bounds.header_seconds:g} seconds")
        elif self.phase == WAITING:
            if waited > self.timeout_keep_alive:
                self.transport.close()
        elif self.phase == BODY:
            self._look_at_body(now)

    def _look_at_body(self, now: float) -> None:
        if now - self.since > self.bounds.body_seconds:
            self._refuse(408, "timeout", f"no complete body within {self.bounds.body_seconds:g} seconds")
            return
        begun, received = self._window
        if self.flow.read_paused:  # it is we who are slow
            self._window = (now, self._received)
        elif now - begun >= self.bounds.body_grace_seconds:
            if self._received - received < self.bounds.body_bytes_per_second * (now - begun):
                details = f"the body came slower than {self.bounds.body_bytes_per_second} bytes a second"
                self._refuse(408, "timeout", details)
            else:
                self._window = (now, self._received)

    @property
    def _in_flight(self) -> bool:
        """Whether an answer is due."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.disconnected

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's own timer, which any byte stops for good: `look` does its work."""

    # ---- bytes ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.phase == DEAF:
            return
        self._unset_keepalive_if_required()
        if self.phase == WAITING:
            if not self._fresh:  # the first request's time runs from the connection on
                self.since = self.loop.time()
            self.phase = HEADERS
            self._head = 0
        if self.phase == HEADERS:
            self._head += len(data)
        elif self.phase == BODY:
            self._received += len(data)
            if self._received > 2 * self.bounds.body_bytes:  # chunks of a byte, or sizes with endless extensions
                self._refuse(413, "too_large", f"a body has at most {self.bounds.body_bytes} bytes")
                return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            elif len(rest := data[error.args[0] :]):  # an upgrade that we do not offer is a request like any other
                self.data_received(rest)
            return
        except httptools.HttpParserError:
            status, problem = self._verdict or (400, Problem("bad_request", "this is not HTTP/1.1 as we accept it"))
            self._refuse(status, problem.error, problem.details)
            return
        if self.phase == HEADERS and self._head > self.bounds.header_bytes:
            self._refuse_headers()

    def _refuse_headers(self) -> None:
        self._refuse(431, "headers_too_large", f"headers have at most {self.bounds.header_bytes} bytes")

    def _stop(self, status: int, error: str, details: str) -> None:
        self._verdict = (status, Problem(error, details))
        raise _Stop

    # ---- the parser's callbacks ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.phase != HEADERS:  # it came in one piece with the one before it
            self.phase, self.since = HEADERS, self.loop.time()
        self._fields = 0
        self._size = 0
        self._verdict = None

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        if self._fields > self.bounds.headers:
            self._stop(431, "headers_too_large", f"a request has at most {self.bounds.headers} headers")
        self._count(len(name) + len(value) + 4)
        if self.phase == HEADERS:  # a trailer must not become a header of a request that is already being answered
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self.bounds.header_bytes:
            self._stop(431, "headers_too_large", f"headers have at most {self.bounds.header_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._check_framing()
        if len(self.pipeline) >= self.bounds.pipelined:
            self._stop(400, "bad_request", "too many requests at once on one connection")
        self._fresh = False
        self.phase = BODY
        self._received = 0
        self.since = self.loop.time()
        self._window = (self.since, 0)
        self._size = 0
        super().on_headers_complete()

    def _check_framing(self) -> None:
        """What llhttp lets through, and another parser in front of us may read otherwise (request smuggling)."""
        if self.parser.get_http_version() not in ("1.1", "1.0"):
            self._stop(400, "bad_request", "this is not HTTP/1.1")
        if not self.url.startswith(b"/"):
            self._take_authority()
        hosts = lengths = 0
        has_body = False
        for name, value in self.headers:
            if name == b"transfer-encoding":
                has_body = True
                if value.lower() != b"chunked" or self.parser.get_http_version() == "1.0":
                    self._stop(400, "bad_request", "the only transfer coding is chunked, and HTTP/1.0 has none")
            elif name == b"content-length":
                lengths += 1
                has_body = has_body or value.strip(b"0 ") != b""
                if not value.isdigit() or len(value) > 18:
                    self._stop(400, "bad_request", "Content-Length is a number")
                if int(value) > self.bounds.body_bytes:
                    self._stop(413, "too_large", f"a body has at most {self.bounds.body_bytes} bytes")
            elif name == b"host":
                hosts += 1
            elif name == b"content-encoding" and value.lower() != b"identity":
                self._stop(415, "unsupported_media_type", "bodies are sent without Content-Encoding")
        if hosts > 1 or lengths > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._stop(400, "bad_request", "a request has one Host and at most one Content-Length")
        if self.parser.should_upgrade():
            self._check_upgrade(has_body)

    def _take_authority(self) -> None:
        """`GET http://name/path`: the name in the target counts, and Host is ignored (RFC 9112 3.2.2)."""
        match = _ABSOLUTE.match(self.url)
        if match is None:
            self._stop(400, "bad_request", "a request's target is a path")
        else:
            self.headers[:] = [(name, match[1] if name == b"host" else value) for name, value in self.headers]
            self.url = self.url[match.end() :]
            if not self.url.startswith(b"/"):
                self.url = b"/" + self.url

    def _check_upgrade(self, has_body: bool) -> None:
        if has_body or self.parser.get_method() == b"CONNECT":  # llhttp would read the body as the next request
            self._stop(400, "bad_request", "a request that upgrades has no body")
        if not self._should_upgrade():
            return
        headers = dict(self.headers)
        if (
            self.parser.get_method() != b"GET"
            or self.parser.get_http_version() != "1.1"
            or headers.get(b"sec-websocket-version") != b"13"
            or not _KEY.fullmatch(headers.get(b"sec-websocket-key", b""))
            or any(len(part) > 4096 for part in (self.url, *headers.values()))  # the WebSocket's own parser has bounds
            or any(not value.isascii() for value in headers.values())
        ):
            self._stop(400, "bad_request", "this is no WebSocket handshake of version 13")

    def on_body(self, body: bytes) -> None:
        if self.phase == BODY:
            self._size += len(body)
            if self._size > self.bounds.body_bytes:
                self._stop(413, "too_large", f"a body has at most {self.bounds.body_bytes} bytes")
        super().on_body(body)

    def on_message_complete(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        self._head = 0
        super().on_message_complete()
        self.phase = ANSWERING
        if answered:
            self._wait_for_next()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.phase == ANSWERING and not self.pipeline:
            self._wait_for_next()
        elif self.phase == DEAF and not self.transport.is_closing():
            self.transport.close()  # what it was deaf for is answered

    def _wait_for_next(self) -> None:
        self.phase = WAITING
        self.since = self.loop.time()

    # ---- endings -------------------------------------------------------------------------------------------

    def _refuse(self, status: int, error: str, details: str, *, retry_after: int | None = None) -> None:
        """Answer if we still can, and hear no more of this client."""
        if self.phase == DEAF or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        phase, self.phase, self.since = self.phase, DEAF, self.loop.time()
        cycle, in_flight = self.cycle, self._in_flight
        if status in (400, 408, 431):
            self.registry.security("request_refused", self.client[0] if self.client else "", status=status)
        if in_flight and phase != BODY:  # a request was fine; only what came after it is not
            cycle.keep_alive = False
            return
        if in_flight and (cycle.response_started or self.pipeline):  # ours would land in the middle of another answer
            self.transport.close()
            return
        if in_flight:  # its body will never be whole: whoever reads it hears that the client is gone
            cycle.disconnected = True
            cycle.message_event.set()
            self.flow.resume_reading()  # or we would not see its end
        elif phase == BODY:  # it was answered, before its body was over
            self.transport.close()
            return
        body = msgspec.json.encode(Problem(error, details, retry_after=retry_after))
        headers = {b"content-type": b"application/json", b"content-length": b"%d" % len(body), b"connection": b"close"}
        if retry_after is not None:
            headers[b"retry-after"] = b"%d" % retry_after
        lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
        lines += [b"%s: %s" % header for header in (*SECURITY_HEADERS, *headers.items())]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:  # TLS has no half-closed connections
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", "this is not HTTP/1.1 as we accept it")

    def handle_websocket_upgrade(self) -> None:
        client = self.registry.client(self)
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        if isinstance(protocol, GuardedWebSocket):
            self.registry.remove(self)
            if protocol in self.connections:  # not ended by its own handshake
                self.registry.add(protocol, client)


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, with an end for those who do not read, and no 500."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        registry: Registry,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.registry = registry
        self._closing = _Closing(registry.bounds)
        accept = self.conn.accept

        def accept_as_we_answer(request: Request) -> Response:
            response = accept(request)
            if response.status_code != 101:
                for name, value in SECURITY_HEADERS:
                    response.headers[name.decode()] = value.decode()
            return response

        self.conn.accept = accept_as_we_answer  # type: ignore[method-assign]

    def connection_lost(self, exc: Exception | None) -> None:
        self.registry.remove(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._closing.paused(self.loop.time(), self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._closing.resumed()

    def look(self, now: float) -> None:
        self._closing.look(self.transport, now)

    def send_500_response(self) -> None:
        if self.initial_response or self.handshake_complete:
            return
        body = msgspec.json.encode(Problem("unavailable", "the server is stopping", retry_after=1))
        response = self.conn.reject(HTTPStatus.SERVICE_UNAVAILABLE, body.decode())
        for name, value in SECURITY_HEADERS:
            response.headers[name.decode()] = value.decode()
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        response.headers["Retry-After"] = "1"
        self.conn.send_response(response)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.handshake_complete = True


def protocols(registry: Registry) -> dict[str, Any]:
    """The arguments `http` and `ws` of `uvicorn.Config`."""
    from functools import partial

    return {
        "http": cast(type[asyncio.Protocol], partial(Guard, registry=registry)),
        "ws": cast(type[asyncio.Protocol], partial(GuardedWebSocket, registry=registry)),
    }
