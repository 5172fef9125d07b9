"""Trees that a job leaves behind to choke whoever reads or removes them."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest

from sandrun.model import MIB
from tests import host, serving
from tests.escape.limits import metadata, need
from tests.serving import Api

pytestmark = pytest.mark.requirement(24)


def outputs(api: Api, code: str, **request: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The result of a kept job and its output files by path. Not even a hostile tree takes long."""
    began = time.monotonic()
    result = api.run(code, outputs=["**"], keep=True, **request)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0), result
    assert time.monotonic() - began < host.within(20)
    return result, {file["path"]: file for file in result["output_files"] if file["path"] != "main.py"}


def test_store_has_at_most_50_000_inodes(api: Api, running_server: serving.Server) -> None:
    """Then ENOSPC, though hardly a byte is used; they are gone with the job."""
    code = """
count = 0
try:
    while True:
        open(f"/tmp/{count}", "x").close()
        count += 1
except OSError as error:
    print(count, error.errno)
"""
    result = api.run(code, timeout=60)
    assert result["outcome"] == "exited", result
    count, errno = map(int, result["stdout"].split())
    assert 49_900 < count < 50_000
    assert errno == 28
    assert result["limits_hit"] == ["storage"]
    assert running_server.idle()


@pytest.mark.requirement(31)
def test_ten_thousand_outputs_are_taken_and_the_rest_is_told(api: Api) -> None:
    code = "for number in range(10_500): open(f'{number:05}', 'x').close()"
    result, files = outputs(api, code)
    assert len(result["output_files"]) == 10_000
    assert result["outputs_omitted"] == 501  # main.py too
    assert next(iter(files)) == "00000"
    assert api.http.delete(f"/jobs/{result['job_id']}").status_code == 204


def test_sparse_file_counts_by_its_apparent_size(api: Api) -> None:
    """400 MB of nothing: no output, and no memory of anybody's."""
    result, files = outputs(api, "open('sparse', 'w').truncate(400 << 20); open('small', 'w').write('x')", memory_mb=64)
    assert list(files) == ["small"]
    assert result["outputs_omitted"] == 1
    if metadata(result)["memory_peak_bytes"] is not None:
        assert metadata(result)["memory_peak_bytes"] < 64 * MIB


def test_sparse_file_of_a_size_that_fits_is_zeros(api: Api) -> None:
    _, files = outputs(api, "open('sparse', 'w').truncate(20 << 20)", memory_mb=64)
    assert files["sparse"]["size"] == 20 * MIB
    assert files["sparse"]["sha256"] == hashlib.sha256(bytes(20 * MIB)).hexdigest()


def test_many_sparse_files_are_bounded_together(api: Api) -> None:
    """256 MB in all, holes counted: two of 100 MB, not three."""
    code = "for number in range(5): open(f'sparse{number}', 'w').truncate(100 << 20)"
    result, files = outputs(api, code, memory_mb=64)
    assert len(files) == 2
    assert result["outputs_omitted"] == 3
    assert api.http.delete(f"/jobs/{result['job_id']}").status_code == 204


@pytest.mark.parametrize("levels", [1500, 6000])
def test_deep_tree_is_walked_and_cleaned_up(levels: int, api: Api, running_server: serving.Server) -> None:
    """What lies deeper than a path can say is left out, and told."""
    code = f"""
import os
open("top", "w").write("x")
for _ in range({levels}):
    os.mkdir("d")
    os.chdir("d")
open("bottom", "w").write("deep")
"""
    result, files = outputs(api, code)
    deep = "d/" * levels + "bottom"
    assert ("top" in files, deep in files) == (True, levels == 1500)
    assert result["outputs_omitted"] == (0 if levels == 1500 else 1)
    if levels == 1500:
        assert api.download(result["job_id"], deep) == b"deep"
    assert running_server.idle()


