"""UDP (RFC 768)."""

from __future__ import annotations

from struct import Struct
from typing import Final

from .checksum import PROTO_UDP, transport_checksum

HEADER: Final[Struct] = Struct("!HHHH")  # source port, destination port, length with header, checksum


def datagram(src: bytes, dst: bytes, sport: int, dport: int, payload: bytes) -> bytes:
    """Header and payload with a complete checksum, for addresses of either family."""
    length = HEADER.size + len(payload)
    c = transport_checksum(src, dst, PROTO_UDP, HEADER.pack(sport, dport, length, 0) + payload)
    return HEADER.pack(sport, dport, length, c or 0xFFFF) + payload  # zero means "no checksum"
