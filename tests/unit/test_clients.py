"""Who a client is cannot be changed by what a client controls."""

from __future__ import annotations

import pytest

from sandrun.errors import InvalidInput
from sandrun.jobs.clients import Clients, network_of


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_client_is_an_ipv4_address_or_an_ipv6_64(address: str, network: str):
    assert network_of(address) == network


@pytest.mark.requirement(25)
def test_another_address_of_the_same_64_is_the_same_client():
    clients = Clients()
    assert clients.identify("2001:db8:1:2::1") == clients.identify("2001:db8:1:2:ffff::9")
    assert clients.identify("2001:db8:1:2::1") != clients.identify("2001:db8:1:3::1")


def test_ipv4_clients_of_a_dual_stack_socket_are_told_apart():
    clients = Clients()
    assert clients.identify("::ffff:192.0.2.7").tag != clients.identify("::ffff:192.0.2.8").tag
    assert clients.identify("::ffff:192.0.2.7") == clients.identify("192.0.2.7")


def test_tag_is_64_bits_and_cannot_be_computed_without_the_key():
    tag = Clients(b"k" * 16).identify("192.0.2.7").tag
    assert 0 <= tag < 1 << 64
    assert tag == Clients(b"k" * 16).identify("192.0.2.7").tag
    assert tag != Clients(b"K" * 16).identify("192.0.2.7").tag


@pytest.mark.parametrize("address", ["", "localhost", "192.0.2.7:80", "192.0.2", "1.2.3.4, 5.6.7.8", "\x00"])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(InvalidInput, match="is not an IP address"):
        network_of(address)
