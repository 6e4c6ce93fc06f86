"""Options of passt as its guest sees them: available services, their answers, and the MTU of packets."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP
from scapy.layers.dhcp6 import DUID_LL, DHCP6_Advertise, DHCP6_Solicit, DHCP6OptClientId, DHCP6OptIA_NA
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptMTU,
    ICMPv6NDOptRDNSS,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from ..support import User
from ..traffic.support import GATEWAY, GATEWAY6, HOST, PEER, PEER6, Lan
from .client import ACK, GUEST_MAC, Client, dict_of, framed
from .support import ACCEPTED, GONE, Passt, passt

LINK_LOCAL = "fe80::ff:fe00:1"
ALL = "33:33:00:00:00:01"
FROM_GUEST = Ether(src=GUEST_MAC, dst=ALL)
SOLICIT_ROUTER = FROM_GUEST / IPv6(src=LINK_LOCAL, dst="ff02::2", hlim=255) / ICMPv6ND_RS()
SOLICIT_NEIGHBOUR = FROM_GUEST / IPv6(src=LINK_LOCAL, dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt=GATEWAY6)
SOLICIT_DHCPV6 = (
    FROM_GUEST / IPv6(src=LINK_LOCAL, dst="ff02::1:2") / UDP(sport=546, dport=547) / DHCP6_Solicit(trid=7)
    / DHCP6OptClientId(duid=DUID_LL(lladdr=GUEST_MAC)) / DHCP6OptIA_NA(iaid=1)
)  # fmt: skip
IS_AT = 2  # an ARP reply
MANY = 2 << 20  # bytes of requests at once
SERVICES = ("DHCP", "RA", "ND", "DHCPv6", "ARP")


@contextlib.contextmanager
def served(lan: Lan, user: User, *options: str) -> Iterator[tuple[Passt, Client]]:
    """A guest of a passt with these options, which has said nothing yet."""
    with passt(lan, user, *options) as server, Client.at(str(server.path)) as client:
        server.expect(ACCEPTED)
        yield server, client


def service(packet: Packet) -> str | None:
    """Which of SERVICES a packet comes from. An announcement of our addresses is no answer."""
    if ARP in packet and packet[ARP].op != IS_AT:
        return None
    kinds = ((BOOTP, "DHCP"), (ICMPv6ND_RA, "RA"), (ICMPv6ND_NA, "ND"), (DHCP6_Advertise, "DHCPv6"), (ARP, "ARP"))
    return next((name for kind, name in kinds if kind in packet), None)


def answers(client: Client) -> dict[str, Packet]:
    """Answers of all services, by service. ARP is the last request, which always has an answer with IPv4."""
    client.send(client.dhcp("discover"), SOLICIT_ROUTER, SOLICIT_NEIGHBOUR, SOLICIT_DHCPV6, client.who_has(GATEWAY))
    found: dict[str, Packet] = {}
    while "ARP" not in found:
        packet = client.expect(lambda p: p if service(p) else None)
        found[service(packet) or ""] = packet
    return found


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ((), ()),
        (("--no-dhcp",), ("DHCP",)),
        (("--no-ra",), ("RA",)),
        (("--no-icmp",), ()),  # of pings only
        (("--no-ndp",), ("RA", "ND")),
        (("--no-dhcpv6",), ("DHCPv6",)),
        (("--no-dhcp", "--no-ndp", "--no-dhcpv6"), ("DHCP", "RA", "ND", "DHCPv6")),
        (("-4",), ("RA", "ND", "DHCPv6")),
    ],
)
def test_services(lan: Lan, ordinary_user: User, options: tuple[str, ...], absent: tuple[str, ...]) -> None:
    """Each can be left out, and the others answer as before."""
    with served(lan, ordinary_user, *options) as (_, client):
        assert set(answers(client)) == set(SERVICES) - set(absent)


def ask(client: Client, *options: Any) -> dict[str | int, Any]:
    """The options of a DHCP offer."""
    client.send(client.dhcp("discover", *options))
    return dict_of(client.expect(lambda p: p if BOOTP in p else None))


def test_names_for_the_guest(lan: Lan, ordinary_user: User) -> None:
    with served(lan, ordinary_user, "-H", "vm", "--fqdn", "vm.lan.test") as (_, client):
        told = ask(client, ("param_req_list", [12, 81]))
        assert told["hostname"] == b"vm"
        assert bytes(told["client_FQDN"]).endswith(b"\x02vm\x03lan\x04test\0")


def test_resolvers_of_the_host(lan: Lan, ordinary_user: User) -> None:
    with served(lan, ordinary_user) as (_, client):
        found = answers(client)
        told, advertised = dict_of(found["DHCP"]), found["RA"]
        assert told["name_server"] == PEER
        assert bytes(told[119]).startswith(b"\x03lan\x04test\0\x04corp")
        assert advertised[ICMPv6NDOptRDNSS].dns == [PEER6]
        assert advertised[ICMPv6NDOptDNSSL].searchlist == ["lan.test.", "corp.test."]


def test_given_resolvers(lan: Lan, ordinary_user: User) -> None:
    given = ("-D", "192.0.2.53", "-D", "2001:db8::53", "-S", "a.test", "-S", "b.test")
    with served(lan, ordinary_user, *given) as (_, client):
        found = answers(client)
        told, advertised = dict_of(found["DHCP"]), found["RA"]
        assert told["name_server"] == "192.0.2.53"
        assert bytes(told[119]).startswith(b"\x01a\x04test\0\x01b")
        assert advertised[ICMPv6NDOptRDNSS].dns == ["2001:db8::53"]
        assert advertised[ICMPv6NDOptDNSSL].searchlist == ["a.test.", "b.test."]


@pytest.mark.parametrize(
    ("option", "code", "kind"),
    [("--no-dhcp-dns", "name_server", ICMPv6NDOptRDNSS), ("--no-dhcp-search", 119, ICMPv6NDOptDNSSL)],
)
def test_what_is_not_told(lan: Lan, ordinary_user: User, option: str, code: str | int, kind: type[Packet]) -> None:
    with served(lan, ordinary_user, option) as (_, client):
        found = answers(client)
        assert code not in dict_of(found["DHCP"])
        assert kind not in found["RA"]


def test_gateway_outside_the_subnet(lan: Lan, ordinary_user: User) -> None:
    """The guest learns by classless routes how to reach it (RFC 3442)."""
    with served(lan, ordinary_user, "-a", "203.0.113.5/32", "-g", "192.0.2.1") as (_, client):
        client.send(client.dhcp("discover"))
        offer = client.expect(lambda p: p if BOOTP in p else None)
        assert offer[BOOTP].yiaddr == "203.0.113.5"
        router = socket.inet_aton("192.0.2.1")
        assert b"\x79\x0e\x20" + router + bytes(4) + b"\0" + router in bytes(offer[BOOTP])


def test_bootp(lan: Lan, ordinary_user: User) -> None:
    """A request without a message type has an answer without one, and without a lease."""
    with served(lan, ordinary_user) as (_, client):
        request = client.dhcp("discover")
        client.send(_as_bootp(request))
        told = dict_of(client.expect(lambda p: p if BOOTP in p else None))
        assert told["subnet_mask"] == "255.255.255.0" and told["router"] == GATEWAY
        assert "message-type" not in told and "lease_time" not in told


def _as_bootp(request: Packet) -> Packet:
    """The same without DHCP's message type."""
    changed = request.copy()
    changed[BOOTP].payload.options = ["end"]
    for layer in (IP, UDP):
        changed[layer].len = changed[layer].chksum = None
    return changed


