"""Each step that builds a sandbox is made to fail in turn: the error names it, and nothing is left behind."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandrun.errors import SetupError
from sandrun.linux import cgroup, hierarchy, mounts, process, seccomp
from sandrun.model import Outcome
from sandrun.sandbox import messages, policy, report, rootfs
from sandrun.sandbox.steps import COLLECTOR_STEPS, CONFINE_STEPS, INIT_STEPS, JOB_STEPS
from sandrun.spawner import box, nursery, protocol, tenant
from tests import host, serving
from tests.kernel.spawned import (
    ERRNO,
    SAY,
    Done,
    Spawned,
    default_waived,
    hear_late,
    pause,
    rebuilt,
    sleeping,
    spawned,
    spoilt,
    without,
)

TABLES = {"INIT_STEPS": INIT_STEPS, "JOB_STEPS": JOB_STEPS, "CONFINE_STEPS": CONFINE_STEPS}
STEPS = [(table, name) for table, steps in TABLES.items() for name, _ in steps]
LEADS_A_SESSION = 'calls.call("setsid")\n\n\ndef offer_to_oom'
ROOT = pytest.mark.root
pytestmark = pytest.mark.requirement(17)


def refuse(*_: object, **__: object) -> Any:
    raise OSError(ERRNO, "spoilt by a test")


class Switch:
    """Seen in the spawner's process too: what a test spoils there works until it is turned."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    def turn(self) -> None:
        self._shared[0] = 1

    @property
    def on(self) -> bool:
        return bool(self._shared[0])

    def spoil(self, place: object, name: str, only: Callable[..., bool] = lambda *_, **__: True) -> None:
        """Have `place.name` refuse, once the switch is turned, when `only` holds of its arguments."""
        good = getattr(place, name)

        def spoilt(*arguments: Any, **named: Any) -> Any:
            if self.on and only(*arguments, **named):
                refuse()
            return good(*arguments, **named)

        setattr(place, name, spoilt)


async def refused(one: Spawned) -> SetupError:
    """A spawner that finds the host unfit says why, and ends by itself."""
    with pytest.raises(SetupError) as caught:
        await one.client.ready()
    assert serving.wait_until(lambda: (p := host.process(one.pid)) is None or p.state == "Z", 5)
    return caught.value


def assert_failed(done: Done, step: str, errno: int = ERRNO) -> None:
    assert done.ended.outcome is Outcome.SETUP_FAILED, done
    assert done.ended.failed is not None
    assert (done.ended.failed["step"], done.ended.failed["errno"]) == (step, errno), done.ended.failed
    assert (done.stdout, done.stderr, done.outputs, done.ended.isolation) == ("", "", {}, b"")
    assert done.ended.exit_code is done.ended.signal is None


def build_on_demand() -> None:
    """In the spawner's process: keep no sandboxes for later, so that all that is there is a job's."""
    tenant.Tenant._refill = lambda self: None  # type: ignore[method-assign]


async def assert_nothing_grows(one: Spawned, **wishes: Any) -> None:
    """Failing again and again leaves neither processes nor cgroups nor descriptors behind."""

    def idle() -> bool:
        return not one.sandboxes() and not one.cgroups()

    await one.run(**wishes)  # a zygote that was replaced a moment ago has its descriptors then
    assert serving.wait_until(idle, 2), (one.sandboxes(), one.cgroups())
    before = one.descriptors()
    for _ in range(3):
        await one.run(**wishes)
    assert serving.wait_until(idle, 2), (one.sandboxes(), one.cgroups())
    assert serving.wait_until(lambda: one.descriptors() <= before, 2), (before, one.descriptors())


# ---- inside the sandbox ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "step"), STEPS)
async def test_server_refuses_to_start_when_a_step_fails(table: str, step: str, tmp_path: Path) -> None:
    async with spawned(tmp_path, spoilt(table, step)) as one:
        error = await refused(one)
    assert (error.step, error.errno) == (step, ERRNO)
    assert "spoilt by a test" in error.details


