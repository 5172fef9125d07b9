"""The HTTP process in a real server: how it starts, stops, and what it leaves on disk and in the log."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.sync.client import connect

from sandrun.jobs.job import job_tag
from tests import host, serving
from tests.serving import SANDRUN, Server, free_port, tarball, wait_until

ROOT = Path(__file__).parents[2]
StartServer = Callable[..., Server]


class Later(threading.Thread):
    """Something that runs beside the test; `result` waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._value: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._work()
        except Exception as error:
            self._value = error

    def result(self, seconds: float = 30) -> Any:
        self.join(seconds)
        assert not self.is_alive(), "it is not over"
        return self._value


def running_jobs(url: str) -> int:
    return int(httpx2.get(f"{url}/health").json()["running"])


def post(url: str, **request: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/run", json=request, timeout=60)


# ---- stopping ----------------------------------------------------------------------------------------------


@pytest.mark.requirement(35)
def test_stop_lets_running_jobs_finish_and_takes_no_new_ones(start_server: StartServer) -> None:
    server = start_server("--grace-seconds", "20")
    submitted = submit(server.url, "import time\nfor n in range(4):\n print(n, flush=True)\n time.sleep(0.5)\n")
    asked = Later(lambda: post(server.url, code="import time; time.sleep(2); print('done')"))
    with connect(f"ws{server.url[4:]}/logs/{submitted}/stream", proxy=None) as stream:
        assert wait_until(lambda: running_jobs(server.url) == 2, 10)
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: httpx2.get(f"{server.url}/health").json()["status"] == "draining", 5)
        refused = post(server.url, code="print(1)")
        assert (refused.status_code, refused.json()["error"]) == (503, "overloaded")
        frames = [json.loads(frame) for frame in stream]
    assert "".join(frame.get("text", "") for frame in frames) == "0\n1\n2\n3\n"
    assert frames[-1] == {"event": "end", "status": "completed", "outcome": "exited", "exit_code": 0}
    assert asked.result().json()["stdout"] == "done\n"
    assert server.process.wait(10) == 0


@pytest.mark.requirement(35)
def test_jobs_beyond_the_grace_period_are_cancelled_and_told(start_server: StartServer) -> None:
    server = start_server("--grace-seconds", "1")
    asked = Later(lambda: post(server.url, code="import time; print('begun', flush=True); time.sleep(60)", timeout=60))
    assert wait_until(lambda: running_jobs(server.url) == 1, 10)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    result = asked.result().json()
    assert (result["outcome"], result["stdout"]) == ("cancelled", "begun\n")
    assert server.process.wait(10) == 0
    assert time.monotonic() - begun < host.within(8)


@pytest.mark.requirement(35)
def test_second_signal_stops_now(start_server: StartServer) -> None:
    server = start_server("--grace-seconds", "15")
    asked = Later(lambda: post(server.url, code="import time; time.sleep(15)", timeout=60))
    assert wait_until(lambda: running_jobs(server.url) == 1, 10)
    server.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: httpx2.get(f"{server.url}/health").json()["status"] == "draining", 5)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(10)
    assert time.monotonic() - begun < host.within(5)
    assert isinstance(asked.result(), httpx2.HTTPError)


# ---- starting ----------------------------------------------------------------------------------------------


def refusal(*flags: str) -> tuple[int, str]:
    """Exit status and stderr of a server that does not start."""
    command = [str(SANDRUN), "serve", *serving.default_flags(), *flags]
    with serving.state_directory() as state:
        done = subprocess.run(
            [*command, "--state-dir", str(state)], capture_output=True, text=True, timeout=60, check=False
        )
    return done.returncode, done.stderr


@pytest.mark.once
def test_port_in_use_is_told_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, told = refusal("--port", str(port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in told
    assert "Traceback" not in told


@pytest.mark.once
def test_certificate_that_is_none_is_told() -> None:
    code, told = refusal("--port", "0", "--cert", "/etc/hostname", "--key", "/etc/hostname")
    assert code == 1
    assert "/etc/hostname" in told
    assert "Traceback" not in told


@pytest.mark.once
def test_server_speaks_tls_with_the_operators_certificate() -> None:
    certificate = str(ROOT / "tests" / "data" / "localhost.pem")
    port = free_port()
    trusting = ssl.create_default_context(cafile=certificate)
    with (
        serving.state_directory() as state,
        httpx2.Client(base_url=f"https://localhost:{port}", verify=trusting, timeout=10, trust_env=False) as http,
    ):
        command = [str(SANDRUN), "--port", str(port), "--cert", certificate, "--key", certificate]
        child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command, *serving.default_flags(), "--state-dir", str(state)],
            stderr=subprocess.DEVNULL,
        )

        def healthy() -> bool:
            try:
                return http.get("/health").status_code == 200
            except httpx2.TransportError:
                return False

        try:
            assert wait_until(healthy, 40)
            assert http.post("/run", json={"code": "print(6 * 7)"}).json()["stdout"] == "42\n"
            assert "https://localhost" in http.get("/").text
        finally:
            child.terminate()
            assert child.wait(20) == 0


