"""Which host ids a server running as root takes for itself and its sandboxes. user_namespaces(7)."""

from __future__ import annotations

from sandrun.errors import SetupError

BLOCK = 65536
"""Ids of one block: the first is api's, each further one a zygote's."""


def choose_base(wanted: int, blocks: int, *, uid_map: str | None = None) -> int:
    """First id of `blocks` blocks: `wanted` if the own map has them, else the second block of its largest part.

    A server in a container is root over a part of the host's ids only; the first block there is its users'.
    `uid_map` is the text of /proc/self/uid_map, which is read if it is not given.
    Raises: SetupError if there is no room.
    """
    if uid_map is None:
        with open("/proc/self/uid_map") as file:
            uid_map = file.read()
    need = BLOCK * blocks
    largest = (0, 0)
    for line in uid_map.splitlines():
        inside, _, count = (int(word) for word in line.split())
        if inside <= wanted and wanted + need <= inside + count:
            return wanted
        largest = max(largest, (count, inside))
    count, inside = largest
    if count < need + BLOCK:
        raise SetupError("uid range", 0, f"root here has {count} ids; {need + BLOCK} are needed (user_namespaces(7))")
    return inside + BLOCK
