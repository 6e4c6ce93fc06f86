"""First datagrams of clients, from real listeners of the loopback to a fake tap."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import addr
from passt.flow.neighbours import HELD_MAX, HOLD, SOLICIT_MAX
from passt.linux import nspool
from passt.linux.mmsg import COUNT
from passt.policy.forwarding import Forwarding
from passt.policy.guest import Guest
from passt.policy.rules import Rule
from passt.ports import udp_in
from passt.ports.udp_in import refuse
from passt.udp_engine import outbound
from passt.udp_engine import sock as udp_sock
from passt.udp_engine.sock import Client

from ..offload import received
from ..oracle import recomputed
from ..support import GATEWAY4, GATEWAY6, GUEST4, GUEST6, IP4, T0, elapse, reactor, timers
from ..udp_support import QUERY, REUSE, Between, Lab, host_of, labs, port_of, second_bind, unprivileged

Start = Callable[..., Lab]
TO = 7777  # the guest's port
OTHER_MAC = bytes.fromhex("525400999999")


class Remote(Forwarding):
    """As if the clients were not on this host: 127.0.x.y is 203.0.x.y, ::1 is 2001:db8:5::1."""

    def spliced(self, peer: bytes, rule: Rule) -> bool:
        return False

    def inbound_source(self, peer: bytes, guest: Guest) -> bytes | None:
        return super().inbound_source(remote(peer), guest)


def remote(peer: bytes) -> bytes:
    return b"\xcb\x00" + peer[2:] if len(peer) == 4 else addr.packed("2001:db8:5::1")


@pytest.fixture
def start() -> Iterator[Start]:
    """Laboratories with clients that are far away."""
    with labs() as make:

        def begin(**config: Any) -> Lab:
            lab = make(**config)
            lab.ctx.fwd = Remote(lab.ctx.settings)
            return lab

        yield begin


@pytest.fixture
def local() -> Iterator[Start]:
    """Laboratories with clients of this host."""
    with labs() as make:
        yield make


def packets(lab: Lab) -> list[Any]:
    """The packets that the guest's driver hands up, checked by scapy."""
    frames = received(lab.link)
    assert [recomputed(f) for f in frames] == frames
    return [Ether(f) for f in frames]


def payloads(lab: Lab) -> list[bytes]:
    return [bytes(p[UDP].payload) for p in packets(lab)]


def answer(lab: Lab, packet: Any, data: bytes) -> None:
    """The guest answers `packet`."""
    ip = packet[IP] if IP in packet else packet[IPv6]
    u = packet[UDP]
    key = addr.packed(ip.dst) + addr.packed(ip.src) + u.dport.to_bytes(2, "big") + u.sport.to_bytes(2, "big")
    guest_sends(lab, key, data)


def guest_sends(lab: Lab, key: bytes, data: bytes) -> None:
    lab.ctx.pool.buf[64 : 64 + len(data)] = data
    assert lab.udp is not None
    lab.udp.tap_handler(key, [64, 64 + len(data), 0], lab.now)


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "source", "destination"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.9", "127.0.0.5"),
        ("::1", "::1", "::1"),
        ("::", "::1", "::1"),
        ("::", "127.0.0.9", "127.0.0.5"),
    ],
)
@pytest.mark.parametrize("size", [0, 1, 1400, 65000])
def test_a_datagram_and_its_answer(start: Start, bound: str, source: str, destination: str, size: int) -> None:
    lab = start()
    listener = lab.listen(bound, to=TO)
    client = lab.client(listener, destination, source)
    question, reply = os.urandom(size), os.urandom(size)
    client.send(question)
    lab.turn()
    (p,) = packets(lab)
    v4 = ":" not in source
    ip = p[IP if v4 else IPv6]
    assert (ip.src, ip.dst) == (addr.text(remote(host_of(client))), addr.text(GUEST4 if v4 else GUEST6))
    assert (p[UDP].sport, p[UDP].dport) == (port_of(client), TO)
    assert bytes(p[UDP].payload) == question
    answer(lab, p, reply)
    assert client.recv(65536) == reply  # it is connected: from the address and port that it sent to
    assert lab.flow.sock.getsockname()[:2] == (destination, listener.port)
    assert not lab.ctx.drops


