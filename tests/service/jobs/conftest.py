"""A job service for each test, proved empty at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.service.job_world import World


@pytest.fixture(autouse=True)
def _closes_what_it_opened(no_new_descriptors: None) -> None:
    pass


@pytest.fixture
async def new_world() -> AsyncIterator[Callable[..., World]]:
    made: list[World] = []

    def make(**config: Any) -> World:
        made.append(World(**config))
        return made[-1]

    yield make
    for world in made:
        world.service.close()
        world.spawner.close()
        for sandbox in world.spawner.sandboxes:
            if not sandbox.ended.done():
                sandbox.end()
        await asyncio.sleep(0.01)
        world.assert_empty()


@pytest.fixture
async def world(new_world: Callable[..., World]) -> World:
    return new_world()
