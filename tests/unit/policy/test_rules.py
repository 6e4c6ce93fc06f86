"""Rules as values: where a port leads, which rules get in each other's way, what a rule is called."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.conf.ports import parse_spec
from passt.policy.rules import Listener, Rule, conflict
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

LO4, LO6 = addr.LOOPBACK4, addr.LOOPBACK6
HOST4 = addr.packed("192.0.2.1")
BASE = Rule("-t 80-89:8080-8089", PROTO_TCP, False, 80, 89, 8080)


def test_where_ports_lead() -> None:
    assert [BASE.target_port(port) for port in (80, 85, 89)] == [8080, 8085, 8089]
    assert list(BASE.ports) == list(range(80, 90))


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        ({}, {}, range(80, 90)),
        ({}, {"first": 85, "last": 95}, range(85, 90)),
        ({}, {"first": 90, "last": 95}, range(0)),
        ({}, {"proto": PROTO_UDP}, range(0)),
        ({}, {"outbound": True}, range(0)),
        ({}, {"to": 1}, range(80, 90)),
        ({}, {"addr": LO4}, range(80, 90)),  # any address is also that one
        ({"addr": addr.ANY4}, {"addr": LO4}, range(80, 90)),
        ({"addr": LO4}, {"addr": LO4}, range(80, 90)),
        ({"addr": LO4}, {"addr": HOST4}, range(0)),
        ({"addr": LO4}, {"addr": LO6}, range(0)),
        ({"addr": addr.ANY4}, {"addr": addr.ANY6}, range(0)),  # IPv6 sockets with an address take IPv6 only
        ({"ifname": "eth0"}, {"ifname": "eth1"}, range(0)),
        ({"ifname": "eth0"}, {"ifname": "eth0"}, range(80, 90)),
        ({}, {"ifname": "eth0"}, range(80, 90)),
        ({"addr": LO4, "ifname": "lo"}, {"addr": LO4}, range(80, 90)),
    ],
)
def test_overlaps(a: dict[str, object], b: dict[str, object], common: range) -> None:
    one, other = replace(BASE, **a), replace(BASE, **b)  # type: ignore[arg-type]
    assert one.overlaps(other) == other.overlaps(one) == common


@pytest.mark.parametrize(
    "text",
    [
        "-t 80-89:8080-8089",
        "-u 53",
        "-T 5432:192.0.2.1",
        "-U 1-2:192.0.2.1/3-4",
        "-t 0.0.0.0/80",
        "-t [::]/8080:80",
        "-t 127.0.0.1%lo/80:[2001:db8::1]/81",
        "-t %eth0/1-65535",
        "-t auto",
        "-t %eth0/auto",
        "-u auto,80-89",
        "-t auto,8080:80",
    ],
)
def test_spec_is_what_is_parsed(text: str) -> None:
    (rule,) = parse_spec(text[1], text[3:])
    assert rule.spec == text


@given(*(st.integers(0, 65535) for _ in range(4)))
def test_overlap_is_what_both_have(a: int, b: int, c: int, d: int) -> None:
    one = replace(BASE, first=min(a, b), last=max(a, b))
    other = replace(BASE, first=min(c, d), last=max(c, d))
    common = one.overlaps(other)
    for port in (a, b, c, d, 0, 65535):
        assert (port in common) == (port in one.ports and port in other.ports)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "TCP * 80-89 -> 8080-8089"),
        ({"last": 80}, "TCP * 80 -> 8080"),
        ({"proto": PROTO_UDP, "addr": LO4, "ifname": "lo"}, "UDP [127.0.0.1]%lo 80-89 -> 8080-8089"),
        ({"addr": LO6, "last": 80, "target": HOST4}, "TCP [::1] 80 -> [192.0.2.1] 8080"),
        ({"auto": True, "ifname": "eth0"}, "TCP auto *%eth0 80-89 -> 8080-8089"),
    ],
)
def test_text(changes: dict[str, object], text: str) -> None:
    assert str(replace(BASE, **changes)) == text  # type: ignore[arg-type]


def test_listener() -> None:
    with socket.socket() as s:
        listener = Listener(BASE, 85, s)
        assert (listener.port, listener.to, listener.fd, listener.index) == (85, 8085, s.fileno(), -1)


WIDTHS = [
    (None, None),
    (None, "eth0"),
    (addr.packed("192.0.2.1"), None),
    (addr.packed("192.0.2.1"), "eth0"),
    (addr.ANY4, None),
    (addr.ANY4, "eth0"),
]


@pytest.mark.parametrize("one", WIDTHS)
@pytest.mark.parametrize("other", WIDTHS)
def test_narrow_and_wide_rules_conflict_in_either_order(
    one: tuple[bytes | None, str | None], other: tuple[bytes | None, str | None]
) -> None:
    """One address, any of its family, any; with an interface and without."""
    a, b = (
        Rule("-t x", PROTO_TCP, False, first, first + 10, first, addr=address, ifname=name)
        for first, (address, name) in ((80, one), (85, other))
    )
    assert conflict([a, b]) == conflict([b, a]) == (a, b)
    assert conflict([a, replace(b, first=91, last=99)]) is None


def test_a_rule_of_another_family_does_not_hide_a_conflict() -> None:
    """It has the highest port of all addresses, and is none of the addresses of IPv4."""
    narrow, other, wide = (
        Rule("-t x", PROTO_TCP, False, first, last, first, addr=address)
        for first, last, address in (
            (80, 90, addr.packed("192.0.2.1")),
            (81, 100, addr.packed("2001:db8::1")),
            (85, 95, addr.ANY4),
        )
    )
    assert conflict([narrow, other, wide]) == (narrow, wide)
