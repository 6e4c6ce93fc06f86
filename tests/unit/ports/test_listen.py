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
from passt.flow.room import HALF_OPEN
from passt.flow.spare import REST
from passt.linux import netns
from passt.linux.netns import Namespace
from passt.loop.reactor import EPOLLIN, TYPE_LISTEN, make_ref
from passt.policy.rules import Listener, Rule
from passt.ports import listen
from passt.ports.listen import BUDGET_MAX, STREAK, Listeners
from passt.ports.sockets import Failure, open_ports
from passt.tcp_engine.sock import reset
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

from ..support import T0, free_ports, make_context, reactor, stage_faults, timers
from .test_sockets import rule

PEER = addr.packed("198.51.100.9")


class Taker:
    """A service that takes connections, or datagrams."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, ...]] = []
        self.ports: list[tuple[int, str]] = []  # that UDP is told of
        self.looks = 0  # at all flows, which may be many
        self.in_use: set[int] = set()  # UDP ports of flows of the guest

    def accepted(self, listener: Listener, sock: Any, *who: Any) -> None:
        self.got.append((listener.port, *who))
        assert type(sock) is socket.SocketType and sock.getsockname()[1] == listener.port
        assert not sock.getblocking() and not os.get_blocking(sock.fileno())
        sock.close()

    def sock_handler(self, listener: Listener, now: float) -> None:
        self.got.append((listener.port, now))

    def ports_in_use(self, ports: Collection[int]) -> set[int]:
        self.looks += 1
        return self.in_use.intersection(ports)

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
    for count in (1, 2):
        rig.connect(port)
        rig.fire()
        assert rig.was_reset()
        assert rig.ctx.drops == {"listen: not from loopback": count}


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


def test_the_budget_doubles_after_a_streak(make: Make, port: int) -> None:
    rig = make(rule(port))
    for _ in range(STREAK + 2):
        rig.connect(port)
    for n in range(STREAK):
        rig.fire()
        assert len(rig.splice.got) == n + 1
    rig.fire()
    assert len(rig.splice.got) == STREAK + 2


@pytest.mark.parametrize(("clients", "budget"), [(0, 1), (1, 1), (3, 3), (7, 7)])
def test_the_budget_follows_the_crowd_down(make: Make, port: int, clients: int, budget: int) -> None:
    """And another streak is needed to raise it."""
    rig = make(rule(port))
    rig.listeners._budget, rig.listeners._streak = 8, STREAK - 1
    for _ in range(clients):
        rig.connect(port)
    rig.fire()
    assert rig.listeners._budget == budget
    for n in range(STREAK):
        assert rig.listeners._budget == budget, f"event {n}"
        for _ in range(budget):
            rig.connect(port)
        rig.fire()
    assert rig.listeners._budget == 2 * budget and rig.listeners._streak == 0


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
def test_flows_of_little_use_make_way_for_a_client(make: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(foreign: bool, now: float) -> int:
        assert foreign, "the client is a peer"
        limit.left += 1
        return 1

    limit = Descriptors(monkeypatch, errno.EMFILE)
    rig = make(rule(port))
    rig.ctx.room.offer(HALF_OPEN, give)
    limit.left = 0
    rig.connect(port)
    rig.fire()
    rig.fire()
    assert len(rig.splice.got) == 1 and not rig.ctx.drops


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
    tries: list[int] = []

    def fail(fd: int) -> None:
        tries.append(fd)
        raise OSError(number, os.strerror(number))

    rig = make(rule(port))
    monkeypatch.setattr(listen, "accept", fail)
    rig.listeners._budget = 4
    rig.fire()
    rig.fire()
    assert len(tries) == 2, "one for each event"
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
    gauge = rig.ctx.stats.gauges["listeners"]
    assert gauge() == 2
    assert rig.listeners.has(PROTO_TCP, False, first)
    assert not rig.listeners.has(PROTO_UDP, False, first) and not rig.listeners.has(PROTO_TCP, True, first)
    rig.connect(first)
    rig.listeners.remove(wanted, first)
    assert gauge() == 1
    assert (rig.listeners.ports(wanted), rig.listeners.has(PROTO_TCP, False, first)) == ({first + 2}, False)
    reactor(rig.ctx).end_turn(T0)
    assert rig.was_reset()  # it had not been accepted
    rig.listeners.add(wanted, first)
    assert sorted(ref & 0xFFFFFFFF for ref in reactor(rig.ctx).refs.values()) == [0, 1]  # places are used again


def test_both_loopbacks_of_a_port_are_served_and_closed(make: Make, port: int) -> None:
    rig = make(rule(port, outbound=True))
    assert [listener.sock.family for listener in rig.opened] == [socket.AF_INET, socket.AF_INET6]
    assert list(reactor(rig.ctx).events.values()) == [EPOLLIN, EPOLLIN]
    rig.listeners.remove(rig.opened[0].rule, port)
    assert reactor(rig.ctx).refs == {} and not rig.listeners.has(PROTO_TCP, True, port)


def test_a_fault_at_one_socket_of_a_port_leaves_the_other_no_longer(make: Make, port: int) -> None:
    rig = make(rule(port, outbound=True))
    stage_faults(rig.ctx)
    retire, failing = rig.ctx.reactor.retire, rig.opened[0].fd

    def once(fd: int, sock: Any) -> None:
        retire(fd, sock)
        if fd == failing:
            raise RuntimeError("staged")

    rig.ctx.reactor.retire = once  # type: ignore[method-assign]
    rig.listeners.remove(rig.opened[0].rule, port)
    assert reactor(rig.ctx).refs == {} and rig.ctx.drops["fault"] == 1


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
    assert rig.udp_in.ports == [(port, "begin")]


class FlowOfGuest(Taker):
    """UDP with a flow of the guest from `port`, whose socket on the host is bound to `at`; 0: it makes way."""

    def __init__(self, port: int, at: int, host: str = "") -> None:
        super().__init__()
        self.in_use = {port}
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.sock.bind((host, at))

    def free_ports(self, ports: Collection[int]) -> None:
        super().free_ports(ports)
        self.sock.close()


def with_flow(rig: Rig, flow: FlowOfGuest) -> FlowOfGuest:
    rig.listeners._udp_in = flow  # type: ignore[assignment]
    return flow


def test_a_flow_makes_way_where_that_helps(make: Make, port: int) -> None:
    rig = make()
    flow = with_flow(rig, FlowOfGuest(port, port))
    wanted = rule(port, proto=PROTO_UDP, auto=True)
    rig.listeners.add(wanted, port)
    assert flow.ports == [(port, "make way"), (port, "begin")]
    assert rig.listeners.ports(wanted) == {port}


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_flow_makes_way_for_a_port_that_another_program_has(make: Make, port: int, host: str, auto: bool) -> None:
    """The flow from that port has another one on the host, and would lose it."""
    rig = make()
    with (
        socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as other,
        with_flow(rig, FlowOfGuest(port, 0)).sock,
    ):
        other.bind((host, port))
        for _ in range(3):
            with pytest.raises(OSError, match="in use"):
                rig.listeners.add(rule(port, proto=PROTO_UDP, auto=auto), port)
    assert rig.listeners._udp_in.ports == []  # type: ignore[attr-defined]


def test_no_flow_makes_way_for_a_port_that_may_not_be_bound(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make()

    def forbidden(config: Any, wanted: Any, into: Any) -> list[Failure]:
        return [Failure(r, p, errno.EACCES) for r, p in wanted]

    monkeypatch.setattr(listen, "open_ports", forbidden)
    with with_flow(rig, FlowOfGuest(500, 0)).sock, pytest.raises(PermissionError):
        rig.listeners.add(rule(500, proto=PROTO_UDP, auto=True), 500)
    assert rig.listeners._udp_in.ports == []  # type: ignore[attr-defined]


def test_flows_make_way_in_vain_once(make: Make, port: int) -> None:
    """Another program of the user shares the port: only a flow that is closed shows that it does."""
    rig = make()
    wanted = rule(port, proto=PROTO_UDP, auto=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", port))
        for looks in (1, 0, 0):
            with with_flow(rig, FlowOfGuest(port, port)).sock, pytest.raises(OSError, match="in use"):
                rig.listeners.add(wanted, port)
            assert len(rig.listeners._udp_in.ports) == looks  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="in use"):
            rig.listeners.add(rule(port, proto=PROTO_UDP), port)  # a user asks: once more
        assert rig.listeners._udp_in.ports == [(port, "make way")]  # type: ignore[attr-defined]
    rig.listeners.add(wanted, port)


def test_add_that_fails_changes_nothing(make: Make, port: int) -> None:
    rig = make()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="Address already in use") as e:
        rig.listeners.add(rule(port), port)
    assert e.value.errno == errno.EADDRINUSE
    assert (rig.listeners.ports(rule(port)), reactor(rig.ctx).refs) == (set(), {})
    rig.listeners.add(rule(port), port)


def test_ports_that_cannot_be_watched_are_closed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """fs.epoll.max_user_watches is reached by the second one. The third could not be opened."""
    rig = make()
    first = free_ports(2)
    ports = [first, first + 1]
    wanted = [(rule(port), port) for port in ports]
    watch = rig.ctx.reactor.watch

    def limited(fd: int, *rest: int) -> None:
        if reactor(rig.ctx).refs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        watch(fd, *rest)

    monkeypatch.setattr(rig.ctx.reactor, "watch", limited)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        failed = rig.listeners.add_all([*wanted, (rule(taken), taken)])
    assert set(failed) == {
        Failure(rule(taken), taken, errno.EADDRINUSE),
        *(Failure(r, port, errno.ENOSPC) for r, port in wanted),
    }
    reactor(rig.ctx).end_turn(T0)
    assert reactor(rig.ctx).refs == {} and not any(rig.listeners.ports(r) for r, _ in wanted)
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


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
    assert failure == Failure(rule(port, outbound=True), port, errno.EPERM)


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


def test_a_fault_at_one_port_that_leads_elsewhere_is_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_ports(2)
    udp = rule(first, first + 1, proto=PROTO_UDP)
    rig = make(udp)
    stage_faults(rig.ctx)
    begun: list[int] = []

    def begin(listener: Listener) -> None:
        if listener.port == first:
            raise RuntimeError("staged")
        begun.append(listener.port)

    monkeypatch.setattr(rig.udp_in, "begin", begin)
    successor = replace(udp, to=7)
    rig.listeners.hand_over([(udp, first, successor), (udp, first + 1, successor)])
    assert begun == [first + 1] and rig.ctx.drops["fault"] == 1
    assert rig.listeners.ports(successor) == {first, first + 1}


def test_a_range_of_udp_ports_costs_one_look_at_all_flows(make: Make, port: int) -> None:
    """Flows are the guest's, thousands if it likes, and the loop stands still meanwhile."""
    rig = make()
    wanted = [(rule(port, port + 3, proto=PROTO_UDP), p) for p in range(port, port + 4)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", port))
        assert len(rig.listeners.add_all(wanted)) == 1 and rig.udp_in.looks == 1
    assert rig.listeners.add_all(wanted[:1]) == [] and rig.udp_in.looks == 1
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


# A socket that was destroyed from outside ----------------------------------------------------------------------------


def destroy(listener: Listener) -> None:
    """The effect of `ss -K`: accept(2) fails by EINVAL from now on, and epoll reports EPOLLHUP."""
    listener.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(OSError, match="Invalid argument"):
        listen.accept(listener.fd)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_write", lambda level, text, **_: lines.append(text))
    return lines


def lose(make: Make, port: int) -> Rig:
    """A rig whose listener is lost."""
    rig = make(rule(port))
    rig.ctx.settings.replace(replace(rig.ctx.config, forwards=(rig.opened[0].rule,)), T0)
    destroy(rig.opened[0])
    rig.fire()
    reactor(rig.ctx).end_turn(T0)
    return rig


def test_a_destroyed_listener_is_replaced(make: Make, port: int, said: list[str]) -> None:
    rig = lose(make, port)
    assert reactor(rig.ctx).refs == {}, "it would be reported for ever"
    services = timers(rig.ctx).services
    assert services.deadlines[-1] == T0 + listen.REOPEN
    services.fire(-1)
    assert rig.listeners.ports(rig.opened[0].rule) == {port}
    rig.connect(port)
    (fd,) = reactor(rig.ctx).refs
    reactor(rig.ctx).fire(fd, EPOLLIN, T0)
    assert [got[0] for got in rig.splice.got] == [port]
    assert said == [f"Port {port} of '{rig.opened[0].rule.option}' was closed by another program: opening it again"]
    assert rig.ctx.drops["listen: socket destroyed"] == 1
    again = next(listener for listener in rig.listeners._by_index if listener is not None)
    destroy(again)
    rig.fire(again)
    assert rig.ctx.drops["listen: socket destroyed"] == 2


def test_a_port_that_a_request_opened_meanwhile_is_left_alone(make: Make, port: int, said: list[str]) -> None:
    rig = lose(make, port)
    rig.listeners.add(rig.opened[0].rule, port)
    timers(rig.ctx).services.fire(-1)
    assert len(said) == 1, "it is open, so it is not given up"
    assert len(reactor(rig.ctx).refs) == 1


def test_a_port_that_was_taken_meanwhile_is_given_up(make: Make, port: int, said: list[str]) -> None:
    rig = lose(make, port)
    with socket.create_server(("127.0.0.1", port)):
        timers(rig.ctx).services.fire(-1)
    assert rig.listeners.ports(rig.opened[0].rule) == set()
    assert said[1:] == [
        "Closed by another program, and given up: "
        f"Failed to bind port {port} (Address already in use) for option '{rig.opened[0].rule.option}'"
    ]


def test_a_port_that_is_not_wanted_any_more_stays_closed(make: Make, port: int, said: list[str]) -> None:
    rig = lose(make, port)
    rig.ctx.settings.replace(replace(rig.ctx.config, forwards=()), T0)
    timers(rig.ctx).services.fire(-1)
    assert rig.listeners.ports(rig.opened[0].rule) == set()
    assert len(said) == 1


def test_automatic_rules_look_after_their_ports(make: Make, port: int, said: list[str]) -> None:
    rig = make(replace(rule(port), auto=True))
    destroy(rig.opened[0])
    rig.fire()
    assert rig.listeners.ports(rig.opened[0].rule) == set(), "the next scan opens it"
    assert timers(rig.ctx).services.deadlines == [None]
