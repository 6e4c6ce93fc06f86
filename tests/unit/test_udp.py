"""UDP between a fake tap and real sockets of the loopback: the gateway's address stands for it."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from scapy.layers.inet import ICMP, IP, UDP, UDPerror, defragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6, defragment6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from passt import addr, log, udp
from passt.flow.ip_fields import DF
from passt.flow.source import LOST, REASON
from passt.flow.table import ACTIVE, FREE
from passt.linux import sockopt
from passt.linux.sockopt import SOL_UDP, UDP_GRO, UDP_SEGMENT, Destroyed, ExtendedError
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp import Udp
from passt.udp_engine import io as udp_io
from passt.udp_engine import outbound
from passt.udp_engine.flow import UdpFlow
from passt.udp_engine.io import PLAIN

from .offload import received
from .oracle import recomputed
from .support import GATEWAY4, GATEWAY6, GUEST4, GUEST6, GUEST_MAC, T0, link, make_context, reactor, reconfigure, timers

SPORT = 0  # of flows whose port does not matter: replaced by a free one
OTHER_MAC = bytes.fromhex("525400999999")


class Talk:
    """A guest, our UDP, and a server on the host's loopback."""

    def __init__(self, *, v4: bool = True, **config: Any) -> None:
        self.v4 = v4
        self.guest, self.gateway = (GUEST4, GATEWAY4) if v4 else (GUEST6, GATEWAY6)
        self.ctx = make_context(pool_size=1 << 20, **config)
        self.link = link(self.ctx)
        self.udp = Udp(self.ctx)
        family, host = (socket.AF_INET, "127.0.0.1") if v4 else (socket.AF_INET6, "::1")
        self.server = socket.socket(family, socket.SOCK_DGRAM)
        self.server.settimeout(5)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.server.bind((host, 0))
        self.port: int = self.server.getsockname()[1]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.bind((host, 0))
            self.sport: int = s.getsockname()[1]
        self.key = self.key_to(self.gateway, self.port)

    def key_to(self, dst: bytes, port: int) -> bytes:
        return self.guest + dst + self.sport.to_bytes(2, "big") + port.to_bytes(2, "big")

    @property
    def flow(self) -> UdpFlow:
        """The only flow."""
        (flow,) = (f for f in self.ctx.flows.by_index if f is not None)
        assert isinstance(flow, UdpFlow)
        return flow

    def sends(self, *datagrams: bytes | tuple[bytes, int], now: float = T0, key: bytes = b"", fields: int = 0) -> None:
        """The guest sends datagrams, (payload, size) being a super-frame, in one batch."""
        frames: list[int] = []
        at = 64
        for datagram in datagrams:
            data, size = datagram if isinstance(datagram, tuple) else (datagram, 0)
            self.ctx.pool.buf[at : at + len(data)] = data
            frames += (at, at + len(data), size)
            at += len(data) + 5
        self.udp.tap_handler(key or self.key, frames, now, fields)

    def arrived(self, count: int) -> list[bytes]:
        """The next datagrams at the server."""
        return [self.server.recv(65536) for _ in range(count)]

    def answers(self, *datagrams: bytes) -> None:
        """The server sends to the guest's flow."""
        for d in datagrams:
            self.server.sendto(d, self.flow.sock.getsockname())

    def event(self, events: int = EPOLLIN, now: float = T0) -> None:
        """Handle `events` as soon as epoll would report them."""
        p = select.poll()
        p.register(self.flow.fd, events)
        assert p.poll(5000), "nothing to report"
        reactor(self.ctx).fire(self.flow.fd, events, now)

    def packets(self) -> list[Packet]:
        """The packets that the guest's driver hands up, checked by scapy."""
        frames = received(self.link)
        assert [recomputed(f) for f in frames] == frames
        return [Ether(f) for f in frames]

    def payloads(self) -> list[bytes]:
        return [bytes(p[UDP].payload) for p in self.packets()]

    def close(self) -> None:
        self.server.close()
        for flow in self.ctx.flows.by_index:
            if flow is not None:
                flow.sock.close()
        reactor(self.ctx).end_turn(T0)


Start = Callable[..., Talk]


@pytest.fixture
def start() -> Iterator[Start]:
    """Begins conversations, ends them."""
    talks: list[Talk] = []

    def begin(**config: Any) -> Talk:
        talks.append(Talk(**config))
        return talks[-1]

    yield begin
    for t in talks:
        t.close()


