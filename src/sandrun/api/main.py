"""The api process: from a forked child of the supervisor to an HTTP server that is locked in, and to its end.

Exit codes: 0 stopped as asked, REFUSED for what a restart cannot mend (it has said what on stderr), FAILED.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import uvicorn
from starlette.types import Receive, Scope, Send

from sandrun.api import guard, lockdown, log
from sandrun.api.app import App
from sandrun.api.context import Context
from sandrun.config import Config
from sandrun.errors import ConfigError, ProtocolError, SandrunError
from sandrun.jobs.service import JobService
from sandrun.linux import ids, memory, process
from sandrun.spawner.client import SpawnerClient

REFUSED = 1
FAILED = 70
"""EX_SOFTWARE of <sysexits.h>: the supervisor starts another."""
CLOSE_SECONDS = 5
"""How long requests that are being answered may take once all jobs have ended."""
BACKLOG = 512

TRIM_JOBS = 500
"""So many are erased before their memory is given back: that takes milliseconds, and the next jobs want some of it."""
LATER_IMPORTS = (
    "uvicorn.lifespan.off uvicorn.protocols.http.flow_control "
    "email.utils encodings.idna encodings.utf_8 encodings.latin_1 encodings.ascii encodings.unicode_escape stringprep "
    "asyncio.base_events asyncio.selector_events asyncio.sslproto asyncio.unix_events concurrent.futures.thread "
    "multipart ssl tarfile zlib traceback linecache tokenize uvloop httptools"
).split()
"""What libraries import when they first need it, when it may be too late: see tests/service/test_api_lockdown.py."""


class _Gate:
    """The application before there is one: uvicorn reads its certificate while we still may, jobs come later."""

    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn's server with our signals, and one wake-up a second instead of ten, when it calls `each_second`."""

    def __init__(self, config: uvicorn.Config, each_second: Callable[[], None]) -> None:
        super().__init__(config)
        self.each_second = each_second
        self.stopping = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # the Date header
            try:
                await asyncio.wait_for(self.stopping.wait(), 1.0)
            except TimeoutError:
                self.each_second()
                continue
            self.should_exit = True


class Trimming:
    """Called each second: gives the memory of erased jobs back, which libc would keep for the next ones."""

    def __init__(self, service: JobService) -> None:
        self._service = service
        self._trimmed = 0
        self._seen = 0

    def __call__(self) -> None:
        before, self._seen = self._seen, self._service.erased
        enough = TRIM_JOBS if self._seen != before else TRIM_JOBS // 10  # no longer in a row: what is left of them
        if self._seen - self._trimmed >= enough:
            self._trimmed = self._seen
            memory.trim()


def run(config: Config, spawner: socket.socket, control: socket.socket) -> int:
    """Bind, lock down, serve. Returns: the exit code.

    Args:
        spawner: our end of the spawner's socket.
        control: our end of a SOCK_SEQPACKET pair with the supervisor, which may send the socket of a new spawner at any
            time; its end is our end.
    """
    log.set_up()
    try:
        return _run(config, spawner, control)
    except SandrunError as error:
        structlog.get_logger().critical("refused_to_start", reason=str(error))
        return REFUSED
    except OSError as error:
        structlog.get_logger().critical("refused_to_start", reason=str(error), **log.describe(error))
        return REFUSED
    except Exception as error:
        structlog.get_logger().critical("failed", **log.describe(error))
        return FAILED


