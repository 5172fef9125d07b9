"""What the HTTP process logs: lines that nobody can forge, without what clients and jobs wrote."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from sandrun.api import log

pytestmark = pytest.mark.requirement(33)
CANARY = "canary-91c4"


class Log:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in os.read(self._descriptor, 1 << 20).splitlines()]


@pytest.fixture
def logged() -> Iterator[Log]:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    root = logging.getLogger()
    before = root.handlers, root.level
    log.set_up(writer)
    yield Log(reader)
    structlog.reset_defaults()
    root.handlers, root.level = before
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            pass  # the test has


def test_event_is_one_line_whatever_it_holds(logged: Log) -> None:
    structlog.get_logger().info("job_ended", job='a\n{"event": "forged"}\r\x1b[2J\ud800')
    (event,) = logged.events()
    assert event["event"] == "job_ended"
    assert set(event) == {"event", "job", "level", "timestamp"}


def test_library_is_told_without_its_arguments(logged: Log) -> None:
    logging.getLogger("uvicorn.error").warning("Invalid request %s", CANARY)
    logging.getLogger("uvicorn.error").info('%s - "WebSocket %s" [accepted]', "127.0.0.1", CANARY)
    (event,) = logged.events()
    assert (event["logger"], event["message"]) == ("uvicorn.error", "Invalid request %s")


def test_exception_is_told_by_type_and_place(logged: Log) -> None:
    try:
        int(CANARY)
    except ValueError as error:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
        structlog.get_logger().error("unexpected", **log.describe(error))
    told = logged.events()
    assert [event["exception"] for event in told] == ["ValueError"] * 2
    assert "test_exception_is_told_by_type_and_place" in told[0]["trace"][-1]
    assert CANARY not in json.dumps(told)


def test_asyncio_is_told_without_the_repr_of_its_tasks(logged: Log) -> None:
    message = f"Task exception was never retrieved\nfuture: <Task exception={CANARY}>"
    logging.getLogger("asyncio").error(message)
    (event,) = logged.events()
    assert event["message"] == "Task exception was never retrieved"


def test_own_module_is_told_whole(logged: Log) -> None:
    logging.getLogger("sandrun.jobs").info("job %s: %s", "tag", "exited")
    (event,) = logged.events()
    assert (event["event"], event["logger"], event["level"]) == ("job tag: exited", "sandrun.jobs", "info")


@pytest.mark.requirement(34)
def test_log_that_nobody_reads_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log.Lines(writer).msg("lost")
    os.close(writer)
    log.Lines(writer).msg("lost too")


def test_flood_of_security_events_is_cut_and_counted(logged: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("sandrun.api.log.time.monotonic", lambda: now)
    security = log.Security(per_second=5)
    for _ in range(100):
        security("request_refused", "192.0.2.1", status=400)
    now = 1001.0
    security("request_refused", "192.0.2.1", status=400)
    told = logged.events()
    assert len(told) == 7
    assert (told[5]["event"], told[5]["count"]) == ("security_events_dropped", 95)
    assert told[0]["address"] == "192.0.2.1"
