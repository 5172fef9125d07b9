"""The command line as a person uses it: against a real server, and `run` without one."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serving import SANDRUN, Api, default_flags

HELLO = "import sys; print('hello', *sys.argv[1:]); print('warning', file=sys.stderr)\n"


def sandrun(*words: str, url: str = "", timeout: float = 90, **options: Any) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SANDRUN_")}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [SANDRUN, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**clean, "SANDRUN_URL": url, "SANDRUN_CONFIG": "/dev/null"},
        **options,
    )
    return done


def ok(*words: str, url: str = "", **options: Any) -> str:
    done = sandrun(*words, url=url, **options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A directory with a manifest, as a person would have it."""
    source = tmp_path / "report"
    source.mkdir()
    (source / "job.json").write_text(json.dumps({"entrypoint": "main.py", "args": ["a"], "outputs": ["*.txt"]}))
    (source / "main.py").write_text(HELLO + "open('summary.txt', 'w').write('done')\nopen('other', 'w')\n")
    return source


# ---- with a server -----------------------------------------------------------------------------------------


def test_a_job_from_submit_to_erasure(api: Api, server: str, report: Path, tmp_path: Path) -> None:
    job = ok("submit", str(report), url=server).strip()
    assert len(job) == 32
    assert "exited with 0" in ok("status", "--wait", job, url=server)
    logs = sandrun("logs", job, url=server)
    assert (logs.stdout, logs.stderr) == ("hello a\n", "warning\n")
    followed = sandrun("logs", "-f", job, url=server)
    assert followed.stdout == "hello a\n"
    assert "warning\n" in followed.stderr
    assert "exited with 0" in followed.stderr
    assert ok("outputs", job, url=server).split()[::2] == ["4", "summary.txt"]
    out = tmp_path / "out"
    assert ok("download", job, "--to", str(out), url=server) == f"{out}/summary.txt\n"
    assert (out / "summary.txt").read_text() == "done"
    again = sandrun("download", job, "--to", str(out), url=server)
    assert (again.returncode, again.stderr) == (1, f"sandrun: {out}/summary.txt: File exists\n")
    ok("download", job, "--to", str(out), "--overwrite", "summary.txt", url=server)
    assert ok("download", job, "summary.txt", "--to", "-", url=server) == "done"
    ok("cancel", "--erase", job, url=server)
    gone = sandrun("status", job, url=server)
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1


def test_flags_and_arguments_reach_the_job(api: Api, server: str, report: Path) -> None:
    job = ok("submit", str(report), "--timeout", "20", "--env", "X=1", "--", "-v", "b", url=server).strip()
    ok("status", "--wait", job, url=server)
    assert sandrun("logs", job, url=server).stdout == "hello -v b\n"


def test_machines_get_json(api: Api, server: str, report: Path) -> None:
    job = json.loads(ok("submit", "--json", str(report), url=server))["job_id"]
    result = json.loads(ok("status", "--wait", "--json", job, url=server))
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert json.loads(ok("logs", "--json", job, url=server)) == {"stdout": "hello a\n", "stderr": "warning\n"}
    lines = [json.loads(line) for line in ok("logs", "-f", "--json", job, url=server).splitlines()]
    assert lines[-1] == {"event": "end", "status": "completed", "outcome": "exited", "exit_code": 0}
    assert [file["path"] for file in json.loads(ok("outputs", "--json", job, url=server))["files"]] == ["summary.txt"]


def test_a_refusal_is_one_sentence_that_names_field_and_range(api: Api, server: str, report: Path) -> None:
    done = sandrun("submit", str(report), "--timeout", "9999", url=server)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "timeout" in done.stderr
    assert "9999" in done.stderr


def test_a_running_job_is_cancelled(api: Api, server: str, tmp_path: Path) -> None:
    (tmp_path / "sleep.sh").write_text("echo begun; sleep 60\n")
    job = ok("submit", str(tmp_path / "sleep.sh"), url=server).strip()
    while "begun" not in ok("logs", job, url=server):
        time.sleep(0.05)
    ok("cancel", job, url=server)
    assert "was cancelled" in ok("status", "--wait", job, url=server)


@pytest.mark.requirement(33)
def test_job_cannot_send_escapes_to_the_terminal_of_a_reader(api: Api, server: str, tmp_path: Path) -> None:
    code = "print('\\x1b]0;owned\\x07\\x1b[2J', end='', flush=True); open('\\x1b[31m.txt', 'w')"
    (tmp_path / "evil.py").write_text(code)
    job = ok("submit", str(tmp_path / "evil.py"), url=server).strip()
    ok("status", "--wait", job, url=server)
    assert ok("logs", job, url=server) == "\x1b]0;owned\x07\x1b[2J"  # a pipe gets exact bytes
    for words in (["logs", job], ["logs", "-f", job], ["outputs", job], ["status", job], ["status", "--json", job]):
        assert "\x1b" not in on_terminal(*words, url=server).replace("\x1b[?25h", "").replace("\x1b[?25l", "")


