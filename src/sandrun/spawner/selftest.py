"""The proof before a server, or a new zygote, takes its first job: 6 * 7 in a sandbox like any other."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sandrun.spawner import interpreters, nursery, protocol
from sandrun.spawner.box import EXITED, SETUP_FAILED

if TYPE_CHECKING:
    from sandrun.spawner.server import Server
    from sandrun.spawner.tenant import Tenant

SECONDS = 20.0
MEMORY_BYTES = 512 << 20
TICKETS = 1 << 63
"""Above any ticket of api's."""


class SelfTests:
    """`run` it once; then `reason` tells why an interpreter is not offered, "" if it is."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.running = 0
        self._tickets = itertools.count(TICKETS)
        self.reasons: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """Test, and withdraw what does not answer 42.

        Raises: SetupError if not even the bare python3 does: then no sandbox can be built here.
        """
        for tenant in self.server.tenants:
            for name, found in self.server.interpreters.items():
                if not tenant.withdrawn and (name == "python3" or not tenant.name):
                    self._start(tenant, name, found, partial(self.reasons.__setitem__, (tenant.name, name)))
        while self.running and not self.server.stopping:
            self.server.loop.turn()
        for tenant in self.server.tenants:
            reason = self.reason("python3", tenant.name)
            if reason and not tenant.withdrawn:
                tenant.withdrawn = reason

    def reason(self, interpreter: str, environment: str = "") -> str:
        return self.reasons.get((environment, interpreter), "not tested")

    def prove(self, tenant: Tenant, told: Callable[[str], None]) -> None:
        """Test the python3 of one that is to succeed another. `told` hears why it must not, "" if it may."""
        self._start(tenant, "python3", self.server.interpreters["python3"], told)

    def _start(self, tenant: Tenant, name: str, found: interpreters.Interpreter, told: Callable[[str], None]) -> None:
        entrypoint = f"test{found.extension}"
        wishes: dict[str, Any] = {
            "entrypoint": entrypoint, "interpreter": name, "args": [], "env": {}, "outputs": None, "fresh": False,
        }  # fmt: skip
        opened: list[int] = []
        try:
            opened += os.pipe2(os.O_CLOEXEC)
            opened += os.pipe2(os.O_CLOEXEC)
            for access in (os.O_RDONLY, os.O_WRONLY):
                opened.append(os.open("/dev/null", access | os.O_CLOEXEC))
            opened.append(nursery.sealed(json.dumps(wishes).encode(), "spec"))
            opened.append(nursery.sealed(interpreters.make_archive(entrypoint, found.test), "archive"))
        except OSError:
            protocol.close_all(opened)
            raise
        said, said_to, complained, complained_to, nothing, nowhere, spec, archive = opened
        descriptors = [spec, archive, nothing, said_to, complained_to, nowhere]
        self.running += 1
        start = protocol.Start(
            environment=0,  # only api's START needs to say which
            processes=100,
            collect=False,
            ticket=next(self._tickets),
            tag=0,
            memory_bytes=MEMORY_BYTES,
            wall_ms=round(SECONDS * 1000),
            cpu_ms=0,
        )

        def done(ended: protocol.Ended) -> None:
            self.running -= 1
            told(_judge(ended, _drain(said), _drain(complained)))

        self.server.start_job(tenant, start, descriptors, done)


def _judge(ended: protocol.Ended, said: bytes, complained: bytes) -> str:
    if ended.outcome == SETUP_FAILED:
        return ended.inside.decode(errors="replace")
    if (ended.outcome, ended.exit_code, said) == (EXITED, 0, interpreters.EXPECTED):
        return ""
    text = complained.decode(errors="replace")[-300:]
    outcome = f"{protocol.OUTCOMES[ended.outcome]}, exit code {ended.exit_code}, signal {ended.signal}"
    return f"self-test\0000\0{outcome}: {text}"


def _drain(reader: int) -> bytes:
    """What a test wrote; all its processes are dead, so the end is there."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 65536)
    except BlockingIOError:
        return b""
    finally:
        os.close(reader)
