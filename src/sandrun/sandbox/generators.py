"""Generators of random numbers that modules made while a zygote loaded them.

All jobs of the zygote have them in the same state, and would draw the same numbers: each seeds them anew.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

CHANCE = 1 << 64
"""numpy draws 128 bits where it is given no seed; a seed below this one is somebody's choice, and stays."""

_renewals: list[Callable[[], object]] = []


def find() -> None:
    """Look for them, in the zygote, while its objects are not frozen: gc.get_objects passes over those.

    Of a `random.Random` nobody can tell whether it was given a seed: it is taken for one that was not.
    """
    random, numpy = sys.modules.get("random"), sys.modules.get("numpy.random")
    kinds: tuple[type[Any], ...] = (random.Random,) if random is not None else ()
    bits: tuple[type[Any], ...] = (numpy.BitGenerator,) if numpy is not None else ()
    for found in gc.get_objects():
        kind = type(found)  # isinstance would ask the object, and wake a lazy one
        if issubclass(kind, kinds):
            _renewals.append(found.seed)
        elif issubclass(kind, bits) and _drawn(found):
            _renewals.append(_renewal(found))
    if numpy is not None:
        _renewals.append(numpy.seed)
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None:
        _renewals.append(lambda: setattr(processes.current_process(), "authkey", os.urandom(32)))


def renew() -> None:
    """Seed them from the kernel's generator, in a job's process."""
    for renewal in _renewals:
        renewal()


def _drawn(bits: Any) -> bool:
    sequence = getattr(bits, "seed_seq", None) or getattr(bits, "_seed_seq", None)
    entropy = getattr(sequence, "entropy", None)
    return isinstance(entropy, int) and entropy >= CHANCE


def _renewal(bits: Any) -> Callable[[], object]:
    return lambda: setattr(bits, "state", type(bits)().state)
