"""A Python job is what `python3 FILE ARGS` is outside: both streams to the byte, how it ends, and the files it leaves.

An in-place job runs in an interpreter that had started long before: each program here runs there and outside by the
same Python, and those that look around in an interpreter of their own, too.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from tests import packages, serving
from tests.escape.probing import FRESH, IN_PLACE, PROGRAMS, PYTHON, Inside, Kind, succeeded
from tests.serving import Api

pytestmark = pytest.mark.requirement(36)

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/job",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "USER": "sandbox",
    "LOGNAME": "sandbox",
    "XDG_CACHE_HOME": "/tmp/.cache",
    "XDG_CONFIG_HOME": "/tmp/.config",
}


class Program(NamedTuple):
    """`code` is what `entry` holds; `stdin` is what it reads; `looks` says that it looks around."""

    code: str | bytes
    args: tuple[str, ...] = ()
    stdin: str = ""
    files: Mapping[str, str] = {}
    entry: str = "main.py"
    env: Mapping[str, str] = {}
    looks: bool = False

    @property
    def sources(self) -> dict[str, bytes]:
        named = {self.entry: self.code, **self.files}
        return {name: text.encode() if isinstance(text, str) else text for name, text in named.items()}


def scripts() -> dict[str, Program]:
    """Those of programs/scripts.txt."""
    found: dict[str, Program] = {}
    looks = False
    for part in re.split(r"^(?=### |# ----)", (PROGRAMS / "scripts.txt").read_text(), flags=re.MULTILINE)[1:]:
        head, _, code = part.partition("\n")
        if head.startswith("# ----"):
            looks = head.endswith("*")
            continue
        more: dict[str, Any] = {}
        if code.startswith("#: "):
            line, _, code = code.partition("\n")
            more = json.loads(line[3:])
        found[head[4:]] = Program(code, looks=looks, **more)
    return found


def zipped(files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def bytecode(source: str) -> bytes:
    """What the interpreter of jobs, not ours, compiles this to."""
    code = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], 'source.py', True)"
    with tempfile.TemporaryDirectory(prefix="sandrun-test-") as folder:
        Path(f"{folder}/a.py").write_text(source)
        subprocess.run([PYTHON, "-c", code, f"{folder}/a.py", f"{folder}/a.pyc"], check=True, timeout=60)
        return Path(f"{folder}/a.pyc").read_bytes()


STATUSES = ("", "0", "3", "255", "256", "-1", "None", "True", "2**40", "'said'", "('a', 1)", "1.5", "b'x'", "[]")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGXCPU", "SIGRTMIN")
KILL = "import os, signal\nprint(1, flush=True)\nos.kill(os.getpid(), signal.{})\n"
SCRIPTS = {
    **scripts(),
    **{f"sys.exit({status})": Program(f"import sys\nprint(1)\nsys.exit({status})\n") for status in STATUSES},
    **{f"{name} to itself": Program(KILL.format(name)) for name in SIGNALS},
    "no newline at the end": Program("print('hello')"),
    "null byte": Program(b"print(1)\0\n"),
    "null byte first": Program(b"\0print(1)\n"),
    "not utf-8": Program(b"print('\xff')\n"),
    "coding cookie": Program(b"# -*- coding: latin-1 -*-\nprint('\xe9')\n"),
    "unknown cookie": Program(b"# -*- coding: nonsense -*-\nprint(1)\n"),
    "byte order mark": Program(b"\xef\xbb\xbfprint('bom')\n"),
    "carriage returns": Program(b"1\r\nx = '''a\r\nb'''\r\nprint(repr(x))\r\n"),
    "zip archive": Program(
        zipped(
            {
                "__main__.py": "import sys, b\nprint(__name__, __file__, sys.path[0], sys.argv, b.x)\n1/0\n",
                "b.py": "x=1\n",
            }
        ),
        entry="main.pyz",
        args=("a",),
    ),
    "zip archive without a main": Program(zipped({"b.py": "x = 1\n"}), entry="main.pyz"),
    "bytecode": Program(bytecode("print(__name__, __file__)\n1 / 0\n"), entry="main.pyc"),
    "old carriage returns": Program(b"print(1)\rprint(2)\r"),
}


LOOKING = [name for name, one in SCRIPTS.items() if one.looks]


class Ran(NamedTuple):
    """`code` is the exit status, or minus the signal; `files` are those made or changed, with the hash of each."""

    code: int
    stdout: str
    stderr: str
    files: dict[str, str]


def readable(stream: bytes, folder: str = "/job") -> str:
    """Without what differs from run to run: addresses, and threads' identities, which are addresses too."""
    text = stream.replace(folder.encode(), b"/job").decode(errors="replace")
    return re.sub(r"(?<=started )\d{9,}|(?<=0x)[0-9a-f]{6,16}|(?<=<frozen runpy>\", line )\d+", "…", text)


