"""Borders of what is peeked, sent, and sent again (`output.py`), which conversations leave open."""

from __future__ import annotations

import os
from typing import Any

import pytest

from passt.loop.reactor import EPOLLIN
from passt.tcp_engine import output as tcp_output
from passt.tcp_engine.conn import TAP_FIN_ACKED, TAP_FIN_SENT, TcpConn
from passt.wire.tcp import ACK, FIN, PSH, SYN
from passt.wire.virtio import GSO_NONE, GSO_TCPV4, GSO_TCPV6, VNET
from tests.unit.support import reactor
from tests.unit.tcp_support import ALL, Talk, accepted_connection, fake_sockets, open_connection

from .test_output import NO_PEEK_OFF

__all__ = ["fake_sockets"]

MSS = 1460


def conn_of(talk: Talk) -> TcpConn:
    return talk.tcp._conns[talk.key]


def unscaled(window: int, **how: Any) -> Talk:
    """A connection whose guest has no window scale, and this window."""
    talk = Talk(**how)
    talk.syn(ws=None)
    talk.expect(SYN | ACK)
    talk.window = window
    talk.guest(ACK)
    return talk


def event(talk: Talk) -> None:
    """The host socket is readable, epoll says."""
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN, talk.now)


# Sending -------------------------------------------------------------------------------------------------------------


def test_a_window_of_one_byte_gets_one_byte() -> None:
    talk = unscaled(1)
    talk.host(b"abc")
    talk.expect(ACK | PSH, b"a")


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_the_socket_is_not_read_for_a_window_that_is_full(features: Any) -> None:
    """recv_into() of 0 bytes would read as many as the buffer holds."""
    talk = unscaled(3, features=features)
    talk.host(b"abcdef")
    talk.expect(ACK | PSH, b"abc")
    peeks = talk.sock.peeks
    event(talk)
    talk.expect_nothing()
    assert talk.sock.peeks == peeks


@pytest.mark.parametrize(("room", "sent"), [(MSS, True), (MSS - 1, False)])
def test_beside_others_a_whole_segment_is_sent(room: int, sent: bool) -> None:
    talk = unscaled(8 * MSS)
    talk.host(bytes(MSS))
    talk.taken()
    conn = conn_of(talk)
    conn.snd_wnd = MSS + room
    talk.sock.incoming += bytes(4 * MSS)
    event(talk)
    assert conn.snd_nxt - conn.snd_una == MSS + (room if sent else 0)


@pytest.mark.parametrize(
    ("room", "sent"), [(500, True), (499, False), (251, False)], ids=["half", "less than half", "a quarter"]
)
def test_beside_others_half_of_the_largest_window_is_sent(room: int, sent: bool) -> None:
    """The largest window is 1000 bytes, less than a segment."""
    talk = unscaled(1000)
    talk.host(bytes(600))
    assert len(talk.expect(ACK | PSH).payload) == 600
    conn = conn_of(talk)
    conn.snd_wnd = 600 + room
    conn.snd_wnd_max = 1000
    talk.sock.incoming += bytes(2000)
    event(talk)
    assert conn.snd_nxt - conn.snd_una == 600 + (room if sent else 0)


@pytest.mark.parametrize(("in_flight", "peeks"), [(2 * MSS - 1, 1), (2 * MSS, 0)])
def test_with_two_segments_in_flight_the_socket_is_not_read_for_less(in_flight: int, peeks: int) -> None:
    """The acknowledgement of these is on its way, and opens the window."""
    talk = unscaled(65535)
    talk.host(bytes(in_flight))
    talk.taken()
    conn_of(talk).snd_wnd = in_flight + 100
    before = talk.sock.peeks
    talk.host(bytes(1000))
    assert talk.sock.peeks - before == peeks
    talk.expect_nothing()


def test_the_end_may_be_found_before_epoll_reports_it() -> None:
    talk = open_connection()
    talk.sock.ended = True
    event(talk)
    talk.expect(FIN | ACK, b"")


def test_without_peek_offset_a_queue_that_is_in_flight_as_a_whole_has_not_ended() -> None:
    talk = open_connection(features=NO_PEEK_OFF)
    talk.host(b"data")
    talk.expect(ACK | PSH, b"data")
    event(talk)
    talk.expect_nothing()
    talk.host(b"more")
    talk.expect(ACK | PSH, b"more")


# Segmentation --------------------------------------------------------------------------------------------------------


def test_one_segment_is_not_segmented() -> None:
    talk = open_connection()
    talk.host(bytes(MSS))
    assert talk.expect(ACK | PSH).gso_size == 0
    talk.host(bytes(MSS + 1))
    assert talk.expect(ACK | PSH).gso_size == MSS


