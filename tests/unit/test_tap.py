"""The way in: a socket pair stands for the tap (one read, one frame), recording fakes for the services.

tap = start()                        a Tap with both families on
tap.put(frame, ...); tap.read()      frames arrive, the loop calls the handler until nothing waits
tap.calls                            who was called, with copies of what lay in the pool
tap.drops                            what was counted
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    fragment6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from passt import addr
from passt.drops import Reason
from passt.flow.ip_fields import DF
from passt.flow.table import Flow
from passt.link.packet import FRAME_ROOM
from passt.link.plain_tap import PlainLink
from passt.link.tap_device import BUDGET_MAX, BULK, PATIENCE, TapLink
from passt.loop.reactor import EPOLLIN, TYPE_TAP, make_ref
from passt.policy.guest import Guest
from passt.policy.rules import Rule
from passt.tap import Tap
from passt.wire.checksum import PROTO_TCP, checksum
from passt.wire.cursor import Malformed
from passt.wire.virtio import F_NEEDS_CSUM, GSO_UDP_L4, NO_OFFLOAD, VNET, VNET_LEN
from tests.unit.support import (
    GATEWAY4,
    GUEST4,
    GUEST6,
    GUEST_LL,
    GUEST_MAC,
    IP4,
    IP6,
    OUR_MAC,
    T0,
    make_context,
    reactor,
    reconfigure,
    stage_faults,
)

PEER4, PEER6 = addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7")
OTHER_MAC = bytes.fromhex("525400999999")
PARTIAL = VNET.pack(F_NEEDS_CSUM, 0, 0, 0, 34, 6)  # whose checksum is to be completed
Call = tuple[str, tuple[Any, ...]]


class Service:
    """Any service: notes calls in `calls`, raises `error` if it is set."""

    def __init__(self, name: str, tap: FakeTap) -> None:
        self._name, self._tap = name, tap
        self.error: Exception | None = None
        self.answer: bytes | None = None

    def tap_handler(self, *args: Any) -> bytes | None:
        self._tap.calls.append((self._name, self._tap.copied(self._name, args)))
        if self.error is not None:
            raise self.error
        return self.answer

    def set_class(self, key: bytes) -> None:
        self._tap.calls.append((f"{self._name} class", (key, self._tap.ctx.classes[key])))

    def forget_class(self, key: bytes) -> None:
        self._tap.calls.append((f"{self._name} class forgotten", (key,)))

    def fault_key(self, key: bytes) -> None:
        self._tap.calls.append((f"{self._name} fault", (key,)))

    def forget(self) -> None:
        self._tap.calls.append((f"{self._name} forget", ()))


class FakeTap:
    """The device, the tap module, and what it called."""

    def __init__(self, *, vnet: bool = True, **config: Any) -> None:
        self.ctx = make_context(pool_size=1 << 18, **config)
        self.calls: list[Call] = []
        self.services = {n: Service(n, self) for n in ("arp", "ndp", "dhcp", "dhcpv6", "icmp", "udp", "tcp")}
        self.device, self.guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device.setblocking(False)
        drops = self.ctx.drops
        fd = self.device.fileno()
        self.link = TapLink(fd, drops, uso=True) if vnet else PlainLink(fd, drops)
        self.ctx.link = self.link
        self.register()
        self.tap = Tap(self.ctx, udp=cast(Any, self.services["udp"]), tcp=cast(Any, self.services["tcp"]))
        self.link.start(self.ctx.reactor, self.ctx.pool, self.tap)
        self.now = T0

    def register(self) -> None:
        """As the services do themselves."""
        take, fakes = self.ctx.services, cast(Any, self.services)
        take.take_ethertype(0x0806, fakes["arp"].tap_handler)
        take.take_port(True, 67, fakes["dhcp"].tap_handler)
        take.take_port(False, 547, fakes["dhcpv6"].tap_handler)
        take.take_icmp(True, (8,), fakes["icmp"].tap_handler, fragments=True)
        take.take_icmp(False, (128,), fakes["icmp"].tap_handler, fragments=True)
        take.take_icmp(False, range(133, 138), fakes["ndp"].tap_handler)
        for name in ("tcp", "udp", "icmp"):
            take.on_forget.append(fakes[name].forget)

    def copied(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the handler `name`, without the time, with the bytes at offsets instead of the offsets."""
        args = tuple(bytes(a) if isinstance(a, memoryview) else a for a in args if a != self.now)
        if name == "tcp":
            flat = args[1]
            self.hops = args[2]
            return args[0], [self.ctx.pool.copy(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]
        if name == "udp":
            flat = args[1]
            triples = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
            return args[0], [(self.ctx.pool.copy(a, b), gso) for a, b, gso in triples], *args[2:]
        return args

    def put(self, *frames: bytes | Packet, vnet: bytes = NO_OFFLOAD) -> None:
        for f in frames:
            self.guest.send(vnet + bytes(f))

    @property
    def readable(self) -> bool:
        return bool(select.select([self.device], [], [], 0)[0])

    def turn(self) -> None:
        """One call of the handler."""
        reactor(self.ctx).fire(self.device.fileno(), EPOLLIN, self.now)

    def read(self) -> list[Call]:
        """Turns until nothing waits; the calls they made."""
        self.calls = []
        while self.readable:
            self.turn()
        return self.calls

    def batch(self, *frames: bytes | Packet, vnet: bytes = NO_OFFLOAD) -> list[Call]:
        """Frames that are read in one turn; the calls they make."""
        self.link._budget = BUDGET_MAX
        self.put(*frames, vnet=vnet)
        self.calls = []
        self.turn()
        assert not self.readable
        return self.calls

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.ctx.drops)

    def close(self) -> None:
        self.device.close()
        self.guest.close()


Start = Callable[..., FakeTap]


@pytest.fixture
def start() -> Iterator[Start]:
    taps: list[FakeTap] = []

    def begin(**config: Any) -> FakeTap:
        taps.append(FakeTap(**config))
        return taps[-1]

    yield begin
    for t in taps:
        t.close()


@pytest.fixture
def tap(start: Start) -> FakeTap:
    return start()


# Frames ------------------------------------------------------------------------------------------------------------


def ether(inner: Packet, src: bytes = GUEST_MAC) -> bytes:
    return bytes(Ether(src=addr.mac_text(src), dst=addr.mac_text(OUR_MAC)) / inner)


def ip4(inner: Packet, src: bytes = GUEST4, dst: bytes = PEER4, **fields: Any) -> bytes:
    return ether(IP(src=addr.text(src), dst=addr.text(dst), **fields) / inner)


def ip6(inner: Packet, src: bytes = GUEST6, dst: bytes = PEER6, **fields: Any) -> bytes:
    return ether(IPv6(src=addr.text(src), dst=addr.text(dst), **fields) / inner)


def udp(data: bytes = b"data", sport: int = 1000, dport: int = 2000) -> Packet:
    return UDP(sport=sport, dport=dport) / Raw(data)


