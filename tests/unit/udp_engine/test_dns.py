"""Queries of the guest and resolvers of every kind, as conversations: fake sockets, and a clock that is handed in."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR, DNSRR
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from passt import addr, log
from passt.linux.sockopt import ORIGIN_ICMP, ExtendedError
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.policy.resolvers import HOLD
from passt.udp import Udp
from passt.udp_engine import dns
from passt.udp_engine.dns import QUERY_LIFETIME, QUERY_TIMEOUT, DnsFlow, open_socket, query_id, response_id

from ..support import GUEST4, GUEST6, T0, link, make_context, reactor, reconfigure, timers

FORWARDED4, FORWARDED6 = addr.packed("169.254.1.1"), addr.packed("2001:db8::53")
A, B, C = "192.0.2.10", "192.0.2.11", "2001:db8::10"


def query(ident: int, name: str = "name.test") -> bytes:
    return bytes(DNS(id=ident, qd=DNSQR(qname=name)))


def answer(ident: int, text: bytes = b"") -> bytes:
    return bytes(DNS(id=ident, qr=1, qd=DNSQR(qname="name.test"), an=DNSRR(rrname="name.test", type="TXT", rdata=text)))


class Socket:
    """Towards a resolver. `refuses`: what connecting and sending meet; `errors`, `answers`: what waits."""

    numbers = iter(range(1000, 1_000_000))

    def __init__(self, host: str) -> None:
        self.host = host
        self.fd = next(self.numbers)
        self.sent: list[bytes] = []
        self.answers: list[bytes] = []
        self.errors: list[int] = []
        self.pending: list[int] = []  # errnos of the next sends
        self.closed = False
        self.destroyed = False  # by root of the host, and not told yet

    def fileno(self) -> int:
        return self.fd

    def send(self, data: bytes) -> int:
        if self.pending:
            raise _error(self.pending.pop(0))
        self.sent.append(bytes(data))
        return len(data)

    def recv_into(self, buffer: memoryview) -> int:
        if not self.answers:
            raise BlockingIOError
        data = self.answers.pop(0)
        buffer[: len(data)] = data
        return len(data)

    def recvmsg(self, *_: int) -> Any:
        if not self.errors:
            raise BlockingIOError
        error = ExtendedError(self.errors.pop(0), ORIGIN_ICMP, 3, 3, 0, None)
        return b"", [(socket.IPPROTO_IP, 11, error.emit())], 0, None

    def getsockopt(self, *_: int) -> int:
        destroyed, self.destroyed = self.destroyed, False
        return errno.ECONNABORTED if destroyed else 0

    def close(self) -> None:
        self.closed = True


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture(autouse=True, scope="module")
def resolver_sockets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dns, "open_socket", lambda fwd, host: Talk.current.open(host))
        yield


class Talk:
    """A guest, our forwarding, and resolvers."""

    current: Talk  # whose sockets are opened

    def __init__(self, *hosts: str, v6: bool = False, **config: Any) -> None:
        config |= {"dns_match": (FORWARDED4, FORWARDED6), "dns_hosts": tuple(map(addr.packed, hosts))}
        self.ctx = make_context(**config)
        self.udp = Udp(self.ctx)
        Talk.current = self
        self.sockets: list[Socket] = []
        self.refusing: dict[str, int] = {}  # by host: errno of opening
        self.now = T0
        self.v6 = v6

    def open(self, host: bytes) -> Socket:
        name = addr.text(host)
        if name in self.refusing:
            raise _error(self.refusing[name])
        self.sockets.append(Socket(name))
        return self.sockets[-1]

    def to(self, host: str) -> Socket:
        """The last socket towards a resolver."""
        return next(s for s in reversed(self.sockets) if s.host == host)

    def asks(self, *payloads: bytes, port: int = 40000, size: int = 0) -> None:
        """The guest sends datagrams, in one batch, from `port`."""
        frames: list[int] = []
        at = 64
        for payload in payloads:
            self.ctx.pool.buf[at : at + len(payload)] = payload
            frames += (at, at + len(payload), size)
            at += len(payload)
        ends = GUEST6 + FORWARDED6 if self.v6 else GUEST4 + FORWARDED4
        self.udp.tap_handler(ends + port.to_bytes(2, "big") + b"\0\x35", frames, self.now)

    def asked(self) -> list[tuple[str, int]]:
        """(resolver, identifier) of what went out since the last call."""
        found = [(s.host, query_id(data)) for s in self.sockets for data in s.sent]
        for s in self.sockets:
            s.sent.clear()
        return found

    def answers(self, host: str, *messages: bytes) -> list[int]:
        """A resolver sends; what the guest gets, as identifiers."""
        sock = self.to(host)
        sock.answers += messages
        reactor(self.ctx).fire(sock.fd, EPOLLIN, self.now)
        return [p[DNS].id for p in self.guest_got()]

    def fails(self, host: str, number: int = errno.ECONNREFUSED) -> None:
        """An ICMP error comes for what went to a resolver."""
        sock = self.to(host)
        sock.errors.append(number)
        reactor(self.ctx).fire(sock.fd, EPOLLERR, self.now)

    def guest_got(self) -> list[Packet]:
        return [Ether(frame) for frame in link(self.ctx).take()]

    def waits(self, seconds: float) -> None:
        """The clock moves on, and timers fire when they are due."""
        end = self.now + seconds
        services = timers(self.ctx).services
        while due := [(at, t) for t, at in enumerate(services.deadlines) if at is not None and at <= end]:
            self.now, timer = min(due)
            services.fire(timer, self.now)
        self.now = end

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.ctx.drops)

    @property
    def waiting(self) -> int:
        """Queries that are remembered."""
        flows = [f for f in self.ctx.flows.by_index if isinstance(f, DnsFlow)]
        kept = len(self.udp.dns._waiting)
        assert kept >= sum(len(f.queries) for f in flows)
        return kept


# Queries that are answered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("v6", [False, True])
def test_a_query_and_its_answer(v6: bool) -> None:
    talk = Talk(A, B, v6=v6)
    talk.asks(query(7))
    assert talk.asked() == [(A, 7)]
    talk.to(A).answers.append(answer(7, b"x"))
    reactor(talk.ctx).fire(talk.to(A).fd, EPOLLIN, T0)
    (packet,) = talk.guest_got()
    ip = packet[IPv6 if v6 else IP]
    assert addr.packed(ip.src) == (FORWARDED6 if v6 else FORWARDED4)
    assert addr.packed(ip.dst) == (GUEST6 if v6 else GUEST4)
    assert (packet[UDP].sport, packet[UDP].dport) == (53, 40000)
    assert bytes(packet[UDP].payload) == answer(7, b"x")
    assert talk.waiting == 0
    assert talk.drops == {}


def test_several_queries_from_one_port() -> None:
    """As glibc asks for A and AAAA; answers come in any order."""
    talk = Talk(A, B)
    talk.asks(query(7), query(8))
    assert talk.asked() == [(A, 7), (A, 8)]
    assert talk.answers(A, answer(8), answer(7)) == [8, 7]
    assert len(talk.sockets) == 1
    assert talk.waiting == 0


def test_queries_that_a_guest_has_joined_to_a_super_frame() -> None:
    talk = Talk(A)
    one, two, three = query(1), query(2), query(3)
    talk.asks(one + two + three[:-1] + b"\0", size=len(one))
    assert talk.asked() == [(A, 1), (A, 2), (A, 3)]


def test_each_port_of_the_guest_has_a_socket_of_its_own() -> None:
    talk = Talk(A)
    talk.asks(query(7), port=40000)
    talk.asks(query(7), port=40001)
    first, second = talk.sockets
    first.answers.append(answer(7))
    reactor(talk.ctx).fire(first.fd, EPOLLIN, T0)
    assert [p[UDP].dport for p in talk.guest_got()] == [40000]
    second.answers.append(answer(7))
    reactor(talk.ctx).fire(second.fd, EPOLLIN, T0)
    assert [p[UDP].dport for p in talk.guest_got()] == [40001]


def test_a_long_answer_comes_in_fragments() -> None:
    talk = Talk(A, mtu=1280)
    talk.asks(query(7))
    talk.to(A).answers.append(answer(7) + bytes(3000))
    reactor(talk.ctx).fire(talk.to(A).fd, EPOLLIN, T0)
    packets = talk.guest_got()
    assert len(packets) == 3
    assert sum(len(p[IP].payload) for p in packets) == 8 + len(answer(7)) + 3000


def test_other_ports_are_no_affair_of_ours() -> None:
    talk = Talk("127.0.0.1")
    ends = GUEST4 + FORWARDED4 + b"\x9c\x40" + (853).to_bytes(2, "big")
    talk.ctx.pool.buf[64:74] = b"0123456789"
    talk.udp.tap_handler(ends, [64, 74, 0], T0)
    (flow,) = talk.ctx.flows.by_index
    assert flow is not None
    assert not isinstance(flow, DnsFlow)
    assert flow.endpoints().host == "127.0.0.1:853"
    flow.sock.close()


# Failures ----------------------------------------------------------------------------------------------------------


def test_a_resolver_that_refuses() -> None:
    """The next one has both queries before any time has passed."""
    talk = Talk(A, B)
    talk.asks(query(7), query(8))
    talk.asked()
    talk.fails(A)
    assert talk.asked() == [(B, 7), (B, 8)]
    assert talk.answers(B, answer(7), answer(8)) == [7, 8]
    talk.asks(query(9))
    assert talk.asked() == [(B, 9)]
    assert talk.drops == {"dns: resolver failed: ECONNREFUSED": 1}


def test_a_resolver_that_keeps_silent() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(QUERY_TIMEOUT - 0.1)
    assert talk.asked() == [(A, 7)]
    talk.waits(0.1)
    assert talk.asked() == [(B, 7)]
    assert talk.answers(B, answer(7)) == [7]
    talk.asks(query(8))
    assert talk.asked() == [(B, 8)]
    assert talk.drops == {"dns: resolver failed: no answer": 1}


def test_a_silent_resolver_is_asked_again_later_by_one_query() -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    talk.waits(QUERY_TIMEOUT)
    talk.answers(B, answer(1))
    talk.waits(HOLD)
    talk.asked()
    talk.asks(query(2), query(3))
    assert sorted(talk.asked()) == [(A, 2), (B, 3)]
    talk.answers(A, answer(2))
    talk.asks(query(4))
    assert talk.asked() == [(A, 4)]


def test_slow_names_are_no_failure_of_a_resolver_that_answers_others() -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    talk.waits(0.5)
    talk.asks(query(2))
    talk.answers(A, answer(2))
    talk.asked()
    talk.waits(QUERY_TIMEOUT - 0.5)
    assert talk.asked() == [(B, 1)]
    talk.asks(query(3))
    assert talk.asked() == [(A, 3)]


def test_a_late_answer_is_an_answer_and_the_other_one_is_dropped() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(QUERY_TIMEOUT + 0.1)
    assert talk.answers(A, answer(7)) == [7]
    assert talk.answers(B, answer(7)) == []
    assert talk.drops["dns: answer to no query"] == 1
    talk.asks(query(8))
    talk.asked()
    assert talk.waiting == 1


@pytest.mark.parametrize("v6", [False, True])
def test_across_families(v6: bool) -> None:
    talk = Talk(C if not v6 else A, v6=v6)
    talk.asks(query(7))
    assert talk.answers(talk.sockets[0].host, answer(7)) == [7]
    talk = Talk(A, C, v6=v6)
    talk.asks(query(7))
    first, second = (C, A) if v6 else (A, C)
    assert talk.asked() == [(first, 7)]
    talk.fails(first)
    assert talk.asked() == [(second, 7)]


def test_a_resolver_without_a_way_to_it() -> None:
    """No route, no address family on this host: known at once, and the guest notices nothing."""
    talk = Talk(A, C, B)
    talk.refusing = {A: errno.ENETUNREACH, C: errno.EAFNOSUPPORT}
    talk.asks(query(7))
    assert talk.asked() == [(B, 7)]
    assert talk.answers(B, answer(7)) == [7]


def test_an_earlier_error_of_the_socket_is_not_this_ones() -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    talk.answers(A, answer(1))
    talk.asked()
    talk.to(A).pending = [errno.ECONNREFUSED]
    talk.asks(query(2))
    assert talk.asked() == [(A, 2)]
    talk.to(A).pending = [errno.ECONNREFUSED, errno.ECONNREFUSED]
    talk.asks(query(3))
    assert talk.asked() == [(B, 3)]


@pytest.mark.parametrize("told", ["by an event", "when sending"])
def test_a_socket_that_was_destroyed_is_replaced(told: str) -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    talk.answers(A, answer(1))
    talk.asked()
    first = talk.to(A)
    if told == "by an event":
        first.destroyed = True
        reactor(talk.ctx).fire(first.fd, EPOLLERR | EPOLLIN, talk.now)
    else:
        first.pending = [errno.ECONNABORTED, errno.EDESTADDRREQ]
    talk.asks(query(2))
    assert talk.asked() == [(A, 2)]
    assert talk.to(A) is not first
    assert talk.answers(A, answer(2)) == [2]
    reactor(talk.ctx).end_turn(talk.now)
    assert first.closed
    assert talk.drops == {}, "it is no failure of the resolver"


def test_a_full_send_buffer_is_a_loss_like_any_other() -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    talk.answers(A, answer(1))
    talk.to(A).pending = [errno.EAGAIN]
    talk.asked()
    talk.asks(query(2))
    assert talk.asked() == []
    assert talk.drops == {"dns: send: EAGAIN": 1}
    talk.waits(QUERY_TIMEOUT)
    assert talk.asked() == [(B, 2)]


def test_a_small_link_on_the_way_is_no_failure() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.asked()
    talk.fails(A, errno.EMSGSIZE)
    assert talk.asked() == []
    assert talk.drops == {}


@pytest.mark.parametrize("v6", [False, True])
def test_the_guest_is_told_when_all_refuse(v6: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, *_: said.append(text))
    talk = Talk(A, B, v6=v6)
    talk.asks(query(7))
    talk.fails(A)
    assert talk.guest_got() == []
    talk.fails(B)
    (packet,) = talk.guest_got()
    if v6:
        assert packet[ICMPv6DestUnreach].code == 4
    else:
        assert (packet[ICMP].type, packet[ICMP].code) == (3, 3)
    assert query(7) in bytes(packet)
    assert talk.waiting == 0
    listed = f"{A} (Connection refused), {B} (Connection refused)"
    assert said == [f"No resolver of the host answers: {listed}; names cannot be looked up"]


def test_who_kept_silent_may_still_answer_when_the_others_refuse() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(QUERY_TIMEOUT)
    talk.fails(B)
    assert talk.guest_got() == []
    assert talk.answers(A, answer(7)) == [7]


def test_all_keep_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, *_: said.append(text))
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(QUERY_LIFETIME)
    assert talk.asked() == [(A, 7), (B, 7)]
    assert talk.guest_got() == []
    talk.waits(QUERY_TIMEOUT)
    assert talk.waiting == 0
    assert talk.drops == {"dns: resolver failed: no answer": 2, "dns: no answer": 1}
    assert len(said) == 1
    services = timers(talk.ctx).services
    assert services.deadlines[talk.udp.dns._timer] is None, "nothing waits, nothing wakes up"


# Other actions of a guest ------------------------------------------------------------------------------------------


def test_a_repeated_query_goes_to_the_resolver_that_has_it() -> None:
    """However often a guest asks, time runs on for a silent resolver."""
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(1)
    talk.asks(query(7))
    assert talk.asked() == [(A, 7), (A, 7)]
    talk.waits(QUERY_TIMEOUT - 1)
    assert talk.asked() == [(B, 7)]
    assert talk.answers(B, answer(7)) == [7]


def test_a_query_again_when_all_were_tried_is_another_round() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(5)
    talk.asked()
    talk.asks(query(7))
    assert talk.asked() == [(A, 7)]
    talk.waits(1)
    assert talk.answers(B, answer(7)) == [7]
    assert talk.waiting == 0


def test_another_query_with_the_same_identifier_takes_its_place() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.waits(QUERY_TIMEOUT)
    talk.asked()
    talk.asks(query(7, "other.test"))
    assert talk.asked() == [(B, 7)]
    assert talk.answers(A, answer(7)) == []
    assert talk.answers(B, answer(7)) == [7]


@pytest.mark.parametrize("junk", [b"", b"short", answer(7), query(7) + bytes(5000)])
def test_what_is_no_query_goes_nowhere(junk: bytes) -> None:
    talk = Talk(A)
    talk.asks(junk)
    assert talk.asked() == []
    assert sum(talk.drops.values()) == 1
    assert talk.waiting == 0


def test_what_is_no_answer_goes_nowhere() -> None:
    talk = Talk(A)
    talk.asks(query(7))
    assert talk.answers(A, b"", b"short", query(7), answer(8), answer(7)) == [7]
    assert talk.drops == {"dns: not an answer": 3, "dns: answer to no query": 1}


def test_a_guest_cannot_make_us_remember_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "QUERIES_MAX", 50)
    talk = Talk(A)
    for i in range(120):
        talk.asks(query(i), port=40000 + i % 7)
    assert talk.waiting == 50
    assert talk.drops["dns: too many queries"] == 70
    assert talk.answers(A, answer(119 - 119 % 7)) in ([], [119 - 119 % 7])


def test_queries_of_a_flow_that_ends_are_forgotten() -> None:
    talk = Talk(A)
    talk.asks(query(7))
    talk.udp.forget()
    reactor(talk.ctx).end_turn(T0)
    assert talk.sockets[0].closed
    talk.waits(QUERY_TIMEOUT)
    assert talk.waiting == 0
    assert talk.asked() == [(A, 7)]


def test_an_idle_flow_ends() -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.fails(A)
    talk.answers(B, answer(7))
    talk.waits(40)
    reactor(talk.ctx).end_turn(talk.now)
    assert all(s.closed for s in talk.sockets)
    assert talk.ctx.flows.count == 0
    assert not reactor(talk.ctx).refs


def test_a_fault_ends_one_flow() -> None:
    talk = Talk(A)
    talk.asks(query(7), port=1)
    talk.asks(query(7), port=2)
    talk.udp.dns.fault(reactor(talk.ctx).refs[talk.sockets[0].fd])
    assert talk.ctx.flows.count == 1
    talk.udp.fault_key(GUEST4 + FORWARDED4 + b"\0\x02\0\x35")
    assert talk.ctx.flows.count == 0


def test_no_descriptor_left() -> None:
    """The longest idle flow gives its own up. If that is the one that needs more, it ends, and nothing else happens."""
    talk = Talk(A, B)
    talk.asks(query(7))
    opened = talk.open
    failures = [errno.EMFILE]

    def scarce(host: bytes) -> Socket:
        if failures:
            raise _error(failures.pop())
        return opened(host)

    talk.open = scarce  # type: ignore[method-assign]
    talk.fails(A)
    assert talk.ctx.flows.count == 0
    assert talk.drops["dns: no descriptor"] == 1
    assert all(s.closed for s in talk.sockets)
    failures.append(errno.EMFILE)
    talk.asks(query(8), port=1)
    talk.asks(query(9), port=2)
    assert talk.asked() == [(A, 7), (B, 9)]
    assert talk.ctx.flows.count == 1
    talk.waits(60)
    assert talk.waiting == 0


def test_new_resolvers_are_used_at_once() -> None:
    talk = Talk(A)
    talk.asks(query(7))
    talk.asked()
    reconfigure(talk.ctx, dns_match=(FORWARDED4,), dns_hosts=(addr.packed(B),))
    talk.waits(QUERY_TIMEOUT)
    assert talk.asked() == [(B, 7)]
    talk.asks(query(8))
    assert talk.asked() == [(B, 8)]


def test_a_new_guest_address_reaches_flows() -> None:
    talk = Talk(A)
    talk.asks(query(7))
    talk.ctx.neighbours.sender(bytes.fromhex("525400999999"))
    talk.ctx.neighbours.learn(GUEST4, bytes.fromhex("525400999999"))
    talk.to(A).answers.append(answer(7))
    reactor(talk.ctx).fire(talk.to(A).fd, EPOLLIN, T0)
    (packet,) = talk.guest_got()
    assert packet.dst == "52:54:00:99:99:99"


def test_real_sockets() -> None:
    """Connected to port 53, from a free port."""
    ctx = make_context()
    with open_socket(ctx.fwd, addr.LOOPBACK4) as s:
        assert s.getpeername() == ("127.0.0.1", 53)
        assert s.getsockname()[1] != 0
        assert not s.getblocking()


# Messages ----------------------------------------------------------------------------------------------------------


def test_identifiers() -> None:
    assert query_id(query(0xABCD)) == response_id(answer(0xABCD)) == 0xABCD
    assert query_id(answer(1)) == response_id(query(1)) == -1


@given(st.binary(max_size=40))
def test_any_message_is_a_query_or_an_answer_or_neither(message: bytes) -> None:
    found = query_id(message), response_id(message)
    if len(message) < 12:
        assert found == (-1, -1)
    else:
        ident = message[0] * 256 + message[1]
        assert found == ((-1, ident) if message[2] >= 128 else (ident, -1))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.just("answer"), st.integers(0, 5), st.integers(0, 8)),
        st.tuples(st.just("fail"), st.integers(0, 0), st.integers(0, 8)),
        st.tuples(st.just("wait"), st.integers(1, 40), st.integers(0, 0)),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_each_query_has_at_most_one_answer(steps: list[tuple[str, int, int]]) -> None:
    talk = Talk(A, B, C)
    asked: dict[tuple[int, int], int] = {}
    for kind, value, which in steps:
        live = [s for s in talk.sockets if s.fd in reactor(talk.ctx).refs]
        if kind == "ask":
            talk.asks(query(value), port=40000 + which)
            asked[40000 + which, value] = 1
        elif kind == "wait":
            talk.waits(value / 4)
        elif live:
            sock = live[which % len(live)]
            if kind == "fail":
                sock.errors.append(errno.ECONNREFUSED)
                reactor(talk.ctx).fire(sock.fd, EPOLLERR, talk.now)
            else:
                sock.answers.append(answer(value))
                reactor(talk.ctx).fire(sock.fd, EPOLLIN, talk.now)
        for packet in talk.guest_got():
            if packet.haslayer(ICMP):
                continue
            key = packet[UDP].dport, packet[DNS].id
            assert asked.pop(key, 0) == 1
        reactor(talk.ctx).end_turn(talk.now)
    talk.waits(60)
    reactor(talk.ctx).end_turn(talk.now)
    assert talk.waiting == talk.ctx.flows.count == 0
    assert all(s.closed for s in talk.sockets)
