"""A job between its start and its verdict: its pipes are read, its outputs taken apart, its end awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from sandrun.errors import ProtocolError
from sandrun.jobs.job import Job, StoredOutput
from sandrun.jobs.outputs import OutputsParser
from sandrun.jobs.pipes import PipeReader
from sandrun.model import Outcome
from sandrun.spawner.client import Ended, Sandbox

END_OF_FILE_SECONDS = 2.0
"""How long pipes may stay open after the report that all their writers are dead; then they are closed from here."""
OVERDUE_SECONDS = 60.0
"""How long beyond a job's wall limit its report may take, set-up and collecting included. Then it counts as lost."""


class Running:
    """Owns the read ends of one sandbox's pipes. `finished` is called once, when nothing more can come."""

    def __init__(self, job: Job, sandbox: Sandbox, finished: Callable[[Job, Ended], None]) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._job = job
        self._sandbox = sandbox
        self._finished = finished
        self._ended: Ended | None = None
        self._collected = Collected(job)
        self._readers: tuple[PipeReader, ...] = (
            PipeReader(loop, sandbox.stdout, job.stdout.append, self._at_end),
            PipeReader(loop, sandbox.stderr, job.stderr.append, self._at_end),
            PipeReader(loop, sandbox.outputs, self._collected.take, self._at_end),
        )
        self._timer = loop.call_later(job.manifest.timeout + OVERDUE_SECONDS, self._overdue)
        sandbox.started.add_done_callback(self._on_started)
        sandbox.ended.add_done_callback(self._on_ended)

    def cancel(self) -> None:
        self._sandbox.cancel()

    def _on_started(self, started: asyncio.Future[float]) -> None:
        if not started.cancelled():
            self._job.started = started.result()
            self._job.unpacked()

    def _on_ended(self, ended: asyncio.Future[Ended]) -> None:
        """All writers are dead: the pipes hold what is left, and then their end."""
        if self._ended is not None:  # given up before
            return
        self._timer.cancel()
        for reader in self._readers:
            reader.drain()
        self._ended = ended.result()
        if all(reader.closed for reader in self._readers):
            self._finish()
        else:
            self._timer = self._loop.call_later(END_OF_FILE_SECONDS, self._give_up, self._ended)

    def _at_end(self) -> None:
        """A pipe has ended: was it the last thing to wait for?"""
        if self._ended is not None and all(reader.closed for reader in self._readers):
            self._timer.cancel()
            self._finish()

    def _finish(self) -> None:
        assert self._ended is not None
        self._readers = ()  # they refer back here: without this only the garbage collector would let go of the job
        self._collected.end(self._ended.outcome)
        self._finished(self._job, self._ended)

    def _overdue(self) -> None:
        self._sandbox.cancel()
        self._give_up(Ended(outcome=Outcome.WORKER_LOST))

    def _give_up(self, ended: Ended) -> None:
        """The spawner never reported, or something still holds a write end: it must not hold up the job's end."""
        structlog.get_logger().error("job_overdue", job=self._job.tag, reported=self._ended is not None)
        self._ended = None
        for reader in self._readers:
            reader.close()
        self._ended = ended
        self._finish()


class Collected:
    """Takes the stream of output files apart into the job's outputs, as long as the store has room for them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._parser: OutputsParser | None = OutputsParser()

    def take(self, piece: bytes) -> None:
        parser = self._parser
        if parser is None:
            return
        if not self._job.account.grant(len(piece)):  # an erased job's account is closed and grants nothing
            self._stop(storage_full=True)
            return
        try:
            for file, data in parser.feed(piece):
                self._job.outputs[file.path] = StoredOutput(file.path, data, file.sha256)
        except ProtocolError:  # the collector is the job's user; what came whole is kept
            structlog.get_logger().warning("outputs_malformed", job=self._job.tag)
            self._stop(storage_full=False)

    def end(self, outcome: Outcome) -> None:
        """No more will come. A file that is not whole is left out, and what a collector that failed did not send."""
        if self._parser is not None:
            self._job.outputs_omitted = self._parser.omitted
            unasked = self._job.manifest.outputs == () or outcome in (Outcome.WORKER_LOST, Outcome.SETUP_FAILED)
            if not self._parser.ended and (self._parser.total or not unasked):
                self._job.outputs_omitted += 1
            self._parser = None

    def _stop(self, *, storage_full: bool) -> None:
        self._parser = None
        self._job.outputs_omitted += 1
        self._job.storage_full = storage_full