def _run(config: Config, spawner: socket.socket, control: socket.socket) -> int:
    process.set_title("sandrun: api")
    process.set_name("sandrun: api")
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all of us; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    listeners = bind(config.host, config.port)
    close_others({0, 1, 2, spawner.fileno(), control.fileno(), *(listener.fileno() for listener in listeners)})
    import_all()
    gate = _Gate()
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    security = log.Security()
    registry = guard.Registry(guard.Bounds(connections=max(64, min(1000, descriptors // 4))), security)
    settings = uvicorn_config(config, gate, registry)
    gc.collect()
    gc.freeze()
    uid = ids.choose_base(config.uid_base, 1) if os.geteuid() == 0 else os.geteuid()
    report = lockdown.lock_down(lockdown.Wanted(user=config.user, uid=uid, waived=config.waived, parent=os.getppid()))
    if report.missing:
        structlog.get_logger().warning("walls_missing", missing=report.missing)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_serve(config, settings, gate, listeners, spawner, control, report, security))


async def _serve(
    config: Config,
    settings: uvicorn.Config,
    gate: _Gate,
    listeners: list[socket.socket],
    spawner: socket.socket,
    control: socket.socket,
    report: lockdown.Report,
    security: log.Security,
) -> int:
    loop = asyncio.get_running_loop()
    client = SpawnerClient(spawner)
    attached = asyncio.Event()
    control.setblocking(False)
    loop.add_reader(control.fileno(), _hear_supervisor, control, client, attached)
    while True:
        try:
            await client.ready()
            break
        except ProtocolError:  # it died at once; the supervisor sends another, or gives up
            await attached.wait()
            attached.clear()
    service = JobService(client, config.jobs)
    context = Context(
        service=service,
        ceilings=config.ceilings,
        hostnames=frozenset(name.lower().rstrip(".") for name in config.hostname),
        walls=report.as_json(),
        spawner_lost=lambda: client.lost,
        security=security,
    )
    gate.app = App(context)
    server = Server(settings, Trimming(service))
    stop = _Stop(service, server, config.grace_seconds)
    loop.add_signal_handler(signal.SIGTERM, stop)
    urls = [_url(listener, tls=settings.is_ssl) for listener in listeners]
    structlog.get_logger().info("listening", urls=urls)
    await server.serve(sockets=listeners)
    service.close()
    return 0


class _Stop:
    """SIGTERM: no new jobs, those that run get the grace period, then the end. Again: the end now (requirement 35)."""

    def __init__(self, service: JobService, server: Server, grace_seconds: float) -> None:
        self._service = service
        self._server = server
        self._grace_seconds = grace_seconds
        self._task: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        if self._task is not None:
            os._exit(FAILED)  # the spawner sees our end of its socket close and ends every job
        structlog.get_logger().info("draining", grace_seconds=self._grace_seconds)
        self._task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._grace_seconds)
        self._server.stopping.set()


def _hear_supervisor(control: socket.socket, client: SpawnerClient, attached: asyncio.Event) -> None:
    try:
        message, descriptors, _flags, _address = socket.recv_fds(control, 64, 1)
    except BlockingIOError:
        return
    except OSError:
        message, descriptors = b"", []
    if not message:
        os._exit(FAILED)  # the supervisor is dead, and nobody would restart what dies next
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        client.attach(socket.socket(fileno=descriptor))
        attached.set()


# ---- parts -------------------------------------------------------------------------------------------------


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on all addresses that `host` means. Raises: ConfigError naming address and reason."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        accepted = "an address of this machine, 0.0.0.0 or ::"
        raise ConfigError(f"host: {host}: {error.strerror}; accepted: {accepted}") from None
    bound: list[socket.socket] = []
    refused: OSError | None = None
    for family, _kind, _protocol, _name, address in dict.fromkeys(found):
        if port == 0 and bound:  # the same free port on all of them
            address = (address[0], bound[0].getsockname()[1], *address[2:])
        try:
            bound.append(_listener(family, address))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # localhost on a host without IPv6
                refused = error
                break
            refused = refused or error
    if refused is not None and (not bound or refused.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        for listener in bound:
            listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {refused.strerror}")
    return bound


def _listener(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))  # "::" is IPv4 too
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _url(listener: socket.socket, *, tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{host}:{port}"


def close_others(keep: set[int]) -> None:
    """Close every descriptor but these: what the supervisor holds is none of this process's business."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    if null > 2:
        os.close(null)
    edges = sorted(keep)
    for below, above in zip(edges, [*edges[1:], 1 << 31], strict=True):
        process.close_range(below + 1, above - 1)


def import_all() -> None:
    """Import what is imported late: the user that we become may not reach the files any more."""
    sys.dont_write_bytecode = True
    for name in LATER_IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError:  # uvloop is optional, and libraries move their modules
            continue


def new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def uvicorn_config(config: Config, app: Any, registry: guard.Registry) -> uvicorn.Config:
    """uvicorn's settings, loaded: the certificate is read here. Raises: ConfigError if it cannot be used."""
    settings = uvicorn.Config(
        app,
        **guard.protocols(registry),
        interface="asgi3",
        lifespan="off",
        log_config=None,
        log_level=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        ws_max_size=64 * 1024,
        ws_per_message_deflate=False,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        ssl_certfile=config.cert,
        ssl_keyfile=config.key,
        backlog=BACKLOG,
    )
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"cert and key: {config.cert}, {config.key}: {error.strerror or error}") from None
    return settings
