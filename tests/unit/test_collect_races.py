"""The collector against a tree that changes under it. By then all processes of a job are dead; it holds even so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.collecting import JOB_ID, collected

pytestmark = [pytest.mark.requirement(31)]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work directory that the job owns, below directories that it may pass."""
    for folder in (tmp_path, *tmp_path.parents[:2]):  # pytest's own are 0700
        folder.chmod(folder.stat().st_mode | 0o111)
    place = tmp_path / "work"
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, JOB_ID, JOB_ID)
    return place


def own(path: Path) -> Path:
    if os.geteuid() == 0:
        os.chown(path, JOB_ID, JOB_ID, follow_symlinks=False)
    return path


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return own(path)


def test_directory_that_becomes_a_link_before_it_is_entered_is_not_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    (work / "folder").mkdir()
    own(work / "folder")
    write(work / "mine", "mine")
    real = os.open

    def open_and_swap(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "folder" and dir_fd is not None:
            os.rmdir("folder", dir_fd=dir_fd)
            os.symlink(elsewhere, "folder", dir_fd=dir_fd)
        return real(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patched:
        patched.setattr("sandrun.sandbox.collect.os.open", open_and_swap)
        found = collected(work)
    assert found == ({"mine": b"mine"}, 1)


def test_fifo_that_takes_a_files_place_holds_nobody_up(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(work / "a", "a")
    write(work / "b", "b")
    real = os.stat

    def stat_and_swap(path: str, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result:
        found = real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if path == "a":
            os.unlink("a", dir_fd=dir_fd)
            os.mkfifo("a", dir_fd=dir_fd)
        return found

    def let_go() -> None:
        """Whoever waits for a writer goes on."""
        try:
            os.close(os.open(work / "a", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            pass

    rescue = threading.Timer(20, let_go)
    rescue.start()
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr("sandrun.sandbox.collect.os.stat", stat_and_swap)
        found = collected(work)
    took = time.monotonic() - began
    rescue.cancel()
    assert found == ({"b": b"b"}, 1)
    assert took < 10


def test_file_that_shrinks_while_it_is_read_is_not_sent(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(work / "a", "a" * 1000)
    write(work / "b", "b")
    real = os.read

    def read_and_cut(descriptor: int, most: int) -> bytes:
        piece = real(descriptor, 10 if most == 1000 else most)
        if len(piece) == 10:
            os.truncate(work / "a", 5)
        return piece

    with monkeypatch.context() as patched:
        patched.setattr("sandrun.sandbox.collect.os.read", read_and_cut)
        found = collected(work)
    assert found[0] == {"b": b"b"}
    assert found[1] > 0


@pytest.mark.root
def test_what_is_mounted_below_is_not_sent(work: Path) -> None:
    """Another file system in the tree is none of the job's making."""
    write(work / "mine", "mine")
    (work / "mounted").mkdir()
    own(work / "mounted")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "none", {str(work / "mounted")!r}], check=True)
open({str(work / "mounted" / "strange")!r}, "w").write("strange")
from tests.collecting import collected
print(collected({str(work)!r}))
"""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "({'mine': b'mine'}, 0)\n"
