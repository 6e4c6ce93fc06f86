"""Frames of a guest that means harm, and the whole stack between them and sockets that send nothing anywhere.

Invariant: whatever the guest sends, nothing is raised and nothing outside the packets changes what comes out.

The second half is checked by doing everything twice: memory that belongs to no packet is filled with other bytes the
second time, and what went to the guest, to the sockets and into the counters must be the same. So a byte read from
beyond a packet shows, whether it is sent or only looked at.

    python -m tests.unit.hostile 600 [seed]     ten minutes of it, for any machine with time to spare
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, cast
from unittest import mock

from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientId,
    DHCP6OptElapsedTime,
    DHCP6OptIA_NA,
    DHCP6OptIAAddress,
    DHCP6OptServerId,
)
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    fragment6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from passt import addr, icmp, log, udp
from passt.arp import Arp
from passt.dhcp import Dhcp
from passt.dhcpv6 import Dhcpv6
from passt.icmp import Icmp
from passt.igmp import Igmp
from passt.link.tap_device import BUDGET_MAX, TapLink
from passt.loop.reactor import EPOLLIN, TYPE_TAP, make_ref
from passt.ndp import Ndp
from passt.policy.guest import Guest
from passt.tap import Tap
from passt.tcp import Tcp
from passt.tcp_engine import sock as tcp_sock
from passt.udp import Udp
from passt.udp_engine import group_sender, outbound
from passt.wire import igmp
from passt.wire.igmp import ALLOW, REPORT6_V1, REPORT_V2, TO_EXCLUDE, Record, Report, Single
from passt.wire.virtio import F_DATA_VALID, F_NEEDS_CSUM, GSO_UDP_L4, NO_OFFLOAD, VNET, VNET_LEN
from tests.unit.support import (
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST6,
    GUEST_LL,
    GUEST_MAC,
    OUR_MAC,
    T0,
    link,
    make_context,
    reactor,
    timers,
)
from tests.unit.tcp_support import ALL, PEER_PORT, FakeSocket, accepted_socket, listener

PEER4, PEER6 = addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7")
GUEST_ISN = 0xFFFFFF00
POOL_SIZE = 1 << 17
SERVER_ID = bytes(range(14))
TAP_FD = 3
ANSWERED, ASKED, NEAR4, NEAR6 = range(8000, 8004)  # ports of the guest that host clients connect to
INBOUND = [
    *((port, peer) for port in (ANSWERED, ASKED) for peer in (PEER4, PEER6)),
    (NEAR4, addr.LOOPBACK4),
    (NEAR6, addr.LOOPBACK6),
]

# A kernel vouches for the checksum: changes of a frame are to be found by what handles it, not by `link/verify.py`
VOUCHED = VNET.pack(F_DATA_VALID, 0, 0, 0, 0, 0)

Change = tuple[int, int, int]  # what (an index into CHANGES), where, value
Spec = tuple[int, Sequence[Change]]  # an index into seeds(), and what is done to that frame


# Sockets that send nothing anywhere ----------------------------------------------------------------------------------


class Datagrams:
    """A connected datagram socket of the host: what it was given is in `sent`, nothing ever comes back."""

    by_fd: ClassVar[dict[int, Datagrams]] = {}
    numbers: ClassVar[Iterator[int]] = itertools.count(10_000)

    def __init__(self, sent: list[tuple[Any, ...]], *label: Any) -> None:
        self.fd = next(Datagrams.numbers)
        self.sent, self.label = sent, label
        Datagrams.by_fd[self.fd] = self

    def fileno(self) -> int:
        return self.fd

    def setsockopt(self, *option: Any) -> None:
        self.sent.append((*self.label, "option", option))

    def getsockopt(self, *_: Any) -> int:
        return 0

    def send(self, data: bytes | memoryview) -> int:
        self.sent.append((*self.label, bytes(data)))
        return len(data)

    def sendto(self, data: bytes, to: tuple[Any, ...]) -> int:
        return self.send(data)

    def getsockname(self) -> tuple[str, int]:
        return "0.0.0.0", 40000

    def recvmsg(self, *_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "nothing there")

    recvfrom = recvmsg

    def close(self) -> None:
        del Datagrams.by_fd[self.fd]


def _writev(fd: int, parts: Sequence[memoryview]) -> int:
    return Datagrams.by_fd[fd].send(b"".join(parts))


class Device:
    """os.readv on the tap: `frames` are what waits."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def __call__(self, fd: int, buffers: tuple[memoryview]) -> int:
        assert fd == TAP_FD
        if not self.frames:
            raise BlockingIOError(errno.EAGAIN, "empty")
        (buffer,) = buffers
        data = self.frames.pop(0)[: len(buffer)]
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """While this holds, no socket of the services is a real one."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (tcp_sock, "new_socket", FakeSocket),
            (outbound, "open_socket", None),  # each stack sets its own
            (group_sender, "open_sender", None),
            (udp, "probe_udp_segment", lambda: True),
            (udp, "probe_udp_gro", lambda: True),
            (udp, "default_hops", lambda: {4: 64, 16: 64}),
            (icmp, "open_socket", None),
            (os, "writev", _writev),
            (os, "readv", None),
            (log, "_level", log.WARNING),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


# The stack -----------------------------------------------------------------------------------------------------------


class Stack:
    """All services around one context, deterministic, with connections of each family: one that the guest began, and of
    host clients one that it answered, one that it did not answer yet, and one of the host's loopback, likewise.

    `fill` is what lies in the packet pool where no frame was read to. `room` is how much a TCP socket takes.
    """

    def __init__(self, fill: bytes, *, room: int = 1 << 30, **config: Any) -> None:
        self.device = Device()
        self.datagrams: list[tuple[Any, ...]] = []
        cast(Any, os).readv = self.device
        for module in (outbound, icmp):
            cast(Any, module).open_socket = lambda fwd, *where, **_: Datagrams(self.datagrams, *where)
        cast(Any, group_sender).open_sender = lambda *where: Datagrams(self.datagrams, *where[:3])
        FakeSocket.made.clear()
        guest = Guest(mac=GUEST_MAC, addr4=GUEST4, addr6=GUEST6, addr6_ll=GUEST_LL)
        self.ctx = make_context(pool_size=POOL_SIZE, guest=guest, **config)
        self.fill = fill[: self.ctx.pool.size]
        self.dhcpv6, self.icmp, self.udp, self.tcp = Dhcpv6(self.ctx), Icmp(self.ctx), Udp(self.ctx), Tcp(self.ctx, ALL)
        self.dhcpv6.server_id = SERVER_ID
        self.icmp._ident = self.udp._ident = 0
        self.tcp.opening._secret = bytes(16)
        for service in (Arp, Ndp, Dhcp):
            service(self.ctx)
        Igmp(self.ctx, self.udp.groups)
        self.tap = Tap(self.ctx, udp=self.udp, tcp=self.tcp)
        self.tap._fault = self.fault  # type: ignore[method-assign]
        self.device_link = TapLink(TAP_FD, self.ctx.drops, uso=True)
        self.device_link.start(self.ctx.reactor, self.ctx.pool, self.tap)
        self.now = T0
        for first, second in connections():
            self.batch([first])
            self.batch([second])
            sock = FakeSocket.made[-1]
            sock.room = room
            sock.incoming += bytes(range(250)) * 20
            reactor(self.ctx).fire(sock.fd, EPOLLIN, self.now)
        for to, peer in INBOUND:
            sock = accepted_socket(peer)
            self.tcp.opening.accepted(listener(to=to), sock, peer, PEER_PORT, self.now)
            sock.room = room
            sock.incoming += bytes(range(250)) * 20
        for answer in answers():
            self.batch([answer])
        for sock in FakeSocket.made[2:]:
            reactor(self.ctx).fire(sock.fd, EPOLLIN, self.now)
        assert len(self.tcp._conns) == 8 or config, "the connections were not made"

    def fault(self, what: str, e: Exception, now: float) -> None:
        """Instead of being counted, faults are raised."""
        raise e

    def batch(self, frames: Sequence[bytes]) -> None:
        """Frames, vnet headers first, that are read in one turn."""
        self.ctx.pool.buf[:] = self.fill
        self.device.frames = list(frames)
        self.device_link._budget = BUDGET_MAX
        reactor(self.ctx).handlers[TYPE_TAP](make_ref(TYPE_TAP, TAP_FD, 0), EPOLLIN, self.now)
        assert not self.device.frames, "frames were left over"
        reactor(self.ctx).end_turn(self.now)

    def later(self, seconds: float) -> None:
        """Time passes: timers fire."""
        self.now += seconds
        timers(self.ctx).advance(self.now)
        services = timers(self.ctx).services
        for timer, deadline in enumerate(services.deadlines):
            if deadline is not None and deadline <= self.now:
                services.fire(timer, self.now)
        reactor(self.ctx).end_turn(self.now)

    def outcome(self) -> tuple[Any, ...]:
        """All that can be seen from outside."""
        ctx, fake = self.ctx, link(self.ctx)
        sockets = [(s.peer, bytes(s.sent), s.shut, s.closed, s.options, bytes(s.incoming)) for s in FakeSocket.made]
        groups = self.udp.senders._flows.by_key
        flows = len(self.tcp._conns), len(self.udp._by_key), len(groups), len(self.icmp._flows.by_key)
        assert ctx.flows.count == sum(flows) == sum(f is not None for f in ctx.flows.by_index)
        return fake.frames, fake.vnet, sockets, self.datagrams, dict(ctx.drops), ctx.guest, flows

    def close(self) -> None:
        Datagrams.by_fd.clear()


FILLS = tuple(random.Random(i).randbytes(POOL_SIZE + (1 << 17)) for i in range(2))


def check(frames: Sequence[bytes], *, together: bool, **how: Any) -> dict[str, int]:
    """Do it twice, as the invariant says; returns the counters. Between `harmless()` only."""
    outcomes = []
    for fill in FILLS:
        stack = Stack(fill, **how)
        for batch in [frames] if together else [[f] for f in frames]:
            stack.batch(batch)
        stack.later(0.02)
        stack.later(1.1)
        outcomes.append(stack.outcome())
        stack.close()
    for a, b in zip(*outcomes, strict=True):
        assert a == b, "what lies outside the packets made a difference"
    drops: dict[str, int] = outcomes[0][4]
    return drops


# Frames --------------------------------------------------------------------------------------------------------------


def _ether(inner: Packet) -> bytes:
    return bytes(Ether(src=addr.mac_text(GUEST_MAC), dst=addr.mac_text(OUR_MAC)) / inner)


def _ip(v4: bool, **fields: Any) -> Packet:
    if v4:
        return IP(**{"src": addr.text(GUEST4), "dst": addr.text(PEER4), **fields})
    return IPv6(**{"src": addr.text(GUEST6), "dst": addr.text(PEER6), **fields})


def _syn(v4: bool, sport: int, **fields: Any) -> bytes:
    options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
    return _ether(_ip(v4) / TCP(sport=sport, dport=80, flags="S", seq=GUEST_ISN, options=options, **fields))


def _ends(v4: bool, near: bool) -> tuple[bytes, bytes]:
    """(guest, peer); `near`: the peer is the host's loopback."""
    if v4:
        return GUEST4, GATEWAY4 if near else PEER4
    return (GUEST_LL, GATEWAY6) if near else (GUEST6, PEER6)


