"""What the guest is told about its own data: how much of it arrived, and how much more we take.

    host peer                       acknowledged
    ------------------------------  --------------------------------------------------------------------------------
    on this host, or closer than    as soon as the socket took the data, or FIN: it will not get lost
    100 us (tcpi_min_rtt)
    elsewhere                       as soon as the socket took it, but for the last 32 to 64 KiB (the tail). The tail
                                    and FIN are acknowledged when the peer has acknowledged them (tcpi_bytes_acked)

The tail is what makes delivery visible: a guest whose path is cut keeps unacknowledged data, so that TCP_USER_TIMEOUT,
SIOCOUTQ and SO_LINGER inside work as on the bare kernel. All before the tail is acknowledged at once, because the two
kernels each have a congestion control of their own: a guest that waits for the round trip of the path and, on top, for
us to look, fills a fast path at a quarter of its rate.

    when TCP_INFO is looked at        why
    --------------------------------  ------------------------------------------------------------------------------
    handshake, or the first data      the round trip decides whether the peer is near, and how often to look
    the host peer sends something     its answer says that the request has arrived: the acknowledgement rides on it
    a round trip after the data       nothing tells that the peer has acknowledged. 1 to 10 ms; later less often, each
                                      eighth of the time since the data came, at least once a second

An acknowledgement of a near peer waits about 10 ms for an answer to ride on, once two answers in a row came within that
time (as Linux's "ping-pong" mode does); a wait that was in vain ends the habit. The timer that serves all such waits
also drops from the sockets what the guest has acknowledged meanwhile.

The window
==========

What we promise is what the socket can take: three quarters of the free space of its send buffer (SO_MEMINFO), at most
the host peer's window (tcpi_snd_wnd) or 64 KiB, whichever is larger. It is computed again when half of it is used up,
not with each segment, and its right edge never moves left. When the buffer is two thirds full, which is where the
kernel stops calling it writable, EPOLLOUT says when to promise more; waiting for EPOLLOUT is also what makes the
kernel grow a buffer that limits the connection. Nothing is promised in the hope that it will fit, so nothing needs to
be dropped; if the kernel takes less all the same, the rest is dropped, counted, and asked for when there is room.

A guest does not send less than a segment or half of the largest window it has seen, whichever is less (RFC 9293,
3.8.6.2.1): it waits for more window, until after 200 ms it probes. So what is left never becomes that small without
the window being computed again; if it stays so while the socket drains, the timer of delayed acknowledgements looks.
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

ACK_DELAY = 0.010  # s
TOGETHER = ACK_DELAY / 4  # s: waits that end so close to each other end at once
POLL_MIN = 0.001  # s between looks at TCP_INFO; the longest regular one is ACK_DELAY
POLL_MAX = 1.0  # s, where the peer stays silent
PINGPONG_MAX = 3
PINGPONG = 2  # answers in time before an acknowledgement waits
BULK = 8192  # bytes in one batch that are not a request waiting for its answer
TAIL_MAX = 65536  # bytes that may wait for the peer's acknowledgement
TAIL_MIN = 32768  # bytes of them that go on waiting when there are more
NEAR_US = 100  # round trip below which a peer counts as near
WINDOW_FLOOR = 65536  # bytes promised whatever the host peer's window, if the send buffer has room


class TcpAck:
    """Acknowledgements and windows of all connections, and the one timer of those that wait."""

    def __init__(self, ctx: Context, out: TcpOut, table: TcpTable, features: tcpinfo.Features) -> None:
        self._ctx = ctx
        self._out = out
        self._table = table
        self._features = features
        self._waiting: list[tuple[float, int, TcpConn]] = []  # a heap, by the time at which to look
        self._order = count()
        self._timer = ctx.timers.services.new(self.timer_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._segment = (config.mtu or 1500) - 40  # the longest that the guest sends

    def owe(self, conn: TcpConn, n: int, must_ack: bool, now: float) -> None:
        """Decide what of the `n` bytes just taken to acknowledge, and whether to do so now."""
        before = conn.rcv_acked
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        elif conn.rcv_nxt - before > TAIL_MAX:
            conn.rcv_acked = conn.rcv_nxt - TAIL_MIN
        elif not conn.poll:
            self.follow(conn)
        if conn.rcv_edge - conn.rcv_nxt < conn.rcv_low or conn.lost:
            self.open_window(conn, now)
            must_ack = True
        if must_ack or (conn.rcv_acked != before and (n >= BULK or conn.pingpong < PINGPONG)):
            self._out.ack(conn)
            if conn.rcv_acked == conn.rcv_nxt:
                return
        self._delay(conn, now)

    def owe_fin(self, conn: TcpConn, now: float) -> None:
        """Likewise, for FIN and what came with it. The connection may be over then, if it is acknowledged."""
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        else:
            self.follow(conn)
        self._out.ack(conn)
        if conn.rcv_acked != conn.rcv_nxt:
            self._delay(conn, now)

    def _delay(self, conn: TcpConn, now: float) -> None:
        """Owe an acknowledgement, for a while."""
        conn.ack_due = True
        if not conn.queued:
            self.look_later(conn, now)

    def look_later(self, conn: TcpConn, now: float) -> None:
        """Have the timer see to what `conn`, which is not queued yet, has put off."""
        conn.queued = True
        wait = ACK_DELAY
        if conn.rcv_acked != conn.rcv_nxt:
            wait = max(conn.poll, min((now - conn.t_rx) / 8, POLL_MAX))
        waiting = self._waiting
        if not waiting or now + wait < waiting[0][0]:
            self._ctx.timers.services.arm(self._timer, now + wait)
        heappush(waiting, (now + wait, next(self._order), conn))

    def follow(self, conn: TcpConn) -> bool:
        """Look at what the host peer has acknowledged; whether that is more than before."""
        before = conn.rcv_acked
        info = tcpinfo.tcp_info(conn.sock)
        # FIN counts as one acknowledged byte, and so does SYN, but for accepted sockets.
        first = conn.isn_tap + 1 if conn.events & SOCK_ACCEPTED else conn.isn_tap
        acked = min(first + tcpinfo.u64(info, tcpinfo.BYTES_ACKED), conn.rcv_nxt)
        conn.rcv_acked = max(before, acked)
        self._measure(conn, info)
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        return conn.rcv_acked != before

    def _measure(self, conn: TcpConn, info: bytes) -> None:
        """Take from TCP_INFO how far away the host peer is."""
        conn.poll = min(max(tcpinfo.u32(info, tcpinfo.RTT) * 1.25e-6, POLL_MIN), ACK_DELAY)
        if self._features.min_rtt and tcpinfo.u32(info, tcpinfo.MIN_RTT) < NEAR_US:
            conn.near = True

    def open_window(self, conn: TcpConn, now: float) -> None:
        """Move the right edge as far as the socket can take more, and ask for EPOLLOUT where that is not far."""
        size, used = tcpinfo.send_buffer(conn.sock, self._features)
        window = (size - used) * 3 // 4  # kernel memory holds its own descriptors too
        if self._features.snd_wnd:
            info = tcpinfo.tcp_info(conn.sock)
            window = min(window, max(tcpinfo.u32(info, tcpinfo.SND_WND), WINDOW_FLOOR))
            if not conn.near:
                self._measure(conn, info)
        conn.rcv_edge = max(conn.rcv_edge, conn.rcv_nxt + min(window, WINDOW_MAX), conn.rcv_nxt)
        window = conn.rcv_edge - conn.rcv_nxt
        conn.rcv_max = max(conn.rcv_max, conn.rcv_edge - conn.rcv_acked)  # to the guest it begins at rcv_acked
        rounding = (1 << conn.ws_to) - 1  # what a scaled window loses at most on its way (RFC 7323, 2.3)
        conn.rcv_low = max(window // 2, min(self._segment, conn.rcv_max // 2)) + rounding
        if used * 3 > size * 2 or conn.lost:
            conn.low = True
            self._ctx.reactor.change(conn.fd, INTEREST | EPOLLOUT)
        elif window < conn.rcv_low and used and not conn.queued:
            self.look_later(conn, now)

    def writable(self, conn: TcpConn, now: float) -> None:
        """The send buffer has room again: promise it, and have what was dropped sent again at once."""
        conn.low = False
        lost, conn.lost = conn.lost, False
        self.open_window(conn, now)
        self._out.ack(conn)
        if lost:
            for _ in range(3):  # duplicate acknowledgements start a fast retransmission (RFC 5681, 3.2)
                self._out.ack(conn)

    def timer_handler(self, now: float) -> None:
        """Look at each connection whose wait is over, or nearly so."""
        waiting = self._waiting
        due = []
        while waiting and waiting[0][0] <= now + TOGETHER:
            due.append(heappop(waiting)[2])
        each(due, self._look, self._table.fault_at, now)
        if waiting:
            self._ctx.timers.services.arm(self._timer, max(waiting[0][0], now + POLL_MIN))

    def _look(self, conn: TcpConn, now: float) -> None:
        """Send the acknowledgement that found no answer to ride on; look again at one that waits for the peer, and at a
        window that is too small. What the guest has acknowledged is dropped from the socket.
        """
        conn.queued = False
        if conn.sock is None:
            return
        if conn.snd_una != conn.base:
            self._out.consume(conn)
        if conn.rcv_edge - conn.rcv_nxt < conn.rcv_low and not conn.low and not conn.events & TAP_FIN_RCVD:
            self.open_window(conn, now)
            if conn.rcv_edge - conn.rcv_nxt >= conn.rcv_low:
                self._out.ack(conn)
        if conn.rcv_acked != conn.rcv_nxt:
            if self.follow(conn):
                self.tell(conn)
            if conn.rcv_acked != conn.rcv_nxt and not conn.queued:
                self._delay(conn, now)
        elif conn.ack_due:
            if now - conn.t_rx < ACK_DELAY / 2:  # data came while this one waited: it has just begun to wait again
                self._delay(conn, now)
                return
            conn.pingpong = 0
            self._out.ack(conn)

    def tell(self, conn: TcpConn) -> None:
        """Send what `follow` found; if it was FIN, the last thing that the guest waited for, the connection is over."""
        self._out.ack(conn)
        if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
            self._table.close(conn)