@pytest.mark.parametrize("v4", [True, False])
def test_datagrams_wait_for_a_guest_that_has_not_spoken(start: Start, v4: bool) -> None:
    """The guest is solicited, and gets them in order when its MAC address is known."""
    lab = start()
    asked: list[bytes] = []
    lab.ctx.services.solicit4 = lab.ctx.services.solicit6 = asked.append
    lab.ctx.guest.mac = addr.BROADCAST_MAC
    listener = lab.listen("127.0.0.1" if v4 else "::1", to=TO)
    client = lab.client(listener, "127.0.0.1" if v4 else "::1")
    for data in (b"1", b"2", b"3"):
        client.send(data)
    lab.turn()
    assert lab.link.frames == [] and asked == [GUEST4 if v4 else GUEST6]
    lab.ctx.neighbours.sender(OTHER_MAC)
    reactor(lab.ctx).end_turn(lab.now)
    sent = packets(lab)
    assert [bytes(p[UDP].payload) for p in sent] == [b"1", b"2", b"3"]
    assert {p.dst for p in sent} == {addr.mac_text(OTHER_MAC)}
    answer(lab, sent[0], b"reply")
    assert client.recv(10) == b"reply"
    assert not lab.ctx.drops


def test_datagrams_for_a_guest_that_never_speaks(start: Start) -> None:
    lab = start()
    lab.ctx.guest.mac = addr.BROADCAST_MAC
    client = lab.client(lab.listen(to=TO))
    for _ in range(HELD_MAX + 5):
        client.send(b"x")
        lab.turn()
    assert lab.ctx.drops == {"udp: no guest": 5}
    elapse(lab.ctx, lab.now, HOLD + SOLICIT_MAX)
    assert lab.ctx.drops == {"udp: no guest": HELD_MAX + 5}
    assert lab.ctx.flows.count == 0


def test_what_follows_comes_by_the_clients_own_socket(start: Start) -> None:
    lab = start()
    listener = lab.listen()
    client = lab.client(listener)
    client.send(b"first")
    lab.turn()
    for i in range(5):
        client.send(b"%d" % i)
    with pytest.raises(BlockingIOError):
        listener.sock.recv(9)
    lab.until(lambda: len(lab.link.frames) > 1)
    assert payloads(lab) == [b"first", b"0", b"1", b"2", b"3", b"4"]


def test_a_burst_is_one_super_frame(start: Start) -> None:
    lab = start()
    client = lab.client(lab.listen())
    sent = [os.urandom(1000) for _ in range(40)]
    for data in sent:
        client.send(data)
    lab.turn()
    assert len(lab.link.frames) == 1
    assert payloads(lab) == sent
    assert len(lab.flows) == 1


def test_a_burst_that_takes_several_batches_stays_in_order(start: Start) -> None:
    lab = start()
    client = lab.client(lab.listen())
    sent = [b"%d" % i for i in range(2 * COUNT + 9)]
    for data in sent:
        client.send(data)
    lab.turn()
    assert payloads(lab) == sent
    assert lab.ctx.flows.count == 1


def test_an_event_takes_a_bounded_number_of_batches(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_in, "BATCHES_MAX", 2)
    lab = start()
    client = lab.client(lab.listen())
    for _ in range(2 * COUNT + 9):
        client.send(b"x")
    lab.turn()
    assert len(payloads(lab)) == 2 * COUNT
    lab.until(lambda: len(lab.link.frames) > 0)
    assert len(payloads(lab)) == 9


def test_clients_of_one_port(start: Start) -> None:
    lab = start()
    listener = lab.listen()
    clients = [lab.client(listener, source=f"127.0.0.{i}") for i in range(1, 4)]
    for i in (0, 1, 2, 1, 0):
        clients[i].send(b"%d" % i)
    lab.turn()
    assert sorted(payloads(lab)) == [b"0", b"0", b"1", b"1", b"2"]
    for i, client in enumerate(clients):
        key = GUEST4 + remote(host_of(client)) + listener.to.to_bytes(2, "big") + port_of(client).to_bytes(2, "big")
        guest_sends(lab, key, b"for %d" % i)
        assert client.recv(99) == b"for %d" % i
        client.send(b"again %d" % i)
        lab.turn()
        assert payloads(lab) == [b"again %d" % i]


def test_one_client_that_writes_to_two_addresses(start: Start) -> None:
    """The guest sees one peer; it gets its answers from where it has written to last."""
    lab = start()
    listener = lab.listen("0.0.0.0")
    client = lab.socket()
    for host in ("127.0.0.5", "127.0.0.6", "127.0.0.5"):
        client.sendto(b"?", (host, listener.port))
        lab.turn()
        (p,) = packets(lab)
        answer(lab, p, b"!")
        assert client.recvfrom(9) == (b"!", (host, listener.port))
    assert lab.ctx.flows.count == 1


