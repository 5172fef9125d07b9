"""Packing a directory, and saving outputs: neither skips, follows or overwrites anything in silence."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from sandrun.client.pack import pack_directory, pack_files
from sandrun.client.save import Saving, local_path
from sandrun.errors import InvalidInput, ProtocolError
from sandrun.model import ARCHIVE_MEMBERS, OutputFile


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar}


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        for path in ("b.py", "a.py", "sub/c") if name == "one" else ("sub/c", "a.py", "b.py"):
            (tmp_path / name / path).write_text(path)
        os.utime(tmp_path / name / "a.py", (1, time.time()))
    os.chmod(tmp_path / "two" / "a.py", 0o600)
    assert pack_directory(tmp_path / "one") == pack_directory(tmp_path / "two")


def test_owner_and_time_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    os.chmod(tmp_path / "a", 0o4755)
    (member,) = members(pack_directory(tmp_path)).values()
    assert (member.uid, member.gid, member.uname, member.gname, member.mtime) == (0, 0, "", "", 0)
    assert member.mode == 0o755


def test_only_pycache_and_git_are_left_behind(tmp_path: Path) -> None:
    for path in (".git/config", "pkg/__pycache__/m.pyc", "pkg/m.py", ".hidden", "node_modules/x", "empty/"):
        target = tmp_path / path
        target.mkdir(parents=True) if path.endswith("/") else (
            target.parent.mkdir(parents=True, exist_ok=True),
            target.touch(),
        )
    assert sorted(members(pack_directory(tmp_path))) == [".hidden", "empty", "node_modules/x", "pkg/m.py"]


@pytest.mark.requirement(27)
def test_links_stay_inside_and_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("x")
    (tmp_path / "d" / "up").symlink_to("../d/f")
    (tmp_path / "dir").symlink_to("d")
    packed = members(pack_directory(tmp_path))
    assert sorted(packed) == ["d/f", "d/up", "dir"]
    assert packed["d/up"].linkname == "../d/f"
    assert packed["dir"].issym()


@pytest.mark.requirement(27)
@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "d/../../x", ".."])
def test_a_link_out_of_the_directory_is_refused_by_name(tmp_path: Path, target: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "evil").symlink_to(target)
    with pytest.raises(InvalidInput, match="evil is a symbolic link out of the directory"):
        pack_directory(tmp_path)


@pytest.mark.requirement(27)
def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="pipe is neither"):
        pack_directory(tmp_path)


@pytest.mark.requirement(27)
def test_a_name_that_no_server_takes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "line\nbreak").touch()
    with pytest.raises(InvalidInput, match="control character"):
        pack_directory(tmp_path)


@pytest.mark.requirement(27)
def test_too_many_files_are_refused(tmp_path: Path) -> None:
    for i in range(ARCHIVE_MEMBERS):
        (tmp_path / str(i)).touch()
    assert len(members(pack_directory(tmp_path))) == ARCHIVE_MEMBERS
    (tmp_path / "more").touch()
    with pytest.raises(InvalidInput, match="more than 1000"):
        pack_directory(tmp_path)


@pytest.mark.requirement(27)
def test_a_huge_sparse_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(InvalidInput, match="big: the files have more than 100 MiB"):
        pack_directory(tmp_path)


def test_nothing_to_send_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nothing"):
        pack_directory(tmp_path)
    with pytest.raises(InvalidInput, match="not a directory"):
        pack_directory(tmp_path / "none")


def test_a_name_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    raw = b"caf\xe9-" + b"x" * 120
    (tmp_path / os.fsdecode(raw)).touch()
    assert raw in gzip.decompress(pack_directory(tmp_path))


@pytest.mark.requirement(27)
def test_long_names_and_names_beyond_ascii_are_kept(tmp_path: Path) -> None:
    wanted = ["ü" * 120, "d" * 200 + "/" + "e" * 200]
    for path in wanted:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert sorted(members(pack_directory(tmp_path))) == sorted(wanted)


def test_files_in_memory_are_packed_with_their_mode() -> None:
    packed = members(pack_files({"a.py": "text", "tool": b"\x7fELF"}, executable=("tool",)))
    assert (packed["a.py"].mode, packed["tool"].mode) == (0o644, 0o755)
    for path in ("/x", "a/../b", "", "a\0"):
        with pytest.raises(InvalidInput):
            pack_files({path: b""})


# ---- saving ------------------------------------------------------------------------------------------------


def listed(path: str, data: bytes) -> OutputFile:
    return OutputFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def save(directory: Path, path: str, data: bytes, *, overwrite: bool = False, sent: bytes | None = None) -> Path:
    with Saving(directory, listed(path, data), overwrite=overwrite) as saving:
        saving.write(data if sent is None else sent)
    return Path(saving.path)


@pytest.mark.requirement(32)
@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "a//b", "", ".", "a/", "./a"])
def test_a_listed_path_cannot_leave_the_directory(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidInput):
        save(tmp_path / "out", path, b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.requirement(32)
def test_odd_names_are_saved_without_control_characters(tmp_path: Path) -> None:
    assert local_path("a\x1b[2J\n\x00\ud800b") == "a\\x1b[2J\\x0a\\x00\\xd800b"
    for name in ("new\nline", "\u202egnp.exe", "x" * 255, "sp ace/ü"):
        assert save(tmp_path, name, b"data").read_bytes() == b"data"


def test_a_file_that_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        save(tmp_path, "a", b"theirs")
    assert (tmp_path / "a").read_text() == "mine"
    assert save(tmp_path, "a", b"theirs", overwrite=True).read_bytes() == b"theirs"


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to("../victim")
    with pytest.raises(FileExistsError):
        save(tmp_path / "out", "a", b"theirs")
    save(tmp_path / "out", "a", b"theirs", overwrite=True)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "out" / "a").is_symlink()


@pytest.mark.parametrize("sent", [b"evil", b"goo", b"goodgood"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_bytes_than_announced_leave_nothing(tmp_path: Path, sent: bytes, overwrite: bool) -> None:
    with pytest.raises(ProtocolError):
        save(tmp_path, "a", b"good", sent=sent, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == []
