"""Spliced UDP, with real sockets: the loopback is both the host's and the namespace's."""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from passt import addr
from passt.linux import nspool
from passt.linux.sockopt import SOL_UDP, UDP_GRO, UDP_SEGMENT, Destroyed
from passt.loop.reactor import EPOLLERR, EPOLLIN, TYPE_UDP_SPLICE, make_ref
from passt.splice import udp as udp_splice
from passt.splice.udp import CLIENT, KEPT_MAX, SERVER, SpliceFlow
from passt.udp_engine import io as udp_io

from ..support import T0, reactor, reconfigure, timers
from ..udp_support import QUERY, Between, Lab, host_of, labs, port_of, unprivileged

Start = Callable[..., Lab]


@pytest.fixture
def start() -> Iterator[Start]:
    """Laboratories in which the namespace's servers are reached on its loopback."""
    with labs() as make:
        yield lambda **config: make(**{"host_lo_to_ns_lo": True} | config)


class Talk:
    """A client, a listener, and a server that its datagrams lead to."""

    def __init__(self, lab: Lab, host: str = "127.0.0.1", *, outbound: bool = False, **listener: Any) -> None:
        self.lab = lab
        self.server = lab.socket(host)
        self.listener = lab.listen(host, to=port_of(self.server), outbound=outbound, **listener)
        self.client = lab.client(self.listener, host)

    def begin(self, data: bytes = b"?") -> Any:
        """The first datagram; returns where the server got it from."""
        self.client.send(data)
        self.lab.turn()
        got, where = self.server.recvfrom(65536)
        assert got == data
        return where

    @property
    def flow(self) -> SpliceFlow:
        flow = self.lab.flow
        assert isinstance(flow, SpliceFlow)
        return flow


@pytest.fixture(params=["127.0.0.1", "::1"])
def talk(request: pytest.FixtureRequest, start: Start) -> Talk:
    return Talk(start(), request.param)


def refused(lab: Lab, count: int) -> None:
    """Handle events until so many datagrams were refused, and no more than that."""
    lab.until(lambda: lab.ctx.drops["udp splice: ECONNREFUSED"] >= count)
    assert lab.ctx.drops == {"udp splice: ECONNREFUSED": count}


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1400, 65000])
def test_a_datagram_and_its_answer(talk: Talk, size: int) -> None:
    question, reply = os.urandom(size), os.urandom(size)
    where = talk.begin(question)
    assert where[:2] == talk.client.getsockname()[:2]  # the client's own port, and the loopback's address
    talk.server.sendto(reply, where)
    talk.lab.turn()
    assert talk.client.recv(65536) == reply
    assert not talk.lab.ctx.drops
    assert talk.lab.link.frames == []


@pytest.mark.parametrize(("outbound", "taken"), [(False, 1), (True, 1)])
def test_one_socket_on_either_side(start: Start, outbound: bool, taken: int) -> None:
    lab = start()
    talk = Talk(lab, outbound=outbound)
    talk.server.sendto(b"!", talk.begin())
    lab.turn()
    assert talk.client.recv(9) == b"!"
    assert lab.ns.taken == taken


@pytest.mark.parametrize("outbound", [False, True])
def test_which_side_a_socket_is_on(start: Start, outbound: bool) -> None:
    lab = start()
    inside: list[Any] = []
    take = lab.ns.take
    lab.ns.take = lambda *kind: inside.append(take(*kind)) or inside[-1]  # type: ignore[func-returns-value,method-assign]
    talk = Talk(lab, outbound=outbound)
    talk.begin()
    assert inside == [talk.flow.ends[CLIENT if outbound else SERVER].sock]


def test_ping_pong_is_one_datagram_at_a_time(talk: Talk) -> None:
    where = talk.begin()
    for i in range(5):
        talk.server.sendto(b"pong %d" % i, where)
        talk.lab.turn()
        assert talk.client.recv(9) == b"pong %d" % i
        talk.client.send(b"ping %d" % i)
        talk.lab.turn()
        assert talk.server.recv(9) == b"ping %d" % i
    assert talk.lab.ctx.flows.count == 1
    assert not any(end.gro for end in talk.flow.ends)


@pytest.mark.parametrize("asked", [0x28, 1])
def test_the_class_of_each_reply_is_passed_on(talk: Talk, asked: int) -> None:
    """Single replies are received without a look at their class only after both directions had none."""
    v6 = talk.server.family == socket.AF_INET6
    sends = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if v6 else (socket.IPPROTO_IP, socket.IP_TOS)
    for sock in (talk.client, talk.server, talk.listener.sock):
        _tells_class(sock)
    talk.client.setsockopt(*sends, asked)
    talk.client.send(b"ping")
    talk.lab.turn()
    assert _class_of(talk.server) == (b"ping", asked)
    where = talk.client.getsockname()
    for tos in (0x48, 0, 0x48, 0, 0, 0x48, 0x48):  # also one that has none in between
        talk.server.setsockopt(*sends, tos)
        talk.server.sendto(b"pong", where)
        talk.lab.turn()
        assert _class_of(talk.client) == (b"pong", tos)
        talk.client.send(b"ping")
        talk.lab.turn()
        assert _class_of(talk.server) == (b"ping", asked)


def _tells_class(sock: socket.socket) -> None:
    v6 = sock.family == socket.AF_INET6
    tells = (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS) if v6 else (socket.IPPROTO_IP, socket.IP_RECVTOS)
    sock.setsockopt(*tells, 1)


def _class_of(sock: socket.socket) -> tuple[bytes, int]:
    """A datagram and its traffic class."""
    data, ((_, _, tos),), _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(4))
    return data, int.from_bytes(tos, sys.byteorder)


