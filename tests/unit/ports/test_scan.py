"""Automatic ports: what is followed, what is our own echo, what happens to ports that cannot be had."""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from passt import addr, log
from passt.policy.rules import Rule
from passt.ports import scan
from passt.ports.scan import INTERVAL, SHARE, SOCKETS_MAX, Scanner
from passt.ports.sockets import RESERVE, Failure, Wanted, reserve
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

from ..support import T0, make_context, reconfigure, stage_faults, timers

T = Rule("-t auto", PROTO_TCP, False, 1, 65535, 1, auto=True, weak=True)
U = replace(T, option="-u auto", proto=PROTO_UDP)
TO = replace(T, option="-T auto", outbound=True)
UO = replace(U, option="-U auto", outbound=True)


class World:
    """Both sides: ports that others have bound, and what we listen on there, which shows in the tables as well."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self.theirs: dict[tuple[str, int], set[int]] = {
            (side, proto): set() for side in ("host", "ns") for proto in (PROTO_TCP, PROTO_UDP)
        }
        self.pinned: dict[tuple[str, int], set[tuple[bytes, int]]] = {key: set() for key in self.theirs}
        self.ours: dict[Rule, set[int]] = {}
        self.closing: dict[Rule, set[int]] = {}  # removed, and bound until the turn ends
        self.refused: set[int] = set()
        self.log: list[str] = []
        self.ctx = make_context(forwards=rules)
        host, ns = Tables(self, "host"), Tables(self, "ns")
        self.scanner = Scanner(self.ctx, self, host, ns)  # type: ignore[arg-type]
        self.deadlines = timers(self.ctx).services.deadlines

    def binds(self, side: str, proto: int, *ports: int) -> None:
        self.theirs[side, proto] |= set(ports)

    def look(self, now: float = T0) -> None:
        timers(self.ctx).services.fire(0, now)
        self.closing.clear()

    # Methods of the listeners

    def ports(self, rule: Rule) -> set[int]:
        return set(self.ours.get(rule, ()))

    def has(self, proto: int, outbound: bool, port: int) -> bool:
        return any(port in ports for r, ports in self.ours.items() if (r.proto, r.outbound) == (proto, outbound))

    def add_all(self, wanted: list[Wanted]) -> list[Failure]:
        assert len({rule.outbound for rule, _ in wanted}) == 1
        failed = []
        for rule, port in wanted:
            assert port not in self.ports(rule)
            if port in self.refused:
                failed.append(Failure(rule, port, errno.EADDRINUSE))
            else:
                self.ours.setdefault(rule, set()).add(port)
                self.log.append(f"+{rule.option} {port}")
        return failed

    def remove_all(self, ports: Iterable[Wanted]) -> None:
        for rule, port in ports:
            self.ours[rule].remove(port)
            self.closing.setdefault(rule, set()).add(port)
            self.log.append(f"-{rule.option} {port}")


class Tables:
    """The kernel's table of one side: inbound rules listen on the host, outbound ones in the namespace."""

    def __init__(self, world: World, side: str) -> None:
        self.world = world
        self.side = side
        self.reads: list[int] = []

    def bound(self, proto: int) -> set[int]:
        self.reads.append(proto)
        ours = (ports for r, ports in self.world.ours.items() if (r.proto, r.outbound) == (proto, self.side == "ns"))
        return self.world.theirs[self.side, proto].union(*ours)

    def pinned(self, proto: int) -> set[tuple[bytes, int]]:
        return self.world.pinned[self.side, proto]


# Following -----------------------------------------------------------------------------------------------------------


def test_ports_appear_and_vanish() -> None:
    w = World(T)
    w.binds("ns", PROTO_TCP, 80)
    w.binds("ns", PROTO_UDP, 53)
    w.binds("host", PROTO_TCP, 22)
    w.scanner.start(T0)
    assert w.log == ["+-t auto 80"]
    w.binds("ns", PROTO_TCP, 8080)
    w.look()
    w.theirs["ns", PROTO_TCP] = {8080}
    w.look()
    w.look()
    assert w.log == ["+-t auto 80", "+-t auto 8080", "--t auto 80"]


def test_within_the_range_and_moved() -> None:
    w = World(replace(T, first=8000, last=8010, to=80))
    w.binds("ns", PROTO_TCP, 79, 80, 85, 90, 91, 8000)
    w.scanner.start(T0)
    assert w.log == ["+-t auto 8000", "+-t auto 8005", "+-t auto 8010"]