@pytest.fixture(params=[True, False], ids=["IPv4", "IPv6"])
def talk(request: pytest.FixtureRequest, start: Start) -> Talk:
    return start(v4=request.param)


# Guest -> host -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1400, 65507])
def test_a_datagram_of_the_guest(talk: Talk, size: int) -> None:
    data = os.urandom(size)
    talk.sends(data)
    assert talk.server.recvfrom(65536)[0] == data
    assert talk.flow.sock.getsockname()[1] == talk.sport


class Writes:
    """Counts and records system calls that send; can fail them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        self.errors: list[int] = []
        self._writev = os.writev
        monkeypatch.setattr(os, "writev", self)

    def __call__(self, fd: int, views: list[memoryview]) -> int:
        if self.errors:
            number = self.errors.pop(0)
            if number:
                raise OSError(number, os.strerror(number))
        self.lengths.append(sum(map(len, views)))
        return self._writev(fd, views)


def test_a_run_is_one_system_call(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    sent = [os.urandom(1000) for _ in range(20)] + [os.urandom(300)]
    talk.sends(*sent)
    assert talk.arrived(21) == sent
    assert writes.lengths == [20300]


def test_super_frames_of_the_guest_are_joined(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    a, b, c = os.urandom(5000), os.urandom(1000), os.urandom(2500)
    talk.sends((a, 1000), b, (c, 1000))
    assert b"".join(talk.arrived(9)) == a + b + c
    assert writes.lengths == [8500]


def test_all_sizes_in_one_batch_stay_in_order(talk: Talk) -> None:
    sent = [os.urandom(n) for n in (100, 100, 1400, 1400, 7, 0, 0, 1400, 9000, 100, 100, 100)]
    talk.sends(*sent)
    assert talk.arrived(len(sent)) == sent


def test_the_segment_size_is_set_only_when_it_must(talk: Talk) -> None:
    talk.sends(b"x" * 100, b"x" * 100)
    assert talk.flow.gso_size == 100
    talk.sends(b"x" * 50)
    talk.sends(b"x" * 100)
    assert talk.flow.gso_size == 100
    talk.sends(b"x" * 101)
    assert talk.flow.gso_size == 0
    assert talk.flow.sock.getsockopt(SOL_UDP, UDP_SEGMENT) == 0
    assert [len(d) for d in talk.arrived(5)] == [100, 100, 50, 100, 101]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EMSGSIZE])
def test_a_path_that_refuses_segments_gets_single_datagrams_for_good(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    writes = Writes(monkeypatch)
    writes.errors = [number, number]
    sent = [os.urandom(n) for n in (1000, 1000, 1000, 10)]
    talk.sends(*sent)
    talk.sends((b"y" * 250, 100), b"z")
    assert talk.arrived(8) == [*sent, b"y" * 100, b"y" * 100, b"y" * 50, b"z"]
    assert writes.lengths == [1000, 1000, 1000, 10, 100, 100, 50, 1]
    assert talk.flow.gso_size == 0


def test_a_single_datagram_that_a_segment_size_keeps_back(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.sends(b"x" * 100, b"x" * 100)
    writes = Writes(monkeypatch)
    writes.errors = [errno.EINVAL, errno.EINVAL]
    talk.sends(b"y" * 90)
    assert talk.arrived(3) == [b"x" * 100, b"x" * 100, b"y" * 90]
    assert talk.flow.sock.getsockopt(SOL_UDP, UDP_SEGMENT) == 0


def test_a_kernel_without_segments(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "probe_udp_segment", lambda: False)
    talk = start()
    writes = Writes(monkeypatch)
    talk.sends(b"a" * 10, b"b" * 10, (b"c" * 25, 10))
    assert talk.arrived(5) == [b"a" * 10, b"b" * 10, b"c" * 10, b"c" * 10, b"c" * 5]
    assert writes.lengths == [10, 10, 10, 10, 5]


def test_a_full_buffer_is_a_drop_of_each_datagram(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    writes.errors = [errno.EAGAIN]
    talk.sends(b"x" * 100, b"x" * 100, b"x")
    assert talk.ctx.drops == {"udp: send: EAGAIN": 3}
    assert talk.link.frames == []


@pytest.mark.parametrize("told", ["by an event", "when receiving", "when sending"])
def test_a_flow_whose_socket_was_destroyed_begins_again(talk: Talk, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """By root of the host, `ss -K`: the socket is not connected any more."""
    talk.sends(b"first")
    assert talk.arrived(1) == [b"first"]
    flow = talk.flow
    if told == "when sending":
        writes = Writes(monkeypatch)
        writes.errors = [errno.ECONNABORTED, errno.EDESTADDRREQ]
        talk.sends(b"lost")
    else:
        if told == "by an event":
            with monkeypatch.context() as m:
                m.setattr("passt.udp.read_errors", lambda _: (_ for _ in ()).throw(Destroyed(errno.ECONNABORTED, "")))
                reactor(talk.ctx).fire(flow.fd, EPOLLERR | EPOLLIN, T0)
        else:
            with monkeypatch.context() as m:
                m.setattr("passt.udp.receive", _aborted)
                flow.gro = 1
                reactor(talk.ctx).fire(flow.fd, EPOLLIN, T0)
    assert flow.state != ACTIVE
    talk.sends(b"again")
    assert talk.arrived(1)[-1:] == [b"again"]
    assert talk.flow is not flow


def _aborted(*_: object) -> None:
    raise OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


def test_an_errno_of_an_earlier_datagram_does_not_cost_this_one(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    writes.errors = [errno.ECONNREFUSED]
    talk.sends(b"hello")
    assert talk.arrived(1) == [b"hello"]
    assert not talk.ctx.drops


@pytest.mark.parametrize(
    ("number", "code4", "code6"),
    [(errno.ENETUNREACH, 0, 0), (errno.EHOSTUNREACH, 1, 3), (errno.EPERM, 13, 1), (errno.ECONNREFUSED, 3, 4)],
)
def test_what_the_kernel_refuses_to_send_is_told(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, number: int, code4: int, code6: int
) -> None:
    writes = Writes(monkeypatch)
    writes.errors = [number, number]
    talk.sends(b"hello")
    (p,) = talk.packets()
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code) == (3, code4)
        assert (p[IP].src, p[IP].dst) == (addr.text(GATEWAY4), addr.text(GUEST4))
    else:
        assert p[ICMPv6DestUnreach].code == code6
        assert (p[IPv6].src, p[IPv6].dst) == (addr.text(GATEWAY6), addr.text(GUEST6))
    assert (p[UDPerror].sport, p[UDPerror].dport) == (talk.sport, talk.port)
    assert bytes(p[UDPerror].payload) == b"hello"
    assert talk.ctx.drops == {f"udp: send: {errno.errorcode[number]}": 1}


def test_hops_of_the_guest_are_kept(talk: Talk) -> None:
    option = sockopt.hops_option(talk.gateway)
    talk.sends(b"x", fields=3)
    assert talk.flow.sock.getsockopt(*option) == 3
    talk.sends(b"x", fields=9)
    assert talk.flow.sock.getsockopt(*option) == 9
    talk.sends(b"x")
    assert talk.flow.sock.getsockopt(*option) == 9


def test_traffic_class_of_the_guest_is_kept(talk: Talk) -> None:
    option = sockopt.TRAFFIC_CLASS[not talk.v4]
    talk.sends(b"x", fields=64)
    assert talk.flow.sock.getsockopt(*option) == 0
    talk.sends(b"x", fields=0xB8 << 8 | 64)
    assert talk.flow.sock.getsockopt(*option) == 0xB8
    talk.sends(b"x", fields=0)  # reassembled, so not known
    assert talk.flow.sock.getsockopt(*option) == 0xB8
    talk.sends(b"x", fields=64)
    assert talk.flow.sock.getsockopt(*option) == 0


def test_dont_fragment_of_the_guest_is_kept(talk: Talk) -> None:
    option = sockopt.MTU_DISCOVER[not talk.v4]
    for fields, value in ((64, 0), (DF | 64, 2), (0, 0), (DF, 2)):
        talk.sends(b"x", fields=fields)
        assert talk.flow.sock.getsockopt(*option) == value


def test_traffic_class_of_what_comes_back(talk: Talk) -> None:
    option = sockopt.TRAFFIC_CLASS[not talk.v4]
    talk.sends(b"?", fields=0x0100 | 64)
    talk.arrived(1)
    for tos, count in ((0xB8, 1), (3, 5), (0, 5), (1, 1), (0, 1)):
        talk.server.setsockopt(*option, tos)
        talk.answers(*(b"answer" for _ in range(count)))
        talk.sends(b"?", fields=0x0100 | 64)
        packets: list[Packet] = []
        while len(packets) < count:
            talk.event()
            packets += talk.packets()
        assert {p[IP].tos if talk.v4 else p[IPv6].tc for p in packets} == {tos}


def test_a_class_that_appears_is_found(talk: Talk) -> None:
    """Single replies are received without a look at their class while it is zero; not for ever."""
    talk.sends(b"?", fields=64)
    talk.arrived(1)
    seen = []
    for i in range(2 * PLAIN):
        talk.server.setsockopt(*sockopt.TRAFFIC_CLASS[not talk.v4], 0xB8 if i else 0)
        talk.answers(b"!")
        talk.link.frames.clear()
        talk.flow.reply_expected = True
        talk.event()
        (p,) = talk.packets()
        seen.append(p[IP].tos if talk.v4 else p[IPv6].tc)
    assert seen == [0] * (PLAIN + 1) + [0xB8] * (PLAIN - 1)


def test_a_class_of_the_guest_lets_that_of_the_answer_be_looked_at(talk: Talk) -> None:
    option = sockopt.TRAFFIC_CLASS[not talk.v4]
    for sent, answered in ((0, 0), (0xB8, 1)):
        talk.sends(b"?", fields=sent << 8 | 64)
        talk.arrived(1)
        talk.server.setsockopt(*option, answered)
        talk.answers(b"!")
        talk.event()
        (p,) = talk.packets()
        assert (p[IP].tos if talk.v4 else p[IPv6].tc) == answered


@pytest.mark.parametrize("v4", [True, False])
def test_fragments_have_the_class(start: Start, v4: bool) -> None:
    talk = start(v4=v4, mtu=1280)
    talk.sends(b"?", fields=0x0100)
    talk.server.setsockopt(*sockopt.TRAFFIC_CLASS[not talk.v4], 0xB8)
    talk.answers(bytes(4000))
    talk.event()
    assert {p[IP].tos if v4 else p[IPv6].tc for p in map(Ether, received(talk.link))} == {0xB8}


def test_fields_that_stay_cost_no_system_call(talk: Talk) -> None:
    talk.sends(b"x", fields=DF | 0x0300 | 64)
    talk.flow.sock = cast(Any, SimpleNamespace(close=talk.flow.sock.close))  # has no setsockopt
    for _ in range(3):
        talk.sends(b"x", fields=DF | 0x0300 | 64)


def test_a_datagram_too_big_for_the_hosts_own_link(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports it twice: by the send, and in the error queue, without the datagram."""
    local = ExtendedError(errno.EMSGSIZE, sockopt.ORIGIN_LOCAL, 0, 0, 1400, None), b""
    Writes(monkeypatch).errors = 2 * [errno.EMSGSIZE]
    monkeypatch.setattr(udp, "read_errors", lambda sock: [local])
    monkeypatch.setattr(udp, "path_mtu", lambda sock, v6: 1400)
    talk.sends(bytes(1450), fields=DF | 64)
    (p,) = talk.packets()
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code, p[ICMP].nexthopmtu) == (3, 4, 1400)
    else:
        assert p[ICMPv6PacketTooBig].mtu == 1400
    assert (p[UDPerror].sport, p[UDPerror].dport) == (talk.sport, talk.port)
    assert talk.ctx.drops == {"udp: send: EMSGSIZE": 1}
    reactor(talk.ctx).fire(talk.flow.fd, EPOLLERR, T0)
    assert talk.packets() == []


