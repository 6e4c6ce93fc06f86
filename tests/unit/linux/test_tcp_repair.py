"""TCP_REPAIR with the running kernel, over loopback: what was read is made again, in every state that moves."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from struct import Struct
from typing import Any

import pytest

from passt import addr, repair
from passt.linux import tcp_repair, tcpinfo
from passt.linux.tcp_repair import OFF, OFF_WITHOUT_PROBE, ON, TCP_REPAIR, TCP_TIMESTAMP, NotMovable
from passt.wire.migration import FIN_ACKED, FIN_RECEIVED, FIN_SENT, OPTION_TIMESTAMPS, QUEUE_MAX, SocketState

from ...system.support import wait_for

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="TCP_REPAIR needs CAP_NET_ADMIN")
FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
BIG = random.Random(1).randbytes(1 << 20)
SO_MAX_PACING_RATE = 47


class LittleRoom(socket.socket):
    """A socket of a host whose net.core.wmem_max is 5,000 bytes."""

    def setsockopt(self, level: int, option: int, value: Any) -> None:  # type: ignore[override]
        if (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF):
            value = min(value, 5_000)
        super().setsockopt(level, option, value)


class Ends:
    """A connection: `ours`, which moves, and the peer's end."""

    def __init__(self, address: str, pace: int = 0) -> None:
        """`pace`: bytes a second that the kernel sends, in segments that are short enough for that."""
        self.address = address
        self.ours = socket.socket(FAMILIES[address])
        if pace:
            self.ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
            self.ours.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pace)
        with socket.create_server((address, 0), family=FAMILIES[address]) as listener:
            self.ours.connect(listener.getsockname()[:2])
            self.peer, _ = listener.accept()
        self.far = addr.packed(address), self.ours.getpeername()[1]
        self.peer.settimeout(10)

    def state(self, sock: socket.socket) -> int:
        return int(tcpinfo.tcp_info(sock)[0])

    def move(self, takes: float = 0.0, kind: type[socket.socket] = socket.socket) -> SocketState:
        """Read `ours`, close it, and make it again, of `kind`; it `takes` s between the first two."""
        tcp_repair.fence(self.ours)
        self.ours.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, ON)
        state = tcp_repair.read(self.ours, self.far, peek_off=False)
        time.sleep(takes)
        self.ours.close()
        self.ours = kind(FAMILIES[self.address])
        self.ours.setblocking(False)
        tcp_repair.fence(self.ours)
        repair._do(bytes([ON]), [self.ours.fileno()], whole=True)
        ends = ((addr.text(a), port) for a, port in (state.local, state.peer))
        queued = tcp_repair.restore(self.ours, state, *ends)
        tcp_repair.lift_fence(self.ours)
        self.ours.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF)
        self.rest = tcp_repair.finish(self.ours, state, queued)
        tcp_repair.lift_fence(self.ours)
        self.ours.settimeout(10)
        return state

    def close(self) -> None:
        self.ours.close()
        self.peer.close()


@pytest.fixture(params=FAMILIES)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(request.param)
    yield made
    made.close()


def read_all(sock: socket.socket, size: int) -> bytes:
    sock.settimeout(10)
    data = b""
    while len(data) < size:
        piece = sock.recv(1 << 20)
        assert piece
        data += piece
    return data


def timestamp(sock: socket.socket) -> int:
    """The timestamp that this end of a connection would send."""
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF


