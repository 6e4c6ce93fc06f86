"""Sockets of UDP flows. All are connected, so each receives from one peer only.

    socket               bound to                              connected to
    -------------------  ------------------------------------  ----------------------------------------
    open_socket          the guest's port if it is free        the host that the guest writes to
    open_target          the client's port if it is free       the server that a spliced client writes to
    open_client          the address and port of a listener    the client that wrote there
                         that the client's datagram went to

A guest or a client writes to many peers from one port, many clients write to one listener, and each pair has a socket
here. Sockets share a port if all have SO_REUSEADDR, which any user may set, or if all have SO_REUSEPORT and belong to
the same user. Hence:

    socket                          SO_REUSEADDR                     SO_REUSEPORT
    ------------------------------  -------------------------------  -----------------------------------------------
    towards a host or a server      off; on at a port of a group     on
    listener                        off                              while a client's socket is bound to its port
    client's, listener at any       on: another program that wants   during bind(2)
    address                         the port meets the listener, too
    client's, listener at one       off: flows of the guest from     on
    address                         there have other addresses

A socket belongs to the user that opened it, so listeners that root opens are given to the user that root becomes
(`ports.sockets.open_side`). A port that is forwarded at all addresses is not shared with other programs of that user,
either, except during the bind(2) of a client's socket.

A socket that is bound and not yet connected receives what any peer sends to its port. Towards a host or a server these
datagrams are discarded. Beside a listener they are misdelivered: first datagrams of other clients, which belong to the
listener. The caller gets them back. The receive buffer is small until connect(2), so a bounded number of receives
takes all of them, in 0.2 ms at most, while any host floods the port.

A port below 1024 was bound with capabilities that the process may have given up (EACCES). Clients of such a port have
no sockets of their own: their datagrams keep coming by the listener, which also answers them (`SharedSocket`).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

from .. import addr
from ..calls import calls
from ..flow.context import Context
from ..linux import nspool
from ..linux.mmsg import INFO4, INFO6
from ..linux.sockopt import (
    FREEBIND,
    IP_PKTINFO,
    RECEIVE_CLASS,
    RECVERR,
    REUSEPORT,
    SOL_UDP,
    TRAFFIC_CLASS,
    UDP_SEGMENT,
    freebind,
    hops_option,
    recverr,
    setting,
)
from ..policy.forwarding import Forwarding, SockAddr
from ..policy.rules import Listener

BUFFER_SIZE = 4 << 20  # requested; net.core.[rw]mem_max limit it
BUFFER_FIRST = 64 << 10  # before connect(2); the kernel doubles it
# Datagrams before connect(2): sk_buff and skb_shared_info of an empty one take at least 576 bytes of the buffer
UNCONNECTED_MAX = 2 * BUFFER_FIRST // 576 + 1
SIZE_MAX = 65535  # of a datagram
BUSY_PORT = frozenset((errno.EACCES, errno.EADDRINUSE))

_SEGMENT, _INT = Struct("=H"), Struct("=i")
# (level, option) of the socket: (level, type) of the control message that has its effect for one send
_ANCILLARY = {
    hops_option(addr.ANY4): (socket.IPPROTO_IP, socket.IP_TTL),
    hops_option(addr.ANY6): (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT),
    TRAFFIC_CLASS[0]: TRAFFIC_CLASS[0],
    TRAFFIC_CLASS[1]: TRAFFIC_CLASS[1],
}

Misdelivered = tuple["Client", bytes]  # a datagram that a socket received before it was connected

CALLS = (
    *setting(REUSEPORT, *RECVERR, *FREEBIND, *RECEIVE_CLASS, (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)),
    *setting(
        *(
            (socket.SOL_SOCKET, option)
            for option in (
                socket.SO_RCVBUF,
                socket.SO_SNDBUF,
                socket.SO_REUSEADDR,
                socket.SO_BROADCAST,
                socket.SO_BINDTODEVICE,
            )
        )
    ),
    *calls("recvfrom", "sendmsg"),
)


class Client(NamedTuple):
    """A peer of a listener, and the local address it writes to. IPv4 takes 4 bytes on dual-stack sockets, too."""

    listener: Listener
    peer: bytes
    port: int
    local: bytes  # unspecified if the datagram went to a group
    scope: int = 0  # interface that link-local addresses among them belong to

    def sockaddr(self, a: bytes, port: int) -> SockAddr:
        """For bind() and connect()."""
        return (addr.text(a), port) if len(a) == 4 else (addr.text(a), port, 0, self.scope)

    def __str__(self) -> str:
        """[192.0.2.9]:40000 -> [192.0.2.2]:53"""
        return f"{addr.host_port(self.peer, self.port)} -> {addr.host_port(self.local, self.listener.port)}"


def opener(ctx: Context, namespace: bool) -> Callable[[int, int], Any]:
    """The function that opens sockets of a family and a type, in the namespace or on the host."""
    return ctx.ns.take if namespace and ctx.ns is not None else nspool.open_socket


def is_self_connected(sock: Any, peer: SockAddr) -> bool:
    """Whether `sock`, connected to `peer`, has that address and port itself."""
    own: SockAddr = sock.getsockname()
    return own[:2] == peer[:2]


# Towards a host or a server ------------------------------------------------------------------------------------------


def open_socket(fwd: Forwarding, host: bytes, sport: int, dport: int, *, beside: bool = False) -> socket.socket:
    """A non-blocking UDP socket connected to `host`, from port `sport` if it is free. Raises OSError.

    `beside`: also if other programs share it (SO_REUSEADDR).
    """
    source, interface = fwd.source(host)

    def make() -> socket.socket:
        return socket.socket(addr.family(host), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    sock: socket.socket = open_target(make, fwd, source, interface, sport, host, dport, beside=beside)
    return sock


def open_target(
    make: Callable[[], Any],
    fwd: Forwarding,
    source: bytes | None,
    interface: str | None,
    sport: int,
    target: bytes,
    dport: int,
    *,
    beside: bool = False,
) -> Any:
    """The same with a socket of `make`, from address `source` and through `interface`. Raises OSError."""
    source = source or (addr.ANY4 if len(target) == 4 else addr.ANY6)
    peer = fwd.sockaddr(target, dport)

    def opened(port: int) -> Any:
        sock = make()
        try:
            _prepare(sock, len(target) == 16, interface)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_FIRST)
            if beside:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(sock, fwd.sockaddr(source, port), fwd.sockaddr(source, 0))
            _connect(sock, peer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
        except BaseException:
            sock.close()
            raise
        return sock

    sock = opened(sport)
    if sport == dport and is_self_connected(sock, peer):
        # An address of the same host, and the peer's port: the socket would receive what it sends.
        sock.close()
        sock = opened(0)
    return sock


def _prepare(sock: Any, v6: bool, interface: str | None) -> None:
    """Set the options that all have."""
    sock.setsockopt(*recverr(socket.AF_INET6 if v6 else socket.AF_INET), 1)
    sock.setsockopt(*RECEIVE_CLASS[v6], 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if interface is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())


def _bind(sock: Any, wanted: SockAddr, any_port: SockAddr) -> None:
    """Bind the port wanted, or any other if it is in use or reserved."""
    if wanted != any_port:
        try:
            sock.setsockopt(*REUSEPORT, 1)
            sock.bind(wanted)
            return
        except OSError as e:
            if e.errno not in BUSY_PORT:
                raise
            sock.setsockopt(*REUSEPORT, 0)  # otherwise the kernel might choose the port of another flow
    sock.bind(any_port)


def _connect(sock: Any, target: SockAddr) -> None:
    """Connect, with SO_BROADCAST where `target` needs it, and discard what was received before.

    At most as much as the buffer holds: the peer may go on to send.
    """
    try:
        sock.connect(target)
    except PermissionError as e:
        if e.errno != errno.EACCES:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.connect(target)
    try:
        for _ in range(UNCONNECTED_MAX):
            sock.recv(1)
    except BlockingIOError:
        pass  # nothing is left from before connect(2)


# Towards a client ----------------------------------------------------------------------------------------------------


def open_client(make: Callable[[], Any], client: Client, misdelivered: list[Misdelivered]) -> Any:
    """A socket of `make` that receives from `client` from now on, and sends from the address that it wrote to.

    Appends what the socket received before connect(2) to `misdelivered`. Returns a `SharedSocket`, which only sends,
    where bind(2) is not permitted. Raises OSError.
    """
    rule = client.listener.rule
    sock = make()
    try:
        _prepare(sock, len(client.peer) == 16, rule.ifname)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_FIRST)
        try:
            _bind_to_listener_port(sock, client)
        except PermissionError as e:
            if e.errno != errno.EACCES:
                raise
            sock.close()
            return SharedSocket(client)
        sock.connect(client.sockaddr(client.peer, client.port))
        misdelivered += _drain_misdelivered(sock, client)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_to_listener_port(sock: Any, client: Client) -> None:
    """Bind to the listener's port; during bind(2) the listener shares it with sockets of the same user."""
    listener = client.listener
    here = client.sockaddr(client.local, listener.port)
    anywhere = listener.rule.addr is None or addr.is_unspecified(listener.rule.addr)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, anywhere)
    sock.setsockopt(*REUSEPORT, 1)
    listener.sock.setsockopt(*REUSEPORT, 1)
    try:
        try:
            sock.bind(here)
        except OSError as e:
            if e.errno != errno.EADDRNOTAVAIL:
                raise
            # The address is on no interface: datagrams arrive by a route of type `local`
            sock.setsockopt(*freebind(addr.family(client.local)), 1)
            sock.bind(here)
    finally:
        listener.sock.setsockopt(*REUSEPORT, 0)
    if anywhere:
        sock.setsockopt(*REUSEPORT, 0)


