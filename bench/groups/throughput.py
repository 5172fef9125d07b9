"""Many clients: how many jobs a second, and how long each waits."""

from __future__ import annotations

import time

from bench import load, machine, programs, server
from bench.context import Context
from bench.figures import Chart, Outcome, median, percentile, ratio
from bench.groups.latency import HELLO, HELLO_PRINTED, SANDRUN

EIGHT = 8
WORKERS = (1, 2, 3, 4, 8)
"""How many at once bare is tried with: its best counts."""
OTHERS = (2, 4)
SHARE_NOTE = "the clients run on the same {} cores and take {:.2f} CPU-ms a job of them"


def _ours(ours: server.Server, context: Context, clients: int) -> load.Load:
    seconds = context.counts.load_seconds
    taken = load.closed_loop(
        ours.port, HELLO, HELLO_PRINTED, clients=clients, seconds=seconds, warm_up=max(0.3, seconds / 3)
    )
    if taken.errors:
        raise RuntimeError(f"{taken.errors} of {clients} clients' requests failed, one with {taken.first_error}")
    if not taken.latencies:
        raise RuntimeError(f"no answer within {seconds} s")
    return taken


def throughput(context: Context) -> Outcome:
    """Eight clients beside the best that each peer reaches, slot by slot in turn."""
    outcome = Outcome()
    counts = context.counts
    program = programs.hello()
    rates: dict[str, dict[int, list[float]]] = {}
    generator: list[float] = []
    with server.running() as ours:
        for number in range(counts.load_rounds):
            taken = _ours(ours, context, EIGHT)
            rates.setdefault(SANDRUN, {}).setdefault(EIGHT, []).append(taken.rate)
            generator.append(taken.generator_seconds * 1000 / max(1, len(taken.latencies)))
            time.sleep(0.5)
            for peer in context.peers:
                if peer.weight > 1 and number:  # the slow ones once: nobody chooses by their third digit
                    continue
                for workers in WORKERS if peer.name == "bare" else OTHERS:
                    seconds = counts.load_seconds / 2
                    for worker in range(workers):
                        peer.command(program, worker)
                    other = load.repeated(
                        lambda worker, peer=peer: peer.run(program, worker),  # type: ignore[misc]
                        workers=workers,
                        seconds=seconds,
                        warm_up=seconds / 6,
                    )
                    rates.setdefault(peer.name, {}).setdefault(workers, []).append(other.rate)
    best = {who: max((median(values), workers) for workers, values in by.items()) for who, by in rates.items()}
    note = SHARE_NOTE.format(machine.cores(), median(generator))
    at_best = {f"{who}_per_second": round(rate, 1) for who, (rate, _) in best.items()}
    outcome.put("rate", ratio(best[SANDRUN][0], best["bare"][0]), note, at_best, bare_at_once=best["bare"][1])
    bars = [(who, rate, min(rates[who][n]), max(rates[who][n])) for who, (rate, n) in best.items()]
    title = 'print("hello") jobs a second, each at its best'
    outcome.charts.append(
        Chart(name="rate", title=title, unit="jobs/s", bars=bars, legend="bar: median; line: least to most")
    )
    return outcome


def clients(context: Context) -> Outcome:
    """From 2 to 256 clients."""
    outcome = Outcome()
    rates: dict[int, list[float]] = {}
    latencies: dict[int, list[float]] = {}
    generator: list[float] = []
    with server.running() as ours:
        for _ in range(context.counts.load_rounds):
            for count in context.counts.clients:
                taken = _ours(ours, context, count)
                rates.setdefault(count, []).append(taken.rate)
                latencies.setdefault(count, []).extend(taken.latencies)
                generator.append(taken.generator_seconds * 1000 / max(1, len(taken.latencies)))
                time.sleep(0.3)
    rate = {count: median(values) for count, values in rates.items()}
    most = max(rate)
    p99 = {count: percentile(values, 99) for count, values in latencies.items()}
    stretch = {count: p99[count] / (count / rate[count]) for count in rate}
    note = SHARE_NOTE.format(machine.cores(), median(generator))
    details = {f"clients_{count}": f"{rate[count]:.0f}/s, p99 {p99[count] * 1000:.1f} ms" for count in rate}
    outcome.put("clients-rate", rate[most] / max(rate.values()), f"{most} clients; {note}", details)
    worst = max(stretch, key=lambda count: stretch[count])
    by_count = {f"clients_{count}": round(value, 2) for count, value in stretch.items()}
    outcome.put("clients-p99", stretch[worst], f"worst at {worst} clients", by_count)
    outcome.put_spreads("hello with so many clients, ms", {str(n): v for n, v in latencies.items()}, 1000)
    lines = {SANDRUN: [(float(count), value) for count, value in rate.items()]}
    title = 'print("hello") jobs a second over HTTP'
    outcome.charts.append(Chart(name="clients", title=title, unit="jobs/s", x_title="clients", lines=lines))
    return outcome
