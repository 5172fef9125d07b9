"""The bounds of the job service, each with its unit, default and range."""

from __future__ import annotations

from dataclasses import dataclass, field

from sandrun.errors import ConfigError
from sandrun.model import MIB, Ceilings

STORE_LEAST_BYTES = 64 * MIB
STORE_MOST_BYTES = 4096 * MIB


def default_store_bytes(ram_bytes: int) -> int:
    """A quarter of the RAM, from 64 MiB to 4 GiB."""
    return min(max(ram_bytes // 4, STORE_LEAST_BYTES), STORE_MOST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsConfig:
    """What the job service takes on at once.

    Attributes:
        ceilings: the most that one job may ask for.
        store_bytes: RAM for uploads, logs and outputs together; None is `default_store_bytes`.
        client_store_share: the part of `store_bytes` that one client may hold, 0.01–1.
        queued_jobs: jobs that wait, all clients together, 1–100000; each holds up to two descriptors.
        client_queued_jobs: jobs of one client that wait, those being admitted included, 1–100000.
        run_queue_seconds: how long `/run` waits in the queue before it is told to come back, 0.1–3600.
        active_per_core: sandboxes that run at once, for each core, 0.1–100.
        memory_share: the part of RAM that the limits of the running jobs may promise together, 0.05–16.
        client_running_share: the part of the running places that one client may hold (but always one), 0.01–1.
        failed_ttl_seconds: how long a failed job is kept after it was last looked at, 1–86400.
        ttl_seconds: the same for a completed one, 1–604800.

    Raises: ConfigError naming the key, the value and the accepted range.
    """

    ceilings: Ceilings = field(default_factory=Ceilings)
    store_bytes: int | None = None
    client_store_share: float = 0.5
    queued_jobs: int = 1000
    client_queued_jobs: int = 100
    run_queue_seconds: float = 30.0
    active_per_core: float = 2.0
    memory_share: float = 0.6
    client_running_share: float = 0.25
    failed_ttl_seconds: float = 300.0
    ttl_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: {value} is out of range; accepted: {low} to {high}")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("store_bytes", MIB, 1 << 44),
    ("client_store_share", 0.01, 1.0),
    ("queued_jobs", 1, 100_000),
    ("client_queued_jobs", 1, 100_000),
    ("run_queue_seconds", 0.1, 3600.0),
    ("active_per_core", 0.1, 100.0),
    ("memory_share", 0.05, 16.0),
    ("client_running_share", 0.01, 1.0),
    ("failed_ttl_seconds", 1.0, 86_400.0),
    ("ttl_seconds", 1.0, 604_800.0),
)
