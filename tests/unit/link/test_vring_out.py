"""Frames to a machine: chains that are merged, super-frames, a ring without buffers."""

from __future__ import annotations

import os
import random

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from passt.drops import Drop
from passt.link import vhost_control as device
from passt.wire import vhost
from passt.wire.vhost import RingState

from ... import front_end
from ...front_end import BASE, RECEIVE, SIZE, U16, WRITE
from .vhost_desk import PLAIN, Desk, super_frame, tcp_frame


def test_a_frame_fills_as_many_buffers_as_it_needs(desk: Desk) -> None:
    desk.link.send_payload(super_frame(60000, 1400))
    desk.link.send_frame(tcp_frame(13))
    assert desk.machine.receive() == [], "nothing is shown before the turn ends"
    desk.run()
    assert desk.drops == {}
    got = desk.machine.receive()
    assert got[-1] == (bytes(10) + b"\1\0", tcp_frame(13))
    assert len(got) > 40, "this driver takes no super-frames: it was cut"
    assert desk.link.sent_frames == len(got)
    assert desk.link.sent_bytes == sum(len(frame) for _, frame in got)
    assert desk.machine.rings[RECEIVE].called() == 1


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("buffer", [1526, 4096, 70000])
def test_super_frames_are_left_whole_for_a_driver_that_takes_them(v6: bool, buffer: int) -> None:
    tso = device.F_GUEST_CSUM | device.F_GUEST_TSO4 | device.F_GUEST_TSO6
    desk = Desk(PLAIN | device.F_MRG_RXBUF | tso, num=256 if buffer < 5000 else 32, buffer=buffer)
    desk.machine.set_up()
    desk.run()
    hdr, payload = super_frame(60000, 1400, v6=v6)
    desk.link.send_payload((hdr, payload))
    desk.run()
    ((vnet, frame),) = desk.machine.receive()
    assert vnet[:10] + frame == hdr + payload
    count = -(-(len(frame) + 12) // buffer)
    assert U16.unpack_from(vnet, 10) == (count,)
    desk.close()


def test_a_ring_without_buffers_is_full_until_there_are_some() -> None:
    desk = Desk(PLAIN | device.F_MRG_RXBUF, num=256, buffer=4096)
    rooms: list[float] = []
    desk.link.on_room = rooms.append
    desk.machine.set_up()
    desk.run()
    rooms.clear()
    sent = 0
    while not desk.link.full:
        desk.link.send_frame(tcp_frame(11, seed=sent))
        sent += 1
        assert sent < 300
    assert 128 < sent < 256
    while not desk.drops:
        desk.link.send_frame(tcp_frame(11, seed=sent))
        sent += 1
    assert desk.drops == {Drop.VRING_FULL: 1}
    assert desk.link.room < 4096
    assert desk.machine.rings[RECEIVE].flags == 0, "a kick is wanted"
    desk.run()
    assert not rooms
    got = desk.machine.receive()
    assert [frame for _, frame in got] == [tcp_frame(11, seed=i) for i in range(sent - 1)]
    desk.run()
    assert len(rooms) == 1
    assert not desk.link.full
    assert desk.link.room > 250000
    assert desk.machine.rings[RECEIVE].flags == 1, "no kick is wanted"
    desk.close()


def test_a_super_frame_that_can_never_fit_is_cut() -> None:
    tso = device.F_GUEST_CSUM | device.F_GUEST_TSO4
    for features, num, buffer in ((device.F_MRG_RXBUF | tso, 32, 1526), (tso, 64, 1526)):
        desk = Desk(PLAIN | features, num=num, buffer=buffer)
        desk.machine.set_up()
        desk.run()
        hdr, payload = super_frame(20000, 1400)
        desk.link.send_payload((hdr, payload))
        desk.link.send_frame(tcp_frame(1000))
        desk.run()
        got = desk.machine.receive()
        assert b"".join(bytes(Ether(frame)[TCP].payload) for _, frame in got[:-1]) == payload
        assert desk.drops == {}
        desk.close()


def test_a_frame_that_finds_room_wakes_those_that_wait() -> None:
    """`full` ends without a kick: a frame is sent, and sees the buffers that came meanwhile."""
    desk = Desk(PLAIN | device.F_MRG_RXBUF)
    rooms: list[float] = []
    desk.link.on_room = rooms.append
    desk.machine.set_up()
    desk.run()
    rooms.clear()
    while not desk.link.full:
        desk.link.send_frame(tcp_frame(11))
    desk.run()
    assert not rooms
    desk.machine.receive()
    os.eventfd_read(desk.machine.rings[RECEIVE].kick)  # the kick is late
    desk.link.send_frame(tcp_frame(11))
    assert not desk.link.full
    desk.link.at_turn_end(0)
    assert len(rooms) == 1
    desk.close()


def test_a_ring_that_stops_makes_tcp_wait_until_it_runs_again(desk: Desk) -> None:
    rooms: list[float] = []
    desk.link.on_room = rooms.append
    desk.run()
    rooms.clear()
    ring = desk.machine.rings[RECEIVE]
    desk.machine.tell(vhost.GET_VRING_BASE, RingState(RECEIVE, 0).emit())
    desk.run()
    assert desk.link.full
    assert not rooms
    desk.machine.start_ring(ring, RingState.parse(desk.machine.answer().payload).number)
    desk.run()
    assert not desk.link.full
    assert desk.link.room > 0
    assert len(rooms) == 1


# Payload that is received in the machine's buffers ------------------------------------------------------------------

TSO = device.F_GUEST_CSUM | device.F_GUEST_TSO4 | device.F_GUEST_TSO6
CHUNK = 14_000


def received(desk: Desk, hdr: bytearray, data: bytes, want: int) -> int:
    """Receive `data` where `want` bytes have room, and send it as frames of CHUNK; the bytes that had room."""
    views, total = desk.link.lay_out(len(hdr), CHUNK, want)
    assert sum(map(len, views)) == total
    left = data[:total]
    for view in views:
        view[: len(left[: len(view)])] = left[: len(view)]
        left = left[len(view) :]
    for start in range(0, min(total, len(data)), CHUNK):
        desk.link.send_laid_out(hdr, min(CHUNK, len(data) - start, total - start))
    return total


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("buffer", [128, 1526, 4096, 16000])
@pytest.mark.parametrize("length", [1, 3000, CHUNK, CHUNK + 1, 40_000])
def test_frames_are_those_of_send_payload(v6: bool, buffer: int, length: int) -> None:
    hdr, _ = super_frame(100, 1400, v6=v6)
    data = os.urandom(length)
    got = []
    for direct in (False, True):
        desk = Desk(PLAIN | device.F_MRG_RXBUF | TSO, num=512, buffer=buffer)
        desk.machine.set_up()
        desk.run()
        if direct:
            assert received(desk, hdr, data, 50_000) == 50_000
        else:
            for start in range(0, length, CHUNK):
                desk.link.send_payload((hdr, data[start : start + CHUNK]))
        desk.run()
        got.append((desk.machine.receive(), desk.link.sent_frames, desk.link.sent_bytes, desk.link.room))
        assert desk.drops == {}
        desk.run()
        desk.link.send_frame(tcp_frame(100))  # the ring goes on behind what was laid out and not used
        desk.run()
        assert [frame for _, frame in desk.machine.receive()] == [tcp_frame(100)]
        desk.close()
    assert got[0] == got[1]


@pytest.mark.parametrize(
    ("features", "buffer"),
    [
        (TSO, 70_000),  # no merged buffers
        (device.F_MRG_RXBUF, 4096),  # no offloads
        (device.F_MRG_RXBUF | device.F_GUEST_CSUM | device.F_GUEST_TSO4, 4096),
        (device.F_MRG_RXBUF | TSO, 66),  # room for the headers, and no more
        (device.F_MRG_RXBUF | TSO, 71),  # a frame of 60 bytes is in two buffers
    ],
)
def test_nothing_is_laid_out_for_other_drivers(features: int, buffer: int) -> None:
    desk = Desk(PLAIN | features, num=64, buffer=buffer)
    desk.machine.set_up()
    desk.run()
    assert desk.link.lay_out(10 + 54, CHUNK, 50_000) == ([], 0)
    desk.close()


def test_nothing_is_laid_out_beside_a_capture_or_without_a_machine(desk: Desk) -> None:
    link = desk.link
    assert link.lay_out(64, CHUNK, 1000) == ([], 0), "this driver takes no offload"
    link.attach(None)
    assert link.lay_out(64, CHUNK, 1000) == ([], 0)
    link.send_laid_out(super_frame(1, 1400)[0], 1)
    assert desk.drops == {Drop.NO_GUEST: 1}
    busy = Desk(PLAIN | device.F_MRG_RXBUF | TSO)
    busy.machine.set_up()
    busy.run()
    assert busy.link.lay_out(64, CHUNK, 1000)[1] == 1000
    busy.link.capture = lambda to_guest, frame: None
    assert busy.link.lay_out(64, CHUNK, 1000) == ([], 0)
    busy.close()


def test_a_ring_that_runs_dry_is_full_and_says_when_it_is_not() -> None:
    desk = Desk(PLAIN | device.F_MRG_RXBUF | TSO, num=64, buffer=4096)
    rooms: list[float] = []
    desk.link.on_room = rooms.append
    desk.machine.set_up()
    desk.run()
    rooms.clear()
    hdr, _ = super_frame(100, 1400)
    sent = b""
    while not desk.link.full:
        data = os.urandom(min(desk.link.room, 20_000))
        sent += data[: received(desk, hdr, data, len(data))]
    assert desk.drops == {}
    assert desk.link.lay_out(64, CHUNK, 1 << 18)[1] < 1 << 18, "more than there is"
    desk.run()
    assert not rooms
    assert b"".join(frame[54:] for _, frame in desk.machine.receive()) == sent
    desk.run()
    assert len(rooms) == 1 and not desk.link.full
    desk.close()


@pytest.mark.parametrize("seed", range(6))
def test_buffers_lie_anywhere_and_come_in_any_order(seed: int) -> None:
    """Some behind one another, of several lengths, and with descriptors whose `next` means nothing."""
    dice = random.Random(seed)
    desk = Desk(PLAIN | device.F_MRG_RXBUF | TSO, num=256)
    machine, ring = desk.machine, desk.machine.rings[RECEIVE]
    places, at = [], front_end.BUFFERS
    while len(places) < ring.num:
        size = dice.choice((1526, 2048, 4096))
        for _ in range(dice.choice((1, 2, 17))):
            places.append((at, size))
            at += size
        at += dice.choice((0, 64))
    slots = list(range(ring.num))
    dice.shuffle(places)
    if seed % 2:
        places.sort()
    machine._buffer_at = lambda slot: places[slot][0]  # type: ignore[method-assign]
    machine.introduce()
    for slot, (place, size) in enumerate(places[: ring.num]):
        ring.describe(slot, BASE + place, size, WRITE, dice.randrange(1 << 16))
        ring.offer(slot)
    for each in machine.rings:
        machine.start_ring(each)
    desk.run()
    hdr, _ = super_frame(100, 1400)
    for _ in range(60):
        data = dice.randbytes(dice.choice((1, 1000, 5000, 40_000)))
        if dice.random() < 0.3:
            desk.link.send_payload((hdr, data))
        else:
            assert received(desk, hdr, data, 40_000) == 40_000
        desk.link.send_frame(tcp_frame(100))
        desk.run()
        got = [frame for _, frame in machine.receive(refill=False)]
        assert b"".join(frame[54:] for frame in got[:-1])[: len(data)] == data
        assert got[-1] == tcp_frame(100)
        back = [slot for slot in slots if slot in {head for head, _ in machine.back}]
        if seed % 3:
            dice.shuffle(back)
        for slot in back:
            ring.offer(slot)
        os.eventfd_write(ring.kick, 1)
        desk.run()
    assert desk.drops == {}
    desk.close()


@pytest.mark.parametrize("wrong", [64, 0xFFFF])
def test_a_head_beyond_the_ring_behind_others(wrong: int) -> None:
    desk = Desk(PLAIN | device.F_MRG_RXBUF, num=64)
    machine, ring = desk.machine, desk.machine.rings[RECEIVE]
    machine.introduce()
    machine.fill()
    U16.pack_into(machine.memory, ring.avail_at + 4 + 2 * 5, wrong)
    for each in machine.rings:
        machine.start_ring(each)
    desk.run()
    assert desk.drops == {Drop.VRING_BROKEN: 1}
    desk.close()


def test_a_run_ends_where_the_memory_ends() -> None:
    """Its next buffer would be one of which half is there."""
    desk = Desk(PLAIN | device.F_MRG_RXBUF, num=4)
    machine, ring = desk.machine, desk.machine.rings[RECEIVE]
    machine.introduce()
    for slot in range(4):
        ring.describe(slot, BASE + SIZE - 3 * 4096 - 2048 + slot * 4096, 4096, WRITE)
        ring.offer(slot)
    for each in machine.rings:
        machine.start_ring(each)
    desk.run()
    assert desk.drops == {Drop.VRING_BROKEN: 1}
    desk.close()


def test_pages_of_a_migrating_machine_are_logged(desk: Desk) -> None:
    """Payload is written before the chain is given back, which logs it."""
    other = Desk(PLAIN | device.F_MRG_RXBUF | TSO, num=64, buffer=4096)
    other.machine.set_up()
    other.machine.tell_log(1 << 16)
    other.run()
    log = other.machine.log()
    other.run()
    hdr, _ = super_frame(100, 1400)
    assert received(other, hdr, bytes(10_000), 10_000) == 10_000
    other.run()
    assert sum(bin(byte).count("1") for byte in log[:]) >= 3
    assert [len(frame) for _, frame in other.machine.receive()] == [10_054]
    other.close()


def test_a_ring_that_breaks_between_two_frames() -> None:
    desk = Desk(PLAIN | device.F_MRG_RXBUF | TSO, num=64, buffer=4096)
    machine, ring = desk.machine, desk.machine.rings[RECEIVE]
    machine.set_up()
    desk.run()
    hdr, _ = super_frame(100, 1400)
    while desk.link.room > 80_000:
        received(desk, hdr, bytes(CHUNK), CHUNK)
    assert desk.link.lay_out(len(hdr), CHUNK, 3 * CHUNK)[1] == 3 * CHUNK
    U16.pack_into(machine.memory, ring.avail_at + 2, ring.avail_idx + 200)
    for _ in range(3):
        desk.link.send_laid_out(hdr, CHUNK)
    assert desk.drops == {Drop.VRING_BROKEN: 1, Drop.NO_GUEST: 2}
    desk.close()
