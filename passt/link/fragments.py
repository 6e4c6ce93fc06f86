"""Fragments in the packet pool: handed to `reassembly.py`, and the whole packet put back in the shape of a frame.

    addresses (start, end)    where source and destination stand: 8 or 32 bytes, which tell the family
    l4                        IPv4: behind the header; IPv6: where the fragment header stands
"""

from __future__ import annotations

from ..wire import ip
from ..wire.ether import HEADER_LEN
from ..wire.virtio import VNET_LEN
from .packet import FRAME_ROOM, PacketPool
from .reassembly import LENGTH_MAX, Reassembly


def ipv4(
    queue: Reassembly, pool: PacketPool, addresses: tuple[int, int], proto: int, ident: int, fragment: int, l4: int,
    end: int, now: float,
) -> bytes | None:  # fmt: skip
    """Take an IPv4 fragment (RFC 791, 3.2); the packet that it completes."""
    key = pool.copy(*addresses) + bytes((proto,)) + ident.to_bytes(2, "big")
    more, offset = bool(fragment & ip.MF), (fragment & 0x1FFF) * 8
    return queue.add(key, offset, more, pool.view(l4, end), now, LENGTH_MAX - ip.HEADER4.size)


def ipv6(
    queue: Reassembly, pool: PacketPool, addresses: tuple[int, int], l4: int, end: int, now: float
) -> bytes | None:
    """Take an IPv6 fragment (RFC 8200, 4.5); the packet that it completes."""
    proto, where = pool.buf[l4], int.from_bytes(pool.view(l4 + 2, l4 + 4), "big")
    key = pool.copy(*addresses) + bytes((proto,)) + pool.copy(l4 + 4, l4 + 8)
    return queue.add(key, where & 0xFFF8, bool(where & 1), pool.view(l4 + 8, end), now)


def place(pool: PacketPool, addresses: tuple[int, int], whole: bytes) -> tuple[int, tuple[int, int], int, int]:
    """Put a packet into the room behind the batch, with its addresses before it: (start, addresses, l4, end)."""
    src_dst = pool.copy(*addresses)
    start = pool.size - FRAME_ROOM
    l3 = start + VNET_LEN + HEADER_LEN
    pool.buf[start:l3] = bytes(l3 - start)
    l4 = l3 + ip.HEADER6.size
    end = l4 + len(whole)
    pool.buf[l4 - len(src_dst) : l4] = src_dst
    pool.buf[l4:end] = whole
    return start, (l4 - len(src_dst), l4), l4, end
