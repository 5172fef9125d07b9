"""Every call of the API, and what it refuses."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

from sandrun.errors import Overloaded
from sandrun.jobs.job import job_tag
from sandrun.model import LOG_BYTES, MIB, Ceilings, Outcome
from sandrun.sandbox import collect
from tests.service.api_world import World, world
from tests.service.spawner_double import BROKEN, DATA
from tests.serving import tarball

pytestmark = pytest.mark.usefixtures("no_new_descriptors")

NO_JOB = "0" * 32


async def parse_events(lines: AsyncIterator[str], most: int) -> list[tuple[str, Any]]:
    """The next server-sent events, at most `most`: name and data."""
    events: list[tuple[str, Any]] = []
    name = "message"
    async for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            events.append((name, json.loads(value)))
            name = "message"
            if len(events) == most:
                break
    return events


@pytest.fixture
async def api() -> AsyncIterator[World]:
    async with world() as made:
        yield made


# ---- /run --------------------------------------------------------------------------------------------------


async def test_run_answers_with_the_whole_result(api: World) -> None:
    asked = asyncio.create_task(api.http.post("/run", json={"code": "x", "outputs": ["*"]}))
    sandbox = await api.next_sandbox()
    sandbox.begin()
    sandbox.write("stdout", b"hello\n")
    sandbox.write("stderr", b"\xff")
    sandbox.write_output(b"a.txt", b"content")
    sandbox.end_outputs()
    sandbox.end(Outcome.EXITED, exit_code=3)
    answer = await asked
    result = answer.json()
    assert answer.status_code == 200
    assert (result["status"], result["outcome"], result["exit_code"]) == ("failed", "exited", 3)
    assert (result["stdout"], result["stderr"]) == ("hello\n", "�")
    assert result["output_files"] == [
        {
            "path": "a.txt",
            "size": 7,
            "sha256": hashlib.sha256(b"content").hexdigest(),
            "content_base64": "Y29udGVudA==",
        }
    ]
    assert result["job_tag"] == job_tag(result["job_id"])
    assert set(result) == {
        *("job_id", "job_tag", "status", "outcome", "exit_code", "signal", "position", "stdout", "stderr"),
        *("truncated", "limits_hit", "execution_metadata", "output_files", "outputs_omitted", "isolation"),
        *("violations", "failure"),
    }
    assert api.service.counts["known"] == 0, "erased when answered"
    assert (await api.http.get(f"/status/{result['job_id']}")).status_code == 404


async def test_run_that_is_kept_can_be_asked_for(api: World) -> None:
    asked = asyncio.create_task(api.http.post("/run", json={"code": "x", "keep": True}))
    (await api.next_sandbox()).end()
    job_id = (await asked).json()["job_id"]
    status = (await api.http.get(f"/status/{job_id}")).json()
    assert (status["status"], status["stdout"]) == ("completed", None)


async def test_closing_the_connection_cancels_a_run(api: World) -> None:
    asked = asyncio.create_task(api.http.post("/run", json={"code": "x"}))
    sandbox = await api.next_sandbox()
    asked.cancel()
    await api.until(lambda: sandbox.cancels)
    assert api.service.counts["known"] == 0
    sandbox.end(Outcome.CANCELLED)


async def test_closing_the_connection_cancels_a_run_that_waits(api: World) -> None:
    api.spawner.refuses = Overloaded("busy", retry_after_seconds=1, client_at_fault=False)
    asked = asyncio.create_task(api.http.post("/run", json={"code": "x"}))
    await api.until(lambda: api.service.counts["queued"])
    asked.cancel()
    await api.until(lambda: not api.service.counts["queued"])
    assert api.service.counts["known"] == 0


async def test_run_streams_events_to_those_who_accept_them(api: World) -> None:
    async with api.http.stream("POST", "/run", json={"code": "x"}, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        sandbox = api.spawner.sandboxes[-1]
        lines = answer.aiter_lines()
        sandbox.write("stdout", b"one\n")
        events = await parse_events(lines, 2)
        sandbox.write("stderr", b"two")
        sandbox.end()
        events += await parse_events(lines, 99)
    assert [name for name, _ in events] == ["job", "log", "log", "result"]
    assert events[0][1]["status"] == "running"
    assert events[1][1] == {"stream": "stdout", "offset": 0, "text": "one\n"}
    assert events[2][1] == {"stream": "stderr", "offset": 0, "text": "two"}
    assert (events[3][1]["stdout"], events[3][1]["status"]) == ("one\n", "completed")
    assert api.service.counts["known"] == 0


async def test_leaving_a_run_that_streams_cancels_it(api: World) -> None:
    async with api.http.stream("POST", "/run", json={"code": "x"}, headers={"Accept": "text/event-stream"}):
        sandbox = api.spawner.sandboxes[-1]
    await api.until(lambda: sandbox.cancels)
    assert api.service.counts["known"] == 0
    sandbox.end(Outcome.CANCELLED)


async def test_run_beyond_its_time_in_the_queue_is_told_to_come_back() -> None:
    async with world(run_queue_seconds=0.1) as api:
        api.spawner.refuses = Overloaded("busy", retry_after_seconds=1, client_at_fault=False)
        answer = await api.http.post("/run", json={"code": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        assert answer.json()["error"] == "overloaded"
        assert api.service.counts["known"] == 0


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", None])
async def test_run_takes_json_by_these_content_types(api: World, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    asked = asyncio.create_task(api.http.post("/run", content=b'{"code": "x"}', headers=headers))
    (await api.next_sandbox()).end()
    assert (await asked).status_code == 200


@pytest.mark.requirement(29)
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'{"code": "x"', "body"),
        (b'{"code": "x", "code": "y"}', "code"),
        (b'{"code": 1}', "code"),
        (b"{}", "code"),
        (b'{"code": "x", "timeout": true}', "timeout"),
        (b'{"code": "x", "timeout": NaN}', "body"),
        (b'{"code": "x", "timeout": 1e999}', "body"),
        (b'{"code": "x", "timeout": 9999}', "timeout"),
        (b'{"code": "x", "memory_mb": 2048}', "memory_mb"),
        (b'{"code": "x", "mode": "y"}', "mode"),
        (b'{"code": "x", "interpreter": "cobol"}', "interpreter"),
        (b'{"code": "x", "interpreter": "node"}', "interpreter"),
        (b'{"code": "x", "environment": "nope"}', "environment"),
        (b'{"code": "x", "env": {"A=B": "c"}}', "env"),
        (b'{"code": "x", "args": ["a\\u0000b"]}', "args"),
        (b'{"code": "x", "files": {"../a": "b"}}', "files"),
        (b'{"code": "\xff"}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"code": "' + b"x" * (MIB + 1) + b'"}', "code"),
    ],
    ids=range(22),
)
async def test_run_refuses_by_name(api: World, body: bytes, field: str) -> None:
    answer = await api.http.post("/run", content=body)
    assert answer.status_code == 400, answer.text
    problem = answer.json()
    assert (problem["error"], problem["field"]) == ("invalid_input", field)
    assert problem["details"]
    counts = api.service.counts
    assert (counts["known"], counts["queued"], counts["store_used_bytes"]) == (0, 0, 0), "nothing is kept"
    assert api.spawner.attempts == 0


async def test_ceiling_is_told_with_the_refusal(api: World) -> None:
    problem = (await api.http.post("/run", json={"code": "x", "timeout": 301})).json()
    assert problem["field"] == "timeout"
    assert "301" in problem["details"]
    assert "300" in problem["details"]


async def test_run_of_another_content_type_gets_415(api: World) -> None:
    answer = await api.http.post("/run", content=b"{}", headers={"Content-Type": "text/xml"})
    assert (answer.status_code, answer.json()["error"]) == (415, "unsupported_media_type")


@pytest.mark.requirement(30)
@pytest.mark.parametrize("chunked", [False, True])
async def test_run_body_beyond_16_mb_gets_413_and_costs_nothing(api: World, chunked: bool) -> None:
    body = b'{"code": "' + b"x" * (16 * MIB) + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    answer = await api.http.post("/run", content=pieces() if chunked else body)
    assert (answer.status_code, answer.json()["field"]) == (413, "body")
    assert api.service.counts["store_used_bytes"] == 0


async def test_large_run_body_is_charged_while_it_is_read() -> None:
    async with world(store_bytes=16 * MIB) as api:
        answer = await api.http.post("/run", content=b'{"code": "' + b"x" * (8 * MIB) + b'"}')
        assert answer.status_code in (429, 503)
        assert answer.json()["retry_after"] == int(answer.headers["retry-after"]) > 0
        assert api.service.counts["store_used_bytes"] == 0


# ---- /submit -----------------------------------------------------------------------------------------------


async def test_submit_answers_with_the_jobs_id(api: World) -> None:
    files = {"files": tarball({"main.py": "x"}), "manifest": b'{"entrypoint": "main.py"}'}  # files first
    answer = await api.http.post("/submit", files=files)
    told = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{told['job_id']}"
    assert len(told["job_id"]) == 32
    assert (told["status"], told["position"]) == ("running", None)
    sandbox = api.spawner.sandboxes[-1]
    assert json.loads(sandbox.spec)["entrypoint"] == "main.py"
    sandbox.end()


async def test_manifest_in_the_archive_serves_too(api: World) -> None:
    files = {"files": tarball({"main.py": "x", "job.json": '{"entrypoint": "main.py"}'})}
    assert (await api.http.post("/submit", files=files)).status_code == 202
    api.spawner.sandboxes[-1].end()


BOUNDARY = b"--limit\r\n"


def part(name: str, body: bytes, extra: bytes = b"") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"; filename="x"\r\n'.encode()
    return BOUNDARY + head + extra + b"\r\n" + body + b"\r\n"


END = b"--limit--\r\n"
GOOD = tarball({"main.py": "x"})
MANIFEST = b'{"entrypoint": "main.py"}'


@pytest.mark.requirement(27, 29)
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (END, "files"),
        (part("manifest", MANIFEST) + END, "files"),
        (part("files", GOOD) + END, "manifest"),
        (part("files", b"") + part("manifest", MANIFEST) + END, "files"),
        (part("files", b"not a tar") + part("manifest", MANIFEST) + END, "files"),
        (part("files", GOOD[:-20]) + part("manifest", MANIFEST) + END, "files"),
        (part("files", GOOD + b"more") + part("manifest", MANIFEST) + END, "files"),
        (part("files", GOOD) + part("files", GOOD) + END, "files"),
        (part("manifest", MANIFEST) + part("manifest", MANIFEST) + part("files", GOOD) + END, "manifest"),
        (part("other", b"x") + part("files", GOOD) + END, "other"),
        (part("", b"x") + END, ""),
        (part("manifest", b"") + part("files", GOOD) + END, "manifest"),
        (part("manifest", b'{"entrypoint": "no.py"}') + part("files", GOOD) + END, "entrypoint"),
        (part("manifest", b'{"entrypoint": "main.py", "timeout": 0}') + part("files", GOOD) + END, "timeout"),
        (part("manifest", b" " * (MIB + 1)) + part("files", GOOD) + END, "manifest"),
        (part("files", GOOD) + part("manifest", MANIFEST), "body"),
        (part("files", GOOD)[:-30], "body"),
        (b"", "body"),
        (b"nonsense", "body"),
        (part("files", GOOD, b"X: " + b"a" * 10_000 + b"\r\n") + END, "body"),
        (part("files", GOOD, b"X: a\r\n" * 20) + END, "body"),
        (b"".join(part(name, b"x") for name in ("manifest", "files", "manifest", "files", "a", "b")) + END, "manifest"),
        (BOUNDARY + b"Content-Type: text/plain\r\n\r\nx\r\n" + END, "body"),
    ],
    ids=range(23),
)
async def test_submission_is_refused_by_name_and_leaves_nothing(api: World, body: bytes, field: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=limit"}
    answer = await api.http.post("/submit", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field
    assert (api.service.counts["known"], api.service.counts["store_used_bytes"]) == (0, 0)
    assert api.spawner.attempts == 0


@pytest.mark.parametrize(
    "kind",
    ["application/json", "multipart/form-data", "multipart/mixed; boundary=limit", "", "multipart/form-data; b=;"],
)
async def test_submission_of_another_content_type_gets_415(api: World, kind: str) -> None:
    answer = await api.http.post("/submit", content=part("files", GOOD) + END, headers={"Content-Type": kind})
    assert answer.status_code == 415


@pytest.mark.requirement(30)
async def test_announced_upload_beyond_bound_gets_413_unread(api: World) -> None:
    reply = await api.served.exchange(
        b"POST /submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=limit\r\n"
        b"Content-Length: 107000000\r\nExpect: 100-continue\r\n\r\n"
    )
    assert (reply.status, reply.json["field"]) == (413, "files")
    assert reply.headers["connection"] == "close", "the body that was not asked for must not be taken for a request"


async def test_bad_manifest_in_front_is_refused_before_the_files_come(api: World) -> None:
    head = (
        b"POST /submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=limit\r\n"
        b"Content-Length: 90000000\r\n\r\n"
    )
    reply = await api.served.exchange(head + part("manifest", b'{"entrypoint": "../x"}') + BOUNDARY)
    assert (reply.status, reply.json["field"]) == (400, "entrypoint")


@pytest.mark.requirement(19)
async def test_upload_is_charged_while_it_comes_and_given_back_when_it_breaks_off(api: World) -> None:
    connection = await api.served.connect()
    connection.send(
        b"POST /submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=limit\r\n"
        b"Content-Length: 90000000\r\n\r\n" + part("files", b"x" * 3_000_000)[:-2]
    )
    await api.until(lambda: api.service.counts["store_used_bytes"] > 2_900_000)
    await connection.aclose()
    await api.until(lambda: not api.service.counts["store_used_bytes"])


async def test_full_store_refuses_uploads_with_a_time() -> None:
    async with world(store_bytes=16 * MIB, client_store_share=1.0) as api:
        answer = await api.http.post("/submit", files={"files": b"x" * (13 * MIB)})
        assert answer.status_code == 503 or answer.status_code == 429
        assert int(answer.headers["retry-after"]) == answer.json()["retry_after"] > 0
        assert api.service.counts["store_used_bytes"] == 0


# ---- status, cancel, delete --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/status", "/jobs"])
async def test_status_tells_how_a_job_stands(api: World, path: str) -> None:
    job_id, sandbox = await api.submit()
    result = (await api.http.get(f"{path}/{job_id}")).json()
    assert (result["status"], result["outcome"], result["job_id"]) == ("running", None, job_id)
    sandbox.end(Outcome.TIMEOUT)
    await api.until(lambda: api.job(job_id).status.ended)
    result = (await api.http.get(f"{path}/{job_id}")).json()
    assert (result["status"], result["outcome"], result["stdout"]) == ("failed", "timeout", None)


async def test_status_waits_for_the_end(api: World) -> None:
    job_id, sandbox = await api.submit()
    asked = asyncio.create_task(api.http.get(f"/status/{job_id}?wait=30"))
    await asyncio.sleep(0.1)
    assert not asked.done()
    sandbox.end()
    assert (await asked).json()["status"] == "completed"


async def test_status_waits_no_longer_than_asked(api: World) -> None:
    job_id, sandbox = await api.submit()
    assert (await api.http.get(f"/status/{job_id}?wait=0.1")).json()["status"] == "running"
    sandbox.end()


@pytest.mark.parametrize("query", ["wait=61", "wait=-1", "wait=x", "wait=", "wait=nan", "wait=1&wait=2", "wait=1e1"])
async def test_bad_wait_is_refused_by_name(api: World, query: str) -> None:
    job_id = await api.finished()
    answer = await api.http.get(f"/status/{job_id}?{query}")
    assert (answer.status_code, answer.json()["field"]) == (400, "wait")


async def test_cancel_stops_and_keeps(api: World) -> None:
    job_id, sandbox = await api.submit()
    sandbox.write("stdout", b"so far")
    asked = asyncio.create_task(api.http.post(f"/jobs/{job_id}/cancel"))
    await api.until(lambda: sandbox.cancels)
    sandbox.end(Outcome.CANCELLED, exit_code=None)
    result = (await asked).json()
    assert (result["status"], result["outcome"]) == ("failed", "cancelled")
    assert (await api.http.get(f"/logs/{job_id}")).text == "so far"
    assert (await api.http.post(f"/jobs/{job_id}/cancel")).status_code == 200, "no effect on one that has ended"


async def test_delete_stops_and_erases(api: World) -> None:
    job_id, sandbox = await api.submit()
    answer = await api.http.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert sandbox.cancels == 1
    for path in ("status", "jobs", "logs", "outputs", "download"):
        assert (await api.http.get(f"/{path}/{job_id}")).status_code == 404
    assert (await api.http.delete(f"/jobs/{job_id}")).status_code == 404
    sandbox.end(Outcome.CANCELLED)


async def test_no_get_erases(api: World) -> None:
    job_id = await api.finished({b"a": b"b"}, stdout=b"x")
    for path in (f"/download/{job_id}", f"/download/{job_id}/a", f"/logs/{job_id}", f"/status/{job_id}"):
        for _ in range(2):
            assert (await api.http.get(path)).status_code == 200


@pytest.mark.parametrize("job_id", [NO_JOB, "x", "../etc/passwd", "%2e%2e%2fetc", "0" * 5000, "ä", "%00", "a/b/c"])
@pytest.mark.parametrize("path", ["/status", "/logs", "/outputs", "/download"])
async def test_job_that_is_not_there_gets_404(api: World, path: str, job_id: str) -> None:
    answer = await api.http.get(f"{path}/{job_id}")
    assert answer.status_code == 404
    assert answer.json()["error"] == "not_found"
    assert job_id not in answer.text, "nothing of the request comes back"


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


# ---- the server itself -------------------------------------------------------------------------------------


async def test_root_shows_three_commands_or_json(api: World) -> None:
    text = await api.http.get("/")
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert [line.split()[0] for line in text.text.splitlines()] == ["curl"] * 3
    browser = await api.http.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert browser.text == text.text
    told = (await api.http.get("/", headers={"Accept": "application/json"})).json()
    assert (told["service"], told["limits"]["timeout"]) == ("sandrun", Ceilings().timeout)


async def test_first_command_of_the_root_works_as_it_stands(api: World) -> None:
    """curl -d sends a form's content type."""
    line = (await api.http.get("/")).text.splitlines()[0]
    body = line.split("-d ")[1].strip("'")
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    asked = asyncio.create_task(api.http.post("/run", content=body, headers=headers))
    (await api.next_sandbox()).end()
    assert (await asked).status_code == 200


