"""Memory put into huge pages: the same bytes, and a child's own where it writes."""

from __future__ import annotations

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
