"""TCP through pasta: data both ways, the ends of a connection, refusal and reset, slow readers, a link that loses."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from ..support import User, wait_for
from .support import GATEWAY, GATEWAY6, PEER, PEER6, Guest, Lan, Namespace, in_thread, read_all, refused

# The server's namespace, the address it binds, the address that the guest connects to.
TARGETS = {
    "host4": ("host", "127.0.0.1", GATEWAY),
    "host6": ("host", "::1", GATEWAY6),
    "peer4": ("peer", PEER, PEER),
    "peer6": ("peer", PEER6, PEER6),
}
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, lan: Lan) -> tuple[Namespace, str, str]:
    """Where a server runs, and how the guest gets there."""
    where, bind, address = TARGETS[request.param]
    return (lan.host if where == "host" else lan.peer), bind, address


def connect(guest: Guest, where: Namespace, bind: str, address: str) -> Pair:
    """The guest's end and the server's end of a new connection."""
    with where.listen(bind) as listener:
        client = guest.connect(address, listener.getsockname()[1])
        server, _ = listener.accept()
        server.settimeout(client.gettimeout())
    return client, server


@pytest.fixture
def pair(guest: Guest, lan: Lan) -> Iterator[Pair]:
    """A connection from the guest to the host's loopback."""
    client, server = connect(guest, lan.host, "127.0.0.1", GATEWAY)
    with client, server:
        yield client, server


def data(size: int) -> bytes:
    """Bytes in which any swap, gap or repetition shows."""
    return random.Random(size).randbytes(size)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_and_end(sock: socket.socket, content: bytes) -> None:
    sock.sendall(content)
    sock.shutdown(socket.SHUT_WR)


def test_both_directions_at_once(guest: Guest, target: tuple[Namespace, str, str]) -> None:
    client, server = connect(guest, *target)
    up, down = data(5_000_001), data(7_000_003)
    with client, server, in_thread(send_and_end, client, up), in_thread(send_and_end, server, down):
        with in_thread(read_all, server) as received:
            assert read_all(client) == down
        assert received() == up


def test_peer_address_is_the_one_connected_to(guest: Guest, target: tuple[Namespace, str, str]) -> None:
    client, server = connect(guest, *target)
    with client, server:
        assert client.getpeername()[0] == target[2]
        client.sendall(b"x")
        assert server.recv(1) == b"x"


def test_single_bytes_arrive_without_waiting_for_more(pair: Pair) -> None:
    client, server = pair
    for sock in pair:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(200):
        client.sendall(bytes([i]))
        assert server.recv(2) == bytes([i])
        server.sendall(bytes([255 - i]))
        assert client.recv(2) == bytes([255 - i])


@pytest.mark.parametrize("first", ["guest", "host"])
def test_half_close_leaves_the_other_direction_open(pair: Pair, first: str) -> None:
    closer, other = pair if first == "guest" else pair[::-1]
    early, late = data(300_000), data(3_000_000)
    with in_thread(send_and_end, closer, early):
        assert read_all(other) == early
    with in_thread(send_and_end, other, late):
        assert read_all(closer) == late


def test_connection_refused(guest: Guest, target: tuple[Namespace, str, str]) -> None:
    where, bind, address = target
    with where.listen(bind) as listener:
        port = listener.getsockname()[1]
    assert refused(lambda: guest.connect(address, port))


@pytest.mark.parametrize("first", ["guest", "host"])
def test_reset_passes(pair: Pair, first: str) -> None:
    closer, other = pair if first == "guest" else pair[::-1]
    closer.sendall(b"x")
    assert other.recv(1) == b"x"
    reset(closer)
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_reset_while_data_is_under_way(pair: Pair) -> None:
    """The guest stops reading, the host has much to say, the guest resets: the host learns it while it sends."""
    client, server = pair
    server.settimeout(0.5)
    with pytest.raises(TimeoutError):
        server.sendall(bytes(1 << 30))
    reset(client)
    server.settimeout(10)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        server.sendall(bytes(1 << 30))


