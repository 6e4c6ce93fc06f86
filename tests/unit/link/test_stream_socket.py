"""The stream to a virtual machine: framing, batches, a socket that is full, a guest that is gone."""

from __future__ import annotations

import errno
import random
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.link import stream_socket
from passt.link.backend import Buffer, Link
from passt.link.packet import PacketPool
from passt.link.stream_socket import FLUSH_AT, NET_BUFSIZE, SEND_BUFFER, SEND_BUFFER_LITTLE, StreamLink
from passt.loop.reactor import EPOLLOUT
from passt.udp_engine.flow import UdpFlow
from passt.wire.virtio import GSO_NONE, GSO_TCPV6, NO_OFFLOAD, VNET

from ..support import T0, FakeReactor, FakeReceiver

PLAIN = VNET.pack(0, GSO_NONE, 0, 0, 0, 0)


def super_frame(count: int, size: int) -> tuple[Buffer, Buffer]:
    """A TCP super-frame of `count` segments of `size` bytes."""
    hdr = bytearray(VNET.pack(1, GSO_TCPV6, 74, size, 54, 16) + bytes(74))
    hdr[10 + 12 : 10 + 15] = b"\x86\xdd\x60"
    length = 20 + count * size
    hdr[10 + 18 : 10 + 20] = length.to_bytes(2, "big")
    return hdr, random.Random(count).randbytes(count * size)


def payload(parts: tuple[Buffer, Buffer]) -> bytes:
    return bytes(parts[1])


def parse(stream: bytes) -> list[bytes]:
    """The frames of a stream that ends with one."""
    frames, at = [], 0
    while at < len(stream):
        length = int.from_bytes(stream[at : at + 4], "big")
        frames.append(stream[at + 4 : at + 4 + length])
        at += 4 + length
    assert at == len(stream), "the last frame is not complete"
    return frames


def padded(frame: bytes) -> bytes:
    """A frame as it goes on the wire, at least 60 bytes long."""
    return frame.ljust(60, b"\0")


