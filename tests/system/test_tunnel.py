"""A tunnel as wg-quick(8) makes it: without a gateway, and with its default route in a table that rules choose.

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

from passt.linux.syscall import CLONE_NEWNET, setns

from .support import User, wait_for
from .test_follow import HOME, HOME6, QUIET, SERVER, SERVER6, Site, connect, made_site, seen_as, talk
from .traffic.support import Namespace

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
