"""Memory put into huge pages: the same bytes, and a child's own where it writes. And given back, and measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sandrun.linux import memory

CODE = """
import hashlib, mmap, os
from sandrun.linux import memory
area = mmap.mmap(-1, 4 * memory.HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(area), 4096):
    area[at : at + 8] = at.to_bytes(8, "little")
look = lambda: hashlib.sha256(area).hexdigest()
before = look()
count = memory.collapse()
assert look() == before
pid = os.fork()
if pid == 0:
    area[5 * 4096 : 5 * 4096 + 8] = b"changed!"
    same = [area[at : at + 8] == at.to_bytes(8, "little") for at in range(0, len(area), 4096)]
    os._exit(same.count(False) if not same[5] else 99)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
assert look() == before
print(count, open("/proc/self/smaps_rollup").read())
"""


def test_content_stays_and_a_child_changes_its_own_copy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, _, text = done.stdout.partition(" ")
    huge = re.search(r"AnonHugePages:\s*(\d+) kB", text)
    assert huge is not None
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no huge pages")
    if int(count) == 0:
        pytest.skip("this kernel cannot collapse memory (Linux 6.1)")
    assert int(huge[1]) * 1024 >= memory.HUGE_BYTES


TRIM = """
import os
from sandrun.linux import memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
kept = [bytes(4000) for _ in range(20_000)]
pinned = bytes(4000)
full = resident()
del kept
before = resident()
memory.trim()
print(full - before, before - resident())
"""


def test_freed_memory_is_given_back() -> None:
    """What is freed below something that is still in use stays libc's until it is told."""
    ran = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True, timeout=30)
    kept, given_back = map(int, ran.stdout.split())
    assert kept < 20
    assert given_back > 60


def test_available_memory_is_the_hosts() -> None:
    assert 0 < memory.available_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
