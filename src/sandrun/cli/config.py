"""Every setting with its value and its origin: default, file, environment or flag."""

from __future__ import annotations

import argparse
import sys

from sandrun.cli.settings import add_flags, load_config
from sandrun.cli.terminal import one_line, print_json
from sandrun.config import default_file, display, table

EXAMPLES = """examples:
  sandrun config                     what a server started now would use
  sandrun config --max-timeout 600   the same, with this flag
  sandrun config --table             unit, default and range of every key, as Markdown"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="one JSON object")
    what.add_argument("--table", action="store_true", help="the reference: every key with unit, default and range")
    add_flags(parser, "listen", "isolation", "limits", "jobs")


def run(args: argparse.Namespace) -> int:
    if args.table:
        table(sys.stdout.write)
        return 0
    config = load_config(args)
    if args.json:
        print_json({row.name: {"value": value, "origin": origin} for row, value, origin in config.rows()})
        return 0
    shown = [
        (row.name, one_line(display(row, value)), row.unit, one_line(origin)) for row, value, origin in config.rows()
    ]
    widths = [min(40, max(len(line[i]) for line in shown)) for i in range(3)]
    for name, value, unit, origin in shown:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {unit:{widths[2]}}  {origin}")
    if not args.config:
        print(f"\nfile: {default_file()}, if it exists; --config or SANDRUN_CONFIG names another", file=sys.stderr)
    return 0
