"""The capture file, byte by byte, and the checksums in it."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
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

from passt import log
from passt.link.pcap import Pcap, complete
from passt.wire.checksum import pseudo_sum
from passt.wire.virtio import F_NEEDS_CSUM, VNET

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
        capture = Pcap(file, "pcap", Counter())
        assert path.stat().st_size == 0  # until it is said that it begins
        capture.flush()
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


class Pipe:
    """A pipe with a reader that has read nothing yet."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.file = FileIO(writer, "w")
        self.drops = Counter[str]()
        self.ended = 0
        self.capture = Pcap(self.file, "the pipe", self.drops)
        self.capture.on_end = self._end

    def _end(self) -> None:
        self.ended += 1

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        os.close(self.reader)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "warn", lines.append)
    return lines


def test_a_slow_reader_gets_whole_records_and_nobody_waits() -> None:
    frame = bytes(range(250)) * 4
    with Pipe() as pipe:
        taken = 0
        while not pipe.drops:
            pipe.capture.capture(True, PLAIN + frame)
            pipe.capture.at_turn_end(0.0)
            taken += 1
        assert pipe.drops == {"capture: reader too slow": 1}
        got = b""
        while len(got) < 24 + (taken - 1) * (16 + len(frame)):
            got += os.read(pipe.reader, 1 << 20)
            pipe.capture.at_turn_end(0.0)
        os.set_blocking(pipe.reader, False)
        with pytest.raises(BlockingIOError):
            os.read(pipe.reader, 1)
    records = got[24:]
    assert {records[i + 16 : i + 16 + len(frame)] for i in range(0, len(records), 16 + len(frame))} == {frame}


def test_a_reader_that_went_away_ends_the_capture(said: list[str]) -> None:
    with Pipe() as pipe:
        pipe.capture.flush()
        os.close(pipe.reader)
        for _ in range(3):
            pipe.capture.capture(True, PLAIN + b"frame")
            pipe.capture.at_turn_end(0.0)
        assert pipe.file.closed and pipe.ended == 1
        pipe.reader = os.open(os.devnull, os.O_RDONLY)
    assert said == ["Packet capture to the pipe ends: Broken pipe"]


def test_a_full_disk_ends_the_capture(said: list[str]) -> None:
    with FileIO("/dev/full", "w") as file:
        capture = Pcap(file, "/dev/full", Counter())
        for _ in range(3):
            capture.flush()
            capture.capture(True, PLAIN + b"frame")
    assert said == ["Packet capture to /dev/full ends: No space left on device"]


def test_scapy_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "pcap"
    with FileIO(path, "w") as file:
        capture = Pcap(file, "pcap", Counter())
        for packet, csum_offset in PACKETS:
            capture.capture(True, partial(packet, csum_offset))
        capture.flush()
    assert [bytes(p) for p in rdpcap(str(path))] == [bytes(p) for p, _ in PACKETS]
