"""Bundles for OCI runtimes (opencontainers/runtime-spec, config.md): the same walls and limits for each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_bundle(
    bundle: Path, argv: Iterable[str], env: Mapping[str, str], folders: Mapping[str, str], *, memory: int, tasks: int
) -> None:
    root = bundle / "rootfs"
    points = ("usr", "proc", "dev", "tmp", "job", "etc/alternatives")
    for name in (*points, *(path.lstrip("/") for path in folders.values())):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    shown = {"/usr": "/usr", "/etc/alternatives": "/etc/alternatives", **folders}
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 65534, "gid": 65534},
            "args": list(argv),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": "/job",
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "job",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _tmpfs("/dev", "nosuid", "mode=755"),
            _tmpfs("/tmp", "nosuid", "nodev"),
            _tmpfs("/job", "nosuid", "nodev", "mode=777"),
            *(_bind(outside, inside) for outside, inside in shown.items()),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "resources": {"memory": {"limit": memory}, "pids": {"limit": tasks}},
        },
    }
    (bundle / "config.json").write_text(json.dumps(config))


def _tmpfs(where: str, *options: str) -> dict[str, Any]:
    return {"destination": where, "type": "tmpfs", "source": "tmpfs", "options": [*options, "size=65536k"]}


def _bind(outside: str, inside: str) -> dict[str, Any]:
    options = ["bind", "ro", "nosuid", "nodev"]
    return {"destination": inside, "type": "bind", "source": outside, "options": options}
