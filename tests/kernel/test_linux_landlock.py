"""Landlock, each time in a child; the same probe first succeeds without it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import termios
import time

import pytest

from sandrun.linux import capabilities, landlock, process
from tests.kernel.children import errno_of, in_child

pytestmark = pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock, or not in its lsm= list")
SYSTEM = [path for path in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/proc") if os.path.exists(path)]


def needs_abi(version: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(landlock.abi() < version, reason=f"needs Landlock ABI {version}, has {landlock.abi()}")


@pytest.fixture
def tree(tmp_path):
    """Two directories with a file each."""
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def confined(tree, probe, **options):
    """What `probe` gives before and after restriction to tree/read and tree/write."""

    def restricted():
        process.set_no_new_privs()
        assert landlock.restrict([*SYSTEM, f"{tree}/read"], [f"{tree}/write", "/dev/null"], **options) == landlock.abi()
        return probe()

    return in_child(probe), in_child(restricted)


def test_what_is_below_no_path_can_not_be_opened_or_listed(tree):
    def probe():
        return errno_of(os.open, tree / "other/file", os.O_RDONLY), errno_of(os.listdir, tree)

    assert confined(tree, probe) == ((0, 0), (errno.EACCES, errno.EACCES))


def test_read_only_paths_can_be_read_and_executed(tree):
    def probe():
        ran = subprocess.run(["/bin/echo", "ran"], capture_output=True, check=True).stdout
        return ran, (tree / "read/file").read_text(), os.listdir(tree / "read")

    assert confined(tree, probe) == ((b"ran\n", "read", ["file"]),) * 2


def test_read_only_paths_can_not_be_changed(tree):
    (tree / "write/unlink").write_text("")
    (tree / "read/unlink").write_text("")

    def probe(directory):
        return [
            errno_of(os.open, directory / "file", os.O_WRONLY),
            errno_of(os.open, directory / "new", os.O_WRONLY | os.O_CREAT),
            errno_of(os.symlink, "x", directory / "link"),
            errno_of(os.mkdir, directory / "directory"),
            errno_of(os.mkfifo, directory / "fifo"),
            errno_of(os.rename, directory / "file", directory / "renamed"),
            errno_of(os.unlink, directory / "unlink"),
        ]

    def restricted():
        process.set_no_new_privs()
        landlock.restrict([*SYSTEM, f"{tree}/read"], [f"{tree}/write"])
        return probe(tree / "read"), probe(tree / "write")

    assert in_child(restricted) == ([errno.EACCES] * 7, [0] * 7)


def test_read_write_paths_can_be_changed_in_every_ordinary_way(tree):
    directory = tree / "write"

    def probe():
        (directory / "new").write_text("text")
        os.truncate(directory / "new", 1)
        os.mkdir(directory / "directory")
        os.rename(directory / "new", directory / "directory/moved")
        os.link(directory / "directory/moved", directory / "linked")
        os.symlink("linked", directory / "symbolic")
        os.mkfifo(directory / "fifo")
        for name in ("directory/moved", "linked", "symbolic", "fifo"):
            os.unlink(directory / name)
        os.rmdir(directory / "directory")
        with open("/dev/null", "w") as file:
            file.write("gone")
        return os.listdir(directory)

    if landlock.abi() < 2:
        pytest.skip("ABI 1 refuses every move to another directory")
    assert confined(tree, probe) == (["file"], ["file"])


@pytest.mark.root
def test_device_nodes_can_not_be_made_even_there(tree):
    def probe():
        code = errno_of(os.mknod, tree / "write/null", 0o20600, os.makedev(1, 3))
        if not code:
            os.unlink(tree / "write/null")
        return code

    assert confined(tree, probe) == (0, errno.EACCES)


@needs_abi(3)
def test_read_only_file_can_not_be_truncated(tree):
    assert confined(tree, lambda: errno_of(os.truncate, tree / "read/file", 4)) == (0, errno.EACCES)


@needs_abi(5)
def test_devices_that_are_only_read_take_no_ioctl(tree):
    def probe():
        with open("/dev/zero", "rb", buffering=0) as file:
            return errno_of(fcntl.ioctl, file, termios.TIOCGWINSZ, b"\0" * 8)

    def restricted():
        process.set_no_new_privs()
        landlock.restrict(["/dev/zero"], [])
        return probe()

    assert in_child(probe) == errno.ENOTTY
    assert in_child(restricted) == errno.EACCES


@needs_abi(4)
@pytest.mark.parametrize("deny_tcp", [True, False])
def test_tcp_is_refused(tree, deny_tcp):
    def probe():
        codes = []
        for action in (socket.socket.bind, socket.socket.connect):
            with socket.socket() as made:
                codes.append(errno_of(action, made, ("127.0.0.1", 0 if action is socket.socket.bind else 1)))
        return codes

    before, after = confined(tree, probe, deny_tcp=deny_tcp)
    assert before == [0, errno.ECONNREFUSED]
    assert after == ([errno.EACCES, errno.EACCES] if deny_tcp else before)


@needs_abi(6)
@pytest.mark.parametrize("scope", [True, False])
def test_signals_end_at_what_the_confined_process_started(tree, scope):
    def probe():
        outsider = os.fork()
        if outsider == 0:
            time.sleep(60)
        process.set_no_new_privs()
        landlock.restrict(SYSTEM, [], scope=scope)
        insider = os.fork()
        if insider == 0:
            time.sleep(60)
        return [errno_of(os.kill, pid, signal.SIGTERM) for pid in (outsider, insider)]

    assert in_child(probe) == [errno.EPERM if scope else 0, 0]


@needs_abi(6)
@pytest.mark.parametrize("scope", [True, False])
def test_abstract_sockets_of_others_can_not_be_reached(tree, scope):
    name = f"\0sandrun-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()

        def probe():
            with socket.socket(socket.AF_UNIX) as made:
                return errno_of(made.connect, name)

        assert confined(tree, probe, scope=scope) == (0, errno.EPERM if scope else 0)


def test_walls_hold_after_execve(tree):
    def probe():
        path = str(tree / "other/file")
        return subprocess.run(["/bin/cat", path], capture_output=True, text=True, env={"LC_ALL": "C"}).stderr

    before, after = confined(tree, probe)
    assert before == ""
    assert "Permission denied" in after


def test_path_that_is_not_there_is_named(tree):
    process_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError, match="/not-there"):
        landlock.restrict(["/not-there"], [])
    assert len(os.listdir("/proc/self/fd")) == process_before


def test_restriction_without_no_new_privs_needs_privilege():
    def probe():
        capabilities.clear()
        return errno_of(landlock.restrict, ["/usr"], [])

    assert in_child(probe) == errno.EPERM


@pytest.mark.requirement(17)
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_kernel_without_landlock_is_told(monkeypatch, code):
    def refuse(*_arguments, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("sandrun.linux.landlock.syscall", refuse)
    monkeypatch.setattr(landlock, "_ABI", [])
    assert landlock.abi() == 0
    with pytest.raises(OSError, match="no Landlock") as caught:
        landlock.restrict(["/usr"], [])
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.parametrize(("version", "highest"), [(1, 12), (2, 13), (3, 14), (4, 14), (5, 15), (6, 15), (9, 15)])
def test_rights_are_those_of_the_abi(version, highest):
    assert landlock.handled_filesystem_rights(version) == (1 << highest + 1) - 1
