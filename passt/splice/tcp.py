"""TCP between the loopbacks of the host and of the namespace: from socket to socket, without a frame.

    client --- accepted socket, side 0 === half 0 ==> side 1, connecting socket --- server
                                       <== half 1 ===

A connection is two halves, each of which moves bytes from one socket to the other:

    bulk    splice(2) from the socket into a pipe and from there into the other one: the pages change hands, no byte is
            copied. The pipe is borrowed from a pool for as long as bytes are in it.
    small   what fits into one receive of COPY_MAX bytes is received and sent: fewer system calls, no pipe.

Bytes that wait cost more than bytes that flow: left to themselves, the sockets' buffers grow until what is on its way
is beyond the processor's caches, and the server reads it from memory. So a bulk half gets small buffers, on both sides
(1.5 times the throughput of one stream), unless there are many: each has its share of the time then, and fills them.

A receive that fills its buffer makes a half bulk; a wake-up of a bulk half that brought less than BULK_MIN makes it
small again. Bytes that the other socket does not take are held, in the pipe or in `pending`, nothing more is read
until it does, and so the sender's kernel slows the sender down.

Events are edge-triggered, EPOLLOUT from the first time on that a socket did not take everything. Reading goes on until
the kernel says that there is no more (EAGAIN, or a receive that did not fill its buffer), at most ROUNDS times: then
the event is asked for again, so that others have their turn. Urgent data (RFC 9293, 3.8.5) stays in line; splice(2)
stops at its mark for ever, so a half that has seen any is never bulk again.

    event                                        consequence
    -------------------------------------------  -----------------------------------------------------------------
    end of a direction (FIN)                     what is held is delivered, then shutdown(SHUT_WR) at the other side
    end of both                                  both sockets are closed
    reset or another error at one side           what that side sent before goes on as far as the other takes it; then
                                                 both are reset
    nobody listens at the target                 the next address of Forwarding.splice_targets (the other family);
                                                 after the last one the client is reset
    table full, no descriptor                    the client is reset, counted

There are no timers: both peers are kernels on this host, and neither can vanish without a word. The client's
address cannot be kept, since the server sees its own loopback; 127.0.0.2 and the like are, where the server is on
IPv4 loopback too.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from .. import PASTA, addr, log
from ..calls import calls
from ..flow.context import Context
from ..flow.table import TableFull, reason_of
from ..linux.nspool import open_socket
from ..linux.sockopt import setting
from ..loop.reactor import (
    EPOLLERR,
    EPOLLET,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    TYPE_TCP_SPLICE,
    ref_data,
)
from ..policy.rules import Listener
from ..tcp_engine import sock as tcp_sock
from .conn import Half, SpliceConn
from .pipes import PIPE_SIZE, PipePool

COPY_MAX = 65536  # bytes received at once by a small half
BULK_MIN = 16384  # bytes in a wake-up
BUFFER = 200_000  # bytes of the buffers of a tuned half; the kernel doubles it
FEW = 3  # connections: one transfer, and what controls it
ROUNDS = 16  # times a half is filled and emptied before others have their turn
INTEREST = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
IDLE, BLOCKED, AGAIN = range(3)  # what a half waits for: bytes, room at `dst`, its turn

CALLS = (
    *setting((socket.SOL_SOCKET, socket.SO_RCVBUF), (socket.SOL_SOCKET, socket.SO_SNDBUF), mode=PASTA),
    *calls("splice", "recvfrom", "sendto", "shutdown", mode=PASTA),
)


class TcpSplice:
    """All spliced connections."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._by_index = ctx.flows.by_index
        self._pipes = PipePool()
        self._count = 0  # connections that have an index
        self._buf = memoryview(bytearray(COPY_MAX))
        self._tallies = ctx.stats.spliced["tcp"]  # to the guest, to the host
        ctx.reactor.handle(TYPE_TCP_SPLICE, self.sock_handler)

    # Opening -----------------------------------------------------------------------------------------------------

    def accepted(self, listener: Listener, sock: Any, peer: bytes, peer_port: int, now: float) -> None:
        """Take over `sock`, a connection of `peer` to `listener`."""
        ctx = self._ctx
        targets = ctx.fwd.splice_targets(len(peer) == 16, listener.rule, ctx.guest)
        conn = SpliceConn(sock, peer, peer_port, listener, targets)
        try:
            ctx.flows.insert(conn)
        except TableFull:
            ctx.drops["splice: table full"] += 1
            tcp_sock.reset(sock)
            return
        self._count += 1
        try:
            ctx.reactor.watch(conn.fd, TYPE_TCP_SPLICE, conn.index << 1, INTEREST)
            self._connect(conn, errno.EHOSTUNREACH, now)
        except OSError as e:
            self._failed(conn, e.errno or errno.EIO, now)

    def _connect(self, conn: SpliceConn, error: int, now: float) -> None:
        """Connect to the next target, the last one having failed with `error`."""
        while conn.targets:
            error = self._try(conn, conn.targets.pop(0))
            if error == 0:
                self._connected(conn)
                return
            if error == errno.EINPROGRESS:
                return
            self._drop_other(conn)
        self._failed(conn, error, now)

    def _failed(self, conn: SpliceConn, error: int, now: float) -> None:
        """There will be no connection to the server."""
        self._ctx.drops[f"splice: {errno.errorcode.get(error, error)}"] += 1
        if error not in (errno.ECONNREFUSED, errno.ECONNRESET):
            log.warn_ratelimited("splice", f"Cannot connect to forwarded port {conn.port}: {os.strerror(error)}", now)
        self._abort(conn, reason_of(error))

    def _try(self, conn: SpliceConn, target: bytes) -> int:
        """Begin to connect to `target`: 0, EINPROGRESS or what failed. Raises OSError if there is no socket."""
        family = addr.family(target)
        if conn.inbound:
            assert self._ctx.ns is not None
            sock: Any = self._ctx.ns.take(family, socket.SOCK_STREAM)
        else:
            sock = open_socket(family, socket.SOCK_STREAM)
        conn.other, conn.server = sock, target
        if len(target) == 4 and target[0] == 127 and conn.peer[0] == 127 and conn.peer != addr.LOOPBACK4:
            sock.bind((addr.text(conn.peer), 0))
        sockaddr = self._ctx.fwd.sockaddr(target, conn.port)
        error = tcp_sock.connect_local(sock, sockaddr)
        if error in (0, errno.EINPROGRESS):
            pending = EPOLLOUT if error else 0
            self._ctx.reactor.watch(sock.fileno(), TYPE_TCP_SPLICE, conn.index << 1 | 1, INTEREST | pending)
        return error

    def _connected(self, conn: SpliceConn) -> None:
        conn.targets = []
        there, back = self._tallies if conn.inbound else self._tallies[::-1]
        conn.halves = Half(conn.sock, conn.other, there), Half(conn.other, conn.sock, back)
        self._ctx.flows.activate(conn)

    def _early(self, conn: SpliceConn, side: int, events: int, now: float) -> None:
        """An event before the server is connected: of the client, or about how connecting went."""
        if side == 0:
            if events & (EPOLLERR | EPOLLHUP):
                self._abort(conn, "client gone")  # it has given up
            conn.early |= events  # what it sent waits
            return
        error = conn.other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._drop_other(conn)
            events = 0  # they were those of the socket that failed
            try:
                self._connect(conn, error, now)
            except OSError as e:
                self._failed(conn, e.errno or errno.EIO, now)
        elif events & EPOLLOUT:
            self._connected(conn)
        for half, seen in zip(conn.halves, (conn.early, events), strict=False):  # no halves: not connected
            half.urgent, half.ending = bool(seen & EPOLLPRI), bool(seen & EPOLLRDHUP)
            if conn.state:
                self._move(conn, half)

    # Moving ------------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Something happened at side `ref & 1` of flow ref_data(ref) >> 1."""
        conn: Any = self._by_index[(ref & 0xFFFFFFFF) >> 1]
        side = ref & 1
        halves = conn.halves
        if not halves:
            self._early(conn, side, events, now)
            return
        if events & EPOLLERR:
            half = halves[side]
            error = half.src.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._move_last(half)
            self._broken(conn, error, side)
            return
        half = halves[1 - side]
        if events & EPOLLOUT and (half.held or half.pending):
            self._move(conn, half)
            if not conn.state:
                return
        half = halves[side]
        if events & (EPOLLPRI | EPOLLRDHUP):
            half.urgent |= bool(events & EPOLLPRI)
            half.ending |= bool(events & EPOLLRDHUP)
        if not (half.held or half.pending or half.eof):
            self._move(conn, half)

    def _move(self, conn: SpliceConn, half: Half) -> None:
        """Move what can be moved, and pass the end on if that was all."""
        try:
            if half.bulk or half.held:
                state = self._bulk(half)
            else:
                state = self._small(half)
                if state == AGAIN:
                    state = self._bulk(half)
            if state == IDLE and half.eof and not half.fin:
                self._finish(conn, half)
                return
        except OSError as e:
            # Which of the two failed is not known: one that was reset says EPIPE to who sends, ECONNRESET to who reads.
            self._broken(conn, e.errno or errno.EIO, conn.halves.index(half) ^ (e.errno == errno.EPIPE))
            return
        if state == BLOCKED:
            if not half.polled:
                half.polled = True
                self._ctx.reactor.change(half.dst_fd, INTEREST | EPOLLOUT)
        elif state == AGAIN:
            conn.halves[half is conn.halves[0]].polled = True
            self._ctx.reactor.change(half.src_fd, INTEREST | EPOLLOUT)

    def _move_last(self, half: Half) -> None:
        """Move what a peer sent before it reset the connection. Where its bytes end, its stream does not."""
        try:
            if half.bulk or half.held or self._small(half) == AGAIN:
                self._bulk(half)
        except OSError:
            pass  # the other side has failed as well, and its reset is to come

    def _small(self, half: Half) -> int:
        """Receive and send: once, or until there is no more where no event would tell of the rest."""
        buf = self._buf
        if half.pending and not self._flush(half):
            return BLOCKED
        while True:
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
                if not half.tuned and self._count <= FEW:
                    self._tune(half)
                return AGAIN
            if not (half.urgent or half.ending):
                return IDLE

    def _tune(self, half: Half) -> None:
        """Bound what is on its way."""
        half.tuned = True
        half.src.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        half.dst.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)

    def _flush(self, half: Half) -> bool:
        """Send what is pending; whether all of it went."""
        try:
            sent = half.dst.send(half.pending)
        except BlockingIOError:
            return False
        half.pending = half.pending[sent:]
        return not half.pending

    def _bulk(self, half: Half) -> int:
        """Splice."""
        splice, src, dst = os.splice, half.src_fd, half.dst_fd
        if half.pipe is None:
            try:
                half.pipe = self._pipes.take()
            except OSError:  # no descriptors: go on by copying
                half.bulk = False
                return AGAIN
        reader, writer = half.pipe
        total = 0
        rounds = ROUNDS
        state = AGAIN
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
                half.ending = True  # or a mark at the end of what was sent: a receive tells them apart
                state = IDLE
                break
            total += half.held
            half.moved += half.held
            half.tally.bytes += half.held
        self._pipes.give_back(half.pipe, 0)
        half.pipe = None
        if half.urgent or (half.ending and state == IDLE):
            half.bulk = False  # or what `_small` leaves pending would be overtaken
            return self._small(half)
        half.bulk = state == AGAIN or total >= BULK_MIN
        return state

    # Ending ------------------------------------------------------------------------------------------------------

    def _finish(self, conn: SpliceConn, half: Half) -> None:
        """Everything was delivered: pass the end on. Raises OSError."""
        half.fin = True
        if conn.halves[0].fin and conn.halves[1].fin:
            self._release(conn, "both ended")
        else:
            half.dst.shutdown(socket.SHUT_WR)

    def _drop_other(self, conn: SpliceConn) -> None:
        """Close the socket towards the server, if there is one."""
        if conn.other is not None:
            self._ctx.reactor.retire(conn.other.fileno(), conn.other)
            conn.other = None

    def _broken(self, conn: SpliceConn, error: int, side: int) -> None:
        """The socket of `side` failed, 0 is the client's."""
        guests = (side == 1) == conn.inbound
        why = reason_of(error) if error else "reset by peer"
        self._abort(conn, "reset by guest" if guests and why == "reset by peer" else why)

    def _abort(self, conn: SpliceConn, why: str) -> None:
        """Reset both sides."""
        tcp_sock.reset_on_close(conn.sock)
        if conn.other is not None:
            tcp_sock.reset_on_close(conn.other)
        self._release(conn, why)

    def _release(self, conn: SpliceConn, why: str) -> None:
        """Close both sides, and let go of everything."""
        self._ctx.flows.free(conn, why)
        for half in conn.halves:
            if half.pipe is not None:
                self._pipes.give_back(half.pipe, half.held)
        conn.halves = ()  # which refer to the sockets
        self._drop_other(conn)
        self._ctx.reactor.retire(conn.fd, conn.sock)
        self._count -= 1

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref) >> 1: end that flow, and only that."""
        conn = self._by_index[ref_data(ref) >> 1]
        if isinstance(conn, SpliceConn):
            self._abort(conn, "fault")
