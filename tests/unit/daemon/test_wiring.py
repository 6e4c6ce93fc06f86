"""The composition root: a frame of each kind through everything, and what a failure costs."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, cast

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from passt import addr, log
from passt.daemon import wiring
from passt.flow.context import Context
from passt.flow.services import Taken
from passt.link import choose
from passt.link.backend import NoLink
from passt.linux import netns
from passt.linux.netns import Namespace
from passt.linux.tun import Tap as Device
from passt.loop.reactor import (
    TYPE_LISTEN,
    TYPE_PING,
    TYPE_TAP,
    TYPE_TCP,
    TYPE_TCP_SPLICE,
    TYPE_TCP_TIMER,
    TYPE_TIMER,
    TYPE_UDP,
    TYPE_UDP_SPLICE,
    make_ref,
)
from passt.policy.rules import Rule
from passt.ports.sockets import NO_SOCKETS, open_side
from passt.wire.checksum import PROTO_TCP, PROTO_UDP
from passt.wire.virtio import NO_OFFLOAD, VNET
from tests.unit.support import CONFIG, GATEWAY4, GUEST4, GUEST6, GUEST_LL, GUEST_MAC, OUR_MAC, free_ports


class Decision:
    """The part of the decision that `wire` reads: its configuration."""

    config = CONFIG


class Wired:
    """Everything, around a socket pair in place of the tap device."""

    def __init__(self) -> None:
        self.device, self.guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device.setblocking(False)
        self.guest.settimeout(5)
        device = Device(self.device.fileno(), "tap0", csum=True, tso=True, uso=False)
        self.link = choose.for_device(device)
        self.ctx: Context
        self.ctx, _, tap = wiring.wire(cast(Any, Decision), self.link, GUEST_MAC, Namespace(-1), NO_SOCKETS, NO_SOCKETS)
        assert tap is not None
        self.tap = tap

    def sends(self, packet: Packet, turns: int = 1) -> None:
        ether = Ether(src=addr.mac_text(GUEST_MAC), dst=addr.mac_text(OUR_MAC))
        self.guest.send(NO_OFFLOAD + bytes(ether / packet))
        for _ in range(turns):
            self.ctx.reactor.turn(5)

    def hears(self) -> Packet:
        return Ether(self.guest.recv(65536)[VNET.size :])

    def close(self) -> None:
        for flow in self.ctx.flows.by_index:
            if flow is not None:
                flow.sock.close()
        self.ctx.reactor.close()
        self.device.close()
        self.guest.close()


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Close what no object closes."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    for fd in set(os.listdir("/proc/self/fd")) - before:  # timers and the like, which live as long as the process does
        try:
            if re.search("timerfd|eventfd", os.readlink(f"/proc/self/fd/{fd}")):
                os.close(int(fd))
        except FileNotFoundError:
            pass  # the directory's own descriptor


@pytest.fixture
def wired() -> Iterator[Wired]:
    w = Wired()
    yield w
    w.close()


def test_context_is_complete(wired: Wired) -> None:
    for field in fields(Context):
        assert getattr(wired.ctx, field.name) is not None
    assert wired.ctx.guest.mac == GUEST_MAC
    assert (wired.ctx.guest.addr4, wired.ctx.guest.addr6) == (GUEST4, GUEST6)
    assert (wired.link.tso, wired.link.uso) == (True, False)


def test_arp_and_neighbour_discovery(wired: Wired) -> None:
    wired.sends(ARP(psrc="192.0.2.2", pdst="192.0.2.1"))
    assert wired.hears()[ARP].hwsrc == addr.mac_text(OUR_MAC)
    near = IPv6(src=addr.text(GUEST_LL), dst="ff02::1", hlim=255)
    wired.sends(near / ICMPv6ND_NS(tgt="fe80::1"))
    assert ICMPv6ND_NA in wired.hears()
    wired.sends(near / ICMPv6ND_RS())
    assert ICMPv6ND_RA in wired.hears()


def test_tcp_and_udp(wired: Wired) -> None:
    to_host = IP(src=addr.text(GUEST4), dst=addr.text(GATEWAY4))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as s:
        wired.sends(to_host / TCP(sport=40000, dport=server.getsockname()[1], flags="S"))
        assert wired.hears()[TCP].flags == "SA"
        s.bind(("127.0.0.1", 0))
        s.settimeout(5)
        wired.sends(to_host / UDP(sport=40000, dport=s.getsockname()[1]) / b"question")
        data, sender = s.recvfrom(100)
        s.sendto(data[::-1], sender)
        while True:  # on a busy machine SYN,ACK comes again meanwhile
            wired.ctx.reactor.turn(5)
            if UDP in (heard := wired.hears()):
                break
        answer = heard[UDP]
        assert bytes(answer.payload) == b"noitseuq" and answer.dport == 40000
    assert wired.ctx.flows.count == 2 and not wired.ctx.drops


def test_ping_is_handed_on(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    echo = Taken(lambda mac, src, dst, message, now, hops: seen.append(bytes(message)), fragments=True)
    monkeypatch.setitem(wired.ctx.services.icmp4, 8, echo)
    wired.sends(IP(src=addr.text(GUEST4), dst=addr.text(GATEWAY4)) / ICMP(id=1))
    assert seen[0][:1] == b"\x08"


# Without a tap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("proto", "kind"), [(PROTO_TCP, socket.SOCK_STREAM), (PROTO_UDP, socket.SOCK_DGRAM)])
def test_loopback_to_loopback_without_a_tap(monkeypatch: pytest.MonkeyPatch, proto: int, kind: int) -> None:
    """An outbound rule; both of its sides are in our own namespace here."""
    monkeypatch.setattr(netns, "setns", lambda fd, kind: None)

    class SpliceOnly:
        config = CONFIG

    with socket.socket(type=kind) as server, socket.socket(type=kind) as client, socket.socket(type=kind) as free:
        for s in (server, free):
            s.bind(("127.0.0.1", 0))
        at, to = free.getsockname()[1], server.getsockname()[1]
        free.close()
        rule = Rule("-T x", proto, True, at, at, to)
        SpliceOnly.config = replace(CONFIG, ip6=None, splice_only=True, forwards=(rule,))
        ns = open_side(SpliceOnly.config, outbound=True)
        ctx, _, tap = wiring.wire(cast(Any, SpliceOnly), None, addr.BROADCAST_MAC, Namespace(-1), NO_SOCKETS, ns)
        assert tap is None and isinstance(ctx.link, NoLink)
        if proto == PROTO_TCP:
            server.listen()
        for s in (server, client):
            s.settimeout(5)
        client.connect(("127.0.0.1", at))
        client.send(b"through")
        ctx.reactor.turn(5)
        if proto == PROTO_TCP:
            accepted, _ = server.accept()
            with accepted:
                while not (data := received(accepted)):
                    ctx.reactor.turn(5)
        else:
            data = server.recv(100)
        assert data == b"through"
        for flow in filter(None, ctx.flows.by_index):
            assert ctx.reactor.on_fault is not None
            monkeypatch.setattr(log, "_write", lambda level, text: None)
            ctx.reactor.on_fault(make_ref(SPLICE[proto], flow.fd, flow.index << 1), OSError(), 0)
        assert ctx.flows.count == 0
        assert ctx.ns is not None
        ctx.ns.close()
        ctx.reactor.turn(0)
        ctx.reactor.close()
        ns.listeners[0].sock.close()


SPLICE = {PROTO_TCP: TYPE_TCP_SPLICE, PROTO_UDP: TYPE_UDP_SPLICE}


def received(s: socket.socket) -> bytes:
    """Available data, empty if there is none yet."""
    try:
        return s.recv(100, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "service"),
    [(TYPE_TCP, "_tcp"), (TYPE_TCP_TIMER, "_tcp"), (TYPE_UDP, "_udp"), (TYPE_PING, "_icmp"), (TYPE_TIMER, None)],
)
def test_a_fault_goes_to_the_owner_of_the_event(
    monkeypatch: pytest.MonkeyPatch, kind: int, service: str | None
) -> None:
    calls: list[tuple[int, int]] = []

    def note(which: int) -> Callable[[int], None]:
        return lambda ref: calls.append((which, ref))

    monkeypatch.setattr(log, "_held", {})
    handlers = {TYPE_TCP: note(0), TYPE_TCP_TIMER: note(0), TYPE_UDP: note(1), TYPE_PING: note(2)}
    drops = Counter[str]()
    wiring._fault(handlers, drops, make_ref(kind, 5, 7), ZeroDivisionError(), 1.0)
    assert drops == {"fault": 1}
    owner = {"_tcp": 0, "_udp": 1, "_icmp": 2}
    assert calls == ([(owner[service], make_ref(kind, 5, 7))] if service else [])


def test_a_fault_costs_one_connection(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_held", {})
    lines: list[str] = []
    monkeypatch.setattr(log, "_write", lambda level, text: lines.append(text))
    to_host = IP(src=addr.text(GUEST4), dst=addr.text(GATEWAY4))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for sport in (40000, 40001):
            wired.sends(to_host / TCP(sport=sport, dport=server.getsockname()[1], flags="S"))
            assert wired.hears()[TCP].flags == "SA"
        flow = wired.ctx.flows.by_index[0]
        assert flow is not None

        def fail(ref: int, events: int, now: float) -> None:
            raise ZeroDivisionError("a defect of ours")

        wired.ctx.reactor.handle(TYPE_TCP, fail)
        accepted, _ = server.accept()
        with accepted:
            accepted.send(b"x")
            wired.ctx.reactor.turn(5)
        reset = wired.hears()[TCP]
        while reset.flags == "SA":  # sent again, since this guest does not answer
            reset = wired.hears()[TCP]
        assert "R" in reset.flags and reset.dport == 40000
    assert wired.ctx.flows.by_index[0] is None and wired.ctx.flows.by_index[1] is not None
    assert lines == ["Handling an event of type tcp failed: ZeroDivisionError('a defect of ours')"]


def test_a_fault_of_a_listener_is_handed_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays, and is not looked at for a moment."""
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_write", lambda level, text: None)
    port = free_ports()

    class Config:
        config = replace(CONFIG, forwards=(Rule("-t x", PROTO_TCP, False, port, port, port),))

    host = open_side(Config.config, outbound=False)
    ctx = wiring.wire(cast(Any, Config), None, addr.BROADCAST_MAC, Namespace(-1), host, NO_SOCKETS).ctx
    events: list[float] = []

    def fail(ref: int, mask: int, now: float) -> None:
        events.append(now)
        raise ZeroDivisionError("a defect of ours")

    ctx.reactor.handle(TYPE_LISTEN, fail)
    with socket.create_connection(("127.0.0.1", port)):
        for _ in range(5):
            ctx.reactor.turn(0)
        assert len(events) == 1
        while len(events) < 2:
            ctx.reactor.turn(5)
    ctx.reactor.close()
    host.listeners[0].sock.close()


def test_the_tap_is_watched(wired: Wired) -> None:
    fd = wired.device.fileno()
    assert wired.ctx.reactor._refs[fd] == make_ref(TYPE_TAP, fd, 0)