def test_outbound_follows_the_host() -> None:
    w = World(TO)
    w.binds("host", PROTO_TCP, 5432)
    w.binds("ns", PROTO_TCP, 80)
    w.scanner.start(T0)
    assert w.ours == {TO: {5432}}


@pytest.mark.parametrize(("rules", "expected"), [((U,), {53}), ((U, T), {53, 80})])
def test_udp_follows_tcp_if_that_is_automatic(rules: tuple[Rule, ...], expected: set[int]) -> None:
    w = World(*rules)
    w.binds("ns", PROTO_TCP, 80)
    w.binds("ns", PROTO_UDP, 53)
    w.scanner.start(T0)
    assert w.ours[U] == expected


def test_udp_follows_given_tcp_ports() -> None:
    """While a program listens there, as `iperf3 -s` does; the UDP port has the number of the TCP port."""
    same = Rule("-t 5201", PROTO_TCP, False, 5201, 5201, 5201)
    moved = Rule("-t 80:8080", PROTO_TCP, False, 80, 80, 8080)
    w = World(U, same, moved)
    w.scanner.start(T0)
    assert not any(w.ours.values())
    w.binds("ns", PROTO_TCP, 5201, 8080, 22)
    w.look()
    assert w.ours == {U: {80, 5201}}
    w.theirs["ns", PROTO_TCP] = {22}
    w.look()
    assert w.ours == {U: set()}


@pytest.mark.parametrize(
    "led",
    [
        Rule("-t 22:[2001:db8::9]", PROTO_TCP, False, 22, 22, 22, target=addr.packed("2001:db8::9")),
        Rule("-T 22", PROTO_TCP, True, 22, 22, 22),
    ],
)
def test_udp_follows_no_tcp_port_that_leads_elsewhere(led: Rule) -> None:
    w = World(U, led)
    w.binds("ns", PROTO_TCP, 22)
    w.scanner.start(T0)
    assert not any(w.ours.values())


def test_tcp_of_the_other_direction_does_not_count_for_udp() -> None:
    w = World(U, TO)
    w.binds("ns", PROTO_TCP, 80)
    w.binds("host", PROTO_TCP, 22)
    w.scanner.start(T0)
    assert w.ours == {TO: {22}}


def test_rules_with_different_addresses_listen_on_the_same_port() -> None:
    """Also if one of them has it before the other."""
    v4, v6 = (replace(T, option=f"-t {a}/auto", addr=addr.packed(a)) for a in ("127.0.0.1", "::1"))
    fixed = replace(T, option="-t 192.0.2.1/80", first=80, last=80, to=80, addr=addr.packed("192.0.2.1"), auto=False)
    w = World(fixed, v4, v6)
    w.ours[fixed] = {80}
    w.binds("ns", PROTO_TCP, 80)
    w.scanner.start(T0)
    assert w.ours == {fixed: {80}, v4: {80}, v6: {80}}


# Echo ----------------------------------------------------------------------------------------------------------------


def test_no_echo_between_the_directions() -> None:
    w = World(T, U, TO, UO)
    w.binds("ns", PROTO_TCP, 80)
    w.binds("host", PROTO_TCP, 22)
    w.binds("ns", PROTO_UDP, 53)
    w.binds("host", PROTO_UDP, 123)
    w.scanner.start(T0)
    settled = {T: {80}, U: {53, 80}, TO: {22}, UO: {22, 123}}
    assert w.ours == settled
    for _ in range(3):
        w.look()
    assert w.ours == settled
    for ports in w.theirs.values():
        ports.clear()
    w.look()
    assert w.ours == {rule: set() for rule in settled}


def test_fixed_rules_of_the_other_direction_are_ours() -> None:
    fixed = replace(TO, option="-T 22", first=22, last=22, to=22, auto=False, weak=False)
    w = World(T, fixed)
    w.ours[fixed] = {22}
    w.binds("ns", PROTO_TCP, 80)
    w.scanner.start(T0)
    assert w.ours[T] == {80}


def test_a_server_on_both_sides_is_followed_from_neither_twice() -> None:
    """Both have 80: each side's port is taken by its server, so that nothing can be bound, now and later."""
    w = World(T, TO)
    w.binds("ns", PROTO_TCP, 80)
    w.binds("host", PROTO_TCP, 80)
    w.refused = {80}
    w.scanner.start(T0)
    w.look()
    assert w.log == []