def tcp(data: bytes = b"data", sport: int = 1000, dport: int = 2000, **fields: Any) -> Packet:
    return TCP(sport=sport, dport=dport, **fields) / Raw(data)


def key4(sport: int = 1000, dport: int = 2000) -> bytes:
    return GUEST4 + PEER4 + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")


def key6(sport: int = 1000, dport: int = 2000) -> bytes:
    return GUEST6 + PEER6 + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")


def changed(frame: bytes, at: int, value: bytes) -> bytes:
    """`frame` with `value` at offset `at`."""
    return frame[:at] + value + frame[at + len(value) :]


def resummed(frame: bytes) -> bytes:
    """With the sum of its IPv4 header, which was changed, as it should be."""
    return (
        changed(frame, 24, bytes(2))[:24]
        + checksum(changed(frame, 24, bytes(2))[14:34]).to_bytes(2, "big")
        + frame[26:]
    )


def tagged(frame: bytes, tci: int = 0x6000, kind: int = 0x8100) -> bytes:
    """With a tag behind the addresses; VLAN 0 is a priority alone."""
    return frame[:12] + kind.to_bytes(2, "big") + tci.to_bytes(2, "big") + frame[12:]


# Handlers of packets -------------------------------------------------------------------------------------------------


def test_arp(tap: FakeTap) -> None:
    packet = ARP(psrc="192.0.2.2", pdst="192.0.2.1")
    ((name, (mac, payload)),) = tap.batch(ether(packet))
    assert (name, mac) == ("arp", GUEST_MAC)
    assert payload == bytes(packet)


@pytest.mark.parametrize("v4", [True, False])
def test_tcp(tap: FakeTap, v4: bool) -> None:
    ((name, (key, segments)),) = tap.batch(ip4(tcp()) if v4 else ip6(tcp()))
    assert (name, key) == ("tcp", key4() if v4 else key6())
    assert [s[20:] for s in segments] == [b"data"]


@pytest.mark.parametrize("v4", [True, False])
def test_udp(tap: FakeTap, v4: bool) -> None:
    calls = tap.batch(ip4(udp(), ttl=7) if v4 else ip6(udp(), hlim=7))
    assert calls == [("udp", (key4() if v4 else key6(), [(b"data", 0)], 7 if v4 else DF | 7))]


@pytest.mark.parametrize("v4", [True, False])
def test_an_address_that_an_option_fixes_is_not_observed(start: Start, v4: bool) -> None:
    """Of the other family, and of link scope, it is."""
    other4, other6, own_ll = addr.packed("192.0.2.9"), addr.packed("2001:db8::9"), addr.packed("fe80::9")
    config = {"ip4": replace(IP4, fixed=True)} if v4 else {"ip6": replace(IP6, fixed=True)}
    tap = start(**config)
    before = tap.ctx.guest.addr4, tap.ctx.guest.addr6
    tap.batch(ip4(udp(), src=other4), ip6(udp(), src=other6), ip6(udp(), src=own_ll), ip4(ICMP(), src=other4))
    now = tap.ctx.guest.addr4, tap.ctx.guest.addr6
    assert now == ((before[0], other6) if v4 else (other4, before[1]))
    assert tap.ctx.guest.addr6_ll == own_ll


@pytest.mark.parametrize("v4", [True, False])
@pytest.mark.parametrize("tos", [0, 0xB8, 0x03, 0xFF])
def test_traffic_class(tap: FakeTap, v4: bool, tos: int) -> None:
    frame = ip4(udp(), ttl=7, tos=tos, flags="DF") if v4 else ip6(udp(), hlim=7, tc=tos, fl=0xFFFFF)
    ((_, (_, _, fields)),) = tap.batch(frame)
    assert fields == DF | tos << 8 | 7


@pytest.mark.parametrize(("flags", "df"), [("DF", DF), (0, 0)])
def test_dont_fragment(tap: FakeTap, flags: Any, df: int) -> None:
    ((_, (_, _, fields)),) = tap.batch(ip4(udp(), ttl=64, flags=flags))
    assert fields == df | 64


@pytest.mark.parametrize(("v4", "most"), [(True, 1472), (False, 1452)])
def test_packets_above_1500_bytes_may_be_fragmented(tap: FakeTap, v4: bool, most: int) -> None:
    def frame(n: int) -> Any:
        return ip4(udp(bytes(n)), flags="DF") if v4 else ip6(udp(bytes(n)))

    ((_, (_, _, fits)),) = tap.batch(frame(most))
    ((_, (_, _, beyond)),) = tap.batch(frame(most + 1))
    assert (fits & DF, beyond & DF) == (DF, 0)


@pytest.mark.parametrize("v4", [True, False])
def test_the_class_of_a_connection_is_told_when_it_changes(tap: FakeTap, v4: bool) -> None:
    def segment(tos: int, sport: int = 1000) -> Any:
        packet = tcp()
        packet.sport = sport
        return ip4(packet, tos=tos) if v4 else ip6(packet, tc=tos)

    told = [call for tos in (0, 2, 0xB9, 0xB8, 0x48, 0x03, 0) for call in tap.batch(segment(tos))]
    key = key4() if v4 else key6()
    assert [call for call in told if call[0] == "tcp class"] == [("tcp class", (key, tos)) for tos in (0xB8, 0x48, 0)]
    names = [name for name, _ in tap.batch(segment(0xB8), segment(0, 7))]
    assert names == ["tcp class", "tcp", "tcp", "tcp class forgotten"], "the segments that have it leave with it"


def test_datagrams_with_other_fields_are_a_group_of_their_own(tap: FakeTap) -> None:
    """In their order."""
    calls = tap.batch(*(ip4(udp(d), tos=tos, ttl=1) for d, tos in ((b"a", 0), (b"b", 0), (b"c", 8), (b"d", 0))))
    groups = [([d for d, _ in datagrams], fields) for _, (_, datagrams, fields) in calls]
    assert groups == [([b"a", b"b"], 1), ([b"c"], 0x801), ([b"d"], 1)]


def test_empty_datagram(tap: FakeTap) -> None:
    assert tap.batch(ip4(udp(b"")))[0][1][1] == [(b"", 0)]


def test_udp_super_frame_keeps_its_size(tap: FakeTap) -> None:
    vnet = VNET.pack(F_NEEDS_CSUM, GSO_UDP_L4, 42, 1000, 34, 6)
    ((_, (_, datagrams, _)),) = tap.batch(ip4(udp(bytes(4500))), vnet=vnet)
    assert datagrams == [(bytes(4500), 1000)]


@pytest.mark.parametrize("size", [1, 12, 100])
def test_datagrams_of_a_super_frame_are_as_many_as_a_kernel_makes(tap: FakeTap, size: int) -> None:
    """A frame of 64 KiB in datagrams of a byte would cost as many sends."""
    vnet = VNET.pack(F_NEEDS_CSUM, GSO_UDP_L4, 42, size, 34, 6)
    most = bytes(128 * size)
    ((_, (_, datagrams, _)),) = tap.batch(ip4(udp(most)), vnet=vnet)
    assert datagrams == [(most, size)]
    assert tap.batch(ip4(udp(most + b"x")), vnet=vnet) == []
    assert tap.drops == {"udp: too many datagrams in a frame": 1}


