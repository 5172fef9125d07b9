"""The end of a process, cut short: in interpreters of their own, whose last words are read by us."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import ctypes, os, sys
from sandrun.linux import exits
libc = ctypes.PyDLL(None)
register = libc["__cxa_atexit"]
register.argtypes = [ctypes.c_void_p] * 3
puts = ctypes.cast(libc["puts"], ctypes.c_void_p)
words = {word: ctypes.create_string_buffer(word.encode()) for word in ("before", "after", "in between")}
say = lambda word: register(puts, ctypes.addressof(words[word]), None)
end = libc["exit"]
say("before")
"""


def run(code: str, *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and the lines that C's own stream brought: they are there only if it was flushed."""
    done = subprocess.run([sys.executable, "-c", START + code, *arguments], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_without_a_mark_exit_does_all() -> None:
    assert run("say('after'); end(3)") == (3, ["after", "before"])


def test_exit_that_is_not_shortened_does_all() -> None:
    assert run("assert exits.mark(); say('after'); end(4)") == (4, ["after", "before"])


@pytest.mark.parametrize("code", [0, 1, 77, 255])
def test_shortened_exit_does_what_came_after_the_mark_and_keeps_the_status(code: int) -> None:
    assert run(f"assert exits.mark(); say('after'); exits.shorten(); end({code})") == (code, ["after"])


def test_shortened_exit_flushes() -> None:
    assert run("assert exits.mark(); exits.shorten(); libc.puts(b'buffered'); end(0)") == (0, ["buffered"])


def test_forked_child_may_do_otherwise() -> None:
    code = """
assert exits.mark()
if os.fork() == 0:
    exits.shorten()
    end(0)
os.wait()
end(5)
"""
    assert run(code) == (5, ["before"])


def test_interpreter_that_ends_by_itself_is_shortened_too() -> None:
    assert run("assert exits.mark(); say('after'); exits.shorten(); sys.exit(6)") == (6, ["after"])


def test_libc_that_is_not_as_expected_is_left_as_it_was() -> None:
    """What cannot be found cannot be switched off again, so it must do nothing until it is switched on."""
    code = "exits._places = lambda word: []; assert not exits.mark(); say('after'); exits.shorten(); end(7)"
    assert run(code) == (7, ["after", "before"])


def test_many_entries_before_and_after() -> None:
    """libc keeps 32 in one piece of memory, others elsewhere."""
    code = "[say('before') for _ in range(100)]; assert exits.mark(); [say('after') for _ in range(100)]; "
    assert run(code + "exits.shorten(); end(0)") == (0, ["after"] * 100)


@pytest.mark.needs("gcc")
def test_finalizers_of_what_was_loaded_since_are_run(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    assert gcc is not None
    source, target = tmp_path / "said.c", tmp_path / "said.so"
    source.write_text('#include <stdio.h>\n__attribute__((destructor)) static void end(void) { puts("finalizer"); }\n')
    subprocess.run([gcc, "-shared", "-fPIC", "-o", target, source], check=True)
    load = "ctypes.CDLL(sys.argv[1]); "
    shortened = "exits.shorten(); end(0)"
    assert run(load + "assert exits.mark(); " + shortened, str(target)) == (0, [])
    assert run("assert exits.mark(); " + load + shortened, str(target)) == (0, ["before", "finalizer"])
