"""Walks the whole tree and lists all that claims to be writable, and all that is by trying."""

from __future__ import annotations

import json
import os

SKIP = {"/proc"}


def walk() -> tuple[int, list[str], list[str]]:
    seen, claimed, by_trying = 0, [], []
    todo = ["/"]
    while todo:
        folder = todo.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        try:
            os.close(os.open(f"{folder}/probe", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.unlink(f"{folder}/probe")
            by_trying.append(folder)
        except OSError:
            pass
        if os.access(folder, os.W_OK):
            claimed.append(folder)
        for entry in entries:
            seen += 1
            if entry.is_dir(follow_symlinks=False):
                if entry.path not in SKIP:
                    todo.append(entry.path)
            elif not entry.is_symlink() and os.access(entry.path, os.W_OK):
                claimed.append(entry.path)
    return seen, claimed, by_trying


def writable_in_proc() -> list[str]:
    """Below /proc the mode means little: open for writing, without writing."""
    found = []
    for folder, folders, files in os.walk("/proc"):
        if folder == "/proc":
            folders[:] = [name for name in folders if not name.isdigit() and name != "thread-self"]
        folders[:] = [name for name in folders if name not in ("task", "net", "fd", "root", "cwd", "map_files")]
        for name in files:
            try:
                os.close(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_NONBLOCK))
                found.append(f"{folder}/{name}")
            except OSError:
                pass
    return found


seen, claimed, by_trying = walk()
print(
    json.dumps({"seen": seen, "claimed": sorted(claimed), "by trying": sorted(by_trying), "proc": writable_in_proc()})
)
