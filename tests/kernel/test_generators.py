"""Generators made before a fork: two children have them in the same state until they are renewed."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, multiprocessing.process, os, random
from sandrun.sandbox import generators
mine = random.Random()
generators.find()
state = random.getstate()
drawn = []
for renewed in (False, False, True, True):
    reader, writer = os.pipe()
    if os.fork() == 0:
        random.setstate(state)
        if renewed:
            generators.renew()
        key = bytes(multiprocessing.process.current_process().authkey).hex()
        os.write(writer, json.dumps([mine.random(), random.random(), key]).encode())
        os._exit(0)
    os.wait()
    drawn.append(json.loads(os.read(reader, 4096)))
print(json.dumps(drawn))
"""


def test_children_differ_once_they_have_renewed() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    plain, as_plain, renewed, again = json.loads(done.stdout)
    assert plain == as_plain
    for values in zip(plain, renewed, again, strict=True):
        assert len(set(values)) == 3, values
