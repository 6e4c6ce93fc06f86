"""The way out: what is written, what is captured, what a failure means."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from passt.link import tap_device
from passt.link.tap_device import NO_OFFLOAD, VNET, TapLink

HEADER = bytearray(VNET.pack(tap_device.F_NEEDS_CSUM, tap_device.GSO_TCPV4, 54, 1460, 34, 16) + b"header")


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


def test_vnet_header_is_native() -> None:
    order = sys.byteorder
    wanted = bytes((1, 1)) + b"".join(n.to_bytes(2, order) for n in (54, 1460, 34, 16))
    assert bytes(HEADER[: VNET.size]) == wanted
    assert bytes(10) == NO_OFFLOAD


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


@pytest.mark.parametrize("code", sorted(tap_device.TRANSIENT))
def test_transient(monkeypatch: pytest.MonkeyPatch, tap: Tap, code: int) -> None:
    def fail(fd: int, data: object) -> int:
        raise OSError(code, "")

    monkeypatch.setattr(os, "write", fail)
    tap.link.send(HEADER)
    assert tap.drops == {f"tap write: {errno.errorcode[code]}": 1}


def test_device_gone(monkeypatch: pytest.MonkeyPatch, tap: Tap) -> None:
    def fail(fd: int, data: object) -> int:
        raise OSError(errno.EBADFD, "")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="77"):
        tap.link.send(HEADER)
    errors: list[OSError] = []
    tap.link.on_error = errors.append
    tap.link.send(HEADER)
    assert [e.errno for e in errors] == [errno.EBADFD]
    assert not tap.drops


def test_without_a_tap_frames_are_counted() -> None:
    drops: Counter[str] = Counter()
    nowhere = tap_device.NoLink(drops)
    nowhere.send(HEADER)
    nowhere.send_payload((HEADER, b"x"))
    nowhere.send_frame(b"frame")
    assert drops == {"no tap": 3}
    assert (nowhere.sent_frames, nowhere.sent_bytes) == (0, 0)
    assert (nowhere.tso, nowhere.uso) == (False, False)
