"""Bounds of the job service are checked when they are set, not when they hurt."""

from __future__ import annotations

from typing import Any

import pytest

from sandrun.errors import ConfigError
from sandrun.jobs.config import JobsConfig, default_store_bytes
from sandrun.model import MIB


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("queued_jobs", 0),
        ("store_bytes", 5),
        ("memory_share", 16.1),
        ("ttl_seconds", 0),
        ("active_per_core", float("nan")),
    ],
)
def test_bound_out_of_range_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ConfigError, match=rf"{key}: .* is out of range; accepted: "):
        JobsConfig(**{key: value})


@pytest.mark.parametrize(("ram", "store"), [(128 * MIB, 64 * MIB), (8192 * MIB, 2048 * MIB), (1 << 40, 4096 * MIB)])
def test_store_is_a_quarter_of_the_ram_within_bounds(ram: int, store: int):
    assert default_store_bytes(ram) == store
