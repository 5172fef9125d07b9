"""The fields of a manifest as flags, for `submit` and `run`."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from typing import Any

from sandrun.errors import InvalidInput
from sandrun.model import ARCHIVE_BYTES, MANIFEST_BYTES, parse_json, show

MANIFEST_NAME = "job.json"
ARCHIVES = (".tar.gz", ".tgz", ".tar")


def add_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    group = parser.add_argument_group("the job", "These go over the manifest, if there is one.")
    add = group.add_argument
    return [
        add("--manifest", metavar="FILE", help="JSON file with the fields; else job.json in the directory"),
        add("--entrypoint", metavar="PATH", help="file in the directory that is run"),
        add("--interpreter", metavar="NAME", help="default: by the entrypoint's extension"),
        add("--env", metavar="NAME=VALUE", action="append", help="a variable; may be repeated"),
        add("--stdin", metavar="FILE", help="text for the job's standard input; - is ours"),
        add(
            "--output", metavar="GLOB", action="append", help="outputs to keep; may be repeated; default: all new files"
        ),
        add("--timeout", metavar="SECONDS", type=_number, help="wall clock"),
        add("--memory-mb", metavar="MIB", type=_integer, help="memory, its files included"),
        add("--cpu-seconds", metavar="SECONDS", type=_number, help="CPU time"),
        add("--processes", metavar="N", type=_integer, help="processes and threads at once"),
        add("--environment", metavar="NAME", help="a set of packages: sandrun environment"),
        add("--fresh-interpreter", action="store_true", help="a new interpreter with its own address layout"),
    ]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{show(text)} is no number") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{show(text)} is no integer") from None


def fields(args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """The fields that flags and arguments give, in the manifest's own form."""
    found: dict[str, Any] = {
        "entrypoint": args.entrypoint,
        "interpreter": args.interpreter,
        "args": words or None,
        "env": _variables(args.env),
        "stdin": None if args.stdin is None else _text(args.stdin),
        "outputs": args.output,
        "timeout": args.timeout,
        "memory_mb": args.memory_mb,
        "cpu_seconds": args.cpu_seconds,
        "processes": args.processes,
        "environment": args.environment,
        "fresh_interpreter": args.fresh_interpreter or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def collect(args: argparse.Namespace, source: str, words: list[str]) -> dict[str, Any]:
    """The manifest: `--manifest`, else `job.json` in a directory, and the flags over it.

    Raises: InvalidInput; OSError if a file cannot be read.
    """
    own = os.path.join(source, MANIFEST_NAME)
    found = {}
    if args.manifest:
        found = read_file(args.manifest)
    elif os.path.isfile(own):
        found = read_file(own)
    return {**found, **fields(args, words)}


def load_source(source: str, given: dict[str, Any]) -> bytes:
    """The archive to send. A single file becomes the entrypoint in `given`."""
    from sandrun.client.pack import pack_directory, pack_files

    mode = os.stat(source).st_mode
    if stat.S_ISDIR(mode):
        if "entrypoint" not in given:
            where = show(os.path.join(source, MANIFEST_NAME), 200)
            raise InvalidInput("entrypoint", f"is missing; --entrypoint PATH names it, or {where}")
        return pack_directory(source)
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


def read_file(path: str) -> dict[str, Any]:
    """A manifest as a person keeps it. Raises: InvalidInput, OSError."""
    with open(path, "rb") as stream:
        text = stream.read(MANIFEST_BYTES + 1)
    if len(text) > MANIFEST_BYTES:
        raise InvalidInput(show(path, 200), f"is larger than {MANIFEST_BYTES} bytes")
    value = parse_json(text, what=show(path, 200))
    if not isinstance(value, dict):
        raise InvalidInput(show(path, 200), "must be a JSON object")
    return value


def encode(manifest: dict[str, Any]) -> bytes:
    try:
        return json.dumps(manifest, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:  # NaN, and lone surrogates of an argument that is not UTF-8
        raise InvalidInput("manifest", f"cannot be written as JSON: {error}") from None


def _variables(given: list[str] | None) -> dict[str, str] | None:
    if given is None:
        return None
    variables = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput("--env", f"{show(text)} is not NAME=VALUE")
        variables[name] = value
    return variables


def _text(path: str) -> str:
    data = sys.stdin.buffer.read() if path == "-" else _read(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("--stdin", f"{show(path, 200)} is not UTF-8 (byte {error.start})") from None


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()
