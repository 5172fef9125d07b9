"""What `/run` takes, and by which name it refuses the rest (requirement 29)."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandrun.errors import InvalidInput, TooLarge
from sandrun.jobs.request import RunRequest, entry_name, parse_run, run_request_from
from sandrun.model import CODE_BYTES, INTERPRETERS, RUN_BODY_BYTES, STDIN_BYTES, Ceilings

pytestmark = pytest.mark.requirement(29)


def parse(**fields: Any) -> RunRequest:
    return parse_run(json.dumps(fields).encode(), Ceilings())


def test_code_alone_is_a_python_job_of_30_seconds_without_outputs():
    request = parse(code="print(1)")
    assert request.files == {"main.py": b"print(1)"}
    manifest = request.manifest
    assert (manifest.entrypoint, manifest.interpreter, manifest.timeout) == ("main.py", "python3", 30.0)
    assert (manifest.stdin, manifest.outputs, request.keep) == (b"", (), False)


def test_every_field_arrives():
    request = parse(
        code="cat",
        interpreter="bash",
        files={"data/in.csv": "a,b", "raw": {"base64": base64.b64encode(b"\0\xff").decode()}},
        stdin={"base64": "AAE="},
        args=["x"],
        env={"A": "1"},
        outputs=["*.png"],
        timeout=5,
        memory_mb=128,
        cpu_seconds=2.5,
        processes=7,
        environment="data",
        fresh_interpreter=True,
        keep=True,
    )
    assert request.files == {"main.sh": b"cat", "data/in.csv": b"a,b", "raw": b"\0\xff"}
    manifest = request.manifest
    assert (manifest.stdin, manifest.args, dict(manifest.env)) == (b"\0\1", ("x",), {"A": "1"})
    assert (manifest.outputs, manifest.timeout, manifest.memory_mb) == (("*.png",), 5.0, 128)
    assert (manifest.cpu_seconds, manifest.processes, manifest.environment) == (2.5, 7, "data")
    assert manifest.fresh_interpreter
    assert request.keep
    assert request.size == 3 + 3 + 2 + 2


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_entry_file_has_the_extension_of_its_interpreter(interpreter: str):
    expected = {
        "python3": "main.py",
        "bash": "main.sh",
        "sh": "main.sh",
        "node": "main.js",
        "perl": "main.pl",
        "ruby": "main.rb",
        "php": "main.php",
        "Rscript": "main.R",
        "lua": "main.lua",
        "executable": "main",
    }
    assert entry_name(interpreter) == expected[interpreter]
    assert parse(code="", interpreter=interpreter).manifest.interpreter == interpreter


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("code", {}),
        ("code", {"code": 1}),
        ("code", {"code": None}),
        ("code", {"code": "\ud800"}),
        ("code", {"code": "x" * (CODE_BYTES + 1)}),
        ("entrypoint", {"code": "", "entrypoint": "main.py"}),
        ("language", {"code": "", "language": "python"}),
        ("interpreter", {"code": "", "interpreter": "cobol"}),
        ("interpreter", {"code": "", "interpreter": ["python3"]}),
        ("keep", {"code": "", "keep": 1}),
        ("files", {"code": "", "files": ["a"]}),
        ("files", {"code": "", "files": {str(n): "" for n in range(1000)}}),
        ("files", {"code": "", "files": {"../a": ""}}),
        ("files", {"code": "", "files": {"/a": ""}}),
        ("files", {"code": "", "files": {"a\0": ""}}),
        ("files", {"code": "", "files": {"": ""}}),
        ("files", {"code": "", "files": {"\ud800": ""}}),
        ("files", {"code": "", "files": {"a/b": "", "a//b": ""}}),
        ("files", {"code": "", "files": {"./main.py": ""}}),
        ("files.a", {"code": "", "files": {"a": 1}}),
        ("files.a", {"code": "", "files": {"a": {}}}),
        ("files.a", {"code": "", "files": {"a": {"base64": "QQ==", "mode": 1}}}),
        ("files.a", {"code": "", "files": {"a": {"base64": "Q"}}}),
        ("files.a", {"code": "", "files": {"a": {"base64": "Q Q ="}}}),
        ("files.a", {"code": "", "files": {"a": {"base64": "é"}}}),
        ("files.a", {"code": "", "files": {"a": {"base64": None}}}),
        ("stdin", {"code": "", "stdin": 5}),
        ("stdin", {"code": "", "stdin": {"text": "x"}}),
        ("stdin", {"code": "", "stdin": "\udfff"}),
        ("timeout", {"code": "", "timeout": 0}),
        ("timeout", {"code": "", "timeout": True}),
        ("timeout", {"code": "", "timeout": 301}),
        ("memory_mb", {"code": "", "memory_mb": 64.5}),
        ("env", {"code": "", "env": {"A=B": ""}}),
        ("environment", {"code": "", "environment": {"A": "1"}}),
        ("args", {"code": "", "args": "x"}),
        ("outputs", {"code": "", "outputs": ["../*"]}),
    ],
)
def test_what_is_wrong_is_refused_by_the_name_of_its_field(field: str, fields: dict[str, Any]):
    with pytest.raises(InvalidInput) as refused:
        parse(**fields)
    assert refused.value.field == field
    assert refused.value.details


@pytest.mark.parametrize(
    ("body", "details"),
    [
        (b"", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"code": "", "timeout": NaN}', "not a finite number"),
        (b'{"code": "", "timeout": 1e999}', "not a finite number"),
        (b'{"code": "\xff"}', "is not UTF-8"),
        (b'{"code": ' + b"[" * 21 + b"]" * 21 + b"}", "deeper than 20"),
    ],
)
def test_body_that_is_no_json_object_is_refused(body: bytes, details: str):
    with pytest.raises(InvalidInput, match=details):
        parse_run(body, Ceilings())


def test_key_that_stands_twice_is_refused():
    with pytest.raises(InvalidInput, match="code: the key stands twice"):
        parse_run(b'{"code": "a", "code": "b"}', Ceilings())


def test_body_above_16_mib_is_refused_unread():
    with pytest.raises(TooLarge) as refused:
        parse_run(b" " * (RUN_BODY_BYTES + 1), Ceilings())
    assert refused.value.limit_bytes == RUN_BODY_BYTES


def test_stdin_above_16_mib_is_refused():
    with pytest.raises(InvalidInput, match="stdin: has"):
        run_request_from({"code": "", "stdin": "x" * (STDIN_BYTES + 1)}, Ceilings())


def test_default_timeout_bows_to_the_servers_ceiling():
    assert parse_run(b'{"code": ""}', Ceilings(timeout=5)).manifest.timeout == 5


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
_fields = st.sampled_from(
    "code files stdin keep interpreter args env outputs timeout memory_mb cpu_seconds processes environment".split()
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_fields, _json, max_size=6), st.booleans())
def test_any_json_gives_a_request_or_a_refusal_with_a_field(value: dict[str, Any], with_code: bool):
    if with_code:
        value["code"] = "print(1)"
    refused: InvalidInput | None = None
    try:
        request = run_request_from(value, Ceilings())
    except InvalidInput as error:
        refused = error
    if refused is None:
        assert request.manifest.entrypoint in request.files
    else:
        assert refused.field
        assert refused.details.isprintable()
