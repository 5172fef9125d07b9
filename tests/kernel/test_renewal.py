"""What is kept ready for jobs follows the host: its memory, its interpreter, and time."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from sandrun.errors import SetupError
from sandrun.linux import memory
from sandrun.linux.cgroup import Cgroup
from sandrun.model import Outcome
from sandrun.spawner import interpreters, nursery, protocol, selftest, server, tenant
from tests import host
from tests.kernel.spawned import SAY, Spawned, spawned

SECONDS = 15.0


async def becomes(true: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not true():
            await asyncio.sleep(0.02)


def zygotes(one: Spawned) -> set[int]:
    return {p.pid for p in host.descendants(one.pid) if p.parent == one.pid}


def inits(one: Spawned, zygote: int) -> list[host.Process]:
    return [p for p in one.sandboxes() if p.parent == zygote]


def parked(one: Spawned) -> int:
    """Sandboxes of an idle spawner: each has an init and the process that waits for a job."""
    return len(one.sandboxes()) // 2


def looking_often(more: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def patch() -> None:
        server.LOOK_SECONDS = 0.05
        more()

    return patch


def version(path: Path, refuse_from: int = 1 << 30) -> Callable[[], None]:
    """The version of the interpreter's files is what `path` says; from `refuse_from` on no zygote can be started."""
    start = nursery.start

    def refuse(recipe: nursery.Recipe, archive: int, cgroup: Cgroup | None) -> nursery.Zygote:
        if int(path.read_text()) >= refuse_from:
            raise SetupError("zygote", 12, "refused by a test")
        return start(recipe, archive, cgroup)

    def patch() -> None:
        interpreters.installed = lambda rootfs: (int(path.read_text()),)
        nursery.start = refuse

    return looking_often(patch)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    path = tmp_path / "installed"
    path.write_text("1")
    return path


async def test_zygote_gives_way_when_the_interpreter_is_replaced(tmp_path: Path, installed: Path) -> None:
    """At once for jobs that come; the one that runs goes on, and then nothing of the old zygote is left."""
    async with spawned(tmp_path, patch=version(installed)) as one:
        await one.client.ready()
        (old,) = zygotes(one)
        running = asyncio.create_task(one.run(SAY))
        busy = await one.wait_for("begun")
        installed.write_text("2")
        await becomes(lambda: len(zygotes(one)) == 2)
        (new,) = zygotes(one) - {old}
        await becomes(lambda: inits(one, new) and len(inits(one, old)) == 1)
        assert (await one.run()).stdout == "hello\n"
        assert busy.alive
        os.kill(busy.pid, signal.SIGUSR1)
        done = await running
        assert (done.ended.outcome, done.ended.signal) == (Outcome.SIGNALED, signal.SIGUSR1)
        await becomes(lambda: zygotes(one) == {new})
        assert (await one.run()).stdout == "hello\n"
        await becomes(lambda: parked(one) >= 1)
        assert one.client.facts.environments[""]["available"]


async def test_pool_is_filled_again_while_jobs_run(tmp_path: Path) -> None:
    """Not only when one of them ends: the next client would wait for a sandbox to be built."""
    cores = len(os.sched_getaffinity(0))
    async with spawned(tmp_path) as one:
        await one.client.ready()
        (zygote,) = zygotes(one)
        running = [asyncio.create_task(one.run(SAY)) for _ in range(cores)]
        await becomes(lambda: len(one.called("begun")) == cores)
        await becomes(lambda: len(inits(one, zygote)) == 2 * cores)
        for busy in one.called("begun"):
            os.kill(busy.pid, signal.SIGUSR1)
        assert {(await job).ended.outcome for job in running} == {Outcome.SIGNALED}


async def test_zygote_gives_way_when_it_is_old(tmp_path: Path) -> None:
    def age() -> None:
        tenant.ZYGOTE_SECONDS = 1.0

    async with spawned(tmp_path, patch=looking_often(age)) as one:
        await one.client.ready()
        (old,) = zygotes(one)
        async with asyncio.timeout(SECONDS):
            while old in zygotes(one):
                done = await one.run()
                assert (done.ended.outcome, done.stdout) == (Outcome.EXITED, "hello\n")
        assert "died" not in one.text()


