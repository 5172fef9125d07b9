"""The closed tables of messages between api, spawner, zygote and init: one file, both ends of each.

Each message is one datagram of a SOCK_SEQPACKET socket pair: a kind byte, fixed fields, perhaps a tail of bytes.
What is not in the table, is too long, or brings another number of descriptors raises ProtocolError, and whoever
reads it gives the connection up. Nothing that a client sent is in a field; it travels in sealed memory files and
in tails that the spawner hands on unread.

    api     -> spawner  START CANCEL
    spawner -> api      FACTS UNFIT STARTED ACTIVITY ENDED
    spawner -> zygote   SPAWN                     zygote -> spawner   WARM SPAWNED REFUSED

What passes between spawner, init and job is in `sandrun.sandbox.messages`.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import zlib
from typing import Any, NamedTuple

from sandrun.errors import ProtocolError
from sandrun.sandbox.messages import TAIL_BYTES

FACTS_BYTES = 128 * 1024
UNPACKED_FACTS_BYTES = 4 << 20
MAX_DESCRIPTORS = 24


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep the bounds of messages. The kernel drops neither bytes nor descriptors."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, message: bytes, descriptors: list[int] | None = None) -> None:
    """Raises: OSError EPIPE or ECONNRESET if the other end is gone."""
    if descriptors:
        socket.send_fds(end, [message], descriptors)
    else:
        end.send(message)


def receive(end: socket.socket, most: int, descriptors: int = 0) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it, close-on-exec; b"" is end of file.

    Raises: ProtocolError if it was cut, or brought more than `descriptors` descriptors (all are closed then).
    """
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
    message, ancillary, flags, _ = end.recvmsg(most, space, socket.MSG_CMSG_CLOEXEC)
    got: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % 4])
            got.extend(numbers)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(got) > descriptors:
        close_all(got)
        raise ProtocolError(f"a message of {len(message)} bytes with {len(got)} descriptors breaks the table")
    return message, got


def close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def unpack(layout: struct.Struct, message: bytes) -> tuple[int, ...]:
    """The fixed fields of a message that has no tail. Raises: ProtocolError on another length."""
    if len(message) != layout.size:
        raise ProtocolError(f"a message of kind {message[:1]!r} has {len(message)} bytes, not {layout.size}")
    return layout.unpack(message)


# ---- api <-> spawner ---------------------------------------------------------------------------------------

START = b"S"
CANCEL = b"C"
FACTS = b"F"  # `encode_facts`
UNFIT = b"U"  # the tail is `step NUL errno NUL text`: no sandbox can be built here; the last message
STARTED = b"B"
ACTIVITY = b"A"  # a job has begun to use CPU again, or has used none for a while
ENDED = b"E"

_START = struct.Struct("<cxHHBxQQQIIxxxx")
_CANCEL = struct.Struct("<c7xQ")
_STARTED = struct.Struct("<c7xQ")
_ACTIVITY = struct.Struct("<c?6xQ")
_ENDED = struct.Struct("<cBBBiiQQqqqI")

START_BYTES = 64
FROM_SPAWNER_BYTES = FACTS_BYTES
START_DESCRIPTORS = 6
"""spec, archive, stdin (to read), stdout, stderr, outputs (to write)."""

MOST_PROCESSES = 100
LEAST_MEMORY_BYTES, MOST_MEMORY_BYTES = 64 << 20, 2048 << 20
MOST_MS = 3600 * 1000
"""The bounds of the manifest's schema, see docs/api.md."""

UNKNOWN = -1
"""A usage that this host cannot measure."""


class Start(NamedTuple):
    """Start a job. `environment` is an index into the FACTS; `tag` an opaque name of the client."""

    environment: int
    processes: int
    collect: bool
    ticket: int
    tag: int
    memory_bytes: int
    wall_ms: int
    cpu_ms: int  # 0: no limit of its own

    def encode(self) -> bytes:
        return _START.pack(
            START, self.environment, self.processes, self.collect, self.ticket, self.tag, self.memory_bytes,
            self.wall_ms, self.cpu_ms,
        )  # fmt: skip

    @classmethod
    def decode(cls, message: bytes) -> Start:
        _, environment, processes, collect, ticket, tag, memory, wall, cpu = unpack(_START, message)
        good = (
            1 <= processes <= MOST_PROCESSES
            and LEAST_MEMORY_BYTES <= memory <= MOST_MEMORY_BYTES
            and 1 <= wall <= MOST_MS
            and cpu <= MOST_MS
            and collect <= 1
        )
        if not good:  # api has checked this: one that asks for more is not ours any more
            raise ProtocolError("START has a field out of range")
        return cls(environment, processes, bool(collect), ticket, tag, memory, wall, cpu)


