"""Fixtures and markers that all tiers share; docs/architecture.md tells what each tier is for."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests import host, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this host cannot do, saying why; carry requirement numbers into the report that scripts/check reads."""
    root, version = os.geteuid() == 0, host.cgroup_version()
    for item in items:
        for mark in item.iter_markers("requirement"):
            item.user_properties += [("requirement", str(number)) for number in mark.args]
        if item.get_closest_marker("root") and not root:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("unprivileged") and root:
            item.add_marker(pytest.mark.skip(reason="is for an ordinary user"))
        for wanted in ("v1", "v2"):
            if item.get_closest_marker(wanted) and version != wanted:
                item.add_marker(pytest.mark.skip(reason=f"needs cgroup {wanted}; this host has {version}"))
        for mark in item.iter_markers("needs"):
            if missing := [name for name in mark.args if not shutil.which(name)]:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


@pytest.fixture(scope="session")
def running_server() -> Iterator[serving.Server]:
    """One real server for the session, with its processes; a test that harms one starts its own (`start_server`)."""
    with serving.running() as server:
        yield server


@pytest.fixture(scope="session")
def server(running_server: serving.Server) -> str:
    """Base URL of the session's server."""
    return running_server.url


@pytest.fixture
def start_server() -> Iterator[Callable[..., serving.Server]]:
    """A server of the test's own: `start_server("--max-timeout", "5", env={...})`; proved gone at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(serving.running(*flags, **options))


@pytest.fixture(scope="session")
def shared_api(server: str) -> Iterator[serving.Api]:
    with httpx2.Client(base_url=server, timeout=60) as http:
        yield serving.Api(http)


@pytest.fixture
def api(shared_api: serving.Api, running_server: serving.Server) -> Iterator[serving.Api]:
    """The session's server over HTTP. After the test no process of any job may be left (requirement 34)."""
    yield shared_api
    assert running_server.process.poll() is None, f"the server died\n{running_server.tail()}"
    if not running_server.idle():
        left = [f"{p.pid} {p.title}" for p in running_server.busy()]
        raise AssertionError(f"processes of jobs were left: {left}")


@pytest.fixture
def run_job(api: serving.Api) -> Callable[..., dict[str, Any]]:
    """`run_job("print(1)", timeout=5)` is POST /run and gives the result object."""
    return api.run


@pytest.fixture
def no_new_descriptors() -> Iterator[None]:
    """The test leaves this process as many descriptors as it found."""

    def descriptors() -> set[str]:
        """Without the one that lists them, which is closed by then."""
        return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}

    before = descriptors()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    after = descriptors()
    assert len(after) <= len(before), f"descriptors left open: {sorted(after - before)}"
