"""The job's filter in force: each forbidden call is tried, programs of all kinds run."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandrun.linux import process, seccomp
from sandrun.linux.libc import MACHINE, syscall
from sandrun.sandbox.policy import Policy, Rule, init_policy, job_policy
from tests.kernel.children import Died, errno_of, in_child

GUEST = 1879048192  # a uid that is nobody
JOB, INIT = job_policy(), init_policy()
JOB.compile(), INIT.compile()  # before any fork, so that children need no libseccomp

on_x86 = pytest.mark.skipif(MACHINE != "x86_64", reason="needs the machine code or call numbers of x86-64")


def number(name: str) -> int:
    found = seccomp.resolve(name)
    assert found is not None, name
    return found


def confined(probe: Callable[[], Any], rules: Policy = JOB) -> Any:
    """The result of `probe` under the filter, in a child that is PID 1 of a PID namespace of its own."""

    def run() -> Any:
        process.set_no_new_privs()
        seccomp.load(rules.compile())
        return probe()

    return in_child(run)


def refusals(rules: Policy) -> dict[str, int]:
    """Calls that are refused whatever their arguments, and with which errno."""
    rows: dict[str, list[Rule]] = {}
    for rule in rules.rows:
        rows.setdefault(rule.name, []).append(rule)
    certain = {name: found[0].errno for name, found in rows.items() if len(found) == 1 and found[0].errno}
    return {name: code for name, code in certain.items() if seccomp.resolve(name) is not None}


@pytest.mark.requirement(5)
def test_each_forbidden_call_answers_its_errno():
    expected = refusals(JOB)
    assert len(expected) > 200
    numbers = {name: number(name) for name in expected}
    # all arguments are -1, so that a call that got through would do nothing
    answers = confined(lambda: {name: errno_of(syscall, numbers[name], *[-1] * 6) for name in expected})
    assert answers == expected


@pytest.mark.requirement(5)
def test_unknown_numbers_answer_enosys_and_do_not_kill():
    numbers = (*range(480, 520), 1000, 0x3FFFFFFF)
    assert confined(lambda: {errno_of(syscall, call) for call in numbers}) == {errno.ENOSYS}


@on_x86
@pytest.mark.requirement(5)
@pytest.mark.parametrize("call", [0x40000000, 0x40000000 | 39, 0x40000000 | 520, 0x7FFFFFFF])
def test_x32_number_ends_the_process(call):
    in_child(lambda: errno_of(syscall, call, -1))  # outside it is a number like any other
    with pytest.raises(Died) as caught:
        confined(lambda: errno_of(syscall, call, -1))
    assert caught.value.signal == signal.SIGSYS


def getpid_by_int_0x80() -> int:
    """Call the i386 kernel's getpid(2), number 20, which is writev(2) for x86-64."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result: int = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    return result


@on_x86
@pytest.mark.requirement(5)
def test_i386_call_ends_the_process():
    try:
        outside = in_child(getpid_by_int_0x80)
    except Died:
        outside = 0
    if outside != 1:
        pytest.skip("this kernel has no i386 calls")
    with pytest.raises(Died) as caught:
        confined(getpid_by_int_0x80)
    assert caught.value.signal == signal.SIGSYS


@pytest.mark.requirement(5)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40])
def test_no_socket_of_any_family_can_be_made(family):
    def attempt() -> str:
        try:
            socket.socket(family, socket.SOCK_RAW if family == socket.AF_NETLINK else socket.SOCK_STREAM)
        except OSError as error:
            return type(error).__name__
        return "made"

    assert confined(attempt) == "PermissionError"


HIGH = 0x1234 << 32  # the kernel does not see it in an int


