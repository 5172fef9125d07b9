"""The isolation report for people: what is missing must leap to the eye."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sandrun.cli.isolation import headline, lines

SIDE: dict[str, Any] = {
    "uid": [1000] * 4,
    "gid": [1000] * 4,
    "groups": [],
    "capabilities": dict.fromkeys(("Inh", "Prm", "Eff", "Bnd", "Amb"), "0" * 16),
    "no_new_privs": 1,
    "seccomp": 2,
    "namespaces": {"user": 1, "pid": 2, "net": 3},
}
REPORT: dict[str, Any] = {
    "inside": {
        **SIDE,
        "mounts": [["/", "tmpfs", "ro,nosuid", "rw"], ["/job", "tmpfs", "rw,nosuid", "rw"]],
        "descriptors": [0, 1, 2],
        "landlock": 7,
        "rlimits": {"CORE": [0, 0]},
        "host_name": "sandbox",
    },
    "host": {
        **SIDE,
        "uid": [4000] * 4,
        "uid_kind": "own",
        "filter": {"digest": "ab", "calls": 133, "instructions": 538},
        "limits": {"memory_bytes": 512 << 20, "tasks": 101},
        "swap_closed": True,
        "waived": [],
    },
    "digest": "cd",
}


def test_a_whole_sandbox() -> None:
    assert headline(REPORT) == "3 namespaces, no capabilities, 133 system calls, a uid of its own"
    told = dict(lines(REPORT))
    assert told["waived"] == "nothing"
    assert told["user"] == "1000 inside, 4000 on the host (own)"
    assert told["capabilities"] == "none"
    assert told["limits"] == "512.0 MiB memory, 101 tasks, swap closed"
    assert told["mounts"] == "2, 0 without nosuid; writable: /job"
    assert told["seccomp"].startswith("mode 2, 133 calls allowed")


@pytest.mark.parametrize(
    ("path", "value", "where", "seen"),
    [
        ("host.capabilities.Eff", "0000000000000001", "capabilities", "Eff=0000000000000001"),
        ("inside.namespaces.pid", 9, "namespaces", "INSIDE DIFFERS"),
        ("host.swap_closed", False, "limits", "swap OPEN"),
        ("host.limits", {}, "limits", "no memory, no tasks"),
        ("host.waived", ["memory", "pids"], "waived", "memory pids"),
        ("host.groups", [4], "group", "1 others"),
        ("inside.landlock", 0, "landlock", "none"),
        ("inside.mounts", [["/", "tmpfs", "rw", "rw"]], "mounts", "1, 1 without nosuid; writable: /"),
    ],
)
def test_a_wall_that_is_missing_shows(path: str, value: object, where: str, seen: str) -> None:
    report = json.loads(json.dumps(REPORT))
    *above, name = path.split(".")
    part = report
    for key in above:
        part = part[key]
    part[name] = value
    assert seen in dict(lines(report))[where]


def test_what_was_waived_stands_first() -> None:
    report = {**REPORT, "host": {**REPORT["host"], "waived": ["memory"], "uid_kind": "shared"}}
    assert headline(report).startswith("WITHOUT memory; ")
    assert headline(report).endswith("uid: shared")
    assert "CAPABILITIES LEFT" in headline({})


def test_a_report_of_another_shape_is_no_error() -> None:
    for report in (
        {},
        {"inside": 1, "host": []},
        {"host": {"uid": 3, "groups": None}, "inside": {"mounts": ["x", [1]]}},
    ):
        assert len(list(lines(report))) == 14
