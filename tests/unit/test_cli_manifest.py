"""Flags, job.json and arguments become one manifest; what is the job's is not taken for ours."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from sandrun.cli import manifest, run, submit
from sandrun.cli.main import Parser
from sandrun.errors import InvalidInput


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser(prog="sandrun run", allow_abbrev=False)
    parser.usage_code = run.FAILED
    run.add_arguments(parser)
    return run.parse(parser, words)


@pytest.mark.parametrize(
    ("words", "source", "rest"),
    [
        (["f.py"], "f.py", []),
        (["f.py", "a", "b"], "f.py", ["a", "b"]),
        (["f.py", "--timeout", "3", "a", "--timeout", "4"], "f.py", ["a", "--timeout", "4"]),
        (["--timeout", "3", "f.py", "--verbose", "--json"], "f.py", ["--verbose", "--json"]),
        (["--timeout=3", "f.py", "--json", "--", "--json", "--"], "f.py", ["--json", "--"]),
        (["--timeout", "3", "--", "-f.py", "--json"], "-f.py", []),
        (["f.py", "--timeout", "3", "--help-me"], "f.py", ["--help-me"]),
        (["f.py", "--timeout", "3", "-x"], "f.py", ["-x"]),
        (["f.py", "--timeout", "3", ""], "f.py", [""]),
    ],
)
def test_the_jobs_arguments_are_not_ours(words: list[str], source: str, rest: list[str]) -> None:
    args = parsed(*words)
    assert (args.source, args.words) == (source, rest)
    if "3" in " ".join(words):
        assert args.timeout == 3


def test_an_option_before_the_file_must_be_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed("--verbose", "f.py")
    assert end.value.code == 125
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err


def test_submit_takes_arguments_after_two_dashes() -> None:
    parser = Parser(prog="sandrun submit", allow_abbrev=False)
    submit.add_arguments(parser)
    args = parser.parse_intermixed_args(["dir", "--entrypoint", "a", "--", "--verbose", "b"])
    assert (args.source, args.entrypoint, args.words) == ("dir", "a", ["--verbose", "b"])


def test_flags_become_fields(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("données")
    args = parsed(
        *("f.py", "--entrypoint", "e", "--interpreter", "bash", "--env", "A=1=2", "--env", "B="),
        *("--stdin", str(tmp_path / "in"), "--output", "*.png", "--output", "data/", "--timeout", "2.5"),
        *(
            "--memory-mb",
            "64",
            "--cpu-seconds",
            "1",
            "--processes",
            "3",
            "--environment",
            "data",
            "--fresh-interpreter",
        ),
        *("x", "y"),
    )
    assert manifest.fields(args, args.words) == {
        "entrypoint": "e",
        "interpreter": "bash",
        "args": ["x", "y"],
        "env": {"A": "1=2", "B": ""},
        "stdin": "données",
        "outputs": ["*.png", "data/"],
        "timeout": 2.5,
        "memory_mb": 64,
        "cpu_seconds": 1.0,
        "processes": 3,
        "environment": "data",
        "fresh_interpreter": True,
    }
    assert manifest.fields(parsed("f.py"), []) == {}


def test_flags_go_over_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"entrypoint": "a", "timeout": 1}))
    (tmp_path / "other.json").write_text(json.dumps({"entrypoint": "b"}))
    source = str(tmp_path)
    assert manifest.collect(parsed(source, "--timeout", "2"), source, []) == {"entrypoint": "a", "timeout": 2.0}
    other = parsed(source, "--manifest", f"{source}/other.json")
    assert manifest.collect(other, source, ["x"]) == {"entrypoint": "b", "args": ["x"]}


@pytest.mark.parametrize("text", ["[]", "{", '{"a":1,"a":2}', '{"a":NaN}', '{"a":1e999}', "\xff"])
def test_a_manifest_that_is_none_is_refused_by_file_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput):
        manifest.read_file(str(path))
    with open(path, "wb") as stream:
        stream.truncate(1 << 21)
    with pytest.raises(InvalidInput, match=r"job\.json.*larger"):
        manifest.read_file(str(path))


def test_input_that_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_bytes(b"ok\xff")
    with pytest.raises(InvalidInput, match="byte 2"):
        manifest.fields(parsed("f", "--stdin", str(tmp_path / "in")), [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert manifest.fields(parsed("f", "--stdin", "-"), [])["stdin"] == "piped"
    with pytest.raises(InvalidInput, match="JSON"):
        manifest.encode(manifest.fields(parsed("f", "--", "\udcff"), ["\udcff"]))


def names(archive: bytes) -> list[tuple[str, int]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(member.name, member.mode) for member in tar]


def test_a_single_file_is_the_entrypoint(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    given: dict[str, object] = {}
    assert names(manifest.load_source(str(tool), given)) == [("tool", 0o755)]
    assert given == {"entrypoint": "tool"}


def test_an_archive_goes_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(b"any bytes: the server is the judge")
    given: dict[str, object] = {}
    assert manifest.load_source(str(path), given) == path.read_bytes()
    assert given == {}


def test_a_directory_needs_an_entrypoint(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    with pytest.raises(InvalidInput, match=r"--entrypoint PATH names it, or .*/job\.json"):
        manifest.load_source(str(tmp_path), {})
    assert names(manifest.load_source(str(tmp_path), {"entrypoint": "a.py"})) == [("a.py", 0o644)]
