"""The benchmark itself: it runs, with counts too small to mean anything, and README.md tells what it found."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import charts, context, figures, load, machine, peers, processes, programs, results, rows, wire
from bench.groups import leaks

HERE_NOT = ("numpy",)
"""Groups that need what this machine may lack."""


@pytest.fixture(scope="module")
def state() -> context.Context:
    prepared = context.Context(counts=context.TINY, peers=[], quiet=True)
    return program.prepare(prepared, ["bubblewrap"], wants_data=False)


@pytest.mark.root
@pytest.mark.parametrize("group", [group for group in rows.GROUPS if group not in HERE_NOT])
def test_every_group_gives_a_figure_for_each_of_its_rows(state, group, tmp_path):
    outcomes, failures = program.run(state, [group])

    assert not failures
    found = results.collect(outcomes, failures)
    assert [one.row.name for one in found] == [row.name for row in rows.ROWS if row.group == group]
    for one in found:
        assert one.value is not None, f"{one.row.name}: {one.note}"

    facts = {
        "machine": {"cpu": "<&>", "cores": 2, "kernel": "6", "python": "3", "commit": "c0ffee", "changed_since": True}
    }
    folder = results.write("tiny", "2026-01-01T00:00:00", facts, found, outcomes, tmp_path)
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == len(found)
    for chart in folder.glob("*.svg"):
        ET.parse(chart)


def test_command_names_its_rows_without_measuring():
    done = subprocess.run([sys.executable, "-m", "bench", "--list"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == [row.name for row in rows.ROWS]


def test_unknown_row_is_a_usage_error():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "speed"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "speed" in done.stderr


def test_each_row_has_a_group_that_runs():
    assert set(program.GROUPS) == set(rows.GROUPS)
    assert len(rows.BY_NAME) == len(rows.ROWS)


def test_readme_tells_what_the_newest_results_say():
    _, block, _ = results.readme_parts(results.README.read_text())
    assert block == results.readme_block(results.newest()), "run ./scripts/bench --readme"


def test_readme_block_takes_figures_and_charts_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    facts = {"machine": {**machine.describe(), "commit": "c0ffee"}}
    row = rows.BY_NAME["hello"]
    outcome = figures.Outcome(charts=[figures.Chart(name="hello", title="t", unit="ms", bars=[("a", 2.0, 1.0, 3.0)])])
    for kind, started, value in (("full", "2026-01-01T00:00:00", 0.9), ("full", "2026-01-02T00:00:00", 0.123456)):
        results.write(kind, started, facts, [figures.Figure(row, value)], {"latency": outcome})
    results.write("quick", "2026-01-03T00:00:00", facts, [figures.Figure(row, 0.5)], {"latency": outcome})

    block = results.readme_block(results.newest())

    assert "0.123 × bare p50" in block
    assert "2026-01-02-c0ffee/hello.svg" in block
    assert "0.5" not in block


# ---- parts ---------------------------------------------------------------------------------------------------


def test_percentiles_lie_between_the_nearest_samples():
    samples = [4.0, 1.0, 3.0, 2.0]
    assert figures.percentile(samples, 0) == 1.0
    assert figures.median(samples) == 2.5
    assert figures.percentile(samples, 100) == 4.0
    assert figures.percentile([7.0], 99) == 7.0


def test_what_was_not_measured_is_not_reached():
    row = rows.BY_NAME["upload"]
    assert row.reached(None) is False
    assert row.reached(0.6) is True
    assert row.reached(0.59) is False
    assert rows.BY_NAME["cpu-ratio"].reached(None) is None


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_answers_and_frames_come_whole_from_pieces_of_any_size(size):
    body = b'{"stdout":"hello\\n"}'
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    answer = wire.Answer()
    whole = [answer.feed(raw[at : at + size]) for at in range(0, len(raw), size)]
    assert whole == [False] * (len(whole) - 1) + [True]
    assert (answer.status, answer.body) == (200, body)
    assert wire.stdout("hello\n") in answer.body

    payloads = [b"x" * length for length in (0, 1, 125, 126, 70_000)]
    stream = b"".join(bytes([0x81]) + _length(payload) + payload for payload in payloads)
    frames, got = wire.Frames(), []
    for at in range(0, len(stream), size):
        got += frames.feed(stream[at : at + size])
    assert got == payloads


def _length(payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes([size])
    return bytes([126]) + size.to_bytes(2, "big") if size < 65536 else bytes([127]) + size.to_bytes(8, "big")


def test_a_leak_is_seen_whatever_the_number_of_parked_sandboxes():
    def holdings(sandboxes: int, leaked: int = 0) -> processes.Holdings:
        return processes.Holdings(
            processes=4,
            sandboxes=sandboxes,
            sandbox_processes=2 * sandboxes,
            namespaces=6,
            sandbox_namespaces=7 * sandboxes,
            cgroups=10 + 4 * sandboxes,
            mounts=90,
            descriptors={"api": 15, "spawner": 15 + 7 * sandboxes + leaked},
            pss=50 << 20,
            sandbox_pss=sandboxes << 20,
            slab=0,
            kernel_cgroups={},
            slabs={},
        )

    before, early = holdings(2), holdings(4)
    assert set(leaks.surplus(before, early, holdings(3)).values()) == {0}
    assert leaks.surplus(before, early, holdings(2, leaked=3))["descriptors of spawner"] == 3
    assert leaks.surplus(before, before, holdings(2, leaked=1))["descriptors of spawner"] == 1


def test_what_a_load_generator_raises_is_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        load.Child(lambda: 1 / 0).result()


def test_a_peer_that_prints_something_else_is_no_measurement():
    bare = peers.known()[0]
    assert bare.run(programs.hello()) > 0
    with pytest.raises(peers.PeerFailed):
        bare.run(peers.Program(programs.hello().argv, b"goodbye\n"))


def test_charts_are_the_same_every_time_and_show_each_contender():
    facts = {"cpu": "c", "cores": 2, "kernel": "6", "python": "3", "commit": "c", "changed_since": False}
    bars = figures.Chart(name="n", title="a < b", unit="ms", bars=[("us", 1.0, 0.9, 1.2), ("them", 9.0, 8.0, 11.0)])
    drawn = charts.draw(bars, facts)
    assert drawn == charts.draw(bars, facts)
    texts = [element.text for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"us", "them", "1.00 ms", "9.00 ms"} <= set(texts)


def test_newest_results_are_whole():
    """What is committed can be read by whoever looks: machine, commit, every row."""
    folder = results.newest()
    if folder is None:
        pytest.skip("no full results are in the repository")
    result = json.loads((Path(folder) / "results.json").read_text())
    assert {row["name"] for row in result["rows"]} == set(rows.BY_NAME)
    assert {"cpu", "cores", "kernel", "python", "commit"} <= set(result["machine"])