def test_segments_that_are_too_big_leave_segmentation_on(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """QUIC sends its next batch in a size that fits."""
    Writes(monkeypatch).errors = 8 * [errno.EMSGSIZE]
    talk.sends((bytes(3 * 1450), 1450), fields=DF | 64)
    assert talk.ctx.drops == {"udp: send: EMSGSIZE": 3}
    talk.sends((bytes(3 * 1300), 1300), fields=DF | 64)
    assert talk.flow.gso_size == 1300
    assert [len(d) for d in talk.arrived(3)] == [1300, 1300, 1300]


@pytest.mark.parametrize(
    ("src", "dst", "sport", "dport", "reason"),
    [
        (GUEST4, addr.ANY4, 1, 2, "udp: no address to answer or to send to"),
        (addr.ANY4, GATEWAY4, 1, 2, "udp: no address to answer or to send to"),
        (addr.packed("224.0.0.1"), GATEWAY4, 1, 2, "udp: no address to answer or to send to"),
        (GUEST6, addr.ANY6, 1, 2, "udp: no address to answer or to send to"),
        (GUEST4, addr.LOOPBACK4, 1, 2, "udp: martian address"),
        (GUEST4, addr.packed("127.0.0.53"), 1, 53, "udp: martian address"),
        (addr.LOOPBACK4, GATEWAY4, 1, 2, "udp: martian address"),
        (GUEST6, addr.LOOPBACK6, 1, 2, "udp: martian address"),
        (GUEST6, addr.packed("::ffff:127.0.0.1"), 1, 2, "udp: martian address"),
        (addr.packed("::ffff:192.0.2.2"), GATEWAY6, 1, 2, "udp: martian address"),
        (GUEST4, GATEWAY4, 0, 2, "udp: port 0"),
        (GUEST4, GATEWAY4, 1, 0, "udp: port 0"),
    ],
)
def test_what_begins_no_flow(start: Start, src: bytes, dst: bytes, sport: int, dport: int, reason: str) -> None:
    talk = start()
    talk.sends(b"a", b"b", key=src + dst + sport.to_bytes(2, "big") + dport.to_bytes(2, "big"))
    assert talk.ctx.drops == {reason: 2}
    assert talk.ctx.flows.count == 0
    assert talk.link.frames == []


@pytest.mark.parametrize(
    ("config", "reason"), [({"no_udp": True}, "udp: disabled"), ({"ip4": None}, "udp: address family is off")]
)
def test_what_is_turned_off(start: Start, config: dict[str, Any], reason: str) -> None:
    talk = start(**config)
    talk.sends(b"a")
    assert talk.ctx.drops == {reason: 1}


def refusing(number: int) -> Callable[..., socket.socket]:
    def open_socket(*_: object, **__: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    return open_socket


def test_a_destination_without_route_is_unreachable(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "open_socket", refusing(errno.ENETUNREACH))
    talk.sends(b"first", b"second")
    (p,) = talk.packets()
    assert p[ICMP].code == 0 if talk.v4 else p[ICMPv6DestUnreach].code == 0
    assert bytes(p[UDPerror].payload) == b"first"
    assert talk.ctx.drops == {"udp: no socket: ENETUNREACH": 2}


@pytest.mark.parametrize(("why", "told"), [(LOST, True), (REASON, False)])
def test_the_guest_is_told_of_the_end_of_a_flow_whose_family_the_host_has_lost(
    talk: Talk, why: str, told: bool
) -> None:
    """A new address would take the next datagram. Without one there is nothing to wait for."""
    talk.sends(b"a question")
    talk.ctx.services.enders["udp"](talk.flow, why)
    found = talk.packets()
    assert len(found) == told and not any(talk.ctx.flows.by_index)
    for p in found:
        assert p[ICMP].code == 0 if talk.v4 else p[ICMPv6DestUnreach].code == 0
        assert (p[UDPerror].sport, p[UDPerror].dport) == (talk.sport, talk.port)


def test_no_errors_about_broadcasts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = start()
    monkeypatch.setattr(outbound, "open_socket", refusing(errno.ENETUNREACH))
    talk.sends(b"first", key=talk.key_to(addr.BROADCAST4, 9))
    assert talk.link.frames == []


def test_a_full_table_is_counted_and_leaves_no_socket(talk: Talk) -> None:
    talk.ctx.flows.limit = 0
    talk.sends(b"a")
    assert talk.ctx.drops == {"udp: no flow: table full": 1}
    assert reactor(talk.ctx).refs == {}


# Host -> guest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1400, 65000])
def test_an_answer(talk: Talk, size: int) -> None:
    talk.sends(b"?")
    data = os.urandom(size)
    talk.answers(data)
    talk.event()
    (p,) = talk.packets()
    packet = p[IP if talk.v4 else IPv6]
    assert (packet.src, packet.dst) == (addr.text(talk.gateway), addr.text(talk.guest))
    assert (p[UDP].sport, p[UDP].dport) == (talk.port, talk.sport)
    assert bytes(p[UDP].payload) == data


def test_the_first_answer_is_received_alone_the_rest_together(talk: Talk) -> None:
    talk.sends(b"?")
    talk.answers(b"one", b"two", b"six")
    talk.event()
    assert talk.payloads() == [b"one"]
    talk.event()
    assert len(talk.link.frames) == 1
    assert talk.payloads() == [b"two", b"six"]


def test_a_burst_is_one_super_frame(talk: Talk) -> None:
    talk.sends(b"?")
    sent = [os.urandom(1400) for _ in range(40)] + [os.urandom(99)]
    talk.flow.reply_expected = False
    talk.answers(*sent)
    talk.event()
    assert len(talk.link.frames) == 1
    assert talk.payloads() == sent


def test_a_guest_without_super_frames(talk: Talk) -> None:
    talk.link.uso = False
    talk.sends(b"?")
    talk.flow.reply_expected = False
    sent = [os.urandom(1400) for _ in range(10)]
    talk.answers(*sent)
    talk.event()
    assert len(talk.link.frames) == 10
    assert talk.payloads() == sent


def test_a_stream_gathers_for_a_moment(talk: Talk) -> None:
    """Small batches in a row would cost the guest's receiver a wake-up each."""
    watched, timers_ = reactor(talk.ctx).events, timers(talk.ctx).services
    talk.sends(b"?")
    talk.flow.reply_expected = False
    talk.answers(*[b"x"] * 8)
    talk.event()
    assert len(talk.payloads()) == 8
    assert watched[talk.flow.fd] == EPOLLERR
    timer = timers_.deadlines.index(T0 + udp_io.PAUSE)
    talk.answers(*[b"y"] * 40)
    timers_.fire(timer)
    assert talk.payloads() == [b"y"] * 40
    assert watched[talk.flow.fd] == EPOLLIN | EPOLLERR  # 40 are enough: read as they come
    talk.answers(b"z")
    talk.event()
    assert talk.payloads() == [b"z"]
    assert watched[talk.flow.fd] == EPOLLIN | EPOLLERR  # one is no stream
    assert timers_.deadlines[timer] is None


def test_a_pause_that_brings_nothing_and_one_that_outlives_its_flow(talk: Talk) -> None:
    timers_ = timers(talk.ctx).services
    talk.sends(b"?")
    talk.flow.reply_expected = False
    talk.answers(*[b"x"] * 8)
    talk.event()
    talk.link.take()
    timer = timers_.deadlines.index(T0 + udp_io.PAUSE)
    timers_.fire(timer)
    assert talk.link.take() == []
    talk.answers(*[b"x"] * 8)
    talk.event()
    talk.link.take()
    talk.udp.fault_key(talk.key)
    timers_.fire(timer)
    assert talk.link.take() == []


def gro_burst(talk: Talk, data: bytes, size: int) -> None:
    """The server sends `data` in datagrams of `size`, in one piece."""
    talk.server.setsockopt(SOL_UDP, UDP_SEGMENT, size)
    talk.answers(data)
    talk.server.setsockopt(SOL_UDP, UDP_SEGMENT, 0)


def test_bursts_turn_joining_on(talk: Talk) -> None:
    talk.sends(b"?")
    talk.flow.reply_expected = False
    talk.answers(*[b"x"] * udp_io.GRO_MIN)
    talk.event()
    assert talk.flow.gro
    assert talk.flow.sock.getsockopt(SOL_UDP, UDP_GRO) == 1
    talk.link.take()
    data = os.urandom(20500)
    gro_burst(talk, data, 1000)
    talk.sends(b"?")  # an answer is likely, but for flows like this one it may be a joined one
    talk.event()
    assert len(talk.link.frames) == 1
    assert talk.payloads() == [data[i : i + 1000] for i in range(0, 20500, 1000)]


def test_joined_datagrams_for_a_guest_without_super_frames(talk: Talk) -> None:
    talk.link.uso = False
    talk.sends(b"?")
    talk.flow.sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    talk.flow.gro = True
    gro_burst(talk, b"x" * 250, 100)
    talk.event()
    assert [len(v) for v in talk.link.vnet] == [10] * 3
    assert talk.payloads() == [b"x" * 100, b"x" * 100, b"x" * 50]


def test_a_kernel_that_joins_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "probe_udp_gro", lambda: False)
    talk = start()
    talk.sends(b"?")
    talk.flow.reply_expected = False
    talk.answers(*[b"x"] * 10)
    talk.event()
    assert not talk.flow.gro
    assert talk.payloads() == [b"x"] * 10


@pytest.mark.parametrize("mtu", [1500, 65520])
@pytest.mark.parametrize("asked", [True, False])
def test_what_exceeds_the_mtu_goes_in_fragments(start: Start, mtu: int, asked: bool) -> None:
    talk = start(mtu=mtu)
    talk.sends(b"?")
    talk.flow.reply_expected = asked
    data = os.urandom(65507)
    talk.answers(data)
    talk.event()
    frames = talk.link.take()
    packets = [Ether(f)[IP] for f in frames]
    assert all(len(p) <= mtu for p in packets)
    (whole,) = defragment(packets)
    assert recomputed(bytes(Ether(frames[0][:14]) / whole))[14:] == bytes(whole)
    assert bytes(IP(bytes(whole))[UDP].payload) == data


@pytest.mark.parametrize("later", [0, 1280, 9000])
def test_a_flow_keeps_the_mtu_that_it_began_with(start: Start, later: int) -> None:
    """The next one has the new one. None at all (0) is no length of fragments."""
    talk = start(mtu=1500)
    talk.sends(b"?")
    reconfigure(talk.ctx, mtu=later)
    talk.answers(b"x" * 4000)
    talk.event()
    assert [len(f) for f in talk.link.take()] == [14 + n for n in (1500, 1500, 4028 + 2 * 20 - 2 * 1500)]
    talk.udp.forget()
    talk.sends(b"?")
    talk.answers(b"x" * 4000)
    talk.event()
    assert max(len(f) for f in talk.link.take()) == 14 + (1276 if later == 1280 else 4028)


def test_udp_is_switched_off_and_on(talk: Talk) -> None:
    reconfigure(talk.ctx, no_udp=True)
    talk.sends(b"?")
    assert talk.ctx.drops == {"udp: disabled": 1}
    reconfigure(talk.ctx, no_udp=False)
    talk.sends(b"?")
    assert talk.arrived(1) == [b"?"]


def test_ipv6_fragments_and_their_neighbours(start: Start) -> None:
    talk = start(v4=False, mtu=1280)
    talk.sends(b"?")
    talk.flow.reply_expected = False
    sent = [os.urandom(2000), os.urandom(2000), os.urandom(100)]
    talk.answers(*sent)
    talk.event()
    vnets, frames = talk.link.vnet, talk.link.take()
    assert [bool(v) for v in vnets] == [False] * 4 + [True]
    for i in (0, 2):
        whole = IPv6(bytes(defragment6([Ether(f)[IPv6] for f in frames[i : i + 2]])))
        assert bytes(whole[UDP].payload) == sent[i // 2]
    assert bytes(Ether(frames[4])[UDP].payload) == sent[2]


def test_fragmented_datagrams_differ_in_their_identification(start: Start) -> None:
    talk = start(mtu=1500)
    talk.sends(b"?")
    talk.flow.reply_expected = False
    talk.answers(b"x" * 2000, b"x" * 2000)
    talk.event()
    idents = [Ether(f)[IP].id for f in talk.link.take()]
    assert idents[0] == idents[1] != idents[2] == idents[3]


def test_an_event_for_nothing_is_borne(talk: Talk) -> None:
    talk.sends(b"?")
    for _ in range(2):
        reactor(talk.ctx).fire(talk.flow.fd, EPOLLIN | EPOLLERR, T0)
    assert talk.link.frames == []


def test_another_guest_mac(talk: Talk) -> None:
    talk.sends(b"?")
    talk.ctx.neighbours.learn(talk.flow.src, GUEST_MAC)
    talk.ctx.neighbours.sender(OTHER_MAC)
    talk.ctx.neighbours.learn(talk.flow.src, OTHER_MAC)
    talk.answers(b"x")
    talk.event()
    assert talk.link.take_one()[:6] == OTHER_MAC


# Errors --------------------------------------------------------------------------------------------------------------


def check_port_unreachable(talk: Talk) -> None:
    (p,) = talk.packets()
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code) == (3, 3)
        assert (p[IP].src, p[IP].dst) == (addr.text(GATEWAY4), addr.text(GUEST4))
    else:
        assert p[ICMPv6DestUnreach].code == 4
        assert p[IPv6].src == addr.text(GATEWAY6)
    assert (p[UDPerror].sport, p[UDPerror].dport) == (talk.sport, talk.port)
    assert bytes(p[UDPerror].payload) == b"anybody?"


def test_a_closed_port_is_told_when_epoll_says_so(talk: Talk) -> None:
    talk.server.close()
    talk.sends(b"anybody?")
    talk.event(EPOLLERR)
    check_port_unreachable(talk)


def test_a_closed_port_is_told_by_a_flow_that_makes_way_for_a_listener(talk: Talk) -> None:
    """In the turn in which the datagram left: there was no event yet."""
    talk.server.close()
    talk.sends(b"anybody?")
    talk.udp.free_ports({talk.sport})
    assert talk.ctx.flows.closed == {("udp", "made way for a listener"): 1}
    check_port_unreachable(talk)


def test_answers_reach_the_guest_although_the_flow_makes_way_for_a_listener(talk: Talk) -> None:
    talk.sends(b"?")
    talk.flow.reply_expected = False
    talk.answers(b"one", b"two")
    talk.udp.free_ports({talk.sport})
    assert talk.payloads() == [b"one", b"two"]
    assert talk.ctx.flows.closed == {("udp", "made way for a listener"): 1}


def test_a_closed_port_is_told_when_the_next_send_says_so(talk: Talk) -> None:
    talk.server.close()
    talk.sends(b"anybody?")
    p = select.poll()
    p.register(talk.flow.fd, select.POLLERR)
    assert p.poll(5000)
    talk.sends(b"again")
    check_port_unreachable(talk)
    assert not talk.ctx.drops


def test_a_closed_port_is_told_when_a_receive_says_so(talk: Talk) -> None:
    talk.server.close()
    talk.sends(b"anybody?")
    talk.event(EPOLLIN)
    check_port_unreachable(talk)


def test_packet_too_big_has_the_mtu_and_the_router(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.sends(b"x")
    router = addr.packed("203.0.113.1" if talk.v4 else "2001:db8:f::1")
    error = (
        ExtendedError(errno.EMSGSIZE, sockopt.ORIGIN_ICMP, 3, 4, 1400, router)
        if talk.v4
        else ExtendedError(errno.EMSGSIZE, sockopt.ORIGIN_ICMP6, 2, 0, 1400, router)
    )
    monkeypatch.setattr(udp, "read_errors", lambda sock: [(error, b"big")])
    reactor(talk.ctx).fire(talk.flow.fd, EPOLLERR, T0)
    (p,) = talk.packets()
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code, p[ICMP].nexthopmtu) == (3, 4, 1400)
    else:
        assert p[ICMPv6PacketTooBig].mtu == 1400
    assert p[IP if talk.v4 else IPv6].src == addr.text(router)
    assert bytes(p[UDPerror].payload) == b"big"


# Lifecycle -----------------------------------------------------------------------------------------------------------


def test_a_flow_ends_when_nothing_was_sent_or_received(talk: Talk) -> None:
    talk.sends(b"?")
    flow = talk.flow
    talk.answers(b"!")
    talk.event(now=T0 + 100)
    timers(talk.ctx).services.fire(0)
    assert talk.flow is flow
    timers(talk.ctx).services.fire(0, T0 + 279.9)
    assert talk.flow is flow
    timers(talk.ctx).services.fire(0, T0 + 285)
    assert (flow.state, talk.ctx.flows.count) == (FREE, 0)
    talk.sends(b"?", now=T0 + 300)
    assert talk.flow is not flow


def test_many_flows_make_room_for_more(start: Start) -> None:
    talk = start()
    talk.udp._flows.limit = 4
    for i in range(5):
        talk.sends(b"x", now=T0 + i, key=talk.key_to(GATEWAY4, 1000 + i))
    assert [k[-2:] for k in talk.udp._by_key] == [(1000 + i).to_bytes(2, "big") for i in range(1, 5)]


def test_debug_lines_name_both_ends(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "debug_on", True)
    monkeypatch.setattr(log, "debug", lines.append)
    talk.server.close()
    talk.sends(b"?")
    talk.event(EPOLLERR)
    ends = f"{addr.host_port(talk.guest, talk.sport)} -> {addr.host_port(talk.gateway, talk.port)}"
    host = addr.host_port(addr.LOOPBACK4 if talk.v4 else addr.LOOPBACK6, talk.port)
    assert f"Flow 0 (UDP flow): {ends} (host {host}) opened" in lines
    assert any("error on socket" in line and "ECONNREFUSED" in line for line in lines)