@pytest.mark.parametrize(("table", "step"), STEPS)
async def test_job_ends_as_setup_failed_when_a_step_fails(table: str, step: str, tmp_path: Path) -> None:
    """The first sandbox, the self-test's, is built well; from the second on the step fails."""
    async with spawned(tmp_path, spoilt(table, step, from_sandbox=2)) as one:
        await one.client.ready()
        assert_failed(await one.run(), step)
        await assert_nothing_grows(one)
        assert serving.wait_until(lambda: f"could not be built: {step}: " in one.text(), 3)  # nobody's, so it is logged


@pytest.mark.parametrize("step", [name for name, _ in CONFINE_STEPS[:-1]])
async def test_no_job_begins_before_init_is_confined(step: str, tmp_path: Path) -> None:
    """On a busy machine init gets a core only when the job's process could be done with everything."""
    async with spawned(tmp_path, spoilt("CONFINE_STEPS", step, from_sandbox=2, late=0.7)) as one:
        await one.client.ready()
        assert_failed(await one.run(), step)


async def test_step_that_hangs_is_ended(tmp_path: Path) -> None:
    waits = 'calls.call("read", GATE, calls.buffer(1), 1)\n    '
    slow = without("sandbox/steps", (LEADS_A_SESSION, waits + LEADS_A_SESSION))

    def patch() -> None:
        box.SETUP_SECONDS = 0.3

    async with spawned(tmp_path, slow, patch=patch) as one:
        error = await refused(one)
    assert error.step == "set-up"
    assert "not done after" in error.details


@pytest.mark.parametrize(
    ("step", "module", "change"),
    [
        ("verify", "sandbox/job", ("found = report.measure(spec)", "raise OSError({errno}, 'spoilt')")),
        ("task limit", "sandbox/job", ("limit_tasks(messages.decode_go(message))", "raise OSError({errno}, 'spoilt')")),
        ("snapshot", "sandbox/job", ('step = "snapshot"', 'step = "snapshot"; raise OSError({errno}, "spoilt")')),
        ("standard streams", "sandbox/job", ("os.dup2(stream, number)", "raise OSError({errno}, 'spoilt')")),
    ],
)
async def test_what_stands_between_the_steps_fails_by_name(
    step: str, module: str, change: tuple[str, str], tmp_path: Path
) -> None:
    old, new = change
    async with spawned(tmp_path, without(module, (old, new.format(errno=ERRNO)))) as one:
        error = await refused(one)
    assert (error.step, error.errno) == (step, ERRNO)


@pytest.mark.unprivileged
async def test_storage_that_a_sandbox_cannot_make_is_named(tmp_path: Path) -> None:
    """With one uid it makes its own."""
    change = ("slots[SIZE] = (i64)asked.storage_bytes;", "slots[SIZE] = -1;")
    async with spawned(tmp_path, rebuilt(*change)) as one:
        error = await refused(one)
    assert (error.step, error.errno) == ("storage", errno.EINVAL)


async def test_fork_that_fails_is_named(tmp_path: Path) -> None:
    async with spawned(tmp_path, rebuilt("    i64 pid = fork_child(us->tid);", f"    i64 pid = -{ERRNO};")) as one:
        error = await refused(one)
    assert (error.step, error.errno) == ("fork", ERRNO)


async def test_clone_that_fails_is_named(tmp_path: Path) -> None:
    change = ("{CLONE_NEWPID | CLONE_PIDFD,", "{1ULL << 62,")
    async with spawned(tmp_path, rebuilt(*change)) as one:
        error = await refused(one)
    assert (error.step, error.errno) == ("clone3", errno.EINVAL)


