"""What jobs wrote, onto a terminal that they must not control (requirement 33).

A terminal takes escape sequences as commands: retitle, overwrite what stands above, answer as if typed. So on a
terminal every control character but newline and tab is shown as text; into a file or a pipe the exact bytes go.
"""

from __future__ import annotations

import codecs
import re
import sys
from typing import IO

_CONTROL = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f"  # C0 but for tab and newline, and DEL
    "\x80-\x9f"  # C1: U+009B is a whole "ESC [" in one character
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # these reorder what stands around them (CVE-2021-42574)
    "\u2028\u2029\ud800-\udfff"
    "]"
)


def neutralise(text: str) -> str:
    """Text with nothing in it that a terminal would obey; newlines and tabs stay."""
    return _CONTROL.sub(_visible, text)


def one_line(text: str) -> str:
    """Text for a message of our own: neutral, and without line breaks that could look like another message."""
    return neutralise(" ".join(text.split("\n"))).strip()


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class JobStream:
    """One of a job's streams, onto one of ours, piece by piece as it comes."""

    def __init__(self, target: IO[str]) -> None:
        self._target = target
        self._terminal = target.isatty()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._after_return = False

    def write(self, data: bytes) -> None:
        if not self._terminal:
            self._target.flush()
            self._target.buffer.write(data)  # type: ignore[attr-defined]
            self._target.buffer.flush()  # type: ignore[attr-defined]
            return
        self._show(self._decoder.decode(data))

    def gap(self, skipped: int) -> None:
        """Say that bytes are missing here; on a terminal only, for a file is to hold the job's bytes alone."""
        if self._terminal:
            self._show(self._decoder.decode(b"", final=True))
            self._decoder.reset()
            self._target.write(f"\n[sandrun: {skipped} bytes are missing here]\n")

    def close(self) -> None:
        if self._terminal:
            self._show(self._decoder.decode(b"", final=True))
        self._target.flush()

    def _show(self, text: str) -> None:
        # A carriage return would let a line overwrite itself; progress bars stay readable as lines of their own.
        if self._after_return and text.startswith("\n"):
            text = text[1:]
        if text:
            self._after_return = text.endswith("\r")
        self._target.write(neutralise(text.replace("\r\n", "\n").replace("\r", "\n")))
        self._target.flush()


def stdout_stream() -> JobStream:
    return JobStream(sys.stdout)


def stderr_stream() -> JobStream:
    return JobStream(sys.stderr)


def print_json(value: object) -> None:
    """For machines: one object, ASCII, so that no terminal is harmed either."""
    import json

    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
