"""Which interpreter a root file system has, and when it is another than before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandrun.spawner.interpreters import installed


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/lib/python3.12").mkdir(parents=True)
    (tmp_path / "usr/bin/python3.12").write_bytes(b"first")
    (tmp_path / "usr/bin/python3").symlink_to("python3.12")
    return tmp_path


def test_interpreter_that_nobody_touches_stays_the_same(rootfs: Path) -> None:
    (rootfs / "usr/lib/python3.12/site-packages").mkdir()
    before = installed(str(rootfs))
    (rootfs / "usr/lib/python3.12/site-packages/new.py").write_text("")
    (rootfs / "usr/bin/other").write_text("")
    assert before == installed(str(rootfs)) != ()


def test_package_managers_replacement_of_binary_or_library_shows(rootfs: Path) -> None:
    """By a rename, as dpkg does it; of a file in the library, the folder's time tells."""
    seen = [installed(str(rootfs))]
    for path in ("usr/bin/python3.12", "usr/lib/python3.12/os.py"):
        (rootfs / f"{path}.dpkg-new").write_bytes(b"second")
        os.rename(rootfs / f"{path}.dpkg-new", rootfs / path)
        seen.append(installed(str(rootfs)))
    assert len(set(seen)) == 3


def test_interpreter_that_is_gone_is_none(rootfs: Path) -> None:
    (rootfs / "usr/bin/python3.12").unlink()
    assert installed(str(rootfs)) == ()
