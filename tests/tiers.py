"""Runs the tests in tiers, each in the surroundings that it is for, and closes with one summary.

    ./scripts/test                  all tiers
    ./scripts/test TIER [ARGS]      one: unit kernel service escape cold bench user vm; ARGS go to pytest
    ./scripts/test mutations        takes each protection away and sees its tests fail (tests/mutations.py)

Each tier's report lies in .test-results/TIER.xml; ./scripts/check reads them. A tier that this host cannot run at all
is told, and fails where CI is set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandrun.linux import process

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import host, packages, serving  # noqa: E402

RESULTS = ROOT / ".test-results"
LIBRARY = "src/sandrun/linux/libcalls.so"
ALL_SECONDS = 25 * 60
STARTED = time.monotonic()
VM_MEMORY_MB = 3072
NOT_IN_THE_VM = ("ruff", "mypy")  # they judge the same files everywhere


class Impossible(Exception):
    """This host cannot run a tier, whatever is installed; says why."""


@dataclasses.dataclass
class Report:
    """What one tier came to."""

    tier: str
    exit_code: int
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""
    impossible: bool = False

    @property
    def good(self) -> bool:
        """A tier in which no test passed did not run, whatever its exit code says."""
        if self.impossible:
            return "CI" not in os.environ
        return self.exit_code == 0 and self.failed == 0 and self.passed > 0

    @property
    def reason(self) -> str:
        if self.note or self.good or self.failed:
            return self.note
        return f"exit {self.exit_code}" if self.exit_code else "no test passed"

    def read(self, path: Path) -> Report:
        """Count the cases of a JUnit report."""
        if not path.exists():
            self.note = self.note or f"exit {self.exit_code}, no report"
            return self
        for case in ET.parse(path).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                self.failed += 1
            elif "skipped" in kinds:
                self.skipped += 1
            else:
                self.passed += 1
        return self


# ---- the tree ------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    """The files that git tracks or would, relative to the tree: neither .venv nor left-overs come along."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    return sorted(Path(name) for name in set(os.fsdecode(listed).split("\0")) if name and (ROOT / name).is_file())


def fingerprint() -> str:
    """A digest of all that decides what the tests do; documents do not."""
    digest = hashlib.sha256()
    for path in sources():
        if path.parts[0] in ("src", "tests", "examples", "scripts") or path.name == "pyproject.toml":
            digest.update(b"%s\0%s\0" % (os.fsencode(path), hashlib.sha256((ROOT / path).read_bytes()).digest()))
    return digest.hexdigest()


def copy_tree(target: Path, *, venv: bool) -> None:
    """The sources, and if asked the environment, with the new place written into its scripts and paths."""
    for path in sources():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path, follow_symlinks=False)
    if venv:
        copy_venv(target)


def copy_venv(target: Path) -> None:
    shutil.copy2(ROOT / LIBRARY, target / LIBRARY)
    shutil.copytree(ROOT / ".venv", target / ".venv", symlinks=True, ignore=shutil.ignore_patterns("ruff*"))
    old, new = os.fsencode(ROOT), os.fsencode(target)
    for file in [*(target / ".venv/bin").iterdir(), *(target / ".venv").glob("lib/*/site-packages/*.pth")]:
        if file.is_file() and not file.is_symlink() and old in (content := file.read_bytes()):
            mode = file.stat().st_mode
            file.write_bytes(content.replace(old, new))
            file.chmod(mode)


# ---- running -------------------------------------------------------------------------------------------------


def run(
    command: list[str],
    seconds: float,
    *,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    output: int | None = None,
) -> int:
    """Run to the end, or stop it: first as Ctrl-C would, so that fixtures tear down. 124 is a run that was stopped."""
    child = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
    )
    if output is not None:
        beside.add(child.pid)
    interrupted: KeyboardInterrupt | None = None
    try:
        return child.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        print(f"tiers: not over after {seconds:.0f} s: {' '.join(command[:6])} …", flush=True)
    except KeyboardInterrupt as error:
        interrupted = error
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if interrupted:
        raise interrupted
    return 124


