"""Settings: one table of keys, three places they come from, and refusals that name key, value, origin and range."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandrun.config import KEYS, UID_BASE, Config, display, load, table
from sandrun.errors import ConfigError
from sandrun.jobs.config import JobsConfig
from sandrun.model import Ceilings


def loaded(
    toml: str | None = None, flags: dict[str, Any] | None = None, tmp: Path | None = None, **environ: str
) -> Config:
    file = None
    if toml and tmp:
        path = tmp / "sandrun.toml"
        path.write_text(toml)
        file = str(path)
    return load(flags, environ={"SANDRUN_CONFIG": "/dev/null", **environ}, file=file)


def test_every_key_has_a_range_and_a_purpose() -> None:
    for row in KEYS:
        assert row.why
        assert row.accepted
        if row.kind in ("integer", "number", "size"):
            assert row.low is not None
            assert row.high is not None
            assert row.low <= row.default <= row.high


def test_defaults_are_a_valid_server_on_loopback() -> None:
    config = loaded()
    assert (config.host, config.port) == ("127.0.0.1", 8443)
    assert config.ceilings == Ceilings(timeout=300.0, memory_mb=512)
    assert config.waived == frozenset()
    assert config.uid_base == UID_BASE == 1879048192
    assert all(origin == "default" for _, _, origin in config.rows())


def test_each_bound_of_the_job_service_is_a_key_with_the_same_default() -> None:
    config = loaded()
    for field in dataclasses.fields(JobsConfig):
        if field.name not in ("ceilings", "store_bytes"):
            assert getattr(config, field.name) == field.default, field.name
    assert config.jobs.store_bytes == config.store_bytes
    assert config.jobs.ceilings == config.ceilings


def test_flags_go_over_environment_over_file(tmp_path: Path) -> None:
    toml = 'port = 1\nmax_timeout = 1\nmax_memory_mb = 64\nhostname = ["a.example", "b.example"]\n'
    config = loaded(toml, {"port": "3", "host": None}, tmp_path, SANDRUN_PORT="2", SANDRUN_MAX_TIMEOUT="2.5")
    assert (config.port, config.max_timeout, config.max_memory_mb) == (3, 2.5, 64)
    assert config.hostname == ("a.example", "b.example")
    origins = {row.name: origin for row, _, origin in config.rows()}
    assert origins["port"] == "flag --port"
    assert origins["max_timeout"] == "environment SANDRUN_MAX_TIMEOUT"
    assert origins["max_memory_mb"] == f"file {tmp_path}/sandrun.toml"
    assert origins["host"] == "default"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SANDRUN_PORT": "65536"}, ["port", "65536", "environment SANDRUN_PORT", "0 to 65535"]),
        ({"SANDRUN_PORT": "http"}, ["port", "http", "0 to 65535"]),
        ({"SANDRUN_MAX_TIMEOUT": "nan"}, ["max_timeout", "NaN", "1 to 3600 seconds"]),
        ({"SANDRUN_MAX_TIMEOUT": "0"}, ["max_timeout", "1 to 3600 seconds"]),
        ({"SANDRUN_MAX_MEMORY_MB": "4096"}, ["max_memory_mb", "64 to 2048 MiB"]),
        ({"SANDRUN_STORE_BYTES": "1K"}, ["store_bytes", "16M to 1T"]),
        ({"SANDRUN_STORE_BYTES": "much"}, ["store_bytes", "much"]),
        ({"SANDRUN_ALLOW_MISSING": "swap,walls"}, ["allow_missing", "walls", "no-new-privs", "cgroup"]),
        ({"SANDRUN_HOSTNAME": "a b\x1b"}, ["hostname", "is not a host name"]),
        ({"SANDRUN_HOST": ""}, ["host"]),
        ({"SANDRUN_CERT": "/dev/null"}, ["cert", "needs key"]),
        ({"SANDRUN_CERT": "/does/not/exist"}, ["cert", "/does/not/exist", "does not exist"]),
        ({"SANDRUN_ROOTFS": "/does/not/exist"}, ["rootfs", "does not exist"]),
        ({"SANDRUN_MAX_MEMROY_MB": "64"}, ["SANDRUN_MAX_MEMROY_MB", "did you mean SANDRUN_MAX_MEMORY_MB?"]),
    ],
)
def test_a_bad_value_is_refused_by_key_origin_and_range(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        loaded(None, None, None, **environ)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("port = true", ["port", "true", "0 to 65535"]),
        ('port = "8443"', ["port"]),
        ("port = 1.5", ["port", "1.5"]),
        ("max_memroy_mb = 64", ["max_memroy_mb", "did you mean max_memory_mb?"]),
        ("[limits]\nmax_timeout = 3", ["limits", "is no setting"]),
        ('hostname = "one.example"', ["hostname"]),
        ("port = ", ["not TOML"]),
        ("hostname = [1]", ["hostname"]),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, toml: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        loaded(toml, tmp=tmp_path)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_file_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(environ={}, file=str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(environ={"SANDRUN_CONFIG": str(tmp_path)})


def test_variables_of_others_are_left_alone() -> None:
    loaded(SANDRUN_URL="http://127.0.0.1:1", SANDRUN_VM_CACHE="/tmp", SANDRUNNER="x", PATH="/usr/bin")


def test_a_range_holds_for_a_config_made_in_code_too() -> None:
    with pytest.raises(ConfigError, match="port"):
        Config(port=-1)
    with pytest.raises(ConfigError, match="allow_missing"):
        Config(allow_missing=("everything",))


def test_cgroup_waives_memory_pids_and_cpu() -> None:
    assert Config(allow_missing=("cgroup", "swap")).waived == {"memory", "pids", "cpu", "swap"}


def test_lists_repeat_or_use_commas() -> None:
    once = loaded(flags={"allow_missing": ["swap,uid", "cpu"]})
    assert once.allow_missing == ("swap", "uid", "cpu")
    assert loaded(SANDRUN_ALLOW_MISSING="swap, uid cpu").allow_missing == ("swap", "uid", "cpu")


@pytest.mark.parametrize(
    ("text", "count"), [("64M", 64 << 20), ("2g", 2 << 30), ("33554432", 32 << 20), ("1GiB", 1 << 30)]
)
def test_sizes_may_carry_a_suffix(text: str, count: int) -> None:
    assert loaded(SANDRUN_STORE_BYTES=text).store_bytes == count


def test_a_shown_value_reads_back_as_itself() -> None:
    config = loaded(SANDRUN_HOSTNAME="a.example,b.example", SANDRUN_STORE_BYTES="100M", SANDRUN_MAX_TIMEOUT="0012.50")
    for row, value, _ in config.rows():
        if value is not None and value != ():
            assert (
                getattr(load(environ={"SANDRUN_CONFIG": "/dev/null", row.variable: display(row, value)}), row.name)
                == value
            )


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loaded(SANDRUN_STATE_DIR="state").state_dir == str(tmp_path / "state")


def test_the_table_has_a_row_for_each_key() -> None:
    text: list[str] = []
    table(text.append)
    lines = "".join(text).splitlines()
    assert len(lines) == len(KEYS) + 2
    assert all(line.count(" | ") == 5 for line in lines if not line.startswith("|-"))


def test_reading_settings_imports_the_standard_library_only() -> None:
    """The privileged process reads them: requirement of the layers, see docs/architecture.md."""
    code = "import sandrun.config, sys; sandrun.config.load(environ={}); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert {name for name in foreign if not name.startswith(("_", "site", "pip"))} <= {"sandrun"}
