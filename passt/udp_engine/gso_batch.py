"""Runs: neighbouring datagrams of equal size, which a kernel moves as one piece.

Both directions know datagrams as a flat list [start, end, size]*, offsets into some memory. `size` is 0 for a single
datagram; otherwise [start, end) holds several of `size` bytes, of which the last may be shorter: what the guest's
kernel left uncut (a USO super-frame), or what the host's kernel joined (UDP_GRO).

A run is what one UDP_SEGMENT send, or one UDP GSO frame to the guest, may carry: datagrams of one size, the last one
possibly shorter, at most `segments` of them and RUN_MAX bytes. An empty datagram always stands alone, since a kernel
that cuts by size cannot make one.
"""

from __future__ import annotations

from collections.abc import Sequence

# UDP_MAX_SEGMENTS of Linux before 6.9; twice as much since
SEGMENTS_MAX = 64
# A network device takes less than 64 KiB with its headers (gso_max_size) or its driver's work is done in software.
# Ethernet 14, IPv6 40, UDP 8.
RUN_MAX = 65535 - 14 - 40 - 8

Run = tuple[int, int, list[memoryview]]  # size of the datagrams, bytes in all, where they lie


def runs(mv: memoryview, frames: Sequence[int], segments: int = SEGMENTS_MAX) -> list[Run]:
    """The runs in `frames`, in order. With `segments` 1, each datagram by itself.

    What comes in one piece goes on in one piece, even beyond RUN_MAX, unless it has more than `segments` datagrams.
    """
    out: list[Run] = []
    views: list[memoryview] = []
    size = total = room = 0
    triples = iter(frames)
    for start, end, joined in zip(triples, triples, triples, strict=True):
        n = end - start
        s = joined if 0 < joined < n else n
        if 0 < n <= room and (s == size or s == n < size):
            views.append(mv[start:end])
            total += n
            room = room - n if n % size == 0 else 0
            continue
        if views:
            out.append((size, total, views))
        most = s * segments
        while n > most:  # not for n = 0, where `most` is 0 too
            out.append((s, most, [mv[end - n : end - n + most]]))
            n -= most
        views = [mv[end - n : end]]
        size, total = min(s, n), n
        room = min(most, RUN_MAX) - n if n and n % s == 0 else 0
    if views:
        out.append((size, total, views))
    return out
