"""TCP between the guest's frames and sockets of the host.

There is no TCP stack here: the two kernels have one each. Towards the guest we speak for the host peer: sequence
numbers, window, maximum segment size, FIN and RST are mirrored from one side to the other, and no payload is kept.

Directions
==========

Guest to host (`tap_handler`). Segments of one read of the tap come grouped by connection. Payload in order goes to
the socket in one `sendmsg` over views of the packet pool. What the socket took is acknowledged, the last of it when the
host peer has it; what the socket did not take is dropped and asked for again, which the window that we promise makes
rare: see `tcp_engine/window.py`. What comes behind a hole waits for what is missing: see `tcp_engine/out_of_order.py`.

Host to guest (`sock_handler`, and `tap_handler` when an acknowledgement opens the window). Data is peeked, sent, and
stays in the socket until the guest has it: see `tcp_engine/output.py`. Events are edge-triggered.

Either side may begin: what comes before ESTABLISHED is in `tcp_engine/opening.py`, how a connection ends in
`tcp_engine/table.py`. Events and sequence variables are listed in `tcp_engine/conn.py`.

Timers: one timerfd per connection, from a pool, and one for all delayed acknowledgements
=========================================================================================

    name        condition                                   value                     on expiry
    ----------  ------------------------------------------  ------------------------  ------------------------------
    SYN         SYN or SYN,ACK not acknowledged             1, 2, 4 s; 10 s in all    send again; then RST both ways
    RTO         data or FIN not acknowledged                1 s doubling, 7 times     send from snd_una; then RST
    persist     window zero, data waits in the socket       0.2 s doubling to 60 s    send a segment before snd_una
    keepalive   nothing else, idle                          2 h, then 75 s, 8 times   likewise; then RST both ways
    ack         acknowledgements wait                       5 to 15 ms                look at TCP_INFO, send them

A guest that probes an idle connection wants to know whether the peer is alive, not whether we are: its first probe
turns SO_KEEPALIVE on for the host socket, and the error of a dead peer reaches it as RST.

Not handled, on purpose: SACK, timestamps, ECN and TCP_FASTOPEN (the link to the guest has no use for them; the host
socket negotiates them with its peer as it likes); urgent pointers, whose byte travels in line.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from .calls import calls
from .flow.context import Context
from .linux import tcpinfo
from .loop.each import each
from .loop.reactor import EPOLLERR, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, TYPE_TCP, ref_data
from .loop.timers import NO_OWNER
from .tcp_engine import sock as tcp_sock
from .tcp_engine.conn import (
    CLOSED,
    ESTABLISHED,
    KEEPALIVE_IDLE,
    NEVER,
    RETRIES_MAX,
    SOCK_ACCEPTED,
    SOCK_FIN_RCVD,
    SOCK_FIN_SENT,
    SUCCESSOR_RETRIES,
    SYN_RETRIES,
    TAP_FIN_ACKED,
    TAP_FIN_RCVD,
    TAP_FIN_SENT,
    TAP_SYN_RCVD,
    TcpConn,
    set_event,
)
from .tcp_engine.opening import TcpOpen
from .tcp_engine.output import TcpOut
from .tcp_engine.table import TcpTable
from .tcp_engine.window import ACK_DELAY, PINGPONG_MAX, TcpAck
from .wire.tcp import ACK, FIN, RST, SEQ_TO_WINDOW, SYN

CONSUME = 8192  # acknowledged bytes that are dropped from the socket at once
LAZY_MAX = 32  # acknowledgements of fewer bytes after which they are, too; none waits longer than ACK_DELAY
KEEPALIVE_PROBES = 8
IOV_MAX = 1024
DUPLICATES = 3  # acknowledgements that make a guest send again what is missing (RFC 5681, 3.2)
TIMER_SLACK = 0.0005  # s, a timer that fires this early is on time

_MASK = 0xFFFFFFFF
_NOT_PLAIN = FIN | SYN | RST | ACK
_HALF = 1 << 31

CALLS = calls("sendto", "sendmsg", "shutdown")


class Tcp:
    """All TCP connections through the tap. Listeners give those of host clients to `opening`."""

    def __init__(self, ctx: Context, features: tcpinfo.Features | None = None) -> None:
        self._ctx = ctx
        self._pool = ctx.pool
        self._features = features or tcpinfo.probe()
        self._out = TcpOut(ctx, self._features, tso=ctx.link.tso)
        self._by_index = ctx.flows.by_index
        self._table = TcpTable(ctx, self._out)
        self._acks = TcpAck(ctx, self._out, self._table, self._features)
        self.opening = TcpOpen(ctx, self._features, self._out, self._acks, self._table)
        self._conns = self._table.by_key
        self._schedule = self._table.schedule
        ctx.reactor.handle(TYPE_TCP, self.sock_handler)
        ctx.timers.callback = self.timer_handler

    # Guest to host -----------------------------------------------------------------------------------------------

    def tap_handler(self, key: bytes, segments: list[int], now: float) -> None:
        """Segments of one flow: `segments` is a flat list of (offset of the TCP header, end) in the packet pool."""
        conn = self._conns.get(key)
        fresh = False
        if conn is None or not conn.events & ESTABLISHED:
            fresh = True
            conn = self.opening.segments(conn, key, segments, now)
            if conn is None:
                return
            self._established(conn, now)
            if conn.sock is None:
                return
        if len(segments) == 2 and self._plain_segment(conn, segments[0], segments[1], now):
            return
        # The hot loop, long on purpose: one pass over the segments with everything in locals.
        buf, mv, unpack = self._pool.buf, self._pool.mv, SEQ_TO_WINDOW.unpack_from
        rcv_nxt, una, window = conn.rcv_nxt, conn.snd_una, conn.snd_wnd
        in_flight = conn.snd_nxt - una
        sent = max(in_flight, conn.rewound - una)
        payload: list[memoryview] = []
        later: list[tuple[int, int, int, int]] = []
        fin = must_ack = duplicate = False
        for i in range(0, len(segments), 2):
            offset, end = segments[i], segments[i + 1]
            seq, ack, bits, win = unpack(buf, offset + 4)
            data = offset + (bits >> 10 & 0x3C)
            if data > end or data < offset + 20:
                self._ctx.drops["tcp header length"] += 1
                continue
            if bits & (RST | SYN | ACK) != ACK:
                if bits & RST:
                    # RFC 5961, 3.2: only what comes next, or what the last acknowledgement asked for, resets
                    if seq in (rcv_nxt & _MASK, conn.rcv_acked & _MASK):
                        self._table.reset_by_guest(conn)
                        return
                    if (seq - conn.rcv_acked) & _MASK < conn.rcv_edge - conn.rcv_acked:
                        must_ack = True  # challenge
                    self._ctx.drops["tcp reset out of window"] += 1
                elif bits & SYN:
                    must_ack = True  # RFC 5961, 4.2: challenge
                continue
            advance = (ack - una) & _MASK
            n = end - data
            if 0 < advance <= sent:
                una += advance
                in_flight -= advance
                sent -= advance
                window = win << conn.ws_from
            elif advance == 0:
                win <<= conn.ws_from
                if win == window and in_flight > 0 and not n and not bits & FIN:
                    duplicate = True
                window = win
            if seq == rcv_nxt & _MASK:
                if n:
                    payload.append(mv[data:end])
                    rcv_nxt += n
                if bits & FIN:
                    fin = True
                continue
            gap = (seq - rcv_nxt) & _MASK
            if gap < _HALF:
                if n or bits & FIN:
                    later.append((gap + rcv_nxt, data, end, bits & FIN))
                continue
            must_ack = True  # something sent again, a keep-alive or a window probe
            if n <= 1 and gap == _MASK and not conn.keepalive:
                conn.keepalive = True
                tcp_sock.keep_alive(conn.sock, now - conn.t_rx)
            new = gap + n - (1 << 32)  # bytes beyond rcv_nxt
            if new > 0:
                payload.append(mv[end - new : end])
                rcv_nxt += new
            if new >= 0 and bits & FIN and n + gap == 1 << 32:
                fin = True
        if later or conn.early:
            rcv_nxt, fin, hole = self._table.early.merge(conn, mv, rcv_nxt, later, payload, fin)
            if hole:
                must_ack = True
                for _ in range(min(len(later), DUPLICATES) - 1):  # and one below
                    self._out.ack(conn)
        if fresh:
            duplicate = False  # what is in flight was sent after this batch came
        if una != conn.snd_una or window != conn.snd_wnd or duplicate or conn.retries:
            self._acknowledged(conn, una, window, duplicate, now)
            if conn.sock is None:
                return
        if payload or fin:
            self._to_sock(conn, payload, rcv_nxt, fin, must_ack, now)
        elif must_ack:
            self._out.ack(conn)

    def _plain_segment(self, conn: TcpConn, offset: int, end: int, now: float) -> bool:
        """The step of every dialogue: one segment with payload, in order, nothing else about it. False: it is not one.

        It does what the loop in `tap_handler` would do, for two thirds of the price; remove it and nothing changes.
        """
        seq, ack, bits, win = SEQ_TO_WINDOW.unpack_from(self._pool.buf, offset + 4)
        data = offset + (bits >> 10 & 0x3C)
        rcv_nxt, una = conn.rcv_nxt, conn.snd_una
        if seq != rcv_nxt & _MASK or bits & _NOT_PLAIN != ACK or not offset + 20 <= data < end:
            return False
        if conn.retries or conn.early:
            return False
        advance = (ack - una) & _MASK
        if advance > conn.snd_nxt - una:
            return False
        window = win << conn.ws_from
        if advance or window != conn.snd_wnd:
            self._acknowledged(conn, una + advance, window, False, now)
            if conn.sock is None:
                return True
        self._to_sock(conn, (self._pool.mv[data:end],), rcv_nxt + end - data, False, False, now)
        return True

    def _to_sock(
        self, conn: TcpConn, payload: Sequence[memoryview], rcv_nxt: int, fin: bool, must_ack: bool, now: float
    ) -> None:
        """Give the socket the bytes [conn.rcv_nxt, rcv_nxt), and shut it down behind them if `fin`."""
        if conn.events & TAP_FIN_RCVD:  # nothing new can come after FIN
            self._out.ack(conn)
            return
        wanted = rcv_nxt - conn.rcv_nxt
        taken = 0
        try:
            if len(payload) == 1:
                taken = conn.sock.send(payload[0])
            else:
                for i in range(0, len(payload), IOV_MAX):
                    part = payload[i : i + IOV_MAX]
                    n = conn.sock.sendmsg(part)
                    taken += n
                    if n < sum(map(len, part)):
                        break
        except BlockingIOError:
            pass  # the send buffer is full; what was taken before counts
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO)
            return
        conn.rcv_nxt += taken
        conn.t_rx = now
        if taken < wanted:
            conn.lost = True
            self._ctx.drops["tcp send buffer full"] += 1
            must_ack = True
        elif fin:
            self._guest_done(conn, now)
            return
        self._acks.owe(conn, taken, must_ack, now)

    def _guest_done(self, conn: TcpConn, now: float) -> None:
        """Take the guest's FIN, and tell the host peer unless closing does so anyway."""
        conn.rcv_nxt += 1
        set_event(conn, TAP_FIN_RCVD)
        conn.rcv_edge = max(conn.rcv_edge, conn.rcv_nxt)
        if conn.near:
            self._acks.owe_fin(conn, now)
            if conn.events & CLOSED == CLOSED:
                self._table.close(conn)
                return
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO)
            return
        set_event(conn, SOCK_FIN_SENT)
        if not conn.near:
            self._acks.owe_fin(conn, now)
            if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
                self._table.close(conn)

    # Host to guest -----------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Something happened on the host socket of flow ref_data(ref)."""
        conn = self._by_index[ref & _MASK]
        if not isinstance(conn, TcpConn):
            return
        if conn.events == TAP_SYN_RCVD:
            self.opening.connected(conn, conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), now)
            if conn.sock is None or conn.events == TAP_SYN_RCVD:
                return  # the events were those of a socket that is given up for another one
        if events & EPOLLERR:  # EPOLLRDHUP beside it is that of any socket whose connection is over
            error = conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._table.broken(conn, error)
                return
        if events & EPOLLRDHUP and not conn.events & SOCK_FIN_RCVD:
            set_event(conn, SOCK_FIN_RCVD)
        if events & EPOLLPRI:
            conn.urgent = True
        heard = conn.rcv_acked != conn.rcv_nxt and conn.events & ESTABLISHED and self._acks.follow(conn)
        if heard:
            conn.ack_due = True
        if events & (EPOLLIN | EPOLLRDHUP):
            conn.drained = False
            if conn.events & ESTABLISHED:
                self._to_tap(conn, now)
        if conn.sock is None:
            return
        if heard and conn.ack_due:  # nothing went to the guest on which the acknowledgement could ride
            self._acks.tell(conn)
        if events & EPOLLOUT and conn.low and conn.sock is not None:
            self._acks.writable(conn, now)

    def _to_tap(self, conn: TcpConn, now: float, progress: bool = False) -> None:
        """Send what the socket has, and see to the timer: what is in flight already keeps its time (RFC 6298, 5.1),
        unless an acknowledgement made `progress` (5.3).
        """
        before = conn.snd_nxt
        flying = before != conn.snd_una and not progress
        due = conn.ack_due
        try:
            self._out.data(conn)
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO)
            return
        if conn.snd_nxt != before and conn.pingpong < PINGPONG_MAX and (due or now - conn.t_rx < ACK_DELAY):
            conn.pingpong += 1
        if not flying:
            self._schedule(conn, now)

    def _acknowledged(self, conn: TcpConn, una: int, window: int, duplicate: bool, now: float) -> None:
        """The guest acknowledged everything before `una` and takes `window` bytes after it."""
        progress = una != conn.snd_una
        conn.snd_wnd = window
        if window > conn.snd_wnd_max:
            conn.snd_wnd_max = window
        if progress:
            conn.snd_una = una
            conn.retries = 0
            if una > conn.snd_nxt:
                self._out.catch_up(conn)
            if conn.events & TAP_FIN_SENT and una == conn.snd_nxt:
                set_event(conn, TAP_FIN_ACKED)
                if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
                    self._table.close(conn)
                    return
            n = una - conn.base
            if n >= CONSUME or conn.eager or conn.lazy >= LAZY_MAX:
                self._out.consume(conn)
                conn.eager, conn.lazy = n >= CONSUME, 0
            else:
                conn.lazy += 1
                if not conn.queued:
                    self._acks.look_later(conn, now)
        elif window and conn.snd_nxt == una:
            conn.retries = 0
        if conn.recover:
            if una >= conn.recover:
                conn.recover = 0
            elif progress:
                self._out.again(conn)  # a partial acknowledgement: the next hole (RFC 6582, 3.2)
        elif duplicate and not progress:
            # The link keeps the order, so one duplicate is a loss, where RFC 5681 waits for three.
            conn.recover = conn.snd_nxt
            self._out.again(conn)
        if not conn.drained:
            self._to_tap(conn, now, progress)
        elif conn.snd_nxt == una and window:
            conn.deadline = now + KEEPALIVE_IDLE  # as `_schedule` would; the timer, armed for earlier, finds it there
        elif progress or conn.snd_nxt == una:
            self._schedule(conn, now)

    def _established(self, conn: TcpConn, now: float) -> None:
        """The handshake is done. If we began it, the guest waits for ACK: data does for that, if the socket has any."""
        before = conn.snd_nxt
        if conn.drained:
            self._schedule(conn, now)
        else:
            self._to_tap(conn, now)
        if conn.events & SOCK_ACCEPTED and conn.snd_nxt == before and conn.sock is not None:
            self._out.ack(conn)

    # Time --------------------------------------------------------------------------------------------------------

    def timer_handler(self, index: int, now: float) -> None:
        """The timer of flow `index` fired; the deadline may have moved on since it was armed."""
        conn = self._by_index[index]
        if not isinstance(conn, TcpConn) or conn.deadline == NEVER:
            return
        if now + TIMER_SLACK < conn.deadline:
            self._ctx.timers.at(conn.timer, conn.deadline)
            return
        conn.retries += 1
        if not conn.events & ESTABLISHED:
            if conn.retries > SYN_RETRIES:
                self._table.abort(conn, "no answer of the guest")
                return
            self.opening.again(conn)
        elif conn.snd_nxt != conn.snd_una:
            if conn.retries > (SUCCESSOR_RETRIES if conn.key in self._table.successors else RETRIES_MAX):
                self._table.abort(conn, "no acknowledgement")
                return
            conn.recover = 0
            self._out.rewind(conn)
            if conn.snd_wnd:
                self._to_tap(conn, now)
                return
        else:
            if conn.snd_wnd and conn.retries > KEEPALIVE_PROBES:
                self._table.abort(conn, "no answer to keep-alive")
                return
            # RFC 9293, 3.8.4 and 3.8.6.1: an old sequence number makes the guest acknowledge, and tell its window
            self._out.bare(conn, ACK, conn.snd_una - 1)
        self._schedule(conn, now)

    # Ending --------------------------------------------------------------------------------------------------------

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end that flow, and only that. A timer of the pool may have none."""
        index = ref_data(ref)
        if index != NO_OWNER and isinstance(conn := self._by_index[index], TcpConn):
            self._table.end_faulty(conn)

    def fault_key(self, key: bytes) -> None:
        """Likewise, when it failed on segments from the guest."""
        if (conn := self._conns.get(key)) is not None:
            self._table.end_faulty(conn)

    def forget(self) -> None:
        """The guest is gone: RST to all host peers."""
        each(self._table.by_key.values(), self._table.reset_by_guest, self._table.fault_at, "guest gone")

    def resume(self, now: float) -> None:
        """The link takes frames again: those that waited for it go on."""
        stalled, self._out.stalled = self._out.stalled, {}
        each(stalled.values(), self._go_on, self._table.fault_at, now)

    def _go_on(self, conn: TcpConn, now: float) -> None:
        if conn.sock is not None:
            self._to_tap(conn, now)

    def set_guest_mac(self, mac: bytes) -> None:
        """The guest has another address on the link from now on."""
        self._table.set_guest_mac(mac)
