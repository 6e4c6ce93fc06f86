"""Host sockets of TCP connections: connecting ones are opened here; accepted ones inherit from their listener.

    option            purpose
    ----------------  -------------------------------------------------------------------------------------------
    SO_PEEK_OFF       each peek goes on where the last one ended (kernel 6.9; `output.py` has the other way)
    TCP_NODELAY       the guest's kernel has applied Nagle's algorithm already; a second delay would only add to it
    SO_OOBINLINE      the urgent byte stays in the stream, as on the guest's side
    TCP_USER_TIMEOUT  while connecting to one of several resolvers: without an answer, the next resolver is tried
    SO_KEEPALIVE      on from the guest's first keep-alive probe (`keepalive.py`)
    IP_TTL            the guest's, where its SYN has another one than the host's packets (`syn_errors.py`)
    IP_RECVERR        on with it, while connecting
    SO_RCVLOWAT       raised and set back, where the link to the guest is long: see `widen`
    SO_LINGER         on, 0 s: close(2) sends RST instead of FIN, as the guest did
    IP_TOS, ...       the DSCP of the guest's last segments (RFC 2474); ECN is the business of each side's TCP

Accepted sockets inherit the first three from the listening socket, so `prepare_listener` sets them there once. The
guest's source port is not kept: it may be in use on the host, and no peer may rely on it.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import Any, Final

from .. import addr
from ..drops import Drop, Failed, Reason
from ..flow.context import Context
from ..linux import tcpinfo
from ..linux.nspool import new_socket
from ..linux.sockopt import HOPS, RECVERR, SO_PEEK_OFF, TRAFFIC_CLASS, hops_option, recverr, setting
from ..linux.tcpinfo import Features
from ..loop.reactor import EPOLLOUT, INTEREST, TYPE_TCP
from ..policy.forwarding import Forwarding, SockAddr
from .conn import TcpConn

RESOLVER_TIMEOUT: Final = 1500  # ms without an answer to SYN (RFC 5482; Linux applies it while connecting, too)
LONG_LINK_BYTES: Final = 1 << 22  # in flight to the guest over a long link, or half of tcp_rmem's largest
_RESET_ON_CLOSE: Final = Struct("=ii").pack(1, 0)  # struct linger: on, 0 seconds
# Numbers: the names are of enumerations, of which an operation costs a microsecond
_AF_INET: Final = int(socket.AF_INET)
_AF_INET6: Final = int(socket.AF_INET6)
_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

CALLS = (
    *setting(*HOPS, *RECVERR),
    *setting(*((socket.IPPROTO_TCP, o) for o in (socket.TCP_NODELAY, socket.TCP_USER_TIMEOUT))),
    *setting(
        *TRAFFIC_CLASS,
        (socket.SOL_SOCKET, SO_PEEK_OFF),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
        (socket.SOL_SOCKET, socket.SO_LINGER),
        (socket.SOL_SOCKET, socket.SO_RCVLOWAT),
    ),
)


def widen(sock: socket.socket) -> None:
    """Enlarge the receive buffer: over a long link, what is in flight to the guest stays in it for a round trip.

    The kernel enlarges a receive buffer by the bytes that are read within a round trip of its own path, which may be a
    thousandth of the link's. SO_RCVBUF would end that, with a limit of 208 KiB (net.core.rmem_max). SO_RCVLOWAT makes
    the kernel (4.18) enlarge it within its own limits; the mark itself is set back, and the buffer stays
    (tcp_set_rcvlowat in net/ipv4/tcp.c).
    """
    for mark in (LONG_LINK_BYTES, 1):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)


def choose_host(ctx: Context, conn: TcpConn, now: float) -> None:
    """Set `conn.host` to the target of the guest's connection: of several resolvers, the best one."""
    peer, port = conn.peer
    if not ctx.resolvers.serve(peer, port) or not choose_resolver(ctx, conn, now):
        target = ctx.fwd.outbound(peer)
        conn.mapped_host = () if target == peer else (target, port)


def choose_resolver(ctx: Context, conn: TcpConn, now: float) -> bool:
    """Set `conn.host` to the best resolver that was not tried yet; False if all were tried."""
    key = conn.key
    resolver = ctx.resolvers.pick(len(key) > 12, now, conn.resolvers_tried)
    if resolver is None:
        return False
    conn.resolvers_tried += (resolver,)
    conn.host = resolver.addr, int.from_bytes(key[-2:], "big")
    return True


def connect(ctx: Context, features: Features, conn: TcpConn, now: float) -> int:
    """Open the host socket and start to connect to `conn.host`; returns 0, EINPROGRESS or another errno.

    Raises OSError when no socket can be opened, even at the cost of another flow (`flow/room.py`). A host without IPv6
    only rules a resolver out.
    """
    try:
        return _connect(ctx, features, conn)
    except OSError as e:
        if ctx.room.descriptor(e, now):
            return _connect(ctx, features, conn)
        if not conn.resolvers_tried or e.errno != errno.EAFNOSUPPORT:
            raise
        return errno.EAFNOSUPPORT


