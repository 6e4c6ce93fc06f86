"""A client that connects again at once from the same port, when both sides have closed: as on the bare kernel.

There a client that closed first is in TIME-WAIT, and may connect again since timestamps tell old segments from new ones
(RFC 6191).
"""

from __future__ import annotations

import errno
import socket
import time

import pytest

from ..support import User, wait_for
from .support import GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6, Guest, Lan, Namespace

TIMES = 15
PORTS = {"host": 7081, "peer": 7081, "guest": 7082}  # of the server, by its place; automatic ports lead there, too
SPORT = 31999
# Where the client runs and connects to, where the server runs and binds
WAYS = {
    "bare": ("host", PEER, "peer", PEER),
    "bare loopback": ("host", "127.0.0.1", "host", "127.0.0.1"),
    "tap": ("guest", PEER, "peer", PEER),
    "tap, ipv6": ("guest", PEER6, "peer", PEER6),
    "tap to the host": ("guest", GATEWAY, "host", "127.0.0.1"),
    "tap to the host, ipv6": ("guest", GATEWAY6, "host", "::1"),
    "spliced": ("guest", "127.0.0.1", "host", "127.0.0.1"),
    "spliced, ipv6": ("guest", "::1", "host", "::1"),
    "in by the tap": ("peer", HOST, "guest", "0.0.0.0"),
    "in by the tap, ipv6": ("peer", HOST6, "guest", "::"),
    "in, spliced": ("host", "127.0.0.1", "guest", "0.0.0.0"),
    "in, spliced, ipv6": ("host", "::1", "guest", "::"),
}


def once(client_at: Namespace, address: str, port: int, listener: socket.socket, client_first: bool) -> None:
    """A connection with a byte each way; both ends are closed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with client_at.make_socket(family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("::" if ":" in address else "0.0.0.0", SPORT))
        client.connect((address, port))
        server, _ = listener.accept()
        with server:
            server.settimeout(5)
            client.settimeout(5)
            client.sendall(b"?")
            assert server.recv(1) == b"?"
            server.sendall(b"!")
            assert client.recv(1) == b"!"
            first, second = (client, server) if client_first else (server, client)
            first.shutdown(socket.SHUT_WR)
            assert second.recv(1) == b""
            second.close()
            assert first.recv(1) == b""


@pytest.fixture(scope="module")
def someone(ordinary_user: User) -> User:
    """Nothing here depends on the user."""
    return ordinary_user


@pytest.mark.parametrize("client_first", [True, False], ids=["client first", "server first"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_again_from_the_same_port(guest: Guest, lan: Lan, way: tuple[str, str, str, str], client_first: bool) -> None:
    client_at, address, server_at, bound = way
    places = {"guest": guest, "host": lan.host, "peer": lan.peer}
    port = PORTS[server_at]
    with places[server_at].make_socket(socket.AF_INET6 if ":" in bound else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bound, port))
        listener.listen()
        listener.settimeout(5)
        if client_at != server_at and server_at != "peer" and address not in (GATEWAY, GATEWAY6):
            listening = guest if client_at == "guest" else lan.host
            wait_for(lambda: str(port) in listening.run("ss", "-Hltn").stdout, "the port is forwarded")
        refused = 0
        for _ in range(TIMES):
            try:
                once(places[client_at], address, port, listener, client_first)
            except OSError as e:
                if e.errno != errno.EADDRNOTAVAIL:
                    raise
                refused += 1
            time.sleep(0.02)  # the last segment has its acknowledgement
        assert not refused
