"""What a user would otherwise pick: each peer makes a command line out of a program, and is run the same way.

All get what they have for walls of the same kind: namespaces, a read-only /usr, tmpfs, no capabilities, and limits on
memory and processes where they know them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import machine, oci

SEARCHED = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MEMORY_BYTES = 512 << 20
TASKS = 101


@dataclass(frozen=True, slots=True)
class Program:
    """What is run.

    Attributes:
        argv: the first word is a path below /usr.
        wanted: what it prints.
        folders: host path -> path inside, read-only.
    """

    argv: tuple[str, ...]
    wanted: bytes
    env: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)


class PeerFailed(Exception):
    """It did not run the program."""


def spawn(argv: Iterable[str], env: Mapping[str, str], errors: int | None = None) -> tuple[float, bytes, int]:
    """Start a program, read its output to the end, reap it. Returns: seconds, output, exit code.

    posix_spawn(3) and nothing around it: `subprocess` would add its own half millisecond to every peer.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    words = list(argv)
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, writer, 1),
    ]
    if errors is None:
        actions.append((os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0))
    else:
        actions.append((os.POSIX_SPAWN_DUP2, errors, 2))
    begin = time.perf_counter()
    pid = os.posix_spawn(words[0], words, dict(env), file_actions=actions)
    os.close(writer)
    output = b""
    while piece := os.read(reader, 65536):
        output += piece
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - begin
    os.close(reader)
    return seconds, output, os.waitstatus_to_exitcode(status)


class Peer:
    """One contender.

    Attributes:
        name: in tables.
        weight: it is measured once in so many rounds: slow ones would take all the time.
    """

    name = "bare"
    program = machine.PYTHON
    weight = 1

    def command(self, program: Program, worker: int = 0) -> list[str]:
        """The command line; `worker` tells apart those that run at once."""
        return list(program.argv)

    def environment(self, program: Program) -> dict[str, str]:
        return {**machine.ENVIRONMENT, **program.env}

    def version(self) -> str:
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"\d+(\.\d+)+\S*", done.stdout + done.stderr)
        return found[0] if found else ""

    def run(self, program: Program, worker: int = 0) -> float:
        """Seconds. Raises: PeerFailed if it does not print what it should."""
        seconds, output, code = spawn(self.command(program, worker), self.environment(program))
        if output != program.wanted:
            raise PeerFailed(f"{self.name}: exit {code}, {output[:200]!r}")
        return seconds

    def try_out(self, program: Program) -> str:
        """Why it cannot be measured here; "" if it can."""
        if not self.program:
            return f"{self.name} is not installed"
        with tempfile.TemporaryFile() as errors:
            try:
                _, output, code = spawn(self.command(program), self.environment(program), errors.fileno())
            except OSError as error:
                return str(error)
            if output == program.wanted:
                return ""
            errors.seek(0)
            text = " ".join(errors.read().decode(errors="replace").split())
        return f"does not run here: exit {code}: {text[:300]}"

    def close(self) -> None:
        """Remove what was made for it."""


def _find(name: str) -> str:
    return shutil.which(name, path=SEARCHED) or ""


class Bubblewrap(Peer):
    name = "bubblewrap"

    def __init__(self) -> None:
        self.program = _find("bwrap")

    def command(self, program: Program, worker: int = 0) -> list[str]:
        words = [self.program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        words += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib64"):
            words += ["--symlink", f"usr/{name}", f"/{name}"]
        for outside, inside in program.folders.items():
            words += ["--ro-bind", outside, inside]
        words += ["--ro-bind", "/etc/alternatives", "/etc/alternatives"]
        words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/job", "--chdir", "/job"]
        return [*words, "--", *program.argv]


class Nsjail(Peer):
    name = "nsjail"
    weight = 2

    def __init__(self) -> None:
        self.program = _find("nsjail")

    def command(self, program: Program, worker: int = 0) -> list[str]:
        words = [self.program, "--mode", "o", "--really_quiet", "--user", "65534", "--group", "65534"]
        for name in ("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives"):
            words += ["--bindmount_ro", name]
        for outside, inside in program.folders.items():
            words += ["--bindmount_ro", f"{outside}:{inside}"]
        words += ["--tmpfsmount", "/tmp", "--tmpfsmount", "/job", "--cwd", "/job", "--disable_rlimits"]
        words += ["--cgroup_mem_max", str(MEMORY_BYTES), "--cgroup_pids_max", str(TASKS)]
        if machine.describe()["cgroups"] == "v2":
            words += ["--use_cgroupv2"]
        for name, value in self.environment(program).items():
            words += ["--env", f"{name}={value}"]
        return [*words, "--", *program.argv]

    def version(self) -> str:
        return ""  # it does not tell


class Firejail(Peer):
    name = "firejail"
    weight = 8

    def __init__(self) -> None:
        self.program = _find("firejail")

    def command(self, program: Program, worker: int = 0) -> list[str]:
        walls = "--private --private-dev --private-tmp --net=none --caps.drop=all --nonewprivs --seccomp --nogroups"
        shown = [f"--whitelist={outside}" for outside in program.folders if outside.startswith("/home/")]
        return [self.program, "--quiet", "--noprofile", *walls.split(), *shown, "--", *program.argv]

    def environment(self, program: Program) -> dict[str, str]:
        back = {inside: outside for outside, inside in program.folders.items()}
        env = {name: _replaced(value, back) for name, value in program.env.items()}
        return {**machine.ENVIRONMENT, **env}


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


class Runtime(Peer):
    """An OCI runtime: a bundle for each program and worker, made before the measurement."""

    def __init__(self, name: str, program: str, weight: int, options: tuple[str, ...] = ()) -> None:
        self.name = name
        self.program = _find(program)
        self.weight = weight
        self._options = options
        self._folder: Path | None = None
        self._ids: dict[tuple[tuple[str, ...], int], str] = {}

    def command(self, program: Program, worker: int = 0) -> list[str]:
        key = (program.argv, worker)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sandrun-bench-oci-"))
        if key not in self._ids:
            self._ids[key] = f"sandrun-bench-{os.getpid()}-{len(self._ids)}-{worker}"
            env = {**machine.ENVIRONMENT, **program.env}
            bundle = self._folder / self._ids[key]
            oci.write_bundle(bundle, program.argv, env, program.folders, memory=MEMORY_BYTES, tasks=TASKS)
        name = self._ids[key]
        root = self._folder / "state"
        return [self.program, "--root", str(root), *self._options, "run", "--bundle", str(self._folder / name), name]

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Bare(Peer):
    """The interpreter itself, without any isolation."""

    def environment(self, program: Program) -> dict[str, str]:
        back = {inside: outside for outside, inside in program.folders.items()}
        env = {name: _replaced(value, back) for name, value in program.env.items()}
        return {**machine.ENVIRONMENT, **env}


@functools.cache
def known() -> tuple[Peer, ...]:
    return (
        Bare(),
        Bubblewrap(),
        Runtime("crun", "crun", 4),
        Runtime("runc", "runc", 8),
        Nsjail(),
        Runtime("gVisor", "runsc", 16, ("--network=none", "--ignore-cgroups")),
        Firejail(),
    )