class SharedSocket:
    """A socket towards a client that sends by the listener's: no descriptor, nothing to receive, no errors.

    TTL and traffic class go with each send, in control messages (ip(7), ipv6(7)). There is none for DF.
    """

    def __init__(self, client: Client) -> None:
        self._sock = client.listener.sock
        self._segment = 0
        self._fields: dict[tuple[int, int], bytes] = {}  # of the IP header, by level and type of their messages
        to = addr.text(client.peer)
        if len(client.peer) == 16:
            self._to: SockAddr = client.sockaddr(client.peer, client.port)
            self._from = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, INFO6.pack(client.local, client.scope)
        else:
            v4 = self._sock.family == socket.AF_INET
            self._to = (to, client.port) if v4 else (f"::ffff:{to}", client.port, 0, 0)
            self._from = socket.IPPROTO_IP, IP_PKTINFO, INFO4.pack(0, client.local, addr.ANY4)

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """The listener stays."""

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Options that can apply to each send. Others would apply to all clients, and are ignored."""
        if (level, option) == (SOL_UDP, UDP_SEGMENT):
            self._segment = value
        elif (level, option) in _ANCILLARY:
            self._fields[_ANCILLARY[level, option]] = _INT.pack(value)

    def getsockopt(self, level: int, option: int) -> int:
        return 0

    def recvmsg(self, size: int, control: int, flags: int) -> Any:
        raise BlockingIOError

    def send(self, data: bytes) -> None:
        self.write([memoryview(data)])

    def write(self, views: list[memoryview]) -> None:
        """Send a GSO batch. Raises OSError."""
        control = [self._from, *((*kind, value) for kind, value in self._fields.items())]
        if self._segment:
            control.append((SOL_UDP, UDP_SEGMENT, _SEGMENT.pack(self._segment)))
        self._sock.sendmsg(views, control, 0, self._to)


def _drain_misdelivered(sock: Any, client: Client) -> list[Misdelivered]:
    """Receive what arrived at a socket before it was connected to `client`."""
    found: list[Misdelivered] = []
    try:
        for _ in range(UNCONNECTED_MAX):
            payload, (host, port, *more) = sock.recvfrom(SIZE_MAX)
            scope = more[1] if more else 0
            found.append(
                (Client(client.listener, addr.packed(host), port, client.local, scope or client.scope), payload)
            )
    except BlockingIOError:
        pass  # that was all
    return found
