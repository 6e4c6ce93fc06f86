"""Datagrams of the guest to groups: from which port, to which members, and which answers come back."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from passt import addr, log
from passt.flow.source import REASON
from passt.flow.table import FREE, TableFull
from passt.linux import multicast
from passt.linux.sockopt import default_hops, hops_option
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp_engine.flow import FLOW_TIMEOUT
from passt.udp_engine.group_sender import GroupFlow
from passt.udp_engine.groups import PER_EVENT

from ..support import (
    GATEWAY4,
    GUEST4,
    GUEST6,
    GUEST_MAC,
    IP6,
    elapse,
    free_ports,
    no_descriptors,
    pool_put,
    reactor,
    reconfigure,
)
from .test_groups import GROUP, GROUP6, HERE, LO, ON_LO, OTHER, GroupLab, group_lab


def send_to_group(
    lab: GroupLab, sport: int, dport: int, *payloads: bytes, group: bytes = GROUP, fields: int = 1
) -> GroupFlow | None:
    """The guest sends to a group, from a free port of the host unless it is given; returns the flow, if any."""
    key = GUEST4 + group + (sport or free_ports()).to_bytes(2, "big") + dport.to_bytes(2, "big")
    frames: list[int] = []
    at = 64
    for payload in payloads or (b"x",):
        frames += (*pool_put(lab.ctx, payload, at), 0)
        at += len(payload)
    assert lab.udp is not None
    lab.udp.tap_handler(key, frames, lab.now, fields)
    return lab.senders._flows.by_key.get(key)


@pytest.fixture
def lab() -> Iterator[GroupLab]:
    with group_lab() as made:
        yield made


@pytest.fixture
def member(lab: GroupLab) -> Iterator[socket.socket]:
    """A program on the host that has joined, at a port that others may share."""
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            s.setsockopt(socket.SOL_SOCKET, option, 1)
        s.bind(("0.0.0.0", free_ports()))
        multicast.join(s, GROUP, LO)
        s.settimeout(5)
        yield s


def port_of(s: socket.socket) -> int:
    port: int = s.getsockname()[1]
    return port


def flow_of(lab: GroupLab, *args: Any, **more: Any) -> GroupFlow:
    flow = send_to_group(lab, *args, **more)
    assert flow is not None
    return flow


def fire(lab: GroupLab, flow: GroupFlow, events: int = EPOLLIN) -> None:
    reactor(lab.ctx).fire(flow.fd, events, lab.now)


def test_from_the_port_of_the_guest(lab: GroupLab, member: socket.socket) -> None:
    flow = flow_of(lab, 0, port_of(member), b"one", b"two", b"")
    received = [member.recvfrom(10) for _ in range(3)]
    assert [data for data, _ in received] == [b"one", b"two", b""]
    assert {sender[1] for _, sender in received} == {flow.sport} == {flow.port}
    assert (flow.to_host, str(flow.endpoints())) == (6, f"192.0.2.2:{flow.sport} -> 239.77.1.3:{port_of(member)}")


def test_the_next_datagram_takes_the_interface_that_the_host_has_now(lab: GroupLab, member: socket.socket) -> None:
    sport = free_ports()
    before = flow_of(lab, sport, port_of(member), b"one")
    reconfigure(lab.ctx, lab.now, ip4=replace(ON_LO, addr_out=HERE))
    after = flow_of(lab, sport, port_of(member), b"two")
    assert after is not before and after.sock.getsockname() == ("127.0.0.1", after.port)
    assert [member.recv(10) for _ in range(2)] == [b"one", b"two"]
    assert flow_of(lab, sport, port_of(member), b"three") is after
    assert lab.ctx.flows.closed["udp", REASON] == 1


def test_the_source_address_is_that_of_outbound(lab: GroupLab, member: socket.socket) -> None:
    """Also from the group's own port, where the socket is bound to the group."""
    reconfigure(lab.ctx, lab.now, ip4=replace(ON_LO, addr_out=addr.packed("127.0.0.9")))
    for sport in (0, port_of(member)):
        flow_of(lab, sport, port_of(member), b"query")
        assert member.recvfrom(10)[1][0] == "127.0.0.9"


