"""Multicast from inside: what a guest joins is joined on the host's interface, and discovery works both ways."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from ..support import User, wait_for
from .support import GATEWAY, HOST, PEER, Guest, Lan, Namespace

MDNS4, MDNS6, SSDP4, SSDP6 = "224.0.0.251", "ff02::fb", "239.255.255.250", "ff05::c"
LLMNR4, LLMNR6 = "224.0.0.252", "ff02::1:3"
SSM, ASM = "232.9.8.7", "239.9.8.7"
DISCOVERY = [(MDNS4, 5353), (MDNS6, 5353), (SSDP4, 1900), (SSDP6, 1900), (LLMNR4, 5355), (LLMNR6, 5355)]
NO_PORTS = "-u", "none", "-U", "none"
QUIET = 0.3  # s in which nothing may come; what would, has come before the answer that is waited for first
_STORAGE = 128


def family_of(group: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in group else socket.AF_INET


def index_in(where: Namespace) -> int:
    index: int = where.show("link", "show", "eth0")[0]["ifindex"]
    return index


class Member:
    """A program in a namespace, at a port of a group: a responder, which shares the port with others."""

    def __init__(self, where: Namespace, group: str, port: int, *, join: bool = True, bind: bool = True) -> None:
        self.group, self.port, self.v6 = group, port, ":" in group
        self.index = index_in(where)
        self.sock = where.make_socket(family_of(group), socket.SOCK_DGRAM)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            self.sock.setsockopt(socket.SOL_SOCKET, option, 1)
        if bind:
            self.sock.bind(("::" if self.v6 else "0.0.0.0", port))
        if self.v6:
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, self.index)
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        else:
            mreqn = struct.pack("=4s4si", bytes(4), bytes(4), self.index)
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        if join:
            self.join()

    def join(self) -> None:
        self._membership(socket.IP_ADD_MEMBERSHIP, socket.IPV6_JOIN_GROUP)

    def leave(self) -> None:
        self._membership(socket.IP_DROP_MEMBERSHIP, socket.IPV6_LEAVE_GROUP)

    def _membership(self, four: int, six: int) -> None:
        packed = socket.inet_pton(family_of(self.group), self.group)
        if self.v6:
            self.sock.setsockopt(socket.IPPROTO_IPV6, six, packed + struct.pack("=I", self.index))
        else:
            self.sock.setsockopt(socket.IPPROTO_IP, four, packed + bytes(4) + struct.pack("=i", self.index))

    def join_source(self, source: str) -> None:
        """Of IPv4: struct ip_mreq_source is group, interface, source."""
        request = b"".join(socket.inet_aton(a) for a in (self.group, "0.0.0.0", source))
        self.sock.setsockopt(socket.IPPROTO_IP, 39, request)  # IP_ADD_SOURCE_MEMBERSHIP

    def send(self, payload: bytes) -> None:
        self.sock.sendto(payload, (self.group, self.port, 0, self.index) if self.v6 else (self.group, self.port))

    def hears(self, payload: bytes) -> tuple[str, int]:
        """Wait for that datagram, past others; returns its sender."""
        while True:
            data, sender = self.sock.recvfrom(4096)
            if data == payload:
                return sender[0].partition("%")[0], sender[1]

    def silent(self) -> bool:
        """Whether nothing comes."""
        self.sock.settimeout(QUIET)
        try:
            self.sock.recvfrom(4096)
        except TimeoutError:
            return True
        return False


def joined(where: Namespace, group: str) -> bool:
    """Whether the kernel has joined on eth0 (/proc/net/igmp, /proc/net/igmp6)."""
    packed = socket.inet_pton(family_of(group), group)
    if ":" in group:
        lines = where.run("cat", "/proc/net/igmp6").stdout.splitlines()
        return any(line.split()[1:3] == ["eth0", packed.hex()] for line in lines)
    wanted, device = packed[::-1].hex().upper(), ""
    for line in where.run("cat", "/proc/net/igmp").stdout.splitlines()[1:]:
        fields = line.split()
        if not line.startswith("\t"):
            device = fields[1]
        elif device == "eth0" and fields[0] == wanted:
            return True
    return False


def member(guest: Guest, lan: Lan, group: str, port: int) -> Member:
    """A member in the guest, which the host follows at that port."""
    inside = Member(guest, group, port)
    wait_for(lambda: receives(lan.host, group, port), f"the host joins {group}")
    return inside


def receives(host: Namespace, group: str, port: int) -> bool:
    """Whether a socket is bound to that port of a group."""
    at = f"[{group}]" if ":" in group else group
    bound = [line.split()[3].replace("%eth0", "") for line in host.run("ss", "-Hun", "-a").stdout.splitlines()]
    return joined(host, group) and f"{at}:{port}" in bound


@pytest.fixture(scope="module")
def others(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest whose programs' ports are not opened on the host, which may have its own there."""
    with lan.pasta(ordinary_user, "-q", "--config-net", *NO_PORTS) as made:
        yield made


