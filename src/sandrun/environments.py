"""Named sets of Python packages: the operator builds them, jobs read them.

An environment is a virtual environment in `<state_dir>/environments/<name>`, described in its `environment.json`; in a
job it is `/environments/<name>`, read-only. `environment_builder` makes it; a server only lists. Nothing in an
environment is ever run outside a sandbox once it is built.

Standard library only: the spawner lists environments.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOENT
from typing import Any

from sandrun.errors import ConfigError, InvalidInput, NotFound
from sandrun.model import show
from sandrun.ready import DEFINITIONS

MOUNT = "/environments"
"""Where a job finds them."""
DESCRIPTION = "environment.json"
DESCRIPTION_BYTES = 4 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_UNFINISHED = ".tmp-"
_PYTHON = re.compile(r"python3\.(\d+)\Z")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", re.ASCII)
_MOST_PRELOADED = 100
_NESTED = re.compile(r"^\s*(-r|-c|--requirement|--constraint)\b.*", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is told about an environment, in its description and to clients.

    Attributes:
        packages: name to version, as `importlib.metadata` gives them inside.
        digest: see `digest`; equal digests mean equal files.
        python: version of the interpreter that it was built for and is bound to.
        created: UTC, ISO 8601.
        preload: modules that its zygote loads, in this order.
        libraries: shared objects that these load, as paths inside.
        path: the directory on the host; no client is told.
    """

    name: str
    packages: Mapping[str, str]
    digest: str
    python: str
    created: str
    preload: tuple[str, ...]
    libraries: tuple[str, ...]
    path: str


def build(
    name: str,
    packages: Sequence[str] = (),
    *,
    state_dir: str,
    requirements: str | None = None,
    require_hashes: bool = False,
    preload: Sequence[str] | None = None,
    python: str | None = None,
    log: int = 2,
) -> Environment:
    """Build an environment and put it in its place by one rename; one that has the name already is replaced.

    A server that is running takes it up for the jobs that begin then; see `hold`.

    pip works as it is set up on this host: its configuration files, `PIP_*`, proxies and certificates count, those of
    the calling user included.

    Args:
        packages: requirements as pip takes them: `numpy`, `pandas==2.2.3`, `/srv/wheels/own-1.0-py3-none-any.whl`.
            None at all and no file: those of the ready definition of this name.
        requirements: path of a requirements file; it may not name others.
        require_hashes: refuse every package that the file gives no hash for.
        preload: modules that jobs find loaded; not given: those of the ready definition if its packages are built,
            else none.
        python: the interpreter that jobs use; `find_python` if not given.
        log: descriptor that pip's progress goes to.
    Raises: InvalidInput for an argument, ConfigError for a place that others can change, BuildError.
    """
    from sandrun import environment_builder as builder
    from sandrun.linux import files

    _check_name(name)
    ready = DEFINITIONS.get(name) if not packages and requirements is None else None
    if ready is not None:
        packages = ready.packages
    if preload is None:
        preload = ready.preload if ready is not None else ()
    order = builder.Order(
        python=python or find_python(),
        packages=tuple(packages),
        requirements=_check_requirements(packages, requirements, require_hashes),
        require_hashes=require_hashes,
        preload=_check_preload(preload),
        mounted=os.path.join(MOUNT, name),
        log=log,
    )
    base = _own_directory(state_dir)
    place = os.path.join(base, name)
    with _locked(base):
        _clear_leftovers(base)
        builder.clear_leftovers()
        unfinished = _aside(place)
        try:
            built = builder.fill(order, unfinished)
            value = {
                "name": name,
                "packages": built.packages,
                "digest": digest(unfinished),
                "python": built.python,
                "created": _now(),
                "preload": order.preload,
                "libraries": built.libraries,
            }
            with open(os.path.join(unfinished, DESCRIPTION), "x", encoding="utf-8") as stream:
                json.dump(value, stream, indent=1)
                os.fchmod(stream.fileno(), 0o644)
            os.sync()  # a power cut must not leave the name without the files
            if os.path.lexists(place):
                files.exchange(unfinished, place)
            else:
                os.rename(unfinished, place)
        finally:
            _discard(unfinished)  # what was there before, or what could not be finished
    return _read(base, name)


