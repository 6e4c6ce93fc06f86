"""Batches of datagrams between a socket of the loopback and memory."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from passt.flow.context import Context
from passt.flow.table import ACTIVE, FREE, Flow
from passt.linux.mmsg import Receiver
from passt.linux.sockopt import RECEIVE_CLASS, SOL_UDP, TRAFFIC_CLASS, UDP_GRO, UDP_SEGMENT
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp_engine import io as udp_io
from passt.udp_engine.gso_batch import GsoBatch
from passt.udp_engine.io import Pauses, datagram_count, receive_one, retry_send, set_gso_size, transmit

from ..support import T0, reactor, timers


class End:
    """The state of a socket in its flow."""

    def __init__(self, sock: Any, segments: int = 64) -> None:
        self.sock = sock
        self.fd: int = sock.fileno()
        self.gro = False
        self.gso_size = 0
        self.gso_max_segs = segments


Pair = tuple[End, End]


def receive(receiver: Receiver, end: Any, gro: bool, segments: int) -> list[GsoBatch]:
    """Of traffic class zero."""
    ((tos, batches),) = udp_io.receive(receiver, end, gro, segments)
    assert tos == 0
    return batches


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(receiver, sender), connected to each other over the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        a.bind(("127.0.0.1", 0))
        b.connect(a.getsockname())
        a.connect(b.getsockname())
        a.settimeout(5)
        yield End(a), End(b)


def views(*data: bytes) -> list[memoryview]:
    return [memoryview(d) for d in data]


def test_transmit_changes_the_segment_size_only_when_it_must(pair: Pair) -> None:
    a, b = pair
    set_gso_size(b, 700)
    assert b.sock.getsockopt(SOL_UDP, UDP_SEGMENT) == b.gso_size == 700
    for sizes, segment in (((500,), 700), ((), 700), ((300, 300, 9), 300), ((400,), 0), ((100, 100), 100)):
        sent = [os.urandom(n) for n in sizes]
        transmit(b, sizes[0] if sizes else 0, sum(sizes), views(*sent))
        assert [a.sock.recv(65536) for _ in sizes or (0,)] == (sent or [b""])
        assert b.sock.getsockopt(SOL_UDP, UDP_SEGMENT) == b.gso_size == segment


def test_receive_joins_as_soon_as_several_come_at_once(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver()
    for count, gro in ((udp_io.GRO_MIN - 1, False), (udp_io.GRO_MIN, True)):
        for _ in range(count):
            b.sock.send(b"abc")
        assert [(size, total) for size, total, _ in receive(receiver, a, True, 64)] == [(3, 3 * count)]
        assert bool(a.sock.getsockopt(SOL_UDP, UDP_GRO)) == a.gro == gro
    transmit(b, 3, 8, views(b"abcdefgh"))
    assert [(size, total, list(map(bytes, v))) for size, total, v in receive(receiver, a, True, 64)] == [
        (3, 8, [b"abcdefgh"])
    ]
    with pytest.raises(BlockingIOError):
        receive(receiver, a, True, 64)


def test_traffic_classes_part_batches(pair: Pair) -> None:
    a, b = pair
    a.sock.setsockopt(*RECEIVE_CLASS[0], 1)
    for tos, count in ((0, 2), (0xB8, 3), (1, 1), (0, 1)):
        b.sock.setsockopt(*TRAFFIC_CLASS[0], tos)
        for _ in range(count):
            b.sock.send(b"abc")
    found = udp_io.receive(Receiver(), a, False, 64)
    assert [(tos, [(size, total) for size, total, _ in batches]) for tos, batches in found] == [
        (0, [(3, 6)]),
        (0xB8, [(3, 9)]),
        (1, [(3, 3)]),
        (0, [(3, 3)]),
    ]


def test_one_datagram_with_its_class(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver()
    for asked, tos in ((False, 0), (True, 0xB9)):
        a.sock.setsockopt(*RECEIVE_CLASS[0], asked)
        b.sock.setsockopt(*TRAFFIC_CLASS[0], 0xB9)
        b.sock.send(b"abc")
        assert receive_one(receiver, a.sock) == (3, tos) and receiver.mv[:3] == b"abc"


def test_receive_for_one_who_takes_single_datagrams_only(pair: Pair) -> None:
    a, b = pair
    for _ in range(9):
        b.sock.send(b"abc")
    assert [(size, total) for size, total, _ in receive(Receiver(), a, False, 1)] == [(3, 3)] * 9
    assert not a.gro


@pytest.mark.parametrize(("size", "total", "count"), [(0, 0, 1), (5, 5, 1), (5, 10, 2), (5, 11, 3)])
def test_datagrams_in_a_run(size: int, total: int, count: int) -> None:
    assert datagram_count(size, total) == count


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_an_error_of_an_earlier_datagram_is_reported_and_the_run_sent(pair: Pair) -> None:
    a, b = pair
    reported: list[bool] = []
    e = failure(errno.ECONNREFUSED)
    assert list(retry_send(b, 3, 6, views(b"abcdef"), e, lambda: reported.append(True))) == []
    assert [a.sock.recv(9), a.sock.recv(9)] == [b"abc", b"def"]
    assert reported == [True]


def test_a_full_buffer_is_a_drop(pair: Pair) -> None:
    a, b = pair
    a.sock.setblocking(False)
    failures = list(retry_send(b, 3, 8, views(b"abcdefgh"), failure(errno.ENOBUFS), lambda: pytest.fail("no error")))
    assert [(e.errno, count, bytes(first)) for e, count, first in failures] == [(errno.ENOBUFS, 3, b"abcdefgh")]
    with pytest.raises(BlockingIOError):
        a.sock.recv(9)


def test_what_cannot_be_segmented_is_sent_singly_from_then_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    set_gso_size(b, 3)
    writev = os.writev

    def unsegmented(fd: int, buffers: list[memoryview]) -> int:
        if b.gso_size:
            raise failure(errno.EIO)
        return writev(fd, buffers)

    monkeypatch.setattr(os, "writev", unsegmented)
    assert list(retry_send(b, 3, 8, views(b"abc", b"def", b"gh"), failure(errno.EIO), lambda: None)) == []
    assert [a.sock.recv(9) for _ in range(3)] == [b"abc", b"def", b"gh"]
    assert (b.gso_max_segs, b.gso_size) == (1, 0)


def test_what_is_too_big_for_good_is_told(pair: Pair) -> None:
    _, b = pair
    data = bytes(65520)
    ((e, count, first),) = retry_send(b, len(data), len(data), views(data), failure(errno.EMSGSIZE), lambda: None)
    assert (e.errno, count, len(first)) == (errno.EMSGSIZE, 1, 65520)


def no_fault(flow: Flow, e: Exception) -> None:
    raise e


@pytest.mark.parametrize(("count", "paused"), [(1, False), (3, False), (4, True), (31, True), (32, False)])
def test_pauses(ctx: Context, pair: Pair, count: int, paused: bool) -> None:
    taken: list[Any] = []
    pauses = Pauses(ctx, lambda *what: taken.append(what), no_fault)
    a, _ = pair
    flow = Flow(b"")
    flow.state = ACTIVE
    reactor(ctx).watch(a.fd, 4, 0, EPOLLIN | EPOLLERR)
    pauses.after(count, flow, a, T0)
    assert reactor(ctx).events[a.fd] == (EPOLLERR if paused else EPOLLIN | EPOLLERR)
    services = timers(ctx).services
    assert services.deadlines == [T0 + udp_io.PAUSE if paused else None]
    if paused:
        services.fire(0)
        assert taken == [(flow, a, T0 + udp_io.PAUSE)]
        assert reactor(ctx).events[a.fd] == EPOLLIN | EPOLLERR


def test_a_pause_that_outlives_its_flow(ctx: Context, pair: Pair) -> None:
    pauses = Pauses(ctx, lambda *what: pytest.fail("the flow has ended"), no_fault)
    a, _ = pair
    flow = Flow(b"")
    reactor(ctx).watch(a.fd, 4, 0, EPOLLIN | EPOLLERR)
    pauses.after(4, flow, a, T0)
    assert flow.state == FREE
    timers(ctx).services.fire(0)


# Sends that fail, by a script ----------------------------------------------------------------------------------------


class Script:
    """A socket of which each send meets the next of `errors`, 0: none. Notes what was done."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)
        self.done: list[Any] = []

    def fileno(self) -> int:
        return -1

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert (level, option) == (SOL_UDP, UDP_SEGMENT)
        self.done.append(value)

    def send(self, data: bytes) -> None:
        self.write([memoryview(data)])

    def write(self, buffers: list[memoryview]) -> None:
        number = self.errors.pop(0) if self.errors else 0
        if number:
            raise failure(number)
        self.done.append(b"".join(buffers))

    def failures(self, size: int, *datagrams: bytes, gso_size: int = 0) -> list[tuple[int | None, int, bytes]]:
        """The failures of `retry_send` after a first send that has failed with EIO."""
        end = End(self)
        end.gso_size = gso_size
        total = sum(map(len, datagrams))
        found = retry_send(end, size, total, views(*datagrams), failure(errno.EIO), lambda: self.done.append("report"))
        return [(e.errno, count, bytes(first)) for e, count, first in found]


