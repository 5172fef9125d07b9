"""Every exception that Sandrun raises on purpose.

    SandrunError
    ├── InvalidInput            what a client sent is wrong: field, value, accepted range
    ├── NotFound                no such job, or it has been erased
    ├── Conflict                the job is not in a state in which this can be done
    ├── TooLarge                more bytes than the server takes
    ├── Overloaded              not now: queue, memory or a client's share is full
    ├── SetupError              a sandbox could not be built: step, errno, object
    ├── MissingLayer            the host lacks a protection that is required: layer, fix
    ├── ConfigError             a setting is wrong: key, value, origin
    ├── ProtocolError           the other end of a socket broke the table of messages
    └── ServerError             (SDK) the server refused or failed: status, its error object

What a *job* did is never an exception: see `sandrun.model.Outcome`.
"""

from __future__ import annotations


class SandrunError(Exception):
    """The root of the tree; catching it catches all that Sandrun raises on purpose."""


class InvalidInput(SandrunError):
    """Something a client sent is refused.

    Attributes:
        field: the manifest key, archive member or parameter, as the client would write it.
        details: one sentence: the value met and what is accepted.
    """

    def __init__(self, field: str, details: str) -> None:
        super().__init__(f"{field}: {details}")
        self.field = field
        self.details = details


class NotFound(SandrunError):
    """No such job. It never was, or it has been erased: the two are not told apart."""


class Conflict(SandrunError):
    """The job is not in a state in which this can be done."""


class TooLarge(SandrunError):
    """More bytes than the server takes.

    Attributes:
        limit_bytes: the most that would have been taken.
    """

    def __init__(self, what: str, limit_bytes: int) -> None:
        super().__init__(f"{what} is larger than {limit_bytes} bytes")
        self.field = what
        self.limit_bytes = limit_bytes


class Overloaded(SandrunError):
    """Not now.

    Attributes:
        retry_after_seconds: when it is worth another try.
        client_at_fault: True if this client's own share is full (429), False if the server's is (503).
    """

    def __init__(self, reason: str, *, retry_after_seconds: int, client_at_fault: bool) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds
        self.client_at_fault = client_at_fault


class SetupError(SandrunError):
    """A sandbox could not be built.

    Attributes:
        step: a name out of `sandbox.steps`, or of the spawner's own steps.
        errno: the kernel's answer, 0 if it was not the kernel.
    """

    def __init__(self, step: str, errno: int, details: str) -> None:
        super().__init__(f"{step}: {details}")
        self.step = step
        self.errno = errno
        self.details = details


class MissingLayer(SandrunError):
    """A protection that is required cannot be had on this host.

    Attributes:
        layer: a name that `--allow-missing` takes.
        fix: what the operator can do about it, a command where one exists.
    """

    def __init__(self, layer: str, details: str, fix: str) -> None:
        super().__init__(f"{layer}: {details}. {fix}")
        self.layer = layer
        self.details = details
        self.fix = fix


class ConfigError(SandrunError):
    """A setting is wrong; the message names the key, the value, where it came from and what is accepted."""


class ProtocolError(SandrunError):
    """The other end of a socket sent what is not in the table of messages. The connection is given up."""


class ServerError(SandrunError):
    """The server answered with an error (SDK).

    Attributes:
        status: the HTTP status.
        problem: the error object, `{"error", "details", "field"?, "retry_after"?}`.
    """

    def __init__(self, status: int, problem: dict[str, object]) -> None:
        super().__init__(f"{status}: {problem.get('details') or problem.get('error')}")
        self.status = status
        self.problem = problem
