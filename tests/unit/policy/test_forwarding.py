"""Address translation, as tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from passt.addr import packed
from passt.policy.config import Config, Ip4, Ip6
from passt.policy.forwarding import WAYS_MAX, Forwarding
from passt.policy.guest import Guest
from passt.policy.rules import Rule
from passt.policy.settings import Settings
from passt.wire.checksum import PROTO_TCP

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


def test_a_resolver_may_be_on_another_link() -> None:
    """Only as a resolver: on the guest's link, another host may have its address."""
    fwd = Forwarding(Settings(replace(CONFIG, dns_scopes=((packed("fe80::2"), 7),))))
    assert [fwd.sockaddr(packed("fe80::2"), port)[3:] for port in (53, 853, 80)] == [(7,), (7,), (3,)]
    assert fwd.sockaddr(packed("fe80::3"), 53)[3:] == (3,)


def test_a_way_is_found_once_and_again_after_a_change() -> None:
    settings = Settings(CONFIG)
    fwd = Forwarding(settings)
    target = packed("198.51.100.1")
    way = fwd.way(target)
    assert fwd.way(target) is way and (way.source, way.interface, way.own) == (packed("203.0.113.7"), "eth1", False)
    own = replace(IP4, addr_out=None, if_out="eth2", host_addr=target)
    settings.replace(replace(CONFIG, ip4=own), 0.0)
    assert (fwd.way(target).source, fwd.way(target).interface, fwd.way(target).own) == (None, None, True)
    assert fwd.source(packed("198.51.100.2")) == (None, "eth2")


def test_ways_are_kept_for_some_addresses() -> None:
    fwd = Forwarding(Settings(CONFIG))
    for i in range(3 * WAYS_MAX):
        fwd.way(bytes((10, 0, i >> 8, i & 0xFF)))
        assert 0 < len(fwd._ways) <= WAYS_MAX


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


# Loopback to loopback -------------------------------------------------------------------------------------------------

IN = Rule("-t 80", PROTO_TCP, False, 80, 80, 80)
OUT = replace(IN, option="-T 80", outbound=True)
GUEST = Guest(addr4=packed("192.0.2.2"), addr6=packed("2001:db8::2"))
LOOPBACKS = ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("rule", "guest", "config", "targets"),
    [
        (IN, GUEST, {}, ["192.0.2.2", "2001:db8::2"]),
        (IN, Guest(addr4=GUEST.addr4), {}, ["192.0.2.2"]),
        (IN, Guest(addr6=GUEST.addr6), {}, ["2001:db8::2"]),
        (IN, Guest(), {}, []),
        (IN, GUEST, {"ip4": None}, ["2001:db8::2"]),
        (IN, GUEST, {"ip6": None}, ["192.0.2.2"]),
        (IN, GUEST, {"host_lo_to_ns_lo": True}, LOOPBACKS),
        (IN, Guest(), {"splice_only": True}, LOOPBACKS),
        (IN, Guest(), {"splice_only": True, "ip6": None}, ["127.0.0.1"]),
        (OUT, Guest(), {}, LOOPBACKS),
        (OUT, GUEST, {"ip4": None, "ip6": None}, LOOPBACKS),
        (replace(IN, target=packed("198.51.100.1")), GUEST, {"host_lo_to_ns_lo": True}, ["198.51.100.1"]),
    ],
)
def test_where_a_spliced_client_is_led(rule: Rule, guest: Guest, config: dict[str, Any], targets: list[str]) -> None:
    """Its own family comes first."""
    fwd = Forwarding(Settings(replace(CONFIG, **config)))
    expected = [packed(a) for a in targets]
    assert fwd.splice_targets(False, rule, guest) == expected
    assert fwd.splice_targets(True, rule, guest) == expected[::-1]
