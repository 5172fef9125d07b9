"""How jobs of this run begin: the tier `cold` would be the tier `escape` again if its servers parked sandboxes."""

from __future__ import annotations

import os

from tests import serving
from tests.serving import Api, Server


def test_sandboxes_are_parked_or_not_as_the_tier_says(api: Api, running_server: Server) -> None:
    cold = "--parked-share 0" in os.environ.get(serving.FLAGS, "")
    assert api.run("print(1)")["stdout"] == "1\n"
    assert serving.wait_until(lambda: bool(running_server.sandboxes()) != cold, 10)
