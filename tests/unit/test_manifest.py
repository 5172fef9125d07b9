"""A manifest is strict JSON, known fields in known ranges; a refusal names field, value and range (requirement 29)."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.errors import InvalidInput
from sandrun.model import (
    ARGS,
    EXTENSIONS,
    INTERPRETERS,
    MANIFEST_BYTES,
    MANIFEST_DEPTH,
    MIB,
    OUTPUT_PATTERNS,
    RUN_BODY_BYTES,
    STRING_BYTES,
    STRINGS_BYTES,
    VALUES,
    VARIABLES,
    Ceilings,
    Manifest,
    check_path,
    manifest_from,
    parse_json,
    parse_manifest,
    show,
)

pytestmark = pytest.mark.requirement(29)

T = TypeVar("T")
HIGHEST = Ceilings(timeout=3600, memory_mb=2048, cpu_seconds=3600, processes=100)


def parse(ceilings: Ceilings = HIGHEST, **fields: Any) -> Manifest:
    return parse_manifest(json.dumps({"entrypoint": "main.py", **fields}).encode(), ceilings)


def refusal(text: bytes, ceilings: Ceilings = HIGHEST) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse_manifest(text, ceilings)
    assert caught.value.details.isprintable()
    assert len(caught.value.details) < 500
    return caught.value


def attempt(call: Callable[[], T]) -> T | InvalidInput:
    """The value, or the refusal; no other exception."""
    try:
        return call()
    except InvalidInput as error:
        assert error.details.isprintable()  # noqa: PT017
        return error


# ---- fields ------------------------------------------------------------------------------------------------


def test_entrypoint_alone_takes_every_default():
    assert parse(Ceilings()) == Manifest(entrypoint="main.py", interpreter="python3")


def test_every_field_arrives():
    given = {
        "entrypoint": "./src//main.R",
        "interpreter": "Rscript",
        "args": ["-v", "", "ä"],
        "env": {"A_1": "x=y", "_": ""},
        "stdin": "text\0",
        "outputs": ["**/*.png", "out/"],
        "timeout": 1.5,
        "memory_mb": 64,
        "cpu_seconds": 0.1,
        "processes": 1,
        "environment": "data-1.0",
        "fresh_interpreter": True,
    }
    found = parse_manifest(json.dumps(given).encode(), HIGHEST)
    assert set(given) == {field.name for field in dataclasses.fields(Manifest)}
    assert found == Manifest(
        entrypoint="src/main.R",
        interpreter="Rscript",
        args=("-v", "", "ä"),
        env={"A_1": "x=y", "_": ""},
        stdin=b"text\0",
        outputs=("**/*.png", "out/"),
        timeout=1.5,
        memory_mb=64,
        cpu_seconds=0.1,
        processes=1,
        environment="data-1.0",
        fresh_interpreter=True,
    )
    assert found.limits.memory_bytes == 64 * MIB


@pytest.mark.parametrize(
    ("extension", "interpreter"), [*EXTENSIONS.items(), ("", "executable"), (".exe", "executable")]
)
def test_interpreter_follows_from_the_extension(extension: str, interpreter: str):
    assert parse(entrypoint=f"a.b/main{extension}").interpreter == interpreter


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_every_interpreter_can_be_named(interpreter: str):
    assert parse(interpreter=interpreter).interpreter == interpreter


REFUSED: list[tuple[str, Any, str]] = [
    ("entrypoint", None, "missing"),
    ("entrypoint", 5, "must be a string"),
    ("entrypoint", "", "empty"),
    ("entrypoint", "-c", "begins with '-'"),
    ("entrypoint", "./-c", "begins with '-'"),
    ("entrypoint", ".//-", "begins with '-'"),
    ("entrypoint", "/bin/sh", "absolute"),
    ("entrypoint", "a/../../b", "'..'"),
    ("entrypoint", ".", "work directory itself"),
    ("entrypoint", "a\nb", "control character"),
    ("entrypoint", "a\0b", "NUL"),
    ("entrypoint", "a\ud800", "lone surrogate"),
    ("entrypoint", "x" * 256, "255"),
    ("interpreter", "python2", "accepted: python3, bash"),
    ("interpreter", "/usr/bin/python3", "accepted: python3, bash"),
    ("interpreter", 3, "must be a string"),
    ("args", "-v", "list"),
    ("args", {"a": 1}, "list"),
    ("args", [1], "must be a string"),
    ("args", [None], "must be a string"),
    ("args", ["a\0b"], "NUL"),
    ("args", ["\udc80"], "lone surrogate"),
    ("args", ["x"] * (ARGS + 1), f"at most {ARGS}"),
    ("args", ["x" * (STRING_BYTES + 1)], f"at most {STRING_BYTES}"),
    ("env", ["A=1"], "object"),
    ("env", {"1A": ""}, "[A-Za-z_][A-Za-z0-9_]*"),
    ("env", {"": ""}, "[A-Za-z_][A-Za-z0-9_]*"),
    ("env", {"A=B": ""}, "[A-Za-z_][A-Za-z0-9_]*"),
    ("env", {"A\n": ""}, "[A-Za-z_][A-Za-z0-9_]*"),
    ("env", {"Ä": ""}, "[A-Za-z_][A-Za-z0-9_]*"),
    ("env", {str(n): "" for n in range(VARIABLES + 1)}, f"at most {VARIABLES}"),
    ("env.A", {"A": 1}, "must be a string"),
    ("env.A", {"A": None}, "must be a string"),
    ("env.A", {"A": "\0"}, "NUL"),
    ("stdin", 5, "must be a string"),
    ("stdin", "\ud800", "lone surrogate"),
    ("outputs", "*.png", "list"),
    ("outputs", [1], "must be a string"),
    ("outputs", ["/etc/*"], "absolute"),
    ("outputs", ["../*"], "'..'"),
    ("outputs", [""], "empty"),
    ("outputs", ["x"] * (OUTPUT_PATTERNS + 1), f"at most {OUTPUT_PATTERNS}"),
    ("outputs", ["x/" * 200] * 100, "bytes in all"),
    ("timeout", 0, "1 to 3600"),
    ("timeout", 0.999, "1 to 3600"),
    ("timeout", 3600.5, "1 to 3600"),
    ("timeout", -1, "1 to 3600"),
    ("timeout", True, "a number from 1 to 3600"),
    ("timeout", "5", "a number from 1 to 3600"),
    ("timeout", [5], "a number from 1 to 3600"),
    ("memory_mb", 63, "64 to 2048"),
    ("memory_mb", 2049, "64 to 2048"),
    ("memory_mb", 64.0, "an integer from 64 to 2048"),
    ("memory_mb", True, "an integer"),
    ("memory_mb", "512", "an integer"),
    ("cpu_seconds", 0, "0.1 to 3600"),
    ("cpu_seconds", 0.09, "0.1 to 3600"),
    ("cpu_seconds", 3601, "0.1 to 3600"),
    ("cpu_seconds", False, "a number"),
    ("processes", 0, "1 to 100"),
    ("processes", 101, "1 to 100"),
    ("processes", 1.5, "an integer"),
    ("environment", {"A": "1"}, "environment names a package set; variables go in env"),
    ("environment", "../x", "must be the name"),
    ("environment", "", "must be the name"),
    ("environment", "a\n", "must be the name"),
    ("environment", 1, "must be the name"),
    ("fresh_interpreter", 1, "true or false"),
    ("fresh_interpreter", "true", "true or false"),
    ("Entrypoint", "x", "is not a field"),
    ("timeout_seconds", 5, "is not a field"),
    ("__proto__", {}, "is not a field"),
    ("evil\x1b[2J", 1, "is not a field"),
]


@pytest.mark.parametrize(("field", "value", "reason"), REFUSED)
def test_bad_value_is_refused_by_field_and_range(field: str, value: Any, reason: str):
    fields = {"entrypoint": "main.py", field.partition(".")[0]: value}
    error = refusal(json.dumps(fields).encode())
    assert error.field == show(field)
    assert reason in error.details


def test_all_strings_together_are_bounded():
    """Only a `/run` is large enough to meet this one."""
    fields = {"entrypoint": "a.py", "args": ["x" * 100_000] * 8, "env": {"A": "x" * 100_000, "B": "x" * 100_000}}
    assert len(manifest_from(fields, HIGHEST).args) == 8
    with pytest.raises(InvalidInput, match=f"together; accepted: at most {STRINGS_BYTES}"):
        manifest_from({**fields, "args": ["x" * 100_000] * 9}, HIGHEST)


def test_globs_together_are_bounded():
    """Each is compiled for the job."""
    patterns = ["x" * 250] * 60
    assert len(manifest_from({"entrypoint": "a.py", "outputs": patterns}, HIGHEST).outputs or ()) == 60
    with pytest.raises(InvalidInput, match="outputs"):
        manifest_from({"entrypoint": "a.py", "outputs": [*patterns, *patterns]}, HIGHEST)


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("timeout", 1, 3600), ("memory_mb", 64, 2048), ("cpu_seconds", 0.1, 3600), ("processes", 1, 100)],
)
def test_both_ends_of_a_range_are_accepted(field: str, low: float, high: float):
    assert getattr(parse(HIGHEST, **{field: low}), field) == low
    assert getattr(parse(HIGHEST, **{field: high}), field) == high


@pytest.mark.parametrize(("field", "value", "told"), [("timeout", 600, "1 to 300"), ("memory_mb", 1024, "64 to 512")])
def test_what_the_schema_allows_and_the_server_does_not_is_told_the_ceiling(field: str, value: int, told: str):
    error = refusal(json.dumps({"entrypoint": "a.py", field: value}).encode(), Ceilings())
    assert error.field == field
    assert str(value) in error.details
    assert "ceiling" in error.details
    assert told in error.details


def test_defaults_bend_to_lower_ceilings():
    manifest = parse(Ceilings(timeout=10, memory_mb=128, processes=5))
    assert (manifest.timeout, manifest.memory_mb, manifest.processes) == (10, 128, 5)


@pytest.mark.parametrize("text", [b"[]", b'"main.py"', b"null", b"5", b"true"])
def test_manifest_that_is_no_object_is_refused(text: bytes):
    assert refusal(text).field == "manifest"


def test_manifest_above_a_megabyte_is_refused_unparsed():
    assert "1048576" in refusal(b"[" * (MANIFEST_BYTES + 1)).details
    assert parse_manifest(b'{"entrypoint": "a.py"}'.ljust(MANIFEST_BYTES), HIGHEST)


# ---- strict JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 1,}', "is not JSON"),
        (b"[1 2]", "is not JSON"),
        (b"// comment\n{}", "is not JSON"),
        (b'"a\nb"', "is not JSON"),
        (b'"\\x41"', "is not JSON"),
        (b'"open', "is not JSON"),
        (b'"\\', "is not JSON"),
        (b"[" * MANIFEST_DEPTH, "is not JSON"),
        (b"]" * 30, "is not JSON"),
        (b"[}", "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"NaN", "NaN is not a finite number"),
        (b'{"a": Infinity}', "not a finite number"),
        (b"[-Infinity]", "not a finite number"),
        (b"1e999", "not a finite number"),
        (b"-1e999", "not a finite number"),
        (b"1" * 21, "more than 20 digits"),
        (b"1" * 100_000, "more than 20 digits"),
        (b"[" * 21 + b"]" * 21, "nested deeper than 20"),
        (b'{"a":' * 21 + b"1" + b"}" * 21, "nested deeper than 20"),
        (b"[" * 100_000, "more than"),
        (b'["[", ' + b"[" * 20, "nested deeper than 20"),
        (b'["\\"[", ' + b"[" * 20, "nested deeper than 20"),
        (b'["\\\\", ' + b"[" * 20, "nested deeper than 20"),
        (b"[" + b"1," * VALUES + b"1]", "more than"),
        (b"[" + b'"",' * (VALUES + 1) + b"1]", "more than"),
    ],
)
def test_what_is_not_strict_json_is_refused(text: bytes, reason: str):
    with pytest.raises(InvalidInput) as caught:
        parse_json(text, what="body")
    assert caught.value.field == "body"
    assert reason in caught.value.details
    assert len(caught.value.details) < 200


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 20 + b"]" * 20,
        b'"' + b"[" * 100 + b'"',
        b'"\\"' + b"[" * 100 + b'"',
        b'"\\\\\\"' + b"{" * 100 + b'"',
        b'["\\\\", "' + b"[" * 100 + b'"]',
        b'"\\u005b\\ud83d\\ude00"',
        b"[" + b"1," * 9000 + b"1]",
        b"-0.0",
        b"1e300",
    ],
)
def test_what_only_looks_too_deep_or_too_much_is_read(text: bytes):
    assert parse_json(text, what="body") == json.loads(text)


@pytest.mark.parametrize("text", [b'{"a": 1, "a": 1}', b'{"b": [{"a": 1, "a": 2}]}', b'{"a": 1, "\\u0061": 2}'])
def test_key_that_stands_twice_is_refused_by_name(text: bytes):
    with pytest.raises(InvalidInput) as caught:
        parse_json(text, what="body")
    assert (caught.value.field, caught.value.details) == ("a", "the key stands twice")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@settings(max_examples=200, deadline=None)
@given(JSON, st.booleans(), st.integers(0, 4))
def test_depth_is_measured_exactly(value: Any, ascii_only: bool, bound: int):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    found = attempt(lambda: parse_json(text, what="x", depth=bound))
    if isinstance(found, InvalidInput):
        assert depth_of(value) > bound
    else:
        assert found == value
        assert depth_of(value) <= bound


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text('[]{}",:\\ 01eE+-.tfn', max_size=60).map(str.encode))
def test_any_bytes_are_what_json_says_or_refused(text: bytes):
    value = attempt(lambda: parse_json(text, what="x"))
    if not isinstance(value, InvalidInput):
        assert value == json.loads(text)
        assert not isinstance(value, float) or math.isfinite(value)


@settings(max_examples=120, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(Manifest)]) | st.text(max_size=5), JSON
    ),
    st.booleans(),
)
def test_any_object_is_a_manifest_within_bounds_or_refused(fields: dict[str, Any], with_entrypoint: bool):
    if with_entrypoint:
        fields["entrypoint"] = "main.py"
    manifest = attempt(lambda: parse_manifest(json.dumps(fields).encode(), Ceilings()))
    if isinstance(manifest, InvalidInput):
        return
    assert 1 <= manifest.timeout <= 300
    assert 64 <= manifest.memory_mb <= 512
    assert not manifest.entrypoint.startswith(("-", "/"))


@pytest.mark.parametrize(
    "text",
    [
        b"[" * RUN_BODY_BYTES,
        b"[" + b"[]," * (RUN_BODY_BYTES // 3),
        b'"' + b'\\"' * (RUN_BODY_BYTES // 2),
        b'"' + b"\\\\" * (RUN_BODY_BYTES // 2) + b'"',
        b'"\\"' * (RUN_BODY_BYTES // 3),
        b"{" + b'"":0,' * (RUN_BODY_BYTES // 5),
        b"1" * RUN_BODY_BYTES,
        b"0." + b"1" * RUN_BODY_BYTES,
    ],
    ids=["open", "pairs", "quotes", "backslashes", "unclosed", "keys", "digits", "fraction"],
)
def test_no_body_of_16_megabytes_takes_long(text: bytes):
    start = time.process_time()
    attempt(lambda: parse_json(text, what="body"))
    assert time.process_time() - start < 2  # a tenth of it, in truth


# ---- paths and messages ------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | st.lists(st.sampled_from(["a", "..", ".", "", "a..b", "-"]), max_size=6).map("/".join))
def test_any_path_that_passes_stays_inside_in_normal_form(text: str):
    path = attempt(lambda: check_path(text, "x"))
    if isinstance(path, InvalidInput):
        return
    parts = path.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert check_path(path, "x") == path
    assert path.isprintable() or not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in path)


@pytest.mark.parametrize("path", ["a..b", "..a", "a..", "...", " ", "-x", "a b/ç/😀", "caf\udce9"])
def test_only_a_whole_component_of_two_dots_climbs(path: str):
    assert check_path(path, "x") == path


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("a\nb\x1b[2J\x7f", "a\\x0ab\\x1b[2J\\x7f"),
        ("\u202e", "\\u202e"),
        ("x" * 100, "x" * 79 + "…"),
        ("x" * (20 * MIB), "x" * 79 + "…"),
        (1.5, "1.5"),
        (True, "true"),
        (None, "null"),
        ([["x"] * 1000], "a list"),
        ({"a": "x"}, "an object"),
    ],
)
def test_values_are_shown_on_one_short_line(value: object, shown: str):
    assert show(value) == shown
