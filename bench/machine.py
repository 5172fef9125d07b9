"""What this machine is, and its meters: CPU time and memory of all of it, from /proc."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
PYTHON = "/usr/bin/python3"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/"}
"""What every contender's program gets: a job's own."""


def cpu_ms() -> float:
    """CPU time that all processes and the kernel have used since boot, proc(5). Neither idle nor stolen time."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq = (int(word) for word in file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) * 1000 / TICKS


def meminfo() -> dict[str, int]:
    """Bytes by name, proc(5)."""
    found = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024
    return found


def available() -> int:
    """MemAvailable, and what it leaves out: the free pages that each CPU keeps for itself, proc_zoneinfo "pagesets".

    Since Linux 6.7 these are hundreds of MiB when many processes have just ended: memory that is free seems used, and
    what is taken of it seems free.
    """
    kept = re.findall(r"^ +count: +(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return meminfo()["MemAvailable"] + sum(map(int, kept)) * os.sysconf("SC_PAGE_SIZE")


def load() -> float:
    return os.getloadavg()[0]


def busy_share(seconds: float) -> float:
    """CPU seconds a second that this machine uses without us, who sleep meanwhile."""
    before, begin = cpu_ms(), time.monotonic()
    time.sleep(seconds)
    return (cpu_ms() - before) / 1000 / (time.monotonic() - begin)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def _git(*arguments: str) -> str:
    return _first_line("git", "-c", "safe.directory=*", *arguments)


def commit() -> tuple[str, bool]:
    """Its short name, and whether what is measured differs from it."""
    name = _git("rev-parse", "--short=7", "HEAD") or "unknown"
    return name, bool(_git("status", "--porcelain", "--", "src", "bench"))


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _system() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else platform.system()


def _cgroups() -> str:
    kinds = {line.partition(" - ")[2].split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    if {"cgroup", "cgroup2"} <= kinds:
        return "v1 with a v2 hierarchy (hybrid)"
    return "v2" if "cgroup2" in kinds else "v1" if "cgroup" in kinds else "none"


def describe() -> dict[str, Any]:
    """For the head of every result."""
    name, changed = commit()
    return {
        "commit": name,
        "changed_since": changed,
        "cpu": _cpu_model(),
        "cores": cores(),
        "ram_mib": meminfo()["MemTotal"] >> 20,
        "kernel": platform.release(),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "system": _system(),
        "cgroups": _cgroups(),
        "python": _first_line(PYTHON, "--version"),
        "root": os.geteuid() == 0,
        "load_at_start": round(load(), 2),
        "busy_at_start": round(busy_share(2.0), 2),
    }
