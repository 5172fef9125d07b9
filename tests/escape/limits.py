"""What the tests of limits share: programs that use things up, other clients, and figures of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests import serving
from tests.escape.probing import waived
from tests.serving import Api

OTHERS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""Addresses of other clients: each has places of its own, and the server listens on all of the loopback's."""

FILL = """
import os
def fill(path, most=1 << 40):
    \"\"\"Write zeros until that fails; the bytes that went in, and the errno.\"\"\"
    done = 0
    with open(path, "wb", buffering=0) as file:
        while done < most:
            try:
                done += file.write(bytes(min(1 << 20, most - done)))
            except OSError as error:
                return done, error.errno
    return done, 0
"""


def need(api: Api, *layers: str) -> None:
    """Skip where the operator waived what is tested: an ordinary user has no limits without a cgroup of his own."""
    missing = waived(api) & set(layers)
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} waived on this host")


@contextlib.contextmanager
def other_client(url: str, number: int = 0) -> Iterator[Api]:
    """The server as another client sees it."""
    transport = httpx2.HTTPTransport(local_address=OTHERS[number])
    with httpx2.Client(base_url=url, transport=transport, timeout=90) as http:
        yield Api(http)


def meminfo(field: str) -> int:
    """Bytes, of /proc/meminfo."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(field)


def metadata(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["execution_metadata"]
    return found


def returns_to(read: Any, before: int, slack: int, seconds: float = 5) -> bool:
    """Whether a figure of the host's is back, give or take what others on this machine do."""
    return serving.wait_until(lambda: read() <= before + slack, seconds)


def resident(pid: int) -> int:
    """RAM that a process has mapped, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
