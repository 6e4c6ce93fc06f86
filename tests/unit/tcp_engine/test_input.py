"""Payload of the guest that the host socket refuses waits, in order and whole, and costs no more the more waits."""

from __future__ import annotations

import errno
import random

import pytest

from passt.linux.tcpinfo import BYTES_ACKED, MIN_RTT
from passt.tcp_engine import out_of_order
from passt.tcp_engine.conn import CLOSED, SOCK_FAILED, TcpConn
from passt.tcp_engine.input import DUP_ACKS, IOV_MAX
from passt.tcp_engine.window import PINGPONG, TcpAck
from passt.wire.tcp import ACK, FIN, PSH, RST

from ..support import lines_of
from ..tcp_support import Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]


def stalled(first: bytes = b"abcdef", room: int = 2, *, sack: bool = True) -> Talk:
    """The guest has sent `first`, of which the host socket took `room` bytes; both ends permit SACK."""
    talk = open_connection(sack=sack)
    conn_of(talk).near = True
    talk.sock.room, talk.sock.wmem = room, talk.sock.sndbuf
    talk.guest(ACK | PSH, first)
    talk.expect(ACK, ack=1 + room)
    assert conn_of(talk).rcv_refused and conn_of(talk).wait_writable
    return talk


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._conns.values()
    return conn


def kept(talk: Talk) -> list[tuple[int, bytes, int]]:
    """The queue, with relative numbers."""
    conn = conn_of(talk)
    return [(seq - conn.irs, bytes(data), fin) for seq, data, fin in conn.out_of_order]


def take(talk: Talk, room: int = 1 << 30) -> None:
    """The host peer has read: the socket takes `room` bytes."""
    talk.sock.room, talk.sock.wmem = room, 0
    talk.writable()


def test_what_comes_behind_waits_and_the_socket_is_not_tried() -> None:
    talk = stalled()
    talk.sock.room = 1 << 30  # EPOLLOUT has not told
    talk.guest(ACK | PSH, b"gh")
    talk.put(talk.segment(ACK, b"ij"), talk.segment(ACK | PSH, b"kl"))
    assert talk.sock.sent == b"ab"
    assert kept(talk) == [(3, b"cdef", 0), (7, b"gh", 0), (9, b"ij", 0), (11, b"kl", 0)]
    assert [(s.ack, s.sack) for s in talk.taken()] == [(3, []), (3, [])], "nothing is missing"
    take(talk)
    assert talk.sock.sent == b"abcdefghijkl" and not kept(talk)
    assert talk.expect(ACK, ack=13).window > 0 and not talk.ctx.drops


def test_without_sack_what_waits_is_no_loss() -> None:
    """Three acknowledgements for a batch would make the guest resend."""
    talk = stalled(sack=False)
    talk.put(*(talk.segment(ACK, b"x") for _ in range(5)))
    talk.expect(ACK, ack=3)


@pytest.mark.parametrize("sack", [True, False])
def test_a_hole_behind_what_waits_is_told(sack: bool) -> None:
    talk = stalled(sack=sack)
    talk.put(*(talk.segment(ACK, b"x", seq=at) for at in (9, 10, 11, 12)))
    told = talk.taken()
    assert [s.ack for s in told] == [3] * (1 if sack else DUP_ACKS)
    assert [s.sack for s in told] == [[(9, 13)]] if sack else [[]] * DUP_ACKS
    talk.guest(ACK, b"gh")
    assert talk.expect(ACK, ack=3).sack == []
    take(talk)
    assert talk.sock.sent == b"abcdefghxxxx"


def test_the_end_waits_with_it() -> None:
    talk = stalled()
    talk.guest(ACK | FIN, b"g")
    assert talk.expect(ACK, ack=3).sack == [] and not talk.sock.shut
    take(talk, 3)
    assert talk.sock.sent == b"abcde" and not talk.sock.shut
    talk.taken()
    take(talk)
    assert talk.sock.sent == b"abcdefg" and talk.sock.shut
    assert talk.taken()[-1].ack == 9


