"""What a job's process begins with: descriptors, environment, signals, limits; and what it can do to others."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import serving
from tests.escape.probing import (
    COMPILED,
    PYTHONS,
    Inside,
    call,
    compiled,
    held,
    outside,
    outside_answers,
    succeeded,
)
from tests.serving import Api, Server

# ---- descriptors -------------------------------------------------------------------------------------------


@pytest.mark.requirement(12)
def test_descriptors_are_exactly_three(inside: Inside) -> None:
    """All numbers up to 65535 are tried."""
    seen = inside.says("surroundings.py")
    assert seen["descriptors"] == [0, 1, 2]
    assert seen["streams"] == ["c", "p", "p"]  # /dev/null, and pipes, which cannot be truncated
    assert seen["stdin"] == ""


@pytest.mark.requirement(12)
def test_stdin_is_what_was_given(inside: Inside) -> None:
    code = "import os, sys\nprint(repr(sys.stdin.read()))\nprint(os.fstat(0).st_nlink)\n"
    assert succeeded(inside.run(code, stdin="line\nend"))["stdout"] == "'line\\nend'\n0\n"


@pytest.mark.requirement(12, 15)
def test_stdin_cannot_be_changed(inside: Inside) -> None:
    """A sealed memory file: what was checked and hashed is what the job reads."""
    code = """
import mmap, os
said = []
for attempt in (
    lambda: os.pwrite(0, b"x", 0), lambda: os.ftruncate(0, 0), lambda: mmap.mmap(0, 4),
    lambda: os.write(os.open("/dev/stdin", os.O_RDWR), b"x"), lambda: os.write(1, b"") and os.read(1, 1),
):
    try:
        attempt()
        said.append("ok")
    except OSError as error:
        said.append(type(error).__name__)
print(said)
"""
    result = succeeded(inside.run(code, stdin="given"))
    assert result["stdout"] == f"{['PermissionError'] * 4 + ['ok']}\n"


@pytest.mark.requirement(12)
def test_own_output_cannot_be_read_back(inside: Inside) -> None:
    code = "import os\ntry:\n    os.open('/dev/stdout', 0)\nexcept PermissionError as e:\n    print(e.errno)\n"
    assert succeeded(inside.run(code))["stdout"] == "13\n"


@pytest.mark.requirement(12)
def test_work_directory_is_the_jobs(inside: Inside) -> None:
    assert inside.says("surroundings.py")["work directory"] == "/job"


@pytest.mark.root
@pytest.mark.requirement(12)
def test_descriptors_are_three_as_the_host_sees_it(inside: Inside, running_server: Server) -> None:
    with held(inside, running_server) as job:
        assert sorted(os.listdir(f"{job.folder}/fd")) == ["0", "1", "2"]
        assert os.readlink(f"{job.folder}/cwd").endswith("/job")


# ---- environment -------------------------------------------------------------------------------------------

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
SHELLS_OWN = {"PWD", "OLDPWD", "SHLVL", "_"}


@pytest.mark.requirement(13)
def test_environment_is_an_exact_list(inside: Inside) -> None:
    found = inside.says("surroundings.py")["environment"]
    if inside.kind.name == "below-a-shell":
        found = {name: value for name, value in found.items() if name not in SHELLS_OWN}
    assert found == ENVIRONMENT


@pytest.mark.requirement(13, 14)
def test_environment_as_the_kernel_has_it_is_the_same(inside: Inside) -> None:
    """/proc/self/environ is what the process was started with: not a zygote's, whose job this is none of."""
    found = [entry for entry in inside.says("surroundings.py")["proc environment"] if entry]
    names = {entry.partition("=")[0] for entry in found} - SHELLS_OWN
    assert names <= set(ENVIRONMENT)


@pytest.mark.requirement(13)
def test_shell_begins_with_the_exact_list(api: Api) -> None:
    code = "while IFS= read -r -d '' entry; do echo \"$entry\"; done < /proc/self/environ\n"
    found = succeeded(api.job({"main.sh": code}, entrypoint="main.sh", interpreter="bash", env={"MINE": "a b"}))
    entries = dict(line.split("=", 1) for line in found["stdout"].splitlines())
    assert entries == {**ENVIRONMENT, "MINE": "a b"}


# ---- signals, session, limits ------------------------------------------------------------------------------

