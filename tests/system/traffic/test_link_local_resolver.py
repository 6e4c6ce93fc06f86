"""A resolver of the host at a link-local address of another link than that of the default route."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from ..support import User
from .support import Lan, new_lan, root_user

RESOLVER = "fe80::53"
ASKED = "2001:db8:1::99"  # of --dns-forward
QUERY = struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + b"\4name\4test\0" + struct.pack("!2H", 1, 1)
RESPONSE = QUERY[:2] + b"\x81\x80" + QUERY[4:]


@pytest.fixture(scope="module")
def two_links() -> Iterator[Lan]:
    """The peer is on the second link, too, and both links have the resolver's address somewhere."""
    with new_lan(root_user()) as lan:
        lan.host.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", str(lan.peer.pid))
        lan.host.run("ip", "link", "property", "add", "dev", "eth1", "altname", "the-second-link-of-the-host")
        lan.peer.run("ip", "address", "add", f"{RESOLVER}/64", "dev", "eth1", "nodad")
        for namespace in (lan.host, lan.peer):
            namespace.run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/eth1/accept_dad")
            namespace.run("ip", "link", "set", "eth1", "up")
        yield lan


@pytest.mark.parametrize("zone", ["eth1", "the-second-link-of-the-host"])
@pytest.mark.parametrize("named", ["by an option", "by resolv.conf"])
def test_it_is_reached(two_links: Lan, ordinary_user: User, zone: str, named: str) -> None:
    index = two_links.peer.show("link", "show", "eth1")[0]["ifindex"]
    servers = []
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        servers.append(two_links.peer.make_socket(socket.AF_INET6, kind))
        servers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        servers[-1].bind((RESOLVER, 53, 0, index))
    udp, tcp = servers
    tcp.listen()
    options = ["--dns-forward", ASKED]
    if named == "by an option":
        options += ["--dns-host", f"{RESOLVER}%{zone}"]
    else:
        two_links.host.write("/run/resolv.conf", f"nameserver {RESOLVER}%{zone}\n")
        two_links.host.run("mount", "--bind", "/run/resolv.conf", "/etc/resolv.conf")
    with two_links.pasta(ordinary_user, "-q", "--config-net", *options) as guest:
        client = guest.connect(ASKED, 53, socket.SOCK_DGRAM)
        client.send(QUERY)
        query, sender = udp.recvfrom(512)
        assert query[2:] == QUERY[2:]
        udp.sendto(query[:2] + RESPONSE[2:], sender)
        assert client.recv(512) == RESPONSE
        stream = guest.connect(ASKED, 53)
        with tcp.accept()[0] as accepted:
            stream.send(b"query")
            assert accepted.recv(16) == b"query"
    two_links.peer.close_sockets()
    two_links.host.run("umount", "/etc/resolv.conf", check=named != "by an option")
