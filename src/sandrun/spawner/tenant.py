"""An environment, its zygote, its parked sandboxes, and the jobs that wait for one."""

from __future__ import annotations

import heapq
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from sandrun import environments
from sandrun.errors import ProtocolError, SetupError
from sandrun.linux import cgroup, process
from sandrun.sandbox import messages, report, rootfs
from sandrun.spawner import nursery, protocol
from sandrun.spawner.box import CANCELLED, SETUP_FAILED, SPARE_BYTES, WORKER_LOST, Box

if TYPE_CHECKING:
    from sandrun.spawner.loop import Timer
    from sandrun.spawner.server import Server

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
REFILL_SECONDS = 0.001
"""Between two builds for the pool: what is asked for goes first."""
ZYGOTE_SECONDS = 3600.0
"""A zygote that is older gives way to a new one, and what it has parked with it."""
AGAIN_SECONDS = 60.0
"""After a new one that could not be started: the old one serves until then."""
LONG_SECONDS = 0.05
"""After a job was given a sandbox: most are over by then, and what they took is built again at their end."""
REST_SECONDS = 1.0
"""After a build that failed with nobody waiting for it: what it lacked may come back, and a loop would take a core."""

Done = Callable[[protocol.Ended], None]


class Waiting(NamedTuple):
    """A job that waits for its sandbox."""

    start: protocol.Start
    descriptors: list[int]
    done: Done


