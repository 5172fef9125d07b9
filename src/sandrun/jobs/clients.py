"""Who is asking: one IPv4 address, or one IPv6 /64, which a single host commonly has all of (requirement 25)."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from sandrun.errors import InvalidInput
from sandrun.model import show


@dataclass(frozen=True, slots=True)
class Client:
    """A client as bounds and budgets know it.

    Attributes:
        network: `192.0.2.7` or `2001:db8:1:2::/64`: for events that an operator acts on, never for the spawner.
        tag: 64 bits, all that the spawner is told; without the key nobody gets the address back out of it.
    """

    network: str
    tag: int


class Clients:
    """Makes clients out of addresses."""

    def __init__(self, key: bytes | None = None) -> None:
        """`key` has 16 to 64 bytes; a restarted server that is given the same one knows its clients again."""
        self._key = os.urandom(16) if key is None else key
        self.identify = lru_cache(maxsize=4096)(self._identify)

    def _identify(self, address: str) -> Client:
        """The client behind `address`, an IP literal, with or without a zone (`fe80::1%eth0`).

        Raises: InvalidInput if it is none.
        """
        network = network_of(address)
        digest = blake2b(network.encode(), digest_size=8, key=self._key).digest()
        return Client(network, int.from_bytes(digest, "big"))


def network_of(address: str) -> str:
    """The part of `address` that a client cannot change at will: all of IPv4, the first 64 bits of IPv6.

    IPv4 inside IPv6 (`::ffff:192.0.2.7`, RFC 4291 2.5.5.2) is IPv4: a dual-stack socket shows every IPv4 client so, and
    they would all share one /64.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        raise InvalidInput("client address", f"{show(address)} is not an IP address") from None
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64"
