"""The HTTP process gives the memory of erased jobs back, in bulk and not after each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sandrun.api import main
from sandrun.linux import memory


@pytest.mark.parametrize(
    ("erased_by_the_second", "trims"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([1, 1, 1], [0, 0, 0]),
        ([400, 600, 900, 1100], [0, 1, 1, 2]),
        ([600, 800, 800, 800], [1, 1, 2, 2]),
        ([40, 80, 80, 80], [0, 0, 1, 1]),
    ],
)
def test_memory_is_given_back_once_for_many_jobs(
    erased_by_the_second: list[int], trims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(memory, "trim", lambda: calls.append(None))
    service: Any = SimpleNamespace(erased=0)
    trimming = main.Trimming(service)
    seen = []
    for erased in erased_by_the_second:
        service.erased = erased
        trimming()
        seen.append(len(calls))
    assert seen == trims
