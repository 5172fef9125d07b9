"""Unpacker and collector need nothing that a job may not do: they run under its filter (requirement 4)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from sandrun.linux import process, seccomp
from sandrun.sandbox.collect import collect, snapshot
from sandrun.sandbox.policy import job_policy
from sandrun.sandbox.unpack import unpack
from tests.collecting import JOB_ID
from tests.kernel.children import in_child
from tests.tars import directory, file, link, memory_file, packed


def confined() -> None:
    """Become an ordinary user under the job's filter, for good."""
    program = job_policy().compile()
    if os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split()[2] != "1":
        os.setgroups([])
        os.setresgid(JOB_ID, JOB_ID, JOB_ID)
        os.setresuid(JOB_ID, JOB_ID, JOB_ID)
    process.set_no_new_privs()
    seccomp.load(program)


@pytest.mark.requirement(4, 27, 31)
def test_unpacking_and_collecting_pass_the_jobs_filter():
    archive = packed(
        file(b"main.py", b"print(1)"),
        directory(b"empty"),
        file(b"deep/er/program", os.urandom(400_000), mode=b"0000755\0"),
        link(b"deep/link", b"../main.py"),
    )

    def inside() -> tuple[int, set[str], bytes]:
        with tempfile.TemporaryFile() as stream:
            confined()
            with pytest.raises(PermissionError):
                os.chroot("/")  # the filter is in force
            unpacked = unpack(fd, root)
            before = snapshot(root)
            made = Path(root, "deep/er/made")
            made.write_bytes(b"out")
            made.chmod(0)
            made.parent.chmod(0o300)
            Path(root, "deep").chmod(0o400)
            collect(root, None, before, stream.fileno())
            stream.seek(0)
            return unpacked, set(os.listdir(root)), stream.read()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root, memory_file(archive) as fd:
        os.chmod(root, 0o777)
        unpacked, found, stream = in_child(inside)
    assert unpacked == 400_008
    assert found == {"main.py", "empty", "deep"}
    assert b"deep/er/made" in stream
    assert b"main.py" not in stream