@cache
def _isn(v4: bool, sport: int, dport: int) -> int:
    """Our initial sequence number of the connection between these ports, the guest's first."""
    tcp = Tcp(make_context(), ALL)
    tcp.opening._secret = bytes(16)
    return tcp.opening.isn(
        b"".join(_ends(v4, sport in (NEAR4, NEAR6))) + sport.to_bytes(2, "big") + dport.to_bytes(2, "big"), T0
    )


def _segment(
    v4: bool,
    flags: str,
    data: bytes = b"",
    *,
    seq: int = 1,
    ack: int = 1,
    sport: int = 40000,
    dport: int = 80,
    **fields: Any,
) -> bytes:
    numbers = {"seq": GUEST_ISN + seq & 0xFFFFFFFF, "ack": _isn(v4, sport, dport) + ack & 0xFFFFFFFF}
    src, dst = map(addr.text, _ends(v4, sport in (NEAR4, NEAR6)))
    return _ether(
        _ip(v4, src=src, dst=dst) / TCP(sport=sport, dport=dport, flags=flags, **numbers, **fields) / Raw(data)
    )


@cache
def connections() -> list[tuple[bytes, bytes]]:
    """SYN and ACK of the connections that a stack begins with."""
    return [(NO_OFFLOAD + _syn(v4, 40000), NO_OFFLOAD + _segment(v4, "A")) for v4 in (True, False)]


