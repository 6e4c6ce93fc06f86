"""The out-of-order queue: segments of the guest behind a hole, kept so that it only retransmits what is missing.

The link to the guest keeps the order, and loses frames only in an overrun. An overrun loses many of them, and without
SACK the guest retransmits what it believes lost, one window per timeout, with new data behind it. If everything behind
a hole were dropped, each round would lose what the next one repairs: an upload beside a flood would stand still for
minutes after it.

    [ in the host socket | missing | queued | missing | queued ]
                      rcv_nxt                                     rcv_edge

    limit                   value               beyond it
    ----------------------  ------------------  ---------------------------------------------
    bytes of a connection   OUT_OF_ORDER_MAX    dropped, counted "tcp early: no room"
    bytes of all            OUT_OF_ORDER_TOTAL  likewise
    window advertised       rcv_edge            likewise

Pieces are copies, sorted by sequence number. They do not overlap, except that a piece may begin before its predecessor
ends. The queue of most connections is an empty tuple.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import itemgetter

from ..drops import Drop, Reason
from .conn import TAP_FIN_RCVD, TcpConn

OUT_OF_ORDER_MAX = 2 << 20  # bytes
OUT_OF_ORDER_TOTAL = 16 << 20
OVERHEAD = 1024  # bytes that a piece counts beside its payload: more than it takes, since it costs time as well

Piece = tuple[int, memoryview, int]  # sequence number, payload, FIN bit


class OutOfOrder:
    """The queues of all connections; `total` is their cost in bytes."""

    def __init__(self, drops: Counter[Reason]) -> None:
        self._drops = drops
        self.total = 0

    def merge(
        self,
        conn: TcpConn,
        mv: memoryview,
        rcv_nxt: int,
        later: list[tuple[int, int, int, int]],
        payload: list[memoryview],
        fin: bool,
    ) -> tuple[int, bool, bool]:
        """Append to `payload` what follows rcv_nxt without a hole, from `later` and from the queue; queue the rest.

        `later` has (sequence number, start, end, FIN bit) of new segments in `mv`. Returns (rcv_nxt, fin, hole).
        """
        pieces = [(seq, mv[data:end], fin_bit) for seq, data, end, fin_bit in later]
        if conn.out_of_order:
            pieces += self.take(conn)
        pieces.sort(key=itemgetter(0))
        for i, (seq, data, fin_bit) in enumerate(pieces):
            skip = rcv_nxt - seq
            if skip < 0 or fin:
                if not fin and not conn.events & TAP_FIN_RCVD:
                    self.keep(conn, pieces[i:])
                return rcv_nxt, fin, True
            if skip < len(data):
                payload.append(data[skip:])
                rcv_nxt += len(data) - skip
            if fin_bit and rcv_nxt == seq + len(data):
                fin = True
        return rcv_nxt, fin, False

    def take(self, conn: TcpConn) -> tuple[Piece, ...]:
        """Empty the queue of `conn`; returns its pieces."""
        pieces, conn.out_of_order = conn.out_of_order, ()
        self.total -= _cost(pieces)
        return pieces

    def keep(self, conn: TcpConn, pieces: Iterable[Piece]) -> None:
        """Queue copies of `pieces`, which are sorted, as far as there is room. The queue of `conn` is empty."""
        kept: list[Piece] = []
        left = min(OUT_OF_ORDER_MAX, OUT_OF_ORDER_TOTAL - self.total)
        end = -1
        for seq, data, fin in pieces:
            if seq + len(data) + fin <= end:
                continue  # a duplicate
            left -= len(data) + OVERHEAD
            if left < 0 or seq + len(data) > conn.rcv_edge:
                self._drops[Drop.TCP_OUT_OF_ORDER] += 1
                break
            end = seq + len(data) + fin
            kept.append((seq, data if data.readonly else memoryview(bytes(data)), fin))  # read-only: copied before
        conn.out_of_order = tuple(kept)
        self.total += _cost(conn.out_of_order)


def _cost(pieces: tuple[Piece, ...]) -> int:
    return sum(len(data) + OVERHEAD for _, data, _ in pieces)
