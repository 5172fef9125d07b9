"""A result for people: what ended the job, what it used, which walls stood."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from sandrun.cli.terminal import one_line
from sandrun.model import Outcome

EXIT_CODES = {Outcome.TIMEOUT: 124, Outcome.MEMORY_LIMIT: 137}
"""What `sandrun run` exits with where the job itself has no code; as timeout(1) and a shell have it."""
FAILED = 125
"""…and for anything that is not the job's doing, as env(1), nohup(1) and docker-run(1) have it."""


def exit_code(result: Mapping[str, Any]) -> int:
    """The exit code of `sandrun run`: the job's own, or the one that stands for its end."""
    outcome = result["outcome"]
    if outcome == Outcome.EXITED:
        return int(result["exit_code"])
    if outcome == Outcome.SIGNALED:
        return 128 + int(result["signal"])
    return EXIT_CODES.get(outcome, FAILED)


def describe(result: Mapping[str, Any]) -> str:
    """The verdict in a few words."""
    outcome, status = result["outcome"], result["status"]
    if outcome is None:
        place = f", place {result['position']}" if result.get("position") else ""
        return f"{status}{place}"
    words = {
        Outcome.EXITED: f"exited with {result['exit_code']}",
        Outcome.SIGNALED: f"ended by {signal_name(result['signal'])}",
        Outcome.TIMEOUT: "reached its time limit",
        Outcome.CPU_LIMIT: "reached its CPU limit",
        Outcome.MEMORY_LIMIT: "reached its memory limit",
        Outcome.CANCELLED: "was cancelled",
        Outcome.WORKER_LOST: "was lost: Sandrun ended under it",
        Outcome.SETUP_FAILED: "did not start: a wall could not be built",
    }
    text = words.get(outcome, str(outcome))
    failure = result.get("failure")
    if failure:
        text += f" ({failure.get('step')}: {failure.get('details')})"
    if result["limits_hit"]:
        text += f"; ran into its limit of {', '.join(result['limits_hit'])}"
    return one_line(text)


def signal_name(number: object) -> str:
    try:
        return signal.Signals(int(str(number))).name
    except ValueError:
        return f"signal {number}"


def usage(result: Mapping[str, Any]) -> str:
    """What the job used, as far as this host could measure it."""
    measured = result["execution_metadata"]
    parts = []
    for key, word in (("wall_seconds", "wall"), ("cpu_seconds", "CPU")):
        if measured.get(key) is not None:
            parts.append(f"{measured[key]:.2f} s {word}")
    if measured.get("memory_peak_bytes") is not None:
        parts.append(f"{size(measured['memory_peak_bytes'])} memory")
    if measured.get("processes_peak") is not None:
        count = measured["processes_peak"]
        parts.append(f"{count} process{'es' if count != 1 else ''}")
    return ", ".join(parts)


def size(count: int) -> str:
    """Bytes for people: 812 B, 3.4 KiB, 120.0 MiB."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024 or unit == "GiB":
            break
    return f"{value:.1f} {unit}"


def summary(result: Mapping[str, Any]) -> str:
    """One line: verdict, usage, what is left."""
    parts = [describe(result)]
    if result["outcome"] is not None and (used := usage(result)):
        parts.append(used)
    files = result["output_files"]
    if files:
        parts.append(f"{len(files)} output{'s' if len(files) > 1 else ''}")
    lost = [f"{count} bytes of {stream}" for stream, count in result["truncated"].items() if count]
    if lost:
        parts.append(f"{' and '.join(lost)} not kept")
    return "; ".join(parts)
