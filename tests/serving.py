"""A real server for the tests: started as a user would, used over HTTP, stopped by pid, and nothing of it is left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests import host

SANDRUN = Path(sys.executable).parent / "sandrun"
FLAGS = "TEST_SERVER_FLAGS"
"""Environment variable: a tier's flags for every server that its tests start; a test's own come later and hold."""
START_SECONDS = 40.0  # user-mode Linux on a busy machine is slow
STOP_SECONDS = 45.0
GONE_SECONDS = 2.0  # requirement 34


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(true: Any, seconds: float, step: float = 0.02) -> bool:
    """Whether `true()` came true in this time (`host.within`)."""
    end = time.monotonic() + host.within(seconds)
    while not true():
        if time.monotonic() > end:
            return bool(true())
        time.sleep(step)
    return True


def default_flags() -> list[str]:
    """As an ordinary user without a delegated cgroup the tests waive just that layer."""
    return [] if os.geteuid() == 0 else ["--allow-missing", "cgroup"]


@dataclass
class Server:
    """A running `sandrun serve`.

    Attributes:
        pid: of the supervisor.
        log: the file with its stderr.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def descendants(self) -> list[host.Process]:
        return host.descendants(self.pid)

    def sandboxes(self) -> list[list[host.Process]]:
        """Each sandbox's processes, parked ones too, init first: they live below a zygote's PID namespace."""
        ours = host.process(os.getpid())
        base = ours.pid_depth if ours else 1
        inits = [p for p in self.descendants() if p.pid_depth == base + 2 and p.pid_inside == 1]
        return [[init, *host.descendants(init.pid)] for init in inits]

    def lasting(self) -> list[host.Process]:
        """Api, spawner and zygotes. Told apart by where they live: a sandbox's title is at first its zygote's."""
        ours = host.process(os.getpid())
        base = ours.pid_depth if ours else 1
        return [p for p in self.descendants() if 0 < p.pid_depth < base + 2]

    def busy(self) -> list[host.Process]:
        """Processes of jobs: of sandboxes that are not parked. In a parked one a single process waits for its files,
        with a socket open that no job has (requirement 12)."""
        found = []
        for members in self.sandboxes():
            if len(members) != 2 or not any(text.startswith("socket:") for text in members[1].descriptors()):
                found += members
        return found

    def part(self, word: str) -> host.Process:
        """The process of this server with `word` (api, spawner, zygote) in its title."""
        found = [p for p in self.descendants() if word in p.title.split("/")[-1]]
        assert found, f"no process called {word} among {[p.title for p in self.descendants()]}"
        return found[0]

    def idle(self, seconds: float = GONE_SECONDS) -> bool:
        """Whether no process of any job is left within this time."""
        return wait_until(lambda: not self.busy(), seconds)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self, how: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> None:
        """Stop it and prove that no process, namespace, cgroup or mount of it is left."""
        before = self.descendants()
        rooms = host.Rooms(before)
        pids = {p.pid for p in before} | {self.pid}
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server was not over {seconds:g} s after signal {how}\n{self.tail()}") from None
        finally:
            left = [p for p in before if not wait_until(lambda p=p: not p.alive, GONE_SECONDS)]
            described = [f"{p.pid} {p.title}" for p in left]
            for p in left:  # the test fails below; the machine is left clean all the same
                with contextlib.suppress(OSError):
                    os.kill(p.pid, signal.SIGKILL)
        assert not left, f"processes outlived the server: {described}\n{self.tail()}"
        with rooms:
            inhabited = not wait_until(lambda: not rooms.inhabitants(), GONE_SECONDS)
            assert not inhabited, f"namespaces are still inhabited: {[p.title for p in rooms.inhabitants()]}"
        if how != signal.SIGKILL:
            assert not host.own_cgroups(pids), "cgroups outlived the server"
        new = {m for m in host.mounts() if "sandrun" in m and str(Path(sys.prefix).parent) not in m}
        assert not new, f"mounts outlived the server: {new}"


