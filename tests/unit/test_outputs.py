"""The reader of the collector's stream believes nothing of it (requirements 31, 32)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.errors import ProtocolError
from sandrun.jobs.outputs import OutputsParser
from sandrun.sandbox.collect import (
    BEGIN,
    BROKEN,
    COMPLETE,
    DATA,
    END,
    FILES,
    FRAME,
    OUTPUT_BYTES,
    PATH_BYTES,
    PIECE_BYTES,
    SIZE,
    collect,
)

pytestmark = pytest.mark.requirement(31)


def begin(path: bytes, size: int = 0) -> bytes:
    return FRAME.pack(BEGIN, 8 + len(path)) + SIZE.pack(size) + path


def data(content: bytes) -> bytes:
    return FRAME.pack(DATA, len(content)) + content


COMPLETED = FRAME.pack(COMPLETE, 0)
BROKE = FRAME.pack(BROKEN, 0)


def end(left_out: int = 0) -> bytes:
    return FRAME.pack(END, left_out)


def file(path: bytes, content: bytes) -> bytes:
    return begin(path, len(content)) + (data(content) if content else b"") + COMPLETED


def parse(stream: bytes, piece: int = 1 << 30) -> tuple[dict[str, bytes], OutputsParser]:
    parser = OutputsParser()
    found = {}
    for at in range(0, len(stream), piece):
        for told, content in parser.feed(stream[at : at + piece]):
            assert told.size == len(content)
            assert told.sha256 == hashlib.sha256(content).hexdigest()
            found[told.path] = bytes(content)
    return found, parser


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 64, 1 << 30])
def test_pieces_of_any_length_give_the_same_files(piece: int):
    stream = file(b"a", b"1" * 100) + file(b"b/c", b"") + begin(b"d", 3) + data(b"1") + data(b"23") + COMPLETED + end(2)
    found, parser = parse(stream, piece)
    assert found == {"a": b"1" * 100, "b/c": b"", "d": b"123"}
    assert (parser.omitted, parser.ended, parser.total) == (2, True, len(stream))


def test_broken_file_is_counted_not_given():
    found, parser = parse(begin(b"a", 10) + data(b"1") + BROKE + file(b"b", b"2") + end(1))
    assert found == {"b": b"2"}
    assert parser.omitted == 2


def test_stream_cut_short_gives_what_is_complete():
    found, parser = parse(file(b"a", b"1") + begin(b"b", 2) + data(b"2"))
    assert found == {"a": b"1"}
    assert not parser.ended


MALFORMED = {
    "unknown kind": FRAME.pack(b"?", 0),
    "content without a file": data(b"1"),
    "complete without a file": COMPLETED,
    "broken without a file": BROKE,
    "end inside a file": begin(b"a") + end(),
    "file inside a file": begin(b"a") + begin(b"b"),
    "after the end": end() + file(b"a", b""),
    "one byte after the end": end() + b"\0",
    "complete too early": begin(b"a", 2) + data(b"1") + COMPLETED,
    "more content than told": begin(b"a", 1) + data(b"12"),
    "more content than told, in two": begin(b"a", 1) + data(b"1") + data(b"2"),
    "empty piece": begin(b"a", 1) + FRAME.pack(DATA, 0),
    "huge piece": begin(b"a", PIECE_BYTES + 1) + FRAME.pack(DATA, PIECE_BYTES + 1),
    "complete with a length": begin(b"a") + FRAME.pack(COMPLETE, 1),
    "broken with a length": begin(b"a") + FRAME.pack(BROKEN, 1),
    "no path": begin(b""),
    "head too short": FRAME.pack(BEGIN, 7) + bytes(7),
    "path too long": begin(b"a" * (PATH_BYTES + 1)),
    "path of 4 GB": FRAME.pack(BEGIN, 0xFFFFFFFF),
    "absolute": begin(b"/etc/passwd"),
    "climbs": begin(b"../a"),
    "climbs inside": begin(b"a/../b"),
    "dot": begin(b"."),
    "dot inside": begin(b"a/./b"),
    "empty component": begin(b"a//b"),
    "slash at the end": begin(b"a/"),
    "NUL": begin(b"a\0b"),
    "too large": begin(b"a", OUTPUT_BYTES + 1),
    "too large together": begin(b"a", OUTPUT_BYTES) + BROKE + begin(b"b", 1),
    "too many": b"".join(begin(b"%d" % number) + COMPLETED for number in range(FILES)) + begin(b"last"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("piece", [1, 1 << 30], ids=["bytewise", "whole"])
def test_malformed_stream_is_given_up(case: str, piece: int):
    with pytest.raises(ProtocolError, match="outputs: "):
        parse(MALFORMED[case], piece)


@pytest.mark.parametrize("case", MALFORMED)
def test_what_came_before_the_malformed_part_stands(case: str):
    files = OutputsParser().feed(file(b"before", b"1") + MALFORMED[case])
    assert next(files)[0].path == "before"
    with pytest.raises(ProtocolError):
        list(files)


def test_promise_of_much_takes_no_memory():
    tracemalloc.start()
    try:
        parser = OutputsParser()
        list(parser.feed(begin(b"a", 1 << 20)))
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            list(parser.feed(data(b"1") + BROKE + begin(b"a", 1 << 20)))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1 << 20


@pytest.mark.requirement(32)
@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"new\nline", "new\nline"),
        (b"\xff\xfe/x", "\\xff\\xfe/x"),
        ("\u202etxt.exe".encode(), "\u202etxt.exe"),
        (b"caf\xc3\xa9 caf\xe9", "café caf\\xe9"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
        (b"x" * 255, "x" * 255),
        (b"...", "..."),
    ],
)
def test_odd_names_are_shown_as_text_that_json_can_hold(path: bytes, shown: str):
    found, _ = parse(file(path, b"1") + end())
    assert found == {shown: b"1"}
    assert json.loads(json.dumps(list(found)).encode()) == [shown]
    shown.encode()


@pytest.mark.requirement(32)
def test_two_names_shown_alike_are_one_file_and_one_left_out():
    found, parser = parse(file(b"\xff", b"1") + file(b"\\xff", b"2") + end())
    assert found == {"\\xff": b"1"}
    assert parser.omitted == 1


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30)
        | st.sampled_from(
            [end(), COMPLETED, BROKE, begin(b"a", 3), begin(b"b"), data(b"1"), data(b"123"), file(b"c", b"x")]
        ),
        max_size=12,
    ),
    st.integers(1, 40),
)
def test_any_bytes_give_files_or_a_protocol_error(parts: list[bytes], piece: int):
    try:
        found, _ = parse(b"".join(parts), piece)
    except ProtocolError:
        return
    for path in found:
        assert not {"", ".", ".."} & set(path.split("/"))


NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: not set(name) & set(b"/\0\\") and name not in (b".", b"..")
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.lists(NAMES, min_size=1, max_size=4).map(b"/".join), st.binary(max_size=3000), max_size=8),
    st.integers(1, 5000),
)
def test_any_tree_collected_is_the_tree_read(tree: dict[bytes, bytes], piece: int):
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryFile() as stream:
        made = {}
        for path, content in tree.items():
            full = os.path.join(os.fsencode(root), path)
            try:
                os.makedirs(os.path.dirname(full), exist_ok=True)
                Path(os.fsdecode(full)).write_bytes(content)
            except OSError:  # a file is in the way of a directory, or the other way round
                continue
            made[path.decode(errors="backslashreplace")] = content
        collect(root, None, b"", stream.fileno())
        stream.seek(0)
        found, parser = parse(stream.read(), piece)
    assert found == made
    assert (parser.omitted, parser.ended) == (0, True)