async def test_zygote_that_cannot_be_renewed_goes_on(tmp_path: Path, installed: Path) -> None:
    async with spawned(tmp_path, patch=version(installed, refuse_from=2)) as one:
        await one.client.ready()
        (old,) = zygotes(one)
        installed.write_text("2")
        await becomes(lambda: "could not be renewed: zygote: refused by a test; the old one goes on" in one.text())
        await asyncio.sleep(0.3)
        assert one.text().count("could not be renewed") == 1
        assert (await one.run()).stdout == "hello\n"
        assert zygotes(one) == {old}


@pytest.mark.requirement(34)
@pytest.mark.parametrize("victim", ["old", "new"])
async def test_zygotes_that_die_in_a_renewal_cost_nothing_but_their_jobs(
    victim: str, tmp_path: Path, installed: Path
) -> None:
    async with spawned(tmp_path, patch=version(installed)) as one:
        await one.client.ready()
        (old,) = zygotes(one)
        running = asyncio.create_task(one.run(SAY))
        await one.wait_for("begun")
        installed.write_text("2")
        await becomes(lambda: len(zygotes(one)) == 2)
        doomed = old if victim == "old" else max(zygotes(one) - {old})
        os.kill(doomed, signal.SIGKILL)
        await becomes(lambda: doomed not in zygotes(one))
        assert (await one.run()).stdout == "hello\n"
        if victim == "old":
            assert (await running).ended.outcome is Outcome.WORKER_LOST
        else:
            os.kill((await one.wait_for("begun")).pid, signal.SIGUSR1)
            assert (await running).ended.outcome is Outcome.SIGNALED
        assert (await one.run()).stdout == "hello\n"


@pytest.mark.requirement(34)
async def test_new_zygote_that_dies_in_its_test_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, installed: Path
) -> None:
    """It is not started again and again while another serves; no descriptor of it or of its test stays."""

    def patch() -> None:
        version(installed)()
        prove = selftest.SelfTests.prove

        def struck(self: selftest.SelfTests, tenant: tenant.Tenant, told: Callable[[str], None]) -> None:
            tenant.kill_zygote()
            prove(self, tenant, told)

        pytest.MonkeyPatch().setattr(selftest.SelfTests, "prove", struck)

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        (old,) = zygotes(one)
        await becomes(lambda: parked(one) >= min(2, len(os.sched_getaffinity(0))))
        before = one.descriptors()
        installed.write_text("2")
        await becomes(lambda: "could not be renewed: zygote: it died with status 9" in one.text())
        assert "starting another" not in one.text()
        await becomes(lambda: one.descriptors() == before)
        assert (await one.run()).stdout == "hello\n"
        assert zygotes(one) == {old}


async def test_spawner_without_a_descriptor_to_spare_goes_on(tmp_path: Path, installed: Path) -> None:
    """It can neither look at the host nor renew a zygote then; what it has serves on."""

    def patch() -> None:
        version(installed)()
        look, pair = memory.available_bytes, protocol.pair

        def refused() -> NoReturn:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        memory.available_bytes = lambda: refused() if installed.read_text() == "2" else look()
        protocol.pair = lambda: refused() if installed.read_text() == "3" else pair()

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        before = zygotes(one)
        installed.write_text("2")
        await becomes(lambda: "cannot see how much memory is available" in one.text())
        installed.write_text("3")
        await becomes(lambda: "could not be renewed: zygote: [Errno 24]" in one.text())
        installed.write_text("4")
        assert (await one.run()).stdout == "hello\n"
        assert zygotes(one) == before


async def test_nothing_is_parked_while_the_host_is_short_of_memory(tmp_path: Path) -> None:
    """Jobs are run all the same, each in a sandbox that is built for it."""
    figure = tmp_path / "available"
    figure.write_text(str(1 << 40))

    def patch() -> None:
        memory.available_bytes = lambda: int(figure.read_text() or 0)

    async with spawned(tmp_path, patch=looking_often(patch)) as one:
        await one.client.ready()
        await becomes(lambda: parked(one) >= 1)
        figure.write_text("1000")
        await becomes(lambda: not one.sandboxes())
        assert "short of memory: nothing is parked" in one.text()
        for _ in range(3):
            assert (await one.run()).stdout == "hello\n"
        await becomes(lambda: not one.sandboxes())
        figure.write_text(str(one.client.facts.ram_bytes // server.SHORT_SHARE + 1000))
        await asyncio.sleep(0.3)
        assert not one.sandboxes()  # nor does it come and go with each byte
        figure.write_text(str(1 << 40))
        await becomes(lambda: parked(one) >= 1)
        assert (await one.run()).stdout == "hello\n"
