"""The capture file, byte by byte, and the checksums in it."""

from __future__ import annotations

import struct
import time
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.utils import rdpcap

from passt.link.pcap import Pcap, complete
from passt.link.tap_device import F_NEEDS_CSUM, VNET
from passt.wire.checksum import pseudo_sum

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
PLAIN = VNET.pack(0, 0, 0, 0, 0, 0)


def partial(packet: Packet, csum_offset: int) -> bytes:
    """The frame as the kernel hands it over: vnet header, the pseudo-header's sum in the checksum field."""
    frame = bytearray(bytes(packet))
    ip = packet[1]
    start = 14 + (40 if ip.version == 6 else 20)
    addresses = bytes(ip)[8:40] if ip.version == 6 else bytes(ip)[12:20]
    half = len(addresses) // 2
    proto = ip.nh if ip.version == 6 else ip.proto
    value = pseudo_sum(addresses[:half], addresses[half:], proto, len(frame) - start)
    frame[start + csum_offset : start + csum_offset + 2] = value.to_bytes(2, "big")
    return VNET.pack(F_NEEDS_CSUM, 0, 0, 0, start, csum_offset) + bytes(frame)


PACKETS = [
    (ETHER / IP(src="192.0.2.2", dst="192.0.2.1") / TCP(sport=1, dport=2) / b"odd", 16),
    (ETHER / IP(src="192.0.2.2", dst="192.0.2.1") / UDP(sport=1, dport=2) / b"even", 6),
    (ETHER / IPv6(src="2001:db8::2", dst="2001:db8::1") / TCP(sport=1, dport=2), 16),
    (ETHER / IPv6(src="2001:db8::2", dst="2001:db8::1") / UDP(sport=1, dport=2) / bytes(60000), 6),
]


@pytest.mark.parametrize(("packet", "csum_offset"), PACKETS)
def test_partial_checksum_is_completed_as_scapy_computes_it(packet: Packet, csum_offset: int) -> None:
    assert complete(partial(packet, csum_offset)) == bytes(packet)


def test_udp_checksum_of_zero_is_sent_as_ones() -> None:
    packet = ETHER / IP(src="192.0.2.2", dst="192.0.2.1") / UDP(sport=0, dport=0) / b"\0\0"
    rest = int(packet.__class__(bytes(packet))[UDP].chksum)
    packet = ETHER / IP(src="192.0.2.2", dst="192.0.2.1") / UDP(sport=0, dport=0) / rest.to_bytes(2, "big")
    frame = complete(partial(packet, 6))
    assert frame[40:42] == b"\xff\xff"
    assert frame == bytes(packet)


def test_finished_frame_is_left_alone() -> None:
    assert complete(PLAIN + b"anything") == b"anything"


@given(st.binary(min_size=VNET.size, max_size=100))
def test_any_vnet_header_keeps_the_length(data: bytes) -> None:
    assert len(complete(data)) == len(data) - VNET.size


def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pcap"
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_123_456_789)
    with FileIO(path, "w") as file:
        capture = Pcap(file)
        assert path.read_bytes() == struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
        capture.capture(False, PLAIN + b"first")
        capture.capture(True, PLAIN + b"second")
        assert path.stat().st_size == 24  # until the turn ends
        capture.at_turn_end(0.0)
        assert path.read_bytes()[24:] == (
            struct.pack("=IIII", 1_700_000_000, 123456, 5, 5) + b"first"
            + struct.pack("=IIII", 1_700_000_000, 123456, 6, 6) + b"second"
        )  # fmt: skip
        capture.at_turn_end(0.0)
        assert path.stat().st_size == 24 + 32 + 11


def test_short_writes_are_continued() -> None:
    class Slow:
        def __init__(self) -> None:
            self.data = b""

        def write(self, data: memoryview) -> int:
            self.data += bytes(data[:7])
            return min(7, len(data))

    slow = Slow()
    capture = Pcap(slow)  # type: ignore[arg-type]
    capture.capture(False, PLAIN + bytes(range(100)))
    capture.flush()
    assert slow.data[24 + 16 :] == bytes(range(100))


def test_scapy_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "pcap"
    with FileIO(path, "w") as file:
        capture = Pcap(file)
        for packet, csum_offset in PACKETS:
            capture.capture(True, partial(packet, csum_offset))
        capture.flush()
    assert [bytes(p) for p in rdpcap(str(path))] == [bytes(p) for p, _ in PACKETS]
