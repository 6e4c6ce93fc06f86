"""One line for each packet, whatever it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from passt import log
from passt.link import trace
from passt.wire.virtio import VNET

PLAIN = bytes(VNET.size)
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


@pytest.mark.parametrize(
    ("packet", "begin", "contains"),
    [
        (IP(src="192.0.2.2", dst="192.0.2.1") / TCP(sport=7, dport=80, flags="S"),
         "[192.0.2.2]:7 -> [192.0.2.1]:80 TCP 54: Ether / IP / TCP 192.0.2.2:", " S"),
        (IP(src="192.0.2.2", dst="192.0.2.1") / UDP(sport=7, dport=9) / b"x",
         "[192.0.2.2]:7 -> [192.0.2.1]:9 UDP 43: Ether / IP / UDP", "Raw"),
        (IPv6(src="2001:db8::2", dst="2001:db8::1") / TCP(sport=7, dport=80),
         "[2001:db8::2]:7 -> [2001:db8::1]:80 TCP 74: Ether / IPv6 / TCP", ""),
        (IP(src="192.0.2.2", dst="192.0.2.1") / ICMP(id=1, seq=2),
         "[192.0.2.2] -> [192.0.2.1] ICMP 42: Ether", "echo-request"),
        (IPv6(src="fe80::2", dst="fe80::1") / ICMPv6EchoRequest(),
         "[fe80::2] -> [fe80::1] ICMPv6 62: Ether", "Echo Request"),
        (ARP(pdst="192.0.2.1"), "42: Ether / ARP who has 192.0.2.1", ""),
    ],
)  # fmt: skip
def test_line(packet: Packet, begin: str, contains: str) -> None:
    text = trace.line(bytes(ETHER / packet))
    assert text.startswith(begin)
    assert contains in text
    assert "\n" not in text


def test_dhcp_and_dns_are_decoded() -> None:
    payload = bytes.fromhex("000101000001000000000000") + b"\7example\3org\0" + bytes.fromhex("00010001")
    text = trace.line(bytes(ETHER / IP(src="192.0.2.2", dst="192.0.2.1") / UDP(sport=7, dport=53) / payload))
    assert "example.org" in text


def test_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "trace", said.append)
    frame = bytes(ETHER / ARP(pdst="192.0.2.1"))
    trace.capture(False, PLAIN + frame)
    trace.capture(True, PLAIN + frame)
    assert [text.split(" 42: ")[0] for text in said] == ["guest -> host", "host -> guest"]


@given(st.binary(max_size=80), st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x08\x06", b"\x12\x34"]))
def test_any_frame_has_a_line(data: bytes, ethertype: bytes) -> None:
    assert "\n" not in trace.line(bytes(12) + ethertype + data)
    assert trace.line(data)