@pytest.mark.parametrize("v4", [True, False])
def test_echo_request(tap: FakeTap, v4: bool) -> None:
    echo = (ICMP(id=7, seq=1) if v4 else ICMPv6EchoRequest(id=7, seq=1, data=b"")) / Raw(b"ping")
    ((name, (mac, src, dst, message, fields)),) = tap.batch(
        ip4(echo, ttl=3, tos=0xB8, flags="DF") if v4 else ip6(echo, hlim=3, tc=0xB8)
    )
    assert (name, mac) == ("icmp", GUEST_MAC)
    assert (src, dst) == (GUEST4 if v4 else GUEST6, PEER4 if v4 else PEER6)
    assert message[0] == (8 if v4 else 128) and message[-4:] == b"ping" and fields == DF | 0xB803


def test_neighbour_discovery(tap: FakeTap) -> None:
    ((name, (mac, src, dst, message, fields)),) = tap.batch(ip6(ICMPv6ND_NS(tgt="fe80::1"), src=GUEST_LL, hlim=255))
    assert (name, mac, src, dst) == ("ndp", GUEST_MAC, GUEST_LL, PEER6)
    assert message[0] == 135 and fields == DF | 255


def test_dhcp(tap: FakeTap) -> None:
    frame = ip4(udp(b"discover", 68, 67), src=addr.ANY4, dst=addr.BROADCAST4)
    assert tap.batch(frame) == [("dhcp", (GUEST_MAC, addr.ANY4, addr.BROADCAST4, 68, b"discover"))]
    assert tap.ctx.guest.addr4 == GUEST4  # 0.0.0.0 is the address of no host


def test_dhcpv6_and_what_it_gave(tap: FakeTap) -> None:
    tap.services["dhcpv6"].answer = addr.packed("2001:db8::77")
    calls = tap.batch(ip6(udp(b"solicit", 546, 547), src=GUEST_LL, dst=addr.packed("ff02::1:2")))
    assert calls == [("dhcpv6", (GUEST_MAC, GUEST_LL, addr.packed("ff02::1:2"), 546, b"solicit"))]
    assert tap.ctx.guest.addr6 == addr.packed("2001:db8::77")


def test_ports_of_the_other_family_are_ordinary(tap: FakeTap) -> None:
    calls = tap.batch(ip4(udp(dport=547)), ip6(udp(dport=67)))
    assert [name for name, _ in calls] == ["udp", "udp"]


# Where a packet ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v4", [True, False])
@pytest.mark.parametrize("pad", [1, 18, 1000])
def test_padding_is_no_payload(tap: FakeTap, v4: bool, pad: int) -> None:
    build = ip4 if v4 else ip6
    calls = tap.batch(build(tcp(b"ab")) + b"P" * pad, build(udp(b"ab")) + b"P" * pad)
    assert calls[0][1][1][0][20:] == b"ab"
    assert calls[1][1][1] == [(b"ab", 0)]


def test_bytes_behind_the_datagram_are_no_payload(tap: FakeTap) -> None:
    shorter = changed(ip4(udp(b"abcdef")), 14 + 20 + 4, (8 + 3).to_bytes(2, "big"))
    assert tap.batch(shorter, vnet=PARTIAL)[0][1][1] == [(b"abc", 0)]


def test_ipv4_options(tap: FakeTap) -> None:
    options = b"\x07\x07\x04\0\0\0\0\0"  # record route, end
    calls = tap.batch(ip4(tcp(), options=[]), ip4(tcp(b"opt"), ihl=7, options=options), ip4(udp(), options=options))
    assert [(name, args[0]) for name, args in calls] == [("tcp", key4()), ("udp", key4())]
    assert [s[20:] for s in calls[0][1][1]] == [b"data", b"opt"]
    assert calls[1][1][1] == [(b"data", 0)]


def test_ipv6_extension_headers(tap: FakeTap) -> None:
    headers = IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt()
    calls = tap.batch(ip6(headers / tcp()), ip6(headers / udp()), ip6(headers / ICMPv6EchoRequest(data=b"x")))
    assert sorted(name for name, _ in calls) == ["icmp", "tcp", "udp"]
    assert [args[0] for name, args in calls if name != "icmp"] == [key6(), key6()]


def test_atomic_fragment_is_whole(tap: FakeTap) -> None:
    calls = tap.batch(ip6(IPv6ExtHdrFragment(offset=0, m=0) / udp()))
    assert calls[0][1][1] == [(b"data", 0)]


# Dropped packets -----------------------------------------------------------------------------------------------------

V4, V6 = ip4(udp()), ip6(udp())
T4 = ip4(tcp())
L4 = 14 + 20
L6 = 14 + 40


def pieces(inner: Packet, v4: bool, ident: int = 1, tos: int = 0) -> list[bytes]:
    """The frames of a fragmented packet."""
    mac = Ether(src=addr.mac_text(GUEST_MAC), dst=addr.mac_text(OUR_MAC))
    if v4:
        whole = IP(src=addr.text(GUEST4), dst=addr.text(PEER4), id=ident, tos=tos) / inner
        return [bytes(mac / p) for p in fragment(whole, 1000)]
    whole = IPv6(src=addr.text(GUEST6), dst=addr.text(PEER6), tc=tos) / IPv6ExtHdrFragment(id=ident) / inner
    return [bytes(mac / p) for p in fragment6(whole, 1000)]


OPTIONS4 = ip4(tcp(), options=[IPOption(b"\x07\x07\x04" + bytes(4) + b"\0")])


