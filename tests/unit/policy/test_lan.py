"""The MAC addresses that the guest sees, and what it was told of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passt.addr import ANY4, packed
from passt.flow.context import Context
from passt.policy import lan
from passt.policy.lan import Lan, settings_of
from tests.unit.support import (
    CONFIG,
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST_MAC,
    IP4,
    IP6,
    OUR_MAC,
    T0,
    make_context,
    reconfigure,
)

NEIGHBOUR, NEIGHBOUR6, FAR = packed("192.0.2.77"), packed("fe80::77"), packed("203.0.113.9")
MAC, ROUTER, OTHER = (bytes((0x52, 0x54, 0, 0, 0, n)) for n in (0x77, 1, 0x78))
NO_MAP4, NO_MAP6 = replace(IP4, map_host_loopback=None), replace(IP6, map_host_loopback=None)


def known(ctx: Context) -> Lan:
    """Where the gateways and a neighbour of each family are known."""
    for a, mac in ((NEIGHBOUR, MAC), (NEIGHBOUR6, MAC), (GATEWAY4, ROUTER), (GATEWAY6, ROUTER)):
        assert ctx.lan.note(a, mac)
    return ctx.lan


def test_nothing_is_known() -> None:
    ctx = make_context()
    assert {ctx.lan.mac_of(a) for a in (NEIGHBOUR, NEIGHBOUR6, GATEWAY4, GATEWAY6, FAR, ANY4)} == {OUR_MAC}
    assert (ctx.lan.count, ctx.lan.outdated()) == (0, [])


def test_the_gateway_maps_the_host() -> None:
    """The default: neighbours have their own address, and all that comes through the gateway has ours."""
    seen = known(make_context())
    assert [seen.mac_of(a) for a in (NEIGHBOUR, NEIGHBOUR6)] == [MAC, MAC]
    assert [seen.mac_of(a) for a in (GATEWAY4, GATEWAY6, FAR, packed("2001:db8:1::9"))] == [OUR_MAC] * 4
    assert [seen.knows(a) for a in (NEIGHBOUR, NEIGHBOUR6)] == [True, True]
    assert [seen.knows(a) for a in (GATEWAY4, GATEWAY6, FAR)] == [False, False, False]
    assert seen.count == 4


def test_the_gateway_is_a_neighbour_where_it_maps_nothing() -> None:
    """--no-map-gw: it is the router, and what comes from beyond it comes from there."""
    seen = known(make_context(ip4=NO_MAP4, ip6=NO_MAP6))
    assert [seen.mac_of(a) for a in (NEIGHBOUR, NEIGHBOUR6)] == [MAC, MAC]
    assert [seen.mac_of(a) for a in (GATEWAY4, GATEWAY6, FAR, packed("2001:db8:1::9"))] == [ROUTER] * 4
    assert seen.knows(GATEWAY4) and not seen.knows(FAR)


def test_without_a_gateway() -> None:
    ctx = make_context(ip4=replace(NO_MAP4, gateway=None), ip6=None)
    ctx.lan.note(NEIGHBOUR, MAC)
    assert (ctx.lan.mac_of(NEIGHBOUR), ctx.lan.mac_of(FAR), ctx.lan.mac_of(NEIGHBOUR6)) == (MAC, OUR_MAC, OUR_MAC)


@pytest.mark.parametrize("field", ["map_host_loopback", "map_guest_addr"])
def test_addresses_that_map_the_host(field: str) -> None:
    ctx = make_context(ip4=replace(IP4, **{field: NEIGHBOUR}), ip6=replace(IP6, **{field: NEIGHBOUR6}))
    known(ctx)
    assert (ctx.lan.mac_of(NEIGHBOUR), ctx.lan.mac_of(NEIGHBOUR6)) == (OUR_MAC, OUR_MAC)
    assert not ctx.lan.knows(NEIGHBOUR) and not ctx.lan.knows(NEIGHBOUR6)


def test_an_address_that_is_forwarded_to_resolvers() -> None:
    assert known(make_context(dns_match=(NEIGHBOUR,))).mac_of(NEIGHBOUR) == OUR_MAC


def test_never_the_guests_own() -> None:
    """A host and a guest may have the same one, by mistake or by intent: the guest would drop its frames."""
    ctx = make_context(ip4=NO_MAP4)
    ctx.lan.note(NEIGHBOUR, GUEST_MAC)
    ctx.lan.note(GATEWAY4, GUEST_MAC)
    ctx.guest.mac = GUEST_MAC
    assert (ctx.lan.mac_of(NEIGHBOUR), ctx.lan.mac_of(FAR)) == (OUR_MAC, OUR_MAC)


def test_only_another_address_is_news() -> None:
    ctx = make_context()
    assert [ctx.lan.note(NEIGHBOUR, mac) for mac in (MAC, MAC, OTHER, OTHER, MAC)] == [True, False, True, False, True]
    assert ctx.lan.mac_of(NEIGHBOUR) == MAC


def test_another_link_has_other_neighbours() -> None:
    seen = known(make_context())
    seen.forget(4)
    assert (seen.mac_of(NEIGHBOUR), seen.mac_of(NEIGHBOUR6), seen.count) == (OUR_MAC, MAC, 2)
    seen.forget(16)
    assert (seen.mac_of(NEIGHBOUR6), seen.count) == (OUR_MAC, 0)


def test_another_configuration() -> None:
    ctx = make_context(ip4=NO_MAP4)
    known(ctx)
    reconfigure(ctx, ip4=replace(NO_MAP4, gateway=NEIGHBOUR))
    assert ctx.lan.mac_of(FAR) == MAC
    reconfigure(ctx, our_mac=OTHER)
    assert ctx.lan.mac_of(packed("2001:db8:1::9")) == OTHER
    reconfigure(ctx, ip4=IP4, now=T0 + 1)
    assert ctx.lan.mac_of(FAR) == OTHER


def test_settings_that_matter() -> None:
    assert settings_of(CONFIG) == settings_of(replace(CONFIG, mtu=1280, dns_search=("test",)))
    for change in ({"our_mac": MAC}, {"ip4": NO_MAP4}, {"ip4": None}, {"dns_match": (NEIGHBOUR,)}):
        assert settings_of(CONFIG) != settings_of(replace(CONFIG, **change))


def test_neighbours_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that changed longest ago is forgotten."""
    monkeypatch.setattr(lan, "NEIGHBOURS_MAX", 3)
    ctx = make_context()
    for n in (1, 2, 3):
        ctx.lan.note(bytes((10, 0, 0, n)), MAC)
    ctx.lan.note(bytes((10, 0, 0, 1)), OTHER)
    ctx.lan.note(bytes((10, 0, 0, 4)), MAC)
    assert [ctx.lan.knows(bytes((10, 0, 0, n))) for n in (1, 2, 3, 4)] == [True, False, True, True]


