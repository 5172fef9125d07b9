"""What the API calls: take a job on, run it, tell of it, forget it. One event loop; nothing here blocks it.

    submit, run ─▶ admission (store, queue bounds, checks) ─▶ queue ─▶ running ─▶ verdict ─▶ kept, then forgotten

Whatever is refused leaves nothing behind: no memory file, no byte held, no place in the queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from sandrun.errors import InvalidInput, NotFound, Overloaded, ProtocolError
from sandrun.jobs.checks import Checks
from sandrun.jobs.clients import Client, Clients
from sandrun.jobs.config import JobsConfig, default_store_bytes
from sandrun.jobs.describe import describe, log_end, log_fields
from sandrun.jobs.intake import check_upload, pack_request
from sandrun.jobs.job import Input, InputFile, Job
from sandrun.jobs.request import RunRequest
from sandrun.jobs.result import Failure, JobResult
from sandrun.jobs.running import Running
from sandrun.jobs.scheduler import Bounds, Scheduler
from sandrun.jobs.store import Account, Store
from sandrun.jobs.wakeup import Wakeup
from sandrun.model import MIB, LimitHit, Manifest, Outcome, Status, parse_manifest, show
from sandrun.spawner.client import Ended, Order, SpawnerClient, SpawnerFacts

JOB_BYTES = 16 * 1024
"""What every job is charged for being known at all."""
SMALL_BYTES = 64 * 1024
"""Up to this much is parsed or packed in the event loop: a thread would cost more than the work."""
CANCEL_SECONDS = 5.0
DEFAULT_MEMORY_BYTES = 512 * MIB
"""What a job takes of the memory that may be promised, when the places of a client are counted."""
START_AGAIN_SECONDS = 0.05
"""How soon to try again when the spawner is being replaced or is busy."""


class JobService:
    """All jobs of one server. Make it inside the running loop, when the spawner is ready."""

    def __init__(self, spawner: SpawnerClient, config: JobsConfig, *, client_key: bytes | None = None) -> None:
        """`client_key` makes the clients' tags; a restarted server given the same one knows its clients again."""
        self.config = config
        self._spawner = spawner
        self._loop = asyncio.get_running_loop()
        self._facts = facts = spawner.facts
        self._clients = Clients(client_key)
        self.erased = 0  # jobs, since the start
        self._checks = Checks(max(2, facts.cores))
        budget = config.store_bytes or default_store_bytes(facts.ram_bytes)
        self._store: Store[Job] = Store(
            budget,
            int(budget * config.client_store_share),
            forget=self.erase,
            call_at=self._loop.call_at,
            clock=self._loop.time,
        )
        memory_bytes = int(facts.ram_bytes * config.memory_share)
        places = memory_bytes // min(config.ceilings.memory_mb * MIB, DEFAULT_MEMORY_BYTES)
        self._scheduler: Scheduler[Job] = Scheduler(
            Bounds(
                active=max(1, int(config.active_per_core * facts.cores)),
                memory_bytes=memory_bytes,
                client_running=max(1, int(places * config.client_running_share)),
                queued=config.queued_jobs,
                client_queued=config.client_queued_jobs,
            ),
            self._start,
        )
        self._running: dict[Job, Running] = {}
        self._idle = Wakeup()
        self._retrying = False
        self._draining = False

    # ---- who and what ----

    def client(self, address: str) -> Client:
        """The client behind an address (an IP literal). Raises: InvalidInput if it is none."""
        return self._clients.identify(address)

    @property
    def facts(self) -> SpawnerFacts:
        """What this host offers; between two spawners, what the last one said."""
        try:
            self._facts = self._spawner.facts
        except (asyncio.InvalidStateError, ProtocolError):
            pass
        return self._facts

    @property
    def counts(self) -> dict[str, int]:
        """For `/health`: jobs queued, running and known, bytes held and in the budget."""
        ledger = self._store.ledger
        return {
            "queued": self._scheduler.queued,
            "running": self._scheduler.running,
            "known": len(self._store),
            "store_used_bytes": ledger.used_bytes,
            "store_bytes": ledger.budget_bytes,
        }

    @property
    def draining(self) -> bool:
        return self._draining

    # ---- admission ----

    def open_account(self, client: Client) -> Account:
        """For an upload: `take` each piece before keeping it, then give the account to `submit`, or `close` it.

        Raises: Overloaded while draining.
        """
        self._refuse_if_draining()
        return self._store.open(client)

    async def submit(
        self, client: Client, archive_fd: int, manifest_bytes: bytes | None, account: Account | None = None
    ) -> Job:
        """Check an uploaded archive and its manifest (None: `job.json` in the archive), and queue the job.

        Owns the descriptor, a sealed memory file, and the account from the call on, whatever happens. Without an
        account the file's size is taken from the store now.

        Raises: InvalidInput; Overloaded.
        """
        given = Input(archive_fd, os.fstat(archive_fd).st_size)
        held = account or self._store.open(client)
        with self._admission(client, given, held):
            if account is None:
                held.take(given.archive_bytes)
            known: Manifest | bytes | None = manifest_bytes
            if manifest_bytes is not None and len(manifest_bytes) <= SMALL_BYTES:
                known = parse_manifest(manifest_bytes, self.config.ceilings)
                self._refuse_missing(known)  # before the archive has cost anything
            check = partial(check_upload, given, known, self.config.ceilings)
            manifest, inputs = await self._checks.run(client, check)
            self._refuse_missing(manifest)
            job = self._make(client, manifest, given, held, inputs, keep=True)
        self._enqueue(job)
        return job

    async def run(self, client: Client, request: RunRequest) -> Job:
        """Queue a job that came whole in one request; returns when it has left the queue, running or already ended.

        Then `wait` for its end, take its `result`, and `dismiss` it, whatever happens. A caller that is cancelled
        while this waits takes the job with it.

        Raises: InvalidInput; Overloaded, also when it was not its turn within `run_queue_seconds`.
        """
        self._refuse_missing(request.manifest)
        given = Input()
        account = self._store.open(client)
        with self._admission(client, given, account):
            pack = partial(pack_request, given, request)
            inputs = pack() if request.size <= SMALL_BYTES else await self._checks.run(client, pack)
            account.take(given.archive_bytes)
            job = self._make(client, request.manifest, given, account, inputs, keep=request.keep)
        self._enqueue(job)
        if job.status is Status.QUEUED:
            await self._wait_for_turn(job)
        return job

    def get(self, job_id: str) -> Job:
        """The job, kept for its whole time from now on. Raises: NotFound."""
        return self._store.get(job_id)

    async def wait(self, job: Job, seconds: float | None = None) -> bool:
        """Until the job has ended or is erased, at most `seconds`. Returns whether it has."""
        return await job.wait_ended(seconds)

    def position(self, job: Job) -> int | None:
        """Place in the queue from 1; None once it has left it."""
        return self._scheduler.position(job)

    async def cancel(self, job: Job) -> None:
        """Stop the job and keep what it wrote. Returns when it has ended; no effect on one that has."""
        self._stop(job)
        await job.wait_ended(CANCEL_SECONDS)

    def erase(self, job: Job) -> None:
        """Forget the job with all that it was given, wrote and made; one that still runs is stopped."""
        if not job.erased:
            self.erased += 1
            self._store.remove(job)
            self._stop(job)
            job.erase()

    def dismiss(self, job: Job) -> None:
        """A `/run` is answered, or its connection closed: stop it if it still runs, erase it unless it is kept."""
        if job.keep:
            self._stop(job)
        else:
            self.erase(job)

    def result(self, job: Job, *, logs: bool = False) -> JobResult:
        """All that is told of the job now; with `logs`, its logs as text and its small outputs too, as `/run` answers.

        Raises: NotFound once it is erased.
        """
        if job.erased:
            raise NotFound("no such job, or it has been erased")
        return describe(job, self._scheduler.position(job), logs=logs)

    async def drain(self, grace_seconds: float) -> None:
        """Take nothing on any more, let what runs finish within `grace_seconds`, then stop it. Waiting jobs are lost.

        A second call with a shorter grace makes it so.
        """
        self._draining = True
        for job in self._store.jobs():
            if self._scheduler.remove(job):
                self._conclude(job, Ended(outcome=Outcome.WORKER_LOST))
        if not await self._wait_idle(grace_seconds):
            for running in list(self._running.values()):
                running.cancel()
            await self._wait_idle(CANCEL_SECONDS)

    def close(self) -> None:
        """Erase every job and end the threads."""
        self._draining = True
        for job in self._store.jobs():
            self.erase(job)
        self._checks.close()

    # ---- on the way in ----

    @contextmanager
    def _admission(self, client: Client, given: Input, account: Account) -> Iterator[None]:
        """Hold a place in the queue for what is being admitted. If that fails nothing is kept."""
        try:
            self._refuse_if_draining()
            self._scheduler.reserve(client)
            try:
                account.take(JOB_BYTES)
                yield
                self._refuse_if_draining()
            except BaseException:
                self._scheduler.give_up(client)
                raise
        except BaseException:
            given.close()
            account.close()
            raise

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise Overloaded("the server is shutting down", retry_after_seconds=10, client_at_fault=False)

    def _refuse_missing(self, manifest: Manifest) -> None:
        """Interpreters and environments are this server's own: a manifest may be right elsewhere and wrong here."""
        facts = self.facts
        if manifest.cpu_seconds is not None and "cpu" in facts.isolation.get("waived", ()):
            raise InvalidInput("cpu_seconds", "this server cannot measure CPU time (cpu is waived); leave it out")
        available = [name for name, fact in facts.interpreters.items() if fact.get("available", True)]
        if manifest.interpreter not in available and manifest.interpreter != "executable":
            names = ", ".join(sorted(available))
            raise InvalidInput("interpreter", f"{show(manifest.interpreter)} is not on this server; accepted: {names}")
        if manifest.environment is not None:
            offered = sorted(name for name, fact in facts.environments.items() if name and fact.get("available", True))
            if manifest.environment not in offered:
                named, names = show(manifest.environment), ", ".join(offered) or "none"
                reason = facts.environments.get(manifest.environment, {}).get("reason")
                missing = f"withdrawn ({reason})" if reason else "not on this server"
                raise InvalidInput("environment", f"{named} is {missing}; accepted: {names}")

    def _make(
        self,
        client: Client,
        manifest: Manifest,
        given: Input,
        account: Account,
        inputs: tuple[InputFile, ...],
        *,
        keep: bool,
    ) -> Job:
        given.spec = json.dumps(
            {
                "entrypoint": manifest.entrypoint,
                "interpreter": manifest.interpreter,
                "args": manifest.args,
                "env": dict(manifest.env),
                "outputs": manifest.outputs,
                "fresh": manifest.fresh_interpreter,
            }
        ).encode()
        account.take(len(given.spec) + given.stdin_bytes)
        return Job(client, manifest, given, account, inputs, keep=keep)

    def _enqueue(self, job: Job) -> None:
        self._store.add(job)
        self._scheduler.queue(job)

    async def _wait_for_turn(self, job: Job) -> None:
        deadline = self._loop.time() + self.config.run_queue_seconds
        try:
            while job.left_queue is None and not job.status.ended and not job.erased:
                if not await job.changed.wait(deadline - self._loop.time()):
                    reason = f"the job waited {self.config.run_queue_seconds:g} s in the queue"
                    raise Overloaded(reason, retry_after_seconds=30, client_at_fault=False)
            if job.left_queue is None:  # drained, or room was needed
                raise Overloaded("the server took the job back", retry_after_seconds=10, client_at_fault=False)
        except BaseException:
            self.erase(job)
            raise

    # ---- running ----

    def _start(self, job: Job) -> bool:
        """Hand the job to the spawner; False if it cannot take one now."""
        given, manifest = job.given, job.manifest
        try:
            sandbox = self._spawner.start(
                Order(
                    spec=given.spec,
                    archive_fd=given.archive_fd,
                    stdin_fd=given.stdin_fd,
                    limits=manifest.limits,
                    environment=manifest.environment,
                    tag=job.client.tag,
                    collect=manifest.outputs != (),
                )
            )
        except Overloaded:
            self._try_again()
            return False
        except (OSError, ValueError) as error:  # ValueError: the environment went with the last spawner
            failed = {"step": "start", "errno": getattr(error, "errno", None) or 0, "details": str(error)}
            self._conclude(job, Ended(outcome=Outcome.SETUP_FAILED, failed=failed))
            self._loop.call_soon(self._next_after, job)
            return True
        given.close()  # the sandbox has its own
        job.left_queue = time.monotonic()
        job.status = Status.RUNNING
        self._running[job] = Running(job, sandbox, self._finished)
        sandbox.on_activity = partial(self._scheduler.set_active, job)
        job.changed.wake()
        return True

    def _try_again(self) -> None:
        if not self._retrying:
            self._retrying = True
            self._loop.call_later(START_AGAIN_SECONDS, self._start_again)

    def _start_again(self) -> None:
        self._retrying = False
        self._scheduler.resume()

    def _stop(self, job: Job) -> None:
        if self._scheduler.remove(job):
            self._conclude(job, Ended(outcome=Outcome.CANCELLED))
        elif job in self._running:
            self._running[job].cancel()

    def _finished(self, job: Job, ended: Ended) -> None:
        """Nothing more will come of a job that was started."""
        del self._running[job]
        if not job.erased:
            self._conclude(job, ended)
        self._loop.call_soon(self._next_after, job)  # whoever waits for this job hears of it first

    def _next_after(self, job: Job) -> None:
        self._scheduler.release(job)
        if not self._running:
            self._idle.wake()

    def _conclude(self, job: Job, ended: Ended) -> None:
        """The verdict: what is told of the job from now on."""
        job.release_input()
        job.stdout.end()
        job.stderr.end()
        job.outcome = ended.outcome
        job.exit_code = ended.exit_code
        job.signal = ended.signal
        job.usage = ended.usage
        job.isolation = ended.isolation
        hits = set(ended.limits_hit)
        if job.stdout.truncated or job.stderr.truncated:
            hits.add(LimitHit.OUTPUT)
        if job.storage_full:
            hits.add(LimitHit.STORAGE)
        job.limits_hit = tuple(sorted(hits))
        if ended.failed is not None:
            step, number = str(ended.failed.get("step")), int(ended.failed.get("errno") or 0)
            job.failure = Failure(step=step, errno=number, details=os.strerror(number) if number else "failed")
        succeeded = ended.outcome is Outcome.EXITED and ended.exit_code == 0
        job.status = Status.COMPLETED if succeeded else Status.FAILED
        job.ttl_seconds = self.config.ttl_seconds if succeeded else self.config.failed_ttl_seconds
        job.ended = time.monotonic()
        self._store.settle(job)
        job.changed.wake()
        self._loop.call_soon(log_end, log_fields(job), ended)

    async def _wait_idle(self, seconds: float) -> bool:
        deadline = self._loop.time() + seconds
        while self._running:
            left = deadline - self._loop.time()
            if left <= 0 or not await self._idle.wait(left):
                return not self._running
        return True
