"""Host sockets of TCP connections: options, outbound address and interface, where they connect to."""

from __future__ import annotations

import errno
import select
import socket
from dataclasses import replace
from struct import Struct
from typing import Any

import pytest

from passt import addr
from passt.linux.sockopt import SO_PEEK_OFF, TRAFFIC_CLASS
from passt.loop.reactor import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import TcpConn
from passt.wire.tcp import ACK, SYN
from tests.unit.support import GATEWAY4, GATEWAY6, GUEST4, GUEST6, IP4, IP6, T0, link, make_context, reactor
from tests.unit.tcp_support import ALL, FakeSocket, Talk, fake_sockets

__all__ = ["fake_sockets"]
PEER4, PEER6 = addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7")
OUT4, OUT6 = addr.packed("203.0.113.5"), addr.packed("2001:db8:5::5")


def connected(peer: bytes, *, features: Any = ALL, **config: Any) -> tuple[TcpConn, FakeSocket, Any]:
    """A connection to `peer`, its socket, and the events it is watched for."""
    ctx = make_context(**config)
    guest = GUEST4 if len(peer) == 4 else GUEST6
    conn = TcpConn(guest + peer + bytes.fromhex("9c40 0050"))
    ctx.flows.insert(conn)
    tcp_sock.choose_host(ctx, conn, T0)
    error = tcp_sock.connect(ctx, features, conn, T0)
    assert error == FakeSocket.connect_results[-1]
    return conn, FakeSocket.made[-1], reactor(ctx).events.get(conn.fd)


def test_options() -> None:
    _, sock, events = connected(PEER4)
    assert sock.options == {
        (socket.SOL_SOCKET, SO_PEEK_OFF): 0,
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        (socket.SOL_SOCKET, socket.SO_OOBINLINE): 1,
    }
    assert not sock.resets_on_close and sock.bound == ()
    assert events == EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET


def test_kernel_without_peek_offset() -> None:
    _, sock, _ = connected(PEER4, features=replace(ALL, peek_off=False))
    assert (socket.SOL_SOCKET, SO_PEEK_OFF) not in sock.options