# The MTU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "mtu"), [(("-m", "1280"), 1280), (("-m", "576"), 576), (("-4", "-m", "68"), 68)])
def test_mtu(lan: Lan, ordinary_user: User, options: tuple[str, ...], mtu: int) -> None:
    """The guest is told, and no packet of a connection is longer, whatever the guest's own segment size."""
    data = random.Random(mtu).randbytes(4000)
    with served(lan, ordinary_user, *options) as (_, client), lan.host.listen("127.0.0.1") as listener:
        found = answers(client)
        assert ("RA" in found) == (mtu >= 1280)
        if "RA" in found:
            assert found["RA"][ICMPv6NDOptMTU].mtu == mtu
        assert client.configure().options["interface-mtu"] == mtu
        connection = client.connect(GATEWAY, listener.getsockname()[1])
        far, _ = listener.accept()
        with far:
            far.sendall(data)
            received, longest = b"", 0
            while len(received) < len(data):
                packet = client.expect(lambda p: p if TCP in p and p[TCP].payload else None)
                if packet[TCP].seq == connection.received:
                    received += bytes(packet[TCP].payload)[: packet[IP].len - 20 - packet[TCP].dataofs * 4]
                    connection.received = (connection.received + packet[IP].len - 20 - packet[TCP].dataofs * 4) % 2**32
                    longest = max(longest, packet[IP].len)
                    connection.send_segment(ACK)
            assert received == data
            assert longest == mtu
            connection.send(data[:1000], mss=mtu - 40)
            assert far.recv(1000, socket.MSG_WAITALL) == data[:1000]


