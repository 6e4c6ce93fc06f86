"""A spliced TCP connection, its two halves, and its statistics."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import addr
from ..flow.stats import Tally
from ..flow.table import GUEST, HOST, Endpoints, Flow, FlowInfo, TcpInfo, name_of
from ..linux import tcpinfo
from ..policy.rules import Listener
from .pipes import Pipe


class Half:
    """One direction: from `src` to `dst`."""

    __slots__ = (
        "bulk",
        "dst",
        "dst_fd",
        "eof",
        "eof_announced",
        "epollout",
        "fin",
        "held",
        "moved",
        "pending",
        "pipe",
        "src",
        "src_fd",
        "tally",
        "tuned",
        "urgent",
    )  # fmt: skip

    def __init__(self, src: Any, dst: Any, tally: Tally) -> None:
        self.src, self.src_fd = src, src.fileno()
        self.dst, self.dst_fd = dst, dst.fileno()
        self.tally = tally  # of all connections
        self.moved = 0  # bytes received
        self.pipe: Pipe | None = None
        self.held = 0  # bytes in the pipe
        self.pending = b""  # bytes received that `dst` did not take
        self.bulk = False
        self.urgent = False  # `src` has seen urgent data: a receive may stop at its mark
        self.eof_announced = False  # EPOLLRDHUP of `src` was seen: no further event reports its end
        self.eof = False  # the end of `src` was received
        self.fin = False  # ... and sent to `dst`
        self.tuned = False  # the buffer sizes were set
        self.epollout = False  # EPOLLOUT of `dst` is requested


class SpliceConn(Flow):
    """A connection. `sock` is the client's; `key` is empty, since no look-up needs one."""

    __slots__ = ("events_before", "halves", "inbound", "peer", "peer_port", "port", "server", "server_sock", "targets")
    kind = "spliced TCP connection"
    label: ClassVar[str] = "tcp_splice"

    def __init__(self, sock: Any, peer: bytes, peer_port: int, listener: Listener, targets: list[bytes]) -> None:
        super().__init__(b"")
        self.sock, self.fd = sock, sock.fileno()
        self.peer, self.peer_port = peer, peer_port
        self.server, self.port = targets[0] if targets else b"", listener.to
        self.inbound = not listener.rule.outbound
        self.targets = targets  # addresses not tried yet
        self.server_sock: Any = None  # connected to the server
        self.events_before = 0  # the client's, before the server is connected
        self.halves: tuple[Half, ...] = ()  # none before the server is connected

    def endpoints(self) -> Endpoints:
        """The server is the one tried last; before that, the first target."""
        client = addr.host_port(self.peer, self.peer_port)
        server = addr.host_port(self.server, self.port) if self.server else ""
        if self.inbound:
            own = name_of(self.server_sock.getsockname) if self.server_sock is not None else ""
            return Endpoints(HOST, server, own, client)
        return Endpoints(GUEST, client, name_of(self.sock.getsockname), server)

    def traffic(self) -> tuple[int, int]:
        if not self.halves:
            return 0, 0
        first, second = (half.moved - half.held - len(half.pending) for half in self.halves)
        return (first, second) if self.inbound else (second, first)

    def info(self, now: float) -> FlowInfo:
        socks = (self.sock, self.server_sock) if self.inbound else (self.server_sock, self.sock)
        host, guest = (tcpinfo.details(sock) if sock is not None else None for sock in socks)
        tcp_info = TcpInfo(
            rtt=host.rtt if host else None,
            snd_wnd=None,
            rcv_wnd=None,
            resent_to_guest=guest.retransmits if guest else None,
            resent_to_host=host.retransmits if host else None,
            queue_to_guest=_on_the_way(host, guest),
            queue_to_host=_on_the_way(guest, host),
        )
        age = now - self.opened
        idle = min(host.idle, guest.idle, age) if host and guest else None
        names = ["ESTABLISHED"] if self.halves else ["CONNECTING"]
        for half, name in zip(self.halves, ("CLIENT_FIN", "SERVER_FIN"), strict=False):
            names += [name] if half.fin else []
        return FlowInfo(
            self.index, "tcp", "splice", self.endpoints(), "|".join(names), *self.traffic(), age, idle, tcp_info
        )


def _on_the_way(src: tcpinfo.Details | None, dst: tcpinfo.Details | None) -> int | None:
    """Bytes that one socket received and the other's peer has not acknowledged, give or take SYN and FIN."""
    if src is None or dst is None or src.received is None or dst.acked is None:
        return None
    return max(src.received - dst.acked, 0)
