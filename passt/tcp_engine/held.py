"""SACK to the guest: which blocks an acknowledgement reports (RFC 2018, 4; RFC 2883).

    held    blocks behind a hole, as the out-of-order queue has them; the one that was extended last comes first
    dsack   a segment that came twice, to be reported once: with that, the guest knows a needless retransmission

The first block has the segment that caused the acknowledgement; the others repeat what was reported last. A guest that
misses three acknowledgements in four still hears of each block. HELD_MAX blocks are remembered, where a segment has
room for four: a block may be extended long after it was reported.

A block must be held until it is acknowledged, or the guest would not send it again in time. So blocks are taken from
what is in the queue, and those which had to leave it for lack of room are withdrawn (RFC 2018, 8 allows that).

Blocks never begin at the acknowledgement number: to Linux that is a receiver that has reneged. Therefore, while there
is a hole, everything before it is acknowledged, though the host peer's acknowledgement of the tail is to come
(`window.py`).

A segment of at most one byte before the acknowledgement number is no duplicate, but a keep-alive probe, which may have
to wait for its answer (`keepalive.py`). A duplicate of one byte costs the guest no more without D-SACK.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter

from ..wire.tcp import SACK_BLOCKS_MAX
from .conn import TcpConn

HELD_MAX = 32
_SEQ = itemgetter(0)

Block = tuple[int, int]


def note(conn: TcpConn, segments: Iterable[tuple[int, int]]) -> None:
    """Segments (left edge, right edge) came behind a hole, in this order; the queue has been updated."""
    queue = conn.out_of_order
    if not queue:
        conn.held = ()
        return
    end = queue[-1][0] + len(queue[-1][1])
    held = [(left, min(right, end)) for left, right in conn.held if right > conn.rcv_nxt and left < end]
    for start, stop in segments:
        i = bisect_right(queue, start, key=_SEQ) - 1
        if i < 0 or queue[i][0] + len(queue[i][1]) < stop or stop == start:
            continue  # not kept
        left, right = start, stop
        rest = []
        for block in held:
            if block[0] <= right and left <= block[1]:
                left, right = min(left, block[0]), max(right, block[1])
            else:
                rest.append(block)
        held = [(left, right), *rest]
    conn.held = tuple(held[:HELD_MAX])


def sack_blocks(conn: TcpConn) -> list[Block]:
    """The blocks of the acknowledgement that is sent now. A D-SACK is reported once."""
    dsack, conn.dsack = conn.dsack, ()
    if not conn.sack:
        return []
    acked = conn.rcv_acked
    blocks = [dsack] if dsack and dsack[1] <= acked else []
    if acked == conn.rcv_nxt:
        blocks += [block for block in conn.held if block[0] > acked]
    return blocks[:SACK_BLOCKS_MAX]
