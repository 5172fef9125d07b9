"""`sandrun` itself: finding commands, exit codes, one sentence on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandrun.cli import main as cli
from sandrun.cli import verdict
from sandrun.cli.main import COMMANDS, main, sentence
from sandrun.errors import InvalidInput, ServerError

SANDRUN = Path(sys.executable).parent / "sandrun"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SANDRUN_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SANDRUN_CONFIG", "/dev/null")
    monkeypatch.setenv("SANDRUN_URL", "http://127.0.0.1:9")  # discard: nobody listens


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and the sentence on stderr; stdout stays empty."""
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("sandrun: ")
    return code, lines[0]


def test_overview_names_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", list(COMMANDS))
def test_each_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: sandrun {command}" in text
    assert "examples:" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sandrun 0.")


def test_bare_flags_are_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from sandrun.cli import serve

    seen = []
    monkeypatch.setattr(serve, "run", lambda args: seen.append(args.key_port) or 7)
    assert main(["--port", "1234"]) == 7
    assert main(["serve", "--port", "1235"]) == 7
    assert seen == ["1234", "1235"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["stat"], 2, "did you mean status?"),
        (["\x1b[31mx"], 2, "\\x1b[31mx is no command"),
        (["config", "--prt", "1"], 2, "unrecognized arguments: --prt"),
        (["config", "--port", "99999"], 2, "port: 99999 (flag --port) is not accepted; accepted: 0 to 65535"),
        (["serve", "--max-timeout", "x"], 2, "max_timeout: x (flag --max-timeout)"),
        (["serve", "--config", "/does/not/exist"], 2, "/does/not/exist does not exist"),
        (["status"], 2, "JOB"),
        (["status", "--server", "ftp://x", "a"], 2, "is not the URL of a server"),
        (["status", "../../etc"], 1, "job_id: ../../etc is not the id of a job"),
        (["status", "abc"], 1, "http://127.0.0.1:9 does not answer: Connection refused"),
        (["logs", "-f", "abc"], 1, "does not answer"),
        (["submit", "/does/not/exist"], 1, "/does/not/exist: No such file or directory"),
        (["submit", "/dev/null"], 1, "neither a file nor a directory"),
        (["submit", "/etc/hostname", "--env", "X"], 1, "--env: X is not NAME=VALUE"),
        (["submit", "/etc/hostname", "--timeout", "soon"], 2, "soon is no number"),
        (["download", "abc", "--to", "-"], 1, "takes exactly one PATH"),
        (["environment"], 2, "build|list|remove"),
        (["environment", "build", "x", "--requirements", "/does/not/exist"], 1, "/does/not/exist"),
        (["environment", "remove", "x", "--state-dir", "/does/not/exist"], 1, "no environment x"),
        (["run", "/does/not/exist"], 125, "/does/not/exist: No such file or directory"),
        (["run", "--bogus", "x"], 125, "--bogus"),
        (["run"], 125, "FILE|DIR"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    from sandrun.client.requests import LogStream

    monkeypatch.setattr(LogStream, "RECONNECTS", 0)
    got, line = error_of(capsys, *words)
    assert got == code
    assert said in line


def test_a_servers_words_cannot_steer_the_terminal() -> None:
    problem: dict[str, object] = {"error": "invalid", "field": "timeout", "details": "a\x1b[2J\nb", "retry_after": 3}
    assert sentence(ServerError(400, problem)) == "timeout: a\\x1b[2J b (try again in 3 s)"
    assert sentence(InvalidInput("x", "y")) == "x: y"


def test_settings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--json", "--port", "1234"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["port"] == {"value": 1234, "origin": "flag --port"}
    assert values["max_timeout"] == {"value": 300.0, "origin": "default"}


def test_settings_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--table"]) == 0
    assert "| `max_memory_mb` | `--max-memory-mb` | MiB | 512 | 64 to 2048 MiB |" in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run(
            [SANDRUN, "config", "--table"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_start_imports_no_third_party_module() -> None:
    """`serve` forks the privileged process out of what is loaded when it is called."""
    code = (
        "import sys, types\n"
        "supervisor = types.ModuleType('sandrun.spawner.supervisor')\n"
        "def serve(config):\n"
        "    print('\\n'.join(sys.modules)); return 0\n"
        "supervisor.serve = serve\n"
        "sys.modules['sandrun.spawner.supervisor'] = supervisor\n"
        "from sandrun.cli.main import main\n"
        "main(['--port', '0'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"SANDRUN_CONFIG": "/dev/null"}
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "sandrun" in loaded
    foreign = {n for n in loaded - set(sys.stdlib_module_names) if not n.startswith(("_", "site"))}
    assert foreign == {"sandrun"}


def test_run_forks_before_it_imports_a_third_party_module(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"entrypoint": "a.py", "environment": "data"}')
    (tmp_path / "a.py").touch()
    code = (
        "import sys\n"
        "import sandrun.cli.run\n"
        "from sandrun.cli.main import main\n"
        "def spawner(config, environment, interpreter):\n"
        "    print('\\n'.join(sys.modules), 'environment-' + environment); sys.exit()\n"
        "sandrun.cli.run.spawner = spawner\n"
        "main(['run', sys.argv[1]])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    foreign = {n for n in loaded - set(sys.stdlib_module_names) if not n.startswith(("_", "site"))}
    assert foreign == {"sandrun", "environment-data"}


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from sandrun.cli import config

    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "run", interrupted)
    assert cli.main(["config"]) == 130


# ---- verdicts ----------------------------------------------------------------------------------------------


def result(**fields: object) -> dict[str, object]:
    base: dict[str, object] = {
        "status": "failed",
        "outcome": None,
        "exit_code": None,
        "signal": None,
        "position": None,
        "limits_hit": [],
        "truncated": {"stdout": 0, "stderr": 0},
        "output_files": [],
        "execution_metadata": {},
    }
    return base | fields


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"outcome": "exited", "exit_code": 0, "status": "completed"}, 0, "exited with 0"),
        ({"outcome": "exited", "exit_code": 3}, 3, "exited with 3"),
        ({"outcome": "signaled", "signal": 11}, 139, "ended by SIGSEGV"),
        ({"outcome": "signaled", "signal": 63}, 191, "ended by signal 63"),
        ({"outcome": "timeout", "signal": 9}, 124, "time limit"),
        ({"outcome": "memory_limit", "signal": 9}, 137, "memory limit"),
        ({"outcome": "cpu_limit"}, 125, "CPU limit"),
        ({"outcome": "cancelled"}, 125, "cancelled"),
        ({"outcome": "worker_lost"}, 125, "lost"),
        (
            {"outcome": "setup_failed", "failure": {"step": "pivot_root", "errno": 1, "details": "no\x1b"}},
            125,
            "pivot_root: no\\x1b",
        ),
    ],
)
def test_exit_code_and_words_of_each_outcome(fields: dict[str, object], code: int, words: str) -> None:
    assert verdict.exit_code(result(**fields)) == code
    assert words in verdict.describe(result(**fields))


def test_summary_tells_usage_and_losses() -> None:
    text = verdict.summary(
        result(
            outcome="exited",
            exit_code=0,
            limits_hit=["output"],
            truncated={"stdout": 5, "stderr": 0},
            output_files=[{}, {}],
            execution_metadata={
                "wall_seconds": 1.234,
                "cpu_seconds": None,
                "memory_peak_bytes": 3 << 20,
                "processes_peak": 2,
            },
        )
    )
    assert text == (
        "exited with 0; ran into its limit of output; 1.23 s wall, 3.0 MiB memory, 2 processes; 2 outputs; "
        "5 bytes of stdout not kept"
    )


def test_a_queued_job_has_a_place() -> None:
    assert verdict.describe(result(status="queued", position=4)) == "queued, place 4"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert verdict.size(count) == text
