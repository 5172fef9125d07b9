"""The SDK against scripted servers: what it sends, how it reads answers, how it lives through broken connections."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from sandrun.client import AsyncClient, Client, LogEnd, LogPart
from sandrun.client import requests as build
from sandrun.client.requests import LogStream
from sandrun.client.results import read_frame, read_result
from sandrun.errors import ConfigError, InvalidInput, ProtocolError, ServerError
from sandrun.model import LimitHit, Outcome, Status

URL = "http://127.0.0.1:9"
JOB = "0123456789abcdef0123456789abcdef"

RESULT: dict[str, Any] = {
    "job_id": JOB,
    "job_tag": "0123456789ab",
    "status": "failed",
    "outcome": "memory_limit",
    "exit_code": None,
    "signal": 9,
    "position": None,
    "stdout": "out",
    "stderr": "",
    "truncated": {"stdout": 0, "stderr": 7},
    "limits_hit": ["processes"],
    "execution_metadata": {"wall_seconds": 1.5},
    "output_files": [{"path": "a", "size": 1, "sha256": "00", "content_base64": "eA=="}],
    "outputs_omitted": 0,
    "isolation": {"inside": {}},
    "violations": None,
    "failure": None,
}


def client_for(handler: Callable[[httpx2.Request], httpx2.Response]) -> Client:
    return Client(URL, transport=httpx2.MockTransport(handler))


def both(handler: Callable[[httpx2.Request], httpx2.Response], call: Callable[[Any], Any]) -> list[Any]:
    """What `call` gives on the blocking and on the asyncio client."""

    async def asynchronous() -> Any:
        async with AsyncClient(URL, transport=httpx2.MockTransport(handler)) as client:
            return await call(client)

    with client_for(handler) as client:
        return [call(client), asyncio.run(asynchronous())]


def test_run_sends_code_and_fields() -> None:
    seen: list[Any] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append((request.method, request.url.path, json.loads(request.content)))
        return httpx2.Response(200, json=RESULT)

    for result in both(
        handler,
        lambda client: client.run(
            "print()",
            files={"a": b"\xff", "b": "text"},
            stdin=b"\x00",
            args=("x",),
            outputs=("*",),
            timeout=5,
            env=None,
        ),
    ):
        assert result.outcome is Outcome.MEMORY_LIMIT
        assert (result.signal, result.stdout, result.limits_hit) == (9, "out", (LimitHit.PROCESSES,))
        assert result.ended
        assert not result.succeeded
        assert result.output_files[0].content_base64 == "eA=="
        assert result.raw == RESULT
    body = {
        "code": "print()",
        "files": {"a": {"base64": "/w=="}, "b": "text"},
        "stdin": {"base64": "AA=="},
        "args": ["x"],
        "outputs": ["*"],
        "timeout": 5,
    }
    assert seen == [("POST", "/run", body)] * 2


def test_submit_sends_the_manifest_before_the_files(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print()")
    seen: list[tuple[str, bytes]] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append((request.headers["content-type"], request.content))
        return httpx2.Response(202, json={"job_id": JOB, "status": "queued", "position": 3})

    for submitted in both(handler, lambda client: client.submit(tmp_path, {"timeout": 9}, entrypoint="main.py")):
        assert (submitted.job_id, submitted.status, submitted.position) == (JOB, Status.QUEUED, 3)
    for kind, content in seen:
        boundary = kind.partition("boundary=")[2].encode()
        _, manifest, files, end = content.split(b"--" + boundary)
        assert json.loads(manifest.partition(b"\r\n\r\n")[2]) == {"timeout": 9, "entrypoint": "main.py"}
        assert files.partition(b"\r\n\r\n")[2].startswith(b"\x1f\x8b")
        assert end == b"--\r\n"


def test_without_fields_the_archives_own_manifest_counts() -> None:
    content = build.submit(b"archive", None, {}).content
    assert content is not None
    assert b'name="manifest"' not in content
    assert b'name="files"' in content


def test_what_json_cannot_hold_is_refused_here() -> None:
    for fields in ({"timeout": float("nan")}, {"args": ["\ud800"]}, {"env": {"A": object()}}):
        with pytest.raises(InvalidInput, match="manifest"):
            build.submit(b"archive", fields, {})


@pytest.mark.parametrize("job_id", ["", "../x", "a/b", "a?b", "é", "a" * 129, "a b"])
def test_an_id_cannot_reach_another_path(job_id: str) -> None:
    for request in (build.result, build.outputs, build.cancel, build.delete):
        with pytest.raises(InvalidInput, match="job_id"):
            request(job_id)


def test_a_path_is_quoted() -> None:
    assert build.download(JOB, "a b/ü?#%\n").target == f"/download/{JOB}/a%20b/%C3%BC%3F%23%25%0A"


def test_the_servers_own_words_are_raised() -> None:
    problem = {"error": "invalid_input", "details": "900 is above this server's ceiling", "field": "timeout"}
    for call in (lambda c: c.result(JOB), lambda c: c.run("x"), lambda c: c.cancel(JOB), lambda c: c.read(JOB, "a")):
        with client_for(lambda _: httpx2.Response(400, json=problem)) as client, pytest.raises(ServerError) as refusal:
            call(client)
        assert refusal.value.status == 400
        assert refusal.value.problem == problem


def test_what_is_no_sandrun_server_is_told() -> None:
    with (
        client_for(lambda _: httpx2.Response(200, text="<html>")) as client,
        pytest.raises(ProtocolError, match="JSON"),
    ):
        client.result(JOB)
    with (
        client_for(lambda _: httpx2.Response(200, json={"a": 1})) as client,
        pytest.raises(ProtocolError, match="shape"),
    ):
        client.result(JOB)
    with (
        client_for(lambda _: httpx2.Response(502, text="bad gateway")) as client,
        pytest.raises(ServerError, match="502"),
    ):
        client.result(JOB)


def test_no_answer_is_status_0() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServerError, match="Connection refused") as refusal:
        client.result(JOB)
    assert refusal.value.status == 0


def test_wait_polls_until_the_end() -> None:
    for count in (1, 3):
        left = [count, count]

        def handler(request: httpx2.Request, left: list[int] = left) -> httpx2.Response:
            assert 1 <= int(request.url.params["wait"]) <= build.WAIT_SECONDS
            left[-1] -= 1
            if left[-1] == 0:
                left.pop()
                return httpx2.Response(200, json=RESULT)
            return httpx2.Response(200, json=RESULT | {"status": "running", "outcome": None})

        assert all(result.ended for result in both(handler, lambda client: client.wait(JOB)))


def test_wait_gives_up_in_time() -> None:
    running = RESULT | {"status": "running", "outcome": None}
    with (
        client_for(lambda _: httpx2.Response(200, json=running)) as client,
        pytest.raises(TimeoutError, match="running"),
    ):
        client.wait(JOB, seconds=0.01)


def test_download_saves_what_was_listed(tmp_path: Path) -> None:
    content = {"a": b"one", "d/b c": b"two" * 100_000, "no": b""}

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.startswith("/outputs/"):
            files = [{"path": p, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for p, c in content.items()]
            return httpx2.Response(200, json={"files": files})
        return httpx2.Response(200, content=content[request.url.path.removeprefix(f"/download/{JOB}/")])

    targets = iter([tmp_path / "one", tmp_path / "two"])
    for saved in both(handler, lambda client: client.download(JOB, next(targets))):
        assert [Path(path).read_bytes() for path in saved] == list(content.values())
    with client_for(handler) as client:
        assert client.download(JOB, tmp_path / "three", paths=["a"]) == [str(tmp_path / "three" / "a")]
        with pytest.raises(InvalidInput, match="not among the outputs"):
            client.download(JOB, tmp_path, paths=["b"])
        with pytest.raises(FileExistsError):
            client.download(JOB, tmp_path / "three")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "x", "http://a:b", "http://a?b", "http://a#b", "//a"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not the URL"):
        Client(url)


def test_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDRUN_URL", "http://[::1]:1234/prefix/")
    with Client() as client:
        assert client.url == "http://[::1]:1234/prefix"


def test_a_certificate_file_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/null"):
        Client("https://127.0.0.1:1", ca="/dev/null")


def test_an_answer_of_another_version_is_told() -> None:
    with pytest.raises(ProtocolError, match="documented shape"):
        read_result(json.dumps(RESULT | {"outcome": "levitated"}).encode())


def test_the_client_needs_nothing_of_the_server() -> None:
    """It must install on any laptop: of Sandrun it sees model and errors alone."""
    code = "import sys; from sandrun.client import AsyncClient, Client; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("sandrun")}
    assert {name for name in ours if not name.startswith("sandrun.client")} == {
        "sandrun",
        "sandrun.errors",
        "sandrun.bounds",
        "sandrun.model",
    }


# ---- live logs ---------------------------------------------------------------------------------------------


def text(offset: int, words: str, stream: str = "stdout") -> str:
    return json.dumps({"stream": stream, "offset": offset, "text": words})


END = json.dumps({"event": "end", "status": "completed", "outcome": "exited", "exit_code": 0})


def test_frames_are_read() -> None:
    assert read_frame(text(3, "ä")) == LogPart(stream="stdout", offset=3, data="ä".encode())
    raw = base64.b64encode(b"\xff").decode()
    assert read_frame(json.dumps({"stream": "stderr", "offset": 0, "base64": raw})) == LogPart(
        stream="stderr", offset=0, data=b"\xff"
    )
    assert read_frame(END) == LogEnd(status=Status.COMPLETED, outcome=Outcome.EXITED, exit_code=0)
    gap = {"event": "gap", "stream": "stdout", "offset": 10, "bytes": 7}
    assert read_frame(json.dumps(gap)) == LogPart(stream="stdout", offset=10, data=b"", skipped=7)
    assert LogStream(URL, JOB).feed(json.dumps(gap)) == LogPart(stream="stdout", offset=10, data=b"", skipped=7)
    assert read_frame(json.dumps({"event": "news of a later version"})) is None
    for frame in ("{}", "[]", "x", text(0, "", "stdin"), json.dumps({"stream": "stdout", "offset": 0, "base64": "?"})):
        with pytest.raises(ProtocolError):
            read_frame(frame)


def test_offsets_resume_skip_and_repeat() -> None:
    stream = LogStream(URL, JOB, stdout=2)
    assert stream.url == f"ws://127.0.0.1:9/logs/{JOB}/stream?stdout=2&stderr=0"
    assert stream.feed(text(2, "äb")) == LogPart(stream="stdout", offset=2, data="äb".encode())
    assert stream.feed(text(2, "äb")) is None
    assert stream.feed(text(4, "bcd")) == LogPart(stream="stdout", offset=5, data=b"cd")
    assert stream.feed(text(10, "x")) == LogPart(stream="stdout", offset=10, data=b"x", skipped=3)
    assert stream.url.endswith("?stdout=11&stderr=0")
    assert LogStream("https://h", JOB).url.startswith("wss://h/logs/")


def test_losses_in_a_row_end_it() -> None:
    stream = LogStream(URL, JOB)
    pauses = [stream.pause_after_loss() for _ in range(LogStream.RECONNECTS + 1)]
    assert pauses[-1] is None
    assert all(pause is not None and pause <= 5 for pause in pauses[:-1])
    stream.feed(text(0, "x"))
    assert stream.pause_after_loss() is not None


@pytest.fixture
def flaky_server() -> Iterator[tuple[str, list[str]]]:
    """Breaks each connection after a frame, until all is said; the paths that were asked for."""
    paths: list[str] = []
    words = [text(0, "hello "), text(0, "err", "stderr"), text(6, "world\n"), END]

    def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        paths.append(connection.request.path)
        number = (len(paths) - 1) % len(words)
        try:
            connection.send(words[number])
            if number == 0:
                connection.socket.close()
            elif number == 1:
                connection.close(1012)
        except (ConnectionClosed, OSError):
            pass

    server: Server
    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.socket.getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}", paths
        finally:
            server.shutdown()
            thread.join()


def test_follow_goes_on_where_a_broken_connection_stopped(flaky_server: tuple[str, list[str]]) -> None:
    url, paths = flaky_server

    async def asynchronous() -> list[LogPart | LogEnd]:
        async with AsyncClient(url) as client:
            return [item async for item in client.follow(JOB)]

    with Client(url) as client:
        for items in (list(client.follow(JOB)), asyncio.run(asynchronous())):
            assert [item.text for item in items if isinstance(item, LogPart)] == ["hello ", "err", "world\n"]
            assert isinstance(items[-1], LogEnd)
    queries = [path.partition("?")[2] for path in paths]
    assert queries == ["stdout=0&stderr=0", "stdout=6&stderr=0", "stdout=6&stderr=3", "stdout=12&stderr=3"] * 2


def test_follow_of_no_job_is_refused_at_once() -> None:
    def refuse(connection: ServerConnection, request: Any) -> Any:
        answer = connection.respond(404, json.dumps({"error": "not_found", "details": "no such job"}))
        answer.headers["Content-Type"] = "application/json"
        return answer

    with serve(lambda _: None, "127.0.0.1", 0, process_request=refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with (
                Client(f"http://127.0.0.1:{server.socket.getsockname()[1]}") as client,
                pytest.raises(ServerError, match="no such job") as refusal,
            ):
                list(client.follow(JOB))
            assert refusal.value.status == 404
        finally:
            server.shutdown()
            thread.join()
