"""Where one wall stands behind another: the test takes the first away, so that it is the second that holds."""

from __future__ import annotations

import asyncio
import errno
import json
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandrun.linux import cgroup, landlock, process
from sandrun.model import Outcome
from sandrun.spawner import box, nursery, protocol, server, tenant
from sandrun.spawner.selftest import TICKETS
from tests import host, serving
from tests.kernel.spawned import SAY, default_waived, hear_late, rebuilt, source, spawned, without
from tests.kernel.test_steps import build_on_demand, refused

ROOT = pytest.mark.root


# ---- what a zygote does wrong ------------------------------------------------------------------------------


@ROOT
@pytest.mark.requirement(2)
async def test_wrong_id_maps_are_noticed(tmp_path: Path) -> None:
    wrong = without("spawner/zygote", ("(INIT_UID, JOB_UID)", "(INIT_UID - 1, JOB_UID)"))
    async with spawned(tmp_path, wrong) as one:
        error = await refused(one)
    assert error.step == "user namespace"
    assert "getresuid does not show 999" in error.details


HANDED_DOWN = """
import json, os, signal
session = int(open("/proc/self/stat").read().rpartition(")")[2].split()[3])
print(json.dumps([sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), os.umask(0), session == os.getpid()]))
"""


@pytest.mark.requirement(13)
async def test_what_a_zygote_would_hand_down_is_reset(tmp_path: Path) -> None:
    """Mask, umask and session, whatever the zygote's are."""
    change = "os.umask(0o077); signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))"
    serve = "        connection.detach()"
    async with spawned(tmp_path, without("spawner/zygote", (serve, f"        {change}\n{serve}"))) as one:
        await one.client.ready()
        for fresh in (False, True):
            done = await one.run(HANDED_DOWN, fresh=fresh)
            assert done.stdout, done
            assert json.loads(done.stdout) == [[], 0o022, True]


async def test_zygote_that_breaks_the_table_is_ended(tmp_path: Path) -> None:
    serve = "        connection.detach()"
    stray = f'        protocol.send(connection, b"?")\n{serve}'
    async with spawned(tmp_path, without("spawner/zygote", (serve, stray))) as one:
        await refused(one)
        assert "unexpected message b'?'" in one.text()


async def test_second_init_for_one_sandbox_ends_the_zygote(tmp_path: Path) -> None:
    """SPAWNED brings the pidfd that a sandbox is killed by: another's would be killed instead."""
    once = "say_spawned(us->connection, asked.slot, pidfd);"
    async with spawned(tmp_path, rebuilt(once, f"{once} {once}")) as one:
        await refused(one)
        assert "which waits for none" in one.text()


@pytest.mark.requirement(1)
async def test_zygote_shares_no_namespace_but_one_with_the_host(tmp_path: Path) -> None:
    """Were a sandbox to fall back into its zygote's, it would not be the host's. clone3 needs the host's cgroups."""
    async with spawned(tmp_path) as one:
        await one.client.ready()
        (zygote,) = (p for p in host.descendants(one.pid) if p.parent == one.pid)
        assert set(zygote.namespaces()) == set(host.NAMESPACES) - {"cgroup"}


# ---- what api does wrong -----------------------------------------------------------------------------------

START = protocol.Start(
    environment=0, processes=10, collect=False, ticket=900, tag=0, memory_bytes=512 << 20, wall_ms=1000, cpu_ms=0
)


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        (b"?", 0),
        (b"S", 6),
        (START.encode() + b"x", 6),
        (START.encode(), 5),
        (START.encode(), 7),
        (START._replace(environment=1).encode(), 6),
        (START._replace(ticket=TICKETS).encode(), 6),
        (protocol.encode_cancel(1), 1),
        (protocol.encode_started(1), 0),
    ],
    ids=["unknown", "short", "long", "few", "many", "environment", "ticket", "cancel", "spawner's own"],
)
async def test_api_that_breaks_the_table_is_given_up(message: bytes, descriptors: int, tmp_path: Path) -> None:
    """The spawner ends with all that it had started; the supervisor starts another for another api."""
    async with spawned(tmp_path) as one:
        await one.client.ready()
        null = os.open("/dev/null", os.O_RDWR)
        try:
            protocol.send(one.client._connection, message, [null] * descriptors)
        finally:
            os.close(null)
        assert serving.wait_until(lambda: (p := host.process(one.pid)) is None or p.state == "Z", 2), one.text()
        assert "giving it up" in one.text()