@pytest.mark.parametrize(("whose", "step"), [("job_policy", "seccomp"), ("init_policy", "init filter")])
async def test_filter_that_the_kernel_refuses_is_named(whose: str, step: str, tmp_path: Path) -> None:
    """A program that is none is EINVAL, seccomp(2)."""
    real = getattr(policy, whose)()
    broken = SimpleNamespace(digest=real.digest, count=real.count, compile=lambda: b"\xff" * 8)
    good = {name: getattr(policy, name)() for name in ("job_policy", "init_policy")}

    def patch() -> None:
        for name, table in (good | {whose: broken}).items():
            setattr(policy, name, lambda table=table: table)

    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert (error.step, error.errno) == (step, errno.EINVAL)


async def test_job_whose_archive_is_none_ends_at_unpacking(tmp_path: Path) -> None:
    """Admission lets none through; the sandbox does not lean on that."""
    async with spawned(tmp_path, patch=build_on_demand) as one:
        await one.client.ready()
        assert_failed(await one.run(archive=b"not a tar" * 100), "unpack", 0)
        await assert_nothing_grows(one, archive=b"")
        assert (await one.run()).stdout == "hello\n"


@pytest.mark.parametrize("step", [name for name, _ in COLLECTOR_STEPS])
async def test_collector_that_cannot_be_confined_collects_nothing(step: str, tmp_path: Path) -> None:
    async with spawned(tmp_path, spoilt("COLLECTOR_STEPS", step), patch=build_on_demand) as one:
        await one.client.ready()
        done = await one.run("print('hello'); open('output', 'w').write('x')")
        assert done.outputs == {}
        assert not done.complete
        assert done.stdout == "hello\n"
        await assert_nothing_grows(one)


@pytest.mark.requirement(20)
@pytest.mark.parametrize("waived", [frozenset(), frozenset(("memory", "pids", "cpu"))], ids=["with cgroup", "without"])
async def test_tasks_are_limited_by_two_walls(waived: frozenset[str], tmp_path: Path) -> None:
    """RLIMIT_NPROC counts this job's tasks alone, in its own user namespace; without a cgroup it is the only one."""
    code = """
import os, resource, threading
stop, made = threading.Event(), 1
for _ in range(12):
    try:
        threading.Thread(target=stop.wait).start()
        made += 1
    except RuntimeError:
        break
print(made, *resource.getrlimit(resource.RLIMIT_NPROC))
stop.set()
"""
    async with spawned(tmp_path, absent=waived) as one:
        await one.client.ready()
        for done in await asyncio.gather(*(one.run(code, processes=5) for _ in range(3))):
            made, *limit = map(int, done.stdout.split())
            assert made == 5
            assert limit == ([5, 5] if waived | default_waived() else [21, 21])  # the cgroup's tells that it was met
        assert (await one.run(code, processes=50)).stdout.startswith("13 ")


# ---- the spawner's own -------------------------------------------------------------------------------------


def is_a(*kinds: bytes) -> Callable[..., bool]:
    return lambda end, message, *_: message[:1] in kinds


@pytest.mark.parametrize(
    ("step", "place", "name", "only"),
    [
        pytest.param("cgroup", cgroup.Group, "create", None, marks=ROOT),
        pytest.param("limits", cgroup.Cgroup, "set_limits", None, marks=ROOT),
        pytest.param("limits", cgroup.Cgroup, "limits", None, marks=ROOT, id="limits-read-back"),
        pytest.param("cgroup", cgroup.Cgroup, "entry_fds", None, marks=[ROOT, pytest.mark.v1], id="cgroup-entry"),
        pytest.param("storage", rootfs, "new_storage", None, marks=ROOT),
        pytest.param("sockets", protocol, "pair", None),
        pytest.param("oom notice", cgroup.Cgroup, "oom_fd", None, marks=ROOT),
        pytest.param("spawn", protocol, "send", is_a(protocol.SPAWN)),
        pytest.param("verify from the host", report, "verify_outside", None),
        pytest.param("assignment", protocol, "send", is_a(messages.ASSIGN_COLLECT), id="assignment-init"),
        pytest.param("assignment", protocol, "send", is_a(messages.GO), id="assignment-job"),
    ],
)
async def test_spawners_own_step_fails_by_name(
    step: str, place: object, name: str, only: Callable[..., bool] | None, tmp_path: Path
) -> None:
    switch = Switch()

    def patch() -> None:
        build_on_demand()
        switch.spoil(place, name, only or (lambda *_, **__: True))

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        assert (await one.run()).stdout == "hello\n"
        switch.turn()
        assert_failed(await one.run(), step)
        await assert_nothing_grows(one)


