"""A spawner without a server: forked by the test, which may spoil what it is made of, and proved gone at the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sandrun.jobs.archive import build_archive
from sandrun.jobs.outputs import OutputsParser
from sandrun.linux import cgroup, landlock, seccomp
from sandrun.linux.hierarchy import Hierarchy
from sandrun.model import MIB, Limits
from sandrun.spawner import nursery, protocol, server, supervisor
from sandrun.spawner.client import Ended, Order, SpawnerClient
from tests import host, serving

ROOT = Path(__file__).parents[2]
END_SECONDS = host.within(12.0)
UID_BASE = 1879048192
SAY = "import ctypes, time; print('begun', flush=True); ctypes.CDLL(None).prctl(15, b'begun', 0, 0, 0); time.sleep(60)"
"""A job that has said `begun` on its stdout when its process is called so."""
ERRNO = 18
"""EXDEV: what spoilt steps answer. Nothing else that a set-up does can answer it."""


@dataclass
class Done:
    """What became of a job."""

    ended: Ended
    stdout: str
    stderr: str
    outputs: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False

    @property
    def inside(self) -> dict[str, Any]:
        """The isolation report of the job's process itself."""
        return dict(json.loads(self.ended.isolation)["inside"])

    @property
    def host(self) -> dict[str, Any]:
        """The isolation report of the spawner."""
        return dict(json.loads(self.ended.isolation)["host"])


@dataclass
class Spawned:
    """A running spawner and our end of its socket."""

    pid: int
    client: SpawnerClient
    log: Path

    async def run(
        self,
        code: str = "print('hello')",
        *,
        memory_mb: int = 512,
        processes: int = 100,
        timeout: float = 20,
        archive: bytes | None = None,
        **wishes: Any,
    ) -> Done:
        """Run a Python script, or with interpreter="sh" and so on another; its outputs are all that it makes."""
        wishes = {"interpreter": "python3", "args": [], "env": {}, "outputs": None, "fresh": False, **wishes}
        packed = build_archive({"script": code.encode()}) if archive is None else archive
        descriptor = nursery.sealed(packed, "archive")
        order = Order(
            spec=json.dumps({"entrypoint": "script", **wishes}).encode(),
            archive_fd=descriptor,
            stdin_fd=None,
            limits=Limits(wall_seconds=timeout, memory_bytes=memory_mb * MIB, processes=processes),
            environment=None,
            tag=1,
            collect=True,
        )
        try:
            sandbox = self.client.start(order)
        finally:
            os.close(descriptor)
        parser = OutputsParser()
        streams = asyncio.gather(*(_read(fd) for fd in (sandbox.stdout, sandbox.stderr, sandbox.outputs)))
        ended = await asyncio.wait_for(asyncio.shield(sandbox.ended), timeout + 60)
        stdout, stderr, collected = await asyncio.wait_for(streams, host.within(5))
        outputs = {file.path: bytes(data) for file, data in parser.feed(collected)}
        return Done(ended, stdout.decode(errors="replace"), stderr.decode(errors="replace"), outputs, parser.ended)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def sandboxes(self) -> list[host.Process]:
        """Processes of all sandboxes, parked ones too."""
        ours = host.process(os.getpid())
        base = ours.pid_depth if ours else 1
        return [p for p in host.descendants(self.pid) if p.pid_depth >= base + 2]

    def called(self, name: str) -> list[host.Process]:
        """Those of them that have given themselves this name; see `SAY`."""
        found = []
        for p in self.sandboxes():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{p.pid}/comm").read_text().strip() == name:
                    found.append(p)
        return found

    async def wait_for(self, name: str) -> host.Process:
        """The one that is called so, when it is there."""
        async with asyncio.timeout(20):
            while not (found := self.called(name)):
                await asyncio.sleep(0.01)
        return found[0]

    def cgroups(self) -> list[str]:
        """The cgroups of all sandboxes, as paths."""
        found = []
        for top in host.own_cgroups({self.pid}):
            found += [folder for folder, _, _ in os.walk(top) if os.path.basename(folder).startswith("j")]
        return found

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def _take_away(absent: frozenset[str]) -> None:
    """In the spawner's process: a host without these layers. Of cgroups, none or all."""

    def no_filters() -> NoReturn:
        raise OSError(errno.EINVAL, "no seccomp filters")

    def no_cgroups(*, use_v2: bool = True) -> Hierarchy:
        return Hierarchy("none", (), {})

    if absent & {"memory", "pids", "cpu"}:
        cgroup.detect = no_cgroups
    if "seccomp" in absent:
        seccomp.probe = no_filters
    if "landlock" in absent:
        landlock.abi = lambda: 0


