"""The TCP connections through the tap: by key, their timers, and the ways to end them.

    way              condition                                       guest       host peer
    ---------------  ----------------------------------------------  ----------  -------------------------
    close            both directions are done, or none ever began    -           FIN, sent already
    reset_by_guest   the guest sent RST, or refused a connection     -           RST
    abort            a timeout, or a fault of this program           RST         RST
    broken           the host socket failed                          data, then  its error was the end
                                                                     RST
    reset_by_host    the same, and it holds nothing for the guest    RST         the same

All ways lead to `release`, after which a connection holds nothing. The log and the statistics get a reason:

    both ended                         FIN both ways, both acknowledged
    reset by guest, reset by peer      RST
    refused                            by the host peer: no server listens there
    refused by guest                   the same in the guest, for a host client
    no route, timed out, ...           an errno of the host's kernel
    no answer of the guest             to SYN or SYN,ACK
    no acknowledgement                 of data or FIN, for three minutes
    no answer to keep-alive            after two hours and eight probes
    replaced                           a new connection has the same endpoints
    no socket, no descriptor           the process ran out of them
    guest gone                         a virtual machine has disconnected
    fault                              a handler, or a walk over connections, failed at this one
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from .. import NEVER
from ..flow.context import Context
from ..flow.table import FREE, reason_of
from ..loop.each import each, record
from . import sock
from .conn import ESTABLISHED, RTO_INIT, SOCK_ACCEPTED, SOCK_FIN_RCVD, TAP_SYN_RCVD, TcpConn, set_event, timeout
from .out_of_order import OutOfOrder
from .output import TcpOut


class TcpTable:
    """Connections that have an index, from the first SYN to the end."""

    def __init__(self, ctx: Context, out: TcpOut) -> None:
        self._ctx = ctx
        self._out = out
        self.out_of_order = OutOfOrder(ctx.drops)
        ctx.services.on_forget.append(self.forget)
        ctx.services.on_mac.append(self.set_guest_mac)
        self.by_key: dict[bytes, TcpConn] = {}
        self.successors: dict[bytes, Callable[[float], None]] = {}  # by key: called when that connection has ended
        self.half_open = 0  # connections of host clients that the guest has not answered
        self.opening = 0  # connections of the guest that are not established

    def add(self, conn: TcpConn) -> None:
        """Add a new connection. Raises TableFull."""
        self._ctx.flows.insert(conn)
        self.by_key[conn.key] = conn

    def rekey(self, conn: TcpConn, key: bytes) -> None:
        """Change the endpoints of a connection."""
        del self.by_key[conn.key]
        conn.key = key
        self.by_key[key] = conn

    def forget(self) -> None:
        """The guest is gone: RST to all host peers."""
        each(self.by_key.values(), self.reset_by_guest, self.fault_at, "guest gone")

    def set_guest_mac(self, mac: bytes) -> None:
        """Write the guest's new MAC address into all headers."""
        each(self.by_key.values(), _set_guest_mac, self.fault_at, mac)

    def schedule(self, conn: TcpConn, now: float) -> None:
        """Set the deadline of a connection, and arm its timer. Raises OSError when no timerfd can be opened."""
        # Nearly every call is about data that was sent once.
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
        """End a connection whose handler failed. Even RST may fail now, and the connection is released all the same."""
        try:
            if conn.state != FREE:
                self.abort(conn, "fault")
        except Exception as e:
            record(self._ctx.drops, "the end of a TCP connection", e)
            if conn.state != FREE:
                self.release(conn, "fault")

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

    def broken(self, conn: TcpConn, error: int) -> None:
        """The host socket failed with `error`. The data that it still holds goes to the guest, as far as the window
        allows, and then RST.

        EPIPE is the error of a peer that sent FIN before RST (tcp_reset() in CLOSE-WAIT): the guest gets both.
        """
        if error == errno.EPIPE and not conn.events & SOCK_FIN_RCVD:
            set_event(conn, SOCK_FIN_RCVD)
        if conn.events & ESTABLISHED:
            try:
                self._out.send_data(conn, reset=True)
            except OSError:
                pass  # nothing is left in the socket: RST follows
        self.reset_by_host(conn, reason_of(error))

    def close(self, conn: TcpConn, why: str = "both ended") -> None:
        """Both directions are done. Bytes left in the socket would make close(2) send RST, so they are consumed."""
        if conn.sock is not None and conn.events & ESTABLISHED:
            self._out.consume(conn)
        self.release(conn, why)

    def release(self, conn: TcpConn, why: str) -> None:
        """Remove a connection, and give back everything that it holds."""
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
        if conn.out_of_order:
            self.out_of_order.take(conn)
        conn.ack_due = False
        self._ctx.flows.free(conn, why)
        if self.successors and conn.key in self.successors:
            self._ctx.reactor.between_turns(self.successors.pop(conn.key))


def _set_guest_mac(conn: TcpConn, mac: bytes) -> None:
    conn.hdr[10:16] = mac
