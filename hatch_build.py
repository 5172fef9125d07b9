"""Builds libcalls.so from src/sandrun/linux/calls.c, for the wheel and for an editable install: it needs gcc alone."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """The wheel is for one kind of machine, but any Python and any libc: the library asks for strerror(3) alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            subprocess.run([Path(__file__).parent / "scripts/compile"], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"scripts/compile failed with {error.returncode}: it needs the package gcc") from None
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_17_{sysconfig.get_platform().rpartition('-')[2]}"
