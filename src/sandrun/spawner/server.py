"""The spawner: makes, limits, accounts and ends sandboxes. Privileged, one thread, standard library only.

It reads nothing that a client sent: wishes, files and input pass through as descriptors, what was measured inside a
sandbox as bytes. When api is gone, everything it had started is ended and the spawner goes too.
"""

from __future__ import annotations

import heapq
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sandrun import environments
from sandrun.environments import Environment
from sandrun.errors import ConfigError, MissingLayer, ProtocolError, SandrunError, SetupError
from sandrun.linux import cgroup, memory, process
from sandrun.sandbox import messages, rootfs
from sandrun.spawner import interpreters, nursery, protocol
from sandrun.spawner.box import CANCELLED, SETUP_FAILED, Box
from sandrun.spawner.loop import Loop
from sandrun.spawner.selftest import TICKETS, SelfTests
from sandrun.spawner.tenant import Done, Tenant, Waiting, end_unbuilt
from sandrun.spawner.walls import Walls

PARKED_BYTES = 4 << 20
"""What a parked sandbox takes."""
MOST_PARKED = 64
SHORT_SHARE = 20
"""With less than one part in this many of RAM available no sandbox is parked, until there is twice as much."""
LOOK_SECONDS = 1.0
"""Between two looks at the host's memory and at the interpreter's files."""
ACTIVITY_SECONDS = 0.2
"""Between two looks at which jobs use CPU."""
END_SECONDS = 5.0
"""How long sandboxes may take to die when api is gone. Their zygotes' end is theirs in any case."""
SEND_AGAIN_SECONDS = 0.002
FIRST_SLOT, SLOTS = 1, 16384
MOST_AT_ONCE = SLOTS // 2


class Settings(NamedTuple):
    """What the spawner is told.

    Attributes:
        waived: layers that may be missing.
        environments: package sets to offer beside the bare interpreter.
        state_dir: where others may turn up later, "" for nowhere.
        uid_base: first host id of the sandboxes, in root mode.
        parked_share: the part of RAM that one environment's parked sandboxes may take.
        overrides: modules that a test replaces inside zygotes, to see that a broken wall is noticed.
    """

    waived: frozenset[str]
    rootfs: str
    uid_base: int
    interpreters: tuple[str, ...]
    environments: tuple[Environment, ...]
    parked_share: float
    state_dir: str = ""
    overrides: tuple[tuple[str, bytes], ...] = ()


