"""The way out: what is written, what is captured, what a failure means; and the way in ahead of a timer."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest

from passt.link.backend import TRANSIENT
from passt.link.packet import PacketPool
from passt.link.tap_device import BUDGET_MAX, TapLink
from passt.loop.reactor import EPOLLIN
from passt.wire.virtio import F_NEEDS_CSUM, GSO_TCPV4, NO_OFFLOAD, VNET

from ..support import T0, FakeReactor, FakeReceiver

HEADER = bytearray(VNET.pack(F_NEEDS_CSUM, GSO_TCPV4, 54, 1460, 34, 16) + b"header")


class Tap:
    """A pipe that keeps datagrams apart, in place of the device."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
        self.drops: Counter[str] = Counter()
        self.link = TapLink(self.writer, self.drops, uso=True)

    def read(self) -> bytes:
        return os.read(self.reader, 65536)


@pytest.fixture
def tap() -> Iterator[Tap]:
    tap = Tap()
    yield tap
    os.close(tap.reader)
    os.close(tap.writer)


def test_one_frame_one_write(tap: Tap) -> None:
    tap.link.send(HEADER)
    tap.link.send_payload((HEADER, memoryview(b"pay"), b"load"))
    tap.link.send_frame(b"frame")
    assert tap.read() == bytes(HEADER)
    assert tap.read() == bytes(HEADER) + b"payload"
    assert tap.read() == NO_OFFLOAD + b"frame"
    assert (tap.link.sent_frames, tap.link.sent_bytes) == (3, len("header" + "headerpayload" + "frame"))


def test_capture(tap: Tap) -> None:
    seen: list[tuple[bool, bytes]] = []
    tap.link.capture = lambda to_guest, frame: seen.append((to_guest, frame))
    tap.link.send(HEADER)
    tap.link.send_payload((HEADER, memoryview(b"data")))
    tap.link.send_frame(b"frame")
    HEADER_THEN = bytes(HEADER)
    assert seen == [(True, HEADER_THEN), (True, HEADER_THEN + b"data"), (True, NO_OFFLOAD + b"frame")]
    assert isinstance(seen[0][1], bytes), "the header is used again for the next frame"


def test_full_queue_drops_and_counts(tap: Tap) -> None:
    seen: list[bytes] = []
    for _ in range(100):
        tap.link.send(bytearray(4096))
    tap.link.capture = lambda to_guest, frame: seen.append(frame)
    before = tap.drops["tap write: EAGAIN"]
    assert before > 0
    tap.link.send(HEADER)
    tap.link.send_payload((HEADER, b"x"))
    assert tap.drops == {"tap write: EAGAIN": before + 2}
    assert seen == [], "what was not sent is not captured"
    assert tap.link.sent_bytes == (100 - before) * (4096 - VNET.size), "nor counted"


@pytest.mark.parametrize("code", sorted(TRANSIENT))
def test_transient(monkeypatch: pytest.MonkeyPatch, tap: Tap, code: int) -> None:
    def fail(fd: int, data: object) -> int:
        raise OSError(code, "")

    monkeypatch.setattr(os, "write", fail)
    tap.link.send(HEADER)
    assert tap.drops == {f"tap write: {errno.errorcode[code]}": 1}


def test_device_gone(monkeypatch: pytest.MonkeyPatch, tap: Tap) -> None:
    def fail(fd: int, data: object) -> int:
        raise OSError(errno.EBADFD, "File descriptor in bad state")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(ConnectionError, match="bad state"):
        tap.link.send(HEADER)
    told: list[str] = []
    tap.link.on_gone = told.append
    tap.link.send(HEADER)
    assert told == ["The tap device failed: File descriptor in bad state"]
    assert not tap.drops


@pytest.mark.parametrize("budget", [2, BUDGET_MAX])
def test_all_that_waits_is_read_ahead_of_a_timer(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """In as many reads as it takes."""
    monkeypatch.setattr("passt.link.tap_device.BUDGET_MAX", budget)
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
    link, pool, loop = TapLink(reader, Counter(), uso=True), PacketPool(1 << 20), FakeReactor()
    receiver = FakeReceiver(pool.mv)
    link.start(cast(Any, loop), pool, receiver)
    try:
        frames = [bytes(20) + bytes([n]) for n in range(8)]
        for frame in frames:
            os.write(writer, NO_OFFLOAD + frame)
        loop.fire(reader, EPOLLIN, T0)
        assert len(receiver.frames) < len(frames)  # the others wait for the next turn
        link.catch_up(T0)
        assert [bytes(frame) for frame in receiver.frames] == frames
        os.write(writer, NO_OFFLOAD + frames[0])
        link.unwatch()  # the device is about to be another one
        link.catch_up(T0)
        assert len(receiver.frames) == len(frames)
        link.watch()
        link.catch_up(T0)
        assert len(receiver.frames) == len(frames) + 1
    finally:
        os.close(reader)
        os.close(writer)
