"""The unprivileged end of the spawner's socket, for one asyncio loop: start sandboxes, hear how they end."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sandrun.errors import Overloaded, ProtocolError, SetupError
from sandrun.model import LimitHit, Limits, Outcome, Usage
from sandrun.sandbox import messages
from sandrun.spawner import protocol

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS)
"""What passes by itself: descriptors or memory used up, for the moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnerFacts:
    """What this host offers, measured at start.

    Attributes:
        interpreters: name -> {"path", "version", "available", "reason"?}.
        environments: name -> {"python", "packages", "digest", ...}; "" is the bare interpreter.
        isolation: {"cgroup": "v1" | "v2" | "hybrid" | "none", "waived": [...], "uid": "own" | "shared", ...}.
    """

    interpreters: dict[str, dict[str, Any]]
    environments: dict[str, dict[str, Any]]
    isolation: dict[str, Any]
    cores: int
    ram_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job to start.

    Attributes:
        spec: JSON for init: entrypoint, interpreter, args, env, outputs, fresh. The spawner hands it on unread.
        archive_fd: memory file with the job's tar; stays the caller's, who may close it once `start` returns.
        stdin_fd: what the job reads, None for nothing.
        tag: opaque 64-bit name of the client, for the CPU ledger.
    """

    spec: bytes
    archive_fd: int
    stdin_fd: int | None
    limits: Limits
    environment: str | None
    tag: int
    collect: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a job.

    Attributes:
        isolation: JSON, {"inside": measured in the sandbox, "host": measured from outside, "digest": SHA-256}, or b"".
    """

    outcome: Outcome
    exit_code: int | None = None
    signal: int | None = None
    usage: Usage = field(default_factory=Usage)
    limits_hit: tuple[LimitHit, ...] = ()
    isolation: bytes = b""
    failed: dict[str, Any] | None = None


class Sandbox:
    """A job that the spawner was asked to start.

    Attributes:
        stdout, stderr, outputs: read ends of pipes, non-blocking; whoever reads them owns and closes them.
        started: resolves to the CLOCK_MONOTONIC second at which the client's code began; cancelled if it never did.
        ended: resolves to `Ended`, never to an exception.
        on_activity: called with False when the job has used no CPU for 0.2 s, with True when it does again.
    """

    def __init__(self, client: SpawnerClient, ticket: int, pipes: tuple[int, int, int]) -> None:
        self._client = client
        self.ticket = ticket
        self.stdout, self.stderr, self.outputs = pipes
        self.started: asyncio.Future[float] = client.loop.create_future()
        self.ended: asyncio.Future[Ended] = client.loop.create_future()
        self.on_activity: Callable[[bool], None] | None = None

    def cancel(self) -> None:
        """Have the job end as `cancelled`; what it wrote so far is kept. No effect on one that is over."""
        if not self.ended.done():
            self._client.send(protocol.encode_cancel(self.ticket))

    def finish(self, ended: Ended) -> None:
        self.started.cancel()
        if not self.ended.done():
            self.ended.set_result(ended)


