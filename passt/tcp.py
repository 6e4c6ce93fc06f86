"""TCP between the guest's frames and sockets of the host.

This is no TCP stack: the guest's kernel and the host's have one each. Towards the guest this program takes the part of
the host peer. It mirrors sequence numbers, windows, MSS, FIN and RST, and stores no payload but segments out of order.

Directions
==========

Guest to host (`tap_handler`). The segments of one read of the tap come grouped by connection. Payload in order goes to
the socket in one `sendmsg` over views of the packet pool. Bytes that the socket takes are acknowledged, the last of
them when the host peer acknowledges them. Bytes that the socket refuses are dropped, and the guest retransmits them;
the window advertised makes that rare (`tcp_engine/window.py`). Segments behind a hole are queued
(`tcp_engine/out_of_order.py`).

Host to guest (`sock_handler`, and `tap_handler` when an acknowledgement opens the window). Data is peeked and sent, and
stays in the socket until the guest acknowledges it (`tcp_engine/output.py`). Events are edge-triggered.

Handshakes are in `tcp_engine/opening.py`, the ways to end in `tcp_engine/table.py`, events and sequence variables in
`tcp_engine/conn.py`.

Timers: one timerfd per connection, from a pool, and one for all delayed acknowledgements
=========================================================================================

    name         condition                                 value                      on expiry
    -----------  ----------------------------------------  -------------------------  --------------------------------
    SYN          SYN or SYN,ACK not acknowledged           1, 2, 4 s; 10 s in all     retransmit; then RST both ways
    RTO          data or FIN not acknowledged              1 s doubling to 60 s, 7 x  go-back-N; then RST both ways
    persist      window zero, data in the socket           0.2 s doubling to 60 s     zero-window probe at snd_una - 1
    keep-alive   none of these                             2 h, then 75 s, 8 x        the same; then RST both ways
    delayed ACK  acknowledgement or consumption put off    10 ms, or round trip       read TCP_INFO, acknowledge

The values are constants of `tcp_engine/conn.py`; `timeout` chooses among them, and `table.py` arms the timer.

A guest's keep-alive probe asks for the peer, not for this program: the first one turns on SO_KEEPALIVE for the host
socket, and the error of a dead peer reaches the guest as RST.

Left out: SACK, timestamps, ECN, TCP_FASTOPEN, round trip estimates and congestion control towards the guest (the link
is short and in order, and the host socket has them with its peer); TIME-WAIT (the host's kernel has it); urgent
pointers (the byte stays in line).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from . import NEVER
from .calls import calls
from .drops import Drop
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

CONSUME_MIN = 8192  # acknowledged bytes that are consumed from the socket at once
ACKS_UNCONSUMED_MAX = 32  # acknowledgements after which fewer bytes are, too; ACK_DELAY bounds the wait
KEEPALIVE_PROBES = 8
IOV_MAX = 1024
DUP_ACKS = 3  # duplicate acknowledgements that start a fast retransmit of the guest (RFC 5681, 3.2)
TIMER_SLACK = 0.0005  # s, a timer that expires this early is on time

_MASK = 0xFFFFFFFF
_NOT_PLAIN = FIN | SYN | RST | ACK
_HALF = 1 << 31

CALLS = calls("sendto", "sendmsg", "shutdown")


class Tcp:
    """All TCP connections through the tap. Listeners hand host clients to `opening`."""

    def __init__(self, ctx: Context, features: tcpinfo.Features | None = None) -> None:
        self._ctx = ctx
        self._pool = ctx.pool
        self._features = features or tcpinfo.probe()
        self._out = TcpOut(ctx, self._features)
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
        just_established = False
        if conn is None or not conn.events & ESTABLISHED:
            just_established = True
            conn = self.opening.segments(conn, key, segments, now)
            if conn is None:
                return
            self._established(conn, now)
            if conn.sock is None:
                return
        if len(segments) == 2 and self._plain_segment(conn, segments[0], segments[1], now):
            return
        # The hot loop, long on purpose: one pass over the segments, with all state in locals.
        buf, mv, unpack = self._pool.buf, self._pool.mv, SEQ_TO_WINDOW.unpack_from
        rcv_nxt, una, window = conn.rcv_nxt, conn.snd_una, conn.snd_wnd
        in_flight = conn.snd_nxt - una
        sent = max(in_flight, conn.snd_max - una)
        payload: list[memoryview] = []
        later: list[tuple[int, int, int, int]] = []
        fin = must_ack = duplicate = False
        for i in range(0, len(segments), 2):
            offset, end = segments[i], segments[i + 1]
            seq, ack, bits, win = unpack(buf, offset + 4)
            data = offset + (bits >> 10 & 0x3C)
            if data > end or data < offset + 20:
                self._ctx.drops[Drop.TCP_HEADER_LENGTH] += 1
                continue
            if bits & (RST | SYN | ACK) != ACK:
                if bits & RST:
                    # RFC 5961, 3.2: RST counts only at rcv_nxt, or where the last acknowledgement was
                    if seq in (rcv_nxt & _MASK, conn.rcv_acked & _MASK):
                        self._table.reset_by_guest(conn)
                        return
                    if (seq - conn.rcv_acked) & _MASK < conn.rcv_edge - conn.rcv_acked:
                        must_ack = True  # challenge ACK
                    self._ctx.drops[Drop.TCP_RESET_OUT_OF_WINDOW] += 1
                elif bits & SYN:
                    must_ack = True  # RFC 5961, 4.2: challenge ACK
                continue
            advance = (ack - una) & _MASK
            n = end - data
            if 0 < advance <= sent:
                una += advance
                sent -= advance
                window = win << conn.snd_wscale
            elif advance == 0:
                win <<= conn.snd_wscale
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
            must_ack = True  # a retransmission, a keep-alive or a zero-window probe
            if n <= 1 and gap == _MASK and not conn.keepalive:
                conn.keepalive = True
                tcp_sock.keep_alive(conn.sock, now - conn.t_rx)
            new = gap + n - (1 << 32)  # bytes beyond rcv_nxt
            if new > 0:
                payload.append(mv[end - new : end])
                rcv_nxt += new
            if new >= 0 and bits & FIN:
                fin = True
        if later or conn.out_of_order:
            rcv_nxt, fin, hole = self._table.out_of_order.merge(conn, mv, rcv_nxt, later, payload, fin)
            if hole:
                must_ack = True
                for _ in range(min(len(later), DUP_ACKS) - 1):  # and one more below
                    self._out.ack(conn)
        if just_established:
            duplicate = False  # the data in flight was sent after this batch had arrived
        if una != conn.snd_una or window != conn.snd_wnd or duplicate or conn.retries:
            self._acknowledged(conn, una, window, duplicate, now)
            if conn.sock is None:
                return
        if payload or fin:
            self._to_sock(conn, payload, rcv_nxt, fin, must_ack, now)
        elif must_ack:
            self._out.ack(conn)

    def _plain_segment(self, conn: TcpConn, offset: int, end: int, now: float) -> bool:
        """Fast path: one segment with payload, in order, with no flag but ACK and PSH. Returns False for any other.

        It does the same as the loop in `tap_handler`, in two thirds of the time.
        """
        seq, ack, bits, win = SEQ_TO_WINDOW.unpack_from(self._pool.buf, offset + 4)
        data = offset + (bits >> 10 & 0x3C)
        rcv_nxt, una = conn.rcv_nxt, conn.snd_una
        if seq != rcv_nxt & _MASK or bits & _NOT_PLAIN != ACK or not offset + 20 <= data < end:
            return False
        if conn.retries or conn.out_of_order:
            return False
        advance = (ack - una) & _MASK
        if advance > conn.snd_nxt - una:
            return False
        window = win << conn.snd_wscale
        if advance or window != conn.snd_wnd:
            self._acknowledged(conn, una + advance, window, False, now)
            if conn.sock is None:
                return True
        self._to_sock(conn, (self._pool.mv[data:end],), rcv_nxt + end - data, False, False, now)
        return True

    def _to_sock(
        self, conn: TcpConn, payload: Sequence[memoryview], rcv_nxt: int, fin: bool, must_ack: bool, now: float
    ) -> None:
        """Send the bytes [conn.rcv_nxt, rcv_nxt) to the host socket, and FIN behind them if `fin`."""
        if conn.events & TAP_FIN_RCVD:  # no new data follows FIN
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
            pass  # the send buffer is full; `taken` counts what it took before
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO)
            return
        conn.rcv_nxt += taken
        conn.t_rx = now
        if taken < wanted:
            conn.rcv_dropped = True
            self._ctx.drops[Drop.TCP_BUFFER_FULL] += 1
        elif fin:
            self._fin_received(conn, now)
            return
        self._acks.acknowledge(conn, taken, must_ack, now)

    def _fin_received(self, conn: TcpConn, now: float) -> None:
        """Take the guest's FIN, and send FIN to the host peer, by shutdown(2) or by close(2)."""
        conn.rcv_nxt += 1
        set_event(conn, TAP_FIN_RCVD)
        conn.rcv_edge = max(conn.rcv_edge, conn.rcv_nxt)
        if conn.near:
            self._acks.acknowledge_fin(conn, now)
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
            self._acks.acknowledge_fin(conn, now)
            if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
                self._table.close(conn)

    # Host to guest -----------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Handle events of the host socket of flow ref_data(ref)."""
        conn = self._by_index[ref & _MASK]
        if not isinstance(conn, TcpConn):
            return
        if conn.events == TAP_SYN_RCVD:
            self.opening.connected(conn, conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), now)
            if conn.sock is None or conn.events == TAP_SYN_RCVD:
                return  # the events are those of a socket that was replaced by another one
        if events & EPOLLERR:  # EPOLLRDHUP beside it is no FIN: every closed socket has it
            error = conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._table.broken(conn, error)
                return
        if events & EPOLLRDHUP and not conn.events & SOCK_FIN_RCVD:
            set_event(conn, SOCK_FIN_RCVD)
        if events & EPOLLPRI:
            conn.urgent = True
        peer_acked = conn.rcv_acked != conn.rcv_nxt and conn.events & ESTABLISHED and self._acks.update_rcv_acked(conn)
        if peer_acked:
            conn.ack_due = True
        if events & (EPOLLIN | EPOLLRDHUP):
            conn.drained = False
            if conn.events & ESTABLISHED:
                self._to_tap(conn, now)
        if conn.sock is None:
            return
        if peer_acked and conn.ack_due:  # no data went to the guest that could carry the acknowledgement
            self._acks.forward_ack(conn)
        if events & EPOLLOUT and conn.wait_writable and conn.sock is not None:
            self._acks.writable(conn, now)

    def _to_tap(self, conn: TcpConn, now: float, progress: bool = False) -> None:
        """Send what the socket has. Data in flight keeps its timer (RFC 6298, 5.1), or `progress` restarts it (5.3)."""
        before = conn.snd_nxt
        was_in_flight = before != conn.snd_una and not progress
        due = conn.ack_due
        try:
            self._out.send_data(conn)
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO)
            return
        if conn.snd_nxt != before and conn.pingpong < PINGPONG_MAX and (due or now - conn.t_rx < ACK_DELAY):
            conn.pingpong += 1
        if not was_in_flight:
            self._schedule(conn, now)

    def _acknowledged(self, conn: TcpConn, una: int, window: int, duplicate: bool, now: float) -> None:
        """The guest acknowledged everything before `una`, and has a window of `window` bytes after it."""
        progress = una != conn.snd_una
        conn.snd_wnd = window
        if window > conn.snd_wnd_max:
            conn.snd_wnd_max = window
        if progress:
            conn.snd_una = una
            conn.retries = 0
            if una > conn.snd_nxt:
                self._out.skip_acknowledged(conn)
            if conn.events & TAP_FIN_SENT and una == conn.snd_nxt:
                set_event(conn, TAP_FIN_ACKED)
                if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
                    self._table.close(conn)
                    return
            n = una - conn.base
            if n >= CONSUME_MIN or conn.consume_next or conn.acks_unconsumed >= ACKS_UNCONSUMED_MAX:
                self._out.consume(conn)
                conn.consume_next, conn.acks_unconsumed = n >= CONSUME_MIN, 0
            else:
                conn.acks_unconsumed += 1
                if not conn.delack_at:
                    self._acks.queue_delayed(conn, now)
        elif window and conn.snd_nxt == una:
            conn.retries = 0
        if conn.recover:
            if una >= conn.recover:
                conn.recover = 0
            elif progress:
                self._out.fast_retransmit(conn)  # a partial acknowledgement (RFC 6582, 3.2)
        elif duplicate and not progress:
            # The link keeps the order, so one duplicate means a loss; RFC 5681 waits for three.
            conn.recover = conn.snd_nxt
            self._out.fast_retransmit(conn)
        if not conn.drained:
            self._to_tap(conn, now, progress)
        elif conn.snd_nxt == una and window and not conn.retries:
            conn.deadline = now + KEEPALIVE_IDLE  # like `_schedule`; the timer, armed for earlier, reads it
        elif progress or conn.snd_nxt == una:
            self._schedule(conn, now)

    def _established(self, conn: TcpConn, now: float) -> None:
        """The handshake is done. If the guest waits for ACK of its SYN,ACK, data carries it if the socket has any."""
        before = conn.snd_nxt
        if conn.drained:
            self._schedule(conn, now)
        else:
            self._to_tap(conn, now)
        if conn.events & SOCK_ACCEPTED and conn.snd_nxt == before and conn.sock is not None:
            self._out.ack(conn)

    # Time --------------------------------------------------------------------------------------------------------

    def timer_handler(self, index: int, now: float) -> None:
        """The timer of flow `index` expired; the deadline may have moved on since it was armed."""
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
            self.opening.retransmit_syn(conn)
        elif conn.snd_nxt != conn.snd_una:
            if conn.retries > (SUCCESSOR_RETRIES if conn.key in self._table.successors else RETRIES_MAX):
                self._table.abort(conn, "no acknowledgement")
                return
            conn.recover = 0
            self._out.go_back_n(conn)
            if conn.snd_wnd:
                self._to_tap(conn, now)
                return
        else:
            if conn.snd_wnd and conn.retries > KEEPALIVE_PROBES:
                self._table.abort(conn, "no answer to keep-alive")
                return
            # RFC 9293, 3.8.4 and 3.8.6.1: the guest answers an old sequence number by ACK with its window
            self._out.bare(conn, ACK, conn.snd_una - 1)
        self._schedule(conn, now)

    # Ending --------------------------------------------------------------------------------------------------------

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end only that flow. An idle timer of the pool has no flow."""
        index = ref_data(ref)
        if index != NO_OWNER and isinstance(conn := self._by_index[index], TcpConn):
            self._table.end_faulty(conn)

    def fault_key(self, key: bytes) -> None:
        """The same, for a handler that failed on segments of the guest."""
        if (conn := self._conns.get(key)) is not None:
            self._table.end_faulty(conn)

    def resume(self, now: float) -> None:
        """The link takes frames again: connections that waited for it go on."""
        stalled, self._out.stalled = self._out.stalled, {}
        each(stalled.values(), self._go_on, self._table.fault_at, now)

    def _go_on(self, conn: TcpConn, now: float) -> None:
        if conn.sock is not None:
            self._to_tap(conn, now)