def _syn_ack(v4: bool, port: int, **fields: Any) -> bytes:
    options = [("MSS", 1460), ("NOP", None), ("WScale", 7)]
    return _segment(v4, "SA", seq=0, sport=port, dport=PEER_PORT, options=options, **fields)


@cache
def answers() -> list[bytes]:
    """The guest's answers to host clients."""
    return [NO_OFFLOAD + _syn_ack(v4, ANSWERED) for v4 in (True, False)]


def _tcp_seeds(v4: bool) -> Iterator[bytes]:
    yield _syn(v4, 40001)
    yield _segment(v4, "S")
    yield _segment(v4, "PA", b"abcdefgh")
    yield _segment(v4, "PA", b"ijkl", seq=9)
    yield _segment(v4, "PA", b"mnop", seq=13, ack=1461)
    yield _segment(v4, "PA", b"cdefghij", seq=3)
    yield _segment(v4, "A", b"x", seq=0)
    yield _segment(v4, "A", ack=2921, options=[("NOP", None), ("NOP", None), ("Timestamp", (5, 6))])
    yield _segment(v4, "A", window=0)
    yield _segment(v4, "FA", b"end", seq=17, ack=5001)
    yield _segment(v4, "R")
    yield _segment(v4, "PAU", b"urgent", urgptr=3)
    yield _ether(_ip(v4) / TCP(sport=40002, dport=80, flags="A", seq=5, ack=6))


