"""The Internet checksum (RFC 1071) over any amount of bytes, without a loop per byte.

The one's complement sum of 16-bit words is the value of the bytes modulo 0xffff, since 2**16 = 1 (mod 0xffff);
`int.from_bytes` and `%` therefore do the whole work in C. Zero has two representations: a sum that is a non-zero
multiple of 0xffff is represented by 0xffff, the result of an end-around carry.
"""

from __future__ import annotations

from typing import Any, Final

PROTO_ICMP: Final = 1
PROTO_TCP: Final = 6
PROTO_UDP: Final = 17
PROTO_ICMPV6: Final = 58


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """One's complement sum of big-endian 16-bit words, 0..0xffff; an odd last byte is padded with zero."""
    n = int.from_bytes(data, "big")
    if len(data) & 1:
        n <<= 8
    s = n % 0xFFFF
    return 0xFFFF if s == 0 and n else s


def fold(total: int) -> int:
    """Fold a sum of 16-bit words (below 2**32) into 16 bits."""
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


def checksum(*parts: bytes | bytearray | memoryview) -> int:
    """The value for a checksum field over `parts`, of which all but the last have even length."""
    return 0xFFFF - fold(sum(ones_sum(p) for p in parts))


def pseudo_sum(src: bytes, dst: bytes, proto: int, length: int) -> int:
    """Folded sum of the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1), addresses of 4 or 16 bytes.

    A checksum field holds it if the kernel is to complete the checksum (VIRTIO_NET_HDR_F_NEEDS_CSUM).
    """
    return fold(ones_sum(src) + ones_sum(dst) + proto + (length >> 16) + (length & 0xFFFF))


def transport_checksum(src: bytes, dst: bytes, proto: int, segment: Any) -> int:
    """Checksum of a TCP, UDP or ICMPv6 message whose own checksum field is zero."""
    return 0xFFFF - fold(pseudo_sum(src, dst, proto, len(segment)) + ones_sum(segment))
