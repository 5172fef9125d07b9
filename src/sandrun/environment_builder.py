"""Fills a directory with a virtual environment, and lets strangers' code do no more than that.

pip runs strangers' code: the build script of a source package, a `.pth` file. As root all of it happens in a child with
a uid that nobody else has, below a scratch directory. When no process of the child's is left, root copies what the
child made into files of its own, byte by byte, and never runs any of it.

    /var/tmp/sandrun-build-…/          root's: the child may pass, not list or change; locked while its builder lives
    /var/tmp/sandrun-build-…/child/    the child's: home, tmp, pip (a throw-away venv that has pip), venv (to be copied)
"""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from sandrun.errors import ConfigError, SandrunError
from sandrun.linux import process
from sandrun.model import show

BUILD_UID = 2147352575
"""Uid and gid of the child: the last that systemd leaves to nobody, far above the sandboxes' own."""
PLACES = ("/var/tmp", "/tmp")
PREFIX = "sandrun-build-"
REPORT_BYTES = 4 << 20

_PASSED = re.compile(
    r"PIP_.*|(https?|all|no|ftp)_proxy|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|LANG|LC_.*|SOURCE_DATE_EPOCH",
    re.IGNORECASE,
)
_ELSEWHERE = "TARGET PREFIX USER ROOT PYTHON LOG SRC CACHE_DIR REPORT DRY_RUN REQUIRE_VIRTUALENV".split()
"""Settings of pip by which it would install or write elsewhere."""


class BuildError(SandrunError):
    """An environment could not be built; nothing of it is kept. The step is named, pip's own words went to the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to build.

    Attributes:
        python: the interpreter that jobs will use.
        requirements: text of a requirements file, or None.
        preload: modules that must be importable when all is done.
        mounted: where jobs will see the environment; scripts and tracebacks carry this path.
        log: descriptor that the progress goes to.
    """

    python: str
    packages: tuple[str, ...]
    requirements: str | None
    require_hashes: bool
    preload: tuple[str, ...]
    mounted: str
    log: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What the child tells of the environment. Strangers' code ran in it: these are claims, checked for shape alone."""

    packages: dict[str, str]
    python: str
    libraries: tuple[str, ...] = ()


def fill(order: Order, target: str) -> Built:
    """Build in a scratch directory and copy into the new directory `target`: ours, and readable by all.

    Raises: BuildError; OSError.
    """
    uid = _build_uid() if os.geteuid() == 0 else None
    with _scratch(uid) as scratch:
        variables = _variables(scratch, uid)
        if order.requirements is not None:
            _hand_over(os.path.join(scratch, "requirements.txt"), order.requirements, uid)
        built = _in_child(order, scratch, uid, variables)
        owner = os.geteuid() if uid is None else uid
        _copy(os.path.join(scratch, "venv"), target, owner=owner, mounted=order.mounted)
    return built


def clear_leftovers() -> None:
    """Remove the scratch directories of builders that were killed."""
    for place in PLACES:
        for name in os.listdir(place):
            path = os.path.join(place, name)
            if not name.startswith(PREFIX):
                continue
            with suppress(OSError):  # gone meanwhile, somebody else's, or locked by a builder that lives
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if os.fstat(descriptor).st_uid == os.geteuid():
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path)
                finally:
                    os.close(descriptor)


# ---- before the child --------------------------------------------------------------------------------------


def _build_uid() -> int:
    """`BUILD_UID`; where this root has fewer ids (a container), the last but one of them."""
    last = 0
    with open("/proc/self/uid_map") as stream:
        for line in stream:
            first, _, count = (int(word) for word in line.split())
            if first <= BUILD_UID < first + count:
                return BUILD_UID
            last = max(last, first + count - 1)
    if last < 1000:
        raise ConfigError("/proc/self/uid_map: this root has no uid to give to the builder; map at least 65536 of them")
    return last - 1


