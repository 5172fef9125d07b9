"""Structured logs: one JSON object a line on stderr, without anything that a client or a job wrote.

An event carries a job's tag at most, never its id (who knows an id owns the job), and of an exception its type and
where it was raised, never its text, which may quote a client. Security events carry the address, for fail2ban.
"""

from __future__ import annotations

import logging
import os
import time
from types import TracebackType
from typing import Any

import structlog


class Lines:
    """Writes each event by one write(2), so that lines of several processes do not mix. A log that nobody reads any
    more (EPIPE), or a full disk, must not end a job."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def msg(self, line: str) -> None:
        try:
            os.write(self._descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError:
            pass

    debug = info = warning = error = critical = msg


def set_up(descriptor: int = 2) -> None:
    """Send structlog's events, and what is logged through `logging`, to `descriptor` as JSON lines."""
    lines = Lines(descriptor)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_Libraries()]
    root.setLevel(logging.WARNING)
    logging.getLogger("sandrun").setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True
        library.setLevel(logging.WARNING)  # below it uvicorn writes paths, and paths hold job ids


class _Libraries(logging.Handler):
    """Passes on our own modules' events whole, a library's without its arguments, which may quote a request."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] == "sandrun":
            structlog.get_logger().log(record.levelno, record.getMessage(), logger=record.name)
            return
        event: dict[str, Any] = {"logger": record.name, "message": str(record.msg)[:200]}
        if record.exc_info and record.exc_info[1] is not None:
            event |= describe(record.exc_info[1])
        elif record.name == "asyncio":  # its messages are built from the repr of tasks and exceptions
            event["message"] = str(record.msg).partition("\n")[0][:80]
        structlog.get_logger().warning("library", **event)


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as log fields: its type and the places it passed, innermost last."""
    return {"exception": type(error).__name__, "trace": places(error.__traceback__)}


def places(traceback: TracebackType | None, most: int = 12) -> list[str]:
    """`module:line function` of the innermost frames of a traceback."""
    found: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        module = traceback.tb_frame.f_globals.get("__name__", "?")
        found.append(f"{module}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return found[-most:]


class Security:
    """Events that an operator may act on, a bounded number a second: who floods us shall not fill a disk as well."""

    def __init__(self, per_second: int = 20) -> None:
        self.per_second = per_second
        self._second = 0
        self._count = 0

    def __call__(self, event: str, address: str, **fields: Any) -> None:
        second = int(time.monotonic())
        if second != self._second:
            dropped = self._count - self.per_second
            self._second, self._count = second, 0
            if dropped > 0:
                structlog.get_logger().warning("security_events_dropped", count=dropped)
        self._count += 1
        if self._count <= self.per_second:
            structlog.get_logger().warning(event, address=address, **fields)
