"""Bulk of the guest beside requests and answers: it is paced, so that these wait for little of it.

A request of the guest waits behind all that its bulk flows have put into the link: as much as their windows allow, some
megabytes. An answer waits while the program passes on what it has read of that, and the process that a message wakes
up waits for a processor that neither the program nor an end of the bulk flow uses. So for PACED after each message

- a window is at most PACED_WINDOW bytes (`window.py`);
- bulk is acknowledged HOLD after it has come. The guest gets to the edge of its window, and sends nothing meanwhile, so
  a flow moves up to PACED_WINDOW in each HOLD.

Acknowledgements that something depends on are not held: behind a hole, of FIN, or after a refusal. Over a link with a
long round trip the window is a larger one, and the hold a small part of the round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..flow.context import Context
from ..loop.each import each
from .conn import TcpConn

PACED_WINDOW: Final = 1 << 17  # bytes
HOLD: Final = 0.0005  # s


class Pace:
    """The connections whose acknowledgements are held. `release(conn, now)` sends one."""

    def __init__(
        self,
        ctx: Context,
        release: Callable[[TcpConn, float], None],
        fault_at: Callable[[TcpConn, Exception], None],
    ) -> None:
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self._over)
        self._release, self._fault_at = release, fault_at
        self._held: dict[int, TcpConn] = {}  # by index

    def hold(self, conn: TcpConn, now: float) -> None:
        """Bulk has come, and is acknowledged later."""
        conn.ack_due = True
        if not self._held:
            self._timers.arm(self._timer, now + HOLD)
        self._held[conn.index] = conn

    def _over(self, now: float) -> None:
        held, self._held = self._held, {}
        each(held.values(), self._end, self._fault_at, now)

    def _end(self, conn: TcpConn, now: float) -> None:
        """Unless it has ended, or a segment has acknowledged all since, and the window is as large as it should be."""
        small = conn.rcv_edge - conn.rcv_nxt < conn.rcv_wnd_low
        if conn.sock is not None and (small or conn.ack_due or conn.rcv_acked != conn.rcv_nxt):
            self._release(conn, now)
