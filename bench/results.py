"""Where results lie, the tables on stdout, and the block of README.md that is made from the newest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import charts, machine
from bench.figures import Figure, Outcome
from bench.rows import BY_NAME

RESULTS = machine.ROOT / "bench/results"
README = machine.ROOT / "README.md"
BEGIN = "<!-- from bench/results/ by ./scripts/bench; do not edit -->"
END = "<!-- end of what ./scripts/bench wrote -->"
FULL = "full"
HEADLINES = ("hello", "hello-p99", "numpy", "cold", "submit", "bash", "node", "rate", "cpu", "parked")
CHARTS = ("hello", "rate")
figure = charts.figure


def collect(outcomes: Mapping[str, Outcome], failures: Mapping[str, str]) -> list[Figure]:
    """All rows of the groups that ran; those of one that failed say why."""
    found = []
    for row in BY_NAME.values():
        if row.group in failures:
            found.append(Figure(row, None, failures[row.group]))
        elif row.group in outcomes:
            value, note, details = outcomes[row.group].values.get(row.name, (None, "not measured", {}))
            found.append(Figure(row, value, note, details))
    return found


def write(
    kind: str,
    started: str,
    facts: dict[str, Any],
    figures: Iterable[Figure],
    outcomes: Mapping[str, Outcome],
    folder: Path | None = None,
) -> Path:
    """JSON and charts in a folder of their own. Returns: the folder."""
    name = f"{started[:10]}-{facts['machine']['commit']}" + ("" if kind == FULL else f"-{kind}")
    folder = folder or RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    spreads = {what: by for outcome in outcomes.values() for what, by in outcome.spreads.items()}
    result = {
        "kind": kind,
        "started": started,
        **facts,
        "rows": [_rounded(one.as_json()) for one in figures],
        "spreads": {what: {who: _rounded(asdict(s)) for who, s in by.items()} for what, by in spreads.items()},
    }
    (folder / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for outcome in outcomes.values():
        for chart in outcome.charts:
            (folder / f"{chart.name}.svg").write_text(charts.draw(chart, facts["machine"]))
    return folder


def _rounded(value: Any) -> Any:
    """Five digits: what is beyond them is noise, and makes differences hard to read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


# ---- tables ------------------------------------------------------------------------------------------------


def rows_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """name, what, figure, unit, target, reached."""
    lines = [("row", "what", "figure", "", "must be", "reached")]
    notes = []
    for row in rows:
        value = "–" if row["value"] is None else figure(row["value"])
        target = "" if row["target"] is None else f"{'≥' if row['bound'] == 'at least' else '≤'} {row['target']:g}"
        if row["goal"] is not None:
            target += f" (goal {row['goal']:g})"
        reached = {None: "", True: "yes", False: "NO"}[row["reached"]]
        lines.append((row["name"], row["about"], value, row["unit"], target, reached))
        if row["note"]:
            notes.append(f"  {row['name']}: {row['note']}")
    return "\n".join([_aligned(lines, right=(2,)), *notes])


def spreads_table(outcomes: Iterable[Outcome]) -> str:
    lines: list[tuple[str, ...]] = [("", "p10", "p50", "p90", "p99", "n")]
    for outcome in outcomes:
        for what, by in outcome.spreads.items():
            lines.append((what, "", "", "", "", ""))
            for who, s in by.items():
                lines.append((f"  {who}", *(figure(value) for value in (s.p10, s.p50, s.p90, s.p99)), str(s.count)))
    return _aligned(lines, right=(1, 2, 3, 4, 5))


def _aligned(lines: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def machine_line(facts: Mapping[str, Any]) -> str:
    m = facts["machine"]
    changed = " and changes" if m["changed_since"] else ""
    virtual = ", a virtual machine" if m["virtual"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['ram_mib']} MiB{virtual}; {m['system']}, Linux {m['kernel']}, "
        f"cgroups {m['cgroups']}, {m['python']}; commit {m['commit']}{changed}"
    )


# ---- README ------------------------------------------------------------------------------------------------


def newest() -> Path | None:
    """The folder of the last full run."""
    found = []
    for path in RESULTS.glob("*/results.json"):
        result = json.loads(path.read_text())
        if result["kind"] == FULL:
            found.append((result["started"], path.parent))
    return max(found)[1] if found else None


def readme_block(folder: Path | None) -> str:
    """What stands between the marks, with them."""
    if folder is None:
        text = "`./scripts/bench` measures Sandrun beside the bare interpreter and other sandboxes on your machine.\n"
        return f"{BEGIN}\n{text}{END}"
    result = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    place = folder.relative_to(machine.ROOT)
    lines = [f"![{name}]({place}/{name}.svg)" for name in CHARTS if (folder / f"{name}.svg").exists()]
    lines += ["", "| measured | figure | |", "|---|---|---|"]
    for name in HEADLINES:
        row = rows.get(name)
        if row is not None and row["value"] is not None:
            target = "" if row["target"] is None else f"{row['bound']} {row['target']:g} wanted"
            missed = "" if row["reached"] is not False else ": not reached"
            lines.append(f"| {row['about']} | {figure(row['value'])} {row['unit']} | {target}{missed} |")
    told = (
        f"Measured in one interleaved run on {result['started'][:10]}: {machine_line(result)}. "
        f"All rows are in [{place}/results.json]({place}/results.json), how to read them in "
        "[docs/performance.md](docs/performance.md); `./scripts/bench` repeats it on your machine."
    )
    return "\n".join([BEGIN, *lines, "", told, END])


def readme_parts(text: str) -> tuple[str, str, str]:
    """Before, between (with the marks), after. Raises: ValueError if the marks are not there once."""
    found = re.findall(re.escape(BEGIN) + ".*?" + re.escape(END), text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"README.md has {len(found)} blocks of ./scripts/bench instead of one")
    before, _, after = text.partition(found[0])
    return before, found[0], after


def update_readme() -> bool:
    """Returns whether it changed."""
    text = README.read_text()
    before, old, after = readme_parts(text)
    new = readme_block(newest())
    if new != old:
        README.write_text(before + new + after)
    return new != old
