"""Finding cgroup hierarchies in the texts that kernels, systemd and container engines show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandrun.linux import hierarchy
from sandrun.linux.hierarchy import Tree, choose, find_trees, undelegated

SYSTEMD_V2 = "29 24 0:24 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:8 - cgroup2 cgroup2 rw,nsdelegate\n"
SYSTEMD_V1 = """\
25 20 8:1 / / rw,relatime - ext4 /dev/sda1 rw
34 32 0:29 / /sys/fs/cgroup/systemd rw shared:10 - cgroup cgroup rw,xattr,name=systemd
36 32 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:15 - cgroup cgroup rw,cpu,cpuacct
37 32 0:32 / /sys/fs/cgroup/memory rw shared:16 - cgroup cgroup rw,memory
38 32 0:33 / /sys/fs/cgroup/pids rw shared:17 - cgroup cgroup rw,pids
39 32 0:34 / /sys/fs/cgroup/freezer rw shared:18 - cgroup cgroup rw,freezer
"""
MEMBER_V1 = "5:cpu,cpuacct:/a\n4:memory:/a/b\n3:pids:/\n2:freezer:/\n1:name=systemd:/x\n"


def bases(mountinfo: str, memberships: str) -> dict[str, str]:
    return {",".join(sorted(tree.controllers)): tree.base for tree in find_trees(mountinfo, memberships)}


def test_v2_base_is_our_own_cgroup():
    (tree,) = find_trees(SYSTEMD_V2, "0::/system.slice/a.service\n")
    assert (tree.version, tree.mount) == (2, "/sys/fs/cgroup")
    assert tree.base == "/sys/fs/cgroup/system.slice/a.service"


def test_v2_base_is_the_parent_of_the_leaf_that_the_server_moved_to():
    (tree,) = find_trees(SYSTEMD_V2, "0::/system.slice/a.service/own\n")
    assert tree.base == "/sys/fs/cgroup/system.slice/a.service"


def test_each_v1_hierarchy_has_its_own_base():
    assert bases(SYSTEMD_V1, MEMBER_V1) == {
        "cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct/a",
        "memory": "/sys/fs/cgroup/memory/a/b",
        "pids": "/sys/fs/cgroup/pids",
        "freezer": "/sys/fs/cgroup/freezer",
        "name=systemd": "/sys/fs/cgroup/systemd/x",
    }


def test_mount_that_shows_a_part_of_the_hierarchy_is_reckoned_from_its_root():
    container = "50 49 0:32 /docker/c1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    assert bases(container, "4:memory:/docker/c1\n") == {"memory": "/sys/fs/cgroup/memory"}
    assert bases(container, "4:memory:/docker/c1/job\n") == {"memory": "/sys/fs/cgroup/memory/job"}


@pytest.mark.parametrize("path", ["/", "/docker/c2", "/docker/c11", "/docker/c1/../c2", "/../other"])
def test_mount_that_does_not_show_our_cgroup_is_passed_over(path):
    container = "50 49 0:32 /docker/c1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    assert bases(container, f"4:memory:{path}\n") == {}


def test_second_mount_serves_if_the_first_does_not_show_our_cgroup():
    two = (
        "50 49 0:32 /docker/c1 /a rw - cgroup cgroup rw,memory\n51 49 0:32 / /b rw - cgroup cgroup rw,memory\n"
        "52 49 0:32 / /c rw - cgroup cgroup rw,memory\n"
    )
    assert bases(two, "4:memory:/x\n") == {"memory": "/b/x"}


def test_root_above_our_cgroup_namespace_is_passed_over():
    assert bases("29 24 0:24 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/\n") == {}


def test_spaces_in_mount_points_are_read():
    (tree,) = find_trees("29 24 0:24 / /mnt/my\\040cg rw - cgroup2 none rw\n", "0::/\n")
    assert tree.base == "/mnt/my cg"


def test_source_of_a_mount_may_be_odd():
    (tree,) = find_trees("29 24 0:24 / /cg rw shared:1 master:2 - cgroup2 odd\\040name rw\n", "0::/a\n")
    assert tree.base == "/cg/a"


def trees(**controllers: str) -> list[Tree]:
    return [Tree(1, frozenset(names.split()), f"/{name}", f"/{name}") for name, names in controllers.items()]


def unified(*controllers: str) -> Tree:
    return Tree(2, frozenset(controllers), "/u", "/u")


def test_v2_alone_serves_everything_with_one_directory():
    found = choose([], unified("memory", "pids", "cpu"))
    assert found.mode == "v2"
    assert len(found.trees) == 1
    assert found.where == {"memory": 0, "pids": 0, "cpu": 0, "control": 0}


def test_hybrid_limits_on_v1_and_counts_freezes_and_kills_on_v2():
    found = choose(trees(m="memory", p="pids", c="cpu cpuacct", f="freezer"), unified())
    assert found.mode == "hybrid"
    assert [tree.base for tree in found.trees] == ["/m", "/p", "/u", "/c"]
    assert found.where == {"memory": 0, "pids": 1, "cpu": 2, "control": 2, "share": 3}


def test_share_of_cpu_time_is_where_the_limits_are():
    found = choose(trees(m="memory", p="pids", c="cpu", a="cpuacct", f="freezer"), None)
    assert [tree.base for tree in found.trees] == ["/m", "/p", "/a", "/f", "/c"]
    assert "share" not in choose(trees(c="cpu"), unified("memory", "pids")).where


def test_pure_v1_takes_cpuacct_and_the_freezer():
    found = choose(trees(m="memory", p="pids", c="cpu cpuacct", f="freezer", o="devices"), None)
    assert found.mode == "v1"
    assert [tree.base for tree in found.trees] == ["/m", "/p", "/c", "/f"]


def test_controllers_mounted_together_get_one_directory():
    found = choose(trees(all="memory pids cpuacct freezer"), None)
    assert [tree.base for tree in found.trees] == ["/all"]
    assert found.where == {"memory": 0, "pids": 0, "cpu": 0, "control": 0}


def test_controller_that_is_on_v2_is_used_there_though_others_are_on_v1():
    found = choose(trees(m="memory"), unified("pids"))
    assert found.mode == "hybrid"
    assert found.where == {"memory": 0, "pids": 1, "cpu": 1, "control": 1}


def test_without_hierarchies_there_is_nothing():
    found = choose([], None)
    assert (found.mode, found.trees, found.where) == ("none", (), {})


# --- who manages it


def in_unit(path: str) -> hierarchy.Hierarchy:
    return choose([], Tree(2, frozenset({"memory", "pids"}), "/cg", f"/cg{path}"))


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A host with systemd; the dictionary is the extended attributes, by directory."""
    marks: dict[str, bytes] = {}

    def getxattr(path: str, name: str) -> bytes:
        if path not in marks or name != "trusted.delegate":
            raise OSError(61, "No data available")
        return marks[path]

    monkeypatch.setattr(os, "getxattr", getxattr)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system")
    return marks