@pytest.mark.parametrize(
    ("start", "expected"), [(True, ["+-t auto 7", "+-T auto 8"]), (False, ["+-T auto 8", "+-t auto 7"])]
)
def test_inbound_first_at_start_and_last_later(start: bool, expected: list[str]) -> None:
    w = World(T, TO)
    if not start:
        w.scanner.start(T0)
    w.binds("ns", PROTO_TCP, 7)
    w.binds("host", PROTO_TCP, 8)
    if start:
        w.scanner.start(T0)
    else:
        w.look()
    assert w.log == expected


# Failures ------------------------------------------------------------------------------------------------------------


def test_ports_that_cannot_be_had_are_tried_again_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "debug", said.append)
    w = World(T)
    w.refused = {80}
    w.binds("ns", PROTO_TCP, 80, 81)
    w.scanner.start(T0)
    for _ in range(3):
        w.look()
    assert said == ["-t auto: port 80 cannot be opened now: Address already in use"]
    w.refused = set()
    w.look()
    assert w.ours[T] == {80, 81}
    w.refused = {80}
    w.theirs["ns", PROTO_TCP] = set()
    w.look()
    w.binds("ns", PROTO_TCP, 80)
    w.look()
    assert said.count("-t auto: port 80 cannot be opened now: Address already in use") == 2


# How many ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    def warn(key: str, text: str, now: float) -> None:
        assert now >= T0
        said.append(text)

    monkeypatch.setattr(log, "warn_ratelimited", warn)
    return said


def test_no_more_sockets_than_there_may_be(warnings: list[str]) -> None:
    """Ports beyond the limit are logged and counted once, and are followed when others vanish."""
    w = World(T, U)
    w.scanner._most = 4
    w.binds("ns", PROTO_TCP, 80, 81)
    w.scanner.start(T0)
    assert (w.ours, warnings) == ({T: {80, 81}, U: {80, 81}}, [])
    w.binds("ns", PROTO_TCP, 79, 82)
    for _ in range(3):
        w.look()
    assert w.ours == {T: {80, 81}, U: {80, 81}}, "those that are there stay"
    assert warnings == ["Automatic ports: 4 more are bound in the namespace than may be followed, by 4 sockets at most"]
    assert w.ctx.drops == {"auto: too many ports": 4}
    w.theirs["ns", PROTO_TCP] -= {80}
    w.look()
    assert w.ours == {T: {79, 81, 82}, U: {81}} and len(warnings) == 1
    w.theirs["ns", PROTO_TCP] -= {79}
    w.look()
    assert w.ours == {T: {81, 82}, U: {81, 82}} and w.ctx.drops.total() == 4
    w.binds("ns", PROTO_TCP, 83)
    w.look()
    assert len(warnings) == 2 and w.ctx.drops.total() == 6


def test_ports_that_cannot_be_bound_keep_no_other_from_being_followed(warnings: list[str]) -> None:
    w = World(T)
    w.scanner._most = 4
    w.refused = set(range(1, 7))
    w.binds("ns", PROTO_TCP, *range(1, 9))
    w.scanner.start(T0)
    assert not w.ours
    for _ in range(4):
        w.look()
    assert w.ours[T] == {7, 8} and len(warnings) == 1


@pytest.mark.usefixtures("warnings")
def test_it_is_told_where_there_are_too_many(warnings: list[str]) -> None:
    w = World(TO)
    w.scanner._most = 1
    w.binds("host", PROTO_TCP, 80, 81)
    w.scanner.start(T0)
    assert warnings == ["Automatic ports: 2 more are bound on the host than may be followed, by 1 sockets at most"]


def test_each_direction_has_its_own_share() -> None:
    """Outbound ports take a socket for each family, those of one address one."""
    w = World(T, TO)
    w.scanner._most = 5
    w.binds("ns", PROTO_TCP, *range(1, 10))
    w.binds("host", PROTO_TCP, *range(11, 20))
    w.pinned["host", PROTO_TCP] = {(STUB, 53)}
    w.scanner.start(T0)
    assert w.ours == {T: {1, 2, 3, 4, 5}, TO: {11, 12}}
    w.theirs["host", PROTO_TCP] -= set(range(11, 19))
    w.look()
    w.look()
    assert w.ours == {T: {1, 2, 3, 4, 5}, TO: {19}, at(TO): {53}}


