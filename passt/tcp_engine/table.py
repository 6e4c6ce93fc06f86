"""The TCP connections through the tap: by key, their timers, and the ways to end them.

    way              condition                                       guest       host peer
    ---------------  ----------------------------------------------  ----------  -------------------------
    close            both directions are done, or none ever began    -, or RST   FIN, sent already
                                                                     (below)
    reset_by_guest   the guest sent RST, or refused a connection     -           RST
    abort            a timeout, or a fault of this program           RST         RST
    broken           the host socket failed                          data, then  its error was the end
                                                                     RST
    reset_by_host    the same, and it holds nothing for the guest    RST         the same
    evict            it makes room for another one (`eviction.py`)   -, or RST   RST

A reset of the host peer does not overtake what the peer sent before. The socket holds it still, and it goes to the
guest as fast as its window opens. RST follows the last byte, or the acknowledgement of it where segments were lost. A
guest that opens no window for FAILED_PROBES, or that sends data in spite of that, gets RST at once. Before ESTABLISHED
the handshake goes on first. So the guest's program sees what it would see without this program: a connection, data, and
ECONNRESET behind it.

TIME-WAIT. A guest that connected, and sent FIN first, waits for a minute when both directions are done (RFC 9293,
3.6.1), and cannot connect from this port to the same peer meanwhile. A kernel lets it all the same where timestamps
tell old segments from new ones (RFC 6191), and our segments have none. But the wait is for nothing: it guards against
the loss of its last acknowledgement, which is here, and against old segments in the network, and the link to the guest
keeps the order. So the guest is released from it by RST, as RFC 9293, 3.10.7.4 has it. A guest that accepted takes a
new SYN in TIME-WAIT. For the host socket the host's kernel has TIME-WAIT, with a port of its own choice.

All ways lead to `release`, after which a connection holds nothing. The log and the statistics get a reason:

    both ended                         FIN both ways, both acknowledged
    reset by guest, reset by peer      RST
    refused                            by the host peer: no server listens there
    refused by guest                   the same in the guest, for a host client
    unreachable in the guest           the guest answered by an ICMP error
    no route, timed out, ...           an errno of the host's kernel (`timed_out.py`)
    no answer of the guest             to SYN or SYN,ACK
    no acknowledgement                 of data or FIN, for three minutes
    no answer to keep-alive            after two hours and eight probes
    replaced                           a new connection has the same endpoints
    no socket, no descriptor           the process ran out of them
    evicted                            another one took its place (`eviction.py`)
    guest gone                         a virtual machine has disconnected
    host address gone,                 that of the socket, after a change of the host's network (`flow/source.py`)
      host family gone
    fault                              a handler, or a walk over connections, failed at this one
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from .. import NEVER
from ..flow.context import Context
from ..flow.half_open import HalfOpen
from ..flow.idle import flow_limit
from ..flow.room import TABLE
from ..flow.table import FREE, Flow, TableFull, reason_of
from ..loop.each import each, record
from ..wire.tcp import RST
from . import sock
from .conn import (
    ESTABLISHED,
    RTO_INIT_MAX,
    SOCK_ACCEPTED,
    SOCK_FAILED,
    SOCK_FIN_RCVD,
    TAP_FIN_SENT,
    TcpConn,
    set_event,
    timeout,
)
from .deadlines import Deadlines
from .out_of_order import OutOfOrder
from .output import TcpOut
from .rtt import sample
from .timed_out import TimedOut

HALF_OPEN_MAX = 4096  # connections of host clients that the guest has not answered
HALF_OPEN_SHARE = 8
OPENING_MAX = 8192  # connections of the guest that are not established
OPENING_SHARE = 4


class TcpTable:
    """Connections that have an index, from the first SYN to the end."""

    def __init__(self, ctx: Context, out: TcpOut) -> None:
        self._ctx = ctx
        self._out = out
        self.out_of_order = OutOfOrder(ctx.drops)
        self.deadlines = Deadlines(ctx, self.fault_at)
        ctx.services.on_forget.append(self.forget)
        ctx.services.take_end(TcpConn.label, self.end)
        self.by_key: dict[bytes, TcpConn] = {}
        self.successors: dict[bytes, Callable[[float], None]] = {}  # by key: called when that connection has ended
        self.inbound: HalfOpen[TcpConn] = HalfOpen(flow_limit(HALF_OPEN_MAX, HALF_OPEN_SHARE))
        self.outbound: HalfOpen[TcpConn] = HalfOpen(flow_limit(OPENING_MAX, OPENING_SHARE))
        self.failed: dict[int, int] = {}  # errno of sockets that hold data for the guest, by index of the connection
        # The guest's bytes in front of all that are refused now, from the socket of another host (`moving.py`)
        self.rests: dict[int, memoryview] = {}
        self.timed_out = TimedOut(ctx)
        self._link_rtt = 0.0  # s, of handshakes

    def add(self, conn: TcpConn, now: float) -> None:
        """Add a new connection, at the cost of another one if there has to be. Raises TableFull."""
        try:
            self._ctx.flows.insert(conn)
        except TableFull:
            if not self._ctx.room.make(TABLE, now, foreign=conn.events & SOCK_ACCEPTED != 0):
                raise
            self._ctx.flows.insert(conn)
        self.timed_out.forget(conn.key)
        self.by_key[conn.key] = conn

    @property
    def half_open(self) -> int:
        """Connections of host clients that the guest has not answered."""
        return len(self.inbound)

    @property
    def opening(self) -> int:
        """Connections of the guest that are not established."""
        return len(self.outbound)

    def rekey(self, conn: TcpConn, key: bytes) -> None:
        """Change the endpoints of a connection."""
        self._ctx.classes.pop(conn.key, None)
        del self.by_key[conn.key]
        conn.key, conn.host = key, conn.host
        self.by_key[key] = conn

    def begin_handshake(self, conn: TcpConn, now: float) -> None:
        """SYN or SYN,ACK is to be sent, with the timeout that earlier handshakes suggest (RFC 9040)."""
        conn.rtt_at, conn.retries = now, 0
        conn.rto = max(min(3 * self._link_rtt, RTO_INIT_MAX), self._ctx.link.rto_min)
        self.deadlines.set(conn, now + conn.rto, now)

    def end_handshake(self, conn: TcpConn, now: float) -> None:
        """The guest has acknowledged it. `rtt.py` says what is measured after a retransmission."""
        first, last = conn.rtt_at, conn.stalled_at
        self._link_rtt += (now - first - self._link_rtt) / 8
        sample(conn, now - (last if last > first else first), self._ctx.link.rto_min)

    def forget(self) -> None:
        """The guest is gone: RST to all host peers."""
        each(self.by_key.values(), self.reset_by_guest, self.fault_at, "guest gone")
        self.timed_out.clear()

    def schedule(self, conn: TcpConn, now: float, latest: float = NEVER) -> None:
        """Set the deadline of a connection, and arm its timer."""
        if not conn.retries and conn.snd_nxt != conn.snd_una and conn.scoreboard is None and conn.pto:
            delay = conn.pto  # nearly every call is about data that was sent once
            if 0 < conn.look_at <= now + delay:
                conn.deadline = now + delay  # likewise: `Deadlines.set` would find that it is looked at before
                return
        else:
            delay = timeout(conn)
            if delay == NEVER:
                conn.deadline = NEVER
                return
        self.deadlines.set(conn, min(now + delay, latest), now)

    def set_class(self, key: bytes) -> None:
        """The guest has changed the traffic class of its next segments. One that connects has it from the beginning.
        Raises OSError.
        """
        conn = self.by_key.get(key)
        if conn is not None and conn.sock is not None:
            sock.set_class(self._ctx, conn)
            if not self._ctx.classes.get(key):
                self._ctx.classes.pop(key, None)

    def forget_class(self, key: bytes) -> None:
        """The segments with that class have begun no connection."""
        if key not in self.by_key:
            self._ctx.classes.pop(key, None)

    # Ending --------------------------------------------------------------------------------------------------------

    def fault_at(self, conn: TcpConn, e: Exception) -> None:
        """A walk over connections met a fault at this one: it ends, unless it has, and the walk goes on (`each`)."""
        record(self._ctx.drops, "a TCP connection", e)
        self.end_faulty(conn)

    def end_faulty(self, conn: TcpConn) -> None:
        """End a connection whose handler failed. Even RST may fail now, and the connection is released all the same."""
        try:
            if conn.state != FREE:
                self.abort(conn, "fault")
        except Exception as e:
            record(self._ctx.drops, "the end of a TCP connection", e)
            if conn.state != FREE:
                self.release(conn, "fault")

    def end(self, conn: Flow, why: str) -> None:
        """The connection cannot go on: send RST to both sides."""
        assert isinstance(conn, TcpConn), "its label is that of these"
        self.abort(conn, why)

    def abort(self, conn: TcpConn, why: str) -> None:
        """Send RST to both sides."""
        self._out.reset(conn)
        self.reset_by_guest(conn, why)

    def reset_by_guest(self, conn: TcpConn, why: str = "reset by guest") -> None:
        """The guest ended this connection: send RST to the host peer."""
        if conn.sock is not None:
            sock.reset_on_close(conn.sock)
        self.release(conn, why)

    def reset_by_host(self, conn: TcpConn, why: str) -> None:
        """The host socket failed: send RST to the guest."""
        self._out.reset(conn)
        self.release(conn, why)

    def broken(self, conn: TcpConn, error: int, now: float) -> None:
        """The host socket failed with `error`. The data that it still holds goes to the guest, and then RST.

        EPIPE is the error of a peer that sent FIN before RST (tcp_reset() in CLOSE-WAIT): the guest gets both.
        """
        if conn.events & SOCK_FAILED:
            self._end_broken(conn, now)  # it fails once more: nothing is left in it
            return
        set_event(conn, SOCK_FAILED | (SOCK_FIN_RCVD if error == errno.EPIPE else 0))
        self.failed[conn.index] = error
        conn.drained = False
        if not conn.events & ESTABLISHED:
            return
        try:
            self._out.send_data(conn)
        except OSError:
            conn.drained = True
        if not self.finished(conn, now):
            self.schedule(conn, now)

    def finished(self, conn: TcpConn, now: float) -> bool:
        """End a connection whose socket has failed if the guest has all that it held; returns whether it ended.

        To be called when all has gone to the guest that its window takes.
        """
        if not (conn.drained or conn.events & TAP_FIN_SENT):
            return False
        if conn.snd_una != conn.snd_nxt and (conn.retries or conn.scoreboard is not None):
            conn.drained = False  # something was lost on the way: RST waits, and the next acknowledgement looks again
            return False
        self._end_broken(conn, now)
        return True

    def _end_broken(self, conn: TcpConn, now: float) -> None:
        error = self.failed[conn.index]
        if self.timed_out.takes(conn, error, now):
            self.release(conn, reason_of(error))
        else:
            self.reset_by_host(conn, reason_of(error))

    def evict(self, conn: TcpConn, *, silent: bool) -> None:
        """End a connection for another one, which gets its descriptor. `silent`: the guest gets no RST."""
        if not silent:
            self._out.reset(conn)
        owner, conn.sock = conn.sock, None
        self.release(conn, "evicted")
        if owner is not None:
            sock.reset_on_close(owner)
            self._ctx.reactor.forget(conn.fd)
            owner.close()

    def close(self, conn: TcpConn, why: str = "both ended") -> None:
        """Both directions are done. Bytes left in the socket would make close(2) send RST, so they are consumed."""
        if conn.sock is not None and conn.events & ESTABLISHED:
            self._out.consume(conn)
        if conn.time_wait:
            self._out.bare(conn, RST, conn.snd_nxt)
        self.release(conn, why)

    def release(self, conn: TcpConn, why: str) -> None:
        """Remove a connection, and give back everything that it holds."""
        del self.by_key[conn.key]
        if self._ctx.classes:
            self._ctx.classes.pop(conn.key, None)
        if not conn.events & ESTABLISHED:
            (self.inbound if conn.events & SOCK_ACCEPTED else self.outbound).discard(conn)
        if conn.events & SOCK_FAILED:
            del self.failed[conn.index]
        if conn.timer >= 0 or conn.slot is not None:
            self.deadlines.forget(conn)
        if conn.sock is not None:
            self._ctx.reactor.retire(conn.fd, conn.sock)
            conn.sock = None
        if conn.out_of_order:
            self.out_of_order.take(conn)
        if self.rests:
            self.rests.pop(conn.index, None)
        conn.scoreboard = None
        self._ctx.flows.free(conn, why)
        if self.successors and conn.key in self.successors:
            self._ctx.reactor.between_turns(self.successors.pop(conn.key))
