"""A job must not control the terminal of whoever reads its logs (requirement 33)."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.cli.terminal import JobStream, neutralise, one_line


class Terminal(io.TextIOWrapper):
    def __init__(self, *, tty: bool) -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes, encoding="utf-8", errors="backslashreplace", write_through=True)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def shown(*pieces: bytes, tty: bool = True) -> bytes:
    terminal = Terminal(tty=tty)
    stream = JobStream(terminal)
    for piece in pieces:
        stream.write(piece)
    stream.close()
    return terminal.raw_bytes.getvalue()


@pytest.mark.requirement(33)
@pytest.mark.parametrize(
    ("written", "seen"),
    [
        (b"\x1b]0;title\x07", b"\\x1b]0;title\\x07"),
        (b"\x1b[2J\x1b[H", b"\\x1b[2J\\x1b[H"),
        ("\x9b2J".encode(), b"\\x9b2J"),
        (b"\x9b2J", "\ufffd2J".encode()),
        (b"a\x08b\x7f", b"a\\x08b\\x7f"),
        ("\u202etxt.exe".encode(), b"\\u202etxt.exe"),
        (b"tab\tline\n", b"tab\tline\n"),
        ("äé漢🙂".encode(), "äé漢🙂".encode()),
        (b"progress 1\rprogress 2\r\n", b"progress 1\nprogress 2\n"),
        (b"\x0e\x0f\x05", b"\\x0e\\x0f\\x05"),
    ],
)
def test_job_cannot_send_a_control_sequence_to_a_terminal(written: bytes, seen: bytes) -> None:
    assert shown(written) == seen
    assert shown(*(written[i : i + 1] for i in range(len(written)))) == seen  # however it is cut


@pytest.mark.requirement(33)
@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=8))
def test_nothing_that_a_terminal_obeys_gets_through(pieces: list[bytes]) -> None:
    text = shown(*pieces).decode()
    assert all(c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) for c in text)


@pytest.mark.requirement(33)
def test_a_file_gets_the_exact_bytes() -> None:
    every = bytes(range(256)) * 3
    assert shown(every[:100], every[100:], tty=False) == every


def test_a_gap_is_told_on_a_terminal_and_never_written_to_a_file() -> None:
    for tty in (True, False):
        terminal = Terminal(tty=tty)
        stream = JobStream(terminal)
        stream.write("ä".encode()[:1])
        stream.gap(12)
        stream.write(b"after")
        stream.close()
        assert (b"12 bytes are missing" in terminal.raw_bytes.getvalue()) is tty


@pytest.mark.requirement(33)
@given(st.text())
def test_a_message_of_ours_is_one_line(text: str) -> None:
    line = one_line(text)
    assert "\n" not in line
    assert line == neutralise(line)
    assert "\x1b" not in line
