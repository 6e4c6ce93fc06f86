"""Checksums as scapy computes them are found sound, and any change of a packet is found, one by one and in groups."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw

from passt.drops import Reason
from passt.link.packet import PacketPool
from passt.link.vector_sums import VectorVerifier
from passt.link.verify import Verifier
from passt.wire.checksum import PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP
from passt.wire.cursor import Malformed

GUEST4, PEER4, GUEST6, PEER6 = "192.0.2.2", "198.51.100.7", "2001:db8::2", "2001:db8:ffff::7"
PACKETS: dict[tuple[int, bool], Callable[[bytes], Packet]] = {
    (PROTO_TCP, True): lambda data: (
        IP(src=GUEST4, dst=PEER4) / TCP(sport=1, dport=2, options=[("NOP", None)]) / Raw(data)
    ),
    (PROTO_TCP, False): lambda data: IPv6(src=GUEST6, dst=PEER6) / TCP(sport=1, dport=2) / Raw(data),
    (PROTO_UDP, True): lambda data: IP(src=GUEST4, dst=PEER4) / UDP(sport=1, dport=2) / Raw(data),
    (PROTO_UDP, False): lambda data: IPv6(src=GUEST6, dst=PEER6) / UDP(sport=1, dport=2) / Raw(data),
    (PROTO_ICMP, True): lambda data: IP(src=GUEST4, dst=PEER4) / ICMP() / Raw(data),
    (PROTO_ICMPV6, False): lambda data: IPv6(src=GUEST6, dst=PEER6) / ICMPv6EchoRequest(data=data),
}
KINDS = pytest.mark.parametrize("kind", PACKETS)
VERIFIERS = pytest.mark.parametrize("make", [Verifier, VectorVerifier])
Make = Callable[[PacketPool, Counter[Reason]], Verifier]


class Stand:
    """A verifier, and a pool in which packets are put one behind the other."""

    def __init__(self, make: Make = Verifier, at: int = 0) -> None:
        self.pool = PacketPool(1 << 20)
        self.pool.buf[:] = random.Random(1).randbytes(len(self.pool.buf))  # what is around packets means nothing
        self.drops: Counter[Reason] = Counter()
        self.verifier = make(self.pool, self.drops)
        self.at = at

    def put(self, packet: bytes, gap: int = 18) -> tuple[int, int]:
        """(start, end) of the packet."""
        start = self.at + gap
        self.at = start + len(packet)
        self.pool.buf[start : self.at] = packet
        return start, self.at

    def message(self, kind: tuple[int, bool], packet: bytes) -> str:
        """The reason why a packet is dropped, or nothing."""
        proto, v4 = kind
        l3, end = self.put(packet)
        l4 = l3 + (20 if v4 else 40)
        try:
            if v4:
                self.verifier.header(l3, l4)
            self.verifier.message((l3 + 12, l4) if v4 else (l3 + 8, l4), proto, l4, end)
        except Malformed as e:
            return str(e)
        return ""

    def group(self, kind: tuple[int, bool], packets: list[bytes], gap: int = 18) -> list[int]:
        """Which of the packets of a flow are sound, by number."""
        proto, v4 = kind
        size = 20 if v4 else 40
        places = [self.put(packet, gap) for packet in packets]
        first = packets[0]
        key = (first[12:20] if v4 else first[8:40]) + first[size : size + 4]
        if proto == PROTO_TCP:
            flat = [n for l3, end in places for n in (l3 + size, end)]
            sound = self.verifier.segments(key, flat)[::2]
            return [i for i, (l3, _) in enumerate(places) if l3 + size in sound]
        flat = [n for l3, end in places for n in (l3 + size + 8, end, 0)]
        sound = self.verifier.datagrams(key, flat)[::3]
        return [i for i, (l3, _) in enumerate(places) if l3 + size + 8 in sound]


def damaged(packet: bytes, at: int, by: int) -> bytes:
    """One byte is another."""
    return packet[:at] + bytes((packet[at] ^ by,)) + packet[at + 1 :]


@KINDS
@given(data=st.binary(max_size=60), where=st.integers(0, 1 << 16), by=st.integers(1, 255), odd=st.integers(0, 1))
@settings(max_examples=80, deadline=None)
def test_any_change_of_one_byte_is_found(kind: tuple[int, bool], data: bytes, where: int, by: int, odd: int) -> None:
    proto, v4 = kind
    packet = bytes(PACKETS[kind](data))
    stand = Stand(at=odd)
    assert stand.message(kind, packet) == ""
    first = 8 if proto not in (PROTO_ICMP,) and not v4 else 0  # of IPv6, the addresses alone are covered
    at = first + where % (len(packet) - first)
    udp = 20 if v4 else 40
    assume(proto != PROTO_UDP or not udp + 4 <= at < udp + 6)  # the tap takes the length from the field
    assume(proto != PROTO_TCP or at != udp + 12)  # where payload begins
    changed = damaged(packet, at, by)
    assume(proto != PROTO_UDP or not v4 or any(changed[udp + 6 : udp + 8]))
    reason = "ipv4" if v4 and at < 20 else {PROTO_TCP: "tcp", PROTO_UDP: "udp"}.get(proto, "icmp")
    assert stand.message(kind, changed) == f"{reason} checksum"


@KINDS
@pytest.mark.parametrize("length", [0, 1, 2, 3, 1459, 1460, 65000])
def test_lengths(kind: tuple[int, bool], length: int) -> None:
    packet = bytes(PACKETS[kind](random.Random(length).randbytes(length)))
    assert Stand().message(kind, packet) == ""
    assert Stand().message(kind, damaged(packet, len(packet) - 1, 1)).endswith("checksum")


def test_sum_of_all_ones_is_as_good_as_zero() -> None:
    kind = PROTO_ICMP, True
    packet = bytearray(bytes(PACKETS[kind](b"")))
    for sent in (b"\xf7\xff", b"\x00\x00"):
        packet[20:24] = (b"\x08\x00" if sent == b"\xf7\xff" else b"\xff\xff") + sent
        packet[24:] = bytes(len(packet) - 24)
        assert Stand().message(kind, bytes(packet)) == ""


def test_udp_without_a_checksum() -> None:
    for v4 in (True, False):
        packet = bytearray(bytes(PACKETS[PROTO_UDP, v4](b"data")))
        l4 = 20 if v4 else 40
        packet[l4 + 6 : l4 + 8] = bytes(2)
        assert Stand().message((PROTO_UDP, v4), bytes(packet)) == ("" if v4 else "udp checksum")
        assert Stand().group((PROTO_UDP, v4), [bytes(packet)]) == ([0] if v4 else [])


@VERIFIERS
@pytest.mark.parametrize("proto", [PROTO_TCP, PROTO_UDP])
@pytest.mark.parametrize("v4", [True, False])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_groups(make: Make, proto: int, v4: bool, data: st.DataObject) -> None:
    """Runs of equal frames, and others between them, any of them damaged: exactly the sound ones are left."""
    kind = proto, v4
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 700, 701, 1447, 1448, 1449, 9001]), min_size=1, max_size=4))
    counts = data.draw(st.lists(st.integers(1, 6), min_size=len(lengths), max_size=len(lengths)))
    rng = random.Random(data.draw(st.integers(0, 1 << 20)))
    packets: list[bytes] = []
    wanted: list[int] = []
    for length, count in zip(lengths, counts, strict=True):
        for _ in range(count):
            packet = bytes(PACKETS[kind](rng.randbytes(length)))
            if rng.random() < 0.3:
                packet = damaged(
                    packet, len(packet) - 1 - rng.randrange(length + 1 if length else 4), rng.randrange(1, 256)
                )
                assert proto != PROTO_UDP or packet[20 if v4 else 40 :][6:8] != bytes(2)
            else:
                wanted.append(len(packets))
            packets.append(packet)
    stand = Stand(make, data.draw(st.integers(0, 3)))
    assert stand.group(kind, packets, data.draw(st.integers(18, 21))) == wanted
    assert stand.drops == (
        {f"{'tcp' if proto == PROTO_TCP else 'udp'} checksum": bad} if (bad := len(packets) - len(wanted)) else {}
    )


@VERIFIERS
def test_a_damaged_header_is_told_from_a_damaged_segment(make: Make) -> None:
    packet = bytes(PACKETS[PROTO_TCP, True](bytes(100)))
    stand = Stand(make)
    assert stand.group((PROTO_TCP, True), [packet, damaged(packet, 8, 1), damaged(packet, 100, 1)]) == [0]
    assert stand.drops == {"ipv4 checksum": 1, "tcp checksum": 1}
