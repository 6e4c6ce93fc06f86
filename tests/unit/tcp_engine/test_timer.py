"""Expiry of a connection's timer: the table in `tcp.py`, a row at a time."""

from __future__ import annotations

import pytest

from passt.tcp_engine.conn import GIVE_UP, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, PROBE_INIT, RTO_MAX, SYN_TIMEOUT
from passt.tcp_engine.timer import KEEPALIVE_PROBES
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN

from ..support import T0
from ..tcp_support import Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_lost_syn_costs_a_round_trip_of_the_link_and_little_more(lost: int) -> None:
    talk = Talk()
    talk.accept("198.51.100.7")
    talk.wait(talk.ctx.link.rto_min * (2**lost - 1))
    assert [s.flags for s in talk.taken()] == [SYN] * (lost + 1)
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)
    talk.wait(SYN_TIMEOUT)
    talk.expect_nothing()


def test_a_lost_syn_ack() -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.until(talk.now + talk.ctx.link.rto_min)
    talk.expect(SYN | ACK, seq=0, ack=1)
    talk.guest(ACK)
    talk.wait(SYN_TIMEOUT)
    talk.expect_nothing()


def test_data_without_an_answer_ends_the_connection() -> None:
    talk = open_connection(sack=True)
    talk.host(b"x")
    talk.wait(GIVE_UP + 0.2)
    segments = talk.taken()
    assert {s.flags for s in segments[:-1]} == {ACK | PSH} and segments[-1].flags == RST | ACK
    assert talk.gone and 10 < len(segments) < 20


def test_a_closed_window_is_probed() -> None:
    talk = open_connection()
    talk.guest(ACK, window=0)
    talk.host(b"x")
    at, delay = talk.now, PROBE_INIT
    for _ in range(5):
        at += delay
        talk.until(at)
        talk.expect(ACK, b"", seq=0)
        delay *= 2


@pytest.mark.parametrize("lives", [True, False])
def test_a_closed_window_ends_the_connection_only_if_nothing_answers(lives: bool) -> None:
    talk = open_connection()
    talk.guest(ACK, window=0)
    talk.host(b"x")
    end = talk.now + 3 * GIVE_UP
    while talk.now < end and not talk.gone:
        talk.wait(0.05)
        flags = [s.flags for s in talk.taken()]
        if lives and flags:
            talk.guest(ACK, window=0)
    assert talk.gone != lives
    if not lives:
        assert flags == [RST | ACK] and talk.ctx.flows.closed == {("tcp", "no acknowledgement"): 1}
        assert GIVE_UP <= talk.now - T0 <= GIVE_UP + RTO_MAX + 1


def test_an_idle_guest_is_asked_whether_it_lives() -> None:
    talk = open_connection()
    at = talk.now + KEEPALIVE_IDLE
    for _ in range(KEEPALIVE_PROBES):
        talk.until(at)
        talk.expect(ACK, b"", seq=0)
        at += KEEPALIVE_INTERVAL
    talk.until(at)
    talk.expect(RST | ACK)
    assert talk.gone


def test_a_guest_that_does_not_answer_syn_is_given_up() -> None:
    """In time, though the next doubled timeout would be later."""
    talk = Talk()
    talk.accept("198.51.100.7")
    talk.wait(SYN_TIMEOUT - 0.01)
    assert not talk.gone
    talk.wait(0.01)
    assert talk.gone and talk.ctx.flows.closed == {("tcp", "no answer of the guest"): 1}


def test_why_an_idle_guest_was_given_up() -> None:
    talk = open_connection()
    talk.wait(KEEPALIVE_IDLE + (KEEPALIVE_PROBES + 1) * KEEPALIVE_INTERVAL)
    assert talk.gone and talk.ctx.flows.closed == {("tcp", "no answer to keep-alive"): 1}


def test_many_that_end_at_once_are_sent_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon was busy with other sockets for longer than a deadline is ahead: acknowledgements wait in the link."""
    talk = open_connection(sack=True)
    talk.host(end=True)
    talk.expect(FIN | ACK)
    monkeypatch.setattr(talk.ctx.link, "catch_up", lambda now: talk.guest(FIN | ACK, seq=1, ack=2))
    talk.wait(0.05)
    talk.expect(ACK, seq=2, ack=2)
    assert talk.gone