OF_PYTHON = {"SIGINT", "SIGPIPE", "SIGXFSZ"}
"""What every Python sets for itself."""


@pytest.mark.requirement(13)
def test_signals_are_as_at_a_fresh_start(inside: Inside) -> None:
    seen = inside.says("surroundings.py")
    assert seen["blocked"] == []
    assert set(seen["not default"]) == OF_PYTHON
    assert seen["real-time not default"] == []


SIGNALS = """\
while read -r name value; do
    case $name in Sig*|Shd*|Umask*) echo $name$value;; esac
done < /proc/self/status
"""
INHERITED = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn")


@pytest.mark.requirement(13)
def test_shell_begins_with_no_signal_blocked_or_ignored(api: Api) -> None:
    """No Python in between; what the shell catches is its own."""
    result = succeeded(api.job({"main.sh": SIGNALS}, entrypoint="main.sh", interpreter="sh"))
    found = dict(line.split(":", 1) for line in result["stdout"].splitlines())
    assert {name: found[name] for name in INHERITED} == dict.fromkeys(INHERITED, "0" * 16)
    assert found["Umask"] == "0022"


@pytest.mark.requirement(13)
def test_umask_session_and_terminal(inside: Inside) -> None:
    seen = inside.says("surroundings.py")
    assert seen["umask"] == 0o022
    process = seen["process"]
    assert process["terminal"] == 0
    assert seen["/dev/tty"] == "errno 2"
    assert process["session"] not in (0, 1)
    leader = process["parent"] if inside.kind.name == "below-a-shell" else process["pid"]
    assert process["session"] == leader
    assert (process["nice"], process["policy"]) == (0, 0)


@pytest.mark.requirement(7)
def test_process_1_is_its_parent(inside: Inside) -> None:
    process = inside.says("surroundings.py")["process"]
    assert process["pid"] > 1
    assert process["parent"] == (process["session"] if inside.kind.name == "below-a-shell" else 1)


@pytest.mark.requirement(16)
def test_limits_are_small_but_for_address_space(inside: Inside) -> None:
    found = {name: tuple(pair) for name, pair in inside.says("surroundings.py")["rlimits"].items()}
    assert found["NOFILE"][1] <= 4096
    assert found["CORE"] in ((0, 0), (1, 1))
    for name in ("MEMLOCK", "MSGQUEUE", "RTPRIO", "NICE"):
        assert found[name][1] <= 64 << 10, name
    assert found["AS"] == found["DATA"] == (-1, -1)  # node, the JVM and numpy reserve gigabytes
    assert found["STACK"][0] >= 8 << 20


@pytest.mark.root
@pytest.mark.requirement(16)
def test_limits_as_the_host_sees_them(inside: Inside, running_server: Server) -> None:
    with held(inside, running_server) as job:
        text = Path(f"{job.folder}/limits").read_text()
    found = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()[1:]}
    assert found["Max open files"][1] == "4096"
    assert found["Max core file size"][1] in ("0", "1")
    assert found["Max locked memory"] == ["0", "0"]
    assert found["Max realtime priority"] == ["0", "0"]


LIMITS = {
    "raise NOFILE": call("prlimit64", 0, 7, "q:8192,8192", 0),
    "raise CORE": call("prlimit64", 0, 4, "q:0xffffffffffffffff,0xffffffffffffffff", 0),
    "raise MEMLOCK": call("prlimit64", 0, 8, "q:1048576,1048576", 0),
}


@pytest.mark.requirement(16)
def test_limits_cannot_be_raised(inside_any: Inside) -> None:
    assert inside_any.answers(LIMITS) == dict.fromkeys(LIMITS, "EPERM")
    if os.geteuid() == 0:
        assert outside_answers(LIMITS) == dict.fromkeys(LIMITS, "ok")


@pytest.mark.requirement(14, 20)
def test_job_is_offered_first_when_memory_runs_out(inside: Inside) -> None:
    """And cannot take that back (tests/escape/test_confinement_files.py)."""
    assert inside.says("surroundings.py")["oom_score_adj"] == 1000


# ---- started from a strange place --------------------------------------------------------------------------

