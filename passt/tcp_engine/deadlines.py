"""Deadlines of connections: near ones share a timer, far ones have a timerfd of the pool each, or share one, too.

Every segment to the guest has a deadline a few milliseconds ahead, and nearly all of them are acknowledged long before.
With a timerfd each, a connection that talks all the time would cost two system calls and an event for each deadline.
So deadlines within SOON wait in a heap with one service timer. A deadline that moves is not moved in the heap: the
connection is looked at when it would have been, and put back.

    conn.deadline - now     looked at
    ----------------------  ------------------------------------------------------------------------------------------
    up to SOON              at a multiple of GRID before it, so that one expiration serves all busy connections; then,
                            if it has not moved, at the deadline itself
    beyond                  in the heap still, if the connection is there: most live no longer than that. Then, when
                            its timerfd expires, which is rarely re-armed (`loop/timers.py`). A connection that gets
                            none, as some thousands have one, waits in the wheel (`wheel.py`)

A deadline that has passed need not mean that the guest was silent. Of a thousand connections that end at once, the
events of the sockets alone take longer than a deadline is ahead, and acknowledgements wait in the link meanwhile. So
before the first deadline of a turn is taken for missed, the link hands on what it has. Each frame that is sent again
without need would cost two more: the guest answers it, and for a connection that has ended since, we answer that.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from .. import NEVER
from ..flow.context import Context
from ..loop.each import each
from .conn import TcpConn
from .wheel import Wheel

SOON: Final = 0.1  # s
GRID: Final = 0.005  # s
TIMER_SLACK: Final = 0.0005  # s, a timer that expires this early is on time


class Deadlines:
    """The deadlines of all connections. `expired(conn, now)` is called when one has passed."""

    def __init__(self, ctx: Context, fault_at: Callable[[TcpConn, Exception], None]) -> None:
        self._timers = ctx.timers
        self._link = ctx.link
        self._caught_up = 0.0  # `now` of the turn in which the link was last asked for what it has
        self._by_index = ctx.flows.by_index
        self._fault_at = fault_at
        self._soon: list[float] = []  # a heap of the times to look
        self._then: dict[float, list[TcpConn]] = {}  # the connections of each: many share one
        self._timer = ctx.timers.services.new(self._look)
        self._wheel = Wheel(ctx, self._compare, fault_at)
        self.expired: Callable[[TcpConn, float], None] = lambda conn, now: None
        ctx.timers.callback = self.timer_handler

    def set(self, conn: TcpConn, deadline: float, now: float) -> None:
        """Set the deadline of a connection, and see to it that it is looked at."""
        conn.deadline = deadline
        if deadline - now > SOON:
            if conn.look_at:
                return
            timer = conn.timer
            if timer < 0 and conn.slot is None:
                timer = conn.timer = self._timers.take(conn.index)
            if timer >= 0:
                self._timers.at(timer, deadline)
            else:
                self._wheel.at(conn, deadline, now)
        elif not 0 < conn.look_at <= deadline:
            self._put(conn, deadline, now)

    def forget(self, conn: TcpConn) -> None:
        """A connection ends: it needs no timer any more."""
        self._wheel.forget(conn)
        if conn.timer >= 0:
            self._timers.give_back(conn.timer)
            conn.timer = -1

    def _put(self, conn: TcpConn, deadline: float, now: float) -> None:
        at = deadline - deadline % GRID
        if at < now + GRID / 2:
            at = deadline
        conn.look_at = at
        then = self._then.get(at)
        if then is not None:
            then.append(conn)
            return
        self._then[at] = [conn]
        soon = self._soon
        if not soon or at < soon[0]:
            self._timers.services.arm(self._timer, at)
        heappush(soon, at)

    def _look(self, now: float) -> None:
        """Look at all connections whose time has come. An entry that is not the connection's last one is ignored."""
        soon = self._soon
        due = []
        while soon and soon[0] <= now + TIMER_SLACK:
            at = heappop(soon)
            for conn in self._then.pop(at):
                if at == conn.look_at:
                    conn.look_at = 0.0
                    if conn.sock is not None:
                        due.append(conn)
        each(due, self._compare, self._fault_at, now)
        if soon:
            self._timers.services.arm(self._timer, max(soon[0], now + TIMER_SLACK))

    def timer_handler(self, index: int, now: float) -> None:
        """The timerfd of flow `index` expired."""
        conn = self._by_index[index]
        if isinstance(conn, TcpConn):
            self._compare(conn, now)

    def _compare(self, conn: TcpConn, now: float) -> None:
        """It is time to look at a connection; its deadline may have moved on since."""
        if conn.sock is None or conn.deadline == NEVER:
            return
        if self._caught_up < now and conn.deadline <= now + TIMER_SLACK:
            self._caught_up = now
            self._link.catch_up(now)
            if conn.sock is None or conn.deadline == NEVER:
                return
        if now + TIMER_SLACK < conn.deadline:
            self.set(conn, conn.deadline, now)
        else:
            self.expired(conn, now)