@pytest.fixture
def plain(others: Guest, lan: Lan) -> Iterator[Guest]:
    yield from lan.lend(others)


@pytest.mark.parametrize(("group", "port"), DISCOVERY)
def test_both_ways_beside_a_responder_of_the_host(plain: Guest, lan: Lan, group: str, port: int) -> None:
    """Peer, host and guest hear each other, at one port; none hears a datagram of its own from outside."""
    peer, host = Member(lan.peer, group, port), Member(lan.host, group, port)
    inside = member(plain, lan, group, port)
    for speaker in (peer, host, inside):
        text = f"of {speaker.index} {id(speaker)}".encode()
        speaker.send(text)
        senders = {listener: listener.hears(text) for listener in (peer, host, inside)}
        assert {port for _, port in senders.values()} == {port}
        if speaker is inside and ":" not in group:
            assert senders[peer][0] == senders[host][0] == HOST
        if speaker is host and ":" not in group:
            assert senders[inside][0] == GATEWAY, "the guest has the host's address itself"
    assert inside.silent(), "a copy of its own datagram has come back"
    assert joined(lan.host, group)
    for one in (inside, host):
        one.sock.close()
    wait_for(lambda: not joined(lan.host, group), "the host leaves")


@pytest.mark.parametrize(("group", "port"), [(SSDP4, 1900), (SSDP6, 1900), (LLMNR4, 5355)])
def test_search_from_inside(plain: Guest, lan: Lan, group: str, port: int) -> None:
    """SSDP: a search from any port, and devices on the host and beyond that answer it by unicast."""
    devices = [Member(where, group, port) for where in (lan.peer, lan.host)]
    control_point = Member(plain, group, port, join=False, bind=False)
    control_point.send(b"M-SEARCH * HTTP/1.1\r\n")
    for device in devices:
        _, sender = device.sock.recvfrom(4096)
        device.sock.sendto(b"HTTP/1.1 200 OK\r\n", sender)
    answers = [control_point.sock.recvfrom(4096) for _ in devices]
    assert {data for data, _ in answers} == {b"HTTP/1.1 200 OK\r\n"}
    assert {sender[1] for _, sender in answers} == {port}


def test_search_from_outside(plain: Guest, lan: Lan) -> None:
    """A device inside answers the searcher by unicast, from the port that it was asked at (RFC 6762, 6.7)."""
    Member(lan.host, MDNS4, 5353)  # a responder on the host has the port
    device = member(plain, lan, MDNS4, 5353)
    searcher = Member(lan.peer, MDNS4, 5353, join=False, bind=False)
    searcher.sock.bind((PEER, 0))
    device.sock.settimeout(0.5)  # the responder on the host has joined, so the join of ours does not show there

    def asked() -> Any:
        searcher.send(b"who?")
        with contextlib.suppress(TimeoutError):
            return device.sock.recvfrom(4096)[1]
        return None

    device.sock.sendto(b"me", wait_for(asked, "a question"))
    assert searcher.hears(b"me") == (HOST, 5353)


@pytest.mark.parametrize("group", [MDNS4, MDNS6])
def test_leave_is_followed_at_once(plain: Guest, lan: Lan, group: str) -> None:
    inside = member(plain, lan, group, 5353)
    inside.leave()
    wait_for(lambda: not joined(lan.host, group), "the host leaves")
    inside.join()
    wait_for(lambda: joined(lan.host, group), "the host joins")


