"""Running a Python script in an interpreter that has already started: `python3 FILE` without the start.

A zygote is `python3 -m MARKER`, and its whole life is spent inside `import sitecustomize`, which CPython's start-up
does before it looks for MARKER. A job forked from there returns from that import: start-up goes on, with no Python
frame left, and calls `runpy._run_module_as_main`, in whose place stands `_run` (Modules/main.c, `pymain_run_module`).
So `__main__`, tracebacks, flushing, exit codes and `atexit` are the interpreter's own.

`_run` leaves out the end of the interpreter where that changes nothing: taking apart what the zygote had loaded copies
500 pages of it, a third of a short job's time. What the client made is taken apart in the interpreter's own order.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import sys
from _weakref import ref
from collections.abc import Callable
from opcode import opmap
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sandrun.linux import process
from sandrun.sandbox.rootfs import WORK

MARKER = "sandrun" + "x" * 120
"""Also room for a process title: it may be as long as the arguments were."""

_exit = ctypes.PyDLL(None)["exit"]  # libc's: C libraries get to flush, CPython does not get to finalize
_exit.argtypes, _exit.restype = [ctypes.c_int], None
_increment = ctypes.pythonapi.Py_IncRef
_increment.argtypes, _increment.restype = [ctypes.py_object], None


class _State:
    """Attributes: ready: `find` liked what it saw; known: modules that the zygote had loaded; entrypoint: the job's."""

    ready = False
    known: frozenset[str] = frozenset()
    entrypoint = ""


def hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function` whose frame no client's code can see: not by f_back, not in a traceback.

    CPython takes a frame for one that has not begun yet, and passes it over, until it has passed its RESUME; this one
    has none. Include/internal/pycore_frame.h, `_PyFrame_IsIncomplete` (3.11 and later).
    """
    code = function.__code__
    return FunctionType(_without_resume(code), function.__globals__, function.__name__, function.__defaults__)


def _without_resume(code: CodeType) -> CodeType:
    instructions = bytearray(code.co_code)
    for at in range(0, len(instructions), 2):
        if instructions[at] == opmap["RESUME"]:
            instructions[at] = opmap["NOP"]
    return code.replace(co_code=bytes(instructions))


def find() -> None:
    """See whether this interpreter can do all that.

    Raises: LookupError if it cannot: jobs then get an interpreter of their own.
    """
    outer = hidden(_call)
    if outer(_caller) is not sys._getframe():
        raise LookupError("this interpreter shows frames without RESUME")
    if sys.orig_argv[1:2] != ["-m"]:
        raise LookupError("this interpreter was not started with -m")
    _State.ready = True


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _caller() -> Any:
    return sys._getframe().f_back


def ready() -> bool:
    return _State.ready


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
    """Run once what every script runs: a page that is written to now is not copied later."""
    exec(compile(WARM_UP, "<warm>", "exec"), {"__name__": "__main__", "out": io.StringIO()})


def prepare() -> None:
    """Take what is Sandrun's out of the client's sight, before there is a client."""
    archive = next((entry for entry in sys.path if entry.startswith("/proc/self/fd/")), None)
    if archive is not None:
        sys.path.remove(archive)
        sys.path_importer_cache.pop(archive, None)
    for name in [name for name in sys.modules if name == "sandrun" or name.startswith("sandrun.")]:
        _increment(sys.modules.pop(name))  # never freed: its pages are the zygote's
    custom = sys.modules.get("sitecustomize")  # the import machinery still needs the name, nobody what is in it
    if custom is not None:
        for name in [name for name in vars(custom) if not name.startswith("__")]:
            delattr(custom, name)
    warm_up()
    process.set_name("python3")
    _State.known = frozenset(sys.modules) - {"__main__"}
    atexit.register(_spare)


def become(entrypoint: str, args: list[str], environment: dict[str, str]) -> None:
    """Make this interpreter what `python3 ENTRYPOINT ARGS` would be; it runs the script when start-up goes on."""
    _State.entrypoint = entrypoint
    sys.argv = [entrypoint, *args]
    sys.orig_argv = ["python3", entrypoint, *args]
    os.environ.clear()
    os.environ.update(environment)
    stand_in = ModuleType("runpy")
    stand_in._run_module_as_main = hidden(_run)  # type: ignore[attr-defined]
    sys.modules["runpy"] = stand_in


def _run(*_: object) -> None:
    """What `pymain_run_file` does. Every exception goes on to the interpreter, which prints it and ends as ever."""
    del sys.modules["runpy"]
    path = f"{WORK}/{_State.entrypoint}"
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    namespace = sys.modules["__main__"].__dict__
    loader = sys.modules["_frozen_importlib_external"].SourceFileLoader
    namespace.update(__file__=path, __cached__=None, __loader__=loader("__main__", path))
    status: Any = 0
    try:
        exec(code, namespace)
    except SystemExit as error:
        status = error.code
        if status is None:
            status = 0
        if type(status) is not int or not 0 <= status <= 255:
            raise
    del code, namespace
    _finish(status)


def _finish(status: int) -> None:
    """Py_FinalizeEx without the zygote's part. Returns only if something went wrong: the interpreter tells it then."""
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
        if not _flush():
            return
    except BaseException:
        return
    gone = []
    for name in [name for name in sys.modules if name not in _State.known]:
        module: object = sys.modules.pop(name)
        if isinstance(module, ModuleType):
            gone.append(ref(module))
        del module
    gc.collect()
    for reference in reversed(gone):
        alive = reference()
        if alive is not None:
            _clear(alive.__dict__)
    _flush()
    _exit(status)


def _flush() -> bool:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", True):
            try:
                stream.flush()
            except BaseException:
                return False
    return True


def _clear(namespace: dict[str, Any]) -> None:
    """Objects/moduleobject.c, `_PyModule_ClearDict`: names with one underscore first."""
    for private in (True, False):
        for name in list(namespace):
            if name != "__builtins__" and (name[:1] == "_" and name[1:2] != "_") == private:
                namespace[name] = None


_finish = hidden(_finish)


def _spare() -> None:
    """Where the interpreter ends by itself after all: take what the zygote had loaded out of its tidying up."""
    for name in _State.known:
        if name in sys.modules:
            _increment(sys.modules.pop(name))
