"""Progress for people: on stderr, on a terminal only, and gone when it is over."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Show that something is under way while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # 60 ms that a script's call does not pay
    from rich.text import Text

    with Console(stderr=True).status(Text(text)):
        yield
