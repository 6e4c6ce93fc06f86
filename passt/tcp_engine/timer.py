"""The timer of a connection: what its expiry means (the table in `tcp.py`)."""

from __future__ import annotations

from typing import Final

from ..wire.tcp import ACK
from .conn import ESTABLISHED, FAILED_PROBES, GIVE_UP, RTO_MAX, SOCK_FAILED, SYN_TIMEOUT, TcpConn
from .deadlines import TIMER_SLACK
from .opening import TcpOpen
from .output import TcpOut
from .recovery import TcpRecovery
from .table import TcpTable

KEEPALIVE_PROBES: Final = 8


class TcpTimer:
    """The timers of all connections (`deadlines.py`)."""

    def __init__(self, out: TcpOut, table: TcpTable, opening: TcpOpen, recovery: TcpRecovery) -> None:
        self._out = out
        self._table = table
        self._opening = opening
        self._recovery = recovery
        table.deadlines.expired = self.handler

    def handler(self, conn: TcpConn, now: float) -> None:
        """The deadline of a connection has passed."""
        conn.retries += 1
        if not conn.events & ESTABLISHED:
            self._no_answer(conn, now)
        elif conn.snd_nxt != conn.snd_una:
            self._recovery.expired(conn, now)
        elif conn.events & SOCK_FAILED and conn.retries > FAILED_PROBES:
            self._table.broken(conn, 0, now)
        elif conn.snd_wnd and conn.retries > KEEPALIVE_PROBES:
            self._table.abort(conn, "no answer to keep-alive")
        elif not conn.snd_wnd and conn.retries > 1 and now - conn.stalled_at + TIMER_SLACK >= GIVE_UP:
            self._table.abort(conn, "no acknowledgement")
        else:
            if conn.retries == 1:
                conn.stalled_at = now
            # RFC 9293, 3.8.4 and 3.8.6.1: the guest answers an old sequence number by ACK with its window
            self._out.bare(conn, ACK, conn.snd_una - 1)
            self._table.schedule(conn, now)

    def _no_answer(self, conn: TcpConn, now: float) -> None:
        """Nothing acknowledges SYN or SYN,ACK: once more, with twice the timeout (RFC 6298, 5.5)."""
        end = conn.rtt_at + SYN_TIMEOUT
        if now + TIMER_SLACK >= end:
            self._table.abort(conn, "no answer of the guest")
            return
        conn.rto = min(2 * conn.rto, RTO_MAX)
        conn.stalled_at = now
        self._opening.retransmit_syn(conn)
        self._table.schedule(conn, now, end)