def test_versions_of_igmp_and_mld(plain: Guest, lan: Lan) -> None:
    for version in ("2", "3"):
        plain.write("/proc/sys/net/ipv4/conf/eth0/force_igmp_version", version)
        inside = member(plain, lan, MDNS4, 5353)
        inside.sock.close()
        wait_for(lambda: not joined(lan.host, MDNS4), "the host leaves")
    for version in ("1", "2"):
        plain.write("/proc/sys/net/ipv6/conf/eth0/force_mld_version", version)
        inside = member(plain, lan, MDNS6, 5353)
        inside.sock.close()
        wait_for(lambda: not joined(lan.host, MDNS6), "the host leaves")


def test_sources_of_a_group(plain: Guest, lan: Lan) -> None:
    """Source-specific multicast: the host asks for that source alone (/proc/net/mcfilter)."""
    inside = Member(plain, SSM, 7654, join=False)
    inside.send(b"so that its port is known")
    inside.join_source(GATEWAY)
    wait_for(lambda: receives(lan.host, SSM, 7654), "the host joins")
    filters = [line.split() for line in lan.host.run("cat", "/proc/net/mcfilter").stdout.splitlines()]
    here = [(f[3], f[4]) for f in filters if f[2] == "0x" + socket.inet_aton(SSM).hex()]
    assert here == [("0x" + socket.inet_aton(GATEWAY).hex(), "1")]
    source = Member(lan.peer, SSM, 7654, join=False)
    source.send(b"channel")
    assert inside.hears(b"channel") == (GATEWAY, 7654)


def test_any_port_that_leads_to_the_guest(guest: Guest, lan: Lan) -> None:
    """By default that is each port that is bound inside."""
    inside = Member(guest, ASM, 7655)
    wait_for(lambda: receives(lan.host, ASM, 7655), "the host joins")
    peer = Member(lan.peer, ASM, 7655, join=False)
    peer.send(b"stream")
    assert inside.hears(b"stream") == (GATEWAY, 7655)
    assert inside.silent(), "the listener at the port has handed it on, too"


def test_without_multicast(lan: Lan, ordinary_user: User) -> None:
    with lan.pasta(ordinary_user, "-q", "--config-net", *NO_PORTS, "--no-multicast") as guest:
        peer = Member(lan.peer, SSDP4, 1900)
        inside = Member(guest, SSDP4, 1900)
        server = lan.peer.listen(PEER, socket.SOCK_DGRAM)
        client = guest.connect(PEER, server.getsockname()[1], socket.SOCK_DGRAM)
        peer.send(b"outside")
        inside.send(b"inside")
        assert peer.hears(b"outside"), "its own"
        client.send(b"in order")
        server.settimeout(5)
        assert server.recv(100) == b"in order"
        assert peer.silent()
        assert not joined(lan.host, SSDP4)
        lan.peer.close_sockets()


def test_a_guest_that_joins_all_it_can(plain: Guest, lan: Lan) -> None:
    """No more than 16 in a second are told to the network of the host; others are served meanwhile."""
    plain.write("/proc/sys/net/ipv4/igmp_max_memberships", "2000")
    groups = [f"239.9.{i >> 8}.{i & 255}" for i in range(500)]
    greedy = Member(plain, ASM, 7656, join=False)
    for greedy.group in groups:
        greedy.join()
    peer = lan.peer.listen(PEER, socket.SOCK_DGRAM)
    client = plain.connect(PEER, peer.getsockname()[1], socket.SOCK_DGRAM)
    client.send(b"still here")
    assert peer.recv(100) == b"still here"

    def followed() -> set[str]:
        """The groups on the host. The guest sends to each of them from another port, so that theirs is known."""
        sender = Member(plain, ASM, 7656, join=False, bind=False)
        with sender.sock:
            for sender.group in groups:
                sender.send(b"so that its port is known")
        lines = lan.host.run("cat", "/proc/net/igmp").stdout.splitlines()
        return {fields[0] for fields in map(str.split, lines) if fields[0].endswith("09EF")}

    wait_for(followed, "the host joins some")  # the guest's kernel reports after a moment
    assert len(followed()) <= 64


def test_version_1_of_igmp(plain: Guest, lan: Lan) -> None:
    """It has no leave, and a host of it is believed to be there for a while: the last test here."""
    plain.write("/proc/sys/net/ipv4/conf/eth0/force_igmp_version", "1")
    member(plain, lan, MDNS4, 5353).sock.close()