@ROOT
async def test_size_that_cannot_be_changed_fails_as_storage(tmp_path: Path) -> None:
    """A parked sandbox has a tmpfs for 512 MB; this job asks for less."""
    switch = Switch()
    async with spawned(tmp_path, patch=lambda: switch.spoil(mounts, "reconfigure")) as one:
        await one.client.ready()
        assert (await one.run(memory_mb=256)).stdout == "hello\n"
        switch.turn()
        assert_failed(await one.run(memory_mb=256), "storage")
        assert (await one.run()).stdout == "hello\n"


@ROOT
async def test_limit_that_the_kernel_rounds_away_fails(tmp_path: Path) -> None:
    """Limits are read back: one that reads otherwise than it was written is none."""
    switch = Switch()

    def patch() -> None:
        good = hierarchy.write

        def write(fd: int, file: str, value: bytes) -> None:
            good(fd, file, b"500000000" if switch.on and value == b"%d" % (512 << 20) else value)

        cgroup.write = write  # type: ignore[attr-defined]

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        switch.turn()
        done = await one.run()
    assert_failed(done, "limits", errno.ERANGE)
    assert done.ended.failed is not None
    assert "wrote 536870912, reads 49999" in done.ended.failed["details"]


# ---- the zygote's ------------------------------------------------------------------------------------------


def spoil(place: object, name: str) -> Callable[[], None]:
    return lambda: setattr(place, name, refuse)


@pytest.mark.parametrize(
    ("step", "patch"),
    [
        pytest.param("zygote", spoil(process, "clone3"), id="clone3"),
        pytest.param("zygote id maps", spoil(nursery, "_write_maps"), id="id maps"),
        pytest.param("zygote id maps", spoil(os, "setresuid"), id="change of ids"),
        pytest.param("zygote sources", spoil(rootfs, "open_sources"), id="sources"),
        pytest.param("zygote sources", spoil(mounts, "open_tree"), id="open_tree"),
        pytest.param("zygote root", spoil(rootfs, "build"), id="root"),
        pytest.param("zygote root", spoil(process, "pivot_root"), id="pivot_root"),
        pytest.param("zygote root", spoil(mounts, "set_attributes"), id="read-only"),
        pytest.param("zygote start", spoil(nursery, "_arrange"), id="start"),
        pytest.param("zygote start", spoil(os, "execve"), id="execve"),
    ],
)
async def test_zygotes_step_fails_by_name(step: str, patch: Callable[[], None], tmp_path: Path) -> None:
    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert (error.step, error.errno) == (step, ERRNO)


async def test_module_that_the_zygote_cannot_import_is_named(tmp_path: Path) -> None:
    async with spawned(tmp_path, {"sandbox/unpack": b"raise ImportError('spoilt by a test')"}) as one:
        error = await refused(one)
    assert (error.step, error.errno) == ("zygote imports", 0)
    assert "spoilt by a test" in error.details


async def test_zygote_that_cannot_warm_up_is_named(tmp_path: Path) -> None:
    change = ("script.find()\n", f"raise OSError({ERRNO}, 'spoilt')\n")
    async with spawned(tmp_path, without("spawner/zygote", change)) as one:
        error = await refused(one)
    assert (error.step, error.errno) == ("zygote", ERRNO)


