"""Jobs that print: one without end beside others, and one that a hundred follow."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from typing import Any

from bench import load, processes, server, wire
from bench.context import Context
from bench.figures import Outcome, median, percentile, ratio
from bench.groups.scale import hello_p50

MIB = 1 << 20
SPAM = b"import sys\nwhile True: sys.stdout.write('x' * 4000 + chr(10))\n"
LINE_SECONDS = 0.02
LINES = """
import sys, time
time.sleep(2)
begin = time.monotonic()
for number in range({lines}):
    time.sleep(max(0, begin + number * {pause} - time.monotonic()))
    print(number, time.monotonic_ns(), flush=True)
"""
FLOOD = "import sys, time\ntime.sleep(1)\nfor _ in range({count}): sys.stdout.write('y' * 9999 + chr(10))\n"


def spam(context: Context) -> Outcome:
    """hello with and without the other job, in turn."""
    outcome = Outcome()
    counts = context.counts
    request = wire.submit(wire.tarball({"main.py": SPAM}), {"entrypoint": "main.py", "timeout": 290, "outputs": []})
    idle, beside, grown, rates = [], [], [], []
    with server.running() as ours:
        connection = ours.connection()
        hello_p50(connection, 5)
        for _ in range(counts.spam_rounds):
            idle.append(hello_p50(connection, counts.spam_hellos))
            job = connection.json(request, 202)["job_id"]
            full = processes.until(lambda job=job: _printed(connection, job)[1] > 0, 20, 0.1)  # type: ignore[misc]
            if not full:
                raise RuntimeError("the job did not fill its log within 20 s")
            before, printed, begin = ours.pss_bytes(), _printed(connection, job)[1], time.monotonic()
            beside.append(hello_p50(connection, counts.spam_hellos))
            time.sleep(counts.settle_seconds / 2)
            grown.append((ours.pss_bytes() - before) / MIB)
            rates.append((_printed(connection, job)[1] - printed) / (time.monotonic() - begin) / 1e6)
            connection.exchange(wire.delete(f"/jobs/{job}"))
            time.sleep(0.5)
    details = {"idle_ms": median(idle) * 1000, "beside_ms": median(beside) * 1000}
    outcome.put("spam", ratio(median(beside), median(idle)), f"it prints {median(rates):.0f} MB/s", details)
    outcome.put("spam-memory", max(grown), f"worst of {len(grown)}")
    return outcome


def _printed(connection: wire.Connection, job: str) -> tuple[str, int]:
    """Status, and bytes of stdout that were dropped."""
    result = connection.json(wire.get(f"/jobs/{job}"))
    return result["status"], result["truncated"]["stdout"]


def subscribers(context: Context) -> Outcome:
    outcome = Outcome()
    counts = context.counts
    code = LINES.format(lines=counts.lines, pause=LINE_SECONDS).encode()
    request = wire.submit(wire.tarball({"main.py": code}), {"entrypoint": "main.py", "outputs": []})
    with server.running() as ours:
        connection = ours.connection()
        job = connection.json(request, 202)["job_id"]
        delays, complete = _in_child(lambda: _follow(ours.port, job, counts.subscribers))
        status = wire.finished(connection, job)["status"]
        lost = sum(counts.lines - number for number in complete)
        note = f"{counts.subscribers} subscribers, {counts.lines} lines, one every {LINE_SECONDS * 1000:.0f} ms"
        if not delays or status != "completed":
            raise RuntimeError(f"no line came through; the job {status}")
        ranks = {f"p{rank}_ms": round(percentile(delays, rank), 2) for rank in (10, 50, 90)}
        outcome.put("subscribers", percentile(delays, 99), note, ranks)
        outcome.put("subscribers-lost", float(lost))
        told, details = _stalled(ours, connection, counts.stalled_bytes)
        outcome.put("subscribers-gap", float(told), details=details)
    return outcome


def _in_child(main: Any) -> Any:
    return load.Child(main).result()[0]


def _follow(port: int, job: str, number: int) -> tuple[list[float], list[int]]:
    """Milliseconds from each line's making to its arrival, and how many lines each subscriber got in order."""
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    frames: dict[int, wire.Frames] = {}
    texts: dict[int, str] = {}
    got: dict[int, int] = {}
    delays: list[float] = []
    for client in range(number):
        stream = wire.open_websocket(port, f"/logs/{job}/stream", load.address(client))
        key = stream.fileno()
        sockets[key], frames[key], texts[key], got[key] = stream, wire.Frames(), "", 0
        poll.register(key, select.EPOLLIN)
    end = time.monotonic() + 120
    open_ones = set(sockets)
    while open_ones and time.monotonic() < end:
        for key, _ in poll.poll(1.0):
            piece = sockets[key].recv(1 << 16)
            now = time.monotonic_ns()
            if not piece:
                raise wire.Failed("the server closed a WebSocket before the end")
            for payload in frames[key].feed(piece):
                frame = json.loads(payload)
                if frame.get("event") == "end":
                    poll.unregister(key)
                    open_ones.discard(key)
                if frame.get("stream") != "stdout" or "text" not in frame:
                    continue
                *lines, texts[key] = (texts[key] + frame["text"]).split("\n")
                for line in lines:
                    serial, stamp = line.split()
                    got[key] += int(serial) == got[key]
                    delays.append((now - int(stamp)) / 1e6)
    for stream in sockets.values():
        stream.close()
    return delays, list(got.values())


def _stalled(ours: server.Server, connection: wire.Connection, size: int) -> tuple[bool, dict[str, Any]]:
    """Follow a job that writes more than is kept, read nothing until it is over, then all: is the gap told, in full?"""
    code = FLOOD.format(count=size // 10_000).encode()
    request = wire.submit(wire.tarball({"main.py": code}), {"entrypoint": "main.py", "outputs": []})
    job = connection.json(request, 202)["job_id"]
    with contextlib.closing(wire.open_websocket(ours.port, f"/logs/{job}/stream", "127.0.0.9")) as stream:
        wire.finished(connection, job)
        frames, kept, missing, ended = wire.Frames(), 0, 0, False
        while not ended and (piece := stream.recv(1 << 16)):
            for payload in frames.feed(piece):
                frame = json.loads(payload)
                kept += len(frame.get("text", ""))
                missing += frame["bytes"] if frame.get("event") == "gap" else 0
                ended = ended or frame.get("event") == "end"
    written = size // 10_000 * 10_000
    details = {"written": written, "received": kept, "gap_bytes": missing}
    return ended and missing > 0 and kept + missing == written, details
