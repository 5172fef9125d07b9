"""The isolation report is measured: a sandbox that lacks a wall is refused by one side or the other, or shows it."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandrun.linux import cgroup, landlock, mounts, process, seccomp
from sandrun.sandbox import policy, report, rootfs
from sandrun.sandbox.spec import Nest
from tests.kernel.spawned import default_waived, rebuilt, spawned, without
from tests.kernel.test_steps import refused

ROOT = pytest.mark.root
LANDLOCK = pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")
pytestmark = pytest.mark.requirement(17)

STEPS = "sandbox/steps"
UNSHARED = {"net": "CLONE_NEWNET", "ipc": "CLONE_NEWIPC", "uts": "CLONE_NEWUTS", "cgroup": "CLONE_NEWCGROUP"}

# What takes a wall away where it is built, (old, new).
IDS_CHECK = "    _check_ids(calls, JOB_UID)\n"
NO_UID = (('calls.call("setresuid", JOB_UID, JOB_UID, JOB_UID)', "pass"), (IDS_CHECK, ""))
NO_GID = (('calls.call("setresgid", JOB_UID, JOB_UID, JOB_UID)  #', "pass  #"), (IDS_CHECK, ""))
CAPABLE = ("capabilities.add_keep(calls, ())  # the", "pass  # the")
BOUNDING = (
    ("    capabilities.add_drop_bounding(calls)\n    if nest.shared_uid:\n", "    if nest.shared_uid:\n"),
    ("    if nest.shared_uid:\n        capabilities.add_drop_bounding(calls)", "    pass"),
)
NO_LANDLOCK = ("    if nest.landlock:", "    if False:")
FALSE_LANDLOCK = ("        landlock.add_restrict(", "        0 and landlock.add_restrict(")
HANDING_DOWN = ("    calls.close_foreign(", "    0 and calls.close_foreign(")
UNFILTERED = ("    if nest.job_filter:", "    if False:")
SET_NO_NEW_PRIVS = '    calls.call("prctl", process.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)'
PRIVILEGED = (
    (f"{SET_NO_NEW_PRIVS}  # else", "    pass  # else"),
    (f"{SET_NO_NEW_PRIVS}\n\n\ndef restrict_files", "\n\ndef restrict_files"),
)
LIMITED = 'calls.call("prlimit64", 0, number, struct.pack("=2Q", min(soft, hard), hard), None, about=name)'
NOWHERE = (('calls.call("chdir", work)', "pass"), ("    calls.equal(where, work", "    0 and calls.equal(where, work"))
WRITABLE_PROC = (
    '    mounts.add_set_attributes(calls, "/proc", FIXED | mounts.MOUNT_ATTR_NOEXEC)\n\n\ndef find_masked',
    "\n\ndef find_masked",
)
BLIND = {
    **without("sandbox/report", ("    nest = spec.nest\n", "    return\n")),
    **without("sandbox/job", "_rehearse(spec)  # while the host looks"),
}
"""Nothing is verified or tried inside: what is refused then is refused by the host's look alone."""


def unbounded(flag: str) -> tuple[str, str]:
    return ('calls.call("unshare", nest.namespaces)', f'calls.call("unshare", nest.namespaces & ~process.{flag})')


NOTICED_INSIDE = [
    pytest.param(without(STEPS, *NO_UID), "uid reads", marks=ROOT, id="uid"),
    pytest.param(without(STEPS, *NO_GID), "gid reads", marks=ROOT, id="gid"),
    pytest.param(without(STEPS, CAPABLE), "Cap", id="capabilities"),
    pytest.param(without(STEPS, *BOUNDING), "CapBnd reads", id="bounding set"),
    pytest.param(without(STEPS, NO_LANDLOCK), "landlock reads 0", marks=LANDLOCK, id="landlock"),
    pytest.param(without(STEPS, FALSE_LANDLOCK), "landlock reads 0", marks=LANDLOCK, id="landlock said to be there"),
    pytest.param(without(STEPS, UNFILTERED), "seccomp reads 0", id="seccomp"),
    pytest.param(without(STEPS, HANDING_DOWN), "descriptors reads", id="descriptors"),
    pytest.param(without(STEPS, *NOWHERE), "work directory reads", id="work directory"),
    pytest.param(without("sandbox/rootfs", WRITABLE_PROC), "the mount at /proc is", id="read-only proc"),
]


