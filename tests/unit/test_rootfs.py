"""What of the host's /etc comes into the root of sandboxes: listed by name, small, and everybody's to read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandrun.sandbox import rootfs


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """An /etc with one file of each kind in a tree that is copied."""
    tree = tmp_path / "perl"
    tree.mkdir()
    (tree / "mine.cfg").write_text("everybody's")
    (tree / "closed.cfg").write_text("root's")
    (tree / "closed.cfg").chmod(0o640)
    (tree / "large.cfg").write_bytes(bytes(rootfs.COPY_BYTES + 1))
    (tree / "linked.cfg").symlink_to(tree / "closed.cfg")
    (tree / "dangling.cfg").symlink_to("nowhere")
    (tree / "folder").symlink_to("/etc")
    os.mkfifo(tree / "fifo")
    (tmp_path / "shadow").write_text("root:secret:")
    (tmp_path / "machine-id").write_text("0123456789abcdef")
    alternatives = tmp_path / "alternatives"
    alternatives.mkdir()
    (alternatives / "awk").symlink_to("/usr/bin/mawk")
    return tmp_path


@pytest.mark.requirement(9, 14)
def test_only_what_is_listed_and_everybodys_is_copied(etc: Path) -> None:
    found = rootfs._read_etc(str(etc))
    assert found.pop("perl/mine.cfg") == b"everybody's"
    assert found.pop("alternatives/awk") == "/usr/bin/mawk"
    assert found == {name: text.encode() for name, text in rootfs.ETC_TEXTS.items()}


@pytest.mark.requirement(9)
def test_what_names_people_or_hosts_is_in_no_list() -> None:
    """The lists grow with interpreters; these never belong in them."""
    listed = {name.partition("/")[0] for name in (*rootfs.ETC_FILES, *(tree for tree, _ in rootfs.ETC_TREES))}
    assert not listed & {"passwd", "shadow", "group", "gshadow", "hostname", "hosts", "machine-id", "sudoers", "ssh"}
    assert "ssl" not in {tree for tree, _ in rootfs.ETC_TREES}  # of it openssl.cnf alone, and not private/
