"""The service of --follow, with fakes of the kernel on all sides: tables, namespace, loop, and time."""

from __future__ import annotations

import errno
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passt import addr, log
from passt.conf import argv as conf_argv
from passt.conf.decide import decide
from passt.conf.resolv_conf import ResolvConf
from passt.daemon import following
from passt.daemon.following import (
    CALM,
    FORMER_MAX,
    LINK_DOWN,
    LINK_STEP,
    PATIENCE,
    RELEASE,
    RETRY,
    SETTLE,
    SETTLE_MAX,
    SHARE,
    TORN_MAX,
    Following,
    NsTap,
    start,
)
from passt.flow.table import Flow
from passt.linux import tap_change, tun
from passt.linux.routes import Host, Link, NsPlan
from passt.linux.tap_change import Made
from passt.loop.reactor import EPOLLIN
from passt.policy.config import PASST
from passt.policy.rules import Rule
from passt.ports.forwards import Add, Delete, Refused
from passt.wire.checksum import PROTO_TCP
from tests.unit.conf.test_follow import HOME, OFFLINE, TRAIN, TRAIN4, TRAIN6, WIFI, host, ip, net4
from tests.unit.support import GUEST_MAC, T0, elapse, make_context, reactor, timers

FD, TAP_FD = 77, 76
NAMES = ResolvConf((ip("192.0.2.53"),))


class Tables:
    """Those of a host whose networks come one after the other; an exception is raised."""

    def __init__(self, *hosts: Host | OSError) -> None:
        self.hosts = list(hosts)
        self.last = HOME
        self.drained = 0
        self.torn, self._read = False, False  # whether they change while they are read; that they were
        self.monitor = SimpleNamespace(fd=FD, drain=self._drain)
        self.asked: list[Any] = []
        self.neighbours = SimpleNamespace(fd=FD + 1, ask=self.asked.append, asking=False, more=False)

    def _drain(self) -> bool:
        if self._read:
            self._read = False
            return self.torn
        self.drained += 1
        return True

    def read(self) -> Host:
        now = self.hosts.pop(0) if len(self.hosts) > 1 else self.hosts[0]
        if isinstance(now, OSError):
            raise now
        self.last = now
        self._read = True
        return now