def strays() -> list[host.Process]:
    """What runs below us, orphans included, and is not of the tier that runs beside."""
    below = {p.pid: p for p in host.descendants(os.getpid())}
    for pid in beside:
        for p in [*host.descendants(pid), *filter(None, [host.process(pid)])]:
            below.pop(p.pid, None)
    return list(below.values())


def end_strays() -> list[str]:
    """End what a tier left running; what they were called."""
    found: list[str] = []
    end = time.monotonic() + 10
    grace = time.monotonic() + 2  # the last ones of a server may be about to end
    while (left := strays()) and time.monotonic() < end:
        if time.monotonic() > grace:
            found += [called for p in left if (called := f"{p.pid} {p.title}") not in found]
            for p in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(p.pid, signal.SIGKILL)
        time.sleep(0.05)
    return found


def pytest(tier: str, python: Path, results: Path, paths: list[str], extra: list[str]) -> list[str]:
    """The command of a tier; paths named in `extra` replace the tier's own."""
    if any(argument.startswith("tests/") for argument in extra):
        paths = []
    report = [f"--junit-xml={results / tier}.xml", "-o", "junit_family=xunit1"]
    return [str(python), "-m", "pytest", "-q", "--durations=5", *report, *paths, *extra]


def environment(**more: str) -> dict[str, str]:
    """What tests see of our own environment: little, so that they don't lean on it."""
    keep = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "LC_")) or k in ("HOME", "LANG", "CI")}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"HOME": "/", "LANG": "C.UTF-8", **keep, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}


Tier = Callable[[list[str], float, int | None], int]
"""Takes more arguments for pytest, the most seconds, and where to write what it prints; gives pytest's exit code."""
BESIDE = "vm"
"""This tier, a single process on one core, runs beside the others when all run."""
beside: set[int] = set()
"""Its process."""


def native(name: str, folder: str = "", left_out: tuple[str, ...] = (), **more: str) -> Tier:
    """As root, on the cgroups that this host has. `more` is what its environment has beside the usual."""

    def tier(extra: list[str], seconds: float, output: int | None) -> int:
        extra = [*(f"--ignore={path}" for path in left_out), *extra]
        command = pytest(name, Path(sys.executable), RESULTS, [f"tests/{folder or name}"], extra)
        return run(command, seconds, env=environment(**more), output=output)

    return tier


DOUBLES = ("api_server", "api_world", "spawner_double")


IN_PLACE = "tests/escape/test_confinement_python.py"
"""What an interpreter does in place, in hundreds of cases."""
NOT_COLD = (
    IN_PLACE,
    "tests/escape/test_confinement_pause.py",
    "tests/escape/test_crash.py",
    "tests/escape/test_resources_tasks.py",
    "tests/escape/test_resources_time.py",
)
"""What looks at the interpreter, the clock, the server's own processes or the load, not at what a sandbox keeps out."""
ALIKE = (IN_PLACE, "tests/service/test_environments.py", "tests/service/test_environment_rebuilt.py")
"""What takes long and answers alike for every user and kernel. Single tests like that are marked `once`."""
IN_NO_VM = ("tests/service/test_cli.py", "tests/service/test_api_document.py")
"""What an ordinary user sees differently, a kernel does not."""


def touching_the_kernel() -> list[str]:
    """What has pytest run the tests whose answer may depend on who runs them and on which kernel.

    Not those that look at HTTP or at the queue with a double in place of the spawner.
    """
    service = sorted((ROOT / "tests/service").glob("test_*.py"))
    real = [path for path in service if not any(double in path.read_text() for double in DOUBLES)]
    paths = ["tests/kernel", "tests/escape", *(str(path.relative_to(ROOT)) for path in real)]
    return [*paths, *(f"--deselect={path}" for path in ALIKE), "-m", "not once"]


def free_uid() -> int:
    """A uid that is nobody's: it has no account and owns no process."""
    used = {entry.pw_uid for entry in pwd.getpwall()}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used.add(directory.stat().st_uid)
    return next(uid for uid in range(62000, 63000) if uid not in used)