async def test_zygote_that_never_says_a_word_is_ended(tmp_path: Path) -> None:
    def patch() -> None:
        tenant.WARM_SECONDS = 0.3

    change = ("_kept.extend((config, nest, server))", "import time; time.sleep(60)")
    async with spawned(tmp_path, without("spawner/zygote", change), patch=patch) as one:
        error = await refused(one)
    assert error.step == "zygote"
    assert "it was not ready after 0.3 s" in error.details


@pytest.mark.requirement(34)
@pytest.mark.parametrize(
    "heard",
    [
        "at once",
        pytest.param("sandbox last", marks=pytest.mark.once),
        pytest.param("sandbox first", marks=pytest.mark.once),
    ],
)
async def test_job_that_waits_for_a_sandbox_when_the_zygote_dies_is_served_by_the_next(
    heard: str, tmp_path: Path
) -> None:
    """Nothing of it had begun, so nothing is lost, in whatever order the spawner hears of the two deaths."""

    def patch() -> None:
        build_on_demand()
        if heard == "sandbox last":
            hear_late(box.Box, "on_pidfd", 1.0)
        if heard == "sandbox first":  # while another that was just forked holds the zygote's socket open
            hear_late(tenant.Tenant, "_on_zygote_death", 0.5)
            good = protocol.pair

            def pair() -> tuple[Any, Any]:
                ours, theirs = good()
                os.dup(theirs.fileno())  # for good
                protocol.pair = good
                return ours, theirs

            protocol.pair = pair

    slow = sleeping('    calls.call("close", CONTROL)\n    calls.call("setsid")\n', 0.3)
    async with spawned(tmp_path, slow, patch=patch) as one:
        await one.client.ready()
        job = asyncio.create_task(one.run())
        while len(one.sandboxes()) < 2:  # it is being built, and the spawner has been told of it
            await asyncio.sleep(0.01)
        (zygote,) = [p for p in host.descendants(one.pid) if p.parent == one.pid]
        os.kill(zygote.pid, signal.SIGKILL)
        done = await job
        assert (done.ended.outcome, done.stdout) == (Outcome.EXITED, "hello\n"), done
        await assert_nothing_grows(one)
    assert "starting another" in one.text()


@pytest.mark.requirement(31)
async def test_job_that_is_over_before_init_looks_has_its_outputs_collected(tmp_path: Path) -> None:
    """On a busy machine the other process of a new sandbox may have done all before init gets a core."""
    looks = "    report_the_end(slots, wait_for_the_end("
    async with spawned(tmp_path, rebuilt(looks, f"{pause(0.7)}\n{looks}"), patch=build_on_demand) as one:
        await one.client.ready()
        done = await one.run("open('output', 'w').write('x')")
        assert (done.outputs, done.complete) == ({"output": b"x"}, True)


@pytest.mark.requirement(34)
@pytest.mark.parametrize("whose", ["zygote", "init"])
async def test_job_that_runs_when_its_sandbox_dies_is_lost(whose: str, tmp_path: Path) -> None:
    async with spawned(tmp_path, patch=build_on_demand) as one:
        await one.client.ready()
        job = asyncio.create_task(one.run(SAY))
        await one.wait_for("begun")
        victims = [p for p in one.sandboxes() if p.pid_inside == 1]
        if whose == "zygote":
            victims = [p for p in host.descendants(one.pid) if p.parent == one.pid]
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        done = await job
        assert (done.ended.outcome, done.ended.exit_code, done.stdout) == (Outcome.WORKER_LOST, None, "begun\n")
        await assert_nothing_grows(one)


@pytest.mark.requirement(34)
async def test_zygote_that_does_not_answer_is_replaced(tmp_path: Path) -> None:
    """Stopped, by whoever may: who waits is served by the next."""

    def patch() -> None:
        build_on_demand()
        box.SETUP_SECONDS = 1.0

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        (zygote,) = [p for p in host.descendants(one.pid) if p.parent == one.pid]
        os.kill(zygote.pid, signal.SIGSTOP)
        assert (await asyncio.wait_for(one.run(), 20)).stdout == "hello\n"
        assert not zygote.alive
        await assert_nothing_grows(one)


