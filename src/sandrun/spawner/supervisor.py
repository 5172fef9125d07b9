"""`sandrun serve` itself: starts spawner and api, restarts either, reads nothing.

It forks before any third-party module is imported, so the spawner never has one. It holds no network socket. Whatever
dies, the rest follows or is replaced:

    spawner     another one; api gets its socket and tells the clients of lost jobs `worker_lost`
    api         the spawner ends all that it had started for it, and both are started anew
    supervisor  the kernel kills the other two (PR_SET_PDEATHSIG), and with them every sandbox
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from sandrun.config import Config
from sandrun.environments import locate
from sandrun.errors import SandrunError
from sandrun.linux import process
from sandrun.spawner import protocol, server

RESTARTS, RESTART_SECONDS = 5, 60.0
"""More deaths than these in this time, and the server gives up: a restart does not help."""
POLL_SECONDS = 0.05


def settings_from(config: Config) -> server.Settings:
    return server.Settings(
        waived=config.waived,
        rootfs=config.rootfs or "/",
        uid_base=config.uid_base,
        interpreters=config.interpreters,
        environments=locate(config.environments_dir),
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
    def __init__(self, config: Config, serve_api: Callable[[socket.socket, socket.socket], NoReturn]) -> None:
        self.config = config
        self.settings = settings_from(config)
        self.serve_api = serve_api
        self.spawner = 0
        self.api = 0
        self.control: socket.socket | None = None
        self.deaths: list[float] = []
        self.signals: list[int] = []

    def run(self) -> int:
        """Returns: the exit status: 0 after SIGTERM or SIGINT, 1 if the server cannot go on."""
        process.set_title("sandrun: supervisor")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._start_both()
        while True:
            if self.signals:
                return self._stop()
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                signal.sigtimedwait((), POLL_SECONDS) if hasattr(signal, "sigtimedwait") else time.sleep(POLL_SECONDS)
                continue
            code = os.waitstatus_to_exitcode(status)
            if pid == self.api and code in (1, 2):  # it has said why; it would say it again
                return self._give_up(1)
            if pid == self.spawner and code == 1:
                return self._give_up(1)
            if not self._may_restart():
                print("sandrun: spawner or api keep dying; giving up", file=sys.stderr)
                return self._give_up(1)
            if pid == self.spawner:
                print(f"sandrun: the spawner ended ({code}); starting another", file=sys.stderr, flush=True)
                self._replace_spawner()
            elif pid == self.api:
                print(f"sandrun: the api ended ({code}); starting both anew", file=sys.stderr, flush=True)
                self._reap(self.spawner)
                self._start_both()

    def _start_both(self) -> None:
        self.spawner, connection = start_spawner(self.settings)
        ours, theirs = protocol.pair()
        previous = self.control

        def main() -> int:
            self.serve_api(connection, theirs)

        self.api = fork(main, close=[ours, *([previous] if previous else [])])
        connection.close()
        theirs.close()
        if previous is not None:
            previous.close()
        self.control = ours

    def _replace_spawner(self) -> None:
        self.spawner, connection = start_spawner(self.settings)
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
        self._signal(self.api, signal.SIGTERM)
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == self.api:
                self._reap(self.spawner)
                return 0
            if len(self.signals) > 1:
                return self._give_up(0)
            if pid == 0:
                time.sleep(POLL_SECONDS)

    def _give_up(self, status: int) -> int:
        self._signal(self.api, signal.SIGKILL)
        for pid in (self.api, self.spawner):
            self._reap(pid)
        return status

    @staticmethod
    def _signal(pid: int, number: int) -> None:
        try:
            os.kill(pid, number)  # a child that is not reaped yet keeps its pid
        except ProcessLookupError:
            pass

    def _reap(self, pid: int) -> None:
        """Wait for a child that is about to end; SIGKILL if it takes too long. Its death ends all below it."""
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:
                return
            time.sleep(0.01)
        self._signal(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve(config: Config) -> int:
    """Run a server until it is told to stop. Returns: the exit status."""

    def serve_api(connection: socket.socket, control: socket.socket) -> NoReturn:
        process.set_title("sandrun: api")
        from sandrun.api import main  # in the child: the supervisor and the spawner never import it

        main.run(config, connection, control)

    try:
        return Supervisor(config, serve_api).run()
    except SandrunError as error:
        print(f"sandrun: {error}", file=sys.stderr)
        return 1
