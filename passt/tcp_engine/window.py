"""Acknowledgements and windows towards the guest: which of its data has arrived, and how much more it may send.

Acknowledgements
================

    host peer                       the guest's data is acknowledged
    ------------------------------  --------------------------------------------------------------------------------
    near: on this host, or closer   when the socket takes it, and FIN likewise: neither can get lost any more
    than 25 us (tcpi_min_rtt)
    elsewhere                       when the socket takes it, but for the last 4 to 8 segments, 64 KiB at most (the
                                    tail). The tail and FIN are acknowledged when the peer has acknowledged them
                                    (tcpi_bytes_acked)

The tail makes delivery visible. A guest whose path is cut keeps unacknowledged data, so TCP_USER_TIMEOUT, SIOCOUTQ and
SO_LINGER in the guest work as they do on the host. Data before the tail is acknowledged at once, because each of the
two kernels has a congestion control of its own: a guest that waited for the round trip of the path, and then for the
next look at TCP_INFO, would fill a fast path at a quarter of its rate. The tail is smaller than any congestion window
of a guest that sends much (10 segments at first, 16 where CUBIC's HyStart may end slow start): were all that it may
send in the tail, it would see the round trip of the path, which ends slow start, and wait for it again and again.

    TCP_INFO is read                  for
    --------------------------------  ------------------------------------------------------------------------------
    at the first data, and with each  the round trip, which decides whether the peer is near and how often to read, and
    new window                        the host peer's window
    when the host peer sends          its acknowledgement of the request: the answer to the guest carries ours
    a round trip after the data       no event reports an acknowledgement of the peer. The interval is 1 to 10 ms, and
                                      later an eighth of the time since the last data, at most 1 s

An acknowledgement to the guest goes out at once, or is delayed:

    at once     after a batch of BULK_MIN bytes or more; after a full-sized segment behind one whose acknowledgement is
                delayed (RFC 9293, 3.8.6.3); with a new window; after a segment that is a duplicate, out of order, a
                probe, or refused by the socket; and always outside the ping-pong mode. Behind a hole, it is an
                acknowledgement of all before the hole (`held.py`)
    delayed     in ping-pong mode, about 10 ms, so that an answer can carry it; likewise of the guest's FIN, for that of
                the host peer, as the kernel does (tcp_fin() in net/ipv4/tcp_input.c)

Ping-pong mode is the kernel's: it begins when two answers in a row came within the delay, and ends when a delay passes
without one. A connection begins in it where the first requests of HABIT connections to the same server were answered in
time: for a short one, that is a frame in five. A guest that sends the second part of a request when the first one is
acknowledged (Nagle's algorithm) waits for the delay then, once: for VAIN, no connection to this server begins so. An
answer that is late shows that the guest did not wait for the acknowledgement, and changes nothing.

One timer serves all delays, by a heap. It also consumes from the host sockets what the guest has acknowledged since
(`output.py`).

The window
==========

The window advertised is what the socket can take: three quarters of the free space in its send buffer (SO_MEMINFO), and
not more than the larger of the host peer's window (tcpi_snd_wnd) and 64 KiB. It is computed again when half of it is
used up, not for each segment. The first one is that of an earlier connection to the same server, for FIRST_KEPT: their
sockets begin alike. Its right edge never moves left. A send buffer that is two thirds full is no longer writable to the
kernel; from then on EPOLLOUT tells when to advertise more. Waiting for EPOLLOUT also makes the kernel enlarge a buffer
that limits the connection.

A new window does not exceed the free space, so the socket rarely refuses data. Refused data waits in the out-of-order
queue, unacknowledged, until EPOLLOUT reports room.

A link with a long round trip (a machine in another place, a link that is simulated) needs more. The kernel enlarges the
send buffer of a connection that its path limits, and this one is limited by the link: the buffer stays empty, and as
small as it began. So where the link's round trip exceeds LONG_LINK and the socket drains, the window grows beyond the
free space. The round trip is that of the handshake, or less: from an edge that was advertised to data beyond it, it
takes one at least (`rcv_mark`). The window doubles with each new window, up to GROWN_MAX, which the out-of-order queue
has room for. A window is computed again when an eighth of it is used up: the guest would wait for a round trip at the
edge of a half.

So does the window of a guest whose segments lie behind a hole. It recovers from the loss of a retransmission by what it
sends after that (RFC 8985), and at the edge of a small window it has nothing to send, and waits for its timeout, 200 ms
or more. Each new window without a hole takes an eighth of that off, down to the free space.

Silly window avoidance (RFC 9293, 3.8.6.2.1): a guest sends nothing shorter than a segment, or half of the largest
window that it has seen, whichever is less. It waits for more window, and probes after 200 ms. So the window is computed
again before the rest becomes that small (`rcv_wnd_low`). A socket that drains is promised that much although its buffer
is smaller: nothing would make the window larger later. Where the socket is fuller, the delayed-ACK timer computes it
again.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from typing import Final

from .. import NEVER
from ..flow.context import Context
from ..linux import tcpinfo
from ..loop.each import each
from ..loop.reactor import EPOLLOUT, INTEREST
from ..policy.config import WINDOW_MAX, Config
from .conn import CLOSED, SOCK_ACCEPTED, TAP_FIN_RCVD, TAP_FIN_SENT, WS_OFFERED, TcpConn
from .output import TcpOut
from .pace import PACED_WINDOW
from .table import TcpTable

ACK_DELAY: Final = 0.010  # s; half as much to half as much again
COALESCE: Final = ACK_DELAY / 4  # s: delays that end so close to each other end together
POLL_MIN: Final = 0.001  # s between reads of TCP_INFO; the interval grows from the round trip, ACK_DELAY at most
POLL_MAX: Final = 1.0  # s, while the peer acknowledges nothing
PINGPONG_MAX: Final = 3
PINGPONG: Final = 2  # answers in time after which acknowledgements are delayed
IN_VAIN: Final = -1  # the last delay has passed; who speaks next tells whether the guest has waited for it
BULK_MIN: Final = 8192  # bytes: a batch of so many is no request that waits for its answer
TAIL_MAX: Final = 65536  # bytes that may wait for the host peer's acknowledgement; half of them go on waiting
TAIL_SEGMENTS: Final = 8  # the same, in segments
NEAR_US: Final = 25  # us, round trip below which a peer is near: a veth pair takes 10, two network cards 50
LONG_LINK: Final = 0.002  # s, round trip
GROWN_MAX: Final = 3 << 19  # bytes, less than OUT_OF_ORDER_MAX
FIRST_KEPT: Final = 1.0  # s
HABIT: Final = 8  # connections in a row whose first request was answered in time
VAIN: Final = 60.0  # s without the habit after a wait in vain
SERVERS_MAX: Final = 256
WINDOW_FLOOR: Final = 65536  # bytes, advertised whatever the host peer's window if the send buffer has room


def tail_of(mss: int) -> int:
    """Bytes that may wait for the host peer's acknowledgement, where segments have `mss` bytes."""
    return min(mss * TAIL_SEGMENTS, TAIL_MAX)


