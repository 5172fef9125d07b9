"""The SDK: `from sandrun.client import Client`, or `AsyncClient` with the same methods.

    with Client("http://127.0.0.1:8443") as client:
        print(client.run("print('hello')").stdout)

        job = client.submit("report/", entrypoint="main.py")
        for part in client.follow(job.job_id):
            ...
        client.download(job.job_id, "outputs/")

What a job did is a value (`Result.outcome`); what the server refused is `sandrun.errors.ServerError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandrun.client.asynchronous import AsyncClient
    from sandrun.client.pack import pack_directory, pack_files
    from sandrun.client.results import LogEnd, LogPart, Logs, Result, Submitted
    from sandrun.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "Client",
    "LogEnd",
    "LogPart",
    "Logs",
    "Result",
    "Submitted",
    "pack_directory",
    "pack_files",
]
_HOMES = {
    "AsyncClient": "asynchronous",
    "Client": "synchronous",
    "pack_directory": "pack",
    "pack_files": "pack",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562): packing a directory needs no HTTP library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'results')}"), name)
