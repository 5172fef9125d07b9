"""`sandrun`, but that the number of parked sandboxes is what a file says, now and whenever it changes.

    pinned_pool.py FILE serve --port N …

For two measurements that demand would spoil: what a job costs when none is parked, and what a parked one weighs.
"""

from __future__ import annotations

import sys
from typing import Any

LOOK_SECONDS = 0.02


def pin(path: str) -> None:
    from sandrun.spawner import tenant

    def refill(self: Any) -> None:
        self._refill_timer = None
        if self.server.stopping or not self.warm or self.withdrawn or self.name:
            return
        with open(path) as file:
            wanted = int(file.read() or 0)
        have = len(self._ready) + len(self._building)
        if have < wanted and not self.queue and not self._building:
            self._build(tenant.DEFAULT_MEMORY_BYTES)
        elif have > wanted and self._ready:
            self._ready.popleft().kill()
        refill_soon(self)

    def refill_soon(self: Any, seconds: float = LOOK_SECONDS) -> None:
        if self._refill_timer is None:
            self._refill_timer = self.server.loop.after(LOOK_SECONDS, self._refill)

    for name, function in (("_refill", refill), ("refill_soon", refill_soon)):
        assert hasattr(tenant.Tenant, name)
        setattr(tenant.Tenant, name, function)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are not to be found by their short names
    pin(sys.argv.pop(1))
    from sandrun.cli.main import main

    sys.exit(main())
