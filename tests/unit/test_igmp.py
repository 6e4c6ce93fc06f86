"""Membership: what is followed for which reports, until when, and how much of it; the queries."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import ICMPv6MLQuery2, IPv6
from scapy.layers.l2 import Ether

from passt import addr
from passt.addr import packed
from passt.flow.context import Context
from passt.igmp import (
    AGAIN,
    GROUPS_MAX,
    HOSTS_MAX,
    JOINS_PER_SECOND,
    MEMBERSHIP_INTERVAL,
    QUERY_INTERVAL,
    SOURCES_MAX,
    Igmp,
    Member,
    followed,
    wanted,
)
from passt.linux.multicast import Sources
from passt.wire import igmp
from passt.wire.cursor import Malformed
from passt.wire.igmp import (
    ALLOW,
    BLOCK,
    DONE6_V1,
    IS_EXCLUDE,
    IS_INCLUDE,
    LEAVE_V2,
    REPORT6_V1,
    REPORT_V1,
    REPORT_V2,
    TO_EXCLUDE,
    TO_INCLUDE,
    Query,
    Record,
    Report,
    Single,
)

from .support import (
    GATEWAY4,
    GUEST4,
    GUEST_LL,
    GUEST_MAC,
    IP4,
    IP6,
    OUR_MAC,
    T0,
    elapse,
    link,
    make_context,
    reconfigure,
    stage_faults,
    timers,
)

MDNS4, SSDP4, OTHER4 = packed("224.0.0.251"), packed("239.255.255.250"), packed("239.1.2.3")
MDNS6, SSDP6 = packed("ff02::fb"), packed("ff05::c")
ONE, TWO, THREE = packed("192.0.2.9"), packed("192.0.2.10"), packed("192.0.2.11")
SECOND_MAC = bytes.fromhex("525400654321")
ANY: Sources = None


class FakeGroups:
    """The groups that the host is to join, and the number of calls."""

    def __init__(self) -> None:
        self.joined: dict[bytes, Sources] = {}
        self.calls: Counter[str] = Counter()
        self.fails = False

    def follow(self, group: bytes, sources: Sources, now: float) -> None:
        self.calls["follow"] += 1
        if self.fails:
            raise RuntimeError("staged")
        self.joined[group] = sources

    def leave(self, group: bytes) -> None:
        self.calls["leave"] += 1
        del self.joined[group]

    def leave_all(self) -> None:
        self.joined.clear()


class Lab:
    """A querier, with a link."""

    def __init__(self, **config: Any) -> None:
        ip4, ip6 = config.pop("ip4", IP4), config.pop("ip6", IP6)
        ip4 = ip4 and replace(ip4, group_index=config.pop("index", 7))
        ip6 = ip6 and replace(ip6, group_index=7)
        self.ctx: Context = make_context(ip4=ip4, ip6=ip6, **config)
        self.groups = FakeGroups()
        self.igmp = Igmp(self.ctx, self.groups)  # type: ignore[arg-type]
        self.now = T0

    def says(self, message: Single | Report | Query, mac: bytes = GUEST_MAC, hops: int = 1) -> None:
        v6 = (message.size if isinstance(message, Report) else len(message.group)) == 16
        raw = memoryview(message.emit())
        self.igmp.tap_handler(mac, GUEST_LL if v6 else GUEST4, addr.ANY4, raw, self.now, hops)

    def reports(self, kind: int, group: bytes, *sources: bytes, mac: bytes = GUEST_MAC) -> None:
        self.says(Report(len(group), (Record(kind, group, sources),)), mac)

    @property
    def joined(self) -> dict[bytes, Sources]:
        return self.groups.joined

    def queries(self) -> list[Any]:
        return [Ether(frame) for frame in link(self.ctx).take()]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("224.0.0.251", True),
        ("239.255.255.250", True),
        ("224.0.0.1", False),
        ("224.0.0.22", False),
        ("192.0.2.1", False),
        ("255.255.255.255", False),
        ("ff02::fb", True),
        ("ff05::c", True),
        ("ff3e::8000:1", True),
        ("ff02::1", False),
        ("ff02::16", False),
        ("ff02::1:2", False),
        ("ff02::1:ff00:2", False),
        ("ff01::fb", False),
        ("ff00::fb", False),
        ("2001:db8::1", False),
    ],
)
def test_groups_that_are_followed(group: str, expected: bool) -> None:
    assert followed(packed(group)) is expected


@pytest.mark.parametrize(
    ("join", "leave"),
    [
        (Single(REPORT_V1, MDNS4), None),
        (Single(REPORT_V2, MDNS4), Single(LEAVE_V2, MDNS4)),
        (Report(4, (Record(TO_EXCLUDE, MDNS4),)), Report(4, (Record(TO_INCLUDE, MDNS4),))),
        (Report(4, (Record(IS_EXCLUDE, MDNS4),)), Report(4, (Record(TO_INCLUDE, MDNS4),))),
        (Single(REPORT6_V1, MDNS6), Single(DONE6_V1, MDNS6)),
        (Report(16, (Record(TO_EXCLUDE, MDNS6),)), Report(16, (Record(TO_INCLUDE, MDNS6),))),
    ],
)
def test_join_and_leave_at_once(join: Single | Report, leave: Single | Report | None) -> None:
    lab = Lab()
    lab.says(join)
    group = join.group if isinstance(join, Single) else join.records[0].group
    assert lab.joined == {group: ANY}
    if leave is not None:
        lab.says(leave)
        assert lab.joined == {}


def test_sources_of_version_3() -> None:
    lab = Lab()
    lab.reports(ALLOW, OTHER4, ONE)
    assert lab.joined == {OTHER4: {ONE}}
    lab.reports(ALLOW, OTHER4, TWO)
    assert lab.joined == {OTHER4: {ONE, TWO}}
    lab.reports(BLOCK, OTHER4, ONE)
    assert lab.joined == {OTHER4: {TWO}}
    lab.reports(IS_INCLUDE, OTHER4, TWO, THREE)
    assert lab.joined == {OTHER4: {TWO, THREE}}
    lab.reports(TO_INCLUDE, OTHER4, ONE)
    assert lab.joined == {OTHER4: {ONE}}
    lab.reports(TO_EXCLUDE, OTHER4, TWO)
    assert lab.joined == {OTHER4: ANY}, "what is excluded is not followed"
    lab.reports(BLOCK, OTHER4, ONE)
    assert lab.joined == {OTHER4: ANY}
    lab.reports(ALLOW, OTHER4, TWO)
    assert lab.joined == {OTHER4: ANY}, "it is not blocked any more"
    lab.reports(TO_INCLUDE, OTHER4, ONE)
    assert lab.joined == {OTHER4: {ONE}}
    lab.reports(BLOCK, OTHER4, ONE)
    assert lab.joined == {}


def test_a_long_list_of_sources_is_any_source() -> None:
    lab = Lab()
    sources = [packed(f"192.0.2.{i}") for i in range(SOURCES_MAX + 1)]
    lab.reports(ALLOW, OTHER4, *sources[:-1])
    assert lab.joined == {OTHER4: set(sources[:-1])}
    lab.reports(ALLOW, OTHER4, sources[-1])
    assert lab.joined == {OTHER4: ANY}


def test_hosts_behind_one_link() -> None:
    """Each has its own membership."""
    lab = Lab()
    lab.reports(ALLOW, OTHER4, ONE)
    lab.reports(ALLOW, OTHER4, TWO, mac=SECOND_MAC)
    assert lab.joined == {OTHER4: {ONE, TWO}}
    lab.reports(TO_EXCLUDE, OTHER4, mac=SECOND_MAC)
    assert lab.joined == {OTHER4: ANY}
    lab.reports(TO_INCLUDE, OTHER4, mac=SECOND_MAC)
    assert lab.joined == {OTHER4: {ONE}}
    lab.reports(TO_INCLUDE, OTHER4)
    assert lab.joined == {}


@pytest.mark.parametrize(("report", "leave", "group"), [
    (REPORT_V2, LEAVE_V2, MDNS4), (REPORT6_V1, DONE6_V1, MDNS6),
])  # fmt: skip
def test_others_are_asked_when_a_host_leaves(report: int, leave: int, group: bytes) -> None:
    """They had not reported, since this one had (RFC 2236, 3; RFC 2710, 4)."""
    lab = Lab()
    lab.says(Single(report, group))
    lab.says(Single(leave, group))
    (query,) = lab.queries()
    layer = query[IP] if len(group) == 4 else query[IPv6]
    assert layer.dst == addr.text(group)
    assert bytes(group) in bytes(layer.payload)
    lab.says(Single(report, group), SECOND_MAC)
    assert lab.joined == {group: ANY}


def test_what_is_not_reported_ends() -> None:
    lab = Lab()
    lab.reports(TO_EXCLUDE, MDNS4)
    lab.reports(ALLOW, OTHER4, ONE, TWO)
    lab.now = elapse(lab.ctx, lab.now, 2 * QUERY_INTERVAL - 1)
    lab.reports(IS_EXCLUDE, MDNS4)
    lab.reports(IS_INCLUDE, OTHER4, ONE)
    lab.now = elapse(lab.ctx, lab.now, QUERY_INTERVAL + 1)
    assert lab.joined == {MDNS4: ANY, OTHER4: {ONE}}
    lab.now = elapse(lab.ctx, lab.now, MEMBERSHIP_INTERVAL + QUERY_INTERVAL)
    assert lab.joined == {}
    assert timers(lab.ctx).services.deadlines[lab.igmp._timer] is None, "nothing is asked for"


def test_general_queries_while_there_are_members() -> None:
    lab = Lab()
    assert elapse(lab.ctx, lab.now, 1000) and lab.queries() == []
    lab.reports(TO_EXCLUDE, MDNS4)
    lab.now = elapse(lab.ctx, lab.now, QUERY_INTERVAL)
    four, six = lab.queries()
    assert (four.dst, four[IP].dst, four[IP].src, four[IP].ttl) == (
        "01:00:5e:00:00:01", "224.0.0.1", addr.text(GATEWAY4), 1,
    )  # fmt: skip
    assert igmp.parse(bytes(four[IP].payload), 4) == Query(addr.ANY4, 100, 2, QUERY_INTERVAL)
    assert (six.dst, six[IPv6].dst, six[IPv6].hlim) == ("33:33:00:00:00:01", "ff02::1", 1)
    assert six[ICMPv6MLQuery2].mrd == 10_000
    assert four.src == addr.mac_text(OUR_MAC)


def test_the_link_comes_up() -> None:
    """The guest may have joined before."""
    lab = Lab()
    for callback in lab.ctx.services.on_link_up:
        callback()
    assert [frame.type for frame in lab.queries()] == [0x0800, 0x86DD]
    assert timers(lab.ctx).services.deadlines == [None], "nothing that would have to end with a guest"


def test_the_guest_goes() -> None:
    lab = Lab()
    lab.reports(TO_EXCLUDE, MDNS4)
    for callback in lab.ctx.services.on_forget:
        callback()
    assert lab.joined == {}
    assert elapse(lab.ctx, lab.now, 1000) and lab.queries() == []
    lab.reports(TO_EXCLUDE, MDNS4)
    assert lab.joined == {MDNS4: ANY}, "the next one may join"


@pytest.mark.parametrize("config", [{"no_multicast": True}, {"no_udp": True}, {"ip4": None}, {"index": 0}])
def test_off(config: dict[str, Any]) -> None:
    lab = Lab(**config)
    lab.reports(TO_EXCLUDE, MDNS4)
    assert lab.joined == {}
    assert lab.ctx.drops == {"multicast: disabled": 1}
    for callback in lab.ctx.services.on_link_up:
        callback()
    asked = [frame.type for frame in lab.queries()]
    assert asked == ([0x86DD] if "ip4" in config or "index" in config else [])


def test_turned_off_while_it_runs() -> None:
    lab = Lab()
    lab.reports(TO_EXCLUDE, MDNS4)
    reconfigure(lab.ctx, no_multicast=True)
    lab.now = elapse(lab.ctx, lab.now, 3 * MEMBERSHIP_INTERVAL)
    assert lab.queries() == []
    assert lab.joined == {}


def test_queries_of_others_are_ignored() -> None:
    lab = Lab()
    lab.says(Query(addr.ANY4, 100))
    assert (lab.joined, lab.queries(), lab.ctx.drops) == ({}, [], {})


@pytest.mark.parametrize("hops", [0, 2, 255])
def test_only_from_this_link(hops: int) -> None:
    with pytest.raises(Malformed, match="hop limit"):
        Lab().says(Single(REPORT_V2, MDNS4), hops=hops)


def test_source_of_mld() -> None:
    lab = Lab()
    raw = memoryview(Single(REPORT6_V1, MDNS6).emit())
    with pytest.raises(Malformed, match="source address"):
        lab.igmp.tap_handler(GUEST_MAC, packed("2001:db8::2"), MDNS6, raw, T0, 1)
    lab.igmp.tap_handler(GUEST_MAC, addr.ANY6, MDNS6, raw, T0, 1)
    assert lab.joined == {MDNS6: ANY}, "an address may be tentative (RFC 3810, 5.2.13)"


# Bounds --------------------------------------------------------------------------------------------------------------


def group(i: int) -> bytes:
    return b"\xef\1" + i.to_bytes(2, "big")


def test_groups_and_joins_are_bounded() -> None:
    """A guest that joins thousands of groups."""
    lab = Lab()
    for i in range(4000):
        lab.now = T0 + i / 100
        lab.reports(TO_EXCLUDE, group(i))
    assert len(lab.joined) == GROUPS_MAX
    drops = lab.ctx.drops
    assert drops["multicast: joins too fast"] + drops["multicast: too many groups"] == 4000 - GROUPS_MAX
    assert lab.groups.calls["follow"] == GROUPS_MAX
    lab.reports(TO_INCLUDE, next(iter(lab.joined)))
    lab.now += 1
    lab.reports(TO_EXCLUDE, SSDP4)
    assert lab.joined[SSDP4] is ANY, "there is room again"


def test_joins_in_a_second() -> None:
    lab = Lab()
    for i in range(100):
        lab.reports(TO_EXCLUDE, group(i))
    assert len(lab.joined) == JOINS_PER_SECOND
    lab.now = elapse(lab.ctx, lab.now, AGAIN)
    assert [frame.type for frame in lab.queries()] == [0x0800, 0x86DD], "it is asked for what was not followed"
    lab.reports(IS_EXCLUDE, group(99))
    assert len(lab.joined) == JOINS_PER_SECOND + 1
    lab.now = elapse(lab.ctx, lab.now, QUERY_INTERVAL - 1)
    assert lab.queries() == []


def test_coming_and_going_is_bounded() -> None:
    """Each change is told to the host's network."""
    lab = Lab()
    for _ in range(1000):
        lab.reports(TO_EXCLUDE, MDNS4)
        lab.reports(TO_INCLUDE, MDNS4)
        lab.reports(ALLOW, MDNS4, ONE)
        lab.reports(BLOCK, MDNS4, ONE)
        lab.says(Single(LEAVE_V2, MDNS4))
    assert lab.groups.calls["follow"] <= JOINS_PER_SECOND
    assert lab.groups.calls["leave"] <= JOINS_PER_SECOND
    assert len(lab.queries()) <= JOINS_PER_SECOND


