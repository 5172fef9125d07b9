"""SIGKILL to any process of the server, or to all: nothing of any job is left, and no client waits for ever."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sandrun.model import MIB
from tests import host, serving
from tests.escape.limits import FILL, meminfo, other_client, returns_to
from tests.serving import GONE_SECONDS, Api, Server

pytestmark = pytest.mark.requirement(34)

CLIENT_SECONDS = host.within(5.0)
"""How long a client whose job is lost may wait to hear of it."""
AGAIN_SECONDS = 15.0
"""How long a part that died may take to be replaced, on a busy machine."""

LONG = (
    FILL
    + """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
fill("/job/file", 20 << 20); fill("/tmp/file", 20 << 20); fill("/dev/shm/file", 20 << 20)
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
        time.sleep(120)
print("begun", flush=True)
time.sleep(120)
"""
)


@dataclass
class Waiter:
    """A client in a thread of its own; `heard` is what it was told in the end, an exception if that was nothing."""

    ask: Callable[[], Any]
    heard: Any = None
    seconds: float = 0.0
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self) -> None:
        try:
            self.heard = self.ask()
        except Exception as error:
            self.heard = error
        self.seconds = time.monotonic()

    def end(self, since: float) -> Any:
        """What it heard, in time."""
        self.thread.join(CLIENT_SECONDS)
        assert not self.thread.is_alive(), "a client was left hanging"
        assert self.seconds - since < CLIENT_SECONDS
        return self.heard


@dataclass
class Scene:
    """A server that has a submitted job, a job by /run, a follower of the first one's log, and a parked sandbox.

    Attributes:
        inhabitants: all processes of all sandboxes, parked ones too.
        tree: cgroup directories of the spawner.
    """

    server: Server
    api: Api
    job_id: str
    run: Waiter
    follower: Waiter
    inhabitants: list[host.Process]
    rooms: host.Rooms
    tree: list[str]

    def member(self, inside: int) -> host.Process:
        """The init (1) or the entrypoint (2) of a job that runs."""
        return next(p for p in self.server.busy() if p.pid_inside == inside)

    def assert_nothing_left(self) -> None:
        """No process, and with that no mount and no namespace, of any sandbox; tmpfs is seen by `Shmem`."""

        def left() -> list[host.Process]:
            return [p for p in self.inhabitants if p.alive]

        assert serving.wait_until(lambda: not left(), GONE_SECONDS), [p.title for p in left()]
        assert serving.wait_until(lambda: not self.rooms.inhabitants(), GONE_SECONDS)

    def tree_is_gone(self, seconds: float) -> bool:
        return serving.wait_until(lambda: not any(os.path.exists(path) for path in self.tree), seconds)

    def serves_again(self, seconds: float = AGAIN_SECONDS) -> bool:
        """Whether a job can be run; until then the answer is 503 with Retry-After, or none."""

        def served() -> bool:
            with contextlib.suppress(httpx2.TransportError):
                answer = self.api.http.post("/run", json={"code": "print('again')"}, timeout=10)
                if answer.status_code == 200:
                    assert answer.json()["stdout"] == "again\n", answer.text
                    return True
                assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
            return False

        return serving.wait_until(served, seconds, 0.1)


def follow(api: Api, job_id: str) -> list[dict[str, Any]]:
    """All frames of a log stream, to its end."""
    with api.http.stream("GET", f"/logs/{job_id}/stream", timeout=60) as stream:
        return [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]


@contextlib.contextmanager
def scene(server: Server, code: str = LONG) -> Iterator[Scene]:
    with (
        httpx2.Client(base_url=server.url, timeout=60) as http,
        other_client(server.url, 0) as second,
        other_client(server.url, 1) as third,
    ):
        api = Api(http)
        job_id = api.submit({"main.py": code}, entrypoint="main.py", timeout=120)
        assert serving.wait_until(lambda: api.logs(job_id) == "begun\n", 30), api.logs(job_id)
        follower = Waiter(lambda: follow(third, job_id))
        run = Waiter(lambda: second.run("import time; time.sleep(120)", timeout=120))
        assert serving.wait_until(lambda: len({p.pid for p in server.busy() if p.pid_inside == 1}) == 2, 30)
        sandboxes = [p for members in server.sandboxes() for p in members]
        spawner = server.part("spawner")
        with host.Rooms(sandboxes) as rooms:
            tree = host.own_cgroups({spawner.pid})
            yield Scene(server, api, job_id, run, follower, sandboxes, rooms, tree)
        for process in server.busy():  # what lives would hold up the server's end
            if process.pid_inside == 1:
                os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def crash(start_server: Callable[..., Server]) -> Iterator[Scene]:
    with scene(start_server()) as made:
        yield made


def assert_lost(heard: Any) -> None:
    """Either the server tells, or it is not there any more."""
    if isinstance(heard, dict):
        assert heard["outcome"] == "worker_lost", heard
        assert heard["status"] == "failed"
    else:
        assert isinstance(heard, httpx2.TransportError), heard


# ---- one sandbox dies --------------------------------------------------------------------------------------


def test_killed_entrypoint_is_told_as_it_died(crash: Scene) -> None:
    began = time.monotonic()
    os.kill(crash.member(2).pid, signal.SIGKILL)
    ends = [Waiter(lambda: crash.api.wait(crash.job_id, 10))]
    assert serving.wait_until(lambda: not ends[0].thread.is_alive() or not crash.run.thread.is_alive(), CLIENT_SECONDS)
    told = ends[0].heard if not ends[0].thread.is_alive() else crash.run.end(began)
    assert (told["outcome"], told["signal"]) == ("signaled", 9)
    assert crash.serves_again()


def test_killed_init_takes_its_job_along_and_no_other(crash: Scene) -> None:
    """Its client hears `worker_lost`; the other job, and the server, go on."""
    init = crash.member(1)
    members = next(members for members in crash.server.sandboxes() if members[0].pid == init.pid)
    began = time.monotonic()
    os.kill(init.pid, signal.SIGKILL)
    submitted = Waiter(lambda: crash.api.wait(crash.job_id, 10))
    assert serving.wait_until(
        lambda: not submitted.thread.is_alive() or not crash.run.thread.is_alive(), CLIENT_SECONDS
    )
    first_is_lost = not submitted.thread.is_alive()
    assert_lost(submitted.heard if first_is_lost else crash.run.end(began))
    assert serving.wait_until(lambda: not any(p.alive for p in members), GONE_SECONDS)
    others = [p for p in crash.inhabitants if p not in members and p.alive]
    assert others
    assert crash.serves_again()
    assert crash.api.http.post(f"/jobs/{crash.job_id}/cancel").status_code == 200
    if first_is_lost:
        assert crash.follower.end(time.monotonic())[-1]["outcome"] == "worker_lost"


# ---- a part of the server dies -----------------------------------------------------------------------------


def assert_all_lost(crash: Scene, began: float) -> None:
    assert_lost(crash.run.end(began))
    frames = crash.follower.end(began)
    if isinstance(frames, list):
        assert frames[-1] == {"event": "end", "status": "failed", "outcome": "worker_lost", "exit_code": None}
    else:
        assert isinstance(frames, httpx2.TransportError), frames


@pytest.mark.parametrize("part", ["zygote", "spawner"])
def test_killed_part_takes_its_jobs_along_and_is_replaced(part: str, crash: Scene) -> None:
    """The HTTP process lives: it tells every client of a lost job, and knows what was written before."""
    api = crash.server.part("api").pid
    began = time.monotonic()
    os.kill(crash.server.part(part).pid, signal.SIGKILL)
    crash.assert_nothing_left()
    assert_all_lost(crash, began)
    lost = crash.api.wait(crash.job_id, CLIENT_SECONDS)
    assert (lost["outcome"], lost["exit_code"], lost["signal"]) == ("worker_lost", None, None)
    assert crash.api.logs(crash.job_id) == "begun\n"
    assert crash.serves_again()
    assert crash.server.part("api").pid == api
    if part == "spawner":
        assert crash.tree_is_gone(AGAIN_SECONDS)
    else:
        jobs = [name for top in crash.tree for _, names, _ in os.walk(top) for name in names if name[0] == "j"]
        assert len(set(jobs)) <= 2 * len(os.sched_getaffinity(0))  # what is parked again


def test_killed_api_takes_its_jobs_along_and_is_replaced(crash: Scene) -> None:
    """Its memory is where the jobs were known: their ids are gone, and nothing of them is left."""
    spawner = crash.server.part("spawner")
    began = time.monotonic()
    os.kill(crash.server.part("api").pid, signal.SIGKILL)
    assert isinstance(crash.run.end(began), httpx2.TransportError)
    assert isinstance(crash.follower.end(began), httpx2.TransportError)
    crash.assert_nothing_left()
    assert crash.serves_again()
    assert not spawner.alive
    assert crash.tree_is_gone(GONE_SECONDS)
    assert crash.api.http.get(f"/status/{crash.job_id}").status_code == 404


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(("zygote", "spawner"), marks=pytest.mark.once),
        pytest.param(("spawner", "api"), marks=pytest.mark.once),
        ("zygote", "spawner", "api"),
    ],
)
def test_killed_parts_take_their_jobs_along_and_are_replaced(parts: tuple[str, ...], crash: Scene) -> None:
    began = time.monotonic()
    for pid in [crash.server.part(part).pid for part in parts]:
        os.kill(pid, signal.SIGKILL)
    assert_all_lost(crash, began)
    crash.assert_nothing_left()
    assert crash.serves_again()
    assert crash.tree_is_gone(AGAIN_SECONDS)


@pytest.mark.parametrize("part", ["zygote", "spawner"])
def test_jobs_in_any_stage_are_run_or_lost_and_never_blamed(part: str, start_server: Callable[..., Server]) -> None:
    """Clients that send one job after the other while a part dies twice: each is answered, with one of three."""
    server = start_server()
    heard: set[str] = set()
    over = threading.Event()

    def send(number: int) -> None:
        transport = httpx2.HTTPTransport(local_address=f"127.0.1.{number}")
        with httpx2.Client(base_url=server.url, transport=transport, timeout=20) as http:
            while not over.is_set():
                answer = http.post("/run", json={"code": "print(1)"})
                told = answer.json()
                heard.add(str(told.get("failure") or told.get("outcome") or answer.status_code))

    waiters = [Waiter(functools.partial(send, number)) for number in range(1, 7)]
    for _ in range(2):
        time.sleep(0.3)
        if serving.wait_until(lambda: _has(server, part), AGAIN_SECONDS):
            os.kill(server.part(part).pid, signal.SIGKILL)
    time.sleep(0.5)
    over.set()
    for waiter in waiters:
        waiter.thread.join(30)
        assert waiter.heard is None, waiter.heard
    assert "exited" in heard
    assert heard <= {"exited", "worker_lost", "503"}


def kill_zygotes(server: Server, over: Callable[[set[int]], bool]) -> None:
    """Each one as soon as it is there, until `over` says so of those that were."""
    killed: set[int] = set()

    def killed_enough() -> bool:
        with contextlib.suppress(AssertionError, ProcessLookupError):
            zygote = server.part("zygote").pid
            if zygote not in killed:
                os.kill(zygote, signal.SIGKILL)
                killed.add(zygote)
        return over(killed)

    assert serving.wait_until(killed_enough, AGAIN_SECONDS, 0.001), server.tail()


def test_zygote_killed_while_it_starts_is_replaced(crash: Scene) -> None:
    """Nothing is wrong with the host: no environment is withdrawn for it, and the spawner goes on."""
    spawner = crash.server.part("spawner")
    kill_zygotes(crash.server, lambda killed: len(killed) == 3)
    crash.assert_nothing_left()
    assert crash.serves_again()
    assert crash.server.part("spawner").pid == spawner.pid


@pytest.mark.once
def test_zygotes_that_die_again_and_again_are_a_case_for_another_spawner(crash: Scene) -> None:
    """No server stays up that can run nothing: the spawner ends, the next looks at the host anew."""
    spawner, api = crash.server.part("spawner"), crash.server.part("api")
    kill_zygotes(crash.server, lambda _: not spawner.alive)
    crash.assert_nothing_left()
    assert crash.serves_again()
    assert crash.server.part("api").pid == api.pid


# ---- the server dies ---------------------------------------------------------------------------------------


def everything(server: Server) -> list[host.Process]:
    return [*server.descendants(), *[p for p in [host.process(server.pid)] if p]]


@pytest.mark.parametrize(
    "victims",
    [
        "supervisor",
        pytest.param("all at once", marks=pytest.mark.once),
        "all but the sandboxes",
        pytest.param("the sandboxes last", marks=pytest.mark.once),
    ],
)
def test_killed_server_leaves_nothing_that_the_next_does_not_remove(
    victims: str, crash: Scene, start_server: Callable[..., Server]
) -> None:
    server = crash.server
    members = everything(server)
    inside = [p for p in members if p.pid_depth > 2]
    if victims == "supervisor":
        doomed = [p for p in members if p.pid == server.pid]
    elif victims == "all but the sandboxes":
        doomed = [p for p in members if p not in inside]
    else:
        doomed = sorted(members, key=lambda p: p in inside)
    began = time.monotonic()
    for process in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    server.process.wait(5)
    assert_all_lost(crash, began)
    crash.assert_nothing_left()
    assert serving.wait_until(lambda: not any(p.alive for p in members), GONE_SECONDS)
    with pytest.raises(httpx2.ConnectError):
        crash.api.http.get("/health")
    following = start_server()
    assert not any(os.path.exists(path) for path in crash.tree), "the next start left cgroups of the one before"
    with httpx2.Client(base_url=following.url, timeout=30) as http:
        assert Api(http).run("print(1)")["stdout"] == "1\n"


def test_killed_server_takes_a_fork_bomb_along(start_server: Callable[..., Server]) -> None:
    """A hundred processes that fork as fast as they can, in sessions of their own."""
    bomb = """
