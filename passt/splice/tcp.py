"""Spliced TCP: between the loopbacks of the host and of the namespace, from socket to socket, without the tap.

    client --- accepted socket, side 0 === half 0 ==> side 1, connecting socket --- server
                                       <== half 1 ===

A connection is two halves, each of which moves bytes from one socket to the other:

    bulk    splice(2) from one socket into a pipe, and from there into the other: pages move, and no byte is copied. A
            pool lends the pipe for as long as bytes are in it.
    small   one receive of up to COPY_MAX bytes, and one send: fewer system calls, and no pipe.

Large buffers cost throughput: the kernel lets socket buffers grow until the bytes in flight exceed the processor's
caches, and the server reads them from memory. So a bulk half gets small buffers on both sides, which gives one stream
1.5 times its throughput. With more than TUNED_MAX connections the buffers stay: each fills them between its turns.

A receive that fills its buffer makes a half bulk. A wake-up of a bulk half with less than BULK_MIN bytes makes it small
again. Bytes that the other socket does not take are held, in the pipe or in `pending`. Nothing more is read until it
takes them, so TCP slows the sender down.

Events are edge-triggered, and EPOLLOUT is requested from the first partial send on. A half reads until the kernel has
no more (EAGAIN, or a receive that does not fill its buffer), at most ROUNDS_MAX times. Then it requests the event once
more, so that other connections have their turn. Urgent data (RFC 9293, 3.8.5) stays in the stream; splice(2) never gets
past its mark, so a half that has seen urgent data is never bulk again. A receive ends at the mark as well: such a half
receives until nothing is left, at most ROUNDS_MAX times, however fast a client moves the mark on.

    event                                        consequence
    -------------------------------------------  -----------------------------------------------------------------
    end of a direction (FIN)                     held bytes are sent, then shutdown(SHUT_WR) at the other side
    end of both                                  both sockets are closed
    reset or another error at one side           bytes sent before are forwarded first (`lingering.py`); then both are
                                                 reset
    no server at the target                      the next address of Forwarding.splice_targets (the other family);
                                                 after the last one the client is reset
    table full, no descriptor                    flows of little use make way (`flow/room.py`); if there are none, the
                                                 client is reset, counted

There are no timers: both peers are kernels on this host, and cannot disappear without FIN or RST. A rule for the host
may lead to a server elsewhere: such a socket has the outbound address and interface, and SO_KEEPALIVE, with the
kernel's times. The server sees its own loopback instead of the client's address, except for 127.0.0.2 and the like
where the server is on IPv4 loopback.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, Final

from .. import PASTA, addr, log
from ..calls import calls
from ..drops import Drop, Failed
from ..flow.context import Context
from ..flow.room import TABLE
from ..flow.table import FREE, RESET, TableFull, reason_of
from ..linux import tcpinfo
from ..linux.memory import zeros
from ..linux.nspool import open_socket
from ..linux.sockopt import setting
from ..loop.each import record
from ..loop.reactor import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    INTEREST,
    TYPE_TCP_SPLICE,
    ref_data,
)
from ..policy.rules import Listener
from ..tcp_engine import sock as tcp_sock
from .conn import Half, SpliceConn
from .lingering import Lingering
from .pipes import PIPE_SIZE, PipePool

COPY_MAX: Final = 65536  # bytes received at once by a small half
BULK_MIN: Final = 16384  # bytes in a wake-up
BUFFER_SIZE: Final = 200_000  # bytes of the buffers of a tuned half; the kernel doubles it
TUNED_MAX: Final = 3  # connections: one transfer, and its control connections
ROUNDS_MAX: Final = 16  # times that a half fills and empties the pipe, or receives and sends, in one turn
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
IDLE, BLOCKED, MORE, AGAIN = range(4)  # a half waits for: bytes, room at `dst`, its next turn; AGAIN: as a small one

CALLS = (
    *setting((socket.SOL_SOCKET, socket.SO_RCVBUF), (socket.SOL_SOCKET, socket.SO_SNDBUF), mode=PASTA),
    *setting((socket.SOL_SOCKET, socket.SO_BINDTODEVICE), (socket.SOL_SOCKET, socket.SO_KEEPALIVE), mode=PASTA),
    *calls("splice", "recvfrom", "sendto", "shutdown", mode=PASTA),
)


class TcpSplice:
    """All spliced connections."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._by_index = ctx.flows.by_index
        self._pipes = PipePool()
        self._count = 0  # connections that have an index
        self._buf = memoryview(zeros(COPY_MAX))
        self._lingering = Lingering(ctx, self._flush_after_reset, self._abort, self._fault_at)
        self._rests = self._lingering.rests
        self._tallies = ctx.stats.spliced["tcp"]  # to the guest, to the host
        ctx.reactor.handle(TYPE_TCP_SPLICE, self.sock_handler)

    # Opening -----------------------------------------------------------------------------------------------------

    def accepted(self, listener: Listener, sock: Any, peer: bytes, peer_port: int, now: float) -> None:
        """Take over `sock`, which `listener` accepted from `peer`."""
        ctx = self._ctx
        targets = ctx.fwd.splice_targets(len(peer) == 16, listener.rule, ctx.guest)
        conn = SpliceConn(sock, peer, peer_port, listener, targets)
        try:
            self._insert(conn, now)
        except TableFull:
            ctx.drops[Drop.SPLICE_TABLE_FULL] += 1
            tcp_sock.reset(sock)
            return
        self._count += 1
        try:
            ctx.reactor.watch(conn.fd, TYPE_TCP_SPLICE, conn.index << 1, INTEREST)
            self._connect(conn, errno.EHOSTUNREACH, now)
        except OSError as e:
            self._failed(conn, e.errno or errno.EIO, now)

    def _insert(self, conn: SpliceConn, now: float) -> None:
        """Give it an index, at the cost of another flow if there has to be. Raises TableFull."""
        ctx = self._ctx
        try:
            ctx.flows.insert(conn)
        except TableFull:
            if not ctx.room.make(TABLE, now, foreign=conn.inbound):
                raise
            ctx.flows.insert(conn)

    def _connect(self, conn: SpliceConn, error: int, now: float) -> None:
        """Connect to the next target; the last one failed with `error`."""
        while conn.targets:
            error = self._try(conn, conn.targets.pop(0), now)
            if error == 0:
                self._connected(conn)
                return
            if error == errno.EINPROGRESS:
                return
            self._close_server(conn)
        self._failed(conn, error, now)

    def _failed(self, conn: SpliceConn, error: int, now: float) -> None:
        """All targets failed: reset the client."""
        self._ctx.drops[Failed.SPLICE.of(error)] += 1
        if error not in (errno.ECONNREFUSED, errno.ECONNRESET):
            log.warn_ratelimited("splice", f"Cannot connect to forwarded port {conn.port}: {os.strerror(error)}", now)
        self._abort(conn, reason_of(error))

    def _try(self, conn: SpliceConn, target: bytes, now: float) -> int:
        """Start to connect to `target`; returns 0, EINPROGRESS or another errno. Raises OSError without a socket."""
        try:
            sock = self._socket(conn, addr.family(target))
        except OSError as e:
            if not self._ctx.room.descriptor(e, now, foreign=conn.inbound):
                raise
            sock = self._socket(conn, addr.family(target))
        conn.server_sock, conn.server = sock, target
        if not addr.is_loopback(target) and not conn.inbound:
            tcp_sock.bind_source(self._ctx.fwd, sock, target)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if len(target) == 4 and target[0] == 127 and conn.peer[0] == 127 and conn.peer != addr.LOOPBACK4:
            sock.bind((addr.text(conn.peer), 0))
        sockaddr = self._ctx.fwd.sockaddr(target, conn.port)
        error = tcp_sock.connect_local(sock, sockaddr)
        if error in (0, errno.EINPROGRESS):
            pending = EPOLLOUT if error else 0
            self._ctx.reactor.watch(sock.fileno(), TYPE_TCP_SPLICE, conn.index << 1 | 1, INTEREST | pending)
        return error

    def _socket(self, conn: SpliceConn, family: int) -> Any:
        """A socket towards the server. Raises OSError."""
        if conn.inbound:
            assert self._ctx.ns is not None
            return self._ctx.ns.take(family, socket.SOCK_STREAM)
        return open_socket(family, socket.SOCK_STREAM)

    def _connected(self, conn: SpliceConn) -> None:
        conn.targets = []
        there, back = self._tallies if conn.inbound else self._tallies[::-1]
        conn.halves = Half(conn.sock, conn.server_sock, there), Half(conn.server_sock, conn.sock, back)
        self._ctx.flows.activate(conn)

    def _connecting(self, conn: SpliceConn, side: int, events: int, now: float) -> None:
        """Handle an event before the server is connected: of the client, or of connect(2)."""
        if side == 0:
            conn.events_before |= events  # its data waits
            if events & (EPOLLERR | EPOLLHUP):
                self._client_reset(conn, now)
            return
        error = conn.server_sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        reset = error in RESET
        if error and not reset:
            self._close_server(conn)
            events = 0  # of the socket that failed
            try:
                self._connect(conn, error, now)
            except OSError as e:
                self._failed(conn, e.errno or errno.EIO, now)
        elif reset or events & EPOLLOUT:
            self._connected(conn)
        for half, seen in zip(conn.halves, (conn.events_before, events), strict=False):  # no halves: not connected
            half.urgent, half.eof_announced = bool(seen & EPOLLPRI), bool(seen & EPOLLRDHUP)
        if reset:
            self._broken(conn, error, 1, now)
        else:
            for half in conn.halves:
                if conn.state and conn.index not in self._rests:
                    self._move(conn, half, now)

    def _client_reset(self, conn: SpliceConn, now: float) -> None:
        """The client has reset before the server was seen to be connected. A server that is gets its data."""
        if tcpinfo.is_connected(conn.server_sock):
            self._connected(conn)
            conn.halves[0].urgent = bool(conn.events_before & EPOLLPRI)
            self._broken(conn, conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0, now)
        else:
            self._abort(conn, "client gone")

    # Moving ------------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Handle events at side `ref & 1` of flow ref_data(ref) >> 1."""
        conn: Any = self._by_index[(ref & 0xFFFFFFFF) >> 1]
        side = ref & 1
        halves = conn.halves
        if not halves:
            self._connecting(conn, side, events, now)
            return
        if self._rests and conn.index in self._rests:
            return
        if events & EPOLLERR:
            error = halves[side].src.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._broken(conn, error, side, now)
            return
        half = halves[1 - side]
        if events & EPOLLOUT and (half.held or half.pending):
            self._move(conn, half, now)
            if not conn.state or conn.index in self._rests:
                return
        half = halves[side]
        if events & (EPOLLPRI | EPOLLRDHUP):
            half.urgent |= bool(events & EPOLLPRI)
            half.eof_announced |= bool(events & EPOLLRDHUP)
        if not (half.held or half.pending or half.eof):
            self._move(conn, half, now)

    def _move(self, conn: SpliceConn, half: Half, now: float) -> None:
        """Move bytes, and then the end if the half has reached it."""
        try:
            state = self._turn(half)
            if state == IDLE and half.eof and not half.fin:
                self._finish(conn, half)
                return
        except OSError as e:
            sending = e.errno == errno.EPIPE or tcpinfo.is_closed(half.dst)  # either socket may have failed
            side = conn.halves.index(half) ^ sending
            self._broken(conn, errno.ECONNRESET if e.errno == errno.EPIPE else e.errno or errno.EIO, side, now)
            return
        if state == BLOCKED:
            if not half.epollout:
                half.epollout = True
                self._ctx.reactor.change(half.dst_fd, INTEREST | EPOLLOUT)
        elif state != IDLE:
            conn.halves[half is conn.halves[0]].epollout = True
            self._ctx.reactor.change(half.src_fd, INTEREST | EPOLLOUT)

    def _turn(self, half: Half) -> int:
        """Move bytes for one turn; returns what the half waits for."""
        if half.bulk or half.held:
            return self._bulk(half)
        state = self._small(half)
        return self._bulk(half) if state == MORE else state

    def _flush_after_reset(self, half: Half) -> None:
        """Move the bytes that a peer sent before it reset the connection. Their end is no FIN. Raises OSError."""
        for _ in range(ROUNDS_MAX):  # what is left is at most a receive buffer
            if self._turn(half) in (IDLE, BLOCKED):
                break

    def _small(self, half: Half) -> int:
        """Receive and send: once, or to the end of the queue where no event reports the rest."""
        buf = self._buf
        if half.pending and not self._flush(half):
            return BLOCKED
        for _ in range(ROUNDS_MAX):
            try:
                n = half.src.recv_into(buf)
            except BlockingIOError:
                return IDLE
            if not n:
                half.eof = True
                return IDLE
            half.moved += n
            half.tally.bytes += n
            try:
                sent = half.dst.send(buf[:n])
            except BlockingIOError:
                sent = 0
            if sent < n:
                half.pending = bytes(buf[sent:n])
                return BLOCKED
            if n == COPY_MAX and not half.urgent:
                half.bulk = True
                if not half.tuned and self._count <= TUNED_MAX:
                    self._tune(half)
                return MORE
            if not (half.urgent or half.eof_announced):
                return IDLE
        return AGAIN

    def _tune(self, half: Half) -> None:
        """Bound the bytes in flight."""
        half.tuned = True
        half.src.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
        half.dst.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)

    def _flush(self, half: Half) -> bool:
        """Send pending bytes; returns whether none are left."""
        try:
            sent = half.dst.send(half.pending)
        except BlockingIOError:
            return False
        half.pending = half.pending[sent:]
        return not half.pending

    def _bulk(self, half: Half) -> int:
        """Move bytes by splice(2)."""
        splice, src, dst = os.splice, half.src_fd, half.dst_fd
        if half.pipe is None:
            try:
                half.pipe = self._pipes.take()
            except OSError:  # no descriptors: go on by copying
                half.bulk = False
                return MORE
        reader, writer = half.pipe
        total = 0
        rounds = ROUNDS_MAX
        state = MORE
        while True:
            while half.held:
                try:
                    half.held -= splice(reader, dst, half.held, flags=_SPLICE)
                except BlockingIOError:
                    return BLOCKED
            if not rounds or half.urgent:
                break
            rounds -= 1
            try:
                half.held = splice(src, writer, PIPE_SIZE, flags=_SPLICE)
            except BlockingIOError:
                state = IDLE
                break
            if not half.held:
                half.eof_announced = True  # or an urgent mark behind the last byte: a receive tells them apart
                state = IDLE
                break
            total += half.held
            half.moved += half.held
            half.tally.bytes += half.held
        self._ctx.reactor.moved += total
        self._pipes.give_back(half.pipe, 0)
        half.pipe = None
        if half.urgent or (half.eof_announced and state == IDLE):
            half.bulk = False  # otherwise splice(2) would overtake the bytes that `_small` leaves pending
            return self._small(half)
        half.bulk = state == MORE or total >= BULK_MIN
        return state

    # Ending ------------------------------------------------------------------------------------------------------

    def _finish(self, conn: SpliceConn, half: Half) -> None:
        """All bytes are delivered: send FIN, or close both sides. Raises OSError."""
        half.fin = True
        if conn.halves[0].fin and conn.halves[1].fin:
            self._release(conn, "both ended")
        else:
            half.dst.shutdown(socket.SHUT_WR)

    def _close_server(self, conn: SpliceConn) -> None:
        """Close the socket towards the server, if there is one."""
        if conn.server_sock is not None:
            self._ctx.reactor.retire(conn.server_sock.fileno(), conn.server_sock)
            conn.server_sock = None

    def _broken(self, conn: SpliceConn, error: int, side: int, now: float) -> None:
        """The socket of `side` failed; 0 is the client's. EPIPE: FIN came before RST."""
        guests = (side == 1) == conn.inbound
        why = reason_of(error) if error else "reset by peer"
        why = "reset by guest" if guests and why == "reset by peer" else why
        self._lingering.end(conn, conn.halves[side], why, fin=error == errno.EPIPE, now=now)

    def _abort(self, conn: SpliceConn, why: str) -> None:
        """Reset both sides."""
        tcp_sock.reset_on_close(conn.sock)
        if conn.server_sock is not None:
            tcp_sock.reset_on_close(conn.server_sock)
        self._release(conn, why)

    def _release(self, conn: SpliceConn, why: str) -> None:
        """Close both sides, and give back everything."""
        if self._rests:
            self._lingering.forget(conn)
        self._ctx.flows.free(conn, why)
        for half in conn.halves:
            if half.pipe is not None:
                self._pipes.give_back(half.pipe, half.held)
        conn.halves = ()  # they refer to the sockets
        self._close_server(conn)
        self._ctx.reactor.retire(conn.fd, conn.sock)
        self._count -= 1

    def _fault_at(self, conn: SpliceConn, e: Exception) -> None:
        """A walk over connections met a fault at this one: it ends, unless it has, and the walk goes on (`each`)."""
        record(self._ctx.drops, "a spliced TCP connection", e)
        if conn.state != FREE:
            self._abort(conn, "fault")

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref) >> 1: end only that flow."""
        conn = self._by_index[ref_data(ref) >> 1]
        if isinstance(conn, SpliceConn):
            self._abort(conn, "fault")
