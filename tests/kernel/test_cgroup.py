"""Every operation on cgroups with real ones: as this host has them, and where it can, as pure v1."""

from __future__ import annotations

import errno
import os
import select
import signal
import time

import pytest

from sandrun.errors import MissingLayer
from sandrun.linux import cgroup as module
from sandrun.linux import process
from sandrun.linux.cgroup import Cgroup, Cgroups
from sandrun.linux.hierarchy import detect
from tests import host
from tests.kernel.cgroups import GUEST, MB, directories, end, hierarchy, host_modes, start, wait_until

pytestmark = pytest.mark.root


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


def test_group_that_cannot_be_made_leaves_nothing(cgroups, monkeypatch, no_new_descriptors):
    """It is tried again: an environment that turns up while a server has no descriptors left."""

    def refuse(hierarchy, path):
        raise OSError(errno.EMFILE, "refused by a test")

    with monkeypatch.context() as patch:
        patch.setattr(module, "enable_below", refuse)
        with pytest.raises(OSError, match="refused by a test"):
            cgroups.group("z0")
    made = cgroups.group("z0")
    made.create("j1").remove()
    made.close()


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
    assert time.monotonic() - begun < host.within(2)
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
    assert time.monotonic() - begun < host.within(2)


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
