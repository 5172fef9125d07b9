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


def add_flags(parser: argparse.ArgumentParser, *sections: str) -> list[argparse.Action]:
    """Flags for the keys of these sections, and `--config`."""
    added = []
    group = parser.add_argument_group("settings")
    added.append(group.add_argument("--config", metavar="FILE", help="TOML file; else SANDRUN_CONFIG"))
    for section in sections:
        group = parser.add_argument_group(TITLES[section])
        for row in KEYS:
            if row.section == section:
                notes = "; ".join(filter(None, (row.why, f"default {row.default_shown}" if row.default_shown else "")))
                added.append(
                    group.add_argument(
                        row.flag,
                        dest=f"key_{row.name}",
                        action="append" if row.kind == "names" else "store",
                        metavar=row.kind.upper() if row.kind != "names" else "NAME",
                        help=notes.replace("%", "%%"),
                    )
                )
    return added


def load_config(args: argparse.Namespace) -> Config:
    """Raises: ConfigError."""
    flags = {name.removeprefix("key_"): value for name, value in vars(args).items() if name.startswith("key_")}
    return load(flags, file=args.config)