async def test_health_says_whether_jobs_can_be_run(api: World) -> None:
    answer = await api.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    api.context.spawner_lost = lambda: True
    answer = await api.http.get("/health")
    assert (answer.status_code, answer.json()["status"], answer.headers["retry-after"]) == (503, "starting", "2")
    await api.service.drain(0)
    assert (await api.http.get("/health")).json()["status"] == "draining"


@pytest.mark.requirement(35)
async def test_draining_server_takes_no_jobs_and_still_answers(api: World) -> None:
    job_id = await api.finished(stdout=b"kept")
    await api.service.drain(0)
    for answer in (
        await api.http.post("/run", json={"code": "x"}),
        await api.http.post("/submit", files={"files": GOOD, "manifest": MANIFEST}),
    ):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
    assert (await api.http.get(f"/logs/{job_id}")).text == "kept"


async def test_environments_lists_package_sets_and_interpreters(api: World) -> None:
    told = (await api.http.get("/environments")).json()
    assert told["environments"] == [{"name": "broken", **BROKEN}, {"name": "data", **DATA}]
    assert told["interpreters"]["python3"] == {"available": True}


async def test_openapi_describes_every_route(api: World) -> None:
    document = (await api.http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(call.method, call.path.replace(":output", "")) for call in api.app.calls}
    references: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            references.extend(v for k, v in value.items() if k == "$ref")
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(document)
    assert references
    for reference in references:
        assert reference.rpartition("/")[2] in document["components"]["schemas"]
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"]
            assert {"421", "503"} <= set(operation["responses"])


