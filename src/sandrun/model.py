"""The shared vocabulary: what a client asks for, what a job may use, what became of it. No I/O.

Sizes are bytes and times are seconds unless a name says otherwise; `memory_mb` is MiB, as the manifest has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from sandrun.bounds import ARCHIVE_BYTES as ARCHIVE_BYTES
from sandrun.bounds import ARCHIVE_MEMBERS as ARCHIVE_MEMBERS
from sandrun.bounds import COMPONENT_BYTES as COMPONENT_BYTES
from sandrun.bounds import PATH_BYTES as PATH_BYTES
from sandrun.errors import InvalidInput

MIB = 1 << 20

MANIFEST_BYTES = 1 * MIB
MANIFEST_DEPTH = 20
LOG_BYTES = 10 * MIB
"""What is kept of each of a job's two streams."""
SPARE_MEMORY_BYTES = 32 * MIB
"""What a job must have left beside its unpacked files, or it is refused at admission."""
ARGS = 256
VARIABLES = 256
STRING_BYTES = 128 * 1024
"""The most one argument or variable may have: MAX_ARG_STRLEN of execve(2)."""
STRINGS_BYTES = 1 * MIB
"""The most all arguments and variables may have together: below the kernel's quarter of the stack limit."""
OUTPUT_PATTERNS = 256
OUTPUT_PATTERNS_BYTES = 16 * 1024
"""The most all globs may have together; each is compiled for the job."""
VALUES = 20_000
"""The most values in one JSON text: what decodes from it takes far more memory than the text."""
CODE_BYTES = 1 * MIB
STDIN_BYTES = 16 * MIB
RUN_BODY_BYTES = 16 * MIB
INLINE_OUTPUT_BYTES = 64 * 1024
INLINE_OUTPUTS_BYTES = 1 * MIB


class Status(StrEnum):
    """Where a job stands. `completed` means that it exited with 0; every other end is `failed`."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED)


class Outcome(StrEnum):
    """What ended a job."""

    EXITED = "exited"  # with any exit code, 0 or not
    SIGNALED = "signaled"
    TIMEOUT = "timeout"  # wall clock
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"  # the kernel killed one of its processes for memory
    CANCELLED = "cancelled"
    WORKER_LOST = "worker_lost"  # Sandrun died under it
    SETUP_FAILED = "setup_failed"  # a wall could not be built; nothing of the client's ran


class LimitHit(StrEnum):
    """What a job ran into without ending by it."""

    PROCESSES = "processes"
    OUTPUT = "output"
    STORAGE = "storage"
    CPU_BUDGET = "cpu_budget"


LAYERS = (
    "user pid net mount ipc uts cgroupns seccomp capabilities no-new-privs memory pids cpu swap landlock uid"
).split()
"""The walls by the names that `--allow-missing` takes; `cgroup` stands for memory, pids and cpu."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most one job may use, all its processes together. Zero never means "no limit".

    Attributes:
        wall_seconds: from the start of its entrypoint until its last process is gone, CLOCK_MONOTONIC.
        memory_bytes: RAM, page cache and tmpfs files; v2 memory.max, v1 memory.limit_in_bytes.
        processes: tasks, threads included; one less than the cgroup's pids.max, for init is in it too.
        cpu_seconds: user + system time of all its processes; None is no limit of its own.
    """

    wall_seconds: float
    memory_bytes: int
    processes: int
    cpu_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The most that this server grants a job, within the schema's bounds."""

    timeout: float = 300.0
    memory_mb: int = 512
    cpu_seconds: float = 3600.0
    processes: int = 100