def list_(state_dir: str) -> list[Environment]:
    """All environments, by name.

    Raises: ConfigError for one that others than root and this user could have changed, or without a description.
    """
    found = []
    for name in names(state_dir):
        with suppress(FileNotFoundError):  # removed meanwhile
            found.append(find(name, state_dir))
    return found


def names(state_dir: str) -> list[str]:
    """What environments are called that are there, sorted. Raises: ConfigError as `list_`; OSError."""
    base = os.path.join(state_dir, "environments")
    try:
        _check_owner(base)
        found = os.listdir(base)
    except FileNotFoundError:
        return []
    return sorted(name for name in found if _NAME.match(name) and _UNFINISHED not in name)


def find(name: str, state_dir: str) -> Environment:
    """Raises: ConfigError as `list_`; OSError if there is none."""
    base = os.path.join(state_dir, "environments")
    _check_owner(base)
    return _read(base, name)


def remove(name: str, state_dir: str) -> None:
    """Remove an environment; its files stay as long as a server holds them.

    Raises: NotFound.
    """
    _check_name(name)
    base = os.path.join(state_dir, "environments")
    place = os.path.join(base, name)
    if not os.path.isdir(place):
        raise NotFound(f"there is no environment {name} in {base}")
    with _locked(base):
        gone = _aside(place)
        os.rename(place, gone)  # nobody finds half of one
        _discard(gone)


