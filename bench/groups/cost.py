"""CPU time and memory: what a job, a server, and a parked sandbox take."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench import machine, processes, programs, server
from bench.context import Context
from bench.figures import Chart, Outcome, median, ratio
from bench.groups.latency import HELLO, HELLO_PRINTED, SANDRUN

MIB = 1 << 20
SERVER = ("api", "spawner", "zygote", "sandboxes")
BENT = 0.05
TEARDOWN_SECONDS = 0.3
"""What a job leaves to do after its answer (its sandbox goes, another is parked) is its cost too."""


def cost(context: Context) -> Outcome:
    """Jobs one after the other; /proc/stat before and after, less what the machine uses by itself meanwhile."""
    outcome = Outcome()
    count = context.counts.cost_jobs
    taken: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    others: list[float] = []
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        program = programs.hello()

        def hello() -> None:
            connection.timed(HELLO, HELLO_PRINTED)

        contenders: dict[str, Callable[[], object]] = {SANDRUN: hello}
        for name in ("bare", "bubblewrap"):
            if (peer := context.peer(name)) is not None:
                contenders[name] = lambda peer=peer: peer.run(program)  # type: ignore[misc]
        parts = ours.parts()
        for _ in range(context.counts.cost_rounds):
            idle = machine.busy_share(1.0)
            others.append(idle)
            for name, run in contenders.items():
                for _ in range(max(count // 4, 1)):  # the number of parked sandboxes follows demand: let it get there
                    run()
                before, own, begin = machine.cpu_ms(), time.process_time(), time.monotonic()
                server_before = _server_ms(parts)
                for _ in range(count):
                    run()
                own = time.process_time() - own
                time.sleep(TEARDOWN_SECONDS)
                seconds = time.monotonic() - begin
                used = machine.cpu_ms() - before - idle * seconds * 1000
                taken.setdefault(name, []).append(used / count)
                if name == SANDRUN:
                    for part, ms in _server_ms(parts).items():
                        shares.setdefault(part, []).append((ms - server_before[part]) / count)
                    shares.setdefault("load generator", []).append(own * 1000 / count)
    spreads = outcome.put_spreads("CPU of a hello job, ms", taken)
    parts_ms = {part: round(median(values), 3) for part, values in shares.items()}
    value = spreads[SANDRUN].p50
    own = sum(parts_ms[part] for part in SERVER)
    parts_ms["kernel threads and the rest"] = round(value - sum(parts_ms.values()), 3)
    note = f"other programs used {max(others):.2f} of a core meanwhile, which bends this" if max(others) > BENT else ""
    outcome.put("cpu", value, note, parts_ms)
    outcome.put("cpu-processes", own, details={part: parts_ms[part] for part in SERVER})
    outcome.put("cpu-ratio", ratio(value, spreads["bare"].p50), bare_cpu_ms=spreads["bare"].p50)
    bars = [(who, s.p50, s.p10, s.p90) for who, s in spreads.items()]
    title = 'CPU time of print("hello"), all processes and the kernel'
    outcome.charts.append(Chart(name="cpu", title=title, unit="CPU-ms", bars=bars))
    return outcome


def _server_ms(parts: dict[str, list[int]]) -> dict[str, float]:
    """CPU time of the server's parts; `sandboxes` is what zygotes have reaped."""
    found = dict.fromkeys(SERVER, 0.0)
    for part in ("api", "spawner", "zygote"):
        for pid in parts.get(part, []):
            own, children = processes.cpu_seconds(pid)
            found[part] += own * 1000
            if part == "zygote":
                found["sandboxes"] += children * 1000
    return found


def memory(context: Context) -> Outcome:
    """An idle server that has run jobs. Pages that zygote and sandboxes share count for each in part."""
    outcome = Outcome()
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        for _ in range(context.counts.submit):
            connection.timed(HELLO, HELLO_PRINTED)
        processes.settled(ours.pid, 4.0)
        parts = ours.parts()
        pss = {part: processes.pss_bytes(pids) / MIB for part, pids in parts.items()}
        outcome.put(
            "server-memory",
            sum(value for part, value in pss.items() if part != "sandbox"),
            f"and {pss.get('sandbox', 0):.0f} MiB of {ours.sandboxes()} parked sandboxes",
            {f"{part}_mib": round(value, 1) for part, value in pss.items()},
        )
    return outcome


def parked(context: Context) -> Outcome:
    """The fall of MemAvailable when so many more are parked, again and again."""
    outcome = Outcome()
    few, many = 2, 2 + context.counts.parked
    falls, pss = [], []
    with server.parked_file(few) as file, server.running(parked=file) as ours:
        for _ in range(context.counts.parked_rounds):
            levels = []
            for wanted in (few, many):
                file.write_text(str(wanted))
                if not processes.until(lambda wanted=wanted: ours.sandboxes() == wanted, 60):  # type: ignore[misc]
                    outcome.put("parked", None, f"{ours.sandboxes()} sandboxes are parked, not {wanted}")
                    return outcome
                time.sleep(1.0)
                readings = []
                for _ in range(10):
                    readings.append(machine.available())
                    time.sleep(0.05)
                levels.append(median(readings))
            falls.append((levels[0] - levels[1]) / (many - few) / MIB)
            pss.append(processes.pss_bytes(ours.parts()["sandbox"]) / many / MIB)
            context.say(f"parked: {falls[-1]:.2f} MiB each by MemAvailable, {pss[-1]:.2f} by Pss")
        file.write_text(str(few))
    outcome.put("parked", median(falls), f"median of {len(falls)} times {many - few}", pss_mib=median(pss), all=falls)
    return outcome
