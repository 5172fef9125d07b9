"""Many jobs at once: asleep, and waiting in the queue."""

from __future__ import annotations

import time
from collections import Counter

from bench import load, machine, processes, server, wire
from bench.context import Context
from bench.figures import Outcome, median, ratio
from bench.groups.latency import HELLO, HELLO_PRINTED

MIB = 1 << 20
ASLEEP_MB = 64
"""The least that a job may have."""
HELLOS = 40
ADDRESSES = 64
"""What one may have running at once is counted for jobs of 512 MB."""


def hello_p50(connection: wire.Connection, count: int) -> float:
    taken = []
    for _ in range(count):
        time.sleep(0.015)
        taken.append(connection.timed(HELLO, HELLO_PRINTED))
    return median(taken)


def _available() -> float:
    readings = []
    for _ in range(10):
        readings.append(float(machine.available()))
        time.sleep(0.05)
    return median(readings)


def _room(wanted: int) -> tuple[tuple[str, ...], int]:
    """The options that let so many jobs run at once, as far as the server takes them, and how many that is."""
    needed = wanted * ASLEEP_MB * MIB / machine.meminfo()["MemTotal"] * 1.05
    if needed <= 0.6:
        return ("--active-per-core", "100"), wanted
    for share in (needed, 1.0):
        flags = ("--active-per-core", "100", "--memory-share", f"{share:.3f}")
        if server.accepts(*flags):
            return flags, min(wanted, int(share * machine.meminfo()["MemTotal"] / (ASLEEP_MB * MIB)))
    raise server.ServerFailed("the server takes no --memory-share")


def sleepers(context: Context) -> Outcome:
    outcome = Outcome()
    flags, number = _room(context.counts.sleepers)
    notes = []
    if number < context.counts.sleepers:
        notes.append(f"only {number} at once: --memory-share has no room for more")
    archive = wire.tarball({"main.py": f"import time; time.sleep({context.counts.sleep_seconds})".encode()})
    request = wire.submit(
        archive, {"entrypoint": "main.py", "memory_mb": ASLEEP_MB, "timeout": 290, "outputs": ["nothing"]}
    )
    with server.running(*flags) as ours:
        connection = ours.connection()
        idle = hello_p50(connection, HELLOS)
        processes.settled(ours.pid, 4.0)
        parked, before = ours.sandboxes(), _available()
        begin = time.monotonic()
        jobs = load.submit_all(ours.port, request, number, addresses=ADDRESSES)
        latest = begin + context.counts.sleep_seconds * 0.7
        running = processes.until(lambda: ours.sandboxes() >= number, latest - time.monotonic(), 0.2)
        started = time.monotonic() - begin
        time.sleep(0.5)
        alive = ours.sandboxes()
        each = (before - _available()) / max(1, alive - parked) / MIB
        beside = hello_p50(connection, HELLOS)
        states: Counter[str] = Counter()
        for job in jobs:
            result = wire.finished(connection, job)
            states[str(result["outcome"] if result["status"] == "failed" else "completed")] += 1
    if not running:
        notes.append(f"no more than {alive} sandboxes lived at once")
    asked = context.counts.sleepers
    details = {**states, "start_seconds": round(started, 2)}
    outcome.put("sleepers", 100 * states["completed"] / asked, "; ".join(notes), details)
    outcome.put("sleepers-memory", each, f"{alive} at once, their zygote and the server's growth included")
    outcome.put("sleepers-hello", ratio(beside, idle), idle_ms=idle * 1000, beside_ms=beside * 1000)
    return outcome


BLOCKER = wire.submit(
    wire.tarball({"main.py": b"while True: pass\n"}), {"entrypoint": "main.py", "timeout": 290, "outputs": ["nothing"]}
)


def queued(context: Context) -> Outcome:
    """One job keeps the only active place busy while the others queue up; then it is cancelled."""
    outcome = Outcome()
    number = context.counts.queued
    filler = b"#" * (1024 - 16)
    request = wire.submit(
        wire.tarball({"main.py": b"print('done')\n" + filler}, level=0), {"entrypoint": "main.py", "outputs": []}
    )
    with server.running("--active-per-core", str(1 / machine.cores())) as ours:
        connection = ours.connection()
        api = ours.part("api")
        load.bulk(ours.port, HELLO, HELLO_PRINTED, max(20, number // 100))
        time.sleep(1.0)
        before = processes.pss_bytes([api])
        blocker = connection.json(BLOCKER, 202)["job_id"]
        processes.until(lambda: connection.json(wire.get(f"/jobs/{blocker}"))["status"] == "running", 10)
        begin = time.monotonic()
        jobs = load.submit_all(ours.port, request, number)
        submitted = time.monotonic() - begin
        waiting = sum(connection.json(wire.get(f"/jobs/{job}"))["status"] == "queued" for job in jobs)
        grown = processes.pss_bytes([api]) - before
        begin = time.monotonic()
        connection.exchange(wire.delete(f"/jobs/{blocker}"))
        states: Counter[str] = Counter()
        for job in jobs:
            result = wire.finished(connection, job, seconds=600)
            states[str(result["outcome"] if result["status"] == "failed" else "completed")] += 1
        drained = time.monotonic() - begin
        for job in jobs:
            connection.exchange(wire.delete(f"/jobs/{job}"))
        time.sleep(2.0)
        left = processes.pss_bytes([api]) - before
    note = f"{waiting} waited at once; submitted at {number / submitted:.0f}/s, done at {number / drained:.0f}/s"
    outcome.put("queued", 100 * states["completed"] / number, note, states)
    outcome.put("queued-memory", grown / MIB, f"of {waiting} jobs")
    outcome.put("queued-return", left / MIB)
    return outcome