def test_reports_again_are_no_change() -> None:
    lab = Lab()
    for _ in range(100):
        lab.reports(IS_EXCLUDE, MDNS4)
    assert lab.ctx.drops == {}
    assert lab.joined == {MDNS4: ANY}


def test_hosts_of_a_group_are_bounded() -> None:
    lab = Lab()
    for i in range(1000):
        lab.reports(TO_EXCLUDE, MDNS4, mac=b"\2\0\0\0" + i.to_bytes(2, "big"))
    assert len(lab.igmp._members[MDNS4]) == HOSTS_MAX
    assert lab.ctx.drops["multicast: too many hosts in a group"] == 1000 - HOSTS_MAX


def test_a_fault_is_that_of_one_group() -> None:
    lab = Lab()
    stage_faults(lab.ctx)
    lab.groups.fails = True
    lab.says(Report(4, (Record(TO_EXCLUDE, MDNS4), Record(TO_EXCLUDE, SSDP4))))
    assert (lab.groups.calls["follow"], lab.ctx.drops["fault"]) == (2, 2)
    lab.groups.fails = False
    lab.reports(IS_EXCLUDE, MDNS4)
    assert lab.joined == {MDNS4: ANY}
    lab.groups.fails = True
    lab.now = elapse(lab.ctx, lab.now, QUERY_INTERVAL)
    assert lab.ctx.drops["fault"] == 4, "each group has its turn"
    assert len(lab.queries()) == 2


