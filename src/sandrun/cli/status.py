"""How a job stands, or what became of it: verdict, usage, outputs, and the walls as they were measured."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sandrun.cli import connection, verdict
from sandrun.cli.progress import working
from sandrun.cli.terminal import one_line, print_json

EXAMPLES = """examples:
  sandrun status $id            for people
  sandrun status --wait $id     once it has ended
  sandrun status --json $id     the whole result object, docs/api.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the whole result object")
    parser.add_argument("--wait", action="store_true", help="wait until the job has ended")
    parser.add_argument("--isolation", action="store_true", help="show every measurement of the isolation report")
    connection.add_job(parser)


def run(args: argparse.Namespace) -> int:
    with connection.connect(args) as client:
        if args.wait:
            with working("waiting for the job to end"):
                result = client.wait(args.job)
        else:
            result = client.result(args.job)
    if args.json:
        print_json(result.raw)
        return 0
    for label, text in lines(result.raw):
        print(f"{label + ':':12}{text}")
    if args.isolation:
        for path, value in flatten(result.isolation):
            print(f"  {one_line(path)}: {one_line(str(value))}")
    return 0


def lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    measured = result["execution_metadata"]
    found = [("job", result["job_tag"]), ("status", result["status"]), ("verdict", verdict.describe(result))]
    if result["outcome"] is None:
        found.pop()
        if result["position"]:
            found.append(("position", str(result["position"])))
    if used := verdict.usage(result):
        found.append(("usage", used))
    with_what = measured.get("interpreter") or ""
    if measured.get("environment"):
        with_what += f", environment {measured['environment']}"
    if with_what:
        found.append(("ran with", with_what))
    times = ("submitted_at", "started_at", "ended_at")
    found.extend((key.removesuffix("_at"), str(measured[key])) for key in times if measured.get(key))
    dropped = result["truncated"].items()
    found.extend((stream, f"{count} bytes were not kept") for stream, count in dropped if count)
    found.extend(("output", f"{file['path']} ({verdict.size(file['size'])})") for file in result["output_files"])
    if result["isolation"]:
        found.append(("isolation", isolation_line(result["isolation"])))
    return [(label, one_line(text)) for label, text in found]


def isolation_line(report: Mapping[str, Any]) -> str:
    """How much was measured; what was waived stands first, for it is what matters."""
    count = sum(1 for _ in flatten(report))
    waived = next(
        (value for path, value in flatten(report) if path.endswith("waived") and value not in ("", "[]")), None
    )
    return (f"WAIVED {waived}; " if waived else "") + f"{count} measurements, --isolation or --json shows them"


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """A tree of values as dotted paths."""
    if isinstance(value, Mapping):
        return [item for key, below in value.items() for item in flatten(below, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        if all(not isinstance(item, (Mapping, list)) for item in value):
            return [(path, " ".join(map(str, value)))]
        return [item for i, below in enumerate(value) for item in flatten(below, f"{path}[{i}]")]
    return [(path, "" if value is None else str(value).lower() if isinstance(value, bool) else str(value))]