async def test_sandbox_that_is_ended_before_its_birth_is_told_of_dies_at_once(tmp_path: Path) -> None:
    """Without a cgroup there is nothing to kill it by until then: five seconds were lost at every other end."""
    change = ("        us->before_fork();\n", f"        {pause(0.3)} us->before_fork();\n")
    absent = frozenset(("memory", "pids", "cpu"))
    async with spawned(tmp_path, rebuilt(*change), absent=absent) as one:
        await one.client.ready()
        await asyncio.sleep(0.1)  # the first of those for later is on its way
        began = time.monotonic()
    assert time.monotonic() - began < host.within(4)


# ---- layers that the host does not have --------------------------------------------------------------------


@ROOT
@pytest.mark.parametrize("layer", ["memory", "pids", "cpu"])
async def test_controller_that_is_missing_is_named_with_its_fix(layer: str, tmp_path: Path) -> None:
    def patch() -> None:
        good = cgroup.detect

        def detect(**named: bool) -> hierarchy.Hierarchy:
            found = good(**named)
            where = {name: tree for name, tree in found.where.items() if name != layer}
            return hierarchy.Hierarchy(found.mode, found.trees, where)

        cgroup.detect = detect

    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert error.step == layer
    assert "Fix: " in error.details


@pytest.mark.v1
async def test_swap_that_cannot_be_closed_is_named_with_its_fix(tmp_path: Path) -> None:
    def patch() -> None:
        cgroup.swap_active = lambda: True

    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert error.step == "swap"
    assert "swapoff" in error.details


@pytest.mark.parametrize(
    ("lacks", "fix"), [("_library", "libseccomp2"), ("probe", "CONFIG_SECCOMP_FILTER")], ids=["library", "kernel"]
)
async def test_host_without_filters_is_told_the_fix(lacks: str, fix: str, tmp_path: Path) -> None:
    async with spawned(tmp_path, patch=lambda: pytest.MonkeyPatch().setattr(seccomp, lacks, refuse)) as one:
        error = await refused(one)
    assert error.step == "seccomp"
    assert fix in error.details


@pytest.mark.requirement(17)
async def test_job_whose_sandbox_finds_no_descriptor_fails_alone(tmp_path: Path) -> None:
    """Not even one is left to see whether the zygote is alive: no reason to end what others run."""
    used_up = Switch()

    def patch() -> None:
        build_on_demand()
        used_up.spoil(protocol, "pair")
        used_up.spoil(process, "is_exiting")

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        running = asyncio.create_task(one.run(SAY))
        busy = await one.wait_for("begun")
        used_up.turn()
        assert_failed(await one.run(), "sockets", ERRNO)
        assert busy.alive
        os.kill(busy.pid, signal.SIGUSR1)
        assert (await running).ended.outcome is Outcome.SIGNALED


async def test_zygote_of_another_python_takes_the_modules_as_source(tmp_path: Path) -> None:
    """A root file system may bring one whose compiled code is of another kind than ours."""

    def patch() -> None:
        pytest.MonkeyPatch().setattr(importlib.util, "MAGIC_NUMBER", b"\x00\x00\r\n")

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        assert (await one.run()).stdout == "hello\n"


async def test_waived_seccomp_needs_no_library(tmp_path: Path) -> None:
    def patch() -> None:
        seccomp._library = refuse

    async with spawned(tmp_path, patch=patch, waived=default_waived() | {"seccomp"}) as one:
        await one.client.ready()
        done = await one.run("print(next(line.split()[1] for line in open('/proc/self/status') if 'Seccomp:' in line))")
    assert done.stdout == "0\n"
    assert (done.inside["seccomp"], done.host["seccomp"]) == (0, 0)
    assert "seccomp" in done.host["waived"]
