"""No archive gets past the reader that could do harm, or that two programs would read differently (requirement 27)."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandrun.model import ARCHIVE_BYTES, ARCHIVE_MEMBERS
from sandrun.sandbox import tar
from sandrun.sandbox.tar import Archive, BadArchive
from sandrun.sandbox.unpack import unpack
from tests.tars import (
    BLOCK,
    END,
    GNU,
    V7,
    by_tarfile,
    directory,
    file,
    header,
    link,
    long_name,
    memory_file,
    packed,
    padded,
    pax,
    record,
    repaired,
    tree_of,
)

pytestmark = pytest.mark.requirement(27)


def read(content: bytes) -> list[tuple[str, str, bytes]]:
    """Path, kind, and content or target of each member."""
    with memory_file(content) as fd:
        archive = Archive(fd)
        return [
            (
                member.path.decode(errors="surrogateescape"),
                member.kind,
                b"".join(archive.content()) if member.kind == tar.FILE else member.target,
            )
            for member in archive
        ]


def refusal(content: bytes) -> BadArchive:
    with pytest.raises(BadArchive) as caught:
        read(content)
    assert caught.value.field == "files"
    return caught.value


# ---- what must work ----------------------------------------------------------------------------------------

LONG = "d" * 90 + "/" + "e" * 90 + "/" + "f" * 200
REAL = {
    "main.py": ("file", b"print(1)\n"),
    "bin": ("directory", None),
    "bin/run": ("program", b"#!/bin/sh\n"),
    "empty": ("file", b""),
    "exactly-a-block": ("file", b"x" * BLOCK),
    "odd names/ä€😀 \u202f": ("file", b"1"),
    "a..b/..c/d..": ("file", b"only a whole component climbs"),
    "latest": ("symlink", "bin/run"),
    "bin/up": ("symlink", "../main.py"),
    LONG: ("file", b"long"),
    "z": ("symlink", "g" * 150),
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_pythons_tarfile_writes_is_read(format: int, mode: str):
    found = {path: (kind, content) for path, kind, content in read(by_tarfile(REAL, format, mode))}
    for path, (kind, value) in REAL.items():
        content = value if isinstance(value, bytes) else str(value or "").encode()
        assert found[path] == ("file" if kind == "program" else kind, content)


@pytest.mark.needs("tar")
@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "ustar", "v7"])
@pytest.mark.parametrize("arguments", [["."], ["main.py", "bin", "latest", "odd names"]], ids=["dot", "names"])
def test_what_gnu_tar_writes_is_read(tmp_path: Path, format: str, arguments: list[str]):
    with memory_file(by_tarfile({k: v for k, v in REAL.items() if len(k) < 90 and k != "z"}, tarfile.PAX_FORMAT)) as fd:
        unpack(fd, str(tmp_path))
    made = subprocess.run(
        ["tar", "czf", "-", f"--format={format}", "-C", str(tmp_path), *arguments], capture_output=True, check=True
    )
    found = {path for path, _, _ in read(made.stdout)}
    expected = tree_of(tmp_path)
    assert found == {path for path in expected if arguments == ["."] or path.partition("/")[0] in arguments}


def test_git_archives_global_header_is_read_over():
    comment = pax(record(b"comment", b"0123456789abcdef"), b"g")
    assert read(packed(comment, file(b"a", b"1"))) == [("a", "file", b"1")]


def test_pax_records_without_meaning_here_are_read_over():
    records = record(b"mtime", b"1.5") + record(b"SCHILY.xattr.user.x", b"\0\xff\n=") + record(b"path", b"b")
    assert read(packed(pax(records), file(b"a", b"1"))) == [("b", "file", b"1")]


def test_normal_form_and_implied_directories_come_before_what_they_hold():
    found = read(packed(file(b"./a//b/./c", b"1"), directory(b"a/b/"), directory(b"./"), file(b"a/d")))
    assert found == [("a", "directory", b""), ("a/b", "directory", b""), ("a/b/c", "file", b"1"), ("a/d", "file", b"")]


def test_name_that_is_not_utf8_keeps_its_bytes():
    assert read(packed(file(b"caf\xe9")))[0][0] == "caf\udce9"


def test_only_the_execute_bit_of_a_mode_counts():
    with memory_file(packed(file(b"a", mode=b"0007644\0"), file(b"b", mode=b"0000010\0"))) as fd:
        assert [member.executable for member in Archive(fd)] == [False, True]


def test_content_can_be_taken_in_part_or_not_at_all():
    content = os.urandom(700_000)
    with memory_file(packed(file(b"a", content), file(b"b", content), file(b"c", b"end"))) as fd:
        archive = Archive(fd)
        members = iter(archive)
        next(members)
        assert content.startswith(bytes(next(archive.content())))
        assert next(members).path == b"b"
        assert next(members).path == b"c"
        assert b"".join(archive.content()) == b"end"
        assert next(members, None) is None


def test_reading_leaves_the_descriptors_position():
    with memory_file(packed(file(b"a", b"1"))) as fd:
        os.lseek(fd, 7, os.SEEK_SET)
        list(Archive(fd))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7


# ---- what is refused ---------------------------------------------------------------------------------------

DEEP = b"/".join([b"d"] * 1900)
HOSTILE = {
    "absolute": (file(b"/etc/passwd"), "/etc/passwd", "absolute"),
    "absolute behind a prefix": (file(b"b", prefix=b"/a"), "/a/b", "absolute"),
    "climbs": (file(b"../a"), "../a", "'..'"),
    "climbs in the middle": (file(b"a/../b"), "a/../b", "'..'"),
    "climbs at the end": (directory(b"a/.."), "a/..", "'..'"),
    "climbs in the prefix": (file(b"b", prefix=b".."), "../b", "'..'"),
    "climbs in pax": (pax(record(b"path", b"x/../../y")) + file(b"a"), "x/../../y", "'..'"),
    "climbs in a GNU name": (long_name(b"../x") + file(b"a", magic=GNU), "../x", "'..'"),
    "no name": (file(b""), "", "empty name"),
    "newline": (file(b"a\nb"), "a\\x0ab", "control character"),
    "escape": (file(b"\x1b[2J"), "\\x1b[2J", "control character"),
    "delete": (file(b"a\x7f"), "a\\x7f", "control character"),
    "C1 control": (file("a\x9b2J".encode()), "a\\x9b2J", "control character"),
    "NUL inside": (file(b"a\0b"), "a\\x00b", "control character"),
    "NUL in pax": (pax(record(b"path", b"a\0b")) + file(b"a"), "a\\x00b", "control character"),
    "NUL at the end in pax": (pax(record(b"path", b"a\0")) + file(b"a"), "a\\x00", "control character"),
    "NUL in a GNU name": (long_name(b"a\0b") + file(b"a", magic=GNU), "a\\x00b", "control character"),
    "component of 256": (pax(record(b"path", b"x" * 256)) + file(b"a"), "x" * 200 + "…", "255 bytes"),
    "name of 4001": (pax(record(b"path", b"x/" * 2000 + b"y")) + file(b"a"), "x/" * 100 + "…", "4000 bytes"),
    "hard link": (file(b"a") + header(b"b", kind=b"1", link=b"a"), "b", "hard link"),
    "character device": (header(b"null", kind=b"3"), "null", "character device"),
    "block device": (header(b"sda", kind=b"4"), "sda", "block device"),
    "FIFO": (header(b"pipe", kind=b"6"), "pipe", "FIFO"),
    "contiguous": (file(b"a", kind=b"7"), "a", "unknown type"),
    "GNU sparse": (header(b"a", kind=b"S", magic=GNU), "a", "sparse"),
    "pax sparse": (pax(record(b"GNU.sparse.major", b"1")) + file(b"a"), "PaxHeaders/x", "sparse"),
    "star sparse": (pax(record(b"SCHILY.realsize", b"1")) + file(b"a"), "PaxHeaders/x", "sparse"),
    "volume name": (header(b"a", kind=b"V", magic=GNU), "a", "unknown type"),
    "multi-volume": (header(b"a", kind=b"M", magic=GNU), "a", "unknown type"),
    "dump directory": (header(b"a", kind=b"D", magic=GNU), "a", "unknown type"),
    "Solaris header": (header(b"a", kind=b"X"), "a", "unknown type"),
    "type of 0xff": (header(b"a", kind=b"\xff"), "a", "unknown type"),
    "twice": (file(b"a") + file(b"./a"), "./a", "twice"),
    "directory twice": (directory(b"a/") + directory(b"a"), "a", "twice"),
    "top twice": (directory(b"./") + directory(b"."), ".", "twice"),
    "file then directory": (file(b"a") + directory(b"a/"), "a/", "a directory here and a file before"),
    "directory then link": (directory(b"a/") + link(b"a", b"b"), "a", "a symlink here and a directory before"),
    "implied directory then file": (file(b"a/b") + file(b"a"), "a", "a file here and a directory before"),
    "link then file": (link(b"a", b"b") + file(b"a"), "a", "a file here and a symlink before"),
    "below a file": (file(b"a") + file(b"a/b"), "a/b", "below a, which is a file"),
    "below a link": (link(b"a", b"b") + file(b"a/b/c"), "a/b/c", "below a, which is a symlink"),
    "directory below a link": (link(b"a", b".") + directory(b"a/b"), "a/b", "below a, which is a symlink"),
    "link out": (link(b"a/b", b"../../etc"), "a/b", "leaves the archive"),
    "link out at the top": (link(b"a", b".."), "a", "leaves the archive"),
    "link to an absolute path": (link(b"a", b"/etc/passwd"), "a", "absolute path"),
    "link out through a link": (link(b"x/y", b"..") + link(b"x/z", b"y/../.."), "x/z", "leaves the archive"),
    "link that climbs late": (directory(b"a/b") + link(b"a/c", b"b/.."), "a/c", "only at the start"),
    "link to nothing": (link(b"a", b""), "a", "empty target"),
    "link to a newline": (link(b"a", b"b\nc"), "a", "control character in its target"),
    "link with content": (header(b"a", 5, b"2", link=b"b") + padded(b"12345"), "a", "with content"),
    "directory with content": (header(b"a", 512, b"5") + header(b"b"), "a", "with content"),
    "file named as a directory": (file(b"a/"), "a/", "name of a directory"),
    "file named dot": (file(b"a/."), "a/.", "name of a directory"),
    "file in place of the top": (file(b"."), ".", "name of a directory"),
    "link named as a directory": (link(b"a/", b"b"), "a/", "name of a directory"),
    "old directory with content": (file(b"a/", b"1", kind=b"\0"), "a/", "with content"),
    "bad checksum": (header(b"a", checksum=b"000000\0 "), "a", "wrong checksum"),
    "no checksum": (header(b"a", checksum=bytes(8)), "a", "no octal number as its checksum"),
    "size in base 256": (header(b"a", size_field=b"\x80" + bytes(11)), "a", "no octal number as its size"),
    "negative size": (header(b"a", size_field=b"-0000000001"), "a", "no octal number as its size"),
    "size with an underscore": (header(b"a", size_field=b"1_0"), "a", "no octal number as its size"),
    "size in decimal": (header(b"a", size_field=b"9"), "a", "no octal number as its size"),
    "size behind a NUL": (header(b"a", size_field=b"1\x001"), "a", "no octal number as its size"),
    "no size": (header(b"a", size_field=b""), "a", "no octal number as its size"),
    "no mode": (header(b"a", mode=b""), "a", "no octal number as its mode"),
    "unknown magic": (header(b"a", magic=b"USTAR\x0000"), "a", "no ustar, pax or GNU header"),
    "prefix in a GNU header": (header(b"a", magic=GNU, prefix=b"b"), "a", "no ustar, pax or GNU header"),
    "prefix in an old header": (header(b"a", magic=V7, prefix=b"b"), "a", "no ustar, pax or GNU header"),
    "two sizes": (pax(record(b"size", b"0")) + file(b"a", b"1"), "a", "two different sizes"),
    "size in pax alone": (pax(record(b"size", b"512")) + file(b"a") + header(b"b"), "a", "two different sizes"),
    "huge size in pax": (pax(record(b"size", b"9" * 16)) + file(b"a"), "PaxHeaders/x", "malformed pax record size"),
    "signed size in pax": (pax(record(b"size", b"+1")) + file(b"a", b"1"), "PaxHeaders/x", "pax record size"),
    "empty path in pax": (pax(record(b"path", b"")) + file(b"a"), "PaxHeaders/x", "malformed pax record path"),
    "path twice in pax": (pax(record(b"path", b"b") * 2) + file(b"a"), "PaxHeaders/x", "malformed pax record path"),
    "two pax headers": (pax(b"") + pax(b"") + file(b"a"), "PaxHeaders/x", "two extended headers"),
    "unended GNU name": (
        header(b"././@LongLink", 9, b"L", magic=GNU) + padded(b"n" * 120) + file(b"a"),
        "././@LongLink",
        "malformed long name",
    ),
    "empty GNU name": (
        header(b"././@LongLink", 0, b"L", magic=GNU) + file(b"a"),
        "././@LongLink",
        "malformed long name",
    ),
    "two GNU names": (long_name(b"b") * 2 + file(b"a", magic=GNU), "././@LongLink", "two extended headers"),
    "two GNU targets": (long_name(b"b", b"K") * 2 + link(b"a", b"c"), "././@LongLink", "two extended headers"),
    "GNU name and pax": (long_name(b"b") + pax(record(b"path", b"c")) + file(b"a"), "PaxHeaders/x", "two extended"),
    "global path": (pax(record(b"path", b"b"), b"g") + file(b"a"), "PaxHeaders/x", "global header"),
    "global size": (pax(record(b"size", b"0"), b"g") + file(b"a"), "PaxHeaders/x", "global header"),
    "pax without a length": (pax(b"path=b\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax with length 0": (pax(b"0 path=b\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax with a leading zero": (pax(b"010 path=b\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax beyond its end": (pax(b"99 path=b\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax too short": (pax(b"8 path=b\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax without a key": (pax(b"5 =b\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax without a value": (pax(b"7 path\n") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax and zeros": (pax(record(b"path", b"b") + b"\0") + file(b"a"), "PaxHeaders/x", "malformed pax header"),
    "pax for nothing": (pax(record(b"path", b"b")), "PaxHeaders/x", "before the member"),
    "huge pax header": (header(b"p", tar.EXTENDED_BYTES, b"x"), "p", "extended headers more than"),
    "too deep": (pax(record(b"path", DEEP)) + file(b"a"), "d/" * 100 + "…", "too deep"),
    "data after the end": (file(b"a") + END + file(b"b"), "", "data after its end mark"),
    "one byte after the end": (file(b"a") + END + b"\1" + bytes(511), "", "data after its end mark"),
    "one zero block, then more": (file(b"a") + bytes(BLOCK) + file(b"b"), "", "data after its end mark"),
    "odd end": (file(b"a") + END + bytes(100), "", "cut short inside its end mark"),
    "too many bytes": (header(b"a", ARCHIVE_BYTES + 1), "a", f"more than {ARCHIVE_BYTES} bytes"),
    "too many bytes by two": (file(b"a", b"12") + header(b"b", ARCHIVE_BYTES - 1), "b", f"more than {ARCHIVE_BYTES}"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("gzipped", [True, False], ids=["gzip", "plain"])
def test_hostile_member_is_refused_by_name(case: str, gzipped: bool):
    members, member, reason = HOSTILE[case]
    end = b"" if "end" in case else END
    error = refusal(packed(members, end=end) if gzipped else members + end)
    assert reason in error.details
    assert error.member == member
    assert (error.member or "the archive") in error.details


def test_1001_members_are_refused_and_1000_are_not():
    members = [file(b"%d" % number) for number in range(ARCHIVE_MEMBERS)]
    assert len(read(packed(*members))) == ARCHIVE_MEMBERS
    error = refusal(packed(*members, file(b"last")))
    assert error.member == "last"
    assert "1000 members" in error.details


def test_names_cannot_make_more_directories_than_members():
    members = [file(b"%d/a/b/c" % number) for number in range(334)]
    assert "too deep" in refusal(packed(*members)).details
    assert len(read(packed(*members[:333]))) == 333 * 4


def test_many_small_extended_headers_are_bounded_together():
    headers = pax(b"", b"g") * (tar.EXTENDED_BYTES // BLOCK)
    assert read(packed(headers, file(b"a"))) == [("a", "file", b"")]
    assert "extended headers" in refusal(packed(headers, pax(b"", b"g"), file(b"a"))).details


def test_bomb_behind_the_end_mark_is_not_inflated():
    bomb = packed(file(b"a"), end=bytes(64 << 20))
    assert len(bomb) < 400_000
    pieces = 0

    class Counted(Archive):
        def _inflated(self, packed: bytes):
            nonlocal pieces
            for piece in super()._inflated(packed):
                pieces += len(piece)
                yield piece

    with memory_file(bomb) as fd, pytest.raises(BadArchive, match="padding after its end mark"):
        list(Counted(fd))
    assert pieces <= tar.TAIL_BYTES + 2 * tar._PIECE_BYTES


def test_bomb_is_refused_by_what_its_header_says_before_it_is_inflated():
    bomb = packed(header(b"bomb", ARCHIVE_BYTES + 1), bytes(8 << 20))
    with memory_file(bomb) as fd:
        os.ftruncate(fd, 4096)  # what would be needed to inflate it is not even there
        with pytest.raises(BadArchive, match="bomb: makes it more than"):
            list(Archive(fd))


def test_second_gzip_member_is_refused():
    whole = packed(file(b"a"))
    for tail in (whole, gzip.compress(b""), b"\0", b"x" * 70_000):
        assert "after the end of its gzip member" in refusal(whole + tail).details


def test_archive_split_over_gzip_members_is_refused():
    text = file(b"a") + END
    assert refusal(gzip.compress(text[:BLOCK]) + gzip.compress(text[BLOCK:]))


@pytest.mark.parametrize("gzipped", [True, False], ids=["gzip", "plain"])
def test_every_truncation_is_refused(gzipped: bool):
    whole = file(b"a", b"1" * 600) + pax(record(b"path", b"b")) + link(b"x", b"a") + END
    whole = gzip.compress(whole) if gzipped else whole
    assert read(whole)
    for length in range(0, len(whole), 1 if gzipped else 7):
        refusal(whole[:length])


def test_damage_in_the_gzip_data_is_refused():
    whole = bytearray(packed(file(b"a", os.urandom(3000))))
    for at in (3, 2000, len(whole) - 6, len(whole) - 1):  # flags, data, checksum, length
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        refusal(bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(600), b"#!/bin/sh\n" * 200, os.urandom(2000), bytes(700)])
def test_what_is_no_archive_is_refused(content: bytes):
    refusal(content)


def test_raw_deflate_and_zlib_streams_are_refused():
    refusal(zlib.compress(file(b"a") + END))


def test_error_message_is_printable_and_bounded():
    error = refusal(packed(pax(record(b"path", b"\x1b\xff\n" * 1000)) + file(b"a")))
    assert error.details.isprintable()
    assert len(error.details) < 3000


# ---- whatever it is ----------------------------------------------------------------------------------------

MEMBERS = [
    file(b"a", b"hello"),
    file(b"dir/b", b"x" * 600, mode=b"0000755\0"),
    directory(b"dir2/"),
    link(b"dir/up", b"../a"),
    long_name(b"n" * 120) + file(b"cut", magic=GNU),
    pax(record(b"path", b"p" * 130)) + file(b"cut", b"1"),
    file(b"old", b"1", kind=b"\0", magic=V7),
    file(b"tail", prefix=b"head"),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=3000) | st.binary(max_size=600).map(packed))
def test_any_bytes_are_read_or_refused(content: bytes):
    try:
        read(content)
    except BadArchive:
        pass


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """An archive with a few bytes of its headers changed and the checksums set right again."""
    members = draw(st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=4, unique=True))
    content = bytearray(b"".join(members))
    starts = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    for _ in range(draw(st.integers(1, 3))):
        if not starts:
            break
        start = draw(st.sampled_from(starts))
        at = draw(
            st.sampled_from([0, 1, 2, 99, 100, 106, 124, 134, 135, 156, 157, 158, 256, 257, 262, 263, 345, 346, 499])
        )
        content[start + at] = draw(st.sampled_from(b"\0 ./0125gxLKSab\n\x80\xff"))
        content[start : start + BLOCK] = repaired(bytes(content[start : start + BLOCK]))
    return bytes(content) + END


@settings(max_examples=200, deadline=None)
@given(mutated())
def test_whatever_is_accepted_stays_inside_and_keeps_parents_first(content: bytes):
    try:
        found = read(content)
    except BadArchive:
        return
    seen = {"": "directory"}
    for path, kind, target in found:
        assert path not in seen
        assert not path.startswith("/")
        assert not {"", ".", ".."} & set(path.split("/"))
        assert seen[path.rpartition("/")[0]] == "directory"
        seen[path] = kind
        if kind == "symlink":
            top = "/top"
            joined = os.path.normpath(os.path.join(top, os.path.dirname(path), os.fsdecode(target)))
            assert joined == top or joined.startswith(top + "/")


@pytest.mark.needs("tar")
@settings(max_examples=60, deadline=None)
@given(mutated())
def test_gnu_tar_makes_the_same_of_what_is_accepted(content: bytes):
    """No parser differential: where we accept an archive and GNU tar has no complaint, both make one tree."""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        try:
            with memory_file(content) as fd:
                unpack(fd, ours)
        except BadArchive:
            return
        done = subprocess.run(
            ["tar", "xf", "-", "--no-same-owner", "--no-same-permissions", "-C", theirs],
            input=content,
            capture_output=True,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )
        if done.returncode == 0 and not done.stderr:
            assert tree_of(ours) == tree_of(theirs)