@contextlib.contextmanager
def state_directory() -> Iterator[Path]:
    """A directory that others can enter (pytest's own temporary ones are 0700), gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sandrun-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def start(directory: Path, *flags: str, env: Mapping[str, str] | None = None, waive: bool = True) -> Server:
    """Start `sandrun serve` on a free loopback port and wait for /health. It dies with this process."""
    port = free_port()
    log = directory / f"server-{port}.log"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SANDRUN_")}
    tiers = shlex.split(os.environ.get(FLAGS, ""))
    command = [str(SANDRUN), "serve", "--port", str(port), *(default_flags() if waive else []), *tiers, *flags]
    if "--client-running-share" not in flags:  # all tests are one client, and a small machine has few places
        command += ["--client-running-share", "1"]
    if "--state-dir" not in flags:
        command += ["--state-dir", str(directory)]
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env={**clean, **(env or {})},
        )
    server = Server(process, port, log)
    end = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}\n{server.tail()}")
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{server.url}/health", timeout=5).status_code == 200:
                return server
        if time.monotonic() > end:
            server.stop(signal.SIGKILL)
            raise AssertionError(f"no /health within {START_SECONDS:g} s\n{server.tail()}")
        time.sleep(0.03)


@contextlib.contextmanager
def running(*flags: str, env: Mapping[str, str] | None = None, waive: bool = True) -> Iterator[Server]:
    """`start`, then `stop` on every path."""
    with state_directory() as directory:
        server = start(directory, *flags, env=env, waive=waive)
        try:
            yield server
        finally:
            server.stop()


# ---- using it ----------------------------------------------------------------------------------------------


def tarball(files: Mapping[str, str | bytes], *, executable: tuple[str, ...] = ()) -> bytes:
    """A gzip'd tar of these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if name in executable else 0o644
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


@dataclass
class Api:
    """The HTTP API in the words of the tests. `http` is the raw client for all else."""

    http: httpx2.Client

    def run(self, code: str | None = None, **request: Any) -> dict[str, Any]:
        """POST /run; the result object. Refusals are the test's own business: use `http`."""
        if code is not None:
            request["code"] = code
        answer = self.http.post("/run", json=request, timeout=330)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        result: dict[str, Any] = answer.json()
        return result

    def submit(self, files: Mapping[str, str | bytes] | bytes, **manifest: Any) -> str:
        """POST /submit; the job's id."""
        packed = files if isinstance(files, bytes) else tarball(files)
        answer = self.http.post(
            "/submit",
            files={
                "manifest": ("manifest.json", json.dumps(manifest).encode(), "application/json"),
                "files": ("job.tar.gz", packed, "application/gzip"),
            },
            timeout=120,
        )
        assert answer.status_code == 202, f"{answer.status_code} {answer.text}"
        return str(answer.json()["job_id"])

    def wait(self, job_id: str, seconds: float = 120) -> dict[str, Any]:
        """The result object once the job has ended."""
        end = time.monotonic() + seconds
        while True:
            answer = self.http.get(f"/status/{job_id}", params={"wait": 10}, timeout=60)
            assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
            result: dict[str, Any] = answer.json()
            if result["status"] in ("completed", "failed"):
                return result
            assert time.monotonic() < end, f"the job was still {result['status']} after {seconds:g} s"

    def logs(self, job_id: str, stream: str = "stdout") -> str:
        answer = self.http.get(f"/logs/{job_id}", params={"stream": stream})
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        return answer.text

    def job(self, files: Mapping[str, str | bytes] | bytes, **manifest: Any) -> dict[str, Any]:
        """Submit, wait, and add the logs: the result object as /run would give it."""
        job_id = self.submit(files, **manifest)
        result = self.wait(job_id)
        result["stdout"], result["stderr"] = self.logs(job_id), self.logs(job_id, "stderr")
        return result

    def download(self, job_id: str, path: str) -> bytes:
        answer = self.http.get(f"/download/{job_id}/{path}")
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        return answer.content
