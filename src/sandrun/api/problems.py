"""Errors as clients see them: one table from exception to status, one shape of body (requirement 30).

A body is `{"error", "details", "field"?, "retry_after"?}`. `error` is a word for programs, `details` a sentence
for people. There is no 5xx but 503, which always carries Retry-After, and nothing in a body tells about the inside.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException

from sandrun.errors import Conflict, InvalidInput, NotFound, Overloaded, TooLarge


class Problem(msgspec.Struct, omit_defaults=True, frozen=True):
    """The body of every answer of 400 and above.

    Attributes:
        error: a word out of `TABLE`, or of a `Refused`.
        field: the manifest key, archive member, part or parameter that is at fault.
        retry_after: seconds until it is worth another try, with 429 and 503; the header Retry-After says the same.
    """

    error: str
    details: str
    field: str | None = None
    retry_after: int | None = None


class Refused(Exception):
    """A request that HTTP itself refuses, before any job is looked at."""

    def __init__(
        self,
        status: int,
        error: str,
        details: str,
        *,
        field: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {error}: {details}")
        self.status = status
        self.problem = Problem(error, details, field, retry_after)
        self.headers = dict(headers or {})


class Gone(Exception):
    """The client closed the connection: nobody is there to answer."""


TABLE: dict[type, tuple[int, str]] = {
    InvalidInput: (400, "invalid_input"),
    NotFound: (404, "not_found"),
    Conflict: (409, "conflict"),
    TooLarge: (413, "too_large"),
    Overloaded: (503, "overloaded"),  # 429 rate_limited if the client's own share is full
}
UNEXPECTED = (503, "unavailable")
UNEXPECTED_DETAILS = "the server could not do this; try again"
RETRY_SECONDS = 1

_HTTP_WORDS = {404: "not_found", 405: "method_not_allowed"}
_HTTP_DETAILS = {404: "there is nothing at this path", 405: "this path does not take this method"}


def describe(error: BaseException) -> tuple[int, Problem, dict[str, str]]:
    """Status, body and headers for an exception; whatever is not in the table is 503 and tells nothing."""
    if isinstance(error, Refused):
        status, problem, headers = error.status, error.problem, dict(error.headers)
    elif isinstance(error, Overloaded):
        status, word = (429, "rate_limited") if error.client_at_fault else TABLE[Overloaded]
        problem = Problem(word, str(error), retry_after=max(1, error.retry_after_seconds))
        headers = {}
    elif isinstance(error, HTTPException) and error.status_code in _HTTP_WORDS:
        status = error.status_code
        problem = Problem(_HTTP_WORDS[status], _HTTP_DETAILS[status])
        headers = dict(error.headers or {})
    elif (row := _row(error)) is not None:
        status, word = row
        if isinstance(error, InvalidInput):
            problem = Problem(word, error.details, field=error.field)
        elif isinstance(error, TooLarge):
            problem = Problem(word, str(error), field=error.field)
        else:
            problem = Problem(word, str(error) or word)
        headers = {}
    else:
        status, word = UNEXPECTED
        problem = Problem(word, UNEXPECTED_DETAILS, retry_after=RETRY_SECONDS)
        headers = {}
    if problem.retry_after is not None:
        headers["retry-after"] = str(problem.retry_after)
    return status, problem, headers


def is_expected(error: BaseException) -> bool:
    """False for what needs a log line: an exception that no part of the table foresees."""
    return isinstance(error, (Refused, Gone, HTTPException)) or _row(error) is not None


def _row(error: BaseException) -> tuple[int, str] | None:
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
