"""What runs with privilege is made of the standard library and of our own lower layers, and of nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandrun

PACKAGE = Path(sandrun.__file__).parent
BELOW = {
    "linux": {"errors", "bounds"},
    "sandbox": {"errors", "bounds", "linux"},
    "jobs": {"errors", "bounds", "model", "sandbox", "spawner.client"},
    "client": {"errors", "bounds", "model"},
}
"""What each layer may import beside itself."""
PRIVILEGED = ("sandrun.spawner.supervisor", "sandrun.spawner.server", "sandrun.spawner.zygote")


def imported(layer: str) -> Iterator[tuple[str, str]]:
    """(file, module of ours without the package's name) for each import in a layer, also one inside a function."""
    for path in sorted((PACKAGE / layer).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "sandrun":
                if node.module.count(".") == 0 or (PACKAGE / node.module.partition(".")[2].replace(".", "/")).is_dir():
                    for alias in node.names:
                        yield path.name, f"{node.module}.{alias.name}".partition(".")[2]
                else:
                    yield path.name, node.module.partition(".")[2]
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "sandrun":
                        yield path.name, alias.name.partition(".")[2]


@pytest.mark.parametrize("layer", BELOW)
def test_layer_imports_from_those_below_it_alone(layer: str) -> None:
    allowed = BELOW[layer] | {layer}
    wrong = [
        f"{file}: {module}"
        for file, module in imported(layer)
        if not any(module == name or module.startswith(f"{name}.") for name in allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("module", PRIVILEGED)
def test_privileged_process_has_no_third_party_module(module: str) -> None:
    code = f"import sys, {module}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    foreign = {n for n in loaded - set(sys.stdlib_module_names) if not n.startswith(("_", "site"))}
    assert foreign == {"sandrun"}
    assert "asyncio" not in loaded
