"""The spawner: makes, limits, accounts and ends sandboxes. Privileged, one thread, standard library only.

It reads nothing that a client sent: wishes, files and input pass through as descriptors, what was measured inside a
sandbox as bytes. When api is gone, everything it had started is ended and the spawner goes too.
"""

from __future__ import annotations

import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from sandrun.environments import Environment, hold
from sandrun.errors import MissingLayer, ProtocolError, SandrunError, SetupError
from sandrun.linux import cgroup, landlock, process
from sandrun.sandbox import messages, policy, report, rootfs
from sandrun.spawner import interpreters, nursery, protocol
from sandrun.spawner.box import CANCELLED, SETUP_FAILED, SPARE_BYTES, WORKER_LOST, Box
from sandrun.spawner.selftest import TICKETS, SelfTests

WARM_SECONDS = 60.0
"""How long a zygote may take to load its modules."""
RESTARTS = 3
"""Zygotes of one environment that may die in RESTART_SECONDS before it is withdrawn."""
RESTART_SECONDS = 30.0
DEFAULT_MEMORY_BYTES = 512 << 20
"""What sandboxes are built for before they are anybody's."""
DEFAULT_PROCESSES = 100
DEMAND_SECONDS = 2.0
"""How far the count of starts looks back that the number of parked sandboxes follows."""
PARKED_SHARE = 20
"""At most one part in this many of RAM is in parked sandboxes,"""
PARKED_BYTES = 3 << 20
"""which take this much each."""
MOST_PARKED = 64
REFILL_SECONDS = 0.001
"""Between two builds for the pool: what is asked for goes first."""
REST_SECONDS = 1.0
"""After a build that failed with nobody waiting for it: what it lacked may come back, and a loop would take a core."""
ACTIVITY_SECONDS = 0.2
"""Between two looks at which jobs use CPU."""
FIRST_SLOT, SLOTS = 1, 16384


class Settings(NamedTuple):
    """What the spawner is told.

    Attributes:
        waived: layers that may be missing.
        environments: package sets to offer beside the bare interpreter.
        uid_base: first host id of the sandboxes, in root mode.
        overrides: modules that a test replaces inside zygotes, to see that a broken wall is noticed.
    """

    waived: frozenset[str]
    rootfs: str
    uid_base: int
    interpreters: tuple[str, ...]
    environments: tuple[Environment, ...]
    overrides: tuple[tuple[str, bytes], ...] = ()


class Timer:
    """A call at a time of CLOCK_MONOTONIC. Cancelled ones stay in the heap until their time."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Waiting(NamedTuple):
    """A job that waits for its sandbox."""

    start: protocol.Start
    descriptors: list[int]
    done: Callable[[protocol.Ended], None] | None


class Tenant:
    """An environment and its zygote."""

    def __init__(self, name: str, recipe: nursery.Recipe, group: cgroup.Group | None) -> None:
        self.name = name
        self.recipe = recipe
        self.group = group
        self.zygote: nursery.Zygote | None = None
        self.warm = False
        self.withdrawn = ""
        self.facts: dict[str, Any] = {}
        self.described: dict[str, Any] = {}
        self.held = -1
        self.namespaces: dict[str, int] = {}
        self.deaths: list[float] = []
        self.queue: deque[Waiting] = deque()
        self.boxes: dict[int, Box] = {}
        self.building: set[Box] = set()
        self.ready: deque[Box] = deque()
        self.starts: deque[float] = deque()
        self.deadline: Timer | None = None
        self.refill: Timer | None = None
        self.rests_until = 0.0

    @property
    def shared_uid(self) -> bool:
        return self.recipe.uid_base is None

    def ids(self, slot: int) -> tuple[int, int]:
        """Init's and the job's id in the zygote's user namespace."""
        return (0, 0) if self.shared_uid else (2 * slot, 2 * slot + 1)

    def host_id(self, slot: int) -> int:
        return os.geteuid() if self.recipe.uid_base is None else self.recipe.uid_base + self.ids(slot)[1]


