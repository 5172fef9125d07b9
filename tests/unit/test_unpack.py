"""Unpacking makes exactly what the archive says, and nothing through what lies in its way (requirement 27)."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.sandbox import tar
from sandrun.sandbox.tar import BadArchive
from sandrun.sandbox.unpack import unpack
from tests.tars import by_tarfile, directory, file, header, link, memory_file, packed, tree_of

pytestmark = pytest.mark.requirement(27)


def unpacked(content: bytes, root: Path) -> int:
    with memory_file(content) as fd:
        return unpack(fd, str(root))


def test_modes_owners_and_times_of_members_are_dropped(tmp_path: Path):
    members = (
        file(b"plain", b"12", mode=b"0006666\0"),
        file(b"program", mode=b"0004711\0"),
        file(b"closed", mode=b"0000000\0"),
        header(b"dir", kind=b"5", mode=b"0007000\0"),
    )
    before = os.umask(0o077)
    try:
        assert unpacked(packed(*members), tmp_path) == 2
    finally:
        os.umask(before)
    status = {path.name: path.stat() for path in tmp_path.iterdir()}
    modes = {name: stat.S_IMODE(found.st_mode) for name, found in status.items()}
    assert modes == {"plain": 0o644, "program": 0o755, "closed": 0o644, "dir": 0o755}
    for found in status.values():
        assert (found.st_uid, found.st_gid) == (os.geteuid(), tmp_path.stat().st_gid)
        assert found.st_mtime > 1e9


@pytest.mark.parametrize("member", [file(b"a", b"new"), directory(b"a"), link(b"a", b"b")])
@pytest.mark.parametrize("there", ["file", "directory", "dangling link", "link to a file"])
def test_nothing_is_written_over_or_through_what_is_there(tmp_path: Path, member: bytes, there: str):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    if there == "file":
        (root / "a").write_text("old")
    elif there == "directory":
        (root / "a").mkdir()
    else:
        if there == "link to a file":
            outside.write_text("old")
        (root / "a").symlink_to(outside)
    before = tree_of(tmp_path)
    with pytest.raises(OSError) as caught:
        unpacked(packed(member), root)
    assert caught.value.errno == errno.EEXIST
    assert tree_of(tmp_path) == before


def test_directory_to_unpack_in_is_not_reached_through_a_link(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError) as caught:
        unpacked(packed(file(b"a")), tmp_path / "link")
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert not list((tmp_path / "real").iterdir())


def test_bad_member_ends_it_after_those_before(tmp_path: Path):
    with pytest.raises(BadArchive):
        unpacked(packed(file(b"a", b"1"), link(b"b", b"/etc"), file(b"c")), tmp_path)
    assert set(tree_of(tmp_path)) == {"a"}


def test_large_files_arrive_whole(tmp_path: Path):
    noise, zeros = os.urandom(3_000_001), bytes(5_000_000)
    assert unpacked(packed(file(b"noise", noise), file(b"zeros", zeros), file(b"last", b"1")), tmp_path) == 8_000_002
    assert (tmp_path / "noise").read_bytes() == noise
    assert (tmp_path / "zeros").read_bytes() == zeros


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.write
    monkeypatch.setattr("sandrun.sandbox.unpack.os.write", lambda fd, data: real(fd, data[:1000]))
    content = os.urandom(10_500)
    unpacked(packed(file(b"a", content)), tmp_path)
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("content", [packed(file(b"a", b"1" * 900)), packed(file(b"a", b"1" * 900), link(b"b", b".."))])
def test_no_descriptor_is_left_open(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch):
    before = os.listdir("/proc/self/fd")
    try:
        unpacked(content, tmp_path)
    except BadArchive:
        pass
    assert os.listdir("/proc/self/fd") == before
    monkeypatch.setattr(tar.Archive, "content", lambda self: [memoryview(b"1"), None])  # fails inside a file
    (tmp_path / "a").unlink()
    with pytest.raises(TypeError):
        unpacked(content, tmp_path)
    assert os.listdir("/proc/self/fd") == before


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, tuple[str, object]]:
    """Trees that an honest client may pack."""
    tree: dict[str, tuple[str, object]] = {}
    directories = [""]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(directories))
        path = f"{parent}{draw(NAMES)}"
        if path in tree:
            continue
        kind = draw(st.sampled_from(["file", "program", "directory", "symlink"]))
        if kind == "directory":
            directories.append(path + "/")
            tree[path] = (kind, None)
        elif kind == "symlink":
            up = draw(st.integers(0, path.count("/")))
            tree[path] = (kind, "../" * up + draw(NAMES))
        else:
            tree[path] = (kind, draw(st.binary(max_size=2000)))
    return tree


@settings(max_examples=80, deadline=None)
@given(trees(), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.sampled_from(["w", "w:gz"]))
def test_any_honest_tree_comes_out_as_it_went_in(tree: dict[str, tuple[str, object]], format: int, mode: str):
    with tempfile.TemporaryDirectory() as root:
        unpacked(by_tarfile(tree, format, mode), Path(root))
        assert tree_of(root) == tree