class Server:
    """Experience with connections of the guest to a server, for the next ones."""

    __slots__ = ("answered", "low", "until", "vain_at", "window")

    def __init__(self) -> None:
        self.window = self.low = 0  # the first one, and when it is computed again
        self.until = 0.0  # until when that counts
        self.answered = 0  # connections in a row whose first request was answered in time
        self.vain_at = -VAIN  # when an acknowledgement of a first request last waited in vain


class TcpAck:
    """Acknowledgements and windows of all connections, and the delayed-ACK timer."""

    def __init__(self, ctx: Context, out: TcpOut, table: TcpTable, features: tcpinfo.Features) -> None:
        self._ctx = ctx
        self._out = out
        self._table = table
        self._features = features
        self._waiting: list[tuple[float, int, TcpConn]] = []  # a heap, by deadline
        self._order = count()
        self._servers: dict[tuple[bytes, int], Server] = {}  # by address and port
        self._timer = ctx.timers.services.new(self.timer_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._segment = (config.mtu or 1500) - 40  # payload of the guest's longest segment

    def acknowledge(self, conn: TcpConn, n: int, must_ack: bool, now: float) -> None:
        """Acknowledge what may be acknowledged of the `n` bytes that the socket has just taken, now or later."""
        before = conn.rcv_acked
        if conn.near or conn.held:
            conn.rcv_acked = conn.rcv_nxt
        elif conn.rcv_nxt - before > (tail := tail_of(conn.mss)):
            conn.rcv_acked = conn.rcv_nxt - (tail >> 1)
        elif not conn.poll_interval:
            self.update_rcv_acked(conn)
        if conn.rcv_edge - conn.rcv_nxt < conn.rcv_wnd_low or conn.rcv_refused:
            self.open_window(conn, now)
            must_ack = True
        second = conn.ack_due and n >= conn.mss
        if must_ack or (conn.rcv_acked != before and (n >= BULK_MIN or conn.pingpong < PINGPONG or second)):
            self._out.ack(conn)
            if conn.rcv_acked == conn.rcv_nxt:
                return
        self.delay_ack(conn, now)

    def held_over(self, conn: TcpConn, now: float) -> None:
        """Acknowledge bulk whose acknowledgement was held (`pace.py`)."""
        self.acknowledge(conn, BULK_MIN, False, now)

    def acknowledge_fin(self, conn: TcpConn, urgent: bool, now: float) -> None:
        """The same for FIN and the data before it. An acknowledged FIN may complete the connection.

        `urgent`: data before it filled a hole, or was much.
        """
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        elif conn.events & TAP_FIN_SENT or urgent:
            self.update_rcv_acked(conn)
        elif not conn.poll_interval:
            conn.poll_interval = ACK_DELAY
        if not (conn.events & TAP_FIN_SENT or urgent):
            self.delay_ack(conn, now)
            return
        self._out.ack(conn)
        if conn.rcv_acked != conn.rcv_nxt:
            self.delay_ack(conn, now)

    def delay_ack(self, conn: TcpConn, now: float) -> None:
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
        if conn.moved is not None:
            first = conn.moved[0]
        acked = min(conn.rcv_nxt, first + tcpinfo.u64(info, tcpinfo.BYTES_ACKED))
        conn.rcv_acked = max(acked, before)  # of equal values, the object that `rcv_nxt` has
        self._measure(conn, info)
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        return conn.rcv_acked != before

    def _measure(self, conn: TcpConn, info: bytes) -> None:
        """Derive from TCP_INFO whether the host peer is near, and how often to read TCP_INFO."""
        conn.poll_interval = min(max(tcpinfo.u32(info, tcpinfo.RTT) * 1.25e-6, POLL_MIN), ACK_DELAY)
        near = self._features.min_rtt and tcpinfo.u32(info, tcpinfo.MIN_RTT) < NEAR_US
        if near and not conn.rcv_refused:  # a connection that moved may have acknowledged bytes that wait
            conn.near = True

    def first_window(self, conn: TcpConn, now: float) -> None:
        """`open_window` of a connection whose socket has just been connected."""
        server = self._servers.get(conn.host)
        if server is None:
            if len(self._servers) >= SERVERS_MAX:
                self._servers.clear()
            server = self._servers[conn.host] = Server()
        if server.answered >= HABIT:
            conn.pingpong = PINGPONG
        if now >= server.until:
            self.open_window(conn, now)
            server.until, server.window = now + FIRST_KEPT, conn.rcv_edge - conn.rcv_nxt
            server.low = server.window // 2 + (1 << WS_OFFERED) - 1
            conn.rcv_mark, conn.rcv_mark_at = 0, 0.0  # 64 bytes; many connections do not use the window up
            return
        conn.rcv_edge = conn.rcv_nxt + server.window
        conn.rcv_wnd_max = server.window  # one object for all: each is 32 bytes
        conn.rcv_wnd_low = server.low if conn.rcv_wscale else server.window // 2

    def first_answer(self, conn: TcpConn, now: float) -> None:
        """The first request of a connection was answered in time, outside the ping-pong mode."""
        server = self._servers.get(conn.host)
        if server is not None and now - server.vain_at >= VAIN:
            server.answered += 1

    def delay_was_in_vain(self, conn: TcpConn, now: float) -> None:
        """No answer has come in time, and the guest goes on once it has the acknowledgement."""
        conn.pingpong = 0
        server = self._servers.get(conn.host)
        if server is not None:
            server.answered, server.vain_at = 0, now

    def open_window(self, conn: TcpConn, now: float) -> None:
        """Move the right edge as far as the socket has room, and ask for EPOLLOUT where that is little."""
        size, used = tcpinfo.send_buffer(conn.sock, self._features)
        window = (size - used) * 3 // 4  # the kernel charges its sk_buffs to the same buffer
        if self._features.snd_wnd:
            info = tcpinfo.tcp_info(conn.sock)
            window = min(window, max(tcpinfo.u32(info, tcpinfo.SND_WND), WINDOW_FLOOR))
            if not conn.near:
                self._measure(conn, info)
        drains = used * 3 <= size
        if now < self._out.turns.paced_until and window > PACED_WINDOW:
            window = PACED_WINDOW
        window = self._grown(conn, window, drains, now)
        rounding = (1 << conn.rcv_wscale) - 1  # bytes that scaling may take off a window (RFC 7323, 2.3)
        if drains:
            window = max(window, self._least(conn, rounding))
        conn.rcv_edge = max(conn.rcv_edge, conn.rcv_nxt + min(window, WINDOW_MAX), conn.rcv_nxt)
        window = conn.rcv_edge - conn.rcv_nxt
        conn.rcv_wnd_max = max(conn.rcv_wnd_max, conn.rcv_edge - conn.rcv_acked)  # for the guest it begins at rcv_acked
        fresh = window * 7 // 8 if conn.rcv_grown else window // 2
        conn.rcv_wnd_low = max(fresh + rounding, self._least(conn, rounding))
        if used * 3 > size * 2 or conn.rcv_refused:
            conn.wait_writable = True
            self._ctx.reactor.change(conn.fd, INTEREST | EPOLLOUT)
        elif window < conn.rcv_wnd_low and used and not conn.delack_at:
            self.queue_delayed(conn, now)

    def _least(self, conn: TcpConn, rounding: int) -> int:
        """The smallest window that lets the guest send; WINDOW_FLOOR, which scaling leaves whole, has any segment."""
        return min(min(self._segment, conn.rcv_wnd_max // 2) + rounding, WINDOW_FLOOR)

    def _grown(self, conn: TcpConn, window: int, drains: bool, now: float) -> int:
        """The window over a long link, or one that loses frames, which begins with `window`."""
        if conn.rcv_nxt >= conn.rcv_mark:
            if conn.rcv_mark:
                conn.rcv_rtt = min(conn.rcv_rtt, now - conn.rcv_mark_at)
            conn.rcv_mark, conn.rcv_mark_at = max(conn.rcv_edge, conn.rcv_nxt + 1), now
        rtt = conn.srtt if conn.rcv_rtt == NEVER else conn.rcv_rtt
        if not drains:
            grown = 0
        elif rtt > LONG_LINK or conn.held:
            grown = min(max(2 * conn.rcv_grown, window), GROWN_MAX)
        else:
            grown = conn.rcv_grown * 7 // 8
        conn.rcv_grown = grown if grown >= window // 2 else 0
        return max(window, grown)

    def writable(self, conn: TcpConn, now: float) -> None:
        """The send buffer has room again, and took what had waited: advertise it."""
        conn.wait_writable = False
        self.open_window(conn, now)
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
                self.delay_ack(conn, now)
        elif conn.ack_due:
            if now - conn.t_rx < ACK_DELAY / 2:  # newer data came, and its delay has just begun
                self.delay_ack(conn, now)
                return
            conn.pingpong = IN_VAIN
            self._out.ack(conn)

    def forward_ack(self, conn: TcpConn) -> None:
        """Acknowledge what `update_rcv_acked` found. If that completes both directions, the connection is over."""
        self._out.ack(conn)
        if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
            self._table.close(conn)
