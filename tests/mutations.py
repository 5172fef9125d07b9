"""Takes each protection of tests/mutations.toml away, one at a time, and sees the tests that attack it fail.

    ./scripts/test mutations [WORD...]     only those whose protection has one of the words in it

Works in git worktrees with environments of their own, one for each CPU. Before anything is taken away, all named tests
must pass there.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiers  # noqa: E402

SECONDS = 180
ALL_SECONDS = 1200


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One protection and its removal: `old`, which stands in `file` just once, becomes `new`."""

    protection: str
    requirement: tuple[int, ...]
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> str:
        """Edit the file; its former text."""
        path = tree / self.file
        text = path.read_text()
        changed = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            compile(changed, self.file, "exec")  # a syntax error would fail every test and prove nothing
        self.write(tree, changed)
        return text

    def write(self, tree: Path, text: str) -> None:
        (tree / self.file).write_text(text)
        if self.file.endswith(".c"):
            subprocess.run([tree / "scripts/compile"], check=True)


def load(text: str) -> list[Mutation]:
    """The table. Raises: ValueError naming the mutation that does not fit the tree."""
    found = []
    for row in tomllib.loads(text)["mutation"]:
        mutation = Mutation(**{**row, "tests": tuple(row["tests"]), "requirement": tuple(row["requirement"])})
        path = ROOT / mutation.file
        count = path.read_text().count(mutation.old) if path.is_file() else 0
        if count != 1 or mutation.old == mutation.new:
            raise ValueError(f"{mutation.protection}: the old text stands {count} times in {mutation.file}, not once")
        for test in mutation.tests:
            file, _, name = test.partition("::")
            if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text():
                raise ValueError(f"{mutation.protection}: there is no test {test}")
        found.append(mutation)
    return found


@contextlib.contextmanager
def worktree() -> Iterator[Path]:
    """A worktree at HEAD with what is not committed laid over it, and an environment that imports from it."""
    git = ["git", "-c", "safe.directory=*"]
    with tempfile.TemporaryDirectory(prefix="sandrun-mutations-", dir="/tmp") as name:
        tree = Path(name) / "tree"
        Path(name).chmod(0o755)
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(tree)], cwd=ROOT, check=True)
        try:
            tiers.copy_tree(tree, venv=True)
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)
            subprocess.run([*git, "worktree", "prune"], cwd=ROOT, check=False)


def outcomes(tree: Path, tests: list[str], seconds: float = SECONDS) -> dict[str, str]:
    """Run the tests in the tree: passed (all its cases did), skipped, or failed, for each of them."""
    report = tree.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = tiers.pytest("report", tree / ".venv/bin/python", tree.parent, [], ["--no-summary", *tests])
    if os.geteuid() == 0 and not Path("/run/systemd/system").exists():
        # What a protection held back must not reach this machine, and leave nothing behind. (systemd could not find us
        # in a PID namespace, so there the tests rely on their own sandboxes.) Pids begin somewhere of our own, because
        # servers name their cgroups by them.
        first = f'echo {random.randrange(1000, 20000)} >/proc/sys/kernel/ns_last_pid; "$@"; exit $?'
        namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "--", "sh", "-c", first, "sh"]
        command = [*namespace, *command]
    with open(tree.parent / "output.txt", "wb") as output:
        code = tiers.run(command, seconds, cwd=tree, env=tiers.environment(), output=output.fileno())
    found: dict[str, set[str]] = {test: set() for test in tests}
    if report.exists():
        for case in ET.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            verdict = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            test = f"{case.get('file')}::{case.get('name', '').partition('[')[0]}"
            found.setdefault(test, set()).add(verdict)
    if code not in (0, 1):  # interrupted, or nothing could be collected
        return dict.fromkeys(tests, "failed" if code == 124 else f"not run (exit {code})")
    return {
        test: "failed" if "failed" in kinds else "passed" if "passed" in kinds else "skipped" if kinds else "not run"
        for test, kinds in found.items()
    }


def main(words: list[str]) -> int:
    try:
        mutations = load((ROOT / "tests/mutations.toml").read_text())
    except (ValueError, KeyError, TypeError) as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 1
    if words:
        mutations = [m for m in mutations if any(w.lower() in m.protection.lower() for w in words)]
    tests = sorted({test for m in mutations for test in m.tests})
    with contextlib.ExitStack() as stack:
        trees = [stack.enter_context(worktree()) for _ in range(min(os.cpu_count() or 1, len(mutations)))]
        before = {t: v for t, v in outcomes(trees[0], tests, ALL_SECONDS).items() if v != "passed"} if trees else {}
        if before:
            print((trees[0].parent / "output.txt").read_text(errors="replace")[-6000:])
            print(f"mutations: with every protection in place: {before}", file=sys.stderr)
            return 1
        free = queue.SimpleQueue[Path]()
        for tree in trees:
            free.put(tree)
        with ThreadPoolExecutor(max(1, len(trees))) as threads:
            survived = sum(threads.map(lambda m: survives(m, free), mutations))
    print(f"{len(mutations) - survived} passed, {survived} failed", flush=True)
    return 1 if survived or not mutations else 0


def survives(mutation: Mutation, free: queue.SimpleQueue[Path]) -> bool:
    """Whether a test of this protection still passes without it, in the next free tree."""
    tree = free.get()
    try:
        former = mutation.apply(tree)
        try:
            after = outcomes(tree, list(mutation.tests))
        finally:
            mutation.write(tree, former)
    finally:
        free.put(tree)
    wrong = {test: verdict for test, verdict in after.items() if verdict != "failed"}
    lines = [f"{'SURVIVED' if wrong else 'caught':9}{mutation.protection}"]
    print("\n".join([*lines, *(f"         {test}: {verdict}" for test, verdict in wrong.items())]), flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
