"""Addresses and routes of the tap change in place, in a model of the kernel's tables with its rules about them.

The model is that of `inet_insert_ifa`, `inet_del_ifa` and `fib_disable_ip` of the kernel, as far as they matter here.
The real kernel has its say in tests/system/test_follow.py.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.linux.netlink import NLM_F_CREATE, NLM_F_REPLACE, RTM_NEWADDR, RTM_NEWROUTE, Rtnetlink
from passt.linux.routes import RT_SCOPE_HOST, Address, Hop, Link, NsPlan, Route
from passt.linux.tap_change import RTM_DELADDR, RTM_DELROUTE, Made, change, made_by, release, told_down

MAC = bytes.fromhex("020000000005")
TAP = 5


def ip(text: str) -> bytes:
    return addr.packed(text)


@dataclass
class Kernel:
    """Stands for `Rtnetlink` and the namespace behind it. `secondary` are addresses that go with their first one."""

    name: str = "eth0"
    mac: bytes = MAC
    held: list[Address] = field(default_factory=list)
    table: list[Route] = field(default_factory=list)
    deprecated: set[bytes] = field(default_factory=set)
    fails: set[int] = field(default_factory=set)  # types of messages that are refused
    flushed: bool = False
    up: bool = True

    def link(self, index: int) -> Link:
        return next(replace(link, up=self.up) for link in self.links() if link.index == index)

    def links(self) -> tuple[Link, ...]:
        return Link(1, "lo", bytes(6), 65536, loopback=True), Link(TAP, self.name, self.mac, 65520)

    def addresses(self) -> tuple[Address, ...]:
        return tuple(self.held)

    def routes(self, v6: bool) -> tuple[Route, ...]:
        return tuple(r for r in self.table if (len(r.dst) == 16) == v6)

    def add_address(self, index: int, a: Address) -> None:
        self._check(RTM_NEWADDR)
        self.deprecated.discard(a.addr)
        if all((a.addr, a.prefix_len) != (b.addr, b.prefix_len) for b in self.held):
            self.held.append(replace(a, index=index))

    def add_route(self, index: int, route: Route) -> None:
        self._check(RTM_NEWROUTE)
        if any(self._slot(r) == self._slot(route) for r in self.table):
            raise FileExistsError(errno.EEXIST, "there is one")
        self._put(route)

    def _put(self, route: Route) -> None:
        self.table.append(replace(route, hops=tuple(replace(h, index=TAP) for h in route.hops)))

    def do(self, message: Any, kind: int, flags: int = 0) -> None:
        self._check(kind)
        if kind in (RTM_DELADDR, RTM_NEWADDR):
            address, prefix_len = ip(dict(message["attrs"])["IFA_LOCAL"]), message["prefixlen"]
            if kind == RTM_NEWADDR:
                assert flags == NLM_F_REPLACE and dict(message["attrs"])["IFA_CACHEINFO"]["ifa_preferred"] == 0
                self.deprecated.add(address)
            else:
                self._remove(address, prefix_len)
            return
        dst = dict(message["attrs"]).get("RTA_DST")
        packed = ip(dst) if dst else bytes(16 if message["family"] == 10 else 4)
        metric = dict(message["attrs"]).get("RTA_PRIORITY", 0)
        slot = packed, message["dst_len"], metric or (1024 if len(packed) == 16 else 0), message["tos"]
        there = [r for r in self.table if self._slot(r) == slot]
        if kind == RTM_DELROUTE and not there:
            raise OSError(errno.ESRCH, "no such route")
        self.table = [r for r in self.table if r not in there]
        if kind == RTM_NEWROUTE:
            assert flags == NLM_F_CREATE | NLM_F_REPLACE
            gateway = dict(message["attrs"]).get("RTA_GATEWAY")
            self._put(Route(packed, message["dst_len"], (Hop(TAP, ip(gateway) if gateway else None),), metric))

    def _remove(self, address: bytes, prefix_len: int) -> None:
        found = [a for a in self.held if (a.addr, a.prefix_len) == (address, prefix_len)]
        if not found:
            raise OSError(errno.EADDRNOTAVAIL, "no such address")
        first = next(a for a in self.held if self._same_subnet(a, found[0]))
        gone = [a for a in self.held if self._same_subnet(a, found[0])] if first is found[0] else found
        self.held = [a for a in self.held if a not in gone]
        if len(address) == 4 and not any(len(a.addr) == 4 for a in self.held):
            self.flushed = True

    @staticmethod
    def _same_subnet(a: Address, b: Address) -> bool:
        """Whether one is secondary to the other."""
        if a is b:
            return True
        alike = (a.prefix_len, len(a.addr)) == (b.prefix_len, len(b.addr)) == (b.prefix_len, 4)
        return alike and addr.in_subnet(a.addr, b.addr, b.prefix_len)

    @staticmethod
    def _slot(route: Route) -> tuple[object, ...]:
        metric = route.metric or (1024 if len(route.dst) == 16 else 0)
        return route.dst, route.prefix_len, metric, route.tos

    def _check(self, kind: int) -> None:
        if kind in self.fails:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    def text(self) -> list[str]:
        """Addresses in use, "(former)" and "(deprecated)" with those that stay for flows."""
        marks = {True: " (former)", False: ""}
        found = []
        for a in self.held:
            mark = " (deprecated)" if a.addr in self.deprecated else marks[a.scope == RT_SCOPE_HOST]
            found.append(f"{addr.text(a.addr)}/{a.prefix_len}{mark}")
        return found

    def defaults(self) -> list[str]:
        return sorted(str(r) for r in self.table if r.default)


def plan(*addresses: str, gateways: tuple[str, ...] = ()) -> NsPlan:
    """Of addresses ADDRESS/LENGTH on the template, and default routes."""
    own = []
    for text in addresses:
        address, _, length = text.partition("/")
        own.append(Address(2, ip(address), int(length)))
    through = tuple(Route(bytes(len(ip(g))), 0, (Hop(2, ip(g)),)) for g in gateways)
    return NsPlan("eth0", configure=True, addresses=tuple(own), routes=through)


class Tap:
    """The interface, set up and changed."""

    def __init__(self, first: NsPlan) -> None:
        self.kernel = Kernel()
        for a in first.addresses:
            self.kernel.add_address(TAP, a)
        for route in first.routes:
            self.kernel.add_route(TAP, route)
        self.made = made_by(first)

    def change(self, to: NsPlan) -> list[str]:
        self.made, problems = change(cast(Rtnetlink, self.kernel), "eth0", MAC, self.made, to)
        assert not self.kernel.flushed, "the kernel has removed the routes of others"
        return problems


HOME = plan("192.168.7.20/24", "2001:db8:7::20/64", gateways=("192.168.7.1", "fe80::7"))
TRAIN = plan("10.9.0.20/16", "2001:db8:9::20/64", gateways=("10.9.0.1", "fe80::9"))
TUNNEL = plan("10.8.0.2/32", gateways=("192.168.7.1",))


@pytest.mark.parametrize(
    ("to", "addresses", "defaults"),
    [
        (HOME, ["192.168.7.20/24", "2001:db8:7::20/64"], ["default via 192.168.7.1", "default via fe80::7"]),
        (
            TRAIN,
            ["2001:db8:7::20/64 (deprecated)", "192.168.7.20/32 (former)", "10.9.0.20/16", "2001:db8:9::20/64"],
            ["default via 10.9.0.1", "default via fe80::9"],
        ),
        (
            TUNNEL,
            ["2001:db8:7::20/64 (deprecated)", "192.168.7.20/32 (former)", "10.8.0.2/32"],
            ["default via 192.168.7.1"],
        ),
        (plan("192.168.7.20/16"), ["2001:db8:7::20/64 (deprecated)", "192.168.7.20/16"], []),
        (
            plan("192.168.7.99/24", "2001:db8:7::20/64", gateways=("192.168.7.1", "fe80::7")),
            ["2001:db8:7::20/64", "192.168.7.20/32 (former)", "192.168.7.99/24"],
            ["default via 192.168.7.1", "default via fe80::7"],
        ),
    ],
)  # fmt: skip
def test_change(to: NsPlan, addresses: list[str], defaults: list[str]) -> None:
    tap = Tap(HOME)
    assert tap.change(to) == []
    assert tap.kernel.text() == addresses
    assert tap.kernel.defaults() == defaults


def test_there_and_back() -> None:
    tap = Tap(HOME)
    for to in (TRAIN, TUNNEL, HOME):
        assert tap.change(to) == []
    assert [t for t in tap.kernel.text() if "(" not in t] == ["2001:db8:7::20/64", "192.168.7.20/24"]
    assert tap.made.former == (ip("10.9.0.20"), ip("2001:db8:9::20"), ip("10.8.0.2"))
    assert "10.8.0.2/32 (former)" in tap.kernel.text()
    assert tap.change(TUNNEL) == []
    assert "10.8.0.2/32" in tap.kernel.text(), "it is in use again"


def test_release() -> None:
    tap = Tap(HOME)
    tap.change(TRAIN)
    nl = cast(Rtnetlink, tap.kernel)
    tap.made = release(nl, "eth0", MAC, tap.made, [ip("192.168.7.20"), ip("10.9.0.20")])
    assert tap.kernel.text() == ["2001:db8:7::20/64 (deprecated)", "10.9.0.20/16", "2001:db8:9::20/64"]
    assert tap.made.former == (ip("2001:db8:7::20"),)
    tap.made = release(nl, "eth0", MAC, tap.made, [ip("2001:db8:7::20")])
    assert tap.kernel.text() == ["10.9.0.20/16", "2001:db8:9::20/64"]
    assert tap.made.former == ()


def test_what_others_have_made_stays() -> None:
    tap = Tap(HOME)
    theirs = Route(ip("203.0.113.0"), 24, (Hop(TAP, ip("192.168.7.9")),))
    tap.kernel.held.append(Address(TAP, ip("192.168.7.77"), 24))  # second to ours
    tap.kernel.table.append(theirs)
    assert tap.change(TRAIN) == []
    assert "192.168.7.77/24" in tap.kernel.text()
    assert theirs in tap.kernel.table


def test_what_the_owner_has_removed_is_not_made_again() -> None:
    tap = Tap(HOME)
    tap.kernel._remove(ip("2001:db8:7::20"), 64)
    tap.kernel.table = [r for r in tap.kernel.table if len(r.dst) == 4]
    other = plan("10.9.0.20/16", "2001:db8:7::20/64", gateways=("10.9.0.1", "fe80::7"))
    assert tap.change(other) == []
    assert tap.kernel.text() == ["192.168.7.20/32 (former)", "10.9.0.20/16"]
    assert tap.kernel.defaults() == ["default via 10.9.0.1"]


def test_a_default_route_of_the_owner_in_place_of_ours_stays() -> None:
    tap = Tap(HOME)
    theirs = Route(bytes(4), 0, (Hop(TAP, ip("192.168.7.9")), Hop(7, ip("192.0.2.1"))))
    tap.kernel.table = [theirs]
    assert tap.change(TRAIN) == []
    assert theirs in tap.kernel.table


def test_a_renamed_interface_is_known_by_its_mac() -> None:
    tap = Tap(HOME)
    tap.kernel.name = "lan"
    assert tap.change(TRAIN) == []
    tap.kernel.mac = bytes(6)
    with pytest.raises(OSError, match="no interface eth0"):
        tap.change(HOME)


def test_whether_programs_know_that_the_link_is_down() -> None:
    tap = Tap(HOME)
    assert not told_down(cast(Any, tap.kernel), "eth0", MAC)
    tap.kernel.up = False
    assert told_down(cast(Any, tap.kernel), "eth0", MAC)
    with pytest.raises(OSError, match="no interface eth7"):
        told_down(cast(Any, tap.kernel), "eth7", MAC[::-1])


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            RTM_NEWADDR,
            ["Couldn't keep 192.168.7.20", "Couldn't deprecate 2001:db8:7::20/64", "Couldn't set address 10.9.0.20/16",
             "Couldn't set address 2001:db8:9::20/64"],
        ),
        (RTM_NEWROUTE, ["Couldn't set route default via 10.9.0.1", "Couldn't set route default via fe80::9"]),
    ],
)  # fmt: skip
def test_a_step_that_fails_is_told(kind: int, lines: list[str]) -> None:
    tap = Tap(HOME)
    tap.kernel.fails = {kind}
    problems = tap.change(TRAIN)
    assert [line.split(" in namespace: ")[0] for line in problems][: len(lines)] == lines
    assert {line.split(" in namespace: ")[1] for line in problems} == {"Operation not permitted"}


def test_nothing_is_made_where_nothing_is_configured() -> None:
    assert made_by(replace(HOME, configure=False)) == Made()
    assert made_by(HOME).routes[0].hops[0].index == 0, "the host's indices mean nothing there"


PLANS = st.sampled_from(
    [HOME, TRAIN, TUNNEL, plan("192.168.7.20/16"), plan("192.168.7.99/24", gateways=("192.168.7.1",)), plan()]
)


@given(st.lists(PLANS, min_size=1, max_size=8))
def test_any_journey(journey: list[NsPlan]) -> None:
    """The tap has the addresses and default routes of the last plan, and what another has added."""
    tap = Tap(HOME)
    tap.kernel.held.append(Address(TAP, ip("192.168.7.77"), 24))
    for to in journey:
        assert tap.change(to) == []
        wanted = {(a.addr, a.prefix_len) for a in to.addresses} | {(ip("192.168.7.77"), 24)}
        used = {
            (a.addr, a.prefix_len)
            for a in tap.kernel.held
            if a.scope != RT_SCOPE_HOST and a.addr not in tap.kernel.deprecated
        }
        assert used == wanted
        assert tap.kernel.defaults() == sorted(str(r) for r in to.routes)
        assert tap.made.former == tuple(dict.fromkeys(tap.made.former))
    tap.made = release(cast(Rtnetlink, tap.kernel), "eth0", MAC, tap.made, tap.made.former)
    assert not [text for text in tap.kernel.text() if "(" in text]