@pytest.mark.requirement(3, 4)
@pytest.mark.parametrize(("overrides", "says"), NOTICED_INSIDE)
async def test_wall_that_is_missing_is_noticed_inside(overrides: dict[str, bytes], says: str, tmp_path: Path) -> None:
    async with spawned(tmp_path, overrides) as one:
        error = await refused(one)
    assert error.step == "verify"
    assert says in error.details


@pytest.mark.requirement(3)
@pytest.mark.parametrize(
    ("patch", "says"),
    [
        pytest.param(lambda: setattr(rootfs, "UNPRIVILEGED", mounts.MOUNT_ATTR_NODEV), "without nosuid", id="nosuid"),
        pytest.param(lambda: setattr(rootfs, "UNPRIVILEGED", mounts.MOUNT_ATTR_NOSUID), "without nodev", id="nodev"),
        pytest.param(lambda: _leave_writable("/"), "the mount at / is", id="read-only root"),
    ],
)
@ROOT
async def test_mount_that_allows_more_is_noticed_inside(patch: Callable[[], None], says: str, tmp_path: Path) -> None:
    """The spawner makes these mounts, or its child does: with one uid init makes some itself."""
    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert error.step == "verify"
    assert says in error.details


def _leave_writable(path: str) -> None:
    good = mounts.set_attributes

    def set_attributes(target: Any, **flags: Any) -> None:
        if target != path:
            good(target, **flags)

    mounts.set_attributes = set_attributes  # type: ignore[assignment]


@pytest.mark.requirement(5)
async def test_filter_that_lets_everything_pass_is_noticed(tmp_path: Path) -> None:
    """It is in force, by mode and number; what it allows is tried."""
    allow = seccomp.Filter(seccomp.ALLOW).export()
    real = policy.job_policy()

    def patch() -> None:
        init = policy.init_policy()
        lenient = SimpleNamespace(digest=real.digest, count=real.count, compile=lambda: allow)
        policy.job_policy = lambda: lenient  # type: ignore[assignment, return-value]
        policy.init_policy = lambda: init

    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert error.step == "verify"
    assert "calls that pass reads ['socket', 'unshare'], not []" in error.details


@pytest.mark.requirement(5)
async def test_another_filter_than_the_policys_is_noticed(tmp_path: Path) -> None:
    """One that refuses the two calls that are tried, and allows one more than it should."""
    real = policy.job_policy()
    other = seccomp.Filter(seccomp.ALLOW)
    for name in ("socket", "unshare"):
        other.add(seccomp.ERRNO(errno.EPERM), name)
    load = ("add_load(calls, nest.job_filter)", f"add_load(calls, bytes.fromhex({other.export().hex()!r}))")
    async with spawned(tmp_path, without(STEPS, load)) as one:
        error = await refused(one)
    assert error.step == "verify"
    assert f"filter reads {hashlib.sha256(other.export()).hexdigest()!r}, not {real.digest!r}" in error.details


# ---- what the host sees ------------------------------------------------------------------------------------

NOTICED_OUTSIDE = [
    *(
        pytest.param(without(STEPS, unbounded(flag)), f"the {name} namespace is the host's", id=f"{name} namespace")
        for name, flag in UNSHARED.items()
    ),
    pytest.param(
        rebuilt("{CLONE_NEWPID | CLONE_PIDFD,", "{CLONE_PIDFD,"),
        "the pid namespace is the host's",
        id="pid namespace",
    ),
    pytest.param({**BLIND, **without(STEPS, *NO_UID)}, "the host uid is", marks=ROOT, id="uid"),
    pytest.param({**BLIND, **without(STEPS, *NO_GID)}, "the host gid is", marks=ROOT, id="gid"),
    pytest.param({**BLIND, **without(STEPS, CAPABLE)}, "Cap", id="capabilities"),
    pytest.param({**BLIND, **without(STEPS, UNFILTERED)}, "the seccomp mode is 0", id="seccomp"),
]


