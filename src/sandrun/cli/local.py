"""A spawner of our own, for the commands that build a sandbox without a server."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace

from sandrun.config import Config

END_SECONDS = 10.0
"""How long the spawner may take to end what it has started."""


@contextlib.contextmanager
def spawner(config: Config, environment: object = None, interpreter: object = None) -> Iterator[socket.socket]:
    """The privileged process, and its socket for a `SpawnerClient`. It ends with the block, and all with it.

    To be entered before anything starts a thread. `environment` is the one that the job wants, if any; `interpreter`
    likewise, None if that is not known: each that is offered is tested first.
    """
    from sandrun.spawner.supervisor import claim_ids, settings_from, start_spawner

    settings = settings_from(claim_ids(config))
    # Each costs a zygote; and for one job it takes longer to load everything than to import what it wants.
    needed = tuple(replace(known, preload=()) for known in settings.environments if known.name == environment)
    if interpreter is not None:
        wanted = tuple(name for name in settings.interpreters if name in ("python3", interpreter))
        settings = settings._replace(interpreters=wanted)
    pid, connection = start_spawner(settings._replace(environments=needed))
    descriptor = os.pidfd_open(pid)
    try:
        yield connection
    finally:
        connection.close()
        if not select.select([descriptor], [], [], END_SECONDS)[0]:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)
        os.waitpid(pid, 0)
