"""The proof, before a server takes its first job: each interpreter runs 6 * 7 in a sandbox like any other."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from sandrun.errors import SetupError
from sandrun.sandbox import messages
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
        self.reasons: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """Test, and withdraw what does not answer 42.

        Raises: SetupError if not even the bare python3 does: then no sandbox can be built here.
        """
        for tenant in self.server.tenants:
            for name, found in self.server.interpreters.items():
                if not tenant.withdrawn and (name == "python3" or not tenant.name):
                    self._start(tenant, name, found)
        while self.running and not self.server.stopping:
            self.server.loop.turn()
        for tenant in self.server.tenants:
            reason = self.reason("python3", tenant.name)
            if reason and not tenant.withdrawn:
                tenant.withdrawn = reason

    def reason(self, interpreter: str, environment: str = "") -> str:
        return self.reasons.get((environment, interpreter), "not tested")

    def _start(self, tenant: Tenant, name: str, found: interpreters.Interpreter) -> None:
        entrypoint = f"test{found.extension}"
        wishes: dict[str, Any] = {
            "entrypoint": entrypoint, "interpreter": name, "args": [], "env": {}, "outputs": None, "fresh": False,
        }  # fmt: skip
        said, said_to = os.pipe2(os.O_CLOEXEC)
        complained, complained_to = os.pipe2(os.O_CLOEXEC)
        descriptors = [
            nursery.sealed(json.dumps(wishes).encode(), "spec"),
            nursery.sealed(interpreters.make_archive(entrypoint, found.test), "archive"),
            os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC),
            said_to,
            complained_to,
            os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC),
        ]
        self.running += 1
        start = protocol.Start(
            environment=self.server.tenants.index(tenant),
            processes=100,
            collect=False,
            ticket=TICKETS + len(self.reasons) + self.running,
            tag=0,
            memory_bytes=MEMORY_BYTES,
            wall_ms=round(SECONDS * 1000),
            cpu_ms=0,
        )

        def done(ended: protocol.Ended) -> None:
            self.running -= 1
            self.reasons[tenant.name, name] = _judge(ended, _drain(said), _drain(complained))

        self.server.start_job(tenant, start, descriptors, done)


def _judge(ended: protocol.Ended, said: bytes, complained: bytes) -> str:
    if ended.outcome == SETUP_FAILED:
        return ended.inside.decode(errors="replace")
    if (ended.outcome, ended.exit_code, said) == (EXITED, 0, interpreters.EXPECTED):
        return ""
    text = complained.decode(errors="replace")[-300:]
    outcome = f"{protocol.OUTCOMES[ended.outcome]}, exit code {ended.exit_code}, signal {ended.signal}"
    return messages.failure("self-test", SetupError("self-test", 0, f"{outcome}: {text}")).decode(errors="replace")


def _drain(reader: int) -> bytes:
    """What a test wrote; all its processes are dead, so the end is there."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 65536)
    except BlockingIOError:
        return b""
    finally:
        os.close(reader)
