"""Borders of lengths, counts and reasons in `udp.py`: what a mutant of it changes and conversations leave open."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import IPv6

from passt import addr, udp
from passt.linux import sockopt
from passt.linux.sockopt import ExtendedError, default_hops
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp_engine import io as udp_io
from passt.udp_engine.flow import DNS_TIMEOUT, FLOW_TIMEOUT, UdpFlow
from passt.udp_engine.sock import Client

from .support import GATEWAY4, GATEWAY6, GUEST4, T0, reactor, stage_faults
from .test_udp import OTHER_MAC, Start, Talk, start, talk
from .udp_support import QUERY, Lab, labs, port_of

__all__ = ["start", "talk"]

ANSWER = QUERY[:2] + b"\x81\x83" + QUERY[4:]  # there is none


def whole(talk: Talk) -> list[bool]:
    """Of each frame to the guest since the last call: whether it has the flow's header, and is no fragment."""
    found = [bool(v) for v in talk.link.vnet]
    talk.link.take()
    return found


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("alone", [True, False])
def test_the_longest_datagram_of_the_mtu_is_no_fragment(start: Start, more: int, alone: bool) -> None:
    talk = start(mtu=1500)
    talk.sends(b"?")
    size = talk.flow.payload_max + more
    if not alone:  # the first answer is received alone
        talk.answers(b"!")
        talk.event()
        whole(talk)
    talk.answers(bytes(size))
    talk.event()
    assert whole(talk) == [True] if not more else not any(whole(talk))


def test_of_joined_datagrams_only_those_beyond_the_mtu_are_fragments(start: Start) -> None:
    talk = start(mtu=1500)
    talk.sends(b"?")
    most = talk.flow.payload_max
    views = [memoryview(bytes(most + 1)), memoryview(bytes(most))]
    talk.udp._deliver(talk.flow, 0, [(most + 1, 2 * most + 1, views)])
    fragments = whole(talk)
    assert fragments[-1] and not any(fragments[:-1]) and len(fragments) == 3


def test_joined_datagrams_of_the_mtu_stay_joined_and_are_counted(start: Start) -> None:
    talk = start(mtu=1500)
    talk.sends(b"?")
    most = talk.flow.payload_max
    one = [memoryview(bytes(most))]
    assert talk.udp._deliver(talk.flow, 0, [(most, 2 * most, one * 2), (most, 2 * most - 1, [*one, one[0][1:]])]) == 4
    assert len(whole(talk)) == 2
    assert talk.udp._deliver(talk.flow, 0, []) == 0


