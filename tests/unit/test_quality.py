"""The linter and the type checker are tests like any other."""

from __future__ import annotations

import os
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


def test_compiler_warns_of_nothing(tmp_path):
    """In what `pip install` compiles, where a warning that is new to a compiler must not be an error."""
    source = ROOT / "src/sandrun/linux/calls.c"
    subprocess.run(
        [ROOT / "scripts/compile", source, tmp_path / "libcalls.so"],
        env={**os.environ, "CFLAGS": "-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror"},
        check=True,
    )
