"""Running a Python script in an interpreter that has already started: `python3 FILE` without the start.

A zygote is `python3 -m MARKER`, and its whole life is spent inside `import sitecustomize`, which CPython's start-up
does before it looks for MARKER. A job forked from there returns from that import: start-up goes on, with no Python
frame left, and calls `runpy._run_module_as_main`, in whose place stands `_run` (Modules/main.c, `pymain_run_module`).
`_run` calls what `python3 FILE` calls, PyRun_AnyFileExFlags: `__main__`, tracebacks, flushing, exit codes are its own.

`_finish` leaves out the end of the interpreter where that changes nothing: taking apart what the zygote had loaded
copies 500 pages of it, a third of a short job's time. What the client made is taken apart in the interpreter's order.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import site
import stat
import sys
from _weakref import ref
from collections.abc import Callable
from opcode import opmap
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sandrun.linux import exits, process
from sandrun.sandbox.rootfs import WORK

MARKER = "sandrun" + "x" * 120
"""Also room for a process title: it may be as long as the arguments were."""

BUILT_IN = frozenset(sys.builtin_module_names)
"""Modules that no file can stand in for."""
MODULE_SUFFIXES = ("", "py", "pyc", "so")
"""What may stand after a module's name and other points; "" is a folder's."""
OWN_SETTINGS = frozenset({"matplotlibrc"})
"""Files in the work directory that modules read when they are loaded."""

ARCHIVE = "/proc/self/fd/"
"""Where the zygote imports Sandrun's own modules from."""

_libc = ctypes.PyDLL(None)
_exit = _libc["exit"]  # libc's: C libraries get to flush, CPython does not get to finalize
_exit.argtypes, _exit.restype = [ctypes.c_int], None
_fopen = _libc["fopen"]
_fopen.argtypes, _fopen.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_void_p
_run_file = ctypes.pythonapi["PyRun_AnyFileExFlags"]
_run_file.argtypes, _run_file.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p], ctypes.c_int
_increment = ctypes.pythonapi.Py_IncRef
_increment.argtypes, _increment.restype = [ctypes.py_object], None


class _State:
    """Attributes: ready: `find` liked what it saw; known: modules that the zygote had loaded; files: names by which a
    job would find others; user_site: what `site` says of the user's, if start-up has nothing to do there; entrypoint:
    the job's."""

    ready = False
    known: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    user_site: bool | None = None
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
    # faulthandler shows it all the same: then as what `python3 -m` shows
    return code.replace(co_code=bytes(instructions), co_filename="<frozen runpy>", co_name="_run_code")


def find() -> None:
    """See whether this interpreter can do all that.

    Raises: LookupError if it cannot: jobs then get an interpreter of their own.
    """
    atexit.register(_spare)  # before any other: it is called last, when what modules want done at the end is done
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


def forget_archive() -> None:
    """All of Sandrun's own is loaded: nobody needs to look there for modules any more."""
    for entry in [entry for entry in sys.path if entry.startswith(ARCHIVE)]:
        sys.path.remove(entry)
    for entry in [entry for entry in sys.path_importer_cache if entry.startswith(ARCHIVE)]:
        del sys.path_importer_cache[entry]


def remember() -> None:
    """Note what is loaded, in the zygote, when all is, so that a job's end can leave it alone.

    The names of modules move together: whoever looks through them later counts references to them, which copies the
    pages that they are on.
    """
    modules = {"".join(list(name)): module for name, module in sys.modules.items()}
    sys.modules.clear()
    sys.modules.update(modules)
    _State.known = frozenset({name for name in modules if not _is_ours(name)} - {"__main__"})
    _State.files = frozenset({name.partition(".")[0] for name in _State.known}) - BUILT_IN
    exits.mark()
    if site.ENABLE_USER_SITE and not any(finder.find_spec("usercustomize", None) for finder in sys.meta_path):
        _State.user_site = site.ENABLE_USER_SITE


def _is_ours(name: str) -> bool:
    return name == "sandrun" or name.startswith("sandrun.")


def prepare() -> None:
    """Take what is Sandrun's out of the client's sight, in the zygote, when all of it is loaded and frozen."""
    for name in [name for name in sys.modules if _is_ours(name)]:
        _increment(sys.modules.pop(name))  # never freed
    custom = sys.modules.get("sitecustomize")  # the import machinery still needs the name, nobody what is in it
    if custom is not None:
        for name in [name for name in vars(custom) if not name.startswith("__")]:
            delattr(custom, name)
    main = ModuleType("__main__")  # the first one is frozen: the collector would never take what the client makes in it
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={})
    _increment(sys.modules["__main__"])
    sys.modules["__main__"] = main


def rehearse(environment: dict[str, str]) -> None:
    """Do without effect what `become` and `_finish` do, and what a script does."""
    warm_up()
    os.environ.clear()
    process.set_environment_area(environment)
    os.environ.update(environment)
    hidden(_call)
    _clear({"_a": 1, "b": 2})
    gc.collect()


