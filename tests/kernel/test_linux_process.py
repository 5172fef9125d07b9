"""Processes, namespaces and the own memory, each tried in a child with a PID namespace of its own."""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sandrun.linux import libc, mounts, process
from sandrun.linux.calls import Calls
from tests.kernel.children import errno_of, in_child

ALL_NAMESPACES = (
    process.CLONE_NEWNS
    | process.CLONE_NEWNET
    | process.CLONE_NEWIPC
    | process.CLONE_NEWUTS
    | process.CLONE_NEWCGROUP
    | process.CLONE_NEWUSER
)


def own_namespaces() -> dict[str, str]:
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in process.NAMESPACES}


# --- memory


def test_peek_reads_what_is_there():
    buffer = ctypes.create_string_buffer(b"something")
    assert libc.peek(ctypes.addressof(buffer) + 4, 5) == b"thing"


def test_peek_answers_none_where_a_plain_read_would_crash():
    assert libc.peek(0, 1) is None
    assert libc.peek(2**63 + 5, 1) is None


def test_peek_answers_none_when_only_the_beginning_can_be_read():
    with open("/proc/self/maps") as file:
        areas = [re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line) for line in file]
    known = [(int(area[1], 16), int(area[2], 16), area[3]) for area in areas if area]
    starts = {start for start, _, _ in known}
    end = next(end for _, end, rights in known if rights.startswith("rw") and end not in starts)
    assert libc.peek(end - 8, 8) is not None
    assert libc.peek(end - 8, 16) is None


def test_poke_overwrites_memory():
    buffer = ctypes.create_string_buffer(b"hello")
    libc.poke(ctypes.addressof(buffer), b"j")
    assert buffer.value == b"jello"


def test_error_names_call_and_object():
    with pytest.raises(OSError, match=r"open_tree: /not-there: No such file") as caught:
        mounts.open_tree("/not-there", clone=False)
    assert caught.value.errno == errno.ENOENT


# --- what a process says about itself


@pytest.mark.requirement(3)
def test_no_new_privs_is_set_for_good():
    def probe():
        before = process.get_no_new_privs()
        process.set_no_new_privs()
        with open("/proc/self/status") as file:
            return before, process.get_no_new_privs(), "NoNewPrivs:\t1\n" in file.read()

    assert in_child(probe) == (False, True, True)


@pytest.mark.root
def test_undumpable_process_cannot_be_looked_into_by_its_own_user():
    def probe():
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        found = []
        for dumpable in (True, False):
            ready, told = os.pipe()
            if (pid := os.fork()) == 0:
                process.set_dumpable(dumpable)
                os.write(told, b"1")
                time.sleep(60)
            os.read(ready, 1)
            found.append(errno_of(lambda pid=pid: open(f"/proc/{pid}/environ", "rb").close()))
            found.append(errno_of(os.readlink, f"/proc/{pid}/exe"))
        return found

    # the child's own numbers in a /proc of its own, so that /proc/PID is the process just started
    def with_proc():
        mounts.set_attributes("/", propagation=mounts.MS_PRIVATE, recursive=True)
        mounts.move_mount(mounts.new_filesystem("proc", {}), "/proc")
        return probe()

    assert in_child(with_proc, process.CLONE_NEWNS) == [0, 0, errno.EACCES, errno.EACCES]


@pytest.mark.parametrize("number", [0, signal.SIGKILL])
def test_parent_death_signal_ends_the_orphan(number):
    def probe():
        end, held = os.pipe()
        ready, told = os.pipe()
        if (middle := os.fork()) == 0:
            if os.fork() == 0:
                process.set_parent_death_signal(number)
                os.write(told, b"1")
                time.sleep(60)
            os.read(ready, 1)
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(held)
        return bool(select.select([end], [], [], 2.0 if number else 0.2)[0])

    assert in_child(probe) is bool(number)


def test_subreaper_adopts_orphans():
    def probe():
        told, tell = os.pipe()
        if (reaper := os.fork()) == 0:  # PID 1 would adopt without being asked to
            gate, opener = os.pipe()
            process.set_child_subreaper()
            if (middle := os.fork()) == 0:
                if os.fork() == 0:
                    os.read(gate, 1)
                    os.write(tell, str(os.getppid()).encode())
                os._exit(0)
            os.waitpid(middle, 0)
            os.write(opener, b"1")
            os.wait()
            os._exit(0)
        os.waitpid(reaper, 0)
        return int(os.read(told, 20)) == reaper

    assert in_child(probe)


