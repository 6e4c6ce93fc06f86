"""Deadlines: near ones in a heap with one timer, far ones on timerfds; none is missed, and few are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import NEVER
from passt.loop.timers import NO_TIMER
from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.deadlines import GRID, SOON, TIMER_SLACK, Deadlines

from ..support import FakeTimers, make_context, timers
from ..tcp_support import FakeSocket, fake_sockets

__all__ = ["fake_sockets"]

NOW = 1000.0


class Clock:
    """Connections, their deadlines and those that have passed."""

    def __init__(self, n: int, most: int = 1000) -> None:
        self.ctx = make_context()
        self.timers.most = most
        self.deadlines = Deadlines(self.ctx, lambda conn, e: pytest.fail(str(e)))
        self.deadlines.expired = self.expired
        self.conns = [TcpConn(bytes(11) + bytes([i])) for i in range(n)]
        for conn in self.conns:
            conn.sock = FakeSocket(2, 1)
            self.ctx.flows.insert(conn)
        self.now = NOW
        self.turns = 0  # of the wheel
        self.passed: list[tuple[TcpConn, float]] = []

    @property
    def timers(self) -> FakeTimers:
        return timers(self.ctx)

    def expired(self, conn: TcpConn, now: float) -> None:
        assert now + TIMER_SLACK >= conn.deadline
        self.passed.append((conn, now))
        conn.deadline = NEVER

    def looks(self, seconds: float) -> Iterator[float]:
        """Let time pass; gives the times at which the timer of near deadlines expires."""
        end = self.now + seconds
        services = self.timers.services
        near = self.deadlines._timer
        while True:
            due = [(at, timer) for timer, at in enumerate(services.deadlines) if at is not None]
            at, timer = min(due, default=(NEVER, -1))
            nxt = min(self.timers.next(), at)
            if nxt > end:
                break
            self.now = nxt
            if nxt == at:
                services.fire(timer, nxt)
                if timer == near:
                    yield nxt
                else:
                    self.turns += 1
            else:
                self.timers.advance(nxt)
        self.now = end


@given(
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.floats(0.001, 0.3) | st.floats(0.3, 100.0) | st.floats(100.0, 7200.0),
            st.floats(0, 0.05) | st.floats(0, 5000.0),
        ),
        max_size=30,
    ),
)
def test_no_deadline_is_missed_and_none_comes_early(most: int, steps: list[tuple[int, float, float]]) -> None:
    """Whether a connection has a timerfd (`most` of them have) or not."""
    clock = Clock(3, most)
    for i, delay, wait in steps:
        clock.deadlines.set(clock.conns[i], clock.now + delay, clock.now)
        expected = {conn: conn.deadline for conn in clock.conns}
        clock.passed.clear()
        list(clock.looks(wait))
        for conn, at in clock.passed:
            assert expected[conn] - TIMER_SLACK <= at <= expected[conn] + 2 * TIMER_SLACK
        late = [conn for conn in clock.conns if conn.deadline != NEVER and 0 < conn.deadline < clock.now - TIMER_SLACK]
        assert not late


def test_a_deadline_that_moves_costs_a_look_in_a_while() -> None:
    clock = Clock(20)
    looks = []
    for i in range(1000):
        conn = clock.conns[i % 20]
        clock.deadlines.set(conn, clock.now + 0.01, clock.now)
        looks += clock.looks(0.0002)
    assert len(looks) <= 0.2 / GRID + 2 and not clock.passed
    assert all(deadline == NEVER for deadline in clock.timers.expiry.values())


def test_a_deadline_that_moves_far_goes_to_the_timerfd() -> None:
    clock = Clock(1)
    (conn,) = clock.conns
    clock.deadlines.set(conn, clock.now + 0.01, clock.now)
    conn.deadline = NOW + 7200.0
    list(clock.looks(1.0))
    assert clock.timers.next() == NOW + 7200.0 and not conn.look_at and not clock.deadlines._soon
    list(clock.looks(7200.0))
    assert [c for c, _ in clock.passed] == [conn]


def test_a_far_deadline_that_comes_near() -> None:
    clock = Clock(1)
    (conn,) = clock.conns
    clock.deadlines.set(conn, clock.now + 10 * SOON, clock.now)
    clock.deadlines.set(conn, clock.now + SOON / 2, clock.now)
    list(clock.looks(SOON))
    assert [c for c, _ in clock.passed] == [conn]


def test_a_deadline_that_is_near_and_then_far_takes_a_timerfd_at_the_next_look() -> None:
    """Most connections have ended by then, and needed none."""
    clock = Clock(2)
    short, long = clock.conns
    for conn in clock.conns:
        clock.deadlines.set(conn, clock.now + 0.01, clock.now)
        clock.deadlines.set(conn, NOW + 7200.0, clock.now)
        assert conn.timer == NO_TIMER
    clock.deadlines.forget(short)
    short.sock = None
    list(clock.looks(SOON))
    assert short.timer == NO_TIMER and long.timer != NO_TIMER
    list(clock.looks(7200.0))
    assert [c for c, _ in clock.passed] == [long]


def test_a_connection_that_has_ended_is_left_alone() -> None:
    clock = Clock(1)
    (conn,) = clock.conns
    clock.deadlines.set(conn, clock.now + 0.01, clock.now)
    conn.sock = None
    list(clock.looks(1.0))
    assert not clock.passed and not clock.deadlines._soon


@pytest.mark.parametrize("after", [0.001, 0.002, 0.007, 0.0074])
def test_a_deadline_next_to_the_grid_is_looked_at_once(after: float) -> None:
    """A multiple of GRID that is past, or less than half of it ahead, would be another look."""
    clock = Clock(1)
    clock.now += 0.0003 if after < GRID else GRID - 0.002
    deadline = clock.now + after if after < GRID else NOW + GRID + after - GRID / 2
    clock.deadlines.set(clock.conns[0], deadline, clock.now)
    assert list(clock.looks(0.1)) == [pytest.approx(deadline)]
    assert clock.passed == [(clock.conns[0], pytest.approx(deadline))]


@pytest.mark.parametrize("early", [0.0, TIMER_SLACK])
def test_a_far_deadline_passes_when_its_timer_expires(early: float) -> None:
    """Even a little early."""
    clock = Clock(1)
    (conn,) = clock.conns
    deadline = NOW + 2 * SOON
    clock.deadlines.set(conn, deadline, NOW)
    clock.deadlines.timer_handler(conn.index, deadline - early)
    assert clock.passed == [(conn, deadline - early)]


def test_a_timer_whose_flow_is_over_expires_for_nobody() -> None:
    """Its index is free, or has a flow of another kind."""
    clock = Clock(1)
    (conn,) = clock.conns
    clock.deadlines.set(conn, NOW + 2 * SOON, NOW)
    clock.ctx.flows.by_index[conn.index] = None
    clock.deadlines.timer_handler(conn.index, NOW + 2 * SOON)
    assert not clock.passed


def test_a_connection_beyond_those_with_a_timerfd_gets_none() -> None:
    clock = Clock(3, most=2)
    for conn in clock.conns:
        clock.deadlines.set(conn, NOW + 60.0, NOW)
    assert sorted(conn.timer >= 0 for conn in clock.conns) == [False, True, True]
    list(clock.looks(61.0))
    assert {conn for conn, _ in clock.passed} == set(clock.conns)
    assert all(NOW + 60.0 - TIMER_SLACK <= at <= NOW + 60.001 for _, at in clock.passed)


def test_a_near_deadline_needs_no_timerfd() -> None:
    clock = Clock(1)
    clock.deadlines.set(clock.conns[0], NOW + SOON / 2, NOW)
    assert clock.conns[0].timer == NO_TIMER and not clock.timers.owner


def test_a_timerfd_that_is_free_again_is_taken_after_the_next_look() -> None:
    clock = Clock(2, most=1)
    one, two = clock.conns
    clock.deadlines.set(one, NOW + 3600.0, NOW)
    clock.deadlines.set(two, NOW + 1.0, NOW)
    clock.deadlines.forget(one)
    list(clock.looks(2.0))
    assert two.timer >= 0 and two.slot is None and [conn for conn, _ in clock.passed] == [two]


def test_an_acknowledgement_that_waits_in_the_link_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is asked once in a turn, before the first deadline counts as missed, and only then."""
    clock = Clock(3)
    asked: list[float] = []

    def catch_up(now: float) -> None:
        asked.append(now)
        clock.conns[0].deadline = clock.conns[1].deadline = now + 0.01

    monkeypatch.setattr(clock.ctx.link, "catch_up", catch_up)
    for conn in clock.conns:
        clock.deadlines.set(conn, NOW + 0.01, NOW)
    list(clock.looks(0.015))
    assert [c for c, _ in clock.passed] == clock.conns[2:] and len(asked) == 1
    monkeypatch.setattr(clock.ctx.link, "catch_up", asked.append)
    list(clock.looks(0.03))
    assert {id(c) for c, _ in clock.passed} == {id(c) for c in clock.conns} and len(asked) <= 3


def test_a_connection_that_ends_by_what_waited_has_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1)
    (conn,) = clock.conns
    monkeypatch.setattr(clock.ctx.link, "catch_up", lambda now: setattr(conn, "sock", None))
    clock.deadlines.set(conn, NOW + 0.01, NOW)
    list(clock.looks(1.0))
    assert not clock.passed
