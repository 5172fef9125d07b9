"""Run the server in the foreground, until SIGTERM or Ctrl-C; a second signal stops it without grace.

Settings come from a TOML file, SANDRUN_* variables and flags, the later winning; `sandrun config` shows them.
"""

from __future__ import annotations

import argparse

from sandrun.cli.scope import enter_scope
from sandrun.cli.settings import add_flags, load_config

EXAMPLES = """examples:
  sudo sandrun serve                                        on 127.0.0.1:8443
  sudo sandrun --port 8443 --cert cert.pem --key key.pem    with TLS
  sudo sandrun serve --max-memory-mb 2048 --max-timeout 3600
  sandrun serve --allow-missing cgroup                      as a user without a cgroup of one's own"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "listen", "isolation", "limits", "jobs")


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    enter_scope(config)
    from sandrun.spawner.supervisor import serve  # forks the privileged process before anything else is imported

    return serve(config)
