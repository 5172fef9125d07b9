"""Sandrun's server for the measurements: started as anybody would, with the bounds on one client raised."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import machine, processes, wire

SANDRUN = machine.ROOT / ".venv/bin/sandrun"
PYTHON = machine.ROOT / ".venv/bin/python"
PINNED = machine.ROOT / "bench/pinned_pool.py"
START_SECONDS = 60.0
STOP_SECONDS = 60.0
TOGETHER = ("setpriv", "--pdeathsig", "TERM", "--")
"""If the benchmark is killed, its server goes too."""
OPTIONS = (
    *("--client-running-share", "1"),
    *("--client-store-share", "1"),
    *("--client-queued-jobs", "20000"),
    *("--queued-jobs", "20000"),
    *("--run-queue-seconds", "300"),
)
"""All load comes from one machine, and a client is an address."""


class ServerFailed(Exception):
    """It does not start, or does not stop."""


class Server:
    """A running server.

    Attributes:
        pid: of the supervisor.
        options: what it was started with, for the result.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, options: tuple[str, ...]) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.options = options
        self.connections: list[wire.Connection] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def connection(self, source: str = "127.0.0.1") -> wire.Connection:
        """Closed with the server."""
        self.connections.append(wire.Connection(self.port, source))
        return self.connections[-1]

    def parts(self) -> dict[str, list[int]]:
        """pids of supervisor, spawner, api, zygote and sandbox."""
        found: dict[str, list[int]] = {}
        for process in processes.tree(self.pid):
            found.setdefault(process.part, []).append(process.pid)
        return found

    def part(self, name: str) -> int:
        return self.parts()[name][0]

    def sandboxes(self) -> int:
        """How many live: parked, or running a job."""
        members = processes.tree(self.pid)
        zygotes = {p.pid for p in members if p.part == "zygote"}
        return sum(p.parent in zygotes for p in members)

    def pss_bytes(self) -> int:
        """Of supervisor, spawner, api and zygotes."""
        return processes.pss_bytes(p.pid for p in processes.tree(self.pid) if p.part != "sandbox")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(
    *flags: str, state: Path | None = None, parked: Path | None = None, own_bounds: bool = False
) -> Iterator[Server]:
    """A server that answers.

    Args:
        state: directory with environments.
        parked: file with a number: so many sandboxes are kept parked, whatever the demand (`pinned_pool`).
        own_bounds: leave the bounds on a client as they are.
    """
    options = (*(() if own_bounds else OPTIONS), *flags)
    if os.geteuid() != 0:
        options += ("--allow-missing", "cgroup")
    with tempfile.TemporaryDirectory(prefix="sandrun-bench-", ignore_cleanup_errors=True) as directory:
        log = Path(directory) / "log"
        port = free_port()
        program = [str(SANDRUN)] if parked is None else [str(PYTHON), str(PINNED), str(parked)]
        command = [*program, "serve", "--port", str(port), "--state-dir", str(state or directory), *options]
        with open(log, "wb") as stderr:
            process = subprocess.Popen(
                [*TOGETHER, *command], stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=machine.ENVIRONMENT
            )
        server = Server(process, port, log, options)
        try:
            _await_answer(server)
            yield server
        finally:
            _stop(server)


def _await_answer(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        if server.process.poll() is not None:
            raise ServerFailed(f"the server ended with {server.process.returncode}: {server.tail()}")
        with contextlib.suppress(OSError, wire.Failed), contextlib.closing(wire.Connection(server.port)) as connection:
            connection.json(wire.get("/health"))
            return
        if time.monotonic() > end:
            raise ServerFailed(f"no answer within {START_SECONDS:g} s: {server.tail()}")
        time.sleep(0.05)


def _stop(server: Server) -> None:
    for connection in server.connections:
        connection.close()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)  # the second one is without grace
    try:
        server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.process.kill()  # the kernel ends all below it
        server.process.wait()


@contextlib.contextmanager
def parked_file(number: int) -> Iterator[Path]:
    """For `running(parked=…)`; write another number to it at any time."""
    with tempfile.NamedTemporaryFile("w", prefix="sandrun-bench-parked-") as file:
        file.write(str(number))
        file.flush()
        yield Path(file.name)


def accepts(*flags: str) -> bool:
    """Whether `sandrun config` takes these settings."""
    command = [str(SANDRUN), "config", *flags]
    return subprocess.run(command, env=machine.ENVIRONMENT, capture_output=True, check=False).returncode == 0
