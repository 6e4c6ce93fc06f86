"""UDP through pasta: sizes from nothing to the largest, order, addresses, errors."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from ..support import User
from .support import GATEWAY, GATEWAY6, PEER, PEER6, Guest, Lan, Namespace

SIZES = (0, 1, 2, 511, 1280, 1472, 1473, 4000, 8972, 16384, 65506, 65507)
TARGETS = {
    "host4": ("host", "127.0.0.1", GATEWAY),
    "host6": ("host", "::1", GATEWAY6),
    "peer4": ("peer", PEER, PEER),
    "peer6": ("peer", PEER6, PEER6),
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, lan: Lan) -> tuple[Namespace, str, str]:
    """Where a server runs, and how the guest gets there."""
    where, bind, address = TARGETS[request.param]
    return (lan.host if where == "host" else lan.peer), bind, address


@pytest.fixture(params=[1500, 65520])
def mtu_guest(request: pytest.FixtureRequest, lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest with a small and with the largest MTU."""
    with lan.pasta(ordinary_user, "-q", "--config-net", "-m", str(request.param)) as guest:
        yield guest


def pair(guest: Guest, target: tuple[Namespace, str, str]) -> tuple[socket.socket, socket.socket]:
    """The guest's connected socket and the server's bound one, both with room for a burst."""
    where, bind, address = target
    server = where.listen(bind, socket.SOCK_DGRAM)
    client = guest.connect(address, server.getsockname()[1], socket.SOCK_DGRAM)
    for sock in (client, server):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return client, server


def test_every_size_there_and_back(mtu_guest: Guest, target: tuple[Namespace, str, str]) -> None:
    client, server = pair(mtu_guest, target)
    for size in SIZES:
        content = random.Random(size).randbytes(size)
        assert client.send(content) == size
        received, peer = server.recvfrom(1 << 17)
        assert received == content
        server.sendto(received[::-1], peer)
        assert client.recv(1 << 17) == content[::-1]


@pytest.mark.parametrize("size", [100, 1400])
def test_bursts_keep_order_and_borders(guest: Guest, target: tuple[Namespace, str, str], size: int) -> None:
    """Runs of equal datagrams with shorter and empty ones between, as segmentation offload could mix them up."""
    client, server = pair(guest, target)
    lengths = [size] * 20 + [size - 1] + [size] * 3 + [0] + [size] * 7 + [size + 1, 1, 1, 1, 0, 0, size]
    burst = [i.to_bytes(2, "big")[:length] + bytes(max(0, length - 2)) for i, length in enumerate(lengths)]
    client.send(b"hello")
    _, peer = server.recvfrom(16)
    for datagram in burst:
        client.send(datagram)
    assert [server.recv(1 << 16) for _ in burst] == burst
    for datagram in burst:
        server.sendto(datagram, peer)
    assert [client.recv(1 << 16) for _ in burst] == burst


def test_answer_comes_from_the_address_asked(guest: Guest, target: tuple[Namespace, str, str]) -> None:
    where, bind, address = target
    server = where.listen(bind, socket.SOCK_DGRAM)
    client = guest.make_socket(server.family, socket.SOCK_DGRAM)
    client.sendto(b"question", (address, server.getsockname()[1]))
    question, peer = server.recvfrom(64)
    server.sendto(b"answer", peer)
    answer, source = client.recvfrom(64)
    assert (question, answer) == (b"question", b"answer")
    assert source[:2] == (address, server.getsockname()[1])


def test_one_guest_socket_to_many_servers(guest: Guest, lan: Lan) -> None:
    client = guest.make_socket(socket.AF_INET, socket.SOCK_DGRAM)
    servers = {}
    for where, bind, address in (("host", "127.0.0.1", GATEWAY), ("peer", PEER, PEER)):
        for _ in range(8):
            server = (lan.host if where == "host" else lan.peer).listen(bind, socket.SOCK_DGRAM)
            servers[address, server.getsockname()[1]] = server
    for name in servers:
        client.sendto(repr(name).encode(), name)
    for name, server in servers.items():
        question, peer = server.recvfrom(256)
        assert question == repr(name).encode()
        server.sendto(question, peer)
    answers = dict(client.recvfrom(256)[::-1] for _ in servers)
    assert answers == {name: repr(name).encode() for name in servers}


def test_closed_port_is_refused(guest: Guest, target: tuple[Namespace, str, str]) -> None:
    where, bind, address = target
    with where.listen(bind, socket.SOCK_DGRAM) as server:
        port = server.getsockname()[1]
    client = guest.connect(address, port, socket.SOCK_DGRAM)
    client.settimeout(1.5)  # kernels send one such error per second to each host (icmp_ratelimit): ask again
    for _ in range(4):
        try:
            client.send(b"anybody?")
            answer = client.recv(16)
        except ConnectionRefusedError:
            return
        except TimeoutError:
            continue
        pytest.fail(f"a closed port answered {answer!r}")
    pytest.fail("a closed port was not refused")


def test_source_port_that_the_user_may_not_bind(guest: Guest, lan: Lan) -> None:
    """A guest's root may use port 500; on the host another one stands for it."""
    server = lan.host.listen("127.0.0.1", socket.SOCK_DGRAM)
    client = guest.make_socket(socket.AF_INET, socket.SOCK_DGRAM)
    guest.write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
    client.bind(("0.0.0.0", 500))
    client.sendto(b"isakmp", (GATEWAY, server.getsockname()[1]))
    question, peer = server.recvfrom(64)
    assert question == b"isakmp"
    server.sendto(b"answer", peer)
    assert client.recv(64) == b"answer"
