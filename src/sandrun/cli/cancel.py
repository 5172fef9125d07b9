"""Stop a job. What it wrote so far is kept until its time is up; --erase leaves nothing."""

from __future__ import annotations

import argparse

from sandrun.cli import connection

EXAMPLES = """examples:
  sandrun cancel $id
  sandrun cancel --erase $id     stop it if it runs, and erase logs and outputs now"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--erase", action="store_true", help="erase the job, a job that has ended too")
    connection.add_job(parser)


def run(args: argparse.Namespace) -> int:
    with connection.connect(args) as client:
        if args.erase:
            client.delete(args.job)
        else:
            client.cancel(args.job)
    return 0
