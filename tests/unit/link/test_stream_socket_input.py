"""The stream from a virtual machine: framing, however the bytes are split."""

from __future__ import annotations

import itertools
import random
import select
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.drops import Reason
from passt.link.packet import PacketPool
from passt.link.stream_socket import LENGTH, NET_BUFSIZE, SENT_MAX, SENT_MIN, StreamLink

from ..support import T0, FakeReactor, FakeReceiver


class Wire:
    """A stream, its far end, and what came of it."""

    def __init__(self) -> None:
        self.pool = PacketPool(1 << 20)
        self.tap = FakeReceiver(self.pool.mv)
        self.ends: list[str] = []
        self.drops: Counter[Reason] = Counter()
        self.stream = StreamLink(self.drops)
        self.stream.on_gone = self.ends.append
        self.loop = FakeReactor()
        self.stream.start(cast(Any, self.loop), self.pool, self.tap)
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.stream.attach(self.near)

    def send(self, data: bytes) -> None:
        """Send, and let the stream read all of it."""
        view = memoryview(data)
        self.far.setblocking(False)
        while view:
            view = view[self.far.send(view) :]
            self.turn()
        while not self.ends and select.select([self.near], [], [], 0)[0]:
            self.turn()

    def turn(self) -> None:
        self.stream.read(T0)

    def close(self) -> None:
        self.stream.attach(None)
        self.loop.close_retired()
        self.near.close()
        self.far.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(LENGTH.pack(len(f)) + f for f in frames)


def test_byte_by_byte(wire: Wire) -> None:
    frames = [bytes(range(14)), b"x" * 60]
    for byte in framed(*frames):
        wire.send(bytes((byte,)))
    assert wire.tap.frames == frames
    assert (wire.tap.count, wire.tap.octets) == (2, 74)


def test_many_at_once(wire: Wire) -> None:
    frames = [random.Random(i).randbytes(14 + i * 7) for i in range(300)]
    wire.send(framed(*frames))
    assert wire.tap.frames == frames
    assert wire.tap.batches < 10
    assert (wire.tap.count, wire.tap.octets) == (300, sum(map(len, frames)))


def test_longest_and_shortest(wire: Wire) -> None:
    frames = [bytes(SENT_MAX), bytes(SENT_MIN)] * 40
    wire.send(framed(*frames))
    assert wire.tap.frames == frames
    assert not wire.ends


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (0, "truncated"),
        (1, "truncated"),
        (SENT_MIN - 1, "truncated"),
        (SENT_MAX + 1, "oversized frame"),
        (NET_BUFSIZE, "oversized frame"),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_lengths_of_no_frame_are_skipped(wire: Wire, length: int, reason: str, piece: int) -> None:
    frames = [b"before" * 10, b"behind" * 10]
    data = framed(frames[0], bytes(length), bytes(length), frames[1])
    for at in range(0, len(data), piece):
        wire.send(data[at : at + piece])
    assert wire.tap.frames == frames
    assert (wire.tap.count, wire.tap.octets) == (2, 120)
    assert wire.drops == {reason: 2}
    assert not wire.ends


def test_nothing_but_lengths_of_no_frame(wire: Wire) -> None:
    wire.send(framed(*[b""] * 1000))
    assert (wire.tap.frames, wire.drops) == ([], {"truncated": 1000})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 4000), st.integers(SENT_MAX - 2, NET_BUFSIZE)), max_size=40),
    st.lists(st.integers(1, 9000), min_size=1),
    st.integers(),
)
def test_any_split_gives_the_same_frames(sizes: list[int], cuts: list[int], seed: int) -> None:
    wire = Wire()
    rng = random.Random(seed)
    frames = [rng.randbytes(size) for size in sizes]
    data = framed(*frames)
    at = 0
    lengths = itertools.chain(itertools.islice(itertools.cycle(cuts), 2000), itertools.repeat(len(data)))
    while at < len(data):  # one byte at a time would take a million reads
        end = at + next(lengths)
        wire.send(data[at:end])
        at = end
    valid = [frame for frame in frames if SENT_MIN <= len(frame) <= SENT_MAX]
    assert wire.tap.frames == valid
    assert wire.tap.octets == sum(map(len, valid))
    assert wire.drops.total() == len(frames) - len(valid)
    wire.close()


@pytest.mark.parametrize("length", [NET_BUFSIZE + 1, 1 << 20, (1 << 32) - 1])
def test_a_lie_ends_the_client_with_one_message(wire: Wire, length: int) -> None:
    wire.send(LENGTH.pack(length) + bytes(50))
    assert wire.ends == [f"The guest sent a frame length of {length} (up to 69632 are possible)"]


def test_frames_before_a_lie_count(wire: Wire) -> None:
    wire.send(framed(bytes(20)) + LENGTH.pack(1 << 24))
    assert wire.tap.frames == [bytes(20)]
    assert len(wire.ends) == 1


def test_the_end(wire: Wire) -> None:
    wire.far.close()
    wire.turn()
    assert wire.ends == ["The guest closed the connection"]


def test_the_end_in_the_middle_of_a_frame(wire: Wire) -> None:
    wire.send(framed(bytes(100))[:50])
    wire.far.close()
    wire.turn()
    assert wire.ends == ["The guest closed the connection in the middle of a frame"]
    assert not wire.tap.frames


def test_input_of_the_next_client_begins_with_its_first_frame(wire: Wire) -> None:
    wire.send(framed(bytes(100))[:50])
    wire.stream.attach(None)
    wire.turn()
    near, far = socket.socketpair()
    near.setblocking(False)
    wire.stream.attach(near)
    far.send(framed(b"the frame of another"))
    wire.turn()
    assert wire.tap.frames == [b"the frame of another"]
    near.close()
    far.close()


def test_a_reset_is_an_end(wire: Wire) -> None:
    wire.near.send(b"unread")
    wire.far.close()
    wire.turn()
    assert wire.ends == ["The guest's connection failed: Connection reset by peer"]


def test_nothing_there(wire: Wire) -> None:
    wire.turn()
    assert not wire.ends


def test_what_waits_is_read_ahead_of_a_timer(wire: Wire) -> None:
    wire.far.send(framed(bytes(60)))
    wire.stream.catch_up(T0)
    assert len(wire.tap.frames) == 1
    wire.stream.attach(None)
    wire.stream.catch_up(T0)
    assert len(wire.tap.frames) == 1
