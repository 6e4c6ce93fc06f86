"""Listeners, clients and servers of UDP on the loopback, which stands for both sides of a namespace."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from passt import addr
from passt.flow.context import Context
from passt.linux import nspool
from passt.linux.sockopt import IP_PKTINFO
from passt.loop.reactor import EPOLLIN
from passt.policy.rules import Listener, Rule
from passt.ports.udp_in import UdpIn
from passt.udp import Udp
from passt.udp_engine.io import PAUSE
from passt.wire.checksum import PROTO_UDP

from .support import T0, link, make_context, reactor, timers

QUERY = bytes.fromhex("1234 0100 0001 0000 0000 0000 0461736b73 00 0001 0001")  # DNS: the address of "asks."
PATIENCE = 5.0  # s
# Options by which a port might be shared
REUSE: tuple[tuple[int, ...], ...] = (
    (),
    (socket.SO_REUSEADDR,),
    (socket.SO_REUSEPORT,),
    (socket.SO_REUSEADDR, socket.SO_REUSEPORT),
)


def is_refused(client: socket.socket) -> bool:
    """Whether the host's kernel answers a datagram by Port Unreachable, at once."""
    before = client.gettimeout()
    client.send(b"again")
    client.settimeout(0.2)
    try:
        client.recv(1)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        pass
    finally:
        client.settimeout(before)
    return False


def second_bind(where: tuple[str, int], options: tuple[int, ...], uid: int = -1) -> None:
    """Bind a port that is in use here, perhaps as another user. Raises OSError."""
    with socket.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET, socket.SOCK_DGRAM) as s:
        os.fchown(s.fileno(), uid, -1)
        for option in options:
            s.setsockopt(socket.SOL_SOCKET, option, 1)
        s.bind(where)


class PlainSockets:
    """A namespace that is ours: its sockets are plain ones, and counted."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, family: int, kind: int) -> Any:
        self.taken += 1
        return nspool.open_socket(family, kind)


class Lab:
    """Datagrams that others begin. Sockets that it hands out are closed with it."""

    def __init__(self, stack: ExitStack, *, tap: bool = True, **config: Any) -> None:
        self.stack = stack
        self.ctx: Context = make_context(pool_size=1 << 20, **config)
        self.ns = PlainSockets()
        self.ctx.ns = self.ns  # type: ignore[assignment]
        self.link = link(self.ctx)
        self.udp = Udp(self.ctx) if tap else None
        self.udp_in = UdpIn(self.ctx, self.udp)
        self.listeners: dict[int, Listener] = {}
        self.now = T0

    def listen(
        self, host: str = "127.0.0.1", port: int = 0, *, to: int | None = None, outbound: bool = False, **rule: Any
    ) -> Listener:
        """A listener as those of a rule are; "::" is dual-stack."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        if ":" in host:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.setblocking(False)
        self.stack.enter_context(sock)
        sock.bind((host, port))
        port = sock.getsockname()[1]
        whole = Rule("-u", PROTO_UDP, outbound, port, port, port if to is None else to)
        listener = Listener(replace(whole, **rule), port, sock)
        self.listeners[sock.fileno()] = listener
        self.udp_in.begin(listener)
        return listener

    def stop(self, listener: Listener) -> None:
        """Stop listening, as `Listeners.remove` does."""
        del self.listeners[listener.fd]
        self.udp_in.end([listener])
        listener.sock.close()
        reactor(self.ctx).end_turn(self.now)

    def client(self, listener: Listener, to: str = "127.0.0.1", source: str = "", port: int = 0) -> socket.socket:
        """A socket connected to a listener's port at address `to`. Its own port can be had on the other side, too."""
        sock = self.socket(to, source, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.connect((to, listener.port))
        return sock

    def socket(self, like: str = "127.0.0.1", host: str = "", port: int = 0) -> socket.socket:
        """A bound socket of the family of the address `like`."""
        sock = socket.socket(socket.AF_INET6 if ":" in like else socket.AF_INET, socket.SOCK_DGRAM)
        self.stack.enter_context(sock)
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((host or like, port))
        return sock

    def turn(self) -> None:
        """Wait until something is to be handled, and handle it. Pauses of streams are over at once."""
        if not self._resume():
            self._handle(self._wait())

    def recvfrom(self, sock: socket.socket, size: int = 65536) -> tuple[bytes, Any]:
        """The next datagram at a client or server, as soon as enough was handled for it to come."""
        while True:
            ready = self._wait(sock.fileno()) if not self._resume() else []
            if any(fd == sock.fileno() for fd, _ in ready):
                return sock.recvfrom(size)
            self._handle(ready)

    def recv(self, sock: socket.socket, size: int = 65536) -> bytes:
        return self.recvfrom(sock, size)[0]

    def _wait(self, *more: int) -> list[tuple[int, int]]:
        p = select.poll()
        for fd in (*self.listeners, *more):
            p.register(fd, EPOLLIN)
        for fd, events in reactor(self.ctx).events.items():
            p.register(fd, events)
        ready = p.poll(PATIENCE * 1000)
        assert ready, "nothing to handle"
        return ready

    def _handle(self, ready: list[tuple[int, int]]) -> None:
        watched = reactor(self.ctx)
        for fd, events in ready:
            if fd in self.listeners:
                self.udp_in.sock_handler(self.listeners[fd], self.now)
            elif fd in watched.refs:
                watched.fire(fd, events, self.now)
        watched.end_turn(self.now)

    def _resume(self) -> bool:
        services = timers(self.ctx).services
        soon = [t for t, at in enumerate(services.deadlines) if at is not None and at <= self.now + PAUSE]
        for timer in soon:
            services.fire(timer, self.now)
        return bool(soon)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.turn()

    @property
    def flows(self) -> list[Any]:
        return [f for f in self.ctx.flows.by_index if f is not None]

    @property
    def flow(self) -> Any:
        """The only flow."""
        (flow,) = self.flows
        return flow


@contextmanager
def labs() -> Iterator[Callable[..., Lab]]:
    """Makes laboratories, and clears up."""
    made: list[Lab] = []
    with ExitStack() as stack:

        def start(**config: Any) -> Lab:
            made.append(Lab(stack, **config))
            return made[-1]

        yield start
        for lab in made:
            for flow in lab.flows:
                for _, sock in flow.sockets():
                    sock.close()
            reactor(lab.ctx).end_turn(lab.now)


def port_of(s: Any) -> int:
    port: int = s.getsockname()[1]
    return port


def host_of(s: Any) -> bytes:
    return addr.packed(s.getsockname()[0])


class Between(socket.socket):
    """A socket that something happens to between bind() and connect()."""

    happens: Callable[[tuple[Any, ...]], None]

    def connect(self, address: Any) -> None:
        type(self).happens(self.getsockname())
        super().connect(address)


class Unprivileged(socket.socket):
    """A socket of a user without the right to bind ports of listeners."""

    ports: frozenset[int] = frozenset()

    def bind(self, address: Any) -> None:
        if address[1] in Unprivileged.ports:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        super().bind(address)


@contextmanager
def unprivileged(*listeners: Listener) -> Iterator[None]:
    """While this holds, bind(2) to the ports of these fails."""
    with (
        mock.patch.object(Unprivileged, "ports", frozenset(listener.port for listener in listeners)),
        mock.patch.object(
            nspool, "open_socket", lambda family, kind: Unprivileged(family, kind | socket.SOCK_NONBLOCK)
        ),
    ):
        yield
