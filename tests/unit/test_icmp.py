"""Ping against a fake ping socket (real ones need leave of the host), and error messages."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, ICMPerror, defragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from passt import addr, icmp, log
from passt.flow.ip_fields import DF
from passt.flow.table import FREE
from passt.icmp import Icmp, PingNotAllowed, refuse
from passt.linux.sockopt import (
    MTU_DISCOVER,
    ORIGIN_ICMP,
    ORIGIN_ICMP6,
    ORIGIN_LOCAL,
    PATH_MTU,
    TRAFFIC_CLASS,
    ExtendedError,
    hops_option,
)
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.policy.config import PASST, Ip4
from passt.policy.forwarding import Forwarding
from passt.policy.settings import Settings

from .offload import received
from .oracle import recomputed
from .support import CONFIG, GATEWAY4, GATEWAY6, GUEST4, GUEST6, GUEST_MAC, IP4, T0, link, make_context, reactor, timers

FAR4, FAR6 = addr.packed("198.51.100.9"), addr.packed("2001:db8:9::9")
ROUTER4, ROUTER6 = addr.packed("203.0.113.1"), addr.packed("2001:db8:f::1")
IDENT = 0x1234
Control = list[tuple[int, int, bytes]]


class PingSocket:
    """A ping socket: `inbox` and `errors` are what the kernel has for it, `sent` and `options` what we gave it."""

    def __init__(self, host: bytes, ident: int) -> None:
        self.host, self.ident = host, ident
        self.real = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # for its descriptor
        self.sent: list[bytes] = []
        self.inbox: list[tuple[bytes, bytes, int] | OSError] = []
        self.errors: list[tuple[ExtendedError, bytes]] = []
        self.send_errors: list[int] = []
        self.path_mtu = 0
        self.options: list[tuple[int, ...]] = []

    def fileno(self) -> int:
        return self.real.fileno()

    def close(self) -> None:
        self.real.close()

    def setsockopt(self, *option: int) -> None:
        self.options.append(option)

    def getsockopt(self, *option: int) -> int:
        return self.path_mtu if option in PATH_MTU else 0

    def send(self, data: memoryview) -> int:
        if self.send_errors:
            number = self.send_errors.pop(0)
            raise OSError(number, os.strerror(number))
        self.sent.append(bytes(data))
        return len(data)

    def recvmsg_into(self, buffers: tuple[bytearray], _: int) -> tuple[int, Control, int, tuple[str, int]]:
        if not self.inbox:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        first = self.inbox.pop(0)
        if isinstance(first, OSError):
            raise first
        data, sender, tos = first
        buffers[0][: len(data)] = data
        v4 = len(self.host) == 4
        told = (socket.IPPROTO_IP, socket.IP_TOS, bytes((tos,)))
        told6 = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("=i", tos))
        return len(data), [told if v4 else told6], 0, (addr.text(sender), 0)

    def recvmsg(self, *_: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        if not self.errors:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        error, quoted = self.errors.pop(0)
        option = (socket.IPPROTO_IP, 11) if len(self.host) == 4 else (socket.IPPROTO_IPV6, 25)
        return quoted, [(*option, error.emit())], 0, None


class Talk:
    """A guest that pings, and the sockets that are opened for it."""

    def __init__(self, *, v4: bool = True, **config: Any) -> None:
        self.v4 = v4
        self.guest, self.far = (GUEST4, FAR4) if v4 else (GUEST6, FAR6)
        self.ctx = make_context(**config)
        self.link = link(self.ctx)
        self.icmp = Icmp(self.ctx)
        self.sockets: list[PingSocket] = []
        self.refusal: BaseException | None = None

    def open_socket(self, fwd: Forwarding, host: bytes, ident: int) -> PingSocket:
        if self.refusal is not None:
            raise self.refusal
        self.sockets.append(PingSocket(host, ident))
        return self.sockets[-1]

    @property
    def sock(self) -> PingSocket:
        (s,) = self.sockets
        return s

    def echo(self, seq: int, data: bytes = b"data", ident: int = IDENT) -> bytes:
        """The request as the guest writes it."""
        message = ICMP(type=8, id=ident, seq=seq) if self.v4 else ICMPv6EchoRequest(id=ident, seq=seq)
        return bytes(message / data)

    def asks(
        self,
        seq: int = 1,
        data: bytes = b"data",
        *,
        ident: int = IDENT,
        now: float = T0,
        dst: bytes = b"",
        fields: int = 0,
    ) -> bytes:
        request = self.echo(seq, data, ident)
        self.icmp.tap_handler(GUEST_MAC, self.guest, dst or self.far, memoryview(request), now, fields)
        return request

    def answered(self, seq: int = 1, data: bytes = b"data", sender: bytes = b"", now: float = T0, tos: int = 0) -> None:
        """The kernel delivers a reply, with the identifier that the socket has."""
        reply = ICMP(type=0, id=0xBEEF, seq=seq) if self.v4 else ICMPv6EchoReply(id=0xBEEF, seq=seq)
        self.sock.inbox.append((bytes(reply / data), sender or self.sock.host, tos))
        self.event(EPOLLIN, now)

    def event(self, events: int, now: float = T0) -> None:
        reactor(self.ctx).fire(self.sock.fileno(), events, now)

    def packets(self) -> list[Packet]:
        """The packet that the guest's driver passes on, checked by scapy."""
        frames = received(self.link)
        assert [recomputed(f) for f in frames] == frames
        return [Ether(f)[IP if self.v4 else IPv6] for f in frames]

    def packet(self) -> Packet:
        (p,) = self.packets()
        return p

    def close(self) -> None:
        for s in self.sockets:
            s.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    talks: list[Talk] = []

    def begin(**config: Any) -> Talk:
        talk = Talk(**config)
        talks.append(talk)
        monkeypatch.setattr(icmp, "open_socket", talk.open_socket)
        return talk

    yield begin
    for t in talks:
        t.close()