def test_a_broadcast_comes_by_the_listener_each_time(start: Start) -> None:
    lab = start()
    listener = lab.listen("0.0.0.0")
    client = lab.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    for _ in range(2):
        client.sendto(b"?", ("127.255.255.255", listener.port))
        lab.turn()
        (p,) = packets(lab)
        answer(lab, p, b"!")
        assert client.recvfrom(9) == (b"!", ("127.0.0.1", listener.port))
    assert lab.ctx.flows.count == 1


def test_errors_of_a_client_go_to_the_guest(start: Start) -> None:
    lab = start()
    client = lab.client(lab.listen())
    client.send(b"?")
    lab.turn()
    (p,) = packets(lab)
    client.close()
    answer(lab, p, b"!")
    lab.turn()
    (error,) = packets(lab)
    assert error[IP].dst == addr.text(GUEST4)
    assert error.sprintf("%ICMP.type% %ICMP.code%") == "dest-unreach port-unreachable"


def test_the_rules_target(start: Start) -> None:
    lab = start()
    target = addr.packed("198.51.100.77")
    listener = lab.listen("::", to=53, target=target)
    lab.client(listener).send(b"?")
    lab.client(listener, "::1").send(b"?")
    lab.turn()
    (p,) = packets(lab)
    assert (p[IP].dst, p[UDP].dport) == ("198.51.100.77", 53)
    assert lab.ctx.drops == {"udp: no address to deliver to or from": 1}


def test_debug_lines_name_both_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("passt.log.debug_on", True)
    monkeypatch.setattr("passt.log.debug", lines.append)
    lab = start()
    listener = lab.listen(to=TO)
    client = lab.client(listener)
    client.send(b"?")
    lab.turn()
    port = port_of(client)
    assert f"Flow 0 (UDP flow): 127.0.0.1:{port} (seen as 203.0.0.1:{port}) -> 192.0.2.2:{TO} opened" in lines


# Strangers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Sets what happens between bind() and connect() of the sockets of clients."""

    def happens(what: Callable[[Any], None]) -> None:
        Between.happens = what
        monkeypatch.setattr(nspool, "open_socket", lambda family, kind: Between(family, kind | socket.SOCK_NONBLOCK))

    return happens


def test_what_comes_before_the_socket_has_its_client(start: Start, between: Any) -> None:
    """In the order in which it came, and each to its own flow."""
    lab = start()
    listener = lab.listen("0.0.0.0")
    a, b = lab.client(listener, source="127.0.0.2"), lab.client(listener, source="127.0.0.3")
    once = [True]

    def meanwhile(where: Any) -> None:
        if once and once.pop():
            b.send(b"b1")
            a.send(b"a2")
            b.send(b"b2")

    between(meanwhile)
    a.send(b"a1")
    lab.turn()
    got = packets(lab)
    assert [(p[IP].src, bytes(p[UDP].payload)) for p in got] == [
        ("203.0.0.2", b"a1"), ("203.0.0.3", b"b1"), ("203.0.0.2", b"a2"), ("203.0.0.3", b"b2"),
    ]  # fmt: skip
    assert {f.sock.getpeername() for f in lab.flows} == {a.getsockname(), b.getsockname()}
    answer(lab, got[1], b"!")
    assert b.recv(9) == b"!"
    b.send(b"b3")
    lab.turn()
    assert payloads(lab) == [b"b3"]
    assert not lab.ctx.drops


def test_what_the_listener_has_is_older(start: Start, between: Any) -> None:
    """Datagrams that were queued at the listener after its batch go before those of the new socket."""
    lab = start()
    listener = lab.listen()
    client = lab.client(listener)
    sent = [b"%d" % i for i in range(COUNT + 5)]
    for data in sent:
        client.send(data)
    between(lambda where: client.send(b"last"))  # while the first batch is handled, and five wait
    lab.turn()
    assert payloads(lab) == [*sent, b"last"]


