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

Light flows beside bulk. A request of few bytes was handed on to a host peer, or an answer to the guest, while a bulk
flow moves. For LIGHT from then on:

- bulk is sent behind the events of a turn only, where the messages of that turn are no more in its way;
- a turn is LIGHT_TURN bytes, CUT_TURN where the program cuts super-frames, which takes longer: a message that comes
  meanwhile waits for that much;
- where no other message has come OVERDUE after the last one, bulk pauses until one comes, or for PAUSE_MAX.

A message of a bulk flow itself does not count, such as the end of a read that its window cut short: the flow would slow
itself down. The rest of its stream waits for that in any case.

The pause is for the process that the message has woken up. On processors which the daemon and both ends of a bulk flow
keep busy, it waits until one of them has used up its time, some milliseconds. This process is one of them: with bulk to
send it never sleeps. When it does, there is a processor. Pauses take CREDIT_RATE of the other time at most (`_credit`),
since a receiver may be silent for reasons of its own. A link with a queue keeps it short for PACED after a message
(`queue_little`), as an answer waits behind all of it.

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
LIGHT_TURN: Final = TURN_MAX >> 1  # bytes, beside a light flow: one peek
CUT_TURN: Final = 1 << 17  # bytes, the same where super-frames are cut: 0.4 ms at an MTU of 1500
LIGHT: Final = 0.020  # s, and the time for which a flow that sent SPARSE bytes or more at once is bulk
PACED: Final = 0.300  # s, the same for bulk of the guest: some keys that are pressed are so far apart
BULKS_MAX: Final = 256  # connections that are known as bulk
OVERDUE: Final = 0.0002  # s, from the turn of the message: an exchange takes less, unless it waits for a processor
PAUSE_MAX: Final = 0.001  # s
PAUSE_MIN: Final = 0.00005  # s
CREDIT_RATE: Final = 1 / 2  # s of credit for a second without pause
PAUSES: Final = 2 * PAUSE_MAX  # s, the most credit


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
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self._pause_over)
        self._most = TURN_MAX  # bytes in a turn
        self._bulk_until = 0.0
        self._bulk_at: dict[int, float] = {}  # by index: when the connection was bulk, for as many as there may be
        self._light_until = 0.0
        self._handed_on_at = 0.0  # the last message, if nothing has followed it yet
        self._paused_at = 0.0  # 0: bulk is not paused
        self._credit = 0.0  # s of pauses, at `_credit_at`
        self._credit_at = 0.0
        self.left = TURN_MAX
        self.paced_until = 0.0  # for bulk of the guest (`pace.py`), and a link that queues
        self._queues_little = False
        self.light = False  # whether bulk is sent in walks only
        self.walking = False  # between `begin` and `end`
        self.waiting: dict[int, TcpConn] = {}  # by index
        self.resume: Callable[[float], None] = lambda now: None  # the walk: `begin`, `may_send` for each, `end`

    def renewed(self) -> int:
        """`left` in this turn: bytes of earlier turns are none of its."""
        turn = self._reactor.wakeups
        if turn != self._turn:
            self._turn, self.left = turn, 0 if self._paused_at else self._most
        return self.left

    def put_off(self, conn: TcpConn) -> None:
        """`conn` goes on in the next turn, behind the others that wait."""
        self.waiting[conn.index] = conn
        self._go_on_next_turn()

    def _go_on_next_turn(self) -> None:
        if not self._begins and not self._paused_at:
            self._begins = True
            self._reactor.next_turn(self._next_turn)

    def _next_turn(self, now: float) -> None:
        self._begins = False
        if self.light:
            if now > self._light_until:
                self.light, self._most = False, TURN_MAX
            elif self._handed_on_at and now - self._handed_on_at > OVERDUE and self._begin_pause(now):
                return
        self.resume(now)

    def bulk(self, index: int, now: float) -> None:
        """SPARSE bytes or more of connection `index` were handed on at once, to either side."""
        self._bulk_until = now + LIGHT
        if len(self._bulk_at) >= BULKS_MAX:
            self._bulk_at.clear()
        self._bulk_at[index] = now
        if self._queues_little and now > self.paced_until:
            self._queues_little = False
            self._link.queue_little(False)

    def handed_on(self, index: int, now: float) -> None:
        """Few bytes of connection `index` were handed on: a request or an answer, unless they are part of its bulk."""
        if now > self._bulk_until or now - self._bulk_at.get(index, -LIGHT) <= LIGHT:
            return
        self.paced_until = now + PACED
        if not self._queues_little:
            self._queues_little = True
            self._link.queue_little(True)
        self.light, self._most = True, CUT_TURN if self._link.cuts else LIGHT_TURN
        self._light_until = now + LIGHT
        self._handed_on_at = now
        if self._paused_at:
            self._end_pause(now)
            if self.waiting:
                self._go_on_next_turn()

    def _begin_pause(self, now: float) -> bool:
        """Let bulk wait, if there is credit for that; whether it does."""
        self._credit = min(PAUSES, self._credit + (now - self._credit_at) * CREDIT_RATE)
        self._credit_at = now
        if self._credit < PAUSE_MIN:
            return False
        self._handed_on_at, self._paused_at, self.left = 0.0, now, 0
        self._timers.arm(self._timer, now + min(PAUSE_MAX, self._credit))
        return True

    def _end_pause(self, now: float) -> None:
        self._credit -= now - self._paused_at
        self._credit_at, self._paused_at = now, 0.0

    def _pause_over(self, now: float) -> None:
        """The timer of the pause: no message has come, unless it is that of a pause that one has ended."""
        if self._paused_at:
            self._end_pause(now)
            if self.waiting:
                self._go_on_next_turn()

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
