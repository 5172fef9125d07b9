"""A job's namespaces, identity and capabilities, seen from inside and measured from the host."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import grp
import os
import pwd
import socket
import struct

import pytest

from sandrun.linux import process
from tests import host
from tests.escape.probing import Held, Inside, held, shared_uid, status, waived
from tests.kernel.children import in_child
from tests.serving import Api, Server

ZERO = "0" * 16
TUNNELS = {
    "lo",
    "tunl0",
    "gre0",
    "gretap0",
    "erspan0",
    "ip_vti0",
    "ip6_vti0",
    "sit0",
    "ip6tnl0",
    "ip6gre0",
    "ip6gretap0",
}
"""lo, and what the kernel puts into every network namespace (net.core.fb_tunnels_only_for_init_net)."""
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


@pytest.fixture
def job(inside: Inside, running_server: Server):
    with held(inside, running_server) as found:
        yield found


def walls(api: Api) -> set[str]:
    """Kinds of namespace that no waiver took away."""
    names = {"mount": "mnt", "cgroupns": "cgroup"}
    return set(host.NAMESPACES) - {names.get(layer, layer) for layer in waived(api)}


# ---- namespaces --------------------------------------------------------------------------------------------


@pytest.mark.requirement(1)
def test_every_namespace_is_the_jobs_own(job: Held, api: Api) -> None:
    """Neither the host's nor the zygote's, as the host sees it."""
    for kind in walls(api):
        assert job.namespace(kind) != os.readlink(f"/proc/self/ns/{kind}")
    zygote = job.server.part("zygote")
    for kind in walls(api) - {"cgroup"}:  # a zygote lives in the host's: clone3 could not enter cgroups out of one
        assert job.namespace(kind) != os.readlink(f"/proc/{zygote.pid}/ns/{kind}")


@pytest.mark.requirement(1)
def test_no_two_jobs_share_a_namespace(insides: dict[str, Inside], running_server: Server, api: Api) -> None:
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(held(insides[name], running_server)) for name in ("in-place", "in-place")]
        for kind in walls(api):
            assert len({one.namespace(kind) for one in jobs}) == len(jobs), kind


@pytest.mark.requirement(1)
def test_job_itself_sees_other_namespaces_than_the_host(inside: Inside, api: Api) -> None:
    seen = inside.says("surroundings.py")["namespaces"]
    for kind in walls(api):
        assert seen[kind] != os.readlink(f"/proc/self/ns/{kind}")


@pytest.mark.requirement(1)
def test_network_is_loopback_without_address_or_route(inside: Inside) -> None:
    seen = inside.says("surroundings.py")
    assert set(seen["interfaces"]) <= TUNNELS
    assert "lo" in seen["interfaces"]
    assert not [line for routes in seen["routes"] for line in routes if not line.endswith("lo")]
    v4, v6 = seen["addresses"]
    assert not v4.replace("Main:", "").replace("Local:", "").strip(" \n+-/0.|")
    assert v6 in ("", "errno 2")
    assert seen["unix sockets"] == []


IFF_UP = 1
SIOCGIFFLAGS = 0x8913


@pytest.mark.root
@pytest.mark.requirement(1)
def test_network_is_down_as_the_host_sees_it(job: Held) -> None:
    """Asked from within the job's namespace by a child of ours: which interfaces are there and up."""

    def look() -> dict[str, bool]:
        target = os.open(f"{job.folder}/ns/net", os.O_RDONLY)
        process.setns(target, process.CLONE_NEWNET)
        os.close(target)
        found = {}
        with socket.socket() as probe:
            for _, name in socket.if_nameindex():
                request = ctypes.create_string_buffer(name.encode(), 40)
                answer = fcntl.ioctl(probe, SIOCGIFFLAGS, request.raw)
                found[name] = bool(struct.unpack_from("H", answer, 16)[0] & IFF_UP)
        return found

    found = in_child(look)
    assert set(found) <= TUNNELS
    assert found["lo"] is False
    assert not any(found.values())


# ---- who it is ---------------------------------------------------------------------------------------------