def test_strangers_bring_strangers_up_to_a_limit(start: Start, between: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_in, "MISDELIVERED_MAX", 5)
    lab = start()
    listener = lab.listen("0.0.0.0")

    def meanwhile(where: Any) -> None:
        lab.client(listener).send(b"another")
        lab.client(listener).send(b"one more")

    between(meanwhile)
    lab.client(listener).send(b"first")
    lab.turn()
    assert len(payloads(lab)) == lab.ctx.flows.count == 1 + 5
    assert lab.ctx.drops == {"udp: too much for one event": 2 * 6 - 5}
    lab.client(listener).send(b"first")
    lab.turn()
    assert lab.ctx.drops == {"udp: too much for one event": 2 * (2 * 6 - 5)}


def test_the_class_of_a_first_datagram_reaches_the_tap(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    given: list[int] = []
    monkeypatch.setattr(lab.udp, "inbound", lambda *arguments: given.append(arguments[-1]))
    client = Client(lab.listen("0.0.0.0"), addr.packed("198.51.100.9"), 9, addr.LOOPBACK4)
    lab.udp_in._to_guest(client, memoryview(b"x"), [0, 1, 0], T0, 0x28)
    assert given == [0x28]


# Ports that must not be bound again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "source", "destination"),
    [
        ("0.0.0.0", "127.0.0.9", "127.0.0.5"),
        ("::", "::1", "::1"),
        ("::", "127.0.0.9", "127.0.0.5"),
    ],
)
def test_clients_of_a_low_port_are_served_by_the_listener(
    start: Start, bound: str, source: str, destination: str
) -> None:
    lab = start()
    listener = lab.listen(bound, to=TO)
    with unprivileged(listener):
        client = lab.client(listener, destination, source)
        for data in (b"", b"?", os.urandom(9000)):
            client.send(data)
            lab.turn()
            (p,) = packets(lab)
            assert bytes(p[UDP].payload) == data
            for reply in (b"", b"!", os.urandom(9000)):
                answer(lab, p, reply)
                assert client.recv(65536) == reply  # it is connected: from the address and port that it sent to
    assert lab.ctx.flows.count == 1
    assert reactor(lab.ctx).refs == {} and not lab.ctx.drops


def test_runs_from_a_low_port(start: Start) -> None:
    lab = start()
    listener = lab.listen()
    with unprivileged(listener):
        client = lab.client(listener)
        client.send(b"?")
        lab.turn()
    (p,) = packets(lab)
    for size in (1000, 500):
        sent = [os.urandom(size) for _ in range(9)] + [os.urandom(7)]
        frames: list[int] = []
        for i, data in enumerate(sent):
            lab.ctx.pool.buf[i * 2000 : i * 2000 + len(data)] = data
            frames += (i * 2000, i * 2000 + len(data), 0)
        assert lab.udp is not None
        lab.udp.tap_handler(lab.flow.key, frames, T0, 9)
        assert [client.recv(65536) for _ in sent] == sent
    answer(lab, p, b"alone")
    assert client.recv(9) == b"alone"
    assert listener.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) != 9  # what the guest's TTL was is not for all


def test_flows_of_a_low_port_end_like_others(start: Start) -> None:
    lab = start()
    listener = lab.listen()
    with unprivileged(listener):
        clients = [lab.client(listener) for _ in range(2)]
        for client in clients:
            client.send(b"?")
        lab.turn()
        assert lab.ctx.flows.count == 2
        timers(lab.ctx).services.fire(0, T0 + 181)
        assert lab.flows == []
        clients[0].send(b"?")
        lab.turn()
        lab.stop(listener)
        assert lab.flows == []


# The guest's own flows from ports that listeners lead to -------------------------------------------------------------


def guest_key(peer: socket.socket, sport: int) -> bytes:
    """Of a flow from the guest to a socket on the host's loopback."""
    v4 = peer.family == socket.AF_INET
    ends = GUEST4 + GATEWAY4 if v4 else GUEST6 + GATEWAY6
    return ends + sport.to_bytes(2, "big") + port_of(peer).to_bytes(2, "big")


