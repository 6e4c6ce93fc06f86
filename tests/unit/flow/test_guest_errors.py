"""ICMP errors of the guest: quotes are read, whatever is in them, and handed to the protocol that sent the packet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6TimeExceeded, IPv6
from scapy.packet import Packet

from passt import addr
from passt.flow.guest_errors import GuestErrors, parse_quote
from passt.wire.checksum import PROTO_TCP
from passt.wire.cursor import Malformed
from tests.unit.support import GUEST4, GUEST6, GUEST_MAC, T0, make_context

PEER4, PEER6 = addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7")
PORTS = (80).to_bytes(2, "big") + (50000).to_bytes(2, "big")  # the guest's, the peer's
Handed = list[tuple[bytes, bytes]]


def quote(v4: bool, upper: Packet | None = None) -> bytes:
    """A packet that the guest was sent."""
    upper = upper or TCP(sport=50000, dport=80, seq=0x01020304)
    src, dst = (addr.text(a) for a in ((PEER4, GUEST4) if v4 else (PEER6, GUEST6)))
    return bytes((IP(src=src, dst=dst) if v4 else IPv6(src=src, dst=dst)) / upper)


class Rig:
    def __init__(self, v4: bool, answer: bool = True) -> None:
        self.ctx = make_context()
        self.v4, self.handed = v4, Handed()
        GuestErrors(self.ctx)

        def handler(key: bytes, upper: bytes, now: float) -> bool:
            assert now == T0
            self.handed.append((key, upper))
            return answer

        self.ctx.services.take_errors(PROTO_TCP, handler)

    def send(self, message: Packet) -> None:
        raw = bytes(message)
        taken = (self.ctx.services.icmp4 if self.v4 else self.ctx.services.icmp6)[raw[0]]
        assert not taken.fragments
        guest, peer = (GUEST4, PEER4) if self.v4 else (GUEST6, PEER6)
        taken.handler(GUEST_MAC, guest, peer, memoryview(raw), T0, 64)


def errors(v4: bool) -> list[Packet]:
    if v4:
        return [*(ICMP(type=3, code=code) for code in (0, 1, 2, 3, 9, 10, 13)), ICMP(type=11, code=0)]
    return [*(ICMPv6DestUnreach(code=code) for code in (0, 1, 3, 4)), ICMPv6TimeExceeded()]


@pytest.mark.parametrize("v4", [True, False])
def test_each_error_reaches_the_protocol(v4: bool) -> None:
    rig = Rig(v4)
    for error in errors(v4):
        rig.send(error / quote(v4))
    key = (GUEST4 + PEER4 if v4 else GUEST6 + PEER6) + PORTS
    assert rig.handed == [(key, PORTS[2:] + PORTS[:2] + b"\1\2\3\4")] * len(errors(v4))
    assert not rig.ctx.drops


def test_options_of_the_quoted_header() -> None:
    with_options = bytes(IP(src="198.51.100.7", dst="192.0.2.2", options=b"\1" * 8, proto=6)) + b"portsseq"
    assert parse_quote(with_options, v4=True)[2] == b"portsseq"


@pytest.mark.parametrize("v4", [True, False])
def test_an_error_about_nothing_is_counted(v4: bool) -> None:
    rig = Rig(v4, answer=False)
    rig.send(errors(v4)[0] / quote(v4))
    rig.send(errors(v4)[0] / quote(v4, UDP(sport=1, dport=2)))  # no protocol takes those
    assert rig.ctx.drops == {"icmp error of the guest: about nothing": 2} and len(rig.handed) == 1


def test_fragmentation_needed_is_none_of_these() -> None:
    with pytest.raises(Malformed, match="icmp type"):
        Rig(True).send(ICMP(type=3, code=4) / quote(True))


@pytest.mark.parametrize("v4", [True, False])
def test_quotes_that_are_cut_or_wrong(v4: bool) -> None:
    whole = quote(v4)
    header = 20 if v4 else 40
    bad = [whole[:n] for n in range(header + 8)] + [b"\x00" + whole[1:], (b"\x6f" if v4 else b"\x45") + whole[1:]]
    if v4:
        bad += [b"\x44" + whole[1:], b"\x4f" + whole[1 : header + 8], whole[:6] + b"\x00\x01" + whole[8:]]
    for packet in bad:
        with pytest.raises(Malformed, match="icmp error of the guest: quote"):
            parse_quote(packet, v4=v4)
    assert parse_quote(whole[: header + 8], v4=v4)[0] == PROTO_TCP


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes(packet: bytes, v4: bool) -> None:
    try:
        _, key, upper = parse_quote(packet, v4=v4)
    except Malformed:
        return
    assert len(key) == (12 if v4 else 36) and len(upper) == 8
