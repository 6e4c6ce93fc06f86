"""The out-of-order queue: segments of the guest behind a hole, kept so that it only retransmits what is missing.

The link to the guest keeps the order, and loses frames only in an overrun. An overrun loses many of them. SACK tells
the guest which (`held.py`); without it, the guest retransmits what it believes lost, one window per timeout, with new
data behind it. If everything behind a hole were dropped, each round would lose what the next one repairs: an upload
beside a flood would stand still for minutes after it.

Data that the host socket refuses waits in the queue, too, in front of all, until EPOLLOUT reports room (`input.py`).

    [ in the host socket | missing | queued | missing | queued ]
                      rcv_nxt                                     rcv_edge

    limit                   value               beyond it
    ----------------------  ------------------  ---------------------------------------------
    bytes of a connection   OUT_OF_ORDER_MAX    dropped, counted "tcp early: no room"
    bytes of all            OUT_OF_ORDER_TOTAL  likewise
    window advertised       rcv_edge            likewise

Pieces are copies, sorted by sequence number, and each ends behind the end of its predecessor. A piece that another one
covers is dropped. When the queue is full, a piece that is needed earlier takes the place of the last ones. The queue of
most connections is `NO_PIECES`.

A segment costs the same whatever lies in the queue: its place is found by bisection, and what it completes is taken off
the front. OVERHEAD bounds the number of pieces, for the list has to move up when one comes in between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Final

from ..drops import Drop, Reason
from ..wire.tcp import FIN
from .conn import TcpConn
from .pieces import NO_PIECES, Piece, Pieces

OUT_OF_ORDER_MAX: Final = 2 << 20  # bytes
OUT_OF_ORDER_TOTAL: Final = 16 << 20
OVERHEAD: Final = 1024  # bytes that a piece counts beside its payload: more than it takes, since it costs time as well

Later = tuple[int, int, int, int]  # sequence number, start and end in the packet pool, FIN bit


class OutOfOrder:
    """The queues of all connections; `total` is their cost in bytes."""

    def __init__(self, drops: Counter[Reason]) -> None:
        self._drops = drops
        self.total = 0

    def merge(
        self,
        conn: TcpConn,
        view: Callable[[int, int], memoryview],
        rcv_nxt: int,
        later: list[Later],
        payload: list[memoryview],
        fin: bool,
    ) -> tuple[int, bool, bool]:
        """Append to `payload` what follows rcv_nxt without a hole, from `later` and from the queue; queue the rest.

        `later` has new segments, which `view` finds. Returns (rcv_nxt, fin, hole).
        """
        queue = conn.out_of_order
        later.sort()
        i = j = 0
        while not fin:
            if j < len(queue) and (i == len(later) or queue[j][0] < later[i][0]):
                seq, data, fin_bit = queue[j]
                if seq > rcv_nxt:
                    break
                j += 1
            elif i < len(later) and later[i][0] <= rcv_nxt:
                seq, start, end, fin_bit = later[i]
                data = view(start, end)
                i += 1
            else:
                break
            skip = rcv_nxt - seq
            if skip < len(data):
                payload.append(data[skip:])
                rcv_nxt += len(data) - skip
            if fin_bit and rcv_nxt == seq + len(data):
                fin = True
        hole = i < len(later) or j < len(queue)
        if fin:
            self.take(conn)
            return rcv_nxt, fin, hole
        if j:
            self._take_front(conn, j)
        for seq, start, end, fin_bit in later[i:]:
            self._keep(conn, seq, view(start, end), fin_bit)
        return rcv_nxt, fin, hole

    def wait(self, conn: TcpConn, view: Callable[[int, int], memoryview], later: list[Later]) -> None:
        """Queue `later`, and take nothing off: the socket has refused what comes first."""
        for seq, start, end, fin_bit in later:
            self._keep(conn, seq, view(start, end), fin_bit)

    def put_back(self, conn: TcpConn, payload: Sequence[memoryview], taken: int, fin: bool) -> None:
        """The socket took `taken` bytes of `payload`, which begins at conn.rcv_nxt - taken; the rest waits here."""
        rest = memoryview(b"".join(payload))[taken:]
        self._keep(conn, conn.rcv_nxt, rest, FIN if fin else 0)

    def take(self, conn: TcpConn) -> None:
        """Empty the queue of `conn`."""
        if conn.out_of_order:
            self.total -= conn.out_of_order.cost
            conn.out_of_order = NO_PIECES

    def _take_front(self, conn: TcpConn, n: int) -> None:
        """Take the first `n` pieces off the queue of `conn`."""
        queue = conn.out_of_order
        if n == len(queue):
            self.take(conn)
        else:
            self._remove(queue, 0, n)

    def _remove(self, queue: Pieces, first: int, behind: int) -> None:
        cost = sum(len(data) + OVERHEAD for _, data, _ in queue[first:behind])
        del queue[first:behind]
        queue.cost -= cost
        self.total -= cost

    def _keep(self, conn: TcpConn, seq: int, data: memoryview, fin: int) -> None:
        """Queue a copy of a segment if it is in the window, brings something, and has room."""
        queue = conn.out_of_order
        if not queue:
            queue = Pieces()
        at = bisect_right(queue, seq, key=_SEQ)
        end = seq + len(data) + fin
        if at and _end(queue[at - 1]) >= end:
            return  # a duplicate
        if seq + len(data) > conn.rcv_edge or not self._make_room(queue, at, len(data) + OVERHEAD):
            self._drops[Drop.TCP_OUT_OF_ORDER] += 1
            return
        covered = at
        while covered < len(queue) and _end(queue[covered]) <= end:
            covered += 1
        if covered > at:
            self._remove(queue, at, covered)
        queue.insert(at, (seq, memoryview(bytes(data)), fin))
        queue.cost += len(data) + OVERHEAD
        self.total += len(data) + OVERHEAD
        conn.out_of_order = queue

    def _make_room(self, queue: Pieces, at: int, cost: int) -> bool:
        """Whether there is room for `cost` bytes, with pieces behind `at` removed where that is what it takes."""
        need = cost - min(OUT_OF_ORDER_MAX - queue.cost, OUT_OF_ORDER_TOTAL - self.total)
        last = len(queue)
        while need > 0 and last > at:
            last -= 1
            need -= len(queue[last][1]) + OVERHEAD
        if need > 0:
            return False
        if last < len(queue):
            self._drops[Drop.TCP_OUT_OF_ORDER] += len(queue) - last
            self._remove(queue, last, len(queue))
        return True


_SEQ: Final = itemgetter(0)


def _end(piece: Piece) -> int:
    return piece[0] + len(piece[1]) + piece[2]
