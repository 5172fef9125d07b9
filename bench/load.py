"""Many clients at once, in processes of their own: closed loops, in which each sends its next request when it has its
answer. On a machine with two cores they take CPU time that the server could use; every result tells how much."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import wire

CLIENTS_OF_ONE_ADDRESS = 32
"""The server takes 64 connections from one. 127.0.0.1, 127.0.0.2, … are clients of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a closed loop came to in its window.

    Attributes:
        latencies: seconds.
        rate: answers a second.
        generator_seconds: CPU time of the clients themselves, warm-up included.
    """

    latencies: list[float]
    rate: float
    errors: int
    first_error: str
    generator_seconds: float
    seconds: float


def address(number: int) -> str:
    """Source address of client `number`."""
    return f"127.0.{number // CLIENTS_OF_ONE_ADDRESS // 250}.{number // CLIENTS_OF_ONE_ADDRESS % 250 + 1}"


class Child:
    """A function in a forked process, and what it returned."""

    def __init__(self, main: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(reader)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                result = (True, main(), _own_seconds())
            except BaseException as error:
                result = (False, f"{type(error).__name__}: {error}", 0.0)
            try:
                with open(writer, "wb") as pipe:
                    pipe.write(pickle.dumps(result))
            finally:
                os._exit(0)
        os.close(writer)
        self._reader = reader

    def result(self) -> tuple[Any, float]:
        """What it returned, and the CPU seconds that it took with its children. Raises: RuntimeError with its error."""
        with open(self._reader, "rb") as pipe:
            data = pipe.read()
        os.waitpid(self._pid, 0)
        if not data:
            raise RuntimeError("a load generator died")
        good, value, seconds = pickle.loads(data)
        if not good:
            raise RuntimeError(value)
        return value, seconds

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._reader)
        os.waitpid(self._pid, 0)


def _own_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def closed_loop(
    port: int, request: bytes, wanted: bytes, *, clients: int, seconds: float, warm_up: float, processes: int = 2
) -> Load:
    """`clients` kept-alive connections in `processes` processes. What ends in the window after the warm-up counts."""
    processes = min(processes, clients)
    begin = time.monotonic() + 0.05 + clients / 2000  # all connect before the first asks
    window = (begin + warm_up, begin + warm_up + seconds)
    children = []
    for number in range(processes):
        mine = [address(client) for client in range(number, clients, processes)]
        children.append(Child(lambda mine=mine: _loop(port, mine, request, wanted, begin, window)))  # type: ignore[misc]
    latencies: list[float] = []
    errors, first, used = 0, "", 0.0
    for child in children:
        (mine_taken, mine_errors, mine_first), cpu = child.result()
        latencies += mine_taken
        errors += mine_errors
        first = first or mine_first
        used += cpu
    return Load(
        latencies=latencies,
        rate=len(latencies) / seconds,
        errors=errors,
        first_error=first,
        generator_seconds=used,
        seconds=seconds,
    )


def _loop(
    port: int, sources: list[str], request: bytes, wanted: bytes, begin: float, window: tuple[float, float]
) -> tuple[list[float], int, str]:
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    answers: dict[int, wire.Answer] = {}
    asked: dict[int, float] = {}
    for source in sources:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.bind((source, 0))
        connection.connect(("127.0.0.1", port))
        sockets[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)
    time.sleep(max(0.0, begin - time.monotonic()))
    taken: list[float] = []
    errors, first = 0, ""
    now = time.monotonic()
    for number, connection in sockets.items():
        answers[number], asked[number] = wire.Answer(), now
        connection.sendall(request)
    while sockets and now < window[1] + 60:
        for number, _ in poll.poll(1.0):
            connection = sockets[number]
            piece = connection.recv(1 << 16)
            whole = answers[number].feed(piece) if piece else True
            if not whole:
                continue
            now = time.monotonic()
            answer = answers[number]
            if not piece or answer.status != 200 or wanted not in answer.body:
                errors += 1
                first = first or (f"{answer.status} {answer.body[:200]!r}" if piece else "connection closed")
            elif window[0] <= now < window[1]:
                taken.append(now - asked[number])
            if not piece or now >= window[1]:
                poll.unregister(number)
                sockets.pop(number).close()
                continue
            answers[number], asked[number] = wire.Answer(), now
            connection.sendall(request)
        now = time.monotonic()
    return taken, errors + len(sockets), first or ("no answer" if sockets else "")


def bulk(port: int, request: bytes, wanted: bytes, total: int, *, clients: int = 4) -> int:
    """`total` jobs, as fast as so many clients get their answers. Returns how many failed."""

    def loop(source: str, share: int) -> int:
        connection = wire.Connection(port, source)
        failed = 0
        for _ in range(share):
            try:
                connection.timed(request, wanted)
            except (wire.Failed, OSError):
                failed += 1
        return failed

    children = []
    for number in range(clients):
        share = total // clients + (number < total % clients)
        children.append(Child(lambda number=number, share=share: loop(address(number), share)))  # type: ignore[misc]
    return sum(child.result()[0] for child in children)


def submit_all(port: int, request: bytes, total: int, *, addresses: int = 2) -> list[str]:
    """Submit so many jobs, from so many addresses in turn. Returns: ids. Raises: RuntimeError if one is refused."""

    def submit(first: int, step: int) -> list[str]:
        sources = [f"127.0.0.{number + 1}" for number in range(first, addresses, step)]
        connections = [wire.Connection(port, source) for source in sources]
        share = range(first, total, step)
        return [
            str(connections[number % len(connections)].json(request, 202)["job_id"]) for number in range(len(share))
        ]

    children = [Child(lambda first=first: submit(first, 2)) for first in range(2)]  # type: ignore[misc]
    return [job for child in children for job in child.result()[0]]


def repeated(run: Callable[[int], Any], *, workers: int, seconds: float, warm_up: float) -> Load:
    """`run(worker)` again and again in `workers` processes: the same closed loop for what is not a server."""
    begin = time.monotonic() + 0.05
    window = (begin + warm_up, begin + warm_up + seconds)

    def loop(worker: int) -> list[float]:
        time.sleep(max(0.0, begin - time.monotonic()))
        taken = []
        now = time.monotonic()
        while now < window[1]:
            run(worker)
            before, now = now, time.monotonic()
            if window[0] <= now < window[1]:
                taken.append(now - before)
        return taken

    children = [Child(lambda worker=worker: loop(worker)) for worker in range(workers)]  # type: ignore[misc]
    latencies: list[float] = []
    used = 0.0
    for child in children:
        taken, cpu = child.result()
        latencies += taken
        used += cpu
    return Load(
        latencies=latencies,
        rate=len(latencies) / seconds,
        errors=0,
        first_error="",
        generator_seconds=used,
        seconds=seconds,
    )
