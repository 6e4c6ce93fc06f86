"""Neighbour discovery: solicitations answered, the router advertised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6NDOptSrcLLAddr, IPv6

from passt import addr
from passt.addr import ANY6, packed
from passt.flow.context import Context
from passt.ndp import GONE_MAX, GONE_TIME, RA_INTERVAL, Ndp, advertises, ignore, router_advertisement
from passt.wire import ndp
from passt.wire.cursor import Malformed
from passt.wire.ndp import (
    Dnssl,
    LinkAddress,
    Mtu,
    NeighbourAdvertisement,
    NeighbourSolicitation,
    Prefix,
    Rdnss,
    RouterAdvertisement,
    RouterSolicitation,
)

from .oracle import dissect, recomputed
from .support import (
    CONFIG,
    GATEWAY6,
    GUEST6,
    GUEST_LL,
    GUEST_MAC,
    IP6,
    OUR_MAC,
    T0,
    elapse,
    link,
    make_context,
    reconfigure,
    timers,
)

ALL_ROUTERS = packed("ff02::2")
SOURCE = LinkAddress(LinkAddress.SOURCE, GUEST_MAC)
DNS = packed("2001:db8::53")
MAPPED = packed("2001:db8::8")
OTHER_MAC = bytes.fromhex("525400999999")


def parts(frame: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Destination MAC, source, destination and ICMPv6 message of a frame that scapy finds sound."""
    assert frame == recomputed(frame)
    dissect(frame)
    assert frame[6:12] == OUR_MAC
    assert frame[21] == 255  # hop limit, or the guest ignores it (RFC 4861, 6.1.2 and 7.1.2)
    return frame[:6], frame[22:38], frame[38:54], frame[54:]


def hand_over(ctx: Context, src: bytes, dst: bytes, message: bytes, hops: int = 255) -> None:
    """A message of the guest, to a service that is there or is made."""
    taken = ctx.services.icmp6.get(ndp.NEIGHBOUR_SOLICITATION)
    handler = taken.handler if taken else Ndp(ctx).tap_handler
    handler(GUEST_MAC, src, dst, memoryview(message), T0, hops)


def solicit(ctx: Context, target: bytes, src: bytes = GUEST_LL) -> None:
    dst = target if any(src) else packed("ff02::1:ff00:0")[:13] + target[13:]
    hand_over(ctx, src, dst, NeighbourSolicitation(target, (SOURCE,) if any(src) else ()).emit())


def ask_for_router(ctx: Context, src: bytes = GUEST_LL) -> None:
    hand_over(ctx, src, ALL_ROUTERS, RouterSolicitation((SOURCE,) if any(src) else ()).emit())


# Neighbours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [GATEWAY6, packed("2001:db8::99"), GUEST6])
@pytest.mark.parametrize("src", [GUEST_LL, GUEST6])
def test_any_neighbour_is_us(ctx: Context, target: bytes, src: bytes) -> None:
    solicit(ctx, target, src)
    dst_mac, source, destination, message = parts(link(ctx).take_one())
    assert (dst_mac, source, destination) == (GUEST_MAC, GATEWAY6, src)
    flags = NeighbourAdvertisement.ROUTER | NeighbourAdvertisement.SOLICITED
    if target == GATEWAY6:  # for others we are a proxy, which must not override them (RFC 4861, 7.2.4)
        flags |= NeighbourAdvertisement.OVERRIDE
    ours = LinkAddress(LinkAddress.TARGET, OUR_MAC)
    assert NeighbourAdvertisement.parse(message) == NeighbourAdvertisement(flags, target, (ours,))


@pytest.mark.parametrize("target", [GUEST6, GUEST_LL, packed("2001:db8::99"), packed("fe80::99"), DNS, MAPPED])
def test_probe_for_a_free_address(ctx: Context, target: bytes) -> None:
    solicit(ctx, target, ANY6)
    assert link(ctx).take() == []
    guest = ctx.guest
    assert target in (guest.addr6, guest.addr6_ll) or target in (DNS, MAPPED), "it is going to be the guest's"