DROPPED = {
    "empty": (b"", "truncated"),
    "no vnet header": (None, "truncated"),
    "half an Ethernet header": (V4[:13], "truncated"),
    "Ethernet header alone": (V4[:12] + b"\x90\0", "truncated"),
    "unknown EtherType": (changed(V4, 12, b"\x88\xcc"), "ethertype"),
    "VLAN": (tagged(V4, 1), "vlan"),
    "VLAN of a provider": (tagged(V6, 0x8001, 0x88A8), "vlan"),
    "two priority tags": (tagged(tagged(V4)), "ethertype"),
    "short tagged frame": (tagged(V4)[: 18 + 19], "ipv4 length"),
    "IPv4 header checksum": (changed(V4, 22, b"\1"), "ipv4 checksum"),
    "IPv4 header checksum, TCP": (changed(T4, 22, b"\1"), "ipv4 checksum"),
    "IPv4 header checksum, ICMP": (changed(ip4(ICMP()), 22, b"\1"), "ipv4 checksum"),
    "IPv4 header checksum, fragment": (changed(ip4(Raw(bytes(8)), proto=17, flags="MF"), 22, b"\1"), "ipv4 checksum"),
    "TCP checksum": (changed(T4, len(T4) - 1, b"!"), "tcp checksum"),
    "TCP checksum, IPv6": (changed(ip6(tcp()), 60, b"!"), "tcp checksum"),
    "TCP checksum, IPv4 options": (changed(OPTIONS4, len(OPTIONS4) - 1, b"!"), "tcp checksum"),
    "UDP checksum": (changed(V4, len(V4) - 1, b"!"), "udp checksum"),
    "UDP checksum, IPv6": (changed(V6, len(V6) - 1, b"!"), "udp checksum"),
    "no UDP checksum, IPv6": (changed(V6, 60, bytes(2)), "udp checksum"),
    "UDP checksum of DHCP": (changed(ip4(udp(dport=67)), 44, b"!"), "udp checksum"),
    "ICMP checksum": (changed(ip4(ICMP()), 37, b"!"), "icmp checksum"),
    "ICMPv6 checksum": (changed(ip6(ICMPv6EchoRequest()), 58, b"!"), "icmp checksum"),
    "neighbour solicitation's checksum": (
        changed(ip6(ICMPv6ND_NS(tgt="fe80::1"), src=GUEST_LL, hlim=255), 58, b"!"),
        "icmp checksum",
    ),
    "UDP checksum of fragments": (
        [changed(p, len(p) - 1, b"!") for p in pieces(udp(bytes(3000)), True)],
        "udp checksum",
    ),
    "ICMPv6 checksum of fragments": (
        [changed(p, len(p) - 1, b"!") for p in pieces(ICMPv6EchoRequest(data=bytes(3000)), False)],
        "icmp checksum",
    ),
    "short IPv4": (V4[: 14 + 19], "ipv4 length"),
    "short IPv6": (V6[: 14 + 19], "ipv6 length"),
    "short ARP": (V4[:12] + b"\x08\x06" + bytes(19), "truncated"),
    "half an IPv6 header": (V6[: 14 + 39], "ipv6 length"),
    "IPv4 total length beyond the frame": (changed(V4, 16, b"\x05\xdc"), "ipv4 length"),
    "IPv4 total length below a header": (changed(V4, 16, b"\0\x13"), "ipv4 length"),
    "IPv4 version": (changed(V4, 14, b"\x55"), "ipv4 header"),
    "IPv4 header below 20": (changed(V4, 14, b"\x44"), "ipv4 header"),
    "IPv4 header beyond the packet": (changed(V4, 14, b"\x4f"), "ipv4 header"),
    "IPv6 version": (changed(V6, 14, b"\x40"), "ipv6 header"),
    "IPv6 payload length": (changed(V6, 18, b"\0\x0d"), "ipv6 length"),
    "IPv6 no next header": (changed(V6, 20, bytes((59,))), "IPv6 no next header"),
    "IPv6 extension header beyond": (ip6(IPv6ExtHdrHopByHop(len=9) / udp()), "IPv6 extension header truncated"),
    "TCP below 20": (resummed(changed(T4, 16, (20 + 19).to_bytes(2, "big"))), "tcp truncated"),
    "UDP below 8": (resummed(changed(V4, 16, (20 + 7).to_bytes(2, "big"))), "udp truncated"),
    "UDP length below 8": (changed(V4, L4 + 4, b"\0\x07"), "udp length"),
    "UDP length beyond": (changed(V4, L4 + 4, b"\0\x0d"), "udp length"),
    "ICMP below 8": (ip4(Raw(bytes(7)), proto=1), "icmp truncated"),
    "ICMP echo reply": (ip4(ICMP(type=0)), "icmp type"),
    "ICMPv6 echo reply": (ip6(ICMPv6EchoReply()), "icmp type"),
    "ICMPv6 in IPv4": (ip4(Raw(bytes(8)), proto=58), "ip protocol"),
    "ICMP in IPv6": (ip6(Raw(bytes(8)), nh=1), "ip protocol"),
    "IGMP": (ip4(Raw(bytes(8)), proto=2), "ip protocol"),
    "MLD": (ip6(Raw(b"\x8f" + bytes(7)), nh=58), "icmp type"),
    "SCTP": (ip6(Raw(bytes(12)), nh=132), "ip protocol"),
    "fragmented TCP, header cut": (
        [ether(p) for p in fragment(IP(src="192.0.2.2", dst="198.51.100.7", proto=6) / Raw(bytes(16)), 8)],
        "tcp truncated",
    ),
    "fragmented SCTP": (
        [ether(p) for p in fragment(IP(src="192.0.2.2", dst="198.51.100.7", proto=132) / Raw(bytes(40)), 24)],
        "fragment: protocol",
    ),
    "fragment without data": (ip4(Raw(b""), proto=17, flags="MF"), "fragment: bad"),
    "fragment of 7 bytes": (ip6(IPv6ExtHdrFragment(nh=17, m=1) / Raw(bytes(7))), "fragment: bad"),
}


@pytest.mark.parametrize(("frame", "reason"), DROPPED.values(), ids=DROPPED)
def test_dropped_and_counted(tap: FakeTap, frame: bytes | list[bytes] | None, reason: str) -> None:
    good = ip4(udp(b"next"))
    if frame is None:
        tap.guest.send(bytes(VNET_LEN - 1))
    else:
        tap.put(*(frame if isinstance(frame, list) else (frame,)))
    calls = tap.batch(good)
    assert calls == [("udp", (key4(), [(b"next", 0)], 64))]  # what comes behind is not harmed
    assert tap.drops == {reason: 1}


def test_family_that_is_off(start: Start) -> None:
    tap = start(ip4=None)
    assert tap.batch(ip4(udp()), ip6(udp())) == [("udp", (key6(), [(b"data", 0)], DF | 64))]
    assert tap.drops == {"ipv4 disabled": 1}
    tap = start(ip6=None)
    assert tap.batch(ip6(udp()), ip4(udp())) == [("udp", (key4(), [(b"data", 0)], 64))]
    assert tap.drops == {"ipv6 disabled": 1}


def test_longest_frames(tap: FakeTap) -> None:
    """The longest packets of both families pass, one byte more is a frame that is longer than any."""
    longest = ip4(udp(bytes(65535 - 28))), ip6(udp(bytes(65535 - 8)))
    lengths = [len(args[1][0][0]) for frame in longest for _, args in tap.batch(frame)]
    assert lengths == [65535 - 28, 65535 - 8]
    room = FRAME_ROOM - VNET_LEN
    assert tap.batch(longest[1].ljust(room - 1, b"P"))
    for size in (room, room + 5000):
        assert tap.batch(longest[1].ljust(size, b"P")) == []
    assert tap.drops == {"oversized frame": 2}


def test_handlers_may_find_fault_with_what_they_get(tap: FakeTap) -> None:
    for name, frame in (("arp", ether(ARP())), ("icmp", ip4(ICMP())), ("dhcp", ip4(udp(dport=67)))):
        tap.services[name].error = Malformed(Reason(f"{name} nonsense"))
        tap.batch(frame)
        assert tap.ctx.drops[f"{name} nonsense"] == 1


# Groups --------------------------------------------------------------------------------------------------------------


