"""Work on untrusted bytes that is too long for the event loop: in threads, one at a time for each client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sandrun.jobs.clients import Client

T = TypeVar("T")


class Checks:
    """A small pool of threads, and a lock for each client that is using it."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="check")
        self._locks: dict[int, tuple[asyncio.Lock, int]] = {}  # client tag -> lock, how many hold or want it

    async def run(self, client: Client, work: Callable[[], T]) -> T:
        """What `work` returns or raises. When this returns, even because it was cancelled, `work` no longer runs:
        the caller may close the descriptors that it reads. (A closed number is soon another client's file.)
        """
        lock, users = self._locks.get(client.tag, (asyncio.Lock(), 0))
        self._locks[client.tag] = (lock, users + 1)
        try:
            async with lock:
                return await self._in_thread(work)
        finally:
            lock, users = self._locks[client.tag]
            if users > 1:
                self._locks[client.tag] = (lock, users - 1)
            else:
                del self._locks[client.tag]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        job = self._pool.submit(work)
        done = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not job.cancel():
                while not done.done():  # a thread cannot be interrupted; its work is bounded
                    try:
                        await asyncio.wait([done])
                    except asyncio.CancelledError:
                        continue
                if not done.cancelled():
                    done.exception()  # nobody is left to hear of it
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
