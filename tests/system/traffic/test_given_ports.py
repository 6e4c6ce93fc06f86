"""Ports and addresses that options give: what they lead to."""

from __future__ import annotations

import contextlib
import socket

import pytest

from ..support import User, wait_for
from .support import HOST, HOST6, PEER, PEER6, Lan, Namespace, refused

STUB = "127.0.0.53"
ANY = {HOST: "0.0.0.0", HOST6: "::"}


def free_port(where: Namespace, kind: socket.SocketKind) -> int:
    with where.listen("::", kind) as unused:
        port: int = unused.getsockname()[1]
        return port


def test_a_resolver_at_a_loopback_address_of_its_own(lan: Lan, ordinary_user: User) -> None:
    """systemd-resolved is found where /etc/resolv.conf says, also if its port is given."""
    tcp, udp = lan.host.listen(STUB), lan.host.listen(STUB, socket.SOCK_DGRAM)
    tcp_port, udp_port = tcp.getsockname()[1], udp.getsockname()[1]
    with lan.pasta(ordinary_user, "-q", "--config-net", "-T", str(tcp_port), "-U", str(udp_port)) as guest:
        asked = guest.connect(STUB, tcp_port)
        asked.send(b"stream")
        with tcp.accept()[0] as accepted:
            assert accepted.recv(16) == b"stream"
        client = guest.connect(STUB, udp_port, socket.SOCK_DGRAM)
        client.send(b"datagram")
        question, peer = udp.recvfrom(16)
        udp.sendto(question[::-1], peer)
        assert client.recv(16) == b"margatad"


@pytest.mark.parametrize("address", [HOST, HOST6, "127.0.0.1", "::1"])
def test_udp_follows_a_given_tcp_port(lan: Lan, ordinary_user: User, address: str) -> None:
    """As iperf3 -u needs it: its server listens on TCP, and has bound UDP when the client sends at once."""
    port = free_port(lan.host, socket.SOCK_STREAM)
    with lan.pasta(ordinary_user, "-q", "--config-net", "-t", str(port)) as guest:
        any_address = "::" if ":" in address else "0.0.0.0"
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        control = guest.make_socket(family)
        control.bind((any_address, port))
        control.listen()
        inode = f":{port} "
        wait_for(lambda: inode in lan.host.run("ss", "-Huln").stdout, "the UDP port on the host")
        server = guest.make_socket(family, socket.SOCK_DGRAM)
        server.bind((any_address, port))
        where = lan.peer if address in ANY else lan.host
        client = where.connect(address, port, socket.SOCK_DGRAM)
        client.send(b"first")
        assert server.recv(16) == b"first"


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_an_address_that_is_given_stays(lan: Lan, ordinary_user: User, address: str) -> None:
    """Although the guest sends from another one, which it has beside it."""
    port = free_port(lan.host, socket.SOCK_STREAM)
    options = "-a", HOST, "-n", "24", "-a", HOST6, "-t", f"{port}", "-u", "none"
    with lan.pasta(ordinary_user, "-q", "--config-net", *options) as guest:
        other, length = ("2001:db8:1::99", 64) if ":" in address else ("198.51.100.99", 24)
        guest.run("ip", "address", "add", f"{other}/{length}", "dev", "eth0", *(["nodad"] if ":" in address else []))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = guest.make_socket(family)
        server.bind((address, port))
        server.listen()
        stranger = guest.make_socket(family, socket.SOCK_DGRAM)
        stranger.bind((other, 0))
        answering = lan.peer.listen("::" if ":" in address else "0.0.0.0", socket.SOCK_DGRAM)
        peer = PEER6 if ":" in address else PEER
        stranger.sendto(b"x", (peer, answering.getsockname()[1]))
        assert answering.recv(16) == b"x"
        client = lan.peer.make_socket(family)
        assert not refused(lambda: client.connect((address, port)))
        with server.accept()[0] as accepted:
            assert accepted.getsockname()[0] == address


def refused_in_time(client: socket.socket) -> bool:
    """Whether a client hears of a closed port by one of its datagrams, sent every tenth of a second."""
    client.settimeout(0.1)
    for _ in range(30):
        try:
            client.send(b"anybody?")
            client.recv(16)
        except TimeoutError:
            continue
        except ConnectionRefusedError:
            return True
    return False


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("outbound", [True, False])
def test_a_client_of_a_loopback_hears_of_a_closed_port(
    lan: Lan, ordinary_user: User, address: str, outbound: bool
) -> None:
    """And of the server that starts there later."""
    with lan.host.listen(address, socket.SOCK_DGRAM) as unused:
        port = unused.getsockname()[1]
    bound = f"[{address}]/{port}" if ":" in address else f"{address}/{port}"
    option = ("-U", str(port)) if outbound else ("-u", bound)
    with lan.pasta(ordinary_user, "-q", "--config-net", "--host-lo-to-ns-lo", *option) as guest:
        here, there = (guest, lan.host) if outbound else (lan.host, guest)
        client = here.connect(address, port, socket.SOCK_DGRAM)
        assert refused_in_time(client)
        server = there.make_socket(client.family, socket.SOCK_DGRAM)
        server.bind((address, port))

        def served() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                client.send(b"question")
            server.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                return server.recv(16) == b"question"
            return False

        wait_for(served, "the server gets a datagram")
