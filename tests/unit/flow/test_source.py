"""Flows whose address on the host is gone, over all kinds of flows; sockets are fakes that know their address."""

from __future__ import annotations

from typing import Any

import pytest

from passt import addr
from passt.flow.context import Context
from passt.flow.source import LOST, REASON, SHARE, Sources, gone, local_address
from passt.flow.table import Flow
from passt.linux.sockopt import DESTROYED
from tests.unit.support import GUEST4, T0, link, make_context, stage_faults, timers
from tests.unit.tcp_support import fake_sockets, open_connection

__all__ = ["fake_sockets"]

HOST, OTHER = addr.packed("198.51.100.2"), addr.packed("198.51.100.77")
HOST6 = addr.packed("2001:db8:1::2")


class Named:
    """A socket that is bound to an address."""

    def __init__(self, name: str | OSError) -> None:
        self._name = name

    def getsockname(self) -> Any:
        if isinstance(self._name, OSError):
            raise self._name
        return (self._name, 4000, 0, 0) if ":" in self._name else (self._name, 4000)


class Flows:
    """Flows of one kind, in a table. `ended` are those that were ended, with the reason."""

    def __init__(self, ctx: Context, label: str = "udp") -> None:
        self.ctx, self.label = ctx, label
        self.ended: list[tuple[Flow, str]] = []
        ctx.services.take_end(label, self.end)

    def add(self, name: str | OSError, key: bytes = b"") -> Flow:
        flow = Flow(key)
        flow.__class__.label = self.label
        self.ctx.flows.insert(flow)
        flow.sock, flow.fd = Named(name), 10
        return flow

    def end(self, flow: Flow, why: str) -> None:
        self.ended.append((flow, why))
        self.ctx.flows.free(flow, why)


def check(ctx: Context, sources: Sources, addresses: list[bytes], lengths: list[int], steps: int = 0) -> None:
    """A pass to its end, or so many steps of it."""
    sources.check(addresses, lengths, T0)
    services = timers(ctx).services
    while services.deadlines and services.deadlines[0] is not None:
        services.fire(0)
        steps -= 1
        if not steps:
            break


@pytest.fixture(autouse=True)
def label() -> Any:
    yield
    Flow.label = ""


@pytest.mark.parametrize(
    ("local", "is_gone"),
    [("198.51.100.2", False), ("198.51.100.77", True), ("127.0.0.1", False), ("0.0.0.0", False), ("::", False),
     ("::1", False), ("2001:db8:1::77", True), ("2001:db8:1::2", False)],
)  # fmt: skip
def test_gone(local: str, is_gone: bool) -> None:
    assert gone(addr.packed(local), frozenset((HOST, HOST6))) is is_gone


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("198.51.100.2", HOST),
        ("::ffff:198.51.100.2", HOST),
        ("2001:db8:1::2", HOST6),
        ("fe80::2%eth0", addr.packed("fe80::2")),
        (OSError(min(DESTROYED), "gone"), None),
    ],
)
def test_local_address(name: str | OSError, expected: bytes | None) -> None:
    assert local_address(Flows(make_context()).add(name)) == expected


def test_a_flow_without_a_socket_of_its_own_has_no_address() -> None:
    flow = Flows(make_context()).add("198.51.100.77")
    flow.fd = -1
    assert local_address(flow) is None
    flow.fd, flow.sock = 10, None
    assert local_address(flow) is None


def test_flows_from_an_address_that_is_gone_end() -> None:
    ctx = make_context()
    flows, sources = Flows(ctx), Sources(ctx)
    stays, goes, loopback = flows.add("198.51.100.2"), flows.add("198.51.100.77"), flows.add("127.0.0.1")
    check(ctx, sources, [HOST], [4, 16])
    assert flows.ended == [(goes, REASON)]
    assert (sources.ended, stays.index, loopback.index) == (1, 0, 2)


def test_a_family_that_the_host_has_lost() -> None:
    ctx = make_context()
    flows, sources = Flows(ctx), Sources(ctx)
    four, six = flows.add("198.51.100.77"), flows.add("2001:db8:1::77")
    sources.check([HOST], [4, 16], T0, [4])
    timers(ctx).services.fire(0)
    assert flows.ended == [(four, LOST), (six, REASON)]


def test_a_family_that_is_offline_is_left_alone() -> None:
    ctx = make_context()
    flows, sources = Flows(ctx), Sources(ctx)
    four, six = flows.add("198.51.100.77"), flows.add("2001:db8:1::77")
    check(ctx, sources, [HOST], [16])
    assert flows.ended == [(six, REASON)]
    check(ctx, sources, [HOST], [4])
    assert flows.ended[1:] == [(four, REASON)]


def test_flows_of_a_kind_that_has_its_own_timeout_are_left_alone() -> None:
    ctx = make_context()
    flow = Flows(ctx, "udp").add("198.51.100.77")
    Flow.label = "dns"
    check(ctx, Sources(ctx), [HOST], [4])
    assert flow.index == 0 and ctx.flows.count == 1


def test_a_pass_is_made_in_steps_and_begins_again_with_a_change() -> None:
    ctx = make_context()
    flows, sources = Flows(ctx), Sources(ctx)
    for _ in range(2 * SHARE + 1):
        flows.add("198.51.100.77")
    check(ctx, sources, [HOST], [4], steps=1)
    assert len(flows.ended) == SHARE
    check(ctx, sources, [OTHER], [4])  # the address is back
    assert len(flows.ended) == SHARE
    check(ctx, sources, [HOST], [4])
    assert ctx.flows.count == 0


def test_without_flows_there_is_nothing_to_do() -> None:
    ctx = make_context()
    check(ctx, Sources(ctx), [HOST], [4])
    assert timers(ctx).services.deadlines == []


def test_a_flow_whose_look_fails_ends_and_the_others_have_their_turn() -> None:
    ctx = make_context()
    stage_faults(ctx)
    flows, sources = Flows(ctx), Sources(ctx)
    faulty, other = flows.add("not an address"), flows.add("198.51.100.77")
    check(ctx, sources, [HOST], [4])
    assert flows.ended == [(faulty, "fault"), (other, REASON)]
    assert ctx.drops["fault"] == 1


def test_addresses_in_use() -> None:
    ctx = make_context()
    flows, sources = Flows(ctx), Sources(ctx)
    flows.add("198.51.100.2", GUEST4 + HOST + b"\x9c\x40\0\x50")
    flows.add("127.0.0.1")  # from loopback to loopback: no addresses
    assert sources.in_use([GUEST4, OTHER]) == {GUEST4}
    assert sources.in_use([]) == set()


def test_a_connection_is_reset_on_both_sides(fake_sockets: Any) -> None:
    talk = open_connection()
    talk.sock.getsockname = lambda: ("198.51.100.77", 4000)
    sources = Sources(talk.ctx)
    sources.check([HOST], [4], T0)
    sources._step(T0)
    assert talk.ctx.flows.closed["tcp", REASON] == 1
    assert link(talk.ctx).take()[-1][14 + 20 + 13] & 4, "RST to the guest"
