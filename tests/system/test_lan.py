"""The guest sees the MAC addresses of the hosts on the template's link, and sees them change (`passt/policy/lan.py`).

The host has a cable to a peer: a gateway at .1, and a neighbour at .9, which have the same network interface. A packet
socket in the guest sees the source of each frame, and ip-neighbour(8) what the guest was told.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.l2 import ARP

from .support import User, wait_for
from .test_follow import HOME, HOME6, PORT, QUIET, SERVER, SERVER6, Site, connect, made_site, talk
from .traffic.support import Guest, Namespace
from .vm.client import Client
from .vm.support import passt

OURS = "9a:55:9a:55:9a:55"
MAC, OTHER_MAC = "52:54:00:00:00:77", "52:54:00:00:00:78"
NEAR, NEAR6 = f"{HOME}.9", f"{HOME6}::9"
GATEWAY, GATEWAY6 = f"{HOME}.1", f"{HOME6}::1"
FAMILIES = pytest.mark.parametrize(("near", "gateway", "far"), [(NEAR, GATEWAY, SERVER), (NEAR6, GATEWAY6, SERVER6)])
ETH_P_ALL = 3
FORWARDED = 7010
STATES = 40
ICMP_TYPES_OF_DISCOVERY = range(133, 138)
QUICK = 5.0  # s; it is at once, and a loaded machine takes longer


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    for site in made_site():
        peer = site.lan.peer
        peer.run("ip", "address", "add", f"{NEAR}/24", "dev", "eth0")
        peer.run("ip", "address", "add", f"{NEAR6}/64", "dev", "eth0", "nodad")
        for option in ("ipv4/conf/eth0/arp_notify", "ipv6/conf/eth0/ndisc_notify"):
            peer.write(f"/proc/sys/net/{option}", "1")
        site.join(HOME)
        site.join6(HOME6)
        for address in (NEAR, GATEWAY, NEAR6, GATEWAY6):
            threading.Thread(target=echo, args=(datagram_socket(peer, address),), daemon=True).start()
        yield site


@pytest.fixture(autouse=True)
def offline(site: Site) -> None:
    """Each test begins without a neighbour that the host knows."""
    move(site, MAC)
    site.host("neighbour flush all")


def datagram_socket(where: Namespace, address: str) -> socket.socket:
    """At PORT; with an address of its own, which its answers have."""
    made = where.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(None)
    made.bind((address, PORT))
    return made


def echo(sock: socket.socket) -> None:
    """Send datagrams back, until the socket is closed."""
    with contextlib.suppress(OSError):
        while True:
            sock.sendto(*sock.recvfrom(2048))


def move(site: Site, mac: str) -> None:
    """The peer has another network interface, and says so."""
    site.lan.peer.run("ip", "link", "set", "eth0", "address", mac)


class Sources:
    """The MAC addresses that frames of an address have as their source, as the guest gets them."""

    def __init__(self, guest: Namespace) -> None:
        self._sock = guest.make_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._sock.setblocking(False)

    def of(self, address: str) -> set[str]:
        """Those since the last call. Neighbour discovery is left out."""
        v6 = ":" in address
        wanted = socket.inet_pton(socket.AF_INET6 if v6 else socket.AF_INET, address)
        ethertype, source = (b"\x86\xdd", slice(22, 38)) if v6 else (b"\x08\0", slice(26, 30))
        found = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self._sock.recv(2048)
                discovery = v6 and frame[20] == socket.IPPROTO_ICMPV6 and frame[54] in ICMP_TYPES_OF_DISCOVERY
                if frame[12:14] == ethertype and frame[source] == wanted and not discovery:
                    found.add(frame[6:12].hex(":"))
        return found


def told(guest: Namespace, address: str) -> str:
    """The MAC address that the guest knows for another one; empty if it knows none."""
    found = guest.show("neighbour", "show", "to", address)
    return found[0].get("lladdr", "") if found else ""


def converse(guest: Guest, address: str) -> None:
    """TCP, UDP, an ICMP error, and ping."""
    connect(guest, address).close()
    client = guest.connect(address, PORT, socket.SOCK_DGRAM)
    client.send(b"hello")
    assert client.recv(9) == b"hello"
    refused = guest.connect(address, 9, socket.SOCK_DGRAM)
    refused.send(b"no port")
    with pytest.raises(ConnectionRefusedError):
        refused.recv(1)
    guest.run("ping", "-c1", "-W5", address)


@pytest.fixture(scope="module")
def guest(site: Site, ordinary_user: User) -> Iterator[Guest]:
    forwarded = "-t", str(FORWARDED), "-u", str(FORWARDED), "-T", "none", "-U", "none", "-q"
    with site.lan.pasta(ordinary_user, *forwarded, "--config-net") as guest:
        yield guest


@FAMILIES
def test_a_neighbour_has_its_own(guest: Guest, near: str, gateway: str, far: str) -> None:
    """All of its frames, and what ARP and neighbour discovery say, as soon as the host knows it: it has spoken."""
    connect(guest, near).close()
    wait_for(lambda: told(guest, near) == MAC, "the guest is told", QUICK)
    sources = Sources(guest)
    converse(guest, near)
    assert sources.of(near) == {MAC}


@FAMILIES
def test_what_leads_to_the_host_or_beyond_it_has_ours(guest: Guest, near: str, gateway: str, far: str) -> None:
    """The gateway maps the host's loopback."""
    sources = Sources(guest)
    guest.run("ping", "-c1", "-W5", gateway)
    assert sources.of(gateway) == {OURS}
    assert told(guest, gateway) == OURS
    connect(guest, far).close()
    assert sources.of(far) == {OURS}