@contextlib.contextmanager
def throw_away_user() -> Iterator[tuple[int, Path]]:
    """A uid without account, privilege, groups or subuids, and a directory that it can reach."""
    with tempfile.TemporaryDirectory(prefix="sandrun-user-", dir="/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)  # the tree itself may lie below a home that nobody else can enter
        yield free_uid(), directory


def user(extra: list[str], seconds: float, output: int | None) -> int:
    """As an ordinary user with one uid and no cgroup of its own."""
    paths = touching_the_kernel()
    if os.geteuid() != 0:
        command = pytest("user", Path(sys.executable), RESULTS, paths, extra)
        return run(command, seconds, env=environment(), output=output)
    with throw_away_user() as (uid, directory):
        tree, out, home = directory / "tree", directory / "out", directory / "home"
        copy_tree(tree, venv=True)
        for made in (out, home):
            made.mkdir()
            os.chown(made, uid, uid)
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--"]
        if subprocess.run([*drop, "unshare", "--user", "--mount", "true"], check=False, capture_output=True).returncode:
            raise Impossible("the host gives ordinary users no user namespaces (on Ubuntu: AppArmor)")
        command = [*drop, *pytest("user", tree / ".venv/bin/python", out, paths, extra)]
        code = run(command, seconds, cwd=tree, env=environment(HOME=str(home)), output=output)
        fetch(out / "user.xml")
        return code


def vm(extra: list[str], seconds: float, output: int | None) -> int:
    """As root on cgroup v2 with systemd, in a machine booted for it."""
    if not Path("/etc/debian_version").exists() or "ubuntu" in Path("/etc/os-release").read_text().lower():
        raise Impossible("the machine is made from a Debian host's archive (root here is on v2 already)")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["project"]["optional-dependencies"]["dev"] + project["build-system"]["requires"]
    tools = [name for name in tools if not name.startswith(NOT_IN_THE_VM)]
    with tempfile.TemporaryDirectory(prefix="sandrun-vm-tree-") as name:
        tree, out = Path(name) / "tree", Path(name) / "out"
        copy_tree(tree, venv=False)
        (tree / "tests/vm/requirements").write_text("\n".join(tools) + "\n")
        inside = [package for names in packages.PACKAGES.values() for package in names]
        wheels = [f"--wheels={name}" for name in [*project["project"]["dependencies"], *tools, *inside]]
        left_out = [f"--deselect={path}" for path in IN_NO_VM]
        inner = pytest("vm", Path("python"), Path("/out"), [*touching_the_kernel(), *left_out], extra)
        machine = [f"--mem={VM_MEMORY_MB}", f"--timeout={seconds:.0f}", f"--share={tree}", f"--out={out}", *wheels]
        command = [sys.executable, "tests/vm/run-in-vm", "--verbose", *machine, "--", "sh", "tests/vm/inside"]
        code = run([*command, *inner[3:]], seconds + 30, env=environment(), output=output)
        fetch(out / "vm.xml")
        return code


def fetch(report: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(report, RESULTS / report.name)


# Name, what runs it, the most seconds it gets. ALL_SECONDS holds whatever these add up to.
TIERS: dict[str, tuple[Tier, str, float]] = {
    "unit": (native("unit"), "anywhere", 900),
    "kernel": (native("kernel"), "as root on this host's cgroups", 600),
    "service": (native("service"), "as root on this host's cgroups", 900),
    "escape": (native("escape"), "as root on this host's cgroups", 900),
    "cold": (
        native("cold", "escape", NOT_COLD, **{serving.FLAGS: "--parked-share 0"}),
        "the escape tier with no sandbox parked: each is built when its job comes",
        900,
    ),
    "bench": (native("bench"), "as root on this host's cgroups", 240),
    "user": (user, "as an ordinary user with one uid and no cgroup", 900),
    "vm": (vm, "as root on cgroup v2 with systemd, in a machine booted for it", 1400),
}


def run_tier(name: str, extra: list[str], seconds: float, output: int | None = None) -> Report:
    tier, where, most = TIERS[name]
    if output is None:
        print(f"\n==== {name}: {where} ====", flush=True)
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    begin = time.monotonic()
    try:
        code = tier(extra, min(most, seconds), output)
    except Impossible as error:
        return Report(name, 1, time.monotonic() - begin, note=f"not possible here: {error}", impossible=True)
    came = Report(name, code, time.monotonic() - begin, note="timed out" if code == 124 else "").read(report)
    if name != BESIDE and (left := end_strays()):
        came.failed += 1
        came.note = f"{len(left)} processes were left running and have been ended"
        print("left running:", *left, sep="\n  ", flush=True)
    return came


@contextlib.contextmanager
def start_beside(end: float) -> Iterator[Callable[[], Report]]:
    """Run the tier BESIDE while others run; the call waits for it, shows what it printed and gives its report."""
    with tempfile.TemporaryFile() as output, ThreadPoolExecutor(1) as thread:
        future = thread.submit(run_tier, BESIDE, [], end - time.monotonic(), output.fileno())

        def finish() -> Report:
            print(f"\n==== {BESIDE}: {TIERS[BESIDE][1]} (ran beside the others) ====", flush=True)
            report = future.result()
            output.seek(0)
            print(output.read().decode(errors="replace"), flush=True)
            return report

        try:
            yield finish
        finally:
            for pid in beside:
                if not future.done():
                    os.kill(pid, signal.SIGINT)


def summarise(reports: list[Report], digest: str) -> int:
    print("\n==== summary ====")
    for r in reports:
        counts = f"{r.passed:5} passed {r.failed:4} failed {r.skipped:4} skipped"
        verdict = "none" if r.impossible else "ok" if r.good else "FAILED"
        print(f"{verdict:7}{r.tier:9}{counts} {r.seconds:7.1f} s  {r.reason}".rstrip())
    record = {"sources": digest, "tiers": {r.tier: {**dataclasses.asdict(r), "good": r.good} for r in reports}}
    (RESULTS / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    fallen = sum(not r.good and not r.failed for r in reports)  # a tier that did not run counts as one failure
    passed, failed, skipped = (sum(getattr(r, kind) for r in reports) for kind in ("passed", "failed", "skipped"))
    print(f"{time.monotonic() - STARTED:.0f} s in all")
    print(f"{passed} passed, {failed + fallen} failed, {skipped} skipped", flush=True)
    return 0 if all(r.good for r in reports) else 1


def give_back() -> None:
    """Under sudo, what we wrote in the tree still belongs to the one whose tree it is."""
    owner = ROOT.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        for path in [RESULTS, *RESULTS.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name == "mutations":
        return subprocess.call([sys.executable, "-B", str(ROOT / "tests/mutations.py"), *arguments[1:]], cwd=ROOT)
    if name and name not in TIERS:
        print(f"test: no tier {name!r}; there are {', '.join(TIERS)}, and mutations", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "run.json").unlink(missing_ok=True)
    process.set_child_subreaper()  # what a test loses sight of comes to us
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):  # nohup, and a shell's &, have tests begin with them ignored
        signal.signal(number, signal.SIG_DFL)
    digest, end, reports = fingerprint(), time.monotonic() + ALL_SECONDS, []
    try:
        with contextlib.ExitStack() as stack:
            other = stack.enter_context(start_beside(end)) if not name and os.geteuid() == 0 else None
            for tier in [name] if name else TIERS:
                left = end - time.monotonic()
                if os.geteuid() != 0 and tier not in ("unit", "user"):
                    reports.append(Report(tier, 1, note="skipped: run ./scripts/test as root or with sudo"))
                elif tier == BESIDE and other:
                    reports.append(other())
                elif left < 1:
                    reports.append(Report(tier, 124, note=f"skipped: the {ALL_SECONDS} s for all tiers were over"))
                else:
                    reports.append(run_tier(tier, arguments[1:], left))
        return summarise(reports, digest)
    finally:
        end_strays()
        give_back()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("test: stopped")
