"""The outbound address and interface hold for everything that goes to other hosts, and for nothing that stays here."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from ..support import User
from .support import GATEWAY, GATEWAY6, PEER, PEER6, Guest, Lan, new_lan, root_user

OUT, OUT6 = "198.51.100.77", "2001:db8:1::77"  # second addresses of the host
LINK, LINK6 = "203.0.113.7", "2001:db8:2::7"  # of its second link to the peer
TO, TO6 = 7071, 7072  # at the guest's loopback, lead to the peer
SERVED = 7070
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
NAMES, NAMES6 = "192.0.2.53", "2001:db8:5::53"  # stand for the resolver, which is the peer
RESOLVER = "--dns-host", PEER, "--dns-host", PEER6, "--dns-forward", NAMES, "--dns-forward", NAMES6
QUERY = struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + b"\4name\4test\0" + struct.pack("!2H", 1, 1)


@pytest.fixture(scope="module")
def bound(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest whose outbound sockets have the second addresses, and the interface as well."""
    lan.host.run("ip", "address", "add", f"{OUT}/24", "dev", "eth0")
    lan.host.run("ip", "address", "add", f"{OUT6}/64", "dev", "eth0", "nodad")
    rules = f"{TO}:{PEER}/{SERVED},{TO6}:[{PEER6}]/{SERVED}"
    outbound = ("-o", OUT, "-o", OUT6, "--outbound-if4", "eth0", "--outbound-if6", "eth0")
    with lan.pasta(ordinary_user, "-q", "--config-net", *outbound, *RESOLVER, "-T", rules, "-U", rules) as made:
        yield made
    for address, length in ((OUT, 24), (OUT6, 64)):
        lan.host.run("ip", "address", "del", f"{address}/{length}", "dev", "eth0")


def source(guest: Guest, lan: Lan, kind: int, server: str, to: tuple[str, int]) -> str:
    """The address that a server of the peer sees when the guest sends to `to`."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with lan.peer.make_socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((server, SERVED))
        if kind == STREAM:
            listener.listen()
        with guest.make_socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, kind) as client:
            client.connect(to)
            client.send(b"x")
            if kind == DGRAM:
                return str(listener.recvfrom(1)[1][0])
            server_end, peer = listener.accept()
            server_end.close()
            return str(peer[0])


@pytest.mark.parametrize("kind", [STREAM, DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_to_a_peer(bound: Guest, lan: Lan, kind: int, v6: bool) -> None:
    server = PEER6 if v6 else PEER
    assert source(bound, lan, kind, server, (server, SERVED)) == (OUT6 if v6 else OUT)


@pytest.mark.parametrize("kind", [STREAM, DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_to_a_target_of_a_rule(bound: Guest, lan: Lan, kind: int, v6: bool) -> None:
    """-T and -U with a target that is elsewhere."""
    to = "127.0.0.1", TO6 if v6 else TO
    assert source(bound, lan, kind, PEER6 if v6 else PEER, to) == (OUT6 if v6 else OUT)


@pytest.mark.parametrize(("address", "gateway"), [("127.0.0.1", GATEWAY), ("::1", GATEWAY6)])
def test_to_the_hosts_loopback(bound: Guest, lan: Lan, address: str, gateway: str) -> None:
    with lan.host.listen(address) as listener:
        with bound.connect(gateway, listener.getsockname()[1]):
            end, peer = listener.accept()
        end.close()
        assert peer[0] == address


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_pings_and_queries(bound: Guest, lan: Lan, v6: bool) -> None:
    server, wanted = (PEER6, OUT6) if v6 else (PEER, OUT)
    for kind in (STREAM, DGRAM):
        assert query_source(bound, lan, kind, server, NAMES6 if v6 else NAMES) == wanted
    assert echo_source(bound, lan, server) == wanted


def test_what_vanishes_is_not_replaced(lan: Lan, ordinary_user: User) -> None:
    """Without the address nothing goes out by another one, as on the host, where bind(2) fails."""
    lan.host.run("ip", "address", "add", "198.51.100.78/24", "dev", "eth0")
    with lan.pasta(ordinary_user, "-q", "--config-net", "-o", "198.51.100.78") as guest:
        lan.host.run("ip", "address", "del", "198.51.100.78/24", "dev", "eth0")
        with lan.peer.listen(PEER) as listener, pytest.raises(OSError, match="No route to host"):
            guest.connect(PEER, listener.getsockname()[1])


@pytest.fixture(scope="module")
def second_link(ordinary_user: User) -> Iterator[tuple[Lan, Guest]]:
    """Two links lead to the peer. Routes take the first one; the options say the second."""
    with new_lan(root_user()) as lan:
        lan.host.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", str(lan.peer.pid))
        lan.host.run("ip", "address", "add", f"{LINK}/24", "dev", "eth1")
        lan.host.run("ip", "address", "add", f"{LINK6}/64", "dev", "eth1", "nodad")
        for address in "203.0.113.1/24", "2001:db8:2::1/64", f"{PEER6}/128":
            lan.peer.run("ip", "address", "add", address, "dev", "eth1", *(["nodad"] if ":" in address else []))
        for namespace in lan.host, lan.peer:
            namespace.run("ip", "link", "set", "eth1", "up")
        lan.host.run("ip", "-6", "route", "add", f"{PEER6}/128", "dev", "eth1", "metric", "9000")
        options = ["-i", "eth0", "--outbound-if4", "eth1", "--outbound-if6", "eth1", *RESOLVER]
        rules = f"{TO}:{PEER}/{SERVED},{TO6}:[{PEER6}]/{SERVED}"
        with lan.pasta(ordinary_user, "-q", "--config-net", *options, "-T", rules, "-U", rules) as guest:
            yield lan, guest


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_everything_leaves_by_the_interface(second_link: tuple[Lan, Guest], v6: bool) -> None:
    lan, guest = second_link
    server, wanted = (PEER6, LINK6) if v6 else (PEER, LINK)
    for kind in (STREAM, DGRAM):
        assert source(guest, lan, kind, server, (server, SERVED)) == wanted
        assert source(guest, lan, kind, server, ("127.0.0.1", TO6 if v6 else TO)) == wanted
        assert query_source(guest, lan, kind, server, NAMES6 if v6 else NAMES) == wanted
    assert echo_source(guest, lan, server) == wanted


def echo_source(guest: Guest, lan: Lan, server: str) -> str:
    """The address that the peer sees of a ping."""
    v6 = ":" in server
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    with lan.peer.make_socket(family, socket.SOCK_RAW, protocol) as raw:
        guest.run("ping", "-n", "-c", "1", "-W", "1", server, check=False)
        while True:
            message, sender = raw.recvfrom(2048)
            if message[0 if v6 else 20] == (128 if v6 else 8):
                return str(sender[0])


def query_source(guest: Guest, lan: Lan, kind: int, server: str, forwarded: str) -> str:
    """The address that the resolver sees of a query to the address that stands for it."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with contextlib.ExitStack() as stack:
        resolver = stack.enter_context(lan.peer.make_socket(family, kind))
        resolver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        resolver.bind((server, 53))
        if kind == STREAM:
            resolver.listen()
        client = stack.enter_context(guest.make_socket(family, kind))
        client.connect((forwarded, 53))
        client.send(QUERY)
        if kind == DGRAM:
            return str(resolver.recvfrom(512)[1][0])
        accepted, peer = resolver.accept()
        accepted.close()
        return str(peer[0])