@pytest.mark.parametrize(("bound", "host"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::", "::1")])
@pytest.mark.parametrize("remapped", [False, True])
def test_the_guest_is_seen_with_the_port_that_leads_to_it(local: Start, bound: str, host: str, remapped: bool) -> None:
    lab = local(no_splice=True)
    listener = lab.listen(bound, to=TO if remapped else None)
    peers = [lab.socket(host) for _ in range(2)]
    for i, peer in enumerate(peers):
        guest_sends(lab, guest_key(peer, listener.to), b"hello %d" % i)
        data, where = peer.recvfrom(99)
        assert (data, where[:2]) == (b"hello %d" % i, (host, listener.port))
        peer.sendto(b"hello yourself", where)
        lab.turn()
        assert payloads(lab) == [b"hello yourself"]
    assert lab.ctx.flows.count == 2
    assert not listener.sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    newcomer = lab.client(listener, host)
    newcomer.send(b"?")
    lab.turn()
    assert payloads(lab) == [b"?"]
    assert not lab.ctx.drops


def test_a_port_of_all_addresses_is_preferred_to_one_of_a_single_address(local: Start) -> None:
    """A peer that writes to the port that the guest is seen with may not reach the listener of a single address."""
    lab = local(no_splice=True)
    lab.listen("127.0.0.1", to=TO, addr=addr.LOOPBACK4)
    everywhere = lab.listen("0.0.0.0", to=TO)
    lab.listen("127.0.0.2", to=TO, addr=addr.packed("127.0.0.2"))
    peer = lab.socket()
    guest_sends(lab, guest_key(peer, TO), b"hello")
    assert peer.recvfrom(9)[1][1] == everywhere.port


def test_other_ports_of_the_guest_are_kept_as_they_are(local: Start) -> None:
    lab = local(no_splice=True)
    lab.listen(to=TO)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("", 0))
        free = port_of(s)
    peer = lab.socket()
    guest_sends(lab, guest_key(peer, free), b"hello")
    assert peer.recvfrom(9)[1][1] == free


def test_who_writes_while_the_guests_socket_is_opened(start: Start, between: Any) -> None:
    """First datagrams of clients are for the listener, whichever socket received them."""
    lab = start()
    listener = lab.listen("0.0.0.0", to=TO)
    peer, client = lab.socket(), lab.client(listener)
    once = [True]

    def meanwhile(where: Any) -> None:
        if once and once.pop():
            client.send(b"first")

    between(meanwhile)
    guest_sends(lab, guest_key(peer, TO), b"hello")
    assert peer.recvfrom(9) == (b"hello", ("127.0.0.1", listener.port))
    lab.turn()
    (p,) = packets(lab)
    assert bytes(p[UDP].payload) == b"first"
    answer(lab, p, b"!")
    assert client.recv(9) == b"!"


@pytest.mark.parametrize("rule", [{"target": addr.packed("198.51.100.7")}, {"ifname": "lo"}, {"outbound": True}])
def test_rules_that_do_not_lead_to_the_guest_alone(local: Start, rule: dict[str, Any]) -> None:
    lab = local(no_splice=True)
    listener = lab.listen(to=TO, **rule)
    peer = lab.socket()
    guest_sends(lab, guest_key(peer, TO), b"hello")
    assert peer.recvfrom(9)[1][1] != listener.port
    lab.udp_in.end([listener])


def test_a_port_that_must_not_be_bound_is_not_the_guests(local: Start) -> None:
    lab = local(no_splice=True)
    listener, peer = lab.listen(to=TO), lab.socket()
    with unprivileged(listener):
        guest_sends(lab, guest_key(peer, TO), b"hello")
    assert peer.recvfrom(9)[1][1] != listener.port
    assert lab.flow.fd >= 0


def test_a_port_that_cannot_be_had_for_this(local: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = local(no_splice=True)
    listener, peer = lab.listen(to=TO), lab.socket()

    def refused(*_: Any) -> None:
        raise OSError(errno.EADDRINUSE, "")

    monkeypatch.setattr(outbound, "open_client", refused)
    guest_sends(lab, guest_key(peer, TO), b"hello")
    assert peer.recvfrom(9)[1][1] != listener.port
    assert not lab.ctx.drops


def test_the_guest_writes_to_the_port_that_leads_to_it(local: Start) -> None:
    """By way of the host: its socket must not hear itself, and the listener gets what it sends."""
    lab = local(no_splice=True)
    listener = lab.listen()
    key = GUEST4 + GATEWAY4 + listener.to.to_bytes(2, "big") + listener.port.to_bytes(2, "big")
    guest_sends(lab, key, b"myself")
    assert lab.flow.sock.getsockname() != lab.flow.sock.getpeername()
    lab.turn()
    (p,) = packets(lab)
    assert (p[IP].src, bytes(p[UDP].payload)) == (addr.text(GATEWAY4), b"myself")


def test_flows_of_the_guest_make_way_for_a_listener(local: Start) -> None:
    """With `auto`, the guest has bound a port and sent from it before we listen there."""
    lab = local(no_splice=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("", 0))
        port = port_of(s)
    peer = lab.socket()
    key = guest_key(peer, port)
    guest_sends(lab, key, b"early")
    assert peer.recvfrom(9)[1][1] == port
    with pytest.raises(OSError, match="in use"):
        lab.listen("::", port)
    assert lab.udp_in.ports_in_use({port, port + 1}) == {port} and not lab.udp_in.ports_in_use({port + 1})
    lab.udp_in.free_ports({port})
    assert lab.flows == []
    listener = lab.listen("::", port)
    guest_sends(lab, key, b"later")
    data, where = peer.recvfrom(9)
    assert (data, where[1]) == (b"later", port)
    lab.stop(listener)
    assert lab.flows == []
    lab.listen("::", port)


# Refused datagrams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "port", "why"),
    [
        ("192.0.2.9", 1, None),
        ("2001:db8::9", 65535, None),
        ("127.0.0.1", 9, None),
        ("192.0.2.9", 0, "udp: source port 0"),
        ("0.0.0.0", 9, "udp: source is not unicast"),
        ("224.0.0.1", 9, "udp: source is not unicast"),
        ("255.255.255.255", 9, "udp: source is not unicast"),
        ("::", 9, "udp: source is not unicast"),
        ("ff02::1", 9, "udp: source is not unicast"),
    ],
)
def test_sources(peer: str, port: int, why: str | None) -> None:
    assert refuse(addr.packed(peer), port) == why


def test_a_refused_source_is_counted(start: Start) -> None:
    lab = start()
    client = Client(lab.listen(), addr.packed("224.0.0.1"), 9, addr.LOOPBACK4)
    for count in (2, 4):
        lab.udp_in._dispatch(client, memoryview(b"xy"), [0, 1, 0, 1, 2, 0], T0)
        assert lab.ctx.drops == {"udp: source is not unicast": count}
    assert lab.ctx.flows.count == 0


@pytest.mark.parametrize(
    ("destination", "config", "guest"),
    [
        ("::1", {"ip6": None}, {}),
        ("127.0.0.1", {"ip4": None}, {}),
        ("::1", {}, {"addr6": addr.ANY6}),
        ("127.0.0.1", {}, {"addr4": addr.ANY4}),
    ],
)
def test_clients_whose_family_the_guest_lacks(
    start: Start, destination: str, config: dict[str, Any], guest: dict[str, bytes]
) -> None:
    lab = start(**config)
    lab.ctx.guest = replace(lab.ctx.guest, **guest)
    client = lab.client(lab.listen("::"), destination)
    for count in (2, 4):
        client.send(b"?")
        client.send(b"?")
        lab.turn()
        assert lab.ctx.drops == {"udp: no address to deliver to or from": count}
    assert lab.link.frames == []


def test_without_a_tap_only_the_loopback_is_served(start: Start) -> None:
    lab = start(tap=False, splice_only=True)
    listener = lab.listen()
    client = lab.client(listener)
    for count in (1, 2):
        client.send(b"?")
        lab.turn()
        assert lab.ctx.drops == {"udp: not from loopback": count}
    assert lab.udp_in.ports_in_use({listener.port}) == set(), "no guest has flows"
    lab.stop(listener)


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EMFILE, errno.EACCES])
def test_no_socket_for_a_client(start: Start, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    lab = start()
    client = lab.client(lab.listen())

    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outbound, "open_client", refused)
    client.send(b"?")
    client.send(b"?")
    lab.turn()
    assert lab.ctx.drops == {f"udp: no socket: {errno.errorcode[number]}": 2}
    assert lab.link.frames == [] and lab.ctx.flows.count == 0
    monkeypatch.undo()
    client.send(b"now")
    lab.turn()
    assert payloads(lab) == [b"now"]


