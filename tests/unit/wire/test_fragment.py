from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, defragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, defragment6

from passt import addr
from passt.link.reassembly import Reassembly
from passt.wire import udp
from passt.wire.checksum import PROTO_UDP
from passt.wire.fragment import fragments

SRC4, DST4 = addr.packed("192.0.2.1"), addr.packed("192.0.2.2")
SRC6, DST6 = addr.packed("2001:db8::1"), addr.packed("2001:db8::2")


def test_ipv4_bytes() -> None:
    first, last = fragments(SRC4, DST4, 17, b"12345678ABC", 35, 0x10001)
    assert first == bytes.fromhex("4500 001c 0001 2000 ff11 17cc c0000201 c0000202") + b"12345678"
    assert last == bytes.fromhex("4500 0017 0001 0001 ff11 37d0 c0000201 c0000202") + b"ABC"


def test_ipv6_bytes() -> None:
    first, last = fragments(SRC6, DST6, 17, b"12345678ABC", 63, 0x100010002, 5)
    addresses = (SRC6 + DST6).hex()
    assert first == bytes.fromhex(f"60000005 0010 2c ff {addresses} 11 00 0001 00010002") + b"12345678"
    assert last == bytes.fromhex(f"60000005 000b 2c ff {addresses} 11 00 0008 00010002") + b"ABC"


@pytest.mark.parametrize("size", [1473, 3000, 65507])
def test_scapy_reassembles_ipv4(size: int) -> None:
    payload = os.urandom(size)
    packets = [IP(p) for p in fragments(SRC4, DST4, PROTO_UDP, udp.datagram(SRC4, DST4, 7, 9, payload), 1500, 77)]
    for p in packets:
        assert len(p) == p.len <= 1500
        rebuilt = p.copy()
        del rebuilt.chksum
        assert IP(bytes(rebuilt)).chksum == p.chksum
    (whole,) = defragment(packets)
    assert bytes(IP(bytes(whole))[UDP].payload) == payload
    checksum = whole[UDP].chksum if UDP in whole else IP(bytes(whole))[UDP].chksum
    again = IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=7, dport=9) / payload
    assert checksum == IP(bytes(again))[UDP].chksum


@pytest.mark.parametrize("size", [1453, 3000, 60000])
def test_scapy_reassembles_ipv6(size: int) -> None:
    payload = os.urandom(size)
    packets = [
        IPv6(p) for p in fragments(SRC6, DST6, PROTO_UDP, udp.datagram(SRC6, DST6, 7, 9, payload), 1500, 77, 123)
    ]
    assert {p[IPv6ExtHdrFragment].id for p in packets} == {77}
    assert {p.fl for p in packets} == {123}
    assert all(p.plen + 40 == len(p) <= 1500 for p in packets)
    whole = IPv6(bytes(defragment6(packets)))
    assert bytes(whole[UDP].payload) == payload
    again = IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(sport=7, dport=9) / payload
    assert whole[UDP].chksum == IPv6(bytes(again))[UDP].chksum


@given(st.binary(min_size=1, max_size=3000), st.integers(68, 1500), st.randoms(use_true_random=False))
def test_our_own_reassembly_takes_them_in_any_order(message: bytes, mtu: int, rng: random.Random) -> None:
    packets = list(fragments(SRC4, DST4, 17, message, mtu, 1))
    assert all(len(p) <= mtu for p in packets)
    rng.shuffle(packets)
    queue = Reassembly(Counter())
    answers = []
    for p in packets:
        where = int.from_bytes(p[6:8], "big")
        answers.append(queue.add(b"key", (where & 0x1FFF) * 8, bool(where & 0x2000), p[20:], 1.0))
    assert answers == [None] * (len(packets) - 1) + [message]
