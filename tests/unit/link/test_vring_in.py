"""Frames of a machine: chains of any shape, headers copied once, payload of TCP never."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from passt.drops import Drop
from passt.link.vring_in import BATCH_MAX, COPY_MAX
from passt.wire import vhost
from passt.wire.vhost import RingState

from ... import front_end
from ...front_end import BASE, NEXT, SEND_AREA, TRANSMIT, U16
from ..support import T0
from .vhost_desk import Desk, tcp_frame


@pytest.mark.parametrize("split", [[], [12], [10, 12], [12, 26, 46], [100], [2000, 3000], [5, 66, 4000]])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("length", [0, 100, COPY_MAX, 60000])
def test_a_frame_arrives_however_it_is_cut_into_descriptors(
    desk: Desk, split: list[int], indirect: bool, length: int
) -> None:
    frame = tcp_frame(length)
    desk.machine.send(frame, split=[end for end in split if end < len(frame) + 12], indirect=indirect)
    assert desk.frames() == [frame]
    assert [length for _, length in desk.machine.rings[TRANSMIT].used()] == [0]
    assert desk.keeper.octets == len(frame)


@pytest.mark.parametrize("order", [[255, 0, 1], [9, 8, 7, 6], [4, 5, 6, 200, 201, 3], [100, 102, 101, 103]])
def test_descriptors_of_a_chain_lie_anywhere_in_the_table(desk: Desk, order: list[int]) -> None:
    frame, machine = tcp_frame(60000), desk.machine
    ring, data = machine.rings[TRANSMIT], bytes(12) + frame
    size = -(-len(data) // len(order))
    machine.memory[SEND_AREA : SEND_AREA + len(data)] = data
    for slot, following, at in zip(order, [*order[1:], 0], range(0, len(data), size), strict=True):
        last = at + size >= len(data)
        ring.describe(slot, BASE + SEND_AREA + at, min(size, len(data) - at), 0 if last else NEXT, following)
    ring.offer(order[0])
    os.eventfd_write(ring.kick, 1)
    assert desk.frames() == [frame]


def test_payload_of_tcp_is_not_copied(desk: Desk) -> None:
    for v6 in (False, True):
        frame = tcp_frame(60000, v6=v6)
        head = 12 + 54 + 20 * v6
        desk.machine.send(frame, split=[head, head + 32768])
        assert desk.frames() == [frame]
    assert desk.keeper.parts == [2, 3], "two buffers, and 20 bytes of the header of IPv6"


def test_all_other_frames_are_copied(desk: Desk) -> None:
    udp = bytes(Ether() / IP(src="192.0.2.2", dst="192.0.2.1") / UDP() / bytes(3000))
    fragment = bytes(Ether() / IP(src="192.0.2.2", dst="192.0.2.1", flags="MF") / TCP() / bytes(3000))
    options = bytes(Ether() / IP(src="192.0.2.2", dst="192.0.2.1", options=b"\1\1\1\1") / TCP() / bytes(3000))
    wrong = bytearray(tcp_frame(3000))
    wrong[14 + 20 + 12] = 4 << 4  # a header of 16 bytes
    for frame in (udp, fragment, options, bytes(wrong), b"\xff" * 3000):
        desk.machine.send(frame, split=[1000, 2000])
        assert desk.frames() == [frame]
    assert desk.keeper.parts == [1] * 5


def test_a_header_that_changes_after_it_was_copied_changes_nothing(desk: Desk) -> None:
    """Time of check, time of use: the receiver writes to the machine's memory while it looks at the frame."""
    frame = tcp_frame(60000)
    machine = desk.machine

    def received(frames: list[int], octets: int, now: float) -> None:
        machine.memory[front_end.SEND_AREA : front_end.SEND_AREA + 66] = b"\xff" * 66
        desk.keeper.frames.append(desk.keeper.pool.copy(frames[0] + 10, frames[0] + 64))

    desk.keeper.received = received  # type: ignore[method-assign]
    machine.send(frame)
    assert desk.frames() == [frame[:54]]


