"""Taking on jobs, their state, their end: `/run`, `/submit`, `/status`, cancel and delete."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator

import pytest

from sandrun.errors import Overloaded
from sandrun.jobs.job import job_tag
from sandrun.model import MIB, Outcome
from tests.service.api_world import GOOD, MANIFEST, NO_JOB, World, parse_events, world
from tests.serving import tarball

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