def test_without_descriptors_the_longest_idle_flow_makes_room(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    listener = lab.listen()
    clients = [lab.client(listener) for _ in range(3)]
    for lab.now, client in zip((T0, T0 + 1), clients, strict=False):
        client.send(b"?")
        lab.turn()
    failures = [errno.EMFILE]
    real = outbound.open_client

    def scarce(*args: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "")
        return real(*args)

    monkeypatch.setattr(outbound, "open_client", scarce)
    clients[2].send(b"!")
    lab.turn()
    assert {f.sock.getpeername() for f in lab.flows} == {c.getsockname() for c in clients[1:]}


@pytest.mark.parametrize("scarce", ["flows", "descriptors"])
def test_peers_make_no_room_at_the_guests_cost(start: Start, monkeypatch: pytest.MonkeyPatch, scarce: str) -> None:
    """As long as there is a flow of theirs, though it be younger."""
    lab = start()
    assert lab.udp is not None
    listener, server = lab.listen(), lab.socket()
    real, limit = outbound.open_client, 2 if scarce == "flows" else 100

    def open_client(*args: Any) -> Any:
        if scarce == "descriptors" and len(lab.flows) >= 2:
            raise OSError(errno.EMFILE, "")
        return real(*args)

    monkeypatch.setattr(outbound, "open_client", open_client)
    lab.udp._flows.limit = limit
    guest_sends(lab, guest_key(server, 40000), b"?")
    for lab.now in (T0 + 1, T0 + 2, T0 + 3):
        client = lab.client(listener)
        client.send(b"!")
        lab.turn()
        assert {f.sock.getpeername() for f in lab.flows} == {server.getsockname(), client.getsockname()}
    assert lab.ctx.drops == {"UDP flow: closed to make room": 2}


def test_a_full_table_is_counted_and_leaves_no_socket(start: Start) -> None:
    lab = start()
    lab.ctx.flows.limit = 0
    lab.client(lab.listen()).send(b"?")
    lab.turn()
    assert lab.ctx.drops == {"udp: no flow: table full": 1}
    assert reactor(lab.ctx).refs == {}


def test_a_listener_that_cannot_be_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = start()
    listener = lab.listen()

    def fails(fd: int) -> Any:
        raise OSError(errno.ENOMEM, "")

    monkeypatch.setattr(lab.udp_in._receiver, "receive_from", fails)
    for count in (1, 2):
        lab.udp_in.sock_handler(listener, T0)
        assert lab.ctx.drops == {"udp: receive: ENOMEM": count}
    given: list[Any] = []
    monkeypatch.setattr(lab.udp_in, "_deliver_one", lambda datagram, now: given.append(datagram))
    lab.udp_in._outbound.misdelivered.append("came before")  # type: ignore[arg-type]
    lab.udp_in.sock_handler(listener, T0)
    assert given == ["came before"], "it does not wait for the listener"


def test_a_link_local_client_keeps_its_interface_and_its_class(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 4007: the address means nothing without."""
    lab = start()
    listener = lab.listen("::")
    envelope = udp_in.Envelope(addr.packed("fe80::1"), 9, addr.packed("fe80::2"), 3, 0x28)
    monkeypatch.setattr(udp_in, "Envelope", SimpleNamespace(parse=lambda raw: envelope))
    given: list[Any] = []
    monkeypatch.setattr(lab.udp_in, "_dispatch", lambda client, mv, frames, now, tos: given.append((client, tos)))
    lab.udp_in._group((b"", [0, 1, 0]), listener, T0)
    assert given == [(Client(listener, envelope.peer, 9, envelope.local, 3), 0x28)]


# Peers told apart ----------------------------------------------------------------------------------------------------


def test_two_peers_that_the_guest_sees_as_one(local: Start) -> None:
    """127.0.0.2 and 127.0.0.3 both appear as our own address. The answers go to the one heard last."""
    lab = local(no_splice=True)
    listener = lab.listen("0.0.0.0")
    a = lab.client(listener, source="127.0.0.2")
    b = lab.client(listener, source="127.0.0.3", port=port_of(a))
    for client in (a, b, a):
        client.send(b"?")
        lab.turn()
        (p,) = packets(lab)
        assert p[IP].src == addr.text(GATEWAY4)
        answer(lab, p, b"!")
        assert client.recv(9) == b"!"
        assert lab.ctx.flows.count == 1
    assert not lab.ctx.drops


def test_a_client_of_this_host_through_the_tap(local: Start) -> None:
    lab = local(no_splice=True)
    client = lab.client(lab.listen("::"), "::1")
    client.send(b"?")
    lab.turn()
    (p,) = packets(lab)
    assert (p[IPv6].src, p[IPv6].dst) == (addr.text(GATEWAY6), addr.text(addr.packed("fe80::5054:ff:fe12:3456")))
    answer(lab, p, b"!")
    assert client.recv(9) == b"!"


def test_a_peer_that_the_guest_wrote_to_comes_by_another_port(local: Start) -> None:
    """The flow that the guest began gives way: the peer knows us by the port that it writes to."""
    lab = local(no_splice=True)
    one, other = lab.listen(to=TO), lab.listen(to=TO)
    peer = lab.socket()
    key = guest_key(peer, TO)
    guest_sends(lab, key, b"hello")
    assert peer.recvfrom(9) == (b"hello", one.sock.getsockname())
    peer.sendto(b"hello yourself", other.sock.getsockname())
    lab.turn()
    assert payloads(lab) == [b"hello yourself"]
    guest_sends(lab, key, b"!")
    assert peer.recvfrom(9) == (b"!", other.sock.getsockname())
    assert lab.ctx.flows.count == 1


def test_no_gateway_to_stand_for_the_host(local: Start) -> None:
    lab = local(no_splice=True, ip4=replace(IP4, our_addr=None, map_host_loopback=None))
    lab.client(lab.listen()).send(b"?")
    lab.turn()
    assert lab.ctx.drops == {"udp: no address to deliver to or from": 1}


# Life ----------------------------------------------------------------------------------------------------------------


def test_the_port_belongs_to_the_listener(start: Start) -> None:
    lab = start()
    listener = lab.listen("0.0.0.0")
    for _ in range(3):
        for host in ("", "127.0.0.1", "127.0.0.8"):
            for options in REUSE:
                with pytest.raises(OSError, match="in use"):
                    second_bind((host, listener.port), options)
        lab.client(listener).send(b"?")
        lab.turn()


def test_a_client_whose_flow_ended_gets_a_new_one(start: Start) -> None:
    lab = start()
    client = lab.client(lab.listen())
    client.send(b"one")
    lab.turn()
    flow = lab.flow
    timers(lab.ctx).services.fire(0, T0 + 181)
    reactor(lab.ctx).end_turn(T0 + 181)
    assert lab.flows == []
    lab.now = T0 + 200
    client.send(b"two")
    lab.turn()
    assert lab.flow is not flow
    assert payloads(lab) == [b"one", b"two"]


@pytest.mark.parametrize(("first", "timeout"), [(QUERY, 30), (b"?", 180)])
@pytest.mark.parametrize("to", [53, 9953])
def test_queries_to_a_name_server_in_the_guest_end_soon(start: Start, to: int, first: bytes, timeout: float) -> None:
    lab = start()
    lab.client(lab.listen(to=to)).send(first)
    lab.turn()
    assert lab.flow.timeout == timeout


def test_listening_again_on_the_same_port(start: Start) -> None:
    """Flows of the first listener end with it, or their sockets would keep the port."""
    lab = start()
    listener, other = lab.listen(), lab.listen()
    for one in (listener, other):
        lab.client(one).send(b"?")
    lab.until(lambda: len(lab.flows) == 2)
    lab.stop(listener)
    assert lab.flow.client.listener is other
    again = lab.listen(port=listener.port)
    lab.link.take()
    lab.client(again).send(b"!")
    lab.turn()
    assert payloads(lab) == [b"!"]


def test_flows_of_the_guest_outlive_listeners(local: Start) -> None:
    lab = local()
    peer, listener = lab.socket(), lab.listen()
    guest_sends(lab, GUEST4 + GATEWAY4 + b"\x10\x00" + port_of(peer).to_bytes(2, "big"), b"?")
    lab.udp_in.end([listener])
    assert lab.flow.sock.getpeername() == peer.getsockname()


def test_loopback_goes_to_the_splice(local: Start) -> None:
    lab = local(host_lo_to_ns_lo=True)
    server = lab.socket()
    client = lab.client(lab.listen(to=port_of(server)))
    client.send(b"?")
    lab.turn()
    data, where = server.recvfrom(9)
    server.sendto(b"!", where)
    lab.turn()
    assert (data, client.recv(9), lab.link.frames) == (b"?", b"!", [])
    assert lab.ns.taken == 1


def test_the_strangers_buffer_bounds_the_receives() -> None:
    assert 2 * udp_sock.BUFFER_FIRST // 576 < udp_sock.UNCONNECTED_MAX <= 1024


def test_without_a_tap_clients_of_the_loopback_are_served(local: Start) -> None:
    lab = local(tap=False, splice_only=True)
    server = lab.socket()
    lab.client(lab.listen(to=port_of(server))).send(b"?")
    assert lab.recv(server) == b"?"
