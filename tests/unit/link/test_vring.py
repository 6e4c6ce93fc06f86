"""Rings: notices that are not sent, hostile descriptors, heads and indices."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.drops import Drop
from passt.link import vhost_control as device
from passt.link.vring import CHAIN_MAX

from ... import front_end
from ...front_end import BASE, INDIRECT, NEXT, RECEIVE, SIZE, TRANSMIT, U16, WRITE, FrontEnd
from .vhost_desk import PLAIN, Desk, super_frame, tcp_frame


@pytest.mark.parametrize("event_idx", [False, True])
def test_the_machine_is_called_once_for_a_batch_and_only_if_it_wants(event_idx: bool) -> None:
    desk = Desk(PLAIN | device.F_MRG_RXBUF | (device.F_EVENT_IDX if event_idx else 0))
    machine, ring = desk.machine, desk.machine.rings[TRANSMIT]
    machine.set_up()
    desk.run()
    for _ in range(10):
        machine.send(tcp_frame(11), kick=False)
    machine.send(tcp_frame(11))
    assert len(desk.frames()) == 11
    assert ring.called() == 1
    if event_idx:
        U16.pack_into(machine.memory, ring.avail_at + 4 + 2 * ring.num, 11 + 5)  # used_event: after the 17th
    else:
        U16.pack_into(machine.memory, ring.avail_at, 1)  # VIRTQ_AVAIL_F_NO_INTERRUPT
    for _ in range(5):
        machine.send(tcp_frame(11))
        assert len(desk.frames()) == 1
    assert ring.called() == 0
    machine.send(tcp_frame(11))
    desk.run()
    assert ring.called() == (1 if event_idx else 0)
    assert ring.event == (17 if event_idx else 0), "the ring is empty: the next buffer shall be told of"
    assert ring.flags == 0
    desk.close()


def test_buffers_that_come_while_the_ring_is_looked_at_are_not_missed(desk: Desk) -> None:
    machine = desk.machine
    later = [tcp_frame(10 + i) for i in range(20)]

    def received(frames: list[int], octets: int, now: float) -> None:
        keep(frames, octets, now)
        if later:
            machine.send(later.pop(), kick=False)  # as a driver that was told not to kick

    keep = desk.keeper.received
    desk.keeper.received = received  # type: ignore[method-assign]
    machine.send(tcp_frame(99))
    assert len(desk.frames()) == 21


def hostile(machine: FrontEnd, kind: str) -> None:
    ring = machine.rings[TRANSMIT]
    at = BASE + front_end.SEND_AREA + 0x10000
    match kind:
        case "a loop":
            ring.describe(0, at, 100, NEXT, 1)
            ring.describe(1, at, 100, NEXT, 0)
        case "next beyond the ring":
            ring.describe(0, at, 100, NEXT, ring.num)
        case "an address that is not there":
            ring.describe(0, 0, 100, 0)
        case "a length beyond the memory":
            ring.describe(0, BASE + SIZE - 50, 100, 0)
        case "an address that overflows":
            ring.describe(0, (1 << 64) - 50, 100, 0)
        case "a buffer to write":
            ring.describe(0, at, 100, WRITE)
        case "an indirect table of nothing":
            ring.describe(0, at, 0, INDIRECT)
        case "an indirect table of a half":
            ring.describe(0, at, 24, INDIRECT)
        case "an indirect table that is too long":
            ring.describe(0, at, 16 * (ring.num + 1), INDIRECT)
        case "an indirect table in an indirect table":
            front_end.DESC.pack_into(machine.memory, at - BASE, at, 16, INDIRECT, 0)
            ring.describe(0, at, 16, INDIRECT)
        case "a chain of gigabytes":
            ring.describe(0, at, 1 << 20, 0)
        case "a head beyond the ring":
            ring.offer(ring.num)
            return
        case "an index far ahead":
            U16.pack_into(machine.memory, ring.avail_at + 2, ring.num + 2)
            return
    ring.offer(0)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_has_a_limited_length(indirect: bool) -> None:
    """Each descriptor costs time, and memory where chains are taken ahead of time."""
    desk = Desk(num=512)
    machine = desk.machine
    machine.set_up()
    desk.run()
    frame = tcp_frame(1000)
    machine.send(frame, split=range(1, CHAIN_MAX), indirect=indirect)
    assert desk.frames() == [frame]
    machine.send(frame, split=range(1, CHAIN_MAX + 1), indirect=indirect)
    assert desk.frames() == []
    assert desk.drops == {Drop.VRING_BROKEN: 1}
    desk.close()


@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize(
    "kind",
    [
        "a loop",
        "next beyond the ring",
        "an address that is not there",
        "a length beyond the memory",
        "an address that overflows",
        "a buffer to write",
        "an indirect table of nothing",
        "an indirect table of a half",
        "an indirect table that is too long",
        "an indirect table in an indirect table",
        "a chain of gigabytes",
        "a head beyond the ring",
        "an index far ahead",
    ],
)
def test_a_broken_ring_stops_and_the_other_goes_on(desk: Desk, kind: str, good: int) -> None:
    machine, ring = desk.machine, desk.machine.rings[TRANSMIT]
    machine._slot = 10
    for i in range(good):
        machine.send(tcp_frame(10 + i), kick=False)
    hostile(machine, kind)
    os.eventfd_write(ring.kick, 1)
    frames = desk.frames()
    assert frames == ([] if kind == "an index far ahead" else [tcp_frame(10 + i) for i in range(good)])
    assert desk.drops == {Drop.VRING_BROKEN: 1}
    assert not desk.gone
    os.eventfd_write(ring.kick, 1)
    desk.run()
    assert desk.drops == {Drop.VRING_BROKEN: 1}, "it is not looked at again"
    desk.link.send_frame(tcp_frame(17))
    desk.run()
    assert [frame for _, frame in machine.receive()] == [tcp_frame(17)]


@pytest.mark.parametrize("kind", ["a chain without a buffer", "a buffer to read", "no room for the header"])
def test_a_broken_receive_ring_stops(kind: str) -> None:
    desk = Desk()
    machine, ring = desk.machine, desk.machine.rings[RECEIVE]
    ring.num = 64
    machine.set_up()
    if kind == "a chain without a buffer":
        ring.describe(0, BASE, 0, WRITE)
    elif kind == "a buffer to read":
        ring.describe(0, BASE, 100, 0)
    else:
        ring.describe(0, BASE + front_end.SEND_AREA, 11, WRITE | NEXT, 1)
    desk.run()
    desk.link.send_frame(tcp_frame(11))
    assert desk.drops[Drop.VRING_BROKEN] == 1
    machine.send(tcp_frame(12))
    assert desk.frames() == [tcp_frame(12)]
    desk.close()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_in_the_rings_do_no_harm(data: st.DataObject) -> None:
    """Descriptors, heads and indices at random, near valid values: no exception, and the link lives."""
    desk = Desk(PLAIN | data.draw(st.sampled_from([0, device.F_MRG_RXBUF])), num=8, buffer=2048)
    try:
        machine = desk.machine
        machine.set_up()
        ring = machine.rings[data.draw(st.sampled_from([RECEIVE, TRANSMIT]))]
        address = st.sampled_from([0, BASE, BASE + front_end.SEND_AREA, BASE + SIZE - 16, (1 << 64) - 1])
        for slot in range(8):
            ring.describe(
                slot,
                data.draw(address),
                data.draw(st.sampled_from([0, 1, 12, 16, 64, 128, 2048, 65536, 1 << 31])),
                data.draw(st.integers(0, 7)),
                data.draw(st.integers(0, 9)),
            )
        for _ in range(data.draw(st.integers(0, 9))):
            ring.offer(data.draw(st.integers(0, 9)))
            for each in machine.rings:
                os.eventfd_write(each.kick, 1)
        desk.run()
        desk.link.send_payload(super_frame(5000, 1400))
        desk.run()
        assert set(desk.drops) <= {
            Drop.VRING_BROKEN, Drop.VRING_FULL, Drop.NO_GUEST, Drop.TRUNCATED, Drop.OVERSIZED_FRAME
        }  # fmt: skip
        assert desk.reactor._ready is not None
    finally:
        desk.close()
