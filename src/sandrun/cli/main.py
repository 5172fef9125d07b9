"""`sandrun COMMAND …`: finds the command's module, and turns what goes wrong into one sentence and an exit code.

Only the module of the command that runs is imported, and nothing but the standard library before it: `serve` forks the
privileged process out of what is loaded here.

Exit codes: 0; 1 what was asked for is refused or failed; 2 it was asked for wrongly. `run` has its own, see there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sandrun import __version__
from sandrun.cli.terminal import one_line
from sandrun.errors import ConfigError, InvalidInput, SandrunError, ServerError

COMMANDS = {
    "serve": "run the server (also: sandrun --port N …)",
    "run": "run a file or directory here, without a server",
    "submit": "send a directory to a server and print the job's id",
    "status": "how a job stands, or what became of it",
    "logs": "what a job wrote; -f follows it live",
    "outputs": "the files that a job left behind",
    "download": "save the files that a job left behind",
    "cancel": "stop a job",
    "check": "can this host build every wall? And if not, what fixes it",
    "policy": "the system calls that a job may make, with reasons",
    "config": "every setting, its value and where that came from",
    "environment": "build, list and remove sets of Python packages for jobs",
}

EXAMPLES = """examples:
  sandrun run hello.py                      run a program in a sandbox, here
  sudo sandrun serve --port 8443            start a server on 127.0.0.1
  id=$(sandrun submit report/ --entrypoint main.py)
  sandrun logs -f $id                       watch it
  sandrun download $id --to outputs/        fetch what it made
  sandrun check                             see what this host lacks

`sandrun COMMAND --help` tells more."""


class Parser(argparse.ArgumentParser):
    """As argparse's, but wrong usage is one sentence, and the exit code is the command's choice."""

    usage_code = 2

    def error(self, message: str) -> NoReturn:
        complain(f"{one_line(message)} (see {self.prog} --help)")
        sys.exit(self.usage_code)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `sandrun argv…`."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names are the job's and need not be text
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"sandrun {__version__}")
        return 0
    if words[0].startswith("-"):
        words.insert(0, "serve")  # the customer's `sandrun --port 8443 --cert C --key K`
    name = words[0]
    if name not in COMMANDS:
        return _unknown(name)
    command = importlib.import_module(f"sandrun.cli.{name}")
    failed = int(getattr(command, "FAILED", 1))
    parser = Parser(
        prog=f"sandrun {name}",
        description=command.__doc__,
        epilog=getattr(command, "EXAMPLES", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.usage_code = 2 if failed == 1 else failed
    command.add_arguments(parser)
    # Intermixed: `download JOB --to DIR PATH` reads as one expects. It cannot be had together with sub-commands.
    parse = getattr(command, "parse", argparse.ArgumentParser.parse_intermixed_args)
    try:
        args = parse(parser, words[1:])
        code = int(command.run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read us has enough. Python flushes once more at exit, which must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        complain(sentence(error))
        return parser.usage_code
    except (SandrunError, OSError) as error:
        complain(sentence(error))
        return failed
    except Exception:  # a mistake of ours, but `run` must not look as if the job had exited with 1
        import traceback

        traceback.print_exc()
        return failed


def overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{what}" for name, what in COMMANDS.items())
    return (
        "usage: sandrun COMMAND …\n\nRuns untrusted code behind every wall that Linux offers.\n\n"
        f"{commands}\n\n{EXAMPLES}"
    )


def complain(text: str) -> None:
    print(f"sandrun: {text}", file=sys.stderr)


def sentence(error: BaseException) -> str:
    """An error as one line; what a server said is not trusted with the terminal."""
    if isinstance(error, ServerError):
        problem = error.problem
        text = str(problem.get("details") or problem.get("error") or error)
        if problem.get("field") and not text.startswith(f"{problem['field']}"):
            text = f"{problem['field']}: {text}"
        if problem.get("retry_after"):
            text += f" (try again in {problem['retry_after']} s)"
    elif isinstance(error, InvalidInput):
        text = f"{error.field}: {error.details}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = str(error) or type(error).__name__
    return one_line(text)


def _unknown(name: str) -> int:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(COMMANDS)}"
    complain(f"{one_line(name)} is no command{meant}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
