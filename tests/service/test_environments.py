"""Environments whose zygotes have modules loaded: a job finds them, and all else as its own interpreter would have it.

One server with the ready `data`, and with copies of a small one, `odd`, each of which has a module that goes wrong in a
zygote in a way of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sandrun import environments
from tests import packages, serving
from tests.escape.probing import FRESH, IN_PLACE, Inside, Kind, succeeded
from tests.serving import Api

pytestmark = pytest.mark.requirement(36)

KINDS = (IN_PLACE, FRESH)

GOOD = """
import ctypes, os, random, sys, tempfile, threading
if os.getpid() == 1:
    print("x" * 200_000)
    print("y" * 200_000, file=sys.stderr)
    ctypes.CDLL(None).puts(b"printed by C")
SETTING = os.environ.get("ODD_SETTING", "none")
WHERE = (os.getcwd(), os.environ["HOME"], tempfile.gettempdir(), sys.argv, os.environ.get("PYTHONPATH"))
MINE = random.Random()
folder = os.path.join(os.environ.get("XDG_CACHE_HOME", "."), "odd")
os.makedirs(folder, exist_ok=True)
if not os.path.exists(folder + "/found"):
    with open(folder + "/found", "w") as file:
        file.write("costly")
with tempfile.NamedTemporaryFile("w", dir="/dev/shm", prefix="odd", delete=os.getpid() != 1) as file:
    file.write("of no job's business")
os.umask(0o77)
thread = threading.Thread(target=threading.Event().wait, args=(0.3,))
thread.start()
"""
ODD = {
    "good": ("", ""),
    "thread": ("import threading; threading.Thread(target=threading.Event().wait).start()", "1 threads are left"),
    "child": ("import subprocess; subprocess.Popen(['sleep', '100'])", "a process is left"),
    "file": ("kept = open('/etc/localtime')", r"open files are left: \['/etc/localtime'\]"),
    "missing": ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
    "raises": ("raise ValueError('why')", "ValueError: why"),
    "exits": ("raise SystemExit('enough')", "SystemExit: enough"),
    "dies": ("import os; os._exit(9)", "zygote: it died with status"),
}
"""What modules do in a zygote, which is PID 1, and what is told of that. Nothing goes wrong where they are built."""


def make_package(folder: Path) -> Path:
    files = {
        f"odd_{name}.py": f"import os\nif os.getpid() == 1:\n    {code}\n" for name, (code, _) in ODD.items() if code
    }
    files |= {
        "odd_good.py": GOOD,
        "odd-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n",
        "odd-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / "odd-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr("odd-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Server]:
    with packages.state_directory("data") as data, serving.state_directory() as folder:
        wheel = make_package(folder)
        built = Path(environments.build("good", [str(wheel)], preload=["odd_good"], state_dir=str(folder), log=1).path)
        for name in ODD:
            if name != "good":
                shutil.copytree(built, built.with_name(name), symlinks=True)
                description = json.loads((built / "environment.json").read_text())
                changed = {**description, "preload": ["json", f"odd_{name}"], "libraries": ["/not/there.so"]}
                (built.with_name(name) / "environment.json").write_text(json.dumps(changed))
        shutil.copytree(Path(data) / "environments/data", built.with_name("data"), symlinks=True)
        with serving.running("--state-dir", str(folder)) as server:
            yield server


@pytest.fixture(scope="module")
def api(server: serving.Server) -> Iterator[Api]:
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        yield Api(http)


@pytest.fixture(scope="module")
def told(api: Api) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in api.http.get("/environments").json()["environments"]}


def says(api: Api, code: str, kind: Kind = IN_PLACE, environment: str = "data", **request: Any) -> Any:
    """What a program prints, which is JSON."""
    fresh = bool(kind.manifest.get("fresh_interpreter"))
    result = api.run(code, environment=environment, fresh_interpreter=fresh, **request)
    assert succeeded(result)["stderr"] == ""
    return json.loads(result["stdout"])


# ---- what is told ------------------------------------------------------------------------------------------


def test_ready_definition_is_told_with_all_that_jobs_find(told: dict[str, dict[str, Any]]) -> None:
    data = told["data"]
    assert data["available"]
    assert data["in_place"]
    assert {"numpy", "pandas", "matplotlib"} <= data["packages"].keys()
    assert {"numpy", "numpy.random", "pandas", "matplotlib.pyplot"} <= set(data["preload"]) <= set(data["modules"])
    assert re.fullmatch(r"[0-9a-f]{64}", data["digest"])
    assert re.fullmatch(r"3\.\d+\.\d+", data["python"])


LOADED = "import sys\nbefore = set(sys.modules)\nimport json\nprint(json.dumps(sorted(before)))"


@pytest.mark.parametrize("name", ["data", "good"])
def test_job_finds_loaded_what_is_told_and_nothing_else(name: str, told: dict[str, dict[str, Any]], api: Api) -> None:
    loaded = set(says(api, LOADED, environment=name))
    assert loaded - {"__main__", "sitecustomize"} == set(told[name]["modules"])
    assert not set(told[name]["preload"]) & set(says(api, LOADED, FRESH, name))


@pytest.mark.parametrize("name", [name for name in ODD if name != "good"])
def test_module_that_goes_wrong_withdraws_its_environment_with_the_reason(
    name: str, told: dict[str, dict[str, Any]], api: Api
) -> None:
    one = told[name]
    assert not one["available"]
    assert re.search(ODD[name][1], one["reason"])
    if name != "dies":
        assert one["reason"].startswith("preload")
    if name in ("missing", "raises", "exits", "thread"):
        assert one["reason"].startswith(f"preload odd_{name}: ")
    refused = api.http.post("/run", json={"code": "print(1)", "environment": name})
    assert refused.status_code == 400
    assert refused.json()["field"] == "environment"
    assert one["reason"] in refused.json()["details"]


def test_others_are_not_affected(told: dict[str, dict[str, Any]], api: Api) -> None:
    assert {name for name, one in told.items() if one["available"]} == {"data", "good"}
    assert succeeded(api.run("print(1)", environment="good"))["stdout"] == "1\n"
    assert succeeded(api.run("print(1)"))["stdout"] == "1\n"


# ---- what a preloaded module leaves to jobs ----------------------------------------------------------------


def test_module_was_loaded_as_in_a_job_and_what_it_printed_is_nobodys(api: Api) -> None:
    code = "import json, odd_good, os, threading; m = os.umask(0o22); print(json.dumps([odd_good.WHERE, m, "
    code += "len(threading.enumerate()), os.listdir('/dev/shm'), os.listdir('/job')]))"
    where, umask, threads, shared, files = says(api, code, environment="good")
    assert where == ["/job", "/job", "/tmp", [""], None]
    assert (umask, threads, shared, files) == (0o22, 1, [], ["main.py"])


def test_variable_that_a_module_looked_for_is_there_when_it_looks(api: Api) -> None:
    code = "import json, odd_good, sys; print(json.dumps(odd_good.SETTING), file=sys.__stderr__)"
    for given, wanted in (({}, '"none"'), ({"ODD_SETTING": "mine"}, '"mine"'), ({"OTHER": "x"}, '"none"')):
        assert api.run(code, environment="good", env=given)["stderr"].splitlines()[-1] == wanted


CACHE = """
import errno, json, os, sys
path = "/tmp/.cache/odd/found"
said = [open(path).read(), os.path.islink(path)]
for attempt in (lambda: open(path, "w"), lambda: os.chmod(path, 0o777), lambda: os.unlink(os.path.realpath(path))):
    try:
        attempt()
        said.append("ok")
    except OSError as error:
        said.append(errno.errorcode[error.errno])
