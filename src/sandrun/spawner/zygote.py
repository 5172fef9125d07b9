"""A zygote: a warm interpreter, PID 1 of its own PID namespace and uid 0 of its own user namespace, in a private
read-only root. It forks sandboxes and sees no job's data. Everything here runs inside `import sitecustomize` of
`python3 MARKER` (see `sandbox.script`), so returning from `main` is what runs a job's script."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import socket
import sys
from typing import Any

from sandrun.linux import calls, memory, process
from sandrun.sandbox import job, messages, rootfs, script
from sandrun.sandbox.spec import INIT_UID, JOB_UID, Nest, Spec
from sandrun.sandbox.steps import StepFailed, tabulate
from sandrun.spawner import preload, protocol

CODE, CONFIG, SOCKET = 3, 4, 5
"""Descriptors that the spawner hands over."""


_kept: list[object] = []
"""What a job must not free, because to free is to write, and to write copies a page."""


def main() -> None:
    """Serve until the spawner is gone. Returns only in a job's process."""
    connection = socket.socket(fileno=SOCKET)
    try:
        process.set_parent_death_signal(signal.SIGKILL)
        with open(CONFIG, "rb") as file:
            config = json.loads(file.read())
        process.set_title(f"sandrun: zygote {config['name'] or 'bare'}")
        process.set_name("sandrun-zygote")
        nest = _make_nest(config)
        warm = protocol.encode_facts(protocol.WARM, _load(config, nest))
        uids = None if nest.shared_uid else (INIT_UID, JOB_UID)
        server = calls.ForkServer(SOCKET, tabulate(nest), entries=nest.entries, uids=uids)
        _kept.extend((config, nest, server))
        _settle(config)
        protocol.send(connection, warm)
        connection.detach()  # in a job's process its end would close whatever has that number
    except StepFailed as error:
        failure = messages.failure(error.step, error.__cause__ or error)
        protocol.send(connection, protocol.encode_refused(0, failure))
        os._exit(1)
    except BaseException as error:
        protocol.send(connection, protocol.encode_refused(0, messages.failure("zygote", error)))
        os._exit(1)
    try:
        while not server.serve():
            pass
        _be_forked(nest, server)
    except BaseException as error:
        os.write(2, f"zygote: {type(error).__name__}: {error}\n".encode())
        os._exit(1)


def _make_nest(config: dict[str, Any]) -> Nest:
    wanted = dict(config["nest"])
    for name in ("job_filter", "init_filter"):
        wanted[name] = bytes.fromhex(wanted[name])
    nest = Nest(masked=rootfs.find_masked(), **wanted)
    nest.rehearsal = bytes.fromhex(config["rehearsal"])
    return nest


def _load(config: dict[str, Any], nest: Nest) -> dict[str, Any]:
    """Load what jobs shall find loaded, and run the paths they take once: a page touched here is not copied there."""
    reason = ""
    try:
        script.find()
    except LookupError as error:
        reason = str(error)
    script.forget_archive()
    if config["preload"]:
        preload.load(config["preload"], config["libraries"], nest)
    for _ in range(2):
        script.warm_up()
    os.environ.pop("PYTHONPATH", None)
    modules = sorted(n for n in sys.modules if not n.startswith(("sandrun", "sitecustomize", "__main__")))
    return {
        "python": sys.version.split()[0],
        "in_place": script.ready(),
        "reason": reason,
        "modules": modules,
    }


def _settle(config: dict[str, Any]) -> None:
    """What is there now stays: no job's collector of garbage looks at it."""
    script.remember()
    gc.collect()
    gc.freeze()
    script.prepare()
    if config["preload"]:
        memory.collapse()  # a bare interpreter is small enough to be better off without


def _be_forked(nest: Nest, server: calls.ForkServer) -> None:
    """Be what a sandbox's init has forked. Returns only if this interpreter is to run the job."""
    slots = server.slots
    spec = Spec(
        nest,
        control=slots[calls.CONTROL],
        gate=slots[calls.GATE],
        snapshot=slots[calls.SNAPSHOT],
        landlock=nest.landlock if slots[calls.SEEN] == -errno.EACCES else 0,
        filter=server.tables.filter,
    )
    if slots[calls.ROLE] == calls.COLLECTOR:
        job.be_collector(spec, slots[calls.WISHES], slots[calls.OUTPUTS])
    job.become_job(spec)