def run_outside(one: Program, folder: Path) -> Ran:
    """In a folder that is called /job afterwards."""
    for name, content in one.sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    ran = subprocess.run(
        [PYTHON, one.entry, *one.args],
        cwd=folder,
        env={**ENVIRONMENT, "HOME": str(folder), **one.env},
        input=one.stdin.encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    left = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in left.items()
        if one.sources.get(name) != content and "__pycache__" not in name
    }
    return Ran(ran.returncode, readable(ran.stdout, str(folder)), readable(ran.stderr, str(folder)), files)


def run_inside(kind: Kind, one: Program, api: Api) -> Ran:
    asked = {"entrypoint": one.entry, "args": list(one.args), "env": dict(one.env), "interpreter": "python3"}
    job_id = api.submit(one.sources, stdin=one.stdin, timeout=60, **{**kind.manifest, **asked})
    result = api.wait(job_id)
    streams = [api.http.get(f"/logs/{job_id}", params={"stream": name}).content for name in ("stdout", "stderr")]
    api.http.delete(f"/jobs/{job_id}")
    code = -result["signal"] if result["outcome"] == "signaled" else result["exit_code"]
    assert result["outcome"] in ("exited", "signaled"), (result, streams)
    files = {file["path"]: file["sha256"] for file in result["output_files"]}
    return Ran(code, readable(streams[0]), readable(streams[1]), files)


@functools.cache
def expected(name: str) -> Ran:
    with tempfile.TemporaryDirectory(prefix="sandrun-test-") as folder:
        return run_outside(SCRIPTS[name], Path(folder))


# ---- what differs in place -----------------------------------------------------------------------------------


