"""All that a job sees of itself and around it, as JSON."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import stat
import sys


def text(path: str) -> str:
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        return f"errno {error.errno}"


def entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        return [f"errno {error.errno}"]


def is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def is_terminal_there() -> str:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError as error:
        return f"errno {error.errno}"
    return "ok"


descriptors = [number for number in range(65536) if is_open(number)]
status = dict((line + "\t").split(":\t", 1) for line in text("/proc/self/status").splitlines())
stat_fields = text("/proc/self/stat").rpartition(")")[2].split()
mounts = []
for line in text("/proc/self/mountinfo").splitlines():
    left, _, right = line.partition(" - ")
    mounts.append([left.split(" ")[4], right.split(" ")[0], left.split(" ")[5].split(",")])

print(
    json.dumps(
        {
            "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in entries("/proc/self/ns")},
            "status": {name: value.strip() for name, value in status.items()},
            "maps": {name: text(f"/proc/self/{name}").split() for name in ("uid_map", "gid_map")},
            "ids": [os.getuid(), os.getgid()],
            "groups": os.getgroups(),
            "mounts": mounts,
            "interfaces": sorted(
                line.split(":")[0].strip() for line in text("/proc/net/dev").splitlines() if ":" in line
            ),
            "routes": [text("/proc/net/route").splitlines()[1:], text("/proc/net/ipv6_route").splitlines()],
            "addresses": [text("/proc/net/fib_trie"), text("/proc/net/if_inet6")],
            "unix sockets": text("/proc/net/unix").splitlines()[1:],
            "descriptors": descriptors,
            "streams": [stat.filemode(os.fstat(number).st_mode)[0] for number in range(3)],
            "stdin": sys.stdin.read(),
            "environment": dict(os.environ),
            "proc environment": text("/proc/self/environ").split("\0")[:-1],
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "not default": {
                signal.Signals(number).name: str(signal.getsignal(number))
                for number in signal.valid_signals()
                if signal.getsignal(number) is not signal.SIG_DFL
                and number not in (signal.SIGKILL, signal.SIGSTOP)
                and number < signal.SIGRTMIN
            },
            "real-time not default": [
                int(number)
                for number in signal.valid_signals()
                if number >= signal.SIGRTMIN and signal.getsignal(number) is not signal.SIG_DFL
            ],
            "umask": os.umask(0o022),
            "process": {
                "pid": os.getpid(),
                "parent": os.getppid(),
                "group": int(stat_fields[2]),
                "session": int(stat_fields[3]),
                "terminal": int(stat_fields[4]),
                "nice": int(stat_fields[16]),
                "policy": int(stat_fields[38]),
            },
            "/dev/tty": is_terminal_there(),
            "uname": list(os.uname()),
            "domain": text("/proc/sys/kernel/domainname").strip(),
            "cgroup": text("/proc/self/cgroup").splitlines(),
            "rlimits": {
                name.removeprefix("RLIMIT_"): list(resource.getrlimit(getattr(resource, name)))
                for name in dir(resource)
                if name.startswith("RLIMIT_")
            },
            "oom_score_adj": int(text("/proc/self/oom_score_adj")),
            "folders": {
                folder: entries(folder) for folder in ("/", "/dev", "/dev/shm", "/tmp", "/job", "/proc", "/etc")
            },
            "links": {name: os.readlink(f"/dev/{name}") for name in ("fd", "stdin", "stdout", "stderr")},
            "devices": {
                name: [os.major(os.stat(f"/dev/{name}").st_rdev), os.minor(os.stat(f"/dev/{name}").st_rdev)]
                for name in ("null", "zero", "full", "random", "urandom")
            },
            "work directory": os.getcwd(),
            "processes": {
                name: text(f"/proc/{name}/cmdline").replace("\0", " ").strip()
                for name in entries("/proc")
                if name.isdigit()
            },
            "keys": [text("/proc/keys"), text("/proc/key-users")],
            "argv": sys.argv,
            "path": sys.path,
        }
    )
)
