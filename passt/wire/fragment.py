"""IP fragmentation (RFC 791, 3.2; RFC 8200, 4.5): a message that is larger than the guest's MTU, in pieces that fit.

Every piece but the last holds a multiple of 8 bytes. IPv4 pieces carry their offset in the header; IPv6 ones in a
fragment header between the IPv6 header and the piece:

    next header u8 | reserved u8 | offset / 8, 13 bits | reserved, 2 bits | M, 1 bit | identification u32

Checksums of the upper layer are complete in the message: a fragment cannot ask a kernel to finish them.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from . import ip
from .checksum import checksum

HEADER6 = Struct("!BBHI")


def fragments(
    src: bytes, dst: bytes, proto: int, message: bytes, mtu: int, ident: int, flow_label: int = 0, *, tos: int = 0
) -> Iterator[bytes]:
    """IP packets of at most `mtu` bytes that together carry `message`, an upper-layer header and its data.

    `ident` must not repeat between the same addresses while fragments may be around; as many low bits of it are used
    as the family's field has.
    """
    v4 = len(src) == 4
    room = mtu - (ip.HEADER4.size if v4 else ip.HEADER6.size + HEADER6.size) & ~7
    for offset in range(0, len(message), room):
        piece = message[offset : offset + room]
        more = offset + room < len(message)
        if v4:
            yield _header4(src, dst, proto, len(piece), ident, offset, more, tos) + piece
        else:
            shim = HEADER6.pack(proto, 0, offset | more, ident & 0xFFFFFFFF)
            yield ip.header6(src, dst, ip.FRAGMENT, len(shim) + len(piece), flow_label, tos) + shim + piece


def _header4(src: bytes, dst: bytes, proto: int, length: int, ident: int, offset: int, more: bool, tos: int) -> bytes:
    where = offset >> 3 | (ip.MF if more else 0)
    fields = (ip.VERSION_IHL4, tos, ip.HEADER4.size + length, ident & 0xFFFF, where, ip.TTL, proto)
    return ip.HEADER4.pack(*fields, checksum(ip.HEADER4.pack(*fields, 0, src, dst)), src, dst)
