"""Hostile programs and the places they run in: each kind of job, and a plain process outside for comparison."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sandrun.linux.seccomp import resolve
from sandrun.spawner.interpreters import find_python
from tests import host
from tests.serving import Api, Server, wait_until

PROGRAMS = Path(__file__).parent / "programs"
PYTHON = find_python("/")


def program(name: str) -> str:
    return (PROGRAMS / name).read_text()


# ---- kinds of job ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """One way in which a job's process comes to be.

    Attributes:
        files: what a job of this kind consists of, with None where the program goes.
        manifest: what it asks for.
        compiled: it runs machine code; the program is bytes then.
    """

    name: str
    files: Mapping[str, str | None]
    manifest: Mapping[str, Any]
    compiled: bool = False

    def job(self, code: str | bytes, more: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
        return {**{name: code if text is None else text for name, text in self.files.items()}, **more}


IN_PLACE = Kind("in-place", {"main.py": None}, {"entrypoint": "main.py"})
FRESH = Kind("fresh-interpreter", {"main.py": None}, {"entrypoint": "main.py", "fresh_interpreter": True})
SHELL = Kind(
    "below-a-shell",
    {"main.sh": f'{PYTHON} program.py "$@"\nexit $?\n', "program.py": None},
    {"entrypoint": "main.sh", "interpreter": "bash"},
)
COMPILED = Kind("compiled", {"main": None}, {"entrypoint": "main", "interpreter": "executable"}, compiled=True)

PYTHONS = (IN_PLACE, FRESH, SHELL)
KINDS = (*PYTHONS, COMPILED)


@functools.cache
def compiled(name: str, *flags: str) -> bytes:
    """A program of programs/, compiled on this host."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/out"
        subprocess.run(["gcc", "-O1", *flags, "-o", target, str(PROGRAMS / name)], check=True, timeout=60)
        return Path(target).read_bytes()


class Inside:
    """One kind of job on the session's server; what a program said is kept for all tests that look at it."""

    def __init__(self, kind: Kind, api: Api) -> None:
        self.kind = kind
        self.api = api
        self._said: dict[object, Any] = {}

    def run(
        self, code: str | bytes, *, files: Mapping[str, str | bytes] | None = None, **manifest: Any
    ) -> dict[str, Any]:
        """The result object with both logs."""
        return self.api.job(self.kind.job(code, files or {}), **{**self.kind.manifest, **manifest})

    def says(self, name: str, **manifest: Any) -> Any:
        """What a Python program of programs/ prints, which is JSON; run once."""
        key = (name, json.dumps(manifest, sort_keys=True))
        if key not in self._said:
            self._said[key] = json.loads(succeeded(self.run(program(name), **manifest))["stdout"])
        return self._said[key]

    def answers(self, calls: Mapping[str, Call]) -> dict[str, str]:
        """What the kernel answers to these calls, by the same names; made once."""
        key = tuple(calls.items())
        if key not in self._said:
            code = compiled("calls.c") if self.kind.compiled else program("calls.py")
            result = succeeded(self.run(code, stdin=lines(calls), timeout=120))
            self._said[key] = read_answers(calls, result["stdout"])
        found: dict[str, str] = self._said[key]
        return found


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    told = {name: result[name] for name in ("outcome", "exit_code", "signal", "limits_hit", "failure")}
    assert (result["outcome"], result["exit_code"]) == ("exited", 0), (told, result["stderr"][-3000:])
    return result


# ---- outside -----------------------------------------------------------------------------------------------

# A plain child whose PID 1, mounts, IPC and network are its own: what it breaks is gone with it.
_ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--ipc", "--uts", "--net"]