@pytest.mark.requirement(1, 2, 3)
@pytest.mark.parametrize(("overrides", "says"), NOTICED_OUTSIDE)
async def test_wall_that_is_missing_is_noticed_from_the_host(
    overrides: dict[str, bytes], says: str, tmp_path: Path
) -> None:
    async with spawned(tmp_path, overrides) as one:
        error = await refused(one)
    assert error.step == "verify from the host"
    assert says in error.details


@pytest.mark.requirement(1)
async def test_sandbox_in_the_zygotes_mount_namespace_is_refused(tmp_path: Path) -> None:
    """Its mounts would be all sandboxes'; it does not get as far as being looked at."""
    async with spawned(tmp_path, without(STEPS, unbounded("CLONE_NEWNS"))) as one:
        await refused(one)


@ROOT
@pytest.mark.requirement(2)
async def test_host_group_is_noticed_from_the_host(tmp_path: Path) -> None:
    def patch() -> None:
        good = os.setgroups
        os.setgroups = lambda groups: good([4242])

    async with spawned(tmp_path, patch=patch) as one:
        error = await refused(one)
    assert error.step == "verify from the host"
    assert "it is in the host groups [" in error.details


@ROOT
@pytest.mark.requirement(2)
async def test_uid_of_another_sandbox_is_noticed_from_the_host(tmp_path: Path) -> None:
    """Each sandbox gets the ids of its own slot, whatever the zygote does with them."""
    first = "    for (int slot = 0; slot < SLOTS; slot++)\n        slots[slot] = -1;"
    async with spawned(tmp_path, rebuilt(first, f"    asked.job_id += 2;\n{first}")) as one:
        error = await refused(one)
    assert error.step == "verify from the host"
    assert "the host uid is" in error.details


@pytest.mark.requirement(3)
@pytest.mark.parametrize("blind", [False, True])
async def test_missing_no_new_privs_is_noticed(blind: bool, tmp_path: Path) -> None:
    """Filter and Landlock cannot be had without it, so this host has neither: no other wall speaks up."""
    change = without(STEPS, *PRIVILEGED)
    overrides = {**BLIND, **change} if blind else change
    async with spawned(tmp_path, overrides, absent=frozenset(("seccomp", "landlock"))) as one:
        error = await refused(one)
    assert (error.step, error.details.partition("] ")[2]) == (
        ("verify from the host", "no_new_privs is not set") if blind else ("verify", "no_new_privs reads 0, not 1")
    )


# ---- what differs in the report ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("host_name", without(STEPS, 'calls.call("sethostname", HOST_NAME, len(HOST_NAME))')),
        (
            "rlimits",
            without(STEPS, LIMITED),
        ),
        ("mounts", without("sandbox/rootfs", ('{"hidepid": "invisible"},', "{},"))),
        ("mounts", without("sandbox/rootfs", ("    for path, folder in masked:", "    for path, folder in ():"))),
    ],
    ids=["host_name", "rlimits", "hidepid", "masked proc"],
)
async def test_field_differs_without_its_wall(field: str, overrides: dict[str, bytes], tmp_path: Path) -> None:
    async with spawned(tmp_path) as one:
        await one.client.ready()
        good = (await one.run()).inside
    async with spawned(tmp_path, overrides) as one:
        await one.client.ready()
        bad = (await one.run()).inside
    assert good[field] != bad[field]
    assert {name for name in good if good[name] != bad[name]} <= {field, "namespaces"}


