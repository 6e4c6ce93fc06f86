"""Frames of the control plane."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from passt import addr
from passt.wire import ether
from tests.unit.oracle import dissect, recomputed

GUEST, OURS = bytes.fromhex("525400123456"), bytes.fromhex("9a559a559a55")
SRC4, DST4 = addr.packed("192.0.2.1"), addr.packed("192.0.2.2")
SRC6, DST6 = addr.packed("fe80::1"), addr.packed("fe80::2")

UDP4 = bytes.fromhex("525400123456 9a559a559a55 08004500001e00000000ff1137cb c0000201 c00002020009 000a 000a 135a 6869")
ECHO6 = bytes.fromhex(
    "525400123456 9a559a559a55 86dd"
    "60000000 0008 3a ff fe800000000000000000000000000001 fe800000000000000000000000000002"
    "8000 7db5 0001 0502"
)


def test_header() -> None:
    assert ether.HEADER.unpack(UDP4[:14]) == (GUEST, OURS, ether.TYPE_IPV4)
    assert ether.HEADER.pack(GUEST, OURS, ether.TYPE_IPV6) == ECHO6[:14]


def test_udp4() -> None:
    frame = ether.udp_frame(GUEST, OURS, SRC4, DST4, 9, 10, b"hi")
    assert frame == UDP4 == recomputed(UDP4)


def test_udp6() -> None:
    frame = ether.udp_frame(GUEST, OURS, SRC6, DST6, 1, 2, b"hello", flow_label=0x54321)
    assert frame == recomputed(frame)
    packet = dissect(frame.replace(b"hello", b""))
    assert (packet.src, packet.dst, packet.type) == ("9a:55:9a:55:9a:55", "52:54:00:12:34:56", 0x86DD)
    assert (packet["IPv6"].src, packet["IPv6"].dst, packet["IPv6"].hlim) == ("fe80::1", "fe80::2", 255)
    assert packet["IPv6"].fl == 0x54321
    assert (packet["UDP"].sport, packet["UDP"].dport, packet["UDP"].len) == (1, 2, 13)


def test_icmp6() -> None:
    frame = ether.icmp6_frame(GUEST, OURS, SRC6, DST6, bytes.fromhex("8000000000010502"))
    assert frame == ECHO6 == recomputed(ECHO6)


@pytest.mark.parametrize(
    ("group", "mac"), [("ff02::1", "33:33:00:00:00:01"), ("ff02::1:ff12:3456", "33:33:ff:12:34:56")]
)
def test_multicast_mac(group: str, mac: str) -> None:
    assert addr.mac_text(ether.multicast_mac(addr.packed(group))) == mac


@given(st.booleans(), st.binary(max_size=300), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
@example(True, b"\xa0\x80\0\0", 464, 464)  # of Kerberos, whose lengths scapy writes another way
@example(False, b"", 53, 53)
def test_any_datagram(v4: bool, payload: bytes, sport: int, dport: int) -> None:
    """As scapy would have built it, checksums and lengths."""
    src, dst = (SRC4, DST4) if v4 else (SRC6, DST6)
    frame = ether.udp_frame(GUEST, OURS, src, dst, sport, dport, payload)
    assert frame == recomputed(frame)
    assert frame.endswith(payload)
