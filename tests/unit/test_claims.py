"""scripts/check and the mutation runner judge all other tests, so what they refuse is tested here."""

from __future__ import annotations

import pytest

from tests import claims, mutations

HEAD = "| claim | enforced by | test |\n|---|---|---|\n"
GOOD = "| R7 init is another | `src/sandrun/model.py:Limits` | `tests/unit/test_claims.py:test_row_that_holds` |\n"
RAN = {("tests/unit/test_claims.py", "test_row_that_holds"): {"passed", "skipped"}}


def problems(text: str, outcomes: dict[tuple[str, str], set[str]]) -> str:
    found, _ = claims.check_claims(text, outcomes)
    return "\n".join(found)


def test_row_that_holds_covers_its_requirement_and_no_other():
    found = problems(HEAD + GOOD, RAN)
    assert "requirement 8 " in found
    assert "requirement 7 " not in found
    assert "threat-model" not in found


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("model.py", "models.py", "there is no file src/sandrun/models.py"),
        ("Limits", "Limit", "has no Limit"),
        ("`src/sandrun/model.py:Limits`", "the kernel", "names no `file:name` that enforces it"),
        (":test_row_that_holds`", "`", "names no `file:name` of a test"),
        (" |\n", " | more |\n", "4 columns"),
    ],
)
def test_row_that_names_what_is_not_there_covers_nothing(old, new, says):
    found = problems(HEAD + GOOD.replace(old, new), RAN)
    assert says in found
    assert "requirement 7 has no row that holds" in found


@pytest.mark.parametrize(
    ("verdicts", "says"),
    [(set(), "did not run"), ({"skipped"}, "skipped in every tier"), ({"passed", "failed"}, "failed")],
)
def test_row_whose_test_did_not_pass_covers_nothing(verdicts, says):
    found = problems(HEAD + GOOD, {("tests/unit/test_claims.py", "test_row_that_holds"): verdicts})
    assert says in found
    assert "requirement 7 has no row that holds" in found


def test_table_without_the_three_columns_is_not_read():
    assert "requirement 7 has no row that holds" in problems(GOOD, RAN)


PROBES = {("tests/escape/test_a.py", f"test_it[{kind}]") for kind in ("in-place", "fresh-interpreter", "compiled")}


@pytest.mark.parametrize(
    ("without", "tier", "says"),
    [
        ("compiled", "cold", "test_it[compiled] passed in a parked sandbox alone"),
        ("compiled", "escape", "test_it[compiled] passed in a cold sandbox alone"),
        ("fresh-interpreter", "escape", "test_it[in-place] passed in place alone"),
    ],
)
def test_probe_that_did_not_run_in_all_ways_is_named(without, tier, says):
    assert claims.ways({"escape": PROBES, "cold": PROBES}) == ([], 3)
    fewer = {probe for probe in PROBES if without not in probe[1]}
    found, _ = claims.ways({"escape": PROBES, "cold": PROBES, tier: fewer})
    assert f"tests/escape/test_a.py::{says}" in found


def test_every_mutation_fits_the_tree():
    found = mutations.load((mutations.ROOT / "tests/mutations.toml").read_text())
    assert found
    assert len({m.protection for m in found}) == len(found)


@pytest.mark.parametrize(("old", "new"), [("class Limits:", "class Limits:"), ("class Limitz:", ""), ("import ", "")])
def test_mutation_that_changes_nothing_or_two_places_is_refused(old, new):
    row = f"""
[[mutation]]
protection = "x"
requirement = [1]
file = "src/sandrun/model.py"
old = "{old}"
new = "{new}"
tests = ["tests/unit/test_claims.py::test_row_that_holds_covers_its_requirement_and_no_other"]
"""
    with pytest.raises(ValueError, match="not once"):
        mutations.load(row)