import os
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        os.write(1, b"full\\n")
"""
    server = start_server()
    with httpx2.Client(base_url=server.url, timeout=30) as http:
        api = Api(http)
        if "pids" in http.get("/health").json()["isolation"]["waived"]:
            pytest.skip("pids waived on this host, and nothing would stop the bomb")
        spawner = server.part("spawner").pid  # the titles of processes that fork all the time take seconds to read
        job_id = api.submit({"main.py": bomb}, entrypoint="main.py")
        assert serving.wait_until(lambda: "full\n" in api.logs(job_id), 30)
        rooms = host.Rooms([p for p in server.descendants() if p.pid_inside == 1 and p.pid_depth > 2])
        os.kill(spawner, signal.SIGKILL)
        with rooms:
            assert serving.wait_until(lambda: not rooms.inhabitants(), GONE_SECONDS)
        assert api.wait(job_id, CLIENT_SECONDS)["outcome"] == "worker_lost"


def test_killed_command_takes_its_job_along(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    """`sandrun run` has a spawner of its own; no server is there to see to it."""
    tmp_path.chmod(0o755)
    (tmp_path / "main.py").write_text(LONG)
    command = [str(serving.SANDRUN), "run", str(tmp_path / "main.py"), *serving.default_flags()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True) as ran:
        assert ran.stdout is not None
        assert ran.stdout.readline() == b"begun\n"
        members = host.descendants(ran.pid)
        tree = host.own_cgroups({p.pid for p in members})
        assert max(p.pid_depth for p in members) > 2
        with host.Rooms(members) as rooms:
            os.kill(ran.pid, signal.SIGKILL)
            assert serving.wait_until(lambda: not rooms.inhabitants(), GONE_SECONDS)
        assert serving.wait_until(lambda: not any(p.alive for p in members), GONE_SECONDS)
    start_server()
    assert not any(os.path.exists(path) for path in tree)


def test_tmpfs_of_lost_jobs_is_gone(crash: Scene) -> None:
    """60 MB a job in its files: shared memory of the host returns."""
    with_files = meminfo("Shmem")
    os.kill(crash.server.part("spawner").pid, signal.SIGKILL)
    crash.assert_nothing_left()
    assert returns_to(lambda: meminfo("Shmem"), with_files - 60 * MIB, 24 * MIB)


@pytest.mark.root
def test_frozen_job_dies_with_its_spawner(crash: Scene) -> None:
    """As one is that has used up its client's budget."""
    from tests.escape.test_resources_time import frozen

    with frozen(crash.member(2)):
        os.kill(crash.server.part("spawner").pid, signal.SIGKILL)
        crash.assert_nothing_left()
    assert crash.serves_again()


def test_server_that_dies_again_and_again_gives_up(start_server: Callable[..., Server]) -> None:
    """A restart that does not help is not tried for ever: the exit status says so, for whoever supervises it."""
    server = start_server()
    killed: set[host.Process] = set()

    def given_up() -> bool:
        with contextlib.suppress(ProcessLookupError, AssertionError):
            spawner = server.part("spawner")
            killed.add(spawner)
            os.kill(spawner.pid, signal.SIGKILL)
        return server.process.poll() is not None

    assert serving.wait_until(given_up, 60)
    assert server.process.returncode == 1
    assert 5 <= len(killed) <= 7
    assert "Traceback" not in server.tail()


def _has(server: Server, word: str) -> bool:
    with contextlib.suppress(AssertionError):
        return server.part(word).alive
    return False


@pytest.mark.once
def test_server_that_is_killed_keeps_nothing_on_disk(crash: Scene) -> None:
    """Jobs live in memory alone: its state directory holds what it held before."""
    folder = Path(crash.server.log).parent
    os.kill(crash.server.pid, signal.SIGKILL)
    crash.server.process.wait(5)
    crash.assert_nothing_left()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [crash.server.log.name]
