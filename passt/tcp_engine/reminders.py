"""Acknowledgements that may have got lost: on a link that loses frames they are sent again.

A guest's kernel sends dozens of segments at once, which are read and acknowledged together: by one segment, where
another kernel would send one for every two, or for each behind a hole. If the link loses this one, the guest learns
nothing of all of them. While it recovers from a loss, it sends no probe (RFC 8985, 7.2), and waits for its timeout:
200 ms of Linux, doubled if another frame gets lost then.

    sign of a loss    a segment behind a hole, or one that came twice
    lossy             for LOSSY after the last sign
    reminder          the last acknowledgement once more, with its SACK blocks, after a lossy connection was silent for
                      INTERVAL, or 2 x the link's round trip if that is more; doubled, REMINDERS times
    two at once       for a batch of several segments, one of which is behind a hole or fills it (`tcp.py`)

A guest that permits SACK ignores what it knows already. One that does not counts duplicate acknowledgements, and
retransmits for the third (RFC 5681, 3.2): it is reminded of holes only, where that is right.

A connection that never shows a loss has no part in this: nothing is kept for it, and nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..flow.context import Context
from ..loop.each import each
from .conn import TcpConn
from .deadlines import TIMER_SLACK
from .output import TcpOut

INTERVAL: Final = 0.010  # s
LOSSY: Final = 1.0  # s
LOSSY_MAX = 256  # connections; a guest that makes up losses on more of them costs no more time
REMINDERS: Final = 4  # of one silence: within 150 ms, before the guest's own timeout


class Lossy:
    """A connection whose link has lost something."""

    __slots__ = ("at", "conn", "count", "seen", "until")

    def __init__(self, conn: TcpConn) -> None:
        self.conn = conn
        self.at = self.until = 0.0  # time of the next look; end of the state
        self.seen = 0  # rcv_nxt at the last look
        self.count = 0  # reminders of this silence


def interval(conn: TcpConn) -> float:
    """Seconds of silence until the first reminder."""
    return max(INTERVAL, 2 * conn.min_rtt)


class Reminders:
    """The lossy connections, and the timer that they share."""

    def __init__(self, ctx: Context, out: TcpOut, fault_at: Callable[[TcpConn, Exception], None]) -> None:
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self.timer_handler)
        self._out = out
        self._fault_at = fault_at
        self.lossy: dict[int, Lossy] = {}  # by index

    def lost(self, conn: TcpConn, now: float) -> None:
        """The link has lost something of this connection, as a segment shows that has just come."""
        entry = self.lossy.get(conn.index)
        if entry is None or entry.conn is not conn:
            if len(self.lossy) >= LOSSY_MAX:
                return
            if not self.lossy:
                self._timers.arm(self._timer, now + INTERVAL)
            entry = self.lossy[conn.index] = Lossy(conn)
        entry.seen, entry.count = conn.rcv_nxt, 0
        entry.at, entry.until = now + interval(conn), now + LOSSY

    def timer_handler(self, now: float) -> None:
        """Look at all of them."""
        each(self.lossy.values(), self._look, self._failed, now)
        if self.lossy:
            self._timers.arm(self._timer, now + INTERVAL)

    def _failed(self, entry: Lossy, e: Exception) -> None:
        self._forget(entry)
        self._fault_at(entry.conn, e)

    def _forget(self, entry: Lossy) -> None:
        del self.lossy[entry.conn.index]

    def _look(self, entry: Lossy, now: float) -> None:
        conn = entry.conn
        if conn.sock is None:
            self._forget(entry)
        elif now + TIMER_SLACK < entry.at:
            pass
        elif now >= entry.until or entry.count == REMINDERS:
            self._forget(entry)
        elif conn.rcv_nxt != entry.seen:  # it was acknowledged, and that may take as long
            entry.seen, entry.count = conn.rcv_nxt, 0
            entry.at = now + interval(conn)
        else:
            entry.count += 1
            entry.at = now + (interval(conn) * (1 << entry.count))
            if conn.sack or conn.held:
                self._out.ack(conn)
