"""Checksums and segmentation in software, held against scapy, against RFC 1071, and against the kernel's rules."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from passt.link import gso
from passt.link.backend import Buffer
from passt.link.gso import Gso
from passt.linux.tcpinfo import Features
from passt.tcp_engine.conn import TcpConn, build_header, set_segmentation
from passt.tcp_engine.output import TcpOut
from passt.udp_engine.flow import UdpFlow
from passt.wire.checksum import ones_sum, pseudo_sum
from passt.wire.tcp import ACK, FIN, PSH, SYN, SynOptions
from passt.wire.virtio import GSO_NONE, GSO_TCPV4, GSO_TCPV6, NO_OFFLOAD, VNET

from ..offload import arrive
from ..support import GATEWAY4, GATEWAY6, GUEST4, GUEST6, GUEST_MAC, OUR_MAC, make_context

PORTS = (40000).to_bytes(2, "big") + (80).to_bytes(2, "big")
KEYS = {4: GUEST4 + GATEWAY4 + PORTS, 6: GUEST6 + GATEWAY6 + PORTS}
SIZE = 1 << 20
DATA = random.Random(7).randbytes(1 << 16)
OVERHEAD = {("tcp", 4): 40, ("tcp", 6): 60, ("udp", 4): 28, ("udp", 6): 48}
LONGEST = {("tcp", 4): 65495, ("tcp", 6): 65515, ("udp", 4): 65507, ("udp", 6): 65527}
MTUS = (68, 576, 1280, 1500, 9000, 65520)


class Case(NamedTuple):
    proto: str
    version: int
    size: int  # payload of a segment

    @property
    def longest(self) -> int:
        return LONGEST[self.proto, self.version]

    @property
    def l4(self) -> int:
        return 34 if self.version == 4 else 54

    def parts(self, payload: Buffer, flags: int = ACK | PSH, seq: int = 1000) -> tuple[Buffer, ...]:
        """The frame as the protocol modules hand it over."""
        return (tcp if self.proto == "tcp" else udp)(self, payload, flags, seq)

    def expected(self, payload: bytes, flags: int = ACK | PSH, seq: int = 1000, ident: int = 0) -> bytes:
        """One segment, as scapy builds it."""
        label = 1
        packet: Packet = Ether(dst=GUEST_MAC, src=OUR_MAC)
        if self.version == 4:
            packet /= IP(src="192.0.2.1", dst="192.0.2.2", ttl=255, id=ident)
        else:
            packet /= IPv6(src="fe80::1", dst="2001:db8::2", hlim=255, fl=label)
        if self.proto == "tcp":
            packet /= TCP(sport=80, dport=40000, seq=seq & 0xFFFFFFFF, ack=0, flags=flags, window=0)
        else:
            packet /= UDP(sport=80, dport=40000, **({"chksum": 0} if self.version == 4 else {}))
        return bytes(packet / Raw(payload))


def tcp(case: Case, payload: Buffer, flags: int, seq: int) -> tuple[Buffer, ...]:
    conn = TcpConn(KEYS[case.version])
    conn.index = 0
    conn.mss = case.size
    build_header(conn, GUEST_MAC, OUR_MAC, 0, tso=True)
    if len(payload) > case.size:
        set_segmentation(conn, GSO_TCPV4 if case.version == 4 else GSO_TCPV6)
    TcpOut(make_context(), Features()).header(conn, seq, flags, len(payload))
    return conn.hdr, payload


def udp(case: Case, payload: Buffer, flags: int, seq: int) -> tuple[Buffer, ...]:
    flow = UdpFlow(KEYS[case.version], b"", 0.0)
    flow.index = 0
    flow.build_header(GUEST_MAC, OUR_MAC, 0)
    return flow.header(len(payload), min(case.size, len(payload))), payload


def written(parts: tuple[Buffer, ...], at: int = 0) -> list[bytes]:
    """The frames in the buffer; the rest of it is not written."""
    out = bytearray(b"\xa5" * SIZE)
    target = Gso(memoryview(out))
    if parts[0][1]:
        end = target.cut(at, parts[0], parts[1])
    else:
        length = sum(map(len, parts)) - VNET.size
        end = target.frame(at, length, parts)
        assert end == at + 4 + max(length, gso.FRAME_MIN)
    assert out[:at] == b"\xa5" * at
    assert out[end:] == b"\xa5" * (SIZE - end)
    frames = []
    while at < end:
        length = int.from_bytes(out[at : at + 4], "big")
        frames.append(bytes(out[at + 4 : at + 4 + length]))
        at += 4 + length
    assert at == end
    return frames


def equal(frame: bytes, wanted: bytes, case: Case) -> None:
    """The same but for the two representations of zero, of which scapy takes the other one for TCP."""
    field = case.l4 + (16 if case.proto == "tcp" else 6)
    if wanted[field : field + 2] == bytes(2) and case.proto == "tcp":
        wanted = wanted[:field] + b"\xff\xff" + wanted[field + 2 :]
    assert frame == wanted


def unpadded(frame: bytes, case: Case) -> bytes:
    """The frame as far as its packet goes; the rest, up to 60 bytes, is zero."""
    length = int.from_bytes(frame[16:18], "big") if case.version == 4 else 40 + int.from_bytes(frame[18:20], "big")
    end = 14 + length
    assert frame == frame[:end].ljust(60, b"\0")
    return frame[:end]


def verify(frame: bytes, case: Case) -> None:
    """As a receiver does: a correct checksum makes the sum of everything all ones (RFC 1071, 1.3)."""
    l4 = frame[case.l4 :]
    if case.version == 4:
        assert ones_sum(frame[14:34]) == 0xFFFF
        assert int.from_bytes(frame[16:18], "big") == len(frame) - 14
        addresses, proto = frame[26:34], frame[23]
    else:
        assert int.from_bytes(frame[18:20], "big") == len(l4)
        addresses, proto = frame[22:54], frame[20]
    if case.proto == "udp":
        assert int.from_bytes(l4[4:6], "big") == len(l4)
        assert (l4[6:8] == bytes(2)) == (case.version == 4)
        if case.version == 4:
            return
    half = len(addresses) // 2
    total = pseudo_sum(addresses[:half], addresses[half:], proto, len(l4)) + ones_sum(l4)
    assert total % 0xFFFF == 0


def check(case: Case, payload: bytes, flags: int = ACK | PSH, seq: int = 1000, at: int = 0) -> None:
    """Every segment of `payload`; those at both ends byte by byte as scapy builds them."""
    frames = [unpadded(frame, case) for frame in written(case.parts(payload, flags, seq), at)]
    pieces = [payload[i : i + case.size] for i in range(0, len(payload), case.size)] or [b""]
    assert len(frames) == len(pieces)
    header = case.l4 + (20 if case.proto == "tcp" else 8)
    last = len(frames) - 1
    for number, (frame, piece) in enumerate(zip(frames, pieces, strict=True)):
        assert frame[header:] == piece
        verify(frame, case)
        now = flags if number == last else flags & ~(FIN | PSH)
        if case.proto == "tcp":
            place = (seq + number * case.size) & 0xFFFFFFFF
            assert frame[case.l4 + 4 : case.l4 + 8] == place.to_bytes(4, "big")
            assert frame[case.l4 + 13] == now
        if case.version == 4:
            assert int.from_bytes(frame[18:20], "big") == number & 0xFFFF
        if number in (0, 1, last - 1, last):
            equal(frame, case.expected(piece, now, seq + number * case.size, number), case)


def cases() -> list[Case]:
    return [
        Case(proto, version, min(mtu - OVERHEAD[proto, version], LONGEST[proto, version]))
        for proto, version in OVERHEAD
        for mtu in MTUS
        if mtu >= 1280 or version == 4
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize(
    "length",
    [
        lambda case: 1,
        lambda case: case.size - 1,
        lambda case: case.size,
        lambda case: case.size + 1,
        lambda case: 2 * case.size,
        lambda case: 5 * case.size - 3,
        lambda case: case.longest // case.size * case.size,
        lambda case: case.longest,
    ],
    ids=["1", "size-1", "size", "size+1", "2 size", "5 size-3", "full", "longest"],
)
def test_every_mtu_and_length(case: Case, length: Callable[[Case], int]) -> None:
    check(case, DATA[: min(length(case), case.longest)])


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_anything(proto: str, version: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, 5000) | st.integers(0, LONGEST[proto, version]))
    size = data.draw(st.integers(max(length // 200, 28), 4000))
    offset = data.draw(st.integers(0, 99))
    fill = data.draw(st.sampled_from([DATA * 2, bytes(1 << 17), b"\xff" * (1 << 17)]))
    flags = ACK | data.draw(st.sampled_from([0, PSH, FIN, PSH | FIN]))
    seq = data.draw(st.integers(0, 0xFFFFFFFF))
    check(Case(proto, version, size), fill[offset : offset + length], flags, seq, data.draw(st.integers(0, 9)))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("version", [4, 6])
def test_tiny_datagrams(version: int, size: int) -> None:
    check(Case("udp", version, size), DATA[: 64 * size])


def test_sequence_numbers_wrap() -> None:
    check(Case("tcp", 4, 1460), DATA[:20000], seq=0xFFFFFFFF - 5000)
    check(Case("tcp", 6, 1440), DATA[:20000], seq=0xFFFFFFFF - 1439)


def test_ids_go_on_from_the_headers_and_wrap() -> None:
    case = Case("tcp", 4, 1000)
    hdr, payload = case.parts(DATA[:5500])
    hdr = bytearray(hdr)
    hdr[28:30] = (0xFFFD).to_bytes(2, "big")
    frames = written((hdr, payload))
    assert [int.from_bytes(f[18:20], "big") for f in frames] == [0xFFFD, 0xFFFE, 0xFFFF, 0, 1, 2]
    for frame in frames:
        verify(frame, case)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("total", [1201, 2400, 30000])
def test_udp_is_cut_as_the_kernel_cuts_it(version: int, total: int) -> None:
    """But for the id, which here only the super-frame has, and for the checksum of IPv4."""
    hdr, payload = Case("udp", version, 1200).parts(DATA[:total])
    kernel = arrive(bytes(hdr[: VNET.size]), bytes(hdr[VNET.size :]) + bytes(payload))
    frames = written((hdr, payload))
    if version == 4:
        kernel = [f[:18] + bytes(2) + f[20:24] + bytes(2) + f[26:40] + bytes(2) + f[42:] for f in kernel]
        frames = [f[:18] + bytes(2) + f[20:24] + bytes(2) + f[26:] for f in frames]
        frames[-1] = frames[-1][: len(kernel[-1])]  # without padding
    assert frames == kernel


def test_headers_of_the_caller_are_left_alone() -> None:
    for case in cases():
        hdr, payload = case.parts(DATA[:60000])
        before = bytes(hdr)
        written((hdr, payload))
        assert bytes(hdr) == before


def test_payload_in_pieces_of_odd_length() -> None:
    for version in (4, 6):
        case = Case("udp", version, 9000)
        hdr, payload = case.parts(DATA[:6003])
        for at in (1, 100, 5001):
            assert written((hdr, payload[:at], payload[at:])) == [case.expected(DATA[:6003])]


def test_options_after_the_header() -> None:
    options = SynOptions(1460, 8).emit()
    conn = TcpConn(KEYS[6])
    build_header(conn, GUEST_MAC, OUR_MAC, 1500, tso=True)
    TcpOut(make_context(), Features()).header(conn, 1, SYN, 0, len(options))
    (frame,) = written((conn.hdr, options))
    verify(frame, Case("tcp", 6, 1440))
    assert Ether(frame)[TCP].options == [("MSS", 1460), ("NOP", None), ("WScale", 8)]


@pytest.mark.parametrize("length", [0, 20, gso.SCALAR_MAX, gso.SCALAR_MAX + 1, 65535])
def test_finished_frame_is_left_alone(length: int) -> None:
    frame = os.urandom(length)
    assert written((NO_OFFLOAD, frame)) == [frame.ljust(60, b"\0")]


@pytest.mark.parametrize("length", [8, gso.SCALAR_MAX, gso.SCALAR_MAX + 7, 65000])
def test_icmp_is_not_udp(length: int) -> None:
    """Its checksum, at another offset of an IPv4 frame, is never left out."""
    frame = bytes(34) + b"\0\0\0\0" + DATA[: length - 4]
    (out,) = written((VNET.pack(1, GSO_NONE, 42, 0, 34, 2) + frame[:50], frame[50:]))
    assert ones_sum(out[34:]) == 0xFFFF
    assert out[:36] + bytes(2) + out[38:] == frame.ljust(60, b"\0")


@pytest.mark.parametrize("filler", [b"\x11\x22", b"\x11\x22" * 2000])
def test_zero_is_sent_as_ones(filler: bytes) -> None:
    """RFC 768, RFC 8200, 8.1: zero would say that there is no checksum."""
    case = Case("udp", 6, 9000)
    hdr, _ = case.parts(filler + bytes(2))
    rest = 0xFFFF - ones_sum(bytes(hdr[VNET.size + case.l4 :]) + filler)
    (frame,) = written((hdr, filler + rest.to_bytes(2, "big")))
    assert frame[case.l4 + 6 : case.l4 + 8] == b"\xff\xff"
    verify(frame, case)


def test_zero_in_a_super_frame() -> None:
    case = Case("udp", 6, 1000)
    one = bytearray(DATA[:1000])
    hdr, _ = case.parts(bytes(one))
    one[998:] = bytes(2)
    one[998:] = (0xFFFF - ones_sum(bytes(hdr[VNET.size + case.l4 :]) + one)).to_bytes(2, "big")
    for frame in written(case.parts(bytes(one) * 5)):
        assert frame[case.l4 + 6 : case.l4 + 8] == b"\xff\xff"
        verify(frame, case)
