"""Environments for tests, built by the tests themselves and kept in .venv, which git ignores and set-up renews."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandrun import environments
from sandrun.ready import DEFINITIONS
from tests import serving

PACKAGES = {"data": ("numpy", "pandas", "matplotlib"), "web": ("requests",)}
CACHE = Path(__file__).resolve().parents[1] / ".venv" / "test-state"
WHEELS = Path("/wheels")
"""Where a machine without an index (tests/vm) has its packages."""


@contextlib.contextmanager
def state_directory(*names: str) -> Iterator[str]:
    """A state directory with these environments of `PACKAGES`."""
    if all(name in built(CACHE) for name in names):
        yield str(CACHE)
        return
    for name in names:
        lacking = [package for package in PACKAGES[name] if WHEELS.is_dir() and not any(WHEELS.glob(f"{package}-*"))]
        if lacking:
            pytest.skip(f"this machine has neither a package index nor a wheel of {', '.join(lacking)}")
    with contextlib.ExitStack() as stack:
        ours = os.access(CACHE.parent, os.W_OK) and CACHE.parent.stat().st_uid == os.geteuid()
        directory = CACHE if ours else stack.enter_context(serving.state_directory())
        for name in names:
            if name not in built(directory):
                packages = () if name in DEFINITIONS else PACKAGES[name]
                environments.build(name, packages, state_dir=str(directory), log=1)
        yield str(directory)


def built(directory: Path) -> set[str]:
    """The environments there that today's interpreter can use."""
    python = f"python{os.path.realpath(environments.find_python()).rpartition('python')[2]}"
    found = environments.list_(str(directory))
    return {
        one.name
        for one in found
        if os.path.isdir(os.path.join(one.path, "lib", python))
        and (one.name not in DEFINITIONS or one.preload == DEFINITIONS[one.name].preload)
    }
