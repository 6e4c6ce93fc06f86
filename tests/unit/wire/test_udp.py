"""UDP datagrams."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from passt.addr import packed
from passt.wire import udp

SRC4, DST4 = packed("192.0.2.1"), packed("192.0.2.2")
SRC6, DST6 = packed("2001:db8::1"), packed("2001:db8::2")

DATAGRAM4 = bytes.fromhex("0035 8000 000c 13c3 74657374")


def test_literal() -> None:
    assert udp.datagram(SRC4, DST4, 53, 0x8000, b"test") == DATAGRAM4
    assert udp.HEADER.unpack(DATAGRAM4[:8]) == (53, 0x8000, 12, 0x13C3)


@given(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=64))
def test_scapy_agrees(sport: int, dport: int, payload: bytes) -> None:
    four = bytes(IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=sport, dport=dport) / payload)[20:]
    six = bytes(IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(sport=sport, dport=dport) / payload)[40:]
    assert udp.datagram(SRC4, DST4, sport, dport, payload) == four
    assert udp.datagram(SRC6, DST6, sport, dport, payload) == six


def test_zero_means_none_and_is_never_sent() -> None:
    """A sum of all ones has the checksum 0, which is transmitted as its other representation (RFC 768)."""
    base = udp.datagram(SRC4, DST4, 1, 2, b"\0\0")
    payload = base[6:8]  # adding the checksum to the sum makes it 0xffff
    assert udp.datagram(SRC4, DST4, 1, 2, payload)[6:8] == b"\xff\xff"