def test_groups_of_ipv6() -> None:
    with group_lab(ip4=None, ip6=replace(IP6, group_index=LO)) as lab:
        port = free_ports()
        for sport in (port, port + 1):
            key = GUEST6 + GROUP6 + sport.to_bytes(2, "big") + port.to_bytes(2, "big")
            assert lab.udp is not None
            lab.udp.tap_handler(key, [*pool_put(lab.ctx, b"query"), 0], lab.now, 1)
            flow = lab.senders._flows.by_key[key]
            here = addr.text(GROUP6) if sport == port else "::"
            assert flow.sock.getsockname() == (here, sport, 0, LO if sport == port else 0)
            assert flow.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF) == LO
            assert flow.to == (addr.text(GROUP6), port, 0, LO)
        lab.senders._to_guest = mock.Mock()
        lab.stack.enter_context(flow.sock)
        with mock.patch.object(flow, "sock", mock.Mock(wraps=flow.sock)) as sock:
            sock.recvfrom.side_effect = [(b"answer", ("fe80::9%lo", 7, 0, LO)), BlockingIOError]
            fire(lab, flow)
        lab.senders._to_guest.send.assert_called_once_with(
            lab.ctx.guest.mac, GUEST6, port + 1, addr.packed("fe80::9"), 7, b"answer"
        )


def test_answers_by_unicast_from_any_host(lab: GroupLab, member: socket.socket) -> None:
    """SSDP: each device answers from its own address and port."""
    flow = flow_of(lab, 0, port_of(member), b"M-SEARCH")
    member.recv(10)
    ports = []
    for i in range(2):
        with socket.socket(type=socket.SOCK_DGRAM) as device:
            device.bind(("127.0.0.1", 0))
            device.sendto(b"answer %d" % i, ("127.0.0.1", flow.port))
            ports.append(port_of(device))
    fire(lab, flow)
    frames = [Ether(frame) for frame in lab.link.take()]
    assert [(f[UDP].sport, f[UDP].dport, bytes(f[UDP].payload)) for f in frames] == [
        (ports[0], flow.sport, b"answer 0"),
        (ports[1], flow.sport, b"answer 1"),
    ]
    assert {f.dst for f in frames} == {addr.mac_text(GUEST_MAC)}
    assert {(f[IP].src, f[IP].dst) for f in frames} == {(addr.text(GATEWAY4), addr.text(GUEST4))}
    assert flow.to_guest == 16


def test_a_burst_of_answers_leaves_turns_to_others(lab: GroupLab) -> None:
    flow = flow_of(lab, 0, 7)
    with socket.socket(type=socket.SOCK_DGRAM) as device:
        for _ in range(PER_EVENT + 2):
            device.sendto(b"answer", ("127.0.0.1", flow.port))
    fire(lab, flow)
    assert len(lab.link.take()) == PER_EVENT
    for _ in range(2):
        fire(lab, flow, EPOLLERR)
        assert len(lab.link.take()) == 1, "an error is one of the socket, which one call takes"


def test_answers_go_to_the_machine_that_asked(lab: GroupLab) -> None:
    """Several machines share the link."""
    another = bytes.fromhex("020000000099")
    lab.ctx.guest.macs[GUEST4] = another
    flow = flow_of(lab, 0, 7)
    with socket.socket(type=socket.SOCK_DGRAM) as device:
        device.sendto(b"answer", ("127.0.0.1", flow.port))
    fire(lab, flow)
    assert [Ether(frame).dst for frame in lab.link.take()] == [addr.mac_text(another)]


def test_from_the_port_of_the_group(lab: GroupLab, member: socket.socket) -> None:
    """mDNS: the source port says that it is a responder; the host's own one keeps its unicast datagrams."""
    port = port_of(member)
    flow = flow_of(lab, port, port, b"query")
    assert member.recvfrom(10)[1][1] == port == flow.port
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.sendto(b"to the responder", ("127.0.0.1", port))
    assert member.recv(100) == b"to the responder"
    assert flow.sock.getsockname()[0] == addr.text(GROUP)


def test_another_program_may_have_the_port_afterwards(lab: GroupLab) -> None:
    port = free_ports()
    flow_of(lab, port, port)
    with socket.socket(type=socket.SOCK_DGRAM) as responder:
        responder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        responder.bind(("0.0.0.0", port))


