"""What every handler needs, in one object that is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from sandrun.api.log import Security
from sandrun.jobs.checks import Checks
from sandrun.jobs.clients import Client
from sandrun.jobs.service import JobService
from sandrun.model import Ceilings


@dataclass(slots=True, kw_only=True)
class Context:
    """The server as its handlers see it.

    Attributes:
        hostnames: what a Host header may name beside IP literals and localhost, in lower case.
        walls: what confines this process, for `/health`; see `lockdown.Report`.
        spawner_lost: whether there is no spawner to start jobs with just now.
        threads: for work on clients' bytes that is too long for the event loop.
    """

    service: JobService
    ceilings: Ceilings
    hostnames: frozenset[str] = frozenset()
    walls: dict[str, Any] = field(default_factory=dict)
    spawner_lost: Callable[[], bool] = lambda: False
    security: Security = field(default_factory=Security)
    threads: Checks = field(default_factory=lambda: Checks(2))

    def client(self, connection: HTTPConnection) -> Client:
        """Who is asking. A connection without an address (a Unix socket) is local."""
        peer = connection.scope.get("client")
        return self.service.client(peer[0] if peer else "127.0.0.1")
