"""Acknowledgements and windows towards the guest: which of its data has arrived, and how much more it may send.

Acknowledgements
================

    host peer                       the guest's data is acknowledged
    ------------------------------  --------------------------------------------------------------------------------
    near: on this host, or closer   when the socket takes it, and FIN likewise: neither can get lost any more
    than 100 us (tcpi_min_rtt)
    elsewhere                       when the socket takes it, but for the last 32 to 64 KiB (the tail). The tail and FIN
                                    are acknowledged when the peer has acknowledged them (tcpi_bytes_acked)

The tail makes delivery visible. A guest whose path is cut keeps unacknowledged data, so TCP_USER_TIMEOUT, SIOCOUTQ and
SO_LINGER in the guest work as they do on the host. Data before the tail is acknowledged at once, because each of the
two kernels has a congestion control of its own: a guest that waited for the round trip of the path, and then for the
next look at TCP_INFO, would fill a fast path at a quarter of its rate.

    TCP_INFO is read                  for
    --------------------------------  ------------------------------------------------------------------------------
    at the first data, and with each  the round trip, which decides whether the peer is near and how often to read, and
    new window                        the host peer's window
    when the host peer sends          its acknowledgement of the request: the answer to the guest carries ours
    a round trip after the data       no event reports an acknowledgement of the peer. The interval is 1 to 10 ms, and
                                      later an eighth of the time since the last data, at most 1 s

An acknowledgement to the guest goes out at once, or is delayed:

    at once     after a batch of BULK_MIN bytes or more; with a new window; after a segment that is a duplicate, out of
                order, a probe, or refused by the socket; and always outside the ping-pong mode
    delayed     in ping-pong mode, about 10 ms, so that an answer can carry it

Ping-pong mode is the kernel's: it begins when two answers in a row came within the delay, and ends when a delay passes
without one. One timer serves all delays, by a heap. It also consumes from the host sockets what the guest has
acknowledged since (`output.py`).

The window
==========

The window advertised is what the socket can take: three quarters of the free space in its send buffer (SO_MEMINFO), and
not more than the larger of the host peer's window (tcpi_snd_wnd) and 64 KiB. It is computed again when half of it is
used up, not for each segment. Its right edge never moves left. A send buffer that is two thirds full is no longer
writable to the kernel; from then on EPOLLOUT tells when to advertise more. Waiting for EPOLLOUT also makes the kernel
enlarge a buffer that limits the connection.

A new window never exceeds the free space, so the socket rarely refuses data. Data that it does refuse is dropped and
counted, and duplicate acknowledgements ask for it once EPOLLOUT reports room.

Silly window avoidance (RFC 9293, 3.8.6.2.1): a guest sends nothing shorter than a segment, or half of the largest
window that it has seen, whichever is less. It waits for more window, and probes after 200 ms. So the window is computed
again before the rest becomes that small (`rcv_wnd_low`). Where it stays small although the socket drains, the
delayed-ACK timer computes it again.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from ..flow.context import Context
from ..linux import tcpinfo
from ..loop.each import each
from ..loop.reactor import EPOLLOUT
from ..policy.config import Config
from .conn import CLOSED, SOCK_ACCEPTED, TAP_FIN_RCVD, WINDOW_MAX, TcpConn
from .output import TcpOut
from .sock import INTEREST
from .table import TcpTable

ACK_DELAY = 0.010  # s; half as much to half as much again
COALESCE = ACK_DELAY / 4  # s: delays that end so close to each other end together
POLL_MIN = 0.001  # s between reads of TCP_INFO; the interval grows from the round trip, ACK_DELAY at most
POLL_MAX = 1.0  # s, while the peer acknowledges nothing
PINGPONG_MAX = 3
PINGPONG = 2  # answers in time after which acknowledgements are delayed
BULK_MIN = 8192  # bytes: a batch of so many is no request that waits for its answer
TAIL_MAX = 65536  # bytes that may wait for the host peer's acknowledgement
TAIL_MIN = 32768  # bytes that go on waiting where there are more
NEAR_US = 100  # us, round trip below which a peer is near
WINDOW_FLOOR = 65536  # bytes, advertised whatever the host peer's window if the send buffer has room


class TcpAck:
    """Acknowledgements and windows of all connections, and the delayed-ACK timer."""

    def __init__(self, ctx: Context, out: TcpOut, table: TcpTable, features: tcpinfo.Features) -> None:
        self._ctx = ctx
        self._out = out
        self._table = table
        self._features = features
        self._waiting: list[tuple[float, int, TcpConn]] = []  # a heap, by deadline
        self._order = count()
        self._timer = ctx.timers.services.new(self.timer_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._segment = (config.mtu or 1500) - 40  # payload of the guest's longest segment

    def acknowledge(self, conn: TcpConn, n: int, must_ack: bool, now: float) -> None:
        """Acknowledge what may be acknowledged of the `n` bytes that the socket has just taken, now or later."""
        before = conn.rcv_acked
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        elif conn.rcv_nxt - before > TAIL_MAX:
            conn.rcv_acked = conn.rcv_nxt - TAIL_MIN
        elif not conn.poll_interval:
            self.update_rcv_acked(conn)
        if conn.rcv_edge - conn.rcv_nxt < conn.rcv_wnd_low or conn.rcv_dropped:
            self.open_window(conn, now)
            must_ack = True
        if must_ack or (conn.rcv_acked != before and (n >= BULK_MIN or conn.pingpong < PINGPONG)):
            self._out.ack(conn)
            if conn.rcv_acked == conn.rcv_nxt:
                return
        self._delay_ack(conn, now)

    def acknowledge_fin(self, conn: TcpConn, now: float) -> None:
        """The same for FIN and the data before it. An acknowledged FIN may complete the connection."""
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        else:
            self.update_rcv_acked(conn)
        self._out.ack(conn)
        if conn.rcv_acked != conn.rcv_nxt:
            self._delay_ack(conn, now)

    def _delay_ack(self, conn: TcpConn, now: float) -> None:
        """Delay an acknowledgement."""
        conn.ack_due = True
        if not conn.delack_at or conn.rcv_acked != conn.rcv_nxt:
            self.queue_delayed(conn, now)

    def queue_delayed(self, conn: TcpConn, now: float) -> None:
        """Put `conn` into the heap of the delayed-ACK timer, unless it is there with an earlier deadline.

        A later entry stays in the heap and is ignored: its deadline is not that of the connection. The deadline of a
        delayed acknowledgement is a multiple of ACK_DELAY, which all connections share: short ones would otherwise cost
        an expiration of the timer each.
        """
        if conn.rcv_acked != conn.rcv_nxt:
            deadline = now + max(conn.poll_interval, min((now - conn.t_rx) / 8, POLL_MAX))
        else:
            earliest = now + ACK_DELAY / 2
            deadline = earliest - earliest % ACK_DELAY + ACK_DELAY
        if 0 < conn.delack_at <= deadline:
            return
        conn.delack_at = deadline
        waiting = self._waiting
        if not waiting or deadline < waiting[0][0]:
            self._ctx.timers.services.arm(self._timer, deadline)
        heappush(waiting, (deadline, next(self._order), conn))

    def update_rcv_acked(self, conn: TcpConn) -> bool:
        """Read what the host peer has acknowledged; returns whether that is more than before."""
        before = conn.rcv_acked
        info = tcpinfo.tcp_info(conn.sock)
        # tcpi_bytes_acked counts FIN as a byte, and SYN, too, unless the socket was accepted.
        first = conn.irs + 1 if conn.events & SOCK_ACCEPTED else conn.irs
        acked = min(first + tcpinfo.u64(info, tcpinfo.BYTES_ACKED), conn.rcv_nxt)
        conn.rcv_acked = max(before, acked)
        self._measure(conn, info)
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        return conn.rcv_acked != before

    def _measure(self, conn: TcpConn, info: bytes) -> None:
        """Derive from TCP_INFO whether the host peer is near, and how often to read TCP_INFO."""
        conn.poll_interval = min(max(tcpinfo.u32(info, tcpinfo.RTT) * 1.25e-6, POLL_MIN), ACK_DELAY)
        if self._features.min_rtt and tcpinfo.u32(info, tcpinfo.MIN_RTT) < NEAR_US:
            conn.near = True

    def open_window(self, conn: TcpConn, now: float) -> None:
        """Move the right edge as far as the socket has room, and ask for EPOLLOUT where that is little."""
        size, used = tcpinfo.send_buffer(conn.sock, self._features)
        window = (size - used) * 3 // 4  # the kernel charges its sk_buffs to the same buffer
        if self._features.snd_wnd:
            info = tcpinfo.tcp_info(conn.sock)
            window = min(window, max(tcpinfo.u32(info, tcpinfo.SND_WND), WINDOW_FLOOR))
            if not conn.near:
                self._measure(conn, info)
        conn.rcv_edge = max(conn.rcv_edge, conn.rcv_nxt + min(window, WINDOW_MAX), conn.rcv_nxt)
        window = conn.rcv_edge - conn.rcv_nxt
        conn.rcv_wnd_max = max(conn.rcv_wnd_max, conn.rcv_edge - conn.rcv_acked)  # for the guest it begins at rcv_acked
        rounding = (1 << conn.rcv_wscale) - 1  # bytes that scaling may take off a window (RFC 7323, 2.3)
        conn.rcv_wnd_low = max(window // 2, min(self._segment, conn.rcv_wnd_max // 2)) + rounding
        if used * 3 > size * 2 or conn.rcv_dropped:
            conn.wait_writable = True
            self._ctx.reactor.change(conn.fd, INTEREST | EPOLLOUT)
        elif window < conn.rcv_wnd_low and used and not conn.delack_at:
            self.queue_delayed(conn, now)

    def writable(self, conn: TcpConn, now: float) -> None:
        """The send buffer has room again: advertise it, and ask for a fast retransmit of what was dropped."""
        conn.wait_writable = False
        lost, conn.rcv_dropped = conn.rcv_dropped, False
        self.open_window(conn, now)
        self._out.ack(conn)
        if lost:
            for _ in range(3):  # duplicate acknowledgements start a fast retransmit (RFC 5681, 3.2)
                self._out.ack(conn)

    def timer_handler(self, now: float) -> None:
        """Handle each connection whose delay is over, or nearly over."""
        waiting = self._waiting
        due = []
        while waiting and waiting[0][0] <= now + COALESCE:
            deadline, _, conn = heappop(waiting)
            if deadline == conn.delack_at:
                due.append(conn)
        each(due, self._delay_over, self._table.fault_at, now)
        if waiting:
            self._ctx.timers.services.arm(self._timer, max(waiting[0][0], now + POLL_MIN))

    def _delay_over(self, conn: TcpConn, now: float) -> None:
        """A delay is over. Consume what the guest has acknowledged, and compute a window that is too small again.

        An acknowledgement that waits for the host peer's is sent or waits again. One that waited for an answer is sent.
        """
        conn.delack_at = 0.0
        if conn.sock is None:
            return
        if conn.snd_una != conn.base:
            self._out.consume(conn)
        low = conn.rcv_edge - conn.rcv_nxt < conn.rcv_wnd_low
        if low and not conn.wait_writable and not conn.events & TAP_FIN_RCVD:
            self.open_window(conn, now)
            if conn.rcv_edge - conn.rcv_nxt >= conn.rcv_wnd_low:
                self._out.ack(conn)
        if conn.rcv_acked != conn.rcv_nxt:
            if self.update_rcv_acked(conn):
                self.forward_ack(conn)
            if conn.rcv_acked != conn.rcv_nxt:
                self._delay_ack(conn, now)
        elif conn.ack_due:
            if now - conn.t_rx < ACK_DELAY / 2:  # newer data came, and its delay has just begun
                self._delay_ack(conn, now)
                return
            conn.pingpong = 0
            self._out.ack(conn)

    def forward_ack(self, conn: TcpConn) -> None:
        """Acknowledge what `update_rcv_acked` found. If that completes both directions, the connection is over."""
        self._out.ack(conn)
        if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
            self._table.close(conn)