def test_more_frames_than_a_batch_come_in_several(desk: Desk) -> None:
    frames = [tcp_frame(100, seed=i) for i in range(250)]
    for frame in frames:
        desk.machine.send(frame, kick=False)
    desk.machine.send(tcp_frame(1))
    assert desk.frames() == [*frames, tcp_frame(1)]
    big = [tcp_frame(60000, seed=i) for i in range(30)]  # more than the pool has room for
    desk.keeper.batches = 0
    for frame in big:
        desk.machine.send(frame, kick=frame is big[-1])
    assert desk.frames() == big
    assert desk.keeper.batches > 1
    assert BATCH_MAX >= 251


def test_the_rest_of_many_frames_is_read_in_the_next_turn_once(desk: Desk) -> None:
    """No kick tells of it, and kicks that come meanwhile ask for no more turns."""
    big = [tcp_frame(60000, seed=i) for i in range(60)]
    for frame in big:
        desk.machine.send(frame)
    asked = []
    next_turn = desk.reactor.next_turn

    def counted(callback: Callable[[float], None]) -> None:
        asked.append(callback)
        next_turn(callback)

    desk.reactor.next_turn = counted  # type: ignore[method-assign]
    desk.reactor.turn(0)
    assert len(asked) == 1 and desk.keeper.batches == 1
    os.eventfd_write(desk.machine.rings[TRANSMIT].kick, 1)
    desk.reactor.turn(0)
    assert desk.keeper.batches == 3, "by the kick, and by the turn that was asked for"
    assert len(asked) == 2, "one turn is asked for at a time"
    desk.run(8)
    assert desk.keeper.frames == big


def test_frames_behind_a_fault_are_read_without_another_kick(desk: Desk) -> None:
    faults: list[Exception] = []
    desk.reactor.on_fault = lambda ref, e, now: faults.append(e)
    keep = desk.keeper.received

    def fails_once(frames: list[int], octets: int, now: float) -> None:
        if not faults:
            desk.machine.send(tcp_frame(2), kick=False)  # as a driver that was told not to kick
            raise ValueError("a fault")
        keep(frames, octets, now)

    desk.keeper.received = fails_once  # type: ignore[method-assign]
    desk.machine.send(tcp_frame(1))
    assert desk.frames() == [tcp_frame(2)]
    assert len(faults) == 1


def test_a_kick_is_told_of_whatever_its_counter_says() -> None:
    """A write to a full counter would wait for a reader, and there is none: this side does not write to it."""
    desk = Desk()
    os.eventfd_write(desk.machine.rings[TRANSMIT].kick, (1 << 64) - 2)
    desk.machine.set_up()
    desk.machine.send(tcp_frame(1), kick=False)
    assert desk.frames() == [tcp_frame(1)]
    assert desk.drops == {}
    desk.close()


def test_what_waits_is_read_ahead_of_a_timer(desk: Desk) -> None:
    desk.link.catch_up(T0)  # the front end has said nothing yet
    desk.run()
    desk.machine.send(tcp_frame(100), kick=False)
    assert desk.frames() == []
    desk.link.catch_up(T0)
    assert desk.keeper.frames == [tcp_frame(100)]
    desk.link.attach(None)
    desk.link.catch_up(T0)
    assert desk.keeper.frames == [tcp_frame(100)]


def test_the_indices_wrap(desk: Desk) -> None:
    ring = desk.machine.rings[TRANSMIT]
    desk.machine.tell(vhost.GET_VRING_BASE, RingState(TRANSMIT, 0).emit())
    desk.run()
    assert RingState.parse(desk.machine.answer().payload) == RingState(TRANSMIT, 0)
    ring.avail_idx = ring.seen = 0xFFFE
    U16.pack_into(desk.machine.memory, ring.avail_at + 2, 0xFFFE)
    U16.pack_into(desk.machine.memory, ring.used_at + 2, 0xFFFE)
    desk.machine.start_ring(ring, 0xFFFE)
    for i in range(5):
        desk.machine.send(tcp_frame(i))
        assert desk.frames() == [tcp_frame(i)]
    assert len(ring.used()) == 5


def test_frames_that_are_no_frames_are_counted(desk: Desk) -> None:
    desk.machine.send(b"short")
    desk.machine.send(bytes(66000))
    desk.machine.send(tcp_frame(1))
    assert desk.frames() == [tcp_frame(1)]
    assert desk.drops == {Drop.TRUNCATED: 1, Drop.OVERSIZED_FRAME: 1}
    assert len(desk.machine.rings[TRANSMIT].used()) == 3