@pytest.fixture(params=[True, False], ids=["IPv4", "IPv6"])
def talk(request: pytest.FixtureRequest, start: Any) -> Talk:
    talk: Talk = start(v4=request.param)
    return talk


# Echo ----------------------------------------------------------------------------------------------------------------


def test_a_request_goes_out_as_it_is(talk: Talk) -> None:
    request = talk.asks()
    assert (talk.sock.host, talk.sock.ident) == (talk.far, IDENT)
    assert talk.sock.sent == [request]


@pytest.mark.parametrize("size", [0, 1, 56, 60000])
def test_a_reply_gets_the_identifier_back(talk: Talk, size: int) -> None:
    data = os.urandom(size)
    talk.asks(7, data)
    talk.answered(7, data)
    p = talk.packet()
    assert (p.src, p.dst) == (addr.text(talk.far), addr.text(talk.guest))
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].id, p[ICMP].seq, bytes(p[ICMP].payload)) == (0, IDENT, 7, data)
    else:
        reply = p[ICMPv6EchoReply]
        assert (reply.id, reply.seq, reply.data) == (IDENT, 7, data)


def test_one_socket_for_each_identifier_and_destination(talk: Talk) -> None:
    for ident, dst in ((1, talk.far), (2, talk.far), (1, GATEWAY4 if talk.v4 else GATEWAY6), (1, talk.far)):
        talk.asks(ident=ident, dst=dst)
    loopback = addr.LOOPBACK4 if talk.v4 else addr.LOOPBACK6
    assert [(s.host, s.ident) for s in talk.sockets] == [(talk.far, 1), (talk.far, 2), (loopback, 1)]


def test_the_gateway_is_the_hosts_loopback(talk: Talk) -> None:
    gateway = GATEWAY4 if talk.v4 else GATEWAY6
    talk.asks(dst=gateway)
    talk.answered()
    assert talk.packet().src == addr.text(gateway)


def test_a_long_reply_goes_in_fragments(start: Any) -> None:
    talk = start(mtu=1500)
    data = os.urandom(65507)
    talk.asks(1, data)
    talk.answered(1, data)
    frames = talk.link.take()
    assert all(len(f) <= 1514 for f in frames)
    (whole,) = defragment([Ether(f)[IP] for f in frames])
    message = IP(bytes(whole))[ICMP]
    assert bytes(message.payload) == data
    assert bytes(message)[2:4] == bytes(ICMP(type=0, id=IDENT, seq=1) / data)[2:4]


