"""The client for asyncio: the methods of `Client`, to be awaited."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import httpx2
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus, WebSocketException

from sandrun.client import requests
from sandrun.client.requests import LogStream, ManifestFields, Request, RunFields
from sandrun.client.results import LogEnd, LogPart, Logs, Result, Submitted, read_outputs, read_result, read_submitted
from sandrun.client.save import Saving
from sandrun.client.tls import context_for
from sandrun.model import OutputFile


class AsyncClient:
    """Talks to one server, as `Client` does. `async with AsyncClient() as client:` gives its connections back.

    Args:
        url: of the server; None is SANDRUN_URL, else http://127.0.0.1:8443.
        ca: PEM file with the certificate to trust, for a server with one of its own making; None is SANDRUN_CA.
        transport: what carries requests instead of the network, for tests.

    Each method raises `ServerError` with the server's own words when it refuses, with status 0 when it does not answer,
    and `ProtocolError` when what answers is no Sandrun server.
    """

    def __init__(
        self, url: str | None = None, *, ca: str | None = None, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self.url = requests.check_url(url)
        self._local = requests.is_local(self.url)
        self._tls = context_for(self.url, ca)
        self._http = httpx2.AsyncClient(verify=self._tls, trust_env=not self._local, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, code: str, **fields: Unpack[RunFields]) -> Result:
        """Run a program and wait for it: output, verdict and small files come back in one round trip.

        The server forgets the job when it has answered, unless `keep=True`. A job that fails is a result, no exception.
        """
        return read_result(await self._send(requests.run(code, fields)))

    async def submit(
        self,
        source: str | os.PathLike[str] | bytes,
        manifest: Mapping[str, Any] | None = None,
        **fields: Unpack[ManifestFields],
    ) -> Submitted:
        """Send a directory (or a tar.gz as bytes) to be run. `fields` go over `manifest`; without either the archive's
        own `job.json` counts.

        `__pycache__` and `.git` are left behind; anything else that no server would take raises InvalidInput by name.
        """
        request = await asyncio.to_thread(requests.submit, source, manifest, fields)  # packing takes seconds
        return read_submitted(await self._send(request))

    async def result(self, job_id: str) -> Result:
        """How the job stands now."""
        return read_result(await self._send(requests.result(job_id)))

    async def wait(self, job_id: str, *, seconds: float | None = None) -> Result:
        """The result once the job has ended. Raises: TimeoutError if it has not within `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = requests.WAIT_SECONDS if end is None else max(0.0, end - time.monotonic())
            result = read_result(await self._send(requests.result(job_id, wait_seconds=requests.poll_seconds(left))))
            if result.ended:
                return result
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"the job is still {result.status} after {seconds:g} s")

    async def logs(self, job_id: str) -> Logs:
        """Both streams as they are now."""
        return Logs(
            stdout=await self._send(requests.logs(job_id, "stdout")),
            stderr=await self._send(requests.logs(job_id, "stderr")),
        )

    async def follow(self, job_id: str, *, stdout: int = 0, stderr: int = 0) -> AsyncIterator[LogPart | LogEnd]:
        """Both streams as they are written, from these offsets on; the last item is a `LogEnd`.

        A connection that breaks is made again, and goes on where it stopped.
        """
        stream = LogStream(self.url, job_id, stdout=stdout, stderr=stderr)
        while True:
            try:
                async with connect(
                    stream.url,
                    ssl=self._tls if stream.url.startswith("wss:") else None,
                    proxy=None if self._local else True,
                    compression=None,
                ) as connection:
                    async for frame in connection:
                        item = stream.feed(frame)
                        if item is not None:
                            yield item
                        if isinstance(item, LogEnd):
                            return
                lost: Exception = ConnectionError("the server closed the log stream")
            except InvalidStatus as error:
                requests.raise_problem(error.response.status_code, bytes(error.response.body or b""))
                lost = error
            except (WebSocketException, OSError) as error:
                lost = error
            pause = stream.pause_after_loss()
            if pause is None:
                raise requests.unreachable(self.url, lost) from lost
            await asyncio.sleep(pause)

    async def outputs(self, job_id: str) -> tuple[OutputFile, ...]:
        """The files that the job left behind, once it has ended."""
        return read_outputs(await self._send(requests.outputs(job_id)))

    async def read(self, job_id: str, path: str) -> bytes:
        """One output in memory."""
        return await self._send(requests.download(job_id, path))

    async def download(
        self,
        job_id: str,
        directory: str | os.PathLike[str],
        *,
        paths: Iterable[str] | None = None,
        overwrite: bool = False,
    ) -> list[str]:
        """Save outputs below `directory` (all, or those of `paths`), each proved by its SHA-256; their paths there.

        Raises: FileExistsError rather than replace a file, unless `overwrite`.
        """
        saved = []
        for file in requests.choose(await self.outputs(job_id), paths):
            with Saving(directory, file, overwrite=overwrite) as saving:
                await self._save(requests.download(job_id, file.path), saving)
            saved.append(saving.path)
        return saved

    async def cancel(self, job_id: str) -> None:
        """Stop the job; what it wrote so far is kept."""
        await self._send(requests.cancel(job_id))

    async def delete(self, job_id: str) -> None:
        """Stop the job if it runs, and erase all of it."""
        await self._send(requests.delete(job_id))

    async def _send(self, request: Request) -> bytes:
        try:
            answer = await self._http.request(
                request.method,
                self.url + request.target,
                headers=dict(request.headers),
                content=request.content,
                timeout=httpx2.Timeout(requests.ANSWER_SECONDS, read=request.answer_seconds),
            )
        except httpx2.HTTPError as error:
            raise requests.unreachable(self.url, error) from error
        requests.raise_problem(answer.status_code, answer.content)
        return answer.content

    async def _save(self, request: Request, saving: Saving) -> None:
        url = self.url + request.target
        try:
            async with self._http.stream(request.method, url, timeout=requests.ANSWER_SECONDS) as answer:
                if answer.status_code >= 400:
                    requests.raise_problem(answer.status_code, await answer.aread())
                async for chunk in answer.aiter_bytes():
                    saving.write(chunk)
        except httpx2.HTTPError as error:
            raise requests.unreachable(self.url, error) from error
