"""A tunnel as wg-quick(8) makes it: without a gateway, and with its default route in a table that rules choose. Or, as
other programs do, in the main table.

Two tun devices whose packets the test carries from one to the other. They have no link-layer addresses, as WireGuard's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import struct
import threading
from collections.abc import Iterator

import pytest
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptPrefixInfo,
    IPv6,
)
from scapy.layers.l2 import Ether

from passt.linux.syscall import CLONE_NEWNET, setns

from .support import User, wait_for
from .test_follow import HOME, HOME6, PORT, QUIET, SERVER, SERVER6, Site, connect, made_site, seen_as, talk
from .traffic.support import Namespace
from .vm.client import Client
from .vm.support import passt

TUNSETIFF, IFF_TUN_NO_PI = 0x400454CA, 0x1001
NEAR, NEAR6 = "10.66.0.2", "fd66::2"
TABLE = "51820"
RULES = f"rule add not fwmark {TABLE} table {TABLE}", "rule add table main suppress_prefixlength 0"
BOUND = "--outbound-if4", "wg0", "--outbound-if6", "wg0"


def open_tunnel(where: Namespace) -> int:
    """The descriptor of a new device, wg0."""
    made: list[int] = []

    def inside() -> None:
        with open(f"/proc/{where.pid}/ns/net", "rb") as namespace:
            setns(namespace.fileno(), CLONE_NEWNET)
        made.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        fcntl.ioctl(made[0], TUNSETIFF, struct.pack("=16sH22x", b"wg0", IFF_TUN_NO_PI))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    return made[0]


def carry(one: int, other: int, end: threading.Event) -> None:
    """Packets from each of two devices to the other one. One that is not up has no use for them."""
    with selectors.DefaultSelector() as ready:
        for fd, to in ((one, other), (other, one)):
            ready.register(fd, selectors.EVENT_READ, to)
        while not end.is_set():
            for key, _ in ready.select(0.1):
                with contextlib.suppress(OSError):
                    os.write(key.data, os.read(key.fd, 1 << 16))


@contextlib.contextmanager
def tunnel(site: Site) -> Iterator[None]:
    """It leads to the peer."""
    host, peer = site.lan.host, site.lan.peer
    one, other, end = open_tunnel(host), open_tunnel(peer), threading.Event()
    carrier = threading.Thread(target=carry, args=(one, other, end))
    carrier.start()
    try:
        for address in (f"{NEAR}/32", f"{NEAR6}/128"):
            host.run("ip", "address", "add", address, "dev", "wg0", *(["nodad"] if ":" in address else []))
        for namespace in (host, peer):
            namespace.run("ip", "link", "set", "wg0", "up", "mtu", "1420")
        for address in (NEAR, NEAR6):
            peer.run("ip", "route", "add", address, "dev", "wg0")
        yield
    finally:
        end.set()
        carrier.join()
        for fd in (one, other):
            os.close(fd)


@contextlib.contextmanager
def rules(site: Site) -> Iterator[None]:
    """Those of wg-quick: the main table for all but its default route, which is that of another table."""
    for family in ("-4", "-6"):
        site.host(f"{family} route add default dev wg0 table {TABLE}", *(f"{family} {rule}" for rule in RULES))
    try:
        yield
    finally:
        for family in ("-4", "-6"):
            site.host(*(f"{family} {rule.replace(' add ', ' del ')}" for rule in RULES))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("a thread of an ordinary user cannot enter the namespaces")
    for site in made_site():
        site.join(HOME)
        site.join6(HOME6)
        yield site


def test_sockets_use_it_and_the_guest_stays_at_home(site: Site, anyone: User) -> None:
    """The main table has its default route still, which is the template's."""
    with site.pasta(anyone, "--config-net") as (guest, network):
        connection = connect(guest)
        with tunnel(site), rules(site):
            wait_for(lambda: seen_as(guest) == NEAR, "a new connection goes through the tunnel")
            wait_for(lambda: seen_as(guest, SERVER6) == NEAR6, "by IPv6, too")
            assert network()["view"].startswith(f"IPv4 {HOME}.20/24 via {HOME}.1 (eth0: the default route)")
        wait_for(lambda: seen_as(guest) == f"{HOME}.20", "the tunnel is gone")
        assert talk(connection)


@pytest.mark.parametrize("ruled", [True, False])
def test_sockets_that_are_bound_to_it(site: Site, ordinary_user: User, ruled: bool) -> None:
    """All of the guest's connections go through it, also where no other program's do. In IPv6, a bound socket needs a
    route.
    """
    with (
        tunnel(site),
        rules(site) if ruled else contextlib.nullcontext(),
        site.lan.pasta(ordinary_user, *QUIET, "--config-net", *BOUND) as guest,
    ):
        assert seen_as(guest) == NEAR
        assert seen_as(guest, SERVER6) == (NEAR6 if ruled else "")
        guest.run("ping", "-c1", "-W5", SERVER)


# A machine; no option says anything about the tunnel ---------------------------------------------------------------


@contextlib.contextmanager
def default_routes(site: Site) -> Iterator[None]:
    """Those of the main table lead through the tunnel."""
    for family in ("-4", "-6"):
        site.host(f"{family} route add default dev wg0 metric 1")
    yield  # they go with the tunnel


def through_the_tunnel(client: Client, router: str) -> None:
    """The machine gets all that it needs from DHCP and router advertisements, and reaches the server."""
    client.configure()
    assert (client.address, client.options["router"]) == (NEAR, router)
    assert client.connect(SERVER, PORT).receive(len(NEAR) + 1) == f"{NEAR}\n".encode()
    own = f"{NEAR6.removesuffix('2')}1:2:3"
    advertised(client, NEAR6)
    client.send(Ether(src=client.mac, dst=client.router_mac) / IPv6(src=own, dst=SERVER6) / ICMPv6EchoRequest(id=7))
    client.expect(lambda p: True if ICMPv6EchoReply in p and p[IPv6].dst == own else None)


def advertised(client: Client, address: str) -> None:
    """A router advertises the /64 of `address`."""
    solicitation = IPv6(src="fe80::1:2:3", dst="ff02::2") / ICMPv6ND_RS()
    client.send(Ether(src=client.mac, dst="33:33:00:00:00:02") / solicitation)
    prefix = address.removesuffix("2")
    client.expect(
        lambda p: (
            True
            if ICMPv6ND_RA in p and p[ICMPv6ND_RA].routerlifetime and p[ICMPv6NDOptPrefixInfo].prefix == prefix
            else None
        )
    )


def test_a_machine_that_starts_in_a_tunnel(site: Site, anyone: User) -> None:
    site.leave()
    with (
        tunnel(site), default_routes(site), passt(site.lan, anyone, *QUIET[1:5]) as server,
        Client.at(str(server.path)) as client,
    ):  # fmt: skip
        through_the_tunnel(client, "169.254.2.2")


@pytest.mark.parametrize("online", [True, False])
def test_a_machine_whose_host_enters_a_tunnel(site: Site, ordinary_user: User, online: bool) -> None:
    """It keeps the gateway that it has, if it has one."""
    site.leave()
    if online:
        site.join(HOME)
        site.host(f"route add default via {HOME}.1 dev eth0 metric 100", "route del default metric 0")
        site.join6(HOME6)
    with passt(site.lan, ordinary_user, *QUIET[1:5]) as server, Client.at(str(server.path)) as client:
        client.configure()
        with tunnel(site), default_routes(site):
            server.expect(rf"The host's network has changed: IPv4 {NEAR}/32.*IPv6 {NEAR6}")
            through_the_tunnel(client, f"{HOME}.1" if online else "169.254.2.2")
