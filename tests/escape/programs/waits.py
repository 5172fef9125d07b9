"""Waits in every way that Python knows, round after round, and checks that each wait was all that was asked for."""

from __future__ import annotations

import asyncio
import fcntl
import json
import multiprocessing
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time

SECONDS = 0.25


def later(function, *arguments):
    threading.Timer(SECONDS, function, arguments).start()


def sleep():
    time.sleep(SECONDS)


def by_select():
    reader, writer = os.pipe()
    assert select.select([reader], [], [], SECONDS) == ([], [], [])
    os.close(reader), os.close(writer)


def by_poll():
    reader, writer = os.pipe()
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert poll.poll(SECONDS * 1000) == []
    os.close(reader), os.close(writer)


def by_epoll():
    reader, writer = os.pipe()
    with select.epoll() as poll:
        poll.register(reader)
        assert poll.poll(SECONDS) == []
    os.close(reader), os.close(writer)


def read():
    reader, writer = os.pipe()
    later(os.write, writer, b"x")
    assert os.read(reader, 1) == b"x"
    os.close(reader), os.close(writer)


def write():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    later(os.read, reader, 1 << 20)
    assert os.write(writer, b"x") == 1
    os.close(reader), os.close(writer)


def lock():
    held = threading.Lock()
    held.acquire()
    assert held.acquire(timeout=SECONDS) is False
    later(held.release)
    assert held.acquire()


def from_queue():
    try:
        queue.Queue().get(timeout=SECONDS)
    except queue.Empty:
        return
    raise AssertionError("got something")


def child():
    pid = os.fork()
    if pid == 0:
        time.sleep(SECONDS)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def shell():
    assert subprocess.run(["sh", "-c", f"sleep {SECONDS} & wait $!; exit 7"]).returncode == 7


def bash():
    done = subprocess.run(["bash", "-c", f"read -t {SECONDS} line < <(sleep 5); echo $?"], capture_output=True)
    assert done.stdout == b"142\n", done.stdout  # by its SIGALRM


def file_lock():
    with open("lock", "w") as ours, open("lock", "w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        later(fcntl.flock, theirs, fcntl.LOCK_UN)
        fcntl.flock(ours, fcntl.LOCK_EX)


def by_alarm():
    came = []
    signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    time.sleep(SECONDS * 1.5)
    assert came == [1]


def in_asyncio():
    async def main():
        await asyncio.sleep(SECONDS)
        process = await asyncio.create_subprocess_exec("sleep", str(SECONDS))
        return await process.wait()

    assert asyncio.run(main()) == 0


def pool():
    with multiprocessing.Pool(2) as workers:
        assert workers.map(abs, [-1, -2]) == [1, 2]


WAITS = (
    sleep, by_select, by_poll, by_epoll, read, write, lock, from_queue, child, shell, bash, file_lock, by_alarm,
    in_asyncio, pool,
)  # fmt: skip

if __name__ == "__main__":
    print("ready", flush=True)
    short = {}
    for wait in WAITS:
        begin = time.monotonic()
        wait()
        took = time.monotonic() - begin
        if took < SECONDS * 0.95 and wait is not pool:
            short[wait.__name__] = took
    print(json.dumps({"short": short, "clock": time.monotonic(), "pid": os.getpid(), "args": len(sys.argv)}))
