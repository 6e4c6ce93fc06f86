"""Borders of acknowledgements and windows (`window.py`), which conversations leave open."""

from __future__ import annotations

import pytest

from passt.linux.tcpinfo import BYTES_ACKED, MIN_RTT
from passt.loop.reactor import EPOLLOUT
from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.window import (
    ACK_DELAY,
    BULK_MIN,
    COALESCE,
    NEAR_US,
    PINGPONG,
    POLL_MAX,
    POLL_MIN,
    TAIL_MAX,
    TAIL_SEGMENTS,
)
from passt.wire.tcp import ACK, PSH, SYN
from tests.unit.support import GATEWAY4, reactor
from tests.unit.tcp_support import Talk, fake_sockets, open_connection

from .test_window import far, near, round_trip

__all__ = ["fake_sockets"]


def conn_of(talk: Talk) -> TcpConn:
    return talk.tcp._conns[talk.key]


def idle(talk: Talk) -> TcpConn:
    """Its connection, with nothing delayed."""
    talk.wait(1.0)
    talk.taken()
    conn = conn_of(talk)
    assert not conn.delack_at
    return conn


def in_pingpong_mode(talk: Talk) -> TcpConn:
    conn = idle(talk)
    conn.pingpong = PINGPONG
    return conn


def pair() -> tuple[Talk, list[TcpConn]]:
    """Two connections."""
    talk = open_connection(peer=GATEWAY4)
    talk.key = talk.key[:-4] + b"\x9c\x41" + talk.key[-2:]
    talk.seq = talk.ack = 0
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    return talk, list(talk.tcp._conns.values())


