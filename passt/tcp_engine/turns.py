"""Connections that wait to send to the guest, and their order.

    waits for                        until                                        goes on
    -------------------------------  -------------------------------------------  --------------------------------
    the link: it is full, or has     the back end calls `on_room`                 in the turn of that call
    no room (`link/backend.py`)
    its turn: all connections have   the next turn of the loop, which does not    behind the events of that turn,
    sent TURN_MAX bytes in this      wait then                                    with what is left of another
    one, or others wait                                                           TURN_MAX

A guest with a window of some megabytes would otherwise have one bulk flow filled up to its window within one event, and
one that waits for the link would fill it each time that it has room: an answer of one byte waited for as long as the
bulk flow had data.

The order. Connections with less than SPARSE bytes in flight come first, because they wait for an answer. They wait for
no turn: where it is used up, they may have SPARSE bytes in flight. The others follow in the order in which they began
to wait. One that has sent and has more begins to wait anew, behind those that found the link full or TURN_MAX used up
before they could send. An acknowledgement lets none of them overtake those that wait. So many bulk flows share the link
in turns, and each waits for the others once.

Not in here: retransmissions, which a hole limits; acknowledgements and other bare segments, which are always sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..flow.context import Context
from .conn import TcpConn

# Bytes to the guest, of all connections, before other events have their turn: two peeks of whole frames, 0.5 ms
TURN_MAX: Final = 15 << 15
SPARSE: Final = 1 << 14  # bytes


def _is_busy(conn: TcpConn) -> bool:
    return conn.snd_nxt - conn.snd_una >= SPARSE


class Turns:
    """The connections that wait. `left` is what may be sent in this turn; a sender subtracts from it."""

    def __init__(self, ctx: Context) -> None:
        self._link = ctx.link
        self._reactor = ctx.reactor
        self._passed_over: dict[int, TcpConn] = {}
        self._begins = False  # `_next_turn` is going to be called
        self._turn = ctx.reactor.wakeups  # that `left` is about
        self.left = TURN_MAX
        self.walking = False  # between `begin` and `end`
        self.waiting: dict[int, TcpConn] = {}  # by index
        self.resume: Callable[[float], None] = lambda now: None  # the walk: `begin`, `may_send` for each, `end`

    def renewed(self) -> int:
        """`left` in this turn: bytes of earlier turns are none of its."""
        turn = self._reactor.wakeups
        if turn != self._turn:
            self._turn, self.left = turn, TURN_MAX
        return self.left

    def put_off(self, conn: TcpConn) -> None:
        """`conn` goes on in the next turn, behind the others that wait."""
        self.waiting[conn.index] = conn
        self._go_on_next_turn()

    def _go_on_next_turn(self) -> None:
        if not self._begins:
            self._begins = True
            self._reactor.next_turn(self._next_turn)

    def _next_turn(self, now: float) -> None:
        self._begins = False
        self.resume(now)

    def begin(self) -> list[TcpConn]:
        """Those that wait, in their order. They do not wait any more, and may send what is left in this turn."""
        waiting, self.waiting = self.waiting, {}
        self.walking = True
        self.renewed()
        return sorted(waiting.values(), key=_is_busy)

    def may_send(self, conn: TcpConn) -> bool:
        """Whether `conn`, one of these, may send now; if not, it is in front the next time."""
        if (self.left > 0 or not _is_busy(conn)) and not self._link.full and self._link.room > 0:
            return True
        self._passed_over[conn.index] = conn
        return False

    def end(self) -> None:
        """All had their chance."""
        self.walking = False
        first, self._passed_over = self._passed_over, {}
        self.waiting = first | self.waiting
        if first and self.left <= 0:
            self._go_on_next_turn()
