"""The HTTP and WebSocket client of the measurements: raw sockets, requests made beforehand, no library in the way."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import tarfile
import time
from collections.abc import Mapping
from typing import Any

IDLE_SECONDS = 3.0
"""The server ends a silent connection after 5 s; before a measurement we make a new one after this many."""


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def delete(path: str) -> bytes:
    return f"DELETE {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def run(code: str, **request: Any) -> bytes:
    """POST /run."""
    return post("/run", json.dumps({"code": code, **request}).encode())


def submit(archive: bytes, manifest: Mapping[str, Any]) -> bytes:
    """POST /submit, the manifest first."""
    mark = "sandrun-bench-8f2d6c"
    body = b""
    for name, kind, data in (
        ("manifest", "application/json", json.dumps(manifest).encode()),
        ("files", "application/gzip", archive),
    ):
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="{name}"'
        body += f"--{mark}\r\n{disposition}\r\nContent-Type: {kind}\r\n\r\n".encode() + data + b"\r\n"
    return post("/submit", body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}")


def tarball(files: Mapping[str, bytes], level: int = 6) -> bytes:
    """A gzip'd tar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=level) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


class Failed(Exception):
    """An answer that is not what was asked for."""


class Answer:
    """Takes pieces of an HTTP/1.1 answer with a Content-Length until it is whole."""

    __slots__ = ("_data", "_end", "_head")

    def __init__(self) -> None:
        self._data = bytearray()
        self._head = self._end = -1

    def feed(self, piece: bytes) -> bool:
        """Returns whether it is whole."""
        self._data += piece
        if self._end < 0:
            self._head = self._data.find(b"\r\n\r\n") + 4
            if self._head < 4:
                return False
            length = 0
            for line in bytes(self._data[: self._head]).split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            self._end = self._head + length
        return len(self._data) >= self._end

    @property
    def status(self) -> int:
        return int(self._data[9:12])

    @property
    def body(self) -> bytes:
        return bytes(self._data[self._head : self._end])


class Connection:
    """One kept-alive connection. `source` is our own address: each address of 127/8 is a client of its own."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.port = port
        self.source = source
        self._socket: socket.socket | None = None
        self._used = 0.0

    def ready(self) -> Connection:
        """Connect again if the server may be about to close it: done before the clock runs."""
        if self._socket is None or time.monotonic() - self._used > IDLE_SECONDS:
            self.close()
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(330)
            self._socket.bind((self.source, 0))
            self._socket.connect(("127.0.0.1", self.port))
            self._used = time.monotonic()
        return self

    def exchange(self, request: bytes) -> Answer:
        self.ready()
        assert self._socket is not None
        self._socket.sendall(request)
        answer = Answer()
        while True:
            piece = self._socket.recv(1 << 16)
            if not piece:
                self.close()
                raise Failed("the server closed the connection")
            if answer.feed(piece):
                break
        self._used = time.monotonic()
        return answer

    def json(self, request: bytes, status: int = 200) -> Any:
        answer = self.exchange(request)
        if answer.status != status:
            raise Failed(f"{answer.status} instead of {status}: {answer.body[:300]!r}")
        return json.loads(answer.body)

    def timed(self, request: bytes, wanted: bytes) -> float:
        """Seconds from the first byte sent to the last received. The answer must be a 200 with `wanted` in it."""
        self.ready()
        begin = time.perf_counter()
        answer = self.exchange(request)
        seconds = time.perf_counter() - begin
        if answer.status != 200 or wanted not in answer.body:
            raise Failed(f"{answer.status}: {answer.body[:300]!r}")
        return seconds

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def stdout(text: str) -> bytes:
    """What an answer to `run` holds if the job printed `text`."""
    return b'"stdout":' + json.dumps(text).encode()


def finished(connection: Connection, job: str, seconds: float = 300) -> dict[str, Any]:
    """The result of a submitted job once it has ended, by long polls."""
    end = time.monotonic() + seconds
    while True:
        result: dict[str, Any] = connection.json(get(f"/jobs/{job}?wait=30"))
        if result["status"] in ("completed", "failed"):
            return result
        if time.monotonic() > end:
            raise Failed(f"the job was still {result['status']} after {seconds:g} s")


# ---- WebSocket, RFC 6455 ---------------------------------------------------------------------------------


def open_websocket(port: int, path: str, source: str) -> socket.socket:
    """A connection that frames come on; what came with the handshake's answer is still to be read."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.bind((source, 0))
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n") and (piece := connection.recv(1)):
        head += piece
    if b" 101 " not in head.partition(b"\r\n")[0]:
        connection.close()
        raise Failed(f"no WebSocket: {head[:200]!r}")
    return connection


class Frames:
    """Takes pieces, gives the payloads of whole text frames. A server masks nothing and we accept no fragments."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        self._data += piece
        found = []
        while len(self._data) >= 2:
            size, at = self._data[1] & 127, 2
            if size == 126:
                size, at = int.from_bytes(self._data[2:4], "big"), 4
            elif size == 127:
                size, at = int.from_bytes(self._data[2:10], "big"), 10
            if len(self._data) < at + size or (self._data[1] & 127 >= 126 and len(self._data) < at):
                break
            if self._data[0] & 15 == 1:
                found.append(bytes(self._data[at : at + size]))
            del self._data[: at + size]
        return found
