"""Which server the client commands talk to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandrun.client import Client


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server", metavar="URL", help="default SANDRUN_URL, else http://127.0.0.1:8443; https:// if it has TLS"
    )
    group.add_argument(
        "--ca", metavar="FILE", help="certificate to trust, if the server made its own; default SANDRUN_CA"
    )


def add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="the id that `sandrun submit` printed")
    add_flags(parser)


def connect(args: argparse.Namespace) -> Client:
    """Raises: ConfigError for a URL that is none."""
    from sandrun.client import Client

    return Client(args.server, ca=args.ca)
