"""Fixtures of the tests on cgroups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sandrun.linux.cgroup import Cgroup, Cgroups
from tests.kernel.cgroups import directories, hierarchy, host_modes


@pytest.fixture(params=host_modes())
def cgroups(request: pytest.FixtureRequest, no_new_descriptors: None) -> Iterator[Cgroups]:
    made = Cgroups._create(hierarchy(request.param), frozenset())
    assert made.mode == request.param
    places = directories(made)
    assert all(place.is_dir() for place in places)
    try:
        yield made
    finally:
        made.close()
    assert [place for place in places if place.exists()] == []


@pytest.fixture
def box(cgroups: Cgroups) -> Cgroup:
    return cgroups.group("z0").create("j1")
