"""Can this host build every wall? Looks at each, builds a throw-away sandbox, and prints what fixes what is missing.

Exit code: 0 if a server with these settings would run jobs, 1 if not.
"""

from __future__ import annotations

import argparse

from sandrun.cli.scope import enter_scope
from sandrun.cli.settings import add_flags, load_config
from sandrun.cli.terminal import one_line, print_json

EXAMPLES = """examples:
  sudo sandrun check
  sandrun check --allow-missing cgroup
  sandrun check --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one object: ok, findings")
    add_flags(parser, "isolation")


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    enter_scope(config)
    from sandrun.spawner.hostcheck import check

    findings = check(config)
    good = all(finding.ok for finding in findings)
    if args.json:
        print_json({"ok": good, "findings": [finding._asdict() for finding in findings]})
        return 0 if good else 1
    width = max(len(finding.name) for finding in findings)
    for finding, following in zip(findings, [*findings[1:], None], strict=True):
        print(f"{'ok' if finding.ok else 'MISSING':9}{finding.name:{width}}  {one_line(finding.details)}")
        again = following is not None and not following.ok and following.fix == finding.fix
        if finding.fix and not finding.ok and not again:
            print(f"{'':9}{'':{width}}  fix: {one_line(finding.fix.removeprefix('Fix: '))}")
    print("a server with these settings would run jobs" if good else "a server with these settings would not start")
    return 0 if good else 1
