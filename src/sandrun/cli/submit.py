"""Send a directory, a single file or a tar.gz to a server; the job's id is printed on stdout.

The id is the only credential for the job: whoever knows it may read its logs, fetch its outputs and stop it.
`__pycache__` and `.git` are not sent; anything else that a server would not take is refused here, by name.
"""

from __future__ import annotations

import argparse

from sandrun.cli import connection, manifest
from sandrun.cli.progress import working
from sandrun.cli.terminal import print_json
from sandrun.cli.verdict import size

EXAMPLES = """examples:
  sandrun submit report/                              with report/job.json as manifest
  sandrun submit report/ --entrypoint main.py --timeout 60
  sandrun submit hello.py
  sandrun submit job.tar.gz --manifest job.json
  sandrun submit tool/ --entrypoint run.sh -- --verbose in.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="DIR|FILE", help="directory; .tar.gz, .tgz, .tar; any other file is the entrypoint"
    )
    parser.add_argument("words", metavar="ARG", nargs="*", help="arguments of the job, after --")
    parser.add_argument("--json", action="store_true", help="print job_id, status and position as JSON")
    manifest.add_flags(parser)
    connection.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    given = manifest.collect(args, args.source, args.words)
    archive = manifest.load_source(args.source, given)
    with connection.connect(args) as client, working(f"sending {size(len(archive))}"):
        submitted = client.submit(archive, given)
    if args.json:
        print_json({"job_id": submitted.job_id, "status": submitted.status, "position": submitted.position})
    else:
        print(submitted.job_id)
    return 0
