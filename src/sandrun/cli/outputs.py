"""The files that a job left behind: size, SHA-256, path."""

from __future__ import annotations

import argparse

from sandrun.cli import connection
from sandrun.cli.terminal import one_line, print_json

EXAMPLES = """examples:
  sandrun outputs $id
  sandrun outputs --json $id"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help='{"files": [{"path", "size", "sha256"}]}')
    connection.add_job(parser)


def run(args: argparse.Namespace) -> int:
    with connection.connect(args) as client:
        files = client.outputs(args.job)
    if args.json:
        print_json({"files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in files]})
        return 0
    width = max((len(str(file.size)) for file in files), default=0)
    for file in files:
        print(f"{file.size:{width}}  {one_line(file.sha256)}  {one_line(file.path)}")
    return 0