def _inbound_seeds(v4: bool) -> Iterator[bytes]:
    answered: dict[str, Any] = {"sport": ANSWERED, "dport": PEER_PORT}
    yield _segment(v4, "PA", b"220 ready", **answered)
    yield _syn_ack(v4, ANSWERED)
    yield _segment(v4, "FA", b"bye", seq=10, ack=5001, **answered)
    asked: dict[str, Any] = {"sport": ASKED, "dport": PEER_PORT}
    yield _segment(v4, "S", seq=0, **asked)
    yield _segment(v4, "A", ack=77, **asked)
    yield _segment(v4, "R", **asked)
    yield _syn_ack(v4, ASKED, ack=2)
    yield _syn_ack(v4, ASKED)
    yield _segment(v4, "PA", b"250 hello", **asked)
    yield _segment(v4, "RA", seq=10, **asked)
    near: dict[str, Any] = {"sport": NEAR4 if v4 else NEAR6, "dport": PEER_PORT}
    yield _segment(v4, "RA", seq=0, **near)
    yield _syn_ack(not v4, near["sport"])
    yield _segment(not v4, "PA", b"at last", **near)


def _udp_seeds(v4: bool) -> Iterator[bytes]:
    yield _ether(_ip(v4) / UDP(sport=5000, dport=6000) / Raw(b"datagram"))
    yield _ether(_ip(v4) / UDP(sport=5000, dport=6000))
    yield _ether(_ip(v4) / UDP(sport=5001, dport=53) / Raw(bytes(range(200))))
    yield _ether(_ip(v4) / (ICMP(id=7, seq=1) if v4 else ICMPv6EchoRequest(id=7, seq=1)) / Raw(b"ping"))


