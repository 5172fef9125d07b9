"""docs/api.md against a real server: each command of its console blocks is run, and answers as the document says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"
PLACE = "http://127.0.0.1:8443"


def blocks(text: str) -> list[tuple[str, str]]:
    """(command, what it answers) of all console blocks. `$ ` begins a command, `> ` goes on with it."""
    found: list[tuple[list[str], list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(([line[2:]], []))
            elif line.startswith("> ") and not found[-1][1]:
                found[-1][0].append(line[2:])
            else:
                found[-1][1].append(line)
    return [("\n".join(command), "\n".join(answer)) for command, answer in found]


def pattern(answer: str) -> re.Pattern[str]:
    """`…` is anything; JSON ends its answer with or without a line break."""
    return re.compile(".*".join(map(re.escape, answer.rstrip("\n").split("…"))), re.DOTALL)


@pytest.mark.needs("curl", "bash")
def test_every_command_of_the_document_answers_as_it_says(server: str, tmp_path: Path) -> None:
    commands = blocks(DOCUMENT.read_text().replace(PLACE, server))
    assert len(commands) > 25
    mark = "\x01"
    script = "".join(f"{command}\nprintf '{mark}'\n" for command, _ in commands)
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    answers = ran.stdout.split(mark)
    assert len(answers) == len(commands) + 1, ran.stderr
    for (command, expected), answer in zip(commands, answers, strict=False):
        got = answer.replace("\r", "").rstrip("\n")
        assert pattern(expected).fullmatch(got), f"$ {command}\n{got}\n--- expected\n{expected}"
