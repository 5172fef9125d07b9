"""The tables of messages between our processes: what is not in them is refused, and brings no descriptor in."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandrun.errors import ProtocolError
from sandrun.sandbox import messages
from sandrun.spawner import protocol

START = protocol.Start(
    environment=1, processes=100, collect=True, ticket=7, tag=2**64 - 1, memory_bytes=512 << 20, wall_ms=1000, cpu_ms=0
)
ENDED = protocol.Ended(
    ticket=7, outcome=0, exit_code=0, signal=0, hits=3, wall_us=1, cpu_us=protocol.UNKNOWN, memory_peak=4096,
    tasks_peak=2, host=b"{}", inside=b"whatever came",
)  # fmt: skip
DECODERS: dict[str, Callable[[bytes], object]] = {
    "START": protocol.Start.decode,
    "CANCEL": protocol.decode_cancel,
    "STARTED": protocol.decode_started,
    "ACTIVITY": protocol.decode_activity,
    "ENDED": protocol.Ended.decode,
    "SPAWNED": protocol.decode_spawned,
    "REFUSED": protocol.decode_refused,
    "EXITED": messages.Exited.decode,
}


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = protocol.pair()
    with one, other:
        yield one, other


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_what_is_sent_is_what_is_read() -> None:
    assert protocol.Start.decode(START.encode()) == START
    assert protocol.Ended.decode(ENDED.encode()) == ENDED
    assert protocol.decode_cancel(protocol.encode_cancel(9)) == 9
    assert protocol.decode_started(protocol.encode_started(9)) == 9
    assert protocol.decode_activity(protocol.encode_activity(9, True)) == (9, True)
    assert protocol.decode_spawned(struct.pack("<cxxxI", protocol.SPAWNED, 5)) == 5  # as calls.c does
    assert protocol.decode_refused(protocol.encode_refused(5, b"step\0001\0text")) == (5, b"step\0001\0text")
    exited = messages.Exited(messages.HIT_STORAGE, 256, 10, 4096, 1.5)
    sent = struct.pack("<cBHiqqd", messages.EXITED, messages.HIT_STORAGE, 0, 256, 10, 4096, 1.5)  # as calls.c does
    assert messages.Exited.decode(sent) == exited


@pytest.mark.parametrize(
    "changed",
    [
        {"processes": 0},
        {"processes": protocol.MOST_PROCESSES + 1},
        {"memory_bytes": protocol.LEAST_MEMORY_BYTES - 1},
        {"memory_bytes": protocol.MOST_MEMORY_BYTES + 1},
        {"wall_ms": 0},
        {"wall_ms": protocol.MOST_MS + 1},
        {"cpu_ms": protocol.MOST_MS + 1},
    ],
    ids=str,
)
def test_api_cannot_ask_for_more_than_any_manifest_may(changed: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="out of range"):
        protocol.Start.decode(START._replace(**changed).encode())


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS.keys())
@given(message=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(decode: Callable[[bytes], object], message: bytes) -> None:
    try:
        decode(message)
    except ProtocolError:
        pass


@given(tail=st.binary(max_size=300))
def test_any_failure_can_be_read(tail: bytes) -> None:
    step, number, text = messages.read_failure(tail)
    assert step
    assert number >= 0
    assert isinstance(text, str)


def test_message_that_is_too_long_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    one.send(bytes(65))
    with pytest.raises(ProtocolError, match="breaks the table"):
        protocol.receive(other, 64)


@pytest.mark.parametrize("count", [1, 3, protocol.MAX_DESCRIPTORS + 5])
def test_stray_descriptors_are_refused_and_closed(ends: tuple[socket.socket, socket.socket], count: int) -> None:
    one, other = ends
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        before = open_descriptors()
        protocol.send(one, b"message", [null] * count)
        with pytest.raises(ProtocolError, match="descriptors"):
            protocol.receive(other, 64, count - 1)
        assert open_descriptors() == before
    finally:
        os.close(null)


def test_descriptors_arrive_close_on_exec(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        protocol.send(one, b"message", [null, null])
    finally:
        os.close(null)
    message, received = protocol.receive(other, 64, 2)
    try:
        assert message == b"message"
        assert [os.get_inheritable(descriptor) for descriptor in received] == [False, False]
    finally:
        protocol.close_all(received)


def test_end_of_the_other_side_is_an_empty_message(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    one.close()
    assert protocol.receive(other, 64) == (b"", [])


@given(told=st.binary(max_size=12))
def test_time_that_a_sandbox_tells_is_within_what_can_be(told: bytes) -> None:
    assert 5.0 <= messages.decode_time(told, 5.0, 9.0) <= 9.0