@pytest.mark.requirement(31)
def test_modes_hide_nothing_and_keep_nothing(api: Api, running_server: serving.Server) -> None:
    code = """
import os
for name, mode in (("closed", 0), ("unlisted", 0o300), ("unentered", 0o400)):
    os.makedirs(f"{name}/below")
    open(f"{name}/below/file", "w").write(name)
    os.chmod(f"{name}/below/file", 0)
    os.chmod(f"{name}/below", mode)
    os.chmod(name, mode)
"""
    result, files = outputs(api, code)
    assert set(files) == {f"{name}/below/file" for name in ("closed", "unlisted", "unentered")}
    assert api.download(result["job_id"], "closed/below/file") == b"closed"
    assert running_server.idle()


@pytest.mark.requirement(31)
def test_empty_file_is_an_output(api: Api) -> None:
    result, files = outputs(api, "open('empty', 'w').close()")
    assert (files["empty"]["size"], files["empty"]["sha256"]) == (0, hashlib.sha256().hexdigest())
    assert api.download(result["job_id"], "empty") == b""


@pytest.mark.requirement(31)
def test_links_are_no_outputs_and_lead_nowhere(api: Api) -> None:
    """To files and folders of the host, of the sandbox, to each other and to themselves."""
    code = """
import os
os.makedirs("real/deep")
open("real/file", "w").write("mine")
targets = ["/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/fd", "/", "..", "real", "real/file", "self",
           "/job/real/file", "/usr/bin/python3", "/dev/zero", "/dev/random", "/proc/self/mem"]
for number, target in enumerate(targets):
    os.symlink(target, f"link{number}")
os.symlink("self", "self")
os.symlink("two", "one"); os.symlink("one", "two")
os.symlink("../..", "real/deep/up")
os.link("real/file", "hard")
"""
    result, files = outputs(api, code)
    assert set(files) == {"real/file", "hard"}
    for path in ("link0", "link7", "link6/file", "self", "real/deep/up/real/file"):
        assert api.http.get(f"/download/{result['job_id']}/{path}").status_code == 404
    assert api.download(result["job_id"], "hard") == b"mine"


@pytest.mark.requirement(31)
def test_folder_that_is_swapped_for_a_link_leads_nowhere(api: Api) -> None:
    """By a process that lives until the very end."""
    code = """
import os, time
os.mkdir("folder"); open("folder/passwd", "w").write("mine")
if os.fork() == 0:
    while True:
        os.rename("folder", "aside"); os.symlink("/etc", "folder")
        os.unlink("folder"); os.rename("aside", "folder")
time.sleep(0.1)
"""
    for _ in range(5):
        result, files = outputs(api, code)
        for path in files:
            assert api.download(result["job_id"], path) == b"mine"


@pytest.mark.requirement(31)
def test_special_files_cannot_be_made(api: Api) -> None:
    """Nor FIFOs and sockets, at which a reader would wait for ever: EPERM."""
    code = """
import os, socket, stat
for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
    try:
        os.mknod("special", kind | 0o666, os.makedev(1, 5))
    except OSError as error:
        print(error.errno)
one, two = socket.socketpair()
try:
    one.bind("socket")
except OSError as error:
    print(error.errno)
"""
    result, files = outputs(api, code)
    assert result["stdout"].split() == ["1"] * 5
    assert files == {}


def test_removed_and_open_files_are_no_outputs(api: Api) -> None:
    _, files = outputs(api, "import os; kept = open('gone', 'w'); kept.write('x'); kept.flush(); os.unlink('gone')")
    assert files == {}


def test_outputs_of_a_job_at_its_memory_limit_are_collected(api: Api) -> None:
    """The store is full and the collector still has room to work."""
    need(api, "memory")
    code = """
done = 0
with open("big", "wb", buffering=0) as file:
    try:
        while True:
            done += file.write(bytes(1 << 20))
    except OSError:
        pass
print(done)
"""
    for memory_mb in (64, 256):
        result, files = outputs(api, code, memory_mb=memory_mb)
        assert files["big"]["size"] == int(result["stdout"]) > (memory_mb - 33) * MIB
        assert api.http.delete(f"/jobs/{result['job_id']}").status_code == 204
