"""Connections to a host peer that has become silent: the guest's own timeout ends them, as on the bare kernel.

When the host's kernel gives up on a peer (ETIMEDOUT; EHOSTUNREACH or ENETUNREACH, if a router told why), the peer has
not reset anything. RST would tell the guest ECONNRESET, a different and false reason. So the connection is forgotten
here, and becomes silent towards the guest as well:

    segment of the guest     answer
    -----------------------  -------------------------------------------------------------------------------------------
    SYN                      a new connection
    any other, for SILENCE   none, counted. The guest retransmits or probes, as it does already, and its kernel gives up
                             with the error and at the time that its application asked for (TCP_USER_TIMEOUT)
    later                    RST: there is no such connection

Where the reason was a router's, the guest gets that first, as an ICMP error about its oldest segment in flight. Its
kernel keeps it as the reason for the timeout (RFC 5461, 3; `sk_err_soft`).

A guest that waits for nothing, neither for an acknowledgement nor for an answer to its keep-alive probes, would never
know: it gets RST. The other direction has no such way: a socket can send FIN or RST, and a host peer whose guest is
silent gets RST.
"""

from __future__ import annotations

import errno

from ..drops import Drop
from ..flow.context import Context
from ..flow.errors import Errors
from ..wire import icmp
from ..wire.checksum import PROTO_TCP
from ..wire.tcp import MASK
from .conn import ESTABLISHED, TcpConn

SILENCE = 1000.0  # s, longer than the retransmissions of a Linux guest (tcp_retries2: 924 s)
SILENT_MAX = 4096  # connections; the oldest makes way

_UNREACHABLE = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN))


class TimedOut:
    """The silent connections, by key."""

    def __init__(self, ctx: Context) -> None:
        self._drops = ctx.drops
        self._errors = Errors(ctx)
        self._until: dict[bytes, float] = {}  # the oldest first

    def takes(self, conn: TcpConn, error: int, now: float) -> bool:
        """The socket of `conn` failed with `error`: whether the guest is to find out by its own timeout."""
        if error != errno.ETIMEDOUT and error not in _UNREACHABLE:
            return False
        waits = conn.rcv_acked != conn.rcv_nxt
        if not conn.events & ESTABLISHED or not (waits or conn.keepalive):
            return False
        if waits and error in _UNREACHABLE:
            n = (len(conn.key) - 4) // 2
            guest, peer, ports = conn.key[:n], conn.key[n : 2 * n], conn.key[2 * n :]
            oldest = ports + (conn.rcv_acked & MASK).to_bytes(4, "big") + bytes(12)
            self._errors.refused(error, guest, peer, icmp.quote(guest, peer, PROTO_TCP, oldest), now)
        self._until.pop(conn.key, None)
        if len(self._until) >= SILENT_MAX:
            del self._until[next(iter(self._until))]
        self._until[conn.key] = now + SILENCE
        return True

    def ignores(self, key: bytes, now: float) -> bool:
        """Whether a segment of no connection, which is no SYN, gets no answer; it is counted then."""
        until = self._until.get(key)
        if until is None:
            return False
        if now >= until:
            del self._until[key]
            return False
        self._drops[Drop.TCP_TIMED_OUT] += 1
        return True

    def forget(self, key: bytes) -> None:
        """A new connection has these endpoints."""
        if self._until:
            self._until.pop(key, None)

    def clear(self) -> None:
        """The guest is gone."""
        self._until.clear()
