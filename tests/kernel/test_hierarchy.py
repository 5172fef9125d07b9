"""Where a server's cgroups are: what dead servers left there, layers that a host lacks, leaves and delegation."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from sandrun.errors import MissingLayer
from sandrun.linux import cgroup as module
from sandrun.linux.cgroup import Cgroups
from sandrun.linux.hierarchy import Hierarchy, detect, end_trees
from tests.kernel.cgroups import (
    GUEST,
    MB,
    directories,
    end,
    hierarchy,
    host_modes,
    is_dead,
    server_with_a_frozen_job,
    wait_until,
)

pytestmark = pytest.mark.root


@pytest.mark.requirement(34)
@pytest.mark.parametrize("mode", host_modes())
def test_leftovers_of_a_killed_server_are_ended_and_removed_those_of_a_living_one_stay(mode, cgroups, tmp_path):
    with server_with_a_frozen_job(mode, tmp_path) as (server, name, inside):
        places = [Path(f"{tree.base}/{name}") for tree in hierarchy(mode).trees]
        assert all(place.is_dir() for place in places)
        cgroups.remove_leftovers()
        assert all((place / "z0/j1").is_dir() for place in places), "the server lives"
        os.kill(server, signal.SIGKILL)
        assert end(server) == -signal.SIGKILL
        assert not is_dead(inside)
        module.remove_leftovers(hierarchy(mode))
        assert [place for place in places if place.exists()] == []
        wait_until(lambda: is_dead(inside))
        assert all(place.is_dir() for place in directories(cgroups)), "ours is not a leftover"


@pytest.mark.v1
@pytest.mark.requirement(34)
def test_leftovers_of_a_server_that_lived_in_another_mode_are_found(tmp_path):
    """A pure v1 server leaves a frozen job behind; a server that uses other hierarchies starts next."""
    with server_with_a_frozen_job("v1", tmp_path) as (server, name, inside):
        places = [Path(f"{tree.base}/{name}") for tree in hierarchy("v1").trees]
        os.kill(server, signal.SIGKILL)
        assert end(server) == -signal.SIGKILL
        assert all(place.is_dir() for place in places)
        assert not is_dead(inside)
        module.remove_leftovers(detect())
        assert [place for place in places if place.exists()] == []
        wait_until(lambda: is_dead(inside))


@pytest.mark.requirement(34)
def test_leftovers_in_the_cgroup_of_another_session_are_found(cgroups):
    for tree in cgroups.hierarchy.trees:
        session = Path(tree.mount, f"session-{os.getpid()}")
        left = session / "below/sandrun-1/z0/j1"
        left.mkdir(parents=True)
        try:
            cgroups.remove_leftovers()
            assert not (session / "below/sandrun-1").exists()
            assert (session / "below").is_dir()
        finally:
            end_trees([(tree, str(session))])


def test_other_directories_are_never_taken_for_leftovers(cgroups):
    tree = cgroups.hierarchy.trees[0]
    others = [
        Path(tree.base, name) for name in ("sandrun", "sandrun-x", f"sandrun-{os.getpid()}.service", "asandrun-1")
    ]
    for other in others:
        other.mkdir()
    try:
        cgroups.remove_leftovers()
        assert all(other.is_dir() for other in others)
    finally:
        for other in others:
            other.rmdir()


def test_two_servers_of_one_pid_number_do_not_share_a_name(cgroups):
    with Cgroups._create(hierarchy(cgroups.mode), frozenset()) as second:
        assert second.name != cgroups.name
        assert cgroups.remove_leftovers() == second.remove_leftovers() == 0


# --- layers


@pytest.mark.requirement(17)
@pytest.mark.parametrize(
    ("layer", "purposes"), [("memory", ["memory"]), ("pids", ["pids"]), ("cpu", ["cpu", "control"])]
)
def test_missing_controller_is_named_with_its_fix_or_waived(layer, purposes, no_new_descriptors):
    def crippled() -> Hierarchy:
        found = detect()
        for purpose in purposes:
            del found.where[purpose]
        return found

    with pytest.raises(MissingLayer, match="Delegate=yes") as caught:
        Cgroups._create(crippled(), frozenset())
    assert caught.value.layer == layer
    with Cgroups._create(crippled(), frozenset({layer, "swap"})) as made:
        assert made.missing - {"swap"} == {layer}
        box = made.group("z0").create("j1")
        box.set_limits(64 * MB, 10)
        known = box.usage()
        limits = box.limits()
        assert (limits["memory_bytes"] is None) == (layer == "memory")
        assert (limits["tasks"] is None) == (layer == "pids")
        assert (known[0] is None) == (layer == "cpu")
        assert box.events() == (0, 0)
        assert (box.oom_fd() is None) == (layer == "memory")
        box.freeze(True)
        box.freeze(False)
        box.kill()


@pytest.mark.requirement(17)
def test_read_only_hierarchy_is_a_missing_layer(no_new_descriptors, monkeypatch):
    found = detect()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(MissingLayer, match="Read-only file system") as caught:
        Cgroups._create(found, frozenset())
    assert caught.value.layer == "memory"
    with pytest.raises(MissingLayer) as caught:
        Cgroups._create(found, frozenset({"memory"}))
    assert caught.value.layer == "pids"


def test_hybrid_whose_v2_tree_cannot_be_used_falls_back_to_v1(monkeypatch, no_new_descriptors):
    if detect().mode != "hybrid":
        pytest.skip("needs a hybrid host")
    mkdir = os.mkdir

    def refused(path: str, *args: int, **more: int) -> None:
        if "unified" in path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    with Cgroups.create() as made:
        assert made.mode == "v1"
        assert made.missing == frozenset()


def test_with_all_layers_waived_and_missing_every_operation_does_nothing(no_new_descriptors, monkeypatch):
    monkeypatch.setattr(module, "detect", lambda use_v2=True: Hierarchy("none", (), {}))
    with Cgroups.create({"memory", "pids", "cpu"}) as made:
        assert made.mode == "none"
        assert made.missing == {"memory", "pids", "cpu"}
        assert made.remove_leftovers() == 0
        group = made.group("z0")
        group.chown(GUEST, GUEST)
        box = group.create("j1")
        box.set_limits(64 * MB, 10)
        assert box.entry_fds() == []
        assert box.directory_fd() is None
        assert box.usage() == (None, None, None, None)
        assert box.events() == (0, 0)
        assert box.oom_fd() is None
        limits = box.limits()
        assert (limits["memory_bytes"], limits["tasks"]) == (None, None)
        box.freeze(True)
        box.kill()
        assert not box.populated()
        box.remove()
        group.close()


@pytest.mark.v2
def test_server_moves_to_a_leaf_so_that_its_cgroup_can_have_controllers(cgroups):
    assert Path("/proc/self/cgroup").read_text().strip().endswith("/own")
    base = Path(cgroups.hierarchy.trees[0].base)
    assert (base / "cgroup.procs").read_text() == ""
    for place in (base, base / cgroups.name):
        assert {"memory", "pids"} <= set((place / "cgroup.subtree_control").read_text().split())
    if cgroups.has_swap_max:
        assert (base / "own/memory.swap.max").read_text() == "0\n"


@pytest.mark.v2
@pytest.mark.requirement(17)
def test_unit_that_is_not_delegated_is_refused_with_the_command_that_fixes_it(monkeypatch, no_new_descriptors):
    monkeypatch.setattr(os, "getxattr", lambda *_: b"0")
    with pytest.raises(MissingLayer, match=r"not delegated.*systemd-run --scope -p Delegate=yes") as caught:
        Cgroups.create()
    assert caught.value.layer == "memory"


def test_trees_that_are_gone_already_are_no_error():
    end_trees([(tree, f"{tree.base}/sandrun-0-not-there") for tree in detect().trees])