os.unlink(path)
os.rmdir("/tmp/.cache/odd")
print(json.dumps(said))
"""


@pytest.mark.requirement(9, 15)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_cache_of_a_module_is_there_and_cannot_be_changed_for_others(kind: Kind, api: Api) -> None:
    for _ in range(2):
        assert says(api, CACHE, kind, "good") == ["costly", True, "EROFS", "EROFS", "EROFS"]


SHADOWS = "import json, odd_good, calendar; print(json.dumps([odd_good.__file__, calendar.__file__]))"


def test_own_modules_come_before_loaded_ones(api: Api) -> None:
    """As beside any script: what is loaded already must not hide a file of the job's."""
    files = {"odd_good.py": "", "data/calendar.py": "", "random.txt": "", "odd_good.csv": ""}
    paths = says(api, SHADOWS, environment="good", files=files)
    assert paths[0] == "/job/odd_good.py"
    assert paths[1].startswith("/usr/lib/python3")
    assert says(api, SHADOWS, environment="good", files={"x.py": ""})[0].startswith("/environments/good/")
    assert (
        says(
            api,
            "import json\nprint(json.__file__.__repr__().replace(chr(39), chr(34)))",
            files={"json.py": "def dumps(x): return '0'\n"},
        )
        == "/job/json.py"
    )


# ---- random numbers ----------------------------------------------------------------------------------------