def _service_seeds() -> Iterator[bytes]:
    yield _ether(ARP(psrc=addr.text(GUEST4), pdst=addr.text(GATEWAY4), hwsrc=addr.mac_text(GUEST_MAC)))
    chaddr = GUEST_MAC.ljust(16, b"\0")
    options = [("message-type", "discover"), ("param_req_list", [1, 3, 6, 15, 51, 121]), ("max_dhcp_size", 1500), "end"]
    request = [("message-type", "request"), ("requested_addr", "192.0.2.2"), ("hostname", b"guest"), "end"]
    for dhcp in (options, request):
        bootp = UDP(sport=68, dport=67) / BOOTP(chaddr=chaddr, xid=0x1234) / DHCP(options=dhcp)
        yield _ether(_ip(True, src="0.0.0.0", dst="255.255.255.255") / bootp)
    client = DHCP6OptClientId(duid=DUID_LL(lladdr=addr.mac_text(GUEST_MAC)))
    ia = DHCP6OptIA_NA(iaid=7, ianaopts=[DHCP6OptIAAddress(addr="2001:db8::99")])
    to_servers = _ip(False, src=addr.text(GUEST_LL), dst="ff02::1:2") / UDP(sport=546, dport=547)
    yield _ether(to_servers / DHCP6_Solicit(trid=1) / client / DHCP6OptIA_NA(iaid=7) / DHCP6OptElapsedTime())
    server = DHCP6OptServerId(duid=Raw(SERVER_ID))
    yield _ether(to_servers / DHCP6_Request(trid=2) / client / server / ia)
    near = _ip(False, src=addr.text(GUEST_LL), dst="ff02::1", hlim=255)
    for nd in (ICMPv6ND_NS(tgt="fe80::1"), ICMPv6ND_RS(), ICMPv6ND_NA(tgt="fe80::1")):
        yield _ether(near / nd / ICMPv6NDOptSrcLLAddr(lladdr=addr.mac_text(GUEST_MAC)))
    yield _ether(near / ICMPv6MLReport2())