def test_a_reply_that_just_fits_the_mtu(start: Any) -> None:
    talk = start(mtu=1500)
    for size, frames in ((1472, 1), (1473, 2)):
        talk.asks(size, b"x" * size)
        talk.answered(size, b"x" * size)
        assert len(talk.link.take()) == frames


def test_a_duplicate_is_dropped_until_it_is_asked_for_again(talk: Talk) -> None:
    talk.asks(1)
    talk.answered(1)
    talk.answered(1)
    assert len(talk.packets()) == 1
    assert talk.ctx.drops == {"icmp: duplicate reply": 1}
    talk.asks(1)
    talk.answered(1)
    talk.asks(2)
    talk.answered(2)
    assert len(talk.packets()) == 2


def test_a_virtual_machine_sees_duplicates(start: Any) -> None:
    talk = start(mode=PASST)
    talk.asks(1)
    talk.answered(1)
    talk.answered(1)
    assert len(talk.packets()) == 2


def test_replies_of_others_are_dropped(talk: Talk) -> None:
    talk.asks(1)
    talk.answered(1, sender=ROUTER4 if talk.v4 else ROUTER6)
    assert talk.packets() == []
    assert talk.ctx.drops == {"icmp: reply from elsewhere": 1}


def test_members_of_a_group_answer_for_themselves(talk: Talk) -> None:
    group = addr.packed("224.0.0.1" if talk.v4 else "ff02::1")
    members = [addr.packed(a) for a in (("192.0.2.7", "192.0.2.8") if talk.v4 else ("fe80::7", "fe80::8"))]
    talk.asks(1, dst=group)
    for m in members:
        talk.answered(1, sender=m)
    assert [p.src for p in talk.packets()] == [addr.text(m) for m in members]


@pytest.mark.parametrize("message", [b"", b"\0" * 7, bytes.fromhex("0300 0000 00000000"), b"\x08" + b"\0" * 7])
def test_what_is_no_reply_is_dropped(talk: Talk, message: bytes) -> None:
    talk.asks(1)
    talk.sock.inbox.append((message, talk.far, 0))
    talk.event(EPOLLIN)
    assert talk.packets() == []
    assert talk.ctx.drops == {"icmp: not an echo reply": 1}


def test_fields_of_the_guest_are_kept(talk: Talk) -> None:
    """TTL and traffic class, where they change. A TTL of 0 is none."""
    hops, tos, df = hops_option(talk.far), TRAFFIC_CLASS[not talk.v4], MTU_DISCOVER[not talk.v4]
    for fields in (1, 1, 0, 2, 2 | 0xB800):
        talk.asks(fields=fields)
    assert talk.sock.options == [(*hops, 1), (*df, 0), (*hops, 2), (*tos, 0xB8)]


def test_dont_fragment_is_kept_where_it_may_be_meant(talk: Talk) -> None:
    """A packet beyond 1500 bytes has it because the guest's link takes it (`flow/ip_fields.py`)."""
    fits = 1500 - (20 if talk.v4 else 40) - 8
    talk.asks(data=bytes(fits), fields=DF | 64)
    talk.asks(data=bytes(fits + 1), fields=DF | 64)
    df = MTU_DISCOVER[not talk.v4]
    assert [option for option in talk.sock.options if option[:2] == df] == [(*df, 2), (*df, 0)]


@pytest.mark.parametrize("size", [56, 3000])
def test_the_class_of_a_reply(start: Any, size: int) -> None:
    for v4 in (True, False):
        talk = start(v4=v4, mtu=1500)
        talk.asks(data=bytes(size))
        talk.answered(data=bytes(size), tos=0xB9)
        packets = [Ether(f)[IP if v4 else IPv6] for f in received(talk.link)]
        assert {p.tos if v4 else p.tc for p in packets} == {0xB9}


