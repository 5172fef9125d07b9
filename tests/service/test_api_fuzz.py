"""Whatever is sent, the answer is 2xx, 4xx or 503 with a time, in our own words, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sandrun.api.guard import Bounds
from tests.service import api_world
from tests.service.locked import Playing
from tests.serving import tarball

pytestmark = pytest.mark.requirement(30)

QUICK = Bounds(header_seconds=0.15, body_grace_seconds=0.15, linger_seconds=0.1, client_connections=1000)
bounded = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


class Served:
    """A server in a thread of its own, so that hypothesis can call it from plain functions."""

    def __init__(self) -> None:
        self.port = 0
        self.failures: list[str] = []
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda loop, context: self.failures.append(str(context)))
        async with api_world.world(bounds=QUICK, spawner=Playing()) as world:
            self.world = world
            self.port = world.served.port
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def send(self, data: bytes) -> bytes:
        """All that comes back until the server ends the connection, or has had nothing to say for a while."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            got = b""
            try:
                connection.sendall(data)
                connection.settimeout(0.6)
                while piece := connection.recv(65536):
                    got += piece
            except (TimeoutError, ConnectionError):
                pass
            return got


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()
    assert server.failures == []


def replies(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Takes answers apart; what is not one fails the test."""
    found = []
    while data:
        if data.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
            data = data[25:]
            continue
        head, _, data = data.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z -]+", line)
        assert match, line
        headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while (size := int(data.partition(b"\r\n")[0] or b"0", 16)) > 0:
                data = data.partition(b"\r\n")[2]
                body, data = body + data[:size], data[size + 2 :]
            data = data.partition(b"\r\n\r\n")[2]
        elif match[1] != "101":
            size = int(headers.get("content-length", "0"))
            body, data = data[:size], data[size:]
        else:
            data = b""  # frames follow
        found.append((int(match[1]), headers, body))
    return found


def check(status: int, headers: dict[str, str], body: bytes, *, head: bool = False) -> None:
    assert status in (101, 200, 202, 204) or 400 <= status < 500 or status == 503, status
    assert headers.get("x-content-type-options") == "nosniff" or status == 101
    assert "server" not in headers
    if status == 503:
        assert int(headers["retry-after"]) > 0
    if status >= 400 and not head:
        problem = json.loads(body)
        assert problem["error"]
        assert problem["details"]
        assert set(problem) <= {"error", "details", "field", "retry_after"}
        assert not re.search(rb"Traceback|/usr/lib|site-packages|object at 0x", body)


methods = st.sampled_from(b"GET POST DELETE HEAD PUT PATCH OPTIONS TRACE CONNECT get X".split())
paths = st.one_of(
    st.sampled_from(b"/ /run /submit /health /status/x /jobs/0 /logs/x/stream /download/x/y /openapi.json".split()),
    st.sampled_from([b"*", b"", b"//", b"/%", b"/%00", b"/\xff", b"http://evil/run", b"/..%2f..", b"/?" + b"a&" * 50]),
    st.binary(min_size=1, max_size=30).map(lambda raw: b"/" + raw),
)
headers = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"Host: localhost",
                b"Host: evil",
                b"Host:",
                b"Content-Length: 0",
                b"Content-Length: 13",
                b"Content-Length: 99999999999999999999",
                b"Content-Length: -1",
                b"Transfer-Encoding: chunked",
                b"Transfer-Encoding: identity",
                b"Connection: close",
                b"Connection: keep-alive, Upgrade",
                b"Upgrade: websocket",
                b"Upgrade: h2c",
                b"Sec-WebSocket-Version: 13",
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
                b"Expect: 100-continue",
                b"Expect: nonsense",
                b"Content-Type: application/json",
                b"Content-Type: multipart/form-data; boundary=b",
                b"Accept: text/event-stream, */*;q=0.1",
                b"Accept: ;;;q=q,,",
                b"Origin: null",
                b"Range: bytes=0-1",
                b"Content-Encoding: gzip",
            ]
        ),
        st.binary(max_size=40),
    ),
    max_size=8,
)
bodies = st.one_of(
    st.just(b""),
    st.just(b'{"code": "x"}'),
    st.just(b"d\r\n" + b'{"code": "x"}' + b"\r\n0\r\n\r\n"),
    st.just(b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n'),
    st.binary(max_size=100),
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Something like a request, whole or damaged."""
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 ", b""]))
    head = b" ".join([draw(methods), draw(paths), version])
    lines = [head, *([b"Host: localhost"] if draw(st.booleans()) else []), *draw(headers)]
    data = draw(st.sampled_from([b"\r\n", b"\r\n", b"\n"])).join(lines) + b"\r\n\r\n" + draw(bodies)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=4)) + data[place + draw(st.integers(0, 3)) :]
    return data


