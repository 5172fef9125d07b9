"""One large archive that does not compress: taking it in, and unpacking it inside."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine, server, wire
from bench.context import Context, interleave
from bench.figures import Outcome, ratio
from bench.groups.latency import SANDRUN
from bench.peers import PeerFailed, spawn

PIECE_BYTES = 1 << 16
TAR = "/usr/bin/tar"


def uploads(context: Context) -> Outcome:
    outcome = Outcome()
    size = context.counts.upload_bytes
    files = {f"data{number}": os.urandom(size // 10) for number in range(10)}
    files["main.py"] = b"print('here')\n"
    archive = wire.tarball(files, level=1)
    del files
    request = wire.submit(archive, {"entrypoint": "main.py", "outputs": []})
    unpacking: dict[str, list[float]] = {SANDRUN: [], "tar xzf": []}
    with (
        server.running() as ours,
        tempfile.TemporaryDirectory(prefix="sandrun-bench-", dir="/dev/shm") as folder,
    ):
        connection = ours.connection()
        packed = Path(folder) / "archive"
        packed.write_bytes(archive)

        def submit() -> float:
            connection.ready()
            begin = time.perf_counter()
            answer = connection.json(request, 202)
            seconds = time.perf_counter() - begin
            result = wire.finished(connection, answer["job_id"])
            if result["status"] != "completed":
                raise wire.Failed(f"{result['outcome']}: {result.get('failure')}")
            unpacking[SANDRUN].append(_start_seconds(result["execution_metadata"]))
            connection.exchange(wire.delete(f"/jobs/{answer['job_id']}"))
            return seconds

        def untar() -> float:
            target = Path(folder) / "target"
            target.mkdir()
            seconds, _, code = spawn((TAR, "xzf", str(packed), "-C", str(target)), machine.ENVIRONMENT)
            if code:
                raise PeerFailed(f"tar: exit {code}")
            unpacking["tar xzf"].append(seconds)
            shutil.rmtree(target)
            return seconds

        contenders = {SANDRUN: submit, "hash and memfd": lambda: _hash_and_write(request), "tar xzf": untar}
        samples = interleave(contenders, context.counts.uploads, gap=0.2)
    what = f"{len(archive) / 1e6:.0f} MB upload, ms"
    taken = outcome.put_spreads(what, {name: samples[name] for name in (SANDRUN, "hash and memfd")}, 1000)
    unpacked = outcome.put_spreads(f"{size / 1e6:.0f} MB unpacked, ms", unpacking, 1000)
    outcome.put("upload", ratio(taken["hash and memfd"].p50, taken[SANDRUN].p50), archive_bytes=len(archive))
    outcome.put("unpack", ratio(unpacked[SANDRUN].p50, unpacked["tar xzf"].p50))
    return outcome


def _hash_and_write(data: bytes) -> float:
    """SHA-256 over it and a copy in a memory file, piece by piece: what taking an upload in cannot do without."""
    begin = time.perf_counter()
    digest = hashlib.sha256()
    file = os.memfd_create("bench")
    view = memoryview(data)
    for at in range(0, len(data), PIECE_BYTES):
        piece = view[at : at + PIECE_BYTES]
        digest.update(piece)
        os.write(file, piece)
    digest.digest()
    seconds = time.perf_counter() - begin
    os.close(file)
    return seconds


def _start_seconds(times: dict[str, Any]) -> float:
    """From leaving the queue to the first line of the job's code: unpacking, and a millisecond or two beside it."""
    submitted, started = (datetime.datetime.fromisoformat(times[name]) for name in ("submitted_at", "started_at"))
    return (started - submitted).total_seconds() - float(times["queue_seconds"])