def test_name_is_cut_to_15_bytes():
    def probe():
        process.set_name("sandrun: far too long")
        with open("/proc/self/comm") as file:
            return file.read()

    assert in_child(probe) == "sandrun: far to\n"


def title_of(*arguments: str, title: str) -> tuple[bytes, str]:
    """What /proc/PID/cmdline of a freshly exec'ed interpreter reads with its title set; $MARK of its child."""
    code = """if True:
        import os, sys
        from sandrun.linux import process
        process.set_title(sys.stdin.read())
        with open("/proc/self/cmdline", "rb") as file:
            print((file.read(), os.popen("echo $MARK").read()))
    """
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=title,
        env={"MARK": "intact", "PYTHONPATH": str(Path(libc.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    shown, mark = ast.literal_eval(ran.stdout)
    return shown, mark.strip()


def test_title_is_all_that_ps_shows():
    assert title_of("x" * 5000, title="sandrun: sandbox 7") == (b"sandrun: sandbox 7\0", "intact")


def test_title_that_does_not_fit_is_cut_and_leaves_the_environment_alone():
    shown, mark = title_of(title="t" * 10_000)
    assert re.fullmatch(rb"t{100,1000}\0", shown)
    assert mark == "intact"


def test_empty_title_shows_nothing_of_the_arguments():
    assert title_of("secret", title="") == (b"\0", "intact")


# --- new processes


@pytest.mark.requirement(1)
def test_clone3_makes_all_seven_namespaces():
    ours = own_namespaces()
    theirs = in_child(own_namespaces, ALL_NAMESPACES)
    assert {kind for kind in ours if ours[kind] != theirs[kind]} == set(process.NAMESPACES)


def test_clone3_child_is_pid_1_with_threads_that_work():
    def probe():
        seen: list[int] = []
        lock = threading.RLock()
        with lock:
            thread = threading.Thread(target=lambda: seen.append(threading.get_native_id()))
            thread.start()
            thread.join()
        return os.getpid(), threading.get_native_id(), seen, threading.main_thread() is threading.current_thread()

    pid, native, seen, is_main = in_child(probe)
    assert (pid, native, is_main) == (1, 1, True)
    assert seen[0] != 1


def test_clone3_child_has_other_random_numbers():
    random.seed(5)
    numbers = [in_child(random.random) for _ in range(3)] + [random.random()]
    assert len(set(numbers)) == 4


def test_clone3_gives_a_close_on_exec_pidfd_of_the_child():
    def probe():
        pid, pidfd = process.clone3(0)
        if pid == 0:
            signal.pause()
        flags = fcntl.fcntl(pidfd, fcntl.F_GETFD)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        return flags, ended is not None and (ended.si_pid == pid, ended.si_status)

    assert in_child(probe) == (fcntl.FD_CLOEXEC, (True, signal.SIGKILL))


def test_clone3_that_fails_leaves_the_interpreter_able_to_fork_and_import():
    def probe():
        calls: list[str] = []
        os.register_at_fork(
            before=lambda: calls.append("before"),
            after_in_parent=lambda: calls.append("parent"),
            after_in_child=lambda: calls.append("child"),
        )
        clone_fs = 0x200  # never together with a new mount namespace
        code = errno_of(process.clone3, process.CLONE_NEWNS | clone_fs)
        thread = threading.Thread(target=__import__, args=("this_module_is_not_there",), daemon=True)
        threading.excepthook = lambda _: None  # it ends with ModuleNotFoundError, if the import lock is free
        thread.start()
        thread.join(5)
        if (pid := os.fork()) == 0:
            os._exit(7)
        return code, calls[:2], thread.is_alive(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_child(probe) == (errno.EINVAL, ["before", "parent"], False, 7)


@pytest.mark.root
def test_clone3_starts_the_child_inside_a_cgroup():
    with open("/proc/self/mountinfo") as file:
        found = [line.split() for line in file if " - cgroup2 " in line]
    if not found:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    with open("/proc/self/cgroup") as file:
        own = next(line.strip().removeprefix("0::") for line in file if line.startswith("0::"))
    name = f"sandrun-test-{os.getpid()}"
    directory = f"{found[0][4]}/{own}/{name}"
    os.mkdir(directory)
    try:
        descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        end, start = os.pipe()
        pid, pidfd = process.clone3(0, cgroup_fd=descriptor)
        if pid == 0:
            try:
                with open("/proc/self/cgroup", "rb") as status:
                    os.write(start, status.read())
            finally:
                os._exit(0)
        os.close(start)
        with open(end) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        os.close(pidfd)
        os.close(descriptor)
        assert f"/{name}\n" in text
        pid, pidfd = process.clone3(0)  # the cgroup of one call is not kept for the next
        if pid == 0:
            with open("/proc/self/cgroup", "rb") as status:
                os._exit(name.encode() in status.read())
        os.close(pidfd)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.rmdir(directory)


# --- namespaces


def test_host_name_of_a_uts_namespace_is_its_own():
    outside = os.uname().nodename

    def probe():
        calls = Calls()
        calls.call("sethostname", b"job", 3)
        calls.call("setdomainname", b"nowhere", 7)
        calls.run()
        with open("/proc/sys/kernel/domainname") as file:
            return os.uname().nodename, file.read()

    assert in_child(probe, process.CLONE_NEWUTS) == ("job", "nowhere\n")
    assert os.uname().nodename == outside


@pytest.mark.requirement(1)
def test_unshared_network_has_no_interface_of_the_host():
    def probe():
        process.unshare(process.CLONE_NEWNET)
        return [name for _, name in socket.if_nameindex()]

    names = in_child(probe)
    assert "lo" in names
    assert not [name for name in names if re.match(r"(en|eth|wl|docker|br)", name)]


def test_setns_enters_the_namespace_of_a_pidfd():
    def probe():
        end, start = os.pipe()
        pid, pidfd = process.clone3(process.CLONE_NEWUTS)
        if pid == 0:
            socket.sethostname("inner")
            os.write(start, b"1")
            signal.pause()
        os.read(end, 1)
        process.setns(pidfd, process.CLONE_NEWUTS)
        return os.uname().nodename

    assert in_child(probe, process.CLONE_NEWUTS) == "inner"


def test_pivot_root_leaves_nothing_of_the_old_tree():
    def probe():
        mounts.set_attributes("/", propagation=mounts.MS_PRIVATE, recursive=True)
        mounts.move_mount(mounts.new_filesystem("tmpfs", {"mode": "0755"}), "/mnt")
        os.mkdir("/mnt/only")
        os.chdir("/mnt")
        process.pivot_root(".", ".")
        mounts.umount(".", mounts.MNT_DETACH)
        os.chdir("/")
        return os.listdir("/")

    assert in_child(probe, process.CLONE_NEWNS) == ["only"]


def test_pivot_root_onto_what_is_no_mount_names_it():
    with pytest.raises(OSError, match=r"pivot_root: /usr/bin: ") as caught:
        in_child(lambda: process.pivot_root("/usr/bin", "/usr/bin"), process.CLONE_NEWNS)
    assert caught.value.errno in (errno.EBUSY, errno.EINVAL)  # on the root's own mount, on another


def test_close_range_leaves_exactly_what_is_below():
    end, start = os.pipe()

    def probe():
        answer = os.dup(start)
        os.dup2(answer, 900)
        process.close_range(answer + 1, 899)
        before = [number for number in range(answer + 1, 1000) if errno_of(os.fstat, number) == 0]
        process.close_range(901, 900)  # an empty range is no error
        process.close_range(0, answer - 1)
        process.close_range(answer + 1, 2**32 - 1)
        after = [number for number in range(1000) if errno_of(os.fstat, number) == 0]
        os.write(answer, repr((before, after == [answer])).encode())

    with pytest.raises(EOFError):  # in_child's own pipe is closed too
        in_child(probe)
    os.close(start)
    with open(end) as file:
        assert file.read() == "([900], True)"
