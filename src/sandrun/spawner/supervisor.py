"""`sandrun serve` itself: starts spawner and api, restarts either, reads nothing.

It forks before any third-party module is imported, so the spawner never has one. It holds no network socket. Whatever
dies, the rest follows or is replaced:

    spawner     another one; api gets its socket and tells the clients of lost jobs `worker_lost`
    api         the spawner ends all that it had started for it, and both are started anew
    supervisor  the kernel kills the other two (PR_SET_PDEATHSIG), and with them every sandbox
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from sandrun import environments
from sandrun.config import Config
from sandrun.errors import SandrunError
from sandrun.linux import ids, process
from sandrun.spawner import protocol, server

FINISH_SECONDS = 8.0
"""How long the spawner may take to end what it has started."""
RESTARTS, RESTART_SECONDS = 5, 60.0
"""More deaths than these in this time, and the server gives up: a restart does not help."""
HEARD = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
"""Blocked in the supervisor and taken one by one by sigtimedwait(2): nothing interrupts it, nothing is missed."""


_claims: list[int] = []
"""Descriptors that hold this process's ranges of ids, to its end."""


def claim_ids(config: Config) -> Config:
    """The same settings with a range of host ids that no other server here has. Raises: SetupError."""
    if os.geteuid() != 0:
        return config
    base, descriptor = ids.claim(config.uid_base)
    _claims.append(descriptor)
    return dataclasses.replace(config, uid_base=base)


def settings_from(config: Config) -> server.Settings:
    return server.Settings(
        waived=config.waived,
        rootfs=config.rootfs or "/",
        uid_base=config.uid_base,
        interpreters=config.interpreters,
        environments=tuple(environments.list_(config.state_dir)),
        parked_share=config.parked_share,
    )


def start_spawner(settings: server.Settings) -> tuple[int, socket.socket]:
    """Fork a spawner. Returns: its pid, and the socket for a `SpawnerClient`."""
    ours, theirs = protocol.pair()
    pid = fork(lambda: server.run(theirs, settings), close=[ours])
    theirs.close()
    return pid, ours


def fork(main: Callable[[], int], *, close: list[socket.socket]) -> int:
    """Run `main` in a child and exit with what it returns; no exception passes into the parent's code."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 70  # EX_SOFTWARE, sysexits.h
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        process.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(status)
        for end in close:
            end.close()
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else status
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Supervisor:
    def __init__(self, config: Config, serve_api: Callable[[socket.socket, socket.socket], int]) -> None:
        self.config = config
        self.serve_api = serve_api
        self.spawner = 0
        self.api = 0
        self.control: socket.socket | None = None
        self.deaths: list[float] = []
        self.signals: list[int] = []

    def run(self) -> int:
        """Returns: the exit status: 0 after SIGTERM or SIGINT, 1 if the server cannot go on."""
        process.set_title("sandrun: supervisor")
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        self._start_both()
        while True:
            heard = signal.sigwait(HEARD)
            if heard != signal.SIGCHLD:
                return self._stop()
            while (ended := _reap_any()) is not None:
                pid, code = ended
                if code in (1, 2) or not self._may_restart():  # 1 and 2: it has said why, and would say it again
                    return self._give_up()
                if pid == self.spawner:
                    _say(f"the spawner ended ({code}); starting another")
                    self._replace_spawner()
                elif pid == self.api:
                    _say(f"the api ended ({code}); starting both anew")
                    self._finish(self.spawner)
                    self._start_both()

    def _start_spawner(self) -> socket.socket:
        """With the environments that are there by now. Raises: ConfigError."""
        settings = settings_from(self.config)._replace(state_dir=self.config.state_dir)
        self.spawner, connection = start_spawner(settings)
        return connection

    def _start_both(self) -> None:
        connection = self._start_spawner()
        ours, theirs = protocol.pair()
        previous = self.control

        def main() -> int:
            return self.serve_api(connection, theirs)

        self.api = fork(main, close=[ours, *([previous] if previous else [])])
        connection.close()
        theirs.close()
        if previous is not None:
            previous.close()
        self.control = ours

    def _replace_spawner(self) -> None:
        connection = self._start_spawner()
        assert self.control is not None
        try:
            protocol.send(self.control, b"N", [connection.fileno()])
        except OSError:
            pass  # api has just died too; its end is handled next
        connection.close()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self.deaths = [when for when in self.deaths if when > now - RESTART_SECONDS] + [now]
        return len(self.deaths) <= RESTARTS

    def _stop(self) -> int:
        """Api drains and ends by itself, and its end is the spawner's. A second signal stops both now."""
        os.kill(self.api, signal.SIGTERM)
        while True:
            heard = signal.sigwait(HEARD)
            if heard != signal.SIGCHLD:
                self._give_up()
                return 0
            while (ended := _reap_any()) is not None:
                if ended[0] == self.api:
                    self._finish(self.spawner)
                    return 0

    def _give_up(self) -> int:
        for pid in (self.api, self.spawner):
            self._finish(pid, 0.0 if pid == self.api else FINISH_SECONDS)
        return 1

    def _finish(self, pid: int, patience: float = FINISH_SECONDS) -> None:
        """Wait for a child that is about to end, then SIGKILL. A child's death ends all below it."""
        deadline = time.monotonic() + patience
        while True:
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                os.kill(pid, signal.SIGKILL)  # not reaped, so its pid is still its own
                os.waitpid(pid, 0)
                return
            signal.sigtimedwait((signal.SIGCHLD,), left)


def _reap_any() -> tuple[int, int] | None:
    """pid and exit code (negative: a signal) of a dead child, None if there is none."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _say(text: str) -> None:
    print(f"sandrun: {text}", file=sys.stderr, flush=True)


def serve(config: Config) -> int:
    """Run a server until it is told to stop. Returns: the exit status."""

    def serve_api(connection: socket.socket, control: socket.socket) -> int:
        process.set_title("sandrun: api")
        from sandrun.api import main  # in the child: the supervisor and the spawner never import it

        return main.run(config, connection, control)

    try:
        config = claim_ids(config)
        return Supervisor(config, serve_api).run()
    except SandrunError as error:
        _say(str(error))
        return 1
