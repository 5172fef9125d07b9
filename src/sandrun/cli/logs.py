"""What a job wrote: its stdout on ours, its stderr on ours.

Into a file or a pipe go the exact bytes. On a terminal control characters are shown as text, so no job can steer it.
"""

from __future__ import annotations

import argparse

from sandrun.cli import connection, verdict
from sandrun.cli.main import complain
from sandrun.cli.terminal import print_json, stderr_stream, stdout_stream

EXAMPLES = """examples:
  sandrun logs $id                        what there is so far
  sandrun logs -f $id                     follow until the job ends
  sandrun logs --stream stdout $id > out  one stream alone"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="follow until the job has ended")
    parser.add_argument("--stream", choices=("stdout", "stderr", "both"), default="both", help="default both")
    parser.add_argument(
        "--json", action="store_true", help="one object with both streams; with -f one object a line, as they come"
    )
    connection.add_job(parser)


def run(args: argparse.Namespace) -> int:
    if args.follow:
        return _follow(args)
    wanted = ("stdout", "stderr") if args.stream == "both" else (args.stream,)
    with connection.connect(args) as client:
        logs = client.logs(args.job)
    data = {"stdout": logs.stdout, "stderr": logs.stderr}
    if args.json:
        print_json({stream: data[stream].decode(errors="replace") for stream in wanted})
        return 0
    targets = {"stdout": stdout_stream(), "stderr": stderr_stream()}
    for stream in wanted:
        targets[stream].write(data[stream])
        targets[stream].close()
    return 0


def _follow(args: argparse.Namespace) -> int:
    import json

    from sandrun.client import LogEnd

    targets = {"stdout": stdout_stream(), "stderr": stderr_stream()}
    with connection.connect(args) as client:
        for item in client.follow(args.job):
            if isinstance(item, LogEnd):
                event = {"event": "end", "status": item.status, "outcome": item.outcome, "exit_code": item.exit_code}
                if args.json:
                    print(json.dumps(event), flush=True)
            elif args.stream in ("both", item.stream):
                if args.json:
                    part = {"stream": item.stream, "offset": item.offset, "text": item.text, "skipped": item.skipped}
                    print(json.dumps(part), flush=True)
                    continue
                if item.skipped:
                    targets[item.stream].gap(item.skipped)
                targets[item.stream].write(item.data)
        for target in targets.values():
            target.close()
        if not args.json:
            complain(verdict.summary(client.result(args.job).raw))
    return 0
