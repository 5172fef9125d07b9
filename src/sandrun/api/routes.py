"""The calls of the API as a table: routing, the OpenAPI document and docs/api.md are made of the same rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the path or the query."""

    name: str
    about: str
    schema: dict[str, Any]
    where: str = "query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A body that is sent or answered: its media type and the type whose schema it has (None: bytes, see `about`)."""

    kind: str = "application/json"
    type: Any = None
    schema: dict[str, Any] | None = None
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One row: method and path, who answers, and what with.

    Attributes:
        path: as Starlette writes it; `{path:output}` takes slashes and newlines.
        answers: status -> bodies, one a media type.
        problems: the statuses of 400 and above that this call has of its own.
    """

    method: str
    path: str
    name: str
    about: str
    handler: Handler
    answers: dict[int, tuple[Body, ...]]
    problems: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    body: tuple[Body, ...] = ()


JOB_ID = Parameter(
    name="job_id",
    about="The job's id, as /submit gave it. Who knows it may read, cancel and erase the job.",
    schema={"type": "string", "pattern": "^[0-9a-f]{32}$"},
    where="path",
)
OFFSETS = tuple(
    Parameter(
        name=name,
        about=f"Where to begin in {name}, in bytes.",
        schema={"type": "integer", "minimum": 0, "default": 0},
    )
    for name in ("stdout", "stderr")
)
STREAM = Parameter(
    name="stream",
    about="Which of the two streams; both by default.",
    schema={"type": "string", "enum": ["both", "stdout", "stderr"], "default": "both"},
)
ENCODING = Parameter(
    name="encoding",
    about="`base64` has every frame carry exact bytes; by default only those that are no UTF-8 do.",
    schema={"type": "string", "enum": ["utf-8", "base64"], "default": "utf-8"},
)
EVENTS = Body(
    kind="text/event-stream",
    schema={"type": "string"},
    about="One frame a `data:` line, until the job has ended.",
)