def test_the_rest_behind_a_super_frame_is_not_segmented() -> None:
    talk = open_connection()
    chunk = conn_of(talk).chunk
    talk.host(bytes(chunk + MSS))
    assert [(len(s.payload), s.gso_size) for s in talk.taken()] == [(chunk, MSS), (MSS, 0)]
    assert VNET.unpack_from(conn_of(talk).hdr)[1] == GSO_NONE


@pytest.mark.parametrize(("v6", "kind"), [(False, GSO_TCPV4), (True, GSO_TCPV6)])
def test_the_kernel_is_told_the_family_to_segment(v6: bool, kind: int) -> None:
    talk = open_connection(v6=v6)
    talk.host(bytes(10_000))
    talk.taken()
    assert VNET.unpack_from(conn_of(talk).hdr)[1] == kind


# Sent again ----------------------------------------------------------------------------------------------------------


def test_each_retransmission_is_counted() -> None:
    """Fast ones, those of a timeout, and both: what `pesto --flows` shows."""
    talk = open_connection()
    conn = conn_of(talk)
    talk.host(bytes(1000))
    for n in (1, 2):
        talk.wait(conn.rto)
        assert conn.resent == n
    talk.guest(ACK, ack=1001)
    for n in (3, 4):
        talk.host(bytes(1000))
        talk.ack = conn.snd_una - conn.iss
        talk.guest(ACK)  # the same number again
        assert conn.resent == n
        talk.guest(ACK, ack=conn.snd_nxt - conn.iss)
    assert len([s for s in talk.taken() if s.payload]) == 3 + 4


def test_a_byte_is_sent_again_as_a_byte() -> None:
    talk = open_connection()
    talk.host(b"x")
    talk.expect(ACK | PSH, b"x")
    talk.guest(ACK, ack=1)
    talk.expect(ACK | PSH, b"x", seq=1)


@pytest.mark.parametrize("chunk", [None, MSS])
def test_what_is_sent_again_with_fin_or_before_it_and_the_next_peek_is_behind_it(chunk: int | None) -> None:
    talk = open_connection()
    conn = conn_of(talk)
    conn.chunk = chunk or conn.chunk
    data = os.urandom(4000)
    talk.host(data, end=True)
    talk.taken()
    talk.guest(ACK, ack=1)
    talk.expect(ACK | PSH | (0 if chunk else FIN), data[: conn.chunk], seq=1)
    assert conn.events & TAP_FIN_SENT
    assert talk.sock.peek_off == len(data)


def test_a_retransmission_changes_no_event() -> None:
    talk = accepted_connection()
    talk.host(b"data", end=True)
    conn = conn_of(talk)
    before = conn.events
    talk.taken()
    talk.wait(conn.rto)
    talk.expect(ACK | PSH | FIN, b"data", seq=1)
    assert conn.events == before


def test_a_late_acknowledgement_of_everything_leaves_nothing_to_peek() -> None:
    """Of data and FIN, which were sent again in part."""
    talk = open_connection()
    conn = conn_of(talk)
    conn.chunk = 4 * MSS
    data = bytes(20 * MSS)
    talk.host(data, end=True)
    talk.taken()
    talk.wait(conn.rto)
    assert len(talk.taken()) == 1 and conn.scoreboard is not None
    talk.guest(ACK, ack=1 + len(data) + 1)
    talk.expect_nothing()
    assert conn.events & TAP_FIN_ACKED and conn.scoreboard is None
    assert conn.snd_nxt == conn.snd_una and talk.sock.peek_off == conn.snd_una - 1 - conn.base


def test_urgent_data_does_not_make_small_segments() -> None:
    """A peek that fills the room was not cut short by a mark."""
    talk = unscaled(1000)
    talk.host(bytes(600))
    talk.taken()
    conn = conn_of(talk)
    conn.urgent, conn.snd_wnd, conn.snd_wnd_max = True, 700, 1000
    talk.sock.incoming += bytes(2000)
    event(talk)
    talk.expect_nothing()


def test_without_peek_offset_the_discard_is_filled_to_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_output, "DISCARD_MAX", 5001)
    talk = open_connection(features=NO_PEEK_OFF)
    for data, sent in (bytes(5000), 5000), (bytes(100), 1):
        talk.host(data)
        assert sum(len(s.payload) for s in talk.taken()) == sent
    peeks = talk.sock.peeks
    event(talk)
    talk.expect_nothing()
    assert talk.sock.peeks == peeks