def test_grouped_by_flow_in_order_of_arrival(tap: FakeTap) -> None:
    frames = []
    for i in range(4):
        frames += [ip4(tcp(b"a%d" % i, 1)), ip6(udp(b"b%d" % i, 2)), ip4(tcp(b"c%d" % i, 3)), ip4(udp(b"d%d" % i, 4))]
    calls = tap.batch(*frames)
    assert [(name, args[0]) for name, args in calls] == [
        ("tcp", key4(1)),
        ("tcp", key4(3)),
        ("udp", key6(2)),
        ("udp", key4(4)),
    ]
    assert [s[20:] for s in calls[0][1][1]] == [b"a0", b"a1", b"a2", b"a3"]
    assert calls[2][1][1] == [(b"b%d" % i, 0) for i in range(4)]


def test_groups_do_not_outlive_their_batch(tap: FakeTap) -> None:
    tap.batch(ip4(udp(b"one")), ip4(tcp(b"one")))
    calls = tap.batch(ip4(udp(b"two")), ip4(tcp(b"two")))
    assert calls[0][1][1][0][20:] == b"two" and calls[1][1][1] == [(b"two", 0)]


@pytest.mark.parametrize("v4", [True, False])
def test_hops_of_segments(tap: FakeTap, v4: bool) -> None:
    """Those of the first of a group; of fragments, those of the last one."""
    tap.batch(*(ip4(tcp(), ttl=hops) if v4 else ip6(tcp(), hlim=hops) for hops in (3, 9)))
    assert tap.hops == 3
    for piece in pieces(tcp(bytes(2000)), v4):
        tap.batch(piece)
    assert tap.hops == 64


# Fragments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v4", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_fragmented_datagram(tap: FakeTap, v4: bool, backwards: bool) -> None:
    data = os.urandom(30000)
    frames = pieces(udp(data), v4, tos=0xB8)
    assert len(frames) > 20
    if backwards:
        frames.reverse()
    assert tap.batch(*frames[:-1]) == []
    assert tap.batch(frames[-1]) == [("udp", (key4() if v4 else key6(), [(data, 0)], 0xB840))]
    assert tap.drops == {}