def probed(sock: socket.socket) -> int:
    """How often the kernel has probed the zero window of the socket's peer (tcpi_backoff)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[4]


@pytest.mark.parametrize("slow", ["guest", "host"])
def test_slow_reader_loses_nothing(pair: Pair, slow: str) -> None:
    """The reader stops twice, until the writer has met a zero window and probed it."""
    reader, writer = pair if slow == "guest" else pair[::-1]
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # which does not grow then
    content = data(32_000_000)  # more than all buffers on the way take
    with in_thread(send_and_end, writer, content):
        received = bytearray()
        for _ in range(2):
            wait_for(lambda: probed(writer) >= 2, "probes of a zero window")
            while len(chunk := reader.recv(1 << 16)) and len(received) < 2_000_000:
                received += chunk
            received += chunk
        received += read_all(reader)
    assert bytes(received) == content


def echo(sock: socket.socket) -> None:
    sock.settimeout(60)
    with sock:
        while chunk := sock.recv(1 << 16):
            sock.sendall(chunk)


def test_many_connections_at_once(guest: Guest, lan: Lan) -> None:
    """A hundred connections, each with its own data, there and back at the same time."""
    contents = [data(100_000 + i) for i in range(100)]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(lan.host.listen("127.0.0.1"))
        clients = []
        for content in contents:
            client = guest.connect(GATEWAY, listener.getsockname()[1])
            clients.append(stack.enter_context(client))
            stack.enter_context(in_thread(echo, listener.accept()[0]))
            stack.enter_context(in_thread(send_and_end, client, content))
        for client, content in zip(clients, contents, strict=True):
            assert read_all(client) == content


def test_more_connections_than_timers(lan: Lan, root: User) -> None:
    """Of 400 descriptors, timers may have 50; the other connections share one, and have a descriptor each."""
    with (
        lan.pasta(root, "-q", "--config-net", descriptors=400) as guest,
        contextlib.ExitStack() as stack,
        lan.host.listen("127.0.0.1") as listener,
    ):
        before = len(os.listdir(f"/proc/{guest.daemon}/fd"))
        pairs = []
        for _ in range(200):
            client = stack.enter_context(guest.connect(GATEWAY, listener.getsockname()[1]))
            pairs.append((client, stack.enter_context(listener.accept()[0])))
        assert len(os.listdir(f"/proc/{guest.daemon}/fd")) < before + 200 + 50 + 32  # of which some were opened later
        for sender, receiver in (*pairs, *(pair[::-1] for pair in pairs)):
            sender.sendall(b"still here")
            assert receiver.recv(100) == b"still here"


def test_connections_in_a_row(guest: Guest, lan: Lan) -> None:
    """Five hundred short connections, alternately ended by the guest and by the host."""
    with lan.host.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        for i in range(500):
            client = guest.connect(GATEWAY, port)
            server, _ = listener.accept()
            first, second = (client, server) if i % 2 else (server, client)
            first.sendall(b"request")
            first.shutdown(socket.SHUT_WR)
            assert read_all(second) == b"request"
            second.sendall(b"answer")
            second.close()
            assert read_all(first) == b"answer"
            first.close()


LOSS = """
table inet loss {
    chain in { type filter hook input priority 0; iifname != lo meta l4proto tcp numgen random mod 50 == 0 drop; }
    chain out { type filter hook output priority 0; oifname != lo meta l4proto tcp numgen random mod 50 == 0 drop; }
}
"""


@pytest.mark.parametrize("mtu", [1500, 65520])
def test_link_that_loses_two_percent(lan: Lan, anyone: User, mtu: int) -> None:
    content = data(8_000_000)
    digest = hashlib.sha256(content).digest()
    with lan.pasta(anyone, "-q", "--config-net", "-m", str(mtu)) as guest:
        guest.run("nft", "-f", "-", input=LOSS)
        client, server = connect(guest, lan.host, "127.0.0.1", GATEWAY)
        with client, server:
            for writer, reader in ((client, server), (server, client)):
                with in_thread(send_and_end, writer, content):
                    assert hashlib.sha256(read_all(reader)).digest() == digest


@pytest.mark.parametrize("mtu", [1280, 1500, 9000, 65520])
def test_streams_at_mtu(lan: Lan, ordinary_user: User, mtu: int) -> None:
    content = data(10_000_000)
    with lan.pasta(ordinary_user, "-q", "--config-net", "-m", str(mtu)) as guest:
        (link,) = [link for link in guest.show("link") if link["ifname"] != "lo"]
        assert link["mtu"] == mtu
        for bind, address in (("127.0.0.1", GATEWAY), ("::1", GATEWAY6)):
            client, server = connect(guest, lan.host, bind, address)
            with client, server, in_thread(send_and_end, client, content), in_thread(send_and_end, server, content):
                with in_thread(read_all, server) as received:
                    assert read_all(client) == content
                assert received() == content