@FAMILIES
def test_a_change_is_told_and_flows_follow(guest: Guest, site: Site, near: str, gateway: str, far: str) -> None:
    connection = connect(guest, near)
    datagrams = guest.connect(near, PORT, socket.SOCK_DGRAM)
    datagrams.send(b"1")
    assert datagrams.recv(1) == b"1"
    wait_for(lambda: told(guest, near) == MAC, "the guest is told", QUICK)
    sources = Sources(guest)
    move(site, OTHER_MAC)
    wait_for(lambda: told(guest, near) == OTHER_MAC, "it is told of the change, too", QUICK)
    assert talk(connection)
    datagrams.send(b"2")
    assert datagrams.recv(1) == b"2"
    assert sources.of(near) == {OTHER_MAC}


@FAMILIES
def test_a_neighbour_is_a_client(guest: Guest, site: Site, near: str, gateway: str, far: str) -> None:
    """The host knows it since its first packet. The guest has the address of the host."""
    v6 = ":" in near
    host = f"{HOME6}::20" if v6 else f"{HOME}.20"
    family = socket.AF_INET6 if v6 else socket.AF_INET
    kinds = socket.SOCK_STREAM, socket.SOCK_DGRAM
    sources = Sources(guest)
    with guest.make_socket(family) as listener, guest.make_socket(family, socket.SOCK_DGRAM) as receiver:
        for server in (listener, receiver):
            server.bind((host, FORWARDED))
        listener.listen(8)
        stream, datagrams = (site.lan.peer.make_socket(family, kind) for kind in kinds)
        for client in (stream, datagrams):
            client.bind((near, 0))
            client.connect((host, FORWARDED))
            client.send(b"hello")
        with listener.accept()[0] as accepted:
            assert accepted.recv(9) == b"hello"
        receiver.sendto(*receiver.recvfrom(9))
        assert datagrams.recv(9) == b"hello"
    assert (sources.of(near), told(guest, near)) == ({MAC}, MAC)


