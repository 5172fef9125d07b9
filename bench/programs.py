"""What is run: the same program for every contender."""

from __future__ import annotations

from pathlib import Path

from bench import machine
from bench.peers import Program

HELLO = 'print("hello")'
NUMPY = "import numpy; print(numpy.__name__)"
EXECUTED = {
    "bash": ("/usr/bin/bash", "-c", "echo hello"),
    "sh": ("/usr/bin/sh", "-c", "echo hello"),
    "perl": ("/usr/bin/perl", "-e", 'print "hello\\n";'),
    "node": ("/usr/bin/node", "-e", 'console.log("hello")'),
}
PRINTED = b"hello\n"


def hello() -> Program:
    return Program((machine.PYTHON, "-c", HELLO), PRINTED)


def executed(name: str) -> Program:
    return Program(EXECUTED[name], PRINTED)


def numpy(environments: Path) -> Program:
    """/usr/bin/python3 with the packages that the job finds in `data`."""
    folder = environments / "environments/data"
    packages = next(folder.glob("lib/python3*/site-packages"))
    inside = Path("/environments/data") / packages.relative_to(folder)
    return Program(
        (machine.PYTHON, "-c", NUMPY),
        b"numpy\n",
        {"PYTHONPATH": str(inside), "OPENBLAS_NUM_THREADS": "1"},
        {str(folder.resolve()): "/environments/data"},
    )


INSIDE = {
    "loop": """
import time
def work():
    total = 0
    for number in range(4_000_000):
        total += number & 7
    return total
work()
begin = time.perf_counter()
work()
print(time.perf_counter() - begin)
""",
    "getppid": """
import os, time
getppid = os.getppid
begin = time.perf_counter()
for _ in range(1_000_000):
    getppid()
print(time.perf_counter() - begin)
""",
    "files": """
import os, tempfile, time
with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
    os.chdir(folder)
    data = b"x" * 200
    begin = time.perf_counter()
    for number in range(10_000):
        with open(str(number), "wb") as file:
            file.write(data)
    for number in range(10_000):
        with open(str(number), "rb") as file:
            file.read()
    for number in range(10_000):
        os.unlink(str(number))
    print(time.perf_counter() - begin)
    os.chdir("/")
""",
}
"""Each times itself and prints seconds. FOLDER, a tmpfs, is set in front."""