async def _read(descriptor: int) -> bytes:
    """Everything up to the end of file; closes it."""
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    try:
        while True:
            try:
                piece = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                ready = asyncio.Event()
                loop.add_reader(descriptor, ready.set)
                try:
                    await ready.wait()
                finally:
                    loop.remove_reader(descriptor)
                continue
            if not piece:
                return b"".join(parts)
            parts.append(piece)
    finally:
        os.close(descriptor)


def default_waived() -> frozenset[str]:
    """As an ordinary user without a cgroup of its own just that layer is waived."""
    return frozenset() if os.geteuid() == 0 else frozenset(("memory", "pids", "cpu"))


@contextlib.asynccontextmanager
async def spawned(
    directory: Path,
    overrides: Mapping[str, bytes] | None = None,
    *,
    patch: Callable[[], object] | None = None,
    waived: frozenset[str] | None = None,
    absent: frozenset[str] = frozenset(),
    interpreters: tuple[str, ...] = ("python3",),
) -> AsyncIterator[Spawned]:
    """Fork a spawner; `await it.client.ready()` tells whether it found the host fit. At the end nothing may be left.

    `overrides` replaces modules inside zygotes, `patch` is called in the spawner's own process before it begins.
    `absent` are waived layers that this host is made to lack.
    """
    settings = server.Settings(
        waived=(default_waived() if waived is None else waived) | absent,
        rootfs="/",
        uid_base=UID_BASE,
        interpreters=interpreters,
        environments=(),
        parked_share=0.05,
        overrides=tuple((overrides or {}).items()),
    )
    ours, theirs = protocol.pair()
    log = directory / "spawner.log"

    def main() -> int:
        sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  to the end of this process
        _take_away(absent)
        if patch is not None:
            patch()
        return server.run(theirs, settings)

    mounted = host.mounts()
    pid = supervisor.fork(main, close=[ours])
    theirs.close()
    pidfd = os.pidfd_open(pid)
    client = SpawnerClient(ours)
    one = Spawned(pid, client, log)
    try:
        yield one
    finally:
        left = host.descendants(pid)
        rooms = host.Rooms(left)
        client.close()
        overdue = not select.select([pidfd], [], [], END_SECONDS)[0]
        if overdue:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert not overdue, f"the spawner was not over after {END_SECONDS:g} s\n{one.text()}"
    assert status in (0, 1), f"the spawner ended with {status}\n{one.text()}"
    assert "Traceback" not in one.text(), one.text()
    assert serving.wait_until(lambda: not [p for p in left if p.alive], serving.GONE_SECONDS)
    with rooms:
        assert serving.wait_until(lambda: not rooms.inhabitants(), serving.GONE_SECONDS), rooms.inhabitants()
    assert not host.own_cgroups({pid}), "cgroups outlived the spawner"
    assert host.mounts() == mounted, "mounts outlived the spawner"


# ---- spoiling it -------------------------------------------------------------------------------------------


def source(module: str) -> str:
    """The text of a module by the name that `nursery.MODULES` has for it."""
    return (Path(nursery.PACKAGE) / f"{module}.py").read_text()