@pytest.mark.parametrize("same", [True, False])
def test_a_port_that_is_not_shared(lab: GroupLab, member: socket.socket, same: bool) -> None:
    """Another one is better than none."""
    dport = port_of(member)
    if same:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # it shares with its user's sockets alone
        flow = flow_of(lab, dport, dport)
        assert flow.port != dport and flow.port > 1023, "one that any program may get"
        return
    with socket.socket(type=socket.SOCK_DGRAM) as another:
        another.bind(("0.0.0.0", 0))
        flow = flow_of(lab, port_of(another), dport)
        assert flow.port not in (0, port_of(another))
        assert member.recvfrom(10)[1][1] == flow.port


def test_two_groups_from_one_port(lab: GroupLab) -> None:
    """Answers reach the guest's port by any of the two sockets."""
    first, second = flow_of(lab, 0, 1900), None
    second = flow_of(lab, first.sport, 1900, group=OTHER)
    assert first.port == second.port == first.sport
    with socket.socket(type=socket.SOCK_DGRAM) as device:
        device.sendto(b"answer", ("127.0.0.1", first.port))
    fire(lab, first)
    fire(lab, second)
    (frame,) = lab.link.take()
    assert Ether(frame)[UDP].dport == first.sport


def test_from_a_port_that_leads_to_the_guest(lab: GroupLab, member: socket.socket) -> None:
    listener = lab.listen("0.0.0.0", to=7777)
    flow = flow_of(lab, 7777, port_of(member), b"query")
    assert member.recvfrom(10)[1][1] == listener.port == flow.port
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.sendto(b"answer", ("127.0.0.1", listener.port))
    assert listener.sock.recv(10) == b"answer"


def test_own_copies_stay_outside(lab: GroupLab, member: socket.socket) -> None:
    """The host's program gets a copy, the guest does not."""
    port = port_of(member)
    lab.follow(GROUP, port)
    for sport in (port, 0):
        flow_of(lab, sport, port, b"query")
        assert member.recv(10) == b"query"
        assert lab.frames() == []
    member.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
    member.sendto(b"query", (addr.text(GROUP), port))
    assert len(lab.frames()) == 1, "that of the host's responder"


def test_ports_that_were_sent_to_are_listened_at(lab: GroupLab) -> None:
    lab.follow()
    port = free_ports()
    flow_of(lab, 0, port)
    assert lab.ports == {(GROUP, port)}


def test_a_port_of_the_group_that_another_program_has(lab: GroupLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's datagrams leave all the same; that those to the group do not reach it is told."""
    told: list[float] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: told.append(now))
    lab.follow()
    with socket.socket(type=socket.SOCK_DGRAM) as another:
        another.bind(("0.0.0.0", free_ports()))
        assert flow_of(lab, 0, port_of(another)).to_host == 1
    assert (lab.ports, told) == (set(), [lab.now])


def test_fields_of_the_header(lab: GroupLab) -> None:
    flow = flow_of(lab, 0, 7, fields=4 | 0xB800)
    assert flow.sock.getsockopt(*hops_option(GROUP)) == 4
    assert flow.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0xB8
    assert flow.sock.getsockopt(socket.IPPROTO_IP, 10) == 0, "IP_MTU_DISCOVER: it may be fragmented"
    flow_of(lab, flow.sport, 7, fields=255)
    assert flow.sock.getsockopt(*hops_option(GROUP)) == 255
    assert flow.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == default_hops()[4]


def test_off(lab: GroupLab) -> None:
    lab.ctx.settings.replace(replace(lab.ctx.config, no_multicast=True), lab.now)
    for _ in range(2):
        assert send_to_group(lab, 0, 7, b"a", b"b") is None
    assert lab.ctx.drops == {"multicast: disabled": 4}


def test_idle_flows_end(lab: GroupLab) -> None:
    flow = flow_of(lab, 0, 7)
    elapse(lab.ctx, lab.now, FLOW_TIMEOUT + 10)
    assert flow.state == FREE
    assert lab.ctx.flows.closed["udp", "idle"] == 1


