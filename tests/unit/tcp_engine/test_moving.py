"""A connection moves: the guest sees one conversation, which one program begins and another one goes on with.

The kernel's side is in `tests/unit/linux/test_tcp_repair.py`.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from passt import NEVER, addr
from passt.drops import Drop
from passt.linux import tcp_repair
from passt.linux.sockopt import SO_PEEK_OFF, TRAFFIC_CLASS
from passt.linux.tcp_repair import IP_MINTTL, NotMovable
from passt.linux.tcpinfo import BYTES_ACKED, BYTES_RECEIVED, Features
from passt.loop.reactor import EPOLLIN, EPOLLOUT, EPOLLRDHUP, INTEREST
from passt.tcp_engine import moving
from passt.tcp_engine.conn import SOCK_FIN_RCVD, TAP_FIN_ACKED, TAP_FIN_RCVD, TcpConn
from passt.tcp_engine.window import TcpAck
from passt.wire.migration import FIN_RECEIVED, FIN_SENT, ConnectionState, SocketState, State
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN

from ..support import IP4, IP6, T0, reactor
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


def reasons(talk: Talk) -> dict[str, int]:
    """How many connections have ended, by reason."""
    return {why: n for (_, why), n in talk.ctx.flows.closed.items()}


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
    assert over(talk) and reasons(talk) == {"migration": 1}
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
    assert over(other) and reasons(other) == {"migration": 1}


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
    assert sock.closed and reasons(other) == {"migration": 1}
    monkeypatch.setattr(tcp_repair, "lift_fence", fails)
    conn = conn_of(talk)
    with pytest.raises(OSError, match="no room"):
        mover(talk).resume(conn, talk.sock, talk.now)
    talk.expect(RST | ACK)
    assert over(talk) and reasons(talk) == {"migration": 1}


def test_a_socket_that_cannot_be_prepared_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(1, "no")

    monkeypatch.setattr(tcp_repair, "fence", fails)
    talk = Talk()
    with pytest.raises(OSError, match="no"):
        mover(talk).open(SOCKET)
    assert talk.sock.closed
    assert Drop.TCP_NO_SOCKET not in talk.ctx.drops


# Each value of the description, each step ---------------------------------------------------------------------------


def test_every_value_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def read(sock: Any, peer: tuple[bytes, int], *, peek_off: bool) -> SocketState:
        asked.append((sock, peer, peek_off))
        return SOCKET

    monkeypatch.setattr(tcp_repair, "read", read)
    finished: list[Any] = []
    monkeypatch.setattr(tcp_repair, "finish", lambda *how: finished.append(how))
    talk = open_connection()
    conn = conn_of(talk)
    conn.sack = conn.time_wait = conn.delays_acks = True
    state = leave(talk)
    assert asked == [(talk.sock, conn.host, True)]
    assert (state.events, state.traffic_class) == (conn.events, 0)
    other = arrive(talk, state)
    assert finished == [(other.sock, SOCKET, 0)]
    moved = conn_of(other)
    names = (
        *("key", "host", "events", "iss", "irs", "snd_una", "snd_nxt", "snd_wnd", "snd_wnd_max", "rcv_nxt"),
        *("rcv_acked", "mss", "snd_wscale", "rcv_wscale", "sack", "time_wait", "delays_acks", "base", "near"),
    )
    assert {name: getattr(moved, name) for name in names} == {name: getattr(conn, name) for name in names}
    assert moved.rcv_wnd_max == moved.rcv_edge - moved.rcv_acked


def test_connections_that_are_not_established_stay() -> None:
    talk = Talk()
    talk.syn()
    conn = conn_of(talk)
    assert not mover(talk).established(), "the guest has not answered"
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    assert mover(talk).established() == [conn]


def test_what_waits_for_a_time_is_forgotten_and_begins_again() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    talk.guest(ACK | PSH, b"half")
    conn.asked_at = talk.now
    sock = mover(talk).halt(conn)
    assert (conn.deadline, conn.delack_at, conn.asked_at) == (NEVER, 0.0, 0.0)
    talk.wait(5)
    mover(talk).resume(conn, sock, talk.now)
    talk.tcp.resume(talk.now)
    talk.taken()
    talk.guest(ACK | PSH, b"more")
    talk.wait(0.05)
    talk.expect(ACK, b"", ack=9)


@pytest.mark.parametrize("v6", [False, True])
def test_a_socket_of_the_family_and_the_interface(monkeypatch: pytest.MonkeyPatch, v6: bool) -> None:
    made: list[tuple[int, int]] = []

    def new_socket(family: int, kind: int) -> FakeSocket:
        made.append((family, kind))
        return FakeSocket(family, kind)

    monkeypatch.setattr(moving, "new_socket", new_socket)
    device = socket.SOL_SOCKET, socket.SO_BINDTODEVICE
    local, peer = (addr.packed("2001:db8::2"), addr.packed("2001:db8:f::7")) if v6 else (LOCAL[0], PEER[0])
    state = replace(SOCKET, local=(local, 50000), peer=(peer, 80))
    assert device not in mover(Talk()).open(state).options
    away = Talk(config={"ip4": replace(IP4, if_out="eth7"), "ip6": replace(IP6, if_out="eth7")})
    assert mover(away).open(state).options[device] == b"eth7\0"
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    assert made == [(socket.AF_INET6 if v6 else socket.AF_INET, kind)] * 2


def test_steps_that_are_of_the_socket_alone() -> None:
    sock = FakeSocket(socket.AF_INET, socket.SOCK_STREAM)
    tcp_repair.fence(sock)
    mover(Talk()).let_in(sock)
    assert sock.options[FENCE] == 0 and not sock.closed
    tcp_repair.fence(sock)
    mover(Talk()).reset(sock)
    assert sock.options[FENCE] == 0 and sock.closed and sock.resets_on_close


def test_a_reset_that_fails_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sock: Any) -> None:
        raise OSError(9, "gone")

    monkeypatch.setattr(tcp_repair, "lift_fence", fails)
    mover(Talk()).reset(FakeSocket(socket.AF_INET, socket.SOCK_STREAM))


def test_a_fin_in_flight_to_the_host_is_not_acknowledged() -> None:
    """Nor is data before it: the peer of the new socket has acknowledged neither."""
    talk = open_connection()
    talk.sock.info[BYTES_ACKED] = 1
    talk.guest(ACK | PSH, b"abc")
    talk.guest(ACK | FIN)
    talk.taken()
    state = leave(talk)
    other = arrive(talk, replace(state, socket=replace(SOCKET, send_queue=b"abc", fins=FIN_SENT)))
    conn = conn_of(other)
    assert conn.moved == (conn.rcv_nxt - 4, conn.base)
    other.sock.info[BYTES_ACKED] = 3
    other.wait(0.05)
    assert conn.rcv_acked == conn.rcv_nxt - 1


def test_a_fin_that_the_guest_has_acknowledged_is_no_byte_of_the_socket() -> None:
    talk = open_connection()
    talk.host(b"bye", end=True)
    talk.taken()
    talk.ack = 5
    talk.guest(ACK)
    state = leave(talk)
    assert state.events & TAP_FIN_ACKED
    assert state.socket is not None, "it may move"
    other = arrive(talk, state)
    conn = conn_of(other)
    assert conn.base == conn.snd_una - 1
    other.guest(ACK | PSH, b"goes on")
    other.wait(0.05)
    assert bytes(other.sock.sent) == b"goes on"


def test_a_fin_that_was_sent_is_the_last_that_is_peeked_at() -> None:
    talk = open_connection()
    talk.host(b"bye", end=True)
    talk.taken()
    conn = conn_of(talk)
    sock = mover(talk).halt(conn)
    before = dict(sock.options)
    mover(talk).resume(conn, sock, talk.now)
    assert sock.options[socket.SOL_SOCKET, SO_PEEK_OFF] == before[socket.SOL_SOCKET, SO_PEEK_OFF]


def test_a_kernel_without_peek_offsets_is_asked_for_none() -> None:
    talk = open_connection(features=Features(peek_off=False))
    conn = conn_of(talk)
    sock = mover(talk).halt(conn)
    mover(talk).resume(conn, sock, talk.now)
    assert (socket.SOL_SOCKET, SO_PEEK_OFF) not in sock.options


def test_the_window_is_opened_at_the_time_of_the_resumption() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    sock = mover(talk).halt(conn)
    with mock.patch.object(TcpAck, "open_window", autospec=True) as opened:
        mover(talk).resume(conn, sock, T0 + 7)
    opened.assert_called_once_with(mock.ANY, conn, T0 + 7)


def test_data_of_a_peer_on_this_host_counts_as_delivered() -> None:
    talk = accepted_connection("127.0.0.1")
    state = leave(talk)
    assert state.events == conn_of(talk).events, "it was not the guest that began"
    other = arrive(talk, state)
    assert conn_of(talk).near and conn_of(other).near is True


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("which", ["guest", "peer"])
def test_an_endpoint_that_is_none(v6: bool, which: str) -> None:
    talk = open_connection(v6=v6)
    state = leave(talk)
    guest, peer, ports = state.key[: len(state.key) // 2 - 2], state.key[len(state.key) // 2 - 2 : -4], state.key[-4:]
    group = addr.packed("ff02::1" if v6 else "224.0.0.1")
    key = group + peer + ports if which == "guest" else guest + group + ports
    with pytest.raises(OSError, match=r"^.Errno 98. its endpoints are in use, or are none$") as e:
        mover(Talk()).lose(replace(state, key=key), T0)
    assert e.value.errno == errno.EADDRINUSE


def test_room_is_made_in_a_full_table(monkeypatch: pytest.MonkeyPatch) -> None:
    state = leave(open_connection())
    other = Talk()
    other.ctx.flows.limit = 0
    made: list[float] = []
    monkeypatch.setattr(other.ctx.room, "make", lambda kind, now, *, foreign: made.append(now))
    assert state.socket is not None
    with pytest.raises(OSError, match=r"^.Errno 23. the table of flows is full$") as e:
        mover(other).adopt(state, mover(other).open(state.socket), 0, T0 + 5)
    assert e.value.errno == errno.ENFILE
    assert made == [T0 + 5]