def without(module: str, *removed: str | tuple[str, str]) -> dict[str, bytes]:
    """A module with these lines taken out, or (old, new) put in their place. Each must stand there exactly once."""
    text = source(module)
    for change in removed:
        old, new = (change, "pass") if isinstance(change, str) else change
        assert text.count(old) == 1, f"{module} has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    compile(text, module, "exec")
    return {module: text.encode()}


def hear_late(kind: type, name: str, seconds: float) -> None:
    """In the spawner's process: have this handler of a pidfd (a sandbox's, or a zygote's) called so much later."""
    hear = getattr(kind, name)

    def heard(self: Any) -> None:
        holder = getattr(self, "zygote", self)
        self.server.loop.unwatch(holder.pidfd)
        self.server.loop.after(seconds, lambda: hear(self))

    setattr(kind, name, heard)


def rebuilt(old: str, new: str) -> dict[str, bytes]:
    """linux/calls.c with one text in the place of another, compiled."""
    text = (ROOT / "src/sandrun/linux/calls.c").read_text()
    assert text.count(old) == 1, f"calls.c has {text.count(old)} times {old!r}"
    with tempfile.TemporaryDirectory() as name:
        Path(name, "calls.c").write_text(text.replace(old, new))
        command = [ROOT / "scripts/compile", Path(name, "calls.c"), Path(name, "library")]
        subprocess.run(command, check=True)
        return {nursery.LIBRARY: Path(name, "library").read_bytes()}


NANOSLEEP = f"""
from sandrun.linux import libc
libc.SYS["nanosleep"] = {35 if os.uname().machine == "x86_64" else 101}
"""


def pause(seconds: float) -> str:
    """A pause in calls.c, which init's filter allows: it waits for nothing."""
    if os.uname().machine == "x86_64":
        return f"KERNEL(NR_poll, 0, 0, {round(seconds * 1000)}, 0);"
    return f"{{ struct timespec while_ = {{0, {round(seconds * 1e9)}}}; KERNEL(NR_ppoll, 0, 0, &while_, 0); }}"


def sleeping(before: str, seconds: float) -> dict[str, bytes]:
    """`sandbox.steps` with a pause before a call, wherever it is carried out."""
    pause = f"    calls.call('nanosleep', struct.pack('=2q', 0, {round(seconds * 1e9)}), None)\n"
    changed = without("sandbox/steps", (before, pause + before))["sandbox/steps"]
    return {"sandbox/steps": changed + NANOSLEEP.encode()}


def spoilt(table: str, step: str, *, from_sandbox: int = 0, late: float = 0) -> dict[str, bytes]:
    """`sandbox.steps` with one step of one of its tables refused, after a while, from the zygote's n-th sandbox on."""
    text = f"""{source("sandbox/steps")}
{NANOSLEEP}

SANDBOXES = 0

def _spoilt(name, add):
    def refuse(calls, nest):
        if SANDBOXES >= {from_sandbox}:
            if {late}:
                calls.call("nanosleep", struct.pack("=2q", 0, {round(late * 1e9)}), None)
            calls.equal(b"a", b"b", error={ERRNO}, about="spoilt by a test")
        add(calls, nest)
    return name, refuse if name == {step!r} else add

{table} = tuple(_spoilt(*step) for step in {table})
"""
    return {"sandbox/steps": text.encode(), **counting()}


def counting() -> dict[str, bytes]:
    """A zygote that counts its sandboxes in `steps.SANDBOXES`, and makes their tables anew."""
    text = f"""{source("spawner/zygote")}

from sandrun.sandbox import steps
_serve_one = calls.ForkServer.serve

def serve(self):
    steps.SANDBOXES += 1
    self.use(tabulate(_kept[1]))
    return _serve_one(self)

calls.ForkServer.serve = serve
"""
    return {"spawner/zygote": text.encode()}
