"""Thousands of jobs in a row: what is there afterwards that was not there before."""

from __future__ import annotations

import time
from typing import Any

from bench import load, peers, processes, programs, server, wire
from bench.context import Context, interleave
from bench.figures import Outcome, median, ratio
from bench.groups.latency import HELLO, HELLO_PRINTED, SANDRUN
from bench.processes import Holdings

MIB = 1 << 20
PAIRS = 150
"""Of hello and bare, among the first and among the last thousand."""


def leaks(context: Context) -> Outcome:
    outcome = Outcome()
    steps = context.counts.leaks
    program = programs.hello()
    found: list[Holdings] = []
    patience = min(12.0, 2 * context.counts.settle_seconds)  # the number of parked sandboxes follows slowly
    with server.running() as ours:
        before = processes.settled(ours.pid, patience)
        failed = done = 0
        first = last = None
        begin = time.monotonic()
        for step in steps:
            pairs = min(PAIRS, steps[0] // 2)
            while done < step:
                if first is None or (last is None and step == steps[-1] and step - done <= 2 * pairs):
                    pair = _pairs(ours, context.peers[0], program, pairs)
                    done += pairs + 2
                    first, last = (pair, last) if first is None else (first, pair)
                else:
                    most = step - done - (2 * pairs if step == steps[-1] else 0)
                    part = min(5000, most) if most > 0 else step - done
                    failed += load.bulk(ours.port, HELLO, HELLO_PRINTED, part)
                    done += part
            if step == steps[-1]:
                context.say(f"leaks: {done / (time.monotonic() - begin):.0f} jobs/s, waits included")
            time.sleep(context.counts.settle_seconds)
            found.append(processes.settled(ours.pid, patience))
            context.say(f"leaks: after {done} jobs: {_brief(found[-1])}")
    if failed:
        raise RuntimeError(f"{failed} of {done} jobs failed")
    early, thousand, middle, late = found
    for name, now, base, jobs in (
        ("leaks-5000", middle, early, steps[2]),
        ("leaks-50000", late, thousand, steps[3]),
    ):
        more = surplus(before, early, now)
        told = {what: number for what, number in more.items() if number}
        note = f"after {jobs} jobs; parked: {before.sandboxes} before, {now.sandboxes} after"
        outcome.put(name, float(sum(abs(number) for number in more.values())), note, {**told, **_brief(now)})
        grown = _memory(now, before, early) - _memory(base, before, early)
        outcome.put(f"{name}-memory", grown / MIB, details=_brief(now))
    slab = (late.slab - thousand.slab) / MIB
    caches = {name: late.slabs[name] - thousand.slabs[name] for name in late.slabs}
    groups = {f"{name}_cgroups": late.kernel_cgroups[name] for name in late.kernel_cgroups}
    outcome.put("leaks-50000-slab", slab, "of the whole machine", {**caches, **groups})
    if first is not None and last is not None:
        value = ratio(last, first)
        outcome.put("leaks-50000-latency", value, first_of_bare=first, last_of_bare=last)
    return outcome


def _pairs(ours: server.Server, bare: peers.Peer, program: peers.Program, rounds: int) -> float:
    """hello's p50 by bare's, in turn."""
    connection: wire.Connection = ours.connection()
    contenders = {SANDRUN: lambda: connection.timed(HELLO, HELLO_PRINTED), "bare": lambda: bare.run(program)}
    samples = interleave(contenders, rounds, gap=0.004)
    connection.close()  # or it would count as a descriptor too many
    return median(samples[SANDRUN]) / median(samples["bare"])


def _brief(held: Holdings) -> dict[str, Any]:
    return {
        "sandboxes": held.sandboxes,
        "pss_mib": round((held.pss + held.sandbox_pss) / MIB, 2),
        "slab_mib": round(held.slab / MIB, 2),
        "descriptors": held.descriptors,
        "memory_cgroups": held.kernel_cgroups.get("memory"),
    }


def _counts(held: Holdings) -> dict[str, int]:
    return {
        "processes": held.processes + held.sandbox_processes,
        "namespaces": held.namespaces + held.sandbox_namespaces,
        "cgroups": held.cgroups,
        "mounts": held.mounts,
        **{f"descriptors of {part}": number for part, number in held.descriptors.items()},
    }


def surplus(before: Holdings, early: Holdings, now: Holdings) -> dict[str, int]:
    """What `now` has more than `before`, less what parked sandboxes account for.

    Their number follows demand. What one of them holds is taken from `before` and `early`, if those differ in it.
    """
    first, second, third = _counts(before), _counts(early), _counts(now)
    more = {}
    for name, number in third.items():
        each = 0.0
        if early.sandboxes != before.sandboxes:
            each = round((second[name] - first[name]) / (early.sandboxes - before.sandboxes))
        more[name] = round(number - first[name] - each * (now.sandboxes - before.sandboxes))
    return more


def _memory(held: Holdings, before: Holdings, early: Holdings) -> float:
    """Pss of all, less that of the parked sandboxes beyond those of `before`."""
    total = held.pss + held.sandbox_pss
    each = held.sandbox_pss / held.sandboxes if held.sandboxes else 0
    return total - each * (held.sandboxes - before.sandboxes)
