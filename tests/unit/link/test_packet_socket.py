"""The socket of packets of a machine: a frame is a packet, in both directions."""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest

from passt.drops import Reason
from passt.link.packet import PacketPool
from passt.link.packet_socket import BATCH, PacketLink
from passt.link.stream_socket import LIMIT, SENT_MAX, SENT_MIN
from passt.wire.virtio import NO_OFFLOAD

from ..support import T0, FakeReactor, FakeReceiver


class Wire:
    """A link, the far end of its socket, and what came of it."""

    def __init__(self) -> None:
        pool = PacketPool(1 << 20)
        self.tap = FakeReceiver(pool.mv)
        self.ends: list[str] = []
        self.drops: Counter[Reason] = Counter()
        self.link = PacketLink(self.drops)
        self.link.on_gone = self.ends.append
        self.loop = FakeReactor()
        self.link.start(cast(Any, self.loop), pool, self.tap)
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.near, self.far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.link.attach(self.near)

    def arrived(self) -> list[bytes]:
        """The packets at the far end."""
        found = []
        try:
            while packet := self.far.recv(1 << 17):
                found.append(packet)
        except BlockingIOError:
            pass
        return found

    def close(self) -> None:
        self.link.attach(None)
        self.loop.close_retired()
        self.near.close()
        self.far.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def test_from_the_guest(wire: Wire) -> None:
    frames = [random.Random(i).randbytes(14 + i * 20) for i in range(BATCH)]
    for frame in frames:
        wire.far.send(frame)
    wire.link.read(T0)
    assert wire.tap.frames == frames
    assert (wire.tap.batches, wire.tap.count, wire.tap.octets) == (1, BATCH, sum(map(len, frames)))
    wire.link.read(T0)
    assert wire.tap.batches == 1, "there is nothing more"


def test_a_batch_ends_where_the_pool_does(wire: Wire) -> None:
    """The rest waits in the socket for the next turn."""
    frames = [os.urandom(SENT_MAX), os.urandom(SENT_MIN)] * 20
    for frame in frames:
        wire.far.send(frame)
    turns = 0
    while len(wire.tap.frames) < len(frames):
        wire.link.read(T0)
        turns += 1
        assert turns < 10
    assert wire.tap.frames == frames and turns > 1


@pytest.mark.parametrize(
    ("length", "reason"),
    [(1, "truncated"), (SENT_MIN - 1, "truncated"), (SENT_MAX + 1, "oversized frame"), (100_000, "oversized frame")],
)
def test_what_is_no_frame_is_skipped(wire: Wire, length: int, reason: str) -> None:
    frames = [b"before" * 10, b"behind" * 10]
    for packet in (frames[0], bytes(length), frames[1]):
        wire.far.send(packet)
    wire.link.read(T0)
    assert (wire.tap.frames, wire.drops, wire.ends) == (frames, {reason: 1}, [])


def test_the_end_comes_after_the_last_frame(wire: Wire) -> None:
    wire.far.send(b"x" * 60)
    wire.far.close()
    wire.link.read(T0)
    assert (wire.tap.frames, wire.ends) == ([b"x" * 60], ["The guest closed the connection"])
    wire.link.read(T0)
    assert len(wire.ends) == 1


def test_an_error_is_the_end(wire: Wire) -> None:
    """A frame that the guest did not read when it closed: the connection is reset."""
    wire.link.send_frame(b"y" * 60)
    wire.link.at_turn_end(T0)
    wire.far.close()
    wire.link.read(T0)
    assert wire.ends == ["The guest's connection failed: Connection reset by peer"]


def test_to_the_guest(wire: Wire) -> None:
    frames = [random.Random(i).randbytes(60 + i) for i in range(200)]
    for frame in frames:
        wire.link.send_frame(frame)
    wire.link.send_payload((NO_OFFLOAD + b"short", b"er"))
    wire.link.at_turn_end(T0)
    assert wire.arrived() == [*frames, b"shorter".ljust(60, b"\0")]
    assert not wire.link.full and not wire.drops


def test_a_socket_that_is_full_takes_the_rest_later(wire: Wire) -> None:
    wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    frames = [random.Random(i).randbytes(1514) for i in range(300)]
    room: list[float] = []
    wire.link.on_room = room.append
    for frame in frames:
        wire.link.send_frame(frame)
    wire.link.at_turn_end(T0)
    assert wire.link.full and not room
    arrived = []
    for _ in range(len(frames)):
        arrived += wire.arrived()
        wire.link.writable(T0)
    assert (arrived, wire.link.full, room) == (frames, False, [T0])


def test_a_frame_longer_than_the_buffer_of_the_socket_is_a_drop(wire: Wire) -> None:
    wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    wire.link.send_frame(b"a" * 60)
    wire.link.send_frame(bytes(60_000))
    wire.link.send_frame(b"b" * 60)
    wire.link.at_turn_end(T0)
    assert wire.arrived() == [b"a" * 60, b"b" * 60]
    assert wire.drops == {"stream: frame too long": 1}


def test_a_guest_that_reads_nothing_costs_no_more_than_the_limit(wire: Wire) -> None:
    wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    frame = bytes(60_000)
    for _ in range(LIMIT // len(frame) + 100):
        wire.link.send_frame(bytes(1500))
        wire.link.send_frame(frame)
    assert wire.drops.keys() == {"stream full", "stream: frame too long"}
