"""GSO batches: neighbouring datagrams of equal size, which a kernel moves as one buffer.

Both directions pass datagrams as a flat list [start, end, size]*, with offsets into some memory. `size` is 0 for a
single datagram. Otherwise [start, end) holds several datagrams of `size` bytes, and the last may be shorter: a USO
super-frame, which the guest's kernel left unsegmented, or datagrams that the host's kernel joined (UDP_GRO).

A GSO batch is what one UDP_SEGMENT send, or one UDP GSO frame to the guest, may carry: datagrams of one size, the last
one possibly shorter, at most `segments` of them and GSO_BATCH_MAX bytes. An empty datagram is a batch by itself: a
kernel that segments by size cannot make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..wire import ether, ip, udp

# UDP_MAX_SEGMENTS of Linux before 6.9; twice as much since
SEGMENTS_MAX: Final = 64
# A network device takes less than 64 KiB with headers (gso_max_size); beyond that the kernel segments in software.
GSO_BATCH_MAX: Final = 65535 - ether.HEADER_LEN - ip.HEADER6.size - udp.HEADER.size

GsoBatch = tuple[int, int, list[memoryview]]  # size of the datagrams, bytes in all, their memory


def gso_batches(mv: memoryview, frames: Sequence[int], segments: int = SEGMENTS_MAX) -> list[GsoBatch]:
    """The batches in `frames`, in order. With `segments` 1, each datagram is one.

    An entry that holds several datagrams stays in one batch, even beyond GSO_BATCH_MAX, unless it has more than
    `segments` of them.
    """
    out: list[GsoBatch] = []
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
        room = min(most, GSO_BATCH_MAX) - n if n and n % s == 0 else 0
    if views:
        out.append((size, total, views))
    return out
