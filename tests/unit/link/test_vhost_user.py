"""The vhost-user link: captures, front ends one after the other, a driver with any set of offloads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from passt.drops import Drop
from passt.link import vhost_control as device

from .vhost_desk import PLAIN, Desk, super_frame, tcp_frame

GUEST_OFFLOADS = (
    device.F_GUEST_CSUM, device.F_GUEST_TSO4, device.F_GUEST_TSO6, device.F_GUEST_USO4, device.F_GUEST_USO6,
    device.F_MRG_RXBUF, device.F_EVENT_IDX, device.F_VERSION_1, device.F_PROTOCOL_FEATURES,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(GUEST_OFFLOADS)), st.booleans(), st.sampled_from([1, 100, 1401, 30000, 65000 - 54]))
def test_whatever_a_driver_takes_it_gets_the_stream(acknowledged: set[int], v6: bool, length: int) -> None:
    num, buffer = (256, 2048) if device.F_MRG_RXBUF in acknowledged else (64, 66000)
    desk = Desk(sum(acknowledged), num=num, buffer=buffer)
    try:
        desk.machine.set_up()
        desk.run()
        hdr, payload = super_frame(length, 1400, v6=v6)
        if length <= 1400:
            hdr[1] = 0
        desk.link.send_payload((hdr, payload))
        desk.run()
        got = desk.machine.receive()
        if length > 1400 and len(got) == 1:
            wanted = {device.F_GUEST_CSUM, device.F_GUEST_TSO6 if v6 else device.F_GUEST_TSO4}
            assert wanted <= acknowledged
        data = b""
        for vnet, frame in got:
            end = 54 + int.from_bytes(frame[18:20], "big") if v6 else 14 + int.from_bytes(frame[16:18], "big")
            packet = Ether(frame[:end])  # without padding
            data += bytes(packet[TCP].payload)
            if not vnet[0]:  # complete: scapy agrees
                sum_before = packet[TCP].chksum
                del packet[TCP].chksum
                assert Ether(bytes(packet))[TCP].chksum == sum_before
            else:
                assert device.F_GUEST_CSUM in acknowledged
        assert data == payload
        assert desk.drops == {}
    finally:
        desk.close()


@pytest.mark.parametrize("features", [PLAIN, PLAIN | device.F_MRG_RXBUF | device.F_GUEST_CSUM])
def test_short_frames_are_padded(features: int) -> None:
    """As by the stream socket: to 60 bytes, with zeros, whether their checksums are complete or not."""
    desk = Desk(features)
    desk.machine.set_up()
    desk.run()
    lengths = 54, 55, 59, 60, 61
    for length in lengths:
        desk.link.send_frame(tcp_frame(length - 54))
    hdr, payload = super_frame(1, 1400)
    hdr[1] = 0
    desk.link.send_payload((hdr, payload))
    desk.link.send(hdr)
    desk.run()
    frames = [frame for _, frame in desk.machine.receive()]
    assert [len(frame) for frame in frames] == [60, 60, 60, 60, 61, 60, 60]
    for length, frame in zip(lengths, frames, strict=False):
        assert frame == tcp_frame(length - 54) + bytes(max(0, 60 - length))
    assert not any(frames[5][55:]) and not any(frames[6][54:])
    assert desk.link.sent_bytes == sum(map(len, frames))
    desk.close()


def test_another_front_end_follows_the_one_that_has_gone() -> None:
    desk = Desk()
    desk.machine.set_up()
    desk.machine.send(tcp_frame(11))
    assert desk.frames() == [tcp_frame(11)]
    desk.machine.close()
    desk.run()
    assert desk.gone == ["The guest closed the connection"]
    desk.link.send_frame(tcp_frame(12))
    assert desk.drops == {Drop.NO_GUEST: 1}
    machine = desk.connect(PLAIN)
    machine.set_up()
    machine.send(tcp_frame(13))
    assert desk.frames() == [tcp_frame(13)]
    desk.link.send_frame(tcp_frame(14))
    desk.run()
    assert [frame for _, frame in machine.receive()] == [tcp_frame(14)]
    desk.close()


def test_a_capture_has_frames_of_both_directions() -> None:
    desk = Desk(PLAIN | device.F_MRG_RXBUF | device.F_GUEST_CSUM | device.F_GUEST_TSO4)
    seen: list[tuple[bool, bytes]] = []
    desk.link.capture = lambda to_guest, data: seen.append((to_guest, data))
    desk.machine.set_up()
    desk.run()
    hdr, payload = super_frame(5000, 1400)
    desk.link.send_payload((hdr, payload))
    desk.link.send_frame(tcp_frame(11))
    assert seen == [(True, hdr + payload), (True, bytes(10) + tcp_frame(11))]
    desk.close()


def test_frames_before_the_rings_run_are_dropped() -> None:
    desk = Desk()
    desk.link.send_frame(tcp_frame(11))
    desk.link.send_payload(super_frame(5000, 1400))
    assert desk.drops == {Drop.NO_GUEST: 2}
    desk.close()


def test_a_driver_with_small_buffers_limits_the_mtu() -> None:
    tso = device.F_GUEST_CSUM | device.F_GUEST_TSO4 | device.F_GUEST_TSO6
    for features, mtu in ((0, 1500), (device.F_GUEST_CSUM, 1500), (tso, 65535), (device.F_MRG_RXBUF, 65535)):
        desk = Desk(PLAIN | features)
        told: list[int] = []
        desk.link.on_mtu = told.append
        desk.machine.set_up()
        desk.run()
        assert told == [mtu]
        desk.close()