def test_socket_type(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[tuple[int, int]] = []

    def new(family: int, kind: int) -> FakeSocket:
        kinds.append((family, kind))
        return FakeSocket(family, kind)

    monkeypatch.setattr(tcp_sock, "new_socket", new)
    connected(PEER4)
    connected(PEER6)
    flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    assert kinds == [(socket.AF_INET, flags), (socket.AF_INET6, flags)]


def test_real_sockets_take_all_options() -> None:
    """The kernel takes all options that the fakes take."""
    with socket.socket() as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        tcp_sock.reset_on_close(s)
        linger = s.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert Struct("=ii").unpack(linger) == (1, 0)


@pytest.mark.parametrize(
    ("peer", "where"),
    [
        (PEER4, ("198.51.100.7", 80)),
        (GATEWAY4, ("127.0.0.1", 80)),
        (PEER6, ("2001:db8:ffff::7", 80, 0, 0)),
        (GATEWAY6, ("::1", 80, 0, 0)),
        (addr.packed("fe80::77"), ("fe80::77", 80, 0, 7)),  # the scope is the template interface
    ],
)
def test_destination(peer: bytes, where: tuple[Any, ...]) -> None:
    _, sock, _ = connected(peer, scope_id=7)
    assert sock.peer == where


def test_outbound_address_and_interface() -> None:
    out4, out6 = replace(IP4, addr_out=OUT4, if_out="eth7"), replace(IP6, addr_out=OUT6, if_out="eth8")
    _, sock, _ = connected(PEER4, ip4=out4, ip6=out6)
    assert sock.bound == ("203.0.113.5", 0)
    assert sock.options[socket.SOL_SOCKET, socket.SO_BINDTODEVICE] == b"eth7\0"
    _, sock, _ = connected(PEER6, ip4=out4, ip6=out6)
    assert sock.bound == ("2001:db8:5::5", 0, 0, 0)
    assert sock.options[socket.SOL_SOCKET, socket.SO_BINDTODEVICE] == b"eth8\0"


def test_link_local_outbound_address_has_a_scope() -> None:
    _, sock, _ = connected(PEER6, ip6=replace(IP6, addr_out=addr.packed("fe80::5")), scope_id=7)
    assert sock.bound == ("fe80::5", 0, 0, 7)


def test_loopback_has_its_own_address_and_interface() -> None:
    _, sock, _ = connected(GATEWAY4, ip4=replace(IP4, addr_out=OUT4, if_out="eth7"))
    assert sock.bound == () and (socket.SOL_SOCKET, socket.SO_BINDTODEVICE) not in sock.options


@pytest.mark.parametrize("what", ["bind", "setsockopt"])
def test_what_cannot_be_applied_ends_the_attempt(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The address or the interface vanished after the start: nothing goes out by another one."""
    original = getattr(FakeSocket, what)

    def refuse(self: FakeSocket, *args: Any) -> None:
        if what == "bind" or args[:2] == (socket.SOL_SOCKET, socket.SO_BINDTODEVICE):
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        original(self, *args)

    monkeypatch.setattr(FakeSocket, what, refuse)
    talk = Talk(config={"ip4": replace(IP4, addr_out=OUT4, if_out="eth7")})
    talk.syn()
    (frame,) = link(talk.ctx).take()
    assert frame[23] == 1 and frame[34:36] == b"\3\1", "host unreachable"
    assert talk.sock.peer == () and talk.gone


# How connecting goes -------------------------------------------------------------------------------------------------


def test_in_progress_waits_for_epollout() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    _, _, events = connected(PEER4)
    assert events is not None and events & EPOLLOUT


def test_loopback_is_asked_twice() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS, 0]
    _, _, events = connected(GATEWAY4)
    assert events is not None and not events & EPOLLOUT


def test_a_far_peer_is_asked_once() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS, errno.EINPROGRESS]
    _, sock, _ = connected(PEER4)
    assert sock._connects == [errno.EINPROGRESS]


def test_loopback_that_takes_its_time() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS, errno.EALREADY]
    ctx = make_context()
    conn = TcpConn(GUEST4 + GATEWAY4 + bytes.fromhex("9c40 0050"))
    ctx.flows.insert(conn)
    tcp_sock.choose_host(ctx, conn, T0)
    assert tcp_sock.connect(ctx, ALL, conn, T0) == errno.EINPROGRESS
    assert reactor(ctx).events[conn.fd] & EPOLLOUT


def test_what_failed_is_not_watched() -> None:
    FakeSocket.connect_results = [errno.ECONNREFUSED]
    conn, sock, events = connected(PEER4)
    assert events is None
    assert conn.sock is sock and conn.fd == sock.fd  # for the caller to close


@pytest.mark.parametrize(
    ("peer", "features", "near"),
    [
        (PEER4, ALL, False),
        (GATEWAY4, ALL, True),
        (GUEST4, ALL, True),  # the host has the address, too
        (PEER4, replace(ALL, bytes_acked=False), True),  # TCP_INFO lacks it
        (PEER6, ALL, False),
        (GATEWAY6, ALL, True),
    ],
)
def test_near(peer: bytes, features: Any, near: bool) -> None:
    assert connected(peer, features=features)[0].near is near


# Traffic class -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v6", [False, True])
def test_the_class_of_a_connection(v6: bool) -> None:
    """SYN has it, segments have the last one, and nothing is kept of a connection that has ended."""
    talk = Talk(v6=v6)
    talk.ctx.classes[talk.key] = 0xB8
    talk.syn()
    assert talk.sock.options[TRAFFIC_CLASS[v6]] == 0xB8
    for tos in (0x48, 0):
        talk.ctx.classes[talk.key] = tos
        talk.tcp.set_class(talk.key)
        assert talk.sock.options[TRAFFIC_CLASS[v6]] == tos
    assert talk.ctx.classes == {}, "zero is what all others have"
    talk.ctx.classes[talk.key] = 0xB8
    talk.tcp.fault_key(talk.key)
    assert talk.ctx.classes == {}


def test_a_class_of_no_connection_is_forgotten() -> None:
    talk = Talk()
    talk.ctx.classes[talk.key] = 0xB8
    talk.tcp.set_class(talk.key)
    talk.tcp.forget_class(talk.key)
    assert talk.ctx.classes == {}


# Receive buffers over a long link --------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "wide"), [(0.0, False), (0.0019, False), (0.0021, True), (0.1, True)])
def test_a_long_link_has_a_wide_receive_buffer(seconds: float, wide: bool) -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.now += seconds
    talk.guest(ACK)
    assert talk.sock.options.get((socket.SOL_SOCKET, socket.SO_RCVLOWAT)) == (1 if wide else None)


def test_the_kernel_enlarges_the_buffer_and_reports_every_byte() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()) as sock, server.accept()[0] as peer:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        tcp_sock.widen(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > before
        with select.epoll() as epoll:
            epoll.register(sock, select.EPOLLIN | select.EPOLLET)
            epoll.poll(0)
            peer.send(b"x")
            assert epoll.poll(60)


class ResetAtOnce:
    """A socket whose server answers and resets before connect(2) returns."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.inner = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def connect_ex(self, sockaddr: Any) -> int:
        error = self.inner.connect_ex(sockaddr)
        server = self._listener.accept()[0]
        server.send(b"greeting")
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, Struct("=ii").pack(1, 0))
        server.close()
        return error


def test_what_a_server_sends_before_it_resets_at_once_is_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = ResetAtOnce(listener)
        with sock.inner:
            assert tcp_sock.connect_local(sock, listener.getsockname()) == errno.EINPROGRESS, "an event says the rest"
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
            assert sock.recv(100) == b"greeting"


def test_a_local_server_is_connected_at_once() -> None:
    """An event says that there is none."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            assert tcp_sock.connect_local(sock, address) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        assert tcp_sock.connect_local(sock, address) == errno.EINPROGRESS
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