def test_answers_keep_a_flow(lab: GroupLab) -> None:
    flow = flow_of(lab, 0, 7)
    lab.now = elapse(lab.ctx, lab.now, FLOW_TIMEOUT - 10)
    with socket.socket(type=socket.SOCK_DGRAM) as device:
        device.sendto(b"answer", ("127.0.0.1", flow.port))
    fire(lab, flow)
    assert flow.last == lab.now
    lab.now = elapse(lab.ctx, lab.now, FLOW_TIMEOUT - 10)
    assert flow.state != FREE


def test_the_guest_goes(lab: GroupLab) -> None:
    flow = flow_of(lab, 0, 7)
    assert lab.udp is not None
    lab.udp.forget()
    assert flow.state == FREE
    assert lab.ctx.flows.closed["udp", "guest gone"] == 1


def test_listeners_get_the_port(lab: GroupLab) -> None:
    flow = flow_of(lab, 0, 7)
    assert lab.udp is not None
    assert lab.udp.ports_in_use({flow.port, 1}) == {flow.port}
    lab.udp.free_ports({flow.port})
    assert flow.state == FREE
    assert lab.ctx.flows.closed["udp", "made way for a listener"] == 1
    lab.listen("0.0.0.0", flow.port)


def test_no_descriptor(lab: GroupLab) -> None:
    with no_descriptors():
        for _ in range(2):
            assert send_to_group(lab, 7001, 7, b"a", b"b") is None
    assert lab.ctx.drops == {"udp: no socket: EMFILE": 4}


@pytest.mark.parametrize(
    ("fails", "counted"),
    [(TableFull("staged"), "udp: no flow: table full"), (OSError(errno.ENOSPC, "staged"), "udp: no flow: ENOSPC")],
)
def test_no_place(lab: GroupLab, fails: Exception, counted: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with mock.patch.object(lab.senders._flows, "add", side_effect=fails):
        for _ in range(2):
            assert send_to_group(lab, 0, 7, b"a", b"b") is None
    assert lab.ctx.drops == {counted: 4}
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.ENOBUFS, errno.ECONNABORTED])
def test_errors_of_sends(lab: GroupLab, number: int) -> None:
    for _ in range(2):
        flow = flow_of(lab, 0, 7)
        lab.stack.enter_context(flow.sock)
        with mock.patch.object(flow, "sock", mock.Mock(wraps=flow.sock)) as sock:
            sock.sendto.side_effect = OSError(number, "staged")
            send_to_group(lab, flow.sport, 7, b"a", b"b")
        assert (flow.state == FREE) == (number == errno.ECONNABORTED)
    assert lab.ctx.drops == {f"udp: send: {errno.errorcode[number]}": 4}
    assert lab.ctx.flows.closed["udp", "socket destroyed"] == (2 if number == errno.ECONNABORTED else 0)
    assert lab.link.take() == [], "no ICMP error is about a group"


@pytest.mark.parametrize("number", [errno.ENETDOWN, errno.ECONNABORTED])
def test_errors_of_receives(lab: GroupLab, number: int) -> None:
    for _ in range(2):
        flow = flow_of(lab, 0, 7)
        lab.stack.enter_context(flow.sock)
        with mock.patch.object(flow, "sock", mock.Mock(wraps=flow.sock)) as sock:
            sock.recvfrom.side_effect = OSError(number, "staged")
            fire(lab, flow)
        assert (flow.state == FREE) == (number == errno.ECONNABORTED)
    assert lab.ctx.drops == {f"udp: receive: {errno.errorcode[number]}": 2}
    assert lab.ctx.flows.closed["udp", "socket destroyed"] == (2 if number == errno.ECONNABORTED else 0)


def test_faults_end_one_flow(lab: GroupLab) -> None:
    first, second = flow_of(lab, 0, 7), flow_of(lab, 0, 8)
    lab.senders.fault(reactor(lab.ctx).refs[first.fd])
    assert lab.udp is not None
    assert (first.state == FREE, second.state == FREE) == (True, False)
    lab.udp.fault_key(second.key)
    lab.udp.fault_key(second.key)
    assert second.state == FREE
    assert lab.ctx.flows.closed["udp", "fault"] == 2


def test_flows_are_bounded(lab: GroupLab) -> None:
    lab.senders._flows.limit = 16
    for i in range(40):
        lab.now += 1
        send_to_group(lab, 0, 7000 + i)
    assert len(lab.senders._flows.by_key) <= 16
    assert lab.ctx.drops["UDP flow: closed to make room"] >= 24
