"""Headers of flows that get other MAC addresses: which ones, and what it costs at most."""

from __future__ import annotations

import pytest

from passt.flow.context import Context
from passt.flow.headers import REWRITES, STEP
from passt.flow.table import Flow
from tests.unit.support import (
    GATEWAY4,
    GUEST4,
    GUEST_MAC,
    OUR_MAC,
    T0,
    elapse,
    make_context,
    stage_faults,
    timers,
)

PEER, PEER_MAC = bytes((192, 0, 2, 77)), bytes.fromhex("525400770077")


class Header(Flow):
    """A flow that notes what is written into its header."""

    __slots__ = ("broken", "macs")

    def __init__(self, peer: bytes, number: int = 0) -> None:
        super().__init__(GUEST4 + peer + number.to_bytes(4, "big"))
        self.macs: list[tuple[bytes, bytes]] = []
        self.broken = False

    def set_macs(self, guest: bytes, peer: bytes) -> None:
        if self.broken:
            raise ZeroDivisionError
        self.macs.append((guest, peer))


@pytest.fixture
def ctx() -> Context:
    return make_context()


def flows(ctx: Context, count: int, peer: bytes = PEER) -> list[Header]:
    made = [Header(peer, i) for i in range(count)]
    for flow in made:
        ctx.flows.insert(flow)
    return made


def test_each_end_has_its_own(ctx: Context) -> None:
    (near,), (other,) = flows(ctx, 1), flows(ctx, 1, GATEWAY4)
    ctx.guest.macs[GUEST4] = GUEST_MAC
    ctx.lan.note(PEER, PEER_MAC)
    ctx.headers.rewrite(T0)
    assert (near.macs, other.macs) == ([(GUEST_MAC, PEER_MAC)], [(GUEST_MAC, OUR_MAC)])


def test_ipv6(ctx: Context) -> None:
    peer = bytes(15) + b"\x77"
    flow = Header(peer)
    flow.key = bytes(15) + b"\1" + peer + bytes(4)
    ctx.flows.insert(flow)
    ctx.lan.note(peer, PEER_MAC)
    ctx.headers.rewrite(T0)
    assert [mac for _, mac in flow.macs] == [PEER_MAC]


def test_a_bounded_number_of_steps(ctx: Context) -> None:
    """However often something changes: REWRITES headers at once, and as many in each STEP; the last change counts."""
    made = flows(ctx, 9000)
    for i in range(1001):
        ctx.lan.note(PEER, bytes((2, i % 2, 0, 0, 0, 0)))
        ctx.headers.rewrite(T0)
    assert sum(len(flow.macs) for flow in made) == REWRITES
    now = elapse(ctx, T0, STEP)
    assert sum(len(flow.macs) for flow in made) == 2 * REWRITES
    elapse(ctx, now, 2 * STEP * (9000 // REWRITES + 2))
    assert {flow.macs[-1][1] for flow in made} == {b"\2" + bytes(5)}
    assert max(len(flow.macs) for flow in made) == 2
    assert timers(ctx).services.deadlines == [None]


def test_a_few_flows_are_no_exception(ctx: Context) -> None:
    """They are through in one step, and the next one waits all the same."""
    (flow,) = flows(ctx, 1)
    for _ in range(5):
        ctx.headers.rewrite(T0)
    assert len(flow.macs) == 1
    now = elapse(ctx, T0, STEP)
    assert len(flow.macs) == 2
    elapse(ctx, now, 1)
    assert len(flow.macs) == 2 and timers(ctx).services.deadlines == [None]


def test_a_flow_that_ended_leaves_a_gap(ctx: Context) -> None:
    first, second = flows(ctx, 2)
    ctx.flows.free(first, "done")
    ctx.headers.rewrite(T0)
    assert (len(first.macs), len(second.macs)) == (0, 1)


def test_a_fault_stays_with_its_flow(ctx: Context) -> None:
    stage_faults(ctx)
    first, second = flows(ctx, 2)
    first.broken = True
    ctx.headers.rewrite(T0)
    assert len(second.macs) == 1 and ctx.drops["fault"] == 1