@pytest.mark.usefixtures("warnings")
def test_descriptors_are_left_beside_all_rules() -> None:
    fixed = Rule("-u 1000-1002", PROTO_UDP, False, 1000, 1002, 1000)
    w = World(T, fixed)
    w.ours[fixed] = {1000, 1001, 1002}
    w.scanner._all = 5
    w.binds("ns", PROTO_TCP, 80, 81, 82)
    w.scanner.start(T0)
    assert w.ours[T] == {80, 81}


def test_the_share_is_one_of_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((1024, 256), (1 << 20, SOCKETS_MAX), (resource.RLIM_INFINITY, SOCKETS_MAX)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        scanner = World(T).scanner
        assert scanner._most == most
        assert scanner._all == (sys.maxsize if limit == resource.RLIM_INFINITY else limit) - RESERVE


def test_few_descriptors_are_halved() -> None:
    assert [reserve(limit) for limit in (0, 64, 128, 256, 257, 1 << 20)] == [0, 32, 64, RESERVE, RESERVE, RESERVE]


# Time ----------------------------------------------------------------------------------------------------------------


def test_without_automatic_rules_nothing_ever_happens() -> None:
    w = World(replace(T, auto=False, weak=False))
    w.scanner = Scanner(w.ctx, w, None, None)  # type: ignore[arg-type]
    w.scanner.start(T0)
    assert w.deadlines == []


def test_only_what_is_needed_is_read() -> None:
    w = World(T)
    host, ns = Tables(w, "host"), Tables(w, "ns")
    w.scanner = Scanner(w.ctx, w, host, ns)  # type: ignore[arg-type]
    w.scanner.start(T0)
    assert (host.reads, ns.reads) == ([], [PROTO_TCP])


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    w = World(T)
    w.scanner.start(T0)
    assert w.deadlines == [T0 + INTERVAL]
    cost = iter([5.0, 5.01, 7.0, 7.1])
    monkeypatch.setattr(scan.time, "process_time", lambda: next(cost))
    w.look(T0)
    assert w.deadlines == [T0 + INTERVAL]
    w.look(T0)
    assert w.deadlines == [pytest.approx(T0 + 0.1 * SHARE)]


def test_a_fault_costs_one_look() -> None:
    def fail(proto: int) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    w = World(T)
    w.scanner.start(T0)
    tables = w.scanner._ns
    assert tables is not None
    works = tables.bound
    tables.bound = fail  # type: ignore[method-assign]
    stage_faults(w.ctx)
    w.look()
    assert w.ctx.drops["fault"] == 1
    tables.bound = works  # type: ignore[method-assign]
    w.binds("ns", PROTO_TCP, 80)
    w.look()
    assert w.ours == {T: {80}}


# Addresses of 127/8 --------------------------------------------------------------------------------------------------

STUB = addr.packed("127.0.0.53")


def at(rule: Rule, address: bytes = STUB) -> Rule:
    return replace(rule, addr=address, target=address, auto=True, weak=True)


def test_given_outbound_ports_lead_there_too() -> None:
    """-T 53 -U 53 on a host with systemd-resolved."""
    tcp = Rule("-T 53", PROTO_TCP, True, 53, 53, 53)
    udp = Rule("-U 5353:53", PROTO_UDP, True, 5353, 5353, 53)
    w = World(tcp, udp)
    w.pinned["host", PROTO_TCP] = w.pinned["host", PROTO_UDP] = {(STUB, 53), (STUB, 54)}
    w.scanner.start(T0)
    assert w.ours == {at(tcp): {53}, at(udp): {5353}} and w.deadlines == [T0 + INTERVAL]
    w.pinned["host", PROTO_UDP] = set()
    w.pinned["host", PROTO_TCP] = set()
    w.look()
    assert not any(w.ours.values())
    w.pinned["host", PROTO_TCP] = {(STUB, 53)}
    w.look()
    assert w.ours[at(tcp)] == {53}
    reconfigure(w.ctx, forwards=(udp,))
    assert not any(w.ours.values())


def test_udp_follows_no_tcp_server_of_given_outbound_ports() -> None:
    w = World(Rule("-T 53", PROTO_TCP, True, 53, 53, 53), UO)
    w.binds("host", PROTO_TCP, 53)
    w.scanner.start(T0)
    assert not w.ours


def test_both_sockets_of_an_outbound_port_count(warnings: list[str]) -> None:
    """A port takes a socket at each loopback: of five, two are left for one port more."""
    w = World(TO)
    w.scanner._most = 5
    w.binds("host", PROTO_TCP, 80)
    w.scanner.start(T0)
    w.binds("host", PROTO_TCP, 81, 82)
    w.look()
    assert w.ours[TO] == {80, 81} and len(warnings) == 1


def test_udp_follows_no_tcp_server_of_given_ports_there() -> None:
    w = World(Rule("-T 53", PROTO_TCP, True, 53, 53, 53), UO)
    w.pinned["host", PROTO_TCP] = {(STUB, 53)}
    w.scanner.start(T0)
    assert {r.proto for r in w.ours} == {PROTO_TCP}


def test_given_outbound_ports_need_no_tables() -> None:
    ctx = make_context(forwards=(Rule("-T 53", PROTO_TCP, True, 53, 53, 53),))
    Scanner(ctx, World(), None, None).start(T0)  # type: ignore[arg-type]
    assert timers(ctx).services.deadlines == []


def test_a_server_at_a_loopback_address_of_its_own_is_found_there() -> None:
    w = World(TO, UO)
    w.scanner.start(T0)
    w.pinned["host", PROTO_UDP] = {(STUB, 53)}
    w.pinned["host", PROTO_TCP] = {(STUB, 53), (addr.packed("127.0.0.54"), 53)}
    w.look()
    assert w.ours == {
        at(UO): {53}, at(UO, addr.packed("127.0.0.54")): {53}, at(TO): {53}, at(TO, addr.packed("127.0.0.54")): {53}
    }  # fmt: skip
    w.pinned["host", PROTO_TCP].clear()
    w.look()
    assert {rule: ports for rule, ports in w.ours.items() if ports} == {at(UO): {53}}
    w.pinned["host", PROTO_UDP].clear()
    w.look()
    assert not any(w.ours.values())


@pytest.mark.parametrize("proto", [PROTO_TCP, PROTO_UDP])
def test_where_it_is_listened_on_by_ourselves_it_is_an_echo(proto: int) -> None:
    """Neither is it followed, nor by UDP what is of TCP."""
    fixed = Rule("127.0.0.53/53", proto, False, 53, 53, 53, addr=STUB)
    w = World(TO, UO, fixed)
    w.ours[fixed] = {53}
    w.pinned["host", proto] = {(STUB, 53)}
    w.scanner.start(T0)
    assert w.ours == {fixed: {53}}


def test_ports_of_given_rules_are_followed_by_these_alone() -> None:
    given = Rule("-U 53", PROTO_UDP, True, 53, 53, 53)
    w = World(UO, given)
    w.pinned["host", PROTO_UDP] = {(STUB, 53), (STUB, 54)}
    w.scanner.start(T0)
    assert w.ours == {at(given): {53}, at(UO): {54}}


def test_servers_of_the_namespace_at_such_addresses_cannot_be_reached_from_outside() -> None:
    w = World(T, U)
    w.pinned["ns", PROTO_TCP] = {(STUB, 53)}
    w.scanner.start(T0)
    assert not w.ours


def test_ranges_and_rules_that_end() -> None:
    low = replace(UO, option="-U 1-100,auto", last=100)
    w = World(low)
    w.pinned["host", PROTO_UDP] = {(STUB, 53), (STUB, 153)}
    w.scanner.start(T0)
    assert w.ours == {at(low): {53}}
    reconfigure(w.ctx, forwards=())
    assert not any(w.ours.values())


def test_without_ipv4_there_are_none() -> None:
    w = World(UO)
    reconfigure(w.ctx, ip4=None)
    w.pinned["host", PROTO_UDP] = {(STUB, 53)}
    w.scanner.start(T0)
    assert not w.ours


# Rules that change ----------------------------------------------------------------------------------------------------


def test_other_rules() -> None:
    """A new rule is followed at once, a deleted one no longer; the timer exists while rules do."""
    w = World()
    w.scanner.start(T0)
    assert w.deadlines == []
    w.binds("ns", PROTO_TCP, 80)
    reconfigure(w.ctx, forwards=(T,))
    assert w.log == ["+-t auto 80"] and w.deadlines == [T0 + INTERVAL]
    w.remove_all([(T, 80)])
    reconfigure(w.ctx, T0 + 0.1, forwards=())
    w.look(T0 + INTERVAL)
    assert w.deadlines == [None] and w.log == ["+-t auto 80", "--t auto 80"]
    reconfigure(w.ctx, T0 + 5, forwards=(T,))
    assert w.deadlines == [T0 + 5 + INTERVAL]


def test_one_timer_is_enough() -> None:
    w = World(T)
    w.scanner.start(T0)
    reconfigure(w.ctx, T0 + 0.5, forwards=(T, TO))
    assert w.deadlines == [T0 + INTERVAL]


def test_ports_that_others_ask_for() -> None:
    """By name, on an address in common: they are left to them, and come back."""
    w = World(T)
    w.binds("ns", PROTO_TCP, 80, 81)
    w.scanner.start(T0)
    named = replace(T, option="-t 127.0.0.1/80", first=80, last=80, addr=addr.LOOPBACK4, auto=False, weak=False)
    reconfigure(w.ctx, forwards=(T, named, replace(named, first=81, last=81, outbound=True)))
    assert w.ours[T] == {81}
    reconfigure(w.ctx, forwards=(T,))
    assert w.ours[T] == {80, 81}


def test_what_can_be_followed() -> None:
    w = World()
    assert w.scanner.can_follow(True) and w.scanner.can_follow(False)
    bare = Scanner(w.ctx, w, None, None)  # type: ignore[arg-type]
    assert not bare.can_follow(True) and not bare.can_follow(False)
    outward = Scanner(w.ctx, w, Tables(w, "host"), None)  # type: ignore[arg-type]
    assert outward.can_follow(True) and not outward.can_follow(False)


def test_given_outbound_ports_without_a_table_keep_no_other_from_being_followed() -> None:
    w = World(T, Rule("-T 53", PROTO_TCP, True, 53, 53, 53))
    w.binds("ns", PROTO_TCP, 80)
    Scanner(w.ctx, w, None, Tables(w, "ns")).start(T0)  # type: ignore[arg-type]
    assert w.ours == {T: {80}}


def test_a_port_of_a_derived_rule_that_could_not_be_closed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault costs a look."""
    w = World(TO)
    stage_faults(w.ctx)
    w.pinned["host", PROTO_TCP] = {(STUB, 53)}
    w.scanner.start(T0)
    w.pinned["host", PROTO_TCP] = set()
    with monkeypatch.context() as m:
        m.setattr(w, "remove_all", lambda ports: 1 / len([p for p in ports if False]))
        w.look()
    assert w.ctx.drops["fault"] and w.ours[at(TO)] == {53}
    w.look()
    assert not any(w.ours.values())


@pytest.mark.parametrize(
    ("step", "missed"), [("_follow_one", 4), ("_follow_rule", 1), ("_find_pinned", 2), ("_follow_own", 1)]
)
def test_a_fault_costs_what_it_is_about(monkeypatch: pytest.MonkeyPatch, step: str, missed: int) -> None:
    """A direction, a rule, the servers at loopback addresses of a rule, those at one address."""
    w = World(T, U, TO, UO)
    stage_faults(w.ctx)
    w.binds("ns", PROTO_TCP, 80)
    w.binds("ns", PROTO_UDP, 81)
    w.binds("host", PROTO_TCP, 22)
    w.binds("host", PROTO_UDP, 23)
    w.pinned["host", PROTO_TCP] = {(STUB, 53), (addr.packed("127.0.0.54"), 54)}
    real, calls = getattr(Scanner, step), []

    def failing(self: Scanner, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == (2 if step == "_follow_one" else 1):
            raise RuntimeError("staged")
        return real(self, *arguments)

    monkeypatch.setattr(Scanner, step, failing)
    w.scanner.start(T0)
    before = set(w.ours)
    assert w.ctx.drops["fault"] == 1
    w.look()
    assert w.ctx.drops["fault"] == 1
    assert len(set(w.ours) - before) == (missed if step != "_follow_one" else 6) and before


def test_a_fault_at_one_derived_rule_keeps_no_other_from_being_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    w = World(TO)
    stage_faults(w.ctx)
    w.pinned["host", PROTO_TCP] = {(STUB, 53), (addr.packed("127.0.0.54"), 54)}
    w.scanner.start(T0)
    real, calls = Scanner._close_all, []

    def failing(self: Scanner, own: Rule) -> None:
        calls.append(own)
        if len(calls) == 1:
            raise RuntimeError("staged")
        real(self, own)

    monkeypatch.setattr(Scanner, "_close_all", failing)
    reconfigure(w.ctx, forwards=())
    assert len(calls) == 2 and w.ctx.drops["fault"] == 1
    assert sum(map(len, w.ours.values())) == 1
