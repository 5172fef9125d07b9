"""What libc does at exit(3), cut short.

Each shared object of a zygote has destructors on libc's list, and finalizers that the dynamic linker runs at its end:
with numpy, pandas and matplotlib they touch a thousand pages, 3 ms at the end of a job that may have used none of them.
`mark` puts an entry on the list that asks for the process's id, which is nothing. After `shorten` it ends the process:
exit runs what was put there later, flushes C's streams, and is over. That changes memory of glibc's, the struct
exit_function of its stdlib/exit.h; where the entry is not found as expected, it stays nothing, and exit does all.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct

from sandrun.linux import libc

WITH_ARGUMENT = 4
"""The flavour ef_cxa: the function is called with the entry's argument and the exit status."""
_ENTRY = struct.Struct("=QQQQ")  # flavour, function (mangled), argument, handle of the shared object
_ARGUMENT_OFFSET = 16
_WORD = struct.Struct("=Q")
_HEAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw[x-]p \S+ \S+ \S+ +(\S*)")  # user-mode Linux has heaps with an x

_library = ctypes.PyDLL(None)
_register = _library["__cxa_atexit"]
_register.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
_find = _library["memmem"]
_find.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
_find.restype = ctypes.c_void_p
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_iterate = _library["dl_iterate_phdr"]
_iterate.argtypes = [_Callback, ctypes.c_void_p]
_ADDED_OFFSET = 32  # dlpi_adds in struct dl_phdr_info, dl_iterate_phdr(3)


class _State:
    """Attributes: entry: where ours is, 0 for nowhere; loaded: what had ever been loaded when it was made."""

    entry = 0
    loaded = 0


def _note(info: int, size: int, place: int) -> int:
    ctypes.memmove(place, info + _ADDED_OFFSET, 8)
    return 1


_callback = _Callback(_note)
_count = ctypes.c_uint64(0)


def _loaded() -> int:
    """How many shared objects were loaded since the process began."""
    _iterate(_callback, ctypes.addressof(_count))
    return _count.value


def mark() -> bool:
    """Note where we are on libc's list. Returns: whether this libc is one that we know."""
    handle = int.from_bytes(os.urandom(6), "little") << 8 | 1  # no address of anything: those are even
    _register(ctypes.cast(_library["syscall"], ctypes.c_void_p), libc.SYS["getpid"], handle)
    _register(ctypes.cast(_library["fflush"], ctypes.c_void_p), None, None)  # called before it, exit(3)
    found = [place for place in _places(_WORD.pack(handle)) if _is_ours(place, handle)]
    if len(found) != 1:
        return False
    _State.entry = found[0]
    _State.loaded = _loaded()
    return True


def shorten() -> None:
    """Have exit(3) stop at the mark, unless shared objects were loaded since: their finalizers come last of all."""
    if _State.entry and _loaded() == _State.loaded:
        libc.poke(_State.entry + _ARGUMENT_OFFSET, _WORD.pack(libc.SYS["exit_group"]))


def _is_ours(place: int, handle: int) -> bool:
    entry = libc.peek(place, _ENTRY.size)
    if entry is None:
        return False
    flavour, _, argument, last = _ENTRY.unpack(entry)
    return (flavour, argument, last) == (WITH_ARGUMENT, libc.SYS["getpid"], handle)


def _places(word: bytes) -> list[int]:
    """Where an entry may begin that ends with `word`: in libc's own variables, or in the heap.

    The heap has no name where the kernel has no room to grow it, and malloc(3) takes anonymous memory instead.
    """
    found = []
    in_libc = False
    with open("/proc/self/maps") as file:
        lines = file.readlines()
    for line in lines:
        fits = _HEAP.match(line)
        if fits is None:
            in_libc = "/libc.so" in line or "/libc-" in line
            continue
        start, end, name = int(fits[1], 16), int(fits[2], 16), fits[3]
        in_libc = "/libc.so" in name or "/libc-" in name or (in_libc and not name)  # .bss has no name, but follows
        if not in_libc and name not in ("[heap]", ""):
            continue
        while at := _find(start, end - start, word, _WORD.size):  # in place: a copy would be found too
            found.append(at + _WORD.size - _ENTRY.size)
            start = at + 1
    return [place for place in found if place % 8 == 0]
