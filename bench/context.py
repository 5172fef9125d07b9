"""What the groups share: how often to measure, whom, and how to tell what goes on."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import Peer

GAP_SECONDS = 0.010
"""Between two measurements, and up to as much again by chance: what the last contender left to do shall be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How often, how many, how long. Seconds where the name says so."""

    hello: int
    numpy: int
    cold: int
    submit: int
    executed: int
    inside: int
    cost_rounds: int
    cost_jobs: int
    parked: int
    parked_rounds: int
    uploads: int
    upload_bytes: int
    load_rounds: int
    load_seconds: float
    clients: tuple[int, ...]
    sleepers: int
    sleep_seconds: int
    queued: int
    leaks: tuple[int, int, int, int]
    """Jobs after which it is looked: in the issues 500, 1,000, 5,000 and 50,000."""
    settle_seconds: float
    spam_rounds: int
    spam_hellos: int
    subscribers: int
    lines: int
    stalled_bytes: int


FULL = Counts(
    hello=1200, numpy=150, cold=200, submit=250, executed=120, inside=15,
    cost_rounds=5, cost_jobs=400, parked=100, parked_rounds=5, uploads=7, upload_bytes=90_000_000,
    load_rounds=4, load_seconds=3.0, clients=(2, 4, 8, 16, 32, 64, 128, 256),
    sleepers=1000, sleep_seconds=60, queued=10_000, leaks=(500, 1000, 5000, 50_000), settle_seconds=10.0,
    spam_rounds=3, spam_hellos=60, subscribers=100, lines=300, stalled_bytes=40_000_000,
)  # fmt: skip
QUICK = Counts(
    hello=80, numpy=12, cold=25, submit=25, executed=12, inside=3,
    cost_rounds=1, cost_jobs=100, parked=40, parked_rounds=1, uploads=1, upload_bytes=30_000_000,
    load_rounds=1, load_seconds=1.0, clients=(2, 16, 256),
    sleepers=60, sleep_seconds=4, queued=300, leaks=(100, 200, 300, 400), settle_seconds=1.0,
    spam_rounds=1, spam_hellos=15, subscribers=100, lines=80, stalled_bytes=30_000_000,
)  # fmt: skip
TINY = Counts(
    hello=4, numpy=2, cold=2, submit=2, executed=2, inside=1,
    cost_rounds=1, cost_jobs=5, parked=3, parked_rounds=1, uploads=1, upload_bytes=200_000,
    load_rounds=1, load_seconds=0.3, clients=(2, 8),
    sleepers=3, sleep_seconds=2, queued=5, leaks=(4, 8, 12, 16), settle_seconds=0.3,
    spam_rounds=1, spam_hellos=2, subscribers=3, lines=5, stalled_bytes=12_000_000,
)  # fmt: skip
"""For the test of the benchmark itself: its figures mean nothing."""


@dataclass(slots=True, kw_only=True)
class Context:
    """Attributes:
    peers: those that run here, bare first; `absent` tells why the others don't.
    environments: state directory with the environment `data`, None where it cannot be built.
    """

    counts: Counts
    peers: list[Peer]
    absent: dict[str, str] = field(default_factory=dict)
    environments: Path | None = None
    environments_reason: str = ""
    quiet: bool = False

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"bench: {text}", file=sys.stderr, flush=True)

    def peer(self, name: str) -> Peer | None:
        return next((peer for peer in self.peers if peer.name == name), None)


Contender = Callable[[], float]


def interleave(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    weights: Mapping[str, int] | None = None,
    gap: float = GAP_SECONDS,
) -> dict[str, list[float]]:
    """Run all, round after round, each round in another order; `weights` lets slow ones sit out all but one in so many.

    Each is run twice beforehand: caches are warm for everybody.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for number in range(rounds):
        order = [name for name in contenders if number % (weights or {}).get(name, 1) == 0]
        random.shuffle(order)
        for name in order:
            time.sleep(gap * (1 + random.random()))
            samples[name].append(contenders[name]())
    return samples