def set_timestamp(sock: socket.socket, ahead: int) -> None:
    """Let the clock of this end be `ahead` of what it is."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, ON)
    value = Struct("=I").pack(timestamp(sock) + ahead & 0xFFFFFFFE)  # an odd one would be in microseconds
    sock.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, value)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_WITHOUT_PROBE)


def fill(sock: socket.socket) -> bytes:
    """Send as much of BIG as is taken; what was taken."""
    sock.setblocking(False)
    sent = 0
    try:
        while sent < len(BIG):
            sent += sock.send(BIG[sent:])
    except BlockingIOError:
        pass
    return BIG[:sent]


def test_a_fenced_socket_hears_nothing_and_answers_nothing(ends: Ends) -> None:
    tcp_repair.fence(ends.ours)
    ends.peer.sendall(b"unheard")
    ends.ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ends.ours.recv(1)
    info = tcpinfo.Details.parse(tcpinfo.tcp_info(ends.peer))
    assert info.acked == 0
    tcp_repair.lift_fence(ends.ours)
    ends.ours.settimeout(10)
    assert ends.ours.recv(100) == b"unheard", "the peer sends it again"


@needs_root
def test_both_queues_and_their_order(ends: Ends) -> None:
    unread = fill(ends.peer)
    unsent = fill(ends.ours)
    state = ends.move()
    assert state.receive_queue == unread[: len(state.receive_queue)]
    assert state.send_queue == unsent[len(unsent) - len(state.send_queue) :]
    assert state.unsent
    assert state.fins == 0
    assert read_all(ends.peer, len(unsent)) == unsent
    ends.peer.sendall(b"after")
    assert read_all(ends.ours, len(unread) + 5) == unread + b"after"
    ends.ours.sendall(b"up")
    assert ends.peer.recv(10) == b"up"
    ends.peer.close()
    assert ends.ours.recv(1) == b""


@needs_root
def test_bytes_that_were_sent_and_not_acknowledged(ends: Ends) -> None:
    tcp_repair.fence(ends.peer)
    ends.ours.sendall(b"in flight")
    state = ends.move()
    assert (state.send_queue, state.unsent) == (b"in flight", 0)
    tcp_repair.lift_fence(ends.peer)
    assert ends.peer.recv(100) == b"in flight"


@needs_root
@pytest.mark.parametrize("address", FAMILIES)
@pytest.mark.parametrize("fin", [False, True])
def test_bytes_that_are_sent_after_they_were_read(address: str, fin: bool) -> None:
    """The kernel paces: without an acknowledgement, it sends more for as long as the peer's window has room."""
    ends = Ends(address, pace=50_000)
    try:
        data = BIG[:60_000]  # which the peer's window has room for
        ends.ours.sendall(data)
        if fin:
            ends.ours.shutdown(socket.SHUT_WR)
        state = ends.move(takes=0.3)
        assert state.unsent
        assert read_all(ends.peer, len(data)) == data
        if fin:
            assert ends.peer.recv(1) == b""
        else:
            ends.ours.sendall(b"after")
            assert ends.peer.recv(100) == b"after"
    finally:
        ends.close()


@needs_root
def test_many_bytes_in_flight_fit(ends: Ends) -> None:
    """More than the send buffer of a new socket."""
    tcp_repair.fence(ends.peer)
    ends.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
    sent = fill(ends.ours)
    state = ends.move()
    assert len(state.send_queue) == len(sent) > 100_000
    tcp_repair.lift_fence(ends.peer)
    assert read_all(ends.peer, len(sent)) == sent


@needs_root
def test_more_bytes_in_flight_than_a_new_socket_may_have(ends: Ends) -> None:
    """The helper makes room for them, and the buffer is an ordinary one afterwards."""
    tcp_repair.fence(ends.peer)
    ends.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
    sent = fill(ends.ours)
    state = ends.move(kind=LittleRoom)
    assert len(state.send_queue) - state.unsent > 40_000
    assert ends.ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 10_000
    tcp_repair.lift_fence(ends.peer)
    ends.ours.settimeout(10)
    assert read_all(ends.peer, len(sent) - len(ends.rest)) + ends.rest == sent
    ends.ours.sendall(ends.rest + b"after")
    assert read_all(ends.peer, len(ends.rest) + 5) == ends.rest + b"after"


@needs_root
def test_timestamps_go_on_from_where_they_were(ends: Ends) -> None:
    """The clock of another kernel is another one, and the peer discards segments with old timestamps (RFC 7323, 5)."""
    set_timestamp(ends.ours, 1 << 30)
    ends.ours.sendall(b"before")
    assert ends.peer.recv(100) == b"before"
    before = timestamp(ends.ours)
    state = ends.move()
    assert state.options & OPTION_TIMESTAMPS
    assert 0 <= timestamp(ends.ours) - before & 0xFFFFFFFF < 60_000
    for i in range(3):
        ends.ours.sendall(b"%d" % i)
        assert ends.peer.recv(100) == b"%d" % i
        ends.peer.sendall(b"%d" % i)
        assert ends.ours.recv(100) == b"%d" % i


