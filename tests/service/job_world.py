"""The job service over a spawner that the test plays."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any, cast

from sandrun.jobs.config import JobsConfig
from sandrun.jobs.job import Job
from sandrun.jobs.memfile import sealed
from sandrun.jobs.request import run_request_from
from sandrun.jobs.service import JobService
from sandrun.model import MIB, Ceilings
from sandrun.spawner.client import SpawnerClient
from tests.service.spawner_double import SandboxDouble, SpawnerDouble


class World:
    """A service over a spawner that the test plays. One place on the host, unless `config` says more."""

    def __init__(self, **config: Any) -> None:
        self.spawner = SpawnerDouble()
        defaults = {"active_per_core": 1.0, "store_bytes": 64 * MIB}
        self.service = JobService(cast(SpawnerClient, self.spawner), JobsConfig(**defaults | config))
        self.alice = self.service.client("192.0.2.1")
        self.bob = self.service.client("192.0.2.2")

    async def run(self, code: str = "print('hello')", **fields: Any) -> Job:
        request = run_request_from({"code": code, **fields}, Ceilings())
        return await self.service.run(self.alice, request)

    async def submit(self, archive: bytes | None = None, **manifest: Any) -> Job:
        text = json.dumps({"entrypoint": "main.py", **manifest}).encode()
        return await self.service.submit(self.alice, sealed("upload", archive or tar(**{"main.py": b"x"})), text)

    def sandbox(self, number: int = -1) -> SandboxDouble:
        return self.spawner.sandboxes[number]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)

    def assert_empty(self) -> None:
        """Nothing is kept, held, queued or running."""
        counts = self.service.counts
        assert counts["queued"] == counts["running"] == counts["known"] == counts["store_used_bytes"] == 0
        scheduler = self.service._scheduler
        assert (scheduler._reserved, scheduler._waiting, scheduler._places) == (0, {}, {})


def tar(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()
