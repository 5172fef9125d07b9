"""Running a Python script in an interpreter that has already started: `python3 FILE` without the start.

A zygote is `python3 MARKER`, and its whole life is spent inside `import sitecustomize`, which the start-up of CPython
does before it looks at MARKER. A job forked from there writes the client's path over MARKER in the interpreter's
configuration and returns: start-up goes on and runs the script as it runs any, from an empty frame stack, with its own
`__main__`, tracebacks, flushing, exit codes and `atexit`. Where the marker cannot be found (another layout of PyConfig)
`find` says so, and jobs get an interpreter of their own. Modules/main.c `pymain_run_python`, PEP 587.
"""

from __future__ import annotations

import atexit
import ctypes
import io
import os
import sys

from sandrun.linux import libc, process
from sandrun.sandbox.rootfs import WORK

MARKER = WORK + "/" + "x" * 4090
"""As long as a path may be: the client's is written into its buffer."""

_WORD = ctypes.sizeof(ctypes.c_void_p)
_WIDE = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
_CONFIG_BYTES = 1024
_places: list[int] = []


def find() -> None:
    """Look up where the configuration holds MARKER: as `run_filename`, and as the first of `argv` (for sys.path[0]).

    Raises: LookupError if this interpreter's configuration is not as expected.
    """
    _places.clear()
    get = getattr(ctypes.pythonapi, "_Py_GetConfig", None)
    if get is None:
        raise LookupError("this Python does not export _Py_GetConfig")
    get.restype = ctypes.c_void_p
    config = get()
    wanted = _encode(MARKER)
    names = lists = 0
    for offset in range(0, _CONFIG_BYTES, _WORD):
        word = _pointer(config + offset)
        if not word:
            continue
        if libc.peek(word, len(wanted)) == wanted:
            _places.append(word)
            names += 1
        elif (first := _pointer(word)) and libc.peek(first, len(wanted)) == wanted:
            _places.append(first)
            lists += 1
    if names != 1 or lists < 1:
        _places.clear()
        raise LookupError(f"MARKER stands {names} times as a name and {lists} times in a list of the configuration")


def ready() -> bool:
    return bool(_places)


def prepare() -> None:
    """Take what is Sandrun's out of sight, and run once what every script runs: its pages are copied now, not later."""
    archive = next((entry for entry in sys.path if entry.startswith("/proc/self/fd/")), None)
    if archive is not None:
        sys.path.remove(archive)
        sys.path_importer_cache.pop(archive, None)
    for name in [name for name in sys.modules if name == "sandrun" or name.startswith("sandrun.")]:
        _keep(sys.modules.pop(name))
    custom = sys.modules.get("sitecustomize")  # the import machinery still needs the name, nobody what is in it
    if custom is not None:
        for name in [name for name in vars(custom) if not name.startswith("__")]:
            delattr(custom, name)
    warm_up()
    process.set_name("python3")
    atexit.register(_spare, tuple(sys.modules))


WARM_UP = """
class Warm:
    def __init__(self, n): self.n = n
    def __repr__(self): return f"<{self.n:>4}>"
try:
    total = sum(i * i for i in range(10)); names = {str(i): [i, Warm(i)] for i in range(5)}
    print(total, names, sep="\\n", file=out); raise ValueError("warm")
except ValueError as error:
    print(repr(error), file=out)
"""


def warm_up() -> None:
    exec(compile(WARM_UP, "<warm>", "exec"), {"__name__": "__main__", "out": io.StringIO()})


def become(entrypoint: str, args: list[str], environment: dict[str, str]) -> None:
    """Make this interpreter what `python3 ENTRYPOINT ARGS` would be; it runs the script when start-up goes on."""
    path = f"{WORK}/{entrypoint}"
    if len(path) > len(MARKER):
        raise OSError(36, "File name too long")
    data = _encode(path)
    for place in _places:
        libc.poke(place, data)
    sys.argv = [entrypoint, *args]
    sys.orig_argv = ["python3", entrypoint, *args]
    os.environ.clear()
    os.environ.update(environment)


def _spare(names: tuple[str, ...]) -> None:
    """Last of the exit handlers: take what the zygote had loaded out of the interpreter's tidying up.

    What the client's script made or imported is torn down as ever: `__del__` runs, open files are flushed.
    """
    for name in names:
        if name != "__main__" and name in sys.modules:
            _keep(sys.modules.pop(name))


def _keep(thing: object) -> None:
    """Never free it: its pages are the zygote's, and taking it apart would copy them."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _encode(text: str) -> bytes:
    return text.encode(_WIDE, "surrogateescape") + b"\0\0\0\0"


def _pointer(address: int) -> int:
    data = libc.peek(address, _WORD)
    return int.from_bytes(data, sys.byteorder) if data else 0
