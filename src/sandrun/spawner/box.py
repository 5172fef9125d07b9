"""One sandbox as the spawner sees it: its cgroup, sockets, pidfd, clocks, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from sandrun.errors import ProtocolError
from sandrun.linux import mounts
from sandrun.linux.cgroup import Cgroup
from sandrun.sandbox import messages, report
from sandrun.spawner import protocol

if TYPE_CHECKING:
    from sandrun.spawner.loop import Timer
    from sandrun.spawner.server import Server
    from sandrun.spawner.tenant import Done, Tenant

SETUP_SECONDS = 30.0
"""For building the walls and unpacking."""
END_SECONDS = 0.4
"""How long init may take to end its job before the whole cgroup is killed."""
COLLECT_SECONDS = 60.0
OOM_LOOKS, OOM_LOOK_SECONDS = 5, 0.004
FORKS_IN_FLIGHT = 16
"""How many forks at a time may get as far as the cgroup's limit, which each does with all locks of a fork."""
QUIET_USEC = 1000
"""A job that used less CPU between two looks sleeps, as far as the queue is concerned."""
BUSY_USEC = 100_000
"""One that used more has had its while."""
SPARE_BYTES = 32 << 20
"""What a job's memory limit has beside its tmpfs: a full one is ENOSPC, not the end of the job."""
EXITED, SIGNALED, TIMEOUT, CPU_LIMIT, MEMORY_LIMIT, CANCELLED, WORKER_LOST, SETUP_FAILED = range(8)
CPU_CHECK_SECONDS = 0.002
"""The shortest wait between two readings of a job with a CPU limit."""
_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7)


