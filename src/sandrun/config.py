"""Every setting of a server: one frozen `Config`, read once at start.

Each field of `Config` is a key, and its row says all there is to know: unit, default, accepted range, purpose; `sandrun
config` and docs/operating.md print that table. A key `max_timeout` is `max_timeout = 600` in the TOML file,
`SANDRUN_MAX_TIMEOUT=600` in the environment and `--max-timeout 600` on the command line; the later of the three wins,
and `Config.origins` remembers which did.

Standard library only: the privileged side reads this too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NoReturn

from sandrun.errors import ConfigError
from sandrun.model import INTERPRETERS, LAYERS, Ceilings, show

if TYPE_CHECKING:
    from sandrun.jobs.config import JobsConfig

MIB = 1 << 20
CGROUP_LAYERS = ("memory", "pids", "cpu")
ROOT_STATE_DIR = "/var/lib/sandrun"
ROOT_FILE = "/etc/sandrun/sandrun.toml"
UID_BASE = 1879048192
"""First host uid of the sandboxes as root: clear of subuids (100000…) and of systemd's ranges (below 0x70000000)."""

OTHER_VARIABLES = frozenset({"SANDRUN_CONFIG", "SANDRUN_URL", "SANDRUN_CA"})
"""Variables of ours that are no keys: the TOML file's path; the server that the client commands talk to, and its CA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of the table.

    Attributes:
        kind: how a value is read: text, path, integer, number, size, names.
        low, high: the accepted range of a number, in `unit`; None is unbounded.
        choices: the accepted words, if they are few.
        default_text: how the default is told where it depends on the host.
        reads: the file or directory must exist when the server starts.
    """

    name: str
    section: str
    kind: str
    unit: str
    default: Any
    why: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    default_text: str = ""
    reads: bool = False

    @property
    def variable(self) -> str:
        return "SANDRUN_" + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def accepted(self) -> str:
        """The range in words, for tables and error messages."""
        if self.choices:
            return ", ".join(self.choices)
        if self.low is not None and self.high is not None:
            words = f"{_figure(self.low, self.kind)} to {_figure(self.high, self.kind)}"
            return f"{words} {self.unit}" if self.unit else words
        return {"path": "a path", "names": "a list of names"}.get(self.kind, "text")

    @property
    def default_shown(self) -> str:
        return self.default_text or display(self, self.default)


def _setting(section: str, kind: str, default: Any, why: str, **row: Any) -> Any:
    """A dataclass field whose metadata is its row of the table."""
    row = {"section": section, "kind": kind, "why": why, "unit": "bytes" if kind == "size" else "", **row}
    if callable(default):
        return field(default_factory=default, metadata=row)
    return field(default=default, metadata=row)