@pytest.mark.parametrize("target", [GATEWAY6, DNS, MAPPED, packed("fe80::2")])
def test_probe_for_an_address_of_ours(target: bytes) -> None:
    """All nodes are told, since the guest has no address yet to answer to (RFC 4861, 7.2.4)."""
    ip6 = replace(IP6, dns=(DNS,), map_guest_addr=MAPPED, our_ll=packed("fe80::2"))
    ctx = make_context(ip6=ip6)
    solicit(ctx, target, ANY6)
    dst_mac, source, destination, message = parts(link(ctx).take_one())
    assert (dst_mac, source, destination) == (bytes.fromhex("333300000001"), ip6.our_ll, addr.ALL_NODES6)
    flags = NeighbourAdvertisement.ROUTER | NeighbourAdvertisement.OVERRIDE
    ours = LinkAddress(LinkAddress.TARGET, OUR_MAC)
    assert NeighbourAdvertisement.parse(message) == NeighbourAdvertisement(flags, target, (ours,))


def test_a_machine_beside_the_one_that_asks_answers_itself(ctx: Context) -> None:
    other = packed("2001:db8:1::77")
    ctx.neighbours.sender(OTHER_MAC)
    ctx.neighbours.learn(other, OTHER_MAC)
    solicit(ctx, other)
    assert link(ctx).take() == []
    ctx.neighbours.learn(other, GUEST_MAC)
    solicit(ctx, other)
    assert len(link(ctx).take()) == 1


@pytest.mark.parametrize("dst", [GATEWAY6, addr.ALL_NODES6, packed("ff02::1:ff00:2")])
def test_probe_that_goes_elsewhere(ctx: Context, dst: bytes) -> None:
    """RFC 4861, 7.1.1: without a source it goes to the solicited-node address of its target."""
    with pytest.raises(Malformed, match="solicited-node"):
        hand_over(ctx, ANY6, dst, NeighbourSolicitation(GATEWAY6).emit())
    assert link(ctx).take() == []


def test_ignore() -> None:
    assert not ignore(GUEST_LL, GUEST6, CONFIG)
    assert ignore(ANY6, GUEST6, CONFIG)
    assert not ignore(ANY6, GATEWAY6, CONFIG)
    for target in (GUEST6, GATEWAY6):
        assert ignore(GUEST_LL, target, replace(CONFIG, no_ndp=True))
        assert ignore(GUEST_LL, target, replace(CONFIG, ip6=None))
        assert not ignore(GUEST_LL, target, replace(CONFIG, no_ra=True))


def test_options_that_a_solicitation_does_not_have(ctx: Context) -> None:
    """They are ignored, whatever they hold (RFC 4861, 6.1.1 and 7.1.1)."""
    lies = bytes.fromhex("1f02 0000 ffffffff 4000000000000000 0301 40c0ffffffff")
    hand_over(ctx, GUEST_LL, GATEWAY6, NeighbourSolicitation(GATEWAY6, (SOURCE,)).emit() + lies)
    assert len(link(ctx).take()) == 1
    hand_over(ctx, GUEST_LL, ALL_ROUTERS, RouterSolicitation((SOURCE,)).emit() + lies)
    assert len(link(ctx).take()) == 1


def test_no_icmp_is_about_echo_only() -> None:
    """As the manual of the original has it; its code drops neighbour discovery as well."""
    ctx = make_context(no_icmp=True)
    solicit(ctx, GATEWAY6)
    ask_for_router(ctx)
    assert len(link(ctx).take()) == 2


def test_no_ra_leaves_neighbours() -> None:
    ctx = make_context(no_ra=True)
    solicit(ctx, GATEWAY6)
    assert len(link(ctx).take()) == 1
    ask_for_router(ctx)
    assert link(ctx).take() == []


@pytest.mark.parametrize("change", [{"no_ndp": True}, {"ip6": None}])
def test_all_off(change: dict[str, Any]) -> None:
    ctx = make_context(**change)
    service = Ndp(ctx)
    solicit(ctx, GATEWAY6)
    ask_for_router(ctx)
    service.start(T0)
    assert link(ctx).take() == []
    assert timers(ctx).services.deadlines == []


