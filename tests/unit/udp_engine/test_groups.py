"""Receivers of groups: at which ports, beside which programs, for how long; what the guest gets."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from passt import addr, log
from passt.linux import multicast
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp_engine import groups as module
from passt.udp_engine.group_sender import GroupSenders
from passt.udp_engine.groups import LEARNED_MAX, PER_EVENT, PORTS, PORTS_MAX, REFRESH, Groups
from passt.wire.udp import datagram

from ..support import CONFIG, GATEWAY4, IP4, IP6, OUR_MAC, free_ports, reactor, reconfigure, timers
from ..udp_support import Lab, second_bind

GROUP, OTHER, MDNS = addr.packed("239.77.1.3"), addr.packed("239.77.1.4"), addr.packed("224.0.0.251")
GROUP6 = addr.packed("ff02::4d:3")
LO = 1
HERE = addr.LOOPBACK4
ON_LO = replace(IP4, group_index=LO)


class GroupLab(Lab):
    """A laboratory whose template interface is the loopback."""

    @property
    def groups(self) -> Groups:
        assert self.udp is not None
        return self.udp.groups

    @property
    def senders(self) -> GroupSenders:
        assert self.udp is not None
        return self.udp.senders

    @property
    def ports(self) -> set[tuple[bytes, int]]:
        return set(self.groups._receivers)

    @property
    def group_ports(self) -> set[int]:
        """Ports that flows of the guest may share with receivers."""
        assert self.udp is not None
        return self.udp.outbound.group_ports

    def follow(self, group: bytes = GROUP, port: int = 0, sources: multicast.Sources = None) -> None:
        """The guest has joined, and is expected at a port."""
        if port:
            self.groups.learn(group, port, self.now)
        self.groups.follow(group, sources, self.now)

    def host(self, port: int = 0) -> socket.socket:
        """A sender on the host."""
        s = self.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        s.bind(("127.0.0.1", port))
        multicast.set_interface(s, False, LO)
        return s

    def end_turn(self) -> None:
        reactor(self.ctx).end_turn(self.now)

    def handle(self) -> None:
        """Handle what receivers have got."""
        for fd in list(self.groups._by_fd):
            reactor(self.ctx).fire(fd, EPOLLIN, self.now)

    def frames(self) -> list[Any]:
        self.handle()
        return [Ether(frame) for frame in self.link.take()]

    def refresh(self) -> None:
        """The moment has passed."""
        timer = self.groups._timer
        assert timers(self.ctx).services.deadlines[timer] is not None
        timers(self.ctx).services.fire(timer, self.now + REFRESH)


@contextmanager
def group_lab(**config: Any) -> Iterator[GroupLab]:
    """A laboratory, which leaves nothing open."""
    with ExitStack() as stack:
        made = GroupLab(stack, **{"ip4": ON_LO, "ip6": None} | config)
        yield made
        made.groups.leave_all()
        assert made.udp is not None
        made.udp.forget()
        made.end_turn()


@pytest.fixture
def lab() -> Iterator[GroupLab]:
    with group_lab() as made:
        yield made


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings, and by what they are limited."""
    lines: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: lines.append(f"{key} {now:.0f}: {text}"))
    return lines


def sent(to: tuple[bytes, int], sender: socket.socket, payload: bytes = b"x") -> None:
    sender.sendto(payload, (addr.text(to[0]), to[1]))


