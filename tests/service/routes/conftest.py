"""All routes of one API on a real socket; the test plays the spawner."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.service.api_world import World, world


@pytest.fixture(autouse=True)
def _closes_what_it_opened(no_new_descriptors: None) -> None:
    pass


@pytest.fixture
async def api() -> AsyncIterator[World]:
    async with world() as made:
        yield made
