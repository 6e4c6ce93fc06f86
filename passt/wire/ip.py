"""IPv4 (RFC 791) and IPv6 (RFC 8200) headers, and the walk over IPv6 extension headers.

Headers that we write have TTL or hop limit 255, no options, traffic class zero unless one is given, and an IPv4
identification of zero.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from ..drops import Drop
from .checksum import checksum
from .cursor import Malformed

# Version and header length, TOS, total length, identification, flags and fragment offset, TTL, protocol, checksum,
# source, destination (RFC 791, 3.1)
HEADER4: Final[Struct] = Struct("!BBHHHBBH4s4s")
# Version, traffic class and flow label, payload length, next header, hop limit, source, destination (RFC 8200, 3)
HEADER6: Final[Struct] = Struct("!IHBB16s16s")

MTU_MAX: Final = 65535  # bytes: no packet is longer (RFC 791, 3.1)
VERSION_IHL4: Final = 0x45  # version 4, five words of header
VERSION6: Final = 6 << 28
DF: Final = 0x4000
MF: Final = 0x2000
FRAGMENT_MASK: Final = 0x3FFF  # MF and the offset: not zero in every fragment of a datagram
ECN_MASK: Final = 3  # of the traffic class (RFC 3168, 5)
FLOW_LABEL_MASK: Final = 0xFFFFF
TTL: Final = 255

HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51
NO_NEXT_HEADER: Final = 59
DESTINATION_OPTIONS: Final = 60

EXTENSIONS_MAX: Final = 16  # RFC 8200, 4.1 recommends an order with seven; RFC 8504, 5.3 lets a node set a limit

_LENGTH_IN_8: Final = frozenset((HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS))


def header4(src: bytes, dst: bytes, proto: int, length: int, tos: int = 0) -> bytes:
    """An IPv4 header, checksum included, for `length` bytes of payload."""
    fields = (VERSION_IHL4, tos, HEADER4.size + length, 0, 0, TTL, proto)
    return HEADER4.pack(*fields, checksum(HEADER4.pack(*fields, 0, src, dst)), src, dst)


def header6(src: bytes, dst: bytes, next_header: int, length: int, flow_label: int = 0, tos: int = 0) -> bytes:
    """An IPv6 header for `length` bytes of payload."""
    return HEADER6.pack(VERSION6 | tos << 20 | flow_label & FLOW_LABEL_MASK, length, next_header, TTL, src, dst)


def header(src: bytes, dst: bytes, proto: int, length: int, flow_label: int = 0, tos: int = 0) -> bytes:
    """The header of the family of `src` and `dst`."""
    if len(src) == 4:
        return header4(src, dst, proto, length, tos)
    return header6(src, dst, proto, length, flow_label, tos)


def skip_extensions(buf: bytes | bytearray | memoryview, offset: int, end: int, next_header: int) -> tuple[int, int]:
    """Walk the extension headers of `next_header` at `offset` of a packet that ends at `end` (RFC 8200, 4).

    Returns the upper-layer protocol and its offset. A fragment is reported as (FRAGMENT, offset), for the caller to
    drop; an atomic fragment (RFC 6946) is skipped like any other header. An unknown header, and ESP, which encrypts the
    rest, count as an upper-layer protocol. Raises Malformed: truncated, no next header, too many.
    """
    for _ in range(EXTENSIONS_MAX):
        if next_header == NO_NEXT_HEADER:
            raise Malformed(Drop.IPV6_NO_NEXT_HEADER)
        if next_header not in _LENGTH_IN_8 and next_header != FRAGMENT and next_header != AUTHENTICATION:
            return next_header, offset
        if offset + 8 > end:
            raise Malformed(Drop.IPV6_EXTENSION_TRUNCATED)
        if next_header == FRAGMENT:
            if buf[offset + 2] | buf[offset + 3] & 0xF9:  # offset or M; the two bits between them are reserved
                return FRAGMENT, offset
            size = 8
        elif next_header == AUTHENTICATION:
            size = 4 * buf[offset + 1] + 8  # RFC 4302, 2.2: in 4-byte words, minus 2
        else:
            size = 8 * buf[offset + 1] + 8
        next_header = buf[offset]
        offset += size
        if offset > end:
            raise Malformed(Drop.IPV6_EXTENSION_TRUNCATED)
    raise Malformed(Drop.IPV6_EXTENSIONS)
