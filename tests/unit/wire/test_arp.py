"""ARP packets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import ARP

from passt.addr import packed
from passt.wire.arp import REPLY, REQUEST, Packet
from passt.wire.cursor import Malformed

LITERAL = bytes.fromhex("0001 0800 06 04 0001 525400123456 c0000202 000000000000 c0000201")
PACKET = Packet(REQUEST, bytes.fromhex("525400123456"), packed("192.0.2.2"), bytes(6), packed("192.0.2.1"))


def test_both_ways() -> None:
    assert Packet.parse(LITERAL) == PACKET
    assert PACKET.emit() == LITERAL


def test_padding_of_short_frames() -> None:
    assert Packet.parse(LITERAL + bytes(18)) == PACKET


def test_scapy_agrees() -> None:
    theirs = ARP(op=REPLY, hwsrc="9a:55:9a:55:9a:55", psrc="192.0.2.1", hwdst="52:54:00:12:34:56", pdst="192.0.2.2")
    ours = Packet(REPLY, bytes.fromhex("9a559a559a55"), packed("192.0.2.1"), PACKET.sender_mac, packed("192.0.2.2"))
    assert ours.emit() == bytes(theirs)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, "0006"), (2, "86dd"), (4, "08"), (5, "10")],
    ids=["hardware", "protocol", "hlen", "plen"],
)
def test_other_kinds(position: int, value: str) -> None:
    raw = bytes.fromhex(value)
    with pytest.raises(Malformed, match="not for IPv4 over Ethernet"):
        Packet.parse(LITERAL[:position] + raw + LITERAL[position + len(raw) :])


@given(st.binary(max_size=64) | st.binary(min_size=20, max_size=20).map(lambda b: LITERAL[:8] + b))
def test_parses_or_malformed(data: bytes) -> None:
    try:
        packet = Packet.parse(data)
    except Malformed:
        assert data[:6] != LITERAL[:6] or len(data) < len(LITERAL)
    else:
        assert packet.emit() == data[: len(LITERAL)]