# The guest was told --------------------------------------------------------------------------------------------------


def test_told_and_outdated() -> None:
    ctx = make_context()
    assert ctx.lan.tell(NEIGHBOUR) == OUR_MAC
    assert ctx.lan.tell(NEIGHBOUR6) == OUR_MAC
    assert ctx.lan.outdated() == []
    known(ctx)
    assert ctx.lan.outdated() == [NEIGHBOUR, NEIGHBOUR6], "of others it was told nothing"
    assert ctx.lan.tell(NEIGHBOUR) == MAC
    assert ctx.lan.outdated() == [NEIGHBOUR6]
    ctx.lan.note(NEIGHBOUR, OTHER)
    assert ctx.lan.outdated() == [NEIGHBOUR6, NEIGHBOUR], "the one told longest ago is the first"
    ctx.lan.guest_gone()
    assert ctx.lan.outdated() == []


def test_the_gateway_changes_and_with_it_what_comes_through_it() -> None:
    ctx = make_context(ip4=NO_MAP4)
    known(ctx)
    for a in (FAR, NEIGHBOUR, GATEWAY4):
        ctx.lan.tell(a)
    ctx.lan.note(GATEWAY4, OTHER)
    assert ctx.lan.outdated() == [FAR, GATEWAY4]


@pytest.mark.parametrize("given", [True, False])
def test_an_address_that_the_guest_has_by_now_is_not_announced(given: bool) -> None:
    """The guest would see a conflict."""
    ctx = make_context()
    ctx.lan.tell(NEIGHBOUR)
    known(ctx)
    if given:
        reconfigure(ctx, ip4=replace(IP4, addr=NEIGHBOUR))
    else:
        ctx.guest.macs[NEIGHBOUR] = GUEST_MAC
    assert ctx.lan.outdated() == []
    ctx.guest.macs.clear()
    reconfigure(ctx, ip4=replace(IP4, addr=GUEST4))
    assert ctx.lan.outdated() == [NEIGHBOUR]


def test_nothing_is_told_of_no_address() -> None:
    """0.0.0.0 is the sender of a probe."""
    ctx = make_context(ip4=NO_MAP4)
    assert ctx.lan.tell(ANY4) == OUR_MAC
    known(ctx)
    assert (ctx.lan.outdated(), ctx.lan.tell(ANY4)) == ([], ROUTER)


def test_what_was_told_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lan, "TOLD_MAX", 3)
    ctx = make_context(ip4=NO_MAP4)
    for n in (1, 2, 3, 1, 4):
        ctx.lan.tell(bytes((10, 0, 0, n)))
    known(ctx)
    assert ctx.lan.outdated() == [bytes((10, 0, 0, n)) for n in (3, 1, 4)]


# Whether they are of use --------------------------------------------------------------------------------------------


def test_what_waits_to_be_read_comes_before_a_look_up() -> None:
    seen = make_context().lan

    def read() -> None:
        seen.before_use = None
        seen.note(NEIGHBOUR, MAC)

    seen.before_use = read
    assert seen.mac_of(GATEWAY4) == OUR_MAC and seen.before_use is read, "it is ours whatever comes"
    assert seen.mac_of(NEIGHBOUR) == MAC
    seen.before_use = lambda: setattr(seen, "before_use", None)
    assert seen.knows(NEIGHBOUR) and seen.before_use is None


def test_whether_the_guest_was_told_of_others() -> None:
    """Not of what leads to the host, nor of our link-local address, which the host has itself."""
    own = packed("fe80::7")
    ctx = make_context(ip6=replace(IP6, our_ll=own))
    for a in (GATEWAY4, GATEWAY6, own, ANY4):
        ctx.lan.tell(a)
    assert not ctx.lan.told_of_others()
    ctx.lan.tell(FAR)
    assert ctx.lan.told_of_others()
    ctx.lan.guest_gone()
    assert not ctx.lan.told_of_others()
    ctx = make_context(ip6=NO_MAP6)
    ctx.lan.tell(GATEWAY6)
    assert ctx.lan.told_of_others(), "the router is a neighbour"
