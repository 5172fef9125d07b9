"""Writing responses: JSON, bytes, streams, downloads. Each carries the headers that requirement 30 asks of all."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandrun.api.guard import SECURITY_HEADERS
from sandrun.api.problems import describe
from sandrun.api.requests import until_gone

_encoder = msgspec.json.Encoder()
PIECE_BYTES = 256 * 1024
"""How much of a large body is in flight at a time."""


class Answer(Response):
    """A whole body in one piece. `raw_headers` are made here once, without Starlette's guesses."""

    def __init__(
        self,
        body: bytes,
        kind: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        private: bool = True,
    ) -> None:
        self.status_code = status
        self.background = None
        self.body = body
        self.raw_headers = make_headers(kind, headers, private=private)
        if status != 204:
            self.raw_headers.append((b"content-length", b"%d" % len(body)))


class Json(Answer):
    """Any value that msgspec encodes."""

    def __init__(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None, *, private: bool = True
    ) -> None:
        super().__init__(_encoder.encode(value), "application/json", status, headers, private=private)


class Text(Answer):
    """Text that no browser takes for anything else."""

    def __init__(self, text: str, *, private: bool = True) -> None:
        super().__init__(text.encode(), "text/plain; charset=utf-8", private=private)


class Pieces(Response):
    """A body that is made while it is sent. It ends, and its maker is closed, when the client is gone."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        kind: str,
        headers: Mapping[str, str] | None = None,
        *,
        size: int | None = None,
        done: Callable[[], None] | None = None,
    ) -> None:
        """`size`, if it is known before. `done` is called at the end, whatever it is, even before the first piece."""
        self.status_code = 200
        self.background = None
        self.pieces = pieces
        self.done = done
        self.raw_headers = make_headers(kind, headers)
        if size is not None:
            self.raw_headers.append((b"content-length", b"%d" % size))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await until_gone(receive, self._send_all(send))
        finally:
            if self.done is not None:
                self.done()

    async def _send_all(self, send: Send) -> None:
        try:
            async for piece in self.pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            close = getattr(self.pieces, "aclose", None)
            if close is not None:
                await close()


def make_headers(
    kind: str, headers: Mapping[str, str] | None = None, *, private: bool = True
) -> list[tuple[bytes, bytes]]:
    """`private` is what belongs to one job: no cache may keep it."""
    made = [(b"content-type", kind.encode("latin-1")), *SECURITY_HEADERS]
    if private:
        made.append((b"cache-control", b"no-store"))
    for name, value in (headers or {}).items():
        made.append((name.encode("latin-1"), value.encode("latin-1")))
    return made


def problem(error: BaseException, scope: Scope) -> Json:
    """The answer to an exception."""
    status, body, headers = describe(error)
    if any(name == b"expect" for name, _ in scope["headers"]):
        # We answer instead of saying 100 Continue: whether the body still comes is the client's choice, and what comes
        # next on this connection could be taken for it.
        headers["connection"] = "close"
    return Json(body, status, headers)


# ---- downloads ---------------------------------------------------------------------------------------------

_UNSAFE = re.compile(r"[^A-Za-z0-9!#$&+.^_`|~ ()\[\]{}=,@-]|^\.+")


def disposition(path: str) -> str:
    """Content-Disposition for a file that a job named: RFC 6266, with RFC 8187 for what is not ASCII.

    The name is the last component of `path`, without control and format characters: a newline would split the header,
    a right-to-left override would show `exe.gpj` as `jpg.exe`.
    """
    name = path.rpartition("/")[2]
    shown = "".join("_" if unicodedata.category(c)[0] == "C" or c in "\\\u2028\u2029" else c for c in name) or "file"
    plain = _UNSAFE.sub("_", shown)
    if plain == shown:
        return f'attachment; filename="{plain}"'
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(shown, safe='')}"
