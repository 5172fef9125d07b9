"""The unprivileged end of the spawner's socket: whatever comes over it, and when nothing comes any more."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandrun.errors import Overloaded, ProtocolError, SetupError
from sandrun.jobs.memfile import sealed
from sandrun.model import Limits, Outcome
from sandrun.spawner import protocol
from sandrun.spawner.client import Order, Sandbox, SpawnerClient

pytestmark = [pytest.mark.requirement(34), pytest.mark.usefixtures("no_new_descriptors")]

FACTS: dict[str, Any] = {
    "interpreters": {"python3": {"available": True}},
    "environments": {"": {"available": True}},
    "isolation": {},
    "cores": 1,
    "ram_bytes": 1 << 30,
}


@pytest.fixture
async def ends() -> AsyncIterator[tuple[SpawnerClient, socket.socket]]:
    ours, theirs = protocol.pair()
    client = SpawnerClient(ours)
    protocol.send(theirs, protocol.encode_facts(protocol.FACTS, FACTS))
    await asyncio.wait_for(client.ready(), 2)
    yield client, theirs
    client.close()
    theirs.close()


BAD_REPORTS = {
    "report cut short": (b"{}", b'{"uid":['),
    "report that goes on": (b"{}", b'{}},"host":{"waived":[]'),
    "host's that goes on": (b'{}},"inside":{', b"{}"),
    "report that is no object": (b"{}", b"1"),
    "report that is no ASCII": (b"{}", b'{"uid":"\xff"}'),
}
"""Host's and inside, of a job that has the ticket 1."""


def start(client: SpawnerClient) -> Sandbox:
    archive = sealed("archive", b"")
    try:
        sandbox = client.start(
            Order(
                spec=b"{}",
                archive_fd=archive,
                stdin_fd=None,
                limits=Limits(wall_seconds=1, memory_bytes=64 << 20, processes=1),
                environment=None,
                tag=1,
                collect=False,
            )
        )
    finally:
        os.close(archive)
    protocol.close_all([sandbox.stdout, sandbox.stderr, sandbox.outputs])
    return sandbox


def refuse_more(client: SpawnerClient) -> None:
    with pytest.raises(Overloaded, match="restarted"):
        start(client)


async def test_jobs_of_a_spawner_that_dies_are_lost(ends: tuple[SpawnerClient, socket.socket]) -> None:
    client, theirs = ends
    running = [start(client), start(client)]
    theirs.close()
    for sandbox in running:
        assert (await asyncio.wait_for(sandbox.ended, 2)).outcome is Outcome.WORKER_LOST
        assert sandbox.started.cancelled()
    assert client.lost
    refuse_more(client)


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        (b"?", 0),
        (protocol.encode_started(1), 1),
        (protocol.encode_started(1) + b"x", 0),
        (protocol.ENDED, 0),
        (protocol.encode_cancel(1), 0),
        *((protocol.Ended(1, 0, 0, 0, 0, 1, 1, 1, 1, *reports).encode(), 0) for reports in BAD_REPORTS.values()),
    ],
    ids=["unknown", "stray descriptor", "long", "short", "api's own", *BAD_REPORTS],
)
async def test_spawner_that_breaks_the_table_is_lost(
    message: bytes, descriptors: int, ends: tuple[SpawnerClient, socket.socket]
) -> None:
    client, theirs = ends
    running = start(client)
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        protocol.send(theirs, message, [null] * descriptors)
    finally:
        os.close(null)
    assert (await asyncio.wait_for(running.ended, 2)).outcome is Outcome.WORKER_LOST
    refuse_more(client)


async def test_news_of_jobs_that_nobody_knows_is_no_news(ends: tuple[SpawnerClient, socket.socket]) -> None:
    """A job may end while its erasure is on the way."""
    client, theirs = ends
    protocol.send(theirs, protocol.encode_started(77))
    protocol.send(theirs, protocol.encode_activity(77, True))
    ended = protocol.Ended(77, 0, 0, 0, 0, 1, 1, 1, 1, b"", b"")
    protocol.send(theirs, ended.encode())
    running = start(client)
    protocol.send(theirs, protocol.encode_started(running.ticket))
    await asyncio.wait_for(running.started, 2)
    assert not client.lost


async def test_unfit_host_is_told_with_its_step() -> None:
    ours, theirs = protocol.pair()
    client = SpawnerClient(ours)
    protocol.send(theirs, protocol.UNFIT + b"pivot_root\00022\000Invalid argument")
    with pytest.raises(SetupError, match="pivot_root"):
        await asyncio.wait_for(client.ready(), 2)
    client.close()
    theirs.close()


async def test_spawner_that_dies_before_it_is_ready_is_told() -> None:
    ours, theirs = protocol.pair()
    client = SpawnerClient(ours)
    theirs.close()
    with pytest.raises(ProtocolError, match="ended before"):
        await asyncio.wait_for(client.ready(), 2)
    client.close()
