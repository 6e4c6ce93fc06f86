"""TCP through the stream protocol, segment by segment: what no kernel in a guest does when asked, but others do."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, fragment
from scapy.layers.l2 import Ether

from ..support import User, wait_for
from ..traffic.support import GATEWAY, Lan
from .client import ACK, PSH, Client
from .support import Passt, Standing


@pytest.fixture(scope="module")
def standing(lan: Lan, ordinary_user: User) -> Iterator[Standing]:
    """passt for all tests of this module."""
    made = Standing(lan, ordinary_user, "-t", "18081:80")
    yield made
    made.close()


@pytest.fixture
def client(server: Passt) -> Iterator[Client]:
    """A client that has configured itself."""
    with Client.at(str(server.path)) as made:
        made.arp(GATEWAY)
        yield made.configure()


@pytest.fixture
def listener(lan: Lan) -> Iterator[socket.socket]:
    """On the host's loopback."""
    with lan.host.listen("127.0.0.1") as made:
        yield made


@pytest.mark.parametrize("again", [b"", b"x"], ids=["no byte", "a byte"])
def test_window_probe_is_no_keepalive(client: Client, lan: Lan, listener: socket.socket, again: bytes) -> None:
    """A probe 0.2 s after data, as of a closed window: the host's idle socket has no keep-alive timer (ss -o)."""
    port = listener.getsockname()[1]
    connection = client.connect(GATEWAY, port)
    there, _ = listener.accept()
    with there:
        connection.send(b"x")
        assert there.recv(1) == b"x"
        connection.expect(lambda tcp: tcp.ack == connection.sent or None)
        connection.sent -= 1
        connection.send_segment(ACK, again)
        connection.sent += 1
        connection.expect(lambda tcp: tcp.ack == connection.sent or None)
        show = "ss", "-Htno", "dport", "=", f":{port}"
        shown = wait_for(lambda: lan.host.run(*show).stdout, "the host's socket is shown")
        assert "timer:" not in shown


def test_segments_in_fragments(client: Client, listener: socket.socket) -> None:
    """A kernel reassembles them (RFC 791, 3.2), and so do we; in any order, with whole segments between."""
    connection = client.connect(GATEWAY, listener.getsockname()[1])
    there, _ = listener.accept()
    with there:
        there.settimeout(5)
        words = [bytes((i,)) * 500 for i in range(6)]
        for i, word in enumerate(words):
            segment = connection.segment(ACK | PSH, word)
            connection.sent += len(word)
            if i % 2:
                client.send(segment)
                continue
            segment[IP].id = i + 1
            pieces = [Ether(src=client.mac, dst=client.router_mac) / p for p in fragment(segment[IP], 104)]
            assert len(pieces) > 3
            client.send(*(reversed(pieces) if i else pieces))
        data = b""
        while len(data) < 3000 and (more := there.recv(3000)):
            data += more
        assert data == b"".join(words)
        connection.expect(lambda tcp: tcp.ack == connection.sent or None)
