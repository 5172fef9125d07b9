"""Where the time of one job goes, from socket to socket: every system call of every process of it, by ftrace.

    sudo .venv/bin/python -m bench.stages [--jobs N] [--code CODE] [--interpreter NAME] [--show]

The kernel writes down when each call of api, spawner, init and job began and ended (tracefs, an instance of our own).
Marks among them cut the time from the request's first byte to the answer's last into stages. Tracing costs about a
tenth of the time that it measures.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import programs, server, wire
from bench.figures import median, percentile

TRACING = Path("/sys/kernel/tracing")
EVENTS = ("raw_syscalls/sys_enter", "raw_syscalls/sys_exit", "sched/sched_process_exit", "sched/sched_process_fork")
CALLS = {
    0: "read", 1: "write", 3: "close", 7: "poll", 17: "pread64", 44: "sendto", 45: "recvfrom", 46: "sendmsg",
    47: "recvmsg", 59: "execve", 61: "wait4", 62: "kill", 231: "exit_group", 232: "epoll_wait", 257: "openat",
    263: "unlinkat", 281: "epoll_pwait", 319: "memfd_create", 435: "clone3",
}  # fmt: skip
"""Of x86-64, those that are marks."""
LINE = re.compile(r"^\s*(?P<comm>.+)-(?P<pid>\d+)\s+\[\d+\] \S+\s+(?P<at>[\d.]+): (?P<event>\w+): (?P<rest>.*)$")
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Call:
    """One system call, or the death of a process (`name` is "died"). Times are CLOCK_MONOTONIC seconds."""

    part: str
    pid: int
    name: str
    begin: float
    end: float
    first: int
    result: int


@contextlib.contextmanager
def tracing(pids: list[int], events: tuple[str, ...] = EVENTS) -> Iterator[Path]:
    """Record what these processes and their children do. Yields: the folder; `trace` in it has what was recorded."""
    folder = TRACING / "instances/sandrun-bench"
    if not folder.parent.is_dir():
        raise SystemExit(f"bench: {TRACING} is not there: mount -t tracefs tracefs {TRACING}")
    folder.mkdir(exist_ok=True)
    try:
        (folder / "trace_clock").write_text("mono")
        (folder / "buffer_size_kb").write_text("16384")
        (folder / "options/event-fork").write_text("1")
        (folder / "set_event_pid").write_text(" ".join(str(pid) for pid in pids))
        for event in events:
            (folder / "events" / event / "enable").write_text("1")
        (folder / "trace").write_text("")
        (folder / "tracing_on").write_text("1")
        yield folder
    finally:
        (folder / "tracing_on").write_text("0")
        for event in events:
            (folder / "events" / event / "enable").write_text("0")
        folder.rmdir()


def parse(text: str, parts: dict[int, str]) -> list[Call]:
    """The calls, in the order of their ends. Processes that `parts` does not name are of sandboxes."""
    found: list[Call] = []
    open_calls: dict[int, tuple[float, int, int]] = {}
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        pid, at, rest = int(match["pid"]), float(match["at"]), match["rest"]
        part = parts.get(pid, "sandbox")
        if match["event"] == "sys_enter" and (entered := re.match(r"NR (-?\d+) \((\w+)", rest)):
            open_calls[pid] = (at, int(entered[1]), int(entered[2], 16))
        elif match["event"] == "sys_exit" and (left := re.match(r"NR (-?\d+) = (-?\d+)", rest)):
            begin, number, first = open_calls.pop(pid, (at, int(left[1]), -1))
            found.append(Call(part, pid, CALLS.get(number, str(number)), begin, at, first, int(left[2])))
        elif match["event"] == "sched_process_exit":
            found.append(Call(part, pid, "died", at, at, 0, 0))
    return found


# ---- stages ------------------------------------------------------------------------------------------------

STAGES = (
    ("to api", "the request crosses the loopback, api wakes"),
    ("api: request", "parse, admit, queue, pack the archive, make pipes, send START"),
    ("to spawner", "it wakes"),
    ("spawner: assign", "write limits, read them back, hand the descriptors over"),
    ("to job", "the parked job wakes"),
    ("job: prepare", "read the spec, unpack, list what is there, tell that it begins"),
    ("job: code", "until its output is written"),
    ("job: end", "the interpreter finishes, the process dies"),
    ("to init", "it wakes, sees the death"),
    ("init: end", "end and reap all others, measure, report"),
    ("to spawner again", "it wakes"),
    ("spawner: verdict", "read the meters, judge, send ENDED"),
    ("to api again", "it wakes"),
    ("api: answer", "read the pipes, conclude, write the answer"),
    ("to client", "the answer crosses the loopback"),
)


def cut(calls: list[Call], begin: float, end: float) -> list[float] | None:
    """Seconds of each of STAGES for the job between `begin` and `end`; None if its marks cannot all be found."""
    mine = [call for call in calls if begin - 0.001 <= call.end <= end + 0.001]

    def first(part: str, names: tuple[str, ...], after: float, pid: int = 0, *, least: int = -1) -> Call:
        for call in mine:
            if (
                call.part == part
                and call.name in names
                and call.end >= after
                and call.result >= least
                and (not pid or call.pid == pid)
            ):
                return call
        raise LookupError(f"no {names} of {part}")

    try:
        request = first("api", ("read", "recvfrom"), begin, least=1)
        asked = first("api", ("sendmsg",), request.end)
        heard = first("spawner", ("recvmsg",), asked.begin, least=1)
        first_message = first("spawner", ("sendmsg",), heard.end)
        go = first("spawner", ("sendmsg",), first_message.end + 1e-9)
        woken = [c for c in mine if c.part == "sandbox" and c.name == "recvmsg" and c.end >= first_message.begin]
        inits = {c.pid for c in mine if c.part == "sandbox" and c.name == "wait4"}
        job = next(c for c in woken if c.pid not in inits)
        output = next(c for c in mine if c.pid == job.pid and c.name == "write" and c.first == 1 and c.end > job.end)
        running = [c for c in mine if c.pid == job.pid and c.name in ("sendto", "sendmsg") and c.end < output.begin][-1]
        died = first("sandbox", ("died",), output.end, job.pid)
        reaped = next(c for c in mine if c.pid in inits and c.name == "wait4" and c.end > died.end and c.result > 0)
        reports = [c for c in mine if c.pid == reaped.pid and c.name in ("write", "sendto") and c.begin > reaped.end]
        told = first("spawner", ("recvmsg",), reports[0].begin, least=1)
        told_to_api = (c for c in mine if c.part == "spawner" and c.name in ("sendto", "sendmsg"))
        verdict = next(c for c in told_to_api if c.begin > told.end)
        known = first("api", ("read", "recvmsg"), verdict.begin, least=0)
        answer = [c for c in mine if c.part == "api" and c.name == "write" and c.first > 2 and c.begin > known.end][-1]
    except (LookupError, StopIteration):
        return None
    marks = (
        begin, request.begin, asked.begin, heard.begin if heard.begin > asked.begin else asked.end, go.end, job.end,
        running.end, output.end, died.begin, reaped.end, reports[0].end, told.end, verdict.end, known.end, answer.end,
        end,
    )  # fmt: skip
    return [max(0.0, after - before) for before, after in itertools.pairwise(marks)]


def show(calls: list[Call], begin: float, end: float) -> None:
    """Every call of one job."""
    for call in sorted(calls, key=lambda call: call.begin):
        if begin - 0.001 <= call.end <= end + 0.01:
            at, took = (call.begin - begin) * 1000, (call.end - call.begin) * 1000
            print(f"{at:9.3f} {took:8.3f}  {call.part:10}{call.pid:7}  {call.name} = {call.result}")


def measure(jobs: int, code: str, asked: dict[str, object]) -> tuple[list[Call], list[tuple[float, float]]]:
    request, wanted = wire.run(code, **asked), wire.stdout("hello\n")
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        for _ in range(40):
            connection.timed(request, wanted)
            time.sleep(PAUSE_SECONDS / 2)
        time.sleep(3.0)
        parts = {pid: part for part, pids in ours.parts().items() for pid in pids}
        marks = []
        with tracing(list(parts)) as folder:
            for _ in range(jobs):
                time.sleep(PAUSE_SECONDS)
                connection.ready()
                begin = time.monotonic()
                connection.timed(request, wanted)
                marks.append((begin, time.monotonic()))
            (folder / "tracing_on").write_text("0")
            text = (folder / "trace").read_text()
    return parse(text, parts), marks


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--code", default=programs.HELLO, help="it must print hello")
    parser.add_argument("--interpreter", help="another than python3")
    parser.add_argument("--show", action="store_true", help="list every system call of the median job too")
    asked = parser.parse_args(arguments)
    more: dict[str, object] = {"interpreter": asked.interpreter} if asked.interpreter else {}
    calls, marks = measure(asked.jobs, asked.code, more)
    cuts = [(found, mark) for mark in marks if (found := cut(calls, *mark)) is not None]
    if not cuts:
        print("bench: no job's stages could be told apart", file=sys.stderr)
        return 1
    totals = [end - begin for _, (begin, end) in cuts]
    print(f"{len(cuts)} of {len(marks)} jobs, traced; median {median(totals) * 1000:.2f} ms, ms by stage:\n")
    print(f"{'stage':20}{'p10':>8}{'p50':>8}{'p90':>8}   what")
    for number, (name, about) in enumerate(STAGES):
        taken = [found[number] * 1000 for found, _ in cuts]
        ranks = "".join(f"{percentile(taken, rank):8.3f}" for rank in (10, 50, 90))
        print(f"{name:20}{ranks}   {about}")
    if asked.show:
        middle = sorted(cuts, key=lambda one: one[1][1] - one[1][0])[len(cuts) // 2][1]
        show(calls, *middle)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
