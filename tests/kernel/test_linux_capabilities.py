"""Capability sets are given up for good, and the kernel is asked whether they are."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import tempfile

import pytest

from sandrun.linux import capabilities, libc, process
from sandrun.linux.calls import Calls
from tests.kernel.children import errno_of, in_child

NOTHING = {"inh": 0, "prm": 0, "eff": 0, "bnd": 0, "amb": 0}
PR_CAP_AMBIENT_RAISE = 2


def keep(names: list[str]) -> None:
    calls = Calls()
    capabilities.add_keep(calls, names)
    calls.run()


def fill_inheritable_and_ambient() -> None:
    """Put CAP_KILL where a change of uid and an execve keep it."""
    bit = 1 << capabilities.CAP_KILL
    held = capabilities.read()
    low, high = held["prm"] & 0xFFFFFFFF, held["prm"] >> 32
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.syscall(libc.SYS["capset"], header, (ctypes.c_uint32 * 6)(low, low, bit, high, high, 0))
    process._prctl(process.PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capabilities.CAP_KILL, 0, 0)


@pytest.mark.requirement(3)
def test_all_five_sets_are_empty_afterwards():
    def probe():
        fill_inheritable_and_ambient()
        before = capabilities.read()
        capabilities.drop_bounding()
        capabilities.clear()
        return before, capabilities.read()

    before, after = in_child(probe)
    assert all(before.values())
    assert after == NOTHING


@pytest.mark.requirement(3)
def test_a_program_run_by_uid_0_gains_nothing_back():
    def probe():
        capabilities.drop_bounding()
        capabilities.clear()
        return subprocess.run(["/bin/cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout

    lines = dict(line.split(":\t", 1) for line in in_child(probe).splitlines() if line.startswith(("Cap", "Uid")))
    assert lines.pop("Uid").split()[0] == "0" or os.geteuid() != 0
    assert {name: int(value, 16) for name, value in lines.items()} == {f"Cap{key.title()}": 0 for key in NOTHING}


def test_clear_alone_leaves_the_bounding_set_to_drop_bounding():
    def probe():
        capabilities.clear()
        return capabilities.read(), errno_of(capabilities.drop_bounding)

    after, code = in_child(probe)
    assert after.pop("bnd") != 0
    assert not any(after.values())
    assert code == errno.EPERM  # which is why the bounding set comes first


@pytest.mark.root
def test_what_a_capability_allowed_is_refused_without_it():
    with tempfile.NamedTemporaryFile() as file:

        def probe():
            allowed = errno_of(os.chown, file.name, 1, 1)
            capabilities.clear()
            return allowed, errno_of(os.chown, file.name, 2, 2)

        assert in_child(probe) == (0, errno.EPERM)


def test_keep_holds_just_those_named():
    def probe():
        fill_inheritable_and_ambient()
        keep(["CAP_KILL", "CAP_SETUID", "CAP_PERFMON"])
        kept = capabilities.read()
        keep(["CAP_KILL"])
        return kept, capabilities.read(), errno_of(keep, ["CAP_SETUID"])

    kept, fewer, again = in_child(probe)
    mask = 1 << 5 | 1 << 7 | 1 << 38  # in the low and in the high half
    assert (kept["eff"], kept["prm"], kept["inh"], kept["amb"]) == (mask, mask, 0, 0)
    assert (fewer["eff"], fewer["prm"]) == (1 << 5, 1 << 5)
    assert again == errno.EPERM


def test_keep_refuses_a_name_that_is_no_capability():
    with pytest.raises(KeyError):
        in_child(lambda: keep(["CAP_TYPO"]))


@pytest.mark.requirement(3)
@pytest.mark.parametrize("names", [[], ["CAP_KILL"]])
def test_a_kernel_that_keeps_capabilities_is_noticed(names, monkeypatch):
    monkeypatch.setitem(libc.SYS, "capset", libc.SYS["getpid"])
    with pytest.raises(OSError, match="capset: the kernel kept") as caught:
        in_child(lambda: keep(names))
    assert caught.value.errno == errno.EPERM


def test_last_capability_is_the_kernels():
    with open("/proc/sys/kernel/cap_last_cap") as file:
        assert capabilities.last_cap() == int(file.read())


def test_sets_of_another_process_can_be_read():
    def probe():
        pid, _ = process.clone3(0)
        if pid == 0:
            os._exit(0)
        capabilities.clear()
        return capabilities.read("self"), capabilities.read(os.readlink("/proc/self"))

    own, by_number = in_child(probe)
    assert own == by_number
