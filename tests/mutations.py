"""Takes each protection of tests/mutations.toml away, one at a time, and sees the tests that attack it fail.

    ./scripts/test mutations [WORD...]     only those whose protection has one of the words in it

Works in a git worktree with an environment of its own. Before anything is taken away, all named tests must pass there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiers  # noqa: E402

SECONDS = 240


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
        path.write_text(text.replace(self.old, self.new))
        compile(path.read_text(), self.file, "exec")  # a syntax error would fail every test and prove nothing
        return text


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


def outcomes(tree: Path, tests: list[str]) -> dict[str, str]:
    """Run the tests in the tree: passed (all its cases did), skipped, or failed, for each of them."""
    report = tree.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = tiers.pytest("report", tree / ".venv/bin/python", tree.parent, [], ["--no-summary", *tests])
    if os.geteuid() == 0 and not Path("/run/systemd/system").exists():
        # What a protection held back must not reach this machine, and leave nothing behind. (systemd could not
        # find us in a PID namespace, so there the tests rely on their own sandboxes.)
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "--", *command]
    with open(tree.parent / "output.txt", "wb") as output:
        code = tiers.run(command, SECONDS, cwd=tree, env=tiers.environment(), output=output.fileno())
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
    survived = 0
    with worktree() as tree:
        before = {test: v for test, v in outcomes(tree, tests).items() if v != "passed"}
        if before:
            print((tree.parent / "output.txt").read_text(errors="replace")[-6000:])
            print(f"mutations: with every protection in place: {before}", file=sys.stderr)
            return 1
        for number, mutation in enumerate(mutations, 1):
            former = mutation.apply(tree)
            try:
                after = outcomes(tree, list(mutation.tests))
            finally:
                (tree / mutation.file).write_text(former)
            wrong = {test: v for test, v in after.items() if v != "failed"}
            survived += bool(wrong)
            print(f"{'SURVIVED' if wrong else 'caught':9}{number:3}/{len(mutations)} {mutation.protection}", flush=True)
            for test, verdict in wrong.items():
                print(f"         {test}: {verdict}", flush=True)
    print(f"{len(mutations) - survived} passed, {survived} failed", flush=True)
    return 1 if survived or not mutations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
