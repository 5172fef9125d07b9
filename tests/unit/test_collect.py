"""The collector takes regular files and nothing else, whatever tree a job leaves (requirements 24, 31, 32)."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandrun.sandbox import collect as module
from sandrun.sandbox.collect import Selection, collect, snapshot
from tests.collecting import JOB_ID, as_job, collected, stream_of

pytestmark = pytest.mark.requirement(31)


@pytest.fixture
def work() -> Iterator[Path]:
    """A job's work directory, which is the job's."""
    root = Path(tempfile.mkdtemp(prefix="collect-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    if os.geteuid() == 0:
        os.chown(root, JOB_ID, JOB_ID)
    yield root
    subprocess.run(["chmod", "-R", "u+rwx", str(root)], check=True)  # shutil.rmtree recurses too deep for what is here
    subprocess.run(["rm", "-rf", str(root)], check=True)


def make(work: Path, script: Callable[[], None]) -> None:
    """Run `script` in the work directory, as the job."""

    def inside() -> None:
        os.chdir(work)
        script()

    assert os.waitstatus_to_exitcode(os.waitpid(as_job(inside), 0)[1]) == 0


# ---- what is an output -------------------------------------------------------------------------------------


def test_by_default_what_is_new_or_changed_since_unpacking(work: Path):
    def unpacked() -> None:
        for name in ("kept", "changed", "touched", "replaced", "renamed", "removed", "same"):
            Path(name).write_text("same")

    make(work, unpacked)
    before = snapshot(str(work))

    def job() -> None:
        Path("changed").write_text("diff")
        os.utime("touched", (1, 1))
        Path("new").write_text("same")
        os.rename("new", "replaced")
        os.rename("renamed", "moved")
        os.unlink("removed")
        Path("sub/deep").mkdir(parents=True)
        Path("sub/deep/made").write_text("made")
        for pruned in (Path("__pycache__"), Path("sub/__pycache__/x")):
            pruned.mkdir(parents=True)
            (pruned / "main.pyc").write_text("no")

    make(work, job)
    files, omitted = collected(work, None, before)
    assert files == {
        "changed": b"diff",
        "touched": b"same",
        "replaced": b"same",
        "moved": b"same",
        "sub/deep/made": b"made",
    }
    assert omitted == 0


def test_change_within_the_clock_tick_of_unpacking_is_seen(work: Path):
    """Time stamps go by ticks of up to 10 ms, and a warm job runs within one: 30 tries would miss some."""
    missed = 0
    for _ in range(30):
        (work / "a").write_bytes(b"12345")
        (work / "b").write_bytes(b"12345")
        before = snapshot(str(work))
        fd = os.open(work / "a", os.O_WRONLY)
        os.write(fd, b"1x345")
        os.close(fd)
        files, _ = collected(work, None, before)
        assert "b" not in files
        missed += "a" not in files
    assert missed == 0


def test_other_content_behind_the_same_time_stamp_is_seen(work: Path, monkeypatch: pytest.MonkeyPatch):
    """The same on a kernel before 6.13, which has no finer time stamps for files that were looked at."""
    monkeypatch.setattr("sandrun.sandbox.collect.time.clock_gettime_ns", lambda clock: 0)
    (work / "a").write_bytes(b"12345")
    (work / "b").write_bytes(b"12345")
    before = snapshot(str(work))
    former = (work / "a").stat()
    with open(work / "a", "r+b") as f:
        f.write(b"1x345")
    now = (work / "a").stat()
    before = before.replace(struct.pack("<Q", former.st_ctime_ns), struct.pack("<Q", now.st_ctime_ns))
    files, _ = collected(work, None, before)
    assert files.get("a") == b"1x345"


def test_snapshot_waits_for_the_next_tick_where_there_is_too_much_to_compare(
    work: Path, monkeypatch: pytest.MonkeyPatch
):
    (work / "a").write_bytes(bytes(2_000_000))
    changed = (work / "a").stat().st_ctime_ns
    clock = iter([changed, changed, changed, changed + 1])
    monkeypatch.setattr("sandrun.sandbox.collect.time.clock_gettime_ns", lambda number: next(clock))
    snapshot(str(work))
    assert next(clock, None) is None


def test_snapshot_does_not_wait_long_for_a_clock_set_back(work: Path, monkeypatch: pytest.MonkeyPatch):
    (work / "a").write_bytes(bytes(2_000_000))
    monkeypatch.setattr("sandrun.sandbox.collect.time.clock_gettime_ns", lambda clock: 0)
    start = time.monotonic()
    snapshot(str(work))
    assert time.monotonic() - start < 10


def test_asked_for_are_unchanged_files_too_and_pycache(work: Path):
    for name in ("a", "__pycache__"):
        (work / name).mkdir()
    for name in ("a/b.txt", "a/c.txt", "__pycache__/d", "e"):
        (work / name).write_text(name)
    before = snapshot(str(work))
    assert set(collected(work, ("a/c.txt", "__pycache__"), before)[0]) == {"a/c.txt", "__pycache__/d"}
    assert collected(work, (), before) == ({}, 0)


@pytest.mark.requirement(31)
def test_what_matches_no_pattern_is_not_sent(work: Path):
    for name in ("secret.txt", "out.txt"):
        (work / name).write_text(name)
    assert b"secret" not in stream_of(work, ("out.*",))


# ---- hostile trees -----------------------------------------------------------------------------------------


def test_links_are_not_followed_in_any_component(work: Path, tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")

    def job() -> None:
        os.symlink("/etc/passwd", "file")
        os.symlink(tmp_path / "outside", "directory")
        os.symlink(".", "loop")
        os.symlink("self", "self")
        Path("real").mkdir()
        Path("real/ok").write_text("ok")
        os.symlink("real", "alias")

    make(work, job)
    assert collected(work) == ({"real/ok": b"ok"}, 0)
    assert collected(work, ("file", "directory/secret", "loop/**", "alias/ok", "**")) == ({"real/ok": b"ok"}, 0)


def test_fifo_socket_and_loop_neither_hang_nor_are_sent(work: Path):
    def job() -> None:
        os.mkfifo("fifo")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket")
        Path("ok").write_text("ok")

    make(work, job)
    start = time.monotonic()
    assert collected(work, ("**",)) == ({"ok": b"ok"}, 0)
    assert time.monotonic() - start < 5


@pytest.mark.root
def test_device_is_not_opened(work: Path):
    os.mknod(work / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    assert collected(work, ("**",)) == ({}, 0)


@pytest.mark.parametrize("becomes", ["link", "fifo", "directory", "other file", "nothing"])
def test_file_that_becomes_something_else_before_it_is_opened_is_not_sent(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
):
    """No process is alive when outputs are collected; this holds even if one were."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (work / "a").write_text("a")
    (work / "b").write_text("b")
    real = os.stat

    def stat_and_swap(path: str, *, dir_fd: int, follow_symlinks: bool) -> os.stat_result:
        found = real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if path == "a":
            os.rename("a", "old", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            match becomes:
                case "link":
                    os.symlink(secret, "a", dir_fd=dir_fd)
                case "fifo":
                    os.mkfifo("a", dir_fd=dir_fd)
                case "directory":
                    os.mkdir("a", dir_fd=dir_fd)
                case "other file":
                    os.close(os.open("a", os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd))
        return found

    with monkeypatch.context() as patched:  # pytest tells a failure by stat
        patched.setattr("sandrun.sandbox.collect.os.stat", stat_and_swap)
        found = collected(work)
    assert found == ({"b": b"b"}, 1)


def test_directory_that_moves_while_it_is_read_ends_the_walk(work: Path):
    """Going up from a moved directory leads elsewhere: nothing from there may be sent."""

    def job() -> None:
        Path("a/b").mkdir(parents=True)
        Path("a/b/large").write_bytes(bytes(1_000_000))
        Path("elsewhere").mkdir()
        Path("elsewhere/secret").write_text("secret")

    make(work, job)
    end, start = os.pipe()
    pid = as_job(lambda: collect(str(work), ("a",), b"", start))
    os.close(start)
    with open(end, "rb") as pipe:
        stream = pipe.read(1000)  # it is in the middle of the file, and the pipe is full
        os.rename(work / "a/b", work / "elsewhere/b")
        stream += pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"secret" not in stream
    assert stream.endswith(module.FRAME.pack(module.END, 1))


@pytest.mark.requirement(24, 31)
def test_modes_of_nothing_do_not_hide_outputs(work: Path):
    def job() -> None:
        for name, mode in (("a", 0o000), ("b", 0o300), ("c", 0o400), ("d", 0o100)):
            Path(name, "in").mkdir(parents=True)
            Path(name, "in", "file").write_text(name)
            os.chmod(Path(name, "in", "file"), 0)
            os.chmod(Path(name, "in"), mode)
            os.chmod(name, mode)
        os.chmod(".", 0)

    make(work, job)
    assert collected(work) == ({f"{name}/in/file": name.encode() for name in "abcd"}, 0)


@pytest.mark.requirement(24, 31)
def test_deep_trees_cost_no_descriptors_and_end_where_paths_do(work: Path):
    def job() -> None:
        for depth in range(2500):
            os.mkdir("d")
            os.chdir("d")
            if depth in (1499, 2400):
                Path("file").write_text(str(depth))

    make(work, job)
    end, start = os.pipe()

    def limited() -> None:
        os.dup2(start, 3)
        os.closerange(4, 4096)
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
        collect(str(work), None, b"", 3)

    pid = as_job(limited)
    os.close(start)
    with open(end, "rb") as pipe:
        stream = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"d/" * 1500 + b"file" in stream
    assert b"2400" not in stream
    assert stream.endswith(module.FRAME.pack(module.END, 1))


@pytest.mark.requirement(24, 31)
def test_sparse_files_count_by_apparent_size(work: Path):
    (work / "sparse").touch()
    os.truncate(work / "sparse", 400 << 20)
    (work / "z").write_text("after it")
    start = time.monotonic()
    assert collected(work) == ({"z": b"after it"}, 1)
    assert time.monotonic() - start < 5


def test_counts_and_sizes_are_bounded(work: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(10):
        (work / f"{number}").write_bytes(b"x" * 100)
    monkeypatch.setattr(module, "FILES", 7)
    found, omitted = collected(work)
    assert (sorted(found), omitted) == (list("0123456"), 3)
    monkeypatch.setattr(module, "OUTPUT_BYTES", 450)
    found, omitted = collected(work)
    assert (sorted(found), omitted) == (list("0123"), 6)
    monkeypatch.setattr(module, "ENTRIES", 3)
    found, omitted = collected(work)
    assert (len(found), omitted) == (3, 1)


@pytest.mark.requirement(24, 31)
def test_fifty_thousand_entries_are_walked_in_seconds(work: Path):
    def job() -> None:
        for outer in range(50):
            os.mkdir(f"{outer}")
            for inner in range(998):
                os.close(os.open(f"{outer}/{inner}", os.O_CREAT | os.O_WRONLY))

    make(work, job)
    start = time.monotonic()
    assert collected(work, ("**/*.csv",)) == ({}, 0)
    found, omitted = collected(work)
    assert (len(found), omitted) == (10_000, 39_900)
    assert time.monotonic() - start < 20


def test_hard_links_count_for_each_name(work: Path, monkeypatch: pytest.MonkeyPatch):
    (work / "0").write_bytes(b"x" * 100)
    for number in range(1, 6):
        os.link(work / "0", work / f"{number}")
    monkeypatch.setattr(module, "OUTPUT_BYTES", 250)
    found, omitted = collected(work)
    assert (len(found), omitted) == (2, 4)


@pytest.mark.requirement(32)
def test_odd_names_arrive_byte_for_byte(work: Path):
    names = [b"new\nline", b"\xff\xfe", b"\xe2\x80\xaetxt.exe", b"x" * 255, b"a\\b", b"-rf", b"\x1b[2J", b" ", b"..."]
    for name in names:
        with open(os.path.join(os.fsencode(work), name), "wb") as f:
            f.write(name)
    stream = stream_of(work)
    for name in names:
        assert module.FRAME.pack(module.BEGIN, 8 + len(name)) + module.SIZE.pack(len(name)) + name in stream
    found, omitted = collected(work)
    assert (len(found), omitted) == (len(names), 0)
    assert found["\\xff\\xfe"] == b"\xff\xfe"


def test_file_that_cannot_be_read_to_its_end_is_marked(work: Path, monkeypatch: pytest.MonkeyPatch):
    (work / "a").write_bytes(b"x" * 300_000)
    (work / "b").write_bytes(b"b")
    real, calls = os.read, 0

    def failing(fd: int, size: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error")
        return real(fd, size)

    monkeypatch.setattr("sandrun.sandbox.collect.os.read", failing)
    assert collected(work) == ({"b": b"b"}, 2)  # told by the reader and by the collector


def test_work_directory_that_is_gone_or_replaced_gives_no_outputs(work: Path, tmp_path: Path):
    assert collected(tmp_path / "missing") == ({}, 1)
    (work / "real").mkdir()
    (work / "real/file").write_text("1")
    (work / "link").symlink_to("real")
    assert collected(work / "link") == ({}, 1)


def test_nobody_listening_is_an_error(work: Path):
    (work / "a").write_text("a")
    end, start = os.pipe()
    os.close(end)
    with pytest.raises(BrokenPipeError):
        collect(str(work), None, b"", start)
    os.close(start)


def test_slow_reader_gets_everything(work: Path):
    content = os.urandom(1_000_000)
    (work / "a").write_bytes(content)
    end, start = os.pipe()
    pid = as_job(lambda: collect(str(work), None, b"", start))
    os.close(start)
    received = 0
    while piece := os.read(end, 50_000):
        received += len(piece)
        time.sleep(0.001)
    os.close(end)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert received > len(content)


def test_no_descriptor_is_left_open(work: Path):
    (work / "a/b").mkdir(parents=True)
    (work / "a/b/c").write_text("c")
    before = os.listdir("/proc/self/fd")
    snapshot(str(work))
    with open("/dev/null", "wb") as sink:
        collect(str(work), None, b"", sink.fileno())
    assert os.listdir("/proc/self/fd") == before


# ---- globs -------------------------------------------------------------------------------------------------

GLOBS = [
    ("out.csv", "out.csv", True),
    ("out.csv", "sub/out.csv", False),
    ("./out.csv", "out.csv", True),
    ("out//b/", "out/b", True),
    ("out", "out/deep/er", True),
    ("out", "outer", False),
    ("*.csv", "a.csv", True),
    ("*.csv", ".csv", True),
    ("*.csv", "sub/a.csv", False),
    ("*.csv", "a.csv/below", True),
    ("*.csv", "a.csvx", False),
    ("*", "a/b", True),
    ("*/b", "a/b", True),
    ("*/b", "b", False),
    ("**", "a", True),
    ("**", "a/b/c", True),
    ("**/*.png", "a.png", True),
    ("**/*.png", "x/y/a.png", True),
    ("**/*.png", "x/y/a.jpg", False),
    ("a/**", "a/b", True),
    ("a/**", "a", False),
    ("a/**/z", "a/z", True),
    ("a/**/z", "a/b/c/z", True),
    ("a/**/z", "b/z", False),
    ("a/**/b/**/c", "a/b/c", True),
    ("a/**/b/**/c", "a/x/b/y/b/c", True),
    ("a/**/b/**/c", "a/c/b", False),
    ("**/**", "a", True),
    ("a**b", "axxb", True),
    ("a**b", "a/b", False),
    ("?.txt", "a.txt", True),
    ("?.txt", "é.txt", True),
    ("?.txt", "ab.txt", False),
    ("a?b", "a/b", False),
    ("[abc].t", "b.t", True),
    ("[!abc].t", "b.t", False),
    ("[^abc].t", "d.t", True),
    ("[!a]", "/", False),
    ("x[!a]y", "x/y", False),
    ("x[+-9]y", "x/y", False),
    ("x[+-9]y", "x5y", True),
    ("[]]", "]", True),
    ("[!]]", "]", False),
    ("[a-]", "-", True),
    ("[z-a]", "m", False),
    ("[!z-a]", "m", True),
    ("[", "[", True),
    ("[ab", "[ab", True),
    ("[&&a~~b||c]", "&", True),
    ("[\\]", "\\", True),
    ("a.c", "abc", False),
    ("*.*", "new\nline.x", True),
    ("(a|b)+", "(a|b)+", True),
    ("$^", "$^", True),
]


@pytest.mark.parametrize(("pattern", "path", "expected"), GLOBS)
def test_glob(pattern: str, path: str, expected: bool):
    assert Selection((pattern,)).matches(path) is expected


def test_any_of_several_globs_will_do():
    selection = Selection(("a", "b/*.txt", "**/c"))
    assert [path for path in ("a", "b/x.txt", "x/c", "d", "b/x") if selection.matches(path)] == ["a", "b/x.txt", "x/c"]


def reference(pattern: list[str], path: list[str]) -> bool:
    """The definition, by trying everything."""
    if not pattern:
        return True  # all below what matched
    if pattern[0] == "**":
        if all(part == "**" for part in pattern):
            return bool(path)
        return any(reference(pattern[1:], path[skip:]) for skip in range(len(path) + 1))
    return bool(path) and component(pattern[0], path[0]) and reference(pattern[1:], path[1:])


def component(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(component(pattern[1:], name[skip:]) for skip in range(len(name) + 1))
    return bool(name) and (pattern[0] in ("?", name[0])) and component(pattern[1:], name[1:])


PARTS = st.text("ab*?", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(PARTS | st.just("**"), min_size=1, max_size=5),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5),
)
@example(["*a*b"], ["aabab"])
@example(["**", "a", "*b", "**", "a"], ["a", "a", "b", "a"])
def test_globs_mean_what_the_definition_says(pattern: list[str], path: list[str]):
    assert Selection(("/".join(pattern),)).matches("/".join(path)) is reference(pattern, path)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\0"), max_size=20))
def test_any_text_is_a_glob(pattern: str):
    Selection((pattern, f"[{pattern}]*")).matches("some/path")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*a" * 100 + "*b", "a" * 255),
        ("*a" * 100, "a" * 254 + "b"),
        ("?*" * 100 + "b", "a" * 255),
        ("**/a/" * 200 + "b", "a/" * 2000 + "c"),
        ("**/*a*a/" * 100 + "b", "aaaa/" * 800 + "c"),
        ("**/?*/" * 300 + "b", "a/" * 2000 + "c"),
    ],
)
def test_no_glob_takes_forever(pattern: str, path: str):
    def overdue(number: int, frame: object) -> None:
        raise AssertionError("took more than 2 s")

    selection = Selection((pattern,))
    before = signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        assert not selection.matches(path) or re.search("/b", path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
