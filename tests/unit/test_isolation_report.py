"""What is measured of a sandbox, from inside and from the host, is held against what it must be, field by field."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sandrun.sandbox import report
from sandrun.sandbox.spec import JOB_UID, Spec

HOST_UID = 1879113729
OUTER = dict.fromkeys(("user", "pid", "net", "mnt", "ipc", "uts", "cgroup"), 4026531840)
ALL_FLAGS = sum(report.NAMESPACE_FLAGS.values())
NOTHING = dict.fromkeys(("Inh", "Prm", "Eff", "Bnd", "Amb"), "0" * 16)

INSIDE: dict[str, Any] = {
    "uid": [JOB_UID] * 4,
    "gid": [JOB_UID] * 4,
    "groups": [],
    "capabilities": NOTHING,
    "no_new_privs": 1,
    "seccomp": 2,
    "calls_that_pass": [],
    "filter": "0123",
    "landlock": 7,
    "descriptors": [0, 1, 2],
    "mounts": [
        ["/", "tmpfs", "ro,nosuid,nodev", "ro,size=16384k"],
        ["/usr", "ext4", "ro,nosuid,nodev,relatime", "rw"],
        ["/dev/null", "devtmpfs", "ro,nosuid,noexec", "rw"],
        ["/job", "tmpfs", "rw,nosuid,nodev", "rw"],
        ["/tmp", "tmpfs", "rw,nosuid,nodev", "rw"],
        ["/dev/shm", "tmpfs", "rw,nosuid,nodev", "rw"],
        ["/proc", "proc", "ro,nosuid,nodev,noexec", "rw,hidepid=invisible"],
    ],
    "work_directory": "/job",
}
OUTSIDE: dict[str, Any] = {
    "uid": [HOST_UID] * 4,
    "gid": [HOST_UID] * 4,
    "groups": [],
    "capabilities": NOTHING,
    "no_new_privs": 1,
    "seccomp": 2,
    "namespaces": {name: number + 1 for name, number in OUTER.items()},
}


def changed(found: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    """A copy with another value at `field`, which may be below others: "capabilities.Eff"."""
    made = copy.deepcopy(found)
    *above, last = field.split(".")
    place = made
    for name in above:
        place = place[name]
    place[last] = value
    return made


def inside(found: dict[str, Any], job_filter: bytes = b"program") -> None:
    nest = SimpleNamespace(job_filter=job_filter, filter_digest="0123" if job_filter else "", landlock=7)
    report.verify(found, cast(Spec, SimpleNamespace(nest=nest)))


def outside(found: dict[str, Any], **options: Any) -> None:
    wanted: dict[str, Any] = {
        "outer": OUTER, "flags": ALL_FLAGS, "uid": HOST_UID, "sandboxed": True, "shared_uid": False,
    }  # fmt: skip
    report.verify_outside(found, **{**wanted, **options})


def with_mount(place: str, options: str) -> list[list[str]]:
    others = [mount for mount in INSIDE["mounts"] if mount[0] != place]
    return [*others, [place, "ext4", options, "rw"]]


@pytest.mark.requirement(3, 17)
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        *(("uid", [*[JOB_UID] * n, 0, *[JOB_UID] * (3 - n)], "uid") for n in range(4)),
        *(("gid", [*[JOB_UID] * n, 0, *[JOB_UID] * (3 - n)], "gid") for n in range(4)),
        *((f"capabilities.{name}", "0000000000000020", f"Cap{name}") for name in NOTHING),
        ("no_new_privs", 0, "no_new_privs"),
        ("seccomp", 0, "seccomp"),
        ("seccomp", 1, "seccomp"),
        ("calls_that_pass", ["socket"], "calls that pass"),
        ("filter", "4567", "filter"),
        ("filter", "", "filter"),
        ("landlock", 0, "landlock"),
        ("descriptors", [0, 1, 2, 7], "descriptors"),
        ("descriptors", [0, 1], "descriptors"),
        ("mounts", with_mount("/usr", "ro,nodev"), "the mount at /usr is ro,nodev, without nosuid"),
        ("mounts", with_mount("/job", "rw,nodev"), "the mount at /job is rw,nodev, without nosuid"),
        ("mounts", with_mount("/usr", "ro,nosuid"), "the mount at /usr is ro,nosuid, without nodev"),
        ("mounts", with_mount("/device", "ro,nosuid"), "the mount at /device is ro,nosuid, without nodev"),
        ("mounts", with_mount("/dev/shm", "rw,nosuid"), "the mount at /dev/shm is rw,nosuid, without nodev"),
        ("mounts", with_mount("/usr", "rw,nosuid,nodev"), "the mount at /usr is rw,nosuid,nodev, not read-only"),
        ("mounts", with_mount("/proc", "rw,nosuid,nodev"), "the mount at /proc is rw,nosuid,nodev, not read-only"),
        ("work_directory", "(unreachable)/home", "work directory"),
        ("work_directory", "/", "work directory"),
    ],
)
def test_what_a_job_sees_of_itself_must_be_as_it_should(field: str, value: object, says: str) -> None:
    inside(INSIDE)
    with pytest.raises(OSError, match=says.replace("(", r"\(")):
        inside(changed(INSIDE, field, value))


@pytest.mark.requirement(1, 2, 3, 17)
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        *((f"namespaces.{name}", number, f"the {name} namespace is the host's") for name, number in OUTER.items()),
        *(("uid", [*[HOST_UID] * n, 0, *[HOST_UID] * (3 - n)], "the host uid") for n in range(4)),
        ("uid", [HOST_UID + 2] * 4, "the host uid"),
        *(("gid", [*[HOST_UID] * n, 0, *[HOST_UID] * (3 - n)], "the host gid") for n in range(4)),
        ("groups", [4], "the host groups"),
        *((f"capabilities.{name}", "0000000000000020", f"Cap{name}") for name in NOTHING),
        ("no_new_privs", 0, "no_new_privs"),
        ("seccomp", 0, "seccomp"),
    ],
)
def test_what_the_host_sees_of_a_job_must_be_as_it_should(field: str, value: object, says: str) -> None:
    outside(OUTSIDE)
    with pytest.raises(OSError, match=says):
        outside(changed(OUTSIDE, field, value))


@pytest.mark.requirement(2)
def test_a_job_is_never_the_hosts_root() -> None:
    """Whatever the spawner believes it to be, as its own ids begin at 0 too."""
    with pytest.raises(OSError, match="the host uid is"):
        outside({**OUTSIDE, "uid": [0] * 4, "gid": [0] * 4}, uid=0)


def test_waived_layers_are_not_held_against_a_sandbox() -> None:
    inside(changed(changed(INSIDE, "seccomp", 0), "filter", ""), job_filter=b"")
    outside(changed(OUTSIDE, "seccomp", 0), sandboxed=False)
    outside(changed(OUTSIDE, "namespaces.net", OUTER["net"]), flags=ALL_FLAGS & ~report.NAMESPACE_FLAGS["net"])
    with pytest.raises(OSError, match="the pid namespace"):  # these two have no flag to leave out
        outside(changed(OUTSIDE, "namespaces.pid", OUTER["pid"]), flags=0)


@pytest.mark.requirement(2)
def test_with_one_uid_the_users_own_is_what_a_job_has() -> None:
    outside({**OUTSIDE, "uid": [1000] * 4, "gid": [1000] * 4, "groups": [4]}, uid=1000, shared_uid=True)
    with pytest.raises(OSError, match="the host uid is"):
        outside({**OUTSIDE, "uid": [1000] * 4}, uid=1001, shared_uid=True)


def test_own_state_is_read_as_the_kernel_tells_it() -> None:
    found = report.read_status("/proc/self")
    with open("/proc/self/status") as file:
        text = file.read()
    assert "Uid:\t" + "\t".join(map(str, found["uid"])) in text
    for name, mask in found["capabilities"].items():
        assert f"Cap{name}:\t{mask}" in text
    assert report.read_namespaces("/proc/self").keys() == OUTER.keys()
