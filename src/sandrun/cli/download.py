"""Save the files that a job left behind, each proved by its SHA-256; their paths are printed.

No file that exists is replaced unless --overwrite says so: the names are the job's choice. `-` as directory writes one
file to standard output.
"""

from __future__ import annotations

import argparse
import sys

from sandrun.cli import connection
from sandrun.cli.progress import working
from sandrun.cli.terminal import JobStream, one_line
from sandrun.errors import InvalidInput

EXAMPLES = """examples:
  sandrun download $id                             all of them, below ./outputs
  sandrun download $id --to here                   below ./here
  sandrun download $id chart.png data/a.csv
  sandrun download $id summary.txt --to -          onto standard output"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    connection.add_job(parser)
    parser.add_argument("paths", metavar="PATH", nargs="*", help="only these; default all")
    parser.add_argument("--to", metavar="DIR", default="outputs", help="directory, made if missing (default outputs)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    with connection.connect(args) as client:
        if args.to == "-":
            if len(args.paths) != 1:
                raise InvalidInput("--to -", "takes exactly one PATH")
            target = JobStream(sys.stdout)
            target.write(client.read(args.job, args.paths[0]))
            target.close()
            return 0
        with working("downloading"):
            saved = client.download(args.job, args.to, paths=args.paths or None, overwrite=args.overwrite)
    for path in saved:
        print(one_line(path))
    return 0
