"""The ASGI application: routes under one layer that checks Host and Origin, and turns exceptions into answers."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router, compile_path
from starlette.types import Message, Receive, Scope, Send

from sandrun.api import log, openapi, streams
from sandrun.api.context import Context
from sandrun.api.hosts import Hosts
from sandrun.api.problems import Gone, Refused, is_expected
from sandrun.api.responses import problem
from sandrun.api.routes import Call
from sandrun.api.routes_jobs import JobCalls
from sandrun.api.routes_results import ResultCalls
from sandrun.api.routes_server import ServerCalls


class _OutputPath(Convertor[str]):
    """The rest of the path, whatever it holds: names of outputs have slashes, and newlines too."""

    regex = r"(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("output", _OutputPath())


class App:
    """One server's application."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.hosts = Hosts(context.hostnames)
        server = ServerCalls(context)
        results = ResultCalls(context)
        self.calls: list[Call] = [*JobCalls(context).calls(), *results.calls(), *server.calls()]
        frames = (streams.Frame, streams.Gap, streams.End, streams.Erased)
        server.document = msgspec.json.encode(openapi.document(self.calls, frames))
        self._router = Router(
            [Route(call.path, call.handler, methods=[call.method], name=call.name) for call in self.calls],
            redirect_slashes=False,
            default=_nothing_here,
        )
        self._websocket = results.websocket
        self._websocket_path = compile_path("/logs/{job_id}/stream")[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            scope["app"] = self  # has Starlette's routes raise what they would else answer in plain text
            self.hosts.check(scope)
            if scope["type"] == "websocket":
                match = self._websocket_path.match(scope["path"])
                if match is None:
                    raise HTTPException(404)
                scope["path_params"] = match.groupdict()
                await self._websocket(scope, receive, sending)
            else:
                await self._router(scope, receive, sending)
        except Gone:
            return
        except asyncio.CancelledError:  # the grace period of a stop is over
            if not begun:
                await _answer(problem(_stopping(), scope), scope, receive, send)
        except Exception as error:
            if scope["type"] == "websocket" and isinstance(error, OSError):
                return  # uvicorn's way to say that the client is gone
            if isinstance(error, Refused) and error.status in (403, 421):
                peer = scope.get("client")
                self.context.security("request_refused", peer[0] if peer else "", status=error.status)
            if not is_expected(error):
                structlog.get_logger().error("unexpected", **log.describe(error))
            if begun:
                raise  # all that is left is to break the connection off, which uvicorn does
            await _answer(problem(error, scope), scope, receive, send)


def _stopping() -> Refused:
    return Refused(503, "unavailable", "the server is stopping", retry_after=5)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


async def _answer(response: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """To a request, or to a WebSocket handshake (ASGI's Denial Response)."""
    if scope["type"] != "websocket":
        await response(scope, receive, send)
        return
    start = {"type": "websocket.http.response.start", "status": response.status_code, "headers": response.raw_headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": response.body})
