"""Which interpreters this host offers to jobs, and the small scripts that prove each inside a sandbox."""

from __future__ import annotations

import io
import os
import re
import tarfile
from typing import NamedTuple

from sandrun.errors import SetupError

OLDEST_PYTHON = (3, 11)
FOLDERS = ("/usr/bin", "/bin", "/usr/local/bin")
"""Never PATH's: a job's interpreter is the distribution's, or lies where all users may read it."""


class Interpreter(NamedTuple):
    """`argv` comes before the entrypoint; `test` is a script that prints 42."""

    argv: tuple[str, ...]
    extension: str
    test: bytes


SCRIPTS = {
    "python3": (".py", b"print(6 * 7)\n"),
    "bash": (".sh", b"echo $((6 * 7))\n"),
    "sh": (".sh", b"echo $((6 * 7))\n"),
    "node": (".js", b"console.log(6 * 7)\n"),
    "perl": (".pl", b"print 6 * 7, qq(\\n)\n"),
    "ruby": (".rb", b"puts 6 * 7\n"),
    "php": (".php", b"<?php echo 6 * 7, PHP_EOL;\n"),
    "Rscript": (".R", b'cat(6 * 7, "\\n", sep = "")\n'),
    "lua": (".lua", b"print(6 * 7)\n"),
    "executable": ("", b"#!/bin/sh\necho $((6 * 7))\n"),
}
EXPECTED = b"42\n"
NAMES = {"lua": ("lua", "lua5.4", "lua5.3")}


def find(rootfs: str, wanted: tuple[str, ...]) -> dict[str, Interpreter]:
    """Those of `wanted` that lie below `rootfs`; python3 must be there. Raises: SetupError if it is not, or too old."""
    found: dict[str, Interpreter] = {}
    for name in wanted:
        extension, script = SCRIPTS[name]
        if name == "executable":
            found[name] = Interpreter((), extension, script)
        elif name == "python3":
            found[name] = Interpreter((find_python(rootfs),), extension, script)
        else:
            for path in (f"{folder}/{file}" for folder in FOLDERS for file in NAMES.get(name, (name,))):
                if os.access(rootfs.rstrip("/") + path, os.X_OK):
                    found[name] = Interpreter((path,), extension, script)
                    break
    return found


def find_python(rootfs: str) -> str:
    """/usr/bin/python3 if it is new enough, else the newest /usr/bin/python3.N. Raises: SetupError."""
    folder = os.path.join(rootfs, "usr/bin")
    if _version(os.path.basename(os.path.realpath(os.path.join(folder, "python3")))) >= OLDEST_PYTHON:
        return "/usr/bin/python3"
    versions = [version for name in os.listdir(folder) if (version := _version(name)) >= OLDEST_PYTHON]
    if not versions:
        raise SetupError("interpreters", 2, f"no Python of at least 3.11 in {folder}; install the package python3")
    return "/usr/bin/python{}.{}".format(*max(versions))


def installed(rootfs: str) -> tuple[int, ...]:
    """Changes when a package manager puts other files of `find_python`'s interpreter in place; () while it is gone."""
    try:
        binary = os.path.realpath(rootfs.rstrip("/") + find_python(rootfs))
        library = os.path.join(rootfs, "usr/lib", os.path.basename(binary))
        found = [os.stat(binary), *([os.stat(library)] if os.path.isdir(library) else [])]
    except (OSError, SetupError):
        return ()
    return tuple(figure for each in found for figure in (each.st_dev, each.st_ino, each.st_mtime_ns))


def _version(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"python3\.(\d+)", name)
    return (3, int(match[1])) if match else (0, 0)


def make_archive(name: str, content: bytes) -> bytes:
    """A tar with one executable file, as a client would send it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o755
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
