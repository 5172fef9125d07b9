"""Environments: built by nobody's uid, copied by root, replaced by one rename, told by a digest."""

from __future__ import annotations

import base64
import csv
import glob
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandrun import environment_builder as builder
from sandrun import environments
from sandrun.cli.main import main
from sandrun.errors import ConfigError, InvalidInput, NotFound
from sandrun.ready import DEFINITIONS
from tests import host, serving


@pytest.fixture(scope="module")
def links() -> Iterator[Path]:
    """A folder of packages that pip's configuration names, and nothing else to install from."""
    with serving.state_directory() as directory, pytest.MonkeyPatch.context() as patch:
        make_wheel(directory)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(directory))
        patch.delenv("PIP_CONSTRAINT", raising=False)
        yield directory


def make_wheel(directory: Path) -> Path:
    """tiny 1.0: one module with a set in it, one command."""
    path = directory / "tiny-1.0-py3-none-any.whl"
    record = "tiny-1.0.dist-info/RECORD"
    files = {
        "tiny.py": "KINDS = 'x'\ndef main():\n    print('x' in {'a', 'b', 'c', 'd'})\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny-command = tiny:main\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(record, "".join(f"{name},,\n" for name in (*files, record)))
    return path


def make_source_package(directory: Path, name: str, script: str) -> None:
    """A package whose build script runs `script` and puts what that stores in `found` into its module `<name>`."""
    build_script = f"""
import json, os, zipfile
found = {{}}
{textwrap.dedent(script)}
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    info = "{name}-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, "{name}-1.0-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("{name}.py", "FOUND = " + repr(json.dumps(found)))
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return "{name}-1.0-py3-none-any.whl"
"""
    with tarfile.open(directory / f"{name}-1.0.tar.gz", "w:gz") as tar:
        source = directory / f"{name}-source"
        source.mkdir()
        (source / "backend.py").write_text(build_script)
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (source / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        tar.add(source, f"{name}-1.0")


def found_by(environment: environments.Environment, name: str) -> dict[str, object]:
    """What the build script of `name` found."""
    (module,) = Path(environment.path).glob(f"lib/python3.*/site-packages/{name}.py")
    names: dict[str, str] = {}
    exec(module.read_text(), names)
    found: dict[str, object] = json.loads(names["FOUND"])
    return found


def scratch_directories() -> list[str]:
    return [name for place in builder.PLACES for name in os.listdir(place) if name.startswith(builder.PREFIX)]


@pytest.fixture
def state() -> Iterator[str]:
    with serving.state_directory() as directory:
        yield str(directory)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds take no time and no pip: the tests that use it are about what happens around one."""

    def fill(order: builder.Order, target: str) -> builder.Built:
        os.mkdir(target)
        Path(target, "content").write_text(repr(order.packages))
        return builder.Built(packages=dict.fromkeys(order.packages, "1"), python="3.11.2")

    monkeypatch.setattr(builder, "fill", fill)


# ---- what is built -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(links: Path) -> Iterator[environments.Environment]:
    with serving.state_directory() as directory:
        yield environments.build("data", ["tiny"], state_dir=str(directory), log=1)


def test_environment_has_the_packages_and_nothing_to_install_more(built: environments.Environment) -> None:
    assert built.packages == {"tiny": "1.0"}
    command = [f"{built.path}/bin/python", "-I", "-c", "import tiny; tiny.main()"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
    state_dir = os.path.dirname(os.path.dirname(built.path))
    assert environments.list_(state_dir) == [built]


def test_environment_is_readable_by_all_and_writable_by_its_owner_alone(built: environments.Environment) -> None:
    for path, kind in [(b"", stat.S_IFDIR), *builder.walk(os.fsencode(built.path))]:
        found = os.lstat(os.path.join(os.fsencode(built.path), path))
        assert found.st_uid == os.geteuid(), path
        if kind != stat.S_IFLNK:
            wanted = {stat.S_IFDIR: (0o755,), stat.S_IFREG: (0o644, 0o755)}[kind]
            assert stat.S_IMODE(found.st_mode) in wanted, path


def test_paths_inside_are_those_that_jobs_see(built: environments.Environment) -> None:
    script = Path(built.path, "bin", "tiny-command").read_text()
    assert script.startswith(f"#!{environments.MOUNT}/data/bin/python")
    (compiled,) = Path(built.path).glob("lib/python3.*/site-packages/__pycache__/tiny.*.pyc")
    assert b"/environments/data/lib/python3." in compiled.read_bytes()
    for path, kind in builder.walk(os.fsencode(built.path)):
        if kind == stat.S_IFREG:
            assert (
                builder.PREFIX.encode()
                not in Path(os.fsdecode(os.path.join(os.fsencode(built.path), path))).read_bytes()
            )
    assert not scratch_directories()


def test_record_of_a_package_holds_for_the_scripts_that_were_changed(built: environments.Environment) -> None:
    (record,) = Path(built.path).glob("lib/python3.*/site-packages/tiny-1.0.dist-info/RECORD")
    rows = {row[0]: row[1:] for row in csv.reader(record.read_text().splitlines())}
    content = (record.parent.parent / "../../../bin/tiny-command").read_bytes()
    hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    assert rows["../../../bin/tiny-command"] == [f"sha256={hashed}", str(len(content))]


def test_same_packages_give_the_same_digest_and_a_changed_file_another(
    built: environments.Environment, state: str
) -> None:
    again = environments.build("data", ["tiny"], state_dir=state, log=1)
    assert again.digest == built.digest == environments.digest(again.path)
    module = next(Path(again.path).glob("lib/python3.*/site-packages/tiny.py"))
    module.write_text(module.read_text() + "\n")
    assert environments.digest(again.path) != again.digest


def test_digest_tells_modes_links_and_names_apart(tmp_path: Path) -> None:
    digests = set()
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("x")
    digests.add(environments.digest(str(tmp_path)))
    file.chmod(0o755)
    digests.add(environments.digest(str(tmp_path)))
    link.symlink_to("x")
    digests.add(environments.digest(str(tmp_path)))
    link.unlink()
    link.symlink_to("y")
    digests.add(environments.digest(str(tmp_path)))
    file.rename(tmp_path / "other")
    digests.add(environments.digest(str(tmp_path)))
    assert len(digests) == 5


# ---- what a build script cannot do -------------------------------------------------------------------------


@pytest.mark.root
def test_build_script_runs_as_nobody_and_gains_nothing_by_set_uid(links: Path, state: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root's alone")
    secret.chmod(0o600)
    assert secret.read_text()
    script = f"""
        found["ids"] = [*os.getresuid(), *os.getresgid(), *os.getgroups()]
        found["status"] = open("/proc/self/status").read()
        for name, attempt in {{
            "read": lambda: open({str(secret)!r}).read(),
            "write": lambda: open({state + "/environments/planted"!r}, "w"),
            "root": lambda: os.setuid(0),
        }}.items():
            try:
                found[name] = repr(attempt())
            except OSError as error:
                found[name] = error.errno
        found["environment"] = dict(os.environ)
    """
    make_source_package(links, "curious", script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "the operator's")
        environment = environments.build("evil", ["curious"], state_dir=state, log=1)
    found = found_by(environment, "curious")
    assert len(set(found["ids"])) == 1  # type: ignore[call-overload]
    assert found["ids"][0] > 1000  # type: ignore[index]
    status = str(found["status"])
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert [found["read"], found["write"], found["root"]] == [13, 13, 1]
    assert "AWS_SECRET_ACCESS_KEY" not in found["environment"]  # type: ignore[operator]
    assert os.lstat(environment.path).st_uid == 0


def test_what_a_build_script_leaves_running_is_ended_before_the_copy(links: Path, state: str) -> None:
    script = """
        import time
        told, tell = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(tell, str(os.getpid()).encode())
                os.closerange(0, 3)  # pip waits for the end of what it reads
                time.sleep(600)
            os._exit(0)
        found["pid"] = int(os.read(told, 20))
    """
    make_source_package(links, "lingering", script)
    environment = environments.build("evil", ["lingering"], state_dir=state, log=1)
    assert not os.path.exists(f"/proc/{found_by(environment, 'lingering')['pid']}")


def test_copy_takes_no_file_of_another_owner(tmp_path: Path) -> None:
    """A hard link to somebody else's file is that file: root's copy would show it to every job."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "linked").write_text("secret")
    with pytest.raises(builder.BuildError, match="linked is not a regular file of the builder's own"):
        builder._copy(str(tmp_path / "venv"), str(tmp_path / "copy"), owner=os.geteuid() + 1, mounted="/environments/x")


def test_copy_takes_no_fifo_follows_no_link_and_drops_set_id_bits(tmp_path: Path) -> None:
    source = tmp_path / "venv"
    source.mkdir()
    (source / "program").write_text("x")
    (source / "program").chmod(0o6777)
    (source / "link").symlink_to("/etc/passwd")
    (source / "folder").symlink_to("/etc")
    builder._copy(str(source), str(tmp_path / "one"), owner=os.geteuid(), mounted="/environments/x")
    assert stat.S_IMODE(os.stat(tmp_path / "one" / "program").st_mode) == 0o755
    assert sorted(os.readlink(tmp_path / "one" / name) for name in ("link", "folder")) == ["/etc", "/etc/passwd"]
    os.mkfifo(source / "fifo")
    with pytest.raises(builder.BuildError, match="fifo is not a regular file"):
        builder._copy(str(source), str(tmp_path / "two"), owner=os.geteuid(), mounted="/environments/x")


# ---- failures ----------------------------------------------------------------------------------------------


def test_failed_build_names_the_step_and_leaves_nothing(
    links: Path, state: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(builder.BuildError, match="pip install failed with 1; its own words stand above"):
        environments.build("data", ["no-such-package"], state_dir=state)
    assert "No matching distribution found for no-such-package" in capfd.readouterr().err
    assert os.listdir(os.path.join(state, "environments")) == []
    assert not scratch_directories()


def test_required_hashes_are_required(links: Path, state: str, tmp_path: Path) -> None:
    right = hashlib.sha256((links / "tiny-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    requirements = tmp_path / "requirements.txt"  # in a directory that the builder cannot enter
    requirements.write_text(f"tiny==1.0 --hash=sha256:{right}\n")
    built = environments.build("data", requirements=str(requirements), require_hashes=True, state_dir=state, log=1)
    assert built.packages == {"tiny": "1.0"}
    requirements.write_text("tiny==1.0\n")
    with pytest.raises(builder.BuildError, match="pip install failed"):
        environments.build("other", requirements=str(requirements), require_hashes=True, state_dir=state, log=1)
    assert [found.name for found in environments.list_(state)] == ["data"]


def test_configuration_of_the_callers_pip_counts(links: Path, state: str, tmp_path: Path) -> None:
    """Its files may be where the builder cannot look."""
    settings = f"[global]\nno-index = true\nfind-links = {links}\n"
    home = tmp_path / "home"
    (home / ".config" / "pip").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PIP_NO_INDEX")
        patch.delenv("PIP_FIND_LINKS")
        patch.setenv("HOME", str(home))
        patch.delenv("XDG_CONFIG_HOME", raising=False)
        (home / ".config" / "pip" / "pip.conf").write_text(settings)
        assert environments.build("one", ["tiny"], state_dir=state, log=1).packages == {"tiny": "1.0"}
        (home / ".config" / "pip" / "pip.conf").rename(home / "named.conf")
        patch.setenv("PIP_CONFIG_FILE", str(home / "named.conf"))
        patch.setenv("PIP_TARGET", str(tmp_path))
        assert environments.build("two", ["tiny"], state_dir=state, log=1).packages == {"tiny": "1.0"}


def test_killed_build_leaves_no_process_and_the_next_one_clears_up(links: Path, state: str) -> None:
    script = """
        import time
        open(os.environ["HOME"] + "/reached", "w").close()
        time.sleep(600)
    """
    make_source_package(links, "slow", script)
    code = f"from sandrun import environments as e; e.build('data', ['slow'], state_dir={state!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        reached = [f"{place}/{builder.PREFIX}*/child/home/reached" for place in builder.PLACES]
        assert serving.wait_until(lambda: any(map(glob.glob, reached)), 30)
        below = host.descendants(process.pid)
        assert len(below) >= 3  # the builder, pip, the build script
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert serving.wait_until(lambda: not [p for p in below if p.alive], 5), [p.title for p in below if p.alive]
    assert scratch_directories()
    environments.build("data", ["tiny"], state_dir=state, log=1)
    assert not scratch_directories()
    assert os.listdir(os.path.join(state, "environments")) == ["data"]


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("", {}, "name"),
        ("../data", {}, "name"),
        ("a/b", {}, "name"),
        (".hidden", {}, "name"),
        ("-x", {}, "name"),
        ("a.tmp-1", {}, "name"),
        ("x" * 65, {}, "name"),
        ("data\n", {}, "name"),
        ("own", {"packages": []}, "packages"),
        ("own", {"preload": ["-c"]}, "preload"),
        ("own", {"preload": ["numpy."]}, "preload"),
        ("own", {"preload": ["numpy;x"]}, "preload"),
        ("own", {"preload": ["sandrun.spawner"]}, "preload"),
        ("own", {"preload": [f"m{n}" for n in range(101)]}, "preload"),
        ("data", {"packages": ["--target=/"]}, "packages"),
        ("data", {"packages": ["tiny\n--pre"]}, "packages"),
        ("data", {"require_hashes": True}, "require_hashes"),
        ("data", {"requirements": "/nowhere.txt"}, "requirements"),
        ("data", {"requirements": "/dev/null/x"}, "requirements"),
    ],
)
def test_bad_arguments_are_refused_by_name(name: str, arguments: dict[str, object], field: str, state: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        environments.build(name, **{"packages": ["tiny"], "state_dir": state, **arguments})  # type: ignore[arg-type]
    assert refused.value.field == field
    assert os.listdir(state) == []


@pytest.mark.parametrize("line", ["-r other.txt", "--requirement=other.txt", "  -c limits.txt", "--constraint limits"])
def test_requirements_file_that_names_another_is_refused(line: str, state: str, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"tiny\n{line}\n")
    with pytest.raises(InvalidInput, match=r"a file that names another"):
        environments.build("data", requirements=str(requirements), state_dir=state)


# ---- preloaded modules -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", DEFINITIONS)
def test_ready_definition_needs_no_more_than_its_name(name: str, state: str) -> None:
    packages, preload = DEFINITIONS[name]
    built = environments.build(name, state_dir=state)
    assert (tuple(built.packages), built.preload) == (packages, preload)
    assert environments.list_(state) == [built]
    only = environments.build(name, preload=["numpy"], state_dir=state)
    assert (tuple(only.packages), only.preload) == (packages, ("numpy",))
    own = environments.build(name, ["numpy"], state_dir=state)
    assert (tuple(own.packages), own.preload) == (("numpy",), ())


@pytest.mark.usefixtures("quick")
def test_modules_are_kept_in_their_order_and_once(state: str) -> None:
    built = environments.build("own", ["x"], preload=["b.c", "a", "b.c", "_d1"], state_dir=state)
    assert built.preload == ("b.c", "a", "_d1")


@pytest.mark.usefixtures("quick")
def test_description_of_an_older_version_preloads_nothing(state: str) -> None:
    path = Path(environments.build("own", ["x"], preload=["a"], state_dir=state).path, environments.DESCRIPTION)
    value = json.loads(path.read_text())
    del value["preload"], value["libraries"]
    path.write_text(json.dumps(value))
    assert environments.list_(state)[0].preload == environments.list_(state)[0].libraries == ()
    path.write_text(json.dumps({**value, "preload": ["os; print()"]}))
    with pytest.raises(ConfigError, match=r"environment.json cannot be read .*os; print"):
        environments.list_(state)


def test_module_to_preload_must_be_importable(links: Path, state: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(builder.BuildError, match="import of a module to preload failed with 1"):
        environments.build("own", ["tiny"], preload=["tiny", "tiny.not_there"], state_dir=state)
    assert "No module named 'tiny.not_there'" in capfd.readouterr().err
    assert os.listdir(os.path.join(state, "environments")) == []


def test_shared_objects_of_preloaded_modules_are_noted(links: Path, state: str) -> None:
    """As paths inside: a zygote maps them before all else."""
    built = environments.build("own", ["tiny"], preload=["tiny", "_ctypes"], state_dir=state, log=1)
    assert any(path.startswith("/usr/lib/") and "_ctypes." in path for path in built.libraries), built.libraries
    assert not any(builder.PREFIX in path for path in built.libraries)


def test_command_line_names_modules_to_preload(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    asked: list[tuple[str, list[str], object]] = []

    def build(name: str, packages: list[str], **more: object) -> environments.Environment:
        asked.append((name, packages, more["preload"]))
        raise InvalidInput("name", "enough")

    monkeypatch.setattr(environments, "build", build)
    for words in ("data", "own x y --preload a b.c", "own --preload a --requirements f", "data --preload"):
        assert main(["environment", "build", "--state-dir", state, *words.split()]) == 1
    assert asked == [
        ("data", [], None),
        ("own", ["x", "y"], ["a", "b.c"]),
        ("own", [], ["a"]),
        ("data", [], []),
    ]


# ---- directories -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_build_replaces_and_remove_removes(state: str) -> None:
    first = environments.build("data", ["one"], state_dir=state)
    second = environments.build("data", ["two"], state_dir=state)
    assert first.digest != second.digest
    assert environments.list_(state) == [second]
    assert os.listdir(os.path.join(state, "environments")) == ["data"]
    environments.remove("data", state)
    assert environments.list_(state) == []
    assert os.listdir(os.path.join(state, "environments")) == []
    with pytest.raises(NotFound, match="there is no environment data"):
        environments.remove("data", state)


@pytest.mark.usefixtures("quick")
def test_files_that_a_server_holds_stay_until_it_lets_go(state: str) -> None:
    base = os.path.join(state, "environments")
    held = environments.hold(environments.build("data", ["one"], state_dir=state))
    try:
        environments.build("data", ["two"], state_dir=state)
        environments.remove("data", state)
        environments.build("other", ["three"], state_dir=state)
        assert [found.name for found in environments.list_(state)] == ["other"]
        assert os.open("content", os.O_RDONLY, dir_fd=held) > 0
        assert len(os.listdir(base)) == 2
    finally:
        os.close(held)
    environments.build("other", ["four"], state_dir=state)
    assert os.listdir(base) == ["other"]


def test_no_environments_before_the_first_is_built(state: str) -> None:
    assert environments.list_(state) == []
    assert os.listdir(state) == []


@pytest.mark.usefixtures("quick")
def test_directories_that_others_can_write_are_refused_with_the_fix(state: str) -> None:
    built = environments.build("data", ["one"], state_dir=state)
    for path, call in (
        (built.path, lambda: environments.list_(state)),
        (os.path.join(state, "environments"), lambda: environments.list_(state)),
        (state, lambda: environments.build("other", ["one"], state_dir=state)),
    ):
        os.chmod(path, 0o775)
        with pytest.raises(
            ConfigError, match=f"{path} .*could be changed by others; fix: chown .* && chmod 755 {path}"
        ):
            call()
        os.chmod(path, 0o755)


@pytest.mark.usefixtures("quick")
def test_broken_description_is_named_with_the_fix(state: str) -> None:
    built = environments.build("data", ["one"], state_dir=state)
    for content in ("", "[]", "{}", '{"packages": 1, "digest": "", "python": "", "created": ""}'):
        Path(built.path, environments.DESCRIPTION).write_text(content)
        with pytest.raises(ConfigError, match="build it again: sandrun environment remove data"):
            environments.list_(state)


def test_python_for_environments_is_the_systems() -> None:
    path = environments.find_python()
    assert path.startswith("/usr/bin/python3")
    command = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    assert subprocess.run(command, check=False).returncode == 0
