"""The host's network changes under a virtual machine: it is told by what it understands (docs/follow.md)."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptPrefixInfo,
    IPv6,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from ..support import User, wait_for
from ..test_follow import HOME, HOME6, PORT, SERVER, SERVER6, TRAIN, TRAIN6, Site, made_site
from .client import RST, Client, dict_of
from .image import Image
from .machine import VirtualMachine
from .support import passt

QUIET = "-t", "none", "-u", "none"
UDHCPC = "udhcpc -i eth0 -s /dhcp -O search -O mtu -O staticroutes -p /tmp/udhcpc -b"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    yield from made_site()


@pytest.fixture(autouse=True)
def at_home(site: Site) -> None:
    site.leave()
    site.join(HOME)
    site.join6(HOME6)


def moves(site: Site) -> None:
    """From home to the train. The former addresses are not gone yet."""
    site.join(TRAIN)
    site.join6(TRAIN6)
    site.host(f"address change {HOME}.20/24 dev eth0 preferred_lft 0")
    site.host(f"address change {HOME6}::20/64 dev eth0 preferred_lft 0")


def prefixes(packet: Packet) -> dict[str, tuple[int, int]]:
    """Those of a router advertisement: preferred and valid lifetime."""
    found, layer = {}, packet.getlayer(ICMPv6NDOptPrefixInfo)
    while layer is not None:
        found[str(layer.prefix)] = layer.preferredlifetime, layer.validlifetime
        layer = layer.payload.getlayer(ICMPv6NDOptPrefixInfo)
    return found


def told_by_the_router(client: Client, prefix: str) -> dict[str, tuple[int, int]]:
    """The first advertisement that has `prefix`."""

    def wanted(packet: Packet) -> dict[str, tuple[int, int]] | None:
        found = prefixes(packet) if ICMPv6ND_RA in packet else {}
        return found if f"{prefix}::" in found else None

    return client.expect(wanted)


def renew(client: Client, address: str, server: str) -> Packet:
    """The answer to a client that wants to keep its address, in RENEWING: by unicast, without a server identifier."""
    source = bytes.fromhex(client.mac.replace(":", ""))
    bootp = BOOTP(chaddr=source, xid=7, ciaddr=address)
    head = Ether(src=client.mac, dst=client.router_mac) / IP(src=address, dst=server) / UDP(sport=68, dport=67)
    client.send(head / bootp / DHCP(options=[("message-type", "request"), "end"]))
    return client.expect(lambda p: p if DHCP in p and p[BOOTP].xid == 7 else None)


def test_a_guest_is_told_at_once_by_ipv6_and_when_it_asks_by_ipv4(site: Site, anyone: User) -> None:
    with passt(site.lan, anyone, *QUIET) as server, Client.at(str(server.path)) as client:
        client.configure()
        assert (client.address, client.options["router"]) == (f"{HOME}.20", f"{HOME}.1")
        assert 60 <= client.options["lease_time"] < 3600
        connection = client.connect(SERVER, PORT)
        assert connection.receive(len(f"{HOME}.20\n")) == f"{HOME}.20\n".encode()
        moves(site)
        told = told_by_the_router(client, TRAIN6)
        assert told[f"{HOME6}::"] == (0, 0) and min(told[f"{TRAIN6}::"]) > 0
        server.expect(r"The host's network has changed: IPv4 10\.9\.0\.20/24")
        answer = renew(client, f"{HOME}.20", f"{HOME}.1")
        assert (dict_of(answer)["message-type"], dict_of(answer)["server_id"]) == (6, f"{HOME}.1")  # NAK, as of before
        connection.send(b"still here")
        assert connection.receive(10) == b"still here"
        other = client.connect(SERVER, PORT)  # from the former address still, which is translated
        assert other.receive(len(f"{TRAIN}.20\n")) == f"{TRAIN}.20\n".encode()
        client.configure()
        assert (client.address, client.options["router"]) == (f"{TRAIN}.20", f"{TRAIN}.1")
        assert client.options["lease_time"] == 60, "the network has just moved"
        site.host(f"address del {HOME}.20/24 dev eth0")
        ports = connection.ports["dport"], connection.ports["sport"]
        ended = client.expect(lambda p: p[TCP] if TCP in p and (p[TCP].sport, p[TCP].dport) == ports else None)
        assert ended.flags & RST


def silent_machine(client: Client) -> None:
    """It has used its addresses at home."""
    client.configure()
    client.ping(SERVER)
    source = f"{HOME6}::1:2:3"
    echo = ICMPv6EchoRequest(id=7, seq=1)
    client.send(Ether(src=client.mac, dst=client.router_mac) / IPv6(src=source, dst=SERVER6) / echo)
    client.expect(lambda p: True if ICMPv6EchoReply in p else None)


def opens_to(site: Site, client: Client, host: str) -> str:
    """The machine's address that a connection to a port of `host` goes to."""
    ip = IPv6 if ":" in host else IP
    with site.lan.peer.make_socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as peer:
        peer.setblocking(False)
        peer.connect_ex((host, PORT))
        return str(client.expect(lambda p: p[ip].dst if ip in p and TCP in p and p[TCP].flags == "S" else None))


