"""ARP packets, and the answers to them.

Invariants: parsing gives a packet or `Malformed`; a packet that was parsed is emitted as the bytes it was parsed from.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire.arp import LAYOUT, REQUEST, Packet
from passt.wire.cursor import Malformed


def seeds() -> Iterable[bytes]:
    yield Packet(REQUEST, b"\x52\x54\0\x12\x34\x56", b"\xc0\0\2\2", bytes(6), b"\xc0\0\2\1").emit() + bytes(18)


def one(data: bytes) -> None:
    try:
        packet = Packet.parse(data)
    except Malformed:
        return
    assert packet.emit() == data[: LAYOUT.size]
