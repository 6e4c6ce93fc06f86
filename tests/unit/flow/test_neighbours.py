"""Where the guest's addresses are, what waits for a guest to speak, and what that costs at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from passt import addr
from passt.flow import neighbours
from passt.flow.context import Context
from passt.flow.neighbours import (
    ADDRESSES_MAX,
    HELD_MAX,
    HOLD,
    LINK_UP_DELAY,
    SOLICIT_MAX,
    SOLICITED_PER_SECOND,
)
from passt.flow.table import Flow
from tests.unit.support import (
    GATEWAY4,
    GUEST4,
    GUEST6,
    GUEST_LL,
    GUEST_MAC,
    T0,
    elapse,
    make_context,
    reactor,
    reconfigure,
    timers,
)

OTHER_MAC = bytes.fromhex("525400999999")
OTHER4 = addr.packed("192.0.2.3")


class Header(Flow):
    """A flow that notes the guest's MAC addresses that are written into its header."""

    __slots__ = ("macs",)

    def __init__(self, guest: bytes, number: int = 0) -> None:
        super().__init__(guest + GATEWAY4 + number.to_bytes(4, "big"))
        self.macs: list[bytes] = []

    def set_macs(self, guest: bytes, peer: bytes) -> None:
        self.macs.append(guest)


@pytest.fixture
def ctx(monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: T0)
    return make_context()


def flows(ctx: Context, guest: bytes, count: int) -> list[Header]:
    made = [Header(guest, i) for i in range(count)]
    for flow in made:
        ctx.flows.insert(flow)
    return made


def solicited(ctx: Context) -> list[bytes]:
    asked: list[bytes] = []
    ctx.services.solicit4 = ctx.services.solicit6 = asked.append
    return asked


# Where addresses are -------------------------------------------------------------------------------------------------


def test_one_machine_costs_no_walk(ctx: Context) -> None:
    """Its addresses are learned, and headers left alone."""
    (flow,) = flows(ctx, GUEST4, 1)
    for a in (GUEST4, GUEST6, GUEST_LL, OTHER4):
        ctx.neighbours.learn(a, GUEST_MAC)
    assert flow.macs == []
    assert ctx.guest.mac_of(addr.packed("192.0.2.77")) == GUEST_MAC


def test_flows_follow_their_own_address(ctx: Context) -> None:
    (mine,), (others,) = flows(ctx, GUEST4, 1), flows(ctx, OTHER4, 1)
    ctx.neighbours.learn(GUEST4, GUEST_MAC)
    ctx.neighbours.sender(OTHER_MAC)
    ctx.neighbours.learn(OTHER4, OTHER_MAC)
    assert (mine.macs, others.macs) == ([GUEST_MAC], [OTHER_MAC])
    ctx.neighbours.sender(GUEST_MAC)
    ctx.neighbours.learn(GUEST4, GUEST_MAC)
    assert timers(ctx).services.deadlines != [None]
    now = elapse(ctx, T0, 1)
    assert (len(mine.macs), len(others.macs)) == (1, 1), "nothing is new"
    ctx.neighbours.learn(OTHER4, GUEST_MAC)  # that address moves
    elapse(ctx, now, 1)
    assert (mine.macs[-1], others.macs[-1]) == (GUEST_MAC, GUEST_MAC)


@pytest.mark.parametrize("a", [addr.LOOPBACK4, addr.ANY4, addr.BROADCAST4, addr.packed("224.0.0.1"), addr.ANY6])
def test_addresses_of_nobody(ctx: Context, a: bytes) -> None:
    ctx.neighbours.learn(a, OTHER_MAC)
    assert not ctx.guest.macs


PROBED = [addr.packed("192.0.2.55"), addr.packed("2001:db8::55"), addr.packed("fe80::55")]


def reached(ctx: Context) -> set[bytes]:
    return {ctx.guest.addr4, ctx.guest.addr6, ctx.guest.addr6_ll}


@pytest.mark.parametrize("a", PROBED)
def test_a_silent_guest_is_reached_at_what_it_probes_for(ctx: Context, a: bytes) -> None:
    ctx.neighbours.probed(a)
    assert a in reached(ctx)
    ctx.neighbours.learn(GUEST4 if len(a) == 4 else GUEST_LL if addr.is_link_local(a) else GUEST6, GUEST_MAC)
    assert a not in reached(ctx), "the address that speaks"
    ctx.neighbours.probed(a)
    assert a not in reached(ctx), "it may still be refused"