class Forwards:
    """Rules in force, and the changes asked for."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = dict(enumerate(rules, 1))
        self.asked: list[Any] = []
        self.refused = False

    def change(self, changes: list[Any], now: float) -> None:
        self.asked += changes
        if self.refused:
            raise Refused(["Address already in use"])
        for change in changes:
            if isinstance(change, Delete):
                self.rules = {n: r for n, r in self.rules.items() if r != change.rule}
            elif isinstance(change, Add):
                self.rules[max(self.rules, default=0) + 1] = change.rule


class Namespace:
    """An interface, with a netlink socket or without one."""

    def __init__(self, plan: NsPlan, *, rights: bool = True, reader: bool = False) -> None:
        self.plan, self.mac, self.device = plan, GUEST_MAC, SimpleNamespace(fd=TAP_FD)
        nl = SimpleNamespace(limit=lambda seconds: None, links=lambda: (self._tap(),), link=self._link)
        self.netlink, self.reader = (nl, None) if rights else (None, nl if reader else None)
        self.up: list[bool | OSError] = []  # what programs there are told of the link, one time after the other

    def _tap(self, up: bool = True) -> Link:
        return Link(2, self.plan.ifname, self.mac, 1500, up=up)

    def _link(self, index: int) -> Link:
        assert index == 2
        up = self.up.pop(0) if len(self.up) > 1 else self.up[0]
        if isinstance(up, OSError):
            raise up
        return self._tap(up)


class Lab:
    """The service for a guest, and what it says and does."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *hosts: Host | OSError, line: str = "--config-net", mode: str = "",
        rules: tuple[Rule, ...] = (), rights: bool = True, reader: bool = False,
    ) -> None:  # fmt: skip
        self.lines: list[str] = []
        self.cost = self.clock = 0.0
        monkeypatch.setattr(log, "info", self.lines.append)
        monkeypatch.setattr(log, "_held", {})
        monkeypatch.setattr(log, "say", lambda level, text: self.lines.append(text))
        monkeypatch.setattr(following.time, "thread_time", self._thread_time)
        words = [*line.split(), *([] if mode else ["true"])]
        self.options = conf_argv.parse(words, mode) if mode else conf_argv.parse(words)
        decision = decide(self.options, HOME, NAMES)
        decision = replace(decision, config=replace(decision.config, forwards=rules))
        self.ctx = make_context(decision.config)
        if decision.config.ip4 and decision.config.ip6:  # as `daemon.wiring` does
            self.ctx.guest.addr4, self.ctx.guest.addr6 = decision.config.ip4.addr, decision.config.ip6.addr or b""
        self.tables, self.forwards = Tables(*hosts), Forwards(*rules)
        self.changed: list[NsPlan] = []
        self.released: list[set[bytes]] = []
        self.problems: list[str] = []
        monkeypatch.setattr(tap_change, "change", self._change)
        monkeypatch.setattr(tap_change, "release", self._release)
        self.carrier: list[bool] = []
        self.broken = False
        monkeypatch.setattr(tun, "set_carrier", self._set_carrier)
        self.namespace = Namespace(decision.plan, rights=rights, reader=reader) if decision.plan else None
        tap = NsTap(cast(Any, self.namespace)) if self.namespace else None
        self.service = Following(
            self.ctx, self.options, decision, cast(Any, self.tables), cast(Any, SimpleNamespace(current=NAMES)),
            cast(Any, self.forwards), tap,
        )  # fmt: skip

    def _thread_time(self) -> float:
        self.clock += self.cost
        return self.clock

    def _set_carrier(self, fd: int, *, on: bool) -> None:
        assert fd == TAP_FD
        if self.broken:
            raise OSError(errno.EBADFD, "File descriptor in bad state")
        self.carrier.append(on)

    def _change(self, nl: Any, name: str, mac: bytes, made: Made, plan: NsPlan) -> tuple[Made, list[str]]:
        self.changed.append(plan)
        return Made(plan.addresses, plan.routes, (*made.former, *(a.addr for a in made.addresses))), self.problems

    def _release(self, nl: Any, name: str, mac: bytes, made: Made, unused: Any) -> Made:
        self.released.append(set(unused))
        return replace(made, former=tuple(a for a in made.former if a not in set(unused)))

    @property
    def due(self) -> float | None:
        """The time of the next look."""
        return timers(self.ctx).services.deadlines[self.service._timer]

    def tells(self, now: float = T0) -> float:
        """The kernel tells of a change; returns how long the service waits for more."""
        reactor(self.ctx).fire(FD, EPOLLIN, now)
        assert FD not in reactor(self.ctx).refs, "more of it costs nothing"
        assert self.due is not None
        return self.due - now

    def looks(self) -> None:
        timers(self.ctx).services.fire(self.service._timer)
        reactor(self.ctx).end_turn(T0)
        assert FD in reactor(self.ctx).refs

    def goes(self, now: float = T0) -> float:
        """A change, from the kernel's message to its consequences; returns the time when it is through."""
        wait = self.tells(now)
        self.looks()
        return now + wait

    @property
    def addresses(self) -> tuple[str, str]:
        four, six = self.ctx.config.ip4, self.ctx.config.ip6
        assert four and six
        return addr.text(four.addr), addr.text(six.addr) if six.addr else "-"


