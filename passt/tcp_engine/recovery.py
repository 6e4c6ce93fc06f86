"""Loss of segments to the guest: what is sent again, and when (RFC 2018, RFC 6298, RFC 6582, RFC 6675, RFC 8985).

    sign of a loss                             answer
    -----------------------------------------  -----------------------------------------------------------------------
    SACK of something behind a hole            the holes are sent again, and those of them that get lost once more
                                               (`scoreboard.py`)
    no acknowledgement for `pto`               a probe: the last segment again. Its SACK shows the holes before it, and
                                               a D-SACK that the guest was only slow
    a duplicate acknowledgement, from a guest  the oldest frame again; and with each partial acknowledgement the one
    that does not permit SACK                  behind it, up to `point` (NewReno, RFC 6582)
    no acknowledgement for `rto`               the oldest frame again, then twice as much with each acknowledgement; and
                                               the timeout doubles

RFC 5681 waits for three duplicate acknowledgements, because a network may deliver out of order. This link does not, so
one is enough. `Scoreboard` finds out where that is not so.

snd_nxt never moves back: what is resent lies between snd_una and snd_nxt, and stays in the host socket until it is
acknowledged. A guest that acknowledges all that is in flight ends every kind of recovery.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from ..flow.context import Context
from ..wire import tcp
from ..wire.cursor import Malformed
from ..wire.tcp import HALF, MASK
from . import rtt
from .conn import GIVE_UP, RTO_MAX, SUCCESSOR_GIVE_UP, TcpConn
from .deadlines import TIMER_SLACK
from .output import TcpOut
from .scoreboard import NO_LIMIT, Scoreboard
from .table import TcpTable

TIMED_OUT: Final = -1.0  # in the place of `probe_at`: a D-SACK may be of what a timeout sent again, and tells nothing
FRAMES_AFTER_TIMEOUT: Final = 4  # at least so many segments are sent again at once, as by RFC 5681, 3.1

Options = Sequence[tuple[int, bytes]]  # acknowledgement number and options of segments


class TcpRecovery:
    """Loss recovery of all connections, towards the guest."""

    def __init__(self, ctx: Context, out: TcpOut, table: TcpTable) -> None:
        self._ctx = ctx
        self._out = out
        self._table = table

    def acknowledged(self, conn: TcpConn, duplicate: bool, progress: bool, options: Options, now: float) -> None:
        """An acknowledgement came that may tell of a loss."""
        blocks = self._blocks(conn, options, now) if options else ()
        una, board = conn.snd_una, conn.scoreboard
        again = progress
        if board is None:
            if not blocks and (conn.sack or not duplicate or progress):
                conn.probe_at = min(conn.probe_at, 0.0)
                return
            board = conn.scoreboard = Scoreboard(una, una, conn.snd_nxt)
            conn.probe_at = 0.0
            again = True
        for left, right in blocks:
            board.add(left, right)
        if conn.rtt_end and board.sacked and board.sacked[-1][1] >= conn.rtt_end:
            conn.rtt_end = 0
            rtt.sample(conn, now - conn.rtt_at, self._ctx.link.rto_min)
        board.update(una, conn.mss, not conn.reorders)
        if una >= (board.edge if conn.sack else board.point) and not board.sacked:
            conn.scoreboard = None
            return
        if not conn.sack and again and board.allowance == NO_LIMIT:
            board.resent.clear()
            board.high_rxt, board.edge = una, min(una + conn.chunk, conn.snd_nxt)
        if progress:
            board.allowance = min(2 * board.allowance, NO_LIMIT)
        if self.resend(conn, now) and conn.sock is not None:
            self._table.schedule(conn, now)

    def progress(self, conn: TcpConn, *, probed: bool) -> None:
        """The guest acknowledges new data after a probe or a timeout; `probed`: perhaps with a D-SACK."""
        conn.retries = 0
        if not probed:
            conn.probe_at = min(conn.probe_at, 0.0)
        if conn.sack or conn.snd_una != conn.snd_nxt:
            rtt.set_rto(conn, self._ctx.link.rto_min)

    def resend(self, conn: TcpConn, now: float) -> bool:
        """Send again what is lost, as far as the guest's window and the link take it; returns whether it was anything.

        The connection ends if its socket fails.
        """
        board = conn.scoreboard
        assert board is not None
        if self._ctx.link.full or self._ctx.link.room <= 0:
            self._out.turns.waiting[conn.index] = conn
            return False
        nxt = conn.snd_nxt
        ranges = board.next(nxt, min(nxt, conn.snd_una + max(conn.snd_wnd, conn.mss)), self._ctx.link.room)
        if ranges:
            self._send(conn, ranges, now)
        return bool(ranges)

    def _send(self, conn: TcpConn, ranges: Sequence[tuple[int, int]], now: float) -> None:
        if not conn.sack or any(left < conn.rtt_end <= right for left, right in ranges):
            conn.rtt_end = 0  # Karn's algorithm
        try:
            self._out.resend(conn, ranges)
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO, now)
            if conn.sock is not None:
                self._table.broken(conn, 0, now)  # what was lost cannot be sent again: there is no more to wait for

    def _blocks(self, conn: TcpConn, options: Options, now: float) -> list[tuple[int, int]]:
        """The blocks of SACK options that lie in flight. `options` has (acknowledgement number, options of a segment).

        A first block at or below the acknowledgement is a D-SACK (RFC 2883, 4).
        """
        una, in_flight = conn.snd_una, conn.snd_nxt - conn.snd_una
        found = []
        for ack, raw in options:
            try:
                blocks = tcp.parse_sack(raw)
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
                continue
            if blocks and (ack - blocks[0][1]) & MASK < HALF:
                if (blocks[0][1] - conn.iss) & MASK > 1:  # not of SYN
                    self._duplicate(conn, now)
                del blocks[0]
            for left, right in blocks:
                start = (left - una) & MASK
                end = (right - una) & MASK
                if start < end <= in_flight:
                    found.append((una + start, una + end))
        return found

    def _duplicate(self, conn: TcpConn, now: float) -> None:
        """The guest had already what was sent again."""
        if conn.probe_at > 0:
            rtt.needless_probe(conn, now - conn.probe_at)
            conn.probe_at = 0.0
        elif conn.probe_at == 0 and conn.resent:
            conn.reorders = True

    def expired(self, conn: TcpConn, now: float) -> None:
        """No acknowledgement of data in flight came in time: a probe first, then a timeout."""
        limit = SUCCESSOR_GIVE_UP if conn.key in self._table.successors else GIVE_UP
        if conn.retries == 1:
            conn.stalled_at = now
            if conn.sack and conn.scoreboard is None and conn.snd_wnd:
                conn.probe_at = now
                self._send(conn, [(max(conn.snd_nxt - conn.mss, conn.snd_una), conn.snd_nxt)], now)
                if conn.sock is not None:
                    self._table.schedule(conn, now)
                return
        elif now - conn.stalled_at + TIMER_SLACK >= limit:
            self._table.abort(conn, "no acknowledgement")
            return
        conn.rto = min(2 * conn.rto, RTO_MAX)
        if not conn.sack:
            conn.pto = conn.rto
        conn.probe_at = TIMED_OUT
        una, nxt = conn.snd_una, conn.snd_nxt
        board = conn.scoreboard
        if board is None:
            board = conn.scoreboard = Scoreboard(una, una, nxt)
        allowance = max(conn.chunk, FRAMES_AFTER_TIMEOUT * conn.mss)
        board.timeout(una, nxt, allowance, forget=conn.retries > 2)
        self.resend(conn, now)
        if conn.sock is not None:
            self._table.schedule(conn, now, conn.stalled_at + limit)
