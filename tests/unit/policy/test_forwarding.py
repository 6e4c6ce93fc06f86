"""Address translation, as tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passt.addr import packed
from passt.policy.config import Config, Ip4, Ip6
from passt.policy.forwarding import Forwarding
from passt.policy.settings import Settings

IP4 = Ip4(
    addr=packed("192.0.2.2"),
    prefix_len=24,
    gateway=packed("192.0.2.1"),
    our_addr=packed("192.0.2.1"),
    map_host_loopback=packed("192.0.2.1"),
    map_guest_addr=packed("192.0.2.9"),
    addr_out=packed("203.0.113.7"),
    if_out="eth1",
)
IP6 = Ip6(
    addr=packed("2001:db8::2"),
    prefix_len=64,
    gateway=packed("fe80::1"),
    our_ll=packed("fe80::1"),
    map_host_loopback=packed("fe80::1"),
    map_guest_addr=packed("2001:db8::9"),
    addr_out=packed("2001:db8:1::7"),
)
CONFIG = Config(ip4=IP4, ip6=IP6, scope_id=3)


@pytest.mark.parametrize(
    ("dst", "target"),
    [
        ("192.0.2.1", "127.0.0.1"),
        ("192.0.2.9", "192.0.2.2"),
        ("192.0.2.2", "192.0.2.2"),
        ("198.51.100.1", "198.51.100.1"),
        ("fe80::1", "::1"),
        ("2001:db8::9", "2001:db8::2"),
        ("2001:db8:2::1", "2001:db8:2::1"),
    ],
)
def test_outbound(dst: str, target: str) -> None:
    assert Forwarding(Settings(CONFIG)).outbound(packed(dst)) == packed(target)


def test_the_addresses_in_force_count() -> None:
    settings = Settings(CONFIG)
    fwd = Forwarding(settings)
    settings.replace(replace(CONFIG, ip4=replace(IP4, addr=packed("192.0.2.3")), ip6=None, scope_id=4), 0.0)
    assert fwd.outbound(packed("192.0.2.9")) == packed("192.0.2.3")
    assert fwd.family(packed("::1")) is None
    assert fwd.scope(packed("fe80::2")) == 4


def test_nothing_mapped() -> None:
    plain = replace(IP4, map_host_loopback=None, map_guest_addr=None)
    fwd = Forwarding(Settings(replace(CONFIG, ip4=plain)))
    for dst in ("192.0.2.1", "192.0.2.9", "192.0.2.53"):
        assert fwd.outbound(packed(dst)) == packed(dst)


def test_no_address_to_map_to() -> None:
    fwd = Forwarding(Settings(replace(CONFIG, ip6=replace(IP6, addr=None))))
    assert fwd.outbound(packed("2001:db8::9")) == packed("2001:db8::9")


def test_family_off() -> None:
    fwd = Forwarding(Settings(replace(CONFIG, ip4=None)))
    assert fwd.family(packed("192.0.2.1")) is None
    assert fwd.family(packed("::1")) is CONFIG.ip6
    assert fwd.outbound(packed("192.0.2.1")) == packed("192.0.2.1")
    assert fwd.source(packed("192.0.2.1")) == (None, None)


@pytest.mark.parametrize(
    ("target", "address", "interface"),
    [
        ("198.51.100.1", "203.0.113.7", "eth1"),
        ("127.0.0.1", None, None),
        ("2001:db8:2::1", "2001:db8:1::7", None),
        ("::1", None, None),
    ],
)
def test_source(target: str, address: str | None, interface: str | None) -> None:
    assert Forwarding(Settings(CONFIG)).source(packed(target)) == (packed(address) if address else None, interface)


@pytest.mark.parametrize(
    ("address", "sockaddr"),
    [
        ("192.0.2.1", ("192.0.2.1", 80)),
        ("2001:db8::1", ("2001:db8::1", 80, 0, 0)),
        ("fe80::2", ("fe80::2", 80, 0, 3)),
        ("ff02::1", ("ff02::1", 80, 0, 3)),
        ("ff01::1", ("ff01::1", 80, 0, 3)),
        ("ff05::1", ("ff05::1", 80, 0, 0)),
    ],
)
def test_sockaddr(address: str, sockaddr: tuple[object, ...]) -> None:
    assert Forwarding(Settings(CONFIG)).sockaddr(packed(address), 80) == sockaddr
