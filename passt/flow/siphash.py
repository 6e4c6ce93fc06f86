"""SipHash-2-4 with a 64-bit result (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).

A keyed hash that cannot be predicted without the key, for initial sequence numbers (RFC 6528). A call costs about a
microsecond per round in Python, 2 rounds per 8 bytes and 4 at the end, once per TCP connection.
"""

from __future__ import annotations

from struct import Struct

_KEY = Struct("<QQ")
_MASK = 0xFFFFFFFFFFFFFFFF

# "somepseudorandomlygeneratedbytes", the constants of section 2.1
_INIT = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573


def siphash24(key: bytes, data: bytes) -> int:
    """The 64-bit hash of `data` under a key of 16 bytes."""
    k0: int
    k1: int
    k0, k1 = _KEY.unpack(key)
    v0, v1, v2, v3 = k0 ^ _INIT[0], k1 ^ _INIT[1], k0 ^ _INIT[2], k1 ^ _INIT[3]
    n = len(data)
    blocks = n // 8 + 1
    # The last block is what is left, zeros, and the length modulo 256 as its last byte (section 2.2).
    padded = data + bytes(8 * blocks - 1 - n) + bytes((n & 0xFF,))
    words: tuple[int, ...] = Struct(f"<{blocks}Q").unpack(padded)
    # The four rounds of the end are two more "blocks" of zero, but that 0xff goes into v2 before them; written as
    # one loop, since a call per round would cost as much as the round.
    for m, final in (*((word, 0) for word in words), (0, 0xFF), (0, 0)):
        v2 ^= final
        v3 ^= m
        for _ in (0, 1):
            v0 = v0 + v1 & _MASK
            v1 = (v1 << 13 & _MASK | v1 >> 51) ^ v0
            v0 = v0 << 32 & _MASK | v0 >> 32
            v2 = v2 + v3 & _MASK
            v3 = (v3 << 16 & _MASK | v3 >> 48) ^ v2
            v0 = v0 + v3 & _MASK
            v3 = (v3 << 21 & _MASK | v3 >> 43) ^ v0
            v2 = v2 + v1 & _MASK
            v1 = (v1 << 17 & _MASK | v1 >> 47) ^ v2
            v2 = v2 << 32 & _MASK | v2 >> 32
        v0 ^= m
    return v0 ^ v1 ^ v2 ^ v3
