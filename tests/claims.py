"""Holds docs/threat-model.md against the tree and against the last run of all tiers.

Its tables have the columns claim | enforced by | test. A claim carries the requirements it answers for, written R7 or
R20, R21; the other two columns name `path/file.py:name` in backticks, as often as needed, among words or alone.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiers  # noqa: E402

DOCUMENT = ROOT / "docs/threat-model.md"
IN_SCOPE = (*range(1, 15), *range(16, 25), *range(26, 34), 36, 38)
_NAMED = re.compile(r"`([\w./-]+\.[a-z]+):([\w.]+)`")


def rows(text: str) -> list[tuple[int, list[str]]]:
    """The rows of all tables whose head is claim | enforced by | test, with their line numbers."""
    found, inside = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        head = [cell.lower() for cell in cells]
        if len(head) == 3 and head[0].startswith("claim") and head[1] == "enforced by" and head[2].startswith("test"):
            inside = True
        elif inside and not set(line) <= set("|-: "):
            found.append((number, cells))
    return found


def verdicts() -> dict[tuple[str, str], set[str]]:
    """What became of each test function in each tier: (file, name) -> some of passed, failed, skipped."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in tiers.TIERS:
        report = tiers.RESULTS / f"{name}.xml"
        if not report.exists():
            continue
        for case in ET.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            verdict = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            function = case.get("name", "").partition("[")[0]
            found.setdefault((case.get("file", ""), function), set()).add(verdict)
    return found


def passed() -> dict[str, set[tuple[str, str]]]:
    """Of each tier the tests that passed: file, and name with parameters."""
    found: dict[str, set[tuple[str, str]]] = {}
    for name in tiers.TIERS:
        report = tiers.RESULTS / f"{name}.xml"
        cases = ET.parse(report).getroot().iter("testcase") if report.exists() else ()
        good = [case for case in cases if not {child.tag for child in case} & {"failure", "error", "skipped"}]
        found[name] = {(case.get("file", ""), case.get("name", "")) for case in good}
    return found


def missing(path: str, name: str) -> str:
    """What is wrong with `path:name`, or nothing."""
    file = ROOT / path
    if not file.is_file():
        return f"there is no file {path}"
    words = [re.escape(word) for word in name.split(".")]
    text = file.read_text(errors="replace")
    if not all(re.search(rf"(?<!\w){word}(?!\w)", text) for word in words):
        return f"{path} has no {name}"
    return ""


def ways(ran: dict[str, set[tuple[str, str]]]) -> tuple[list[str], int]:
    """Whether each probe of the escape tier ran in all ways in which a job can begin.

    In a parked sandbox (tier escape) and in a cold one (tier cold); and those that ask for it both in the warm
    interpreter and in one that was exec'ed. Not those that look at one of these ways alone.
    `ran`: of each tier the tests that passed, as file and name with parameters. Returns: problems, and how many probes.
    """
    parked, cold = (
        {(file, name) for file, name in ran.get(tier, ()) if file not in tiers.NOT_COLD} for tier in ("escape", "cold")
    )
    problems = [f"{file}::{name} passed in a parked sandbox alone" for file, name in sorted(parked - cold)]
    problems += [f"{file}::{name} passed in a cold sandbox alone" for file, name in sorted(cold - parked)]
    for file, name in sorted(parked):
        if (file, name.replace("in-place", "fresh-interpreter")) not in parked:
            problems.append(f"{file}::{name} passed in place alone")
    return problems, len(parked)


def check_run() -> list[str]:
    try:
        run = json.loads((tiers.RESULTS / "run.json").read_text())
    except FileNotFoundError:
        return ["no run to look at: ./scripts/test comes first"]
    problems = [f"tier {name} was not run" for name in tiers.TIERS if name not in run["tiers"]]
    problems += [f"tier {name} failed" for name, report in run["tiers"].items() if not report["good"]]
    if run["sources"] != tiers.fingerprint():
        problems.append("the sources have changed since the last ./scripts/test")
    return problems


def check_claims(text: str, outcomes: dict[tuple[str, str], set[str]]) -> tuple[list[str], int]:
    """Problems, and how many rows were read."""
    problems, covered = [], set()
    table = rows(text)
    for number, cells in table:
        where = f"{DOCUMENT.relative_to(ROOT)}:{number}"
        if len(cells) != 3:
            problems.append(f"{where}: {len(cells)} columns; a row is claim | enforced by | test")
            continue
        claim, enforced, tested = cells
        requirements = {int(n) for n in re.findall(r"\bR(\d+)\b", claim)}
        lines, tests = _NAMED.findall(enforced), _NAMED.findall(tested)
        wrong = [p for name in [*lines, *tests] if (p := missing(*name))]
        wrong += [] if lines else ["names no `file:name` that enforces it"]
        wrong += [] if tests else ["names no `file:name` of a test"]
        for path, name in tests:
            verdict = outcomes.get((path, name), set())
            if "failed" in verdict:
                wrong.append(f"{name} failed")
            elif "passed" not in verdict:
                wrong.append(f"{name} was skipped in every tier" if verdict else f"{name} did not run")
        problems += [f"{where}: {w}" for w in wrong]
        if not wrong:
            covered |= requirements
    problems += [f"requirement {n} has no row that holds" for n in IN_SCOPE if n not in covered]
    return problems, len(table)


def main() -> int:
    problems = check_run()
    more, probes = ways(passed())
    problems += more
    if not DOCUMENT.exists():
        problems.append(f"there is no {DOCUMENT.relative_to(ROOT)}")
    else:
        more, count = check_claims(DOCUMENT.read_text(), verdicts())
        problems += more
        if not problems:
            print(f"check: {count} claims over {len(IN_SCOPE)} requirements, each enforced, attacked, and held")
            print(f"check: {probes} probes ran in parked and in cold sandboxes, in warm and exec'ed interpreters")
    for problem in problems:
        print(f"check: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