WRAPPER = """#!{python}
import os, resource, signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGPIPE, signal.SIGRTMIN + 3):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGALRM, signal.SIGWINCH, signal.SIGRTMIN + 5))
os.umask(0o077)
os.nice(1)
for number in (7, 9, 63, 500):
    os.dup2(os.open("/etc/passwd", os.O_RDONLY), number, inheritable=True)
os.environ.update(CANARY="canary", LD_BIND_NOW="1", PYTHONDONTWRITEBYTECODE="1", LC_ALL="C", TZ="Asia/Tokyo")
os.execv({sandrun!r}, [{sandrun!r}, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def strange() -> Iterator[Api]:
    """A server as nohup and worse would start it: ignored and blocked signals, a closed umask, open descriptors."""
    with pytest.MonkeyPatch.context() as patch, serving.state_directory() as folder:
        wrapper = folder / "wrapper"
        wrapper.write_text(WRAPPER.format(python=sys.executable, sandrun=str(serving.SANDRUN)))
        wrapper.chmod(0o755)
        patch.setattr(serving, "SANDRUN", wrapper)
        with serving.running() as server, httpx2.Client(base_url=server.url, timeout=60) as http:
            yield Api(http)


@pytest.mark.requirement(12, 13)
@pytest.mark.parametrize("kind", PYTHONS, ids=lambda kind: kind.name)
def test_nothing_is_inherited_from_where_the_server_was_started(kind: Any, strange: Api) -> None:
    seen = Inside(kind, strange).says("surroundings.py")
    assert seen["descriptors"] == [0, 1, 2]
    assert seen["blocked"] == []
    assert set(seen["not default"]) == OF_PYTHON
    assert seen["real-time not default"] == []
    assert seen["umask"] == 0o022
    assert {n: v for n, v in seen["environment"].items() if n not in SHELLS_OWN} == ENVIRONMENT
    assert "canary" not in str(seen["proc environment"]).lower()


@pytest.mark.requirement(13)
def test_shell_inherits_nothing_from_where_the_server_was_started(strange: Api) -> None:
    result = succeeded(strange.job({"main.sh": SIGNALS}, entrypoint="main.sh", interpreter="sh"))
    found = dict(line.split(":", 1) for line in result["stdout"].splitlines())
    assert {name: found[name] for name in INHERITED} == dict.fromkeys(INHERITED, "0" * 16)
    assert found["Umask"] == "0022"


# ---- variables that load code ------------------------------------------------------------------------------

EVIL_PYTHON = """
import os
with open("/job/loaded", "a") as file:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("{}", os.getpid(), os.getuid(), status["Seccomp"].strip(), status["NoNewPrivs"].strip(), file=file)
"""
TELL = "import time\nprint('the job itself')\n"


def loaded(api: Api, job_id: str) -> list[list[str]]:
    """What the hostile code wrote about the processes it found itself in: who, pid, uid, seccomp, no_new_privs."""
    answer = api.http.get(f"/download/{job_id}/loaded")
    return [line.split() for line in answer.text.splitlines()] if answer.status_code == 200 else []


def run_with(api: Api, kind: Any, code: str | bytes, files: dict[str, str | bytes], env: dict[str, str]) -> Any:
    job_id = api.submit(kind.job(code, files), **{**kind.manifest, "env": env})
    result = api.wait(job_id)
    result["stdout"], result["stderr"] = api.logs(job_id), api.logs(job_id, "stderr")
    found = loaded(api, job_id)
    api.http.delete(f"/jobs/{job_id}")
    return result, found


@pytest.fixture(scope="session")
def library() -> bytes:
    return compiled("loaded.c", "-shared", "-fPIC")


@pytest.mark.requirement(4)
@pytest.mark.parametrize("variable", ["LD_PRELOAD", "LD_AUDIT"])
@pytest.mark.parametrize("kind", [*PYTHONS, COMPILED], ids=lambda kind: kind.name)
def test_preloaded_library_reaches_the_job_alone(variable: str, kind: Any, library: bytes, api: Api) -> None:
    """It runs in the job's own processes, behind every wall, and nowhere else: not in unpacker, init or collector."""
    code: str | bytes = TELL
    if kind is COMPILED:
        code = compiled("hello.c")
    result, found = run_with(api, kind, code, {"evil.so": library}, {variable: "/job/evil.so"})
    succeeded(result)
    assert "the job itself" in result["stdout"]
    assert found, "it was not even loaded in the job"
    for pid, uid, seccomp, no_new_privs in (row[1:] for row in found):
        assert int(pid) > 1
        assert (uid, seccomp, no_new_privs) == ("1000", "2", "1")