INTERPRETERS = ("python3", "bash", "sh", "node", "perl", "ruby", "php", "Rscript", "lua", "executable")
EXTENSIONS = {
    ".py": "python3",
    ".sh": "bash",
    ".bash": "bash",
    ".js": "node",
    ".mjs": "node",
    ".cjs": "node",
    ".pl": "perl",
    ".rb": "ruby",
    ".php": "php",
    ".R": "Rscript",
    ".r": "Rscript",
    ".lua": "lua",
}
"""An entrypoint without one of these extensions is run as an executable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a client asks for, validated. `parse_manifest` makes one; see docs/api.md for the fields.

    Attributes:
        outputs: globs over paths below the work directory; None is every file that the job made or changed.
        environment: name of a package set of the server's; None is the bare interpreter.
    """

    entrypoint: str
    interpreter: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    outputs: tuple[str, ...] | None = None
    timeout: float = 300.0
    memory_mb: int = 512
    cpu_seconds: float | None = None
    processes: int = 100
    environment: str | None = None
    fresh_interpreter: bool = False

    @property
    def limits(self) -> Limits:
        return Limits(
            wall_seconds=self.timeout,
            memory_bytes=self.memory_mb * MIB,
            processes=self.processes,
            cpu_seconds=self.cpu_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a job used, measured by the kernel. None is what this host cannot measure (a waived layer)."""

    wall_seconds: float = 0.0
    cpu_seconds: float | None = None
    memory_peak_bytes: int | None = None
    processes_peak: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """One file that a job left behind. `path` is relative to the work directory, undecodable bytes as \\xNN."""

    path: str
    size: int
    sha256: str
    content_base64: str | None = None


# ---- reading a manifest ------------------------------------------------------------------------------------

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


def parse_json(text: bytes, *, what: str, depth: int = MANIFEST_DEPTH) -> Any:
    """Strict JSON: UTF-8, no duplicate key, no NaN or Infinity (1e999 is one), nesting at most `depth`, VALUES values.

    Raises: InvalidInput naming `what`. RFC 8259; RFC 7493 (I-JSON) for the duplicates.
    """

    def refuse(details: str) -> NoReturn:
        raise InvalidInput(what, details)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise InvalidInput(show(key), "the key stands twice")
            found[key] = value
        return found

    def number(digits: str) -> float:
        value = float(digits)
        if value - value != 0.0:
            refuse(f"{digits[:40]} is not a finite number")
        return value

    def integer(digits: str) -> int:
        if len(digits) > 20:  # int() of a long literal is quadratic, and raises above 4300 digits
            refuse("an integer has more than 20 digits")
        return int(digits)

    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 (byte {error.start})")
    if flaw := _shape_flaw(text, depth):
        refuse(flaw)
    try:
        return json.loads(
            decoded,
            object_pairs_hook=pairs,
            parse_float=number,
            parse_int=integer,
            parse_constant=lambda name: refuse(f"{name} is not a finite number"),
        )
    except ValueError as error:
        refuse(f"is not JSON: {error}")


def _shape_flaw(text: bytes, depth: int) -> str:
    """What is too deep or too much, told before the parser recurses (in C) and allocates (20 bytes for one of text).

    Right for all that stands before the first syntax error, and the parser goes no further. Every step is one of C's.
    """
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # escapes hide where a string ends
    if bare.count(b'"') > 2 * VALUES:
        return f"has more than {VALUES} strings"
    outside = b"".join(bare.split(b'"')[::2])
    brackets = outside.translate(None, _NO_BRACKETS)
    if len(brackets) + outside.count(b",") > VALUES:
        return f"has more than {VALUES} values"
    level = 0
    for bracket in brackets:
        level += 1 if bracket in b"[{" else -1
        if level > depth:
            return f"is nested deeper than {depth} levels"
    return ""


def show(value: object, most: int = 80) -> str:
    """A client's value for an error message: on one line, bounded, without control characters."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = value[: most + 1] if isinstance(value, str) else json.dumps(value, default=str)
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def check_path(text: str, what: str) -> str:
    """A relative path below the work directory, in normal form; the rules of archive members (requirement 27).

    Raises: InvalidInput. Only a *component* that equals `..` climbs: `a..b` is a good name.
    """
    if not text:
        raise InvalidInput(what, "is empty")
    if text.startswith("/"):
        raise InvalidInput(what, f"{show(text)} is absolute; paths are relative to the work directory")
    if _CONTROL.search(text):
        raise InvalidInput(what, f"{show(text)} has a control character")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidInput(what, f"{show(text)} has a component '..'")
    if not parts:
        raise InvalidInput(what, f"{show(text)} names the work directory itself")
    try:
        lengths = [len(part.encode("utf-8", "surrogateescape")) for part in parts]  # so a local name keeps its bytes
    except UnicodeEncodeError:
        raise InvalidInput(what, f"{show(text)} has a lone surrogate, which is not text") from None
    if sum(lengths) + len(lengths) > PATH_BYTES or max(lengths) > COMPONENT_BYTES:
        raise InvalidInput(
            what, f"{show(text)} is longer than {PATH_BYTES} bytes, or one of its components than {COMPONENT_BYTES}"
        )
    return "/".join(parts)


class _Reader:
    """Takes typed values out of a JSON object, each once; `end` refuses what is left over by name."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise InvalidInput(what, "must be a JSON object")
        self.left = dict(value)
        self.what = what

    def end(self) -> None:
        for key in self.left:
            raise InvalidInput(show(key), f"is not a field of the {self.what}")

    def take(self, key: str) -> Any:
        return self.left.pop(key, None)

    def string(self, key: str) -> str | None:
        value: str | None = self.take(key)
        if value is not None:
            check_string(value, key)
        return value

    def boolean(self, key: str) -> bool:
        value = self.take(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise InvalidInput(key, f"{show(value)} must be true or false")
        return value

    def number(self, key: str, default: Any, low: float, high: float, ceiling: float, *, whole: bool) -> Any:
        value = self.take(key)
        if value is None:
            return min(default, ceiling) if default is not None else None
        kind = "an integer" if whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise InvalidInput(key, f"{show(value)} must be {kind} from {low} to {ceiling:g}")
        if not low <= value <= high:
            raise InvalidInput(key, f"{value} is out of range; accepted: {low} to {ceiling:g}")
        if value > ceiling:
            raise InvalidInput(key, f"{value} is above this server's ceiling; accepted: {low} to {ceiling:g}")
        return value if whole else float(value)

    def strings(self, key: str, most: int) -> tuple[str, ...] | None:
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > most:
            raise InvalidInput(key, f"must be a list of at most {most} strings")
        for item in value:
            check_string(item, key)
        return tuple(value)


def check_text(value: object, what: str, most: int = STRING_BYTES) -> bytes:
    """A string in UTF-8. Raises: InvalidInput unless it is one, without lone surrogates, of at most `most` bytes."""
    if not isinstance(value, str):
        raise InvalidInput(what, f"{show(value)} must be a string")
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(what, "has a lone surrogate, which is not text") from None
    if len(encoded) > most:
        raise InvalidInput(what, f"has {len(encoded)} bytes; accepted: at most {most}")
    return encoded


def check_string(value: object, what: str, most: int = STRING_BYTES) -> None:
    """As `check_text`, and without NUL."""
    if b"\0" in check_text(value, what, most):
        raise InvalidInput(what, "has a NUL character, which no argument or name can hold")


def interpreter_of(entrypoint: str) -> str:
    """What runs an entrypoint whose manifest names no interpreter, by its extension."""
    dot = entrypoint.rfind(".", entrypoint.rfind("/") + 1)
    return EXTENSIONS.get(entrypoint[dot:], "executable") if dot >= 0 else "executable"


def parse_manifest(text: bytes, ceilings: Ceilings) -> Manifest:
    """A manifest as it came over the wire: size, encoding and JSON shape first, then every field.

    Raises: InvalidInput naming field, value and accepted range (requirement 29).
    """
    if len(text) > MANIFEST_BYTES:
        raise InvalidInput("manifest", f"has more than {MANIFEST_BYTES} bytes, the most accepted")
    return manifest_from(parse_json(text, what="manifest"), ceilings)


def manifest_from(value: object, ceilings: Ceilings, *, default_timeout: float = 300.0) -> Manifest:
    """A manifest out of decoded JSON. Raises: InvalidInput, as `parse_manifest` does."""
    read = _Reader(value, "manifest")
    entrypoint = read.string("entrypoint")
    if entrypoint is None:
        raise InvalidInput("entrypoint", "is missing; it names the file in the archive that is run")
    given = entrypoint
    entrypoint = check_path(given, "entrypoint")
    if entrypoint.startswith("-"):  # `./-c` too, of which the normal form is an option
        raise InvalidInput("entrypoint", f"{show(given)} begins with '-', which an interpreter takes for an option")
    interpreter = read.string("interpreter")
    if interpreter is None:
        interpreter = interpreter_of(entrypoint)
    elif interpreter not in INTERPRETERS:
        raise InvalidInput("interpreter", f"{show(interpreter)} is unknown; accepted: {', '.join(INTERPRETERS)}")
    args = read.strings("args", ARGS) or ()
    env = _parse_env(read.take("env"))
    total = sum(len(s.encode()) + 1 for s in (*args, *env, *env.values()))
    if total > STRINGS_BYTES:
        raise InvalidInput("args", f"args and env have {total} bytes together; accepted: at most {STRINGS_BYTES}")
    stdin = read.take("stdin")
    stdin_bytes = b"" if stdin is None else check_text(stdin, "stdin", STDIN_BYTES)
    outputs = read.strings("outputs", OUTPUT_PATTERNS)
    for pattern in outputs or ():
        check_path(pattern, "outputs")
    if (total := sum(len(pattern.encode()) for pattern in outputs or ())) > OUTPUT_PATTERNS_BYTES:
        raise InvalidInput("outputs", f"has {total} bytes in all; accepted: at most {OUTPUT_PATTERNS_BYTES}")
    environment = read.take("environment")
    if isinstance(environment, dict):
        raise InvalidInput("environment", "environment names a package set; variables go in env")
    if environment is not None and (not isinstance(environment, str) or not _NAME.match(environment)):
        raise InvalidInput("environment", f"{show(environment)} must be the name of one of this server's environments")
    manifest = Manifest(
        entrypoint=entrypoint,
        interpreter=interpreter,
        args=args,
        env=env,
        stdin=stdin_bytes,
        outputs=outputs,
        timeout=read.number("timeout", default_timeout, 1, 3600, ceilings.timeout, whole=False),
        memory_mb=read.number("memory_mb", 512, 64, 2048, ceilings.memory_mb, whole=True),
        cpu_seconds=read.number("cpu_seconds", None, 0.1, 3600, ceilings.cpu_seconds, whole=False),
        processes=read.number("processes", 100, 1, 100, ceilings.processes, whole=True),
        environment=environment,
        fresh_interpreter=read.boolean("fresh_interpreter"),
    )
    read.end()
    return manifest


def _parse_env(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > VARIABLES:
        raise InvalidInput("env", f"must be an object of at most {VARIABLES} variables")
    for name, text in value.items():
        if not _ENV_NAME.match(name):
            raise InvalidInput("env", f"{show(name)} is not a name; accepted: [A-Za-z_][A-Za-z0-9_]*")
        check_string(text, f"env.{show(name)}")
    return value