@FAMILIES
def test_the_gateway_is_a_neighbour_without_the_map(
    site: Site, anyone: User, near: str, gateway: str, far: str
) -> None:
    """Hosts beyond it are behind its MAC address. The host knows it before: the table is read at the start."""
    site.lan.host.run("ping", "-c1", "-W5", gateway)
    with site.lan.pasta(anyone, *QUIET, "--config-net", "--no-map-gw") as guest:
        sources = Sources(guest)
        converse(guest, gateway)
        assert (sources.of(gateway), told(guest, gateway)) == ({MAC}, MAC)
        connection = connect(guest, far)
        assert sources.of(far) == {MAC}
        move(site, OTHER_MAC)
        wait_for(lambda: told(guest, gateway) == OTHER_MAC, "the guest is told", QUICK)
        assert talk(connection)
        assert sources.of(far) == {OTHER_MAC}


def wakes(guest: Guest) -> int:
    """How often the daemon has waited so far."""
    status = Path(f"/proc/{guest.daemon}/status").read_text()
    (found,) = re.findall(r"^voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)
    return int(found)


def wakes_of_changes(guest: Guest, site: Site) -> int:
    """How often so many changes of the states of two neighbours, one after the other, wake the daemon up."""
    before = wakes(guest)
    for i in range(STATES // 2):
        for near in (NEAR, NEAR6):
            site.host(f"neighbour change {near} lladdr {MAC} dev eth0 nud {('stale', 'reachable')[i % 2]}")
    return wakes(guest) - before


def test_neighbours_do_not_wake_an_idle_daemon(site: Site, anyone: User) -> None:
    """Without flows, and told of the gateway alone, which maps the host, it need not know; and it does when asked."""
    for near in (NEAR, NEAR6):
        site.lan.host.run("ping", "-c1", "-W5", near)
    with site.lan.pasta(anyone, *QUIET, "--config-net") as guest:
        for far in (SERVER, SERVER6):
            connect(guest, far).close()
        wait_for(lambda: wakes_of_changes(guest, site) < STATES // 4, "the connections have ended")
        assert wakes_of_changes(guest, site) < STATES // 4
        move(site, OTHER_MAC)
        wait_for(lambda: OTHER_MAC in site.lan.host.run("ip", "neighbour", "show", "to", NEAR).stdout, "the host knows")
        sources = Sources(guest)
        connection = connect(guest, NEAR)
        assert (sources.of(NEAR), told(guest, NEAR)) == ({OTHER_MAC}, OTHER_MAC)
        assert wakes_of_changes(guest, site) > STATES // 4, "the connection needs them"
        connection.close()


def test_follow_off(site: Site, ordinary_user: User) -> None:
    """Nothing is watched."""
    site.lan.host.run("ping", "-c1", "-W5", NEAR)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net", "--follow", "off") as guest:
        sources = Sources(guest)
        converse(guest, NEAR)
        assert (sources.of(NEAR), told(guest, NEAR)) == ({OURS}, OURS)


def test_a_machine_sees_neighbours(site: Site, ordinary_user: User) -> None:
    """passt: frames to the neighbour's MAC address are ours, and a change is announced."""
    with (
        passt(site.lan, ordinary_user, "-t", "none", "-u", "none") as server,
        Client.at(str(server.path)) as client,
    ):
        client.configure()
        assert client.router_mac == client.arp(NEAR) == OURS, "the host does not know it yet"
        client.send(client.ip(NEAR) / ICMP(id=77, seq=1) / b"ping")
        announced = client.expect(lambda p: p[ARP].hwsrc if ARP in p and p[ARP].psrc == p[ARP].pdst == NEAR else None)
        assert announced == client.arp(NEAR) == MAC
        client.router_mac = MAC
        client.send(client.ip(NEAR) / ICMP(id=77, seq=2) / b"ping")
        assert client.expect(lambda p: p.src if ICMP in p and p[ICMP].seq == 2 else None) == MAC
        move(site, OTHER_MAC)
        again = client.expect(lambda p: p[ARP].hwsrc if ARP in p and p[ARP].psrc == p[ARP].pdst == NEAR else None)
        assert again == OTHER_MAC