def test_a_change_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN)
    assert lab.tells() == pytest.approx(SETTLE)
    lab.looks()
    assert lab.addresses == ("10.9.0.20", "2001:db8:9::20")
    assert lab.lines == [
        "The host's network has changed: IPv4 10.9.0.20/24 via 10.9.0.1 (eth0: the default route); "
        "IPv6 2001:db8:9::20/64 via fe80::9 (eth0: the default route)"
    ]
    assert [addr.text(a.addr) for a in lab.changed[0].addresses] == ["10.9.0.20", "2001:db8:9::20"]
    assert lab.namespace and lab.namespace.plan == lab.changed[0], "a tap that is created again has it"
    assert (lab.ctx.guest.addr4, lab.ctx.guest.addr6) == (ip("10.9.0.20"), ip("2001:db8:9::20"))
    figures = lab.service.figures()
    assert (figures["changes"], figures["reads"], figures["failures"], figures["follow"]) == (1, 1, 0, "all")
    assert lab.ctx.stats.network == lab.service.figures


def test_nothing_is_said_or_done_where_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, HOME)
    lab.goes()
    assert (lab.lines, lab.changed, lab.service.reads, lab.service.changes) == ([], [], 1, 0)


def test_a_host_that_is_offline_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, OFFLINE)
    lab.goes(lab.goes())
    assert len(lab.lines) == 1 and "stays (no interface has a usable route)" in lab.lines[0]
    assert lab.addresses == ("192.168.7.20", "2001:db8:7::20") and lab.changed == []


