"""Listening sockets in the loop: who gets a connection, how many at a time, what happens without descriptors."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import pytest

from passt import addr, log
from passt.flow import spare
from passt.flow.context import Context
from passt.flow.spare import REST
from passt.linux import netns
from passt.linux.netns import Namespace
from passt.loop.reactor import EPOLLIN, TYPE_LISTEN, make_ref
from passt.policy.rules import Listener, Rule
from passt.ports import listen
from passt.ports.listen import BUDGET_MAX, STREAK, Listeners
from passt.ports.sockets import open_ports
from passt.tcp_engine.sock import reset
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

from ..support import T0, free_ports, make_context, reactor, timers
from .test_sockets import rule

PEER = addr.packed("198.51.100.9")


class Taker:
    """A service that takes connections, or datagrams."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, ...]] = []
        self.ports: list[tuple[int, str]] = []  # that UDP is told of
        self.looks = 0  # at all flows, which may be many

    def accepted(self, listener: Listener, sock: Any, *who: Any) -> None:
        self.got.append((listener.port, *who))
        assert type(sock) is socket.SocketType and sock.getsockname()[1] == listener.port
        assert not sock.getblocking() and not os.get_blocking(sock.fileno())
        sock.close()

    def sock_handler(self, listener: Listener, now: float) -> None:
        self.got.append((listener.port, now))

    def free_ports(self, ports: Collection[int]) -> None:
        self.looks += 1
        self.ports += [(port, "make way") for port in sorted(ports)]

    def begin(self, listener: Listener) -> None:
        self.ports.append((listener.port, "begin"))

    def end(self, listeners: Collection[Listener]) -> None:
        self.looks += bool(listeners)
        self.ports += [(listener.port, "end") for listener in listeners]


class Rig:
    """Listeners around services that note what they get."""

    def __init__(self, ctx: Context, *rules: Rule, tap: bool = True) -> None:
        self.ctx = ctx
        self.tcp, self.splice, self.udp_in = Taker(), Taker(), Taker()
        self.opened: list[Listener] = []
        assert open_ports(ctx.config, [(r, p) for r in rules for p in r.ports], self.opened) == []
        self.listeners = Listeners(
            ctx,
            tcp=self.tcp if tap else None,  # type: ignore[arg-type]
            tcp_splice=self.splice,  # type: ignore[arg-type]
            udp_in=self.udp_in,  # type: ignore[arg-type]
            namespace=Namespace(7),
            opened=self.opened,
        )
        self.clients: list[socket.socket] = []

    def connect(self, port: int, host: str = "127.0.0.1") -> tuple[str, int]:
        """A client of ours; its address."""
        self.clients.append(socket.create_connection((host, port)))
        address: tuple[str, int] = self.clients[-1].getsockname()[:2]
        return address

    def fire(self, listener: Listener | None = None, now: float = T0) -> None:
        reactor(self.ctx).fire((listener or self.opened[0]).fd, EPOLLIN, now)

    def was_reset(self) -> bool:
        """Whether the last client was reset."""
        with pytest.raises(ConnectionResetError):
            self.clients[-1].recv(1)
        return True

    def close(self) -> None:
        self.listeners.close()
        for s in self.clients:
            s.close()
        reactor(self.ctx).end_turn(T0)


Make = Callable[..., Rig]


@pytest.fixture
def make() -> Iterator[Make]:
    rigs: list[Rig] = []

    def made(*rules: Rule, tap: bool = True, ctx: Context | None = None, **more: Any) -> Rig:
        rigs.append(Rig(ctx or make_context(**more), *rules, tap=tap))
        return rigs[-1]

    yield made
    for rig in rigs:
        rig.close()


