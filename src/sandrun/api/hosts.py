"""Whom a request means to talk to, and from which page it comes: against DNS rebinding and other sites' forms.

A page of another site can have a browser connect here under a name of its own (rebinding): so Host must be an IP
literal, localhost or a configured name. It can also have the browser post a form or open a WebSocket without rebinding:
browsers then send Origin, which must name the same host.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from starlette.types import Scope

from sandrun.api.problems import Refused

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{0,5})?\Z")
_ORIGIN = re.compile(rb"[a-z][a-z0-9+.-]*://([^/]*)\Z")
_SAFE = ("GET", "HEAD", "OPTIONS")


class Hosts:
    """The names that this server answers to."""

    def __init__(self, names: frozenset[str]) -> None:
        """`names` in lower case, without a port."""
        self._names = names
        self.host_of = lru_cache(maxsize=256)(_host_of)
        self.is_ours = lru_cache(maxsize=256)(self._is_ours)

    def check(self, scope: Scope) -> None:
        """Raises: Refused 421 for a Host that is not ours, 403 for a page of another host that asks for an effect."""
        host = origin = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
        if host is not None and not self.is_ours(host):
            details = "this server is not known by that name; the operator can add it with --hostname"
            raise Refused(421, "unknown_host", details, field="Host")
        if origin is not None and (scope["type"] == "websocket" or scope["method"] not in _SAFE):
            match = _ORIGIN.match(origin)
            if match is None or host is None or self.host_of(match[1]) != self.host_of(host):
                details = "a page of another origin may not do this"
                raise Refused(403, "foreign_origin", details, field="Origin")

    def _is_ours(self, header: bytes) -> bool:
        host = _host_of(header)
        if host is None:
            return False
        if host == "localhost" or host in self._names:
            return True
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True


def _host_of(header: bytes) -> str | None:
    """The host of `host[:port]` in lower case; None for what is no host."""
    match = _HOST.match(header)
    return match[1].decode().lower().rstrip(".") if match else None