def test_what_is_too_big_for_the_hosts_link_is_told_once_with_its_mtu(talk: Talk) -> None:
    talk.asks(1, fields=DF | 64)
    talk.sock.path_mtu = 1400
    talk.sock.send_errors += [errno.EMSGSIZE] * 2
    talk.sock.errors.append((ExtendedError(errno.EMSGSIZE, ORIGIN_LOCAL, 0, 0, 1400, None), b""))
    request = talk.asks(2, bytes(1442), fields=DF | 64)
    p = talk.packet()
    assert p.src == addr.text(talk.far)
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code, p[ICMP].nexthopmtu) == (3, 4, 1400)
    else:
        assert p[ICMPv6PacketTooBig].mtu == 1400
    assert request[:8] in bytes(p)
    assert talk.ctx.drops == {"icmp: EMSGSIZE": 1}


def test_a_flow_ends_after_a_silence(talk: Talk) -> None:
    talk.asks(1)
    talk.asks(2, now=T0 + 50)
    timers(talk.ctx).services.fire(0)
    (flow,) = (f for f in talk.ctx.flows.by_index if f is not None)
    timers(talk.ctx).services.fire(0)
    assert flow.state == FREE
    reactor(talk.ctx).end_turn(T0 + 110)
    assert talk.sock.fileno() == -1


# Refused -------------------------------------------------------------------------------------------------------------

REQUEST4 = bytes.fromhex("0800 f7ff 0000 0000")


@pytest.mark.parametrize(
    ("src", "dst", "echo", "reason"),
    [
        (GUEST4, FAR4, REQUEST4, None),
        (GUEST6, FAR6, b"\x80" + bytes(7), None),
        (GUEST4, addr.BROADCAST4, REQUEST4, None),
        (GUEST4, FAR4, REQUEST4[:7], "icmp: truncated"),
        (GUEST4, FAR4, b"", "icmp: truncated"),
        (GUEST4, FAR4, b"\x80" + bytes(7), "icmp: not an echo request"),
        (GUEST6, FAR6, b"\x08" + bytes(7), "icmp: not an echo request"),
        (GUEST4, FAR4, b"\x08\x01" + bytes(6), "icmp: not an echo request"),
        (addr.ANY4, FAR4, REQUEST4, "icmp: no address to answer or to ask"),
        (addr.BROADCAST4, FAR4, REQUEST4, "icmp: no address to answer or to ask"),
        (GUEST4, addr.ANY4, REQUEST4, "icmp: no address to answer or to ask"),
        (GUEST4, addr.LOOPBACK4, REQUEST4, "icmp: martian address"),
        (addr.LOOPBACK4, FAR4, REQUEST4, "icmp: martian address"),
        (GUEST6, addr.LOOPBACK6, b"\x80" + bytes(7), "icmp: martian address"),
        (GUEST6, addr.packed("::ffff:127.0.0.1"), b"\x80" + bytes(7), "icmp: martian address"),
    ],
)
def test_refuse(src: bytes, dst: bytes, echo: bytes, reason: str | None) -> None:
    assert refuse(src, dst, memoryview(echo)) == reason


@given(st.binary(max_size=30))
def test_refuse_takes_anything(echo: bytes) -> None:
    reason = refuse(GUEST4, FAR4, memoryview(echo))
    assert (reason is None) == (len(echo) >= 8 and echo[:2] == b"\x08\0")


@pytest.mark.parametrize(
    ("config", "reason"), [({"no_icmp": True}, "icmp: disabled"), ({"ip4": None}, "icmp: address family is off")]
)
def test_what_is_turned_off(start: Any, config: dict[str, Any], reason: str) -> None:
    talk = start(**config)
    talk.asks()
    assert talk.ctx.drops == {reason: 1}
    assert talk.sockets == []