def alone(command: list[str]) -> list[str]:
    """A command that runs `command` as PID 2 of namespaces of its own, with root's capabilities over them."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [*_ALONE, *user, "--", "/bin/sh", "-c", '"$@"; exit $?', "sh", *command]


def outside(code: str, *arguments: str, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """The same Python program in a plain child of ours, alone."""
    return subprocess.run(
        alone([PYTHON, "-c", code, *arguments]),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def outside_answers(calls: Mapping[str, Call]) -> dict[str, str]:
    ran = outside(program("calls.py"), stdin=lines(calls))
    assert ran.returncode == 0, ran.stderr
    return read_answers(calls, ran.stdout)


# ---- system calls ------------------------------------------------------------------------------------------

NUMBERS = {"statmount": 457, "listmount": 458, "mseal": 462}
"""Calls that libseccomp may be too old for; since 424 a call has one number on all architectures."""


class Call(NamedTuple):
    """A system call: its name or number, and arguments as programs/calls.py takes them."""

    name: str | int
    arguments: tuple[str | int, ...] = ()

    @property
    def number(self) -> int | None:
        if isinstance(self.name, int):
            return self.name
        if self.name == "i386":
            return 0
        return resolve(self.name) if self.name not in NUMBERS else NUMBERS[self.name]


def call(name: str | int, *arguments: str | int) -> Call:
    return Call(name, arguments)


def known(calls: Mapping[str, Call]) -> dict[str, Call]:
    """Those that exist on this machine: aarch64 lacks open, chmod and the like."""
    return {what: one for what, one in calls.items() if one.number is not None}


def lines(calls: Mapping[str, Call]) -> str:
    made = []
    for what, one in calls.items():
        assert one.number is not None, f"{what}: {one.name} has no number here"
        first = "i386" if one.name == "i386" else hex(one.number)
        made.append(" ".join(map(str, (first, *one.arguments))))
    return "\n".join(made) + "\n"


def read_answers(calls: Mapping[str, Call], said: str) -> dict[str, str]:
    answers = said.split()
    assert len(answers) == len(calls), said
    return {what: _readable(answer) for what, answer in zip(calls, answers, strict=True)}


def _readable(answer: str) -> str:
    """ "ok", the errno's name, or the signal's."""
    if answer[0] == "E":
        return errno.errorcode.get(int(answer[1:]), answer)
    return signal.Signals(int(answer[1:])).name if answer[0] == "S" else "ok"


# ---- jobs that are looked at while they run ----------------------------------------------------------------

_SAY_TOKEN = """\
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
"""


@dataclass
class Held:
    """A running job, found on the host by the name that its process gave itself.

    Attributes:
        process: the one that holds the token.
    """

    api: Api
    job_id: str
    process: host.Process
    server: Server
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"/proc/{self.process.pid}"

    def namespace(self, kind: str) -> str:
        return os.readlink(f"{self.folder}/ns/{kind}")

    def sandbox(self) -> list[host.Process]:
        """All processes of its PID namespace, init first."""
        for members in self.server.sandboxes():
            if any(one.pid == self.process.pid for one in members):
                return members
        raise AssertionError("the job is gone")

    def processes(self) -> list[host.Process]:
        """The job's own: all but init."""
        return self.sandbox()[1:]

    def init(self) -> host.Process:
        return self.sandbox()[0]

    def output(self, stream: str = "stdout") -> str:
        return self.api.logs(self.job_id, stream)

    def wait_for(self, text: str, seconds: float = 30) -> None:
        assert wait_until(lambda: text in self.output(), seconds), (self.output(), self.output("stderr"))

    def wait(self) -> dict[str, Any]:
        """Its result with both logs, when it is over."""
        self.result = self.api.wait(self.job_id)
        self.result["stdout"], self.result["stderr"] = self.output(), self.output("stderr")
        return self.result


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status by field."""
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


@contextlib.contextmanager
def held(
    inside: Inside,
    server: Server,
    code: str = "time.sleep(100)\n",
    *,
    files: Mapping[str, str | bytes] | None = None,
    **manifest: Any,
) -> Iterator[Held]:
    """A Python job that runs `code` when it is known to the host; cancelled at the end."""
    token = new_token()
    job = inside.kind.job(_SAY_TOKEN + code, files or {})
    manifest = {**inside.kind.manifest, "args": [token], **manifest}
    with holding(inside.api, server, token, job, named=True, **manifest) as found:
        yield found


@contextlib.contextmanager
def holding(
    api: Api, server: Server, token: str, files: Mapping[str, str | bytes], *, named: bool = False, **manifest: Any
) -> Iterator[Held]:
    """Any job, of which a process carries `token` as its name or in its arguments; cancelled at the end.

    `named`: as its name, since a shell above it may have the same arguments.
    """
    job_id = api.submit(files, **manifest)
    try:
        found: list[host.Process] = []

        def find() -> bool:
            members = [one for sandbox in server.sandboxes() for one in sandbox[1:]]
            found[:] = [one for one in members if comm(one.pid) == token or (token in one.title and not named)]
            return bool(found)

        assert wait_until(find, 15), (api.wait(job_id, 5), api.logs(job_id, "stderr"))
        yield Held(api, job_id, found[0], server)
    finally:
        api.http.post(f"/jobs/{job_id}/cancel")
        api.wait(job_id)
        api.http.delete(f"/jobs/{job_id}")


def new_token() -> str:
    """Short enough to be a process's name."""
    return f"t{os.urandom(6).hex()}"


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def waived(api: Api) -> set[str]:
    return set(api.http.get("/health").json()["isolation"]["waived"])


def shared_uid(api: Api) -> bool:
    """Whether init and job have one host uid: an ordinary user's server."""
    return bool(api.http.get("/health").json()["isolation"]["uid"] == "shared")