class Server:
    """`run` serves one api until it is gone.

    Attributes:
        boxes: sandboxes by slot. tickets: those that have a job, by its ticket. free: slots, a heap.
        tenants: environments, in the order of `Start.environment`. beside: those that are to join them or to
            succeed one of them, and those that end.
        serving: api was told the FACTS.
        installed: what tells one version of the interpreter's files from another, `interpreters.installed`.
    """

    walls: Walls
    archive: int

    def __init__(self, connection: socket.socket, settings: Settings) -> None:
        self.connection = connection
        self.settings = settings
        self.loop = Loop(self._refused)
        self.boxes: dict[int, Box] = {}
        self.tickets: dict[int, Box] = {}
        self.free = list(range(FIRST_SLOT, SLOTS))
        self.tenants: list[Tenant] = []
        self.beside: set[Tenant] = set()
        self.installed: tuple[int, ...] = ()
        self._made = 0
        self._unfit: dict[str, str] = {}
        self.short_of_memory = False
        self.serving = False
        self.stopping = False
        self.cores = len(os.sched_getaffinity(0))
        self.ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.most_parked = min(MOST_PARKED, math.ceil(self.ram_bytes * settings.parked_share / PARKED_BYTES))
        self._outbox: list[bytes] = []

    def log(self, text: str) -> None:
        print(f"sandrun spawner: {text}", file=sys.stderr, flush=True)

    def _refused(self, handler: Callable[[], None], error: OSError) -> None:
        """What the kernel refuses one sandbox ends that one, not the others. Other exceptions are mistakes of ours."""
        box = getattr(handler, "__self__", None)
        if not isinstance(box, Box) or box.failed:
            raise error
        self.log(f"slot {box.slot}: {error}")
        box.fail(messages.failure("spawner", error))

    # ---- start and stop ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Prepare, tell api the FACTS, and serve. Returns: the exit status.

        Raises: MissingLayer, SetupError if the host is not fit.
        """
        with cgroup.Cgroups.create(self.settings.waived) as cgroups:
            cgroups.remove_leftovers()
            self._prepare(cgroups)
            while any(not tenant.warm and not tenant.withdrawn for tenant in self.tenants):
                self.loop.turn()
            self._insist()
            self.tests = SelfTests(self)
            self.tests.run()
            self._insist()
            self._send(self._encoded_facts())
            self.serving = True
            self.connection.setblocking(False)
            self.loop.watch(self.connection.fileno(), self._on_api)
            self._look_at_activity()
            self._look_at_host()
            while not self.stopping:
                self.loop.turn()
            self._end_all()
            return os.EX_TEMPFAIL if self.tenants[0].withdrawn else 0  # another may have better luck

    def _prepare(self, cgroups: cgroup.Cgroups) -> None:
        settings = self.settings
        self.cgroups = cgroups
        self.walls = Walls(cgroups, settings.waived, settings.uid_base, len(settings.environments) + 1)
        self.interpreters = interpreters.find(settings.rootfs, settings.interpreters)
        self.installed = interpreters.installed(settings.rootfs)
        self.archive = nursery.make_archive(dict(settings.overrides))
        self.tenants.append(self._tenant(None, -1))
        for environment in settings.environments:
            try:
                held = environments.hold(environment)
            except FileNotFoundError as error:  # removed since it was listed
                self.log(str(error))
                continue
            self.tenants.append(self._tenant(environment, held))
        for tenant in self.tenants:
            tenant.start_zygote()

    def _tenant(self, environment: Environment | None, held: int) -> Tenant:
        """With ids and a cgroup of its own. Takes over `held`. Raises: SetupError if there are no ids left; OSError."""
        group: cgroup.Group | None = None
        try:
            number = self._made
            argvs = {key: list(found.argv) for key, found in self.interpreters.items()}
            inside, path = "", nursery.PATH
            if environment is not None:
                inside = f"{rootfs.ENVIRONMENTS}/{environment.name}"
                path = f"{inside}/bin:{path}"
                argvs["python3"] = [f"{inside}/bin/python3"]
            recipe = nursery.Recipe(
                name=environment.name if environment is not None else "",
                environment=environment.path if environment is not None else None,
                rootfs=self.settings.rootfs,
                python=argvs["python3"][0],
                preload=environment.preload if environment is not None else (),
                libraries=environment.libraries if environment is not None else (),
                uid_base=self.walls.block(number),
                nest=self.walls.nest(argvs, path, inside),
            )
            group = self.cgroups.group(f"z{number}") if self.cgroups.mode != "none" else None
            if group is not None and recipe.uid_base is not None:
                group.chown(recipe.uid_base, recipe.uid_base)
            self._made += 1
            return Tenant(self, recipe, group, environment, held)
        except BaseException:
            if group is not None:
                group.close()
            if held >= 0:
                os.close(held)
            raise

    def give_up(self) -> None:
        """The bare interpreter is withdrawn. While serving, the supervisor starts another spawner, which looks at the
        host anew; before, `run` says why it refuses."""
        self.stopping = self.stopping or self.serving

    def _insist(self) -> None:
        """Raises: SetupError if the bare interpreter has no sandbox: then nothing has."""
        if self.tenants[0].withdrawn:
            raise SetupError(*messages.read_failure(self.tenants[0].withdrawn.encode()))

    def _end_all(self) -> None:
        """Api is gone: end what runs, and leave nothing."""
        for box in list(self.boxes.values()):
            box.kill()
        deadline = time.monotonic() + END_SECONDS
        while self.boxes and time.monotonic() < deadline:
            self.loop.after(0.1, lambda: None)
            self.loop.turn()
        for tenant in [*self.tenants, *self.beside]:
            tenant.end_zygote()

    # ---- api -----------------------------------------------------------------------------------------------

    def _on_api(self) -> None:
        try:
            for _ in range(32):
                message, descriptors = protocol.receive(
                    self.connection, protocol.START_BYTES, protocol.START_DESCRIPTORS
                )
                if not message:
                    self.stopping = True
                    return
                try:
                    self._handle(message, descriptors)
                except BaseException:
                    protocol.close_all(descriptors)
                    raise
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            self.log(f"api: {error}; giving it up")
            self.stopping = True

    def _handle(self, message: bytes, descriptors: list[int]) -> None:
        kind = message[:1]
        if kind == protocol.START and len(descriptors) == protocol.START_DESCRIPTORS:
            start = protocol.Start.decode(message)
            known = start.ticket in self.tickets or any(start.ticket in tenant.queue for tenant in self.tenants)
            if start.environment >= len(self.tenants) or known or start.ticket >= TICKETS:
                raise ProtocolError("START names no environment, or a ticket in use")
            self.start_job(self.tenants[start.environment], start, descriptors, self._tell_ended)
        elif kind == protocol.CANCEL and not descriptors:
            ticket = protocol.decode_cancel(message)
            if (box := self.tickets.get(ticket)) is not None:
                box.end(CANCELLED)
            for tenant in self.tenants:
                tenant.forget(ticket)
        else:
            raise ProtocolError(f"unexpected message {kind!r} with {len(descriptors)} descriptors")

    def start_job(self, tenant: Tenant, start: protocol.Start, descriptors: list[int], done: Done) -> None:
        """Have a job run; `done` hears how it ended. Takes over `descriptors`."""
        if len(self.boxes) + sum(len(tenant.queue) for tenant in self.tenants) >= MOST_AT_ONCE:
            failure = messages.failure("spawner", OSError(11, f"more than {MOST_AT_ONCE} sandboxes at once"))
            end_unbuilt(Waiting(start, descriptors, done), SETUP_FAILED, failure)
        else:
            tenant.take(start, descriptors, done)

    def tell_started(self, start: protocol.Start) -> None:
        if start.ticket < TICKETS:
            self._send(protocol.encode_started(start.ticket))

    def tell_activity(self, start: protocol.Start, active: bool) -> None:
        if start.ticket < TICKETS:
            self._send(protocol.encode_activity(start.ticket, active))

    def _look_at_activity(self) -> None:
        for box in list(self.tickets.values()):
            if box.started and box.exited is None:
                box.sample()
        self.loop.after(ACTIVITY_SECONDS, self._look_at_activity)

    def _look_at_host(self) -> None:
        self.loop.after(LOOK_SECONDS, self._look_at_host)
        try:
            available = memory.available_bytes()
        except OSError as error:  # no descriptor is left, say: no reason to end what runs
            self.log(f"cannot see how much memory is available: {error}")
            return
        short = available < self.ram_bytes // SHORT_SHARE * (2 if self.short_of_memory else 1)
        if short != self.short_of_memory:
            self.short_of_memory = short
            self.log("short of memory: nothing is parked until there is some" if short else "no longer short of memory")
            for tenant in self.tenants:
                tenant.refill_soon()
        self.installed = interpreters.installed(self.settings.rootfs)
        for tenant in self.tenants:
            tenant.renew_if_due()
        if self.settings.state_dir and not self.short_of_memory:
            self._look_for_new()

    def _look_for_new(self) -> None:
        """Environments that were built since we started."""
        known = {tenant.name for tenant in [*self.tenants, *self.beside]}
        state_dir = self.settings.state_dir
        try:
            new = [name for name in environments.names(state_dir) if name not in known]
        except (OSError, ConfigError) as error:
            self._cannot("environments cannot be listed", error)
            return
        for name in new:
            try:
                environment = environments.find(name, state_dir)
                newcomer = self._tenant(environment, environments.hold(environment))
            except (OSError, ConfigError, SetupError) as error:
                self._cannot(f"environment {name} cannot be taken up", error)
                continue
            newcomer.joins = True
            self.beside.add(newcomer)
            newcomer.start_zygote()

    def _cannot(self, what: str, error: Exception) -> None:
        """It is tried each second, and said once."""
        if self._unfit.get(what) != str(error):
            self._unfit[what] = str(error)
            self.log(f"{what}: {error}")

    def joined(self, newcomer: Tenant) -> None:
        """It is warm and tested, or withdrawn, which clients are told with the reason."""
        self.tenants.append(newcomer)
        try:
            facts = self._encoded_facts()
        except SetupError as error:
            self.log(f"environment {newcomer.title} is left out: {error.details}")
            self.settings = self.settings._replace(state_dir="")
            self.tenants.remove(newcomer)
            newcomer.retire()
            return
        self.beside.discard(newcomer)
        self._send(facts)

    def succeeded(self, tenant: Tenant, successor: Tenant) -> None:
        """A new zygote is warm and tested: what comes from now on is its."""
        self.tenants[self.tenants.index(tenant)] = successor
        self.beside.discard(successor)
        self.beside.add(tenant)
        self._send(protocol.encode_facts(protocol.FACTS, self._facts()))

    def gone(self, box: Box) -> None:
        """Nothing of `box` is left."""
        del self.boxes[box.slot]
        heapq.heappush(self.free, box.slot)

    def _tell_ended(self, ended: protocol.Ended) -> None:
        self._send(ended.encode())

    def _send(self, message: bytes) -> None:
        """To api, in order; what its socket does not take now goes soon."""
        self._outbox.append(message)
        self._flush()

    def _flush(self) -> None:
        while self._outbox and not self.stopping:
            try:
                self.connection.send(self._outbox[0])
            except BlockingIOError:
                self.loop.after(SEND_AGAIN_SECONDS, self._flush)
                return
            except OSError:
                self.stopping = True
                return
            self._outbox.pop(0)

    def _encoded_facts(self) -> bytes:
        """Raises: SetupError if they are longer than api takes."""
        facts = protocol.encode_facts(protocol.FACTS, self._facts())
        if len(facts) > protocol.FACTS_BYTES:
            raise SetupError("environments", 0, "they have more packages and modules than clients can be told of")
        return facts

    def _facts(self) -> dict[str, Any]:
        offered: dict[str, dict[str, Any]] = {}
        for name, found in self.interpreters.items():
            reason = self.tests.reason(name)
            offered[name] = {"path": found.argv[0] if found.argv else "", "available": not reason}
            if reason:
                step, _, details = messages.read_failure(reason.encode())
                offered[name]["reason"] = f"{step}: {details}"
        return {
            "interpreters": offered,
            "environments": {tenant.name: tenant.describe() for tenant in self.tenants},
            "isolation": self.walls.describe(),
            "cores": self.cores,
            "ram_bytes": self.ram_bytes,
        }


def run(connection: socket.socket, settings: Settings) -> int:
    """The spawner's process. Returns: its exit status; why no sandbox can be built is told to api, which says it."""
    os.setsid()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # api's end ends it
    process.set_parent_death_signal(signal.SIGKILL)
    process.set_title("sandrun: spawner")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a sandbox takes seven
    try:
        return Server(connection, settings).run()
    except SandrunError as error:
        step, number, text = "spawner", 0, str(error)
        if isinstance(error, SetupError):
            step, number, text = error.step, error.errno, error.details
        elif isinstance(error, MissingLayer):
            step, text = error.layer, f"{error.details}. {error.fix}"
        failure = f"{step}\0{number}\0{text}".encode(errors="replace")
        connection.setblocking(True)
        protocol.send(connection, protocol.UNFIT + failure[: protocol.FACTS_BYTES - 1])
        return 1
