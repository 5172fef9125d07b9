"""How a job stands, or what became of it: verdict, usage, outputs, and the walls as they were measured."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sandrun.cli import connection, isolation, verdict
from sandrun.cli.progress import working
from sandrun.cli.terminal import one_line, print_json

EXAMPLES = """examples:
  sandrun status $id            for people
  sandrun status --wait $id     once it has ended
  sandrun status --json $id     the whole result object, docs/api.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the whole result object")
    parser.add_argument("--wait", action="store_true", help="wait until the job has ended")
    parser.add_argument("--isolation", action="store_true", help="one line a wall, as it was measured")
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
    if args.isolation and result.isolation:
        for name, value in isolation.lines(result.isolation):
            print(f"  {name + ':':14}{one_line(value)}")
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
        found.append(("isolation", isolation.headline(result["isolation"])))
    return [(label, one_line(text)) for label, text in found]
