"""The messages of a front end: success, failure, memory that is replaced, rings that stop."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from passt import log
from passt.drops import Drop
from passt.link import vhost_control as device
from passt.link.vring import NUM_MAX
from passt.wire import vhost
from passt.wire.vhost import Region, RingState

from ...front_end import BASE, RECEIVE, SIZE, TRANSMIT, USER, FrontEnd
from .vhost_desk import PLAIN, Desk, super_frame, tcp_frame


def test_features_are_those_that_were_offered(desk: Desk) -> None:
    machine = desk.machine
    for request, value in (
        (vhost.GET_FEATURES, device.FEATURES),
        (vhost.GET_PROTOCOL_FEATURES, device.PROTOCOL_FEATURES),
        (vhost.GET_QUEUE_NUM, 1),
        (vhost.GET_MAX_MEM_SLOTS, 64),
    ):
        machine.tell(request)
        desk.run()
        answer = machine.answer()
        assert (answer.request, vhost.u64(answer.payload)) == (request, value)


def test_success_and_failure_are_told_to_a_front_end_that_asks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: told.append(text))
    machine = desk.machine
    asking = vhost.VERSION | vhost.NEED_REPLY
    for request, payload, outcome in (
        (vhost.SET_OWNER, b"", 0),
        (vhost.NET_SET_MTU, vhost.emit_u64(1500), 0),
        (vhost.SET_FEATURES, vhost.emit_u64(1 << 60), 1),
        (vhost.SET_VRING_NUM, RingState(0, 100).emit(), 1),
        (vhost.SET_VRING_NUM, RingState(0, 2 * NUM_MAX).emit(), 1),
        (vhost.SET_VRING_NUM, RingState(7, 256).emit(), 1),
        (vhost.SET_VRING_KICK, vhost.emit_u64(0), 1),
        (vhost.SET_MEM_TABLE, vhost.emit_regions([machine.region()]), 1),
        (vhost.ADD_MEM_REG, b"short", 1),
        (99, b"", 1),
    ):
        machine.tell(request, payload, flags=asking)
        desk.run()
        assert vhost.u64(machine.answer().payload) == outcome, request
        assert len(told) == outcome, "the log has the reason, the front end has none"
        told.clear()
    assert not desk.gone


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (vhost.HEADER.pack(1, 2, 0), "version 2 of the protocol (1 is known)"),
        (vhost.HEADER.pack(1, 1, 1 << 20), "a message of 1048576 bytes (at most 4096 are possible)"),
        (vhost.HEADER.pack(99, 1, 0), "request 99, which was not offered"),
        (vhost.HEADER.pack(vhost.SET_FEATURES, 1, 2) + b"ab", "a payload of 2 bytes (8 are needed)"),
    ],
)
def test_what_is_no_message_ends_the_connection(desk: Desk, data: bytes, why: str) -> None:
    desk.machine.sock.send(data)
    desk.run()
    assert desk.gone == [f"The vhost-user connection failed: {why}"]


def test_messages_may_come_in_pieces(desk: Desk) -> None:
    data = vhost.Message(vhost.GET_QUEUE_NUM, 1).emit()
    for byte in data:
        desk.machine.sock.send(bytes((byte,)))
        desk.run(1)
    assert desk.machine.answer().request == vhost.GET_QUEUE_NUM


def test_who_does_not_stop_talking_has_one_turn_like_others(desk: Desk) -> None:
    desk.machine.sock.send(vhost.Message(vhost.GET_QUEUE_NUM, 1).emit() * (device.MESSAGES_MAX + 1))
    desk.machine.sock.settimeout(0)
    desk.run(1)
    for _ in range(device.MESSAGES_MAX):
        desk.machine.answer()
    with pytest.raises(BlockingIOError):
        desk.machine.answer()
    desk.run(1)
    assert desk.machine.answer().request == vhost.GET_QUEUE_NUM


def test_a_ring_that_stops_tells_where_it_goes_on(desk: Desk) -> None:
    """As at a reboot, and at a migration: what was taken ahead of time and not filled is given back."""
    machine = desk.machine
    for i in range(3):
        desk.link.send_frame(tcp_frame(10 + i))
    machine.send(tcp_frame(19))
    assert desk.frames() == [tcp_frame(19)]
    for index, base in ((RECEIVE, 3), (TRANSMIT, 1)):
        machine.tell(vhost.GET_VRING_BASE, RingState(index, 0).emit())
        desk.run()
        assert RingState.parse(machine.answer().payload) == RingState(index, base)
    desk.link.send_frame(tcp_frame(15))
    assert desk.drops == {Drop.NO_GUEST: 1}
    assert [frame for _, frame in machine.receive(refill=False)] == [tcp_frame(10 + i) for i in range(3)]
    for ring, base in zip(machine.rings, (3, 1), strict=True):
        machine.start_ring(ring, base)
    machine.send(tcp_frame(10))
    desk.link.send_frame(tcp_frame(16))
    assert desk.frames() == [tcp_frame(10)]
    desk.link.send_frame(tcp_frame(17))
    desk.run()
    assert [frame for _, frame in machine.receive()] == [tcp_frame(17)], "the first came before the ring ran again"


ASKING = vhost.VERSION | vhost.NEED_REPLY


def _stop(machine: FrontEnd) -> int:
    for ring in machine.rings:
        machine.tell(vhost.GET_VRING_BASE, RingState(ring.index, 0).emit())
    return 2


def _disable(machine: FrontEnd) -> int:
    for ring in machine.rings:
        machine.tell(vhost.SET_VRING_ENABLE, RingState(ring.index, 0).emit(), flags=ASKING)
    return 2


def _reset(machine: FrontEnd) -> int:
    machine.tell(vhost.RESET_OWNER, flags=ASKING)
    return 1


def _replace_memory(machine: FrontEnd) -> int:
    """By memory in which the rings are not."""
    other = os.memfd_create("other")
    os.ftruncate(other, SIZE)
    regions = vhost.emit_regions([Region(2 * BASE, SIZE, 2 * USER, 0)])
    machine.tell(vhost.SET_MEM_TABLE, regions, [other], flags=ASKING)
    os.close(other)
    return 1


def _remove_memory(machine: FrontEnd) -> int:
    machine.tell(vhost.REM_MEM_REG, vhost.emit_single_region(machine.region()), flags=ASKING)
    return 1


def _disconnect(machine: FrontEnd) -> int:
    machine.sock.close()
    return 0


@pytest.mark.parametrize("end", [_stop, _disable, _reset, _replace_memory, _remove_memory, _disconnect])
def test_nothing_is_written_after_the_end(end: Callable[[FrontEnd], int]) -> None:
    """No buffer and no ring after the answer or the disconnect, whatever was in progress: others may use the memory."""
    desk = Desk(PLAIN | device.F_MRG_RXBUF | device.F_GUEST_CSUM | device.F_GUEST_TSO4 | device.F_EVENT_IDX)
    machine = desk.machine
    machine.set_up()
    machine.send(tcp_frame(9))
    assert desk.frames() == [tcp_frame(9)]
    desk.link.send_frame(tcp_frame(10))  # filled; it is shown at the end of the turn
    answers = end(machine)
    before = bytes(machine.memory)
    desk.run()
    if answers:
        for _ in range(answers):
            machine.answer()
        before = bytes(machine.memory)
    for ring in machine.rings:
        ring.called()
        os.eventfd_write(ring.kick, 1)
    desk.link.send_frame(tcp_frame(11))
    desk.link.send_payload(super_frame(5000, 1400))
    assert desk.link.lay_out(64, 3000, 4500) == ([], 0)
    assert desk.frames() == []
    assert bytes(machine.memory) == before
    assert [ring.called() for ring in machine.rings] == [0, 0]
    desk.close()


def test_memory_may_be_replaced_while_the_rings_run(desk: Desk) -> None:
    machine = desk.machine
    desk.link.send_frame(tcp_frame(11))
    machine.share_memory()
    desk.run()
    machine.send(tcp_frame(12))
    desk.link.send_frame(tcp_frame(13))
    assert desk.frames() == [tcp_frame(12)]
    desk.run()
    assert [frame for _, frame in machine.receive()] == [tcp_frame(11), tcp_frame(13)]
    region = machine.region()
    machine.tell(vhost.REM_MEM_REG, vhost.emit_single_region(region))
    desk.run()
    desk.link.send_frame(tcp_frame(14))
    assert desk.drops == {Drop.NO_GUEST: 1}, "the rings are not in memory any more"
    machine.tell(vhost.ADD_MEM_REG, vhost.emit_single_region(region), [machine.file])
    for ring in machine.rings:
        machine.start_ring(ring, 2 if ring.index == RECEIVE else 1)
    desk.run()
    desk.link.send_frame(tcp_frame(15))
    desk.run()
    assert [frame for _, frame in machine.receive()] == [tcp_frame(15)]
    assert not desk.gone


def test_no_descriptor_is_left_behind() -> None:
    desk = Desk()

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    desk.machine.close()
    desk.run()
    before = count()
    for _ in range(5):
        machine = desk.connect(PLAIN)
        machine.set_up()
        machine.set_up()  # everything twice
        machine.tell(vhost.SET_VRING_ERR, vhost.emit_u64(0), [machine.rings[0].call])
        machine.tell(vhost.SET_OWNER, b"", [machine.file, machine.file])
        desk.run(20)
        machine.close()
        desk.run(20)
    assert count() == before
    desk.reactor.close()


def test_a_file_cannot_be_shortened_after_it_was_shared(desk: Desk) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(desk.machine.file, 4096)