@needs_root
@pytest.mark.parametrize("address", FAMILIES)
@pytest.mark.parametrize("fin", [False, True])
def test_bytes_without_room_are_handed_back(address: str, fin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former socket has grown beyond what a new one may have."""
    ends = Ends(address, pace=50_000)
    try:
        ends.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 300_000)
        taken = fill(ends.ours)
        if fin:
            ends.ours.shutdown(socket.SHUT_WR)
        small = socket.SOL_SOCKET, socket.SO_SNDBUF, 40_000
        monkeypatch.setattr(tcp_repair, "_enlarge", lambda sock, size: sock.setsockopt(*small))
        state = ends.move()
        assert 0 < len(ends.rest) < state.unsent
        assert taken.endswith(ends.rest)
        assert read_all(ends.peer, len(taken) - len(ends.rest)) == taken[: -len(ends.rest)]
        ends.ours.sendall(ends.rest[:100])
        assert read_all(ends.peer, 100) == ends.rest[:100], "no FIN before the rest"
    finally:
        ends.close()


@needs_root
def test_bytes_that_were_sent_and_have_no_room_do_not_move(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer may have them, and the kernel would ignore what the peer says then."""
    tcp_repair.fence(ends.peer)
    fill(ends.ours)
    monkeypatch.setattr(tcp_repair, "_fill", lambda sock, data: len(data) - 1)
    with pytest.raises(OSError, match="No buffer space"):
        ends.move()


@needs_root
@pytest.mark.parametrize("data", [b"", b"data"])
def test_fin_that_the_peer_has_acknowledged(ends: Ends, data: bytes) -> None:
    ends.ours.shutdown(socket.SHUT_WR)
    wait_for(lambda: ends.state(ends.ours) == 5, "FIN-WAIT-2")
    ends.peer.sendall(data)
    state = ends.move()
    assert state.fins == FIN_SENT | FIN_ACKED
    assert ends.peer.recv(1) == b""
    ends.peer.sendall(b"answer")
    assert read_all(ends.ours, len(data) + 6) == data + b"answer"
    ends.peer.close()
    assert ends.ours.recv(1) == b""


@needs_root
@pytest.mark.parametrize("answered", [False, True])
def test_fin_that_the_peer_has_not_acknowledged(ends: Ends, answered: bool) -> None:
    if answered:
        ends.peer.shutdown(socket.SHUT_WR)
        assert ends.ours.recv(1) == b""
    tcp_repair.fence(ends.peer)
    ends.ours.sendall(b"last words")
    ends.ours.shutdown(socket.SHUT_WR)
    state = ends.move()
    assert state.fins == FIN_SENT | (FIN_RECEIVED if answered else 0)
    assert state.send_queue == b"last words"
    tcp_repair.lift_fence(ends.peer)
    assert read_all(ends.peer, 10) == b"last words"
    assert ends.peer.recv(1) == b""


@needs_root
def test_fin_behind_bytes_that_were_never_sent(ends: Ends) -> None:
    unsent = fill(ends.ours)
    ends.ours.shutdown(socket.SHUT_WR)
    state = ends.move()
    assert state.fins == FIN_SENT
    assert state.unsent
    assert read_all(ends.peer, len(unsent)) == unsent
    assert ends.peer.recv(1) == b""


@needs_root
def test_fin_of_the_peer(ends: Ends) -> None:
    """It is not made again: the caller knows of it, and the peer may still be told something."""
    ends.peer.sendall(b"question")
    ends.peer.shutdown(socket.SHUT_WR)
    wait_for(lambda: ends.state(ends.ours) == 8, "CLOSE-WAIT")
    state = ends.move()
    assert (state.fins, state.receive_queue) == (FIN_RECEIVED, b"question")
    ends.ours.sendall(b"answer")
    ends.ours.shutdown(socket.SHUT_WR)
    assert read_all(ends.peer, 6) == b"answer"
    assert ends.peer.recv(1) == b""
    assert ends.ours.recv(100) == b"question"


@needs_root
def test_options_stay(ends: Ends) -> None:
    before = tcpinfo.tcp_info(ends.ours)
    state = ends.move()
    after = tcpinfo.tcp_info(ends.ours)
    assert before[5] & 7 == after[5] & 7 == state.options
    assert before[6] == after[6] == state.snd_wscale | state.rcv_wscale << 4
    assert ends.ours.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


@needs_root
def test_an_address_of_another_host(ends: Ends) -> None:
    state = SocketState(
        (addr.packed("192.0.2.1"), 1234), (addr.packed("192.0.2.2"), 80), 1, 2, b"", 0, b"", 0, 1460, 0, 0, 0, 0, 0, 0,
        0, 0, 0,
    )  # fmt: skip
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, ON)
        with pytest.raises(OSError, match="Cannot assign"):
            tcp_repair.restore(sock, state, ("192.0.2.1", 1234), ("192.0.2.2", 80))


@needs_root
def test_a_closed_socket_does_not_move(ends: Ends) -> None:
    ends.peer.close()
    ends.ours.close()
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, ON)
        with pytest.raises(NotMovable, match="a socket in state 7"):
            tcp_repair.read(sock, ends.far, peek_off=False)


def test_a_queue_has_a_limit(ends: Ends) -> None:
    with pytest.raises((NotMovable, OSError)):
        tcp_repair._queue(ends.ours, 1, 4 * QUEUE_MAX + 1)
