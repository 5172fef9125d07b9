"""A cgroup of our own under systemd: commands that build sandboxes run themselves again in a delegated scope.

systemd manages every cgroup but those of units with Delegate=yes, and on cgroup v2 one with processes in it cannot
give controllers to its children (cgroup-v2.rst, "No Internal Process Constraint").
"""

from __future__ import annotations

import os
import shutil
import sys

from sandrun.config import Config
from sandrun.linux.cgroup import LAYERS
from sandrun.linux.hierarchy import detect, undelegated

MARK = "INSIDE_SANDRUN_SCOPE"
"""Set in the second run: if that has no delegated cgroup either, there is no third."""


def enter_scope(config: Config) -> None:
    """Return if the cgroup of this process will do, or nothing better can be had; else become the same in a scope."""
    if config.waived.issuperset(LAYERS) or os.environ.get(MARK) or undelegated(detect()) is None:
        return
    systemd_run = shutil.which("systemd-run", path="/usr/bin:/bin")
    if systemd_run is None:
        return  # Cgroups.create says what is missing, and the fix
    user = [] if os.geteuid() == 0 else ["--user"]
    words = [systemd_run, *user, "--scope", "--quiet", "--collect", "-p", "Delegate=yes", "--"]
    os.execve(systemd_run, [*words, sys.executable, *sys.orig_argv[1:]], os.environ | {MARK: "1"})