def hold(environment: Environment) -> int:
    """Keep an environment's files where they are while the descriptor is open, though it be removed or replaced.

    A server needs that: a zygote imports from its environment long after it was mounted.
    Raises: FileNotFoundError if it is gone already.
    """
    import fcntl

    descriptor = os.open(environment.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # a remover had it when we opened it
        os.close(descriptor)
        raise FileNotFoundError(ENOENT, f"environment {environment.name} was removed", environment.path)
    return descriptor


def current(environment: Environment) -> Environment:
    """What has this environment's name now, which is another if it was built again; itself if nothing usable has."""
    try:
        return find(environment.name, os.path.dirname(os.path.dirname(environment.path)))
    except (OSError, ConfigError):
        return environment


def digest(directory: str) -> str:
    """SHA-256, in hex, over all files and links below `directory` but `environment.json`.

    Of each, sorted by path as bytes: `<mode, octal> <SHA-256 of the content, or of a link's target> <path>\\0`.
    """
    import hashlib

    from sandrun.environment_builder import walk

    total = hashlib.sha256()
    top = os.fsencode(directory)
    for path, kind in sorted(walk(top)):
        content = hashlib.sha256()
        mode = stat.S_IFLNK
        if kind == stat.S_IFLNK:
            content.update(os.readlink(os.path.join(top, path)))
        elif kind == stat.S_IFREG and path != os.fsencode(DESCRIPTION):
            with open(os.path.join(top, path), "rb", buffering=0) as stream:
                mode = os.fstat(stream.fileno()).st_mode
                while block := stream.read(1 << 20):
                    content.update(block)
        else:
            continue
        total.update(b"%06o %s %s\0" % (mode, content.hexdigest().encode(), path))
    return total.hexdigest()


def find_python() -> str:
    """`/usr/bin/python3`, or the newest `/usr/bin/python3.N`, of 3.11 or later; never PATH's, which jobs may not reach.

    Raises: ConfigError.
    """
    usual = _PYTHON.match(os.path.basename(os.path.realpath("/usr/bin/python3")))
    if usual and int(usual[1]) >= 11:
        return "/usr/bin/python3"
    newest = max((int(found[1]) for name in os.listdir("/usr/bin") if (found := _PYTHON.match(name))), default=0)
    if newest < 11:
        raise ConfigError("there is no Python 3.11 or later in /usr/bin; install the package python3 or python3.11")
    return f"/usr/bin/python3.{newest}"


# ---- arguments and directories -----------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if not _NAME.match(name) or _UNFINISHED in name:
        accepted = "1 to 64 of A-Z a-z 0-9 _ . - that begin with a letter or digit"
        raise InvalidInput("name", f"{show(name)} is not accepted; accepted: {accepted}")


def _check_preload(names: Iterable[object]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str) or not _MODULE.match(name) or name.partition(".")[0] == "sandrun":
            raise InvalidInput("preload", f"{show(name)} is not the name of a module, as `import` takes it")
        found[name] = None
    if len(found) > _MOST_PRELOADED:
        raise InvalidInput("preload", f"{len(found)} modules; accepted: at most {_MOST_PRELOADED}")
    return tuple(found)


def _check_requirements(packages: Sequence[str], requirements: str | None, require_hashes: bool) -> str | None:
    """The text of the requirements file, if one is named."""
    for package in packages:
        if not package or package.startswith("-") or not package.isprintable():
            raise InvalidInput("packages", f"{show(package)} is not a package; options stand in pip's configuration")
    if requirements is None:
        if require_hashes:
            raise InvalidInput("require_hashes", "needs a requirements file, where a hash stands beside each package")
        if not packages:
            known = ", ".join(sorted(DEFINITIONS))
            raise InvalidInput("packages", f"name at least one, or a requirements file; ready without any are {known}")
        return None
    try:
        with open(requirements, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("requirements", f"{show(requirements, 200)} cannot be read: {error}") from None
    if nested := _NESTED.search(text):
        raise InvalidInput("requirements", f"{show(nested[0].strip())}: a file that names another is not accepted")
    return text


def _own_directory(state_dir: str) -> str:
    """`<state_dir>/environments`, made if it is missing, where nobody else can change anything."""
    base = os.path.join(os.path.abspath(state_dir), "environments")
    for directory in (os.path.dirname(base), base):
        if not os.path.lexists(directory):
            os.makedirs(directory)
            os.chmod(directory, 0o755)
        _check_owner(directory)
    return base


def _check_owner(path: str) -> None:
    """Raises: ConfigError if another user could change what is there."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is not a directory")
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise ConfigError(
            f"{path} (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}) could be changed by others; "
            f"fix: chown {os.geteuid()} {path} && chmod 755 {path}"
        )


def _read(base: str, name: str) -> Environment:
    path = os.path.join(base, name)
    _check_owner(path)
    try:
        with open(os.path.join(path, DESCRIPTION), "rb") as stream:
            value: dict[str, Any] = json.loads(stream.read(DESCRIPTION_BYTES))
        return Environment(
            name=name,
            packages=dict(value["packages"]),
            digest=str(value["digest"]),
            python=str(value["python"]),
            created=str(value["created"]),
            preload=_check_preload(value.get("preload", ())),  # older versions knew neither
            libraries=tuple(map(str, value.get("libraries", ()))),
            path=path,
        )
    except (OSError, ValueError, KeyError, TypeError, InvalidInput) as error:
        fix = f"remove it and build it again: sandrun environment remove {name}"
        raise ConfigError(f"{path}: {DESCRIPTION} cannot be read ({type(error).__name__}: {error}); {fix}") from None


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """One builder or remover at a time; others wait."""
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _aside(place: str) -> str:
    """A name that no reader takes for an environment's."""
    return f"{place}{_UNFINISHED}{os.getpid()}-{os.urandom(4).hex()}"


def _clear_leftovers(base: str) -> None:
    """Remove what builders and removers left in `base`, whose lock we hold: killed ones, or those that met a server."""
    for name in os.listdir(base):
        if _UNFINISHED in name:
            _discard(os.path.join(base, name))


def _discard(path: str) -> None:
    """Remove a tree, unless somebody holds it: then the next builder does."""
    import fcntl
    import shutil

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)  # goes by descriptors, so a link in it leads nowhere
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")
