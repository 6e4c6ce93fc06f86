"""Spliced connections that one side has reset, while the other side has not got all that came before.

RST makes a kernel discard what a socket has not sent yet. So the other side is reset only when its socket has sent all
of it. A reader sees what it would see without this program: the data, and ECONNRESET behind it.

    condition, looked at every POLL                      consequence
    ---------------------------------------------------  ----------------------------------------------------------
    the rest has moved on                                wait on
    all of it was sent                                   FIN, if the side that failed had sent FIN before RST; RST
    nothing has moved for GIVE_UP, or an error           RST

Bytes count as sent when they are in the other kernel, on the same host, or on their way to it (tcpi_notsent_bytes).
Events of such a connection are ignored: a timer that all of them share looks after them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ..flow.context import Context
from ..linux import tcpinfo
from ..loop.each import each
from .conn import Half, SpliceConn

POLL = 0.01  # s
GIVE_UP = 10.0  # s


class _Rest:
    """The rest of a connection: a half that goes on, and the reason for its end."""

    __slots__ = ("conn", "fin", "half", "left", "until", "why")

    def __init__(self, conn: SpliceConn, half: Half, why: str, fin: bool) -> None:
        self.conn, self.half, self.why, self.fin = conn, half, why, fin
        self.left = (-1, -1)  # bytes received, bytes not sent: as they were last
        self.until = 0.0


class Lingering:
    """All of them. `turn(half)` moves bytes, and raises OSError; `abort(conn, why)` resets both sides."""

    def __init__(
        self,
        ctx: Context,
        turn: Callable[[Half], Any],
        abort: Callable[[SpliceConn, str], None],
        fault_at: Callable[[SpliceConn, Exception], None],
    ) -> None:
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self._look)
        self._turn, self._abort, self._fault_at = turn, abort, fault_at
        self.rests: dict[int, _Rest] = {}  # by index of the connection

    def end(self, conn: SpliceConn, half: Half, why: str, *, fin: bool, now: float) -> None:
        """The source of `half` has failed: reset both sides, now or when the rest is delivered.

        `fin`: it sent FIN before. No event reports what is left in it.
        """
        half.eof_announced = True
        self.rests[conn.index] = _Rest(conn, half, why, fin)
        self._go_on(conn, now)
        if conn.index in self.rests and len(self.rests) == 1:
            self._timers.arm(self._timer, now + POLL)

    def forget(self, conn: SpliceConn) -> None:
        """It is released."""
        self.rests.pop(conn.index, None)

    def _look(self, now: float) -> None:
        each([rest.conn for rest in self.rests.values()], self._go_on, self._fault_at, now)
        if self.rests:
            self._timers.arm(self._timer, now + POLL)

    def _go_on(self, conn: SpliceConn, now: float) -> None:
        rest = self.rests[conn.index]
        try:
            over = self._is_over(rest, now)
        except OSError:
            over = True  # the other side has failed as well
        if over:
            self._abort(conn, rest.why)

    def _is_over(self, rest: _Rest, now: float) -> bool:
        """Move what can be moved; returns whether that was the rest, or nothing has moved for too long."""
        half = rest.half
        self._turn(half)
        unsent = tcpinfo.unsent(half.dst)
        if half.eof and not (half.held or half.pending or unsent):
            if rest.fin and not half.fin:
                half.fin = True
                half.dst.shutdown(socket.SHUT_WR)
            return True
        left = half.moved - half.held - len(half.pending), unsent
        if left != rest.left:
            rest.left, rest.until = left, now + GIVE_UP
        return now >= rest.until
