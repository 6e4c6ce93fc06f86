"""Frames to a tap device without a vnet header: whole, summed, cut, one write each. A socket is the device."""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from passt.link.backend import Link
from passt.link.plain_tap import PlainLink
from passt.wire.virtio import NO_OFFLOAD
from tests.unit.link.test_gso import Case

DATA = random.Random(3).randbytes(65000)


class Device:
    """The other end of a link."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.drops: Counter[str] = Counter()
        self.fd = ours.detach()
        self.link: Link = PlainLink(self.fd, self.drops)

    def frames(self) -> list[bytes]:
        got = []
        try:
            while frame := self.sock.recv(1 << 17):
                got.append(frame)
        except BlockingIOError:
            pass  # that was all
        return got


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    os.close(device.fd)
    device.sock.close()


def test_finished_frame(device: Device) -> None:
    device.link.send_frame(b"x" * 60)
    device.link.send(bytearray(NO_OFFLOAD + b"y" * 60))
    assert device.frames() == [b"x" * 60, b"y" * 60]
    assert (device.link.sent_frames, device.link.sent_bytes) == (2, 120)


@pytest.mark.parametrize("version", [4, 6])
def test_super_frame_is_cut_and_summed(device: Device, version: int) -> None:
    case = Case("tcp", version, 1000)
    device.link.send_payload(case.parts(DATA[:2500]))
    frames = device.frames()
    payload = b""
    for frame in frames:
        packet = Ether(frame)
        assert packet.haslayer(TCP)
        sent = packet[TCP].chksum
        del packet[TCP].chksum
        assert Ether(packet.build())[TCP].chksum == sent
        payload += bytes(packet[TCP].payload)
    assert (len(frames), payload) == (3, DATA[:2500])


def test_buffer_grows_with_the_number_of_segments(device: Device) -> None:
    """At the smallest MTU the headers are several times the payload."""
    case = Case("tcp", 4, 16)
    device.link.send_payload(case.parts(DATA[:65000]))
    count = len(device.frames()) + device.drops["tap write: EAGAIN"]
    assert count == -(-65000 // 16)


def test_frame_that_no_tap_takes(device: Device) -> None:
    device.link.send_frame(bytes(65536))
    assert (device.frames(), device.drops) == ([], {"tap write: frame too long": 1})


def test_capture(device: Device) -> None:
    seen: list[tuple[bool, bytes]] = []
    device.link.capture = lambda to_guest, data: seen.append((to_guest, data))
    device.link.send_frame(b"x" * 60)
    assert seen == [(True, NO_OFFLOAD + b"x" * 60)]


def test_device_that_is_gone(device: Device) -> None:
    told: list[str] = []
    device.sock.close()
    with pytest.raises(ConnectionError, match="Broken pipe"):
        device.link.send_frame(b"x" * 60)
    device.link.on_gone = told.append
    device.link.send_payload(Case("tcp", 4, 1000).parts(DATA[:2500]))
    assert told == ["The tap device failed: Broken pipe"], "once, and not for every segment"
