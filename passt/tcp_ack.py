"""What the guest is told about its own data: how much of it arrived, and how much more we take.

    host peer                       acknowledged                                         why
    ------------------------------  ---------------------------------------------------  -------------------------
    on this host, or closer than    as soon as the socket took the data                  it will not get lost
    100 us (tcpi_min_rtt)
    elsewhere, few bytes in flight  likewise                                             saves a system call each
    elsewhere, 64 KiB and more      what the peer acknowledged (tcpi_bytes_acked),       the guest sees the real
                                    looked at with each batch and every 10 ms            round trip and pace

An acknowledgement waits about 10 ms for an answer to ride on, once two answers in a row came within that time
(as Linux's "ping-pong" mode does); a wait that was in vain ends the habit. The timer that serves all such waits also
drops from the sockets what the guest has acknowledged meanwhile.

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

from .core.context import Context
from .core.reactor import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from .linux import tcpinfo
from .tcp_buf import TcpOut
from .tcp_conn import SOCK_ACCEPTED, TAP_FIN_RCVD, WINDOW_MAX, TcpConn

ACK_DELAY = 0.010  # s; half as much to half as much again, since one timer serves all
PINGPONG_MAX = 3
PINGPONG = 2  # answers in time before an acknowledgement waits
BULK = 8192  # bytes in one batch that are not a request waiting for its answer
FOLLOW = 65536  # bytes given to the socket before TCP_INFO is asked what became of them
NEAR_US = 100  # round trip below which a peer counts as near
WINDOW_FLOOR = 65536  # bytes promised whatever the host peer's window, if the send buffer has room

INTEREST = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET  # of a connected socket, as long as its send buffer is not low


class TcpAck:
    """Acknowledgements and windows of all connections, and the one timer of those that wait."""

    def __init__(self, ctx: Context, out: TcpOut, features: tcpinfo.Features) -> None:
        self._ctx = ctx
        self._out = out
        self._features = features
        self._segment = (ctx.config.mtu or 1500) - 40  # the longest that the guest sends
        self._delayed: list[TcpConn] = []
        self._timer = ctx.timers.services.new(self.timer_handler)

    def owe(self, conn: TcpConn, n: int, must_ack: bool, now: float) -> None:
        """Decide what of the `n` bytes just taken to acknowledge, and whether to do so now."""
        before = conn.rcv_acked
        if conn.near:
            conn.rcv_acked = conn.rcv_nxt
        else:
            self._follow(conn, n)
        if conn.rcv_edge - conn.rcv_nxt < conn.rcv_low or conn.lost:
            self.open_window(conn, now)
            must_ack = True
        if must_ack or (conn.rcv_acked != before and (n >= BULK or conn.pingpong < PINGPONG)):
            self._out.ack(conn)
            if conn.rcv_acked == conn.rcv_nxt:
                return
        self._delay(conn, now)

    def _delay(self, conn: TcpConn, now: float) -> None:
        """Owe an acknowledgement, for a while."""
        conn.ack_due = True
        if not conn.queued:
            self.look_later(conn, now)

    def look_later(self, conn: TcpConn, now: float) -> None:
        """Have the timer see to what `conn`, which is not queued yet, has put off."""
        conn.queued = True
        if not self._delayed:
            self._ctx.timers.services.arm(self._timer, now + ACK_DELAY)
        self._delayed.append(conn)

    def _follow(self, conn: TcpConn, n: int) -> None:
        """Set what to acknowledge where the host peer is not near (the table above)."""
        conn.unpolled += n
        if conn.unpolled < FOLLOW and conn.rcv_acked == conn.rcv_nxt - n:
            conn.rcv_acked = conn.rcv_nxt
            return
        info = tcpinfo.tcp_info(conn.sock)
        # The SYN of a socket that connected counts as one acknowledged byte, that of an accepted one does not; its FIN
        # is not sent while this matters.
        first = conn.isn_tap + 1 if conn.events & SOCK_ACCEPTED else conn.isn_tap
        acked = min(first + tcpinfo.u64(info, tcpinfo.BYTES_ACKED), conn.rcv_nxt)
        conn.rcv_acked = max(conn.rcv_acked, acked)
        if conn.rcv_acked == conn.rcv_nxt:
            conn.unpolled = 0
        if self._features.min_rtt and tcpinfo.u32(info, tcpinfo.MIN_RTT) < NEAR_US:
            conn.near = True
            conn.rcv_acked = conn.rcv_nxt

    def open_window(self, conn: TcpConn, now: float) -> None:
        """Move the right edge as far as the socket can take more, and ask for EPOLLOUT where that is not far."""
        size, used = tcpinfo.send_buffer(conn.sock, self._features)
        window = (size - used) * 3 // 4  # kernel memory holds its own descriptors too
        if self._features.snd_wnd:
            peer = tcpinfo.u32(tcpinfo.tcp_info(conn.sock), tcpinfo.SND_WND)
            window = min(window, max(peer, WINDOW_FLOOR))
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
        """Send the acknowledgements that found no answer to ride on; look again at those that wait for the peer, and at
        windows that are too small.

        Who waits for the peer does so until it has acknowledged all, whatever other segments said meanwhile. What the
        guest has acknowledged is dropped from the sockets.
        """
        delayed, self._delayed = self._delayed, []
        for conn in delayed:
            conn.queued = False
            if conn.sock is None:
                continue
            if conn.snd_una != conn.base:
                self._out.consume(conn)
            if conn.rcv_edge - conn.rcv_nxt < conn.rcv_low and not conn.low and not conn.events & TAP_FIN_RCVD:
                self.open_window(conn, now)
                if conn.rcv_edge - conn.rcv_nxt >= conn.rcv_low:
                    self._out.ack(conn)
            if not conn.ack_due and conn.rcv_acked == conn.rcv_nxt:
                continue
            if now - conn.t_rx < ACK_DELAY / 2:  # the timer was armed for another: this one has just begun to wait
                self._delay(conn, now)
                continue
            conn.pingpong = 0
            if conn.rcv_acked != conn.rcv_nxt:
                before = conn.rcv_acked
                self._follow(conn, 0)
                if conn.rcv_acked == before:
                    self._delay(conn, now)
                    continue
            self._out.ack(conn)
            if conn.rcv_acked != conn.rcv_nxt:
                self._delay(conn, now)
