"""Measures Sandrun beside what a user would otherwise pick, all of it interleaved in one run on this machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import context, machine, peers, programs, results, rows, server
from bench.figures import Figure, Outcome
from bench.groups import cost, inside, latency, leaks, scale, streams, throughput, upload

GROUPS: dict[str, Callable[[context.Context], Outcome]] = {
    "latency": latency.latency,
    "numpy": latency.numpy,
    "cold": latency.cold,
    "submit": latency.submit,
    "executed": latency.executed,
    "inside": inside.inside,
    "cost": cost.cost,
    "memory": cost.memory,
    "parked": cost.parked,
    "uploads": upload.uploads,
    "throughput": throughput.throughput,
    "clients": throughput.clients,
    "sleepers": scale.sleepers,
    "queued": scale.queued,
    "leaks": leaks.leaks,
    "spam": streams.spam,
    "subscribers": streams.subscribers,
}
PLANS = {"full": context.FULL, "quick": context.QUICK, "tiny": context.TINY}
ENVIRONMENT = "data"
BUSY = 0.1
STATES = (machine.ROOT / ".venv/bench-state", machine.ROOT / ".venv/test-state")
"""Where the environment for numpy may be; the first is made if neither has it. Both go with .venv."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog="Tables go to stdout; JSON and charts to bench/results/<date>-<commit>/. A full run, about a quarter of "
        "an hour, also renews README.md's figures. Nothing else should run meanwhile.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute or two, for a first look; README.md stays as it is")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    add("--only", action="append", default=[], metavar="ROW", help="a row, or a group of rows; repeatable")
    add("--list", action="store_true", help="name the rows and their targets, and measure nothing")
    add("--peer", action="append", metavar="NAME", help="measure beside this one; repeatable; default all")
    add("--to", type=Path, metavar="FOLDER", help="write the results there")
    add("--readme", action="store_true", help="renew README.md from the newest full results, and measure nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    try:
        chosen = rows.choose(asked.only)
    except KeyError as error:
        print(f"bench: no row or group {error}; --list names them", file=sys.stderr)
        return 2
    if asked.list:
        print(results.rows_table(Figure(row, None).as_json() for row in rows.ROWS if row.group in chosen))
        return 0
    if asked.readme:
        print("README.md renewed" if results.update_readme() else "README.md is as the newest results have it")
        return 0
    plan = "tiny" if asked.tiny else "quick" if asked.quick else "full"
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    begin = time.monotonic()
    state = prepare(context.Context(counts=PLANS[plan], peers=[]), asked.peer, wants_data="numpy" in chosen)
    facts: dict[str, Any] = {
        "machine": machine.describe(),
        "peers": {peer.name: peer.version() for peer in state.peers},
        "absent": state.absent,
    }
    try:
        outcomes, failures = run(state, chosen)
    finally:
        for peer in peers.known():
            peer.close()
    facts["seconds"] = round(time.monotonic() - begin)
    facts["load_at_end"] = round(machine.load(), 2)
    figures = results.collect(outcomes, failures)
    kind = "partial" if asked.only else plan
    folder = results.write(kind, started, facts, figures, outcomes, asked.to)
    print(results.machine_line(facts))
    print(f"peers: {', '.join(f'{name} {version}'.strip() for name, version in facts['peers'].items())}")
    for name, reason in state.absent.items():
        print(f"  without {name}: {reason}")
    busy = facts["machine"]["busy_at_start"]
    warning = "; FIGURES ARE BENT BY IT" if busy > BUSY else ""
    print(f"other programs used {busy} of a core at the start{warning}; {facts['seconds']} s in all\n")
    print(results.spreads_table(outcomes.values()), end="\n\n")
    print(results.rows_table(one.as_json() for one in figures), end="\n\n")
    print(f"results: {folder}")
    if kind == results.FULL and asked.to is None and results.update_readme():
        print("README.md renewed")
    return 1 if failures else 0


def prepare(state: context.Context, wanted: list[str] | None, *, wants_data: bool) -> context.Context:
    """Find the peers that run here, and the environment."""
    hello = programs.hello()
    for peer in peers.known():
        if wanted is not None and peer.name not in (*wanted, "bare"):
            continue
        reason = peer.try_out(hello)
        if reason:
            state.absent[peer.name] = reason
            state.say(f"without {peer.name}: {reason}")
        else:
            state.peers.append(peer)
    if not state.peers or state.peers[0].name != "bare":
        raise SystemExit(f"bench: {machine.PYTHON}: {state.absent.get('bare')}")
    if wants_data:
        state.environments = next((one for one in STATES if preloads(one)), None)
        if state.environments is None:
            state.environments, state.environments_reason = build_environment(state)
    return state


def preloads(state: Path) -> bool:
    """Whether the environment is there, and its zygote has its modules loaded."""
    try:
        return bool(json.loads((state / "environments" / ENVIRONMENT / "environment.json").read_text()).get("preload"))
    except FileNotFoundError:
        return False


def build_environment(state: context.Context) -> tuple[Path | None, str]:
    state.say("building the environment with numpy")
    command = [str(server.SANDRUN), "environment", "build", ENVIRONMENT, "--state-dir", str(STATES[0])]
    env = {**os.environ, "PATH": machine.ENVIRONMENT["PATH"]}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, f"the environment cannot be built: {' '.join(done.stderr.split())[-300:]}"
    return STATES[0], ""


def run(state: context.Context, chosen: list[str]) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Returns: what each group came to, and why others came to nothing."""
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, str] = {}
    for name in chosen:
        begin = time.monotonic()
        try:
            outcomes[name] = GROUPS[name](state)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
            state.say(f"{name} failed: {failures[name]}")
        else:
            state.say(f"{name}: {time.monotonic() - begin:.1f} s")
    return outcomes, failures


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are stopped and files removed
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