@pytest.mark.requirement(30)
async def test_unknown_path_and_method_get_json(api: World) -> None:
    answer = await api.http.get("/nothing")
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
    answer = await api.http.get("/run")
    assert (answer.status_code, answer.json()["error"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert (await api.http.request("OPTIONS", "/run")).status_code == 405
    assert (await api.http.get("/status/")).status_code == 404


@pytest.mark.requirement(30)
async def test_every_answer_carries_the_headers_and_none_opens_it_to_other_sites(api: World) -> None:
    job_id = await api.finished({b"a": b"b"}, stdout=b"x")
    foreign = {"Origin": "http://evil.example"}
    paths = ("/", "/health", "/openapi.json", "/nothing", f"/status/{job_id}", f"/logs/{job_id}", f"/download/{job_id}")
    for path in (*paths, f"/download/{job_id}/a"):
        answer = await api.http.get(path, headers=foreign)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.requirement(30)
@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "localhost:80", "LocalHost:8", "127.0.0.1", "192.0.2.7:1", "[::1]:80")),
        *((host, 200) for host in ("sandrun.example", "Sandrun.Example:8443", "sandrun.example.")),
        *((host, 421) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "2130706433")),
        *((host, 421) for host in ("sandrun.example@evil", "0x7f.1", "", "[::1", "localhost:80:80", "a b", "[evil]")),
    ],
)
async def test_host_header_names_this_server(api: World, host: str, status: int) -> None:
    reply = await api.served.exchange(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert reply.status == status
    if status == 421:
        assert reply.json["error"] == "unknown_host"


@pytest.mark.requirement(30)
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example", "x", ""])
async def test_page_of_another_site_cannot_have_jobs_run(api: World, origin: str) -> None:
    for path in ("/run", "/submit", f"/jobs/{NO_JOB}/cancel"):
        answer = await api.http.post(path, content=b'{"code": 1}', headers={"Origin": origin})  # unread
        assert (answer.status_code, answer.json()["error"]) == (403, "foreign_origin")
    answer = await api.http.delete(f"/jobs/{NO_JOB}", headers={"Origin": origin})
    assert answer.status_code == 403
    assert api.spawner.attempts == 0


async def test_own_page_may(api: World) -> None:
    answer = await api.http.delete(f"/jobs/{NO_JOB}", headers={"Origin": f"http://127.0.0.1:{api.served.port}"})
    assert answer.status_code == 404


@pytest.mark.requirement(30)
async def test_unexpected_failure_tells_nothing(api: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(api.service, "get", fail)
    answer = await api.http.get(f"/status/{NO_JOB}")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {
        "error": "unavailable",
        "details": "the server could not do this; try again",
        "retry_after": 1,
    }
