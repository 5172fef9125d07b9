"""Starting zygotes: namespaces and id maps, the private root, then a fresh interpreter in it."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import marshal
import os
import resource
import signal
import socket
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from sandrun.errors import SetupError
from sandrun.linux import calls, ids, process
from sandrun.linux.cgroup import Cgroup
from sandrun.sandbox import job, messages, rootfs, script
from sandrun.spawner import interpreters, protocol, zygote

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = (
    "__init__ bounds errors "
    "linux/__init__ linux/libc linux/memory linux/exits linux/process linux/calls linux/mounts linux/capabilities "
    "linux/seccomp linux/landlock "
    "sandbox/__init__ sandbox/spec sandbox/messages sandbox/steps sandbox/rootfs sandbox/report sandbox/script "
    "sandbox/generators sandbox/unpack sandbox/tar sandbox/collect sandbox/job "
    "spawner/__init__ spawner/protocol spawner/preload spawner/zygote"
).split()
"""What a zygote runs. It gets these as an archive in memory: its uid may not be able to read where they lie."""

LIBRARY = f"linux/{calls.LIBRARY}"

SITECUSTOMIZE = b"""\
def _run():
    try:
        from sandrun.spawner import zygote
    except BaseException as error:
        import os
        os.write(5, b"r" + bytes(7) + f"zygote imports\\0000\\0{type(error).__name__}: {error}".encode())
        os._exit(1)
    zygote.main()
_run()
"""
"""Without this, `site` would swallow a failed import. The write is a REFUSED, spelled out."""

NAMESPACES = (
    process.CLONE_NEWUSER
    | process.CLONE_NEWPID
    | process.CLONE_NEWNS
    | process.CLONE_NEWNET
    | process.CLONE_NEWIPC
    | process.CLONE_NEWUTS
)
"""A zygote has no cgroup namespace: CLONE_INTO_CGROUP out of one is ENOENT under nsdelegate."""

ENVIRONMENT_BYTES = 4096
PATH = "/usr/local/bin:/usr/bin:/bin"


class Recipe(NamedTuple):
    """What a zygote is made from.

    Attributes:
        name: of the environment, "" for the bare interpreter.
        environment: the environment's folder on the host as it is called now, or None.
        python: path of the interpreter inside.
        preload: modules that the zygote loads, after the shared objects `libraries`.
        uid_base: first of its `ids.BLOCK` host ids (0 inside is its own, then two a sandbox), or None with one uid.
        nest: keyword arguments of `sandbox.spec.Nest`, filters in hexadecimal.
    """

    name: str
    environment: str | None
    rootfs: str
    python: str
    preload: tuple[str, ...]
    libraries: tuple[str, ...]
    uid_base: int | None
    nest: dict[str, Any]


class Zygote(NamedTuple):
    pid: int
    pidfd: int
    connection: socket.socket


def make_archive(overrides: Mapping[str, bytes] | None = None) -> int:
    """The modules of a zygote as a zip in a sealed memory file. `overrides` replaces modules: a test's broken wall."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        _put(archive, "sitecustomize", SITECUSTOMIZE)
        for name in MODULES:
            with open(os.path.join(PACKAGE, f"{name}.py"), "rb") as file:
                source = file.read()
            _put(archive, f"sandrun/{name}", (overrides or {}).get(name, source))
        with open(os.path.join(PACKAGE, LIBRARY), "rb") as file:
            archive.writestr(f"sandrun/{LIBRARY}", (overrides or {}).get(LIBRARY, file.read()))
    return sealed(buffer.getvalue(), "code")


def _put(archive: zipfile.ZipFile, name: str, source: bytes) -> None:
    """A module, compiled too: to compile it leaves the zygote with a heap full of holes, which every sandbox copies.

    An interpreter of another version than ours takes the source. PEP 552: by its hash, unchecked.
    """
    archive.writestr(f"{name}.py", source)
    try:
        code = compile(source, f"{name}.py", "exec", dont_inherit=True)
    except SyntaxError:
        return  # the zygote says so
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    archive.writestr(f"{name}.pyc", head + marshal.dumps(code))


