"""Neighbour discovery messages and options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.addr import packed
from passt.wire import ether, ndp
from passt.wire.cursor import Cursor, Malformed
from passt.wire.ndp import (
    Dnssl,
    LinkAddress,
    Mtu,
    NeighbourAdvertisement,
    NeighbourSolicitation,
    Prefix,
    Rdnss,
    RouterAdvertisement,
    RouterSolicitation,
)
from tests.unit.oracle import dissect, recomputed

MAC = bytes.fromhex("9a559a559a55")
GUEST_MAC = bytes.fromhex("525400123456")
TARGET = packed("fe80::1")

NS = "87000000 00000000 fe800000000000000000000000000001"
SOURCE_LL = "0101 525400123456"
TARGET_LL = "0201 9a559a559a55"
RA = "86000000 40 40 0708 00007530 000003e8"
PREFIX = "0304 40 c0 ffffffff ffffffff 00000000 20010db8000000000000000000000000"
MTU = "0501 0000 0000fff0"
RDNSS = "1903 0000 ffffffff 20010db8000000000000000000000053"
DNSSL = "1f03 0000 ffffffff 076578616d706c6503636f6d00 000000"

SOURCE = LinkAddress(LinkAddress.SOURCE, GUEST_MAC)
OPTIONS: dict[str, ndp.Option] = {  # of a router advertisement
    SOURCE_LL: SOURCE,
    PREFIX: Prefix(packed("2001:db8::"), 64),
    MTU: Mtu(65520),
    RDNSS: Rdnss((packed("2001:db8::53"),)),
    DNSSL: Dnssl(("example.com",)),
}

MESSAGES = {
    "85000000 00000000": RouterSolicitation(),
    "85000000 00000000" + SOURCE_LL: RouterSolicitation((SOURCE,)),
    "86000000 ff 80 ffff 00000000 00000000" + "".join(OPTIONS): RouterAdvertisement(
        255, RouterAdvertisement.MANAGED, 65535, tuple(OPTIONS.values())
    ),
    RA: RouterAdvertisement(64, RouterAdvertisement.OTHER, 1800, (), 30000, 1000),
    NS: NeighbourSolicitation(TARGET),
    NS + SOURCE_LL: NeighbourSolicitation(TARGET, (SOURCE,)),
    "88000000 e0000000 fe800000000000000000000000000001" + TARGET_LL: NeighbourAdvertisement(
        NeighbourAdvertisement.ROUTER | NeighbourAdvertisement.SOLICITED | NeighbourAdvertisement.OVERRIDE,
        TARGET,
        (LinkAddress(LinkAddress.TARGET, MAC),),
    ),
}
CLASSES = RouterSolicitation, RouterAdvertisement, NeighbourSolicitation, NeighbourAdvertisement
KIND = {
    RouterSolicitation: ndp.ROUTER_SOLICITATION,
    RouterAdvertisement: ndp.ROUTER_ADVERTISEMENT,
    NeighbourSolicitation: ndp.NEIGHBOUR_SOLICITATION,
    NeighbourAdvertisement: ndp.NEIGHBOUR_ADVERTISEMENT,
}
Message = RouterSolicitation | RouterAdvertisement | NeighbourSolicitation | NeighbourAdvertisement


@pytest.mark.parametrize(("literal", "message"), MESSAGES.items())
def test_both_ways(literal: str, message: Message) -> None:
    data = bytes.fromhex(literal)
    assert type(message).parse(data) == message
    assert message.emit() == data
    assert data[0] == KIND[type(message)]


@pytest.mark.parametrize("literal", OPTIONS)
def test_options_are_multiples_of_eight(literal: str) -> None:
    data = OPTIONS[literal].emit()
    assert data == bytes.fromhex(literal)
    assert len(data) == 8 * data[1]


@pytest.mark.parametrize("message", MESSAGES.values())
def test_scapy_agrees(message: Message) -> None:
    frame = ether.icmp6_frame(GUEST_MAC, MAC, packed("fe80::1"), packed("fe80::2"), message.emit())
    assert frame == recomputed(frame)
    dissect(frame)


def test_scapy_reads_a_router_advertisement() -> None:
    message = next(m for m in MESSAGES.values() if isinstance(m, RouterAdvertisement))
    packet = dissect(ether.icmp6_frame(GUEST_MAC, MAC, packed("fe80::1"), packed("fe80::2"), message.emit()))
    ra = packet["ICMPv6ND_RA"]
    assert (ra.chlim, ra.M, ra.O, ra.routerlifetime, ra.reachabletime, ra.retranstimer) == (255, 1, 0, 65535, 0, 0)
    prefix = packet["ICMPv6NDOptPrefixInfo"]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("2001:db8::", 64, 1, 1)
    assert prefix.validlifetime == prefix.preferredlifetime == 0xFFFFFFFF
    assert packet["ICMPv6NDOptMTU"].mtu == 65520
    assert packet["ICMPv6NDOptRDNSS"].dns == ["2001:db8::53"]
    assert packet["ICMPv6NDOptRDNSS"].lifetime == 0xFFFFFFFF
    assert packet["ICMPv6NDOptDNSSL"].searchlist == ["example.com."]
    assert packet["ICMPv6NDOptSrcLLAddr"].lladdr == "52:54:00:12:34:56"


# Search list padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 40))
def test_padding_is_the_least_there_can_be(length: int) -> None:
    """`abcdef` makes 8 bytes of name: no padding at all, not 8 stray zeros that Linux takes for an option."""
    label = "a" * length
    data = Dnssl((label,)).emit()
    needed = 8 + length + 2
    assert len(data) == 8 * data[1]
    assert needed <= len(data) < needed + 8
    assert data[8 : 8 + length + 2] == bytes((length,)) + label.encode() + b"\0"
    assert RouterAdvertisement.parse(RouterAdvertisement(64, 0, 0, (Dnssl((label,)),)).emit()).options == (
        Dnssl((label,)),
    )


def test_too_long_a_list() -> None:
    with pytest.raises(ValueError, match="too long"):
        Dnssl(tuple(f"{'a' * 60}.{i:060}" for i in range(20))).emit()


# Refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("literal", "reason"),
    [
        ("", "truncated"),
        ("870000", "truncated"),
        ("87000000 00000000 fe80000000000000000000000000", "truncated"),
        ("87010000 00000000 fe800000000000000000000000000001", "type or code"),
        ("88000000 00000000 fe800000000000000000000000000001", "type or code"),
        ("87000000 00000000 ff020000000000000000000000000001", "multicast"),
        (NS + "01", "truncated"),
        (NS + "0100 525400123456", "length zero"),
        (NS + "6300", "length zero"),
        (NS + "0102 525400123456", "truncated"),
        (NS + "6302", "truncated"),
        (NS + "0e01 010203040506" * 65, "too many options"),
        (RA + "0301 40c0ffffffff", "truncated"),
        (RA + "1902 0000 ffffffff 0000000000000000", "truncated"),
        (RA + "1f02 0000 ffffffff 4000000000000000", "label type"),
        (RA + "1f02 0000 ffffffff 016100c000c00000", "compressed"),
    ],
)
def test_malformed(literal: str, reason: str) -> None:
    kind = RouterAdvertisement if literal.startswith("86") else NeighbourSolicitation
    with pytest.raises(Malformed, match=reason):
        kind.parse(bytes.fromhex(literal))


def test_as_many_options_as_there_may_be() -> None:
    nonces = bytes.fromhex("0e01 010203040506" * (ndp.OPTIONS_MAX - 1) + SOURCE_LL)
    assert NeighbourSolicitation.parse(bytes.fromhex(NS) + nonces).options == (SOURCE,)


def test_options_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of 64 KiB full of them is given up after the first few, whatever kind they are."""
    taken = 0
    take = Cursor.take

    def counted(c: Cursor, n: int) -> bytes:
        nonlocal taken
        taken += 1
        return take(c, n)

    monkeypatch.setattr(Cursor, "take", counted)
    for option in (SOURCE_LL, "0e01 010203040506", "1f01 0000 ffffffff"):
        taken = 0
        with pytest.raises(Malformed, match="too many options"):
            NeighbourSolicitation.parse(bytes.fromhex(NS + option * 8000))
        assert taken < 5 * ndp.OPTIONS_MAX


