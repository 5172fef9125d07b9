"""Every probe runs in each kind of job; a batch of probes is one job, made once a session."""

from __future__ import annotations

import pytest

from tests.escape.probing import KINDS, PYTHONS, Inside, Kind
from tests.serving import Api


@pytest.fixture(scope="session")
def insides(shared_api: Api) -> dict[str, Inside]:
    return {kind.name: Inside(kind, shared_api) for kind in KINDS}


@pytest.fixture(params=PYTHONS, ids=lambda kind: kind.name)
def inside(request: pytest.FixtureRequest, insides: dict[str, Inside], api: Api) -> Inside:
    """A job that runs Python programs: in place, by exec, below a shell. After each test no process of it is left."""
    kind: Kind = request.param
    return insides[kind.name]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def inside_any(request: pytest.FixtureRequest, insides: dict[str, Inside], api: Api) -> Inside:
    """The same and machine code: for probes that are system calls."""
    kind: Kind = request.param
    return insides[kind.name]
