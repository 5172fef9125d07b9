"""Untrusted bytes are looked at in threads, one at a time a client, and never longer than their descriptor lives."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from sandrun.jobs.checks import Checks
from sandrun.jobs.clients import Client

ALICE, BOB = Client("192.0.2.1", 1), Client("192.0.2.2", 2)


@pytest.fixture
async def checks() -> AsyncIterator[Checks]:
    made = Checks(4)
    yield made
    made.close()


class Gate:
    """Work that lasts until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go, self.over = threading.Event(), threading.Event(), False

    def __call__(self) -> str:
        self.begun.set()
        assert self.go.wait(10)
        time.sleep(0.01)
        self.over = True
        return "done"

    async def until_begun(self) -> None:
        while not self.begun.is_set():
            await asyncio.sleep(0.001)


async def test_one_client_has_one_thread_and_others_do_not_wait_for_it(checks: Checks):
    first, second, other = Gate(), Gate(), Gate()
    tasks = [asyncio.create_task(checks.run(c, w)) for c, w in ((ALICE, first), (ALICE, second), (BOB, other))]
    await first.until_begun()
    await other.until_begun()
    assert not second.begun.is_set()
    other.go.set()
    assert await tasks[2] == "done"
    first.go.set()
    await second.until_begun()
    second.go.set()
    assert await asyncio.gather(*tasks[:2]) == ["done", "done"]
    assert not checks._locks


async def test_what_the_work_raises_is_raised_and_the_next_one_runs(checks: Checks):
    def fails() -> None:
        raise ValueError("bad archive")

    for _ in range(2):
        with pytest.raises(ValueError, match="bad archive"):
            await checks.run(ALICE, fails)
    assert await checks.run(ALICE, lambda: 5) == 5


async def test_cancelled_caller_is_held_until_the_thread_no_longer_reads_its_descriptor(checks: Checks):
    gate = Gate()
    task = asyncio.create_task(checks.run(ALICE, gate))
    await gate.until_begun()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.005)
    assert not task.done()
    gate.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.over


async def test_cancelled_waiter_leaves_the_lock_to_others(checks: Checks):
    gate = Gate()
    first = asyncio.create_task(checks.run(ALICE, gate))
    await gate.until_begun()
    second = asyncio.create_task(checks.run(ALICE, lambda: 2))
    third = asyncio.create_task(checks.run(ALICE, lambda: 3))
    await asyncio.sleep(0)
    second.cancel()
    gate.go.set()
    assert await first == "done"
    assert await third == 3
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not checks._locks