class Tenant:
    """One environment from the start of a zygote to its renewal, when a successor takes over.

    Attributes:
        withdrawn: `step NUL errno NUL text` once no sandbox can be had here any more, else "".
        predecessor: which this one is to succeed as soon as it is warm and tested.
        joins: it is to be offered beside the others as soon as it is warm and tested, or has a reason why not.
        retired: another serves in its place; it ends with the last job that it has.
    """

    def __init__(
        self,
        server: Server,
        recipe: nursery.Recipe,
        group: cgroup.Group | None,
        environment: environments.Environment | None = None,
        held: int = -1,
    ) -> None:
        """`held` is the environment's folder (`environments.hold`): removed or replaced, its files stay for us."""
        self.server = server
        self.name = recipe.name
        self.title = recipe.name or "bare"
        self.recipe = recipe
        self.group = group
        self.held = held
        self.environment = environment
        self.predecessor: Tenant | None = None
        self.joins = False
        self.retired = False
        self._renewing = False
        self._due = time.monotonic() + ZYGOTE_SECONDS
        self._installed = server.installed
        self.zygote: nursery.Zygote | None = None
        self.warm = False
        self.withdrawn = ""
        self.facts: dict[str, Any] = {}
        self.namespaces: dict[str, int] = {}
        self.queue: dict[int, Waiting] = {}
        self.boxes: dict[int, Box] = {}
        self._building: set[Box] = set()
        self._ready: deque[Box] = deque()
        self._starts: deque[float] = deque()
        self._deaths: list[float] = []
        self._deadline: Timer | None = None
        self._refill_timer: Timer | None = None
        self._rests_until = 0.0
        self._renewed_after = 0.0

    @property
    def shared_uid(self) -> bool:
        return self.recipe.uid_base is None

    def ids(self, slot: int) -> tuple[int, int]:
        """Init's and the job's id in the zygote's user namespace."""
        return (0, 0) if self.shared_uid else (2 * slot, 2 * slot + 1)

    def host_id(self, slot: int) -> int:
        return os.geteuid() if self.recipe.uid_base is None else self.recipe.uid_base + self.ids(slot)[1]

    def describe(self) -> dict[str, Any]:
        """For FACTS."""
        found: dict[str, Any] = {"available": not self.withdrawn}
        if self.environment is not None:
            found["packages"] = dict(self.environment.packages)
            found["digest"] = self.environment.digest
            found["created"] = self.environment.created
            found["preload"] = list(self.environment.preload)
        found.update({key: self.facts.get(key) for key in ("python", "in_place", "modules")})
        if self.facts.get("reason"):
            found["in_place_reason"] = self.facts["reason"]
        if self.withdrawn:
            step, _, details = messages.read_failure(self.withdrawn.encode())
            found["reason"] = f"{step}: {details}"
        return found

    # ---- renewal -------------------------------------------------------------------------------------------

    def renew_if_due(self) -> None:
        """Have a new zygote started if this one is old, or was made of other files than are there now: the
        environment was built again, or the interpreter replaced, whose modules would be of another version than it.
        """
        now = time.monotonic()
        waits = self.server.short_of_memory or not self.server.installed  # being replaced
        if waits or self._renewing or now < self._renewed_after or not (self.warm or self.withdrawn):
            return
        environment = environments.current(self.environment) if self.environment is not None else None
        same = self._installed == self.server.installed and environment == self.environment
        if same and now < self._due:
            return
        recipe, held = self.recipe, -1
        try:
            if environment is not None:
                held = os.dup(self.held) if environment == self.environment else environments.hold(environment)
                recipe = recipe._replace(preload=environment.preload, libraries=environment.libraries)
        except OSError as error:
            self._go_on(str(error))
            return
        self._renewing = True
        successor = Tenant(self.server, recipe, self.group, environment, held)
        successor.predecessor = self
        self.server.beside.add(successor)
        successor.start_zygote()

    def _go_on(self, reason: str) -> None:
        self.server.log(f"zygote {self.title} could not be renewed: {reason}; the old one goes on")
        self._renewing = False
        self._renewed_after = time.monotonic() + AGAIN_SECONDS

    def _proven(self, reason: str) -> None:
        """The self-test of a successor or newcomer is over; `reason` as for `withdrawn`."""
        if self.joins:
            if reason:
                self._withdraw(reason)
            else:
                self.joins = False
                self.server.joined(self)
                self._match()
                self.refill_soon()
            return
        predecessor, self.predecessor = self.predecessor, None
        if predecessor is None:
            return  # withdrawn meanwhile, and that was told
        if reason:
            step, _, details = messages.read_failure(reason.encode())
            predecessor._go_on(f"{step}: {details}")
            self.retire()
            return
        self.queue, predecessor.queue = predecessor.queue, {}
        self._starts = predecessor._starts
        self.server.succeeded(predecessor, self)
        predecessor.retire()
        self._match()
        self.refill_soon()

    def retire(self) -> None:
        self.retired = True
        self.server.loop.drop(self._refill_timer)
        for box in [*self._ready, *self._building]:
            box.kill()
        self._ready.clear()
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if self.retired and not self.boxes:
            self.kill_zygote()
            if self.zygote is None:
                self._forget_itself()

    def _forget_itself(self) -> None:
        """No zygote, no sandbox, no job."""
        if self.held >= 0:
            os.close(self.held)
            self.held = -1
        self.server.beside.discard(self)

    # ---- the zygote ----------------------------------------------------------------------------------------

    def start_zygote(self) -> None:
        loop = self.server.loop
        try:
            if self.held >= 0:  # the path that it was opened by may be another's now
                self.recipe = self.recipe._replace(environment=os.readlink(f"/proc/self/fd/{self.held}"))
            zygote = nursery.start(self.recipe, self.server.archive, self.group.own if self.group else None)
        except SetupError as error:
            self._withdraw(f"{error.step}\0{error.errno}\0{error.details}")
            return
        except OSError as error:
            self._withdraw(f"zygote\0{error.errno or 0}\0{error}")
            return
        self.zygote = zygote
        self.warm = False
        zygote.connection.setblocking(False)
        loop.watch(zygote.connection.fileno(), self._on_zygote)
        loop.watch(zygote.pidfd, self._on_zygote_death)
        self._deadline = loop.after(WARM_SECONDS, self._give_up_zygote)

    def end_zygote(self) -> None:
        """With it goes all that is left of its sandboxes."""
        if self.zygote is not None:
            self.kill_zygote()
            os.waitpid(self.zygote.pid, 0)

    def zygote_is_gone(self) -> bool:
        """Dead, or about to be: it is past its last instruction before its sandboxes die, and those before its pidfd
        tells."""
        if self.zygote is None or self._zygote_has_closed():
            return True
        try:
            return process.is_exiting(self.zygote.pid)
        except OSError:  # no descriptor is left to look with, which may be why somebody asks
            return False

    def _zygote_has_closed(self) -> bool:
        """The same, but for the moment in which a sandbox that it had just forked still holds a copy of its socket."""
        if self.zygote is None:
            return True
        try:
            return self.zygote.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def kill_zygote(self) -> None:
        if self.zygote is not None:
            signal.pidfd_send_signal(self.zygote.pidfd, signal.SIGKILL)

    def _give_up_zygote(self) -> None:
        self.facts = {"failure": f"zygote\0000\0it was not ready after {WARM_SECONDS:g} s"}
        self.kill_zygote()

    def _on_zygote(self) -> None:
        zygote = self.zygote
        if zygote is None:
            return
        try:
            message, descriptors = protocol.receive(zygote.connection, protocol.FACTS_BYTES, 1)
            try:
                self._handle(zygote, message, descriptors)
            finally:
                protocol.close_all(descriptors)
        except BlockingIOError:
            return
        except (OSError, ProtocolError, ValueError) as error:
            self.server.log(f"zygote {self.title}: {error}")
            self.kill_zygote()

    def _handle(self, zygote: nursery.Zygote, message: bytes, descriptors: list[int]) -> None:
        kind = message[:1]
        if not message:
            self.server.loop.unwatch(zygote.connection.fileno())  # its pidfd tells the rest
        elif kind == protocol.WARM and not self.warm:
            self.facts = protocol.decode_facts(message)
            self.namespaces = report.read_namespaces(f"/proc/{zygote.pid}")
            if self.server.walls.namespaces & process.CLONE_NEWCGROUP:
                self.namespaces["cgroup"] = -1  # the host's; compared with that already
            self.warm = True
            self.server.loop.drop(self._deadline)
            if self.predecessor is not None or self.joins:
                self.server.tests.prove(self, self._proven)
                return
            self._match()
            self.refill_soon()
        elif kind == protocol.SPAWNED and descriptors:
            slot = protocol.decode_spawned(message)
            box = self.boxes.get(slot)
            if box is None or box.pidfd >= 0:
                raise ProtocolError(f"SPAWNED for slot {slot}, which waits for none")
            box.spawned(descriptors.pop())
        elif kind == protocol.REFUSED:
            slot, failure = protocol.decode_refused(message)
            box = self.boxes.get(slot)
            if box is not None:
                box.failed = box.failed or failure
                box.bury()
            else:
                self.facts = {"failure": failure.decode(errors="replace")}
        else:
            raise ProtocolError(f"unexpected message {kind!r}")

    def _on_zygote_death(self) -> None:
        """PID 1 of its namespace is dead, and with it all its sandboxes."""
        zygote = self.zygote
        if zygote is None:
            return
        self._on_zygote()  # what it said last
        self.zygote = None
        loop = self.server.loop
        loop.unwatch(zygote.pidfd)
        loop.unwatch(zygote.connection.fileno())
        loop.drop(self._deadline)
        zygote.connection.close()
        os.close(zygote.pidfd)
        _, status = os.waitpid(zygote.pid, 0)
        for box in list(self.boxes.values()):
            if box.exited is None and box.reason is None:
                box.reason = WORKER_LOST
            if box.pidfd < 0:
                box.bury()
        self._building.clear()  # dead or about to be told so: no failure of the next one's, nor of who waits for it
        self._ready.clear()
        was_warm, self.warm = self.warm, False
        if self.server.stopping:
            return
        if self.retired:
            self._forget_itself()
            return
        now = time.monotonic()
        self._deaths = [when for when in self._deaths if when > now - RESTART_SECONDS] + [now]
        failure = str(self.facts.pop("failure", "")) if not was_warm else ""
        if failure:
            self._withdraw(failure)
        elif not self.namespaces or self.joins or self.predecessor is not None:  # it never served
            self._withdraw(f"zygote\0000\0it died with status {status} while starting")
        elif len(self._deaths) > RESTARTS:
            self._withdraw(f"zygote\0000\0it died {len(self._deaths)} times in {RESTART_SECONDS:.0f} s")
        else:
            self.server.log(f"zygote {self.title} died (status {status}); starting another")
            self.start_zygote()

    def _withdraw(self, failure: str) -> None:
        self.withdrawn = failure
        step, _, details = messages.read_failure(failure.encode())
        joins, self.joins = self.joins, False
        predecessor, self.predecessor = self.predecessor, None
        if predecessor is not None:
            predecessor._go_on(f"{step}: {details}")
            self._forget_itself()
        else:
            self.server.log(f"environment {self.title} is withdrawn: {step}: {details}")
        while self.queue:
            self._fail_oldest(failure.encode())
        if joins:
            self.server.joined(self)
        if predecessor is None and not self.name:
            self.server.give_up()

    # ---- jobs and sandboxes --------------------------------------------------------------------------------

    def take(self, start: protocol.Start, descriptors: list[int], done: Done) -> None:
        """Give a job to a parked sandbox, or to the next that is built. Takes over `descriptors`."""
        waiting = Waiting(start, descriptors, done)
        if self.withdrawn:
            end_unbuilt(waiting, SETUP_FAILED, self.withdrawn.encode())
            return
        self._starts.append(time.monotonic())
        self.queue[start.ticket] = waiting
        self._match()

    def forget(self, ticket: int) -> None:
        """Cancel a job that has no sandbox yet."""
        waiting = self.queue.pop(ticket, None)
        if waiting is not None:
            end_unbuilt(waiting, CANCELLED, b"")

    def parked(self, box: Box) -> None:
        """Its walls stand, seen from both sides: it can take a job."""
        self._building.discard(box)
        if self.retired:
            box.kill()
            return
        self._ready.append(box)
        self._match()

    def finished(self, box: Box) -> None:
        """Nothing of `box` is left: its slot, and with it its ids, may be another's."""
        del self.boxes[box.slot]
        self.server.gone(box)
        if box in self._ready:
            self._ready.remove(box)
        if box in self._building:
            self._building.discard(box)
            if not self.retired:
                self._fail_oldest(box.failed or b"start\0000\000it died while it was built")
        self.refill_soon()
        self._end_if_empty()

    def _match(self) -> None:
        """Bring waiting jobs and parked sandboxes together; build for those that are left."""
        if self.queue and self._zygote_has_closed():
            return  # nothing is given to those that die with it: the next one's are
        while self.queue:
            waiting = next(iter(self.queue.values()))
            box = next((box for box in self._ready if box.fits(waiting.start)), None)
            if box is None:
                break
            self._ready.remove(box)
            if box.parked:
                del self.queue[waiting.start.ticket]
                self.server.tickets[waiting.start.ticket] = box
                box.assign(waiting.start, waiting.descriptors, waiting.done)
                protocol.close_all(waiting.descriptors)
                if self._refill_timer is None:  # a job that takes long: its end would come too late for the next one
                    self.refill_soon(LONG_SECONDS)
        if self.warm:
            for waiting in list(self.queue.values())[len(self._building) :]:
                self._build(waiting.start.memory_bytes if self.shared_uid else DEFAULT_MEMORY_BYTES)

    def _refill(self) -> None:
        """Keep as many sandboxes parked as the last seconds would have liked to find, one build at a time; none while
        the host is short of memory."""
        self._refill_timer = None
        if self.server.stopping or not self.warm or self.withdrawn or self.retired:
            return
        now = time.monotonic()
        while self._starts and self._starts[0] < now - DEMAND_SECONDS:
            self._starts.popleft()
        floor = min(self.server.most_parked, self.server.cores if not self.name else 1)
        wanted = min(self.server.most_parked, max(floor, len(self._starts) // 4))
        if self.server.short_of_memory:
            floor = wanted = 0
        have = len(self._ready) + len(self._building)
        if have < wanted and not self.queue:
            if not self._building:
                self._build(DEFAULT_MEMORY_BYTES)
            self.refill_soon()
        elif have > wanted + floor and self._ready:
            self._ready.popleft().kill()  # its end calls here again
        elif have > floor:
            self.refill_soon(DEMAND_SECONDS)

    def refill_soon(self, seconds: float = REFILL_SECONDS) -> None:
        if self._refill_timer is None or seconds < DEMAND_SECONDS:
            self.server.loop.drop(self._refill_timer)
            when = max(time.monotonic() + seconds, self._rests_until)
            self._refill_timer = self.server.loop.at(when, self._refill)

    def _build(self, memory_bytes: int) -> None:
        """Start building a sandbox; it calls `parked`, or fails the job that has waited longest."""
        assert self.zygote is not None
        server = self.server
        slot = heapq.heappop(server.free)
        step = "cgroup"
        made: cgroup.Cgroup | None = None
        box: Box | None = None
        entries: list[int] = []
        storage = -1
        try:
            flags = 0
            shared: list[int] = []
            if self.group is not None:
                made = self.group.create(f"j{slot}")
                directory = made.directory_fd()
                if directory is not None:
                    shared.append(directory)
                    flags |= protocol.HAS_CGROUP
                entries = made.entry_fds()
                step = "limits"
                made.set_limits(memory_bytes, DEFAULT_PROCESSES + 1)
            step = "storage"
            storage_bytes = memory_bytes - SPARE_BYTES
            if not self.shared_uid:
                owner = self.recipe.uid_base or 0
                storage = rootfs.new_storage(storage_bytes, owner=owner, noswap=server.walls.noswap)
                shared.insert(0, storage)
                flags |= protocol.HAS_STORAGE
            step = "sockets"
            box = Box(server, self, slot, memory_bytes=memory_bytes, cgroup=made, storage=storage)
            server.boxes[slot] = self.boxes[slot] = box
            self._building.add(box)
            step = "oom notice"
            box.watch_memory()
            step = "spawn"
            spawn = protocol.Spawn(flags, len(entries), slot, *self.ids(slot), storage_bytes)
            ends = [end.fileno() for end in box.theirs]
            self.zygote.connection.setblocking(True)  # a full socket: the zygote is a moment behind
            try:
                protocol.send(self.zygote.connection, spawn.encode(), [*ends, *shared, *entries])
            finally:
                self.zygote.connection.setblocking(False)
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
            heapq.heappush(server.free, slot)
            self._fail_oldest(failure)
        finally:
            protocol.close_all(entries)

    def _fail_oldest(self, failure: bytes) -> None:
        """A sandbox could not be built: the job that it was for ends so, and nothing else is tried for it."""
        if not self.withdrawn and self.zygote_is_gone():
            return  # who waits is served by the next
        if self.queue:
            end_unbuilt(self.queue.pop(next(iter(self.queue))), SETUP_FAILED, failure)
        elif not self.server.stopping:
            step, _, details = messages.read_failure(failure)
            self.server.log(f"environment {self.title}: a sandbox could not be built: {step}: {details}")
            self._rests_until = time.monotonic() + REST_SECONDS


def end_unbuilt(waiting: Waiting, outcome: int, inside: bytes) -> None:
    """Tell that a job is over before it had a sandbox. `inside` as in `protocol.Ended`."""
    protocol.close_all(waiting.descriptors)
    unknown = protocol.UNKNOWN
    ticket = waiting.start.ticket
    waiting.done(protocol.Ended(ticket, outcome, unknown, 0, 0, 0, unknown, unknown, unknown, b"", inside))