def test_without_systemd_nobody_else_manages_our_cgroup(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    assert undelegated(in_unit("/anything")) is None


def test_unit_is_ours_if_systemd_marked_it(systemd):
    assert undelegated(in_unit("/system.slice/a.service")) == "/cg/system.slice/a.service"
    systemd["/cg/system.slice/a.service"] = b"1"
    assert undelegated(in_unit("/system.slice/a.service")) is None
    assert undelegated(in_unit("/system.slice/a.service/below/it")) is None
    systemd["/cg/system.slice/a.service"] = b"0"
    assert undelegated(in_unit("/system.slice/a.service")) is not None


def test_mark_of_the_users_manager_does_not_make_its_units_ours(systemd, monkeypatch, tmp_path: Path):
    systemd["/cg/user.slice/user@7.service"] = b"1"
    asked = tmp_path / "systemctl"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = "/user.slice/user@7.service/app.slice/a.scope"
    for answer, ours in (("no", False), ("yes", True), ("", False)):
        asked.write_text(f'#!/bin/sh\n[ "$6" = a.scope ] && echo {answer}\n')
        asked.chmod(0o755)
        assert (undelegated(in_unit(path)) is None) == ours
    asked.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert undelegated(in_unit(path)) == f"/cg{path}"


def test_v1_and_hybrid_need_no_delegation(systemd):
    found = choose(trees(m="memory", p="pids"), unified())
    assert undelegated(found) is None