def test_refused_with_the_end() -> None:
    talk = open_connection()
    talk.sock.room, talk.sock.wmem = 1, talk.sock.sndbuf
    talk.guest(ACK | FIN, b"ab")
    assert kept(talk) == [(2, b"b", FIN)]
    take(talk)
    assert talk.sock.sent == b"ab" and talk.sock.shut


@pytest.mark.parametrize("again", [b"cdef", b"cdefgh", b"cd"])
def test_what_waits_is_sent_again(again: bytes) -> None:
    """A zero-window probe or a timeout of the guest: nothing is counted twice."""
    talk = stalled()
    talk.guest(ACK, again, seq=3)
    talk.expect(ACK, ack=3)
    take(talk)
    assert talk.sock.sent == (b"abcdefgh" if len(again) > 4 else b"abcdef")
    assert talk.tcp._table.out_of_order.total == 0


def test_taken_bit_by_bit() -> None:
    talk = stalled()
    for taken in range(3, 7):
        take(talk, 1)
        assert len(talk.sock.sent) == taken and conn_of(talk).rcv_refused == (taken < 6)
    assert talk.sock.sent == b"abcdef"


def test_what_has_no_room_is_sent_again_by_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_order, "OUT_OF_ORDER_MAX", 100)
    talk = stalled()
    assert not kept(talk) and talk.ctx.drops == {"tcp early: no room": 1}
    take(talk)
    talk.expect(ACK, ack=3)
    talk.guest(ACK, b"cdef", seq=3)
    assert talk.sock.sent == b"abcdef"
    talk.expect(ACK, ack=7)


def test_it_has_precedence_over_what_is_behind_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_order, "OUT_OF_ORDER_MAX", 2 * (out_of_order.OVERHEAD + 10))
    talk = open_connection(sack=True)
    for at in 100, 200:
        talk.guest(ACK, b"x", seq=at)
    talk.taken()
    talk.sock.room = 0
    talk.guest(ACK, b"abc")
    assert kept(talk) == [(1, b"abc", 0), (100, b"x", 0)]
    assert talk.taken()[-1].sack == [(100, 101)]


def test_more_pieces_than_one_call_takes() -> None:
    talk = stalled()
    for _ in range(IOV_MAX + 5):
        talk.guest(ACK, b"x")
    take(talk)
    assert talk.sock.sent == b"abcdef" + b"x" * (IOV_MAX + 5)


def test_the_price_of_a_segment_does_not_depend_on_what_waits() -> None:
    few, many = map(_steps, (20, 1500))
    assert many <= few + 100


def _steps(pieces: int) -> int:
    """Lines that a segment takes while so many others wait."""
    talk = stalled()
    for _ in range(pieces):
        talk.guest(ACK, b"x")
    lines = lines_of(lambda: talk.guest(ACK, b"y"))
    assert len(kept(talk)) == pieces + 2
    return lines


@pytest.mark.parametrize("seed", range(8))
def test_any_order_with_a_socket_that_takes_little(seed: int) -> None:
    rng = random.Random(seed)
    talk = stalled()
    data = rng.randbytes(3000)
    at, segments = 7, []
    while at - 7 < len(data):
        n = rng.randrange(1, 60)
        segments.append(talk.segment(ACK, data[at - 7 : at - 7 + n], seq=at))
        at += n
    rng.shuffle(segments)
    for s in segments:
        talk.put(s)
        if rng.random() < 0.3:
            take(talk, rng.randrange(1, 100))
        for told in talk.taken():
            assert all(left > told.ack for left, _ in told.sack), "a receiver that reneges"
    take(talk)
    assert talk.sock.sent == b"abcdef" + data and not kept(talk)
    assert talk.tcp._table.out_of_order.total == 0 and not talk.ctx.drops


