"""Multicast of a virtual machine, without QEMU: its reports, queries to it, and frames to and from groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6MLQuery2, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from passt import addr
from passt.wire import igmp
from passt.wire.igmp import IS_EXCLUDE, LEAVE_V2, REPORT_V2, TO_INCLUDE, Query, Record, Report, Single

from ..support import User, wait_for
from ..traffic.support import HOST, Lan
from ..traffic.test_multicast import MDNS4, MDNS6, SSDP4, Member, joined, receives
from .client import GUEST_MAC, Client
from .support import Passt, Standing

LINK_LOCAL = "fe80::ff:fe00:1"
MACS = {MDNS4: "01:00:5e:00:00:fb", SSDP4: "01:00:5e:7f:ff:fa", MDNS6: "33:33:00:00:00:fb"}


@pytest.fixture(scope="module")
def standing(lan: Lan, ordinary_user: User) -> Iterator[Standing]:
    """passt for all tests of this module: each of them is another client."""
    made = Standing(lan, ordinary_user)
    yield made
    made.close()


@pytest.fixture
def client(server: Passt) -> Iterator[Client]:
    with Client.at(str(server.path)) as made:
        yield made.configure()


def says(client: Client, message: Single | Report) -> None:
    """A report or a leave, as a kernel sends it."""
    v6 = isinstance(message, Report) and message.size == 16
    src = LINK_LOCAL if v6 else client.address
    header = Ether(src=GUEST_MAC, dst="33:33:00:00:00:16" if v6 else "01:00:5e:00:00:16", type=0x86DD if v6 else 0x800)
    to = addr.packed("ff02::16" if v6 else "224.0.0.22")
    client.send(bytes(header) + igmp.packet(addr.packed(src), to, message.emit()))


def datagram(frame: Packet, group: str, payload: bytes) -> Packet | None:
    """A frame with that datagram to a group."""
    layer = frame.getlayer(IPv6 if ":" in group else IP)
    found = layer is not None and layer.dst == group and UDP in frame and bytes(frame[UDP].payload) == payload
    return frame if found else None


def test_queries_when_a_machine_comes(server: Passt) -> None:
    """It may have joined before passt was started again."""
    with Client.at(str(server.path)) as client:
        client.arp("198.51.100.1")
        four = client.expect(lambda frame: frame if IP in frame and frame[IP].proto == 2 else None)
        assert (four.dst, four[IP].dst, four[IP].ttl) == ("01:00:5e:00:00:01", "224.0.0.1", 1)
        query = igmp.parse(bytes(four[IP].payload), 4)
        assert isinstance(query, Query) and query.group == addr.ANY4
    with Client.at(str(server.path)) as client:
        client.arp("198.51.100.1")
        six = client.expect(lambda frame: frame if ICMPv6MLQuery2 in frame else None)
        assert (six.dst, six[IPv6].dst, six[IPv6].hlim) == ("33:33:00:00:00:01", "ff02::1", 1)


@pytest.mark.parametrize(("group", "port"), [(MDNS4, 5353), (SSDP4, 1900), (MDNS6, 5353)])
def test_both_ways(client: Client, lan: Lan, group: str, port: int) -> None:
    peer = Member(lan.peer, group, port)
    packed = addr.packed(group)
    says(client, Report(len(packed), (Record(IS_EXCLUDE, packed),)))
    wait_for(lambda: receives(lan.host, group, port), "the host joins")
    peer.send(b"query")
    frame = client.expect(lambda frame: datagram(frame, group, b"query"))
    assert (frame.dst, frame[UDP].sport, frame[UDP].dport) == (MACS[group], port, port)
    network = IPv6(src=LINK_LOCAL, dst=group, hlim=255) if ":" in group else IP(src=client.address, dst=group, ttl=255)
    client.send(Ether(src=GUEST_MAC, dst=MACS[group]) / network / UDP(sport=port, dport=port) / b"answer")
    sender = peer.hears(b"answer")
    assert sender[1] == port
    assert sender[0] == HOST or ":" in group
    peer.send(b"next")
    copies: list[Packet] = []

    def until_next(frame: Packet) -> Packet | None:
        copies.extend(filter(None, [datagram(frame, group, b"answer")]))
        return datagram(frame, group, b"next")

    client.expect(until_next)
    assert copies == [], "its own"
    says(client, Report(len(packed), (Record(TO_INCLUDE, packed),)))
    wait_for(lambda: not joined(lan.host, group), "the host leaves")


def test_version_2(client: Client, lan: Lan) -> None:
    says(client, Single(REPORT_V2, addr.packed(MDNS4)))
    wait_for(lambda: joined(lan.host, MDNS4), "the host joins")
    says(client, Single(LEAVE_V2, addr.packed(MDNS4)))
    wait_for(lambda: not joined(lan.host, MDNS4), "the host leaves")


def test_a_machine_that_goes_leaves_its_groups(server: Passt, lan: Lan) -> None:
    with Client.at(str(server.path)) as client:
        says(client.configure(), Single(REPORT_V2, addr.packed(MDNS4)))
        wait_for(lambda: joined(lan.host, MDNS4), "the host joins")
    wait_for(lambda: not joined(lan.host, MDNS4), "the host leaves")