@pytest.fixture
def port() -> int:
    return free_ports()


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client comes from another host."""
    real = listen.accept
    monkeypatch.setattr(listen, "accept", lambda fd: (real(fd)[0], PEER, 40000))


# Destinations of connections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_loopback_is_spliced(make: Make, port: int, host: str) -> None:
    rig = make(rule(port))
    _, client_port = rig.connect(port, host)
    rig.fire()
    assert (rig.splice.got, rig.tcp.got) == ([(port, addr.packed(host), client_port, T0)], [])


def test_loopback_goes_through_the_tap_if_asked(make: Make, port: int) -> None:
    rig = make(rule(port), no_splice=True)
    _, client_port = rig.connect(port)
    rig.fire()
    assert (rig.tcp.got, rig.splice.got) == ([(port, addr.LOOPBACK4, client_port, T0)], [])


@pytest.mark.usefixtures("remote")
def test_other_hosts_go_through_the_tap(make: Make, port: int) -> None:
    rig = make(rule(port))
    rig.connect(port)
    rig.fire()
    assert (rig.tcp.got, rig.splice.got) == ([(port, PEER, 40000, T0)], [])


@pytest.mark.usefixtures("remote")
def test_other_hosts_are_reset_without_a_tap(make: Make, port: int) -> None:
    rig = make(rule(port), tap=False, splice_only=True)
    rig.connect(port)
    rig.fire()
    assert rig.was_reset()
    assert rig.ctx.drops == {"listen: not from loopback": 1}


def test_outbound_is_always_spliced(make: Make, port: int) -> None:
    rig = make(rule(port, outbound=True), no_splice=True)
    expected = []
    for listener, host in zip(rig.opened, ("127.0.0.1", "::1"), strict=True):
        _, client_port = rig.connect(port, host)
        rig.fire(listener)
        expected.append((port, addr.packed(host), client_port, T0))
    assert rig.splice.got == expected


def test_datagrams_are_announced(make: Make, port: int) -> None:
    rig = make(rule(port, proto=PROTO_UDP))
    rig.fire()
    assert rig.udp_in.got == [(port, T0)]


# How many ------------------------------------------------------------------------------------------------------------


def test_one_client_at_a_time_costs_one_accept(make: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = listen.accept

    def counted(fd: int) -> tuple[int, bytes, int]:
        calls.append(fd)
        return real(fd)

    monkeypatch.setattr(listen, "accept", counted)
    rig = make(rule(port))
    for _ in range(STREAK - 1):
        rig.connect(port)
        rig.fire()
    assert len(calls) == len(rig.splice.got) == STREAK - 1


def test_crowd_is_let_in_by_and_by(make: Make, port: int) -> None:
    rig = make(rule(port))
    crowd = 2 * STREAK * BUDGET_MAX
    for _ in range(crowd):
        rig.connect(port)
    sizes: list[int] = []
    while sum(sizes) < crowd:
        rig.fire()
        sizes.append(len(rig.splice.got) - sum(sizes))
    assert max(sizes) == BUDGET_MAX and sizes == sorted(sizes[:-1]) + sizes[-1:]
    rig.fire()  # the backlog is empty
    rig.fire()
    assert len(rig.splice.got) == crowd


def test_client_that_has_gone_is_skipped(make: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [OSError(errno.ECONNABORTED, "aborted"), OSError(errno.EPERM, "firewall"), listen.accept]

    def accept(fd: int) -> tuple[int, bytes, int]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        result: tuple[int, bytes, int] = answer(fd)
        return result

    rig = make(rule(port))
    monkeypatch.setattr(listen, "accept", accept)
    rig.connect(port)
    for _ in range(3):
        rig.fire()
    assert len(rig.splice.got) == 1
    assert timers(rig.ctx).services.deadlines == [None]


# Without descriptors -------------------------------------------------------------------------------------------------


class Descriptors:
    """A number of descriptors that is left: accept(2) and timerfd_create(2) take one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = 100
        self.error = number
        accept, timerfd_create, close = listen.accept, spare.timerfd_create, os.close

        def take(function: Callable[..., Any], *arguments: int) -> Any:
            if not self.left:
                raise OSError(self.error, os.strerror(self.error))
            self.left -= 1
            return function(*arguments)

        def give(fd: int) -> None:
            self.left += 1
            close(fd)

        for module in listen, spare:
            monkeypatch.setattr(module, "accept", lambda fd: take(accept, fd))
        monkeypatch.setattr(spare, "timerfd_create", lambda: take(timerfd_create))
        monkeypatch.setattr(os, "close", give)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_write", lambda level, text: said.append(text))
    return said


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_clients_are_refused_with_the_spare_descriptor(
    make: Make, port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str], number: int
) -> None:
    limit = Descriptors(monkeypatch, number)
    rig = make(rule(port))
    limit.left = 0
    for _ in range(3):
        rig.connect(port)
        # The connection is closed through its socket object, which gives its descriptor back
        monkeypatch.setattr(listen, "reset", lambda sock: (reset(sock), setattr(limit, "left", 1)))
        rig.fire()
        assert rig.was_reset()
        limit.left = 0
    assert rig.ctx.drops == {"listen: no descriptor": 3}
    assert warnings == [f"Refusing connections to port {port}: {os.strerror(number)}"]
    assert rig.tcp.got == rig.splice.got == []
    limit.left = 100
    rig.connect(port)
    rig.fire()
    assert len(rig.splice.got) == 1


