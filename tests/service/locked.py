"""A locked-in HTTP process over a spawner that is played: `python -m tests.service.locked CERT KEY`, "-" for neither.

Writes one line of JSON when it listens, `{"port", "walls"}`, and one when its standard input ends, `{"late"}`: modules
that were imported after the walls were up, when their files may be out of reach.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any, cast

from sandrun.api import guard, lockdown, log, main
from sandrun.api.app import App
from sandrun.api.context import Context
from sandrun.config import Config
from sandrun.jobs.config import JobsConfig
from sandrun.jobs.service import JobService
from sandrun.model import MIB, Ceilings
from sandrun.spawner.client import Order, SpawnerClient
from tests.service.spawner_double import SandboxDouble, SpawnerDouble


class Playing(SpawnerDouble):
    """Runs nothing: each job says hello and leaves a file."""

    def start(self, order: Order) -> SandboxDouble:
        sandbox = super().start(order)
        sandbox.begin()
        sandbox.write("stdout", "grüß dich\n".encode())
        sandbox.write("stderr", b"\xff")
        if order.collect:
            sandbox.write_output(b"out.txt", b"content")
            sandbox.end_outputs()
        asyncio.get_running_loop().call_later(0.05, sandbox.end)
        return sandbox


async def serve(gate: Any, settings: Any, listener: Any, report: lockdown.Report) -> None:
    loop = asyncio.get_running_loop()
    service = JobService(cast(SpawnerClient, Playing()), JobsConfig(store_bytes=64 * MIB))
    gate.app = App(Context(service=service, ceilings=Ceilings(), walls=report.as_json()))
    server = main.Server(settings, lambda: None)
    loop.add_reader(0, server.stopping.set)
    tell({"port": listener.getsockname()[1], "walls": report.as_json()})
    await server.serve(sockets=[listener])
    service.close()


def tell(value: object) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def run(cert: str, key: str) -> None:
    log.set_up()
    config = Config(host="127.0.0.1", port=0, cert=cert, key=key) if cert != "-" else Config(host="127.0.0.1", port=0)
    (listener,) = main.bind(config.host, config.port)
    main.import_all()
    gate = main._Gate()
    settings = main.uvicorn_config(config, gate, guard.Registry(guard.Bounds(), log.Security()))
    report = lockdown.lock_down(lockdown.Wanted(parent=os.getppid()))
    before = set(sys.modules)
    with asyncio.Runner(loop_factory=main.new_loop) as runner:
        runner.run(serve(gate, settings, listener, report))
    tell({"late": sorted(set(sys.modules) - before)})


if __name__ == "__main__":
    run(*sys.argv[1:])
