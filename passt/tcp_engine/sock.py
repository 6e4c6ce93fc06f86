"""Host sockets of TCP connections: opened, set up, connected; or inherited from a listening one.

    option            why
    ----------------  -------------------------------------------------------------------------------------------
    SO_PEEK_OFF       each peek goes on where the last one ended (kernel 6.9; `output.py` has the other way)
    TCP_NODELAY       the guest has cut its stream already; waiting for more would only delay it
    SO_OOBINLINE      the urgent byte is one of the stream, here as on the guest's side
    TCP_USER_TIMEOUT  while connecting to one of several resolvers: if it keeps silent, the next one is tried
    SO_KEEPALIVE      once the guest probes the connection, after the same time without data
    SO_LINGER         on, 0 s: close() sends RST instead of FIN, when the guest did

The first three pass from a listening socket to those that it accepts, so there they are set once (`prepare_listener`).
The guest's port is not kept: it may be in use here, and no peer may rely on it.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import Any

from .. import addr, log
from ..flow.context import Context
from ..linux.nspool import new_socket
from ..linux.sockopt import setting
from ..linux.tcpinfo import SO_PEEK_OFF, Features
from ..loop.reactor import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, TYPE_TCP
from ..policy.forwarding import Forwarding, SockAddr
from .conn import TcpConn

INTEREST = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET  # of a connected socket, as long as its send buffer is not low
RESOLVER_PATIENCE = 1500  # ms that SYN may stay unanswered (RFC 5482; Linux counts it while connecting, too)
KEEPIDLE_MAX = 32767  # s, MAX_TCP_KEEPIDLE of Linux
_RESET_ON_CLOSE = Struct("=ii").pack(1, 0)  # struct linger: on, 0 seconds

CALLS = (
    *setting(*((socket.IPPROTO_TCP, o) for o in (socket.TCP_NODELAY, socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE))),
    *setting(
        (socket.SOL_SOCKET, SO_PEEK_OFF),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.SOL_SOCKET, socket.SO_LINGER),
    ),
)


def aim(ctx: Context, conn: TcpConn, now: float) -> None:
    """Find out whom the guest means: of several resolvers, the best one."""
    key = conn.key
    n = (len(key) - 4) // 2
    peer, port = key[n : 2 * n], int.from_bytes(key[2 * n + 2 :], "big")
    if not ctx.resolvers.serve(peer, port) or not aim_at_resolver(ctx, conn, now):
        conn.host = ctx.fwd.outbound(peer), port


def aim_at_resolver(ctx: Context, conn: TcpConn, now: float) -> bool:
    """Choose the best resolver that was not tried yet; False if all were."""
    key = conn.key
    resolver = ctx.resolvers.pick(len(key) > 12, now, conn.tried)
    if resolver is None:
        return False
    conn.tried += (resolver,)
    conn.host = resolver.addr, int.from_bytes(key[-2:], "big")
    return True


def connect(ctx: Context, features: Features, conn: TcpConn) -> int:
    """Open the host socket and start connecting to `conn.host`; returns 0, EINPROGRESS, or what failed.

    Raises OSError when no socket can be had; that a host has no IPv6 only rules a resolver out.
    """
    try:
        return _connect(ctx, features, conn)
    except OSError as e:
        if not conn.tried or e.errno != errno.EAFNOSUPPORT:
            raise
        return errno.EAFNOSUPPORT


def connect_next(ctx: Context, features: Features, conn: TcpConn, error: int, now: float) -> int:
    """The resolver that was tried last failed with `error`: try the next one, and so on; returns as `connect`."""
    while error not in (0, errno.EINPROGRESS):
        ctx.drops[f"dns: resolver failed: {errno.errorcode.get(error, error)}"] += 1
        ctx.resolvers.failed(conn.tried[-1], os.strerror(error), now)
        if not aim_at_resolver(ctx, conn, now):
            ctx.drops["dns: all resolvers failed"] += 1
            ctx.resolvers.exhausted(now, now)
            break
        if conn.sock is not None:
            ctx.reactor.retire(conn.fd, conn.sock)
            conn.sock = None
        try:
            error = connect(ctx, features, conn)
        except OSError as e:
            error = e.errno or errno.EIO
    return error


def _connect(ctx: Context, features: Features, conn: TcpConn) -> int:
    """A resolver that is not the last one to be tried must be quick."""
    fwd, dst = ctx.fwd, conn.host[0]
    sockaddr = fwd.sockaddr(*conn.host)
    sock: Any = new_socket(addr.family(dst), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    conn.sock, conn.fd = sock, sock.fileno()
    _prepare(sock, features)
    if conn.tried and len(conn.tried) < len(ctx.resolvers.hosts):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, RESOLVER_PATIENCE)
    conn.near = is_near(fwd, features, dst)
    _bind(ctx, conn, dst)
    error = connect_local(sock, sockaddr) if conn.near else sock.connect_ex(sockaddr)
    pending = EPOLLOUT if error == errno.EINPROGRESS else 0
    if error in (0, errno.EINPROGRESS):
        ctx.reactor.watch(conn.fd, TYPE_TCP, conn.index, INTEREST | pending)
    return error


def connect_local(sock: Any, sockaddr: SockAddr) -> int:
    """Connect to somebody on this host; returns 0, EINPROGRESS, or what failed.

    Over loopback the handshake is over before connect(2) returns, which still says EINPROGRESS: ask again.
    """
    error: int = sock.connect_ex(sockaddr)
    if error == errno.EINPROGRESS:
        error = sock.connect_ex(sockaddr)
        if error == errno.EALREADY:
            return errno.EINPROGRESS
    return error


def prepare_listener(sock: Any, features: Features) -> None:
    """Set up a listening socket so that each connection it accepts has the options above. Raises OSError."""
    _prepare(sock, features)


def _prepare(sock: Any, features: Features) -> None:
    if features.peek_off:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def is_near(fwd: Forwarding, features: Features, peer: bytes) -> bool:
    """Whether what a socket takes for `peer` counts as acknowledged: it is on this host, or nothing could tell."""
    ip = fwd.family(peer)
    return addr.is_loopback(peer) or not features.bytes_acked or (ip is not None and peer == ip.addr)


def _bind(ctx: Context, conn: TcpConn, dst: bytes) -> None:
    """Apply the configured outbound address and interface; the connection goes on without what is refused."""
    source, interface = ctx.fwd.source(dst)
    try:
        if source is not None:
            conn.sock.bind(ctx.fwd.sockaddr(source, 0))
        if interface is not None:
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    except OSError as e:
        log.debug(f"Flow {conn.index} (TCP connection): cannot bind: {e.strerror}")


def be_patient(sock: Any) -> None:
    """Connected: how long a resolver may take to answer is the guest's affair."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


def keep_alive(sock: Any, idle: float) -> None:
    """Have the kernel probe the host peer after `idle` seconds without data (RFC 9293, 3.8.4; tcp(7))."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(max(int(idle), 1), KEEPIDLE_MAX))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def reset_on_close(sock: Any) -> None:
    """Have close() send RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def reset(sock: Any) -> None:
    """Close a socket that was never watched, with RST."""
    reset_on_close(sock)
    sock.close()
