"""PID 1 of a sandbox: builds it, starts the job, reaps, ends everything, has outputs collected, reports.

It shares no uid with the job (with one uid: no user namespace), is not dumpable, has a filter of its own, never execs,
and reads nothing that the client sent.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
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
        spec.snapshot = os.memfd_create("snapshot", os.MFD_CLOEXEC)
        take(INIT_STEPS, spec)
        step = "fork"
        pid = os.fork()
    except StepFailed as error:
        _give_up(spec, error.step, error.__cause__ or error)
    except BaseException as error:
        _give_up(spec, step, error)
    if pid == 0:
        close(spec.control)
        job.become_job(spec)
        return
    _supervise(spec, pid)


def _supervise(spec: Spec, pid: int) -> NoReturn:
    step = "init"
    try:
        close(spec.proc, spec.gate)
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=spec.control)
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
        assignment = Assignment()
        status = _wait(control, pid, wake, assignment)
        ended = time.monotonic()
        step = "exit"
        hits = messages.HIT_STORAGE if _storage_full() else 0
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_us = round((used.ru_utime + used.ru_stime) * 1e6)
        exited = messages.Exited(hits, status, cpu_us, used.ru_maxrss * 1024, ended)
        os.write(spec.control, exited.encode())
        if assignment.collect:
            step = "collector"
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            collector = os.fork()
            if collector == 0:
                job.be_collector(spec, assignment.wishes, assignment.outputs)
            os.waitpid(collector, 0)
        close(assignment.wishes, assignment.outputs)  # the reader's end of file, before the answer
        os.write(spec.control, messages.DONE)
    except BaseException as error:
        _give_up(spec, step, error)
    finally:
        os._exit(0)


def _note(number: int, frame: object) -> None:
    """A handler, so that the kernel wakes init; the byte in the wake-up pipe is what is looked at."""


class Assignment:
    """What init keeps of the job that its sandbox was given: descriptors that only the collector reads."""

    def __init__(self) -> None:
        self.wishes = self.outputs = -1
        self.collect = False

    def take(self, control: socket.socket) -> bool:
        """One message of the spawner's. Returns: True if the job is to end."""
        message, descriptors, _, _ = socket.recv_fds(control, 16, 2)
        if message[:1] in (messages.ASSIGN, messages.ASSIGN_COLLECT) and len(descriptors) == 2 and self.wishes < 0:
            self.wishes, self.outputs = descriptors
            self.collect = message[:1] == messages.ASSIGN_COLLECT
            return False
        return True  # END; or end of file: the spawner is gone, and we with it in a moment


def _wait(control: socket.socket, pid: int, wake: int, assignment: Assignment) -> int:
    """Reap until the entrypoint is over, then end every other process. Returns its status, waitpid(2)."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(control, select.POLLIN)
    status = _reap(pid)
    while status is None:
        for descriptor, _ in poll.poll():
            if descriptor == wake:
                os.read(wake, 512)
            elif assignment.take(control):
                _kill_all()
                poll.unregister(control)
        status = _reap(pid)
    if assignment.wishes < 0 and control.fileno() in dict(poll.poll(0)):
        assignment.take(control)  # the job was over before we looked for the first time
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
