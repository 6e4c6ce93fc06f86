"""ICMP errors about SYN, which decide whether connect(2) fails at once, with its reason, or after two minutes.

Guest to host. A SYN of the guest has a TTL or hop limit, and the host socket gets the same one. So a low one ends at
the router where it would end on the host: `traceroute -T` and tcptraceroute see the path.

    the guest's TTL is the host's own    errors of connect(2), as an ICMP error that fits the errno
    it is another one                    IP_RECVERR is on until the socket is connected. The error queue has the message
                                         itself, with the router that sent it (kernel 5.8), and the guest gets that

On a connected socket IP_RECVERR would make each error fatal, where RFC 5461 wants most of them ignored.

Host to guest. The guest answers our SYN by an ICMP error (`flow/guest_errors.py`): the client of the host has its
connection refused at once, as from a kernel in SYN-SENT. The error must quote our initial sequence number (RFC 5927,
4.1), and counts in SYN-SENT alone: on an established connection it is a hint at most, and easy to forge.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..flow.context import Context
from ..flow.errors import Errors
from ..linux.sockopt import ORIGIN_LOCAL, default_hops, read_errors
from ..wire import icmp
from ..wire.checksum import PROTO_TCP
from ..wire.tcp import MASK
from . import sock as tcp_sock
from .conn import ESTABLISHED, TAP_SYN_SENT, TcpConn
from .table import TcpTable


class SynErrors:
    """Errors in both directions. `refused(conn, why, now)` is called for a SYN that the guest answers by one."""

    def __init__(self, ctx: Context, table: TcpTable, refused: Callable[[TcpConn, str, float], None]) -> None:
        self._errors = Errors(ctx)
        self._table = table
        self._refused = refused
        self._default = default_hops()
        ctx.services.take_errors(PROTO_TCP, self.guest_error)

    # Guest to host -------------------------------------------------------------------------------------------------

    def set_hops(self, conn: TcpConn, hops: int) -> None:
        """SYN of the guest came with this TTL or hop limit, 0: not known."""
        if not hops or hops == conn.hops:
            return
        n = len(conn.mapped_host[0]) if conn.mapped_host else len(conn.key) // 2 - 2
        if not conn.hops and hops == self._default[n]:
            return
        conn.hops = hops
        if conn.sock is not None:
            tcp_sock.set_hops(conn)

    def unreachable(self, conn: TcpConn, error: int, now: float) -> None:
        """connect(2) failed with errno `error`: answer SYN by an ICMP error, so that the guest's fails likewise."""
        n = (len(conn.key) - 4) // 2
        guest, peer, ports = conn.key[:n], conn.key[n : 2 * n], conn.key[2 * n :]
        syn = icmp.quote(guest, peer, PROTO_TCP, ports + (conn.irs & MASK).to_bytes(4, "big") + bytes(12))
        if conn.hops and conn.sock is not None:
            for extended, _ in read_errors(conn.sock):
                if extended.origin != ORIGIN_LOCAL:
                    self._errors.reported(extended, guest, peer, conn.host[0], syn, now)
                    return
        if error != errno.ETIMEDOUT:
            self._errors.refused(error, guest, peer, syn, now)

    # Host to guest -------------------------------------------------------------------------------------------------

    def guest_error(self, key: bytes, upper: bytes, now: float) -> bool:
        """The guest sent an error about the segment that begins with `upper`; returns whether that is our SYN."""
        conn = self._table.by_key.get(key)
        if conn is None or conn.events & (TAP_SYN_SENT | ESTABLISHED) != TAP_SYN_SENT:
            return False
        if int.from_bytes(upper[4:8], "big") != conn.iss & MASK:
            return False
        self._refused(conn, "unreachable in the guest", now)
        return True