# Delays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mss", "tail"), [(536, 536 * TAIL_SEGMENTS), (1460, 1460 * TAIL_SEGMENTS), (65480, TAIL_MAX)])
def test_the_tail_may_be_as_long_as_its_limit(mss: int, tail: int) -> None:
    """It is no more than a congestion window has: CUBIC's HyStart would end slow start, and wait for each tail."""
    talk = far()
    (conn,) = talk.tcp._conns.values()
    conn.mss = mss
    talk.guest(ACK, bytes(tail // 2))
    talk.guest(ACK, bytes(tail - tail // 2))
    assert all(s.ack == 1 for s in talk.taken())
    talk.guest(ACK, b"x")
    talk.expect(ACK, ack=1 + tail + 1 - tail // 2)


@pytest.mark.parametrize(("n", "at_once"), [(BULK_MIN - 1, False), (BULK_MIN, True)])
def test_how_many_bytes_are_bulk(n: int, at_once: bool) -> None:
    talk = near()
    in_pingpong_mode(talk)
    talk.guest(ACK, bytes(n))
    assert bool(talk.taken()) is at_once


def test_a_delayed_acknowledgement_is_sent_though_nothing_else_waits() -> None:
    talk = near()
    conn = in_pingpong_mode(talk)
    talk.guest(ACK | PSH, b"q")
    talk.expect_nothing()
    assert conn.delack_at
    talk.wait(ACK_DELAY * 1.5)
    talk.expect(ACK, ack=2)


def test_after_a_delay_in_vain_two_answers_are_needed_again() -> None:
    talk = near()
    in_pingpong_mode(talk)
    talk.guest(ACK | PSH, b"q")
    talk.wait(0.1)
    talk.expect(ACK, ack=2)
    round_trip(talk)
    talk.guest(ACK | PSH, b"q")
    talk.expect(ACK, ack=4)


@pytest.mark.parametrize("phase", [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 0.999])
def test_a_delay_is_half_as_long_to_half_as_long_again(phase: float) -> None:
    talk = near()
    conn = in_pingpong_mode(talk)
    talk.now += phase * ACK_DELAY
    talk.guest(ACK | PSH, b"q")
    assert ACK_DELAY * 0.499 <= conn.delack_at - talk.now <= ACK_DELAY * 1.501


@pytest.mark.parametrize(("age", "waits"), [(0.4, True), (0.6, False)])
def test_newer_data_has_a_delay_of_its_own(age: float, waits: bool) -> None:
    """The delay that ends began for older data. Data that came in its second half waits for an answer, too."""
    talk = near()
    conn = in_pingpong_mode(talk)
    talk.guest(ACK | PSH, b"q")
    conn.t_rx = conn.delack_at - age * ACK_DELAY
    talk.timers.services.fire(talk.tcp._acks._timer, conn.delack_at)
    assert conn.ack_due is waits and bool(talk.taken()) is not waits


@pytest.mark.parametrize(
    ("silence", "interval"), [(0.0, POLL_MIN), (0.8, 0.1), (4.0, 0.5), (8.0, POLL_MAX), (99.0, POLL_MAX)]
)
def test_reads_of_tcp_info_get_rarer(silence: float, interval: float) -> None:
    """An eighth of the time since the last data, at most a second."""
    talk = far()
    talk.guest(ACK | PSH, b"lost")
    conn = conn_of(talk)
    conn.delack_at = 0.0
    now = conn.t_rx + silence
    talk.tcp._acks.queue_delayed(conn, now)
    assert conn.delack_at - now == pytest.approx(interval)


def test_delays_that_end_later_are_left_for_later() -> None:
    talk, (first, second) = pair()
    acks, services = talk.tcp._acks, talk.timers.services
    idle(talk)
    for conn, delay in (first, 0.0), (second, ACK_DELAY + COALESCE):
        acks.queue_delayed(conn, talk.now + delay)
    due, later = first.delack_at, second.delack_at
    assert due + COALESCE < later
    services.fire(acks._timer, due)
    assert (first.delack_at, second.delack_at) == (0.0, later)
    assert services.deadlines[acks._timer] == later
    services.fire(acks._timer, later)
    assert second.delack_at == 0.0 and services.deadlines[acks._timer] is None


# The window ----------------------------------------------------------------------------------------------------------


def test_the_window_is_computed_again_when_less_than_the_lower_limit_is_left() -> None:
    talk = near()
    conn = conn_of(talk)
    edge = conn.rcv_edge
    conn.rcv_wnd_low = edge - conn.rcv_nxt - 100
    talk.guest(ACK, bytes(100))
    assert conn.rcv_edge == edge
    talk.guest(ACK, b"x")
    assert conn.rcv_edge > edge


def test_a_window_at_its_lower_limit_is_not_announced_again() -> None:
    talk = near()
    conn = idle(talk)
    conn.rcv_wnd_low = conn.rcv_edge - conn.rcv_nxt
    talk.tcp._acks.queue_delayed(conn, talk.now)
    talk.wait(0.1)
    talk.expect_nothing()


def test_a_window_that_has_grown_to_its_lower_limit_is_announced() -> None:
    talk = open_connection(peer=GATEWAY4, config={"mtu": 1500})
    conn = idle(talk)
    acks = talk.tcp._acks
    limit = acks._segment + 255  # what the guest would send, and what scaling may take off
    conn.rcv_wnd_max, conn.rcv_edge, conn.rcv_wnd_low = 4 * acks._segment, conn.rcv_nxt, limit
    talk.sock.sndbuf, talk.sock.wmem = -(-limit * 4 // 3), 0
    acks.queue_delayed(conn, talk.now)
    talk.wait(0.1)
    assert (conn.rcv_edge - conn.rcv_nxt, conn.rcv_wnd_low) == (limit, limit)
    talk.expect(ACK)


def opened(talk: Talk, window: int, used: int = 0) -> TcpConn:
    """The connection, after its window was computed for a send buffer of which three quarters of the rest are that."""
    conn = idle(talk)
    conn.rcv_edge = conn.rcv_nxt
    talk.sock.sndbuf, talk.sock.wmem = used + -(-window * 4 // 3), used
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.rcv_edge - conn.rcv_nxt == window
    return conn


@pytest.mark.parametrize(("window", "low"), [(60_001, 30_000 + 255), (4_380, 2_190 + 255), (2_921, 1_460 + 255)])
def test_the_lower_limit_is_half_of_the_window_or_what_the_guest_would_send(window: int, low: int) -> None:
    """The larger one of these, and the bytes that scaling may take off."""
    talk = open_connection(peer=GATEWAY4, config={"mtu": 1500})
    conn_of(talk).rcv_wnd_max = 0
    conn = opened(talk, window)
    assert (conn.rcv_wnd_low, conn.rcv_wnd_max) == (low, window)
    assert isinstance(conn.rcv_wnd_low, int)


def test_of_the_largest_window_half_is_what_the_guest_would_send() -> None:
    talk = open_connection(peer=GATEWAY4, config={"mtu": 65520})
    conn = conn_of(talk)
    conn.rcv_wnd_max = 30_001
    opened(talk, 2_000, used=2_000)  # a third of the buffer, or less, would be a socket that drains
    assert conn.rcv_wnd_low == 15_000 + 255 and isinstance(conn.rcv_wnd_low, int)


def test_the_largest_window_is_that_which_the_guest_sees() -> None:
    talk = far()
    talk.guest(ACK, bytes(1000))
    conn = conn_of(talk)
    conn.rcv_wnd_max = 0
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.rcv_wnd_max == conn.rcv_edge - conn.rcv_acked == conn.rcv_edge - conn.rcv_nxt + 1000


@pytest.mark.parametrize(("used", "waits"), [(66_666, False), (66_667, True)])
def test_a_send_buffer_of_which_two_thirds_are_used_is_writable_to_the_kernel(used: int, waits: bool) -> None:
    """sk_stream_is_writeable(): from there on no EPOLLOUT would come."""
    talk = near()
    talk.sock.sndbuf, talk.sock.wmem = 99_999, used
    conn = conn_of(talk)
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.wait_writable is waits
    assert bool(reactor(talk.ctx).events[talk.sock.fd] & EPOLLOUT) is waits


@pytest.mark.parametrize(("less", "looks"), [(0, False), (1, True)])
def test_a_window_below_its_lower_limit_is_computed_again_soon(less: int, looks: bool) -> None:
    talk = open_connection(peer=GATEWAY4, config={"mtu": 1500})
    conn_of(talk).rcv_wnd_max = 1 << 20
    conn = opened(talk, 1460 + 255 - less, used=2_000)
    assert bool(conn.delack_at) is looks


def test_a_guest_that_sends_beyond_its_window_gets_a_window_of_0() -> None:
    """The socket took it, and has charged more than its limit, as it may: a window below 0 cannot be said."""
    talk = near()
    conn = idle(talk)
    talk.sock.sndbuf, talk.sock.wmem = 100_000, 110_000
    conn.rcv_edge = conn.rcv_nxt + 10
    talk.guest(ACK, bytes(100))
    assert talk.expect(ACK, ack=101).window == 0
    assert conn.rcv_edge == conn.rcv_nxt


@pytest.mark.parametrize(("rtt", "is_near"), [(NEAR_US - 1, True), (NEAR_US, False)])
def test_how_near_a_near_peer_is(rtt: int, is_near: bool) -> None:
    talk = open_connection()
    talk.sock.info |= {MIN_RTT: rtt, BYTES_ACKED: 1}
    conn = conn_of(talk)
    talk.tcp._acks.update_rcv_acked(conn)
    assert conn.near is is_near


def test_a_delay_that_would_end_together_with_another_one_of_the_connection_is_the_same() -> None:
    talk = near()
    conn = idle(talk)
    acks = talk.tcp._acks
    acks.queue_delayed(conn, talk.now)
    acks.queue_delayed(conn, talk.now)
    assert len(acks._waiting) == 1