@pytest.mark.parametrize(("host", "other"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
def test_classes_of_a_server_in_the_other_family(start: Start, host: str, other: str) -> None:
    """Each end has the option of its own family."""
    lab = start()
    server = lab.socket(other)
    client = lab.client(lab.listen(host, to=port_of(server)), host)
    client.send(b"first")
    _, where = lab.recvfrom(server)
    for sock in (client, server):
        _tells_class(sock)
        v6 = sock.family == socket.AF_INET6
        sends = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if v6 else (socket.IPPROTO_IP, socket.IP_TOS)
        sock.setsockopt(*sends, 0x48)
    client.send(b"ping")
    lab.turn()
    assert _class_of(server) == (b"ping", 0x48)
    server.sendto(b"pong", where)
    lab.turn()
    assert _class_of(client) == (b"pong", 0x48)


def test_replies_without_a_class_cost_the_plain_call(talk: Talk) -> None:
    _tells_class(talk.client)
    where = talk.begin()
    for left in (udp_io.PLAIN, udp_io.PLAIN - 1, udp_io.PLAIN - 2):
        talk.server.sendto(b"pong", where)
        talk.lab.turn()
        assert _class_of(talk.client) == (b"pong", 0)
        assert talk.flow.ends[SERVER].plain == left
        talk.client.send(b"ping")
        talk.lab.turn()
        assert talk.server.recv(9) == b"ping"


def test_a_stream_behind_a_reply_is_received_together(talk: Talk) -> None:
    """Only the first datagram is likely to be alone."""
    where = talk.begin()
    for i in range(9):
        talk.server.sendto(b"%d" % i, where)
    talk.lab.turn()
    assert talk.client.recv(9) == b"0"
    assert not select.select([talk.client], [], [], 0)[0]
    talk.lab.turn()
    talk.client.setblocking(False)
    assert [talk.client.recv(9) for _ in range(8)] == [b"%d" % i for i in range(1, 9)]


@pytest.mark.parametrize("size", [1, 1400, 9000])
def test_bulk_both_ways_is_exact_and_in_order(talk: Talk, size: int) -> None:
    where = talk.begin()
    for _ in range(3):
        there, back = ([os.urandom(size) for _ in range(64)] for _ in range(2))
        for a, b in zip(there, back, strict=True):
            talk.client.send(a)
            talk.server.sendto(b, where)
        assert [talk.lab.recv(talk.server) for _ in there] == there
        assert [talk.lab.recv(talk.client) for _ in back] == back
    assert not talk.lab.ctx.drops


def test_all_sizes_in_one_batch_stay_in_order(talk: Talk) -> None:
    talk.begin()
    sent = [os.urandom(n) for n in (100, 100, 1400, 1400, 7, 0, 0, 1400, 9000, 100, 100, 40000, 40000, 100)]
    for data in sent:
        talk.client.send(data)
    assert [talk.lab.recv(talk.server) for _ in sent] == sent
    assert talk.flow.traffic() == (1 + sum(map(len, sent)), 0)
    assert talk.lab.ctx.stats.spliced["udp"][0].bytes == 1 + sum(map(len, sent))


@pytest.mark.parametrize("outbound", [False, True])
def test_bytes_are_counted_by_direction(start: Start, outbound: bool) -> None:
    """The client of an outbound rule is the guest."""
    talk = Talk(start(), outbound=outbound)
    where = talk.begin(b"?")
    for size in (10, 200):
        talk.client.send(bytes(size))
        assert len(talk.lab.recv(talk.server)) == size
        talk.server.sendto(bytes(2 * size), where)
        assert len(talk.lab.recv(talk.client)) == 2 * size
    asked, answered = 1 + 210, 420
    expected = (answered, asked) if outbound else (asked, answered)
    assert talk.flow.traffic() == expected
    assert tuple(tally.bytes for tally in talk.lab.ctx.stats.spliced["udp"]) == expected


def test_runs_that_the_client_sends_are_joined(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.begin()
    for _ in range(udp_io.GRO_MIN):
        talk.client.send(b"x")
    assert [talk.lab.recv(talk.server) for _ in range(udp_io.GRO_MIN)] == [b"x"] * udp_io.GRO_MIN
    assert talk.flow.ends[CLIENT].sock.getsockopt(SOL_UDP, UDP_GRO) == 1
    writes: list[int] = []
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: writes.append(writev(fd, views)) or writes[-1])
    data = os.urandom(40 * 1400 + 9)
    talk.client.setsockopt(SOL_UDP, UDP_SEGMENT, 1400)
    talk.client.send(data)
    assert b"".join(talk.lab.recv(talk.server) for _ in range(41)) == data
    assert writes == [len(data)]


def test_a_kernel_without_offloads(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_splice, "probe_udp_gro", lambda: False)
    monkeypatch.setattr(udp_splice, "probe_udp_segment", lambda: False)
    talk = Talk(start())
    talk.begin()
    for i in range(40):
        talk.client.send(b"%d" % i)
    assert [talk.lab.recv(talk.server) for _ in range(40)] == [b"%d" % i for i in range(40)]
    assert not any(end.gro or end.gso_size for end in talk.flow.ends)


@pytest.mark.parametrize("growing", [False, True])
def test_a_stream_gathers_for_a_moment(talk: Talk, growing: bool) -> None:
    """Its datagrams count, however many batches they are."""
    talk.begin()
    fd = talk.flow.ends[CLIENT].fd
    for i in range(udp_io.GRO_MIN):
        talk.client.send(b"x" * (1 + i * growing))
    talk.lab.turn()
    assert reactor(talk.lab.ctx).events[fd] == EPOLLERR
    talk.lab.turn()
    assert reactor(talk.lab.ctx).events[fd] == EPOLLIN | EPOLLERR


def test_clients_of_one_port(talk: Talk) -> None:
    host = talk.server.getsockname()[0]
    clients = [talk.client, *(talk.lab.client(talk.listener, host) for _ in range(3))]
    for i, client in enumerate(clients):
        client.send(b"%d" % i)
    for _ in clients:
        data, where = talk.lab.recvfrom(talk.server)
        talk.server.sendto(b"for " + data, where)
    for i, client in enumerate(clients):
        assert talk.lab.recv(client) == b"for %d" % i


def test_what_comes_before_the_socket_has_its_client(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    talk = Talk(lab)
    other = lab.client(talk.listener)
    once = [True]

    def meanwhile(where: Any) -> None:
        if once and once.pop():
            other.send(b"other")
            talk.client.send(b"second")

    Between.happens = meanwhile
    monkeypatch.setattr(nspool, "open_socket", lambda family, kind: Between(family, kind | socket.SOCK_NONBLOCK))
    talk.client.send(b"first")
    lab.turn()
    assert [talk.server.recvfrom(9) for _ in range(3)] == [
        (b"first", talk.client.getsockname()),
        (b"other", other.getsockname()),
        (b"second", talk.client.getsockname()),
    ]


def test_datagrams_of_strangers_to_the_server_side_are_dropped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    talk = Talk(lab)
    stranger = lab.socket("127.0.0.1", "127.0.0.7")
    Between.happens = lambda where: stranger.sendto(b"stranger", where)
    lab.ns.take = lambda family, kind: Between(family, kind | socket.SOCK_NONBLOCK)  # type: ignore[method-assign]
    where = talk.begin()
    talk.server.sendto(b"!", where)
    assert lab.recv(talk.client) == b"!"


def test_clients_of_a_low_port_are_served_by_the_listener(talk: Talk) -> None:
    lab = talk.lab
    with unprivileged(talk.listener):
        where = talk.begin()
        for _ in range(2):
            there, back = ([os.urandom(n) for n in (1400, 1400, 1400, 0, 9, 9000)] for _ in range(2))
            for a, b in zip(there, back, strict=True):
                talk.client.send(a)
                talk.server.sendto(b, where)
            assert [lab.recv(talk.server) for _ in there] == there
            assert [lab.recv(talk.client) for _ in back] == back
    assert [end.fd >= 0 for end in talk.flow.ends] == [False, True]
    assert list(reactor(lab.ctx).refs) == [talk.flow.ends[SERVER].fd]
    lab.stop(talk.listener)
    assert lab.flows == [] and reactor(lab.ctx).refs == {}


# Addresses and ports -------------------------------------------------------------------------------------------------


def test_the_clients_loopback_address_is_kept(start: Start) -> None:
    lab = start()
    server = lab.socket()
    client = lab.client(lab.listen("0.0.0.0", to=port_of(server)), "127.0.0.5", "127.0.0.9")
    client.send(b"?")
    lab.turn()
    where = server.recvfrom(9)[1]
    assert where == client.getsockname()
    server.sendto(b"!", where)
    lab.turn()
    assert client.recv(9) == b"!"


def test_a_source_port_that_is_taken_is_replaced(start: Start) -> None:
    lab = start()
    server = lab.socket()
    client = lab.socket()  # it has its port for itself, on the loopback that stands for both sides
    client.connect(("127.0.0.1", lab.listen(to=port_of(server)).port))
    client.send(b"?")
    lab.turn()
    where = server.recvfrom(9)[1]
    assert where[0] == "127.0.0.1" and where[1] != port_of(client)
    server.sendto(b"!", where)
    lab.turn()
    assert client.recv(9) == b"!"


def test_a_socket_never_talks_to_itself(start: Start) -> None:
    """The client's port is the one that the listener leads to, which is free on the other side."""
    lab = start()
    client = lab.socket("127.0.0.1", "127.0.0.9")
    listener = lab.listen(to=port_of(client), target=host_of(client))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    client.connect(("127.0.0.1", listener.port))
    client.send(b"?")
    lab.turn()
    server = lab.flow.ends[SERVER].sock
    assert server.getpeername() == client.getsockname() != server.getsockname()


def test_the_namespaces_own_address(start: Start) -> None:
    """Not its loopback: the source is the kernel's choice."""
    lab = start(host_lo_to_ns_lo=False)
    lab.ctx.guest = replace(lab.ctx.guest, addr4=addr.packed("127.44.0.1"))
    server = lab.socket("127.0.0.1", "127.44.0.1")
    client = lab.client(lab.listen(to=port_of(server)))
    client.send(b"?")
    lab.turn()
    assert server.recv(9) == b"?"


def test_the_rules_target(start: Start) -> None:
    lab = start()
    server = lab.socket("127.0.0.1", "127.77.0.1")
    client = lab.client(lab.listen(to=port_of(server), target=host_of(server)))
    client.send(b"?")
    lab.turn()
    server.sendto(b"!", server.recvfrom(9)[1])
    lab.turn()
    assert client.recv(9) == b"!"


@pytest.mark.parametrize("outbound", [True, False])
@pytest.mark.parametrize("target", ["198.51.100.7", "127.0.0.1"])
def test_a_target_elsewhere_is_reached_from_the_outbound_address(
    start: Start, monkeypatch: pytest.MonkeyPatch, target: str, outbound: bool
) -> None:
    """These are of the host: a socket in the namespace has none of them, and one to a loopback that of the client."""
    lab = start()
    out = addr.packed("203.0.113.5")
    assert lab.ctx.config.ip4 is not None
    reconfigure(lab.ctx, ip4=replace(lab.ctx.config.ip4, addr_out=out, if_out="eth7"))
    bound: list[Any] = []

    def unreachable(make: Any, fwd: Any, source: bytes | None, interface: str | None, *_: Any) -> Any:
        bound.append((source, interface))
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(udp_splice, "open_target", unreachable)
    lab.client(lab.listen(outbound=outbound, target=addr.packed(target))).send(b"?")
    lab.turn()
    if target == "127.0.0.1":
        assert bound == [(addr.LOOPBACK4, None)]
    else:
        assert bound == [(out, "eth7") if outbound else (None, None)]
    assert lab.ctx.drops == {"udp splice: no flow: ENETUNREACH": 1}


def test_no_address_on_the_other_side(start: Start) -> None:
    lab = start(host_lo_to_ns_lo=False)
    lab.ctx.guest = replace(lab.ctx.guest, addr4=addr.ANY4, addr6=addr.ANY6)
    client = lab.client(lab.listen())
    for count in (1, 2):
        client.send(b"?")
        lab.turn()
        assert lab.ctx.drops == {"udp splice: no address to deliver to": count}


# A server in the other family ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "server"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
def test_the_other_family_is_tried(start: Start, client: str, server: str) -> None:
    lab = start()
    talk = Talk(lab, client)
    to = port_of(talk.server)
    talk.server.close()
    theirs = lab.socket(server, server, to)
    talk.client.send(b"first")
    data, where = lab.recvfrom(theirs)  # after the refusal
    assert (data, where[1]) == (b"first", port_of(talk.client))
    assert not talk.flow.answered and talk.flow.kept == b"first"
    theirs.sendto(b"!", where)
    lab.turn()
    assert talk.client.recv(9) == b"!"
    assert talk.flow.answered and talk.flow.kept is None
    talk.client.send(b"second")
    lab.turn()
    assert theirs.recv(9) == b"second"
    assert talk.flow.kept is None
    assert lab.ctx.drops == {"udp splice: ECONNREFUSED": 1}
    refs = reactor(lab.ctx).refs
    assert refs == {
        **{end.fd: make_ref(TYPE_UDP_SPLICE, end.fd, talk.flow.index << 1 | end.side) for end in talk.flow.ends}
    }


def test_the_next_send_may_be_what_tells_of_the_refusal(start: Start) -> None:
    """The datagram that was refused goes first, then the one that met its error."""
    lab = start()
    talk = Talk(lab, "::1")
    to = port_of(talk.server)
    talk.server.close()
    server = lab.socket("127.0.0.1", "127.0.0.1", to)
    talk.client.send(b"one")
    lab.turn()
    p = select.poll()
    p.register(talk.flow.ends[SERVER].fd, 0)
    assert p.poll(5000), "the refusal"
    talk.client.send(b"two")
    reactor(lab.ctx).fire(talk.flow.ends[CLIENT].fd, EPOLLIN, T0)
    assert [server.recv(9), server.recv(9)] == [b"one", b"two"]
    assert lab.ctx.drops == {"udp splice: ECONNREFUSED": 1}


def test_a_receive_may_be_what_tells_of_the_refusal(start: Start) -> None:
    lab = start()
    talk = Talk(lab, "::1")
    to = port_of(talk.server)
    talk.server.close()
    server = lab.socket("127.0.0.1", "127.0.0.1", to)
    talk.client.send(b"one")
    lab.turn()
    end = talk.flow.ends[SERVER]
    p = select.poll()
    p.register(end.fd, 0)
    assert p.poll(5000), "the refusal"
    reactor(lab.ctx).fire(end.fd, EPOLLIN, T0)
    assert server.recv(9) == b"one"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("late", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_server_that_starts_late_is_found(start: Start, host: str, late: str, before: int) -> None:
    """Each datagram is tried in both families, once, whichever it began with."""
    lab = start()
    talk = Talk(lab, host)
    to = port_of(talk.server)
    talk.server.close()
    for i in range(before):
        talk.client.send(b"lost")
        refused(lab, 2 * (i + 1))
    server = lab.stack.enter_context(
        socket.socket(socket.AF_INET6 if ":" in late else socket.AF_INET, socket.SOCK_DGRAM)
    )
    server.settimeout(5)
    server.bind((late, to))
    talk.client.send(b"found")
    data, where = lab.recvfrom(server)
    server.sendto(b"!", where)
    assert (data, lab.recv(talk.client)) == (b"found", b"!")
    assert lab.ctx.flows.count == 1


def test_a_server_that_starts_again_is_found_in_either_family(start: Start) -> None:
    lab = start()
    talk = Talk(lab)
    to = port_of(talk.server)
    talk.server.sendto(b"!", talk.begin())
    lab.turn()
    assert talk.flow.answered
    talk.server.close()
    talk.client.send(b"lost")
    refused(lab, 1)
    assert not talk.flow.answered
    server = lab.socket("::1", "::1", to)
    talk.client.send(b"found")
    assert lab.recv(server) == b"found"


def test_what_is_kept_is_bounded(start: Start) -> None:
    talk = Talk(start())
    talk.begin(bytes(KEPT_MAX + 1))
    assert talk.flow.kept is None
    talk.client.send(bytes(KEPT_MAX))
    talk.lab.turn()
    assert talk.flow.kept == bytes(KEPT_MAX)


def test_only_the_first_datagram_of_a_run_is_kept(start: Start) -> None:
    talk = Talk(start())
    for i in range(5):
        talk.client.send(b"%d" % i)
    talk.lab.turn()
    assert talk.flow.kept == b"0"


def test_one_target_that_refuses(start: Start) -> None:
    lab = start(ip6=None)
    talk = Talk(lab)
    talk.server.close()
    for i in range(3):
        talk.client.send(b"?")
        refused(lab, i + 1)
    assert talk.flow.kept is None
    assert lab.ns.taken == 1


class Lacking:
    """A namespace without some families."""

    def __init__(self, *families: int) -> None:
        self.families = families
        self.taken = 0

    def take(self, family: int, kind: int) -> Any:
        if family in self.families:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        self.taken += 1
        return nspool.open_socket(family, kind)


def test_a_target_that_cannot_be_connected_to_is_passed_over(start: Start) -> None:
    lab = start()
    lab.ctx.ns = Lacking(socket.AF_INET6)  # type: ignore[assignment]
    server = lab.socket()
    client = lab.client(lab.listen("::", to=port_of(server)), "::1")
    client.send(b"?")
    lab.turn()
    assert server.recv(9) == b"?"
    assert not lab.ctx.drops


def test_no_target_can_be_connected_to(start: Start) -> None:
    lab = start()
    lab.ctx.ns = Lacking(socket.AF_INET, socket.AF_INET6)  # type: ignore[assignment]
    client = lab.client(lab.listen())
    for i in range(1, 3):
        client.send(b"?")
        lab.turn()
        assert lab.ctx.drops == {"udp splice: no flow: EAFNOSUPPORT": i}
    assert lab.flows == [] and reactor(lab.ctx).refs == {}


def test_the_other_target_cannot_be_had_after_a_refusal(start: Start) -> None:
    """The socket that there is stays in use."""
    lab = start()
    talk = Talk(lab)
    talk.begin()
    lab.ctx.ns = Lacking(socket.AF_INET, socket.AF_INET6)  # type: ignore[assignment]
    host, port = talk.server.getsockname()
    talk.server.close()
    for i in (1, 2):
        talk.client.send(b"lost")
        lab.turn()
        lab.turn()
        assert lab.ctx.drops == {"udp splice: ECONNREFUSED": i, "udp splice: no server: EAFNOSUPPORT": i}
    server = lab.socket(host, host, port)
    talk.client.send(b"found")
    lab.turn()
    assert server.recv(9) == b"found"


def test_the_datagram_that_was_kept_cannot_be_sent(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    talk = Talk(lab)
    talk.server.close()
    talk.client.send(b"lost")
    lab.turn()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOBUFS, "")

    for i in (1, 2):
        with monkeypatch.context() as m:
            m.setattr(os, "writev", full)
            lab.turn()
        assert lab.ctx.drops == {"udp splice: ECONNREFUSED": i, "udp splice: send: ENOBUFS": i}
        talk.client.send(b"lost")
        lab.turn()


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_client_that_is_gone(talk: Talk) -> None:
    where = talk.begin()
    talk.client.close()
    for i in range(2):
        talk.server.sendto(b"!", where)
        refused(talk.lab, i + 1)
    assert talk.lab.ctx.flows.count == 1


def test_errors_that_a_receive_reports(talk: Talk) -> None:
    where = talk.begin()
    talk.client.close()
    talk.server.sendto(b"!", where)
    talk.lab.turn()
    end = talk.flow.ends[CLIENT]
    p = select.poll()
    p.register(end.fd, 0)
    assert p.poll(5000)
    reactor(talk.lab.ctx).fire(end.fd, EPOLLIN, T0)
    assert talk.lab.ctx.drops == {"udp splice: ECONNREFUSED": 1}


@pytest.mark.parametrize("side", [CLIENT, SERVER])
@pytest.mark.parametrize("told", ["by an event", "when receiving", "when sending"])
def test_a_flow_whose_socket_was_destroyed_begins_again(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, told: str, side: int
) -> None:
    """By root of the host, `ss -K`: the socket is not connected any more. The other end goes with it."""
    where = talk.begin(b"first")
    flow, lab = talk.flow, talk.lab
    end = flow.ends[side]
    end.reply_expected = False
    with monkeypatch.context() as m:
        if told == "by an event":
            m.setattr("passt.splice.udp.read_errors", _destroyed)
            talk.client.send(b"to a socket that anybody reaches")
            reactor(lab.ctx).fire(end.fd, EPOLLERR | EPOLLIN, T0)
        elif told == "when receiving":
            m.setattr("passt.splice.udp.receive", _destroyed)
            reactor(lab.ctx).fire(end.fd, EPOLLIN, T0)
        else:
            m.setattr(os, "writev", _destroyed)
            for _ in range(2):
                talk.server.sendto(b"lost", where) if side == CLIENT else talk.client.send(b"lost")
            lab.turn()
    assert not lab.flows and lab.ctx.flows.closed == {("udp_splice", "socket destroyed"): 1}
    reactor(lab.ctx).end_turn(T0)
    talk.client.send(b"again")
    assert lab.recv(talk.server) == b"again"
    assert talk.flow is not flow


def _destroyed(*_: object) -> None:
    raise Destroyed(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


def test_an_event_for_nothing_is_borne(talk: Talk) -> None:
    talk.begin()
    for end in talk.flow.ends:
        for _ in range(2):
            reactor(talk.lab.ctx).fire(end.fd, EPOLLIN | EPOLLERR, T0)
    assert not talk.lab.ctx.drops


def test_a_full_buffer_is_a_drop(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.begin()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOBUFS, "")

    monkeypatch.setattr(os, "writev", full)
    for i in (1, 2):
        for _ in range(3):
            talk.client.send(b"x")
        talk.lab.turn()
        assert talk.lab.ctx.drops == {"udp splice: send: ENOBUFS": 3 * i}
    assert talk.flow.state, "the flow goes on"


def test_a_path_that_refuses_segments_gets_single_datagrams(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.begin()
    writev = os.writev

    def limited(fd: int, views: list[memoryview]) -> int:
        if len(views) > 1:
            raise OSError(errno.EMSGSIZE, "")
        return writev(fd, views)

    monkeypatch.setattr(os, "writev", limited)
    for i in range(5):
        talk.client.send(b"%d" % i)
    assert [talk.lab.recv(talk.server) for _ in range(5)] == [b"%d" % i for i in range(5)]
    assert talk.flow.ends[SERVER].gso_max_segs == 1
    assert not talk.lab.ctx.drops


# Life ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "timeout"), [(QUERY, 30), (b"?", 180)])
@pytest.mark.parametrize("to", [53, 9953])
def test_a_query_to_any_port_ends_soon(start: Start, to: int, first: bytes, timeout: float) -> None:
    lab = start()
    lab.client(lab.listen(to=to)).send(first)
    lab.turn()
    assert lab.flow.timeout == timeout


def test_an_idle_flow_ends_with_both_sockets(talk: Talk) -> None:
    where = talk.begin()
    flow = talk.flow
    lab, services = talk.lab, timers(talk.lab.ctx).services
    lab.now = T0 + 100
    talk.server.sendto(b"!", where)
    lab.turn()
    (sweep,) = [t for t, deadline in enumerate(services.deadlines) if deadline == T0 + 180]
    services.fire(sweep)
    assert talk.flow is flow
    services.fire(sweep, T0 + 285)
    reactor(lab.ctx).end_turn(T0 + 285)
    assert lab.flows == [] and reactor(lab.ctx).refs == {}
    assert [end.sock.fileno() for end in flow.ends] == [-1, -1]
    lab.now = T0 + 300
    talk.begin(b"again")


def test_many_flows_make_room_for_more(start: Start) -> None:
    lab = start()
    lab.udp_in.splice._flows.limit = 4
    server = lab.socket()
    listener = lab.listen(to=port_of(server))
    clients = [lab.client(listener) for _ in range(6)]
    for i, client in enumerate(clients):
        lab.now = T0 + i
        client.send(b"?")
        lab.turn()
    assert {f.client.port for f in lab.flows} == {port_of(c) for c in clients[2:]}
    assert len(reactor(lab.ctx).refs) == 8
    assert lab.ctx.drops == {"spliced UDP flow: closed to make room": 2}


def test_clients_of_the_host_make_no_room_at_the_namespaces_cost(start: Start) -> None:
    lab = start()
    lab.udp_in.splice._flows.limit = 3
    server = lab.socket()
    inward, outward = lab.listen(to=port_of(server)), lab.listen(to=port_of(server), outbound=True)
    clients = [lab.client(listener) for listener in (outward, inward, inward, inward)]
    for i, client in enumerate(clients):
        lab.now = T0 + i
        client.send(b"?")
        lab.turn()
    assert {f.client.port for f in lab.flows} == {port_of(clients[n]) for n in (0, 2, 3)}


def test_without_descriptors_the_longest_idle_flow_makes_room(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    server = lab.socket()
    listener = lab.listen(to=port_of(server))
    clients = [lab.client(listener) for _ in range(3)]
    for i in range(2):
        lab.now = T0 + i
        clients[i].send(b"?")
        lab.turn()
    failures = [errno.EMFILE]
    real = udp_splice.open_target

    def scarce(*args: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "")
        return real(*args)

    reconfigure(lab.ctx, ip6=None)  # one target
    monkeypatch.setattr(udp_splice, "open_target", scarce)
    clients[2].send(b"!")
    lab.turn()
    assert {f.client.port for f in lab.flows} == {port_of(c) for c in clients[1:]}


@pytest.mark.parametrize("scarce", ["open_client", "open_target"])
def test_without_descriptors_clients_of_the_host_take_none_of_the_namespace(
    start: Start, monkeypatch: pytest.MonkeyPatch, scarce: str
) -> None:
    """An older flow of their own makes room, not the oldest one."""
    lab = start()
    reconfigure(lab.ctx, ip6=None)  # one target
    server = lab.socket()
    inward, outward = lab.listen(to=port_of(server)), lab.listen(to=port_of(server), outbound=True)
    clients = [lab.client(listener) for listener in (outward, inward, inward)]
    failures = [errno.EMFILE]
    place: Any = udp_splice if scarce == "open_target" else lab.udp_in._outbound
    real = getattr(place, scarce)

    def failing(*args: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "")
        return real(*args)

    for i, client in enumerate(clients):
        lab.now = T0 + i
        if i == 2:
            monkeypatch.setattr(place, scarce, failing)
        client.send(b"?")
        lab.turn()
    assert {f.client.port for f in lab.flows} == {port_of(clients[n]) for n in (0, 2)}


@pytest.mark.parametrize("limit", [0, 1])
def test_a_full_table_leaves_no_socket(start: Start, limit: int) -> None:
    lab = start()
    lab.ctx.flows.limit = limit
    if limit:
        lab.udp_in.splice._flows._find_room = lambda *_: False  # type: ignore[method-assign]
    server = lab.socket()
    listener = lab.listen(to=port_of(server))
    for _ in range(limit + 1):
        lab.client(listener).send(b"?")
        lab.turn()
    assert lab.ctx.drops == {"udp splice: no flow: table full": 1}
    assert len(reactor(lab.ctx).refs) == 2 * limit


@pytest.mark.parametrize("failing", [1, 2])
def test_a_socket_that_cannot_be_watched(start: Start, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    lab = start()
    fake = reactor(lab.ctx)
    watch, calls = fake.watch, [0]

    def limited(*args: Any) -> int:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "")
        return watch(*args)

    monkeypatch.setattr(fake, "watch", limited)
    lab.client(lab.listen()).send(b"?")
    lab.turn()
    assert lab.ctx.drops == {"udp splice: no flow: ENOSPC": 1}
    assert (lab.flows, fake.refs) == ([], {})


def test_a_fault_ends_one_flow(talk: Talk) -> None:
    host = talk.server.getsockname()[0]
    talk.begin()
    talk.lab.client(talk.listener, host).send(b"?")
    talk.lab.until(lambda: len(talk.lab.flows) == 2)
    first, second = talk.lab.flows
    ref = reactor(talk.lab.ctx).refs[second.ends[SERVER].fd]
    talk.lab.udp_in.splice.fault(ref)
    assert talk.lab.flows == [first]
    assert len(reactor(talk.lab.ctx).refs) == 2


def test_listening_again_on_the_same_port(talk: Talk) -> None:
    host = talk.server.getsockname()[0]
    talk.begin()
    talk.lab.stop(talk.listener)
    assert talk.lab.flows == []
    again = talk.lab.listen(host, talk.listener.port, to=port_of(talk.server))
    talk.lab.client(again, host).send(b"!")
    talk.lab.turn()
    assert talk.server.recv(9) == b"!"


@pytest.mark.parametrize("outbound", [False, True])
def test_debug_lines_name_both_ends(start: Start, monkeypatch: pytest.MonkeyPatch, outbound: bool) -> None:
    lines: list[str] = []
    monkeypatch.setattr("passt.log.debug_on", True)
    monkeypatch.setattr("passt.log.debug", lines.append)
    talk = Talk(start(ip6=None) if not outbound else start(), outbound=outbound)
    talk.begin()
    client, server = f"127.0.0.1:{port_of(talk.client)}", f"127.0.0.1:{port_of(talk.server)}"
    ends = rf"{client} -> 127\.0\.0\.1:{talk.listener.port} \(host {server}\)"
    if not outbound:
        ends = rf"{client}( \(seen as 127\.0\.0\.1:\d+\))? -> {server}"
    assert any(re.fullmatch(rf"Flow 0 \(spliced UDP flow\): {ends} opened", line) for line in lines), lines
    talk.server.close()
    talk.client.send(b"?")
    talk.lab.until(lambda: bool(talk.lab.ctx.drops))
    assert any("error on socket" in line and "ECONNREFUSED" in line for line in lines)