@pytest.mark.parametrize("kind", [ndp.ROUTER_ADVERTISEMENT, ndp.NEIGHBOUR_ADVERTISEMENT, ndp.REDIRECT])
def test_others_are_ignored(ctx: Context, kind: int) -> None:
    hand_over(ctx, GUEST_LL, GATEWAY6, bytes((kind,)) + bytes(39))
    assert link(ctx).take() == []


@pytest.mark.parametrize("message", [NeighbourSolicitation(GATEWAY6, (SOURCE,)), RouterSolicitation((SOURCE,))])
def test_no_link_address_without_source(ctx: Context, message: NeighbourSolicitation | RouterSolicitation) -> None:
    with pytest.raises(Malformed, match="without source"):
        hand_over(ctx, ANY6, ALL_ROUTERS, message.emit())
    assert link(ctx).take() == []


# The router --------------------------------------------------------------------------------------------------------


def test_router_advertisement(ctx: Context) -> None:
    ask_for_router(ctx)
    dst_mac, source, destination, message = parts(link(ctx).take_one())
    assert (dst_mac, source, destination) == (GUEST_MAC, GATEWAY6, GUEST_LL)
    wanted = RouterAdvertisement(
        255,
        RouterAdvertisement.MANAGED,
        65535,
        (Prefix(packed("2001:db8::"), 64), LinkAddress(LinkAddress.SOURCE, OUR_MAC), Mtu(65520)),
    )
    assert RouterAdvertisement.parse(message) == wanted


def test_all_options_in_order() -> None:
    ip6 = replace(IP6, dns=(DNS, GATEWAY6))
    ctx = make_context(ip6=ip6, mtu=1500, advertise_dns=True, advertise_search=True, dns_search=("example.com", "a."))
    ask_for_router(ctx)
    options = RouterAdvertisement.parse(parts(link(ctx).take_one())[3]).options
    assert [type(o) for o in options] == [Prefix, LinkAddress, Mtu, Rdnss, Dnssl]
    assert options[2:] == (Mtu(1500), Rdnss((DNS, GATEWAY6)), Dnssl(("example.com", "a")))


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"mtu": 0}, Mtu),
        ({"ip6": replace(IP6, dns=())}, Rdnss),
        ({"advertise_dns": False}, Rdnss),
        ({"dns_search": ()}, Dnssl),
        ({"advertise_search": False}, Dnssl),
        ({"ip6": replace(IP6, addr=None)}, Prefix),
    ],
)
def test_an_option_less(change: dict[str, Any], absent: type[ndp.Option]) -> None:
    """Each option depends on nothing but what it says: no resolver does not mean no search list."""
    full = replace(
        CONFIG, ip6=replace(IP6, dns=(DNS,)), advertise_dns=True, advertise_search=True, dns_search=("example.com",)
    )
    config = replace(full, **change)
    assert config.ip6 is not None
    found = {type(o) for o in router_advertisement(config.ip6, config, OUR_MAC).options}
    expected = {Prefix, LinkAddress, Mtu, Rdnss, Dnssl} - {absent}
    if change.get("ip6") == replace(IP6, addr=None):
        expected -= {Rdnss}  # and this one has no resolver either
    assert found == expected


@pytest.mark.parametrize("label_length", range(1, 20))
def test_search_list_of_any_length_is_sound(label_length: int) -> None:
    ctx = make_context(advertise_search=True, dns_search=("a" * label_length,))
    ask_for_router(ctx)
    assert RouterAdvertisement.parse(parts(link(ctx).take_one())[3]).options[-1] == Dnssl(("a" * label_length,))