# ---- slow clients ------------------------------------------------------------------------------------------


def seconds_until_cut(port: int, first: bytes, then: bytes) -> float:
    """How long a client lives that sends `first`, and then `then` one byte every half second; it must get 408."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
        connection.sendall(first)
        got = b""
        left = list(then)
        while time.monotonic() - begun < 25:
            try:
                piece = connection.recv(4096)
            except TimeoutError:
                if left:
                    connection.sendall(bytes([left.pop(0)]))
                continue
            if not piece:
                break
            got += piece
        assert got.startswith(b"HTTP/1.1 408 "), got
        return time.monotonic() - begun


@pytest.mark.once
@pytest.mark.requirement(30)
def test_slow_clients_are_cut_off_in_their_time(running_server: Server) -> None:
    head = b"POST /run HTTP/1.1\r\nHost: localhost\r\n"
    silent = Later(lambda: seconds_until_cut(running_server.port, b"", b""))
    header = Later(lambda: seconds_until_cut(running_server.port, head, b"X: " + b"a" * 99))
    body = Later(lambda: seconds_until_cut(running_server.port, head + b"Content-Length: 99\r\n\r\n", b" " * 98))
    assert 4.9 < silent.result() < 9
    assert 4.9 < header.result() < 9
    assert 9.9 < body.result() < 15
    assert httpx2.get(f"{running_server.url}/health").status_code == 200


# ---- what it leaves ----------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.requirement(26, 30)
@pytest.mark.needs("strace")
def test_upload_download_and_logs_touch_no_file(running_server: Server, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pid = running_server.part("api").pid
    calls = "trace=open,openat,openat2,creat,memfd_create,rename,link,mkdir"
    strace = subprocess.Popen(
        ["strace", "-f", "-qq", "-p", str(pid), "-e", calls, "-o", str(trace)], stderr=subprocess.DEVNULL
    )
    try:
        assert wait_until(lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text(), 10)
        job = submit(running_server.url, "open('out', 'wb').write(b'y' * 3_000_000)", big=os.urandom(20_000_000))
        with httpx2.Client(base_url=running_server.url, timeout=60) as http:
            assert http.get(f"/status/{job}", params={"wait": 30}).json()["status"] == "completed"
            assert len(http.get(f"/download/{job}/out").content) == 3_000_000
            http.get(f"/download/{job}")
            http.get(f"/logs/{job}")
            http.post("/run", json={"code": "print(1)", "files": {"f": "x" * 2_000_000}})
            http.delete(f"/jobs/{job}")
    finally:
        strace.terminate()
        strace.wait(10)
    seen = trace.read_text()
    assert "memfd_create" in seen, "the trace saw nothing"
    written = [line for line in seen.splitlines() if any(flag in line for flag in ("O_CREAT", "O_TMPFILE", "O_WRONLY"))]
    assert written == []


@pytest.mark.requirement(26, 33)
def test_log_has_tags_but_neither_ids_nor_content(start_server: StartServer) -> None:
    server = start_server()
    canary = "canary-5b1c"
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        job = submit(server.url, f"print('{canary}')")
        assert http.get(f"/status/{job}", params={"wait": 30}).json()["status"] == "completed"
        result = http.post("/run", json={"code": f"raise SystemExit('{canary}')", "args": [canary]}).json()
        http.get(f"/logs/{job}")
        http.get(f"/download/{job}/{canary}")
        http.get(f"/{canary}")
        http.get("/health", headers={"Host": f"{canary}.example"})
        http.post("/run", json={"code": canary, canary: 1})
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(f'{canary}\r\n{{"event": "forged"}}\r\n\r\n'.encode())
        raw.recv(4096)
    told = server.tail()
    assert job_tag(job) in told
    assert job_tag(result["job_id"]) in told
    assert job not in told
    assert result["job_id"] not in told
    assert canary not in told
    events = [json.loads(line) for line in told.splitlines()]  # every line is one of ours
    refused = [event for event in events if event["event"] == "request_refused"]
    assert {event["status"] for event in refused} == {400, 421}
    assert {event["address"] for event in refused} == {"127.0.0.1"}, "for fail2ban"


def submit(url: str, code: str, **files: bytes) -> str:
    parts = {"manifest": b'{"entrypoint": "main.py"}', "files": tarball({"main.py": code, **files})}
    answer = httpx2.post(f"{url}/submit", files=parts, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])
