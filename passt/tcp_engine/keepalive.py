"""Keep-alive of the guest: its probes ask for the host peer, so the peer answers them.

    guest                  here                              host's kernel              host peer
      |   probe, seq rcv_nxt - 1  |  TCP_KEEPIDLE 1 s               |     probe             |
      |-------------------------->|-------------------------------->|---------------------->|
      |                           |  TCP_INFO, after 10, 20, 40 ms  |       ACK             |
      |            ACK            |  ... : heard of the peer?       |<----------------------|
      |<--------------------------|                                 |

The guest's kernel counts: its own TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT and TCP_USER_TIMEOUT decide when a peer is
dead, to the second, and its application gets the same error as on the host. It then sends RST, which reaches the host
peer. If this program answered by itself, the guest would never see its interval and count at work.

The host's kernel sends one probe for each of the guest's. TCP_KEEPIDLE, set on a socket with SO_KEEPALIVE, starts its
timer again from the last segment of the peer, and more than a second has passed since: the timer expires at once. The
next probe of its own follows after TCP_KEEPINTVL, which is set to nine hours. TCP_KEEPCNT is the kernel's maximum, so
that the guest gives up first.

    segment with SEG.SEQ = RCV.NXT - 1, at most one byte     answer
    -------------------------------------------------------  ---------------------------------------------------------
    the window is closed, or smaller than a segment needs    at once: a zero-window probe (RFC 9293, 3.8.6.1)
    data of the guest is not acknowledged, or came less      at once: a retransmission. No kernel probes an idle time
    than IDLE_MIN ago                                        of less than a second (TCP_KEEPIDLE of Linux)
    the host peer was heard of less than IDLE_MIN ago        at once
    any other: keep-alive (RFC 9293, 3.8.4)                  when the host peer has answered

The byte: RFC 9293 allows a byte of no meaning in a probe, which Windows sends.
"""

from __future__ import annotations

import socket
from heapq import heappop, heappush
from itertools import count
from typing import Final

from ..flow.context import Context
from ..linux import tcpinfo
from ..linux.sockopt import setting
from ..loop.each import each
from .conn import TcpConn
from .output import TcpOut
from .table import TcpTable

IDLE_MIN: Final = 0.9  # s
LOOK_FIRST: Final = 0.010  # s from the guest's probe to the first read of TCP_INFO; each interval is twice the last
LOOK_MAX: Final = 1.0  # s
LOOKS_TOTAL: Final = 120.0  # s after which an answer is awaited no longer: the guest has asked again, or never will
COALESCE: Final = LOOK_FIRST / 4
PROBE_AFTER: Final = 1  # s, the least that Linux takes for TCP_KEEPIDLE
INTERVAL: Final = 32767  # s, MAX_TCP_KEEPINTVL of Linux
COUNT: Final = 127  # MAX_TCP_KEEPCNT of Linux

Look = tuple[float, int, float, float, TcpConn]  # time, order, interval since the last one, `asked_at`, connection

CALLS = setting(
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    *((socket.IPPROTO_TCP, o) for o in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)),
)


class KeepAlive:
    """The probes of all guest connections that wait for their host peers, and one timer for them."""

    def __init__(self, ctx: Context, out: TcpOut, table: TcpTable) -> None:
        self._ctx = ctx
        self._out = out
        self._table = table
        self._waiting: list[Look] = []  # a heap
        self._order = count()
        self._timer = ctx.timers.services.new(self.timer_handler)

    def probed(self, conn: TcpConn, now: float) -> None:
        """The guest sent an old sequence number, as in the table above. Raises OSError."""
        open_window = conn.rcv_edge - conn.rcv_acked >= conn.rcv_wnd_low
        if not open_window or conn.rcv_acked != conn.rcv_nxt or now - conn.t_rx < IDLE_MIN:
            self._out.ack(conn)
        elif conn.asked_at:
            if now - conn.asked_at >= IDLE_MIN:
                self._ask(conn, now)
        elif _silence(conn) < IDLE_MIN:
            self._out.ack(conn)
        else:
            if not conn.keepalive:
                conn.keepalive = True
                _turn_on(conn.sock)
            self._ask(conn, now)

    def _ask(self, conn: TcpConn, now: float) -> None:
        """Let the kernel probe the host peer, and look for its answer."""
        conn.asked_at = now
        conn.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER)
        self._look_later(conn, now, LOOK_FIRST)

    def _look_later(self, conn: TcpConn, now: float, interval: float) -> None:
        waiting, look = self._waiting, now + interval
        if not waiting or look < waiting[0][0]:
            self._ctx.timers.services.arm(self._timer, look)
        heappush(waiting, (look, next(self._order), interval, conn.asked_at, conn))

    def timer_handler(self, now: float) -> None:
        """Look at each host socket whose time it is."""
        waiting, due = self._waiting, []
        while waiting and waiting[0][0] <= now + COALESCE:
            due.append(heappop(waiting))
        each(due, self._look, self._fault, now)
        if waiting:
            self._ctx.timers.services.arm(self._timer, max(waiting[0][0], now + COALESCE))

    def _look(self, look: Look, now: float) -> None:
        """Answer the guest if the host peer has."""
        _, _, interval, asked_at, conn = look
        if conn.sock is None or conn.asked_at != asked_at:
            return  # it is over, or the guest has asked again
        if _silence(conn) < now - asked_at + IDLE_MIN / 2:  # any segment before that is older by IDLE_MIN
            conn.asked_at = 0.0
            self._out.ack(conn)
        elif now - asked_at < LOOKS_TOTAL:
            self._look_later(conn, now, min(2 * interval, LOOK_MAX))
        else:
            conn.asked_at = 0.0

    def _fault(self, look: Look, e: Exception) -> None:
        self._table.fault_at(look[-1], e)


def _silence(conn: TcpConn) -> float:
    """Seconds since the host socket last received a segment of its peer."""
    info = tcpinfo.tcp_info(conn.sock)
    return min(tcpinfo.u32(info, tcpinfo.LAST_DATA_RECV), tcpinfo.u32(info, tcpinfo.LAST_ACK_RECV)) / 1e3


def _turn_on(sock: socket.socket) -> None:
    """Let the kernel probe, though not by itself."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, COUNT)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
