"""A connection moves: the guest sees one conversation, which one program begins and another one goes on with.

The kernel's side is in `tests/unit/linux/test_tcp_repair.py`.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest

from passt.drops import Drop
from passt.linux import tcp_repair
from passt.linux.sockopt import SO_PEEK_OFF, TRAFFIC_CLASS
from passt.linux.tcp_repair import IP_MINTTL, NotMovable
from passt.linux.tcpinfo import BYTES_ACKED, BYTES_RECEIVED
from passt.loop.reactor import EPOLLIN, EPOLLOUT, EPOLLRDHUP, INTEREST
from passt.tcp_engine import moving
from passt.tcp_engine.conn import SOCK_FIN_RCVD, TAP_FIN_RCVD, TcpConn
from passt.wire.migration import FIN_RECEIVED, FIN_SENT, ConnectionState, SocketState, State
from passt.wire.tcp import ACK, FIN, PSH, RST

from ..support import T0, reactor
from ..tcp_support import FakeSocket, Talk, accepted_connection, fake_sockets, open_connection

__all__ = ["fake_sockets"]

FENCE = socket.IPPROTO_IP, IP_MINTTL
LOCAL, PEER = (bytes((192, 0, 2, 2)), 50000), (bytes((198, 51, 100, 7)), 80)
SOCKET = SocketState(LOCAL, PEER, 1, 2, b"", 0, b"", 0, 1460, 7, 7, 7, 1, 2, 3, 4, 5, 6)


@pytest.fixture(autouse=True)
def repair(fake_sockets: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, SocketState]]:
    """Sockets that were restored, with their states; a socket is read with what it has received."""
    made: list[tuple[Any, SocketState]] = []

    def read(sock: Any, peer: tuple[bytes, int], *, peek_off: bool) -> SocketState:
        return replace(SOCKET, receive_queue=bytes(sock.incoming))

    def restore(sock: Any, state: SocketState, local: Any, peer: Any) -> int:
        made.append((sock, state))
        sock.bound, sock.peer = local, peer
        sock.incoming += state.receive_queue
        return len(state.send_queue)

    monkeypatch.setattr(tcp_repair, "read", read)
    monkeypatch.setattr(tcp_repair, "restore", restore)
    monkeypatch.setattr(tcp_repair, "finish", lambda sock, state, queued: b"")
    monkeypatch.setattr(moving, "new_socket", FakeSocket)
    return made


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._table.by_key.values()
    return conn


def mover(talk: Talk) -> moving.TcpMoving:
    return talk.tcp.mover()


def over(talk: Talk) -> bool:
    """Whether nothing is left."""
    return not talk.ctx.flows.count and not talk.tcp._conns


def leave(talk: Talk) -> ConnectionState:
    """Halt and describe the only connection, as it is emitted and parsed."""
    (conn,) = mover(talk).established()
    sock = mover(talk).halt(conn)
    state = State(bytes(6), bytes(4), bytes(16), bytes(16), (mover(talk).describe(conn, sock),))
    return State.parse(state.emit()).connections[0]


def arrive(talk: Talk, state: ConnectionState) -> Talk:
    """The same conversation with another program."""
    other = Talk(talk.features, talk.v6)
    other.key = state.key
    other.isn, other.seq, other.ack, other.window = talk.isn, talk.seq, talk.ack, talk.window
    assert state.socket is not None
    sock = mover(other).open(state.socket)
    assert sock.options[FENCE] == 255
    queued = mover(other).make(sock, state.socket)
    mover(other).adopt(state, sock, queued, other.now)
    assert sock.options[FENCE] == 0
    other.tcp.resume(other.now)
    return other


@pytest.mark.parametrize("begun", [open_connection, accepted_connection])
def test_the_conversation_goes_on(begun: Any, repair: list[tuple[Any, SocketState]]) -> None:
    talk = begun()
    talk.guest(ACK | PSH, b"before")
    talk.host(b"down")
    talk.taken()
    talk.ack = 5  # all of it
    talk.guest(ACK)
    talk.host(b"in flight")
    talk.taken()
    state = leave(talk)
    assert state.socket is not None
    assert state.socket.receive_queue == b"in flight", "what the guest has acknowledged does not move"
    other = arrive(talk, state)
    (sock, _), *_ = repair
    assert (sock.bound, sock.peer) == (("192.0.2.2", 50000), ("198.51.100.7", 80))
    other.expect_nothing()
    other.ack = 14
    other.guest(ACK | PSH, b"after")
    other.wait(0.05)
    assert bytes(sock.sent) == b"after"
    other.taken()
    other.host(b"more")
    other.expect(ACK | PSH, b"more", seq=14, ack=12)


def test_data_in_flight_that_was_lost_is_sent_again() -> None:
    talk = open_connection()
    talk.host(b"lost")
    talk.taken()
    other = arrive(talk, leave(talk))
    other.expect_nothing()
    other.wait(2)
    segments = [segment for segment in other.taken() if segment.payload]
    assert segments[0].payload == b"lost"
    assert segments[0].seq == 1


def test_data_that_was_not_sent_yet_goes_out_at_once() -> None:
    talk = open_connection()
    talk.guest(ACK, window=0)
    talk.host(b"waits")
    talk.expect_nothing()
    talk.window = 0
    state = leave(talk)
    talk.window = 65535
    other = arrive(talk, state)
    other.expect_nothing()
    other.guest(ACK)
    other.expect(ACK | PSH, b"waits", seq=1)


@pytest.mark.parametrize("here", [False, True])
def test_a_guest_that_waits_for_a_window_is_told_of_it(here: bool) -> None:
    """It has sent all that it may, and the new socket has room where the former one had none."""
    talk = open_connection()
    conn = conn_of(talk)
    talk.sock.wmem = talk.sock.sndbuf
    edge = conn.rcv_edge
    while conn.rcv_nxt < edge:
        talk.guest(ACK | PSH, bytes(min(1460, edge - conn.rcv_nxt)))
    talk.sock.info[BYTES_ACKED] = edge
    talk.wait(0.05)
    assert talk.taken()[-1].window == 0
    if here:
        sock = mover(talk).halt(conn)
        sock.wmem = 0
        mover(talk).resume(conn, sock, talk.now)
        talk.tcp.resume(talk.now)
    else:
        talk = arrive(talk, leave(talk))
    talk.wait(0.05)
    (told,) = talk.taken()
    assert told.window > 0


@pytest.mark.parametrize("fin", [False, True])
def test_bytes_without_room_wait_in_front_of_others(monkeypatch: pytest.MonkeyPatch, fin: bool) -> None:
    """Also when the connection moves once more meanwhile."""
    talk = open_connection()
    talk.guest(ACK | PSH, b"0123456789")
    if fin:
        talk.guest(ACK | FIN)
    state = leave(talk)
    assert state.socket is not None
    monkeypatch.setattr(tcp_repair, "finish", lambda sock, state, queued: b"456789")
    first = arrive(talk, replace(state, socket=replace(state.socket, send_queue=b"0123456789", unsent=8)))
    if not fin:
        first.guest(ACK | PSH, b"abc")
    assert not first.sock.sent and not first.sock.shut
    state = leave(first)
    assert state.socket is not None
    assert (state.socket.send_queue, state.socket.unsent) == (b"456789", 6)
    assert state.socket.fins == (FIN_SENT if fin else 0)
    second = arrive(first, state)
    sock = second.sock
    assert second.ctx.drops == {}
    sock.room = 4
    reactor(second.ctx).fire(sock.fd, EPOLLOUT, second.now)
    assert (bytes(sock.sent), sock.shut) == (b"4567", False)
    sock.room = 0
    reactor(second.ctx).fire(sock.fd, EPOLLOUT, second.now)
    if not fin:
        second.seq -= 3
        second.guest(ACK | PSH, b"abc")  # again: it was not acknowledged
    sock.room = 100
    reactor(second.ctx).fire(sock.fd, EPOLLOUT, second.now)
    assert (bytes(sock.sent), sock.shut) == (b"456789" if fin else b"456789abc", fin)
    assert second.tcp._table.rests == {}
    mover(first).end(conn_of(first), None)
    assert first.tcp._table.rests == {}


def test_numbers_of_the_peer_count_from_the_new_socket() -> None:
    """Both counters of the kernel begin again, and the tail of what the guest sent is not acknowledged twice."""
    talk = open_connection()
    talk.sock.info[BYTES_ACKED] = 1
    talk.guest(ACK | PSH, b"0123456789")
    state = leave(talk)
    state = replace(state, socket=replace(state.socket, send_queue=b"0123456789"))  # type: ignore[type-var]
    other = arrive(talk, state)
    conn = conn_of(other)
    other.sock.info[BYTES_ACKED] = 4
    other.sock.info[BYTES_RECEIVED] = 0
    assert conn.rcv_acked == conn.rcv_nxt - 10
    other.wait(0.05)
    assert conn.rcv_acked == conn.rcv_nxt - 6
    info = conn.info(other.now).tcp
    assert info is not None
    assert (info.queue_to_host, info.queue_to_guest) == (6, 0)


def test_halted_connections_do_nothing_and_go_on_when_resumed() -> None:
    talk = open_connection()
    talk.host(b"unanswered")
    talk.taken()
    conn = conn_of(talk)
    sock = mover(talk).halt(conn)
    assert sock.options[FENCE] == 255
    assert conn.fd not in reactor(talk.ctx).refs
    talk.wait(5)
    talk.expect_nothing()
    assert mover(talk).established() == []
    mover(talk).resume(conn, sock, talk.now)
    assert (sock.options[FENCE], sock.options[socket.SOL_SOCKET, SO_PEEK_OFF]) == (0, 10)
    assert reactor(talk.ctx).events[conn.fd] == INTEREST
    talk.tcp.resume(talk.now)
    talk.ack = 11
    talk.guest(ACK | PSH, b"answer")
    assert bytes(sock.sent) == b"answer"


def test_a_socket_that_waited_for_room_waits_again() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    conn.wait_writable = True
    mover(talk).resume(conn, mover(talk).halt(conn), talk.now)
    assert reactor(talk.ctx).events[conn.fd] == INTEREST | EPOLLOUT


def test_a_connection_that_ends_here() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    sock = mover(talk).halt(conn)
    mover(talk).end(conn, sock)
    talk.expect(RST | ACK)
    talk.end_turn()
    assert sock.closed
    assert over(talk)
    talk = open_connection()
    conn = conn_of(talk)
    mover(talk).halt(conn)
    mover(talk).end(conn, None)  # its socket was closed before
    talk.expect(RST | ACK)
    assert over(talk)


def test_a_lost_connection_is_reset() -> None:
    talk = open_connection()
    talk.guest(ACK | PSH, b"abc")
    talk.taken()
    (conn,) = mover(talk).established()
    mover(talk).halt(conn)
    state = mover(talk).describe(conn, None)
    assert state.socket is None
    other = Talk()
    other.isn = talk.isn
    mover(other).lose(state, T0)
    other.expect(RST | ACK, seq=1, ack=4)
    assert over(other)


@pytest.mark.parametrize("reads", ["fails", "not movable", "urgent"])
def test_what_cannot_be_read_does_not_move(monkeypatch: pytest.MonkeyPatch, reads: str) -> None:
    def read(sock: Any, peer: tuple[bytes, int], *, peek_off: bool) -> SocketState:
        raise NotMovable("so") if reads == "not movable" else OSError(1, "so")

    talk = open_connection()
    if reads == "urgent":
        conn_of(talk).urgent = True
    else:
        monkeypatch.setattr(tcp_repair, "read", read)
    assert leave(talk).socket is None


def test_a_fin_that_only_the_kernel_knows_of_moves() -> None:
    """Its event was not handled before the machine stopped, and cannot come again."""
    talk = open_connection()
    state = leave(talk)
    assert not state.events & SOCK_FIN_RCVD
    source = replace(state, events=state.events | SOCK_FIN_RCVD, socket=replace(SOCKET, fins=FIN_RECEIVED))
    other = arrive(talk, source)
    other.expect(FIN | ACK, seq=1)


def test_a_described_fin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_repair, "read", lambda sock, peer, *, peek_off: replace(SOCKET, fins=FIN_RECEIVED))
    assert leave(open_connection()).events & SOCK_FIN_RCVD


def test_a_half_closed_connection_goes_on() -> None:
    talk = open_connection()
    talk.sock.info[BYTES_ACKED] = 1
    talk.guest(ACK | FIN)
    talk.taken()
    state = leave(talk)
    assert state.events & TAP_FIN_RCVD
    other = arrive(talk, replace(state, socket=replace(SOCKET, fins=FIN_SENT)))
    other.sock.info[BYTES_ACKED] = 1  # FIN alone
    other.wait(0.05)
    other.expect(ACK, b"", ack=2)
    other.host(b"answer")
    other.expect(ACK | PSH, b"answer", seq=1, ack=2)
    reactor(other.ctx).fire(other.sock.fd, EPOLLIN | EPOLLRDHUP, other.now)
    assert other.ctx.drops == {}


def test_a_traffic_class_moves() -> None:
    talk = open_connection()
    talk.ctx.classes[talk.key] = 0x28
    other = arrive(talk, leave(talk))
    assert other.ctx.classes == {talk.key: 0x28}
    assert other.sock.options[TRAFFIC_CLASS[0]] == 0x28


def test_endpoints_that_are_in_use_or_none_are_refused() -> None:
    talk = open_connection()
    state = leave(talk)
    with pytest.raises(OSError, match="its endpoints are in use, or are none"):
        mover(talk).lose(state, T0)
    other = Talk()
    with pytest.raises(OSError, match="its endpoints are in use, or are none"):
        mover(other).lose(replace(state, key=bytes(12)), T0)
    other.ctx.flows.limit = 0
    with pytest.raises(OSError, match="the table of flows is full"):
        mover(other).lose(state, T0)
    assert over(other)
    assert other.ctx.drops == {}


def test_a_socket_that_fails_when_it_goes_on_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(12, "no room")

    talk = open_connection()
    state = leave(talk)
    monkeypatch.setattr(tcp_repair, "finish", fails)
    other = Talk()
    other.isn = talk.isn
    assert state.socket is not None
    sock = mover(other).open(state.socket)
    with pytest.raises(OSError, match="no room"):
        mover(other).adopt(state, sock, 0, other.now)
    other.expect(RST | ACK)
    other.end_turn()
    assert sock.closed
    monkeypatch.setattr(tcp_repair, "lift_fence", fails)
    conn = conn_of(talk)
    with pytest.raises(OSError, match="no room"):
        mover(talk).resume(conn, talk.sock, talk.now)
    talk.expect(RST | ACK)
    assert over(talk)


def test_a_socket_that_cannot_be_prepared_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(1, "no")

    monkeypatch.setattr(tcp_repair, "fence", fails)
    talk = Talk()
    with pytest.raises(OSError, match="no"):
        mover(talk).open(SOCKET)
    assert talk.sock.closed
    assert Drop.TCP_NO_SOCKET not in talk.ctx.drops