class Server:
    """`run` serves one api until it is gone."""

    def __init__(self, connection: socket.socket, settings: Settings) -> None:
        self.connection = connection
        self.settings = settings
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.timers: list[Timer] = []
        self.boxes: dict[int, Box] = {}
        self.tickets: dict[int, Box] = {}
        self.waiting: dict[int, Waiting] = {}
        self.free = list(range(FIRST_SLOT, SLOTS))
        self.outbox: list[bytes] = []
        self.stopping = False
        self.waived = settings.waived
        self.cores = len(os.sched_getaffinity(0))
        self.ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.most_parked = max(1, min(MOST_PARKED, self.ram_bytes // PARKED_SHARE // PARKED_BYTES))
        self.namespaces = report.read_namespaces("/proc/self")
        self.swap_closed = True

    # ---- the loop ------------------------------------------------------------------------------------------

    def watch(self, descriptor: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        self.handlers[descriptor] = handler
        self.epoll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        if self.handlers.pop(descriptor, None) is not None:
            self.epoll.unregister(descriptor)

    def at(self, when: float, call: Callable[[], None]) -> Timer:
        timer = Timer(when, call)
        heapq.heappush(self.timers, timer)
        return timer

    def drop(self, timer: Timer | None) -> None:
        if timer is not None:
            timer.call = None

    def turn(self) -> None:
        """Wait for something to happen, and see to it."""
        while self.timers and (self.timers[0].call is None or self.timers[0].when <= time.monotonic()):
            if (call := heapq.heappop(self.timers).call) is not None:
                self._call(call)
        wait = max(0.0, self.timers[0].when - time.monotonic()) if self.timers else -1
        events = [(descriptor, self.handlers.get(descriptor)) for descriptor, _ in self.epoll.poll(wait)]
        for descriptor, handler in events:
            # a handler before this one may have closed the descriptor, and another taken its number
            if handler is not None and self.handlers.get(descriptor) is handler:
                self._call(handler)

    def _call(self, handler: Callable[[], None]) -> None:
        """What the kernel refuses one sandbox ends that one, not the others. Other exceptions are mistakes of ours."""
        try:
            handler()
        except OSError as error:
            box = getattr(handler, "__self__", None)
            if not isinstance(box, Box) or box.failed:
                raise
            self.log(f"slot {box.slot}: {error}")
            box.fail(messages.failure("spawner", error))

    def log(self, text: str) -> None:
        print(f"sandrun spawner: {text}", file=sys.stderr, flush=True)

    # ---- start and stop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Prepare, tell api the FACTS, and serve. Raises: MissingLayer, SetupError if the host is not fit."""
        with cgroup.Cgroups.create(self.waived) as self.cgroups:
            self.cgroups.remove_leftovers()
            self._prepare()
            while any(not tenant.warm and not tenant.withdrawn for tenant in self.tenants):
                self.turn()
            if self.tenants[0].withdrawn:
                raise SetupError(*_split(self.tenants[0].withdrawn))
            self.tests = SelfTests(self)
            self.tests.run()
            if self.tenants[0].withdrawn:
                raise SetupError(*_split(self.tenants[0].withdrawn))
            self._send(protocol.FACTS + json.dumps(self._facts()).encode())
            self.connection.setblocking(False)
            self.watch(self.connection.fileno(), self._on_api)
            self._look_at_activity()
            while not self.stopping:
                self.turn()
            self._end_all()

    def _prepare(self) -> None:
        settings = self.settings
        root = os.geteuid() == 0
        self.swap_closed = self.cgroups.swap_closed() if self.cgroups.mode != "none" else not cgroup.swap_active()
        if not self.swap_closed and "swap" not in self.waived:
            raise MissingLayer("swap", "a job's memory could be swapped out to a disk", "swapoff -a, or use cgroup v2")
        filters = {"job": b"", "init": b""}
        self.policy: dict[str, Any] = {}
        if "seccomp" not in self.waived:
            jobs, init = policy.job_policy(), policy.init_policy()
            filters = {"job": jobs.compile(), "init": init.compile()}
            self.policy = {"digest": jobs.digest, "calls": jobs.count, "instructions": len(filters["job"]) // 8}
        self.landlock = landlock.abi() if "landlock" not in self.waived else 0
        self.namespace_flags = 0
        for name, flag in report.NAMESPACE_FLAGS.items():
            layer = {"mnt": "mount", "cgroup": "cgroupns"}.get(name, name)
            if layer not in self.waived or os.path.exists(f"/proc/self/ns/{name}"):
                self.namespace_flags |= flag
        self.noswap = root and _takes_noswap()
        self.interpreters = interpreters.find(settings.rootfs, settings.interpreters)
        python = self.interpreters["python3"].argv[0]
        count = len(settings.environments) + 1
        base: int | None = None
        if root:
            with open("/proc/self/uid_map") as file:
                base = nursery.choose_uid_base(file.read(), settings.uid_base, count)
        self.archive = nursery.make_archive(dict(settings.overrides))
        core = 1 if _cores_are_piped() else 0
        self.tenants: list[Tenant] = []
        for number, environment in enumerate([None, *settings.environments]):
            name = environment.name if environment is not None else ""
            inside = f"{rootfs.ENVIRONMENTS}/{name}" if environment is not None else ""
            argvs = {key: list(found.argv) for key, found in self.interpreters.items()}
            if name:
                argvs["python3"] = [f"{inside}/bin/python3"]
            recipe = nursery.Recipe(
                name=name,
                environment=environment.path if environment is not None else None,
                rootfs=settings.rootfs,
                python=argvs["python3"][0] if name else python,
                preload=(),
                uid_base=None if base is None else base + nursery.IDS * number,
                nest={
                    "job_filter": filters["job"].hex(),
                    "init_filter": filters["init"].hex(),
                    "landlock": self.landlock,
                    "namespaces": self.namespace_flags,
                    "shared_uid": base is None,
                    "interpreters": argvs,
                    "path": f"{inside}/bin:{nursery.PATH}" if name else nursery.PATH,
                    "environment": inside,
                    "core_limit": core,
                },
            )
            group = self.cgroups.group(f"z{number}") if self.cgroups.mode != "none" else None
            if group is not None and recipe.uid_base is not None:
                group.chown(recipe.uid_base, recipe.uid_base)
            tenant = Tenant(name, recipe, group)
            if environment is not None:
                tenant.held = hold(environment)  # removed or replaced, it stays for us
                tenant.described = {
                    "packages": dict(environment.packages),
                    "digest": environment.digest,
                    "created": environment.created,
                }
            self.tenants.append(tenant)
            self._start_zygote(tenant)

    def _end_all(self) -> None:
        """Api is gone: end what runs, and leave nothing."""
        for box in list(self.boxes.values()):
            box.kill()
        deadline = time.monotonic() + 5
        while self.boxes and time.monotonic() < deadline:
            self.at(time.monotonic() + 0.1, lambda: None)
            self.turn()
        for tenant in self.tenants:
            if tenant.zygote is not None:
                signal.pidfd_send_signal(tenant.zygote.pidfd, signal.SIGKILL)
                os.waitpid(tenant.zygote.pid, 0)

    # ---- zygotes -------------------------------------------------------------------------------------------

    def _start_zygote(self, tenant: Tenant) -> None:
        try:
            zygote = nursery.start(tenant.recipe, self.archive, tenant.group.own if tenant.group else None)
        except SetupError as error:
            self._withdraw(tenant, f"{error.step}\0{error.errno}\0{error.details}")
            return
        tenant.zygote = zygote
        tenant.warm = False
        zygote.connection.setblocking(False)
        self.watch(zygote.connection.fileno(), lambda: self._on_zygote(tenant))
        self.watch(zygote.pidfd, lambda: self._on_zygote_death(tenant))
        tenant.deadline = self.at(
            time.monotonic() + WARM_SECONDS, lambda: signal.pidfd_send_signal(zygote.pidfd, signal.SIGKILL)
        )

    def _on_zygote(self, tenant: Tenant) -> None:
        zygote = tenant.zygote
        if zygote is None:
            return
        try:
            message, descriptors = protocol.receive(zygote.connection, protocol.FACTS_BYTES, 1)
            kind = message[:1]
            if not message:
                self.unwatch(zygote.connection.fileno())  # its pidfd tells the rest
            elif kind == protocol.WARM and not tenant.warm:
                tenant.facts = json.loads(message[1:])
                tenant.namespaces = report.read_namespaces(f"/proc/{zygote.pid}")
                if self.namespace_flags & process.CLONE_NEWCGROUP:
                    tenant.namespaces["cgroup"] = -1  # the host's; compared with that already
                tenant.warm = True
                self.drop(tenant.deadline)
                self._match(tenant)
                self._refill_soon(tenant)
            elif kind == protocol.SPAWNED and descriptors:
                slot = protocol.decode_spawned(message)
                box = tenant.boxes.get(slot)
                if box is None or box.pidfd >= 0:
                    raise ProtocolError(f"SPAWNED for slot {slot}, which waits for none")
                box.spawned(descriptors.pop())
            elif kind == protocol.REFUSED:
                slot, failure = protocol.decode_refused(message)
                box = tenant.boxes.get(slot)
                if box is not None:
                    box.failed = box.failed or failure
                    box.bury()
                else:
                    tenant.facts = {"failure": failure.decode(errors="replace")}
            else:
                raise ProtocolError(f"unexpected message {kind!r}")
            protocol.close_all(descriptors)
        except BlockingIOError:
            return
        except (OSError, ProtocolError, ValueError) as error:
            self.log(f"zygote {tenant.name or 'bare'}: {error}")
            signal.pidfd_send_signal(zygote.pidfd, signal.SIGKILL)

    def _on_zygote_death(self, tenant: Tenant) -> None:
        """PID 1 of its namespace is dead, and with it all its sandboxes."""
        zygote = tenant.zygote
        if zygote is None:
            return
        self._on_zygote(tenant)  # what it said last
        tenant.zygote = None
        self.unwatch(zygote.pidfd)
        self.unwatch(zygote.connection.fileno())
        zygote.connection.close()
        os.close(zygote.pidfd)
        _, status = os.waitpid(zygote.pid, 0)
        self.drop(tenant.deadline)
        for box in list(tenant.boxes.values()):
            if box.exited is None and box.reason is None:
                box.reason = WORKER_LOST
            if box.pidfd < 0 and not box.dead:
                box.bury()
        was_warm, tenant.warm = tenant.warm, False
        if self.stopping:
            return
        now = time.monotonic()
        tenant.deaths = [when for when in tenant.deaths if when > now - RESTART_SECONDS] + [now]
        failure = str(tenant.facts.pop("failure", "")) or f"zygote\0000\0it died with status {status} while starting"
        if not was_warm or len(tenant.deaths) > RESTARTS:
            self._withdraw(tenant, failure if not was_warm else f"zygote\0000\0it died {RESTARTS + 1} times")
        else:
            self.log(f"zygote {tenant.name or 'bare'} died (status {status}); starting another")
            self._start_zygote(tenant)

    def _withdraw(self, tenant: Tenant, failure: str) -> None:
        tenant.withdrawn = failure
        step, _, details = _split(failure)
        self.log(f"environment {tenant.name or 'bare'} is withdrawn: {step}: {details}")
        while tenant.queue:
            self._fail_oldest(tenant, failure.encode())

    # ---- jobs ----------------------------------------------------------------------------------------------

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
            if start.environment >= len(self.tenants) or start.ticket in self.tickets or start.ticket in self.waiting:
                raise ProtocolError("START names no environment, or a ticket in use")
            self.start_job(self.tenants[start.environment], start, descriptors, None)
        elif kind == protocol.CANCEL and not descriptors:
            ticket = protocol.decode_cancel(message)
            if (box := self.tickets.get(ticket)) is not None:
                box.end(CANCELLED)
            elif (waiting := self.waiting.pop(ticket, None)) is not None:
                self._forget(waiting)
        else:
            raise ProtocolError(f"unexpected message {kind!r} with {len(descriptors)} descriptors")

    def start_job(
        self,
        tenant: Tenant,
        start: protocol.Start,
        descriptors: list[int],
        done: Callable[[protocol.Ended], None] | None,
    ) -> None:
        """Give a job to a parked sandbox, or to the next that is built. Takes over `descriptors`."""
        if tenant.withdrawn:
            protocol.close_all(descriptors)
            self._refuse(start, tenant.withdrawn.encode(), done)
            return
        if len(self.waiting) + len(self.boxes) >= SLOTS // 2:
            protocol.close_all(descriptors)
            self._refuse(start, messages.failure("spawner", OSError(11, "too many sandboxes")), done)
            return
        tenant.starts.append(time.monotonic())
        waiting = Waiting(start, descriptors, done)
        self.waiting[start.ticket] = waiting
        tenant.queue.append(waiting)
        self._match(tenant)

    def parked(self, box: Box) -> None:
        """Its walls stand, seen from both sides: it can take a job."""
        box.tenant.building.discard(box)
        box.tenant.ready.append(box)
        self._match(box.tenant)

    def _match(self, tenant: Tenant) -> None:
        """Bring waiting jobs and parked sandboxes together; build for those that are left."""
        while tenant.queue:
            waiting = tenant.queue[0]
            box = next((box for box in tenant.ready if box.fits(waiting.start)), None)
            if box is None:
                break
            tenant.ready.remove(box)
            if not box.parked:
                continue
            tenant.queue.popleft()
            del self.waiting[waiting.start.ticket]
            self.tickets[waiting.start.ticket] = box
            box.assign(waiting.start, waiting.descriptors, waiting.done)
            protocol.close_all(waiting.descriptors)
        if tenant.warm:
            for waiting in list(tenant.queue)[len(tenant.building) :]:
                self._build(tenant, waiting.start.memory_bytes if tenant.shared_uid else DEFAULT_MEMORY_BYTES)

    def _refill(self, tenant: Tenant) -> None:
        """Keep as many sandboxes parked as the last seconds would have liked to find, one build at a time."""
        tenant.refill = None
        if self.stopping or not tenant.warm or tenant.withdrawn:
            return
        now = time.monotonic()
        while tenant.starts and tenant.starts[0] < now - DEMAND_SECONDS:
            tenant.starts.popleft()
        floor = self.cores if not tenant.name else 1
        wanted = min(self.most_parked, max(floor, len(tenant.starts) // 4))
        have = len(tenant.ready) + len(tenant.building)
        if have < wanted and not tenant.queue:
            if not tenant.building:
                self._build(tenant, DEFAULT_MEMORY_BYTES)
            self._refill_soon(tenant)
        elif have > 2 * wanted + floor:
            tenant.ready.popleft().kill()

    def _refill_soon(self, tenant: Tenant) -> None:
        if tenant.refill is None:
            when = max(time.monotonic() + REFILL_SECONDS, tenant.rests_until)
            tenant.refill = self.at(when, lambda: self._refill(tenant))

    def _build(self, tenant: Tenant, memory_bytes: int) -> None:
        """Start building a sandbox; it calls `parked`, or fails the job that has waited longest."""
        assert tenant.zygote is not None
        slot = heapq.heappop(self.free)
        step = "cgroup"
        made: cgroup.Cgroup | None = None
        box: Box | None = None
        entries: list[int] = []
        storage = -1
        try:
            flags = 0
            shared: list[int] = []
            if tenant.group is not None:
                made = tenant.group.create(f"j{slot}")
                step = "limits"
                made.set_limits(memory_bytes, DEFAULT_PROCESSES + 1)
                directory = made.directory_fd()
                if directory is not None:
                    shared.append(directory)
                    flags |= protocol.HAS_CGROUP
                entries = made.entry_fds()
            step = "storage"
            storage_bytes = memory_bytes - SPARE_BYTES
            if not tenant.shared_uid:
                storage = rootfs.new_storage(storage_bytes, owner=tenant.recipe.uid_base or 0, noswap=self.noswap)
                shared.insert(0, storage)
                flags |= protocol.HAS_STORAGE
            step = "sockets"
            box = Box(self, tenant, slot, memory_bytes=memory_bytes, cgroup=made, storage=storage)
            self.boxes[slot] = tenant.boxes[slot] = box
            tenant.building.add(box)
            step = "oom notice"
            box.watch_memory()
            step = "spawn"
            spawn = protocol.Spawn(flags, len(entries), slot, *tenant.ids(slot), storage_bytes)
            ends = [end.fileno() for end in box.theirs]
            tenant.zygote.connection.setblocking(True)  # a full socket: the zygote is a moment behind
            try:
                protocol.send(tenant.zygote.connection, spawn.encode(), [*ends, *shared, *entries])
            finally:
                tenant.zygote.connection.setblocking(False)
            box.close_theirs()
        except OSError as error:
            failure = messages.failure(step, error)
            if box is not None:
                box.failed = failure
                box.bury()
                return
            if made is not None:
                made.remove()
            if storage >= 0:
                os.close(storage)
            heapq.heappush(self.free, slot)
            self._fail_oldest(tenant, failure)
        finally:
            protocol.close_all(entries)

    def _fail_oldest(self, tenant: Tenant, failure: bytes) -> None:
        """A sandbox could not be built: the job that it was for ends so, and nothing else is tried for it."""
        if tenant.queue:
            waiting = tenant.queue.popleft()
            del self.waiting[waiting.start.ticket]
            protocol.close_all(waiting.descriptors)
            self._refuse(waiting.start, failure, waiting.done)
        else:
            step, _, details = messages.read_failure(failure)
            self.log(f"environment {tenant.name or 'bare'}: a sandbox could not be built: {step}: {details}")
            tenant.rests_until = time.monotonic() + REST_SECONDS

    def _forget(self, waiting: Waiting) -> None:
        """Cancelled before it had a sandbox."""
        for tenant in self.tenants:
            if waiting in tenant.queue:
                tenant.queue.remove(waiting)
        protocol.close_all(waiting.descriptors)
        self._end_unbuilt(waiting.start, CANCELLED, b"", waiting.done)

    def _refuse(self, start: protocol.Start, failure: bytes, done: Callable[[protocol.Ended], None] | None) -> None:
        self._end_unbuilt(start, SETUP_FAILED, failure, done)

    def _end_unbuilt(
        self, start: protocol.Start, outcome: int, inside: bytes, done: Callable[[protocol.Ended], None] | None
    ) -> None:
        unknown = protocol.UNKNOWN
        ended = protocol.Ended(start.ticket, outcome, unknown, 0, 0, 0, unknown, unknown, unknown, b"", inside)
        (done or self._tell_ended)(ended)

    def tell_started(self, box: Box) -> None:
        if box.done is None and box.start is not None:
            self._send(protocol.encode_started(box.start.ticket))

    def tell_activity(self, start: protocol.Start, active: bool) -> None:
        if start.ticket < TICKETS:
            self._send(protocol.encode_activity(start.ticket, active))

    def _look_at_activity(self) -> None:
        for box in list(self.tickets.values()):
            if box.started and box.exited is None:
                box.sample()
        self.at(time.monotonic() + ACTIVITY_SECONDS, self._look_at_activity)

    def ended(self, box: Box, verdict: protocol.Ended) -> None:
        """The job is over."""
        del self.tickets[verdict.ticket]
        (box.done or self._tell_ended)(verdict)

    def finished(self, box: Box) -> None:
        """Nothing of `box` is left: its slot, and with it its ids, may be another's."""
        tenant = box.tenant
        del self.boxes[box.slot], tenant.boxes[box.slot]
        heapq.heappush(self.free, box.slot)
        if box in tenant.ready:
            tenant.ready.remove(box)
        if box in tenant.building:
            tenant.building.discard(box)
            self._fail_oldest(tenant, box.failed or b"start\0000\000it died while it was built")
        self._refill_soon(tenant)

    def _tell_ended(self, ended: protocol.Ended) -> None:
        self._send(ended.encode())

    def _send(self, message: bytes) -> None:
        """To api, in order; what its socket does not take now goes soon."""
        self.outbox.append(message)
        self._flush()

    def _flush(self) -> None:
        while self.outbox and not self.stopping:
            try:
                self.connection.send(self.outbox[0])
            except BlockingIOError:
                self.at(time.monotonic() + 0.002, self._flush)
                return
            except OSError:
                self.stopping = True
                return
            self.outbox.pop(0)

    # ---- what is offered -----------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        offered: dict[str, dict[str, Any]] = {}
        for name, found in self.interpreters.items():
            reason = self.tests.reason(name)
            offered[name] = {"path": found.argv[0] if found.argv else "", "available": not reason}
            if reason:
                offered[name]["reason"] = ": ".join(str(part) for part in _split(reason)[::2])
        environments: dict[str, dict[str, Any]] = {}
        for tenant in self.tenants:
            facts = {key: tenant.facts.get(key) for key in ("python", "in_place", "modules")}
            if tenant.facts.get("reason"):
                facts["in_place_reason"] = tenant.facts["reason"]
            environments[tenant.name] = {"available": not tenant.withdrawn, **tenant.described, **facts}
            if tenant.withdrawn:
                step, _, details = _split(tenant.withdrawn)
                environments[tenant.name]["reason"] = f"{step}: {details}"
        return {
            "interpreters": offered,
            "environments": environments,
            "isolation": {
                "cgroup": self.cgroups.mode,
                "waived": sorted(self.waived),
                "uid": "shared" if self.tenants[0].shared_uid else "own",
                "uid_base": self.tenants[0].recipe.uid_base,
                "filter": self.policy,
                "landlock": self.landlock,
                "swap_closed": self.swap_closed,
                "noswap": self.noswap,
            },
            "cores": self.cores,
            "ram_bytes": self.ram_bytes,
        }


def _split(failure: str) -> tuple[str, int, str]:
    return messages.read_failure(failure.encode())


def _takes_noswap() -> bool:
    try:
        os.close(rootfs.new_storage(1 << 20, owner=0, noswap=True))
    except OSError:
        return False
    return True


def _cores_are_piped() -> bool:
    try:
        with open("/proc/sys/kernel/core_pattern") as file:
            return file.read().startswith("|")
    except OSError:
        return True


def run(connection: socket.socket, settings: Settings) -> int:
    """The spawner's process. Returns: its exit status; what was wrong is on stderr."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # api's end ends it
    process.set_parent_death_signal(signal.SIGKILL)
    process.set_title("sandrun: spawner")
    try:
        Server(connection, settings).run()
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
    return 0
