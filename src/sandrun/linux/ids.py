"""Which host ids a server running as root takes for itself and its sandboxes. user_namespaces(7)."""

from __future__ import annotations

import fcntl
import os
import struct

from sandrun.errors import SetupError

BLOCK = 65536
"""Ids of one block: the first is api's, each further one a zygote's."""

SERVERS, STRIDE = 32, 64 * BLOCK
"""How many servers of one host have ids of their own, and how many ids each. All end below 2^31."""
CLAIMS = "/run/sandrun.ids"
"""Byte n is locked by the server whose ids begin n strides above the first. It lies in RAM and has no content."""
_FLOCK = struct.Struct("hhqqixxxx")


def claim(first: int) -> tuple[int, int]:
    """Take a range of ids that no other server on this host has.

    Returns: its first id, and the descriptor that holds the claim until it and its copies are closed, fcntl(2) "Open
        file description locks".
    Raises: SetupError if all are taken.
    """
    descriptor = os.open(CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    for number in range(SERVERS):
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
        except BlockingIOError:
            continue
        return first + number * STRIDE, descriptor
    os.close(descriptor)
    raise SetupError("uid range", 0, f"{SERVERS} servers run on this host, and have all ranges of ids")


def are_mapped(first: int, count: int, *, uid_map: str | None = None) -> bool:
    """Whether this user namespace has the ids from `first` on; `uid_map` as for `choose_base`."""
    return any(inside <= first and first + count <= inside + length for inside, length in _parts(uid_map))


def choose_base(wanted: int, blocks: int, *, uid_map: str | None = None) -> int:
    """First id of `blocks` blocks: `wanted` if the own map has them, else the second block of its largest part.

    A server in a container is root over a part of the host's ids only; the first block there is its users'.
    `uid_map` is the text of /proc/self/uid_map, which is read if it is not given.
    Raises: SetupError if there is no room.
    """
    need = BLOCK * blocks
    if are_mapped(wanted, need, uid_map=uid_map):
        return wanted
    count, inside = max(((length, inside) for inside, length in _parts(uid_map)), default=(0, 0))
    if count < need + BLOCK:
        raise SetupError("uid range", 0, f"root here has {count} ids; {need + BLOCK} are needed (user_namespaces(7))")
    return inside + BLOCK


def _parts(uid_map: str | None) -> list[tuple[int, int]]:
    """First id and length of each line."""
    if uid_map is None:
        with open("/proc/self/uid_map") as file:
            uid_map = file.read()
    return [(int(words[0]), int(words[2])) for words in map(str.split, uid_map.splitlines())]