# ---- an end that does not come -----------------------------------------------------------------------------


@pytest.mark.requirement(21)
async def test_init_that_does_not_listen_is_killed_with_its_job(tmp_path: Path) -> None:
    deaf = rebuilt("|| n != 2)\n        return 1;", "|| n != 2)\n        return 0;")
    async with spawned(tmp_path, deaf) as one:
        await one.client.ready()
        began = time.monotonic()
        done = await one.run("import time; print('begun', flush=True); time.sleep(60)", timeout=1)
    assert (done.ended.outcome, done.stdout) == (Outcome.TIMEOUT, "begun\n")
    assert time.monotonic() - began < host.within(3)


@pytest.mark.requirement(31)
async def test_collector_that_hangs_is_killed(tmp_path: Path) -> None:
    """No job can bring that about; if one could, it would not keep its place for ever."""

    def patch() -> None:
        box.COLLECT_SECONDS = 0.3

    slow = {"sandbox/collect": (source("sandbox/collect") + "\ndef collect(*_): time.sleep(60)\n").encode()}
    async with spawned(tmp_path, slow, patch=patch) as one:
        await one.client.ready()
        began = time.monotonic()
        done = await one.run()
    assert (done.ended.outcome, done.ended.exit_code, done.stdout) == (Outcome.EXITED, 0, "hello\n")
    assert not done.complete
    assert time.monotonic() - began < host.within(3)


# ---- the collector -----------------------------------------------------------------------------------------

COLLECTOR = """

def collect(directory, patterns, before, out_fd):
    try:
        os.close(os.memfd_create("x"))  # init's own filter allows it
        refused = 0
    except OSError as error:
        refused = error.errno
    with open("/proc/self/status") as file:
        told = file.read() + f"memfd_create:\\t{refused}\\ncwd:\\t{os.getcwd()}\\n"
    data = told.encode()
    os.write(out_fd, FRAME.pack(BEGIN, SIZE.size + 6) + SIZE.pack(len(data)) + b"status")
    os.write(out_fd, FRAME.pack(DATA, len(data)) + data + FRAME.pack(COMPLETE, 0) + FRAME.pack(END, 0))
"""


