"""What admission learns from an archive, and the archive that a `/run` becomes (requirement 27)."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import tempfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.errors import InvalidInput, TooLarge
from sandrun.jobs.archive import ArchiveSummary, build_archive, check_archive, check_entrypoint
from sandrun.model import ARCHIVE_BYTES, ARCHIVE_MEMBERS, MANIFEST_BYTES, Manifest, check_path
from sandrun.sandbox.unpack import unpack
from tests.tars import END, by_tarfile, directory, file, link, memory_file, packed, tree_of

pytestmark = pytest.mark.requirement(27)


def summary_of(content: bytes) -> ArchiveSummary:
    with memory_file(content) as fd:
        return check_archive(fd)


def manifest(entrypoint: str) -> Manifest:
    return Manifest(entrypoint=entrypoint, interpreter="python3")


# ---- admission ---------------------------------------------------------------------------------------------


def test_files_are_told_with_size_and_hash():
    summary = summary_of(packed(file(b"a", b"1"), directory(b"d"), file(b"d/b", b"22"), link(b"l", b"a"), file(b"e/f")))
    digests = [hashlib.sha256(content).hexdigest() for content in (b"1", b"22", b"")]
    assert summary.files == (("a", 1, digests[0]), ("d/b", 2, digests[1]), ("e/f", 0, digests[2]))
    assert summary.others == {"d": "directory", "l": "symlink", "e": "directory"}
    assert summary.unpacked_bytes == 3
    assert summary.manifest_bytes is None


def test_manifest_is_job_json_at_the_top_and_nowhere_else():
    members = [file(b"main.py"), file(b"sub/job.json", b"no"), directory(b"d"), link(b"x", b"job.json")]
    assert summary_of(packed(*members)).manifest_bytes is None
    assert summary_of(packed(*members, file(b"./job.json", b"{}"))).manifest_bytes == b"{}"
    assert summary_of(packed(link(b"job.json", b"x"), file(b"x", b"{}"))).manifest_bytes is None


def test_manifest_of_100_megabytes_is_not_held():
    summary = summary_of(packed(file(b"job.json", b" " * (3 * MANIFEST_BYTES))))
    assert summary.manifest_bytes is not None
    assert len(summary.manifest_bytes) == MANIFEST_BYTES + 1


def test_digest_tells_content_and_not_packing():
    tree = {"a": ("file", b"1"), "d": ("directory", None), "d/p": ("program", b"2"), "l": ("symlink", "a")}
    again = dict(reversed(tree.items()))
    digest = summary_of(by_tarfile(tree, tarfile.PAX_FORMAT)).digest
    assert digest == summary_of(by_tarfile(again, tarfile.GNU_FORMAT)).digest
    for change in ({"a": ("file", b"2")}, {"a": ("program", b"1")}, {"l": ("symlink", "d")}, {"d/b": ("file", b"")}):
        assert digest != summary_of(by_tarfile({**tree, **change}, tarfile.PAX_FORMAT)).digest


def test_bad_member_is_named():
    with pytest.raises(InvalidInput) as caught:
        summary_of(packed(file(b"good"), file(b"../../etc/cron.d/evil")))
    assert caught.value.field == "files"
    assert "../../etc/cron.d/evil" in caught.value.details


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("main.py", "print(1)")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [file(b"a") + END, zipped(), bz2.compress(file(b"a") + END), lzma.compress(file(b"a") + END), b"", b"print(1)\n"],
    ids=["plain tar", "zip", "bzip2", "xz", "nothing", "text"],
)
def test_upload_that_is_no_gzipd_tar_is_told_how_to_pack(content: bytes):
    with pytest.raises(InvalidInput, match="tar czf"):
        summary_of(content)


def test_gzip_of_something_else_is_refused():
    with pytest.raises(InvalidInput, match="files: "):
        summary_of(gzip.compress(b"print(1)\n" * 100))


def test_upload_above_the_bound_is_too_large():
    fd = os.memfd_create("large")
    try:
        os.ftruncate(fd, ARCHIVE_BYTES + 1)
        with pytest.raises(TooLarge):
            check_archive(fd)
    finally:
        os.close(fd)


ENTRYPOINTS = [
    ("missing.py", "is not in the archive"),
    ("d", "is a directory in the archive"),
    ("l.py", "is a symbolic link in the archive"),
    ("ld/main.py", "lies behind the symbolic link ld"),
    ("main.py/x", "is not in the archive"),
]


@pytest.mark.requirement(27, 29)
@pytest.mark.parametrize(("entrypoint", "reason"), ENTRYPOINTS)
def test_entrypoint_that_is_no_regular_file_is_refused(entrypoint: str, reason: str):
    summary = summary_of(packed(file(b"main.py"), file(b"d/main.py"), link(b"l.py", b"main.py"), link(b"ld", b"d")))
    check_entrypoint(summary, manifest("main.py"))
    check_entrypoint(summary, manifest("d/main.py"))
    with pytest.raises(InvalidInput) as caught:
        check_entrypoint(summary, manifest(entrypoint))
    assert caught.value.field == "entrypoint"
    assert entrypoint in caught.value.details
    assert reason in caught.value.details


def test_directory_packed_with_its_own_name_is_told_apart():
    summary = summary_of(packed(directory(b"project"), file(b"project/main.py"), file(b"project/data.csv")))
    with pytest.raises(InvalidInput, match=r"project/main\.py is"):
        check_entrypoint(summary, manifest("main.py"))


# ---- building ----------------------------------------------------------------------------------------------


def unpacked(content: bytes) -> dict[str, tuple[str, object]]:
    with tempfile.TemporaryDirectory() as root, memory_file(content) as fd:
        unpack(fd, root)
        return tree_of(root)


def test_files_of_a_request_arrive():
    long = "d" * 120 + "/" + "f" * 120
    files = {"main.py": b"print(1)", "./data//ä.csv": b"1", long: b"long", "block": b"x" * 512, "empty": b""}
    found = unpacked(build_archive(files))
    assert {path: value for path, (kind, value) in found.items() if kind == "file"} == {
        "main.py": b"print(1)",
        "data/ä.csv": b"1",
        long: b"long",
        "block": b"x" * 512,
        "empty": b"",
    }


def test_scripts_and_programs_are_executable():
    found = unpacked(build_archive({"a": b"#!/bin/sh\n", "b": b"\x7fELF\2", "c": b"print(1)"}))
    assert {path: kind for path, (kind, _) in found.items()} == {"a": "program", "b": "program", "c": "file"}


def test_thousand_files_are_taken_and_one_more_is_not():
    files = {f"{number}": b"" for number in range(ARCHIVE_MEMBERS)}
    assert len(unpacked(build_archive(files))) == ARCHIVE_MEMBERS
    with pytest.raises(InvalidInput, match="1001 files"):
        build_archive({**files, "last": b""})


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"/etc/passwd": b""}, "absolute"),
        ({"a/../b": b""}, "'..'"),
        ({"": b""}, "empty"),
        ({".": b""}, "work directory itself"),
        ({"a\nb": b""}, "control character"),
        ({"a\x9bb": b""}, "control character"),
        ({"a\0b": b""}, "control character"),
        ({"a\ud800": b""}, "lone surrogate"),
        ({"x" * 256: b""}, "component"),
        ({"x/" * 2000 + "y": b""}, "longer than"),
        ({"a": b"", "./a": b""}, "stands twice"),
        ({"a/b": b"", "a": b""}, "a file, and a directory"),
        ({"a": b"", "a/b/c": b""}, "a file, and a directory"),
        ({"d/" * 1500 + "f": b""}, "one directory too many"),
    ],
)
def test_files_that_no_archive_could_hold_are_refused(files: dict[str, bytes], reason: str):
    with pytest.raises(InvalidInput) as caught:
        build_archive(files)
    assert caught.value.field == "files"
    assert reason in caught.value.details
    assert caught.value.details.isprintable()


PATHS = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40), min_size=1, max_size=6
).map("/".join)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(PATHS, st.binary(max_size=1500), max_size=8))
def test_whatever_is_built_is_read_back(files: dict[str, bytes]):
    try:
        content = build_archive(files)
    except InvalidInput:
        return
    found = unpacked(content)
    made = {path: value for path, (kind, value) in found.items() if kind in ("file", "program")}
    assert made == {check_path(path, "files"): data for path, data in files.items()}


def test_one_small_file_makes_four_blocks():
    assert len(build_archive({"main.py": b"print('hello')\n"})) == 4 * 512