def test_datagrams_without_a_socket_are_counted(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(talk.udp.outbound, "open", refuse)
    for n in (1, 2):
        talk.sends(b"a", b"b", b"c")
        assert talk.ctx.drops == {"udp: no socket: EPERM": 3 * n}
    assert all(type(n) is int for n in talk.ctx.drops.values())
    talk.link.take()


def test_bytes_of_a_flow_add_up(talk: Talk) -> None:
    sent = got = 0
    for n in (10, 200, 3000):
        for _ in range(2):
            talk.sends(os.urandom(n))
            talk.answers(os.urandom(2 * n))
            talk.event()
            sent, got = sent + n, got + 2 * n
    talk.answers(b"unasked", b"for")
    while talk.flow.to_guest < got + 10:
        talk.event()
    assert (talk.flow.to_host, talk.flow.to_guest) == (sent, got + 10)


def test_a_new_flow_has_no_segment_size(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the first datagram costs no system call but its own."""
    monkeypatch.setattr(udp_io, "set_gso_size", lambda *_: pytest.fail("none was set"))
    talk.sends(b"abc")
    talk.sends(b"d")
    assert talk.arrived(2) == [b"abc", b"d"]


def test_a_super_frame_alone_is_cut_into_its_datagrams(talk: Talk) -> None:
    data = os.urandom(1050)
    talk.sends((data, 500))
    assert talk.arrived(3) == [data[:500], data[500:1000], data[1000:]]


def test_each_datagram_that_meets_a_full_buffer_is_counted(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.sends(b"x")

    def full(*_: object) -> int:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(os, "writev", full)
    for n in (1, 2):
        talk.sends(b"abc", b"def", b"g")
        assert talk.ctx.drops == {"udp: send: ENOBUFS": 3 * n}
    assert talk.flow.to_host == 1
    talk.link.take()


def test_each_datagram_that_begins_no_flow_is_counted(start: Start) -> None:
    talk = start(no_udp=True)
    for n in (1, 2):
        talk.sends(b"a", b"b", b"c")
        assert talk.ctx.drops == {"udp: disabled": 3 * n}
    assert all(type(n) is int for n in talk.ctx.drops.values())


def test_the_hops_of_a_flow_are_those_of_its_socket_at_first(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datagrams with the host's default cost no system call."""
    talk = start()
    monkeypatch.setattr(UdpFlow, "set_fields", lambda *_: None)
    monkeypatch.setattr(talk.udp.outbound, "open", lambda *_: socket.socket(type=socket.SOCK_DGRAM))
    monkeypatch.setattr(talk.udp, "_send", lambda *_: None)
    talk.sends(b"x", key=talk.key_to(talk.gateway, 9))
    assert talk.flow.fields & 0xFF == default_hops()[4]


@pytest.mark.parametrize("v4", [True, False])
def test_queries_over_quic_go_to_a_resolver_of_the_guests_choice_of_family(start: Start, v4: bool) -> None:
    """RFC 9250: port 853 over UDP. It is a flow like any other."""
    forwarded = addr.packed("169.254.1.1" if v4 else "2001:db8::53")
    for hosts in ((addr.LOOPBACK4, addr.LOOPBACK6), (addr.LOOPBACK6, addr.LOOPBACK4)):
        talk = start(v4=v4, dns_match=(forwarded,), dns_hosts=hosts)
        talk.sends(b"x", key=talk.key_to(forwarded, 853))
        assert talk.flow.host == (addr.LOOPBACK4 if v4 else addr.LOOPBACK6)
        assert talk.flow.sock.getpeername()[1] == 853


def test_a_batch_that_the_kernel_refuses_is_told(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.sends(b"x")

    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "writev", refuse)
    talk.sends(b"abc", b"def")
    assert talk.ctx.drops == {"udp: send: EPERM": 2}
    assert len(talk.packets()) == 1


def test_datagrams_of_a_socket_that_cannot_be_watched_are_counted(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reactor(talk.ctx), "watch", refuse)
    for n in (1, 2):
        talk.sends(b"a", b"b")
        assert talk.ctx.drops == {"udp: no flow: ENOSPC": 2 * n}
    assert talk.ctx.flows.count == 0
    talk.link.take()


def test_an_error_from_the_peer_itself_comes_from_the_guests_address_of_it(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that the guest knows by another address than the host."""
    talk.sends(b"x")
    flow = talk.flow
    flow.host = addr.packed("198.51.100.9" if talk.v4 else "2001:db8:f::9")
    kind = (sockopt.ORIGIN_ICMP, 3, 3) if talk.v4 else (sockopt.ORIGIN_ICMP6, 1, 4)
    error = ExtendedError(errno.ECONNREFUSED, *kind, 0, flow.host)
    monkeypatch.setattr(udp, "read_errors", lambda sock: [(error, b"x")])
    reactor(talk.ctx).fire(flow.fd, EPOLLERR, T0)
    (p,) = talk.packets()
    assert p[IP if talk.v4 else IPv6].src == addr.text(GATEWAY4 if talk.v4 else GATEWAY6)
    assert not talk.v4 or p[ICMP].type == 3


@pytest.mark.parametrize("by_key", [True, False])
def test_a_fault_ends_one_flow_with_its_reason(talk: Talk, by_key: bool) -> None:
    talk.sends(b"x")
    flow = talk.flow
    talk.sends(b"x", key=talk.key_to(talk.gateway, 9))
    if by_key:
        talk.udp.fault_key(flow.key)
        talk.udp.fault_key(flow.key)  # gone already
    else:
        talk.udp.fault(reactor(talk.ctx).refs[flow.fd])
    assert talk.ctx.flows.closed == {("udp", "fault"): 1}
    assert talk.flow.key[-2:] == b"\0\x09"


def test_an_event_is_about_what_it_says(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a pause only errors are asked for, and a stream is not to be read."""
    calls: list[str] = []
    talk.sends(b"x")
    monkeypatch.setattr(talk.udp, "_report", lambda flow, now: calls.append("report"))
    monkeypatch.setattr(talk.udp, "_take", lambda flow, now: calls.append("take"))
    for events, expected in (
        (EPOLLERR, ["report"]),
        (EPOLLIN, ["take"]),
        (EPOLLIN | EPOLLERR, ["report", "take"]),
    ):
        calls.clear()
        reactor(talk.ctx).fire(talk.flow.fd, events, T0)
        assert calls == expected


def test_a_guest_that_has_another_address_or_is_gone(talk: Talk) -> None:
    """Services are told by the tap."""
    talk.sends(b"x")
    talk.ctx.neighbours.sender(OTHER_MAC)
    talk.ctx.neighbours.learn(talk.flow.src, OTHER_MAC)
    talk.answers(b"y")
    talk.event()
    assert talk.link.take_one()[:6] == OTHER_MAC
    for forget in talk.ctx.services.on_forget:
        forget()
    assert talk.ctx.flows.closed == {("udp", "guest gone"): 1}


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_pause_a_stream_is_read(talk: Talk, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.sends(b"x")
    flow = talk.flow
    flow.reply_expected = False
    talk.answers(*[b"y"] * 5)
    while flow.to_guest < 5:
        talk.event()
    if fails:
        stage_faults(talk.ctx)
        monkeypatch.setattr(talk.udp, "_take", lambda *_: 1 // 0)
    else:
        talk.answers(b"z")
    talk.udp._pauses._resume(T0 + 7)
    if fails:
        assert talk.ctx.flows.closed == {("udp", "fault"): 1}
    else:
        assert (flow.last, flow.to_guest) == (T0 + 7, 6)


# Clients of listeners ------------------------------------------------------------------------------------------------


@pytest.fixture
def lab() -> Iterator[Lab]:
    with labs() as make:
        yield make()


class Far:
    """A client whose datagrams have come by a listener."""

    def __init__(self, lab: Lab, to: int = 7777, sport: int = 40000) -> None:
        self.lab = lab
        self.listener = lab.listen(to=to)
        self.client = Client(self.listener, addr.packed("127.0.0.9"), sport, addr.LOOPBACK4)
        peer = addr.packed("203.0.113.9")
        self.key = GUEST4 + peer + to.to_bytes(2, "big") + sport.to_bytes(2, "big")
        self.opened = 0

    def _make(self) -> Any:
        self.opened += 1
        assert self.lab.udp is not None
        return self.lab.udp.outbound.open_client(self.client)

    def sends(self, *datagrams: bytes, now: float = T0) -> None:
        frames: list[int] = []
        for d in datagrams:
            at = frames[-2] if frames else 0
            frames += (at, at + len(d), 0)
        assert self.lab.udp is not None
        self.lab.udp.inbound(self.key, self.client, self._make, memoryview(b"".join(datagrams)), frames, now)

    @property
    def flow(self) -> UdpFlow | None:
        assert self.lab.udp is not None
        return self.lab.udp._by_key.get(self.key)


def test_a_client_keeps_its_flow(lab: Lab) -> None:
    far = Far(lab)
    far.sends(b"one")
    flow = far.flow
    assert flow is not None and flow.fields & 0xFF == default_hops()[4]
    far.sends(b"two", now=T0 + 100)
    assert far.flow is flow and far.opened == 1
    assert (flow.last, flow.to_guest) == (T0 + 100, 6)


@pytest.mark.parametrize("uso", [True, False])
def test_a_guest_without_super_frames_gets_a_clients_datagrams_one_by_one(lab: Lab, uso: bool) -> None:
    lab.link.uso = uso
    Far(lab).sends(b"one", b"two", b"tri")
    assert len(lab.link.take()) == (1 if uso else 3)


def test_of_two_clients_with_one_key_the_last_one_stays(lab: Lab) -> None:
    first, second = Far(lab), Far(lab)
    assert first.key == second.key
    first.sends(b"x")
    second.sends(b"y")
    assert second.flow is not None and second.flow.client == second.client
    assert lab.ctx.flows.closed == {("udp", "replaced"): 1}


def test_datagrams_of_clients_without_a_flow_are_counted(lab: Lab) -> None:
    lab.ctx.flows.limit = 0
    far = Far(lab)
    for n in (1, 2):
        far.sends(b"one", b"two", b"tri")
        assert lab.ctx.drops == {"udp: no flow: table full": 3 * n}
    assert all(type(n) is int for n in lab.ctx.drops.values())


def test_a_listener_that_closes_ends_its_clients_and_no_others(lab: Lab) -> None:
    """Another port of the host may lead to the same port of the guest."""
    first, second = Far(lab, sport=40000), Far(lab, sport=40001)
    for far in (first, second):
        far.sends(b"x")
    assert lab.udp is not None
    lab.udp.end([first.listener])
    assert first.flow is None and second.flow is not None
    assert lab.ctx.flows.closed == {("udp", "listener gone"): 1}


def test_only_the_guests_flows_from_a_port_make_way_for_a_listener(lab: Lab) -> None:
    far = Far(lab, to=7777)
    far.sends(b"x")
    assert lab.udp is not None
    lab.ctx.pool.buf[64:65] = b"x"
    server = port_of(lab.socket())
    for sport in (7777, 7778):
        ends = GUEST4 + GATEWAY4 + sport.to_bytes(2, "big") + server.to_bytes(2, "big")
        lab.udp.tap_handler(ends, [64, 65, 0], T0)
    assert lab.ctx.flows.count == 3
    lab.udp.free_ports({7777})
    assert lab.ctx.flows.closed == {("udp", "made way for a listener"): 1}
    assert far.flow is not None and {f.sport for f in lab.udp._by_key.values()} == {7777, 7778}


# Queries to name servers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_query_to_any_port_ends_soon_when_it_is_answered(talk: Talk, whole: bool) -> None:
    """`whole`: the answer is one."""
    talk.sends(QUERY)
    assert talk.flow.timeout == DNS_TIMEOUT
    talk.arrived(1)
    talk.answers(ANSWER if whole else b"something else")
    talk.event()
    assert talk.flow.timeout == (DNS_TIMEOUT if whole else FLOW_TIMEOUT)
    talk.answers(b"more")
    talk.sends(b"more")
    talk.event()
    assert talk.flow.timeout == (DNS_TIMEOUT if whole else FLOW_TIMEOUT)


def test_the_first_of_several_datagrams_counts(talk: Talk) -> None:
    talk.sends((QUERY + QUERY, len(QUERY)))
    assert talk.flow.timeout == DNS_TIMEOUT


def test_what_begins_otherwise_stays_longer(talk: Talk) -> None:
    talk.sends(b"handshake", QUERY)
    assert talk.flow.timeout == FLOW_TIMEOUT
