from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from passt.linux.mmsg import COUNT, SLOT, Receiver
from passt.linux.sockopt import SOL_UDP, UDP_GRO, UDP_SEGMENT

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(receiver, sender), connected over the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        a.bind(("127.0.0.1", 0))
        b.connect(a.getsockname())
        yield a, b


def datagrams(r: Receiver, lengths: list[int]) -> list[bytes]:
    return [bytes(r.mv[i * SLOT : i * SLOT + n]) for i, n in enumerate(lengths)]


def test_sizes_of_all_kinds_in_one_call(pair: Pair) -> None:
    a, b = pair
    sent = [os.urandom(n) for n in (1, 0, 1400, 65507, 7)]
    for d in sent:
        b.send(d)
    r = Receiver()
    lengths, sizes = r.receive(a.fileno())
    assert lengths == [1, 0, 1400, 65507, 7]
    assert sizes == [0] * 5
    assert datagrams(r, lengths) == sent


def test_no_more_than_there_are_slots(pair: Pair) -> None:
    a, b = pair
    for i in range(COUNT + 3):
        b.send(bytes((i,)))
    r = Receiver()
    lengths, _ = r.receive(a.fileno())
    assert datagrams(r, lengths) == [bytes((i,)) for i in range(COUNT)]
    lengths, _ = r.receive(a.fileno())
    assert datagrams(r, lengths) == [bytes((COUNT + i,)) for i in range(3)]


def test_few_slots(pair: Pair) -> None:
    a, b = pair
    for _ in range(3):
        b.send(b"x")
    assert Receiver(2).receive(a.fileno()) == ([1, 1], [0, 0])


def test_nothing_waits(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        Receiver().receive(pair[0].fileno())


def test_errors_carry_their_errno() -> None:
    with pytest.raises(OSError, match="recvmmsg: ") as e:
        Receiver().receive(-1)
    assert e.value.errno == errno.EBADF


def test_joined_datagrams_tell_their_size_and_the_next_call_forgets_it(pair: Pair) -> None:
    a, b = pair
    a.setsockopt(SOL_UDP, UDP_GRO, 1)
    b.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
    payload = os.urandom(4500)
    b.send(payload)
    r = Receiver()
    assert r.receive(a.fileno()) == ([4500], [1000])
    assert datagrams(r, [4500]) == [payload]
    b.send(b"single")
    assert r.receive(a.fileno()) == ([6], [0])
