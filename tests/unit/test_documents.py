"""The documents say what is so: tables and figures are those that the commands print, and names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sandrun import config
from sandrun.linux.libc import MACHINE
from sandrun.sandbox import policy

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_table_of_settings_is_what_the_command_prints() -> None:
    written = (ROOT / "docs/operating.md").read_text()
    shown = written.partition("<!-- sandrun config --table -->\n")[2].partition("<!-- end -->")[0]
    lines: list[str] = []
    config.table(lines.append)
    assert shown == "".join(lines)


@pytest.mark.requirement(5)
@pytest.mark.skipif(MACHINE != "x86_64", reason="the counts are those of x86-64")
def test_counts_of_system_calls_are_those_of_the_policy() -> None:
    core = len({rule.name for rule in policy.CORE if rule.errno == 0})
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{core} in the core of the filter, {policy.job_policy().count} with the groups" in readme


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, punctuation dropped, blanks to hyphens."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """`spawner/box.py` is below src/sandrun, `tests/claims.py` below the top; what comes later is marked so."""
    later = document.read_text().partition("## Where later things will go")[2]
    for name in re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|md|toml|txt))[`:]", document.read_text()):
        if name.startswith("/") or f"`{name}`" in later or f"`{name}:" in later:
            continue
        assert any((base / name).exists() for base in (ROOT, ROOT / "src/sandrun", document.parent)), name


def test_words_of_the_command_line_are_in_the_readme() -> None:
    from sandrun.cli.main import COMMANDS

    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", readme)] == []