class Box:
    """A sandbox: built by the server, parked when its walls stand, given one job, and never used again.

    It tells `tenant.parked` when it can take a job, `done` what became of that, and `tenant.finished` when nothing of
    it is left.

    Attributes:
        memory_bytes: what its tmpfs was made for; `storage` is its mount as long as that can still be changed, or -1.
        start: the job that it was given.
        reason: outcome that the spawner has decided on, None while the job decides itself.
        failed: `step NUL errno NUL text` of a set-up step.
    """

    def __init__(
        self, server: Server, tenant: Tenant, slot: int, *, memory_bytes: int, cgroup: Cgroup | None, storage: int
    ) -> None:
        self.server = server
        self.tenant = tenant
        self.slot = slot
        self.memory_bytes = memory_bytes
        self.cgroup = cgroup
        self.storage = storage
        self.start: protocol.Start | None = None
        self.done: Done | None = None
        self.pidfd = -1
        self.oom = -1
        self.reason: int | None = None
        self.failed = b""
        self.seen: dict[str, Any] = {}
        self.host = b""
        self.inside = b""
        self.exited: messages.Exited | None = None
        self.assigned = 0.0
        self.started = 0.0
        self.ended = 0.0
        self.killed = False
        self.dead = False
        self.told = False
        self.ours: list[socket.socket] = []
        control, init_end = protocol.pair()
        gate, job_end = protocol.pair()
        gate.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.control, self.gate = control, gate
        self.theirs = (init_end, job_end)
        for end, handler in ((control, self.on_control), (gate, self.on_gate)):
            end.setblocking(False)
            server.loop.watch(end.fileno(), handler)
            self.ours.append(end)
        self.timer: Timer | None = server.loop.after(SETUP_SECONDS, self.on_setup_deadline)
        self.cpu_timer: Timer | None = None

    @property
    def parked(self) -> bool:
        return bool(self.seen) and self.start is None and not self.failed and not self.dead and self.reason is None

    def fits(self, start: protocol.Start) -> bool:
        return self.memory_bytes == start.memory_bytes or self.storage >= 0

    # ---- what comes in -------------------------------------------------------------------------------------

    def on_gate(self) -> None:
        """From the job's process, before it is the client's; end of file when it has become so, or has died."""
        try:
            message, ancillary = _receive(self.gate, messages.TAIL_BYTES + 16, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        except OSError:
            message, ancillary = b"", []
        if not message:
            self._close(self.gate)
            return
        kind = message[:1]
        if kind == messages.FAILED:
            self.fail(message[1:])
        elif kind == messages.CONFINED and not self.inside:
            self.inside = message[1:]
            pid = next(
                (_CREDENTIALS.unpack(data)[0] for level, what, data in ancillary if what == socket.SCM_CREDENTIALS), 0
            )
            try:
                self._look(pid)
            except OSError as error:
                self.fail(messages.failure("verify from the host", error))
                return
            self.server.loop.drop(self.timer)
            self.timer = None
            self.tenant.parked(self)
        elif kind == messages.RUNNING and self.start is not None and not self.started:
            self._run(message[1:])
        else:
            self.fail(messages.failure("gate", ProtocolError(f"unexpected message {kind!r}")))

    def on_control(self) -> None:
        """From init."""
        try:
            message, _ = _receive(self.control, 8192)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        kind = message[:1]
        if not message:
            self._close(self.control)
        elif kind == messages.FAILED:
            self.fail(message[1:])
        elif kind == messages.EXITED and self.exited is None:
            try:
                self.exited = messages.Exited.decode(message)
            except ProtocolError as error:
                self.fail(messages.failure("init", error))
                return
            now = time.monotonic()
            self.ended = self.exited.ended if self.started <= self.exited.ended <= now else now
            self._stop_timers()
            self._count_oom()
            self.timer = self.server.loop.at(now + COLLECT_SECONDS, self.kill)
        elif kind == messages.DONE and self.exited is not None:
            self._tell()  # init has reaped every process but itself: what is left to do can wait for the answer
        else:
            self.fail(messages.failure("init", ProtocolError(f"unexpected message {kind!r}")))

    def on_pidfd(self) -> None:
        """Init is dead, and with PID 1 every process of the namespace, pid_namespaces(7)."""
        self.server.loop.unwatch(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
        for end in (self.gate, self.control):  # what they said last is still to be read
            while end in self.ours:
                before = len(self.ours)
                (self.on_gate if end is self.gate else self.on_control)()
                if len(self.ours) == before and not self._readable(end):
                    self._close(end)
        self.bury()

    def on_oom(self, looks: int = OOM_LOOKS) -> None:
        """The notice may come before the count shows the kill, and v2 gives it for plain reclaim too: look again."""
        if self.dead or self.reason is not None or self.exited is not None:
            self.server.loop.unwatch(self.oom)  # unread it would be ready for ever
            return
        self._count_oom()
        if self._oom_kills:
            self.end(MEMORY_LIMIT)
        elif looks:
            self.server.loop.after(OOM_LOOK_SECONDS, lambda: self.on_oom(looks - 1))

    def on_setup_deadline(self) -> None:
        if self.pidfd < 0:
            self.tenant.kill_zygote()  # it does not answer; the next one serves who waits
        self.fail(messages.failure("set-up", TimeoutError(f"not done after {SETUP_SECONDS:.0f} s")))

    def on_wall_limit(self) -> None:
        self.end(TIMEOUT)

    def sample(self) -> None:
        """Notice whether the job has used CPU since the last look. Called now and then while it runs."""
        used = self.cgroup.cpu_usec() if self.cgroup is not None else None
        if used is None or self.start is None:
            return
        active = used - self._sampled > QUIET_USEC
        busy = 0 < self._sampled < used - BUSY_USEC  # not at the first look, which would count set-up and imports
        self._sampled = used
        if busy and self.cgroup is not None and not self._gave_way:
            self._gave_way = True
            self.cgroup.give_way()  # who has had a while yields to who starts
        if active != self.active:
            self.active = active
            self.server.tell_activity(self.start, active)

    def on_cpu_check(self) -> None:
        used = self.cgroup.cpu_usec() if self.cgroup is not None else None
        if used is None or self.exited is not None:
            return
        assert self.start is not None
        left = self.start.cpu_ms / 1000 - used / 1e6
        if left <= 0:
            self.end(CPU_LIMIT)
            return
        wait = max(left / self.server.cores, CPU_CHECK_SECONDS)
        self.cpu_timer = self.server.loop.after(wait, self.on_cpu_check)

    # ---- what is done --------------------------------------------------------------------------------------

    def spawned(self, pidfd: int) -> None:
        self.pidfd = pidfd
        self.server.loop.watch(pidfd, self.on_pidfd)
        if self.killed:  # before there was anything to kill
            self.kill()

    def _look(self, pid: int) -> None:
        """Measure the job's process from outside. It waits for GO, so the pid is its own as long as it lives."""
        folder = f"/proc/{pid}"
        found = report.read_status(folder)
        found["namespaces"] = report.read_namespaces(folder)
        tenant = self.tenant
        for outer in (self.server.walls.outer, tenant.namespaces):
            report.verify_outside(
                found,
                outer=outer,
                flags=self.server.walls.namespaces,
                uid=tenant.host_id(self.slot),
                sandboxed=bool(self.server.walls.filter),
                shared_uid=tenant.shared_uid,
            )
        found["uid_kind"] = "shared" if tenant.shared_uid else "own"
        found["filter"] = self.server.walls.filter
        found["waived"] = self.server.walls.missing
        found["swap_closed"] = self.server.walls.swap_closed
        self.seen = found

    def assign(self, start: protocol.Start, descriptors: list[int], done: Done) -> None:
        """Give this sandbox its one job: limits first, read back, then what the client sent, unread.

        `descriptors`: wishes, archive, stdin, stdout, stderr, outputs; they stay the caller's.
        """
        self.start, self.done = start, done
        self.assigned = time.monotonic()
        self.timer = self.server.loop.after(SETUP_SECONDS, self.on_setup_deadline)
        step = "limits"
        try:
            if self.cgroup is not None:
                self.cgroup.set_limits(start.memory_bytes, start.processes + 1)
                self.seen["limits"] = self.cgroup.limits()
            step = "storage"
            if start.memory_bytes != self.memory_bytes:
                mounts.reconfigure(self.storage, {"size": str(start.memory_bytes - SPARE_BYTES)})
            self._close_storage()
            self.host = json.dumps(self.seen, separators=(",", ":")).encode()
            step = "assignment"
            wishes, *rest, outputs = descriptors
            kind = messages.ASSIGN_COLLECT if start.collect else messages.ASSIGN
            protocol.send(self.control, kind, [wishes, outputs])
            # Above the cgroup's, which tells that it was met: the kernel counts forks in flight before it compares.
            tasks = start.processes + (FORKS_IN_FLIGHT if self.seen.get("limits", {}).get("tasks") is not None else 0)
            protocol.send(self.gate, messages.encode_go(tasks), [wishes, *rest])
        except OSError as error:
            self.fail(messages.failure(step, error))

    def _close_storage(self) -> None:
        if self.storage >= 0:
            os.close(self.storage)
            self.storage = -1

    def _run(self, told: bytes) -> None:
        assert self.start is not None
        self.started = messages.decode_time(told, self.assigned, time.monotonic())
        self.server.loop.drop(self.timer)
        self.timer = self.server.loop.at(self.started + self.start.wall_ms / 1000, self.on_wall_limit)
        if self.start.cpu_ms:
            self.on_cpu_check()
        self.server.tell_started(self.start)

    def watch_memory(self) -> None:
        """Raises: OSError if the kernel offers no notice of OOM kills."""
        if self.cgroup is None:
            return
        oom = self.cgroup.oom_fd()
        if oom is not None:
            self.oom = oom
            self.server.loop.watch(oom, self.on_oom, self.cgroup.oom_poll)

    def end(self, reason: int) -> None:
        """Have init end the job, collect, and report; if it does not, end everything."""
        if self.reason is not None or self.exited is not None or self.dead:
            return
        self.reason = reason
        self._stop_timers()
        self.timer = self.server.loop.after(END_SECONDS, self.kill)
        try:
            if self.cgroup is not None:
                self.cgroup.freeze(False)  # who has frozen the job from outside has frozen init with it
            self.control.send(messages.END)
        except OSError:
            self.kill()

    def fail(self, failure: bytes) -> None:
        if not self.failed:
            self.failed = failure
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole sandbox. What is left to do follows when init's pidfd says that it is over."""
        self._stop_timers()
        if self.dead:
            return
        self.killed = True
        if self.cgroup is not None:
            self.cgroup.kill()
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # dead and reaped by the zygote already; its pidfd says so in a moment

    # ---- the end -------------------------------------------------------------------------------------------

    active = True
    _gave_way = False
    _sampled = 0
    _oom_kills = 0
    _limit_hits = 0

    def _count_oom(self) -> None:
        if self.cgroup is not None:
            self._oom_kills, self._limit_hits = self.cgroup.events()

    def bury(self) -> None:
        """Nothing lives in it any more: read the meters, remove the cgroup, tell."""
        if self.dead:
            return
        self.dead = True
        self._stop_timers()
        if self.exited is None:
            self.ended = time.monotonic()
            self._count_oom()
        if not self.told:
            self._tell()
        if self.oom >= 0:
            self.server.loop.unwatch(self.oom)
            self.oom = -1
        for end in list(self.ours):
            self._close(end)
        self.close_theirs()
        self._close_storage()
        self._remove(time.monotonic() + 2.0)

    def _remove(self, deadline: float) -> None:
        """A zombie that the zygote has yet to reap keeps a v1 cgroup busy: try again soon, without waiting here."""
        if self.cgroup is not None:
            try:
                self.cgroup.remove(timeout=0)
            except OSError:
                if time.monotonic() < deadline:
                    self.server.loop.after(0.001, lambda: self._remove(deadline))
                    return
                self.server.log(f"cgroup of slot {self.slot} is still busy and is left behind")
        self.tenant.finished(self)

    def _tell(self) -> None:
        """Read the meters and tell what became of the job, once."""
        self.told = True
        if self.start is None:
            return  # nobody's
        self.usage = self.cgroup.usage() if self.cgroup is not None else (None, None, None, None)
        del self.server.tickets[self.start.ticket]
        assert self.done is not None
        self.done(self._verdict(self.start))

    def _verdict(self, start: protocol.Start) -> protocol.Ended:
        cpu, memory, _, tasks = self.usage
        status = self.exited.status if self.exited is not None else -1
        code, number = protocol.UNKNOWN, 0
        outcome = self.reason
        if self.exited is None and outcome is None and self.tenant.zygote_is_gone():
            outcome = WORKER_LOST
        if self.exited is not None and outcome is None:
            if os.WIFSIGNALED(status):
                outcome, number = SIGNALED, os.WTERMSIG(status)
            else:
                outcome, code = EXITED, os.waitstatus_to_exitcode(status)
        elif self.exited is not None and os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
        if self._oom_kills and outcome in (None, EXITED, SIGNALED):
            outcome, code = MEMORY_LIMIT, protocol.UNKNOWN
        inside = self.inside
        decided = (MEMORY_LIMIT, CANCELLED, TIMEOUT, CPU_LIMIT, WORKER_LOST)
        if self.failed and outcome not in decided and self.exited is None:
            outcome, code, number, inside = SETUP_FAILED, protocol.UNKNOWN, 0, self.failed
        elif not self.started and outcome in (EXITED, SIGNALED):
            outcome, code, number = SETUP_FAILED, protocol.UNKNOWN, 0
            inside = self.failed or b"start\0000\000the sandbox died before the job began"
        elif outcome is None:
            outcome = WORKER_LOST
        hits = self.exited.hits if self.exited is not None else 0
        if self._limit_hits:
            hits |= messages.HIT_PROCESSES
        if cpu is None and self.exited is not None:
            cpu, memory = self.exited.cpu_us, self.exited.memory_peak
        return protocol.Ended(
            ticket=start.ticket,
            outcome=outcome,
            exit_code=code,
            signal=number,
            hits=hits,
            wall_us=round((self.ended - self.started) * 1e6) if self.started else 0,
            cpu_us=protocol.UNKNOWN if cpu is None else cpu,
            memory_peak=protocol.UNKNOWN if memory is None else memory,
            tasks_peak=protocol.UNKNOWN if tasks is None else max(tasks - 1, 1),
            host=self.host if outcome != SETUP_FAILED else b"",
            inside=inside,
        )

    def close_theirs(self) -> None:
        for end in self.theirs:
            end.close()

    def _stop_timers(self) -> None:
        for timer in (self.timer, self.cpu_timer):
            if timer is not None:
                self.server.loop.drop(timer)
        self.timer = self.cpu_timer = None

    def _close(self, end: socket.socket) -> None:
        if end in self.ours:
            self.ours.remove(end)
            self.server.loop.unwatch(end.fileno())
            end.close()

    @staticmethod
    def _readable(end: socket.socket) -> bool:
        try:
            return bool(end.recv(1, socket.MSG_PEEK))
        except OSError:
            return False


def _receive(end: socket.socket, most: int, space: int = 0) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """One message. An end that was closed with something unread answers ECONNRESET, once, before what it had sent."""
    try:
        message, ancillary, _, _ = end.recvmsg(most, space)
    except ConnectionResetError:
        message, ancillary, _, _ = end.recvmsg(most, space)
    return message, ancillary
