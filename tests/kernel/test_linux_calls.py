"""Tables of system calls do what they say, and what fails ends them by its name."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

import pytest

from sandrun.linux import calls as module
from sandrun.linux import libc
from sandrun.linux.calls import ANYTHING, SCRATCH, TREE, Calls, Slot, Slots, Tables
from sandrun.sandbox import job, messages, rootfs
from sandrun.spawner import protocol
from tests.kernel.children import errno_of, in_child

C_SOURCE = (Path(__file__).parents[2] / "src/sandrun/linux/calls.c").read_text()


def test_calls_are_made_in_order_and_the_first_that_fails_ends_them(tmp_path):
    calls, slots = Calls(), Slots()
    for name in ("a", "missing/b", "c"):
        calls.call("mkdirat", module.AT_FDCWD, os.fsencode(tmp_path / name), 0o700, about=name)
    with pytest.raises(FileNotFoundError, match=r"mkdirat: missing/b: No such file or directory"):
        calls.run(slots)
    assert os.listdir(tmp_path) == ["a"]


def test_a_result_is_kept_in_its_slot_and_passed_on(tmp_path):
    file = tmp_path / "file"
    calls, slots = Calls(), Slots()
    flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
    calls.call("openat", module.AT_FDCWD, os.fsencode(file), flags, 0o600, store=SCRATCH)
    calls.call("write", SCRATCH, b"text", 4, expected=4)
    calls.call("close", SCRATCH)
    calls.run(slots)
    assert file.read_bytes() == b"text"
    assert errno_of(os.fstat, slots[SCRATCH]) == errno.EBADF
    calls.run(slots)  # a table can be carried out again
    assert slots[TREE] == -1


def test_a_result_that_is_not_the_expected_one_is_a_failure():
    calls = Calls()
    calls.call("write", 1 << 20, b"text", 4, about="nowhere", store=SCRATCH, expected=ANYTHING)
    slots = Slots()
    calls.run(slots)
    assert slots[SCRATCH] == -errno.EBADF
    calls.call("getpid", expected=1, about="not ours")
    with pytest.raises(OSError, match="getpid: not ours") as caught:
        calls.run()
    assert caught.value.errno == 0


def test_what_was_read_is_compared():
    calls = Calls()
    where = calls.buffer(4096)
    calls.call("getcwd", where, 4096)
    calls.equal(where, os.fsencode(os.getcwd()) + b"\0", error=errno.EPERM, about="another directory")
    calls.run()
    calls.equal(where, b"elsewhere", error=errno.EPERM, about="another directory")
    with pytest.raises(PermissionError, match="another directory"):
        calls.run()


def test_a_slot_is_placed_in_a_structure():
    calls, slots = Calls(), Slots()
    where = calls.buffer(12, b"\xff" * 12)
    slots[SCRATCH] = 0x01020304
    calls.place(where + 4, SCRATCH)
    calls.run(slots)
    assert ctypes.string_at(where, 12) == b"\xff" * 4 + b"\4\3\2\1" + b"\xff" * 4


@pytest.mark.requirement(12)
def test_all_descriptors_are_closed_but_the_own_ones():
    """Not in order, one of them below those that are foreign, one that is not there."""
    own = {TREE: 70, SCRATCH: 50, Slot(20): 900, Slot(21): 1, Slot(22): -1}

    def close() -> None:
        slots, calls = Slots(), Calls()
        for slot, number in own.items():
            slots[slot] = number
        for number in (49, 50, 51, 69, 70, 71, 899, 900, 901, 1023):
            os.dup2(1, number)
        calls.close_foreign(own)
        calls.run(slots)
        left = [number for number in range(1100) if errno_of(os.fstat, number) == 0]
        os._exit(0 if left == [0, 1, 2, 50, 70, 900] else 1)

    def probe() -> int:
        pid = os.fork()
        if pid == 0:
            close()
        return os.waitpid(pid, 0)[1]

    assert in_child(probe) == 0


# ---- what is written down twice ----------------------------------------------------------------------------


def in_c(pattern: str) -> str:
    (found,) = re.findall(pattern, C_SOURCE, re.DOTALL)
    return str(found)


def test_slots_have_the_same_numbers_in_c():
    *names, entries = in_c(r"enum \{ (CONTROL, [A-Z_, ]+) \};").split(", ")
    assert [getattr(module, name) for name in names] == list(range(len(names)))
    assert entries == "ENTRIES"
    assert list(module.ENTRIES) == list(range(len(names), len(names) + int(in_c(r"MOST_ENTRIES = (\d+)"))))
    assert int(in_c(r"\bSLOTS = (\d+)")) == module._SLOTS
    others = ("SNAPSHOT", "PROC", "SEEN", "SCRATCH", "TREE", "READY")
    numbers = [*range(len(names)), *module.ENTRIES, *(getattr(module, name) for name in others)]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < module._SLOTS
    for name in ("JOB", "COLLECTOR"):
        assert int(in_c(rf"\b{name} = (\d+)")) == getattr(module, name)
    for name in ("COPY", "EQUAL", "CLOSE_FOREIGN", "PLACE", "DECIMAL", "SUCCESS", "ANYTHING"):
        assert int(in_c(rf"\b{name} = (-\d+)")) == getattr(module, name)


def test_messages_are_the_same_in_c():
    assert in_c(r"\*at\+\+ = '(.)';").encode() == messages.FAILED
    assert in_c(r"struct exited told = \{\s+'(.)'").encode() == messages.EXITED
    assert in_c(r'NR_write, slots\[CONTROL\], "(.)", 1').encode() == messages.DONE
    kinds = in_c(r"message\[0\] != ('.' && message\[0\] != '.')")
    assert {messages.ASSIGN, messages.ASSIGN_COLLECT} == {kinds[1].encode(), kinds[-2].encode()}
    assert in_c(r"\*collect = message\[0\] == '(.)'").encode() == messages.ASSIGN_COLLECT
    assert int(in_c(r"HIT_STORAGE = (\d+)")) == messages.HIT_STORAGE
    assert int(in_c(r"SETUP_FAILED = (\d+)")) == job.SETUP_FAILED
    assert in_c(r'NR_statfs, "([^"]+)"') == rootfs.WORK


def test_messages_of_a_zygote_are_the_same_in_c():
    assert in_c(r"asked\.kind != '(.)'").encode() == protocol.SPAWN
    assert in_c(r"struct answer said = \{'(.)'").encode() == protocol.SPAWNED
    assert in_c(r"said = \{\{'(.)'").encode() == protocol.REFUSED
    for name in ("HAS_STORAGE", "HAS_CGROUP"):
        assert int(in_c(rf"\b{name} = (\d+)")) == getattr(protocol, name)
    assert int(in_c(r"\bDESCRIPTORS = (\d+)")) == protocol.MAX_DESCRIPTORS
    assert protocol._SPAWN.size == 24  # struct spawn has no holes


# ---- a fork server -----------------------------------------------------------------------------------------


def ends_as(message: bytes | None, descriptors: int, *, entries: int = 0) -> int:
    """The exit status of a fork server that is asked this; None closes its connection."""

    def probe() -> int:
        ours, theirs = protocol.pair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            empty = Tables(Calls(), Calls(), Calls(), Calls())
            module.ForkServer(theirs.fileno(), empty, entries=entries, uids=None).serve()
            os._exit(77)
        theirs.close()
        if message is not None:
            protocol.send(ours, message, [0] * descriptors)
        else:
            ours.close()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return int(in_child(probe))


SPAWN = protocol.Spawn(0, 0, 7, 1, 2, 1 << 20).encode()


def test_fork_server_ends_with_its_spawner():
    assert ends_as(None, 0) == 0


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        pytest.param(SPAWN[:-1], 2, id="cut"),
        pytest.param(SPAWN + b"x", 2, id="too long"),
        pytest.param(b"S" + SPAWN[1:], 2, id="another kind"),
        pytest.param(SPAWN, 1, id="a descriptor too few"),
        pytest.param(SPAWN, 3, id="a descriptor too many"),
        pytest.param(SPAWN, 30, id="more descriptors than fit"),
        pytest.param(protocol.Spawn(protocol.HAS_STORAGE, 0, 7, 1, 2, 1).encode(), 2, id="no storage"),
        pytest.param(protocol.Spawn(0, 1, 7, 1, 2, 1).encode(), 3, id="another number of entries"),
    ],
)
def test_fork_server_ends_when_the_table_of_messages_is_broken(message: bytes, descriptors: int):
    assert ends_as(message, descriptors) == 1


def test_more_entries_than_there_are_slots_for_are_refused():
    many = len(module.ENTRIES) + 1
    assert ends_as(protocol.Spawn(0, many, 7, 1, 2, 1).encode(), 2 + many, entries=many) == 1


def test_a_slots_value_is_written_as_text():
    calls, slots = Calls(), Slots()
    where = calls.buffer(24, b"x" * 24)
    slots[SCRATCH] = (1 << 62) + 5
    calls.decimal(where, SCRATCH)
    calls.run(slots)
    assert ctypes.string_at(where, 20) == b"4611686018427387909x"


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_numbers_of_system_calls_are_libseccomps(machine: str, architecture: int):
    resolve = ctypes.CDLL("libseccomp.so.2")["seccomp_syscall_resolve_name_arch"]
    resolve.argtypes, resolve.restype = [ctypes.c_uint32, ctypes.c_char_p], ctypes.c_int
    block = in_c(rf"defined\(__{machine}__\)\nenum \{{(.*?)\}};")
    in_source = {name: int(number) for name, number in re.findall(r"NR_(\w+) = (\d+)", block)}
    assert len(in_source) == 15
    for name, number in {**libc._COMMON, **libc._BY_MACHINE[machine], **in_source}.items():
        known = resolve(architecture, name.encode())
        assert known in (number, -1), name  # -1: this libseccomp is older than the call
    assert set(libc._BY_MACHINE["x86_64"]) == set(libc._BY_MACHINE["aarch64"])
