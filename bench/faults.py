"""How many pages a sandbox touches in its life: each is a fault, and faults are most of a job's CPU time.

    sudo .venv/bin/python -m bench.faults [--jobs N]

By ftrace: each fault of every process, told apart by process (init, job), by time (while it is built and parked, or
while it has a job), and by kind. Faults are counted, so other load on the machine does not bend them.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections import Counter, defaultdict

from bench import programs, server, stages, wire
from bench.figures import median

EVENTS = (
    "exceptions/page_fault_user",
    "exceptions/page_fault_kernel",
    "sched/sched_process_fork",
    "sched/sched_process_exit",
    "raw_syscalls/sys_enter",
)
PRESENT, WRITE = 1, 2
"""Bits of a fault's error code on x86."""
KINDS = ("copied", "new", "mapped")


class Life:
    """What was seen of one process."""

    def __init__(self) -> None:
        self.parent = 0
        self.born = self.died = 0.0
        self.faults: list[tuple[float, str]] = []
        self.calls: list[float] = []

    @property
    def assigned(self) -> float:
        """When it was given its job: the end of its longest silence."""
        gaps = [(after - before, after) for before, after in itertools.pairwise(self.calls)]
        return max(gaps)[1] if gaps else self.died


def parse(text: str) -> dict[int, Life]:
    lives: dict[int, Life] = defaultdict(Life)
    for line in text.splitlines():
        match = stages.LINE.match(line)
        if match is None:
            continue
        pid, at, event, rest = int(match["pid"]), float(match["at"]), match["event"], match["rest"]
        if event.startswith("page_fault") and (code := re.search(r"error_code=0x(\w+)", rest)):
            bits = int(code[1], 16)
            kind = "copied" if bits & WRITE and bits & PRESENT else "new" if bits & WRITE else "mapped"
            lives[pid].faults.append((at, kind))
        elif event == "sched_process_fork" and (child := re.search(r"child_pid=(\d+)", rest)):
            lives[int(child[1])].parent, lives[int(child[1])].born = pid, at
        elif event == "sched_process_exit":
            lives[pid].died = at
        elif event == "sys_enter":
            lives[pid].calls.append(at)
    return dict(lives)


def measure(jobs: int) -> tuple[dict[int, Life], dict[str, list[int]]]:
    request, wanted = wire.run(programs.HELLO), wire.stdout("hello\n")
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        for _ in range(40):
            connection.timed(request, wanted)
        time.sleep(5.0)  # the number of parked sandboxes is down: those that are built for us are the next to be used
        parts = ours.parts()
        with stages.tracing([pid for pids in parts.values() for pid in pids], EVENTS) as folder:
            for _ in range(jobs):
                time.sleep(0.1)
                connection.timed(request, wanted)
            time.sleep(0.3)
            (folder / "tracing_on").write_text("0")
            text = (folder / "trace").read_text()
    return parse(text), parts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20)
    jobs = parser.parse_args(arguments).jobs
    lives, parts = measure(jobs)
    whole = {pid: life for pid, life in lives.items() if life.born and life.died}
    zygotes = set(parts["zygote"])
    inits = {pid: life for pid, life in whole.items() if life.parent in zygotes}
    bodies = {pid: life for pid, life in whole.items() if life.parent in inits}
    if not bodies:
        print("bench: no sandbox was seen from its beginning to its end; try more --jobs", file=sys.stderr)
        return 1
    print(f"page faults of a sandbox that runs hello, median of {len(bodies)} whole lives\n")
    print(f"{'':24}" + "".join(f"{kind:>9}" for kind in (*KINDS, "all")))
    for name, group in (("init", inits), ("job", bodies)):
        for when in ("while it is built", "while it has a job"):
            counts = []
            for life in group.values():
                late = when != "while it is built"
                counts.append(Counter(kind for at, kind in life.faults if (at >= life.assigned) == late))
            ranks = [median([count[kind] for count in counts]) for kind in KINDS]
            total = median([sum(count.values()) for count in counts])
            print(f"{name:5}{when:19}" + "".join(f"{number:9.0f}" for number in (*ranks, total)))
    for part in ("zygote", "spawner", "api"):
        count = sum(len(lives[pid].faults) for pid in parts[part] if pid in lives) / jobs
        print(f"{part:24}{'':27}{count:9.0f}")
    print("\ncopied: a page shared with the zygote; new: of its own; mapped: of a file, or first read")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
