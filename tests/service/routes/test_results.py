"""What jobs wrote: logs, outputs, downloads."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import tarfile
from urllib.parse import quote

import pytest

from sandrun.jobs.job import job_tag
from sandrun.model import LOG_BYTES, MIB
from sandrun.sandbox import collect
from tests.service.api_world import World

# ---- logs --------------------------------------------------------------------------------------------------


@pytest.mark.requirement(33)
async def test_logs_as_text_json_and_bytes(api: World) -> None:
    job_id = await api.finished(stdout="grüß\n".encode() + b"\xff\xfe<script>", stderr=b"err")
    text = await api.http.get(f"/logs/{job_id}")
    assert text.text == "grüß\n��<script>err"
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert (await api.http.get(f"/logs/{job_id}?stream=stderr")).text == "err"
    assert (await api.http.get(f"/logs/{job_id}?stream=stdout&stdout=7")).text == "��<script>"
    told = (await api.http.get(f"/logs/{job_id}", headers={"Accept": "application/json"})).json()
    assert told == {
        "stdout": "grüß\n��<script>",
        "stderr": "err",
        "next": {"stdout": 17, "stderr": 3},
        "truncated": {"stdout": 0, "stderr": 0},
        "status": "completed",
    }
    octets = {"Accept": "application/octet-stream"}
    exact = await api.http.get(f"/logs/{job_id}?stream=stdout", headers=octets)
    assert exact.content == "grüß\n".encode() + b"\xff\xfe<script>"
    assert exact.headers["content-disposition"].startswith("attachment;")
    answer = await api.http.get(f"/logs/{job_id}", headers=octets)
    assert (answer.status_code, answer.json()["field"]) == (400, "stream")


@pytest.mark.requirement(33)
async def test_line_of_8_mb_and_a_full_stream(api: World) -> None:
    line = b"x" * (8 * MIB) + b"\n"
    job_id, sandbox = await api.submit()
    await api.write(sandbox, "stdout", line + b"y" * (3 * MIB))
    sandbox.end()
    await api.until(lambda: api.job(job_id).status.ended)
    answer = await api.http.get(f"/logs/{job_id}?stream=stdout")
    assert answer.content == (line + b"y" * (3 * MIB))[:LOG_BYTES]
    told = (await api.http.get(f"/logs/{job_id}", headers={"Accept": "application/json"})).json()
    assert told["truncated"]["stdout"] == len(line) + 3 * MIB - LOG_BYTES
    assert (await api.http.get(f"/status/{job_id}")).json()["limits_hit"] == ["output"]


@pytest.mark.parametrize("query", ["stream=all", "stdout=-1", "stdout=x", "stderr=1.5", "stdout=" + "9" * 30])
async def test_bad_log_parameter_is_refused_by_name(api: World, query: str) -> None:
    job_id = await api.finished(stdout=b"x")
    answer = await api.http.get(f"/logs/{job_id}?{query}")
    assert (answer.status_code, answer.json()["field"]) == (400, query.partition("=")[0])


async def test_offset_beyond_the_end_is_empty(api: World) -> None:
    job_id = await api.finished(stdout=b"abc")
    assert (await api.http.get(f"/logs/{job_id}?stdout=1000000")).text == ""


# ---- outputs -----------------------------------------------------------------------------------------------

ODD_NAMES = {
    "plain": b"report.txt",
    "directory": b"a/b/c.txt",
    "newline": b"a\nSet-Cookie: x=y\r\n",
    "quote": b'a"; filename="b',
    "backslash": b"a\\b",
    "space": b"a b",
    "percent": b"100%41",
    "unicode": "naïve 漢字".encode(),
    "right to left": "gpj.exe\u202etxt".encode(),
    "invalid UTF-8": b"\xff\xfe",
    "question mark": b"a?b#c",
    "dots": b"...",
    "hidden": b".bashrc",
    "longest": b"x" * 255,
    "semicolon": b"a;b,c",
    "tab and escape": b"\t\x1b[31m",
}


@pytest.mark.requirement(32)
@pytest.mark.parametrize("kind", ODD_NAMES)
async def test_odd_name_is_listed_and_downloads_safely(api: World, kind: str) -> None:
    job_id = await api.finished({ODD_NAMES[kind]: b"content"})
    (listed,) = (await api.http.get(f"/outputs/{job_id}")).json()["files"]
    assert listed["sha256"] == hashlib.sha256(b"content").hexdigest()
    answer = await api.http.get(f"/download/{job_id}/{quote(listed['path'], safe='/')}")
    assert (answer.status_code, answer.content) == (200, b"content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "set-cookie" not in answer.headers
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="')
    assert disposition.isascii()
    assert disposition.isprintable()
    plain = disposition.split('"')[1]
    assert not set(plain) & set('/\\"%;\n\r')
    assert not plain.startswith(".")
    assert disposition.count('"') == 2
    assert "%E2%80%AE" not in disposition, "a right-to-left override"


async def test_large_output_comes_whole(api: World) -> None:
    content = bytes(range(256)) * 4096  # 1 MiB: more than one piece
    job_id, sandbox = await api.submit()
    name = b"big"
    head = collect.SIZE.pack(len(content)) + name
    sandbox.write("outputs", collect.FRAME.pack(collect.BEGIN, len(head)) + head)
    for start in range(0, len(content), 32768):
        sandbox.write("outputs", collect.FRAME.pack(collect.DATA, 32768) + content[start : start + 32768])
        await asyncio.sleep(0.002)
    sandbox.write("outputs", collect.FRAME.pack(collect.COMPLETE, 0))
    sandbox.end_outputs()
    sandbox.end()
    await api.until(lambda: api.job(job_id).status.ended)
    answer = await api.http.get(f"/download/{job_id}/big")
    assert answer.headers["content-length"] == str(len(content))
    assert answer.content == content
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'


async def test_download_all_is_the_same_tar_every_time(api: World) -> None:
    outputs = {b"b.txt": b"b" * 1000, b"a/c": b"", "ä".encode(): b"x", b"x" * 200 + b"/" + b"y" * 200: b"long"}
    job_id = await api.finished(outputs)
    first = await api.http.get(f"/download/{job_id}")
    assert first.headers["content-type"] == "application/gzip"
    assert first.headers["content-disposition"] == f'attachment; filename="outputs-{job_tag(job_id)}.tar.gz"'
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(first.content))) as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert list(members) == sorted(path.decode() for path in outputs)
        for path, content in outputs.items():
            reader = tar.extractfile(path.decode())
            assert reader is not None
            assert reader.read() == content
        (shape,) = {(m.uid, m.gid, m.mtime, m.mode, m.type) for m in members.values()}
        assert shape == (0, 0, 0, 0o644, tarfile.REGTYPE)
    assert (await api.http.get(f"/download/{job_id}")).content == first.content
    empty = await api.finished()
    packed = (await api.http.get(f"/download/{empty}")).content
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert tar.getmembers() == []


async def test_outputs_of_a_running_job_get_409(api: World) -> None:
    job_id, sandbox = await api.submit()
    for path in (f"/outputs/{job_id}", f"/download/{job_id}", f"/download/{job_id}/a"):
        answer = await api.http.get(path)
        assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
    sandbox.end()


@pytest.mark.requirement(30, 31)
@pytest.mark.parametrize(
    "path",
    "../a ..%2fa %2e%2e/a %2e%2e%2f%2e%2e%2fetc/passwd /a %2fa a/ A a%00 a/../a a%252f".split(),
)
async def test_only_the_exact_name_of_an_output_is_downloaded(api: World, path: str) -> None:
    job_id = await api.finished({b"a": b"content"})
    head = f"GET /download/{job_id}/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    reply = await api.served.exchange(head.encode())
    assert reply.status == 404
    assert b"content" not in reply.body


async def test_head_has_no_body(api: World) -> None:
    job_id = await api.finished({b"a": b"content"}, stdout=b"x")
    for path in (f"/download/{job_id}/a", f"/download/{job_id}", f"/logs/{job_id}", "/health"):
        answer = await api.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
