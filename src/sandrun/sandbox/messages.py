"""The closed table of messages between the spawner and what is inside a sandbox: init, and the job's process before
it is the client's. Datagrams of SOCK_SEQPACKET socket pairs: a kind byte, then fixed fields or a tail of bytes.

    spawner -> init   ASSIGN END          init -> spawner   FAILED EXITED DONE
    spawner -> job    GO                  job  -> spawner   FAILED CONFINED RUNNING

A sandbox is built before it is anybody's: between CONFINED and GO it is parked. ASSIGN and GO bring a job, once.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from sandrun.errors import ProtocolError

TAIL_BYTES = 48 * 1024
"""The most a tail may have: an isolation report is about 5 KB."""

HIT_PROCESSES, HIT_STORAGE = 1, 2

CONFINED = b"c"  # job: every wall stands; the tail is the report measured inside
ASSIGN = b"a"  # spawner: descriptors wishes, outputs; `ASSIGN_COLLECT` if outputs are wanted
ASSIGN_COLLECT = b"A"
GO = b"g"  # spawner: the host sees the same; `encode_go`, and descriptors wishes, archive, stdin, stdout, stderr
RUNNING = b"x"  # job: files are unpacked, the next call is the client's; the tail is the time, `encode_time`
FAILED = b"f"  # init or job: step NUL errno NUL text
EXITED = b"e"  # init: the entrypoint is over and every process with it
DONE = b"d"  # init: outputs are collected
END = b"k"  # spawner: kill the job, then go on as after its exit

_EXITED = struct.Struct("<cBHiqqd")
_TIME = struct.Struct("<d")
_GO = struct.Struct("<cxH")


def encode_go(tasks: int) -> bytes:
    """`tasks` becomes the job's RLIMIT_NPROC."""
    return _GO.pack(GO, tasks)


def decode_go(message: bytes) -> int:
    """Raises: ProtocolError if it is none."""
    if len(message) != _GO.size or message[:1] != GO:
        raise ProtocolError(f"{message[:1]!r} of {len(message)} bytes is no GO")
    return int(_GO.unpack(message)[1])


def encode_time(seconds: float) -> bytes:
    """CLOCK_MONOTONIC where it was read: when a busy spawner hears of it is another time."""
    return _TIME.pack(seconds)


def decode_time(tail: bytes, earliest: float, latest: float) -> float:
    """What `encode_time` made, brought into the only range that it can be in."""
    told = _TIME.unpack(tail)[0] if len(tail) == _TIME.size else latest
    return told if earliest <= told <= latest else latest


class Exited(NamedTuple):
    """What calls.c sends. CPU and the peak are getrusage(2)'s, for hosts without cgroups; `status` is waitpid(2)'s.

    `ended` is the CLOCK_MONOTONIC second at which nothing of the job's was left.
    """

    hits: int
    status: int
    cpu_us: int
    memory_peak: int
    ended: float

    @classmethod
    def decode(cls, message: bytes) -> Exited:
        if len(message) != _EXITED.size:
            raise ProtocolError(f"EXITED has {len(message)} bytes, not {_EXITED.size}")
        _, hits, _, status, cpu, memory, ended = _EXITED.unpack(message)
        return cls(hits, status, cpu, memory, ended)


def failure(step: str, error: BaseException) -> bytes:
    """`step NUL errno NUL text`: how a failed step travels."""
    number = getattr(error, "errno", None) or 0
    return f"{step}\0{number}\0{type(error).__name__}: {error}".encode(errors="backslashreplace")[:4096]


def read_failure(tail: bytes) -> tuple[str, int, str]:
    """The three parts of a `failure`; whatever came is made to fit."""
    step, _, rest = tail.partition(b"\0")
    number, _, text = rest.partition(b"\0")
    return (
        step.decode(errors="replace") or "unknown",
        int(number) if number.isdigit() else 0,
        text.decode(errors="replace"),
    )