@pytest.mark.requirement(6)
@pytest.mark.parametrize("high", [0, HIGH])
def test_pid_1_gets_no_signal_from_a_job(high):
    calls = {
        "kill": (1 | high, 0),
        "tgkill": (1 | high, 1 | high, 0),
        "rt_sigqueueinfo": (1 | high, signal.SIGCHLD, ctypes.create_string_buffer(128)),
    }
    numbers = {name: number(name) for name in calls}

    def probe() -> dict[str, int]:
        return {name: errno_of(syscall, numbers[name], *arguments) for name, arguments in calls.items()}

    outside = in_child(probe)
    assert (outside["kill"], outside["tgkill"]) == (0, 0)
    assert confined(probe) == dict.fromkeys(calls, errno.EPERM)


@pytest.mark.requirement(6)
@pytest.mark.parametrize("high", [0, HIGH])
@pytest.mark.parametrize("flag", ["NEWNS", "NEWCGROUP", "NEWUTS", "NEWIPC", "NEWUSER", "NEWPID", "NEWNET"])
def test_clone_makes_no_namespace(flag, high):
    clone, bits = number("clone"), getattr(process, f"CLONE_{flag}")

    def probe() -> int:
        try:
            child = syscall(clone, bits | high | signal.SIGCHLD, 0)
        except OSError as error:
            return error.errno or -1
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return 0

    if os.geteuid() == 0:
        assert in_child(probe) == 0
    assert confined(probe) == errno.EPERM


@pytest.mark.requirement(6)
@pytest.mark.parametrize("high", [0, HIGH])
def test_ioctl_prctl_prlimit_and_socketpair_obey_their_lists(high):
    calls = {
        "TIOCSTI": ("ioctl", (0, 0x5412 | high, b"x")),
        "TIOCLINUX": ("ioctl", (0, 0x541C | high, b"x")),
        "TIOCSETD": ("ioctl", (0, 0x5423 | high, b"\0\0\0\0")),
        "FS_IOC_SETFLAGS": ("ioctl", (0, 0x40086602 | high, b"\0" * 8)),
        "FIONCLEX": ("ioctl", (0, 0x5450 | high, 0)),
        "a driver's": ("ioctl", (0, 0x5760 | high, 0)),
        "PR_SET_DUMPABLE": ("prctl", (4 | high, 1, 0, 0, 0)),
        "PR_SET_SECCOMP": ("prctl", (22 | high, 2, 0, 0, 0)),
        "PR_GET_NO_NEW_PRIVS": ("prctl", (39 | high, 0, 0, 0, 0)),
        "own limits": ("prlimit64", (0 | high, 7, 0, ctypes.create_string_buffer(16))),
        "limits of 1": ("prlimit64", (1 | high, 7, 0, ctypes.create_string_buffer(16))),
        "AF_UNIX": ("socketpair", (1 | high, 1, 0, ctypes.create_string_buffer(8))),
        "AF_INET": ("socketpair", (2 | high, 1, 0, ctypes.create_string_buffer(8))),
    }
    numbers = {name: number(name) for name, _ in calls.values()}
    answers = confined(lambda: {what: errno_of(syscall, numbers[name], *args) for what, (name, args) in calls.items()})
    allowed = ("FIONCLEX", "PR_GET_NO_NEW_PRIVS", "own limits", "AF_UNIX")
    assert answers == dict.fromkeys(calls, errno.EPERM) | dict.fromkeys(allowed, 0) | {"a driver's": errno.ENOTTY}


def test_filter_is_in_force_and_cannot_be_taken_off():
    def probe() -> tuple[int, int, int]:
        again = errno_of(seccomp.load, JOB.compile())
        return seccomp.mode(), int(process.get_no_new_privs()), again

    assert confined(probe) == (2, 1, errno.EPERM)


# --- init's own


@pytest.mark.requirement(7)
def test_init_cannot_execute_but_confines_its_children_further():
    def probe() -> tuple[int, int, int]:
        refused = errno_of(os.execv, "/bin/true", ["true"])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.kill(1, 0)
                seccomp.load(JOB.compile())
                code = errno_of(os.kill, 1, 0)
            finally:
                os._exit(code)
        return refused, errno_of(os.kill, 1, 0), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert confined(probe, INIT) == (errno.EPERM, 0, errno.EPERM)


# --- programs