def on_terminal(*words: str, url: str) -> str:
    """What a terminal would get from this command."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(SANDRUN, [str(SANDRUN), *words], {**os.environ, "SANDRUN_URL": url, "TERM": "dumb"})
    shown = b""
    try:
        while select.select([terminal], [], [], 60)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not data:
                break
            shown += data
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    assert shown or words[0] == "outputs"
    return shown.decode(errors="replace")


# ---- without a server --------------------------------------------------------------------------------------


def local(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return sandrun("run", *default_flags(), *words, **options)


def program(tmp_path: Path, text: str, name: str = "main.py") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_run_gives_the_jobs_output_and_code(tmp_path: Path) -> None:
    done = local(program(tmp_path, HELLO + "sys.exit(7)"), "x", "--timeout", "y")
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello x --timeout y\n", "warning\n")


@pytest.mark.parametrize(
    ("text", "flags", "code", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", [], 139, "SIGSEGV"),
        ("while True: pass", ["--timeout", "1"], 124, "time limit"),
        pytest.param(
            "while True: pass", ["--cpu-seconds", "0.5", "--timeout", "30"], 125, "CPU limit", marks=pytest.mark.root
        ),
        ("import x_does_not_exist", [], 1, "ModuleNotFoundError"),
    ],
)
def test_run_exits_as_the_verdict_says(tmp_path: Path, text: str, flags: list[str], code: int, words: str) -> None:
    done = local(*flags, program(tmp_path, text))
    assert done.returncode == code, done.stderr
    assert words in done.stderr


@pytest.mark.root
@pytest.mark.requirement(18)
def test_run_out_of_memory_is_137(tmp_path: Path) -> None:
    done = local("--memory-mb", "64", program(tmp_path, "x = []\nwhile True: x.append(bytearray(1 << 20))"))
    assert done.returncode == 137, done.stderr
    assert "memory limit" in done.stderr


def test_run_saves_outputs_and_refuses_to_replace_them(tmp_path: Path) -> None:
    path = program(tmp_path, "open('made.txt', 'w').write('x')")
    out = tmp_path / "out"
    assert local(path, "--outputs", str(out)).returncode == 0
    assert (out / "made.txt").read_text() == "x"
    again = local(path, "--outputs", str(out))
    assert (again.returncode, again.stderr) == (125, f"sandrun: {out}/made.txt: File exists\n")
    assert local(path, "--outputs", str(out), "--overwrite").returncode == 0


def test_run_without_outputs_saves_nothing(tmp_path: Path) -> None:
    path = program(tmp_path, "open('made.txt', 'w').write('x')")
    done = local(path, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["main.py"]


def test_run_takes_a_directory_and_input(report: Path, tmp_path: Path) -> None:
    (report / "cat.sh").write_text("cat; ls\n")
    done = local(str(report), "--entrypoint", "cat.sh", "--stdin", "-", input="piped\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["piped", "cat.sh", "job.json", "main.py"]


def test_run_as_json(tmp_path: Path) -> None:
    done = local("--json", program(tmp_path, HELLO))
    result = json.loads(done.stdout)
    assert (result["stdout"], result["stderr"], result["outcome"]) == ("hello\n", "warning\n", "exited")
    assert result["isolation"]


def test_run_refuses_with_125(tmp_path: Path) -> None:
    for words in (["--memory-mb", "63"], ["--environment", "none"], ["--interpreter", "cobol"], ["--env", "1=2"]):
        done = local(*words, program(tmp_path, HELLO))
        assert done.returncode == 125, done
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_stops_the_job_and_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    path = program(tmp_path, "import time\nprint('begun', flush=True)\ntime.sleep(60)")
    with subprocess.Popen(
        [SANDRUN, "run", *default_flags(), path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.send_signal(number)
        process.wait(30)
        assert process.returncode == code
        assert not any(Path(f"/proc/{child}").exists() for child in children)


# ---- about the host ----------------------------------------------------------------------------------------


def test_check_builds_a_sandbox() -> None:
    done = sandrun("check", "--json", *default_flags())
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert found["ok"]
    assert {"user", "seccomp", "memory", "sandbox"} <= {finding["name"] for finding in found["findings"]}


def test_policy_prints_each_call_with_its_reason() -> None:
    text = ok("policy")
    table = json.loads(ok("policy", "--json"))
    assert f"{table['count']} system calls are allowed" in text
    assert sum(table["groups"].values()) == table["count"]
    assert all(row["why"] for row in table["rows"])
    assert table["digest"] in text