def eclipsed(entrypoint: str) -> bool:
    """Whether a file beside the script would be loaded in place of what the zygote has loaded already.

    `import json` finds a json.py there before the library's, but a module that is loaded is not looked for.
    """
    try:
        names = os.listdir(os.path.dirname(os.path.realpath(f"{WORK}/{entrypoint}")))
    except OSError:
        return False  # a link to nowhere
    for name in names:
        stem, _, suffix = name.partition(".")
        if (stem in _State.files and suffix.rpartition(".")[2] in MODULE_SUFFIXES) or name in OWN_SETTINGS:
            return True
    return False


def become(entrypoint: str, args: list[str], environment: dict[str, str]) -> None:
    """Make this interpreter what `python3 ENTRYPOINT ARGS` would be; it runs the script when start-up goes on."""
    _State.entrypoint = entrypoint
    sys.argv = [entrypoint, *args]
    sys.orig_argv = [sys.orig_argv[0], entrypoint, *args]
    os.environ.clear()
    process.set_environment_area(environment)
    os.environ.update(environment)
    if stat.S_ISREG(os.fstat(0).st_mode):  # standard input can be sought in, which the zygote's cannot
        buffer = io.BufferedReader(io.FileIO(0, "rb", closefd=False))
        given = sys.stdin
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(buffer, given.encoding, given.errors, "\n")  # type: ignore[misc]
    if _State.user_site is not None:
        site.ENABLE_USER_SITE = None  # else start-up looks for it again, along the whole path: 60 pages
    stand_in = ModuleType("runpy")
    stand_in._run_module_as_main = hidden(_run)  # type: ignore[attr-defined]
    sys.modules["runpy"] = stand_in


def _run(*_: object) -> None:
    """What `pymain_run_file` does, and then the shorter end."""
    del sys.modules["runpy"]
    if _State.user_site is not None:
        site.ENABLE_USER_SITE = _State.user_site
    path = f"{WORK}/{_State.entrypoint}".encode(errors="surrogateescape")
    sys.path[0] = os.path.dirname(os.path.realpath(path)).decode(errors="surrogateescape")
    failed = _run_file(_fopen(path, b"rb"), path, 1, None) != 0  # it prints what is raised, and ends on SystemExit
    if failed and getattr(sys, "last_type", None) is KeyboardInterrupt:
        return  # the interpreter remembers it, and dies of SIGINT
    _finish(int(failed))
    if failed:
        raise SystemExit(1)


FORGOTTEN = """
    path argv ps1 ps2 last_exc last_type last_value last_traceback path_hooks path_importer_cache meta_path
    __interactivehook__
""".split()
"""What of `sys` the interpreter sets to None first, Python/pylifecycle.c `finalize_modules_delete_special`."""


def _finish(status: int) -> None:
    """Py_FinalizeEx without the zygote's part. Returns only if something went wrong: the interpreter tells it then."""
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name, None)
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
    except BaseException:
        return
    gc.collect()  # orders what belongs together, so that a file is flushed before it is closed
    for name in FORGOTTEN:
        setattr(sys, name, None)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, f"__{name}__", None))
    others = [module for name, module in sys.modules.items() if name not in _State.known]
    gone = [ref(module) for module in others if isinstance(module, ModuleType)]
    del others
    _spare()
    sys.modules.clear()
    gc.collect()
    for reference in reversed(gone):
        alive = reference()
        if alive is not None:
            _clear(alive.__dict__)
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except BaseException:
            continue
    _exit(status)


def _clear(namespace: dict[str, Any]) -> None:
    """Objects/moduleobject.c, `_PyModule_ClearDict`: names with one underscore first."""
    for private in (True, False):
        for name in list(namespace):
            if name != "__builtins__" and (name[:1] == "_" and name[1:2] != "_") == private:
                namespace[name] = None


_finish = hidden(_finish)


def _spare() -> None:
    """Take what the zygote had loaded out of the tidying up, the interpreter's own too.

    A module that leaves `sys.modules` has a reference less, and its page is copied for that. So they don't leave: their
    whole table is set aside, and is never freed.
    """
    theirs = [name for name in sys.modules if name not in _State.known]
    stay = {name: sys.modules[name] for name in NEEDED if name in sys.modules}
    stay.update((name, sys.modules.pop(name)) for name in theirs)
    aside: dict[str, ModuleType] = {}
    _increment(aside)
    body = ctypes.string_at(id(sys.modules) + HEAD_BYTES, BODY_BYTES)
    ctypes.memmove(id(sys.modules) + HEAD_BYTES, id(aside) + HEAD_BYTES, BODY_BYTES)
    ctypes.memmove(id(aside) + HEAD_BYTES, body, BODY_BYTES)
    sys.modules.update(stay)
    exits.shorten()


NEEDED = ("sys", "builtins")
"""The interpreter expects these modules to be there to its end."""
HEAD_BYTES, BODY_BYTES = object.__basicsize__, dict.__basicsize__ - object.__basicsize__
