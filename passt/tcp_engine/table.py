"""The TCP connections through the tap: by key, their timers, and the ways in which they end.

    way              when                                            guest    host peer
    ---------------  ----------------------------------------------  -------  -------------------------
    close            both directions are done, or none ever began    -        FIN, sent already
    reset_by_guest   the guest sent RST, or refused a connection     -        RST
    abort            nobody answers, or a fault of ours              RST      RST
    broken           the host socket failed                          data,    its error was the end
                                                                     RST
    reset_by_host    likewise, and it holds nothing for the guest    RST      likewise

All of them end in `release`, after which nothing of a connection is left. Each is told why, for the log and the
statistics:

    both ended                         FIN both ways, all acknowledged
    reset by guest, reset by peer      RST
    refused                            by the host peer: nobody listens there
    refused by guest                   likewise, for a host client
    no route, timed out, ...           the host's kernel says so
    no answer of the guest             to SYN or SYN,ACK
    no acknowledgement                 of data, for two minutes
    no answer to keep-alive            after two hours
    replaced                           the same endpoints begin anew
    no socket, no descriptor           ours ran out
    guest gone                         a virtual machine has disconnected
    fault                              a handler, or a walk over connections, failed at this one
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..flow.context import Context
from ..flow.table import FREE, reason_of
from ..loop.each import each, record
from ..loop.timers import NEVER
from . import sock
from .conn import ESTABLISHED, RTO_INIT, SOCK_ACCEPTED, SOCK_FIN_RCVD, TAP_SYN_RCVD, TcpConn, set_event, timeout
from .out_of_order import TcpEarly
from .output import TcpOut


class TcpTable:
    """Connections that have an index, from the first SYN to the end."""

    def __init__(self, ctx: Context, out: TcpOut) -> None:
        self._ctx = ctx
        self._out = out
        self.early = TcpEarly(ctx.drops)
        self.by_key: dict[bytes, TcpConn] = {}
        self.successors: dict[bytes, Callable[[float], None]] = {}  # called when the connection of the key has ended
        self.half_open = 0  # connections of host clients that the guest has not answered yet
        self.opening = 0  # connections that the guest began and that are not established yet

    def add(self, conn: TcpConn) -> None:
        """Take a new connection in. Raises TableFull."""
        self._ctx.flows.insert(conn)
        self.by_key[conn.key] = conn

    def rekey(self, conn: TcpConn, key: bytes) -> None:
        """The connection goes on between other endpoints."""
        del self.by_key[conn.key]
        conn.key = key
        self.by_key[key] = conn

    def set_guest_mac(self, mac: bytes) -> None:
        """The guest has another address on the link from now on."""
        each(self.by_key.values(), _set_guest_mac, self.fault_at, mac)

    def schedule(self, conn: TcpConn, now: float) -> None:
        """Arm the timer for what happens next if nothing happens. Raises OSError when a new timer cannot be had."""
        # Data in flight for the first time is what nearly every call is about.
        delay = timeout(conn) if conn.retries or conn.snd_nxt == conn.snd_una else RTO_INIT
        if delay == NEVER:
            conn.deadline = NEVER
            return
        conn.deadline = now + delay
        if conn.timer < 0:
            conn.timer = self._ctx.timers.take(conn.index)
        self._ctx.timers.at(conn.timer, conn.deadline)

    # Ending --------------------------------------------------------------------------------------------------------

    def fault_at(self, conn: TcpConn, e: Exception) -> None:
        """A walk over connections met a fault at this one: it ends, unless it has, and the walk goes on (`each`)."""
        record(self._ctx.drops, "a TCP connection", e)
        self.end_faulty(conn)

    def end_faulty(self, conn: TcpConn) -> None:
        """Handling it has failed, so that even RST may: nothing is left of it in any case."""
        try:
            if conn.state != FREE:
                self.abort(conn, "fault")
        except Exception as e:
            record(self._ctx.drops, "the end of a TCP connection", e)
            if conn.state != FREE:
                self.release(conn, "fault")

    def abort(self, conn: TcpConn, why: str) -> None:
        """RST to both sides."""
        self._out.reset(conn)
        self.reset_by_guest(conn, why)

    def reset_by_guest(self, conn: TcpConn, why: str = "reset by guest") -> None:
        """The guest is done with this connection: RST to the host peer."""
        if conn.sock is not None:
            sock.reset_on_close(conn.sock)
        self.release(conn, why)

    def reset_by_host(self, conn: TcpConn, why: str) -> None:
        """The host socket failed: RST to the guest."""
        self._out.reset(conn)
        self.release(conn, why)

    def broken(self, conn: TcpConn, error: int) -> None:
        """The host socket failed with `error`: what it still holds goes to the guest, as far as the window lets it, and
        then RST.

        EPIPE is the error of a peer that had sent FIN before its RST (tcp_reset() in CLOSE-WAIT): the guest gets both.
        """
        if error == errno.EPIPE and not conn.events & SOCK_FIN_RCVD:
            set_event(conn, SOCK_FIN_RCVD)
        if conn.events & ESTABLISHED:
            try:
                self._out.data(conn, reset=True)
            except OSError:
                pass  # nothing is left in the socket: RST tells the guest all there is
        self.reset_by_host(conn, reason_of(error))

    def close(self, conn: TcpConn, why: str = "both ended") -> None:
        """Both directions are done. Unread bytes would turn close() into RST, so they are taken out first."""
        if conn.sock is not None and conn.events & ESTABLISHED:
            self._out.consume(conn)
        self.release(conn, why)

    def release(self, conn: TcpConn, why: str) -> None:
        """Give back everything a connection holds."""
        del self.by_key[conn.key]
        if not conn.events & ESTABLISHED:
            self.half_open -= conn.events & SOCK_ACCEPTED != 0
            self.opening -= conn.events & TAP_SYN_RCVD != 0
        if conn.timer >= 0:
            self._ctx.timers.give_back(conn.timer)
            conn.timer = -1
        if conn.sock is not None:
            self._ctx.reactor.retire(conn.fd, conn.sock)
            conn.sock = None
        if conn.early:
            self.early.take(conn)
        conn.ack_due = False
        self._ctx.flows.free(conn, why)
        if self.successors and conn.key in self.successors:
            self._ctx.reactor.between_turns(self.successors.pop(conn.key))


def _set_guest_mac(conn: TcpConn, mac: bytes) -> None:
    conn.hdr[10:16] = mac