def _extended_seeds() -> Iterator[bytes]:
    udp_data = UDP(sport=5002, dport=6000) / Raw(b"behind headers")
    yield _ether(_ip(True, options=b"\x07\x07\x04\0\0\0\0\0") / udp_data)
    yield _ether(_ip(False) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / udp_data)
    yield _ether(_ip(False) / IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8::5"]) / udp_data)
    yield _ether(_ip(False) / IPv6ExtHdrFragment(id=3) / udp_data)
    for inner in (UDP(sport=5003, dport=6000) / Raw(bytes(90)), UDP(sport=68, dport=67) / BOOTP() / DHCP()):
        yield from (_ether(p) for p in fragment(_ip(True, id=77) / inner, 40))
    yield from (_ether(p) for p in fragment(_ip(True, id=78) / ICMP(id=9) / Raw(bytes(90)), 40))
    for message in (UDP(sport=5004, dport=6000), ICMPv6EchoRequest(id=9), UDP(sport=546, dport=547)):
        whole = _ip(False) / IPv6ExtHdrFragment(id=message.sport if UDP in message else 9) / message / Raw(bytes(88))
        yield from (_ether(p) for p in fragment6(whole, 120))


def _membership_seeds() -> Iterator[bytes]:
    """Reports of both families and their versions, and datagrams to a group of each."""
    for src, group, to in ((GUEST4, "224.0.0.251", "224.0.0.22"), (GUEST_LL, "ff02::fb", "ff02::16")):
        packed, v4 = addr.packed(group), len(src) == 4
        report = Report(len(packed), (Record(ALLOW, packed, (packed,)), Record(TO_EXCLUDE, packed)))
        ether = OUR_MAC + GUEST_MAC + (b"\x08\0" if v4 else b"\x86\xdd")
        for message in (report, Single(REPORT_V2 if v4 else REPORT6_V1, packed)):
            yield ether + igmp.packet(src, addr.packed(to), message.emit())
        yield _ether(_ip(v4, src=addr.text(src), dst=group) / UDP(sport=5353, dport=5353) / Raw(b"query"))


@cache
def seeds() -> tuple[bytes, ...]:
    """Valid frames of every kind, vnet headers first."""
    plain = itertools.chain(
        *(_tcp_seeds(v4) for v4 in (True, False)),
        *(_inbound_seeds(v4) for v4 in (True, False)),
        *(_udp_seeds(v4) for v4 in (True, False)),
        _service_seeds(),
        _extended_seeds(),
        _membership_seeds(),
    )
    joined = _ether(_ip(True) / UDP(sport=5005, dport=6000) / Raw(bytes(range(250)) * 4))
    super_frame = VNET.pack(F_NEEDS_CSUM, GSO_UDP_L4, 42, 100, 34, 6) + joined
    return (*(NO_OFFLOAD + f for f in plain), super_frame)


# Harm ----------------------------------------------------------------------------------------------------------------


def _flip(frame: bytearray, at: int, value: int) -> None:
    frame[at] ^= value & 0xFF or 1


def _byte(frame: bytearray, at: int, value: int) -> None:
    frame[at] = value & 0xFF


def _word(frame: bytearray, at: int, value: int) -> None:
    frame[at : at + 2] = value.to_bytes(2, "big")


def _cut(frame: bytearray, at: int, value: int) -> None:
    del frame[at:]


def _shorten(frame: bytearray, at: int, value: int) -> None:
    """Cut, and have the lengths of IP and UDP agree, so that what is inside is what ends early."""
    del frame[max(at, 34) :]
    if len(frame) < 34:
        return
    v4 = frame[12:14] == b"\x08\0"
    at, length = (16, len(frame) - 14) if v4 else (18, max(len(frame) - 54, 0))
    frame[at : at + 2] = length.to_bytes(2, "big")
    l4, proto = (34, frame[23]) if v4 else (54, frame[20])
    if proto == 17 and len(frame) >= l4 + 8:
        frame[l4 + 4 : l4 + 6] = (len(frame) - l4).to_bytes(2, "big")


def _grow(frame: bytearray, at: int, value: int) -> None:
    frame += bytes((value & 0xFF,)) * (at + 1)


CHANGES: tuple[Callable[[bytearray, int, int], None], ...] = (_flip, _byte, _word, _cut, _grow, _shorten)


def build(spec: Spec) -> bytes:
    """The frame of a spec. The vnet header is the kernel's, not the guest's: in most cases it vouches for a change."""
    which, changes = spec
    whole = seeds()[which % len(seeds())]
    frame = bytearray(whole[VNET_LEN:])
    for what, where, value in changes:
        if frame:
            CHANGES[what % len(CHANGES)](frame, where % len(frame), value)
    vouched = not whole[0] and changes and sum(where for _, where, _ in changes) % 8
    return (VOUCHED if vouched else whole[:VNET_LEN]) + frame


# By hand -------------------------------------------------------------------------------------------------------------

LENGTHS = (0, 1, 2, 4, 5, 7, 8, 9, 19, 20, 21, 27, 28, 39, 40, 48, 60, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)


def random_spec(r: random.Random) -> Spec:
    changes = []
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        where = r.randrange(r.choice((14, 54, 94, 400)))
        value = r.choice(LENGTHS) if r.random() < 0.5 else r.randrange(0x10000)
        changes.append((r.choice((0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 5)), where, value))
    return r.randrange(len(seeds())), changes


def random_frames(r: random.Random) -> list[bytes]:
    if r.random() < 0.05:
        return [VOUCHED + r.randbytes(r.randrange(100)) for _ in range(r.randrange(1, 5))]
    specs = [random_spec(r) for _ in range(r.randrange(1, 12))]
    if r.random() < 0.5:  # neighbours: fragments of one packet, segments of one connection
        first = r.randrange(len(seeds()))
        specs = [(first + i, changes if r.random() < 0.3 else []) for i, (_, changes) in enumerate(specs)]
        if r.random() < 0.5:
            r.shuffle(specs)
    return [build(spec) for spec in specs]


def main() -> None:
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns()
    end = time.monotonic() + seconds
    rounds = frames = 0
    drops: dict[str, int] = {}
    with harmless():
        while time.monotonic() < end:
            r = random.Random(seed + rounds)
            batch = random_frames(r)
            how: dict[str, Any] = {"together": r.random() < 0.5}
            how.update(room=r.choice((1 << 30, 5, 0)), mtu=r.choice((65520, 1500, 0)))
            try:
                counted = check(batch, **how)
            except Exception:
                print(f"seed {seed + rounds}: {how} {[f.hex() for f in batch]}", flush=True)
                raise
            for reason, n in counted.items():
                drops[reason] = drops.get(reason, 0) + n
            rounds += 1
            frames += len(batch)
    print(f"{rounds} rounds, {frames} frames, each twice; first seed {seed}")
    for reason, n in sorted(drops.items()):
        print(f"{n:9} {reason}")


if __name__ == "__main__":
    main()
