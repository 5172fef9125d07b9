"""An environment that is built again while a server runs: jobs that begin after that find the new one."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sandrun import environment_builder as builder
from sandrun import environments
from tests import serving
from tests.escape.probing import FRESH, IN_PLACE, Kind, succeeded
from tests.serving import Api, Server

SECONDS = 20.0
IN_ZYGOTE = "import os\nif os.getpid() == 1: "
LATE = "import sys, time; print(sys.modules['changing'].VERSION, flush=True); time.sleep(%s); import changing_late; "
LATE += "print(changing_late.VERSION)"

no_good = pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ValueError('not in a zygote')", "preload changing: ValueError: not in a zygote"),
        ("import builtins; builtins.print = lambda *text, **more: None", "self-test: exited, exit code 0"),
    ],
    ids=["loads", "works"],
)
"""What a module may do in a zygote, and what is then told."""


def build(folder: Path, version: int, more: str = "", called: str = "changing") -> environments.Environment:
    path = folder / f"changing-{version}-py3-none-any.whl"
    files = {
        "changing.py": f"VERSION = {version}\n{more}\n",
        "changing_late.py": f"VERSION = {version}\n",
        f"changing-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: changing\nVersion: {version}\n",
        f"changing-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"changing-{version}.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return environments.build(called, [str(path)], preload=["changing"], state_dir=str(folder), log=1)


@pytest.fixture
def folder() -> Iterator[Path]:
    with serving.state_directory() as made:
        yield made


@pytest.fixture(scope="module")
def first() -> Iterator[Path]:
    """Where the first build that asked for it was copied to."""
    with serving.state_directory() as made:
        yield made / "first"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, first: Path) -> None:
    """pip runs for the first build alone: each other is a copy of that, with its own code."""
    by_pip = builder.fill

    def fill(order: builder.Order, target: str) -> builder.Built:
        if not first.exists():
            made = by_pip(order, target)
            shutil.copytree(target, first, symlinks=True)
            return made
        shutil.copytree(first, target, symlinks=True)
        (packages,) = Path(target).glob("lib/python3*/site-packages")
        with zipfile.ZipFile(order.packages[0]) as wheel:
            for name in ("changing", "changing_late"):
                wheel.extract(f"{name}.py", packages)
                next(packages.glob(f"__pycache__/{name}.*")).unlink()
        return builder.Built(packages={"changing": order.packages[0].split("-")[1]}, python=platform.python_version())

    monkeypatch.setattr(builder, "fill", fill)


def offered(api: Api) -> dict[str, Any]:
    listed = api.http.get("/environments").json()["environments"]
    found: dict[str, Any] = next(one for one in listed if one["name"] == "changing")
    return found


def names(api: Api) -> list[str]:
    """What is offered; nothing while there is no spawner."""
    answer = api.http.get("/environments")
    return [one["name"] for one in answer.json()["environments"]] if answer.status_code == 200 else []


def says(api: Api, kind: Kind) -> str:
    fresh = bool(kind.manifest.get("fresh_interpreter"))
    result = api.run("import changing; print(changing.VERSION)", environment="changing", fresh_interpreter=fresh)
    return str(succeeded(result)["stdout"]).strip()


def replace_zygote(server: Server) -> None:
    def zygotes() -> set[int]:
        return {p.pid for p in server.descendants() if p.title == "sandrun: zygote changing"}

    (old,) = zygotes()
    os.kill(old, signal.SIGKILL)
    assert serving.wait_until(lambda: zygotes() - {old}, SECONDS), server.tail()


@pytest.mark.requirement(36)
def test_rebuilt_environment_is_found_by_jobs_that_begin_later(
    folder: Path, start_server: Callable[..., Server]
) -> None:
    """And by no job that had begun: it imports from the old files to its end, also when its zygote is replaced."""
    first = build(folder, 1)
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        assert offered(api)["digest"] == first.digest
        before = api.submit({"main.py": LATE % 4}, entrypoint="main.py", environment="changing")
        assert serving.wait_until(lambda: api.logs(before) == "1\n", SECONDS)
        second = build(folder, 2)
        assert serving.wait_until(lambda: offered(api)["digest"] == second.digest, SECONDS), server.tail()
        assert offered(api)["packages"]["changing"] == "2"
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["2", "2"]
        succeeded(api.wait(before))
        assert api.logs(before) == "1\n1\n"


@no_good
@pytest.mark.usefixtures("copied")
def test_rebuilt_environment_that_is_no_good_leaves_the_old_one_to_its_jobs(
    code: str, told: str, folder: Path, start_server: Callable[..., Server]
) -> None:
    """Also when that one's zygote dies, and though the name is another's by then."""
    first = build(folder, 1)
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        build(folder, 2, IN_ZYGOTE + code)
        assert serving.wait_until(lambda: f"zygote changing could not be renewed: {told}" in server.tail(), SECONDS)
        assert "the old one goes on" in server.tail()
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["1", "1"]
        assert offered(api)["digest"] == first.digest
        replace_zygote(server)
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["1", "1"]


@pytest.mark.usefixtures("copied")
def test_environment_that_was_no_good_is_offered_when_it_is_built_again(
    folder: Path, start_server: Callable[..., Server]
) -> None:
    build(folder, 1, IN_ZYGOTE + "raise ValueError('not in a zygote')")
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        assert "not in a zygote" in offered(api)["reason"]
        second = build(folder, 2)
        assert serving.wait_until(lambda: offered(api)["available"], SECONDS), server.tail()
        assert offered(api)["digest"] == second.digest
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["2", "2"]


@pytest.mark.usefixtures("copied")
def test_removed_environment_stays_until_the_server_ends(folder: Path, start_server: Callable[..., Server]) -> None:
    build(folder, 1)
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        environments.remove("changing", str(folder))
        replace_zygote(server)
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["1", "1"]
        assert offered(api)["available"]


@pytest.mark.requirement(34)
@pytest.mark.usefixtures("copied")
def test_next_spawner_offers_the_environments_that_are_there(folder: Path, start_server: Callable[..., Server]) -> None:
    """Not one that was removed, whose files the last one held and it cannot."""
    build(folder, 1)
    build(folder, 1, called="removed")
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        assert names(api) == ["changing", "removed"]
        environments.remove("removed", str(folder))
        os.kill(server.part("spawner").pid, signal.SIGKILL)
        assert serving.wait_until(lambda: names(api) == ["changing"], SECONDS), server.tail()
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["1", "1"]


@pytest.mark.usefixtures("copied")
def test_new_environment_is_offered_when_it_is_built(folder: Path, start_server: Callable[..., Server]) -> None:
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        assert names(api) == []
        first = build(folder, 1)
        assert serving.wait_until(lambda: names(api) == ["changing"], SECONDS), server.tail()
        assert offered(api)["digest"] == first.digest
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["1", "1"]
        build(folder, 2)
        assert serving.wait_until(lambda: says(api, IN_PLACE) == "2", SECONDS), server.tail()
        replace_zygote(server)
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["2", "2"]


@no_good
@pytest.mark.usefixtures("copied")
def test_new_environment_that_is_no_good_is_told_with_the_reason(
    code: str, told: str, folder: Path, start_server: Callable[..., Server]
) -> None:
    """Until it is built well."""
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        build(folder, 1, IN_ZYGOTE + code)
        assert serving.wait_until(lambda: names(api) == ["changing"], SECONDS), server.tail()
        assert (offered(api)["available"], told in offered(api)["reason"]) == (False, True)
        refused = http.post("/run", json={"code": "print(1)", "environment": "changing"})
        assert (refused.status_code, refused.json()["field"]) == (400, "environment")
        assert api.run("print(1)")["stdout"] == "1\n"
        build(folder, 2)
        assert serving.wait_until(lambda: offered(api)["available"], SECONDS), server.tail()
        assert [says(api, kind) for kind in (IN_PLACE, FRESH)] == ["2", "2"]


@pytest.mark.root
@pytest.mark.usefixtures("copied")
def test_new_environment_that_others_could_change_is_not_offered(
    folder: Path, start_server: Callable[..., Server]
) -> None:
    """Nor does it keep others from being offered. The log tells the fix once, and it is offered when that is done."""
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        made = build(folder, 1, called="elsewhere")
        os.chmod(made.path, 0o777)
        os.rename(made.path, folder / "environments/changing")
        build(folder, 1, called="later")
        assert serving.wait_until(lambda: "later" in names(api), SECONDS), server.tail()
        time.sleep(2.5)
        assert "changing" not in names(api)
        assert server.tail().count("environment changing cannot be taken up") == 1
        assert "fix: chown 0" in server.tail()
        os.chmod(folder / "environments/changing", 0o755)
        assert serving.wait_until(lambda: "changing" in names(api), SECONDS), server.tail()


def test_environments_that_cannot_be_listed_end_nothing(folder: Path, start_server: Callable[..., Server]) -> None:
    """They are found when they can be."""
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        spawner = server.part("spawner").pid
        (folder / "environments").touch()
        told = f"environments cannot be listed: {folder}/environments is not a directory"
        assert serving.wait_until(lambda: told in server.tail(), SECONDS), server.tail()
        time.sleep(2.5)
        assert server.part("spawner").pid == spawner
        assert server.tail().count(told) == 1
        assert api.run("print(1)")["stdout"] == "1\n"


@pytest.mark.usefixtures("copied")
def test_environment_that_is_too_much_to_tell_is_left_out(folder: Path, start_server: Callable[..., Server]) -> None:
    """The others go on: clients hear of all in one message, and it has a bound."""
    build(folder, 1)
    server = start_server("--state-dir", str(folder))
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        api = Api(http)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        made = build(elsewhere, 1)
        described = Path(made.path, environments.DESCRIPTION)
        value = json.loads(described.read_text())
        value["packages"] = {os.urandom(16).hex(): "1" for _ in range(20_000)}
        described.write_text(json.dumps(value))
        os.rename(made.path, folder / "environments/large")
        told = "environment large is left out: they have more packages and modules than clients can be told of"
        assert serving.wait_until(lambda: told in server.tail(), SECONDS), server.tail()
        assert serving.wait_until(lambda: not [p for p in server.descendants() if "zygote large" in p.title], SECONDS)
        assert names(api) == ["changing"]
        assert says(api, IN_PLACE) == "1"