def test_what_comes_behind_the_end_does_not_acknowledge_it() -> None:
    """The host peer's acknowledgement of FIN is to come, and ends the connection."""
    talk = open_connection(sack=True)
    talk.guest(ACK, b"a")
    talk.sock.info |= {BYTES_ACKED: 2, MIN_RTT: 10_000}
    talk.host(end=True)
    talk.taken()
    talk.ack = 2
    talk.guest(FIN | ACK)
    talk.guest(ACK, b"more", seq=20)
    assert [s.ack for s in talk.taken()] == [2, 2] and conn_of(talk).events & CLOSED == CLOSED
    assert not conn_of(talk).held and not kept(talk)
    del talk.sock.info[BYTES_ACKED]
    talk.wait(1)
    assert talk.taken()[-1].ack == 3 and talk.gone


def test_the_end_may_come_when_what_waits_is_sent_again() -> None:
    talk = stalled()
    talk.wait(0.5)
    talk.guest(ACK | FIN, b"cdef", seq=3)
    talk.expect(ACK, ack=3)
    assert conn_of(talk).t_rx == talk.now, "the guest is there"
    take(talk)
    assert talk.sock.sent == b"abcdef" and talk.sock.shut


def test_new_data_behind_the_end_is_not_taken() -> None:
    """RFC 9293, 3.10.7.4: it should not occur, and is acknowledged as what came before."""
    talk = open_connection()
    talk.guest(FIN | ACK, b"a")
    talk.wait(0.05)
    assert talk.taken()[-1].ack == 3
    talk.guest(ACK | PSH, b"more", seq=3)
    assert talk.taken()[-1].ack == 3
    assert talk.sock.sent == b"a"


def test_what_has_waited_is_acknowledged_at_once() -> None:
    """Also on a connection whose acknowledgements are delayed, as of a dialogue: the guest has waited for long."""
    talk = stalled()
    conn = conn_of(talk)
    conn.pingpong, conn.rcv_wnd_low = PINGPONG, 0
    take(talk)
    talk.expect(ACK, ack=7)


