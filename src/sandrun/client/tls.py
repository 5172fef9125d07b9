"""Which certificates a client trusts."""

from __future__ import annotations

import os
import ssl

from sandrun.errors import ConfigError
from sandrun.model import show


def context_for(url: str, ca: str | None) -> ssl.SSLContext:
    """Trusts the file `ca` (else SANDRUN_CA) alone if there is one, else the system's authorities.

    Raises: ConfigError if it cannot be read.
    """
    ca = ca or os.environ.get("SANDRUN_CA")
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, is made 20 ms faster, and is never used
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"the certificate file {show(ca, 200)} cannot be used: {error.strerror or error}") from None
