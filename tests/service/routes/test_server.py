"""The server itself, and what holds for every call: hosts, headers, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sandrun.model import Ceilings
from tests.service.api_world import GOOD, MANIFEST, NO_JOB, World
from tests.service.spawner_double import BROKEN, DATA


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
