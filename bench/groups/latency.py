"""One job at a time on an idle machine: how long until its whole answer is there."""

from __future__ import annotations

import time

from bench import peers, programs, server, wire
from bench.context import Contender, Context, interleave
from bench.figures import Chart, Outcome, Spread, ratio
from bench.processes import until

SANDRUN = "Sandrun"
HELLO, HELLO_PRINTED = wire.run(programs.HELLO), wire.stdout("hello\n")


def _peers(context: Context, program: peers.Program) -> tuple[dict[str, Contender], dict[str, int]]:
    contenders: dict[str, Contender] = {}
    for peer in context.peers:
        contenders[peer.name] = lambda peer=peer: peer.run(program)  # type: ignore[misc]
    return contenders, {peer.name: peer.weight for peer in context.peers}


def _chart(name: str, title: str, spreads: dict[str, Spread]) -> Chart:
    bars = [(who, s.p50, s.p10, s.p90) for who, s in spreads.items()]
    return Chart(name=name, title=title, unit="ms", bars=bars)


def _compared(spreads: dict[str, Spread], base: str) -> tuple[float | None, dict[str, float]]:
    ours, theirs = spreads[SANDRUN], spreads.get(base)
    details = {"sandrun_p50_ms": ours.p50}
    if theirs is None:
        return None, details
    return ratio(ours.p50, theirs.p50), {**details, f"{base}_p50_ms": theirs.p50}


def latency(context: Context) -> Outcome:
    """hello, over a kept-alive connection, beside every peer."""
    outcome = Outcome()
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        contenders, weights = _peers(context, programs.hello())
        contenders = {SANDRUN: lambda: connection.timed(HELLO, HELLO_PRINTED), **contenders}
        samples = interleave(contenders, context.counts.hello, weights=weights)
    spreads = outcome.put_spreads("hello, ms", samples, 1000)
    value, details = _compared(spreads, "bare")
    outcome.put("hello", value, details=details)
    outcome.put("hello-p99", spreads[SANDRUN].p99 / spreads["bare"].p50, sandrun_p99_ms=spreads[SANDRUN].p99)
    value, details = _compared(spreads, "bubblewrap")
    outcome.put("hello-bubblewrap", value, context.absent.get("bubblewrap", ""), details)
    outcome.charts.append(_chart("hello", 'print("hello") in Python, from request to whole answer', spreads))
    return outcome


def numpy(context: Context) -> Outcome:
    """import numpy in the environment `data`."""
    outcome = Outcome()
    if context.environments is None:
        outcome.put("numpy", None, context.environments_reason)
        return outcome
    program = programs.numpy(context.environments)
    with server.running(state=context.environments, own_bounds=True) as ours:
        connection = ours.connection()
        request = wire.run(programs.NUMPY, environment="data")
        contenders: dict[str, Contender] = {SANDRUN: lambda: connection.timed(request, wire.stdout("numpy\n"))}
        weights = {SANDRUN: 1}
        for peer in context.peers:
            if reason := peer.try_out(program):
                context.say(f"numpy without {peer.name}: {reason}")
                continue
            contenders[peer.name] = lambda peer=peer: peer.run(program)  # type: ignore[misc]
            weights[peer.name] = peer.weight
        samples = interleave(contenders, context.counts.numpy, weights=weights)
    spreads = outcome.put_spreads("import numpy, ms", samples, 1000)
    value, details = _compared(spreads, "bare")
    outcome.put("numpy", value, details=details)
    outcome.charts.append(_chart("numpy", "import numpy, from request to whole answer", spreads))
    return outcome


def cold(context: Context) -> Outcome:
    """hello on a server that keeps no sandbox parked."""
    outcome = Outcome()
    with server.parked_file(0) as parked, server.running(parked=parked) as ours:
        if not until(lambda: ours.sandboxes() == 0, 10):
            outcome.put("cold", None, f"{ours.sandboxes()} sandboxes stay parked")
            return outcome
        connection = ours.connection()
        bare = context.peers[0]
        program = programs.hello()
        contenders = {SANDRUN: lambda: connection.timed(HELLO, HELLO_PRINTED), bare.name: lambda: bare.run(program)}
        samples = interleave(contenders, context.counts.cold)
    spreads = outcome.put_spreads("hello with no sandbox parked, ms", samples, 1000)
    value, details = _compared(spreads, "bare")
    outcome.put("cold", value, details=details)
    return outcome


def submit(context: Context) -> Outcome:
    """A tarball of ten files, to `completed` with the output listed."""
    outcome = Outcome()
    files = {f"part{number}.txt": f"{number}\n".encode() * 100 for number in range(9)}
    files["main.py"] = b'import glob\nwith open("out.txt", "w") as f: f.write(str(len(glob.glob("part*.txt"))))\n'
    request = wire.submit(wire.tarball(files), {"entrypoint": "main.py"})
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()

        def once() -> float:
            connection.ready()
            begin = time.perf_counter()
            job = connection.json(request, 202)["job_id"]
            result = wire.finished(connection, job)
            seconds = time.perf_counter() - begin
            if [file["path"] for file in result["output_files"]] != ["out.txt"]:
                raise wire.Failed(f"{result['outcome']}, files {result['output_files']}")
            connection.exchange(wire.delete(f"/jobs/{job}"))
            return seconds

        bare = context.peers[0]
        program = programs.hello()
        samples = interleave({SANDRUN: once, bare.name: lambda: bare.run(program)}, context.counts.submit)
    spreads = outcome.put_spreads("10-file tarball to its output, ms", samples, 1000)
    value, details = _compared(spreads, "bare")
    outcome.put("submit", value, details=details)
    return outcome


def executed(context: Context) -> Outcome:
    """Interpreters that are exec'ed inside, beside bubblewrap running the same."""
    outcome = Outcome()
    bubblewrap = context.peer("bubblewrap")
    bare = context.peers[0]
    absent = context.absent.get("bubblewrap", "bubblewrap is not measured")
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        for name in ("bash", "perl", "sh", "fresh", "node"):
            program = programs.hello() if name == "fresh" else programs.executed(name)
            if reason := bare.try_out(program):
                outcome.put(name, None, reason)
                continue
            asked = {"fresh_interpreter": True} if name == "fresh" else {"interpreter": name}
            request = wire.run(program.argv[-1], **asked)
            contenders: dict[str, Contender] = {
                SANDRUN: lambda request=request: connection.timed(request, wire.stdout("hello\n")),  # type: ignore[misc]
                "bare": lambda program=program: bare.run(program),  # type: ignore[misc]
            }
            if bubblewrap is not None:
                contenders["bubblewrap"] = lambda program=program: bubblewrap.run(program)  # type: ignore[misc]
            samples = interleave(contenders, context.counts.executed)
            what = "python3 with fresh_interpreter" if name == "fresh" else name
            spreads = outcome.put_spreads(f"{what}, ms", samples, 1000)
            value, details = _compared(spreads, "bubblewrap")
            note = absent if bubblewrap is None else ""
            if name == "node":
                outcome.put("node-bubblewrap", value, note, details)
                value, details = _compared(spreads, "bare")
                note = ""
            outcome.put(name, value, note, details)
    return outcome