def test_ping_sockets_not_allowed_is_said_once(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(log, "warn", warnings.append)
    talk.refusal = PingNotAllowed()
    talk.asks(1)
    talk.asks(2)
    (warning,) = warnings
    assert 'sysctl -w net.ipv4.ping_group_range="0 2147483647"' in warning
    assert talk.ctx.drops == {"icmp: no ping sockets": 2}
    assert talk.packets() == []


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({socket.AF_INET: errno.EACCES}, 1),
        ({socket.AF_INET: errno.EAFNOSUPPORT, socket.AF_INET6: errno.EACCES}, 1),
        ({socket.AF_INET: errno.EAFNOSUPPORT, socket.AF_INET6: errno.EAFNOSUPPORT}, 0),
        ({}, 0),
    ],
)
def test_what_a_daemon_says_before_nobody_hears(
    monkeypatch: pytest.MonkeyPatch, errors: dict[int, int], said: int
) -> None:
    warnings: list[str] = []
    opened: list[FakeProbe] = []

    class FakeProbe:
        def __init__(self, family: int, kind: int, proto: int) -> None:
            assert kind == socket.SOCK_DGRAM
            if family in errors:
                raise OSError(errors[family], "no")
            opened.append(self)
            self.closed = False

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(log, "warn", warnings.append)
    monkeypatch.setattr(socket, "socket", FakeProbe)
    icmp.probe()
    assert len(warnings) == said
    assert all("net.ipv4.ping_group_range" in text for text in warnings)
    assert all(probe.closed for probe in opened)


def test_no_route_is_told(talk: Talk) -> None:
    talk.refusal = OSError(errno.ENETUNREACH, "no route")
    request = talk.asks(1)
    p = talk.packet()
    assert (p.src, p.dst) == (addr.text(talk.far), addr.text(talk.guest))
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code) == (3, 0)
        assert bytes(p[ICMPerror]) == request
    else:
        assert p[ICMPv6DestUnreach].code == 0
        assert bytes(p[ICMPv6EchoRequest]) == request
    assert talk.ctx.drops == {"icmp: ENETUNREACH": 1}


def test_a_table_that_is_full(talk: Talk) -> None:
    talk.ctx.flows.limit = 0
    talk.asks()
    assert talk.ctx.drops == {"icmp: no flow: table full": 1}
    assert talk.sock.fileno() == -1


# Errors of ping flows ------------------------------------------------------------------------------------------------


def unreachable(talk: Talk) -> ExtendedError:
    if talk.v4:
        return ExtendedError(errno.EHOSTUNREACH, ORIGIN_ICMP, 11, 0, 0, ROUTER4)
    return ExtendedError(errno.EHOSTUNREACH, ORIGIN_ICMP6, 3, 0, 0, ROUTER6)


def check_time_exceeded(talk: Talk) -> None:
    p = talk.packet()
    assert p.src == addr.text(ROUTER4 if talk.v4 else ROUTER6)
    if talk.v4:
        assert (p[ICMP].type, p[ICMP].code) == (11, 0)
        assert (p[ICMPerror].id, p[ICMPerror].seq) == (IDENT, 1)
    else:
        assert p[ICMPv6TimeExceeded].code == 0
        assert (p[ICMPv6EchoRequest].id, p[ICMPv6EchoRequest].seq) == (IDENT, 1)


@pytest.mark.parametrize("how", ["epoll", "send", "receive"])
def test_an_error_quotes_the_guests_own_request(talk: Talk, how: str) -> None:
    talk.asks(1)
    talk.sock.errors.append((unreachable(talk), talk.echo(1, ident=0xBEEF)))
    if how == "epoll":
        talk.event(EPOLLERR)
    elif how == "send":
        talk.sock.send_errors.append(errno.EHOSTUNREACH)
        again = talk.asks(2)
        assert talk.sock.sent[-1] == again
    else:
        talk.sock.inbox.append(OSError(errno.EHOSTUNREACH, "pending"))
        talk.event(EPOLLIN)
    check_time_exceeded(talk)


def test_a_send_that_fails_twice_is_told(talk: Talk) -> None:
    talk.asks(1)
    talk.sock.send_errors += [errno.EHOSTUNREACH] * 2
    talk.asks(2)
    assert talk.packet().src == addr.text(talk.far)
    assert talk.ctx.drops == {"icmp: EHOSTUNREACH": 1}


def test_a_full_buffer_is_a_drop(talk: Talk) -> None:
    talk.asks(1)
    talk.sock.send_errors += [errno.EAGAIN] * 2
    talk.asks(2)
    assert talk.packets() == []
    assert talk.ctx.drops == {"icmp: send buffer full": 1}


