"""Borders of queries and resolvers (`dns.py`), which conversations leave open."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from typing import Any

import pytest

from passt import addr
from passt.linux.sockopt import RECVERR
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp_engine import dns
from passt.udp_engine.dns import QUERY_LIFETIME, QUERY_SIZE_MAX, QUERY_TIMEOUT, DnsFlow, query_id, response_id

from ..support import GUEST4, IP4, IP6, T0, link, make_context, reactor, timers
from .test_dns import FORWARDED4, A, B, C, Socket, Talk, _error, answer, open_socket, query, resolver_sockets

__all__ = ["resolver_sockets"]


def flow_of(talk: Talk) -> DnsFlow:
    (flow,) = talk.udp.dns._by_key.values()
    return flow


# Sockets -------------------------------------------------------------------------------------------------------------


class Journal(socket.socket):
    """Notes what it is asked for, and is bound and connected to nothing."""

    said: list[tuple[Any, ...]]
    fails = False

    def setsockopt(self, *args: Any) -> None:
        Journal.said.append(("setsockopt", *args))

    def bind(self, address: Any) -> None:
        Journal.said.append(("bind", address))

    def connect(self, address: Any) -> None:
        Journal.said.append(("connect", address))
        if Journal.fails:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> type[Journal]:
    monkeypatch.setattr(Journal, "said", [], raising=False)
    monkeypatch.setattr(Journal, "fails", False)
    monkeypatch.setattr(socket, "socket", Journal)
    return Journal


@pytest.mark.parametrize("v6", [False, True])
def test_queries_leave_from_the_outbound_address_and_interface(v6: bool, journal: type[Journal]) -> None:
    out4, out6 = "203.0.113.7", "2001:db8:1::7"
    ctx = make_context(
        ip4=replace(IP4, addr_out=addr.packed(out4), if_out="eth7"),
        ip6=replace(IP6, addr_out=addr.packed(out6), if_out="eth8"),
    )
    with open_socket(ctx.fwd, addr.packed(C if v6 else A)) as sock:
        assert sock.family == (socket.AF_INET6 if v6 else socket.AF_INET)
        assert not sock.getblocking() and not sock.get_inheritable()
    assert journal.said == [
        ("setsockopt", *RECVERR[v6], 1),
        ("setsockopt", socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth8" if v6 else b"eth7"),
        ("bind", (out6, 0, 0, 0) if v6 else (out4, 0)),
        ("connect", (C, 53, 0, 0) if v6 else (A, 53)),
    ]


def test_a_resolver_on_the_loopback_has_the_loopbacks_address(journal: type[Journal]) -> None:
    ctx = make_context(ip4=replace(IP4, addr_out=addr.packed("203.0.113.7"), if_out="eth7"))
    open_socket(ctx.fwd, addr.LOOPBACK4).close()
    assert journal.said == [("setsockopt", *RECVERR[0], 1), ("connect", ("127.0.0.1", 53))]


def test_no_socket_is_left_of_a_resolver_without_route(journal: type[Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Journal] = []

    class Kept(Journal):
        def connect(self, address: Any) -> None:
            made.append(self)
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Kept)
    journal.fails = True
    with pytest.raises(OSError, match="unreachable"):
        open_socket(make_context().fwd, addr.packed(A))
    assert [s.fileno() for s in made] == [-1]


def test_a_socket_that_cannot_be_watched_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(A)

    def watch(*_: Any) -> int:
        raise _error(errno.ENOSPC)

    monkeypatch.setattr(reactor(talk.ctx), "watch", watch)
    talk.asks(query(7))
    assert talk.to(A).closed and flow_of(talk).ends == flow_of(talk).by_fd == {}
    assert talk.drops["dns: resolver failed: ENOSPC"] == 1


# Figures of a flow ---------------------------------------------------------------------------------------------------


def test_the_hosts_end_of_a_flow_is_the_resolver_that_was_asked_last() -> None:
    talk = Talk(A, B, C)
    flow = DnsFlow(GUEST4 + FORWARDED4 + b"\x9c\x40\0\x35", T0)
    assert (flow.endpoints().guest, flow.endpoints().host) == ("192.0.2.2:40000", "")
    talk.asks(query(7))
    for host in A, B:
        assert flow_of(talk).endpoints().host == f"{host}:53"
        talk.fails(host)
    assert flow_of(talk).endpoints().host == f"[{C}]:53"


def test_bytes_of_a_flow_add_up() -> None:
    talk = Talk(A)
    sent = got = 0
    for i in range(1, 4):
        talk.asks(query(i))
        talk.answers(A, answer(i))
        sent, got = sent + len(query(i)), got + len(answer(i))
    assert (flow_of(talk).to_host, flow_of(talk).to_guest) == (sent, got)


# Counts --------------------------------------------------------------------------------------------------------------


def test_each_failure_is_counted() -> None:
    talk = Talk(A, B)
    for n in range(1, 4):
        talk.asks(query(n))
        talk.to(A if n == 1 else B)
        talk.fails(A)
        assert talk.drops["dns: resolver failed: ECONNREFUSED"] == n
        talk.answers(B, answer(n))
        talk.waits(40)


def test_each_query_without_answer_is_counted() -> None:
    talk = Talk(A)
    for n in range(1, 4):
        talk.asks(query(n))
        talk.waits(QUERY_LIFETIME + QUERY_TIMEOUT)
        assert talk.drops["dns: no answer"] == n


def test_each_query_that_cannot_be_repeated_is_counted() -> None:
    """Its time runs on, and the next resolver gets it."""
    talk = Talk(A, B)
    talk.asks(query(7))
    for n in (1, 2, 3):
        talk.to(A).pending = [errno.ENOBUFS]
        talk.asks(query(7))
        assert talk.drops == {"dns: query not repeated": n}
    talk.asked()
    talk.waits(QUERY_TIMEOUT)
    assert talk.asked() == [(B, 7)]


def test_identifier_0_is_an_identifier() -> None:
    talk = Talk(A)
    talk.asks(query(0))
    assert talk.answers(A, answer(0), answer(0)) == [0]
    assert talk.drops == {"dns: answer to no query": 1}


# Events --------------------------------------------------------------------------------------------------------------


def test_an_event_is_about_what_it_says() -> None:
    talk = Talk(A)
    talk.asks(query(7))
    sock = talk.to(A)
    sock.errors.append(errno.ECONNREFUSED)
    sock.answers.append(answer(7))
    reactor(talk.ctx).fire(sock.fd, EPOLLIN, talk.now)
    assert sock.errors and not sock.answers and not talk.drops
    talk.asks(query(8))
    sock.answers.append(answer(8))
    reactor(talk.ctx).fire(sock.fd, EPOLLERR, talk.now)
    assert sock.answers and not sock.errors


def test_a_flow_that_an_error_has_ended_receives_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(A)
    talk.asks(query(7))
    sock, flow = talk.to(A), flow_of(talk)
    monkeypatch.setattr(talk.udp.dns, "_report", lambda flow, *_: talk.udp.dns.forget())
    sock.answers.append(answer(7))
    reactor(talk.ctx).fire(sock.fd, EPOLLIN | EPOLLERR, talk.now)
    assert sock.answers and flow.to_guest == 0


def test_an_error_may_be_met_by_a_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(A, B)
    talk.asks(query(7))
    talk.asked()
    sock = talk.to(A)
    sock.errors.append(errno.ECONNREFUSED)

    def recv_into(buffer: memoryview) -> int:
        raise _error(errno.ECONNREFUSED)

    monkeypatch.setattr(sock, "recv_into", recv_into)
    reactor(talk.ctx).fire(sock.fd, EPOLLIN, talk.now)
    assert talk.asked() == [(B, 7)]
    assert talk.drops == {"dns: resolver failed: ECONNREFUSED": 1}


# Time ----------------------------------------------------------------------------------------------------------------


def test_each_query_has_its_own_time() -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    talk.waits(1.0)
    talk.asks(query(2))
    talk.asked()
    talk.waits(QUERY_TIMEOUT - 1.0)
    assert talk.asked() == [(B, 1)]
    services = timers(talk.ctx).services
    assert services.deadlines[talk.udp.dns._timer] == T0 + 1.0 + QUERY_TIMEOUT
    talk.waits(0.9)
    assert talk.asked() == []
    talk.waits(0.1)
    assert talk.asked() == [(B, 2)]


def test_the_lifetime_of_a_query_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(A)
    monkeypatch.setattr(dns, "QUERY_LIFETIME", 2 * QUERY_TIMEOUT)
    talk.asks(query(7))
    talk.waits(QUERY_TIMEOUT)
    assert talk.waiting == 1
    talk.waits(QUERY_TIMEOUT)
    assert talk.waiting == 0


def test_a_fault_is_the_end_of_the_flow_with_its_reason() -> None:
    talk = Talk(A)
    talk.asks(query(7))
    talk.udp.fault_key(flow_of(talk).key)
    assert talk.ctx.flows.closed == {("dns", "fault"): 1}
    assert isinstance(talk.to(A), Socket)


# Queries -------------------------------------------------------------------------------------------------------------


def test_a_header_alone_is_a_query_or_an_answer() -> None:
    assert query_id(bytes(12)) == 0 and query_id(bytes(11)) == -1
    assert response_id(b"\0\0\x80" + bytes(9)) == 0 and response_id(b"\0\0\x80" + bytes(8)) == -1


@pytest.mark.parametrize("ident", [0, 7])
def test_queries_up_to_the_limit_and_no_longer(ident: int) -> None:
    talk = Talk(A)
    whole = query(ident).ljust(QUERY_SIZE_MAX, b"\0")
    talk.asks(whole)
    assert talk.asked() == [(A, ident)] and not talk.drops
    for n in (1, 2):
        talk.asks(whole + b"\0")
        assert talk.drops == {"dns: query too long": n}


def test_what_is_no_query_is_counted() -> None:
    talk = Talk(A)
    for n in (1, 2, 3):
        talk.asks(answer(7))
        assert talk.drops == {"dns: not a query": n}


def test_joined_queries_are_cut_apart() -> None:
    talk = Talk(A)
    a, b, c = (query(i) for i in (1, 2, 3))
    assert len(a) == len(b) == len(c)
    talk.asks(a + b + c, size=len(a))
    assert talk.to(A).sent == [a, b, c]
    talk.asks(a[:12] * 2, size=12)
    assert talk.to(A).sent[3:] == [a[:12]] * 2 and not talk.drops


@pytest.mark.parametrize("size", [1, 11])
def test_joined_datagrams_without_room_for_a_header_are_one_drop_each_time(size: int) -> None:
    """A frame of 64 KiB would have so many of them."""
    talk = Talk(A)
    for n in (1, 2):
        talk.asks(bytes(50), bytes(50), size=size)
        assert talk.drops == {"dns: not a query": 2 * n}
    assert not talk.asked()


def test_each_query_that_finds_no_room_for_its_flow_is_counted() -> None:
    talk = Talk(A)
    talk.ctx.flows.limit = 0
    for n in (1, 2):
        talk.asks(*map(query, range(5)))
        assert talk.drops == {"dns: no flow: table full": 5 * n}
        assert all(type(count) is int for count in talk.drops.values())


# Sending -------------------------------------------------------------------------------------------------------------


def test_the_timer_is_armed_for_the_first_query() -> None:
    talk = Talk(A, B)
    talk.asks(query(1))
    assert timers(talk.ctx).services.deadlines[talk.udp.dns._timer] == T0 + QUERY_TIMEOUT


def test_the_socket_is_of_the_configuration_in_force_and_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(A)
    asked: list[tuple[Any, bytes]] = []

    def opened(fwd: Any, host: bytes) -> Socket:
        asked.append((fwd, host))
        return talk.open(host)

    monkeypatch.setattr(dns, "open_socket", opened)
    talk.asks(query(7))
    assert asked == [(talk.ctx.fwd, addr.packed(A))]
    assert reactor(talk.ctx).events[talk.to(A).fd] == EPOLLIN | EPOLLERR


def test_a_guest_without_a_way_to_any_resolver_is_told() -> None:
    talk = Talk(A, B)
    talk.refusing = {A: errno.ENETUNREACH, B: errno.EHOSTUNREACH}
    for n in (1, 2, 3):
        talk.asks(query(n))
        (packet,) = talk.guest_got()
        assert query(n) in bytes(packet)
        assert talk.drops["dns: all resolvers failed"] == n and talk.waiting == 0


def test_each_query_that_meets_a_full_buffer_is_counted() -> None:
    talk = Talk(A)
    talk.asks(query(1))
    for n in (1, 2, 3):
        talk.to(A).pending = [errno.ENOBUFS]
        talk.asks(query(10 + n))
        assert talk.drops == {"dns: send: ENOBUFS": n}


def test_each_flow_that_ends_for_want_of_a_descriptor_is_counted() -> None:
    talk = Talk(A, B)
    opened = talk.open
    failures: list[int] = []

    def scarce(host: bytes) -> Socket:
        if failures:
            raise _error(failures.pop())
        return opened(host)

    talk.open = scarce  # type: ignore[method-assign]
    for n in (1, 2):
        talk.asks(query(7), port=n)
        failures.append(errno.EMFILE)
        talk.fails(talk.sockets[-1].host)
        assert talk.drops["dns: no descriptor"] == n and talk.ctx.flows.count == 0


@pytest.mark.parametrize("more", [0, 1])
def test_the_longest_answer_of_the_mtu_is_no_fragment(more: int) -> None:
    talk = Talk(A, mtu=1500)
    talk.asks(query(7))
    sock = talk.to(A)
    sock.answers.append(answer(7).ljust(1500 - 28 + more, b"\0"))
    reactor(talk.ctx).fire(sock.fd, EPOLLIN, talk.now)
    assert [bool(v) for v in link(talk.ctx).vnet] == ([False, False] if more else [True])
