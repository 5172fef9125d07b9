"""The server's settings as flags: one per key of `sandrun.config.KEYS`."""

from __future__ import annotations

import argparse

from sandrun.config import KEYS, Config, load

TITLES = {
    "listen": "listening",
    "isolation": "isolation",
    "limits": "ceilings: the most that a job may ask for",
    "jobs": "jobs",
}


PLACEHOLDERS = {"text": "NAME", "path": "PATH", "integer": "N", "number": "N", "size": "SIZE", "names": "NAME"}


def add_flags(parser: argparse.ArgumentParser, *sections: str, only: str | None = None) -> list[argparse.Action]:
    """Flags for the keys of these sections, or for the one key `only` of them, and `--config`."""
    added = []
    group = parser.add_argument_group("settings")
    added.append(group.add_argument("--config", metavar="FILE", help="TOML file; else SANDRUN_CONFIG"))
    for section in sections:
        group = parser.add_argument_group(TITLES[section])
        for row in KEYS:
            if row.section == section and only in (None, row.name):
                notes = "; ".join(filter(None, (row.why, f"default {row.default_shown}" if row.default_shown else "")))
                added.append(
                    group.add_argument(
                        row.flag,
                        dest=f"key_{row.name}",
                        action="append" if row.kind == "names" else "store",
                        metavar=PLACEHOLDERS[row.kind],
                        help=notes.replace("%", "%%"),
                    )
                )
    return added


def load_config(args: argparse.Namespace) -> Config:
    """Raises: ConfigError."""
    flags = {name.removeprefix("key_"): value for name, value in vars(args).items() if name.startswith("key_")}
    return load(flags, file=args.config)