def sealed(data: bytes, name: str) -> int:
    """A memory file that nobody can change any more, at its beginning. memfd_create(2), fcntl(2) "File Sealing"."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(
        descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    )
    return descriptor


def start(recipe: Recipe, archive: int, cgroup: Cgroup | None) -> Zygote:
    """Start a zygote; it says WARM, or REFUSED, on its connection when it is ready. `archive` is `make_archive`'s.

    Raises: SetupError if it cannot be started at all; OSError if there are no descriptors for it.
    """
    ours, theirs = protocol.pair()
    parent, child = socket.socketpair()
    directory = cgroup.directory_fd() if cgroup is not None else None
    entries = cgroup.entry_fds() if cgroup is not None else []
    try:
        config = sealed(json.dumps(_config(recipe, len(entries))).encode(), "config")
    except OSError:
        protocol.close_all(entries)
        raise
    try:
        pid, pidfd = process.clone3(NAMESPACES, cgroup_fd=directory)
    except OSError as error:
        protocol.close_all([config, *entries])
        for end in (ours, theirs, parent, child):
            end.close()
        raise SetupError("zygote", error.errno or 0, f"{error}; a zygote needs {_flags_text()}") from None
    if pid == 0:
        parent.close()
        ours.close()
        _become(recipe, theirs, child, archive, config, entries)
    protocol.close_all([config, *entries])
    theirs.close()
    child.close()
    try:
        if parent.recv(1) == b"u":
            _write_maps(pid, recipe.uid_base)
            parent.send(b"m")
    except OSError as error:
        ours.close()
        os.close(pidfd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise SetupError("zygote id maps", error.errno or 0, str(error)) from None
    finally:
        parent.close()
    return Zygote(pid, pidfd, ours)


def _config(recipe: Recipe, entries: int) -> dict[str, Any]:
    """A sandbox enters its cgroup by as many files as its zygote does."""
    return {
        "name": recipe.name,
        "preload": recipe.preload,
        "libraries": recipe.libraries,
        "nest": {**recipe.nest, "entries": entries},
        "rehearsal": interpreters.make_archive(job.REHEARSAL, b"print(1)\n").hex(),
    }


def _flags_text() -> str:
    return "user, pid, mnt, net, ipc and uts namespaces"


def _write_maps(pid: int, base: int | None) -> None:
    if base is None:  # one uid: gid_map is EPERM unless setgroups(2) is given up first, user_namespaces(7)
        files = (("setgroups", b"deny"), ("gid_map", b"0 %d 1" % os.getegid()), ("uid_map", b"0 %d 1" % os.geteuid()))
    else:
        text = b"0 %d %d" % (base, ids.BLOCK)
        files = (("setgroups", b"allow"), ("gid_map", text), ("uid_map", text))
    for name, data in files:
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        except OSError as error:
            raise OSError(error.errno or 0, f"/proc/PID/{name}: {os.strerror(error.errno or 0)}") from None
        finally:
            os.close(descriptor)


def _become(
    recipe: Recipe, connection: socket.socket, sync: socket.socket, archive: int, config: int, entries: list[int]
) -> NoReturn:
    step, channel = "zygote start", connection.fileno()
    try:
        for entry in entries:
            os.write(entry, b"0")
        os.setsid()
        os.umask(0o022)  # of the root's folders, and what jobs inherit
        step = "zygote sources"
        sources = rootfs.open_sources(recipe.rootfs, recipe.environment, recipe.name)
        step = "zygote id maps"
        sync.send(b"u")
        if sync.recv(1) != b"m":
            os._exit(1)
        if recipe.uid_base is not None:
            os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        process.set_parent_death_signal(signal.SIGKILL)  # after the last change of ids, which clears it
        step = "zygote root"
        rootfs.build(sources)
        step = "zygote start"
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP) and number not in (32, 33):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        _arrange([archive, config, channel])
        channel = zygote.SOCKET  # an exec that fails is still told
        environment = {
            "PATH": PATH,
            "HOME": rootfs.WORK,
            "LANG": "C.UTF-8",
            "PYTHONPATH": f"/proc/self/fd/{zygote.CODE}",
            "ROOM": "." * ENVIRONMENT_BYTES,  # jobs that this interpreter runs show their own variables there
        }
        os.execve(recipe.python, [recipe.python, "-m", script.MARKER], environment)
    except BaseException as error:
        _give_up(channel, step, error)


def _arrange(descriptors: list[int]) -> None:
    """Put `descriptors` at 3 and on and pipes at 0 to 2; everything else goes at exec or here.

    Pipes, because the interpreter's standard streams are made when it starts: as for a job, neither terminals nor
    files that can be sought in.
    """
    high = [os.dup2(descriptor, 100 + place, inheritable=True) for place, descriptor in enumerate(descriptors)]
    reader, writer = os.pipe()
    spare_reader, spare_writer = os.dup2(reader, 110), os.dup2(writer, 111)
    for number, descriptor in enumerate((spare_reader, spare_writer, spare_writer)):
        os.dup2(descriptor, number, inheritable=True)
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, 3 + place, inheritable=True)
    process.close_range(3 + len(high), 0xFFFFFFFF)


def _give_up(channel: int, step: str, error: BaseException) -> NoReturn:
    try:
        os.write(channel, protocol.encode_refused(0, messages.failure(step, error)))
    finally:
        os._exit(1)