@pytest.mark.requirement(2)
def test_job_is_nobody_on_the_host(job: Held, api: Api) -> None:
    found = status(job.process.pid)
    uids, gids = set(found["Uid"].split()), set(found["Gid"].split())
    assert len(uids) == len(gids) == 1
    if shared_uid(api):
        assert uids == {str(os.geteuid())}
        return
    assert "0" not in uids | gids
    assert found["Groups"].split() == []
    assert int(uids.pop()) not in {entry.pw_uid for entry in pwd.getpwall()}
    assert int(gids.pop()) not in {entry.gr_gid for entry in grp.getgrall()}


@pytest.mark.requirement(2)
def test_no_two_running_sandboxes_have_an_id_in_common(
    insides: dict[str, Inside], running_server: Server, api: Api
) -> None:
    if shared_uid(api):
        pytest.skip("one uid serves all sandboxes here")
    with contextlib.ExitStack() as stack:
        for name in ("in-place", "below-a-shell"):
            stack.enter_context(held(insides[name], running_server))
        owners: dict[str, set[str]] = {}
        for one in (one for members in running_server.sandboxes() for one in members):
            found = status(one.pid)
            space = os.readlink(f"/proc/{one.pid}/ns/pid")
            for field in ("Uid", "Gid"):
                for number in set(found[field].split()):
                    owners.setdefault(f"{field} {number}", set()).add(space)
        assert len(owners) >= 8  # of init and job, of these two and of those that are parked
        assert {what: spaces for what, spaces in owners.items() if len(spaces) > 1} == {}


@pytest.mark.requirement(2)
def test_job_is_uid_1000_inside(inside: Inside) -> None:
    seen = inside.says("surroundings.py")
    assert seen["ids"] == [1000, 1000]
    assert set(seen["groups"]) <= {65534}  # with one uid, groups that it cannot leave show as nobody's


@pytest.mark.requirement(3)
def test_job_has_no_capability_as_the_host_sees_it(job: Held) -> None:
    for one in job.processes():
        found = status(one.pid)
        assert {name: found[name] for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, ZERO)
        assert found["NoNewPrivs"] == "1"
        assert found["Seccomp"] == "2"


@pytest.mark.requirement(3)
def test_job_has_no_capability_inside(inside: Inside) -> None:
    found = inside.says("surroundings.py")["status"]
    assert {name: found[name] for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, ZERO)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.requirement(3)
def test_every_mount_is_nosuid_and_nodev(inside: Inside) -> None:
    mounts = inside.says("surroundings.py")["mounts"]
    assert len(mounts) > 10
    assert [place for place, _, options in mounts if "nosuid" not in options] == []
    with_devices = {place for place, _, options in mounts if "nodev" not in options}
    assert with_devices == {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")}


# ---- init --------------------------------------------------------------------------------------------------


@pytest.mark.requirement(7)
def test_process_1_is_ours_and_another_user(job: Held, api: Api) -> None:
    init, mine = status(job.init().pid), status(job.process.pid)
    assert job.init().title.startswith("sandrun: sandbox ")
    if not shared_uid(api):
        assert not set(init["Uid"].split()) & set(mine["Uid"].split())
        assert "0" not in init["Uid"].split()
    else:
        assert os.readlink(f"/proc/{job.init().pid}/ns/user") != job.namespace("user")
    assert init["NoNewPrivs"] == "1"
    assert init["Seccomp"] == "2"


KILL_SETUID_SETGID = 1 << 5 | 1 << 6 | 1 << 7


@pytest.mark.requirement(7)
def test_process_1_holds_three_capabilities_at_most(job: Held) -> None:
    found = status(job.init().pid)
    assert int(found["CapEff"], 16) & ~KILL_SETUID_SETGID == 0
    assert int(found["CapPrm"], 16) & ~KILL_SETUID_SETGID == 0
    assert {found[name] for name in ("CapInh", "CapBnd", "CapAmb")} == {ZERO}


@pytest.mark.requirement(7)
def test_process_1_holds_no_descriptor_of_the_job(job: Held) -> None:
    """Neither its streams nor its input: they would keep a reader from its end of file."""
    folder = f"/proc/{job.init().pid}/fd"
    if os.geteuid() != 0:
        pytest.skip("init is not dumpable: only root sees its descriptors")
    streams = {os.readlink(f"{job.folder}/fd/{number}") for number in (1, 2)}
    assert not streams & {os.readlink(f"{folder}/{number}") for number in os.listdir(folder)}