def connect_next(ctx: Context, features: Features, conn: TcpConn, error: int, now: float) -> int:
    """The resolver tried last failed with `error`: try the next ones in turn. Returns the same as `connect`."""
    while error not in (0, errno.EINPROGRESS):
        ctx.drops[Failed.DNS_RESOLVER.of(error)] += 1
        ctx.resolvers.failed(conn.resolvers_tried[-1], os.strerror(error), now)
        if not choose_resolver(ctx, conn, now):
            ctx.drops[Drop.DNS_ALL_FAILED] += 1
            ctx.resolvers.exhausted(now, now)
            break
        if conn.sock is not None:
            ctx.reactor.retire(conn.fd, conn.sock)
            conn.sock = None
        try:
            error = connect(ctx, features, conn, now)
        except OSError as e:
            error = e.errno or errno.EIO
    return error


def _connect(ctx: Context, features: Features, conn: TcpConn) -> int:
    """Only the last resolver to be tried has the kernel's own timeout."""
    dst, port = conn.host
    way = ctx.fwd.way(dst)
    sockaddr = way.sockaddr(port)
    sock: Any = new_socket(_AF_INET if len(dst) == 4 else _AF_INET6, _STREAM)
    conn.sock, conn.fd = sock, sock.fileno()
    prepare(sock, features)
    if conn.key in ctx.classes:
        set_class(ctx, conn)
    if conn.resolvers_tried and len(conn.resolvers_tried) < len(ctx.resolvers.hosts):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, RESOLVER_TIMEOUT)
    if conn.hops:
        set_hops(conn)
    conn.near = way.own or not features.bytes_acked
    if way.source is not None or way.interface is not None:
        try:
            bind_source(ctx.fwd, sock, dst)
        except OSError as e:
            return e.errno or errno.EIO  # the interface or the address vanished after the start
    error = connect_local(sock, sockaddr) if conn.near else sock.connect_ex(sockaddr)
    pending = EPOLLOUT if error == errno.EINPROGRESS else 0
    if error in (0, errno.EINPROGRESS):
        ctx.reactor.watch(conn.fd, TYPE_TCP, conn.index, INTEREST | pending)
    return error


def connect_local(sock: Any, sockaddr: SockAddr) -> int:
    """Connect to a server on this host; returns 0, EINPROGRESS or another errno.

    Over loopback the handshake is complete before connect(2) returns, yet it returns EINPROGRESS: the state tells.
    Another connect(2) would discard what a server has sent that has reset the connection meanwhile. An event tells of
    such an end.
    """
    error: int = sock.connect_ex(sockaddr)
    return 0 if error == errno.EINPROGRESS and tcpinfo.is_connected(sock) else error


def set_class(ctx: Context, conn: TcpConn) -> None:
    """Send segments to the host peer with the guest's traffic class. Raises OSError."""
    conn.sock.setsockopt(*TRAFFIC_CLASS[len(conn.host[0]) == 16], ctx.classes.get(conn.key, 0))


def prepare_listener(sock: Any, features: Features) -> None:
    """Set the options that accepted sockets inherit. Raises OSError."""
    prepare(sock, features)


def prepare(sock: Any, features: Features) -> None:
    """Set the options of every socket. Raises OSError."""
    if features.peek_off:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def is_near(fwd: Forwarding, features: Features, peer: bytes) -> bool:
    """Whether data that a socket takes for `peer` counts as acknowledged: it is on this host, or TCP_INFO lacks it."""
    return fwd.way(peer).own or not features.bytes_acked


def bind_source(fwd: Forwarding, sock: Any, target: bytes) -> None:
    """Bind to the configured outbound interface and address, if there are any for `target`. Raises OSError."""
    source, interface = fwd.source(target)
    if interface is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    if source is not None:
        sock.bind(fwd.sockaddr(source, 0))


def set_hops(conn: TcpConn) -> None:
    """Give the connecting socket the TTL or hop limit of the guest's SYN, and an error queue."""
    conn.sock.setsockopt(*hops_option(conn.host[0]), conn.hops)
    conn.sock.setsockopt(*recverr(addr.family(conn.host[0])), 1)


def no_error_queue(conn: TcpConn) -> None:
    """The socket is connected: an ICMP error is no end of it any more."""
    conn.sock.setsockopt(*recverr(addr.family(conn.host[0])), 0)


def clear_user_timeout(sock: Any) -> None:
    """The resolver is connected: from here on the guest decides how long to wait."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


def reset_on_close(sock: Any) -> None:
    """Let close(2) send RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def turn_away(ctx: Context, sock: Any, reason: Reason, now: float) -> None:
    """Reset a host client that was accepted, and count why."""
    ctx.drops[reason] += 1
    reset_on_close(sock)
    ctx.reactor.retire(sock.fileno(), sock)


def reset(sock: Any) -> None:
    """Close a socket that is not watched, with RST."""
    reset_on_close(sock)
    sock.close()