class Loop(FakeReactor):
    """Notes whether EPOLLOUT is wanted, when that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.wants: list[bool] = []

    def change(self, fd: int, events: int) -> None:
        super().change(fd, events)
        self.wants.append(bool(events & EPOLLOUT))


def start(link: StreamLink, loop: FakeReactor) -> None:
    pool = PacketPool()
    link.start(cast(Any, loop), pool, FakeReceiver(pool.mv))


class Guest:
    """A link, the other end of its socket, and what it wants of the loop."""

    def __init__(self, sndbuf: int = 0) -> None:
        self.drops: Counter[str] = Counter()
        self.link = StreamLink(self.drops)
        self.loop = Loop()
        self.wants = self.loop.wants
        start(self.link, self.loop)
        self.stream = b""
        self.connect(sndbuf)

    def connect(self, sndbuf: int = 0) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.theirs.setblocking(False)
        self.link.attach(self.ours)
        self.attached = self.ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf or 1 << 20)

    def read(self, n: int = 1 << 24) -> int:
        """Read up to `n` bytes; returns how many came."""
        got = 0
        while got < n:
            try:
                data = self.theirs.recv(n - got)
            except BlockingIOError:
                break
            if not data:
                break
            self.stream += data
            got += len(data)
        return got

    def end_turn(self) -> list[bytes]:
        """The frames of a turn whose stream is not full."""
        self.link.at_turn_end(T0)
        self.read()
        frames, self.stream = parse(self.stream), b""
        return frames

    def drain(self) -> list[bytes]:
        """Read everything, with the link told as often as epoll would."""
        self.link.at_turn_end(T0)
        while self.read() or self.link.full:
            self.link.writable(T0)
        frames, self.stream = parse(self.stream), b""
        return frames

    def fill(self) -> list[bytes]:
        """Send until the socket takes no more; returns what was sent."""
        sent: list[bytes] = []
        while not self.link.full:
            sent.append(len(sent).to_bytes(4, "big") * 1000)
            self.link.send_frame(sent[-1])
            self.link.at_turn_end(T0)
        return sent

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    with closing(Guest()) as guest:
        yield guest


# Frames ------------------------------------------------------------------------------------------------------------


def test_is_a_link(guest: Guest) -> None:
    link: Link = guest.link
    assert link.tso and link.uso


def test_length_comes_first(guest: Guest) -> None:
    guest.link.send(bytearray(PLAIN + b"first"))
    guest.link.send_payload((PLAIN + b"sec", memoryview(b"on"), b"d"))
    guest.link.send_frame(b"third!!")
    guest.link.at_turn_end(T0)
    guest.read()
    frames = [padded(frame) for frame in (b"first", b"second", b"third!!")]
    assert guest.stream == b"".join(b"\0\0\0\x3c" + frame for frame in frames)


def test_shortest_frame_that_is_not_padded(guest: Guest) -> None:
    for size in (59, 60, 61):
        guest.link.send_frame(b"x" * size)
    assert guest.end_turn() == [b"x" * 59 + b"\0", b"x" * 60, b"x" * 61]
    assert guest.link.sent_bytes == 181


@pytest.mark.parametrize("size", [1, 5, 17, 18, 19])
def test_short_segments_are_padded(guest: Guest, size: int) -> None:
    """Of an IPv4 UDP super-frame, whose headers are 42 bytes long; the last one is shorter still."""
    flow = UdpFlow(b"\x0a\0\0\1\x0a\0\0\2" + bytes(4), b"", 0.0)
    flow.index = 0
    flow.build_header(bytes(6), bytes(6), 1500)
    data = bytes(range(1, 10 * size + 1)) + (b"" if size == 1 else b"!")
    guest.link.send_payload((flow.header(len(data), size), data))
    frames = guest.end_turn()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert [frame[42:] for frame in frames] == [padded(bytes(42) + piece)[42:] for piece in pieces]
    assert guest.link.sent_bytes == sum(map(len, frames))


def test_header_may_be_used_again_at_once(guest: Guest) -> None:
    hdr, data = bytearray(PLAIN + b"A"), bytearray(b"a" * 5000)
    guest.link.send_payload((hdr, memoryview(data)))
    hdr[:], data[:] = PLAIN + b"B", b"b" * 5000
    guest.link.send_payload((hdr, memoryview(data)))
    assert guest.end_turn() == [b"A" + b"a" * 5000, b"B" + b"b" * 5000]


def test_one_turn_one_call(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Sock:
        def fileno(self) -> int:
            return guest.ours.fileno()

        def setsockopt(self, *option: int) -> None:
            """Its buffer has any size."""

        def send(self, data: memoryview, flags: int) -> int:
            calls.append(len(data))
            return len(data)

    guest.link.attach(Sock())  # type: ignore[arg-type]
    for _ in range(10):
        guest.link.send_frame(bytes(100))
    guest.link.send_payload(super_frame(40, 1440))
    assert calls == []
    guest.link.at_turn_end(T0)
    assert calls == [10 * 104 + 40 * (78 + 1440)]
    guest.link.at_turn_end(T0)
    assert len(calls) == 1, "nothing to send"
    while len(calls) == 1:
        guest.link.send_frame(bytes(1000))
    assert FLUSH_AT - 1004 <= calls[1] <= FLUSH_AT, "a long turn goes in pieces"
    assert guest.wants == []


def test_super_frame_is_cut(guest: Guest) -> None:
    parts = super_frame(44, 1441)
    guest.link.send_payload(parts)
    hdr, data = parts
    guest.link.send_payload((hdr, data[:1441], data[1441:5000], data[5000:]))
    frames = guest.end_turn()
    assert len(frames) == 88
    assert frames[:44] == frames[44:]
    assert b"".join(f[74:] for f in frames[:44]) == payload(parts)


def test_counts_are_of_frames_as_the_guest_gets_them(guest: Guest) -> None:
    guest.link.send_frame(b"x" * 60)
    guest.link.send_payload(super_frame(20, 1460))
    frames = guest.end_turn()
    guest.link.send_frame(b"x" * (NET_BUFSIZE + 1))  # a drop
    assert (guest.link.sent_frames, guest.link.sent_bytes) == (21, sum(map(len, frames)))


def test_super_frame_longer_than_a_piece(guest: Guest) -> None:
    parts = super_frame(65515 // 28, 28)
    assert FLUSH_AT > 65515 // 28 * (28 + 78)
    for _ in range(3):
        guest.link.send_payload(parts)
    assert b"".join(f[74:] for f in guest.drain()) == 3 * payload(parts)


def test_capture_gets_what_the_guest_gets(guest: Guest) -> None:
    seen: list[tuple[bool, bytes]] = []
    guest.link.capture = lambda to_guest, frame: seen.append((to_guest, frame))
    guest.link.send_payload(super_frame(20, 1000))
    guest.link.send(bytearray(PLAIN + b"bare"))
    guest.link.send_frame(b"finished")
    guest.link.send_payload((PLAIN + b"x", bytes(30000)))
    assert seen == [(True, NO_OFFLOAD + frame) for frame in guest.end_turn()]
    assert all(type(frame) is bytes for _, frame in seen)
    guest.link.attach(None)
    guest.link.send_frame(b"nobody")
    guest.link.send_payload(super_frame(2, 100))
    assert len(seen) == 23, "what is dropped is not captured"


def test_frames_that_qemu_has_no_room_for(guest: Guest) -> None:
    guest.link.send_frame(bytes(NET_BUFSIZE + 1))
    guest.link.send_frame(bytes(NET_BUFSIZE))
    assert guest.drops == {"stream: frame too long": 1}
    assert guest.end_turn() == [bytes(NET_BUFSIZE)]


# A socket that is full ---------------------------------------------------------------------------------------------


def test_the_queue_may_be_short(guest: Guest) -> None:
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    for little, size in ((True, SEND_BUFFER_LITTLE), (False, SEND_BUFFER)):
        guest.link.queue_little(little)
        assert guest.ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * min(size, most)
    guest.link.attach(None)
    guest.link.queue_little(True)
    guest.close()
    guest.connect()
    assert guest.attached == 2 * min(SEND_BUFFER_LITTLE, most), "that of the next guest as well"


def test_full_socket_is_waited_for(guest: Guest) -> None:
    rooms: list[float] = []
    guest.link.on_room = rooms.append
    sent = guest.fill()
    assert guest.wants == [True]
    guest.link.send_frame(b"later")
    guest.link.at_turn_end(T0)
    guest.read(10)
    guest.link.at_turn_end(T0)
    assert guest.wants == [True], "asked once"
    assert rooms == []
    assert guest.drain() == [*sent, padded(b"later")]
    assert guest.wants == [True, False]
    assert rooms == [T0]
    assert not guest.drops
    guest.link.writable(T0)
    assert rooms == [T0] and guest.wants == [True, False], "an event that is late means nothing"


def test_full_buffer_drops_whole_frames(guest: Guest) -> None:
    sent = guest.fill()
    frame = bytes(65000)
    while not guest.drops:
        guest.link.send_frame(frame)
        sent.append(frame)
    sent.pop()
    assert guest.drops == {"stream full": 1}
    guest.link.send_payload(super_frame(45, 1440))
    assert guest.drops == {"stream full": 46}
    guest.link.send_frame(b"small enough")
    sent.append(padded(b"small enough"))
    assert guest.drain() == sent
    guest.link.send_frame(frame)
    assert guest.end_turn() == [frame]
    assert guest.drops == {"stream full": 46}


class SlowSocket:
    """Has room for `room` bytes."""

    def __init__(self) -> None:
        self.room = 0
        self.got = bytearray()

    def fileno(self) -> int:
        return 1000

    def setsockopt(self, *option: int) -> None:
        """Its buffer has any size."""

    def send(self, data: memoryview, flags: int) -> int:
        if not self.room:
            raise BlockingIOError(errno.EAGAIN, "")
        n = min(self.room, len(data))
        self.got += data[:n]
        self.room -= n
        return n


@pytest.mark.parametrize("pace", [1, 1000, 20_000, 49_990])
def test_room_is_the_same_wherever_the_stream_stands(monkeypatch: pytest.MonkeyPatch, pace: int) -> None:
    """LIMIT bytes wait, no more and no less, when part of the buffer was sent."""
    limit = 50_000
    monkeypatch.setattr(stream_socket, "LIMIT", limit)
    monkeypatch.setattr(stream_socket, "FLUSH_AT", limit // 2)
    drops: Counter[str] = Counter()
    link, sock = StreamLink(drops), SlowSocket()
    start(link, FakeReactor())
    link.attach(sock)  # type: ignore[arg-type]
    sent: list[bytes] = []
    for turn in range(60):
        while True:
            frame = bytes((turn, len(sent) & 0xFF)) * 500
            link.send_frame(frame)
            if drops.total() > turn:
                break
            sent.append(frame)
        waiting = sum(4 + len(f) for f in sent) - len(sock.got)
        assert limit - 1004 < waiting <= limit
        sock.room = pace
        link.writable(T0)
    sock.room = 1 << 20
    link.writable(T0)
    assert not link.full
    assert parse(bytes(sock.got)) == sent


@given(seed=st.integers(0, 1 << 32), sndbuf=st.sampled_from([1, 20_000]))
@settings(max_examples=20, deadline=None)
def test_any_reader_gets_what_was_accepted(seed: int, sndbuf: int) -> None:
    """Frames of all kinds and sizes against a tiny socket buffer and a reader that takes what it likes."""
    rng = random.Random(seed)
    with patch.multiple(stream_socket, LIMIT=1 << 18, FLUSH_AT=1 << 16), closing(Guest(sndbuf)) as guest:
        wanted: list[bytes] = []
        for number in range(300):
            dropped = guest.drops.total()
            if rng.random() < 0.1:
                count, size = rng.randrange(2, 45), rng.randrange(28, 1440)
                parts = super_frame(count, size)
                guest.link.send_payload(parts)
                ends = [payload(parts)[i * size : i * size + size] for i in range(count)]
            else:
                ends = [number.to_bytes(4, "big") + rng.randbytes(rng.choice((0, 40, 1500, 9000, 65000)))]
                guest.link.send_payload((PLAIN + ends[0][:2], ends[0][2:]))
            if guest.drops.total() == dropped:
                wanted += ends
            if rng.random() < 0.3:
                guest.link.at_turn_end(T0)
            if guest.link.full and rng.random() < 0.5:
                guest.read(rng.randrange(1, 200_000))
                guest.link.writable(T0)
            assert guest.link.full == (guest.wants[-1] if guest.wants else False)
        for frame, end in zip(guest.drain(), wanted, strict=True):
            assert frame.endswith(end) or frame == padded(frame[: frame.index(end) + len(end)])
        assert set(guest.drops) <= {"stream full"}


# A guest that comes and goes ---------------------------------------------------------------------------------------


def test_without_a_guest(guest: Guest) -> None:
    guest.link.attach(None)
    guest.link.send(bytearray(PLAIN + b"bare"))
    guest.link.send_frame(b"finished")
    guest.link.send_payload(super_frame(3, 1000))
    guest.link.at_turn_end(T0)
    guest.link.writable(T0)
    assert guest.drops == {"no guest": 5}
    assert guest.wants == []


def test_the_next_guest_begins_with_a_frame(guest: Guest) -> None:
    guest.fill()
    guest.link.send_frame(bytes(30000))
    guest.link.attach(None)
    guest.close()
    guest.connect()
    assert not guest.link.full
    guest.link.send_frame(b"welcome")
    assert guest.end_turn() == [padded(b"welcome")]


@pytest.mark.parametrize("when", ["turn end", "long turn", "writable"])
def test_guest_gone(guest: Guest, when: str) -> None:
    told: list[str] = []
    guest.link.on_gone = told.append
    if when == "writable":
        guest.fill()
    guest.theirs.close()
    if when == "long turn":
        for _ in range(FLUSH_AT // 1000 + 10):
            guest.link.send_frame(bytes(1000))
    guest.link.send_frame(b"last")
    guest.link.at_turn_end(T0)
    guest.link.writable(T0)
    (why,) = told
    assert why in (f"The guest's connection failed: {text}" for text in ("Broken pipe", "Connection reset by peer"))
    assert guest.loop.refs == {} and guest.loop.retired == [guest.ours]
    before = guest.drops["no guest"]
    guest.link.send_frame(b"nobody")
    guest.link.at_turn_end(T0)
    assert len(told) == 1 and guest.drops["no guest"] == before + 1


def test_guest_gone_without_an_owner(guest: Guest) -> None:
    guest.theirs.close()
    guest.link.send_frame(b"last")
    with pytest.raises(ConnectionError, match="Broken pipe"):
        guest.link.at_turn_end(T0)


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM, errno.EINTR])
def test_short_of_memory_is_as_good_as_full(guest: Guest, code: int) -> None:
    class Sock:
        failures = 1

        def fileno(self) -> int:
            return guest.ours.fileno()

        def setsockopt(self, *option: int) -> None:
            """Its buffer has any size."""

        def send(self, data: memoryview, flags: int) -> Any:
            if self.failures:
                self.failures -= 1
                raise OSError(code, "")
            return guest.ours.send(data, flags)

    guest.link.attach(Sock())  # type: ignore[arg-type]
    guest.link.send_frame(b"patience")
    guest.link.at_turn_end(T0)
    assert guest.wants == [True]
    guest.link.writable(T0)
    assert guest.wants == [True, False]
    assert guest.end_turn() == [padded(b"patience")]
