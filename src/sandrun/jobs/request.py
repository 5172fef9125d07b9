"""The body of `POST /run`: one JSON object that holds a whole job. Strict: what is not a field is refused by name."""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sandrun.errors import InvalidInput, TooLarge
from sandrun.model import (
    ARCHIVE_MEMBERS,
    CODE_BYTES,
    EXTENSIONS,
    INTERPRETERS,
    RUN_BODY_BYTES,
    STDIN_BYTES,
    Ceilings,
    Manifest,
    check_path,
    manifest_from,
    parse_json,
    show,
)

RUN_TIMEOUT = 30.0
"""Seconds that a `/run` gets unless it asks for another time."""
MANIFEST_FIELDS = (
    "interpreter args env outputs timeout memory_mb cpu_seconds processes environment fresh_interpreter"
).split()
_OWN_FIELDS = ("code", "files", "stdin", "keep")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A whole job in memory.

    Attributes:
        manifest: its `entrypoint` is `main.<ext>`, its `outputs` are () unless some were asked for.
        files: path -> content, the entrypoint's too.
        keep: do not erase the job when it is answered.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    keep: bool = False

    @property
    def size(self) -> int:
        """Bytes of content."""
        return sum(map(len, self.files.values())) + len(self.manifest.stdin)


def entry_name(interpreter: str) -> str:
    """The file that `code` becomes: `main` with the first extension that means the interpreter, if there is one."""
    if interpreter == "sh":
        return "main.sh"
    return "main" + next((ending for ending, name in EXTENSIONS.items() if name == interpreter), "")


def parse_run(body: bytes, ceilings: Ceilings) -> RunRequest:
    """A request as it came over the wire. Slow for megabytes: call it in a thread then.

    Raises: TooLarge; InvalidInput naming field, value and accepted range, as a manifest's do (requirement 29).
    """
    if len(body) > RUN_BODY_BYTES:
        raise TooLarge("body", RUN_BODY_BYTES)
    return run_request_from(parse_json(body, what="body"), ceilings)


def run_request_from(value: object, ceilings: Ceilings) -> RunRequest:
    """A request out of decoded JSON. Raises: InvalidInput, as `parse_run` does."""
    if not isinstance(value, dict):
        raise InvalidInput("body", "must be a JSON object")
    for key in value:
        if key not in _OWN_FIELDS and key not in MANIFEST_FIELDS:
            raise InvalidInput(show(key), "is not a field of a run request")
    interpreter = value.get("interpreter")
    if interpreter is None:
        interpreter = "python3"
    elif not isinstance(interpreter, str) or interpreter not in INTERPRETERS:
        raise InvalidInput("interpreter", f"{show(interpreter)} is unknown; accepted: {', '.join(INTERPRETERS)}")
    keep = value.get("keep")
    if keep is not None and not isinstance(keep, bool):
        raise InvalidInput("keep", f"{show(keep)} must be true or false")
    entrypoint = entry_name(interpreter)
    code = value.get("code")
    if code is None:
        raise InvalidInput("code", "is missing; it is the program to run, as text")
    files = {entrypoint: _encode(code, "code", CODE_BYTES)}
    for path, content in _take_files(value.get("files")).items():
        if path in files:
            raise InvalidInput("files", f"{show(path)} stands twice, or is where code goes")
        files[path] = content
    stdin = value.get("stdin")
    asked: dict[str, Any] = {key: value[key] for key in MANIFEST_FIELDS if key in value}
    asked |= {"entrypoint": entrypoint, "interpreter": interpreter}
    manifest = manifest_from(asked, ceilings, default_timeout=RUN_TIMEOUT)
    return RunRequest(
        manifest=replace(
            manifest,
            stdin=b"" if stdin is None else _content(stdin, "stdin", STDIN_BYTES),
            outputs=manifest.outputs or (),
        ),
        files=files,
        keep=bool(keep),
    )


def _take_files(value: object) -> dict[str, bytes]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) >= ARCHIVE_MEMBERS:
        raise InvalidInput("files", f"must be an object of at most {ARCHIVE_MEMBERS - 1} files")
    files: dict[str, bytes] = {}
    for name, content in value.items():
        path = check_path(_text(name, "files"), "files")
        if path in files:
            raise InvalidInput("files", f"{show(path)} stands twice")
        files[path] = _content(content, f"files.{show(path)}", RUN_BODY_BYTES)
    return files


def _content(value: object, what: str, most: int) -> bytes:
    """Bytes given as text or as {"base64": "…"}."""
    if isinstance(value, dict):
        if list(value) != ["base64"] or not isinstance(value["base64"], str):
            raise InvalidInput(what, 'must be a string, or an object {"base64": "…"}')
        try:
            data = binascii.a2b_base64(value["base64"].encode("ascii"), strict_mode=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise InvalidInput(what, f"is not base64: {error}") from None
        if len(data) > most:
            raise InvalidInput(what, f"has {len(data)} bytes; accepted: at most {most}")
        return data
    return _encode(value, what, most)


def _encode(value: object, what: str, most: int) -> bytes:
    if not isinstance(value, str):
        raise InvalidInput(what, f"{show(value)} must be a string")
    data = _text(value, what).encode()
    if len(data) > most:
        raise InvalidInput(what, f"has {len(data)} bytes; accepted: at most {most}")
    return data


def _text(value: str, what: str) -> str:
    """A JSON string can hold half a surrogate pair (`"\\ud800"`), which is no text and has no bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(what, "has a lone surrogate, which is not text") from None
    return value
