"""What the server listens on."""

from __future__ import annotations

import socket

import pytest

from sandrun.api import main
from sandrun.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_new_descriptors")


def close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def test_free_port_is_the_same_on_all_addresses_of_a_name() -> None:
    listeners = main.bind("localhost", 0)
    assert len({listener.getsockname()[1] for listener in listeners}) == 1
    assert "127.0.0.1" in {listener.getsockname()[0] for listener in listeners}
    close(listeners)


def test_every_address_of_ipv6_is_every_address_of_ipv4_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        with pytest.raises(ConfigError, match="cannot listen on ::"):
            main.bind("::", 0)
        return
    listeners = main.bind("::", 0)
    port = listeners[0].getsockname()[1]
    socket.create_connection(("127.0.0.1", port), timeout=2).close()
    socket.create_connection(("::1", port), timeout=2).close()
    close(listeners)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_address_that_is_not_ours_is_refused_by_name(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        main.bind(host, 0)


def test_address_in_use_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            main.bind("127.0.0.1", port)


def test_port_can_be_bound_again_at_once() -> None:
    """A restarted server finds connections of the one before in TIME_WAIT."""
    listeners = main.bind("127.0.0.1", 0)
    port = listeners[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        listeners[0].accept()[0].close()
        connection.recv(1)
    close(listeners)
    close(main.bind("127.0.0.1", port))
