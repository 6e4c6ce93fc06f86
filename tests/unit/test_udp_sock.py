"""Sockets of UDP flows, on the loopback."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from passt import addr
from passt.core.config import Ip4
from passt.core.fwd import Forwarding
from passt.udp_sock import open_socket

from .support import CONFIG, GUEST4, IP4, make_context

PEER4 = addr.packed("198.51.100.9")


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        s.settimeout(5)
        yield s


def port_of(s: socket.socket) -> int:
    port: int = s.getsockname()[1]
    return port


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("", 0))
        return port_of(s)


FWD = Forwarding(CONFIG)


def test_the_socket_has_the_guests_port_and_its_peer(server: socket.socket) -> None:
    port = free_port()
    with open_socket(FWD, addr.LOOPBACK4, port, port_of(server)) as s:
        assert s.getsockname() == ("127.0.0.1", port)
        assert s.getpeername() == server.getsockname()
        assert not s.getblocking()
        assert s.getsockopt(socket.IPPROTO_IP, 11) == 1


def test_ipv6_sockets_leave_ipv4_alone() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        with open_socket(FWD, addr.LOOPBACK6, 0, port_of(server)) as s:
            assert s.getpeername()[:2] == ("::1", port_of(server))
            assert s.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
            assert s.getsockopt(socket.IPPROTO_IPV6, 25) == 1


def test_one_guest_port_to_several_peers(server: socket.socket) -> None:
    port = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        with (
            open_socket(FWD, addr.LOOPBACK4, port, port_of(server)) as a,
            open_socket(FWD, addr.LOOPBACK4, port, port_of(other)) as b,
        ):
            assert port_of(a) == port_of(b) == port
            other.sendto(b"to b", ("127.0.0.1", port))
            server.sendto(b"to a", ("127.0.0.1", port))
            assert (a.recv(10), b.recv(10)) == (b"to a", b"to b")


def test_a_port_that_others_have_is_replaced(server: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        with open_socket(FWD, addr.LOOPBACK4, port_of(holder), port_of(server)) as s:
            assert port_of(s) not in (0, port_of(holder))
            s.send(b"x")
            assert server.recvfrom(10) == (b"x", s.getsockname())


class Bound(socket.socket):
    """A socket on a system that keeps low ports for itself."""

    def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        if 0 < address[1] < 1024:
            raise PermissionError(errno.EACCES, "Permission denied")
        super().bind(address)


def test_a_port_that_is_forbidden_is_replaced(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Bound)
    with open_socket(FWD, addr.LOOPBACK4, 500, port_of(server)) as s:
        assert port_of(s) >= 1024


def test_a_socket_never_talks_to_itself() -> None:
    port = free_port()
    with open_socket(FWD, addr.LOOPBACK4, port, port) as s:
        assert s.getpeername() == ("127.0.0.1", port)
        assert port_of(s) != port


def test_broadcast_is_allowed_when_it_turns_out_to_be_one(server: socket.socket) -> None:
    with open_socket(FWD, addr.packed("127.255.255.255"), free_port(), port_of(server)) as s:
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 1
    with open_socket(FWD, addr.LOOPBACK4, free_port(), port_of(server)) as s:
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 0


RealSocket = socket.socket


class Stranger(socket.socket):
    """A socket that gets a datagram from somebody between bind() and connect()."""

    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        with RealSocket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"stranger", ("127.0.0.1", self.getsockname()[1]))
        super().connect(address)


def test_what_strangers_sent_is_thrown_away(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Stranger)
    with open_socket(FWD, addr.LOOPBACK4, free_port(), port_of(server)) as s, pytest.raises(BlockingIOError):
        s.recv(10)


def test_no_socket_is_left_over_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    class Refused(socket.socket):
        def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            made.append(self)
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(OSError, match="unreachable"):
        open_socket(FWD, addr.LOOPBACK4, 0, 9)
    assert [s.fileno() for s in made] == [-1]


class Recorder(socket.socket):
    """Records what it is bound to, and is connected to nothing."""

    bound: tuple[tuple[str, int], str] = (("", 0), "")

    def setsockopt(self, *args: object) -> None:
        level, option, value = args
        if (level, option) == (socket.SOL_SOCKET, socket.SO_BINDTODEVICE):
            assert isinstance(value, bytes)
            Recorder.bound = Recorder.bound[0], value.decode()

    def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        Recorder.bound = address, Recorder.bound[1]

    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("host", "bound"),
    [(PEER4, (("203.0.113.7", 5000), "eth7")), (addr.LOOPBACK4, (("0.0.0.0", 5000), ""))],
)
def test_outbound_address_and_interface(
    host: bytes, bound: tuple[tuple[str, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", Recorder)
    monkeypatch.setattr(Recorder, "bound", (("", 0), ""))
    ip4 = Ip4(
        addr=GUEST4,
        prefix_len=24,
        gateway=IP4.gateway,
        our_addr=IP4.our_addr,
        if_out="eth7",
        addr_out=addr.packed("203.0.113.7"),
    )
    open_socket(make_context(ip4=ip4).fwd, host, 5000, 9).close()
    assert Recorder.bound == bound
