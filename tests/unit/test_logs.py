"""A stream is kept up to its bound, counted beyond it, and readers find their own way through it."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from sandrun.jobs.logs import LogBuffer
from sandrun.jobs.wakeup import Wakeup
from sandrun.model import LOG_BYTES, MIB


def buffer(*, room: int = 1 << 40) -> LogBuffer:
    left = room

    def grant(size: int) -> bool:
        nonlocal left
        if size > left:
            return False
        left -= size
        return True

    return LogBuffer(Wakeup(), grant)


def test_what_was_written_is_read_at_any_offset():
    log = buffer()
    log.append(b"hello ")
    log.append(b"world")
    assert log.read() == b"hello world"
    assert log.read(6, 3) == b"wor"
    assert log.read(11) == log.read(99) == b""
    assert (log.total, log.kept, log.truncated) == (11, 11, 0)


@pytest.mark.requirement(33)
def test_beyond_the_bound_is_counted_not_kept():
    log = buffer()
    for _ in range(11):
        log.append(b"x" * MIB)
    assert (log.total, log.kept, log.truncated) == (11 * MIB, LOG_BYTES, 11 * MIB - LOG_BYTES)


@pytest.mark.requirement(33)
def test_a_line_of_8_mib_survives():
    log = buffer()
    line = b"y" * (8 * MIB) + b"\n"
    for start in range(0, len(line), 65536):
        log.append(line[start : start + 65536])
    assert log.read() == line


def test_piece_that_crosses_the_bound_is_kept_up_to_it():
    log = buffer()
    log.append(b"a" * (LOG_BYTES - 3))
    log.append(b"bcdef")
    assert log.read(LOG_BYTES - 3) == b"bcd"
    assert log.truncated == 2


def test_what_is_kept_has_no_hole():
    log = buffer(room=10)
    log.append(b"12345678")
    log.append(b"too long")  # the store is full
    log.append(b"9")  # would fit, but something before it is missing
    assert log.read() == b"12345678"
    assert log.truncated == 9


def test_digest_is_that_of_the_bytes_which_can_be_read():
    log = buffer(room=4)
    log.append(b"kept")
    log.append(b"dropped")
    assert log.sha256 == hashlib.sha256(b"kept").hexdigest()


@pytest.mark.requirement(33)
def test_invalid_utf8_is_replaced_in_text_and_exact_in_bytes():
    log = buffer()
    log.append(b"a\xff\xe2\x82")
    assert log.text() == "a\ufffd\ufffd"
    assert log.read() == b"a\xff\xe2\x82"


async def test_reader_is_woken_by_more_and_by_the_end():
    log = buffer()
    waiting = asyncio.create_task(log.wait_for_more(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    log.append(b"x")
    assert await asyncio.wait_for(waiting, 1)
    waiting = asyncio.create_task(log.wait_for_more(1))
    await asyncio.sleep(0)
    log.end()
    assert await asyncio.wait_for(waiting, 1)
    assert await log.wait_for_more(1)  # at once, for ever


async def test_reader_of_a_silent_job_gives_up_when_its_time_is_over():
    assert not await buffer().wait_for_more(0, 0.01)


async def test_erasing_forgets_the_content_and_wakes_readers():
    log = buffer()
    log.append(b"secret")
    waiting = asyncio.create_task(log.wait_for_more(6))
    await asyncio.sleep(0)
    log.erase()
    assert await asyncio.wait_for(waiting, 1)
    assert log.read() == b""
    assert log.ended


async def test_cancelled_waiter_is_forgotten():
    changed = Wakeup()
    waiting = asyncio.create_task(changed.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    changed.wake()
    assert not await changed.wait(0.001)
