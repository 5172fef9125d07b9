"""PID 1 of a sandbox: builds it, starts the job, reaps, ends everything, has outputs collected, reports.

It shares no uid with the job (with one uid: no user namespace), is not dumpable, has a filter of its own, never execs,
and reads nothing that the client sent.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from typing import NoReturn

from sandrun.linux import capabilities, process, seccomp
from sandrun.sandbox import job, messages, rootfs
from sandrun.sandbox.spec import Spec, close
from sandrun.sandbox.steps import INIT_STEPS, StepFailed, take


def be_init(spec: Spec) -> None:
    """Returns only in the job's process, and only if this interpreter is to run the job (`sandbox.job`)."""
    step = "start"
    try:
        process.set_title(f"sandrun: sandbox {spec.slot}")
        spec.snapshot = os.memfd_create("snapshot", os.MFD_CLOEXEC) if spec.collect else -1
        take(INIT_STEPS, spec)
        step = "fork"
        pid = os.fork()
    except StepFailed as error:
        _give_up(spec, error.step, error.__cause__ or error)
    except BaseException as error:
        _give_up(spec, step, error)
    if pid == 0:
        close(spec.control, spec.outputs)
        job.become_job(spec)
        return
    _supervise(spec, pid)


def _supervise(spec: Spec, pid: int) -> NoReturn:
    step = "init"
    try:
        close(spec.proc, spec.gate, spec.archive, spec.stdin, spec.stdout, spec.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 is spared what it does not handle
        wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, _note)
        step = "init capabilities"
        if spec.nest.shared_uid:
            capabilities.clear()
        step = "init filter"
        if spec.nest.init_filter:
            seccomp.load(spec.nest.init_filter)
        step = "supervise"
        status = _wait(spec, pid, wake)
        step = "exit"
        hits = messages.HIT_STORAGE if _storage_full() else 0
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        exited = messages.Exited(hits, status, round((used.ru_utime + used.ru_stime) * 1e6), used.ru_maxrss * 1024)
        os.write(spec.control, exited.encode())
        if spec.collect:
            step = "collector"
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            collector = os.fork()
            if collector == 0:
                job.be_collector(spec)
            os.waitpid(collector, 0)
        os.write(spec.control, messages.DONE)
    except BaseException as error:
        _give_up(spec, step, error)
    finally:
        os._exit(0)


def _note(number: int, frame: object) -> None:
    """A handler, so that the kernel wakes init; the byte in the wake-up pipe is what is looked at."""


def _wait(spec: Spec, pid: int, wake: int) -> int:
    """Reap until the entrypoint is over, then end every other process. Returns its status, waitpid(2)."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(spec.control, select.POLLIN)
    status: int | None = None
    while status is None:
        status = _reap(pid)
        if status is not None:
            break
        for descriptor, _ in poll.poll():
            if descriptor == wake:
                os.read(wake, 512)
            else:
                os.read(spec.control, 16)  # END; or end of file: the spawner is gone, and we with it in a moment
                _kill_all()
                poll.unregister(spec.control)
    while True:
        _kill_all()  # before the last wait: a process may have been forked since the one before
        try:
            done, other = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if done == pid:
            status = other


def _reap(pid: int) -> int | None:
    """Reap whoever is dead. Returns the status of `pid` if it is among them."""
    while True:
        try:
            done, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if done == pid:
            return status
        if done == 0:
            return None


def _kill_all() -> None:
    try:
        os.kill(-1, signal.SIGKILL)  # all of this PID namespace but its PID 1, kill(2)
    except ProcessLookupError:
        pass


def _storage_full() -> bool:
    left = os.statvfs(rootfs.WORK)
    return left.f_bfree == 0 or left.f_ffree == 0


def _give_up(spec: Spec, step: str, error: BaseException) -> NoReturn:
    try:
        os.write(spec.control, messages.FAILED + messages.failure(step, error))
    finally:
        os._exit(job.SETUP_FAILED)