def _default_state_dir() -> str:
    if os.geteuid() == 0:
        return ROOT_STATE_DIR
    return os.path.join(os.path.expanduser("~"), ".local", "share", "sandrun")


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _default_store() -> int:
    return max(64 * MIB, min(4096 * MIB, ram_bytes() // 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings. Raises: ConfigError naming key, value, origin and accepted range."""

    host: str = _setting("listen", "text", "127.0.0.1", "address to listen on; 0.0.0.0 and :: are all of the machine's")
    port: int = _setting("listen", "integer", 8443, "TCP port to listen on; 0 picks a free one", low=0, high=65535)
    cert: str | None = _setting("listen", "path", None, "TLS certificate chain, PEM; needs key", reads=True)
    key: str | None = _setting("listen", "path", None, "TLS private key, PEM; needs cert", reads=True)
    hostname: tuple[str, ...] = _setting(
        "listen", "names", (), "names that a Host header may carry beside IP literals and localhost"
    )
    user: str = _setting(
        "listen", "text", "sandrun", "account of the HTTP process as root; the range's first id if there is none"
    )

    allow_missing: tuple[str, ...] = _setting(
        "isolation",
        "names",
        (),
        "protections that this host may lack; every result says so. cgroup stands for memory, pids and cpu",
        choices=(*LAYERS, "cgroup"),
    )
    rootfs: str | None = _setting(
        "isolation", "path", None, "root file system of the sandboxes; without one /usr of the host", reads=True
    )
    interpreters: tuple[str, ...] = _setting(
        "isolation", "names", INTERPRETERS, "interpreters to offer, of those that the host has", choices=INTERPRETERS
    )
    uid_base: int = _setting(
        "isolation", "integer", UID_BASE, "first host uid of the sandboxes, as root", low=65536, high=4294000000
    )
    state_dir: str = _setting(
        "isolation",
        "path",
        _default_state_dir,
        "directory of the environments",
        default_text=f"{ROOT_STATE_DIR} as root, else ~/.local/share/sandrun",
    )

    max_timeout: float = _setting("limits", "number", 300.0, "ceiling of timeout", unit="seconds", low=1, high=3600)
    max_memory_mb: int = _setting("limits", "integer", 512, "ceiling of memory_mb", unit="MiB", low=64, high=2048)
    max_cpu_seconds: float = _setting(
        "limits", "number", 3600.0, "ceiling of cpu_seconds", unit="seconds", low=0.1, high=3600
    )
    max_processes: int = _setting("limits", "integer", 100, "ceiling of processes", unit="tasks", low=1, high=100)

    store_bytes: int = _setting(
        "jobs",
        "size",
        _default_store,
        "RAM for uploads, logs and outputs, all jobs together",
        low=16 * MIB,
        high=1024 * 1024 * MIB,
        default_text="25 % of RAM, 64M to 4G",
    )
    client_store_share: float = _setting(
        "jobs", "number", 0.5, "part of store_bytes that one client may hold", low=0.01, high=1
    )
    queued_jobs: int = _setting("jobs", "integer", 1000, "jobs that wait, all clients together", low=1, high=100000)
    client_queued_jobs: int = _setting("jobs", "integer", 100, "jobs of one client that wait", low=1, high=100000)
    run_queue_seconds: float = _setting(
        "jobs", "number", 30.0, "how long a /run waits for its turn", unit="seconds", low=0.1, high=3600
    )
    active_per_core: float = _setting(
        "jobs", "number", 2.0, "sandboxes that run at once, for each core", low=0.1, high=100
    )
    memory_share: float = _setting(
        "jobs", "number", 0.6, "part of RAM that running jobs' limits may promise together", low=0.05, high=16
    )
    parked_share: float = _setting(
        "jobs",
        "number",
        0.05,
        "part of RAM that the sandboxes of one environment may take that wait for jobs, 4 MiB each; 0 builds each when "
        "its job comes",
        low=0,
        high=0.5,
    )
    client_running_share: float = _setting(
        "jobs", "number", 0.25, "part of the running places that one client may hold, at least one", low=0.01, high=1
    )
    failed_ttl_seconds: float = _setting(
        "jobs", "number", 300.0, "how long a failed job that nobody asks for is kept", unit="seconds", low=1, high=86400
    )
    ttl_seconds: float = _setting(
        "jobs", "number", 3600.0, "the same for a completed one", unit="seconds", low=1, high=604800
    )
    grace_seconds: float = _setting(
        "jobs", "number", 30.0, "what running jobs get at SIGTERM", unit="seconds", low=0, high=3600
    )

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for row in KEYS:
            _check(row, getattr(self, row.name), self.origins.get(row.name, "default"))
        if (self.cert is None) != (self.key is None):
            given, lacking = ("cert", "key") if self.key is None else ("key", "cert")
            origin = self.origins.get(given, "default")
            raise ConfigError(f"{given} ({origin}) needs {lacking}: TLS takes both or neither")

    @property
    def waived(self) -> frozenset[str]:
        """The layers of `allow_missing`, with `cgroup` spelled out."""
        named = set(self.allow_missing)
        if "cgroup" in named:
            named = (named - {"cgroup"}) | set(CGROUP_LAYERS)
        return frozenset(named)

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings(
            timeout=self.max_timeout,
            memory_mb=self.max_memory_mb,
            cpu_seconds=self.max_cpu_seconds,
            processes=self.max_processes,
        )

    @property
    def jobs(self) -> JobsConfig:
        """The section that `sandrun.jobs` gets."""
        from sandrun.jobs.config import JobsConfig

        return JobsConfig(**{f.name: getattr(self, f.name) for f in fields(JobsConfig)})

    @property
    def environments_dir(self) -> str:
        return os.path.join(self.state_dir, "environments")

    def rows(self) -> Iterator[tuple[Key, Any, str]]:
        """Each key with its value and where that came from."""
        for row in KEYS:
            yield row, getattr(self, row.name), self.origins.get(row.name, "default")


def _table() -> tuple[Key, ...]:
    rows = []
    for f in fields(Config):
        if f.metadata:
            default = f.default_factory() if callable(f.default_factory) else f.default
            rows.append(Key(name=f.name, default=default, **f.metadata))
    return tuple(rows)


KEYS = _table()
_BY_NAME = {row.name: row for row in KEYS}


# ---- values ------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]?)(?:i?B)?\Z", re.IGNORECASE)
_HOSTNAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?\Z")
_SCALE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "size": int,
    "number": (int, float),
    "names": tuple,
    "text": str,
    "path": str,
}


def _figure(value: float, kind: str) -> str:
    if kind == "size":
        for suffix in "TGMK":
            if value >= _SCALE[suffix] and value % _SCALE[suffix] == 0:
                return f"{int(value) // _SCALE[suffix]}{suffix}"
    return f"{value:.10g}"


def display(row: Key, value: Any) -> str:
    """A value as one writes it in the environment."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value) if isinstance(value, str) else _figure(value, row.kind)


def _refuse(row: Key, value: object, origin: str) -> NoReturn:
    raise ConfigError(f"{row.name}: {show(value)} ({origin}) is not accepted; accepted: {row.accepted}")


def _from_text(row: Key, text: str, origin: str) -> Any:
    """A value out of the environment or a flag."""
    try:
        if row.kind == "integer":
            return int(text)
        if row.kind == "number":
            return float(text)
    except ValueError:
        _refuse(row, text, origin)
    if row.kind == "size":
        return _size(row, text, origin)
    if row.kind == "names":
        return tuple(word for word in re.split(r"[,\s]+", text) if word)
    return text


def _size(row: Key, text: str, origin: str) -> int:
    match = _SIZE.match(text.strip())
    if match is None:
        _refuse(row, text, origin)
    return int(match[1]) * _SCALE[match[2].upper()]


def _from_toml(row: Key, value: object, origin: str) -> Any:
    """A value out of the file, where TOML has given it a type."""
    if row.kind == "size" and isinstance(value, str):
        return _size(row, value, origin)
    if row.kind == "names":
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return tuple(value)
        _refuse(row, value, origin)
    if row.kind == "number" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check(row: Key, value: Any, origin: str) -> None:
    """Raises: ConfigError unless `value` has its row's type and lies in its row's range."""
    if value is None and row.default is None:
        return
    if isinstance(value, bool) or not isinstance(value, _TYPES[row.kind]):
        _refuse(row, value, origin)
    if isinstance(value, (int, float)):
        if row.low is None or row.high is None or not row.low <= value <= row.high:  # NaN lies in no range
            _refuse(row, value, origin)
    elif isinstance(value, str) and (not value or not value.isprintable()):
        _refuse(row, value, origin)
    for word in value if isinstance(value, tuple) else ():
        if row.choices and word not in row.choices:
            _refuse(row, word, origin)
        if row.name == "hostname" and not _HOSTNAME.match(word):
            raise ConfigError(f"hostname: {show(word)} ({origin}) is not a host name")


# ---- where values come from --------------------------------------------------------------------------------


def default_file() -> str:
    """The TOML file that is read when none is named; it need not exist."""
    if os.geteuid() == 0:
        return ROOT_FILE
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "sandrun", "sandrun.toml")


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: str | None = None,
) -> Config:
    """Read file, environment and flags, in this order of rising precedence.

    Args:
        flags: key to text, or to a sequence of texts for a list; None is a flag that was not given.
        file: the TOML file; else SANDRUN_CONFIG, else `default_file` if it exists.
    Raises: ConfigError naming key, value, origin and accepted range; for unknown keys too: a limit that is misspelt
        would silently not hold.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    named = file or environ.get("SANDRUN_CONFIG")
    path = named or default_file()
    for name, value in _read_file(path, must_exist=named is not None).items():
        row = _BY_NAME.get(name)
        if row is None:
            _unknown(f"{name} in {path}", name)
        origins[name] = f"file {path}"
        values[name] = _from_toml(row, value, origins[name])
    for variable, text in environ.items():
        if not variable.startswith("SANDRUN_") or variable in OTHER_VARIABLES:
            continue
        name = variable[len("SANDRUN_") :].lower()
        row = _BY_NAME.get(name)
        if row is None or variable != row.variable:
            if _close(name):  # others may use the prefix too, but this is a key misspelt
                _unknown(f"the environment variable {variable}", name, prefix="SANDRUN_")
            continue
        origins[row.name] = f"environment {variable}"
        values[row.name] = _from_text(row, text, origins[row.name])
    for name, given in (flags or {}).items():
        if given is None:
            continue
        row = _BY_NAME[name]
        origins[name] = f"flag {row.flag}"
        if row.kind == "names" and not isinstance(given, str):
            values[name] = tuple(w for text in given for w in _from_text(row, text, origins[name]))
        else:
            values[name] = _from_text(row, given, origins[name])
    for row in KEYS:
        if row.kind == "path" and isinstance(values.get(row.name), str):
            values[row.name] = os.path.abspath(os.path.expanduser(values[row.name]))
            if row.reads and not os.path.exists(values[row.name]):
                raise ConfigError(f"{row.name}: {show(values[row.name], 200)} ({origins[row.name]}) does not exist")
    return Config(**values, origins=origins)


def _read_file(path: str, *, must_exist: bool) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"the settings file {path} does not exist") from None
        return {}
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} is not TOML: {error}") from None


def _close(name: str) -> str | None:
    """The key that `name` is likely meant to be."""
    import difflib

    return next(iter(difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.75)), None)


def _unknown(what: str, name: str, *, prefix: str = "") -> NoReturn:
    meant = _close(name)
    if meant and prefix:
        meant = prefix + meant.upper()
    raise ConfigError(f"{show(what, 300)} is no setting" + (f"; did you mean {meant}?" if meant else ""))


def table(write: Callable[[str], object]) -> None:
    """Write the table of keys as Markdown, for docs/operating.md and `sandrun config --table`."""
    write("| key | flag | unit | default | accepted | what it is |\n|---|---|---|---|---|---|\n")
    for row in KEYS:
        cells = (f"`{row.name}`", f"`{row.flag}`", row.unit, row.default_shown, row.accepted, row.why)
        write("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
