"""Connections that end to make room for others (`flow/half_open.py`, `flow/room.py`). Established ones do not.

    connection                                       guest                            host peer
    -----------------------------------------------  -------------------------------  --------------------------------
    the guest's, which the host has not answered     nothing: it sends SYN again,     a SYN that nothing follows
                                                     which begins another one
    the guest's, answered by SYN,ACK                 RST                              RST
    a host client's, which the guest has not         RST                              RST
    answered
    any that the host peer has reset, with data      RST, in the place of the data    -
    that the guest has not taken (`table.py`)

A guest that is not answered has not been refused, so it is not told so: its connect(2) fails by its own timeout, as on
the bare kernel.

    direction      destination, which has its share of the limit
    -------------  ---------------------------------------------
    of the guest   address of the peer
    to the guest   address and port of the guest
"""

from __future__ import annotations

from itertools import islice

from .. import log
from ..drops import Drop
from ..flow.context import Context
from ..flow.half_open import HalfOpen
from ..flow.room import CLOSING, EVICT_SHARE, HALF_OPEN
from ..loop.each import each
from .conn import SOCK_ACCEPTED, SOCK_FAILED, TAP_SYN_ACK_SENT, TcpConn
from .table import TcpTable


class Eviction:
    """`opening.py` asks it before it adds a connection, and `ctx.room` when the process runs short."""

    def __init__(self, ctx: Context, table: TcpTable) -> None:
        self._drops = ctx.drops
        self._by_index = ctx.flows.by_index
        self._table = table
        ctx.room.offer(CLOSING, self._give_closing)
        ctx.room.offer(HALF_OPEN, self._give_half_open)

    def outbound(self, peer: bytes, now: float) -> None:
        """The guest is about to connect to `peer`: if too many of its connections wait, one of these ends."""
        conn = self._table.outbound.in_the_way(peer)
        if conn is not None:
            self._make_way(conn, self._table.outbound, "The host", now)

    def inbound(self, key: bytes, now: float) -> bool:
        """The same for a host client; returns False where only successors wait."""
        table = self._table
        if len(table.successors) >= table.inbound.limit:
            return False
        conn = table.inbound.in_the_way(to_guest(key), len(table.successors))
        if conn is not None:
            self._make_way(conn, table.inbound, "The guest", now)
        return True

    def _make_way(self, conn: TcpConn, half_open: HalfOpen[TcpConn], who: str, now: float) -> None:
        text = f"{who} leaves {len(half_open)} connections unanswered: new ones take the place of the oldest"
        log.warn_ratelimited(f"half open: {who}", text, now)
        self._evict(conn)

    def _give_half_open(self, foreign: bool, now: float) -> int:
        """End the oldest of these at once; returns how many these were."""
        inbound, outbound = self._table.inbound, self._table.outbound
        ending = list(islice(inbound.all(), -(-len(inbound) // EVICT_SHARE)))
        if not foreign:
            ending += islice(outbound.all(), -(-len(outbound) // EVICT_SHARE))
        return self._give(ending)

    def _give_closing(self, foreign: bool, now: float) -> int:
        """The same for those that were reset, in both directions."""
        by_index = self._by_index
        return self._give([conn for i in self._table.failed if isinstance(conn := by_index[i], TcpConn)])

    def _give(self, ending: list[TcpConn]) -> int:
        each(ending, self._evict, self._table.fault_at)
        return len(ending)

    def _evict(self, conn: TcpConn) -> None:
        """End a connection."""
        events = conn.events
        inbound = events & SOCK_ACCEPTED
        if events & SOCK_FAILED:
            self._drops[Drop.TCP_CLOSING_EVICTED] += 1
        else:
            self._drops[Drop.TCP_INBOUND_EVICTED if inbound else Drop.TCP_EVICTED] += 1
        self._table.evict(conn, silent=not events & (SOCK_ACCEPTED | TAP_SYN_ACK_SENT))


def to_peer(key: bytes) -> bytes:
    """The destination of a connection of the guest."""
    return key[len(key) // 2 - 2 : -4]


def to_guest(key: bytes) -> bytes:
    """The destination of a connection of a host client."""
    n = (len(key) - 4) // 2
    return key[:n] + key[2 * n : 2 * n + 2]
