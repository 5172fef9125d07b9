"""Send a directory, a single file or a tar.gz to a server; the job's id is printed on stdout.

The id is the only credential for the job: whoever knows it may read its logs, fetch its outputs and stop it.
`__pycache__` and `.git` are not sent; anything else that a server would not take is refused here, by name.
"""

from __future__ import annotations

import argparse
import os
import stat
from typing import Any

from sandrun.cli import connection, manifest
from sandrun.cli.progress import working
from sandrun.cli.terminal import print_json
from sandrun.cli.verdict import size
from sandrun.errors import InvalidInput
from sandrun.model import ARCHIVE_BYTES, show

EXAMPLES = """examples:
  sandrun submit report/                              with report/job.json as manifest
  sandrun submit report/ --entrypoint main.py --timeout 60
  sandrun submit hello.py
  sandrun submit job.tar.gz --manifest job.json
  sandrun submit tool/ --entrypoint run.sh -- --verbose in.csv"""

ARCHIVES = (".tar.gz", ".tgz", ".tar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="DIR|FILE", help="directory; .tar.gz, .tgz, .tar; any other file is the entrypoint"
    )
    parser.add_argument("words", metavar="ARG", nargs="*", help="arguments of the job, after --")
    parser.add_argument("--json", action="store_true", help="print job_id, status and position as JSON")
    manifest.add_flags(parser)
    connection.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    given = {**(manifest.read_file(args.manifest) if args.manifest else {}), **manifest.fields(args, args.words)}
    with connection.connect(args) as client:
        archive = load_source(args.source, given)
        with working(f"sending {size(len(archive))}"):
            submitted = client.submit(archive, given)
    if args.json:
        print_json({"job_id": submitted.job_id, "status": submitted.status, "position": submitted.position})
    else:
        print(submitted.job_id)
    return 0


def load_source(source: str, given: dict[str, Any]) -> bytes:
    """The archive to send. A single file becomes the entrypoint in `given`."""
    from sandrun.client.pack import pack_directory, pack_files

    mode = os.stat(source).st_mode
    if stat.S_ISDIR(mode):
        if "entrypoint" in given or os.path.lexists(os.path.join(source, "job.json")):
            return pack_directory(source)
        raise InvalidInput(
            "entrypoint", f"is missing, and {show(source, 200)} has no job.json: --entrypoint PATH names it"
        )
    if not stat.S_ISREG(mode):
        raise InvalidInput("source", f"{show(source, 200)} is neither a file nor a directory")
    with open(source, "rb") as stream:
        content = stream.read(ARCHIVE_BYTES + 1)
    if len(content) > ARCHIVE_BYTES:
        raise InvalidInput("source", f"{show(source, 200)} is larger than {ARCHIVE_BYTES >> 20} MiB")
    if source.endswith(ARCHIVES):
        return content
    name = os.path.basename(source)
    given.setdefault("entrypoint", name)
    return pack_files({name: content}, executable=(name,) if mode & 0o111 else ())