def test_each_datagram_that_fails_is_tried_once_more_and_then_told() -> None:
    """The second is refused for good, the third met an error of an earlier one."""
    sock = Script(errno.EIO, 0, errno.EPERM, errno.EPERM, errno.ECONNREFUSED, 0)
    assert sock.failures(2, b"ab", b"cd", b"e", gso_size=2) == [(errno.EPERM, 1, b"cd")]
    assert sock.done == ["report", 0, b"ab", "report", "report", b"e"]


def test_a_datagram_that_is_no_longer_than_the_segment_size() -> None:
    """It was not to be segmented, and is sent as one when nothing is."""
    sock = Script(errno.EINVAL)
    assert sock.failures(2, b"ab", gso_size=5) == []
    assert sock.done == ["report", 0, b"ab"]


def test_an_empty_datagram_beside_a_segment_size_is_sent_once() -> None:
    sock = Script(errno.EINVAL)
    assert sock.failures(0, b"", gso_size=5) == []
    assert sock.done == ["report", 0, b""]


def test_without_segments_a_failure_is_told_at_once() -> None:
    sock = Script(errno.EIO)
    assert sock.failures(2, b"ab") == [(errno.EIO, 1, b"ab")]
    assert sock.done == ["report"]


def test_a_fault_after_a_pause_is_the_flows(ctx: Context, pair: Pair) -> None:
    faults: list[Any] = []
    fault = RuntimeError("ours")

    def take(*_: Any) -> None:
        raise fault

    pauses = Pauses(ctx, take, lambda *what: faults.append(what))
    a, _ = pair
    flow = Flow(b"")
    flow.state = ACTIVE
    reactor(ctx).watch(a.fd, 4, 0, EPOLLIN | EPOLLERR)
    pauses.after(4, flow, a, T0)
    timers(ctx).services.fire(0)
    assert faults == [(flow, fault)]