def replaced(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Callable[[Ran], Ran]:
    """What differs and nothing else: `pattern`, which must be there, in what both streams say outside."""

    def change(ran: Ran) -> Ran:
        (stdout, one), (stderr, two) = (re.subn(pattern, by, stream) for stream in (ran.stdout, ran.stderr))
        assert one + two == 1, f"{pattern} stands {one + two} times in {ran}"
        return ran._replace(stdout=stdout, stderr=stderr)

    return change


def two_less(match: re.Match[str]) -> str:
    return str(int(match[0]) - 2)


OUR_FRAME = '  File "<frozen runpy>", line … in _run_code\n'
KNOWN_DIFFERENCES: dict[str, tuple[str, Callable[[Ran], Ran]]] = {
    "recursion": ("two frames are below the script's", replaced(r"\b\d+(?= more times)", two_less)),
    "recursion depth": ("two frames are below the script's", replaced(r"\b\d+$", two_less)),
    "faulthandler": ("it shows one of them, as below `python3 -m`", replaced(r"(?<=in <module>\n)$", OUR_FRAME)),
    "faulthandler dump": ("it shows one of them, as below `python3 -m`", replaced(r"(?<=in <module>\n)$", OUR_FRAME)),
    "atexit count": ("one handler is ours", replaced("^0$", "1")),
    "del opens a file": ("names go in another order", replaced("name 'open' is", "name '__file__' is")),
    "del on a library module": ("what the zygote had loaded is not taken apart", replaced("^del\n", "")),
    "del on builtins": ("what the zygote had loaded is not taken apart", replaced("^del\n", "")),
    "is_finalizing": ("what the script made goes before the interpreter does", replaced("del True", "del False")),
}
"""What is known to differ, why, and how; a job that minds asks for a `fresh_interpreter` (docs/architecture.md)."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_in_place_does_what_it_does_outside(name: str, api: Api) -> None:
    _, differs = KNOWN_DIFFERENCES.get(name, ("", None))
    assert run_inside(IN_PLACE, SCRIPTS[name], api) == (differs(expected(name)) if differs else expected(name))


@pytest.mark.parametrize("name", [*LOOKING, *KNOWN_DIFFERENCES])
def test_script_in_a_fresh_interpreter_does_what_it_does_outside(name: str, api: Api) -> None:
    assert run_inside(FRESH, SCRIPTS[name], api) == expected(name)


# ---- what an in-place job finds of Sandrun -----------------------------------------------------------------

LOOK = """
import builtins, gc, json, os, sys, threading, types
print(json.dumps({
    "modules": sorted(name for name, module in sys.modules.items() if "sandrun" in name),
    "module objects": [x.__name__ for x in gc.get_objects() if type(x) is types.ModuleType and "sandrun" in x.__name__],
    "frames": [f.f_code.co_filename for f in sys._current_frames().values()],
    "threads": len(threading.enumerate()),
    "path": [p for p in sys.path if "fd" in p],
    "argv": [a for a in [*sys.argv, *sys.orig_argv] if "sandrun" in a or "xxx" in a],
    "descriptors": os.listdir("/proc/self/fd"),
    "environ": [v for v in open("/proc/self/environ").read().split("\\0") if "fd" in v],
    "sitecustomize": [n for n in vars(sys.modules["sitecustomize"]) if n[0] != "_"],
}))
"""


@pytest.mark.requirement(4, 13)
def test_job_in_place_finds_nothing_of_sandrun(insides: dict[str, Inside], api: Api) -> None:
    """What is left of it in memory has no name, no frame and no descriptor."""
    said = json.loads(succeeded(insides["in-place"].run(LOOK))["stdout"])
    assert said["modules"] == said["module objects"] == said["path"] == said["argv"] == said["sitecustomize"] == []
    assert said["frames"] == ["/job/main.py"]
    assert said["threads"] == 1
    assert sorted(said["descriptors"]) == ["0", "1", "2", "3"]  # 3 reads the list
    assert said["environ"] == []


RANDOMS = """
import json, os, random, secrets, tempfile, uuid
print(json.dumps([random.random(), random.Random().random(), os.urandom(8).hex(), secrets.token_hex(8),
    str(uuid.uuid4()), os.path.basename(tempfile.mktemp())]))
"""


@pytest.mark.requirement(15)
def test_jobs_draw_other_random_numbers(inside: Inside) -> None:
    """Forked from one zygote, they share nothing that a generator was seeded with."""
    drawn = [json.loads(succeeded(inside.run(RANDOMS))["stdout"]) for _ in range(3)]
    for values in zip(*drawn, strict=True):
        assert len(set(values)) == 3, values


LEAVES = """
import builtins, json, os, socket, sys
sys.modules["canary"] = builtins.canary = json.canary = socket.canary = object()
os.environ["CANARY"] = "canary"
sys.path.append("/canary")
"""
FINDS = """
import builtins, json, os, socket, sys
print(any(hasattr(m, "canary") for m in (builtins, json, socket)))
print("canary" in sys.modules, "CANARY" in os.environ, "/canary" in sys.path)
"""


@pytest.mark.requirement(15)
def test_job_in_place_leaves_nothing_in_the_next(insides: dict[str, Inside], api: Api) -> None:
    succeeded(insides["in-place"].run(LEAVES))
    assert succeeded(insides["in-place"].run(FINDS))["stdout"] == "False\nFalse False False\n"


# ---- environments ------------------------------------------------------------------------------------------

AROUND = """
import os, site, sys, sysconfig, requests, subprocess
print(sys.prefix, sys.base_prefix, sys.executable, sys.path, sys.flags, sys.orig_argv[1:])
print(site.getsitepackages(), site.ENABLE_USER_SITE, sysconfig.get_paths()["purelib"], os.environ.get("VIRTUAL_ENV"))
print(requests.__file__, sorted(k for k in os.environ))
print(subprocess.check_output(["python3", "-c", "import sys, requests; print(sys.prefix)"], text=True))
for place in (os.path.dirname(requests.__file__), sys.prefix + "/bin", "/environments", "/.caches"):
    for attempt in (lambda: open(place + "/f", "w"), lambda: os.mkdir(place + "/d"), lambda: os.chmod(place, 0o777)):
        try:
            attempt()
            print(place, "ok")
        except OSError as error:
            print(place, error.errno)
"""


@pytest.mark.requirement(9, 36)
def test_environment_is_the_same_in_place_and_cannot_be_written() -> None:
    """A virtual environment, as its own interpreter sees it; its files may well be the server's user's."""
    with (
        packages.state_directory("web") as state,
        serving.running("--state-dir", state) as server,
        httpx2.Client(base_url=server.url, timeout=60) as http,
    ):
        jobs = [Inside(kind, Api(http)).run(AROUND, environment="web") for kind in (IN_PLACE, FRESH)]
    said = [succeeded(job)["stdout"] for job in jobs]
    assert said[0] == said[1]
    assert said[0].startswith("/environments/web /usr /environments/web/bin/python3 ['/job', ")
    answers = [line.rsplit(" ", 1)[1] for line in said[0].splitlines()[4:] if line]
    assert len(answers) == 12
    assert set(answers) == {"30"}  # EROFS
