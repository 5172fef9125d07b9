"""Runs the collector as a job's init does: in a forked child, as another user than root."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from sandrun.jobs.outputs import OutputsParser
from sandrun.sandbox.collect import collect

JOB_ID = 1879048192 + 65_000


def as_job(work: Callable[[], None]) -> int:
    """Start `work` in a child, which gives up root first; returns its pid. It exits with 0, or 1 and a traceback."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(JOB_ID, JOB_ID, JOB_ID)
                os.setresuid(JOB_ID, JOB_ID, JOB_ID)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def stream_of(root: str | os.PathLike[str], patterns: tuple[str, ...] | None = None, before: bytes = b"") -> bytes:
    """All that the collector writes."""
    end, start = os.pipe()
    pid = as_job(lambda: collect(os.fspath(root), patterns, before, start))
    os.close(start)
    with open(end, "rb") as pipe:
        stream = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return stream


def collected(
    root: str | os.PathLike[str], patterns: tuple[str, ...] | None = None, before: bytes = b""
) -> tuple[dict[str, bytes], int]:
    """Content by path as shown, and the number of files left out."""
    parser = OutputsParser()
    found = {file.path: bytes(data) for file, data in parser.feed(stream_of(root, patterns, before))}
    assert parser.ended
    return found, parser.omitted