@pytest.mark.parametrize(("mtu", "count"), [(1280, 6), (1500, 7), (65520, 11), (0, 11)])
def test_search_list_that_does_not_fit(mtu: int, count: int) -> None:
    """Neither into a packet nor, where that is long, into an option."""
    domains = tuple(f"{i:02}" + f".{'d' * 59}" * 3 for i in range(20))  # 185 bytes each
    ctx = make_context(mtu=mtu, advertise_search=True, dns_search=domains)
    ask_for_router(ctx)
    frame = link(ctx).take_one()
    assert len(frame) - 14 <= (mtu or 65535)
    assert RouterAdvertisement.parse(parts(frame)[3]).options[-1] == Dnssl(domains[:count])


def test_not_even_one_search_domain_fits() -> None:
    config = replace(CONFIG, mtu=150, advertise_search=True, dns_search=("d" * 63,))
    assert not any(isinstance(o, Dnssl) for o in router_advertisement(IP6, config, OUR_MAC).options)


@pytest.mark.parametrize("change", [{"no_dhcpv6": True}, {"ip6": replace(IP6, addr=None)}])
def test_managed_only_where_dhcpv6_answers(change: dict[str, Any]) -> None:
    config = replace(CONFIG, **change)
    assert config.ip6 is not None
    assert router_advertisement(config.ip6, config, OUR_MAC).flags == 0


def test_who_has_no_address_yet_is_answered_by_multicast(ctx: Context) -> None:
    ask_for_router(ctx, ANY6)
    dst_mac, _, destination, _ = parts(link(ctx).take_one())
    assert (dst_mac, destination) == (GUEST_MAC, addr.ALL_NODES6)


def test_advertises() -> None:
    assert advertises(CONFIG)
    for change in ({"no_ra": True}, {"no_ndp": True}, {"ip6": None}):
        assert not advertises(replace(CONFIG, **change))


# Unsolicited -------------------------------------------------------------------------------------------------------