@pytest.mark.requirement(4)
@pytest.mark.parametrize("kind", PYTHONS, ids=lambda kind: kind.name)
def test_python_path_reaches_the_job_alone(kind: Any, api: Api) -> None:
    names = ("sitecustomize", "usercustomize", "json", "os", "encodings", "sandrun")
    files: dict[str, str | bytes] = {f"evil/{name}.py": EVIL_PYTHON.format(name) for name in names[:2]}
    files |= {f"evil/{name}.py": "raise SystemExit('shadowed')\n" for name in names[2:]}
    files["evil/sandrun/__init__.py"] = files.pop("evil/sandrun.py")
    del files["evil/os.py"], files["evil/encodings.py"]  # with these no Python starts at all, outside either
    result, found = run_with(api, kind, TELL, files, {"PYTHONPATH": "/job/evil", "PYTHONSTARTUP": "/job/evil/json.py"})
    succeeded(result)
    assert result["stdout"] == "the job itself\n"
    assert "sitecustomize" in {row[0] for row in found}
    assert {tuple(row[2:]) for row in found} == {("1000", "2", "1")}


@pytest.mark.requirement(4)
@pytest.mark.parametrize("kind", PYTHONS, ids=lambda kind: kind.name)
def test_broken_python_variables_break_the_job_alone(kind: Any, api: Api) -> None:
    """An interpreter that cannot start is the client's failure, told as such; the sandbox was built all the same."""
    result, _ = run_with(api, kind, TELL, {}, {"PYTHONHOME": "/nonexistent"})
    assert (result["outcome"], result["exit_code"]) == ("exited", 1)
    assert "Fatal Python error" in result["stderr"]


FAKES = ("python3", "bash", "sh", "env", "perl", "node", "tar", "awk")


@pytest.mark.requirement(4)
@pytest.mark.parametrize(
    ("entrypoint", "code"),
    [
        ("main.py", "print('real')\n"),
        ("main.sh", "echo real\n"),
        ("main.pl", "print qq(real\\n);\n"),
        ("main.js", "console.log('real')\n"),
    ],
)
def test_path_does_not_pick_the_interpreter(entrypoint: str, code: str, api: Api) -> None:
    available = api.http.get("/health").json()
    assert available["status"] == "ok"
    fakes = {f"bin/{name}": "#!/bin/sh\necho fake\n" for name in FAKES}
    packed = serving.tarball({entrypoint: code, **fakes}, executable=tuple(fakes))
    if (refusal := _unavailable(api, entrypoint)) is not None:
        pytest.skip(refusal)
    result = succeeded(api.job(packed, entrypoint=entrypoint, env={"PATH": "/job/bin"}))
    assert result["stdout"] == "real\n"


def _unavailable(api: Api, entrypoint: str) -> str | None:
    name = {"main.js": "node", "main.pl": "perl"}.get(entrypoint, "sh")
    return None if shutil.which(name) else f"needs {name}"


@pytest.mark.requirement(4)
def test_shell_variables_reach_the_job_alone(api: Api) -> None:
    """BASH_ENV is read by bash, SHELLOPTS and PS4 together run commands: in the job, behind the walls."""
    evil = "echo evil $$ $(sed -n 's/^Seccomp:[^0-9]*//p' /proc/self/status) >> /job/loaded\n"
    files: dict[str, str | bytes] = {"main.sh": "echo real\n", "evil.sh": evil}
    job_id = api.submit(
        files,
        entrypoint="main.sh",
        interpreter="bash",
        env={"BASH_ENV": "/job/evil.sh", "ENV": "/job/evil.sh", "SHELLOPTS": "xtrace", "PS4": "$(id >&2)", "IFS": "x"},
    )
    result = api.wait(job_id)
    assert (result["outcome"], result["exit_code"], api.logs(job_id)) == ("exited", 0, "real\n")
    found = loaded(api, job_id)
    api.http.delete(f"/jobs/{job_id}")
    assert [row[0] for row in found] == ["evil"]
    assert int(found[0][1]) > 1
    assert found[0][2] == "2"


