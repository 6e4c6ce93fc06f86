"""Fragments in the pool: what is told to the queue, and where the whole packet lies."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6

from passt.link import fragments
from passt.link.packet import PacketPool
from passt.link.reassembly import Reassembly

AT = 100  # where packets lie in the pool


def put(pool: PacketPool, packet: bytes) -> int:
    """Where the packet ends."""
    pool.buf[AT : AT + len(packet)] = packet
    return AT + len(packet)


@pytest.mark.parametrize("v6", [False, True])
@given(data=st.binary(min_size=1, max_size=5000), order=st.randoms())
def test_whatever_the_order_the_packet_is_whole(v6: bool, data: bytes, order: object) -> None:
    pool, queue = PacketPool(), Reassembly(Counter())
    udp = UDP(sport=7, dport=9) / data
    if v6:
        whole = IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrFragment(id=5) / udp
        parts = [bytes(part) for part in fragment6(whole, 1280)]
        addresses, wanted = (AT + 8, AT + 40), bytes(IPv6(src="fd00::1", dst="fd00::2") / udp)[40:]
    else:
        parts = [bytes(part) for part in fragment(IP(src="192.0.2.1", dst="192.0.2.2", id=5) / udp, 1200)]
        addresses, wanted = (AT + 12, AT + 20), bytes(IP(src="192.0.2.1", dst="192.0.2.2") / udp)[20:]
    order.shuffle(parts)  # type: ignore[attr-defined]
    found = None
    for i, part in enumerate(parts):
        end = put(pool, part)
        if v6 and part[6] != 44:
            found = part[40:]  # short enough to go without a fragment header
        elif v6:
            found = fragments.ipv6(queue, pool, addresses, AT + 40, end, 1.0)
        else:
            where = int.from_bytes(part[6:8], "big")
            found = fragments.ipv4(queue, pool, addresses, part[9], 5, where, AT + 20, end, 1.0)
        assert (found is None) == (i + 1 < len(parts))
    assert found == wanted
    src_dst = pool.copy(*addresses)
    start, placed, l4, end = fragments.place(pool, addresses, found)
    assert pool.copy(*placed) == src_dst
    assert placed[1] == l4
    assert pool.copy(l4, end) == wanted
    assert pool.buf[start : placed[0]] == bytes(placed[0] - start)