@bounded
@given(st.one_of(requests(), st.lists(requests(), min_size=2, max_size=3).map(b"".join), st.binary(max_size=300)))
@example(b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n" + b'{"code": "x"}')
def test_any_bytes_get_an_answer_of_ours(served: Served, data: bytes) -> None:
    for status, fields, body in replies(served.send(data)):
        check(status, fields, body, head=data[:4] == b"HEAD")


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**25), 10**25),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["python3", "\0", "\ud800", "../x", "main.py", "-c", "a" * 300]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
FIELDS = (
    "code files stdin keep interpreter args env outputs timeout memory_mb cpu_seconds processes environment "
    "fresh_interpreter entrypoint other"
).split()


@bounded
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=5), st.booleans())
def test_any_run_request_is_run_or_refused_by_name(served: Served, fields: dict[str, Any], usable: bool) -> None:
    if usable:
        fields["code"] = "x"
    body = json.dumps(fields).encode()
    head = b"POST /run HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    ((status, answered, told),) = replies(served.send(head + body))
    check(status, answered, told)
    assert status in (200, 400)
    if status == 400:
        assert "field" in json.loads(told)


@bounded
@given(st.dictionaries(st.sampled_from([f for f in FIELDS if f not in ("code", "files", "keep")]), values, max_size=5))
def test_any_manifest_is_taken_or_refused_by_name(served: Served, fields: dict[str, Any]) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="manifest"\r\n\r\n'
        + json.dumps(fields).encode()
        + b'\r\n--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
        + tarball({"main.py": "x", "a": "y"})
        + b"\r\n--b--\r\n"
    )
    head = (
        b"POST /submit HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    ((status, answered, told),) = replies(served.send(head + body))
    check(status, answered, told)
    assert status in (202, 400)
    if status == 400:
        assert "field" in json.loads(told)


query = st.lists(
    st.tuples(
        st.sampled_from(["wait", "stream", "stdout", "stderr", "encoding", "x"]),
        st.one_of(
            st.sampled_from(["0", "0.01", "1e3", "-1", "both", "stdout", "base64", "", "٣"]), st.text(max_size=8)
        ),
    ),
    max_size=3,
)


@bounded
@given(st.sampled_from(["status", "jobs", "logs", "outputs", "download"]), query, st.text(max_size=10))
def test_any_query_of_any_call_is_answered(served: Served, call: str, pairs: list[tuple[str, str]], tail: str) -> None:
    from urllib.parse import quote, urlencode

    jobs = served.world.service._store.jobs()
    job_id = jobs[0].id if jobs else "0" * 32
    path = f"/{call}/{job_id}" + (f"/{quote(tail, errors='replace')}" if tail else "")
    target = path + "?" + urlencode(pairs, errors="replace")
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    ((status, answered, told),) = replies(served.send(head.encode()))
    check(status, answered, told)


def test_server_still_works_after_all_that(served: Served) -> None:
    body = b'{"code": "x"}'
    head = b"POST /run HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    ((status, _, told),) = replies(served.send(head + body))
    assert (status, json.loads(told)["status"]) == (200, "completed")
    assert served.world.service.counts["running"] == 0