def confine() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(GUEST, GUEST, GUEST)
        os.setresuid(GUEST, GUEST, GUEST)
    process.set_no_new_privs()
    seccomp.load(JOB.compile())


def run(*command: str, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "TMPDIR": str(cwd), "LANG": "C.UTF-8"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, preexec_fn=confine, capture_output=True, encoding="utf-8", timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture
def place() -> Iterator[Path]:
    """A work directory below directories that another user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


PYTHON = {
    "hello": "print('hello')",
    "subprocess": """
import subprocess, os, signal
print(subprocess.run(['sh', '-c', 'echo $((6*7))'], capture_output=True, text=True, cwd='.').stdout)
p = subprocess.Popen(['sleep', '60'], start_new_session=True)
os.killpg(os.getpgid(p.pid), signal.SIGTERM)
assert p.wait() == -15
assert os.system('true') == 0
assert os.popen('echo x').read() == 'x\\n'
""",
    "threads": """
import threading, concurrent.futures as c
with c.ThreadPoolExecutor(8) as pool: assert sum(pool.map(abs, range(100))) == 4950
t = threading.Timer(0.01, print); t.start(); t.join()
""",
    "multiprocessing": """
import multiprocessing as m, concurrent.futures as c
def f(x): return x * x
m.set_start_method('fork')
with m.Pool(2) as pool: assert pool.map(f, [1, 2, 3]) == [1, 4, 9]
with c.ProcessPoolExecutor(2) as pool: assert list(pool.map(f, [1, 2])) == [1, 4]
q, l, v = m.Queue(), m.Lock(), m.Value('i', 3)
a = m.Array('i', [1]); e = m.Event(); q.put(1); assert q.get() == 1
from multiprocessing import shared_memory
s = shared_memory.SharedMemory(create=True, size=100); s.buf[0] = 1; s.close(); s.unlink()
""",
    "asyncio": """
import asyncio
async def main():
    p = await asyncio.create_subprocess_exec('echo', 'hi', stdout=-1)
    assert (await p.communicate())[0] == b'hi\\n'
    await asyncio.gather(*[asyncio.sleep(0.01) for _ in range(5)])
    assert await asyncio.to_thread(lambda: 5) == 5
asyncio.run(main())
""",
    "sqlite": """
import sqlite3
d = sqlite3.connect('x.db'); d.execute('pragma journal_mode=wal'); d.execute('create table t(a)')
d.executemany('insert into t values(?)', [(i,) for i in range(100)]); d.commit()
assert d.execute('select sum(a) from t').fetchone() == (4950,)
d.execute('vacuum'); d.close()
""",
    "files": """
import tempfile, shutil, os, pathlib, mmap, zipfile, tarfile, fcntl
with tempfile.TemporaryDirectory(dir='.') as t:
    p = pathlib.Path(t, 'a'); p.write_text('x' * 100000); p.chmod(0o600)
    shutil.copy2(p, p.with_name('b')); p.with_name('c').symlink_to('a'); os.link(p, p.with_name('d'))
    shutil.copytree(t, t + '2', symlinks=True); shutil.rmtree(t + '2')
    os.replace(p.with_name('b'), p.with_name('e')); os.truncate(p, 10); os.utime(p, (1, 1))
    with open(p, 'r+b') as f:
        fcntl.flock(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_EX); f.flush(); os.fsync(f.fileno())
        with mmap.mmap(f.fileno(), 10) as m: m[0] = 65; m.flush()
    with zipfile.ZipFile(p.with_name('z'), 'w') as z: z.write(p)
    with tarfile.open(p.with_name('t'), 'w:gz') as z: z.add(p)
    os.posix_fallocate(os.open(p.with_name('f'), os.O_CREAT | os.O_RDWR), 0, 10000)
    shutil.disk_usage(t); sorted(pathlib.Path(t).glob('**/*'))
""",
    "signals and time": """
import signal, time, os, resource, random, platform
signal.signal(signal.SIGALRM, lambda *_: None)
signal.alarm(1); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
signal.raise_signal(signal.SIGALRM); os.kill(os.getpid(), signal.SIGALRM)
os.times(); resource.getrusage(resource.RUSAGE_CHILDREN); resource.getrlimit(resource.RLIMIT_NOFILE)
time.sleep(0.01); time.get_clock_info('monotonic'); os.urandom(3); platform.platform(); os.cpu_count()
os.getgroups(); os.getppid(); os.getpgrp(); os.isatty(0)
""",
}


@pytest.mark.requirement(36)
@pytest.mark.parametrize("name", PYTHON)
def test_python_programs_work(name, place):
    run("/usr/bin/python3", "-I", "-c", PYTHON[name], cwd=place)


SHELL = {
    "pipelines": """
        seq 1000 | grep 7 | sort -rn | uniq -c | awk '{s+=$2} END {print s}' | tee x | wc -l
        cat < x > y; diff x y; cat <(echo a) <<< b
    """,
    "jobs": """
        sleep 0.01 & wait $!
        (exit 3) || [ $? = 3 ] || exit 1
        kill -0 $$; trap 'exit 0' TERM; kill $$; exit 1
    """,
    "files": """
        mkdir -p a/b; echo x > a/b/c; chmod 750 a/b/c; cp -a a d; mv d e; ls -lR e; ln -s a l; ln e/b/c h
        find . -name c -exec rm {} +; rm -r a e; df . | tail -1; dd if=/dev/zero of=z bs=1k count=10 status=none
    """,
    "timeout": "timeout 0.05 sleep 5; [ $? = 124 ]",
    "id": "id -u; uname -a; date; nproc; ps ax | wc -l; head -c 10 /dev/urandom | base64",
    "archives": "seq 1000 > x; tar czf x.tgz x; rm x; tar xzf x.tgz; gzip x; gunzip x.gz; sha256sum x",
}


@pytest.mark.requirement(36)
@pytest.mark.needs("bash")
@pytest.mark.parametrize("name", SHELL)
def test_shell_programs_work(name, place):
    run("/bin/bash", "-c", SHELL[name], cwd=place)


@pytest.mark.requirement(36)
@pytest.mark.needs("gcc")
def test_c_programs_can_be_compiled_and_run(place):
    (place / "a.c").write_text('#include <stdio.h>\nint main(void) { puts("compiled"); return 0; }\n')
    assert run("/bin/sh", "-c", "gcc -O1 -o a a.c && ./a", cwd=place) == "compiled\n"


@pytest.mark.requirement(36)
@pytest.mark.needs("perl")
def test_perl_works(place):
    program = "my $p = open(my $f, '-|', 'echo hi'); print <$f>; fork // die; wait; print time > 5, times > 0"
    assert run("perl", "-we", program, cwd=place).startswith("hi\n")


@pytest.mark.requirement(36)
@pytest.mark.needs("node")
def test_node_works(place):
    program = """
const {execFileSync} = require('child_process'), fs = require('fs'), {Worker} = require('worker_threads');
fs.writeFileSync('a', 'x'); fs.mkdirSync('d/e', {recursive: true}); fs.rmSync('d', {recursive: true});
console.log(execFileSync('echo', ['hi']).toString().trim(), require('os').cpus().length > 0);
new Worker("require('worker_threads').parentPort.postMessage(1)", {eval: true}).on('message', m => console.log(m));
setTimeout(() => console.log('later'), 20);
"""
    out = run("node", "-e", program, cwd=place)
    assert sorted(out.split("\n")) == ["", "1", "hi true", "later"]


@pytest.mark.skipif(not Path("/usr/lib/python3/dist-packages/numpy").exists(), reason="needs the host's numpy")
def test_numpy_works(place):
    run("/usr/bin/python3", "-c", "import numpy as n; n.random.rand(300, 300) @ n.eye(300)", cwd=place)


def test_programs_above_ran_under_the_filter(place):
    told = run("/usr/bin/python3", "-c", "print(open('/proc/self/status').read())", cwd=place)
    assert "Seccomp:\t2\n" in told
