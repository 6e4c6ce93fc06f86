"""A timing wheel: far deadlines of connections that have no timerfd, behind one service timer.

With thousands of connections a timerfd each is half of all descriptors. Those beyond the pool's share
(`loop/timers.py`) wait here. A slot is a span of time, and a connection is in one slot at most. The spans grow with
the distance of the deadline, so that there are few slots, and the timer is armed for the first of them.

    deadline - now    span of a slot         looked at
    ----------------  ---------------------  -----------------------------------------------------------------------
    d                 the power of two       one to two spans before the deadline. It then goes to a nearer slot, at
                      from d / 8 to d / 4    last to the heap of near deadlines (`deadlines.py`), which is exact

A deadline of two hours is looked at about eight times. An earlier deadline moves the connection to another slot, a
later one leaves it where it is: `deadline` is compared when the slot is due. To leave is one access to a dict. No
operation walks over all connections: of a slot that is due, BATCH are looked at in a turn, and the rest in the next
ones, after other events. Looks come early by a tenth of the wait or more, which is time enough for that.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import frexp
from typing import Final

from ..flow.context import Context
from ..loop.each import each
from .conn import Slot, TcpConn

BATCH: Final = 256  # connections in a turn: half a millisecond
NOW: Final = 1e-6  # s from now: a timer that is to expire in the next turn


def slot_of(deadline: float, now: float) -> float:
    """The time to look at a connection whose deadline is far: the begin of a slot between `now` and `deadline`."""
    _, exponent = frexp(deadline - now)  # distance < 2 ** exponent <= 2 * distance
    span = 2.0 ** (exponent - 3)
    return deadline - deadline % span - span


class Wheel:
    """Far deadlines. look(conn, now) is called when it is time to compare a deadline with the clock."""

    def __init__(
        self, ctx: Context, look: Callable[[TcpConn, float], None], fault_at: Callable[[TcpConn, Exception], None]
    ) -> None:
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self._turn)
        self._look = look
        self._fault_at = fault_at
        self._slots: dict[float, Slot] = {}
        self._order: list[float] = []  # a heap of the times in `_slots`

    def at(self, conn: TcpConn, deadline: float, now: float) -> None:
        """Look at a connection before `deadline`, which is after `now`. An earlier look that is due is enough."""
        if conn.slot is not None:
            if conn.slot.at <= deadline:
                return
            del conn.slot.conns[conn]
        at = slot_of(deadline, now)
        slot = self._slots.get(at)
        if slot is None:
            slot = self._slots[at] = Slot(at)
            if not self._order or at < self._order[0]:
                self._timers.arm(self._timer, at)
            heappush(self._order, at)
        slot.conns[conn] = None
        conn.slot = slot

    @staticmethod
    def forget(conn: TcpConn) -> None:
        """A connection ends."""
        if conn.slot is not None:
            del conn.slot.conns[conn]
            conn.slot = None

    def _turn(self, now: float) -> None:
        """Look at connections of the slots that are due, BATCH of them at most."""
        order, slots = self._order, self._slots
        due: list[TcpConn] = []
        while order and (order[0] <= now or not slots[order[0]].conns):
            conns = slots[order[0]].conns
            while conns and len(due) < BATCH:
                conn, _ = conns.popitem()
                conn.slot = None
                due.append(conn)
            if conns:
                break
            del slots[heappop(order)]
        each(due, self._look, self._fault_at, now)
        if order:
            self._timers.arm(self._timer, max(order[0], now + NOW))