# Clients that come and go -------------------------------------------------------------------------------------------


def descriptors(server: Passt) -> int:
    """How many descriptors passt has open."""
    return len(os.listdir(f"/proc/{server.daemon}/fd"))


def memory(server: Passt) -> int:
    """KiB of passt's resident memory."""
    status = Path(f"/proc/{server.daemon}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_garbage_leaves_nothing_behind(lan: Lan, ordinary_user: User) -> None:
    """Of a hundred clients that send a megabyte of what they like, no memory and no descriptor is left."""
    garbage = random.Random(1).randbytes(1 << 20)
    beginnings = [b"", b"\0", framed([bytes(65535)])[:-1], framed([bytes(14)] * 1000), b"\xff" * 4]
    with passt(lan, ordinary_user) as server:
        before: tuple[int, int] = (0, 0)
        for n in range(100):
            with Client.at(str(server.path)) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                server.expect(ACCEPTED, n + 1)
                client.send_bytes(beginnings[n % 5] + garbage[: 1 << 20 if n % 2 else 3], 1 << 20)
            server.expect(GONE, n + 1)
            if n == 9:
                before = descriptors(server), memory(server)
        assert descriptors(server) == before[0]
        assert memory(server) - before[1] < 4096
        with Client.at(str(server.path)) as client:
            assert client.configure().address == HOST


def test_guest_that_never_reads(lan: Lan, ordinary_user: User) -> None:
    """Queued frames are bounded, the rest is dropped, and services answer when it reads again."""
    with served(lan, ordinary_user) as (server, client):
        client.configure()
        before = memory(server)
        request = framed([client.who_has(PEER)])
        for _ in range(8):
            client.send_bytes(request * (MANY // len(request)), MANY)
        assert memory(server) - before < 24 << 10
        while client.frame(0.5):
            pass
        client.ping(PEER)


def test_statistics_on_a_signal(lan: Lan, ordinary_user: User) -> None:
    """Whether there is a guest, and what it sent and got: frames of a virtual machine are those of its wire."""
    with passt(lan, ordinary_user, "-q") as server:
        os.kill(server.daemon, signal.SIGUSR1)
        server.expect(r"\n  0 guests, ")
        with Client.at(str(server.path)) as client:
            client.configure().ping(PEER)
            os.kill(server.daemon, signal.SIGUSR1)
            server.expect(r"\n  1 guest, ")
            server.expect(r"\n    ping +1 +\S+ +1 +0\n")
            rate = r"[\d.]+(?: [kMG])?"  # of a moment, it may be high
            server.expect(rf"\n  guest -> host +{rate} +[1-9]\d* +{rate} +[1-9]\d*\n")