def test_a_silent_machine_is_reached_at_its_new_address(site: Site, anyone: User) -> None:
    """It has been given one, or has probed for it, and does not say a word from there."""
    forwarded = "-t", str(PORT), "-u", "none"
    with passt(site.lan, anyone, *forwarded) as server, Client.at(str(server.path)) as client:
        silent_machine(client)
        site.leave()
        site.join(TRAIN)
        site.join6(TRAIN6)
        told_by_the_router(client, TRAIN6)
        client.configure(arp=False)
        assert opens_to(site, client, f"{TRAIN}.20") == f"{TRAIN}.20"
        target = f"{TRAIN6}::1:2:3"
        probe = IPv6(src="::", dst="ff02::1:ff02:3") / ICMPv6ND_NS(tgt=target)
        client.send(Ether(src=client.mac, dst="33:33:ff:02:00:03") / probe)
        client.arp(client.options["router"])  # passt has read the probe, which a connection could overtake
        assert opens_to(site, client, f"{TRAIN6}::20") == target


def test_follow_off_is_a_lease_that_never_ends(site: Site, ordinary_user: User) -> None:
    with (
        passt(site.lan, ordinary_user, *QUIET, "--follow", "off") as server,
        Client.at(str(server.path)) as client,
    ):
        client.configure()
        assert client.options["lease_time"] == 0xFFFFFFFF
        moves(site)
        connection = client.connect(SERVER, PORT)
        assert connection.receive(3), "the host's kernel does what it can"
        assert dict_of(renew(client, f"{HOME}.20", f"{HOME}.1"))["message-type"] == 5


def test_a_machine_moves(site: Site, ordinary_user: User, machine_image: Image) -> None:
    """udhcpc is told to renew, as it does at half of its lease; IPv6 comes by itself. QEMU can take the link down and
    up, for a client that watches it.
    """
    machine = VirtualMachine(machine_image)
    with passt(site.lan, ordinary_user, *QUIET) as server:
        try:
            assert server.path
            machine.start_on(server.path)
            machine.run(f"ip link set eth0 up && {UDHCPC}")
            assert f"{HOME}.20/24" in machine.run("ip -4 address show dev eth0")
            wait_for(lambda: HOME6 in machine.run("ip -6 address show dev eth0 scope global"), "an address by IPv6")
            moves(site)
            wait_for(lambda: TRAIN6 in machine.run("ip -6 address show dev eth0 scope global"), "the other one")
            shown = machine.run("ip -6 address show dev eth0 scope global")
            (former,) = re.findall(rf"inet6 {HOME6}\S+.*\n.*preferred_lft (\S+)", shown)
            assert former == "0sec", "deprecated"
            monitor = machine.monitor()
            for up, state in ((False, "down"), (True, "up")):
                monitor.execute("set_link", name="s", up=up)
                machine.run(f"until grep -qx {state} /sys/class/net/eth0/operstate; do sleep 0.1; done")
            machine.run("kill -USR1 $(cat /tmp/udhcpc)")
            wait_for(lambda: f"{TRAIN}.20/24" in machine.run("ip -4 address show dev eth0"), "the new lease")
            assert f"via {TRAIN}.1" in machine.run("ip route show default")
            seen = machine.run(f"nc -w 3 {SERVER} {PORT} </dev/null")
            assert seen.strip() == f"{TRAIN}.20"
        finally:
            machine.close()
