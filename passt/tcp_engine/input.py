"""Guest to host: payload goes to the host socket, or waits in the out-of-order queue.

    payload                         goes to
    ------------------------------  --------------------------------------------------------------------------------
    in order                        the socket
    behind a hole                   the queue; to the socket with the segment that fills the hole
    in order, refused by the        the queue; to the socket when EPOLLOUT reports room (`flush`)
    socket (`rcv_refused`)
    anything while that waits       the queue

While refused payload waits, nothing is taken off the queue, and the socket is not tried: every segment of the guest
would move all that waits there and back. So a guest that goes on sending to a host peer that does not read costs no
more per segment than another one. FIN of the guest waits with the payload before it.

FIN goes to the host peer by shutdown(2), or by close(2) when both directions are done.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Final

from ..calls import calls
from ..flow.context import Context
from . import held
from .conn import CLOSED, SOCK_FAILED, SOCK_FIN_SENT, TAP_FIN_ACKED, TAP_FIN_RCVD, TAP_SYN_RCVD, TcpConn, set_event
from .out_of_order import Later
from .output import TcpOut
from .pace import Pace
from .table import TcpTable
from .turns import SPARSE
from .window import BULK_MIN, TcpAck

IOV_MAX: Final = 1024
MSG_MORE: Final = socket.MSG_MORE
DUP_ACKS: Final = 3  # duplicate acknowledgements that start a fast retransmit of the guest (RFC 5681, 3.2)

CALLS = calls("sendto", "sendmsg", "shutdown")


class TcpIn:
    """The way of payload to the host sockets of all connections."""

    def __init__(self, ctx: Context, out: TcpOut, acks: TcpAck, table: TcpTable) -> None:
        self._view = ctx.pool.view
        self._out = out
        self._acks = acks
        self._table = table
        self._turns = out.turns
        self._pace = Pace(ctx, acks.held_over, table.fault_at)
        self._out_of_order = table.out_of_order

    def queue(
        self, conn: TcpConn, rcv_nxt: int, later: list[Later], payload: list[memoryview], fin: bool
    ) -> tuple[int, bool, bool]:
        """Segments `later` came behind a hole, or others wait there. Append to `payload` what the hole let go.

        Returns (rcv_nxt, fin, must_ack).
        """
        if conn.events & (TAP_FIN_RCVD | SOCK_FAILED):  # nothing follows, and the host peer may have to acknowledge FIN
            return rcv_nxt, fin, bool(later and not conn.events & SOCK_FAILED)
        blocks = [(seq, seq + end - start) for seq, start, end, _ in later]
        if conn.rcv_refused:
            self._out_of_order.wait(conn, self._view, later)
            held.note(conn, blocks)
            hole = any(left > conn.rcv_nxt for left, _ in conn.held)
            must_ack = hole or bool(later)
        else:
            rcv_nxt, fin, hole = self._out_of_order.merge(conn, self._view, rcv_nxt, later, payload, fin)
            held.note(conn, blocks)
            must_ack = hole
        if hole:
            conn.rcv_acked = conn.rcv_nxt
            if not conn.sack:
                for _ in range(min(len(later), DUP_ACKS) - 1):  # the caller sends one more
                    self._out.ack(conn)
        return rcv_nxt, fin, must_ack

    def to_sock(
        self, conn: TcpConn, payload: Sequence[memoryview], rcv_nxt: int, fin: bool, must_ack: bool, now: float
    ) -> None:
        """Send the bytes [conn.rcv_nxt, rcv_nxt) to the host socket, and FIN behind them if `fin`."""
        if conn.events & (TAP_FIN_RCVD | SOCK_FAILED):
            self._to_nobody(conn, now)
            return
        if conn.rcv_refused:
            conn.t_rx = now
            self._put_back(conn, payload, 0, rcv_nxt, fin)
            self._acks.acknowledge(conn, 0, must_ack, now)
            return
        wanted = rcv_nxt - conn.rcv_nxt
        taken = 0
        try:
            if len(payload) == 1:
                # FIN goes with it, in one segment, unless close(2) at the end of the turn is what sends FIN
                with_fin = fin and not conn.events & TAP_FIN_ACKED
                taken = conn.sock.send(payload[0], MSG_MORE) if with_fin else conn.sock.send(payload[0])
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
            self._table.broken(conn, e.errno or errno.EIO, now)
            return
        conn.rcv_nxt += taken
        conn.t_rx = now
        conn.rcv_refused = taken < wanted
        if taken >= SPARSE:
            self._turns.bulk(conn.index, now)
        elif conn.pingpong > 0 and taken:
            self._turns.handed_on(conn.index, now)
        if taken and conn.pingpong < 0:
            self._acks.delay_was_in_vain(conn, now)
        if conn.rcv_refused:
            self._put_back(conn, payload, taken, rcv_nxt, fin)
        elif fin:
            # Of more than a segment at once, as in __tcp_ack_snd_check(): the guest would probe after two round trips
            self._fin_received(conn, must_ack or taken > conn.mss or taken >= BULK_MIN, now)
            return
        elif taken >= SPARSE and now < self._turns.paced_until and not must_ack:
            self._pace.hold(conn, now)
            return
        self._acks.acknowledge(conn, taken, must_ack, now)

    def _to_nobody(self, conn: TcpConn, now: float) -> None:
        """Data after FIN is none: no new data follows it. Where the host peer has reset the connection, no data has a
        receiver, and RST follows; at once, if the guest sends without taking what has to come before RST.
        """
        if not conn.events & SOCK_FAILED:
            self._out.ack(conn)
        elif conn.retries:
            self._table.broken(conn, 0, now)

    def before_reset(self, conn: TcpConn, payload: Sequence[memoryview], fin: bool) -> None:
        """Payload, and FIN if `fin`, in front of the guest's RST: the host peer gets them, as far as the socket has
        room. A kernel discards the rest from its own send queue, too.
        """
        if conn.rcv_refused or conn.events & (TAP_FIN_RCVD | SOCK_FAILED):
            return
        try:
            for i in range(0, len(payload), IOV_MAX):
                conn.sock.sendmsg(payload[i : i + IOV_MAX])
            if fin:
                conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the socket is full, or has failed: RST follows in any case

    def _put_back(self, conn: TcpConn, payload: Sequence[memoryview], taken: int, rcv_nxt: int, fin: bool) -> None:
        """Queue [conn.rcv_nxt, rcv_nxt), which the socket has refused. SACK shows no hole behind it then."""
        self._out_of_order.put_back(conn, payload, taken, fin)
        held.note(conn, [(conn.rcv_nxt, rcv_nxt)])

    def flush(self, conn: TcpConn, now: float) -> None:
        """The host socket has room for what it refused."""
        if self._table.rests and not self._send_rest(conn, now):
            return
        conn.wait_writable = conn.rcv_refused = False
        payload: list[memoryview] = []
        rcv_nxt, fin, _ = self._out_of_order.merge(conn, self._view, conn.rcv_nxt, [], payload, False)
        held.note(conn, ())
        if payload or fin:
            self.to_sock(conn, payload, rcv_nxt, fin, True, now)
        else:
            self._acks.writable(conn, now)

    def _send_rest(self, conn: TcpConn, now: float) -> bool:
        """Send what the socket on another host held, and FIN if that had been sent; whether nothing is left of it."""
        rest = self._table.rests.get(conn.index)
        if rest is None:
            return True
        try:
            rest = rest[conn.sock.send(rest) :]
            if not rest and conn.events & TAP_FIN_RCVD:
                conn.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO, now)
            return False
        if rest:
            self._table.rests[conn.index] = rest
            return False
        del self._table.rests[conn.index]
        return True

    def _fin_received(self, conn: TcpConn, must_ack: bool, now: float) -> None:
        """Take the guest's FIN, and send FIN to the host peer, by shutdown(2) or by close(2)."""
        conn.rcv_nxt += 1
        set_event(conn, TAP_FIN_RCVD)
        conn.time_wait = conn.events & (TAP_SYN_RCVD | TAP_FIN_ACKED) == TAP_SYN_RCVD
        if conn.rcv_edge < conn.rcv_nxt:
            conn.rcv_edge = conn.rcv_nxt
        if conn.near:
            self._acks.acknowledge_fin(conn, must_ack, now)
            if conn.events & CLOSED == CLOSED:
                self._table.close(conn)
                return
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError as e:
            self._table.broken(conn, e.errno or errno.EIO, now)
            return
        set_event(conn, SOCK_FIN_SENT)
        if not conn.near:
            self._acks.acknowledge_fin(conn, must_ack, now)
            if conn.events & CLOSED == CLOSED and conn.rcv_acked == conn.rcv_nxt:
                self._table.close(conn)