@ROOT
@pytest.mark.requirement(18, 20)
async def test_limits_are_what_the_kernel_has(tmp_path: Path) -> None:
    """Read back from the cgroup: a sandbox whose limits were never written shows none."""
    async with spawned(tmp_path) as one:
        await one.client.ready()
        found = (await one.run(memory_mb=256, processes=7)).host["limits"]
    assert found == {"memory_bytes": 256 << 20, "tasks": 8, "swap_closed": True}

    def patch() -> None:
        cgroup.Cgroup.set_limits = lambda *_: None  # type: ignore[method-assign]

    async with spawned(tmp_path, patch=patch) as one:
        await one.client.ready()
        found = (await one.run(memory_mb=256, processes=7)).host["limits"]
    assert (found["memory_bytes"], found["tasks"]) == (None, None)


@ROOT
@pytest.mark.v1
@pytest.mark.requirement(18)
async def test_open_swap_shows(tmp_path: Path) -> None:
    def patch() -> None:
        cgroup.swap_active = lambda: True

    async with spawned(tmp_path, patch=patch, waived=default_waived() | {"swap"}) as one:
        await one.client.ready()
        host = (await one.run()).host
    assert (host["swap_closed"], host["limits"]["swap_closed"], host["waived"]) == (False, False, ["swap"])


async def test_every_waived_layer_shows(tmp_path: Path) -> None:
    """Waiving allows a layer to be missing; of what stands all the same, no report says that it is missing."""
    waived = frozenset(("memory", "pids", "cpu", "seccomp", "landlock", "net"))
    async with spawned(tmp_path, waived=waived, absent=waived - {"net"}) as one:
        facts = await one.client.ready()
        done = await one.run()
        outer = report.read_namespaces("/proc/self")
    assert facts.isolation["waived"] == done.host["waived"] == sorted(waived - {"net"})
    assert facts.isolation["cgroup"] == "none"
    assert (done.inside["seccomp"], done.inside["landlock"]) == (0, 0)
    assert (done.inside["filter"], done.host["filter"]) == ("", {})
    assert "limits" not in done.host
    assert done.inside["namespaces"]["net"] != outer["net"]


@pytest.mark.requirement(17)
async def test_waived_layers_stand_where_they_can_be_had(tmp_path: Path) -> None:
    waived = frozenset(("memory", "pids", "cpu", "seccomp", "landlock"))
    async with spawned(tmp_path, waived=waived) as one:
        facts = await one.client.ready()
        done = await one.run(memory_mb=256, processes=7)
    absent = {"memory", "pids", "cpu"} if os.geteuid() else set()
    assert (
        facts.isolation["waived"] == done.host["waived"] == sorted(absent | set(() if landlock.abi() else ["landlock"]))
    )
    assert (done.inside["seccomp"], done.inside["landlock"]) == (2, landlock.abi())
    if not absent:
        assert done.host["limits"]["memory_bytes"] == 256 << 20


@ROOT
@pytest.mark.requirement(2)
async def test_report_tells_whose_uid_it_is(tmp_path: Path) -> None:
    async with spawned(tmp_path) as one:
        facts = await one.client.ready()
        done = await one.run()
    base = facts.isolation["uid_base"]
    assert done.host["uid_kind"] == facts.isolation["uid"] == "own"
    assert len(set(done.host["uid"])) == 1
    assert base < done.host["uid"][0] < base + 65536
    assert done.inside["uid"] == [1000] * 4


@pytest.mark.unprivileged
@pytest.mark.requirement(2)
async def test_report_tells_of_one_uid(tmp_path: Path) -> None:
    async with spawned(tmp_path) as one:
        facts = await one.client.ready()
        done = await one.run()
    assert done.host["uid_kind"] == facts.isolation["uid"] == "shared"
    assert done.host["uid"] == [os.getuid()] * 4
    assert done.inside["uid"] == [1000] * 4