DRAWS = """
import json, os, random, secrets, sys, tempfile, uuid
drawn = {
    "random": random.random(), "of its own": random.Random().random(), "urandom": os.urandom(8).hex(),
    "secrets": secrets.token_hex(8), "uuid4": str(uuid.uuid4()), "tempfile": os.path.basename(tempfile.mktemp()),
}
if sys.argv[1] == "data":
    import multiprocessing, ssl
    import numpy as np
    import pandas as pd
    drawn |= {
        "numpy.random": np.random.random(), "normal": np.random.normal(), "bytes": np.random.bytes(8).hex(),
        "default_rng": np.random.default_rng().random(), "RandomState": np.random.RandomState().random(),
        "state": str(np.random.get_state()[1][:9]), "sample": str(list(pd.Series(range(999)).sample(5))),
        "authkey": bytes(multiprocessing.current_process().authkey).hex(), "ssl": ssl.RAND_bytes(8).hex(),
    }
else:
    import odd_good
    drawn["a module's"] = odd_good.MINE.random()
print(json.dumps(drawn), file=sys.__stderr__)
"""


@pytest.mark.requirement(15)
@pytest.mark.parametrize("name", ["data", "good"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_jobs_in_a_row_draw_other_random_numbers(kind: Kind, name: str, api: Api) -> None:
    fresh = bool(kind.manifest.get("fresh_interpreter"))
    jobs = [api.run(DRAWS, environment=name, args=[name], fresh_interpreter=fresh) for _ in range(3)]
    drawn = [json.loads(succeeded(job)["stderr"].splitlines()[-1]) for job in jobs]
    for what in drawn[0]:
        assert len({one[what] for one in drawn}) == 3, what


SEEDED = "import json, random, numpy as np; random.seed(7); np.random.seed(7); r = np.random.default_rng(7); "
SEEDED += "print(json.dumps([random.random(), np.random.random(), r.random()]))"


def test_seed_of_the_jobs_own_holds(api: Api) -> None:
    assert says(api, SEEDED) == says(api, SEEDED) == says(api, SEEDED, FRESH)


# ---- programs with numpy, pandas and matplotlib ------------------------------------------------------------

PROGRAMS = {
    "numpy": "import numpy as np\nprint(np.arange(12).reshape(3, 4) @ np.ones((4, 2)), np.linalg.inv(np.eye(2)))\n",
    "lazy": "import numpy as np\nprint(np.fft.fft([1, 2]), np.polynomial.Polynomial([1, 2])(3), np.ma.array([1]))\n",
    "not a number": "import numpy as np\nprint(np.array([1.0, 0.0]) / 0)\n",
    "raises": "import numpy as np\nnp.linalg.inv(np.zeros((2, 2)))\n",
    "exits": "import sys, numpy as np\nprint(np.e)\nsys.exit(3)\n",
    "leaves at once": "import os, numpy as np\nprint(np.e, flush=True)\nos._exit(4)\n",
    "pandas": "import pandas as pd\nd = pd.DataFrame({'a': [1, 2, 2], 'b': list('xyz')})\n"
    "print(d, d.describe(), d.groupby('a').b.count(), sep='\\n')\nd.to_csv('d.csv')\nprint(pd.read_csv('d.csv'))\n",
    "file left open": "import pandas as pd\nf = open('d.csv', 'w')\npd.DataFrame({'a': range(9)}).to_csv(f)\n",
    "memory map": "import numpy as np\nm = np.memmap('m.bin', 'i4', 'w+', shape=9)\nm[:] = 7\nprint(m.sum())\n",
    "numpy files": "import numpy as np\nnp.save('a.npy', np.ones(3))\nnp.savez_compressed('a.npz', x=np.eye(2))\n"
    "print(np.load('a.npy'), np.load('a.npz')['x'])\n",
    "drawing": "import matplotlib.pyplot as plt\nf, a = plt.subplots()\na.plot([1, 2, 4], label='$x^2$')\na.legend()\n"
    "f.savefig('d.png')\nplt.close(f)\nprint(plt.get_backend())\n",
    "drawing left open": "import matplotlib.pyplot as plt\nfor n in range(3):\n    plt.figure()\n    plt.plot([n])\n"
    "plt.savefig('d.png')\n",
    "svg and pdf": "import matplotlib\nmatplotlib.rcParams['svg.hashsalt'] = 'x'\nimport matplotlib.pyplot as plt\n"
    "plt.bar([1], [2])\nplt.savefig('d.svg', metadata={'Date': None})\n"
    "plt.savefig('d.pdf', metadata={'CreationDate': None})\n",
    "own settings": "import matplotlib\nprint(matplotlib.rcParams['lines.linewidth'], matplotlib.matplotlib_fname())\n",
    "show": "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()\n",
    "atexit": "import atexit, numpy as np, matplotlib.pyplot as plt\n"
    "@atexit.register\ndef last():\n    plt.plot(np.ones(3))\n    plt.savefig('d.png')\n    print('last')\n",
    "workers": "import multiprocessing as mp, numpy as np\ndef f(n): return float(np.ones(n).sum())\n"
    "if __name__ == '__main__':\n    with mp.Pool(2) as p: print(p.map(f, [1, 2, 3]))\n",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nimport numpy as np\n"
    "f = lambda n: (np.ones((n, n)) @ np.ones((n, n))).sum()\n"
    "with ThreadPoolExecutor(2) as p: print(list(p.map(f, [2, 99])))\n",
    "subprocess": "import subprocess, sys\nr = subprocess.run([sys.executable, '-c', 'import numpy; exit(5)'])\n"
    "sys.exit(r.returncode)\n",
    "seen": "import sys, os, numpy\nprint(sys.prefix, sys.base_prefix, sys.executable, sys.path)\n"
    "print(sys.argv, sys.orig_argv)\nprint(sorted(os.environ), os.getcwd(), sorted(os.listdir()), numpy.__file__)\n",
    "one thread": "import os, numpy, pandas\nprint([v for v in os.environ if 'THREADS' in v or 'MPL' in v], "
    "open('/proc/self/environ').read().count('THREADS'))\n",
    "interrupted": "import os, signal, numpy\nprint(1, flush=True)\nos.kill(os.getpid(), signal.SIGTERM)\n",
    "unhandled in a thread": "import threading, numpy\nt = threading.Thread(target=lambda: numpy.ones(2)[5])\n"
    "t.start(); t.join()\n",
}
MORE: dict[str, dict[str, str]] = {"own settings": {"matplotlibrc": "lines.linewidth: 7\n"}}


def readable(text: str) -> str:
    return re.sub(r"(?<=0x)[0-9a-f]{6,}|Thread-\d+|\d{9,}", "…", text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_does_in_place_what_it_does_in_an_interpreter_of_its_own(name: str, api: Api) -> None:
    ran = []
    for kind in KINDS:
        job = Inside(kind, api).run(PROGRAMS[name], files=MORE.get(name, {}), environment="data", timeout=60)
        assert job["limits_hit"] == []
        files = {file["path"]: file["sha256"] for file in job["output_files"]}
        assert job["outputs_omitted"] == 0
        ran.append((job["outcome"], job["exit_code"], job["signal"], job["stdout"], readable(job["stderr"]), files))
    assert ran[0] == ran[1]


def test_picture_is_whole(api: Api) -> None:
    job_id = api.submit({"main.py": PROGRAMS["drawing left open"]}, entrypoint="main.py", environment="data")
    assert succeeded(api.wait(job_id))["output_files"][0]["path"] == "d.png"
    picture = api.download(job_id, "d.png")
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture[-8:-4] == b"IEND"
    assert struct.unpack(">II", picture[16:24]) == (640, 480)


FONTS = """
import json, os
folder = "/tmp/.cache/matplotlib"
before = sorted(os.listdir(folder))
import matplotlib.font_manager
print(json.dumps([before == sorted(os.listdir(folder)), all(os.path.islink(f"{folder}/{name}") for name in before),
    [name for name in before if name.startswith("fontlist")] != [], os.path.isdir(matplotlib.get_configdir())]))
"""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_job_looks_for_fonts_again(kind: Kind, api: Api) -> None:
    assert says(api, FONTS, kind) == [True, True, True, True]


def test_nothing_of_these_jobs_is_left(server: serving.Server, api: Api) -> None:
    assert server.idle(5)
    assert server.process.poll() is None


def test_numpy_costs_no_start(api: Api) -> None:
    """Where it is loaded, importing it is to look it up: some microseconds, and tens of milliseconds else."""
    code = (
        "import time; t = time.perf_counter()\nimport numpy, pandas, matplotlib.pyplot\nprint(time.perf_counter() - t)"
    )
    seconds = [says(api, code, kind) for kind in KINDS]
    assert seconds[0] * 10 < seconds[1]


THREADS = """
import json, numpy, os
numpy.ones((99, 99)) @ numpy.ones((99, 99))
print(json.dumps(len(os.listdir("/proc/self/task"))))
"""


def test_job_that_asks_for_threads_has_them(api: Api) -> None:
    """Where numpy is loaded it has one thread: a process with more could not be forked."""
    assert says(api, THREADS) == 1
    cores = len(os.sched_getaffinity(0))  # libraries don't start more than there are
    assert says(api, THREADS, env={"OPENBLAS_NUM_THREADS": "2"}) == min(2, cores)


def test_description_lists_what_was_built(server: serving.Server) -> None:
    with packages.state_directory("data") as state:
        (data,) = [one for one in environments.list_(state) if one.name == "data"]
    assert "numpy.random" in data.preload
    inside = [path for path in data.libraries if path.startswith("/environments/data/lib/")]
    assert len(inside) > 20
    for path in inside:
        assert os.path.exists(path.replace("/environments/data", data.path))