def test_unsolicited(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    assert link(ctx).take() == []  # the first one comes after the first interval
    service = timers(ctx).services
    now = T0
    for _ in range(20):
        (deadline,) = service.deadlines
        assert deadline is not None
        assert RA_INTERVAL[0] <= deadline - now <= RA_INTERVAL[1]
        now = deadline + 0.25  # the loop is late, and counts from when it was
        service.fire(0, now)
        dst_mac, source, destination, message = parts(link(ctx).take_one())
        assert (dst_mac, source, destination) == (bytes.fromhex("333300000001"), GATEWAY6, addr.ALL_NODES6)
        assert RouterAdvertisement.parse(message) == router_advertisement(IP6, CONFIG, OUR_MAC)


def test_interval_is_drawn_each_time(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    service = timers(ctx).services
    seen = set()
    for _ in range(50):
        before = service.deadlines[0]
        service.fire(0)
        assert before is not None
        assert service.deadlines[0] is not None
        seen.add(service.deadlines[0] - before)
    assert len(seen) > 5


def test_no_timer_without_advertisements() -> None:
    ctx = make_context(no_ra=True)
    Ndp(ctx).start(T0)
    assert timers(ctx).services.deadlines == []


# Names -------------------------------------------------------------------------------------------------------------


def test_other_names_are_told_at_once_and_the_former_ones_taken_back() -> None:
    old, new, kept = (addr.packed(f"2001:db8::{i}") for i in (1, 2, 3))
    ip6 = replace(IP6, dns=(old, kept))
    ctx = make_context(ip6=ip6, advertise_dns=True, advertise_search=True, dns_search=("a.test", "b.test"))
    Ndp(ctx).start(T0)
    reconfigure(ctx, T0 + 1, ip6=replace(ip6, dns=(new, kept)), dns_search=("b.test", "c.test"))
    dst_mac, source, destination, message = parts(link(ctx).take_one())
    assert (dst_mac, source, destination) == (bytes.fromhex("333300000001"), GATEWAY6, addr.ALL_NODES6)
    options = RouterAdvertisement.parse(message).options
    assert [o for o in options if isinstance(o, Rdnss)] == [Rdnss((new, kept)), Rdnss((old,), 0)]
    assert [o for o in options if isinstance(o, Dnssl)] == [Dnssl(("b.test", "c.test")), Dnssl(("a.test",), 0)]
    timers(ctx).services.fire(0)
    later = RouterAdvertisement.parse(parts(link(ctx).take_one())[3])
    assert all(o.lifetime for o in later.options if isinstance(o, Rdnss | Dnssl)), "said once"


@pytest.mark.parametrize("config", [{}, {"no_ra": True, "advertise_dns": True}, {"ip6": None, "advertise_dns": True}])
def test_other_names_that_are_not_told_anyway(config: dict[str, Any]) -> None:
    ctx = make_context(dns_search=("a.test",), **config)
    Ndp(ctx).start(T0)
    reconfigure(ctx, T0 + 1, dns_search=("b.test",))
    assert link(ctx).take() == []


def test_another_mtu_and_another_prefix_are_told_at_once(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    for how in ({"mtu": 1400}, {"ip6": replace(IP6, addr=addr.packed("2001:db8:1::2"))}):
        reconfigure(ctx, T0 + 1, **how)
        assert ctx.config.ip6 is not None
        told = RouterAdvertisement.parse(parts(link(ctx).take_one())[3])
        gone = () if "mtu" in how else (addr.packed("2001:db8::"),)
        assert told == router_advertisement(ctx.config.ip6, ctx.config, OUR_MAC, gone=gone)
    reconfigure(ctx, T0 + 2, hostname="which no router tells")
    assert link(ctx).take() == []


def told_prefixes(ctx: Context) -> dict[str, tuple[int, int]]:
    """Prefixes of the only advertisement, with their lifetimes: valid, preferred."""
    options = RouterAdvertisement.parse(parts(link(ctx).take_one())[3]).options
    return {addr.text(o.prefix): (o.valid, o.preferred) for o in options if isinstance(o, Prefix)}


def test_a_former_prefix_is_withdrawn_for_as_long_as_a_guest_may_have_its_addresses(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    for_ever = (ndp.INFINITE, ndp.INFINITE)
    reconfigure(ctx, T0, ip6=replace(IP6, addr=addr.packed("2001:db8:1::2")))
    assert told_prefixes(ctx) == {"2001:db8:1::": for_ever, "2001:db8::": (0, 0)}
    reconfigure(ctx, T0 + 1, ip6=replace(IP6, addr=addr.packed("2001:db8:2::2")))
    assert told_prefixes(ctx) == {"2001:db8:2::": for_ever, "2001:db8::": (0, 0), "2001:db8:1::": (0, 0)}
    timers(ctx).services.fire(0, T0 + GONE_TIME + 0.5)
    assert told_prefixes(ctx) == {"2001:db8:2::": for_ever, "2001:db8:1::": (0, 0)}
    reconfigure(ctx, T0 + GONE_TIME, ip6=replace(IP6, addr=addr.packed("2001:db8:1::2")))
    assert told_prefixes(ctx) == {"2001:db8:1::": for_ever, "2001:db8:2::": (0, 0)}, "it is back"


def test_many_former_prefixes_do_not_make_an_advertisement_longer(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    for number in range(3 * GONE_MAX):
        reconfigure(ctx, T0 + number, ip6=replace(IP6, addr=addr.packed(f"2001:db8:{number + 1:x}::2")))
        told = told_prefixes(ctx)
    assert len(told) == 1 + GONE_MAX


def test_a_former_link_local_address_of_ours_is_no_router_any_more(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    other = addr.packed("fe80::7")
    reconfigure(ctx, T0, ip6=replace(IP6, gateway=other, our_ll=other))
    first, second = map(parts, link(ctx).take())
    assert (first[1], RouterAdvertisement.parse(first[3]).lifetime) == (GATEWAY6, 0)
    assert (second[1], RouterAdvertisement.parse(second[3]).lifetime) == (other, 65535)


def test_a_host_without_ipv6_is_no_router_either(ctx: Context) -> None:
    Ndp(ctx).start(T0)
    reconfigure(ctx, T0, ip6=replace(IP6, addr=None, gateway=None))
    message = RouterAdvertisement.parse(parts(link(ctx).take_one())[3])
    assert message.lifetime == 0
    assert [(o.prefix, o.valid) for o in message.options if isinstance(o, Prefix)] == [(addr.packed("2001:db8::"), 0)]


@pytest.mark.parametrize("pause", [1.0, 1000.0])
def test_advertisements_end_with_ipv6_and_begin_again(ctx: Context, pause: float) -> None:
    """Before the timer has found out, and after."""
    Ndp(ctx).start(T0)
    reconfigure(ctx, T0, ip6=None)
    now = elapse(ctx, T0, pause)
    assert link(ctx).take() == []
    reconfigure(ctx, now, ip6=IP6)
    expected = router_advertisement(IP6, ctx.config, OUR_MAC)
    assert RouterAdvertisement.parse(parts(link(ctx).take_one())[3]) == expected
    elapse(ctx, now, RA_INTERVAL[1])
    assert link(ctx).take(), "and from time to time"


def test_advertisements_begin_with_ipv6() -> None:
    ctx = make_context(ip6=None)
    Ndp(ctx).start(T0)
    reconfigure(ctx, T0, ip6=IP6)
    assert len(link(ctx).take()) == 1
    elapse(ctx, T0, RA_INTERVAL[1])
    assert link(ctx).take()


@given(st.sampled_from([133, 134, 135, 136, 137, 255]), st.binary(max_size=64), st.sampled_from([GUEST_LL, ANY6]))
def test_answers_or_malformed(kind: int, rest: bytes, src: bytes) -> None:
    ctx = make_context()
    try:
        hand_over(ctx, src, GATEWAY6, bytes((kind, 0)) + rest)
    except Malformed:
        assert link(ctx).take() == []
        return
    for frame in link(ctx).take():
        parts(frame)


def test_a_message_from_afar_is_refused(ctx: Context) -> None:
    """A router has counted its hop limit down, or it came in fragments (RFC 6980)."""
    for hops in (254, 0):
        with pytest.raises(Malformed, match="ndp hop limit"):
            hand_over(ctx, GUEST_LL, GATEWAY6, RouterSolicitation(()).emit(), hops)
    assert link(ctx).take() == []


def test_takes_its_messages(ctx: Context) -> None:
    Ndp(ctx)
    assert sorted(ctx.services.icmp6) == [133, 134, 135, 136, 137]
    assert not any(taken.fragments for taken in ctx.services.icmp6.values())


def test_empty_message(ctx: Context) -> None:
    hand_over(ctx, GUEST_LL, GATEWAY6, b"")
    assert link(ctx).take() == []


# Our own messages ----------------------------------------------------------------------------------------------------


def test_solicitation(ctx: Context) -> None:
    """RFC 4861, 7.2.2: to the solicited-node address, with our MAC."""
    Ndp(ctx)
    assert ctx.services.solicit6 is not None
    ctx.services.solicit6(GUEST6)
    (frame,) = link(ctx).take()
    packet = dissect(frame)
    assert recomputed(frame) == frame
    assert (packet.dst, packet[IPv6].dst, packet[IPv6].src) == ("33:33:ff:00:00:02", "ff02::1:ff00:2", "fe80::1")
    assert packet[IPv6].hlim == 255
    assert packet[ICMPv6ND_NS].tgt == "2001:db8::2"
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == addr.mac_text(OUR_MAC)


def test_announcements_when_the_link_comes_up(ctx: Context) -> None:
    """RFC 4861, 7.2.6: to all nodes, overriding; then the router's advertisement."""
    Ndp(ctx)
    (announce,) = ctx.services.on_link_up
    ctx.guest.addr6 = addr.packed("2001:db8::9")
    announce()
    na, ns, ra = map(dissect, link(ctx).take())
    assert (na.dst, na[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    assert (na[ICMPv6ND_NA].tgt, na[ICMPv6ND_NA].R, na[ICMPv6ND_NA].S, na[ICMPv6ND_NA].O) == ("fe80::1", 1, 0, 1)
    assert ns[ICMPv6ND_NS].tgt == addr.text(GUEST6), "the guest may have the assigned address, too"
    assert ICMPv6ND_RA in ra and ra[IPv6].dst == "ff02::1"


@pytest.mark.parametrize("off", [{"ip6": None}, {"no_ndp": True}])
def test_nothing_is_begun_without_ndp(off: dict[str, Any]) -> None:
    ctx = make_context(**off)
    ndp_service = Ndp(ctx)
    ndp_service.announce()
    ndp_service.solicit(GUEST6)
    assert link(ctx).take() == []


# Neighbours of the host ----------------------------------------------------------------------------------------------


NEIGHBOUR, NEIGHBOURS_MAC = packed("fe80::77"), bytes.fromhex("525400000077")
THEIRS = LinkAddress(LinkAddress.TARGET, NEIGHBOURS_MAC)


def test_a_neighbour_answers_for_itself(ctx: Context) -> None:
    """It overrides what the guest has of it, which may be ours, as of before it was known (RFC 4861, 7.2.4)."""
    ctx.lan.note(NEIGHBOUR, NEIGHBOURS_MAC)
    solicit(ctx, NEIGHBOUR)
    frame = link(ctx).take_one()
    assert frame == recomputed(frame)
    assert (frame[:12], frame[22:38], frame[38:54]) == (GUEST_MAC + NEIGHBOURS_MAC, NEIGHBOUR, GUEST_LL)
    flags = NeighbourAdvertisement.ROUTER | NeighbourAdvertisement.SOLICITED | NeighbourAdvertisement.OVERRIDE
    assert NeighbourAdvertisement.parse(frame[54:]) == NeighbourAdvertisement(flags, NEIGHBOUR, (THEIRS,))


def test_a_neighbour_is_announced(ctx: Context) -> None:
    solicit(ctx, NEIGHBOUR)
    link(ctx).take()
    ctx.lan.note(NEIGHBOUR, NEIGHBOURS_MAC)
    assert ctx.lan.outdated() == [NEIGHBOUR]
    assert ctx.services.announce6 is not None
    ctx.services.announce6(NEIGHBOUR)
    frame = link(ctx).take_one()
    assert (frame[:12], frame[22:38]) == (bytes.fromhex("333300000001") + NEIGHBOURS_MAC, NEIGHBOUR)
    assert frame[38:54] == addr.ALL_NODES6
    flags = NeighbourAdvertisement.ROUTER | NeighbourAdvertisement.OVERRIDE
    assert NeighbourAdvertisement.parse(frame[54:]) == NeighbourAdvertisement(flags, NEIGHBOUR, (THEIRS,))
    assert ctx.lan.outdated() == []


@pytest.mark.parametrize("change", [{"no_ndp": True}, {"ip6": None}])
def test_nothing_is_announced_without_ndp(change: dict[str, Any]) -> None:
    ctx = make_context(**change)
    Ndp(ctx)
    assert ctx.services.announce6 is not None
    ctx.services.announce6(NEIGHBOUR)
    assert link(ctx).take() == []


def test_the_router_speaks_with_one_mac() -> None:
    """Where the gateway is no address of ours, it has its own: in advertisements, solicitations, and answers."""
    ctx = make_context(ip6=replace(IP6, map_host_loopback=None))
    ctx.lan.note(GATEWAY6, NEIGHBOURS_MAC)
    ask_for_router(ctx)
    solicit(ctx, GATEWAY6)
    assert ctx.services.solicit6 is not None
    ctx.services.solicit6(GUEST6)
    advertised, answered, asked = link(ctx).take()
    assert {frame[6:12] for frame in (advertised, answered, asked)} == {NEIGHBOURS_MAC}
    assert LinkAddress(LinkAddress.SOURCE, NEIGHBOURS_MAC) in RouterAdvertisement.parse(advertised[54:]).options
    assert NeighbourAdvertisement.parse(answered[54:]).options == (THEIRS,)
    assert NeighbourSolicitation.parse(asked[54:]).options == (LinkAddress(LinkAddress.SOURCE, NEIGHBOURS_MAC),)