def test_names_are_no_more_than_the_message() -> None:
    """With pointers, 63 KiB of options would be 6 MiB of names, and a second and a half of work."""
    body, last = bytearray(b"\1a\0"), 0
    for _ in range(120):
        body, last = body + b"\1b" + (0xC000 | last).to_bytes(2, "big"), len(body)
    body += (0xC000 | last).to_bytes(2, "big") * ((2032 - len(body)) // 2) + b"\0"
    option = b"\x1f\xff" + bytes(6) + body
    with pytest.raises(Malformed, match="compressed"):
        RouterAdvertisement.parse(bytes.fromhex(RA) + option * 31)
    assert RouterSolicitation.parse(bytes((133,)) + bytes(7) + option * 31) == RouterSolicitation()


def test_unknown_options_are_skipped() -> None:
    nonce = "0e01 010203040506"  # RFC 3971, 5.3.2: Linux sends one in its probes for duplicates
    assert NeighbourSolicitation.parse(bytes.fromhex(NS + nonce + SOURCE_LL)).options == (SOURCE,)


@pytest.mark.parametrize("option", [TARGET_LL, PREFIX, "1f02 0000 ffffffff 4000000000000000", "0301 40c0ffffffff"])
def test_options_of_other_messages_are_skipped(option: str) -> None:
    """Even if they lie (RFC 4861, 7.1.1)."""
    assert NeighbourSolicitation.parse(bytes.fromhex(NS + option + SOURCE_LL)).options == (SOURCE,)


def test_has_link_address() -> None:
    assert ndp.has_link_address((Mtu(1500), SOURCE))
    assert not ndp.has_link_address((Mtu(1500),))


OPTION_BYTES = st.tuples(st.sampled_from([1, 2, 3, 5, 14, 25, 31]), st.integers(0, 5), st.binary(max_size=40)).map(
    lambda t: bytes(t[:2]) + t[2][: 8 * t[1] - 2 if t[1] else 0].ljust(8 * t[1] - 2 if t[1] else 0, b"\0")
)


@given(
    st.sampled_from(CLASSES),
    st.integers(0, 30),
    st.binary(max_size=64),
    st.lists(OPTION_BYTES, max_size=4).map(b"".join),
)
def test_parses_or_malformed(kind: type[Message], head: int, data: bytes, options: bytes) -> None:
    raw = bytes((KIND[kind], 0)) + data[:head].ljust(head, b"\0") + options
    try:
        message = kind.parse(raw)
    except Malformed:
        return
    assert type(message).parse(message.emit()) == message