@pytest.mark.parametrize("refused", [True, False])
def test_the_window_is_opened_with_the_time_of_the_event(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """Its growth is measured in round trips: when refused data comes again, and when the socket has room."""
    talk = stalled() if refused else open_connection()
    conn = conn_of(talk)
    times: list[float] = []
    monkeypatch.setattr(TcpAck, "open_window", lambda self, conn, now: times.append(now))
    talk.now += 0.5
    if refused:
        talk.guest(ACK | PSH, b"cdef", seq=3)
    else:
        conn.wait_writable = True
        talk.writable()
    assert times == [talk.now]


@pytest.mark.parametrize("refused", [False, True])
def test_room_that_is_little_still_is_looked_at_again(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """The socket's buffer is small, and nothing waits for it here: nothing else tells when there is more room."""
    monkeypatch.setattr(out_of_order, "OUT_OF_ORDER_MAX", 100)
    talk = open_connection()
    conn = conn_of(talk)
    conn.near, conn.rcv_edge = True, conn.rcv_nxt + 1000
    talk.sock.wmem = talk.sock.sndbuf = 4000
    talk.sock.room = 2 if refused else 1000
    talk.guest(ACK | PSH, b"x" * 1000)
    assert conn.wait_writable and conn.rcv_refused == refused and not kept(talk)
    talk.taken()
    talk.sock.wmem = 2500
    talk.writable()
    assert not conn.wait_writable and not conn.rcv_refused and conn.delack_at > talk.now
    talk.sock.wmem = 0
    talk.wait(conn.delack_at - talk.now)
    assert conn.rcv_edge - conn.rcv_nxt >= conn.rcv_wnd_low


# Where the connection is reset ---------------------------------------------------------------------------------------


def failed(error: int = errno.ECONNRESET) -> Talk:
    """The host peer has reset the connection; the guest has a part of what it sent before."""
    talk = open_connection()
    conn = conn_of(talk)
    conn.snd_wnd = conn.snd_wnd_max = 4
    talk.host(b"0123456789", error=error)
    talk.expect(ACK | PSH, b"0123", ack=1)
    assert conn.events & SOCK_FAILED
    return talk


@pytest.mark.parametrize("fin", [0, FIN])
@pytest.mark.parametrize("count", [1, 2, IOV_MAX + 5])
def test_data_in_front_of_the_guests_reset_is_sent_once(count: int, fin: int) -> None:
    talk = open_connection()
    pieces = [b"%06d" % i for i in range(count)]
    data = [talk.segment(ACK, piece) for piece in pieces[:-1]]
    talk.put(*data, talk.segment(ACK | PSH | fin, pieces[-1]), talk.segment(RST))
    assert talk.sock.sent == b"".join(pieces) and talk.sock.shut == bool(fin)
    assert talk.gone


def test_data_behind_what_waits_is_not_sent_before_it() -> None:
    talk = stalled()
    talk.sock.room = 1 << 30
    talk.put(talk.segment(ACK, b"gh"), talk.segment(RST, seq=3))
    assert talk.sock.sent == b"ab" and talk.gone


def test_data_and_a_reset_for_a_peer_that_has_reset() -> None:
    talk = failed()
    talk.put(talk.segment(ACK, b"late", ack=1), talk.segment(RST))
    assert talk.sock.sent == b"" and talk.gone


def test_data_of_a_guest_that_takes_what_is_left_waits_for_the_reset() -> None:
    talk = failed()
    talk.guest(ACK | PSH, b"late", ack=1, window=0)
    assert not any(s.flags & RST for s in talk.taken()) and not talk.gone


def test_data_of_a_guest_that_takes_nothing_gets_the_reset_at_once() -> None:
    talk = failed()
    conn_of(talk).retries = 1
    talk.guest(ACK | PSH, b"late", ack=1, window=0)
    assert talk.taken()[-1].flags & RST and talk.gone


def test_a_guest_that_takes_nothing_finds_out_by_its_own_timeout_as_the_host_did() -> None:
    talk = failed(errno.ETIMEDOUT)
    conn = conn_of(talk)
    conn.keepalive, conn.retries = True, 1
    talk.guest(ACK | PSH, b"late", ack=1, window=0)
    talk.expect_nothing()
    assert talk.gone


def test_data_behind_a_hole_for_a_peer_that_has_reset_is_not_acknowledged() -> None:
    talk = failed()
    talk.guest(ACK | PSH, b"late", seq=10, ack=1, window=0)
    talk.expect_nothing()


def test_a_send_that_fails_leaves_the_guest_what_came_before() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    talk.sock.incoming += b"0123456789"
    talk.sock.error = errno.ECONNRESET
    talk.guest(ACK | PSH, b"x", window=4 >> 7)
    assert conn.events & SOCK_FAILED and not any(s.flags & RST for s in talk.taken())
    talk.guest(ACK, window=1)
    assert [(s.payload, s.flags & RST) for s in talk.taken()] == [(b"0123456789", 0), (b"", RST)] and talk.gone


@pytest.mark.parametrize("near", [False, True])
def test_the_end_of_both_directions_closes(near: bool) -> None:
    talk = open_connection()
    conn = conn_of(talk)
    conn.near = near
    talk.host(end=True)
    talk.expect(FIN | ACK)
    talk.guest(ACK, ack=2)
    assert not talk.gone
    talk.guest(FIN | ACK, ack=2)
    assert talk.expect(ACK, ack=2).seq == 2 and talk.gone


def test_the_end_of_one_direction_closes_nothing() -> None:
    talk = open_connection()
    conn_of(talk).near = True
    talk.guest(FIN | ACK)
    talk.wait(0.02)
    talk.expect(ACK, ack=2)
    assert talk.sock.shut and not talk.gone
