"""UDP ports of pasta are exclusive: other users of the host get none of the guest's traffic.

The owner of a socket is that of its file: root creates a socket and changes its owner, which the kernel checks.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from ..system.support import User
from ..system.traffic.conftest import lan, open_dir, someone
from ..system.traffic.support import HOST, PEER, Guest, Lan, Namespace
from ..unit.udp_support import REUSE

__all__ = ["lan", "open_dir", "someone"]

FORWARDED, AT_ADDRESS, OUTWARD, INSIDE = 18080, 18081, 18082, 80
STRANGER = 54321  # a user's number

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


@pytest.fixture(scope="module")
def standing(lan: Lan, someone: User) -> Iterator[Guest]:
    inbound = "-u", f"{FORWARDED}:{INSIDE}", "-u", f"{HOST}/{AT_ADDRESS}:{INSIDE + 1}"
    with lan.pasta(someone, "-q", "--config-net", *inbound, "-U", str(OUTWARD), "-t", "none", "-T", "none") as guest:
        yield guest


@pytest.fixture
def guest(standing: Guest, lan: Lan) -> Iterator[Guest]:
    yield from lan.lend(standing)


def shared(host: Namespace, port: int, address: str = HOST, *, tries: int = 1) -> list[str]:
    """How users of the host, root among them, got hold of a port that is in use at an address."""
    found = []
    ways = itertools.product((0, STRANGER), REUSE, (address, "0.0.0.0", "::"))
    for uid, options, where in ways:
        for _ in range(tries):
            with host.make_socket(socket.AF_INET6 if ":" in where else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                os.fchown(sock.fileno(), uid, -1)
                for option in options:
                    sock.setsockopt(socket.SOL_SOCKET, option, 1)
                try:
                    sock.bind((where, port))
                except OSError as e:
                    if e.errno == errno.EADDRINUSE:
                        continue
                    raise
                found.append(f"{uid} at {where} with {options}")
    return found


def ask(client: socket.socket, server: socket.socket, where: tuple[str, int]) -> tuple[str, int]:
    """A question and its answer; who the server has seen."""
    client.sendto(b"question", where)
    data, seen = server.recvfrom(100)
    assert data == b"question"
    server.sendto(b"answer", seen)
    assert client.recv(100) == b"answer"
    return seen[:2]


def connected(host: Namespace, port: int) -> set[str]:
    """Peers of sockets that have a port of the host and are connected."""
    lines = (line.split() for line in host.run("ss", "-Huan", "state", "established").stdout.splitlines())
    return {peer for _, _, local, peer, *_ in lines if local.endswith(f":{port}")}


def server_at(place: Namespace, port: int) -> socket.socket:
    sock = place.make_socket(kind=socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", port))
    return sock


def test_the_port_of_a_flow_that_the_guest_begins(lan: Lan, guest: Guest) -> None:
    """To any number of peers, and no user of the host is among those who have it."""
    with guest.make_socket(kind=socket.SOCK_DGRAM) as client:
        client.bind(("0.0.0.0", 41000))
        for _ in range(3):
            with lan.peer.listen(PEER, socket.SOCK_DGRAM) as server:
                assert ask(client, server, server.getsockname()) == (HOST, 41000)
                assert shared(lan.host, 41000) == []
                assert ask(client, server, server.getsockname()) == (HOST, 41000)


@pytest.mark.parametrize("port", [FORWARDED, AT_ADDRESS])
def test_a_forwarded_port(lan: Lan, guest: Guest, port: int) -> None:
    """Each client has a socket of its own, which no other user can share."""
    server = server_at(guest, INSIDE + (port == AT_ADDRESS))
    expected = set()
    for place in (lan.peer, lan.host):
        for _ in range(3):
            client = place.make_socket(kind=socket.SOCK_DGRAM)
            client.connect((HOST, port))
            ask(client, server, (HOST, port))
            ask(client, server, (HOST, port))
            expected.add(":".join(map(str, client.getsockname())))
            assert shared(lan.host, port) == []
    assert expected <= connected(lan.host, port)


@pytest.mark.parametrize("port", [FORWARDED, AT_ADDRESS])
def test_the_guest_writes_from_a_forwarded_port(lan: Lan, guest: Guest, port: int) -> None:
    client = server_at(guest, INSIDE + (port == AT_ADDRESS))
    for _ in range(2):
        with lan.peer.listen(PEER, socket.SOCK_DGRAM) as server:
            assert ask(client, server, server.getsockname()) == (HOST, port)
            assert shared(lan.host, port) == []


def test_a_port_of_the_hosts_loopback(lan: Lan, guest: Guest) -> None:
    """A socket that a client in the namespace is spliced to."""
    server = server_at(lan.host, OUTWARD)
    client = guest.make_socket(kind=socket.SOCK_DGRAM)
    client.bind(("127.0.0.1", 41001))
    assert ask(client, server, ("127.0.0.1", OUTWARD)) == ("127.0.0.1", 41001)
    assert shared(lan.host, 41001, "127.0.0.1") == []


def test_no_other_user_gets_the_port_while_clients_connect(lan: Lan, guest: Guest) -> None:
    """New client ports all the time: each could make the listener share its port."""
    server_at(guest, INSIDE)
    done = threading.Event()

    def come() -> None:
        while not done.is_set():
            with lan.peer.make_socket(kind=socket.SOCK_DGRAM) as sock:
                sock.sendto(b"hello", (HOST, FORWARDED))

    thread = threading.Thread(target=come)
    thread.start()
    try:
        assert shared(lan.host, FORWARDED, tries=100) == []
    finally:
        done.set()
        thread.join()
