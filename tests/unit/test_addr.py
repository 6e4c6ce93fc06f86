"""Addresses as packed bytes."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr

ADDRESSES = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)


@given(ADDRESSES)
def test_ipaddress_agrees(a: bytes) -> None:
    theirs = ipaddress.ip_address(a)
    assert addr.is_multicast(a) == theirs.is_multicast
    assert addr.is_link_local(a) == theirs.is_link_local
    assert addr.is_unspecified(a) == theirs.is_unspecified
    assert addr.packed(addr.text(a)) == a
    assert ipaddress.ip_address(addr.text(a)) == theirs
    assert addr.family(a) == (socket.AF_INET if theirs.version == 4 else socket.AF_INET6)


@pytest.mark.parametrize(
    ("text", "loopback", "link_local", "multicast", "unicast"),
    [
        ("127.0.0.1", True, False, False, True),
        ("127.255.0.9", True, False, False, True),
        ("128.0.0.1", False, False, False, True),
        ("169.254.1.1", False, True, False, True),
        ("169.255.1.1", False, False, False, True),
        ("224.0.0.1", False, False, True, False),
        ("239.255.255.255", False, False, True, False),
        ("240.0.0.1", False, False, False, True),
        ("255.255.255.255", False, False, False, False),
        ("0.0.0.0", False, False, False, False),
        ("::1", True, False, False, True),
        ("::2", False, False, False, True),
        ("::ffff:127.0.0.1", True, False, False, True),
        ("::ffff:192.0.2.1", False, False, False, True),
        ("fe80::1", False, True, False, True),
        ("febf::1", False, True, False, True),
        ("fec0::1", False, False, False, True),
        ("ff02::1", False, False, True, False),
        ("::", False, False, False, False),
    ],
)
def test_kinds(text: str, loopback: bool, link_local: bool, multicast: bool, unicast: bool) -> None:
    a = addr.packed(text)
    assert (addr.is_loopback(a), addr.is_link_local(a)) == (loopback, link_local)
    assert (addr.is_multicast(a), addr.is_unicast(a)) == (multicast, unicast)


@pytest.mark.parametrize(
    ("text", "martian"),
    [
        ("127.0.0.1", True),
        ("127.255.255.255", True),
        ("126.255.255.255", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", True),
        ("::2", False),
        ("::", False),
        ("::ffff:127.0.0.1", True),
        ("::ffff:0.0.0.0", True),
        ("::ffff:192.0.2.1", True),
        ("::fffe:127.0.0.1", False),
        ("ff02::1", False),
    ],
)
def test_martians(text: str, martian: bool) -> None:
    assert addr.is_martian(addr.packed(text)) == martian


def test_constants() -> None:
    names = {
        "0.0.0.0": addr.ANY4,
        "::": addr.ANY6,
        "255.255.255.255": addr.BROADCAST4,
        "127.0.0.1": addr.LOOPBACK4,
        "::1": addr.LOOPBACK6,
        "ff02::1": addr.ALL_NODES6,
    }
    for text, packed in names.items():
        assert addr.packed(text) == packed


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1::2::3", "example.com", "fe80::1%0", " 1.2.3.4"]
)
def test_not_an_address(text: str) -> None:
    with pytest.raises(ValueError, match="not an IP address"):
        addr.packed(text)


def test_texts() -> None:
    assert addr.host_port(addr.packed("192.0.2.1"), 80) == "192.0.2.1:80"
    assert addr.host_port(addr.packed("2001:db8::1"), 443) == "[2001:db8::1]:443"
    assert addr.mac_text(bytes.fromhex("9a559a559a0b")) == "9a:55:9a:55:9a:0b"


@pytest.mark.parametrize("length", range(33))
def test_netmask(length: int) -> None:
    assert addr.text(addr.netmask(length)) == str(ipaddress.ip_network(f"0.0.0.0/{length}").netmask)


@given(
    st.integers(0, 32).flatmap(lambda n: st.tuples(st.just(n), *[st.binary(min_size=4, max_size=4)] * 2))
    | st.integers(0, 128).flatmap(lambda n: st.tuples(st.just(n), *[st.binary(min_size=16, max_size=16)] * 2)),
    st.booleans(),
)
def test_in_subnet(case: tuple[int, bytes, bytes], near: bool) -> None:
    length, a, net = case
    if near:  # else hardly any random pair shares a prefix
        a = net[:-1] + a[-1:]
    theirs = ipaddress.ip_network((net, length), strict=False)
    assert addr.in_subnet(a, net, length) == (ipaddress.ip_address(a) in theirs)
