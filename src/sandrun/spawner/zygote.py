"""A zygote: a warm interpreter, PID 1 of its own PID namespace and uid 0 of its own user namespace, in a private
read-only root. It forks sandboxes and sees no job's data. Everything here runs inside `import sitecustomize` of
`python3 MARKER` (see `sandbox.script`), so returning from `main` is what runs a job's script."""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from sandrun.linux import calls, memory, process
from sandrun.linux.calls import Slots
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
        _kept.append(nest)
        protocol.send(connection, protocol.encode_facts(protocol.WARM, _prepare(config, nest)))
        del config
    except StepFailed as error:
        failure = messages.failure(error.step, error.__cause__ or error)
        protocol.send(connection, protocol.encode_refused(0, failure))
        os._exit(1)
    except BaseException as error:
        protocol.send(connection, protocol.encode_refused(0, messages.failure("zygote", error)))
        os._exit(1)
    try:
        _serve(connection, nest)
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


def _prepare(config: dict[str, Any], nest: Nest) -> dict[str, Any]:
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
    script.remember()
    gc.collect()
    gc.freeze()
    script.prepare()
    if config["preload"]:
        memory.collapse()  # a bare interpreter is small enough to be better off without
    return {
        "python": sys.version.split()[0],
        "in_place": script.ready(),
        "reason": reason,
        "modules": modules,
    }


def _serve(connection: socket.socket, nest: Nest) -> None:
    ended = process.child_descriptor()
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    waiting.register(ended, select.POLLIN)
    while True:
        ready = dict(waiting.poll())
        if ended in ready:
            os.read(ended, 4096)
            _reap()
        if connection.fileno() not in ready:
            continue
        message, descriptors = protocol.receive(connection, 64, protocol.MAX_DESCRIPTORS)
        if not message:
            os._exit(0)
        spawn = protocol.Spawn.decode(message)
        if len(descriptors) != spawn.descriptors:
            os._exit(1)
        try:
            if _spawn(connection, nest, spawn, descriptors):
                return
        except (OSError, StepFailed) as error:
            step = error.step if isinstance(error, StepFailed) else "clone3"
            failure = messages.failure(step, error.__cause__ or error)
            protocol.send(connection, protocol.encode_refused(spawn.slot, failure))
        protocol.close_all(descriptors)


def _reap() -> None:
    """Of sandboxes that are over. Nowhere else: until then no other process has their pids (`_write_maps`)."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


_tables: dict[int, calls.Tables] = {}
"""By `Nest.entries`, which is the same for all sandboxes."""


def _spawn(connection: socket.socket, nest: Nest, spawn: protocol.Spawn, descriptors: list[int]) -> bool:
    """Fork a sandbox's init. Returns True only in a job's process that is to run in this interpreter."""
    if spawn.entries not in _tables:
        nest.entries = spawn.entries
        _tables[spawn.entries] = tabulate(nest)
    slots = Slots()
    slots[calls.INIT_ID], slots[calls.JOB_ID] = spawn.init_id, spawn.job_id
    slots[calls.CONTROL], slots[calls.GATE], *rest = descriptors
    if spawn.flags & protocol.HAS_STORAGE:
        slots[calls.STORAGE] = rest.pop(0)
    else:
        try:
            descriptors.append(rootfs.new_storage(spawn.storage_bytes, owner=0, noswap=False))
        except OSError as error:
            raise StepFailed("storage") from error
        slots[calls.STORAGE] = descriptors[-1]
    cgroup = rest.pop(0) if spawn.flags & protocol.HAS_CGROUP else None
    for slot, entry in zip(calls.ENTRIES[: spawn.entries], rest, strict=True):
        slots[slot] = entry
    calls.TITLE.value = process.title(f"sandrun: sandbox {spawn.slot}")[1]
    ours, theirs = socket.socketpair()
    try:
        slots[calls.SYNC] = theirs.fileno()
        pid, pidfd = calls.spawn(_tables[spawn.entries], slots, cgroup_fd=cgroup)
        if pid == 0:
            for end in (ours, theirs, connection):
                end.detach()  # closed by number, with everything else that is foreign
            _be_forked(nest, slots, _tables[spawn.entries].filter)
            return True
        theirs.close()
        protocol.send(connection, protocol.encode_spawned(spawn.slot), [pidfd])
        os.close(pidfd)
        if not nest.shared_uid and ours.recv(1) == b"u":
            _write_maps(pid, spawn)
            ours.send(b"m")
    finally:
        ours.close()
        theirs.close()
    return False


def _be_forked(nest: Nest, slots: Slots, filter: bytes) -> None:
    """Be what a sandbox's init has forked. Returns only if this interpreter is to run the job."""
    spec = Spec(
        nest,
        control=slots[calls.CONTROL],
        gate=slots[calls.GATE],
        snapshot=slots[calls.SNAPSHOT],
        landlock=nest.landlock if slots[calls.SEEN] == -errno.EACCES else 0,
        filter=filter,
    )
    if slots[calls.ROLE] == calls.COLLECTOR:
        job.be_collector(spec, slots[calls.WISHES], slots[calls.OUTPUTS])
    job.become_job(spec)


def _write_maps(pid: int, spawn: protocol.Spawn) -> None:
    """Give a sandbox's user namespace its two ids. The pid cannot be another's: its process waits for us, unreaped."""
    ids = b"%d %d 1\n%d %d 1\n" % (INIT_UID, spawn.init_id, JOB_UID, spawn.job_id)
    for name, data in (("setgroups", b"deny"), ("gid_map", ids), ("uid_map", ids)):
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
