"""What the server tells about itself."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandrun import __version__
from sandrun.api.context import Context
from sandrun.api.requests import preferred
from sandrun.api.responses import Answer, Json, Text
from sandrun.api.routes import Body, Call
from sandrun.model import (
    ARCHIVE_BYTES,
    ARCHIVE_MEMBERS,
    CODE_BYTES,
    INLINE_OUTPUT_BYTES,
    INLINE_OUTPUTS_BYTES,
    LOG_BYTES,
    MANIFEST_BYTES,
    RUN_BODY_BYTES,
    STDIN_BYTES,
)

RETRY_SECONDS = 2


class LimitsOffered(msgspec.Struct, frozen=True):
    """The most that this server takes, and grants one job."""

    timeout: float
    memory_mb: int
    cpu_seconds: float
    processes: int
    archive_bytes: int = ARCHIVE_BYTES
    archive_members: int = ARCHIVE_MEMBERS
    manifest_bytes: int = MANIFEST_BYTES
    run_body_bytes: int = RUN_BODY_BYTES
    code_bytes: int = CODE_BYTES
    stdin_bytes: int = STDIN_BYTES
    log_bytes: int = LOG_BYTES
    inline_output_bytes: int = INLINE_OUTPUT_BYTES
    inline_outputs_bytes: int = INLINE_OUTPUTS_BYTES


class Service(msgspec.Struct, frozen=True):
    """Who answers here."""

    service: str
    version: str
    limits: LimitsOffered


class Health(msgspec.Struct, frozen=True):
    """Whether jobs can be run, and within which walls.

    Attributes:
        status: `ok`, `starting` (jobs wait for the part that starts them), or `draining` (no new jobs are taken).
        isolation: what this host has, and what the operator waived.
        walls: what confines the HTTP process itself.
    """

    status: str
    version: str
    queued: int
    running: int
    isolation: dict[str, Any]
    walls: dict[str, Any]


class EnvironmentOffered(msgspec.Struct, frozen=True, omit_defaults=True):
    """A package set of the operator's.

    Attributes:
        available: jobs can have it; if not, `reason` tells why.
        packages: name to version.
        digest: SHA-256 over its files.
        python: version of its interpreter, as that tells it.
        preload: modules that its operator has jobs find loaded.
        modules: all that a job finds loaded, these and what they load themselves.
        in_place: Python jobs need not start an interpreter; if they do, `in_place_reason` tells why.
    """

    name: str
    available: bool
    packages: dict[str, str]
    digest: str
    created: str
    python: str | None
    preload: list[str]
    modules: list[str] | None
    in_place: bool | None
    reason: str = ""
    in_place_reason: str = ""


class Environments(msgspec.Struct, frozen=True):
    """What jobs can be run with."""

    environments: list[EnvironmentOffered]
    interpreters: dict[str, Any]


class ServerCalls:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.service = context.service
        self.document = b""

    async def root(self, request: Request) -> Response:
        if preferred(request, ("text/plain", "application/json")) == "application/json":
            ceilings = self.context.ceilings
            limits = LimitsOffered(ceilings.timeout, ceilings.memory_mb, ceilings.cpu_seconds, ceilings.processes)
            return Json(Service("sandrun", __version__, limits), private=False)
        scheme = request.scope["scheme"]
        base = f"{scheme}://{request.headers.get('host', 'localhost')}"  # one of ours, or it would not have come here
        return Text(
            f"""curl {base}/run -d '{{"code": "print(6 * 7)"}}'\n"""
            f"""curl {base}/submit -F files=@job.tar.gz -F 'manifest={{"entrypoint": "main.py"}}'\n"""
            f"""curl {base}/openapi.json\n""",
            private=False,
        )

    async def health(self, request: Request) -> Response:
        counts = self.service.counts
        status = "draining" if self.service.draining else "starting" if self.context.spawner_lost() else "ok"
        health = Health(
            status=status,
            version=__version__,
            queued=counts["queued"],
            running=counts["running"],
            isolation=self.service.facts.isolation,
            walls=self.context.walls,
        )
        if status == "ok":
            return Json(health)
        return Json(health, 503, {"retry-after": str(RETRY_SECONDS)})

    async def environments(self, request: Request) -> Response:
        facts = self.service.facts
        told = [{"name": name, **about} for name, about in sorted(facts.environments.items()) if name]
        named = msgspec.convert(told, list[EnvironmentOffered])
        return Json(Environments(named, facts.interpreters), private=False)

    async def openapi(self, request: Request) -> Response:
        return Answer(self.document, "application/json", private=False)

    def calls(self) -> list[Call]:
        text = Body(kind="text/plain", schema={"type": "string"}, about="Three commands to begin with.")
        health = (Body(type=Health),)
        return [
            Call(
                method="GET",
                path="/",
                name="root",
                about="What this is: three commands, or JSON for those who accept it.",
                handler=self.root,
                answers={200: (text, Body(type=Service))},
            ),
            Call(
                method="GET",
                path="/health",
                name="health",
                about="Whether jobs can be run. 503 while they cannot, with the same body.",
                handler=self.health,
                answers={200: health, 503: health},
            ),
            Call(
                method="GET",
                path="/environments",
                name="environments",
                about="Package sets and interpreters of this server.",
                handler=self.environments,
                answers={200: (Body(type=Environments),)},
            ),
            Call(
                method="GET",
                path="/openapi.json",
                name="openapi",
                about="This document.",
                handler=self.openapi,
                answers={200: (Body(schema={"type": "object"}),)},
            ),
        ]
