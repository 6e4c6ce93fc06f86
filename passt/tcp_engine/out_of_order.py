"""Segments of guests that came before one that is missing: kept, so that only that one must be sent again.

The link to the guest keeps the order, and loses frames only when it is overrun. But then it loses many at a time, and
without SACK the guest sends again what it believes lost, one window after each time-out, with what is new behind it. If
all that came early were thrown away, each round would lose what the next one repairs: an upload beside a flood stood
still for minutes after it.

    [ in the host socket | missing | kept | missing | kept ]
                  rcv_nxt                                 rcv_edge

    limit                  value          beyond it
    ---------------------  -------------  ---------------------------------------------
    bytes of a connection  EARLY_MAX      dropped, counted "tcp early: no room"
    bytes of all           EARLY_TOTAL    likewise
    what was promised      rcv_edge       likewise

Pieces are copies, sorted and disjoint, except that one may begin before its predecessor ends. A connection without any
has an empty tuple.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import itemgetter

from .conn import TAP_FIN_RCVD, TcpConn

EARLY_MAX = 2 << 20  # bytes
EARLY_TOTAL = 16 << 20
OVERHEAD = 1024  # bytes that a piece counts beside its payload: more than it takes, since each costs time as well

Piece = tuple[int, memoryview, int]  # sequence number, payload, FIN bit


class TcpEarly:
    """What is kept for all connections; `total` is its cost in bytes."""

    def __init__(self, drops: Counter[str]) -> None:
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
        """Append to `payload` what follows without a hole of what came early, now or before, and keep the rest.

        `later` is (sequence number, start, end, FIN bit) of what came now, in `mv`. Returns (rcv_nxt, fin, hole).
        """
        pieces = [(seq, mv[data:end], fin_bit) for seq, data, end, fin_bit in later]
        if conn.early:
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
        """What is kept for `conn`, which has nothing any more."""
        pieces, conn.early = conn.early, ()
        self.total -= _cost(pieces)
        return pieces

    def keep(self, conn: TcpConn, pieces: Iterable[Piece]) -> None:
        """Keep copies of `pieces`, sorted, as far as there is room. Nothing is kept for `conn` yet."""
        kept: list[Piece] = []
        left = min(EARLY_MAX, EARLY_TOTAL - self.total)
        end = -1
        for seq, data, fin in pieces:
            if seq + len(data) + fin <= end:
                continue  # sent twice
            left -= len(data) + OVERHEAD
            if left < 0 or seq + len(data) > conn.rcv_edge:
                self._drops["tcp early: no room"] += 1
                break
            end = seq + len(data) + fin
            kept.append((seq, data if data.readonly else memoryview(bytes(data)), fin))  # once copied is enough
        conn.early = tuple(kept)
        self.total += _cost(conn.early)


def _cost(pieces: tuple[Piece, ...]) -> int:
    return sum(len(data) + OVERHEAD for _, data, _ in pieces)