@pytest.mark.needs("perl")
@pytest.mark.requirement(4)
def test_perl_variables_reach_the_job_alone(api: Api) -> None:
    files: dict[str, str | bytes] = {"main.pl": "print qq(real\\n);\n", "Evil.pm": "print qq(evil $$\\n); 1;\n"}
    result = succeeded(api.job(files, entrypoint="main.pl", env={"PERL5OPT": "-MEvil", "PERL5LIB": "/job"}))
    first, second = result["stdout"].splitlines()
    assert first.startswith("evil ")
    assert int(first.split()[1]) > 1
    assert second == "real"


@pytest.mark.needs("node")
@pytest.mark.requirement(4)
def test_node_variables_reach_the_job_alone(api: Api) -> None:
    files: dict[str, str | bytes] = {
        "main.js": "console.log('real')\n",
        "evil.js": "console.log('evil', process.pid)\n",
    }
    result = succeeded(api.job(files, entrypoint="main.js", env={"NODE_OPTIONS": "--require /job/evil.js"}))
    first, second = result["stdout"].splitlines()
    assert first.startswith("evil ")
    assert int(first.split()[1]) > 1
    assert second == "real"


# ---- others ------------------------------------------------------------------------------------------------

KILL_ALL = """
import os, signal, time
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        time.sleep(100)
    children.append(pid)
time.sleep(0.1)
os.kill(-1, signal.SIGKILL)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.requirement(23)
def test_kill_of_all_ends_the_job_alone(inside: Inside, insides: dict[str, Inside], running_server: Server) -> None:
    before = {p.pid for p in running_server.lasting()}
    with held(insides["in-place"], running_server) as sibling:
        result = inside.run(KILL_ALL)
        assert sibling.process.alive
    if inside.kind.name != "below-a-shell":  # there the entrypoint is among those killed, and its end is the job's
        assert result["stdout"] == "[-9, -9, -9]\n"
    assert (result["outcome"], result["signal"]) == ("signaled", 9)
    assert before == {p.pid for p in running_server.lasting()}


ORPHANS = """
import os, subprocess, sys, time
subprocess.run(["sh", "-c", "(setsid sleep 0.1; exit 3) & exit 0"])
pid = os.fork()
if pid == 0:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.1)
    print(os.getppid(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
time.sleep(0.4)
print(sorted(n for n in os.listdir("/proc") if n.isdigit() and int(n) != os.getpid()))
"""


@pytest.mark.requirement(7)
def test_process_1_reaps_orphans(insides: dict[str, Inside], api: Api) -> None:
    assert succeeded(insides["in-place"].run(ORPHANS))["stdout"] == "1\n[]\n"


LOOK_INTO = """
import ctypes, errno, json, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    time.sleep(100)
class Vec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
secret = ctypes.create_string_buffer(b"secret")
got = ctypes.create_string_buffer(6)
libc.process_vm_readv.restype = ctypes.c_ssize_t
def answer(value):
    return "ok" if value != -1 else errno.errorcode[ctypes.get_errno()]
print(json.dumps({
    "attach": answer(libc.ptrace(16, child, None, None)),
    "seize": answer(libc.ptrace(0x4206, child, None, None)),
    "read": answer(libc.process_vm_readv(child, ctypes.byref(Vec(ctypes.addressof(got), 6)), 1,
        ctypes.byref(Vec(ctypes.addressof(secret), 6)), 1, 0)),
    "write": answer(libc.process_vm_writev(child, ctypes.byref(Vec(ctypes.addressof(got), 6)), 1,
        ctypes.byref(Vec(ctypes.addressof(secret), 6)), 1, 0)),
}))
os.kill(child, 9)
"""


@pytest.mark.requirement(5)
def test_job_cannot_look_into_a_process_even_its_own(inside: Inside) -> None:
    assert "ok" in json.loads(outside(LOOK_INTO).stdout).values()
    assert set(json.loads(succeeded(inside.run(LOOK_INTO))["stdout"]).values()) == {"EPERM"}


NAMES = """
import os
for name in sorted(os.listdir("/proc/self/ns")):
    pass
print(open("/proc/self/comm").read().strip(), os.path.basename(os.readlink("/proc/self/exe"))[:7])
"""


@pytest.mark.requirement(14)
def test_job_is_called_what_it_is(insides: dict[str, Inside], api: Api) -> None:
    """Its process does not carry the zygote's name."""
    assert "zygote" not in succeeded(insides["in-place"].run(NAMES))["stdout"]