@contextmanager
def _scratch(uid: int | None) -> Iterator[str]:
    place = next((place for place in PLACES if os.access(place, os.W_OK | os.X_OK)), None)
    if place is None:
        raise ConfigError(f"no scratch space: none of {', '.join(PLACES)} can be written to")
    outer = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    descriptor = os.open(outer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.chmod(outer, 0o711)
        work = os.path.join(outer, "child")
        for name in (work, os.path.join(work, "home"), os.path.join(work, "tmp")):
            _make_directory(name, uid)
        yield work
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        os.close(descriptor)


def _make_directory(path: str, uid: int | None) -> None:
    os.mkdir(path, 0o700)
    if uid is not None:
        os.chown(path, uid, uid)


def _hand_over(path: str, text: str, uid: int | None) -> None:
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(text)
    if uid is not None:
        os.chown(path, uid, uid)


def _variables(scratch: str, uid: int | None) -> dict[str, str]:
    """The child's environment: how this host's pip is set up, by variables and by the caller's own files, and no more.

    The child can't read the caller's home, so pip's files are copied into its own. `.netrc` is not: it holds more than
    pip's secrets, and build scripts could read it.
    """
    home = os.path.join(scratch, "home")
    variables = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    for name in _ELSEWHERE:
        variables.pop(f"PIP_{name}", None)
    variables |= {
        "HOME": home,
        "TMPDIR": os.path.join(scratch, "tmp"),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONHASHSEED": "0",  # the order of sets in .pyc files: the digest tells packages, not luck
    }
    caller = os.path.expanduser("~")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(caller, ".config")
    for source, folders, name in (
        (os.path.join(caller, ".pip", "pip.conf"), (".pip",), "pip.conf"),
        (os.path.join(config, "pip", "pip.conf"), (".config", "pip"), "pip.conf"),
        (os.environ.get("PIP_CONFIG_FILE", ""), (), "named-by-variable.conf"),
    ):
        if not os.path.isfile(source):
            continue
        with open(source, encoding="utf-8") as stream:
            text = stream.read()
        place = home
        for folder in folders:
            place = os.path.join(place, folder)
            _make_directory(place, uid)
        _hand_over(os.path.join(place, name), text, uid)
        if not folders:
            variables["PIP_CONFIG_FILE"] = os.path.join(place, name)
    return variables


# ---- the child ---------------------------------------------------------------------------------------------


class _Failed(Exception):
    """A step of the child's ended badly; the message says which and how."""


def _in_child(order: Order, scratch: str, uid: int | None, variables: dict[str, str]) -> Built:
    """Fork the child and wait for it. When this returns, no process that it started is left."""
    report, report_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        answer: dict[str, Any] = {"failed": "unknown"}
        try:
            os.close(report)
            signal.signal(signal.SIGTERM, _stop)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the parent too, which then sends SIGTERM
            _become(scratch, uid, parent)
            answer = _steps(order, scratch, variables)
        except BaseException as error:  # it must not run the parent's code, as root or not
            answer = {"failed": str(error) if isinstance(error, _Failed) else f"{type(error).__name__}: {error}"}
        finally:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                _end_descendants()
                os.write(report_end, json.dumps(answer).encode())
            finally:
                os._exit(0)
    os.close(report_end)
    try:
        with open(report, "rb") as stream:
            text = stream.read(REPORT_BYTES)
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    finally:
        os.waitpid(pid, 0)
    try:
        value = json.loads(text)
        if "failed" in value:
            raise BuildError(show(value["failed"], 300))
        packages = {str(name): str(version) for name, version in value["packages"].items()}
        libraries = tuple(map(str, value.get("libraries", ())))
        return Built(packages=packages, python=str(value["python"]), libraries=libraries)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BuildError("the builder died without a report") from None


def _stop(*_: object) -> NoReturn:
    raise _Failed("stopped")


def _become(scratch: str, uid: int | None, parent: int) -> None:
    """Leave root and the caller's terminal for good, and live no longer than the parent."""
    os.setsid()
    process.set_child_subreaper()
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    process.set_no_new_privs()  # else a set-uid program is a way back
    process.set_parent_death_signal(signal.SIGTERM)  # after the change of uid, which clears it
    if os.getppid() != parent:
        raise _Failed("the parent died")
    os.umask(0o022)
    os.chdir(scratch)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _steps(order: Order, scratch: str, variables: dict[str, str]) -> dict[str, Any]:
    """Make the venv, fill it, compile it, ask it what is in it."""
    tools, target = os.path.join(scratch, "pip"), os.path.join(scratch, "venv")
    inside = os.path.join(target, "bin", "python")

    def run(step: str, *command: str, capture: bool = False, must: bool = True) -> bytes:
        output = subprocess.PIPE if capture else order.log
        ended = subprocess.run(command, env=variables, stdout=output, stderr=order.log, check=False)
        if must and ended.returncode:
            raise _Failed(f"{step} failed with {ended.returncode}; its own words stand above")
        return ended.stdout or b""

    run("making a venv (its package is python3-venv)", order.python, "-I", "-m", "venv", tools)
    run("making a venv", order.python, "-I", "-m", "venv", "--without-pip", target)
    pip = (os.path.join(tools, "bin", "python"), "-I", "-m", "pip", "--python", inside, "--no-input", "install")
    options = ["--no-compile", "--no-cache-dir", "--no-warn-script-location"]
    if order.requirements is not None:
        options += ["--requirement", os.path.join(scratch, "requirements.txt")]
    if order.require_hashes:
        options.append("--require-hashes")
    run("pip install", *pip, *options, "--", *order.packages)
    # Compiled here and not by pip: hash-based files hold no times, and the paths are those of a job's traceback.
    # Its failure is none: packages ship files of Python 2. -P and not -I, which would ignore PYTHONHASHSEED.
    paths = ("-s", target, "-p", order.mounted, "--invalidation-mode", "unchecked-hash", target)
    run("compileall", order.python, "-P", "-m", "compileall", "-qq", *paths, must=False)
    answer: dict[str, Any] = json.loads(run("listing the packages", inside, "-I", "-c", _LIST, capture=True))
    if order.preload:
        said = run("import of a module to preload", inside, "-I", "-B", "-c", _IMPORT, *order.preload, capture=True)
        _, _, found = said.decode().rpartition("\n\n")  # modules may print something, too
        answer["libraries"] = [path.replace(target, order.mounted) for path in found.splitlines()]
    return answer


_LIST = """
import importlib.metadata, json, platform
found = sorted((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
print(json.dumps({"packages": dict(found), "python": platform.python_version()}))
"""


_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = {line.split(None, 5)[5].strip(): 0 for line in open("/proc/self/maps") if line.count("/") and ".so" in line}
print("\\n", *reversed(found), sep="\\n")
"""


def _end_descendants() -> None:
    """Kill what a build script left running. A subreaper inherits every orphan, so a double fork does not get away."""
    while True:
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as stream:
                    parent = int(stream.read().rpartition(b")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# ---- the copy ----------------------------------------------------------------------------------------------


def walk(directory: bytes, below: bytes = b"") -> Iterator[tuple[bytes, int]]:
    """Path below `directory` and kind (S_IFREG, S_IFDIR, S_IFLNK, …) of each entry, parents first; follows no link."""
    with os.scandir(os.path.join(directory, below)) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = os.path.join(below, entry.name)
        kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
        yield path, kind
        if kind == stat.S_IFDIR:
            yield from walk(directory, path)


def _copy(source: str, target: str, *, owner: int, mounted: str) -> None:
    """Copy the child's tree; scripts get the path that jobs see for the one that they were made at.

    Only regular files of the child's own are read: into its tree it could have hard-linked somebody else's secret.
    """
    old, new = os.fsencode(source), os.fsencode(mounted)
    changed: dict[bytes, bytes] = {}
    records: list[bytes] = []
    os.mkdir(target)
    os.chmod(target, 0o755)
    for path, kind in walk(os.fsencode(source)):
        start, end = os.path.join(os.fsencode(source), path), os.path.join(os.fsencode(target), path)
        if kind == stat.S_IFDIR:
            os.mkdir(end)
            os.chmod(end, 0o755)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(start).replace(old, new), end)
        else:
            with open(os.open(start, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
                found = os.fstat(stream.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_uid != owner:
                    raise BuildError(f"{show(os.fsdecode(path))} is not a regular file of the builder's own")
                with open(end, "xb") as copy:
                    if path == b"pyvenv.cfg" or path.startswith(b"bin/"):
                        content = stream.read()
                        if old in content:
                            content = changed[path] = content.replace(old, new)
                        copy.write(content)
                    else:
                        shutil.copyfileobj(stream, copy, 1 << 20)
                    os.fchmod(copy.fileno(), 0o755 if found.st_mode & 0o111 else 0o644)
            if path.endswith(b".dist-info/RECORD"):
                records.append(path)
    for path in records:
        _correct_record(os.fsencode(target), path, changed)


def _correct_record(target: bytes, path: bytes, changed: Mapping[bytes, bytes]) -> None:
    """Give the scripts that were changed their new hash and size, so that an installation can still be checked.

    Python packaging specifications, "Recording installed projects": paths are relative to site-packages.
    """
    packages = os.path.dirname(os.path.dirname(path))
    with open(os.path.join(target, path), encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    for row in rows:
        content = changed.get(os.path.normpath(os.path.join(packages, os.fsencode(row[0])))) if row else None
        if content is not None:
            hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            row[1:] = [f"sha256={hashed}", str(len(content))]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with open(os.path.join(target, path), "w", encoding="utf-8", newline="") as stream:
        stream.write(text.getvalue())