# The socket ----------------------------------------------------------------------------------------------------------


class Kernel:
    """Stands for `socket.socket`; records what a ping socket is asked for."""

    def __init__(self, refuse: dict[str, int]) -> None:
        self.refuse = refuse
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, family: int, kind: int, proto: int) -> Kernel:
        self._call("socket", family, kind, proto)
        return self

    def _call(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        number = self.refuse.pop(name, 0)
        if number:
            raise OSError(number, os.strerror(number))

    def setsockopt(self, *args: Any) -> None:
        self._call("setsockopt", *args)

    def bind(self, address: Any) -> None:
        self._call("bind", address)

    def connect(self, address: Any) -> None:
        self._call("connect", address)

    def close(self) -> None:
        self._call("close")


def kernel(monkeypatch: pytest.MonkeyPatch, **refuse: int) -> Kernel:
    k = Kernel(refuse)
    monkeypatch.setattr(socket, "socket", k)
    return k


FWD = Forwarding(Settings(CONFIG))
DGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK


def test_the_socket_has_the_identifier_and_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(monkeypatch)
    icmp.open_socket(FWD, FAR4, IDENT)
    assert k.calls == [
        ("socket", socket.AF_INET, DGRAM, socket.IPPROTO_ICMP),
        ("setsockopt", socket.IPPROTO_IP, 11, 1),
        ("setsockopt", socket.IPPROTO_IP, 13, 1),
        ("bind", ("0.0.0.0", IDENT)),
        ("setsockopt", socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
        ("connect", ("198.51.100.9", 0)),
    ]


def test_the_ipv6_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(monkeypatch)
    icmp.open_socket(make_context(scope_id=7).fwd, GATEWAY6, IDENT)
    assert k.calls == [
        ("socket", socket.AF_INET6, DGRAM, socket.IPPROTO_ICMPV6),
        ("setsockopt", socket.IPPROTO_IPV6, 25, 1),
        ("setsockopt", socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1),
        ("bind", ("::", IDENT, 0, 0)),
        ("connect", ("fe80::1", 0, 0, 7)),
    ]


def test_an_identifier_that_is_taken_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(monkeypatch, bind=errno.EADDRINUSE)
    icmp.open_socket(FWD, FAR4, IDENT)
    assert [c[1] for c in k.calls if c[0] == "bind"] == [("0.0.0.0", IDENT), ("0.0.0.0", 0)]


def test_outbound_address_and_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(monkeypatch)
    ip4 = Ip4(addr=GUEST4, prefix_len=24, gateway=IP4.gateway, our_addr=IP4.our_addr, if_out="eth7", addr_out=ROUTER4)
    icmp.open_socket(make_context(ip4=ip4).fwd, FAR4, IDENT)
    assert ("setsockopt", socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth7") in k.calls
    assert ("bind", ("203.0.113.1", IDENT)) in k.calls


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_host_that_allows_no_ping_sockets(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    kernel(monkeypatch, socket=number)
    with pytest.raises(PingNotAllowed):
        icmp.open_socket(FWD, FAR4, IDENT)


@pytest.mark.parametrize("call", ["setsockopt", "bind", "connect"])
def test_no_socket_is_left_over_after_a_failure(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    k = kernel(monkeypatch, **{call: errno.ENETUNREACH})
    with pytest.raises(OSError, match="unreachable"):
        icmp.open_socket(FWD, FAR4, IDENT)
    assert k.calls[-1] == ("close",)


def test_debug_lines_name_both_ends(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "debug_on", True)
    monkeypatch.setattr(log, "debug", lines.append)
    talk.asks(1)
    talk.sock.errors.append((unreachable(talk), talk.echo(1)))
    talk.event(EPOLLERR)
    guest, far = addr.host_port(talk.guest, IDENT), addr.text(talk.far)
    assert f"Flow 0 (ping): {guest} -> {far} opened" in lines
    assert any("error on socket" in line and "EHOSTUNREACH" in line for line in lines)