@pytest.mark.parametrize("v4", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_fragmented_segment(tap: FakeTap, v4: bool, backwards: bool) -> None:
    """Segments before it go first, and segments behind it later, of the same connection."""
    data = os.urandom(30000)
    frames = pieces(tcp(data), v4)
    assert len(frames) > 20
    if backwards:
        frames.reverse()
    before, behind = (make(tcp(word)) for make in [ip4 if v4 else ip6] for word in (b"before", b"behind"))
    assert [c[0] for c in tap.batch(*frames[:-1], before)] == ["tcp"]
    calls = tap.batch(before, frames[-1], behind)
    key = key4() if v4 else key6()
    assert [(name, args[0], [s[20:] for s in args[1]]) for name, args in calls] == [
        ("tcp", key, [b"before"]),
        ("tcp", key, [data]),
        ("tcp", key, [b"behind"]),
    ]
    assert tap.drops == {}


def test_longest_fragmented_datagram(tap: FakeTap) -> None:
    for v4, data in ((True, os.urandom(65507)), (False, os.urandom(65519))):
        calls = [c for f in pieces(udp(data), v4) for c in tap.batch(f)]
        assert [c[1][1] for c in calls] == [[(data, 0)]]


@pytest.mark.parametrize("v4", [True, False])
def test_fragmented_ping(tap: FakeTap, v4: bool) -> None:
    tap.ctx.guest.addr4, tap.ctx.guest.addr6 = addr.ANY4, addr.ANY6
    echo = (ICMP(id=7) if v4 else ICMPv6EchoRequest(id=7)) / Raw(bytes(5000))
    ((name, args),) = [c for f in pieces(echo, v4) for c in tap.batch(f)]
    assert (name, args[1], len(args[3])) == ("icmp", GUEST4 if v4 else GUEST6, 5008)
    assert args[1] in (tap.ctx.guest.addr4, tap.ctx.guest.addr6)


def test_fragmented_echo_of_the_other_family(tap: FakeTap) -> None:
    wrong = IP(src=addr.text(GUEST4), dst=addr.text(PEER4), proto=58) / Raw(b"\x80" + bytes(2000))
    for piece in fragment(wrong, 1000):
        assert tap.batch(ether(piece)) == []
    assert tap.drops == {"fragment: protocol": 1}


def test_fragmented_dhcp_is_answered_to_its_sender(tap: FakeTap) -> None:
    tap.ctx.pool.buf[:] = b"\xaa" * tap.ctx.pool.size
    data = os.urandom(2000)
    ((name, args),) = [c for f in pieces(udp(data, 68, 67), True) for c in tap.batch(f)]
    assert (name, args) == ("dhcp", (GUEST_MAC, GUEST4, PEER4, 68, data))


def test_reassembled_datagram_keeps_its_place(tap: FakeTap) -> None:
    first, last = pieces(udp(bytes(1500)), True)
    calls = tap.batch(ip4(udp(b"before")), first, ip4(udp(b"between")), last, ip4(udp(b"behind")))
    assert [d for _, args in calls for d, _ in args[1]] == [b"before", b"between", bytes(1500), b"behind"]
    assert [args[2] for _, args in calls] == [64, 64, 64]


def test_reassembly_leaves_nothing_behind(tap: FakeTap) -> None:
    for i in range(50):
        for f in pieces(udp(bytes(1500), sport=1 + i), v4=True, ident=i):
            tap.batch(f)
    assert not tap.tap._batch.fields and not tap.tap._batch.udp and not len(tap.tap._reassembly)


def test_fault_on_a_reassembled_datagram_ends_its_flow(tap: FakeTap) -> None:
    stage_faults(tap.ctx)
    tap.services["udp"].error = ZeroDivisionError()
    calls = [c for f in pieces(udp(bytes(1500)), True) for c in tap.batch(f)]
    assert [name for name, _ in calls] == ["udp", "udp fault"]


# Observed addresses of the guest -------------------------------------------------------------------------------------


def test_mac_of_the_guest(tap: FakeTap) -> None:
    assert tap.batch(ip4(udp())) == [("udp", (key4(), [(b"data", 0)], 64))]  # the one we know
    tap.batch(ether(IP(src="192.0.2.2", dst="198.51.100.7") / udp(), src=OTHER_MAC))
    assert tap.ctx.guest.mac == tap.ctx.guest.mac_of(GUEST4) == OTHER_MAC
    group = bytes.fromhex("01005e000001")
    tap.batch(ether(IP(src="192.0.2.2", dst="198.51.100.7") / udp(), src=group))
    assert tap.ctx.guest.mac == tap.ctx.guest.mac_of(GUEST4) == OTHER_MAC


# Checksums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frame", "reason"), DROPPED.values(), ids=DROPPED)
def test_dropped_and_counted_without_vnet_header(start: Start, frame: bytes | list[bytes] | None, reason: str) -> None:
    if frame is None:
        return
    tap = start(vnet=False)
    tap.put(*(frame if isinstance(frame, list) else (frame,)), vnet=b"")
    tap.read()
    assert tap.batch(ip4(udp(b"next")), vnet=b"") == [("udp", (key4(), [(b"next", 0)], 64))]
    assert tap.drops == {reason: 1}


def test_a_kernel_has_verified_what_it_left_partial(tap: FakeTap) -> None:
    for vnet in (PARTIAL, VNET.pack(2, 0, 0, 0, 0, 0)):
        for frame in (T4, V4, V6):
            assert len(tap.batch(changed(frame, len(frame) - 1, b"!"), vnet=vnet)) == 1
    assert not tap.drops


def test_udp_over_ipv4_needs_no_checksum(start: Start) -> None:
    for tap in (start(), start(vnet=False)):
        frame = changed(V4, L4 + 6, bytes(2))
        assert len(tap.batch(frame, vnet=NO_OFFLOAD if tap.link.reads_vnet else b"")) == 1
        assert not tap.drops


def test_faulty_segments_leave_the_others_in_order(start: Start) -> None:
    tap = start(vnet=False)
    good = [ip4(tcp(bytes((i,)) * 1000)) for i in range(6)]
    bad = [changed(frame, 700, b"!") for frame in good]
    calls = tap.batch(good[0], bad[1], good[2], good[3], bad[4], good[5], vnet=b"")
    ((_, (_, segments)),) = calls
    assert [segment[20:] for segment in segments] == [bytes((i,)) * 1000 for i in (0, 2, 3, 5)]
    assert tap.drops == {"tcp checksum": 2}


def test_hop_limit_of_a_damaged_datagram(start: Start) -> None:
    """It is nothing to those of the datagrams behind it."""
    tap = start(vnet=False)
    calls = tap.batch(changed(V4, 22, b"\1"), ip4(udp(b"next"), ttl=7), vnet=b"")
    assert calls == [("udp", (key4(), [(b"next", 0)], 7))]


@pytest.mark.parametrize("frame", [ip4(udp(), src=PEER4), ip4(tcp(), src=PEER4), ip4(ICMP(), src=PEER4)])
def test_no_address_is_learned_from_a_damaged_packet(start: Start, frame: bytes) -> None:
    tap = start(vnet=False)
    tap.batch(changed(frame, len(frame) - 1, b"!"), vnet=b"")
    assert tap.ctx.guest.addr4 == GUEST4
    assert PEER4 not in tap.ctx.guest.macs


def test_segments_with_ipv4_options_keep_their_place(start: Start) -> None:
    tap = start(vnet=False)
    calls = tap.batch(T4, OPTIONS4, T4, vnet=b"")
    assert [name for name, _ in calls] == ["tcp"] * 3
    assert not tap.drops


# Priority tags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0x8100, 0x88A8])
@pytest.mark.parametrize("vnet", [True, False])
def test_priority_tags_are_passed_over(start: Start, kind: int, vnet: bool) -> None:
    frames = [
        ether(ARP(psrc="192.0.2.2", pdst="192.0.2.1")),
        ip4(udp(b"discover", 68, 67), src=addr.ANY4, dst=addr.BROADCAST4),
        ip4(ICMP()),
        ip6(ICMPv6ND_NS(tgt="fe80::1"), src=GUEST_LL, hlim=255),
        OPTIONS4,
        *(ip4(tcp()), ip6(tcp()), ip4(udp()), ip6(udp())),
        *pieces(udp(bytes(3000), 5, 6), True),
        *pieces(udp(bytes(3000), 7, 8), False),
    ]
    plain, tap = start(vnet=vnet), start(vnet=vnet)
    before = NO_OFFLOAD if vnet else b""
    assert tap.batch(*(tagged(frame, 0xE000, kind) for frame in frames), vnet=before) == plain.batch(
        *frames, vnet=before
    )
    assert not tap.drops and tap.ctx.guest == plain.ctx.guest and tap.ctx.guest.macs == plain.ctx.guest.macs


# Several machines ----------------------------------------------------------------------------------------------------


def test_each_address_has_its_mac(tap: FakeTap) -> None:
    """Frames of two machines in one batch: what came before another sender is handed on before."""
    other4 = addr.packed("192.0.2.3")
    other = IP(src="192.0.2.3", dst="198.51.100.7") / udp()
    calls = tap.batch(ip4(udp(b"1")), ether(other, OTHER_MAC), ip4(udp(b"2")), ip6(udp()), ether(other, OTHER_MAC))
    assert [name for name, _ in calls] == ["udp"] * 5
    guest = tap.ctx.guest
    assert (guest.mac_of(GUEST4), guest.mac_of(GUEST6), guest.mac_of(other4)) == (GUEST_MAC, GUEST_MAC, OTHER_MAC)


def test_services_answer_the_machine_that_asked(tap: FakeTap) -> None:
    frames = [ether(ARP(), src=mac) for mac in (GUEST_MAC, OTHER_MAC, GUEST_MAC)]
    assert [args[0] for _, args in tap.batch(*frames)] == [GUEST_MAC, OTHER_MAC, GUEST_MAC]


@pytest.mark.parametrize("size", [0, 6, 11, 13])
def test_no_mac_is_taken_from_beyond_a_frame(tap: FakeTap, size: int) -> None:
    tap.ctx.pool.buf[:] = b"\xaa" * tap.ctx.pool.size
    assert tap.batch(bytes(size)) == []
    assert tap.ctx.guest.mac == GUEST_MAC
    assert tap.drops == {"truncated": 1}


SEEN = [
    (ip4(udp(), src=addr.packed("192.0.2.9")), {"addr4": addr.packed("192.0.2.9")}),
    (ip4(tcp(), src=addr.packed("192.0.2.9")), {"addr4": addr.packed("192.0.2.9")}),
    (ip4(ICMP(), src=addr.packed("192.0.2.9")), {"addr4": addr.packed("192.0.2.9")}),
    (ip6(tcp(), src=addr.packed("2001:db8::9")), {"addr6": addr.packed("2001:db8::9")}),
    (ip6(udp(), src=addr.packed("fe80::9")), {"addr6_ll": addr.packed("fe80::9")}),
    (ip6(ICMPv6EchoRequest(), src=addr.packed("2001:db8::9")), {"addr6": addr.packed("2001:db8::9")}),
    (ip6(ICMPv6ND_NS(tgt="fe80::1"), src=addr.packed("fe80::9"), hlim=255), {"addr6_ll": addr.packed("fe80::9")}),
    (ip4(udp(), src=addr.packed("127.0.0.1")), {}),
    (ip4(udp(), src=addr.packed("224.0.0.1")), {}),
    (ip4(udp(), src=addr.BROADCAST4), {}),
    (ip4(udp(), src=addr.ANY4), {}),
    (ip6(udp(), src=addr.LOOPBACK6), {}),
    (ip6(udp(), src=addr.packed("ff02::1")), {}),
    (ip6(ICMPv6ND_NS(tgt="fe80::1"), src=addr.ANY6, hlim=255), {}),
    (ip4(Raw(bytes(8)), src=addr.packed("192.0.2.9"), proto=2), {}),  # not for us: nothing is learnt
    (ether(ARP(psrc="192.0.2.9", pdst="192.0.2.1")), {}),
]


def test_a_host_behind_the_guest_is_not_the_guest(start: Start) -> None:
    """Answers of a rule's target address do not move the guest there."""
    behind = addr.packed("192.0.2.20")
    rule = Rule("-t 80:192.0.2.20/80", PROTO_TCP, outbound=False, first=80, last=80, to=80, target=behind)
    tap = start(forwards=(rule,))
    tap.batch(ip4(tcp(), src=behind))
    assert tap.ctx.guest.addr4 == GUEST4


@pytest.mark.parametrize("v4", [True, False])
def test_rules_that_come_and_go_say_which_hosts_are_behind_the_guest(tap: FakeTap, v4: bool) -> None:
    behind = addr.packed("192.0.2.20" if v4 else "2001:db8::20")
    rule = Rule("-t 80", PROTO_TCP, outbound=False, first=80, last=80, to=80, target=behind)
    frame = ip4(tcp(), src=behind) if v4 else ip6(tcp(), src=behind)

    def address() -> bytes:
        tap.batch(frame)
        return tap.ctx.guest.addr4 if v4 else tap.ctx.guest.addr6

    own = GUEST4 if v4 else GUEST6
    reconfigure(tap.ctx, forwards=(replace(rule, target=None), rule))
    assert address() == own
    reconfigure(tap.ctx, forwards=())
    assert address() == behind
    tap.batch(ip4(tcp()) if v4 else ip6(tcp()))
    reconfigure(tap.ctx, forwards=(replace(rule, outbound=True),))  # which leads to a host beyond us
    assert address() == behind


def test_a_host_behind_the_guest_stays_so_while_it_has_flows(tap: FakeTap) -> None:
    """A connection outlives the rule that it came by; the next change finds that it is gone."""
    behind, other = addr.packed("192.0.2.20"), addr.packed("192.0.2.21")
    rule = Rule("-t 80", PROTO_TCP, outbound=False, first=80, last=80, to=80, target=behind)
    reconfigure(tap.ctx, forwards=(rule, replace(rule, first=81, last=81, target=other)))
    flows = [Flow(behind + GATEWAY4 + bytes(4)), Flow(b""), Flow(GUEST4 + other + bytes(4))]
    for flow in flows:
        tap.ctx.flows.insert(flow)
    reconfigure(tap.ctx, forwards=())
    tap.batch(ip4(tcp(), src=behind))
    assert tap.ctx.guest.addr4 == GUEST4
    tap.batch(ip4(tcp(), src=other))
    assert tap.ctx.guest.addr4 == other, "it has none: others only write to it"
    tap.ctx.flows.free(flows[0], "for a test")
    reconfigure(tap.ctx, mtu=1400)
    tap.batch(ip4(tcp(), src=behind))
    assert tap.ctx.guest.addr4 == behind


def test_a_guest_that_comes_back_has_its_address(tap: FakeTap) -> None:
    own4, own6 = addr.packed("192.0.2.9"), addr.packed("2001:db8::9")
    tap.batch(ip4(udp(), src=own4), ip6(udp(), src=own6))
    tap.tap.forget()
    assert (tap.ctx.guest.mac, tap.ctx.guest.addr4, tap.ctx.guest.addr6) == (addr.BROADCAST_MAC, own4, own6)
    tap.batch(ether(ARP()))
    assert (tap.ctx.guest.mac, tap.ctx.guest.addr4, tap.ctx.guest.addr6) == (GUEST_MAC, own4, own6)


def test_another_guest_has_the_assigned_address(tap: FakeTap) -> None:
    tap.batch(ip4(udp(), src=addr.packed("192.0.2.9")), ip6(udp(), src=addr.packed("fe80::9")))
    tap.tap.forget()
    tap.tap.forget()  # one that has not spoken
    tap.batch(ether(ARP(), OTHER_MAC))
    assert tap.ctx.guest == Guest(OTHER_MAC, GUEST4, GUEST6, addr.ANY6)


def test_another_guest_has_no_hosts_behind_it_that_no_rule_names(tap: FakeTap) -> None:
    behind = addr.packed("192.0.2.20")
    rule = Rule("-t 80", PROTO_TCP, outbound=False, first=80, last=80, to=80, target=behind)
    reconfigure(tap.ctx, forwards=(rule,))
    flow = Flow(behind + GATEWAY4 + bytes(4))
    tap.ctx.flows.insert(flow)
    reconfigure(tap.ctx, forwards=())
    tap.ctx.flows.free(flow, "for a test")
    tap.tap.forget()
    tap.batch(ip4(tcp(), src=behind))
    assert tap.ctx.guest.addr4 == behind


def test_a_family_is_switched_off_and_on(tap: FakeTap) -> None:
    ip4_settings, ip6_settings = tap.ctx.config.ip4, tap.ctx.config.ip6
    frames = ip4(udp()), ip6(udp())
    reconfigure(tap.ctx, ip4=None)
    assert [name for name, _ in tap.batch(*frames)] == ["udp"] and tap.drops == {"ipv4 disabled": 1}
    reconfigure(tap.ctx, ip4=ip4_settings, ip6=None)
    assert [name for name, _ in tap.batch(*frames)] == ["udp"] and tap.drops["ipv6 disabled"] == 1
    reconfigure(tap.ctx, ip6=ip6_settings)
    assert [name for name, _ in tap.batch(*frames)] == ["udp", "udp"]


@pytest.mark.parametrize(("frame", "learnt"), SEEN)
def test_addresses_of_the_guest(tap: FakeTap, frame: bytes, learnt: dict[str, bytes]) -> None:
    tap.batch(frame)
    known = {"mac": GUEST_MAC, "addr4": GUEST4, "addr6": GUEST6, "addr6_ll": GUEST_LL}
    assert tap.ctx.guest == Guest(**{**known, **learnt})


@pytest.mark.parametrize("vnet", [True, False])
def test_frames_are_counted(vnet: bool) -> None:
    """Without the vnet header, good ones and bad ones."""
    tap = FakeTap(vnet=vnet)
    tap.put(ether(ARP()), ip4(tcp(b"1" * 100)), b"short", vnet=NO_OFFLOAD if vnet else b"")
    tap.read()
    stats = tap.ctx.stats
    assert stats.frames_from_guest == 3
    assert stats.bytes_from_guest == len(bytes(ether(ARP()))) + len(bytes(ip4(tcp(b"1" * 100)))) + len(b"short")
    tap.close()


# The budget ----------------------------------------------------------------------------------------------------------


def test_what_is_left_over_stays_readable(tap: FakeTap) -> None:
    tap.put(*(ip4(udp(b"%d" % i)) for i in range(5)))
    tap.turn()
    assert len(tap.calls) == 1 and tap.readable
    datagrams = [d for _, args in tap.calls + tap.read() for d, _ in args[1]]
    assert datagrams == [b"0", b"1", b"2", b"3", b"4"] and not tap.readable


class Source:
    """os.readv on a device in which frames never run out, or which has `left` of them."""

    def __init__(self, frame: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frame = NO_OFFLOAD + frame
        self.left: float = float("inf")
        self.error: OSError | None = None
        self.reads = 0
        monkeypatch.setattr(os, "readv", self)

    def __call__(self, fd: int, buffers: tuple[memoryview]) -> int:
        self.reads += 1
        if self.left <= 0:
            raise self.error or BlockingIOError(errno.EAGAIN, "empty")
        self.left -= 1
        (buffer,) = buffers
        assert len(buffer) == FRAME_ROOM, "no room for a frame"
        buffer[: len(self.frame)] = self.frame
        return len(self.frame)


def test_budget_follows_what_there_was(tap: FakeTap, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(V4, monkeypatch)

    def turn(left: float) -> int:
        source.reads, source.left = 0, left
        tap.turn()
        return source.reads

    assert [turn(1) for _ in range(PATIENCE + 1)] == [1] * PATIENCE + [2]  # an empty tap is asked once, then not again
    assert [turn(1) for _ in range(3)] == [1, 1, 1]
    assert [turn(float("inf")) for _ in range(40 * PATIENCE)][-1] == BUDGET_MAX
    assert turn(300) == 301
    assert [turn(float("inf")) for _ in range(PATIENCE)] == [300] * PATIENCE
    assert turn(float("inf")) == BUDGET_MAX, "twice 300 would be more than a turn may take"
    assert turn(0) == 1
    assert turn(5) == 1


def test_behind_bulk_the_tap_is_emptied(tap: FakeTap, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waited behind dozens of acknowledgements, of which each turn of the loop took one."""
    source = Source(V4, monkeypatch)

    def turn(sent: int, left: float) -> int:
        tap.link._written += sent
        source.reads, source.left = 0, left
        tap.turn()
        return source.reads

    assert turn(BULK - 1, 40) == 1
    assert turn(BULK, 40) == 41
    assert turn(0, 40) == 1, "only what was sent since the last read counts, and the budget is what it was"
    assert turn(BULK, float("inf")) == BUDGET_MAX
    assert [turn(BULK, float("inf")) and turn(0, 5) for _ in range(PATIENCE)] == [1] * (PATIENCE - 2) + [2, 2]


def test_full_pool_ends_a_turn(tap: FakeTap, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(ip4(udp(bytes(60000))), monkeypatch)
    tap.link._budget = BUDGET_MAX
    tap.turn()
    assert 2 <= source.reads < 10  # a quarter of a MiB, and the fake checks that each frame has its room
    assert sum(len(args[1]) for _, args in tap.calls) == source.reads


def test_device_is_gone(tap: FakeTap, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(V4, monkeypatch)
    source.left, source.error = 2, OSError(errno.EBADFD, "File descriptor in bad state")
    tap.link._budget = 10
    with pytest.raises(ConnectionError, match="bad state"):
        tap.turn()
    gone: list[str] = []
    tap.link.on_gone = gone.append
    source.left = 2
    tap.turn()
    assert gone == ["The tap device failed: File descriptor in bad state"]
    assert len(tap.calls[-1][1][1]) == 2, "what came before is handled"


def test_capture_sees_every_frame_as_it_came(tap: FakeTap) -> None:
    captured: list[tuple[bool, bytes]] = []
    tap.link.capture = lambda to_guest, data: captured.append((to_guest, data))
    frames = [ip4(udp()), b"short", ip6(tcp())]
    tap.batch(*frames)
    assert captured == [(False, NO_OFFLOAD + f) for f in frames]


def test_watched_as_the_tap(tap: FakeTap) -> None:
    fd = tap.device.fileno()
    assert reactor(tap.ctx).refs == {fd: make_ref(TYPE_TAP, fd, 0)}
    assert reactor(tap.ctx).events[fd] == EPOLLIN


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tcp", "udp"])
def test_a_fault_ends_the_flow_it_was_about(tap: FakeTap, name: str) -> None:
    stage_faults(tap.ctx)
    build = tcp if name == "tcp" else udp
    service = tap.services[name]
    handler = service.tap_handler

    def failing(key: bytes, *args: Any) -> None:
        handler(key, *args)
        if key == key4(2):
            raise ZeroDivisionError("a defect of ours")

    service.tap_handler = failing  # type: ignore[method-assign]
    calls = tap.batch(*(ip4(build(sport=i)) for i in (1, 2, 3)), ip6(ICMPv6EchoRequest()))
    assert [(n, args[0]) for n, args in calls if n != "icmp"] == [
        (name, key4(1)),
        (name, key4(2)),
        (f"{name} fault", key4(2)),
        (name, key4(3)),
    ]
    assert tap.drops == {"fault": 1}


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("arp", ether(ARP())),
        ("icmp", ip4(ICMP())),
        ("ndp", ip6(ICMPv6ND_NS(), hlim=255)),
        ("dhcp", ip4(udp(dport=67))),
        ("dhcpv6", ip6(udp(dport=547))),
    ],
)
def test_a_fault_costs_the_frame(tap: FakeTap, name: str, frame: bytes) -> None:
    stage_faults(tap.ctx)
    tap.services[name].error = ZeroDivisionError("a defect of ours")
    calls = tap.batch(ip4(tcp(b"1")), frame, ip4(tcp(b"2")))
    assert [n for n, _ in calls] == [name, "tcp"]
    assert [s[20:] for s in calls[1][1][1]] == [b"1", b"2"]
    assert tap.drops == {"fault": 1}


def test_faults_are_told_but_not_without_end(tap: FakeTap, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_faults(tap.ctx)
    lines: list[str] = []
    monkeypatch.setattr("passt.log.say", lambda level, text: lines.append(text))
    monkeypatch.setattr("passt.log._held", {})
    tap.services["arp"].error = ZeroDivisionError("a defect of ours")
    tap.batch(*[ether(ARP())] * 50)
    assert tap.drops == {"fault": 50}
    assert lines == ["Handling a frame failed: ZeroDivisionError('a defect of ours')"]


def test_configurations_of_this_file() -> None:
    assert IP4.addr == GUEST4 and IP6.addr == GUEST6


def test_device_without_vnet_header(start: Start) -> None:
    """Frames are read behind the place of one, and what lies there from a batch before means nothing."""
    tap = start(vnet=False)
    seen: list[bytes] = []
    tap.link.capture = lambda to_guest, data: seen.append(data)
    frames = [ip4(udp(b"%d" % i)) for i in range(3)]
    tap.ctx.pool.buf[:] = b"\xff" * len(tap.ctx.pool.buf)
    calls = tap.batch(*frames, vnet=b"")
    assert [data for name, args in calls if name == "udp" for data in args[1]] == [(b"%d" % i, 0) for i in range(3)]
    assert seen == [NO_OFFLOAD + bytes(frame) for frame in frames]
