"""TCP connections that move with their machine: halted, described, resumed, or adopted from a description.

    where     step      the connection                             its socket
    --------  --------  -----------------------------------------  ---------------------------------------------------
    source    halt      stays in the table, without a socket: no   not watched, and discards what comes (`fence`)
                        event and no timer does anything
              describe  the same                                   is read in repair mode (`linux/tcp_repair.py`)
              resume    goes on, as if nothing had been            goes on, out of repair mode
              end       RST to the guest                           reset, or closed in silence where it is in repair
                                                                   mode
    target    open      there is none yet                          new, discards what comes
              make      the same                                   connected between the same endpoints, in repair mode
              adopt     goes on from the description               goes on, out of repair mode
              lose      RST to the guest at once                   -

Both sides of the guest's conversation are numbers of this program, so they move as numbers. Payload behind a hole, or
that the socket refused, is not acknowledged and does not move: the guest sends it again. Estimates of round trips begin
anew. Bytes that the new socket has no room for wait as if it had just refused them (`TcpIn.flush`).

Only established connections move. A guest that connects sends SYN again, and its new host answers. Left out, and lost:
connections with urgent data, which ends a peek, and those that the kernel has closed although data is left to be read.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import Any

from .. import NEVER, addr, log
from ..flow.context import Context
from ..flow.table import TableFull
from ..lean.records import replace
from ..linux import tcp_repair
from ..linux.nspool import new_socket
from ..linux.sockopt import SO_PEEK_OFF
from ..linux.tcp_repair import NotMovable
from ..linux.tcpinfo import Features
from ..loop.reactor import EPOLLOUT, INTEREST, TYPE_TCP
from ..wire.migration import FIN_RECEIVED, FIN_SENT, QUEUE_MAX, ConnectionState, SocketState
from . import rtt
from . import sock as tcp_sock
from .conn import (
    ESTABLISHED,
    SOCK_FIN_RCVD,
    TAP_FIN_ACKED,
    TAP_FIN_RCVD,
    TAP_FIN_SENT,
    TcpConn,
    may_connect,
    set_event,
)
from .output import TcpOut
from .table import TcpTable
from .window import TcpAck

_KIND = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class TcpMoving:
    """The steps for one connection each; `passt/migration` takes them."""

    def __init__(self, ctx: Context, features: Features, out: TcpOut, acks: TcpAck, table: TcpTable) -> None:
        self._ctx, self._features = ctx, features
        self._out, self._acks, self._table = out, acks, table

    # Source ----------------------------------------------------------------------------------------------------------

    def established(self) -> list[TcpConn]:
        """Connections that may move."""
        return [c for c in self._table.by_key.values() if c.events & ESTABLISHED and c.sock is not None]

    def halt(self, conn: TcpConn) -> Any:
        """Take the socket away from its connection; returns it. Raises OSError, with nothing changed."""
        sock = conn.sock
        self._out.consume(conn)
        tcp_repair.fence(sock)
        self._ctx.reactor.forget(conn.fd)
        conn.sock = None
        conn.deadline, conn.delack_at, conn.asked_at = NEVER, 0.0, 0.0
        return sock

    def describe(self, conn: TcpConn, sock: Any | None) -> ConnectionState:
        """The description; `sock` is the connection's socket in repair mode, None: it is not. Does not fail: a
        connection that cannot move is described without a socket.
        """
        state = None
        if sock is not None:
            try:
                state = self._read(conn, sock)
            except (NotMovable, OSError) as e:
                log.debug(f"Flow {conn.index} (TCP connection): does not move: {e}")
        events = conn.events | (SOCK_FIN_RCVD if state is not None and state.fins & FIN_RECEIVED else 0)
        return ConnectionState(
            key=conn.key,
            host=conn.host,
            events=events,
            iss=conn.iss,
            irs=conn.irs,
            snd_una=conn.snd_una,
            snd_nxt=conn.snd_nxt,
            snd_wnd=conn.snd_wnd,
            snd_wnd_max=max(conn.snd_wnd_max, conn.snd_wnd),
            rcv_nxt=conn.rcv_nxt,
            rcv_acked=conn.rcv_acked,
            rcv_edge=max(conn.rcv_edge, conn.rcv_nxt),
            mss=conn.mss,
            snd_wscale=conn.snd_wscale,
            rcv_wscale=conn.rcv_wscale,
            traffic_class=self._ctx.classes.get(conn.key, 0),
            sack=conn.sack,
            time_wait=conn.time_wait,
            delays_acks=conn.delays_acks,
            socket=state,
        )

    def _read(self, conn: TcpConn, sock: Any) -> SocketState:
        """Raises NotMovable or OSError."""
        if conn.urgent:
            raise NotMovable("urgent data")
        if conn.base != _first_unread(conn.snd_una, conn.events):
            raise NotMovable("bytes that the guest has acknowledged are still in the socket")
        state = tcp_repair.read(sock, conn.host, peek_off=self._features.peek_off)
        rest = self._table.rests.get(conn.index)
        if rest is None:
            return state
        queue = state.send_queue + rest
        if len(queue) > QUEUE_MAX:
            raise NotMovable(f"a queue of {len(queue)} bytes")
        fins = state.fins | (FIN_SENT if conn.events & TAP_FIN_RCVD else 0)
        return replace(state, send_queue=queue, unsent=state.unsent + len(rest), fins=fins)

    def resume(self, conn: TcpConn, sock: Any, now: float) -> None:
        """Give the socket back to its connection. Raises OSError, with the connection ended."""
        conn.sock = sock
        try:
            tcp_repair.lift_fence(sock)
            self._go_on(conn, now)
        except OSError:
            self._table.abort(conn, "migration")
            raise

    def end(self, conn: TcpConn, sock: Any | None) -> None:
        """The connection does not go on here, nor does its socket, if that was not closed before."""
        conn.sock = sock
        self._table.abort(conn, "migration")

    def reset(self, sock: Any) -> None:
        """Send RST to a host peer whose guest is gone. A failure does not matter."""
        with suppress(OSError):
            tcp_repair.lift_fence(sock)
            tcp_sock.reset(sock)

    # Target ----------------------------------------------------------------------------------------------------------

    def open(self, state: SocketState) -> Any:
        """A socket for `state`. Raises OSError."""
        sock = new_socket(addr.family(state.local[0]), _KIND)
        try:
            tcp_sock.prepare(sock, self._features)
            tcp_repair.fence(sock)
            interface = self._ctx.fwd.source(state.peer[0])[1]
            if interface is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
        except OSError:
            sock.close()
            raise
        return sock

    def make(self, sock: Any, state: SocketState) -> int:
        """Connect the socket, which is in repair mode; how many bytes it has queued. Raises OSError."""
        fwd = self._ctx.fwd
        return tcp_repair.restore(sock, state, fwd.sockaddr(*state.local), fwd.sockaddr(*state.peer))

    def adopt(self, state: ConnectionState, sock: Any, queued: int, now: float) -> None:
        """Go on with a connection, whose socket has left repair mode with so many bytes `queued`. Raises OSError, with
        RST to the guest and the connection ended; the socket is the table's.
        """
        assert state.socket is not None
        conn = self._connection(state, now)
        conn.sock, conn.fd = sock, sock.fileno()
        pending = len(state.socket.send_queue) + (1 if state.events & TAP_FIN_RCVD else 0)
        conn.moved = conn.rcv_nxt - pending, conn.base
        conn.t_rx = now
        conn.near = tcp_sock.is_near(self._ctx.fwd, self._features, conn.host[0])
        try:
            rest = tcp_repair.finish(sock, state.socket, queued)
            if rest:
                self._table.rests[conn.index] = memoryview(rest)
                conn.rcv_refused, conn.near = True, False
            tcp_repair.lift_fence(sock)
            if state.traffic_class:
                self._ctx.classes[conn.key] = state.traffic_class
                tcp_sock.set_class(self._ctx, conn)
            self._go_on(conn, now)
        except OSError:
            self._table.abort(conn, "migration")
            raise

    def lose(self, state: ConnectionState, now: float) -> None:
        """Send RST to the guest for a connection that has not arrived. Raises OSError."""
        conn = self._connection(state, now)
        conn.rcv_acked = conn.rcv_nxt
        self._table.abort(conn, "migration")

    def _connection(self, state: ConnectionState, now: float) -> TcpConn:
        """A connection in the table, without a socket. Raises OSError."""
        key = state.key
        n = (len(key) - 4) // 2
        if key in self._table.by_key or not all(map(may_connect, (key[:n], key[n : 2 * n]))):
            raise OSError(errno.EADDRINUSE, "its endpoints are in use, or are none")
        conn = TcpConn(key)
        for name in (
            *("host", "iss", "irs", "snd_una", "snd_nxt", "snd_wnd", "snd_wnd_max", "rcv_nxt", "rcv_acked"),
            *("rcv_edge", "mss", "snd_wscale", "rcv_wscale", "sack", "time_wait", "delays_acks"),
        ):
            setattr(conn, name, getattr(state, name))
        set_event(conn, state.events)
        conn.base = _first_unread(conn.snd_una, state.events)
        conn.rcv_wnd_max = conn.rcv_edge - conn.rcv_acked
        rtt.sample(conn, 0.0, self._ctx.link.rto_min)
        try:
            self._table.add(conn, now)
        except TableFull:
            raise OSError(errno.ENFILE, "the table of flows is full") from None
        self._ctx.flows.activate(conn)
        self._out.build_header(conn)
        return conn

    # Both ------------------------------------------------------------------------------------------------------------

    def let_in(self, sock: Any) -> None:
        """Repair mode is about to end. Raises OSError."""
        tcp_repair.lift_fence(sock)

    def _go_on(self, conn: TcpConn, now: float) -> None:
        """Watch the socket, and go on with the guest as soon as the link takes frames. Raises OSError."""
        if self._features.peek_off and not conn.events & TAP_FIN_SENT:
            conn.sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, conn.snd_nxt - conn.base)
        conn.drained = False
        conn.retries = 0
        pending = EPOLLOUT if conn.wait_writable or conn.rcv_refused else 0
        self._ctx.reactor.watch(conn.fd, TYPE_TCP, conn.index, INTEREST | pending)
        self._acks.open_window(conn, now)
        self._table.schedule(conn, now)
        self._acks.delay_ack(conn, now)  # the window may be new, and a guest that has none waits for it
        self._out.turns.waiting[conn.index] = conn


def _first_unread(snd_una: int, events: int) -> int:
    """The first byte that is in the socket, when all that the guest has acknowledged was taken out."""
    return snd_una - (1 if events & TAP_FIN_ACKED else 0)
