"""Run a file or a directory in a sandbox here and now, without a server.

After FILE|DIR, the first word that is no option of ours begins the job's arguments, as does --. Its output is ours, and
so is its exit code: its own, 128+N if signal N ended it, 124 at its time limit, 137 at its memory limit, else 125.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from sandrun.cli import manifest, verdict
from sandrun.cli.local import spawner
from sandrun.cli.main import complain
from sandrun.cli.scope import enter_scope
from sandrun.cli.settings import add_flags, load_config
from sandrun.cli.terminal import JobStream, one_line, print_json, stderr_stream, stdout_stream
from sandrun.config import Config
from sandrun.errors import ProtocolError
from sandrun.model import Ceilings, Outcome, interpreter_of

if TYPE_CHECKING:
    import socket

    from sandrun.jobs.job import Job
    from sandrun.jobs.logs import LogBuffer
    from sandrun.jobs.result import JobResult
    from sandrun.jobs.service import JobService

FAILED = verdict.FAILED

EXAMPLES = """examples:
  sandrun run hello.py
  sandrun run report/ --entrypoint main.py --outputs out/
  sandrun run --timeout 5 --memory-mb 64 tool.py --verbose in.csv     the last two words are the job's
  sandrun run script.sh --stdin data.csv
  sandrun run --json hello.py"""

CEILINGS = Ceilings(timeout=3600.0, memory_mb=2048, cpu_seconds=3600.0, processes=100)
"""Those of the schema: here it is the operator's own machine and job."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="FILE|DIR", help="a file is the entrypoint; a directory has job.json or --entrypoint"
    )
    parser.add_argument("--outputs", metavar="DIR", help="save what the job makes here")
    parser.add_argument("--overwrite", action="store_true", help="…and replace files that exist")
    parser.add_argument("--json", action="store_true", help="print the result object instead of the job's output")
    parser.usage = "sandrun run [OPTION …] FILE|DIR [OPTION …] [--] [ARG …]"
    manifest.add_flags(parser)
    add_flags(parser, "isolation")


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Take our options until the first word that is the job's; argparse would take the job's options for ours."""
    takes_value = {name: action.nargs != 0 for name, action in parser._option_string_actions.items()}
    ours: list[str] = []
    source: str | None = None
    i = 0
    while i < len(words):
        word = words[i]
        name, equals, _ = word.partition("=")
        if word == "--":
            i += 1
            if source is not None:
                break
        elif name in takes_value:
            used = 2 if takes_value[name] and not equals else 1
            ours += words[i : i + used]
            i += used
            continue
        elif source is not None:
            break
        elif word.startswith("-") and word != "-":
            parser.error(f"unrecognized arguments: {word}")
        if i < len(words):
            source = words[i]
            i += 1
    args = parser.parse_args([*ours, "--", source] if source is not None else ours)
    args.words = list(words[i:])
    return args


def run(args: argparse.Namespace) -> int:
    config = load_config(args)
    enter_scope(config)
    given = manifest.collect(args, args.source, args.words)
    archive = manifest.load_source(args.source, given)
    if given and args.outputs is None:
        given.setdefault("outputs", [])
    text = manifest.encode(given) if given else None
    if args.outputs is not None:
        os.makedirs(args.outputs, exist_ok=True)  # a directory that cannot be made is known before the job has run
    with spawner(config, given.get("environment"), _interpreter(given)) as connection:
        return asyncio.run(_run(args, config, connection, archive, text))


def _interpreter(given: Mapping[str, Any]) -> str | None:
    """The interpreter that a job will want, as far as that is known before its archive is read."""
    if given.get("interpreter") is not None:
        return str(given["interpreter"])
    entrypoint = given.get("entrypoint")
    return interpreter_of(entrypoint) if isinstance(entrypoint, str) else None


async def _run(
    args: argparse.Namespace, config: Config, connection: socket.socket, archive: bytes, text: bytes | None
) -> int:
    from sandrun.jobs.memfile import sealed
    from sandrun.jobs.service import JobService
    from sandrun.spawner.client import SpawnerClient

    _speak_plainly()
    client = SpawnerClient(connection)
    try:
        try:
            await client.ready()
        except ProtocolError:
            return FAILED  # the spawner has said why
        service = JobService(client, dataclasses.replace(config.jobs, ceilings=CEILINGS))
        try:
            job = await service.submit(service.client("127.0.0.1"), sealed("archive", archive), text)
            with _interruptible(service, job) as signals:
                await _follow(service, job, quiet=args.json)
            _report(args, service, job)
            if signals:
                return 128 + signals[0]
            return verdict.exit_code(_plain(service.result(job)))
        finally:
            service.close()
    finally:
        client.close()


def _speak_plainly() -> None:
    """The log of a server that is none: what went wrong, one sentence each, on stderr."""
    import structlog

    def sentence(_logger: object, _level: str, event: MutableMapping[str, Any]) -> str:
        told = " ".join(f"{key}={value}" for key, value in event.items() if key != "event" and value not in (None, ()))
        return one_line(f"sandrun: {event.get('event')}: {told}")

    structlog.configure(
        processors=[sentence],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


@contextlib.contextmanager
def _interruptible(service: JobService, job: Job) -> Iterator[list[int]]:
    """SIGINT and SIGTERM stop the job; what it wrote until then is still told. Yields the signals that came."""
    loop = asyncio.get_running_loop()
    came: list[int] = []
    stopping: list[asyncio.Task[None]] = []

    def stop(number: int) -> None:
        came.append(number)
        stopping.append(loop.create_task(service.cancel(job)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        yield came
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _follow(service: JobService, job: Job, *, quiet: bool) -> None:
    if not quiet:
        await asyncio.gather(_copy(job.stdout, stdout_stream()), _copy(job.stderr, stderr_stream()))
    await service.wait(job)


async def _copy(buffer: LogBuffer, target: JobStream) -> None:
    offset = 0
    while True:
        await buffer.wait_for_more(offset)
        data = buffer.read(offset, 1 << 16)
        if not data and buffer.ended:
            break
        target.write(data)
        offset += len(data)
    target.close()


def _report(args: argparse.Namespace, service: JobService, job: Job) -> None:
    result = _plain(service.result(job, logs=args.json))
    if args.json:
        print_json(result)
    saved = _save(args, job) if args.outputs is not None else []
    if args.json:
        return
    if result["outcome"] != Outcome.EXITED or result["limits_hit"] or any(result["truncated"].values()):
        complain(verdict.summary(result))
    for path in saved:
        complain(f"saved {one_line(path)}")


def _plain(result: JobResult) -> dict[str, Any]:
    """As a client would have it from a server."""
    import msgspec

    return dict(msgspec.json.decode(msgspec.json.encode(result)))


def _save(args: argparse.Namespace, job: Job) -> list[str]:
    from sandrun.client.save import Saving
    from sandrun.model import OutputFile

    saved = []
    for output in job.outputs.values():
        file = OutputFile(path=output.path, size=output.size, sha256=output.sha256)
        with Saving(args.outputs, file, overwrite=args.overwrite) as saving:
            saving.write(output.data)
        saved.append(saving.path)
    return saved
