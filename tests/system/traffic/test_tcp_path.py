"""ICMP errors of routers and packet filters about an attempt to connect, as the bare kernel passes them on; and about
datagrams and pings, likewise.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator

import pytest

from passt import addr
from passt.linux.sockopt import hops_option, read_errors, recverr

from ..support import User
from .support import GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6, Guest, Lan, Namespace

# Where the router has a route to, where it has none, its own addresses, and the host, where its route leads back to
BEYOND = {
    "ipv4": ("198.18.0.1", "198.19.0.1", (GATEWAY, PEER), HOST),
    "ipv6": ("2001:db8:fff0::1", "2001:db8:fff1::1", (GATEWAY6, PEER6), HOST6),
}
Beyond = tuple[str, str, tuple[str, str], str]
FORWARDED = 18097
REJECT = """
table inet rejects {
    chain input {
        type filter hook input priority 0;
        tcp dport 18097 reject with icmpx type HOW
    }
}
"""


@pytest.fixture(scope="module")
def someone(ordinary_user: User) -> User:
    """Nothing here depends on the user."""
    return ordinary_user


@pytest.fixture(params=["direct", "guest"])
def where(request: pytest.FixtureRequest, guest: Guest, lan: Lan) -> Namespace:
    """Where the application runs: under the bare kernel of the host, or in the guest."""
    return guest if request.param == "guest" else lan.host


@pytest.fixture(params=BEYOND)
def beyond(request: pytest.FixtureRequest, lan: Lan) -> Iterator[Beyond]:
    """Addresses behind the peer, which is a router while the test lasts."""
    routed, _, _, host = BEYOND[request.param]
    lan.peer.run("ip", "route", "add", routed, "via", host)
    switches = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"]
    mask = "/proc/sys/net/ipv4/icmp_ratemask"  # errors of these types take from the tokens of route errors
    limited = lan.peer.run("cat", mask).stdout
    lan.peer.write(mask, "0")
    for switch in switches:
        lan.peer.write(switch, "1")
    yield BEYOND[request.param]
    for switch in switches:
        lan.peer.write(switch, "0")
    lan.peer.write(mask, limited)
    lan.peer.run("ip", "route", "del", routed)


def connecting(where: Namespace, address: str, hops: int) -> tuple[int, socket.socket]:
    """The errno of connect(2) with this TTL or hop limit, and the socket, which has an error queue."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = where.make_socket(family)
    sock.settimeout(5)
    sock.setsockopt(*hops_option(addr.packed(address)), hops)
    sock.setsockopt(*recverr(family), 1)
    began = time.monotonic()
    try:
        sock.connect((address, 80))
    except OSError as e:
        assert time.monotonic() - began < 1, "the answer came late"
        sock.setblocking(False)
        return e.errno or 0, sock
    return 0, sock


def test_a_router_where_the_ttl_ends(where: Namespace, beyond: Beyond) -> None:
    """`traceroute -T`: time exceeded, from the first router."""
    number, sock = connecting(where, beyond[0], 1)
    assert number == errno.EHOSTUNREACH
    v4 = sock.family == socket.AF_INET
    ((error, _),) = read_errors(sock)
    assert (error.type, error.code) == ((11, 0) if v4 else (3, 0))
    assert addr.text(error.offender or b"") in beyond[2]


@pytest.mark.parametrize("kind", ["datagram", "ping"])
def test_a_router_where_the_ttl_of_a_packet_ends(where: Namespace, beyond: Beyond, kind: str) -> None:
    """`traceroute`, `traceroute -I`."""
    v6 = ":" in beyond[0]
    family, ping = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    sock = where.make_socket(family, socket.SOCK_DGRAM, ping if kind == "ping" else 0)
    sock.setsockopt(*hops_option(addr.packed(beyond[0])), 1)
    sock.setsockopt(*recverr(family), 1)
    sock.settimeout(1)
    sock.connect((beyond[0], 0 if kind == "ping" else 33434))
    sock.send(bytes((128 if v6 else 8, *bytes(7))))
    with pytest.raises(OSError, match="No route to host"):
        sock.recv(1)
    sock.setblocking(False)
    ((error, _),) = read_errors(sock)
    assert (error.type, error.code) == ((3, 0) if v6 else (11, 0))
    assert addr.text(error.offender or b"") in beyond[2]


def test_a_router_without_a_route(where: Namespace, beyond: Beyond) -> None:
    """With a TTL that is not the host's own the message itself comes through: no route, from the router."""
    number, sock = connecting(where, beyond[1], 17)
    ((error, _),) = read_errors(sock)
    v4 = sock.family == socket.AF_INET
    assert (error.type, error.code) == ((3, 0) if v4 else (1, 0))
    assert number == errno.ENETUNREACH and addr.text(error.offender or b"") in beyond[2]


@pytest.mark.parametrize("how", ["port-unreachable", "host-unreachable", "admin-prohibited"])
@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_a_guest_that_rejects(rejecting: Guest, lan: Lan, how: str, v6: bool) -> None:
    """A client is refused at once. On a bare host its connect(2) fails; here the kernel has accepted it already."""
    rejecting.run("nft", "-f", "-", input=REJECT.replace("HOW", how))
    with contextlib.ExitStack() as stack:
        stack.callback(rejecting.run, "nft", "delete", "table", "inet", "rejects")
        client = lan.peer.make_socket(socket.AF_INET6 if v6 else socket.AF_INET)
        client.settimeout(5)
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            ask(client, HOST6 if v6 else HOST)
        assert time.monotonic() - began < 1


def ask(client: socket.socket, address: str) -> None:
    client.connect((address, FORWARDED))
    client.recv(1)


@pytest.fixture(scope="module")
def rejecting(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest with a forwarded port."""
    with lan.pasta(ordinary_user, "-q", "--config-net", "-t", str(FORWARDED)) as made:
        yield made
