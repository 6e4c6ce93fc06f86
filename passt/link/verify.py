"""Checksums of the guest's frames, verified where no kernel has done it (RFC 1122, 3.2.1.2, 4.1.3.4, 4.2.2.7; RFC 4443,
2.3).

    frames of                                    verified
    -------------------------------------------  -------------------------------------------------------------------
    a tap device with a virtio-net header that   never: the kernel that made them is on the same machine, and left the
      says NEEDS_CSUM or DATA_VALID                checksum to the device that puts them on a wire
    one that says neither: raw sockets, netem    each by itself: they are rare
    a stream socket, a tap without that header   TCP and UDP by group, everything else each by itself

Sums are of little-endian words, modulo 0xffff, where a swap of bytes is a multiplication by 256 (RFC 1071, 2 B). So a
number in the pseudo-header counts 256 times, and a sound message has the sum 0: `int.from_bytes` and `%` do all. That
costs 0.2 us for 40 bytes and 2 us for 1500; a back end for bulk has `link/vector_sums.py` for it.

A group is what a batch brought of one flow, with one pseudo-header. Over IPv4 a piece is summed together with the IP
header in front of it, whose own sum is 0: one sum for both. Which of the two is wrong is looked at when the total is.
Packets with IPv4 options are verified each by itself, so the header of a piece has 20 bytes. UDP over IPv4 may go
without a checksum (RFC 768), over IPv6 not (RFC 8200, 8.1).
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from ..drops import Drop, Reason
from ..wire import ip
from ..wire.checksum import PROTO_ICMP, PROTO_TCP, PROTO_UDP
from ..wire.cursor import Malformed
from ..wire.virtio import F_DATA_VALID, F_NEEDS_CSUM
from .packet import PacketPool

VERIFIED: Final = F_NEEDS_CSUM | F_DATA_VALID  # in the flags of a virtio-net header
HEADER4 = ip.HEADER4.size
_UDP_HEADER = 8
_REASONS = {PROTO_TCP: Drop.TCP_CHECKSUM, PROTO_UDP: Drop.UDP_CHECKSUM}


class Verifier:
    """Verifies packets in a pool."""

    def __init__(self, pool: PacketPool, drops: Counter[Reason]) -> None:
        self._pool, self._buf, self._mv = pool, pool.buf, pool.mv
        self._drops = drops

    def header(self, l3: int, l4: int) -> None:
        """An IPv4 header. Raises Malformed."""
        if int.from_bytes(self._buf[l3:l4], "little") % 0xFFFF:
            raise Malformed(Drop.IPV4_CHECKSUM)

    def message(self, addresses: tuple[int, int], proto: int, l4: int, end: int) -> None:
        """One message of TCP, UDP, ICMP or ICMPv6, which begins at `l4`. Raises Malformed.

        Header and payload are read apart, since a pool may have them in different places (`link/backend.py`).
        """
        a, b = addresses
        buf, data = self._buf, l4
        if proto == PROTO_TCP:
            data = min(l4 + (buf[l4 + 12] >> 2 & 0x3C), end)
        elif proto == PROTO_UDP:
            data = l4 + _UDP_HEADER
            if b - a == 8 and not any(buf[l4 + 6 : data]):
                return
        total = int.from_bytes(buf[l4:data], "little") + int.from_bytes(self._pool.view(data, end), "little")
        if proto != PROTO_ICMP:
            total += int.from_bytes(buf[a:b], "little") + (proto + end - l4 << 8)
        if total % 0xFFFF:
            raise Malformed(_REASONS.get(proto, Drop.ICMP_CHECKSUM))

    def segments(self, key: bytes, segments: list[int]) -> list[int]:
        """Those of the TCP segments [TCP header, end]* of one flow that are sound; the others are counted."""
        v4 = len(key) == 12
        pseudo = int.from_bytes(key[:-4], "little") + (PROTO_TCP << 8)
        faulty = self._faulty(segments, 2, HEADER4 if v4 else 0, pseudo)
        if not faulty:
            return segments
        for i in faulty:
            l4 = segments[i]
            header = v4 and int.from_bytes(self._buf[l4 - HEADER4 : l4], "little") % 0xFFFF
            self._drops[Drop.IPV4_CHECKSUM if header else Drop.TCP_CHECKSUM] += 1
        return _without(segments, faulty, 2)

    def datagrams(self, key: bytes, datagrams: list[int]) -> list[int]:
        """The same for UDP datagrams [payload, end, size]*."""
        v4 = len(key) == 12
        pseudo = int.from_bytes(key[:-4], "little") + (PROTO_UDP + _UDP_HEADER << 8)
        faulty = self._faulty(datagrams, 3, _UDP_HEADER + HEADER4 if v4 else _UDP_HEADER, pseudo)
        if not faulty:
            return datagrams
        if v4:
            faulty = [i for i in faulty if self._faulty_datagram4(datagrams[i])]
        else:
            self._drops[Drop.UDP_CHECKSUM] += len(faulty)
        return _without(datagrams, faulty, 3)

    def _faulty_datagram4(self, data: int) -> bool:
        """Whether the datagram with payload at `data` is dropped, and counted. One without a checksum may be sound."""
        buf, l4 = self._buf, data - _UDP_HEADER
        if int.from_bytes(buf[l4 - HEADER4 : l4], "little") % 0xFFFF:
            self._drops[Drop.IPV4_CHECKSUM] += 1
            return True
        if any(buf[data - 2 : data]):
            self._drops[Drop.UDP_CHECKSUM] += 1
            return True
        return False

    def _faulty(self, pieces: list[int], step: int, back: int, pseudo: int) -> list[int]:
        """Places in `pieces`, [start, end, ...]* with `step` numbers each, of those whose sum is not 0.

        A piece is summed from `back` bytes before its start on. `pseudo` is that of all of them, without their length.
        """
        mv = self._mv
        faulty = []
        for i in range(0, len(pieces), step):
            start, end = pieces[i], pieces[i + 1]
            if (int.from_bytes(mv[start - back : end], "little") + pseudo + (end - start << 8)) % 0xFFFF:
                faulty.append(i)
        return faulty


def _without(pieces: list[int], places: list[int], step: int) -> list[int]:
    """A copy of `pieces` without those at `places`."""
    gone = set(places)
    return [number for i in range(0, len(pieces), step) if i not in gone for number in pieces[i : i + step]]