class SpawnerClient:
    """Made inside a running loop. `await ready()` before the first `start`."""

    def __init__(self, connection: socket.socket, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop or asyncio.get_running_loop()
        self._ticket = 0
        self._sandboxes: dict[int, Sandbox] = {}
        self._facts: asyncio.Future[SpawnerFacts] = self.loop.create_future()
        self._environments: list[str] = []
        self.lost = True
        self.attach(connection)

    @property
    def facts(self) -> SpawnerFacts:
        """Raises: asyncio.InvalidStateError before `ready`."""
        return self._facts.result()

    async def ready(self) -> SpawnerFacts:
        """Raises: SetupError if no sandbox can be built here; ProtocolError if the spawner dies before it is ready."""
        return await asyncio.shield(self._facts)

    def attach(self, connection: socket.socket) -> None:
        """Speak to this spawner from now on; the one before it is dead, and its jobs end as `worker_lost`."""
        self._detach()
        connection.setblocking(False)
        self._connection = connection
        if self._facts.done():
            self._facts = self.loop.create_future()
        self.lost = False
        self.loop.add_reader(connection.fileno(), self._receive)

    def close(self) -> None:
        self._detach()

    def start(self, order: Order) -> Sandbox:
        """Hand a job over. Raises: Overloaded while the spawner is being replaced or cannot take more."""
        if self.lost or not self._facts.done():
            raise Overloaded("the spawner is being restarted", retry_after_seconds=2, client_at_fault=False)
        self._ticket += 1
        limits = order.limits
        start = protocol.Start(
            environment=self._environments.index(order.environment or ""),
            processes=limits.processes,
            collect=order.collect,
            ticket=self._ticket,
            tag=order.tag,
            memory_bytes=limits.memory_bytes,
            wall_ms=max(1, round(limits.wall_seconds * 1000)),
            cpu_ms=max(1, round(limits.cpu_seconds * 1000)) if limits.cpu_seconds is not None else 0,
        )
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for _ in range(3):
                reader, writer = os.pipe2(os.O_CLOEXEC)
                os.fchmod(writer, 0o222)  # so that `> /dev/stderr` opens it again, which is another user's; not to read
                os.set_blocking(reader, False)
                ours.append(reader)
                theirs.append(writer)
            spec = os.memfd_create("spec", os.MFD_CLOEXEC)
            theirs.append(spec)
            os.write(spec, order.spec)
            stdin = order.stdin_fd
            if stdin is None:  # opened anew each time: flags set on a shared one would be a channel between jobs
                stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                theirs.append(stdin)
            descriptors = [spec, order.archive_fd, stdin, *theirs[:3]]
            protocol.send(self._connection, start.encode(), descriptors)
        except BaseException as error:
            protocol.close_all(ours)
            if isinstance(error, BlockingIOError):
                reason = "the spawner is busy"
            elif isinstance(error, ConnectionError):
                self._lose()
                reason = "the spawner is being restarted"
            elif isinstance(error, OSError) and error.errno in SHORTAGES:
                reason = f"the server is short of something: {os.strerror(error.errno)}"
            else:
                raise
            raise Overloaded(reason, retry_after_seconds=1, client_at_fault=False) from None
        finally:
            protocol.close_all(theirs)
        sandbox = Sandbox(self, self._ticket, (ours[0], ours[1], ours[2]))
        self._sandboxes[self._ticket] = sandbox
        return sandbox

    def send(self, message: bytes) -> None:
        """A message without descriptors; lost if the spawner is."""
        try:
            if not self.lost:
                protocol.send(self._connection, message)
        except BlockingIOError:  # a full socket: the spawner has much to do, try again soon
            self.loop.call_later(0.01, self.send, message)
        except OSError:
            self._lose()

    def _detach(self) -> None:
        if not self.lost:
            self._lose()

    def _lose(self) -> None:
        self.lost = True
        self.loop.remove_reader(self._connection.fileno())
        self._connection.close()
        if not self._facts.done():
            self._facts.set_exception(ProtocolError("the spawner ended before it was ready"))
            self._facts.exception()  # whoever awaits it hears of it; nobody has to
            self._facts = self.loop.create_future()
        lost = list(self._sandboxes.values())
        self._sandboxes.clear()
        for sandbox in lost:
            sandbox.finish(Ended(outcome=Outcome.WORKER_LOST))

    def _receive(self) -> None:
        try:
            for _ in range(64):
                message, _fds = protocol.receive(self._connection, protocol.FROM_SPAWNER_BYTES)
                if not message:
                    self._lose()
                    return
                self._handle(message)
                if self.lost:
                    return
        except BlockingIOError:
            return
        except (OSError, ProtocolError, ValueError):
            self._lose()

    def _handle(self, message: bytes) -> None:
        kind = message[:1]
        if kind == protocol.STARTED:
            sandbox = self._sandboxes.get(protocol.decode_started(message))
            if sandbox is not None and not sandbox.started.done():
                sandbox.started.set_result(time.monotonic())
        elif kind == protocol.ACTIVITY:
            ticket, active = protocol.decode_activity(message)
            sandbox = self._sandboxes.get(ticket)
            if sandbox is not None and sandbox.on_activity is not None:
                sandbox.on_activity(active)
        elif kind == protocol.ENDED:
            told = protocol.Ended.decode(message)
            ended = _translate(told)  # what it refuses ends the spawner's jobs, this one among them
            sandbox = self._sandboxes.pop(told.ticket, None)
            if sandbox is not None:
                sandbox.finish(ended)
        elif kind == protocol.UNFIT:
            step, number, details = messages.read_failure(message[1:])
            if not self._facts.done():
                self._facts.set_exception(SetupError(step, number, details))
                self._facts.exception()  # whoever awaits it hears of it; nobody has to
        elif kind == protocol.FACTS:
            facts = SpawnerFacts(**protocol.decode_facts(message))
            self._environments = list(facts.environments)
            if self._facts.done():  # told again, of a new zygote
                self._facts = self.loop.create_future()
            self._facts.set_result(facts)
        else:
            raise ProtocolError(f"unknown message {kind!r}")


_json = msgspec.json.Decoder(msgspec.Raw)  # checks, and makes nothing of it: objects take five times the memory


def _translate(ended: protocol.Ended) -> Ended:
    outcome = Outcome(protocol.OUTCOMES[ended.outcome])
    hits = []
    if ended.hits & messages.HIT_PROCESSES:
        hits.append(LimitHit.PROCESSES)
    if ended.hits & messages.HIT_STORAGE:
        hits.append(LimitHit.STORAGE)
    failed = None
    isolation = b""
    if outcome is Outcome.SETUP_FAILED:
        step, number, details = messages.read_failure(ended.inside)
        failed = {"step": step, "errno": number, "details": details}
    elif ended.inside and ended.host:
        for part in (ended.inside, ended.host):  # each by itself, so that neither can pass for more than it is
            if not part.isascii() or not part.startswith(b"{"):
                raise ProtocolError("an isolation report that is no JSON object in ASCII")
            _json.decode(part)
        digest = hashlib.sha256(ended.host + b"\0" + ended.inside).hexdigest().encode()
        isolation = b'{"inside":%b,"host":%b,"digest":"%b"}' % (ended.inside, ended.host, digest)
    return Ended(
        outcome=outcome,
        exit_code=None if ended.exit_code == protocol.UNKNOWN else ended.exit_code,
        signal=ended.signal or None,
        usage=Usage(
            wall_seconds=ended.wall_us / 1e6,
            cpu_seconds=None if ended.cpu_us == protocol.UNKNOWN else ended.cpu_us / 1e6,
            memory_peak_bytes=None if ended.memory_peak == protocol.UNKNOWN else ended.memory_peak,
            processes_peak=None if ended.tasks_peak == protocol.UNKNOWN else ended.tasks_peak,
        ),
        limits_hit=tuple(hits),
        isolation=isolation,
        failed=failed,
    )
