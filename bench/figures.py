"""What a run comes to: distributions of samples, rows with their figures, series for the charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

AT_MOST, AT_LEAST = "at most", "at least"


def percentile(samples: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks. `samples` need not be sorted, and are not empty."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below, above = math.floor(place), math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How samples lie."""

    count: int
    p10: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        kept = list(samples)
        p10, p50, p90, p99 = (percentile(kept, percent) for percent in (10, 50, 90, 99))
        return cls(count=len(kept), p10=p10, p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True)
class Row:
    """What is measured, and what it must reach.

    Attributes:
        name: what `--only` takes.
        unit: "× bare", "MiB".
        target: in `unit`; None for what is only told. `goal` would be better still.
        bound: AT_MOST or AT_LEAST.
    """

    name: str
    group: str
    about: str
    unit: str
    target: float | None = None
    bound: str = AT_MOST
    goal: float | None = None

    def reached(self, value: float | None) -> bool | None:
        """None where there is no target. What could not be measured is not reached."""
        if self.target is None:
            return None
        if value is None:
            return False
        return value <= self.target if self.bound == AT_MOST else value >= self.target


@dataclass(frozen=True, slots=True)
class Figure:
    """A row with its value.

    Attributes:
        value: None if it could not be measured; `note` says why.
        details: what the value was made from.
    """

    row: Row
    value: float | None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        return self.row.reached(self.value)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.row),
            "value": self.value,
            "reached": self.reached,
            "note": self.note,
            "details": self.details,
        }


@dataclass(slots=True, kw_only=True)
class Chart:
    """What a chart shows: `bars`, or else `lines`.

    Attributes:
        name: its file is `<name>.svg`.
        bars: label, middle, low, high; the first is ours. `legend` tells what these are.
        lines: label -> points (x, y); the x axis is logarithmic.
    """

    name: str
    title: str
    unit: str
    x_title: str = ""
    legend: str = "bar: p50; line: p10 to p90"
    bars: list[tuple[str, float, float, float]] = field(default_factory=list)
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What a group came to.

    Attributes:
        values: row name -> value, note, details.
        spreads: what was measured -> contender -> how its samples lie.
    """

    values: dict[str, tuple[float | None, str, dict[str, Any]]] = field(default_factory=dict)
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)

    def put(
        self, name: str, value: float | None, note: str = "", details: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """`details` and `more` are what the value was made from."""
        self.values[name] = (value, note, {**(details or {}), **more})

    def put_spreads(self, what: str, samples: dict[str, list[float]], scale: float = 1.0) -> dict[str, Spread]:
        found = {name: Spread.of(sample * scale for sample in taken) for name, taken in samples.items() if taken}
        self.spreads[what] = found
        return found


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
