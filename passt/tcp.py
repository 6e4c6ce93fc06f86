"""TCP between the guest's frames and sockets of the host.

This is no TCP stack: the guest's kernel and the host's have one each. Towards the guest this program takes the part of
the host peer. It mirrors sequence numbers, windows, MSS, FIN and RST, and stores no payload but segments out of order.

Directions
==========

Guest to host (`tap_handler`). The segments of one read of the tap come grouped by connection. Payload in order goes to
the socket in one `sendmsg` over views of the packet pool (`tcp_engine/input.py`). Bytes that the socket takes are
acknowledged, the last of them when the host peer acknowledges them. Segments behind a hole are queued
(`tcp_engine/out_of_order.py`), and SACK tells the guest which are (`tcp_engine/held.py`). Bytes that the socket refuses
wait in the queue, too; the window advertised makes that rare (`tcp_engine/window.py`).

Host to guest (`sock_handler`, and `tap_handler` when an acknowledgement opens the window). Data is peeked and sent, and
stays in the socket until the guest acknowledges it (`tcp_engine/output.py`). Segments that get lost on the way are sent
again (`tcp_engine/recovery.py`). Connections that want to send more than the link or a turn of the loop takes go on in
an order that keeps answers of a few bytes from waiting (`tcp_engine/turns.py`). Events are edge-triggered.

Handshakes are in `tcp_engine/opening.py`, the ways to end in `tcp_engine/table.py`, events and sequence variables in
`tcp_engine/conn.py`, the way to another host in `tcp_engine/moving.py`.

Timers: a timerfd per connection, up to some thousands; the others share one, and so do near deadlines, delayed
acknowledgements, reminders
===============================================================================================================

    name         condition                                 value                      on expiry
    -----------  ----------------------------------------  -------------------------  --------------------------------
    SYN          SYN or SYN,ACK not acknowledged           RTO, doubling; 10 s in     retransmit; then RST both ways
                                                           all
    probe        data or FIN not acknowledged, SACK, and   2 x least round trip, at   resend the last segment
                 no loss is known                          least 10 ms
    RTO          data or FIN not acknowledged, otherwise   RFC 6298, at least 10 ms   resend the oldest frame, then
                                                           (machine: 50), doubled to  more; after 180 s RST both ways
                                                           60 s
    persist      window zero, data in the socket           50 ms doubling to 60 s     zero-window probe at snd_una - 1;
                                                                                      without an answer for 180 s RST
                                                                                      both ways
    keep-alive   none of these                             2 h, then 75 s, 8 x        the same; then RST both ways
    delayed ACK  acknowledgement or consumption put off    10 ms, or round trip       read TCP_INFO, acknowledge
    reminder     the link has lost something of the guest  10 ms, doubling, 4 x       the last acknowledgement again

Round trips and timeouts are in `tcp_engine/rtt.py`, other values are constants of `tcp_engine/conn.py`. `timeout`
chooses among them, `table.py` sets the deadline, `deadlines.py` watches it, and `timer.py` acts when it has passed.

A guest's keep-alive probe asks for the peer, not for this program. It is answered when the host peer has answered one
(`tcp_engine/keepalive.py`).

Left out: timestamps (`wire/tcp.py`), ECN, TCP_FASTOPEN, and congestion control towards the guest (no other host shares
the link, and the host socket has it with its peer); TIME-WAIT (`tcp_engine/table.py`); urgent pointers (the byte stays
in line).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .drops import Drop
from .flow.context import Context
from .flow.table import RESET
from .linux import tcpinfo
from .loop.each import each
from .loop.reactor import EPOLLERR, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, TYPE_TCP, ref_data
from .loop.timers import NO_OWNER
from .tcp_engine import rtt
from .tcp_engine.conn import (
    CLOSED,
    ESTABLISHED,
    KEEPALIVE_IDLE,
    SOCK_ACCEPTED,
    SOCK_FAILED,
    SOCK_FIN_RCVD,
    TAP_FIN_ACKED,
    TAP_FIN_SENT,
    TAP_SYN_RCVD,
    TcpConn,
    set_event,
)
from .tcp_engine.input import TcpIn
from .tcp_engine.keepalive import KeepAlive
from .tcp_engine.opening import TcpOpen
from .tcp_engine.output import TcpOut
from .tcp_engine.recovery import Options, TcpRecovery
from .tcp_engine.reminders import Reminders
from .tcp_engine.sock import widen
from .tcp_engine.table import TcpTable
from .tcp_engine.timer import TcpTimer
from .tcp_engine.turns import SPARSE
from .tcp_engine.window import ACK_DELAY, LONG_LINK, PINGPONG_MAX, TcpAck
from .wire.tcp import ACK, FIN, HALF, MASK, RST, SEQ_TO_WINDOW_UNPACK, SYN

if TYPE_CHECKING:
    from .tcp_engine.moving import TcpMoving

CONSUME_MIN: Final = 8192  # acknowledged bytes that are consumed from the socket at once
ACKS_UNCONSUMED_MAX: Final = 32  # acknowledgements after which fewer bytes are, too; ACK_DELAY bounds the wait

_NOT_PLAIN: Final = FIN | SYN | RST | ACK


class Tcp:
    """All TCP connections through the tap. Listeners hand host clients to `opening`."""

    def __init__(self, ctx: Context, features: tcpinfo.Features | None = None) -> None:
        self._ctx = ctx
        self._pool = ctx.pool
        self._whole = ctx.pool.whole
        self._features = features or tcpinfo.probe()
        self._out = TcpOut(ctx, self._features)
        self._by_index = ctx.flows.by_index
        self._table = TcpTable(ctx, self._out)
        self._acks = TcpAck(ctx, self._out, self._table, self._features)
        self._keepalive = KeepAlive(ctx, self._out, self._table)
        self._recovery = TcpRecovery(ctx, self._out, self._table)
        self._reminders = Reminders(ctx, self._out, self._table.fault_at)
        self._in = TcpIn(ctx, self._out, self._acks, self._table)
        self.opening = TcpOpen(ctx, self._features, self._out, self._acks, self._table)
        self._conns = self._table.by_key
        self._window = 0  # the last one that a guest has advertised
        self.set_class = self._table.set_class
        self.forget_class = self._table.forget_class
        ctx.reactor.handle(TYPE_TCP, self.sock_handler)
        self._out.turns.resume = self.resume
        self._timer = TcpTimer(self._out, self._table, self.opening, self._recovery)

    # Guest to host -----------------------------------------------------------------------------------------------

    def tap_handler(self, key: bytes, segments: list[int], now: float, hops: int = 0) -> None:
        """Segments of one flow: `segments` is a flat list of (offset of the TCP header, end) in the packet pool.

        `hops` is the TTL or hop limit of the first, 0: not known.
        """
        conn = self._conns.get(key)
        just_established = False
        if conn is None or not conn.events & ESTABLISHED:
            just_established = True
            conn = self.opening.segments(conn, key, segments, now, hops)
            if conn is None:
                return
            self._established(conn, now)
            if conn.sock is None or not segments:
                return
        if len(segments) == 2 and self._plain_segment(conn, segments[0], segments[1], now):
            return
        # The hot loop, long on purpose: one pass over the segments, with all state in locals.
        buf, whole, gather = self._pool.buf, self._whole, self._pool.gather
        rcv_nxt, una, window = conn.rcv_nxt, conn.snd_una, conn.snd_wnd
        in_flight = sent = conn.snd_nxt - una
        payload: list[memoryview] = []
        later: list[tuple[int, int, int, int]] = []
        options: list[tuple[int, bytes]] = []
        fin = must_ack = duplicate = probe = twice = False
        for i in range(0, len(segments), 2):
            offset, end = segments[i], segments[i + 1]
            seq, ack, bits, win = SEQ_TO_WINDOW_UNPACK(buf, offset + 4)
            data = offset + (bits >> 10 & 0x3C)
            if data > end or data < offset + 20:
                self._ctx.drops[Drop.TCP_HEADER_LENGTH] += 1
                continue
            if bits & (RST | SYN | ACK) != ACK:
                if bits & RST:
                    # RFC 5961, 3.2: RST counts only at rcv_nxt, or where the last acknowledgement was
                    if seq in (rcv_nxt + fin & MASK, conn.rcv_acked & MASK):
                        self._in.before_reset(conn, payload, fin)
                        self._table.reset_by_guest(conn)
                        return
                    if (seq - conn.rcv_acked) & MASK < conn.rcv_edge - conn.rcv_acked:
                        must_ack = True  # challenge ACK
                    self._ctx.drops[Drop.TCP_RESET_OUT_OF_WINDOW] += 1
                elif bits & SYN:
                    must_ack = True  # RFC 5961, 4.2: challenge ACK
                continue
            if data != offset + 20 and conn.sack:
                options.append((ack, self._pool.copy(offset + 20, data)))
            advance = (ack - una) & MASK
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
            if seq == rcv_nxt & MASK:
                if n:
                    if whole is not None:
                        payload.append(whole[data:end])
                    else:
                        gather(payload, data, end)
                    rcv_nxt += n
                if bits & FIN:
                    fin = True
                continue
            gap = (seq - rcv_nxt) & MASK
            if gap < HALF:
                if n or bits & FIN:
                    later.append((gap + rcv_nxt, data, end, bits & FIN))
                continue
            if gap == MASK and n <= 1 and not bits & FIN:
                probe = True
                continue
            must_ack = True  # a retransmission
            if n:
                start = rcv_nxt - (1 << 32) + gap
                conn.dsack = (start, min(start + n, rcv_nxt))
            new = gap + n - (1 << 32)  # bytes beyond rcv_nxt
            if new > 0:
                gather(payload, end - new, end)
                rcv_nxt += new
            if new >= 0 and bits & FIN:
                fin = True
        if later or (must_ack and conn.dsack):
            self._reminders.lost(conn, now)
        if later or conn.out_of_order:
            rcv_nxt, fin, wants_ack = self._in.queue(conn, rcv_nxt, later, payload, fin)
            must_ack = must_ack or wants_ack or fin  # FIN behind a hole, or what fills one (RFC 5681, 4.2)
            twice = conn.sack and len(segments) > 2 and not conn.rcv_refused
        if just_established:
            duplicate = False  # the data in flight was sent after this batch had arrived
        if una != conn.snd_una or window != conn.snd_wnd or duplicate or conn.retries or options:
            self._acknowledged(conn, una, window, duplicate, now, options)
            if conn.sock is None:
                return
        if payload or fin:
            self._in.to_sock(conn, payload, rcv_nxt, fin, must_ack, now)
        elif must_ack:
            self._out.ack(conn)
        elif probe:
            self._keepalive.probed(conn, now)
        if twice and conn.sock is not None:
            self._out.ack(conn)  # the other one may get lost, and with it all that the guest has to know of this batch

    def _plain_segment(self, conn: TcpConn, offset: int, end: int, now: float) -> bool:
        """Fast path: one segment with payload, in order, with no flag but ACK and PSH. Returns False for any other.

        It does the same as the loop in `tap_handler`, in two thirds of the time.
        """
        seq, ack, bits, win = SEQ_TO_WINDOW_UNPACK(self._pool.buf, offset + 4)
        data = offset + (bits >> 10 & 0x3C)
        rcv_nxt, una = conn.rcv_nxt, conn.snd_una
        if seq != rcv_nxt & MASK or bits & _NOT_PLAIN != ACK or data != offset + 20 or data >= end:
            return False
        if conn.retries or conn.out_of_order:
            return False
        advance = (ack - una) & MASK
        if advance > conn.snd_nxt - una:
            return False
        window = win << conn.snd_wscale
        if advance or window != conn.snd_wnd:
            self._acknowledged(conn, una + advance, window, False, now)
            if conn.sock is None:
                return True
        if self._whole is not None:
            payload: Sequence[memoryview] = (self._whole[data:end],)
        else:
            self._pool.gather(payload := [], data, end)
        self._in.to_sock(conn, payload, rcv_nxt + end - data, False, False, now)
        return True

    # Host to guest -----------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Handle events of the host socket of flow ref_data(ref)."""
        conn = self._by_index[ref & 0xFFFFFFFF]
        if not isinstance(conn, TcpConn):
            return
        if conn.events == TAP_SYN_RCVD:
            error = conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            reset = error in RESET
            self.opening.connected(conn, 0 if reset else error, now)
            if conn.sock is None or conn.events == TAP_SYN_RCVD:
                return  # the events are those of a socket that was replaced by another one
            if reset:
                self._table.broken(conn, error, now)
        if conn.events & SOCK_FAILED:
            return  # what it holds follows the guest's acknowledgements
        if events & EPOLLPRI:
            conn.urgent = True
        if events & EPOLLERR:  # EPOLLRDHUP beside it is no FIN: every closed socket has it
            error = conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._table.broken(conn, error, now)
                return
        if events & EPOLLRDHUP and not conn.events & SOCK_FIN_RCVD:
            set_event(conn, SOCK_FIN_RCVD)
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
        if events & EPOLLOUT and conn.wait_writable:
            if conn.rcv_refused:
                self._in.flush(conn, now)
            else:
                self._acks.writable(conn, now)

    def _to_tap(self, conn: TcpConn, now: float, progress: bool = False) -> None:
        """Send what the socket has. Data in flight keeps its timer (RFC 6298, 5.1), or `progress` restarts it (5.3)."""
        before = conn.snd_nxt
        was_in_flight = before != conn.snd_una and not progress
        due = conn.ack_due
        try:
            self._out.send_data(conn)
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO, now)
            return
        if conn.events & SOCK_FAILED and self._table.finished(conn, now):
            return
        if n := conn.snd_nxt - before:
            if not conn.rtt_end:
                conn.rtt_end, conn.rtt_at = conn.snd_nxt, now
            answer = due or now - conn.t_rx < ACK_DELAY
            if n >= SPARSE:
                self._out.turns.bulk(conn.index, now)
            elif answer and before == conn.snd_una:  # otherwise it is the rest of more
                self._out.turns.handed_on(conn.index, now)
            if conn.pingpong < 0:
                conn.pingpong = 0
            if answer and conn.pingpong < PINGPONG_MAX:
                conn.pingpong += 1
                if conn.pingpong == 1:
                    self._acks.first_answer(conn, now)
        if not was_in_flight:
            self._table.schedule(conn, now)

    def _acknowledged(
        self, conn: TcpConn, una: int, window: int, duplicate: bool, now: float, options: Options = ()
    ) -> None:
        """The guest acknowledged everything before `una`, and has a window of `window` bytes after it."""
        progress = una != conn.snd_una
        # Of equal values, one object is kept, also for several connections: each is 32 bytes, of every idle one.
        if window == self._window:
            window = self._window
        else:
            self._window = window
        conn.snd_wnd = window
        if window >= conn.snd_wnd_max:
            conn.snd_wnd_max = window
        if progress:
            conn.snd_una = conn.snd_nxt if una == conn.snd_nxt else una
            if conn.retries:
                self._recovery.progress(conn, probed=bool(options))
            if conn.rtt_end and una >= conn.rtt_end:
                measured = now - conn.rtt_at
                conn.rtt_end, conn.rtt_at = 0, 0.0
                if measured > rtt.LOCAL or conn.srtt > rtt.LOCAL:
                    rtt.sample(conn, measured, self._ctx.link.rto_min)
            if conn.events & TAP_FIN_SENT and una == conn.snd_nxt:
                set_event(conn, TAP_FIN_ACKED)
                if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
                    self._table.close(conn)
                    return
            n = una - conn.base
            if n >= CONSUME_MIN or conn.consume_next or conn.acks_unconsumed >= ACKS_UNCONSUMED_MAX:
                self._out.consume(conn)
                conn.consume_next, conn.acks_unconsumed = n >= CONSUME_MIN, 0
            elif not conn.events & TAP_FIN_ACKED:  # otherwise nothing follows that the rest could keep out
                conn.acks_unconsumed += 1
                if not conn.delack_at:
                    self._acks.queue_delayed(conn, now)
        elif window and conn.snd_nxt == una:
            conn.retries = 0
        elif not window:
            conn.stalled_at = now  # the guest lives (RFC 9293, 3.8.6.1)
        if conn.scoreboard is not None or options or duplicate:
            self._recovery.acknowledged(conn, duplicate, progress, options, now)
            if conn.sock is None:
                return
        if not conn.drained:
            self._to_tap(conn, now, progress)
        elif conn.snd_nxt == una and window and not conn.retries:
            conn.deadline = now + KEEPALIVE_IDLE  # like `schedule`; the timer, armed for earlier, reads it
        elif progress or conn.snd_nxt == una:
            self._table.schedule(conn, now)

    def _established(self, conn: TcpConn, now: float) -> None:
        """The handshake is done. If the guest waits for ACK of its SYN,ACK, data carries it if the socket has any."""
        if conn.events & SOCK_FAILED and conn.events & SOCK_ACCEPTED:
            self._out.ack(conn)  # RST may follow, and would refuse the connection that the guest has accepted
        before = conn.snd_nxt
        if conn.min_rtt > LONG_LINK:
            widen(conn.sock)
        if not conn.drained:
            self._to_tap(conn, now)
        elif conn.snd_wnd:
            conn.deadline = now + KEEPALIVE_IDLE  # like `schedule`; the timer, armed for the handshake, reads it
        else:
            self._table.schedule(conn, now)
        if conn.events & SOCK_ACCEPTED and conn.snd_nxt == before and conn.sock is not None:
            self._out.ack(conn)

    def mover(self) -> TcpMoving:
        """For connections that move to another host, or come from one: only those who need its system calls load it."""
        from .tcp_engine.moving import TcpMoving

        return TcpMoving(self._ctx, self._features, self._out, self._acks, self._table)

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
        """The link takes frames again, or another turn begins: connections that waited for it go on."""
        turns = self._out.turns
        each(turns.begin(), self._go_on, self._table.fault_at, now)
        turns.end()

    def _go_on(self, conn: TcpConn, now: float) -> None:
        if conn.sock is None or not self._out.turns.may_send(conn):
            return
        if conn.scoreboard is not None:
            self._recovery.resend(conn, now)
        if conn.sock is not None:
            self._to_tap(conn, now)
