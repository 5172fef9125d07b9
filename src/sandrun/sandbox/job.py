"""The process that becomes the job: walls first, then the host's look at them, then the client's files and code."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import Any, NoReturn

from sandrun.sandbox import collect, generators, messages, report, rootfs, script, unpack
from sandrun.sandbox.spec import Nest, Spec, close
from sandrun.sandbox.steps import StepFailed, limit_tasks

SETUP_FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
GO_DESCRIPTORS = 5
"""wishes, archive, stdin, stdout, stderr."""

REHEARSAL = "rehearsal.py"
"""The one file of `Nest.rehearsal`; gone before a job comes."""

START_UP_VARIABLES = tuple(
    """
    PYTHON LD_ LC_ LANG MALLOC_ GLIBC_ TZ
    OMP_ GOMP_ KMP_ OPENBLAS_ GOTO_ MKL_ BLIS_ NPY_
    """.split()
)
"""Interpreter and C libraries read variables that begin so when they start: a job that sets one gets an interpreter of
its own. What Python modules read is in `Nest.variables`."""


def become_job(spec: Spec) -> None:
    """Run the job. Returns only if this very interpreter is to run it, which begins when its start-up goes on."""
    try:
        wishes = _pass_gate(spec)
    except StepFailed as error:
        _give_up(spec.gate, error.step, error.__cause__ or error)
    except BaseException as error:
        _give_up(spec.gate, "gate", error)
    if wishes["in_place"]:
        try:
            script.become(wishes["entrypoint"], wishes["args"], _environment(spec, wishes))
        except BaseException as error:
            _refuse(wishes["entrypoint"], error)
        return
    _execute(spec, wishes)


def _pass_gate(spec: Spec) -> dict[str, Any]:
    """Prove the walls, wait for a job, unpack it. Returns: what the client wishes."""
    step = "verify"
    try:
        gate = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=spec.gate)
        found = report.measure(spec)
        report.verify(found, spec)
        step = "caches"
        rootfs.link_caches(spec.nest.caches)
        step = "random generators"
        generators.renew()
        gate.send(messages.CONFINED + json.dumps(found, separators=(",", ":")).encode())
        step = "rehearsal"
        _rehearse(spec)  # while the host looks
        step = "gate"
        message, descriptors, _, _ = socket.recv_fds(gate, 16, GO_DESCRIPTORS)
        if not message or len(descriptors) != GO_DESCRIPTORS:
            os._exit(SETUP_FAILED)  # the spawner is gone, or has seen what it must not see and says so itself
        step = "task limit"
        limit_tasks(messages.decode_go(message))
        step = "wishes"
        wishes_file, archive, *streams = descriptors
        wishes: dict[str, Any] = json.loads(_read_all(wishes_file))
        step = "unpack"
        unpack.unpack(archive, rootfs.WORK)
        if wishes["interpreter"] == "executable":
            os.chmod(wishes["entrypoint"], 0o755)
        step = "snapshot"
        _write_all(spec.snapshot, collect.snapshot(rootfs.WORK))
        step = "standard streams"
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        wishes["in_place"] = _runs_in_place(spec.nest, wishes)
        gate.send(messages.RUNNING + messages.encode_time(time.monotonic()))
        close(gate.detach(), spec.snapshot, *descriptors)
    except BaseException as error:
        raise StepFailed(step) from error
    return wishes


def _rehearse(spec: Spec) -> None:
    """Go once, before there is a job, the way that every job goes: what is written to now is not copied then."""
    scratch = spec.snapshot
    os.pwrite(scratch, spec.nest.rehearsal, 0)
    unpack.unpack(scratch, rootfs.WORK)
    _empty(scratch)
    _write_all(scratch, collect.snapshot(rootfs.WORK))
    _empty(scratch)
    wishes = {"entrypoint": REHEARSAL, "interpreter": "python3", "env": {"A": ""}, "fresh": False}
    _write_all(scratch, json.dumps(wishes).encode())
    wishes = json.loads(_read_all(scratch))
    _empty(scratch)
    _runs_in_place(spec.nest, wishes)
    os.unlink(REHEARSAL)
    script.rehearse(_environment(spec, wishes))


def _runs_in_place(nest: Nest, wishes: dict[str, Any]) -> bool:
    return (
        wishes["interpreter"] == "python3"
        and wishes["entrypoint"].endswith(".py")  # not a zip or a .pyc, which the interpreter's start-up looks at
        and not wishes["fresh"]
        and script.ready()
        and not any(name.startswith(START_UP_VARIABLES) or name in nest.variables for name in wishes["env"])
        and not script.eclipsed(wishes["entrypoint"])
    )


def default_environment(nest: Nest) -> dict[str, str]:
    """The exact list (requirement 13)."""
    found = {
        "PATH": nest.path,
        "HOME": rootfs.WORK,
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "XDG_CACHE_HOME": rootfs.CACHE_HOME,
        "XDG_CONFIG_HOME": rootfs.CONFIG_HOME,
        "USER": "sandbox",
        "LOGNAME": "sandbox",
    }
    if nest.environment:
        found["VIRTUAL_ENV"] = nest.environment
    return found


def _environment(spec: Spec, wishes: dict[str, Any]) -> dict[str, str]:
    """What the client gives comes last."""
    return {**default_environment(spec.nest), **wishes["env"]}


def _execute(spec: Spec, wishes: dict[str, Any]) -> NoReturn:
    entrypoint = wishes["entrypoint"]
    try:
        if wishes["interpreter"] == "executable":
            argv = [f"./{entrypoint}"]
        else:
            argv = [*spec.nest.interpreters[wishes["interpreter"]], entrypoint]
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # ignored by Python, and exec hands that on
        os.execve(argv[0], [*argv, *wishes["args"]], _environment(spec, wishes))
    except BaseException as error:
        _refuse(entrypoint, error)


def _refuse(entrypoint: str, error: BaseException) -> NoReturn:
    """The walls stand, but the client's file cannot be run: its fault, told as a shell tells it."""
    text = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    os.write(2, f"sandrun: {entrypoint}: {text}\n".encode(errors="backslashreplace"))
    os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)


def _give_up(channel: int, step: str, error: BaseException) -> NoReturn:
    try:
        os.write(channel, messages.FAILED + messages.failure(step, error))
    finally:
        os._exit(SETUP_FAILED)


def be_collector(spec: Spec, wishes_file: int, outputs_to: int) -> NoReturn:
    """Send what the job left behind, with no more rights than it had. Every process of the job's is dead."""
    status = 1
    try:
        outputs = json.loads(_read_all(wishes_file))["outputs"]
        before = _read_all(spec.snapshot)
        collect.collect(rootfs.WORK, None if outputs is None else tuple(outputs), before, outputs_to)
        status = 0
    except BrokenPipeError:
        status = 0  # nobody wants them any more
    except BaseException as error:
        _give_up(spec.control, "collector", error)
    finally:
        os._exit(status)


def _read_all(descriptor: int) -> bytes:
    """A memory file from its beginning, whatever its offset is."""
    parts = []
    offset = 0
    while part := os.pread(descriptor, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _empty(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