class Checks:
    """Passes over flows: the families that are looked at, and those that are lost."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[set[int], set[int]]] = []
        monkeypatch.setattr(lab.service._sources, "check", self._check)

    def _check(self, addresses: Any, lengths: Any, now: float, lost: Any) -> None:
        self.made.append((set(lengths), set(lost)))


@pytest.mark.parametrize(("to", "lost"), [(TRAIN4, 16), (TRAIN6, 4)])
def test_flows_of_a_family_that_the_host_loses_end_at_once(
    monkeypatch: pytest.MonkeyPatch, to: Host, lost: int
) -> None:
    lab = Lab(monkeypatch, to, HOME)
    checks = Checks(lab, monkeypatch)
    lab.goes()
    assert checks.made == [({4, 16}, {lost})] and lab.due is None


@pytest.mark.parametrize(("to", "lost"), [(TRAIN4, 16), (TRAIN6, 4)])
def test_a_host_that_is_back_has_a_moment_for_the_other_family(
    monkeypatch: pytest.MonkeyPatch, to: Host, lost: int
) -> None:
    lab = Lab(monkeypatch, OFFLINE, to, to, to, HOME)
    checks = Checks(lab, monkeypatch)
    now = lab.goes(lab.goes())
    assert checks.made == [({20 - lost}, set())] and lab.due == pytest.approx(now + PATIENCE)
    lab.goes(now + PATIENCE / 3)  # something else has changed
    assert checks.made[1:] == [({20 - lost}, set())] and lab.due == pytest.approx(now + PATIENCE)
    lab.looks()
    assert checks.made[2:] == [({4, 16}, {lost})] and lab.due is None


def test_a_host_that_is_back_with_both_families_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, OFFLINE, TRAIN6, HOME)
    checks = Checks(lab, monkeypatch)
    lab.goes(lab.goes(lab.goes()))
    assert checks.made == [({16}, set()), ({4, 16}, set())] and lab.due is None


def test_no_flow_ends_by_tables_that_changed_while_they_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN4)
    checks = Checks(lab, monkeypatch)
    lab.tables.torn = True
    now = lab.goes()
    assert not checks.made and lab.due == pytest.approx(now + SETTLE), "they are read again"
    lab.tables.torn = False
    lab.looks()
    assert checks.made == [({4, 16}, {16})] and lab.due is None


def test_a_host_that_changes_all_the_time_keeps_no_dead_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN4)
    checks = Checks(lab, monkeypatch)
    lab.tables.torn = True
    lab.goes()
    for _ in range(TORN_MAX - 1):
        assert not checks.made
        lab.looks()
    assert checks.made == [({4, 16}, {16})]


def test_a_network_that_flaps_is_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, *[TRAIN, HOME] * 20)
    now, waits = T0, []
    for _ in range(8):
        before, now = now, lab.goes(now)
        waits.append(round(now - before, 3))
    assert waits == [SETTLE, SETTLE, 2 * SETTLE, 4 * SETTLE, 8 * SETTLE, SETTLE_MAX, SETTLE_MAX, SETTLE_MAX]
    assert lab.tells(now + CALM + 1) == pytest.approx(SETTLE), "it is calm again"


def test_a_reading_that_takes_long_is_followed_by_a_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, HOME)
    lab.cost = 0.2
    lab.goes()
    assert lab.tells() == pytest.approx(SHARE * 0.2)


def test_tables_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, OSError(errno.ETIMEDOUT, "too long"), TRAIN)
    now = lab.goes()
    assert "Couldn't read the host's addresses and routes" in lab.lines[0]
    assert (lab.service.failures, lab.due) == (1, now + RETRY)
    lab.looks()
    assert lab.addresses == ("10.9.0.20", "2001:db8:9::20")


def test_former_addresses_are_released_when_no_flow_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN)
    flow = Flow(ip("192.168.7.20") + ip("203.0.113.9") + b"\x9c\x40\0\x50")
    lab.ctx.flows.insert(flow)
    lab.goes()
    services, timer = timers(lab.ctx).services, lab.service._release_timer
    due = services.deadlines[timer]
    assert due == pytest.approx(T0 + SETTLE + RELEASE)
    services.fire(timer)
    assert lab.released == [{ip("2001:db8:7::20")}]
    assert lab.ctx.neighbours.given_up == {ip("192.168.7.20")}
    lab.ctx.flows.free(flow, "both ended")
    services.fire(timer)
    assert lab.released[1:] == [{ip("192.168.7.20")}]
    assert services.deadlines[timer] is None and not lab.ctx.neighbours.given_up


def test_former_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [host(net4(2, f"10.{n}.0.20", f"10.{n}.0.1")) for n in range(FORMER_MAX + 4)]
    lab = Lab(monkeypatch, *nets, line="--config-net -4")
    now = T0
    for _ in nets:
        now = lab.goes(now)
    assert len(lab.service._tap._made.former) == FORMER_MAX  # type: ignore[union-attr]
    assert len(lab.ctx.neighbours.given_up) == FORMER_MAX
    assert set.union(*lab.released) == {ip("192.168.7.20"), *(ip(f"10.{n}.0.20") for n in range(3))}, "the oldest ones"


def test_no_right_over_the_namespace_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN, HOME, rights=False)
    lab.goes(lab.goes())
    assert lab.changed == []
    assert sum("pasta has no right to change them" in line for line in lab.lines) == 1
    assert lab.ctx.guest.addr4 == ip("192.168.7.20"), "its own frames tell where it is"


def test_steps_that_fail_in_the_namespace_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN)
    lab.problems = ["Couldn't set address 10.9.0.20/24 in namespace: No buffer space available"]
    lab.goes()
    assert lab.lines[1:] == lab.problems
    assert lab.service.failures == 1 and lab.addresses[0] == "10.9.0.20"


def test_an_interface_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN)

    def fail(*args: Any) -> Any:
        raise OSError(errno.ENODEV, "there is no interface eth0 any more")

    monkeypatch.setattr(tap_change, "change", fail)
    lab.goes()
    assert "there is no interface eth0 any more" in lab.lines[1]


def test_a_machine_finds_out_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN, line="", mode=PASST)
    lab.goes()
    assert lab.addresses == ("10.9.0.20", "2001:db8:9::20") and lab.changed == []
    assert lab.ctx.guest.addr4 == ip("192.168.7.20")
    assert lab.ctx.neighbours.given_up == {ip("192.168.7.20"), ip("2001:db8:7::20")}


def test_without_config_net_the_namespace_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN, line="")
    lab.goes()
    assert lab.addresses[0] == "10.9.0.20" and lab.changed == [] and len(lab.lines) == 1


RULE = Rule("-t 192.168.7.20/80", PROTO_TCP, False, 80, 80, 80, ip("192.168.7.20"))
LOOPBACK = Rule("-t 127.0.0.1/81", PROTO_TCP, False, 81, 81, 81, addr.LOOPBACK4)
ANY = Rule("-t 82", PROTO_TCP, False, 82, 82, 82)


def test_forwarded_ports_move_with_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, OFFLINE, WIFI, rules=(RULE, LOOPBACK, ANY))
    now = lab.goes()
    assert lab.forwards.asked == [], "it may get the address back"
    lab.goes(now)
    moved = replace(RULE, addr=ip("10.9.0.20"))
    assert lab.forwards.asked == [Delete(RULE), Add(moved)]
    assert "'-t 192.168.7.20/80' listens on 10.9.0.20 now" in lab.lines


def test_a_port_that_cannot_move_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, TRAIN, rules=(RULE,))
    lab.forwards.refused = True
    now = lab.goes()
    assert "Ports of '-t 192.168.7.20/80' do not follow: Address already in use" in lab.lines
    lab.forwards.refused = False
    lab.goes(now)
    assert list(lab.forwards.rules.values()) == [replace(RULE, addr=ip("10.9.0.20"))]


def test_start_without_tables_follows_nothing() -> None:
    ctx = make_context()
    nothing = cast(Any, None)
    start(ctx, nothing, nothing, None, nothing, nothing)
    assert ctx.stats.network is None


# The link ----------------------------------------------------------------------------------------------------------


UNKNOWN = OSError(errno.ETIMEDOUT, "netlink: no answer of the kernel arrives")


@pytest.mark.parametrize(
    ("told", "rights", "reader", "down"),
    [
        ([False, False], True, False, LINK_STEP),
        ([False, False], False, True, LINK_STEP),  # root has attached pasta
        ([True, True, True, False], True, False, 3 * LINK_STEP),
        ([True], True, False, LINK_DOWN),
        ([UNKNOWN, UNKNOWN, False], True, False, 2 * LINK_STEP),
        ([], False, False, LINK_DOWN),  # an inherited tap
    ],
)
def test_the_link_goes_down_and_up(
    monkeypatch: pytest.MonkeyPatch, told: list[bool | OSError], rights: bool, reader: bool, down: float
) -> None:
    """It is down until programs have been told; then our addresses are announced, as on any link."""
    lab = Lab(monkeypatch, TRAIN, line="--follow-link", rights=rights, reader=reader)
    assert lab.namespace
    lab.namespace.up = told
    announced: list[bool] = []
    lab.ctx.services.on_link_up.append(lambda: announced.append(True))
    lab.tells()
    lab.looks()
    assert lab.carrier == [False]
    now = elapse(lab.ctx, T0 + SETTLE, down - 0.01)
    assert lab.carrier == [False]
    elapse(lab.ctx, now, 0.05)
    assert (lab.carrier, announced) == ([False, True], [True])
    assert len(told) <= 1, "it is not up before they know"


@pytest.mark.parametrize(
    ("line", "to"),
    [("", TRAIN), ("--follow-link", HOME), ("--follow-link", OFFLINE), ("--follow-link -a 1.2.3.4 -4", TRAIN)],
)
def test_the_link_stays(monkeypatch: pytest.MonkeyPatch, line: str, to: Host) -> None:
    """Without the option, and where the guest has the address that it had."""
    lab = Lab(monkeypatch, to, line=line)
    lab.tells()
    lab.looks()
    elapse(lab.ctx, T0, 5)
    assert lab.carrier == []


def test_a_link_that_cannot_be_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interface was deleted, and is not there again yet; or there is none of ours."""
    lab = Lab(monkeypatch, TRAIN, line="--follow-link")
    lab.broken = True
    lab.tells()
    lab.looks()
    assert "Couldn't take the link down in namespace: File descriptor in bad state" in lab.lines
    assert lab.service.failures == 1
    elapse(lab.ctx, T0, 5)
    assert lab.carrier == []