async def test_both_sides_see_the_same_job(tmp_path: Path) -> None:
    """Namespaces, capabilities, filter and no_new_privs, from inside and from the host."""
    async with spawned(tmp_path) as one:
        await one.client.ready()
        done = await one.run("import os; print(os.readlink('/proc/self/ns/net'), os.getpid())")
    for field in ("namespaces", "capabilities", "no_new_privs", "seccomp", "seccomp_filters"):
        assert done.inside[field] == done.host[field], field
    assert done.stdout == f"net:[{done.inside['namespaces']['net']}] {done.inside['pid']}\n"
    assert done.inside["descriptors"] == [0, 1, 2]
    assert done.inside["calls_that_pass"] == []
    assert done.inside["filter"] == done.host["filter"]["digest"]
    real = policy.job_policy()
    assert done.host["filter"] == {
        "digest": real.digest,
        "calls": real.count,
        "instructions": len(real.compile()) // 8,
    }


# ---- the two verifications, field by field -----------------------------------------------------------------


async def _reports(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    async with spawned(directory) as one:
        await one.client.ready()
        done = await one.run()
    return done.inside, done.host


def _changes(found: dict[str, Any], fields: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The report with one value after the other made wrong, each with the words that must name it."""
    changed = []
    for field in fields:
        if field == "capabilities":
            for name in found[field]:
                bad = copy.deepcopy(found)
                bad[field][name] = "0000000000000001"
                changed.append((f"Cap{name}", bad))
        elif field in ("uid", "gid"):
            for place in range(4):
                bad = copy.deepcopy(found)
                bad[field][place] += 1
                changed.append((field, bad))
        else:
            bad = copy.deepcopy(found)
            bad[field] = {"descriptors": [0, 1, 2, 5], "groups": [0], "work_directory": "/"}.get(field, 0)
            changed.append((field.replace("_d", " d").replace("groups", "host groups"), bad))
    return changed


async def test_each_field_is_verified(tmp_path: Path) -> None:
    inside, outside = await _reports(tmp_path)
    nest = Nest(
        job_filter=b"", init_filter=b"", filter_digest=inside["filter"], landlock=inside["landlock"],
        namespaces=0, shared_uid=False, interpreters={}, path="", environment="", masked=[], core_limit=0, entries=0,
    )  # fmt: skip
    spec: Any = SimpleNamespace(nest=nest)
    report.verify(inside, spec)
    fields = ("uid", "gid", "capabilities", "no_new_privs", "descriptors", "work_directory", "filter")
    for words, bad in [*_changes(inside, fields), *_bad_mounts(inside)]:
        with pytest.raises(OSError, match=words):
            report.verify(bad, spec)

    known: dict[str, Any] = {
        "outer": report.read_namespaces("/proc/self"),
        "flags": process.CLONE_NEWNET | process.CLONE_NEWNS | process.CLONE_NEWIPC | process.CLONE_NEWUTS,
        "uid": outside["uid"][0],
        "sandboxed": True,
        "shared_uid": os.geteuid() != 0,
    }
    report.verify_outside(outside, **known)
    fields = ("uid", "capabilities", "no_new_privs", "seccomp", *(() if known["shared_uid"] else ("gid", "groups")))
    for words, bad in _changes(outside, fields):
        with pytest.raises(OSError, match=words):
            report.verify_outside(bad, **known)
    for name in ("user", "pid", "net", "mnt", "ipc", "uts"):
        bad = copy.deepcopy(outside)
        bad["namespaces"][name] = known["outer"][name]
        with pytest.raises(OSError, match=f"the {name} namespace"):
            report.verify_outside(bad, **known)


def _bad_mounts(inside: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for number, (place, _, options, _) in enumerate(inside["mounts"]):
        for flag in ("nosuid", "nodev", "ro"):
            if flag in options.split(","):
                bad = copy.deepcopy(inside)
                bad["mounts"][number][2] = options.replace(flag, "x" + flag)
                found.append((f"the mount at {place} is", bad))
    assert len(found) > 20
    return found
