"""The isolation report for people: what was measured of a sandbox's walls, from inside and from the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sandrun.cli.verdict import size


def headline(report: Mapping[str, Any]) -> str:
    """All of it in one line; what was waived stands first, for it is what matters."""
    host, inside = _part(report, "host"), _part(report, "inside")
    parts = [
        f"{len(_part(host, 'namespaces') or _part(inside, 'namespaces'))} namespaces",
        "no capabilities" if _no_capabilities(host) else "CAPABILITIES LEFT",
        f"{_part(host, 'filter').get('calls', 'unknown')} system calls",
        "a uid of its own" if host.get("uid_kind") == "own" else "uid: shared",
    ]
    waived = host.get("waived") or ()
    return (f"WITHOUT {' '.join(map(str, waived))}; " if waived else "") + ", ".join(parts)


def lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One wall a line; `--json` has all of it."""
    host, inside = _part(report, "host"), _part(report, "inside")
    yield "waived", " ".join(map(str, host.get("waived") or ())) or "nothing"
    yield "user", f"{_first(inside, 'uid')} inside, {_first(host, 'uid')} on the host ({host.get('uid_kind')})"
    others = len(host.get("groups") or ())
    yield "group", f"{_first(inside, 'gid')} inside, {_first(host, 'gid')} on the host, {others} others"
    own = _part(host, "namespaces")
    agreed = "the same from inside and outside" if own == _part(inside, "namespaces") else "INSIDE DIFFERS"
    yield "namespaces", f"{' '.join(own)} ({agreed})"
    sets = _part(host, "capabilities")
    yield "capabilities", "none" if _no_capabilities(host) else " ".join(f"{k}={v}" for k, v in sets.items())
    yield "no_new_privs", str(host.get("no_new_privs"))
    rules = _part(host, "filter")
    calls = f"{rules.get('calls')} calls allowed, {rules.get('instructions')} instructions"
    yield "seccomp", f"mode {host.get('seccomp')}, {calls}, SHA-256 {rules.get('digest')}"
    yield "landlock", f"ABI {inside['landlock']}" if inside.get("landlock") else "none"
    limits = _part(host, "limits")
    memory = size(limits["memory_bytes"]) if isinstance(limits.get("memory_bytes"), int) else "no"
    swap = "closed" if host.get("swap_closed") else "OPEN"
    yield "limits", f"{memory} memory, {limits.get('tasks', 'no')} tasks, swap {swap}"
    yield "rlimits", " ".join(f"{name}={_pair(value)}" for name, value in _part(inside, "rlimits").items())
    yield "descriptors", " ".join(map(str, inside.get("descriptors") or ()))
    mounts = [mount for mount in inside.get("mounts") or () if isinstance(mount, list) and len(mount) >= 3]
    writable = [str(mount[0]) for mount in mounts if "rw" in str(mount[2]).split(",")]
    suid = sum("nosuid" not in str(mount[2]).split(",") for mount in mounts)
    yield "mounts", f"{len(mounts)}, {suid} without nosuid; writable: {' '.join(writable)}"
    yield "host name", str(inside.get("host_name"))
    yield "digest", str(report.get("digest"))


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _first(value: Mapping[str, Any], name: str) -> object:
    found = value.get(name)
    return found[0] if isinstance(found, list) and found else found


def _no_capabilities(part: Mapping[str, Any]) -> bool:
    sets = _part(part, "capabilities")
    return bool(sets) and all(str(value).strip("0") == "" for value in sets.values())


def _pair(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