def encode_cancel(ticket: int) -> bytes:
    return _CANCEL.pack(CANCEL, ticket)


def decode_cancel(message: bytes) -> int:
    return unpack(_CANCEL, message)[1]


def encode_started(ticket: int) -> bytes:
    return _STARTED.pack(STARTED, ticket)


def decode_started(message: bytes) -> int:
    return unpack(_STARTED, message)[1]


def encode_activity(ticket: int, active: bool) -> bytes:
    return _ACTIVITY.pack(ACTIVITY, active, ticket)


def decode_activity(message: bytes) -> tuple[int, bool]:
    _, active, ticket = unpack(_ACTIVITY, message)
    return ticket, bool(active)


OUTCOMES = "exited signaled timeout cpu_limit memory_limit cancelled worker_lost setup_failed".split()
"""Outcomes by their number in messages; the words are `sandrun.model.Outcome`."""


class Ended(NamedTuple):
    """A job is over, its cgroup empty and gone. Times in µs; UNKNOWN where not measured.

    `host` is what the spawner itself measured (JSON), `inside` what was measured in the sandbox, handed on unread;
    for `setup_failed` it is `step NUL errno NUL text`.
    """

    ticket: int
    outcome: int
    exit_code: int  # UNKNOWN: it did not exit
    signal: int  # 0: none
    hits: int
    wall_us: int
    cpu_us: int
    memory_peak: int
    tasks_peak: int
    host: bytes
    inside: bytes

    def encode(self) -> bytes:
        head = _ENDED.pack(
            ENDED, self.outcome, self.hits, 0, self.exit_code, self.signal, self.ticket, self.wall_us, self.cpu_us,
            self.memory_peak, self.tasks_peak, len(self.host),
        )  # fmt: skip
        return head + self.host + self.inside

    @classmethod
    def decode(cls, message: bytes) -> Ended:
        if len(message) < _ENDED.size:
            raise ProtocolError("ENDED is too short")
        _, outcome, hits, _, code, signal, ticket, wall, cpu, memory, tasks, host = _ENDED.unpack_from(message)
        tail = message[_ENDED.size :]
        if outcome >= len(OUTCOMES) or host > len(tail):
            raise ProtocolError("ENDED has a field out of range")
        return cls(ticket, outcome, code, signal, hits, wall, cpu, memory, tasks, tail[:host], tail[host:])


# ---- facts: from the spawner to api, and from a zygote to the spawner ---------------------------------------


def encode_facts(kind: bytes, facts: dict[str, Any]) -> bytes:
    """`facts` as JSON, deflated: an environment may load two thousand modules, and a datagram has its bounds."""
    return kind + zlib.compress(json.dumps(facts).encode())


def decode_facts(message: bytes) -> dict[str, Any]:
    inflater = zlib.decompressobj()
    try:
        facts = json.loads(inflater.decompress(message[1:], UNPACKED_FACTS_BYTES))
    except (zlib.error, ValueError, RecursionError):
        raise ProtocolError("the facts cannot be read") from None
    if not inflater.eof or inflater.unused_data or not isinstance(facts, dict):
        raise ProtocolError("the facts are no JSON object, too long, or cut")
    return facts


# ---- spawner <-> zygote ------------------------------------------------------------------------------------

SPAWN = b"s"
WARM = b"w"  # `encode_facts`
SPAWNED = b"p"
REFUSED = b"r"

_SPAWN = struct.Struct("<cBBBIIIQ")
HAS_STORAGE, HAS_CGROUP = 1, 2


class Spawn(NamedTuple):
    """Build a sandbox. Ids are those of the zygote's user namespace; equal ones mean a single uid for all.

    Descriptors: control, gate, tmpfs?, v2 cgroup?, v1 `tasks` files. The zygote's end is linux/calls.c, `serve`.
    """

    flags: int
    entries: int  # v1 `tasks` descriptors at the end
    slot: int
    init_id: int
    job_id: int
    storage_bytes: int

    def encode(self) -> bytes:
        return _SPAWN.pack(SPAWN, self.flags, self.entries, 0, self.slot, self.init_id, self.job_id, self.storage_bytes)


_SLOT = struct.Struct("<cxxxI")


def decode_spawned(message: bytes) -> int:
    """The slot. One descriptor goes along: the pidfd of the sandbox's init."""
    return unpack(_SLOT, message)[1]


def encode_refused(slot: int, error: bytes) -> bytes:
    """`error` is `step NUL errno NUL text`, as `failure` makes it."""
    return _SLOT.pack(REFUSED, slot) + error[:TAIL_BYTES]


def decode_refused(message: bytes) -> tuple[int, bytes]:
    if len(message) < _SLOT.size:
        raise ProtocolError("REFUSED is too short")
    return _SLOT.unpack_from(message)[1], message[_SLOT.size :]