@pytest.mark.usefixtures("warnings")
def test_listener_rests_when_even_that_fails(make: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stolen(fd: int) -> None:
        limit.left = 0

    limit = Descriptors(monkeypatch, errno.EMFILE)
    rig = make(rule(port))
    close = os.close
    limit.left = 0
    rig.connect(port)
    reserve = rig.listeners._spare._fd
    monkeypatch.setattr(os, "close", stolen)
    rig.fire()
    monkeypatch.setattr(os, "close", close)
    os.close(reserve)
    services = timers(rig.ctx).services
    fd = rig.opened[0].fd
    assert (reactor(rig.ctx).events[fd], services.deadlines) == (0, [T0 + REST])
    services.fire(0)
    assert reactor(rig.ctx).events[fd] == EPOLLIN
    limit.left = 100
    rig.fire()
    assert len(rig.splice.got) == 1 and rig.ctx.drops == {}


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
def test_listener_rests_without_memory(make: Make, port: int, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    rig = make(rule(port))
    monkeypatch.setattr(listen, "accept", fail)
    rig.fire()
    rig.fire()
    assert reactor(rig.ctx).events[rig.opened[0].fd] == 0
    assert timers(rig.ctx).services.deadlines == [T0 + REST]


def test_a_listener_that_closes_while_it_rests(make: Make, port: int) -> None:
    """Its descriptor may have another owner by then."""
    rig = make(rule(port))
    listener = rig.opened[0]
    rig.listeners.fault(make_ref(TYPE_LISTEN, listener.fd, listener.index))
    rig.listeners.remove(listener.rule, port)
    timers(rig.ctx).services.fire(0)
    assert listener.fd not in reactor(rig.ctx).events


def test_defects_are_not_passed_over(make: Make, port: int) -> None:
    rig = make(rule(port))
    rig.opened[0].sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.fire()


# Faults --------------------------------------------------------------------------------------------------------------


def test_fault_costs_a_moment(make: Make, port: int) -> None:
    rig = make(rule(port), rule(port, proto=PROTO_UDP))
    tcp, udp = rig.opened
    services = timers(rig.ctx).services
    for listener in (tcp, udp):
        rig.listeners.fault(make_ref(TYPE_LISTEN, listener.fd, listener.index))
    first = services.deadlines[0]
    assert [reactor(rig.ctx).events[x.fd] for x in (tcp, udp)] == [0, 0]
    rig.listeners.remove(tcp.rule, port)
    rig.listeners.fault(make_ref(TYPE_LISTEN, tcp.fd, tcp.index))  # of an event that came before
    assert services.deadlines == [first]
    services.fire(0)
    assert reactor(rig.ctx).events == {udp.fd: EPOLLIN}


# Ports that come and go ----------------------------------------------------------------------------------------------


def test_add_and_remove(make: Make) -> None:
    first = free_ports(3)
    wanted = rule(first, first + 2)
    rig = make()
    rig.listeners.add(wanted, first)
    rig.listeners.add(wanted, first + 2)
    assert rig.listeners.ports(wanted) == {first, first + 2}
    assert rig.listeners.has(PROTO_TCP, False, first)
    assert not rig.listeners.has(PROTO_UDP, False, first) and not rig.listeners.has(PROTO_TCP, True, first)
    rig.connect(first)
    rig.listeners.remove(wanted, first)
    assert (rig.listeners.ports(wanted), rig.listeners.has(PROTO_TCP, False, first)) == ({first + 2}, False)
    reactor(rig.ctx).end_turn(T0)
    assert rig.was_reset()  # it had not been accepted
    rig.listeners.add(wanted, first)
    assert sorted(ref & 0xFFFFFFFF for ref in reactor(rig.ctx).refs.values()) == [0, 1]  # places are used again


def test_udp_is_told_of_its_ports(make: Make, port: int) -> None:
    """Its flows share them, or must give way."""
    rig = make(rule(port), rule(port, proto=PROTO_UDP))
    tcp, udp = rig.opened
    assert rig.udp_in.ports == [(port, "begin")]
    for listener in (tcp, udp):
        rig.listeners.remove(listener.rule, port)
    assert rig.udp_in.ports == [(port, "begin"), (port, "end")]
    reactor(rig.ctx).end_turn(T0)
    rig.udp_in.ports.clear()
    rig.listeners.add(tcp.rule, port)
    rig.listeners.add(udp.rule, port)
    assert rig.udp_in.ports == [(port, "make way"), (port, "begin")]


def test_add_that_fails_changes_nothing(make: Make, port: int) -> None:
    rig = make()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="Address already in use") as e:
        rig.listeners.add(rule(port), port)
    assert e.value.errno == errno.EADDRINUSE
    assert (rig.listeners.ports(rule(port)), reactor(rig.ctx).refs) == (set(), {})
    rig.listeners.add(rule(port), port)


def test_connections_outlive_their_listener(make: Make, port: int) -> None:
    rig = make(rule(port))
    kept: list[Any] = []
    rig.splice.accepted = lambda listener, sock, *who: kept.append(sock)  # type: ignore[method-assign]
    rig.connect(port)
    rig.fire()
    rig.listeners.remove(rule(port), port)
    reactor(rig.ctx).end_turn(T0)
    rig.clients[0].send(b"still there")
    assert kept[0].recv(100) == b"still there"
    kept[0].close()


def test_outbound_ports_are_opened_by_one_thread_inside(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[tuple[int, int]] = []
    monkeypatch.setattr(netns, "setns", lambda fd, kind: entered.append((fd, threading.get_ident())))
    first = free_ports(2)
    wanted = rule(first, first + 1, outbound=True)
    rig = make()
    with socket.create_server(("::1", first), family=socket.AF_INET6):
        failed = rig.listeners.add_all([(wanted, first), (wanted, first + 1)])
    assert [(f.port, f.errno) for f in failed] == [(first, errno.EADDRINUSE)]
    assert rig.listeners.ports(wanted) == {first + 1}
    assert len(reactor(rig.ctx).refs) == 2
    assert [fd for fd, _ in entered] == [7] and entered[0][1] != threading.get_ident()


def test_namespace_that_may_not_be_entered(make: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, kind: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(netns, "setns", refuse)
    (failure,) = make().listeners.add_all([(rule(port, outbound=True), port)])
    assert failure.errno == errno.EPERM


def test_two_rules_may_have_a_port_at_different_addresses(make: Make, port: int) -> None:
    a, b = (rule(port, addr=addr.packed(host)) for host in ("127.0.0.1", "127.0.0.2"))
    rig = make(a, replace(b, to=port + 1))
    rig.listeners.remove(a, port)
    assert rig.listeners.has(PROTO_TCP, False, port)
    rig.listeners.remove(replace(b, to=port + 1), port)
    assert not rig.listeners.has(PROTO_TCP, False, port)


# Rules that change ----------------------------------------------------------------------------------------------------


def test_another_rule_takes_a_port_over(make: Make, port: int) -> None:
    """The socket is the same; where it leads is told for each connection."""
    rig = make(rule(port, port + 1))
    successor = replace(rule(port), to=80)
    rig.listeners.hand_over([(rig.opened[0].rule, port, successor)])
    assert (rig.opened[0].rule, rig.opened[0].to) == (successor, 80)
    assert rig.listeners.ports(successor) == {port} and rig.listeners.ports(rig.opened[1].rule) == {port + 1}
    rig.connect(port)
    rig.fire()
    assert rig.splice.got
    rig.listeners.remove(successor, port)
    assert not rig.listeners.has(PROTO_TCP, False, port)


@pytest.mark.parametrize(("to", "told"), [(None, []), (80, ["end", "begin"])])
def test_udp_flows_end_if_a_port_leads_elsewhere(make: Make, port: int, to: int | None, told: list[str]) -> None:
    rig = make(rule(port, proto=PROTO_UDP))
    successor = replace(rule(port, proto=PROTO_UDP), option="-u another", to=to or port)
    before = len(rig.udp_in.ports)
    rig.listeners.hand_over([(rig.opened[0].rule, port, successor)])
    assert [what for _, what in rig.udp_in.ports[before:]] == told


def test_a_range_of_udp_ports_costs_one_look_at_all_flows(make: Make, port: int) -> None:
    """Flows are the guest's, thousands if it likes, and the loop stands still meanwhile."""
    rig = make()
    wanted = [(rule(port, port + 3, proto=PROTO_UDP), p) for p in range(port, port + 4)]
    assert rig.listeners.add_all(wanted) == [] and rig.udp_in.looks == 1
    successor = replace(wanted[0][0], to=80)
    rig.listeners.hand_over([(*w, successor) for w in wanted])
    assert rig.udp_in.looks == 2 and rig.listeners.ports(successor) == set(range(port, port + 4))
    rig.listeners.remove_all([(successor, p) for _, p in wanted])
    assert rig.udp_in.looks == 3 and not rig.listeners.ports(successor)
    assert [p for p, what in rig.udp_in.ports if what == "end"] == 2 * [p for _, p in wanted]


def test_no_look_at_flows_for_tcp(make: Make, port: int) -> None:
    rig = make()
    assert rig.listeners.add_all([(rule(port), port)]) == []
    rig.listeners.remove(rule(port), port)
    assert rig.udp_in.looks == 0


def test_what_is_opened_is_not_served_yet(make: Make, port: int) -> None:
    rig = make()
    opened, failed = rig.listeners.open([(rule(port), port)])
    assert not failed and not rig.listeners.ports(rule(port)) and opened[0].fd not in reactor(rig.ctx).refs
    rig.listeners.watch(opened)
    assert rig.listeners.ports(rule(port)) == {port}
