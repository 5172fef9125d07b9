"""Runs a test's probe in a child that can do no harm: it is PID 1 of a PID namespace of its own."""

from __future__ import annotations

import os
import pickle
import select
import signal
from collections.abc import Callable
from typing import Any

from sandrun.linux import process

MOST_SECONDS = 30


class Died(Exception):
    """The probe was killed by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


def in_child(probe: Callable[[], Any], namespaces: int = 0) -> Any:
    """The picklable result of `probe`, run in a forked child. Its exceptions are raised here, its signals as Died."""
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        namespaces |= process.CLONE_NEWUSER
    end, start = os.pipe()
    pid, pidfd = process.clone3(process.CLONE_NEWPID | namespaces)
    if pid == 0:
        try:
            process.set_parent_death_signal(signal.SIGKILL)
            try:
                if uid != 0:
                    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
                        os.write(descriptor, text.encode())
                        os.close(descriptor)
                answer = pickle.dumps((True, probe()))
            except BaseException as error:
                answer = pickle.dumps((False, error))
            os.write(start, answer)
        finally:
            os._exit(0)
    os.close(start)
    with open(end, "rb") as pipe:
        if not select.select([pipe], [], [], MOST_SECONDS)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # and with PID 1 all that it started
        answer = pipe.read()
    os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        raise Died(-code)
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    return value


def errno_of(call: Callable[..., object], *arguments: Any) -> int:
    """The errno of the OSError that `call` raises, 0 if it raises none."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0