def test_to_the_guest(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    host = lab.host()
    sent((GROUP, port), host, b"hello")
    (frame,) = lab.frames()
    assert (frame.dst, frame.src) == ("01:00:5e:4d:01:03", addr.mac_text(OUR_MAC))
    assert (frame[IP].dst, frame[IP].ttl) == ("239.77.1.3", 255)
    assert frame[IP].src == addr.text(GATEWAY4), "the host's loopback, as the guest knows it"
    assert (frame[UDP].sport, frame[UDP].dport) == (host.getsockname()[1], port)
    assert bytes(frame[UDP].payload) == b"hello"
    assert frame[UDP].chksum


def test_more_than_the_mtu(lab: GroupLab) -> None:
    port = free_ports()
    lab.ctx.settings.replace(replace(lab.ctx.config, mtu=1500), lab.now)
    lab.follow(GROUP, port)
    host = lab.host()
    content = bytes(range(256)) * 20
    sent((GROUP, port), host, content)
    frames = lab.frames()
    assert len(frames) == 4 and all(len(frame) <= 1514 for frame in frames)
    whole = b"".join(bytes(frame[IP].payload) for frame in frames)
    assert whole == datagram(GATEWAY4, GROUP, host.getsockname()[1], port, content)


@pytest.mark.parametrize(("v6", "most"), [(False, 1472), (True, 1452)])
def test_frames_are_as_long_as_the_mtu_allows(lab: GroupLab, v6: bool, most: int) -> None:
    reconfigure(lab.ctx, lab.now, mtu=1500, ip6=IP6)
    group, peer = addr.packed("ff05::c" if v6 else "239.77.1.3"), addr.packed("2001:db8::7" if v6 else "192.0.2.7")
    for size, count in ((most, 1), (most + 1, 2), (most + 1, 2)):
        lab.groups._to_guest.send(OUR_MAC, group, 9, peer, 7, bytes(size))
        frames = lab.link.take()
        assert len(frames) == count and max(map(len, frames)) <= 1514
        assert {frame[12:14] for frame in frames} == {b"\x86\xdd" if v6 else b"\x08\x00"}
        if count == 1:
            assert len(frames[0]) == 1514


def test_fragments_of_two_datagrams_are_told_apart(lab: GroupLab) -> None:
    reconfigure(lab.ctx, lab.now, mtu=1500)
    idents = []
    for _ in range(3):
        lab.groups._to_guest.send(OUR_MAC, GROUP, 9, addr.packed("192.0.2.7"), 7, bytes(2000))
        idents.append({Ether(frame)[IP].id for frame in lab.link.take()})
    assert [len(found) for found in idents] == [1] * 3 and len(set.union(*idents)) == 3


def test_an_address_of_the_guest_is_no_other_host(lab: GroupLab) -> None:
    lab.ctx.guest.addr4 = addr.packed("192.0.2.44")
    lab.groups._to_guest.send(OUR_MAC, GROUP, 9, lab.ctx.guest.addr4, 7, b"x")
    (frame,) = lab.link.take()
    assert Ether(frame)[IP].src == addr.text(ON_LO.our_addr)


def test_leave_closes(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    lab.follow(OTHER, port)
    assert lab.ports == {(GROUP, port), (OTHER, port)} and lab.group_ports == {port}
    lab.groups.leave(GROUP)
    lab.end_turn()
    assert lab.ports == {(OTHER, port)} and lab.group_ports == {port}
    sent((GROUP, port), lab.host())
    assert lab.frames() == []
    lab.groups.leave(GROUP)  # nothing is left to do
    lab.groups.leave_all()
    lab.end_turn()
    assert lab.group_ports == set()
    second_bind(("0.0.0.0", port), ())


def test_groups_move_with_the_interface_of_the_host(lab: GroupLab) -> None:
    """Other changes of the configuration leave them alone."""
    port = free_ports()
    lab.follow(GROUP, port)
    before = lab.groups._receivers[GROUP, port]
    reconfigure(lab.ctx, lab.now, hostname="another")
    lab.refresh()
    assert lab.groups._receivers[GROUP, port] is before
    reconfigure(lab.ctx, lab.now, ip4=replace(ON_LO, addr_out=HERE))
    lab.refresh()
    lab.end_turn()
    after = lab.groups._receivers[GROUP, port]
    assert after is not before and after.to.source == HERE
    sent((GROUP, port), lab.host(), b"still here")
    assert [bytes(frame[UDP].payload) for frame in lab.frames()] == [b"still here"]


def test_groups_wait_for_a_family_that_the_host_has_lost(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    reconfigure(lab.ctx, lab.now, ip4=None)
    lab.refresh()
    reconfigure(lab.ctx, lab.now, ip4=replace(ON_LO, addr_out=HERE))
    lab.refresh()
    assert lab.groups._receivers[GROUP, port].to.source == HERE


def test_groups_of_ipv6_do_not_wait_for_ipv4() -> None:
    with group_lab(ip4=None, ip6=replace(IP6, group_index=LO)) as lab:
        port = free_ports()
        lab.follow(GROUP6, port)
        assert lab.ports == {(GROUP6, port)}
        receiver = lab.groups._receivers[GROUP6, port]
        assert receiver.sock.getsockname() == (addr.text(GROUP6), port, 0, LO)
        lab.groups._deliver = mock.Mock()  # type: ignore[method-assign]
        with mock.patch.object(receiver, "sock") as sock:
            sock.recvfrom.side_effect = [(b"x", ("fe80::9%lo", 7, 0, LO)), BlockingIOError]
            lab.handle()
        lab.groups._deliver.assert_called_once_with(receiver, b"x", addr.packed("fe80::9"), 7, lab.now)


def test_many_changes_are_one(lab: GroupLab, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    deadlines = timers(lab.ctx).services.deadlines
    lab.groups.refresh_soon()
    assert not deadlines[lab.groups._timer], "no group is followed"
    lab.follow(GROUP, free_ports())
    lab.groups.refresh_soon()
    clock += REFRESH / 2
    lab.groups.refresh_soon()
    assert deadlines[lab.groups._timer] == 1000.0 + REFRESH
    lab.refresh()
    lab.groups.refresh_soon()
    assert deadlines[lab.groups._timer] == clock + REFRESH


def test_known_ports(lab: GroupLab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PORTS[MDNS] == (5353,)
    port = free_ports()  # 5353 may be another program's
    monkeypatch.setitem(PORTS, MDNS, (port,))
    lab.follow(MDNS)
    assert lab.ports == {(MDNS, port)}
    assert PORTS[addr.packed("239.255.255.250")] == (1900, 3702)
    assert PORTS[addr.packed("ff02::1:3")] == (5355,)


def test_ports_that_the_guest_sends_to(lab: GroupLab) -> None:
    first = free_ports(LEARNED_MAX + 2)
    for i in range(LEARNED_MAX + 1):
        lab.groups.learn(GROUP, first + i, lab.now)
    lab.follow()
    assert lab.ports == {(GROUP, first + i) for i in range(1, LEARNED_MAX + 1)}, "the last ones"
    lab.groups.learn(GROUP, first + 1, lab.now)
    lab.groups.learn(GROUP, first, lab.now)
    assert lab.ports == {(GROUP, first + i) for i in (0, 1, 3, 4)}


def test_what_is_known_of_groups_is_bounded(lab: GroupLab) -> None:
    for i in range(1000):
        lab.groups.learn(b"\xef\2" + i.to_bytes(2, "big"), 7000, lab.now)
    assert len(lab.groups._learned) == module.GROUPS_LEARNED
    assert lab.groups.ports(b"\xef\2" + (999).to_bytes(2, "big")) == [7000]


def test_ports_that_lead_to_the_guest(lab: GroupLab) -> None:
    """A listener shares its port with the receiver, and gets what is for an address."""
    lab.follow()
    assert lab.ports == set()
    listener = lab.listen("0.0.0.0")
    lab.refresh()
    assert lab.ports == {(GROUP, listener.port)}
    multicast.only_joined(listener.sock, False)  # as `ports.sockets` does
    host = lab.host()
    sent((GROUP, listener.port), host, b"to the group")
    with pytest.raises(BlockingIOError):
        listener.sock.recv(100)
    (frame,) = lab.frames()
    assert frame[IP].dst == addr.text(GROUP)
    host.sendto(b"to the address", ("127.0.0.1", listener.port))
    assert lab.frames() == []
    assert listener.sock.recv(100) == b"to the address"
    with pytest.raises(OSError, match="in use"):
        second_bind(("0.0.0.0", listener.port), (socket.SO_REUSEPORT,))
    lab.stop(listener)
    lab.refresh()
    assert lab.ports == set()


def test_many_ports_that_lead_to_the_guest(lab: GroupLab) -> None:
    lab.follow()
    for _ in range(PORTS_MAX + 3):
        lab.listen("0.0.0.0")
    lab.refresh()
    assert len(lab.ports) == PORTS_MAX


def test_a_listener_gets_the_port_of_a_receiver(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    assert lab.udp is not None
    with pytest.raises(OSError, match="in use"):
        lab.listen("0.0.0.0", port)
    assert lab.udp.ports_in_use({port, 1}) == {port}
    lab.udp.free_ports({port})
    listener = lab.listen("0.0.0.0", port)
    assert lab.ports == set()
    lab.refresh()
    assert lab.ports == {(GROUP, port)}
    assert listener.port == port


@pytest.mark.parametrize("first", [True, False])
def test_beside_another_program(lab: GroupLab, first: bool) -> None:
    """A responder of the host has the port at all addresses, before or after: both get what goes to the group."""
    port = free_ports()
    responder = lab.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        responder.setsockopt(socket.SOL_SOCKET, option, 1)
    if first:
        responder.bind(("0.0.0.0", port))
        lab.follow(GROUP, port)
    else:
        lab.follow(GROUP, port)
        responder.bind(("0.0.0.0", port))
    multicast.join(responder, GROUP, LO)
    responder.settimeout(5)
    host = lab.host()
    sent((GROUP, port), host, b"all")
    assert responder.recv(10) == b"all"
    assert len(lab.frames()) == 1
    host.sendto(b"one", ("127.0.0.1", port))
    assert responder.recv(10) == b"one"
    assert lab.frames() == []


@pytest.mark.parametrize("option", [socket.SO_REUSEPORT, socket.SO_BROADCAST])
def test_a_port_that_is_not_shared(lab: GroupLab, warned: list[str], option: int) -> None:
    """A receiver has SO_REUSEADDR: SO_REUSEPORT of a program of the same user is not enough."""
    port = free_ports()
    with socket.socket(type=socket.SOCK_DGRAM) as another:
        another.setsockopt(socket.SOL_SOCKET, option, 1)
        another.bind(("0.0.0.0", port))
        lab.follow(GROUP, port)
        assert lab.ports == set()
        assert lab.ctx.drops == {"multicast: join: EADDRINUSE": 1}
        text = f"The guest's multicast group 239.77.1.3:{port} is not received: Address already in use"
        assert warned == [f"group {lab.now:.0f}: {text}"]
        lab.groups.learn(GROUP, port, lab.now + 1)
        lab.groups.refresh_soon()
        lab.refresh()
        assert lab.ctx.drops == {"multicast: join: EADDRINUSE": 3}
        assert warned[1:] == [f"group {lab.now + more:.0f}: {text}" for more in (1, REFRESH)]
    lab.follow(GROUP)
    assert lab.ports == {(GROUP, port)}, "tried again with the next report"


def test_sources(lab: GroupLab) -> None:
    port = free_ports()
    elsewhere = frozenset((addr.packed("192.0.2.9"),))
    lab.follow(GROUP, port, elsewhere)
    host = lab.host()
    sent((GROUP, port), host)
    assert lab.frames() == []
    lab.follow(GROUP, sources=elsewhere | {HERE})
    sent((GROUP, port), host)
    assert len(lab.frames()) == 1
    lab.follow(GROUP, sources=elsewhere)
    sent((GROUP, port), host)
    assert lab.frames() == []
    lab.follow(GROUP)
    sent((GROUP, port), host)
    assert len(lab.frames()) == 1
    lab.groups.leave(GROUP)
    lab.end_turn()
    lab.follow(GROUP, sources=elsewhere)
    lab.follow(GROUP)
    sent((GROUP, port), host)
    assert len(lab.frames()) == 1, "any source, after a list"


def test_a_list_that_cannot_be_had(lab: GroupLab, warned: list[str]) -> None:
    """The kernel takes only addresses of hosts as sources."""
    port = free_ports()
    lab.follow(GROUP, port)
    many = frozenset(addr.packed(f"192.0.2.{i}") for i in range(100))  # net.ipv4.igmp_max_msf is 10
    lab.follow(GROUP, sources=many)
    assert lab.ports == set()
    text = (
        f"group {lab.now:.0f}: The guest's multicast group 239.77.1.3:{port} is not received: No buffer space available"
    )
    assert warned == [text] * 2, "neither the list nor another receiver"
    assert lab.ctx.drops == {"multicast: join: ENOBUFS": 2}
    lab.end_turn()


def test_receivers_are_bounded(lab: GroupLab) -> None:
    lab.groups._limit = 3
    first = free_ports(5)
    for i in range(5):
        lab.follow(b"\xef\2\0" + bytes((i,)), first + i)
    assert len(lab.ports) == 3
    assert lab.ctx.drops == {"multicast: too many receivers": 2}


def test_a_burst_leaves_turns_to_others(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    host = lab.host()
    for _ in range(PER_EVENT + 1):
        sent((GROUP, port), host)
    assert len(lab.frames()) == PER_EVENT
    assert len(lab.frames()) == 1


def test_own_copies(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    host = lab.host()
    sent((GROUP, port), host, b"own")
    lab.groups.sent(GROUP, port, host.getsockname()[1], b"own", lab.now)
    assert lab.frames() == []
    sent((GROUP, port), host, b"own")
    assert len(lab.frames()) == 1, "once"
    lab.groups.sent(GROUP, port + 1, 5, b"own", lab.now)
    assert len(lab.groups.copies) == 0, "nothing comes back where nothing is received"


def test_source_port_zero_cannot_be_answered(lab: GroupLab) -> None:
    for _ in range(2):
        lab.groups._to_guest.send(OUR_MAC, GROUP, 9, HERE, 0, b"x")
        lab.groups._to_guest.send(OUR_MAC, GROUP, 9, addr.BROADCAST4, 9, b"x")
        lab.groups._to_guest.send(OUR_MAC, GROUP, 9, addr.packed("::1"), 9, b"x")
    assert lab.ctx.drops == {
        "udp: source port 0": 2, "udp: source is not unicast": 2, "udp: no address to deliver to or from": 2,
    }  # fmt: skip
    assert lab.link.take() == []


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.ENODEV, errno.ENETDOWN])
def test_a_receiver_that_was_destroyed(lab: GroupLab, number: int) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    receiver = lab.groups._receivers[GROUP, port]
    assert reactor(lab.ctx).events[receiver.fd] == EPOLLIN | EPOLLERR
    lab.stack.enter_context(receiver.sock)
    with mock.patch.object(receiver, "sock") as sock:
        sock.recvfrom.side_effect = OSError(errno.ENOMEM, "no memory")
        for _ in range(2):
            lab.handle()
        assert lab.ports == {(GROUP, port)}, "another error passes"
        sock.recvfrom.side_effect = OSError(number, "destroyed")
        lab.handle()
    assert lab.ports == set()
    assert lab.ctx.drops == {"udp: receive: ENOMEM": 2, f"udp: receive: {errno.errorcode[number]}": 1}
    lab.end_turn()
    lab.refresh()
    assert lab.ports == {(GROUP, port)}


def test_a_fault_ends_one_receiver(lab: GroupLab) -> None:
    port = free_ports()
    lab.follow(GROUP, port)
    lab.follow(OTHER, port)
    fd = lab.groups._receivers[GROUP, port].fd
    lab.groups.fault(reactor(lab.ctx).refs[fd])
    lab.end_turn()
    assert lab.ports == {(OTHER, port)}
    lab.groups.fault(1 << 32)  # of none
    lab.follow(GROUP)
    assert lab.ports == {(GROUP, port), (OTHER, port)}


def test_gauges(lab: GroupLab) -> None:
    lab.follow(GROUP, free_ports())
    lab.follow(OTHER)
    assert lab.ctx.stats.gauge("groups") == 2


# Sockets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("239.77.1.3", ("239.77.1.3", 9)),
        ("ff01::1", ("ff01::1", 9, 0, 7)),
        ("ff02::fb", ("ff02::fb", 9, 0, 7)),
        ("ff12::1", ("ff12::1", 9, 0, 7)),  # transient
        ("ff03::1", ("ff03::1", 9, 0, 0)),
        ("ff05::c", ("ff05::c", 9, 0, 0)),
        ("ff0e::c", ("ff0e::c", 9, 0, 0)),
    ],
)
def test_groups_of_link_scope_are_those_of_an_interface(group: str, expected: tuple[Any, ...]) -> None:
    assert module.sockaddr(addr.packed(group), 9, 7) == expected


def test_each_family_has_its_way() -> None:
    ip4 = replace(IP4, group_index=3, if_out="four", addr_out=HERE)
    ip6 = replace(IP6, group_index=4, if_out="six", addr_out=addr.LOOPBACK6)
    config = replace(CONFIG, ip4=ip4, ip6=ip6)
    assert module.way(config, GROUP) == (3, "four", HERE)
    assert module.way(config, GROUP6) == (4, "six", addr.LOOPBACK6)


@pytest.mark.parametrize("group", [GROUP, GROUP6], ids=addr.text)
@pytest.mark.parametrize("interface", [None, "lo"])
def test_sockets_of_groups(group: bytes, interface: str | None) -> None:
    with module.new_socket(group, module.Way(LO, interface, None)) as sock:
        assert not os.get_blocking(sock.fileno()) and not os.get_inheritable(sock.fileno())
        assert sock.getsockopt(*multicast.MULTICAST_ALL[len(group) == 16]) == 0
        bound_to = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
        assert bound_to == (interface or "").encode()
        if group is GROUP6:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
