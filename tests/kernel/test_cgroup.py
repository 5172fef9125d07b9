"""Every operation on cgroups with real ones: as this host has them, and where it can, as pure v1."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandrun.errors import MissingLayer
from sandrun.linux import cgroup as module
from sandrun.linux import process
from sandrun.linux.cgroup import Cgroup, Cgroups
from sandrun.linux.hierarchy import Hierarchy, detect, end_trees

MB = 1 << 20
GUEST = 1879048192  # a uid that is nobody

pytestmark = pytest.mark.root


def host_modes() -> list[str]:
    found = [detect().mode]
    return [*found, "v1"] if found == ["hybrid"] else found


def hierarchy(mode: str) -> Hierarchy:
    return detect(use_v2=mode != "v1")


def directories(cgroups: Cgroups) -> list[Path]:
    return [Path(f"{tree.base}/{cgroups.name}") for tree in cgroups.hierarchy.trees]


def wait_until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


@pytest.fixture(params=host_modes())
def cgroups(request: pytest.FixtureRequest, no_new_descriptors: None) -> Iterator[Cgroups]:
    made = Cgroups._create(hierarchy(request.param), frozenset())
    assert made.mode == request.param
    places = directories(made)
    assert all(place.is_dir() for place in places)
    try:
        yield made
    finally:
        made.close()
    assert [place for place in places if place.exists()] == []


@pytest.fixture
def box(cgroups: Cgroups) -> Cgroup:
    return cgroups.group("z0").create("j1")


def start(box: Cgroup, program: str) -> int:
    """Run a Python program inside, entered as a sandbox enters. Returns: its pid, to be reaped by the test."""
    entries = box.entry_fds()
    executed, signs = os.pipe()
    pid, pidfd = process.clone3(0, cgroup_fd=box.directory_fd())
    if pid == 0:
        try:
            for entry in entries:
                os.write(entry, b"0")
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", f"import os, time, signal\n{program}"])
        finally:
            os._exit(127)
    for fd in (*entries, pidfd, signs):
        os.close(fd)
    os.read(executed, 1)  # end of file: from here on it holds none of our descriptors
    os.close(executed)
    return pid


def end(pid: int) -> int:
    """Exit code, negative for a signal."""
    deadline = time.monotonic() + 10
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{pid} did not end")
        time.sleep(0.002)


def cpu_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# --- limits


@pytest.mark.requirement(18, 20)
def test_limits_are_what_the_kernel_reads_back(box):
    assert box.limits()["memory_bytes"] is None
    assert box.limits()["tasks"] is None
    box.set_limits(64 * MB, 101)
    assert box.limits() == {"memory_bytes": 64 * MB, "swap_closed": True, "tasks": 101}


def test_memory_limit_is_rounded_down_to_pages(box):
    box.set_limits(64 * MB + 5, 10)
    assert box.limits()["memory_bytes"] == 64 * MB


def test_limits_can_be_lowered_and_raised(box):
    for megabytes in (512, 64, 2048, 128):
        box.set_limits(megabytes * MB, megabytes)
        assert box.limits() == {"memory_bytes": megabytes * MB, "swap_closed": True, "tasks": megabytes}


def test_limit_that_the_kernel_did_not_take_as_written_is_an_error(box):
    with pytest.raises(OSError, match=r"wrote 18446744073776660480, reads (67108864|max)") as caught:
        box.set_limits((1 << 64) + 64 * MB, 10)
    assert caught.value.errno == errno.ERANGE


def test_refused_limit_names_file_and_value(box):
    with pytest.raises(OSError, match=r"cgroup pids\.max: cannot write -5: Invalid argument"):
        box.set_limits(64 * MB, -5)


@pytest.mark.requirement(18)
def test_no_page_of_a_sandbox_reaches_swap(cgroups, box):
    box.set_limits(64 * MB, 10)
    where = directories(cgroups)[cgroups.memory] / "z0/j1"
    files = {"memory.swap.max": "0", "memory.swappiness": "0", "memory.memsw.limit_in_bytes": str(64 * MB)}
    found = {name: (where / name).read_text().strip() for name in files if (where / name).exists()}
    assert found.items() <= files.items()
    assert cgroups.swap_closed()


@pytest.mark.parametrize("mode", host_modes())
def test_active_swap_that_cgroups_cannot_close_is_a_missing_layer(mode, monkeypatch, no_new_descriptors):
    monkeypatch.setattr(module, "swap_active", lambda: True)
    if detect().mode == "v2":
        with Cgroups._create(hierarchy(mode), frozenset()) as made:
            box = made.group("z0").create("j1")
            box.set_limits(64 * MB, 10)
            assert box.limits()["swap_closed"] is True
        return
    with pytest.raises(MissingLayer, match="swapoff") as caught:
        Cgroups._create(hierarchy(mode), frozenset())
    assert caught.value.layer == "swap"
    with Cgroups._create(hierarchy(mode), frozenset({"swap"})) as made:
        assert made.missing == {"swap"}
        assert made.group("z0").create("j1").limits()["swap_closed"] is False


# --- entering


def test_process_is_inside_in_every_hierarchy_after_entering(cgroups, box):
    pid = start(box, "time.sleep(60)")
    try:
        for place in directories(cgroups):
            assert str(pid) in (place / "z0/j1/cgroup.procs").read_text().split()
        assert box.populated()
    finally:
        box.kill()
        assert end(pid) == -signal.SIGKILL
    wait_until(lambda: not box.populated())


def test_each_tree_is_entered_in_exactly_one_way(cgroups, box):
    entries = box.entry_fds()
    ways = len(entries) + (box.directory_fd() is not None)
    for fd in entries:
        os.close(fd)
    assert ways == len(cgroups.hierarchy.trees)


def test_all_descriptors_are_closed_on_exec(cgroups):
    box = cgroups.group("z0").create("j1")
    box.set_limits(64 * MB, 10)
    box.oom_fd()
    box.usage()
    box.events()
    box.freeze(False)
    box.populated()
    entries = box.entry_fds()
    inheritable = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}") and int(name) > 2 and os.get_inheritable(int(name))
    ]
    for fd in entries:
        os.close(fd)
    assert [path for path in inheritable if "cgroup" in path or "eventfd" in path] == []


def test_zygote_may_start_processes_only_in_what_it_was_given(cgroups):
    if cgroups.unified < 0:
        pytest.skip("pure v1 is entered by descriptors that the spawner opened")
    closed, given = cgroups.group("z0"), cgroups.group("z1")
    given.chown(GUEST, GUEST)
    before, inside = closed.create("j1"), given.create("j1")
    assert start_as_guest(closed.own, before) == errno.EACCES
    assert start_as_guest(given.own, before) == errno.EACCES
    assert start_as_guest(given.own, inside) == 0


def start_as_guest(home: Cgroup, target: Cgroup) -> int:
    """The errno of CLONE_INTO_CGROUP `target` by a process of another uid that lives in `home`."""
    entries = home.entry_fds()
    pid, pidfd = process.clone3(0, cgroup_fd=home.directory_fd())
    if pid == 0:
        code = 255
        try:
            for entry in entries:
                os.write(entry, b"0")
            os.setgroups([])
            os.setresgid(GUEST, GUEST, GUEST)
            os.setresuid(GUEST, GUEST, GUEST)
            try:
                child, _ = process.clone3(0, cgroup_fd=target.directory_fd())
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)
                code = 0
            except OSError as error:
                code = error.errno or 255
        finally:
            os._exit(code)
    for fd in (*entries, pidfd):
        os.close(fd)
    return end(pid)


# --- events


@pytest.mark.requirement(18)
def test_kill_for_memory_wakes_the_watcher_and_is_counted(box):
    box.set_limits(48 * MB, 10)
    watch = box.oom_fd()
    assert watch is not None
    poll = select.poll()
    poll.register(watch, box.oom_poll)
    assert poll.poll(0) == []
    assert box.events() == (0, 0)
    # the child that is killed is not the entrypoint, which lives on
    pid = start(box, "child = os.fork()\nif not child: b'x' * (200 << 20)\nos.waitpid(child, 0)\ntime.sleep(60)")
    try:
        assert poll.poll(10_000), "no event"
        wait_until(lambda: box.events()[0] == 1, 1)
        wait_until(lambda: box.events() and not poll.poll(0), 1)
        usage = box.usage()
        assert usage[1] is None or 47 * MB <= usage[1] <= 48 * MB
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        assert box.populated()
    finally:
        box.kill()
        end(pid)


@pytest.mark.requirement(18)
def test_memory_of_many_children_and_of_files_counts_together(box):
    box.set_limits(64 * MB, 30)
    program = (
        "import mmap\nfor _ in range(10):\n if not os.fork(): m = b'x' * (12 << 20); time.sleep(60)\ntime.sleep(60)"
    )
    pid = start(box, program)
    try:
        wait_until(lambda: box.events()[0] >= 1)
    finally:
        box.kill()
        end(pid)


@pytest.mark.requirement(20)
def test_exactly_as_many_tasks_as_allowed_then_eagain(box):
    box.set_limits(64 * MB, 5)
    program = (
        "n = 1\ntry:\n while True:\n  if not os.fork(): time.sleep(60)\n  n += 1\nexcept BlockingIOError: os._exit(n)"
    )
    pid = start(box, program)
    try:
        assert end(pid) == 5
        assert box.events()[1] == 1
        peak = box.usage()[3]
        assert peak in (5, None)
    finally:
        box.kill()


# --- usage


def test_cpu_time_is_that_of_all_processes(box):
    burn = "t = time.process_time\nwhile t() < 0.15: pass"
    pid = start(box, f"os.fork()\n{burn}\nos._exit(0)")
    assert end(pid) == 0
    wait_until(lambda: not box.populated())
    used = box.cpu_usec()
    assert used is not None
    assert 290_000 <= used <= 900_000
    assert box.usage()[0] == used


def test_memory_usage_and_peak_are_told(cgroups, box):
    box.set_limits(256 * MB, 10)
    pid = start(box, "b = b'x' * (64 << 20)\ndel b\ntime.sleep(60)")
    try:
        wait_until(lambda: (box.usage()[1] or 64 * MB) >= 64 * MB and (box.usage()[2] or 0) < 64 * MB)
        assert (box.usage()[1] is not None) == cgroups.has_memory_peak
    finally:
        box.kill()
        end(pid)


# --- freezing and killing


@pytest.mark.requirement(38)
def test_frozen_processes_use_no_cpu_and_go_on_afterwards(box):
    pid = start(box, "while True: pass")
    try:
        wait_until(lambda: (box.cpu_usec() or 0) > 50_000)
        box.freeze(True)
        time.sleep(0.1)
        used, ticks = box.cpu_usec(), cpu_of(pid)
        time.sleep(0.2)
        assert box.cpu_usec() == used
        assert cpu_of(pid) == ticks
        box.freeze(False)
        wait_until(lambda: (box.cpu_usec() or 0) > (used or 0) + 50_000)
    finally:
        box.kill()
        assert end(pid) == -signal.SIGKILL


@pytest.mark.requirement(34)
def test_frozen_processes_die_when_killed(box):
    pid = start(box, "os.fork()\nos.fork()\ntime.sleep(60)")
    time.sleep(0.1)
    box.freeze(True)
    time.sleep(0.05)
    begun = time.monotonic()
    box.kill()
    assert end(pid) == -signal.SIGKILL
    wait_until(lambda: not box.populated(), 2)
    assert time.monotonic() - begun < 2
    box.remove()


@pytest.mark.requirement(20, 21)
def test_kill_ends_a_fork_bomb_that_ignores_signals_and_leaves_its_session(box):
    box.set_limits(256 * MB, 40)
    program = (
        "for s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
        "while True:\n try:\n  if not os.fork(): os.setsid()\n except OSError: pass"
    )
    pid = start(box, program)
    wait_until(lambda: box.events()[1] > 0)
    begun = time.monotonic()
    box.kill()
    assert end(pid) == -signal.SIGKILL
    wait_until(lambda: not box.populated(), 2)
    assert time.monotonic() - begun < 2


def test_kill_of_an_empty_cgroup_is_nothing(box):
    box.kill()
    assert not box.populated()


def test_kill_leaves_other_sandboxes_alone(cgroups):
    group = cgroups.group("z0")
    one, other = group.create("j1"), group.create("j2")
    pids = [start(box, "time.sleep(60)") for box in (one, other)]
    one.kill()
    assert end(pids[0]) == -signal.SIGKILL
    time.sleep(0.05)
    assert os.waitpid(pids[1], os.WNOHANG) == (0, 0)
    other.kill()
    assert end(pids[1]) == -signal.SIGKILL


# --- removing


def test_removing_while_a_process_lives_is_ebusy_and_can_be_repeated(cgroups, box):
    pid = start(box, "time.sleep(60)")
    assert box.populated()
    with pytest.raises(OSError, match="busy") as caught:
        box.remove(0)
    assert caught.value.errno == errno.EBUSY
    os.kill(pid, signal.SIGKILL)
    end(pid)
    box.remove()
    assert [place for place in directories(cgroups) if (place / "z0/j1").exists()] == []
    box.remove()


def test_removed_name_can_be_used_again(cgroups):
    group = cgroups.group("z0")
    for _ in range(3):
        box = group.create("j1")
        box.set_limits(64 * MB, 10)
        box.oom_fd()
        box.remove()


def test_name_in_use_is_refused_and_leaves_nothing(cgroups):
    group = cgroups.group("z0")
    group.create("j1")
    with pytest.raises(FileExistsError):
        group.create("j1")


@pytest.mark.requirement(34)
def test_closing_a_group_ends_its_processes_and_no_others(cgroups):
    one, other = cgroups.group("z0"), cgroups.group("z1")
    pids = [start(box, "time.sleep(60)") for box in (one.own, one.create("j1"), other.create("j1"))]
    one.create("frozen").freeze(True)
    # not reaped by us yet, so rmdir is EBUSY until a child is: reap them while it closes
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        one.close()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    assert [place for place in directories(cgroups) if (place / "z0").exists()] == []
    assert os.waitpid(pids[2], os.WNOHANG) == (0, 0)
    other.members["j1"].kill()
    end(pids[2])


@pytest.mark.requirement(34)
@pytest.mark.parametrize("mode", host_modes())
def test_leftovers_of_a_killed_server_are_ended_and_removed_those_of_a_living_one_stay(mode, cgroups, tmp_path):
    found = hierarchy(mode)
    told = tmp_path / "told"
    server = os.fork()
    if server == 0:
        try:
            made = Cgroups._create(hierarchy(mode), frozenset())
            box = made.group("z0").create("j1")
            inside = start(box, "time.sleep(60)")
            box.freeze(True)
            (tmp_path / "half").write_text(f"{made.name} {inside}")
            (tmp_path / "half").rename(told)
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        wait_until(told.exists)
        name, inside = told.read_text().split()
        places = [Path(f"{tree.base}/{name}") for tree in found.trees]
        assert all(place.is_dir() for place in places)
        cgroups.remove_leftovers()
        assert all((place / "z0/j1").is_dir() for place in places), "the server lives"
        os.kill(server, signal.SIGKILL)
        assert end(server) == -signal.SIGKILL
        assert os.path.exists(f"/proc/{inside}")
        module.remove_leftovers(found)
        assert [place for place in places if place.exists()] == []
        wait_until(lambda: not os.path.exists(f"/proc/{inside}") or " Z " in Path(f"/proc/{inside}/stat").read_text())
        assert all(place.is_dir() for place in directories(cgroups)), "ours is not a leftover"
    finally:
        try:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        module.remove_leftovers(found)


@pytest.mark.requirement(34)
@pytest.mark.v1
@pytest.mark.requirement(34)
def test_leftovers_of_a_server_that_lived_in_another_mode_are_found(tmp_path):
    """A pure v1 server leaves a frozen job behind; a server that uses other hierarchies starts next."""
    told, server = tmp_path / "told", os.fork()
    if server == 0:
        try:
            made = Cgroups._create(hierarchy("v1"), frozenset())
            box = made.group("z0").create("j1")
            inside = start(box, "time.sleep(60)")
            box.freeze(True)
            (tmp_path / "half").write_text(f"{made.name} {inside}")
            (tmp_path / "half").rename(told)
            time.sleep(60)
        finally:
            os._exit(1)
    wait_until(told.exists)
    name, inside = told.read_text().split()
    places = [Path(f"{tree.base}/{name}") for tree in hierarchy("v1").trees]
    os.kill(server, signal.SIGKILL)
    assert end(server) == -signal.SIGKILL
    assert all(place.is_dir() for place in places)
    assert os.path.exists(f"/proc/{inside}")
    module.remove_leftovers(detect())
    assert [place for place in places if place.exists()] == []
    wait_until(lambda: not os.path.exists(f"/proc/{inside}") or " Z " in Path(f"/proc/{inside}/stat").read_text())


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
