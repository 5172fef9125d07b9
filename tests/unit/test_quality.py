"""The linter and the type checker are tests like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_ruff_finds_nothing():
    check("ruff", "check", "--no-cache", ".")


@pytest.mark.timeout(300)
def test_mypy_strict_finds_nothing():
    check("mypy")