# Against what a host with a kernel's state would get -----------------------------------------------------------------

KINDS = st.sampled_from([IS_INCLUDE, IS_EXCLUDE, TO_INCLUDE, TO_EXCLUDE, ALLOW, BLOCK])
SETS = st.frozensets(st.sampled_from([ONE, TWO, THREE]))


@given(st.lists(st.tuples(KINDS, SETS), max_size=20))
def test_nothing_that_is_wanted_is_missing(steps: list[tuple[int, frozenset[bytes]]]) -> None:
    """Each report tells the reception state of a host (RFC 3376, 5.1): at least its sources are followed."""
    member, state = Member(), (False, frozenset[bytes]())  # exclude mode, list
    for kind, sources in steps:
        excluding, listed = state
        if kind in (IS_EXCLUDE, TO_EXCLUDE):
            state = True, sources
        elif kind == TO_INCLUDE:
            state = False, sources
        elif kind == IS_INCLUDE:
            state = False, sources | (frozenset() if excluding else listed)
        elif kind == ALLOW:
            state = excluding, listed - sources if excluding else listed | sources
        else:
            state = excluding, listed | sources if excluding else listed - sources
        member.apply(Record(kind, MDNS4, tuple(sources)), T0)
        followed_sources = wanted({} if member.gone else {GUEST_MAC: member})
        assert followed_sources == (ANY if state[0] else state[1])
        assert member.gone == (not state[0] and not state[1])
