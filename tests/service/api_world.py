"""The whole API on a real socket over a spawner that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import httpx2

from sandrun.api.app import App
from sandrun.api.context import Context
from sandrun.api.guard import Bounds
from sandrun.jobs.config import JobsConfig
from sandrun.jobs.job import Job
from sandrun.jobs.service import JobService
from sandrun.model import MIB, Outcome
from sandrun.spawner.client import SpawnerClient
from tests.service.api_server import Listening, listening
from tests.service.spawner_double import SandboxDouble, SpawnerDouble
from tests.serving import tarball

NO_JOB = "0" * 32
GOOD = tarball({"main.py": "x"})
MANIFEST = b'{"entrypoint": "main.py"}'


@dataclass
class World:
    """A server, its client, and the spawner behind it."""

    spawner: SpawnerDouble
    service: JobService
    context: Context
    app: App
    served: Listening
    http: httpx2.AsyncClient

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.002)

    async def next_sandbox(self) -> SandboxDouble:
        """The sandbox of the next job that is started."""
        count = len(self.spawner.sandboxes)
        await self.until(lambda: len(self.spawner.sandboxes) > count)
        return self.spawner.sandboxes[-1]

    async def submit(self, **manifest: Any) -> tuple[str, SandboxDouble]:
        """A job that has been started; its id and its sandbox."""
        manifest = {"entrypoint": "main.py", **manifest}
        parts = {"manifest": json.dumps(manifest).encode(), "files": tarball({"main.py": "x"})}
        answer = await self.http.post("/submit", files=parts)
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["job_id"]
        await self.until(lambda: self.service.get(job_id).left_queue is not None)
        sandbox = self.spawner.sandboxes[-1]
        sandbox.begin()
        return job_id, sandbox

    async def finished(self, outputs: Mapping[bytes, bytes] | None = None, **streams: bytes) -> str:
        """The id of a job that wrote this and left these files."""
        job_id, sandbox = await self.submit()
        for name, data in streams.items():
            await self.write(sandbox, name, data)
        for path, content in (outputs or {}).items():
            sandbox.write_output(path, *([content] if content else []))
            await asyncio.sleep(0.01)
        sandbox.end_outputs()
        sandbox.end(Outcome.EXITED)
        await self.until(lambda: self.job(job_id).status.ended)
        return job_id

    async def write(self, sandbox: SandboxDouble, stream: str, data: bytes) -> None:
        """In pieces that the pipe takes, while the server reads."""
        for start in range(0, len(data), 32768):
            sandbox.write(stream, data[start : start + 32768])
            await asyncio.sleep(0.002)

    def job(self, job_id: str) -> Job:
        return self.service.get(job_id)


@contextlib.asynccontextmanager
async def world(
    *, bounds: Bounds | None = None, interval: float = 0.05, spawner: SpawnerDouble | None = None, **config: Any
) -> AsyncIterator[World]:
    """A server for the time of the block, with room for a few jobs; `config` is of the job service."""
    spawner = spawner or SpawnerDouble()
    defaults = {"active_per_core": 4.0, "client_running_share": 1.0, "store_bytes": 400 * MIB}
    jobs = JobsConfig(**defaults | config)
    service = JobService(cast(SpawnerClient, spawner), jobs)
    context = Context(service=service, ceilings=jobs.ceilings, hostnames=frozenset({"sandrun.example"}))
    app = App(context)
    try:
        async with listening(app, bounds, interval) as served:
            base = f"http://127.0.0.1:{served.port}"
            async with httpx2.AsyncClient(base_url=base, timeout=10, trust_env=False) as http:
                yield World(spawner, service, context, app, served, http)
                spawner.close()
    finally:
        service.close()
        spawner.close()
        context.threads.close()


async def parse_events(lines: AsyncIterator[str], most: int) -> list[tuple[str, Any]]:
    """The next server-sent events, at most `most`: name and data."""
    events: list[tuple[str, Any]] = []
    name = "message"
    async for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            events.append((name, json.loads(value)))
            name = "message"
            if len(events) == most:
                break
    return events