@pytest.mark.requirement(31)
async def test_collector_has_no_more_rights_than_the_job_had(tmp_path: Path) -> None:
    """It reads what a job left: links, names, trees. A hole in it is a hole in the job's own walls, no more."""
    telling = {"sandbox/collect": (source("sandbox/collect") + COLLECTOR).encode()}
    async with spawned(tmp_path, telling) as one:
        await one.client.ready()
        done = await one.run()
    found = dict(line.split(":\t", 1) for line in done.outputs["status"].decode().splitlines() if ":\t" in line)
    if os.geteuid() == 0:
        assert (found["Uid"].split(), found["Gid"].split()) == (["1000"] * 4, ["1000"] * 4)
    assert {found[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (found["NoNewPrivs"], found["Seccomp"], found["memfd_create"]) == ("1", "2", "1")
    assert found["cwd"] == "/job"


# ---- parked ------------------------------------------------------------------------------------------------


@ROOT
@pytest.mark.requirement(18, 20)
async def test_parked_sandbox_has_limits_before_it_has_a_job(tmp_path: Path) -> None:
    wanted = {("memory", str(tenant.DEFAULT_MEMORY_BYTES)), ("pids", str(tenant.DEFAULT_PROCESSES + 1))}
    async with spawned(tmp_path) as one:
        await one.client.ready()
        await asyncio.sleep(0.3)  # the self-test's, which had a job, are gone
        assert serving.wait_until(lambda: limits_of(one.sandboxes()) == wanted, 3), limits_of(one.sandboxes())


def limits_of(members: list[host.Process]) -> set[tuple[str, str]]:
    """What the cgroups that these processes are in limit, on v1 and v2."""
    found = set()
    for p in members:
        for line in Path(f"/proc/{p.pid}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            for mount in ("", "/unified", *(f"/{name}" for name in names.split(",") if name)):
                for name in ("memory.limit_in_bytes", "memory.max", "pids.max"):
                    if (file := Path(f"/sys/fs/cgroup{mount}{path}", name)).exists():
                        found.add((name.partition(".")[0], file.read_text().strip()))
    return found


@pytest.mark.requirement(9, 17)
async def test_landlock_is_measured_in_a_job(tmp_path: Path) -> None:
    async with spawned(tmp_path) as one:
        await one.client.ready()
        assert (await one.run()).inside["landlock"] == landlock.abi()


@pytest.mark.requirement(17, 18)
async def test_open_swap_is_a_refusal_where_nothing_limits_memory(tmp_path: Path) -> None:
    """No cgroup to close it by, and waiving those does not waive swap."""

    def patch() -> None:
        cgroup.swap_active = lambda: True

    async with spawned(tmp_path, patch=patch, absent=frozenset(("memory", "pids", "cpu"))) as one:
        error = await refused(one)
    assert error.step == "swap"
    assert "swapoff" in error.details


@pytest.mark.requirement(20)
async def test_more_jobs_than_there_are_ids_for_are_refused_not_queued_for_ever(tmp_path: Path) -> None:
    def patch() -> None:
        server.MOST_AT_ONCE = 0

    async with spawned(tmp_path, patch=patch, waived=default_waived()) as one:
        error = await refused(one)
    assert "sandboxes at once" in error.details


# ---- one uid -----------------------------------------------------------------------------------------------

ORDINARY = 62001


def as_an_ordinary_user() -> Callable[[], None]:
    """In the spawner's process: go on without privilege, as a server does that an ordinary user starts."""
    archive = nursery.make_archive()  # the tree may lie where that user cannot look

    def patch() -> None:
        nursery.make_archive = lambda overrides=None: archive
        build_on_demand()
        os.setgroups([])
        os.setresgid(ORDINARY, ORDINARY, ORDINARY)
        os.setresuid(ORDINARY, ORDINARY, ORDINARY)
        process.set_dumpable(True)

    return patch


def status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


@ROOT
@pytest.mark.requirement(2, 3, 7)
async def test_with_one_uid_init_and_job_are_apart_all_the_same(tmp_path: Path) -> None:
    waived = default_waived() | {"memory", "pids", "cpu", "swap"}
    async with spawned(tmp_path, patch=as_an_ordinary_user(), waived=waived) as one:
        await one.client.ready()
        running = asyncio.create_task(one.run(SAY))
        job = (await one.wait_for("begun")).pid
        (init,) = (p.pid for p in one.sandboxes() if p.pid_inside == 1)
        for pid in (init, job):
            seen = status(pid)
            assert set(seen["Uid"].split()) == {str(ORDINARY)}
            assert {seen[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}, seen
            assert (seen["NoNewPrivs"], seen["Seccomp"]) == ("1", "2")
        assert os.readlink(f"/proc/{init}/ns/user") != os.readlink(f"/proc/{job}/ns/user")
        assert Path(f"/proc/{job}/setgroups").read_text() == "deny\n"
        assert Path(f"/proc/{job}/uid_map").read_text().split()[0] == "1000"
        os.kill(job, signal.SIGKILL)
        done = await running
    assert (done.ended.outcome, done.ended.signal) == (Outcome.SIGNALED, 9)
    assert done.host["uid_kind"] == "shared"


# ---- what is left when a part dies -------------------------------------------------------------------------


def is_gone(pid: int) -> bool:
    found = host.process(pid)
    return found is None or found.state in "ZX"


@ROOT
@pytest.mark.requirement(34)
async def test_start_looks_for_what_a_killed_server_left(tmp_path: Path) -> None:
    """Before it makes anything of its own; what is found and ended, tests/kernel/test_cgroup.py tells."""
    looked = mmap.mmap(-1, 1)  # shared with the spawner

    def patch() -> None:
        good = cgroup.Cgroups.remove_leftovers

        def remove_leftovers(self: cgroup.Cgroups) -> int:
            looked[0] = 1
            return good(self)

        cgroup.Cgroups.remove_leftovers = remove_leftovers  # type: ignore[method-assign]

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
    assert looked[0] == 1


@pytest.mark.requirement(34)
async def test_idle_spawner_ends_with_its_api(tmp_path: Path) -> None:
    """It has nothing to tell, and so no failure to tell it by which it could notice."""
    async with spawned(tmp_path) as one:
        await one.client.ready()
        await asyncio.sleep(0.3)
        one.client.close()
        assert serving.wait_until(lambda: is_gone(one.pid), 2)


@pytest.mark.requirement(34)
async def test_spawner_ends_with_its_api(tmp_path: Path) -> None:
    """End of file is all that it needs, and its jobs and zygotes end with it."""
    async with spawned(tmp_path) as one:
        await one.client.ready()
        running = asyncio.create_task(one.run(SAY))
        await one.wait_for("begun")
        members = host.descendants(one.pid)
        one.client.close()
        assert serving.wait_until(lambda: is_gone(one.pid), 2)
        assert serving.wait_until(lambda: all(is_gone(p.pid) for p in members), 2)
        assert (await running).ended.outcome is Outcome.WORKER_LOST


@ROOT
@pytest.mark.requirement(21, 34)
async def test_cancelled_job_that_cannot_be_thawed_is_killed_and_no_other(tmp_path: Path) -> None:
    """What the kernel refuses one sandbox, descriptors used up for example, ends that one."""

    def refuse(self: cgroup.Cgroup, frozen: bool) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def patch() -> None:
        spoil = pytest.MonkeyPatch()
        spoil.setattr(cgroup.Cgroup, "freeze", refuse)
        spoil.setattr(cgroup.Cgroup, "kill", lambda self, timeout=2.0: None)  # pure v1's freezes too

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        running = asyncio.create_task(one.run(SAY))
        await one.wait_for("begun")
        one.client.send(protocol.encode_cancel(one.client._ticket))
        done = await asyncio.wait_for(running, host.within(5))
        assert (done.ended.outcome, done.stdout) == (Outcome.CANCELLED, "begun\n")
        assert (await one.run()).stdout == "hello\n"


@pytest.mark.requirement(34)
async def test_no_job_is_given_to_a_sandbox_whose_zygote_is_dead(tmp_path: Path) -> None:
    """However late the spawner hears of the deaths."""

    def patch() -> None:
        hear_late(box.Box, "on_pidfd", 0.5)
        hear_late(tenant.Tenant, "_on_zygote_death", 0.5)

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        assert serving.wait_until(lambda: len(one.sandboxes()) >= 2, 5)
        await asyncio.sleep(0.5)  # they are parked
        (zygote,) = (p for p in host.descendants(one.pid) if p.parent == one.pid)
        os.kill(zygote.pid, signal.SIGKILL)
        assert serving.wait_until(lambda: is_gone(zygote.pid), 5)
        done = await asyncio.wait_for(one.run(), host.within(5))
        assert (done.ended.outcome, done.stdout) == (Outcome.EXITED, "hello\n")


@pytest.mark.requirement(34)
async def test_zygote_that_was_killed_is_replaced_and_its_job_lost(tmp_path: Path) -> None:
    async with spawned(tmp_path) as one:
        await one.client.ready()
        running = asyncio.create_task(one.run(SAY))
        await one.wait_for("begun")
        (zygote,) = (p for p in host.descendants(one.pid) if p.parent == one.pid)
        os.kill(zygote.pid, signal.SIGKILL)
        lost = await asyncio.wait_for(running, host.within(3))
        assert (lost.ended.outcome, lost.stdout) == (Outcome.WORKER_LOST, "begun\n")
        again = await asyncio.wait_for(one.run(), host.within(5))
        assert (again.ended.outcome, again.stdout) == (Outcome.EXITED, "hello\n")