@pytest.mark.parametrize(("a", "former"), [("192.0.2.55", "192.168.7.20"), ("2001:db8::55", "2001:db8:7::55")])
def test_a_guest_that_is_told_of_another_network(ctx: Context, a: str, former: str) -> None:
    """Its former address, which it has spoken from, may be gone. One of a network that it is not told of proves
    nothing.
    """
    here, there = addr.packed(a), addr.packed(former)
    ctx.neighbours.learn(there, GUEST_MAC)
    ctx.neighbours.probed(addr.packed("10.0.0.9" if len(here) == 4 else "2001:db8:9::9"))
    assert there in reached(ctx)
    ctx.neighbours.probed(here)
    assert here in reached(ctx) and there not in reached(ctx)
    ctx.neighbours.learn(there, GUEST_MAC)
    assert there in reached(ctx), "it has that still"


@pytest.mark.parametrize("a", PROBED)
def test_a_namespace_that_has_its_addresses_from_us(ctx: Context, a: bytes) -> None:
    reconfigure(ctx, config_net=True)
    before = reached(ctx)
    ctx.neighbours.probed(a)
    assert reached(ctx) == before


@pytest.mark.parametrize("a", PROBED[:2])
def test_a_probe_does_not_change_a_fixed_address(ctx: Context, a: bytes) -> None:
    reconfigure(ctx, ip4=replace(ctx.config.ip4, fixed=True), ip6=replace(ctx.config.ip6, fixed=True))
    before = reached(ctx)
    ctx.neighbours.probed(a)
    assert reached(ctx) == before


def test_probes_for_addresses_that_lead_elsewhere(ctx: Context) -> None:
    """That of a host behind the guest, one that it had before, and those that no host has."""
    before = reached(ctx)
    ctx.neighbours.moves(OTHER4, GUEST4, done=True)
    for a in (OTHER4, addr.ANY4, addr.ANY6, addr.LOOPBACK4, addr.ALL_NODES6, addr.BROADCAST4):
        ctx.neighbours.probed(a)
    assert reached(ctx) == before


def test_addresses_are_bounded(ctx: Context) -> None:
    for i in range(ADDRESSES_MAX + 10):
        ctx.neighbours.learn(b"\x0a\0" + i.to_bytes(2, "big"), GUEST_MAC)
    assert len(ctx.guest.macs) == ADDRESSES_MAX
    assert b"\x0a\0\0\x09" not in ctx.guest.macs and b"\x0a\0\0\x0a" in ctx.guest.macs


# Waiting -------------------------------------------------------------------------------------------------------------


def held(ctx: Context, count: int, target: bytes = GUEST4) -> list[str]:
    """A list that notes what becomes of `count` things that wait."""
    ctx.guest.mac = addr.BROADCAST_MAC
    done: list[str] = []

    def note(what: str, i: int) -> Any:
        return lambda now: done.append(f"{what} {i}")

    for i in range(count):
        assert ctx.neighbours.hold(target, note("delivered", i), note("given up", i), T0)
    return done


def test_delivered_in_order_when_the_guest_speaks(ctx: Context) -> None:
    asked = solicited(ctx)
    done = held(ctx, 3)
    assert asked == [GUEST4]
    ctx.neighbours.sender(GUEST_MAC)
    assert done == []
    reactor(ctx).end_turn(T0)
    assert done == ["delivered 0", "delivered 1", "delivered 2"]
    elapse(ctx, T0, HOLD)
    assert asked == [GUEST4] and len(done) == 3


def test_solicited_again_and_given_up(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = solicited(ctx)
    now = [T0]
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: now[0])
    done = held(ctx, 2, GUEST6)
    times = []
    while not done:
        now[0] = min(d for d in timers(ctx).services.deadlines if d is not None)
        times.append(now[0] - T0)
        elapse(ctx, now[0], 0)
    assert times[:5] == [0.5, 1.5, 3.5, 7.5, 11.5]
    assert HOLD <= times[-1] <= HOLD + SOLICIT_MAX
    assert done == ["given up 0", "given up 1"]
    assert asked == [GUEST6] * len(times)
    assert timers(ctx).services.deadlines == [None]


