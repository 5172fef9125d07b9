"""Stands in for the spawner where a test needs an order of events that a real one does not give on demand."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from sandrun.errors import Overloaded
from sandrun.model import Outcome, Usage
from sandrun.sandbox import collect
from sandrun.spawner.client import Ended, Order, SpawnerFacts

DATA = {
    "available": True,
    "packages": {"numpy": "2.0.0"},
    "digest": "d" * 64,
    "created": "2026-01-01T00:00:00+00:00",
    "preload": ["numpy"],
    "python": "3.11.2",
    "in_place": True,
    "modules": ["json", "numpy", "numpy.linalg"],
}
BROKEN = {
    **DATA,
    "available": False,
    "reason": "preload numpy: ImportError: no",
    "python": None,
    "in_place": None,
    "modules": None,
}
FACTS = SpawnerFacts(
    interpreters={"python3": {"available": True}, "bash": {"available": True}, "node": {"available": False}},
    environments={"": {"available": True}, "data": DATA, "broken": BROKEN},
    isolation={},
    cores=1,
    ram_bytes=8 << 30,
)


class SandboxDouble:
    """A started job whose every event the test brings about."""

    def __init__(self, order: Order) -> None:
        loop = asyncio.get_running_loop()
        self.spec = order.spec
        self.archive = os.pread(order.archive_fd, 1 << 20, 0)
        self.stdin = None if order.stdin_fd is None else os.pread(order.stdin_fd, 1 << 20, 0)
        self.order = order
        self.cancels = 0
        self.started: asyncio.Future[float] = loop.create_future()
        self.ended: asyncio.Future[Ended] = loop.create_future()
        self._writers: dict[str, int] = {}
        for name in ("stdout", "stderr", "outputs"):
            reader, self._writers[name] = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            setattr(self, name, reader)

    def cancel(self) -> None:
        self.cancels += 1

    def begin(self) -> None:
        self.started.set_result(time.monotonic())

    def write(self, stream: str, data: bytes) -> None:
        assert os.write(self._writers[stream], data) == len(data)

    def write_output(self, path: bytes, *pieces: bytes, complete: bool = True) -> None:
        size = collect.SIZE.pack(sum(map(len, pieces)))
        self.write("outputs", collect.FRAME.pack(collect.BEGIN, len(size + path)) + size + path)
        for piece in pieces:
            self.write("outputs", collect.FRAME.pack(collect.DATA, len(piece)) + piece)
        if complete:
            self.write("outputs", collect.FRAME.pack(collect.COMPLETE, 0))

    def end_outputs(self, omitted: int = 0) -> None:
        self.write("outputs", collect.FRAME.pack(collect.END, omitted))

    def close(self) -> None:
        """All processes are dead."""
        while self._writers:
            os.close(self._writers.popitem()[1])

    def report(self, outcome: Outcome = Outcome.EXITED, **fields: Any) -> None:
        if outcome is Outcome.EXITED:
            fields.setdefault("exit_code", 0)
        self.started.cancel()
        self.ended.set_result(Ended(outcome=outcome, usage=Usage(wall_seconds=0.5, cpu_seconds=0.25), **fields))

    def end(self, outcome: Outcome = Outcome.EXITED, **fields: Any) -> None:
        self.close()
        self.report(outcome, **fields)


class SpawnerDouble:
    """Starts everything it is given, unless `refuses` says with what to refuse."""

    def __init__(self) -> None:
        self.facts = FACTS
        self.refuses: Exception | None = None
        self.attempts = 0
        self.sandboxes: list[SandboxDouble] = []

    def start(self, order: Order) -> SandboxDouble:
        self.attempts += 1
        if self.refuses is not None:
            raise self.refuses
        self.sandboxes.append(SandboxDouble(order))
        return self.sandboxes[-1]

    def lose(self) -> None:
        """The spawner dies, and all that it started."""
        self.refuses = Overloaded("restarting", retry_after_seconds=2, client_at_fault=False)
        for sandbox in self.sandboxes:
            if not sandbox.ended.done():
                sandbox.end(Outcome.WORKER_LOST)

    def close(self) -> None:
        for sandbox in self.sandboxes:
            sandbox.close()
