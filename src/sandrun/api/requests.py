"""Reading requests: bodies within bounds, parameters, what the client accepts, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.types import Receive

from sandrun.api.problems import Gone
from sandrun.errors import InvalidInput, TooLarge
from sandrun.model import show

T = TypeVar("T")

WAIT_SECONDS = 60.0
"""The most that one request may wait for a job."""


async def body_pieces(request: Request, most: int, what: str) -> AsyncIterator[bytes]:
    """The body, piece by piece, never more than `most` bytes. Raises: TooLarge naming `what`, Gone."""
    announced = request.headers.get("content-length")
    if announced is not None and announced.isdigit() and int(announced) > most:
        raise TooLarge(what, most)
    received = 0
    receive = request.receive
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Gone
        piece: bytes = message.get("body", b"")
        received += len(piece)
        if received > most:
            raise TooLarge(what, most)
        if piece:
            yield piece
        if not message.get("more_body", False):
            return


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` returns or raises; the client's leaving cancels it. Raises: Gone.

    The body must have been read, as whatever the client still sends is dropped.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while not (await receive())["type"].endswith(".disconnect"):
            pass
        gone = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise Gone from None
        raise
    finally:
        watcher.cancel()


class Parameters:
    """The query string. Each parameter once; unknown ones are left alone, as proxies and browsers add their own."""

    def __init__(self, request: Request) -> None:
        query: bytes = request.scope["query_string"]
        self._values: dict[str, str] = {}
        if query:
            try:
                pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=32)
            except ValueError:
                raise InvalidInput("query", "is not a query string of at most 32 parameters") from None
            for name, value in pairs:
                if name in self._values:
                    raise InvalidInput(show(name), "is given twice")
                self._values[name] = value

    def number(self, name: str, most: float) -> float:
        """A number from 0 to `most`; 0 if it is not given."""
        text = self._values.get(name)
        if text is None:
            return 0.0
        if not text.isascii() or not text.replace(".", "", 1).isdigit() or len(text) > 20 or float(text) > most:
            raise InvalidInput(name, f"{show(text)} must be a number from 0 to {most:g}")
        return float(text)

    def integer(self, name: str) -> int:
        """A whole number; 0 if it is not given."""
        text = self._values.get(name)
        if text is None:
            return 0
        if not text.isascii() or not text.isdigit() or len(text) > 15:
            raise InvalidInput(name, f"{show(text)} must be a number of bytes")
        return int(text)

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first if it is not given."""
        text = self._values.get(name)
        if text is None:
            return choices[0]
        if text not in choices:
            raise InvalidInput(name, f"{show(text)} is unknown; accepted: {', '.join(choices)}")
        return text


def preferred(request: Request, offered: Sequence[str]) -> str:
    """The media type out of `offered` that Accept ranks highest; the first, if it names none (RFC 9110 12.5.1)."""
    header = request.headers.get("accept")
    if not header or header == "*/*":
        return offered[0]
    best, best_rank = offered[0], 0.0
    for item in header.split(",")[:32]:
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        rank = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    rank = min(1.0, float(parameter[2:]))
                except ValueError:
                    rank = 0.0
        if kind in offered and rank > best_rank:
            best, best_rank = kind, rank
    return best