def test_there_is_room_for_few(ctx: Context) -> None:
    done = held(ctx, HELD_MAX)
    assert not ctx.neighbours.hold(GUEST4, lambda now: None, lambda now: None, T0)
    elapse(ctx, T0, HOLD + SOLICIT_MAX)
    assert len(done) == HELD_MAX
    assert ctx.neighbours.hold(GUEST4, lambda now: None, lambda now: None, T0)


def test_solicitations_are_bounded(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = solicited(ctx)
    for _ in range(100):
        ctx.neighbours.solicit(GUEST4)
    assert len(asked) == SOLICITED_PER_SECOND
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: T0 + 1)
    ctx.neighbours.solicit(addr.ANY6)
    ctx.neighbours.solicit(GUEST6)
    assert asked[SOLICITED_PER_SECOND:] == [GUEST6]


# The link ------------------------------------------------------------------------------------------------------------


def test_link_comes_up(ctx: Context) -> None:
    asked = solicited(ctx)
    told: list[float] = []
    ctx.services.on_link_up.append(lambda: told.append(1))
    ctx.neighbours.link_up(T0)
    assert timers(ctx).services.deadlines == [T0 + LINK_UP_DELAY] and not told
    elapse(ctx, T0, 1)
    assert told == [1]
    assert asked == [GUEST4, GUEST6, GUEST_LL]


def test_link_that_goes_at_once(ctx: Context) -> None:
    asked = solicited(ctx)
    ctx.neighbours.link_up(T0)
    ctx.neighbours.forget()
    elapse(ctx, T0, 1)
    assert asked == []


def test_what_waits_outlives_the_link(ctx: Context) -> None:
    """A machine that connects again is the one it waits for."""
    done = held(ctx, 1)
    ctx.neighbours.forget()
    ctx.neighbours.link_up(T0)
    elapse(ctx, T0, 1)
    ctx.neighbours.sender(GUEST_MAC)
    reactor(ctx).end_turn(T0)
    assert done == ["delivered 0"]


# The guest moves -----------------------------------------------------------------------------------------------------

NEW4, NEW6 = addr.packed("10.9.0.20"), addr.packed("2001:db8:9::20")


def assigned(ctx: Context, four: bytes, six: bytes) -> None:
    assert ctx.config.ip4 and ctx.config.ip6
    reconfigure(ctx, ip4=replace(ctx.config.ip4, addr=four), ip6=replace(ctx.config.ip6, addr=six))


@pytest.mark.parametrize("done", [True, False])
def test_clients_are_led_to_the_new_address_as_soon_as_the_guest_has_it(ctx: Context, done: bool) -> None:
    assigned(ctx, NEW4, NEW6)
    for former, now in ((GUEST4, NEW4), (GUEST6, NEW6)):
        ctx.neighbours.moves(former, now, done=done)
    assert (ctx.guest.addr4, ctx.guest.addr6) == ((NEW4, NEW6) if done else (GUEST4, GUEST6))
    for a in (GUEST4, NEW4, GUEST4, GUEST6, NEW6, GUEST6):  # flows from before go on
        ctx.neighbours.learn(a, GUEST_MAC)
    assert (ctx.guest.addr4, ctx.guest.addr6) == (NEW4, NEW6)
    ctx.neighbours.learn(OTHER4, GUEST_MAC)
    assert ctx.guest.addr4 == OTHER4, "the guest has chosen another one"


def test_a_guest_that_goes_back_has_its_former_address_again(ctx: Context) -> None:
    assigned(ctx, NEW4, GUEST6)
    ctx.neighbours.moves(GUEST4, NEW4, done=True)
    assigned(ctx, GUEST4, GUEST6)
    ctx.neighbours.moves(NEW4, GUEST4, done=False)
    assert ctx.neighbours.given_up == {NEW4}
    ctx.neighbours.learn(GUEST4, GUEST_MAC)
    ctx.neighbours.learn(NEW4, GUEST_MAC)
    assert ctx.guest.addr4 == GUEST4


def test_an_address_without_flows_is_one_like_any_other(ctx: Context) -> None:
    assigned(ctx, NEW4, GUEST6)
    ctx.neighbours.moves(GUEST4, NEW4, done=True)
    ctx.neighbours.release([GUEST4])
    assert ctx.neighbours.given_up == frozenset()
    ctx.neighbours.learn(GUEST4, GUEST_MAC)
    assert ctx.guest.addr4 == GUEST4
