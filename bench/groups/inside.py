"""What the walls cost code that already runs: the same program inside and outside, each timing itself."""

from __future__ import annotations

from bench import machine, programs, server, wire
from bench.context import Contender, Context, interleave
from bench.figures import Outcome, ratio
from bench.groups.latency import SANDRUN
from bench.peers import PeerFailed, spawn

OUTSIDE_FOLDER = "/dev/shm"
"""A tmpfs, as a job's folder is one."""


def inside(context: Context) -> Outcome:
    outcome = Outcome()
    with server.running(own_bounds=True) as ours:
        connection = ours.connection()
        for name, code in programs.INSIDE.items():

            def sandboxed(code: str = code) -> float:
                request = wire.run(f"FOLDER = '/job'\n{code}", timeout=120)
                result = connection.json(request)
                if result["exit_code"] != 0:
                    raise wire.Failed(f"{result['outcome']}: {result['stderr'][-300:]}")
                return float(result["stdout"])

            def bare(code: str = code) -> float:
                argv = (machine.PYTHON, "-c", f"FOLDER = '{OUTSIDE_FOLDER}'\n{code}")
                _, output, exit_code = spawn(argv, machine.ENVIRONMENT)
                if exit_code:
                    raise PeerFailed(f"outside: exit {exit_code}")
                return float(output)

            contenders: dict[str, Contender] = {SANDRUN: sandboxed, "bare": bare}
            try:
                samples = interleave(contenders, context.counts.inside)
            except wire.Failed as error:
                outcome.put(name, None, str(error))
                continue
            spreads = outcome.put_spreads(f"{name}, ms", samples, 1000)
            details = {f"{who}_{rank}_ms": getattr(s, rank) for who, s in spreads.items() for rank in ("p10", "p50")}
            outcome.put(name, ratio(spreads[SANDRUN].p50, spreads["bare"].p50), details=details)
    return outcome
