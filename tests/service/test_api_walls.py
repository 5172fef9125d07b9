"""The HTTP process of a real server, seen from the host: its walls are up, and it holds nothing that it need not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import host, serving
from tests.serving import Server


def status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").partition(":\t")[::2] for line in file)


@pytest.mark.requirement(30)
def test_http_process_is_confined_while_it_listens(running_server: Server) -> None:
    api = running_server.part("sandrun: api")
    found = status(api.pid)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert "0" not in {*found["Uid"].split(), *found["Gid"].split()}
    if os.geteuid() == 0:
        assert found["CapBnd"] == "0" * 16
        assert found["Groups"].split() == []
        assert "mnt" in api.namespaces()


@pytest.mark.root
@pytest.mark.requirement(2)
def test_http_process_has_its_uid_for_itself(running_server: Server) -> None:
    """Who has the uid of a zygote or of a job could signal it, and be signalled."""
    api = running_server.part("sandrun: api")
    own = set(status(api.pid)["Uid"].split())
    others = [p for p in host.descendants(running_server.pid) if p.pid != api.pid]
    assert any("zygote" in p.title for p in others)
    assert not own & {uid for p in others for uid in status(p.pid)["Uid"].split()}


@pytest.fixture
def hostname() -> str:
    return os.path.realpath("/etc/hostname")


@pytest.mark.root
@pytest.mark.requirement(12)
def test_what_the_server_was_started_with_reaches_neither_http_nor_jobs(
    start_server: Callable[..., Server], tmp_path: Path, hostname: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell may hand any descriptor to what it starts."""
    wrapper = tmp_path / "sandrun"
    wrapper.write_text(f'#!/bin/sh\nexec 9<{hostname}\nexec {serving.SANDRUN} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(serving, "SANDRUN", wrapper)
    server = start_server()
    supervisor = host.process(server.pid)
    assert supervisor is not None
    assert hostname in supervisor.descriptors()
    assert hostname not in server.part("sandrun: api").descriptors()
    inside = [one for sandbox in server.sandboxes() for one in sandbox]
    assert inside
    for one in (server.part("zygote"), *inside):
        assert hostname not in one.descriptors()
