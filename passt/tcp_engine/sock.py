"""Host sockets of TCP connections: connecting ones are opened here; accepted ones inherit from their listener.

    option            purpose
    ----------------  -------------------------------------------------------------------------------------------
    SO_PEEK_OFF       each peek goes on where the last one ended (kernel 6.9; `output.py` has the other way)
    TCP_NODELAY       the guest's kernel has applied Nagle's algorithm already; a second delay would only add to it
    SO_OOBINLINE      the urgent byte stays in the stream, as on the guest's side
    TCP_USER_TIMEOUT  while connecting to one of several resolvers: without an answer, the next resolver is tried
    SO_KEEPALIVE      on from the guest's first keep-alive probe, after the same idle time
    SO_LINGER         on, 0 s: close(2) sends RST instead of FIN, as the guest did

Accepted sockets inherit the first three from the listening socket, so `prepare_listener` sets them there once. The
guest's source port is not kept: it may be in use on the host, and no peer may rely on it.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import Any

from .. import addr, log
from ..drops import Drop, Failed
from ..flow.context import Context
from ..linux.nspool import new_socket
from ..linux.sockopt import SO_PEEK_OFF, setting
from ..linux.tcpinfo import Features
from ..loop.reactor import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, TYPE_TCP
from ..policy.forwarding import Forwarding, SockAddr
from .conn import TcpConn

INTEREST = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET  # of a connected socket with room in its send buffer
RESOLVER_TIMEOUT = 1500  # ms without an answer to SYN (RFC 5482; Linux applies it while connecting, too)
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


def choose_host(ctx: Context, conn: TcpConn, now: float) -> None:
    """Set `conn.host` to the target of the guest's connection: of several resolvers, the best one."""
    key = conn.key
    n = (len(key) - 4) // 2
    peer, port = key[n : 2 * n], int.from_bytes(key[2 * n + 2 :], "big")
    if not ctx.resolvers.serve(peer, port) or not choose_resolver(ctx, conn, now):
        conn.host = ctx.fwd.outbound(peer), port


def choose_resolver(ctx: Context, conn: TcpConn, now: float) -> bool:
    """Set `conn.host` to the best resolver that was not tried yet; False if all were tried."""
    key = conn.key
    resolver = ctx.resolvers.pick(len(key) > 12, now, conn.resolvers_tried)
    if resolver is None:
        return False
    conn.resolvers_tried += (resolver,)
    conn.host = resolver.addr, int.from_bytes(key[-2:], "big")
    return True


def connect(ctx: Context, features: Features, conn: TcpConn) -> int:
    """Open the host socket and start to connect to `conn.host`; returns 0, EINPROGRESS or another errno.

    Raises OSError when no socket can be opened. A host without IPv6 only rules a resolver out.
    """
    try:
        return _connect(ctx, features, conn)
    except OSError as e:
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
            error = connect(ctx, features, conn)
        except OSError as e:
            error = e.errno or errno.EIO
    return error


def _connect(ctx: Context, features: Features, conn: TcpConn) -> int:
    """Only the last resolver to be tried has the kernel's own timeout."""
    fwd, dst = ctx.fwd, conn.host[0]
    sockaddr = fwd.sockaddr(*conn.host)
    sock: Any = new_socket(addr.family(dst), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    conn.sock, conn.fd = sock, sock.fileno()
    _prepare(sock, features)
    if conn.resolvers_tried and len(conn.resolvers_tried) < len(ctx.resolvers.hosts):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, RESOLVER_TIMEOUT)
    conn.near = is_near(fwd, features, dst)
    _bind(ctx, conn, dst)
    error = connect_local(sock, sockaddr) if conn.near else sock.connect_ex(sockaddr)
    pending = EPOLLOUT if error == errno.EINPROGRESS else 0
    if error in (0, errno.EINPROGRESS):
        ctx.reactor.watch(conn.fd, TYPE_TCP, conn.index, INTEREST | pending)
    return error


def connect_local(sock: Any, sockaddr: SockAddr) -> int:
    """Connect to a server on this host; returns 0, EINPROGRESS or another errno.

    Over loopback the handshake is complete before connect(2) returns, yet it returns EINPROGRESS. A second call tells.
    """
    error: int = sock.connect_ex(sockaddr)
    if error == errno.EINPROGRESS:
        error = sock.connect_ex(sockaddr)
        if error == errno.EALREADY:
            return errno.EINPROGRESS
    return error


def prepare_listener(sock: Any, features: Features) -> None:
    """Set the options that accepted sockets inherit. Raises OSError."""
    _prepare(sock, features)


def _prepare(sock: Any, features: Features) -> None:
    if features.peek_off:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def is_near(fwd: Forwarding, features: Features, peer: bytes) -> bool:
    """Whether data that a socket takes for `peer` counts as acknowledged: it is on this host, or TCP_INFO lacks it."""
    ip = fwd.family(peer)
    return addr.is_loopback(peer) or not features.bytes_acked or (ip is not None and peer == ip.addr)


def _bind(ctx: Context, conn: TcpConn, dst: bytes) -> None:
    """Apply the configured outbound address and interface; the connection goes on where the kernel refuses."""
    source, interface = ctx.fwd.source(dst)
    try:
        if source is not None:
            conn.sock.bind(ctx.fwd.sockaddr(source, 0))
        if interface is not None:
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    except OSError as e:
        log.debug(f"Flow {conn.index} (TCP connection): cannot bind: {e.strerror}")


def clear_user_timeout(sock: Any) -> None:
    """The resolver is connected: from here on the guest decides how long to wait."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


def keep_alive(sock: Any, idle: float) -> None:
    """Let the kernel probe the host peer after `idle` seconds without data (RFC 9293, 3.8.4; tcp(7))."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(max(int(idle), 1), KEEPIDLE_MAX))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def reset_on_close(sock: Any) -> None:
    """Let close(2) send RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def reset(sock: Any) -> None:
    """Close a socket that is not watched, with RST."""
    reset_on_close(sock)
    sock.close()
