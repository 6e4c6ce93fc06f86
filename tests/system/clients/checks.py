"""Properties that clients rely on, once pasta is ready: each is a function of the site, the daemon and the network.

All of it must hold at once when the first process has ended. Only where a client itself has to wait, for a process
in the foreground, does a test.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ..support import wait_for
from ..traffic.support import GATEWAY, HOST, HOST6, PEER, PEER6, Lan, Namespace
from .support import Daemon, Site

Check = Callable[[Site, Daemon, Lan], None]
NAME, NAME_ADDRESS = "name.test", "192.0.2.77"  # what the name server knows
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listen(where: Namespace, address: str, port: int = 0, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A server at `address`; port 0 is any."""
    made = where.make_socket(_family(address), kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    if kind == socket.SOCK_STREAM:
        made.listen(8)
    return made


def exchange(source: Namespace, address: str, port: int, server: socket.socket, local: str = "") -> str:
    """A connection from `source` to `address` is one to `server`, both ways; whose it is there."""
    client = source.make_socket(_family(address))
    if local:
        client.bind((local, 0))
    client.connect((address, port))
    there, (who, *_) = server.accept()
    with client, there:
        client.sendall(b"to the server")
        assert there.recv(64) == b"to the server"
        there.sendall(b"to the client")
        assert client.recv(64) == b"to the client"
    return str(who)


def exchange_datagrams(source: Namespace, address: str, port: int, server: socket.socket) -> None:
    """The same with a datagram each way."""
    client = source.make_socket(_family(address), socket.SOCK_DGRAM)
    client.connect((address, port))
    client.send(b"to the server")
    data, who = server.recvfrom(64)
    assert data == b"to the server"
    server.sendto(b"to the client", who)
    assert client.recv(64) == b"to the client"


def listeners(where: Namespace) -> set[tuple[str, str]]:
    """(protocol, "address:port") of all listening TCP and all bound, unconnected UDP sockets."""
    found = set()
    for line in where.run("ss", "-Hltun").stdout.splitlines():
        protocol, _, _, _, local, *_ = line.split()
        found.add((protocol, local))
    return found


# Output, and the interface ------------------------------------------------------------------------------------------


def silent(site: Site, daemon: Daemon, lan: Lan) -> None:
    """Nothing was said (--quiet): podman logs whatever comes."""
    assert daemon.said() == ""


def has(*addresses: str) -> Check:
    """The interface has exactly these addresses."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        assert sorted(site.addresses()) == sorted(addresses)

    return check


copied = has(f"{HOST}/24", f"{HOST6}/64")  # the host's
copied4 = has(f"{HOST}/24")


def link_has(**properties: Any) -> Check:
    """As `ip -j link` shows it."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        link = site.link()
        assert {name: link[name] for name in properties} == properties

    return check


# Connections --------------------------------------------------------------------------------------------------------


def outward(site: Site, daemon: Daemon, lan: Lan) -> None:
    """Other machines are reached, over every family that the namespace has."""
    found = [PEER6 if ":" in a else PEER for a in site.addresses()]
    assert found
    for address in sorted(set(found)):
        with listen(lan.peer, address) as server:
            assert exchange(site.guest, address, server.getsockname()[1], server) in (HOST, HOST6)


def host_at(address: str) -> Check:
    """`address` is the host's own in the namespace (--map-guest-addr)."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        own = HOST6 if ":" in address else HOST
        with listen(lan.host, own) as server:
            assert exchange(site.guest, address, server.getsockname()[1], server) == own

    return check


def loopback_at(address: str) -> Check:
    """`address` is the host's loopback in the namespace."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        own = LOOPBACK[_family(address)]
        with listen(lan.host, own) as server:
            assert exchange(site.guest, address, server.getsockname()[1], server) == own

    return check


def gateway_is_itself(site: Site, daemon: Daemon, lan: Lan) -> None:
    """The gateway's address is that of the gateway, not of the host's loopback (--no-map-gw)."""
    with listen(lan.peer, GATEWAY) as server:
        assert exchange(site.guest, GATEWAY, server.getsockname()[1], server) == HOST


def resolves_at(address: str) -> Check:
    """The host's name server answers at `address` (--dns-forward)."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        answer = site.guest.run("dig", "+short", "+time=5", "+tries=1", f"@{address}", NAME, "A").stdout
        assert answer == f"{NAME_ADDRESS}\n"

    return check


def forwards(port: int, inner: int, *, at: str = HOST, source: str = "peer") -> Check:
    """A TCP port of the host is one of the namespace."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        with listen(site.guest, site.address(v6=":" in at), inner) as server:
            exchange(lan.peer if source == "peer" else lan.host, at, port, server)

    return check


def forwards_udp(port: int, inner: int) -> Check:
    """The same for UDP."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        with listen(site.guest, site.address(), inner, socket.SOCK_DGRAM) as server:
            exchange_datagrams(lan.peer, HOST, port, server)

    return check


def forwards_when_bound(site: Site, daemon: Daemon, lan: Lan) -> None:
    """A port that a server in the namespace binds becomes one of the host (`auto`), within a second or so."""
    with listen(site.guest, "0.0.0.0") as server:
        port = server.getsockname()[1]
        wait_for(lambda: any(local.endswith(f":{port}") for _, local in listeners(lan.host)), "the port is open")
        exchange(lan.peer, HOST, port, server)


def forwards_out(port: int, inner: int) -> Check:
    """A port of the namespace's loopback is one of the host's (-T)."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        with listen(lan.host, "127.0.0.1", inner) as server:
            exchange(site.guest, "127.0.0.1", port, server)

    return check


def to_loopback_of_guest(port: int, inner: int) -> Check:
    """A connection to the host's loopback reaches that of the namespace (--host-lo-to-ns-lo)."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        with listen(site.guest, "127.0.0.1", inner) as server:
            assert exchange(lan.host, "127.0.0.1", port, server) == "127.0.0.1"

    return check


def listens_at(*expected: str) -> Check:
    """The host listens on exactly these TCP ports."""

    def check(site: Site, daemon: Daemon, lan: Lan) -> None:
        assert {local for protocol, local in listeners(lan.host) if protocol == "tcp"} == set(expected)

    return check


def closed(site: Site, daemon: Daemon, lan: Lan) -> None:
    """No port was opened, neither here nor there."""
    assert listeners(lan.host) == set()
    assert listeners(site.guest) == set()
