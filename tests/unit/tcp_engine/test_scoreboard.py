"""The scoreboard: SACKed ranges, holes, retransmissions that get lost, reneging."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.tcp_engine.scoreboard import NO_LIMIT, RANGES_MAX, Scoreboard

MSS = 100
RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)).map(lambda p: (p[0], sum(p))), max_size=20)


def board(una: int = 0, nxt: int = 10_000) -> Scoreboard:
    return Scoreboard(una, una, nxt)


@given(RANGES)
def test_ranges_are_those_of_the_bytes(ranges: list[tuple[int, int]]) -> None:
    b, has = board(), set[int]()
    for left, right in ranges:
        new = set(range(left, right))
        assert b.add(left, right) == bool(new - has)
        has |= new
        assert [n for left, right in b.sacked for n in range(left, right)] == sorted(has)
        assert all(a[1] < c[0] for a, c in zip(b.sacked, b.sacked[1:], strict=False))
    holes = {n for left, right in b._holes(0, 400) for n in range(left, right)}
    assert holes == set(range(400)) - has


def test_the_number_of_ranges_is_limited() -> None:
    b = board()
    for n in range(RANGES_MAX + 10):
        assert b.add(10 * n, 10 * n + 5) == (n < RANGES_MAX), "one that is not kept is no news"
    assert len(b.sacked) == RANGES_MAX
    assert b.add(5, 10) and len(b.sacked) == RANGES_MAX - 1  # a range that touches others makes room


def test_holes_below_what_arrived_are_sent_once() -> None:
    b = board()
    b.add(100, 200)
    b.add(500, 600)
    b.update(0, MSS, True)
    assert b.next(10_000, 10_000) == [(0, 100), (200, 500)]
    b.update(0, MSS, True)
    assert b.next(10_000, 10_000) == []
    b.add(700, 800)
    b.update(0, MSS, True)
    assert b.next(10_000, 10_000) == [(600, 700)]


def test_a_retransmission_is_lost_when_a_later_one_arrived() -> None:
    b = board()
    b.add(100, 200)
    b.add(300, 400)
    b.update(0, MSS, True)
    assert b.next(10_000, 10_000) == [(0, 100), (200, 300)]
    b.add(200, 300)
    b.update(0, MSS, True)
    assert b.next(10_000, 10_000) == [(0, 100)]
    b.update(400, MSS, True)
    assert not b.resent and not b.again and not b.sacked


def test_a_retransmission_is_lost_when_data_beyond_its_mark_arrived() -> None:
    b = board()
    b.add(100, 200)
    b.update(0, MSS, True)
    assert b.next(1000, 1000) == [(0, 100)]
    b.add(900, 1000)
    b.update(0, MSS, True)
    assert b.next(1000, 1000) == [(200, 900)]  # what was sent before tells nothing about (0, 100)
    b.add(1000, 1100)
    b.update(0, MSS, True)
    assert sorted(b.next(1100, 1100)) == [(0, 100), (200, 900)]


def test_a_retransmission_may_arrive_in_part() -> None:
    b = board()
    b.add(500, 600)
    b.update(0, MSS, True)
    assert b.next(10_000, 10_000) == [(0, 500)]
    b.add(200, 300)
    b.update(100, MSS, True)
    assert b.next(10_000, 10_000) == [(100, 200)]
    assert b.resent[0][:2] == (300, 500)


def test_what_a_link_that_reorders_calls_for() -> None:
    """RFC 6675, IsLost: more than two segments beyond it are SACKed."""
    b = board()
    b.add(100, 200)
    b.update(0, MSS, False)
    b.add(300, 400)
    b.update(0, MSS, False)
    assert b.next(10_000, 10_000) == []
    b.add(500, 600)
    b.update(0, MSS, False)
    assert b.next(10_000, 10_000) == [(0, 100)]
    b.add(600, 700)
    b.update(0, MSS, False)
    assert b.next(10_000, 10_000) == [(200, 300)]


def test_a_timeout_loses_everything_that_is_not_sacked() -> None:
    """RFC 6675, 5.1; and it begins with little."""
    b = board()
    b.add(300, 400)
    b.update(0, MSS, True)
    assert b.next(1000, 1000) == [(0, 300)]
    b.timeout(0, 1000, 200, forget=False)
    assert b.next(1000, 1000) == [(0, 200)]
    b.update(200, MSS, True)
    b.allowance = 400
    assert b.next(1000, 1000) == [(200, 300), (400, 700)]
    b.update(700, MSS, True)
    b.allowance = NO_LIMIT
    assert b.next(1000, 1000) == [(700, 1000)]


def test_a_second_timeout_forgets_what_is_sacked() -> None:
    """RFC 2018, 8: the guest may have reneged."""
    b = board()
    b.add(300, 400)
    b.timeout(0, 1000, NO_LIMIT, forget=True)
    assert b.next(1000, 1000) == [(0, 1000)]


def test_reneging_is_noticed() -> None:
    b = board()
    b.add(100, 200)
    b.add(300, 400)
    b.update(0, MSS, True)
    assert b.next(1000, 1000) == [(0, 100), (200, 300)]
    b.update(100, MSS, True)  # the guest would acknowledge 200 if it still had these
    assert b.next(1000, 1000) == [(100, 400)]


def test_the_window_limits_what_is_sent_again() -> None:
    b = board()
    b.add(900, 1000)
    b.update(0, MSS, True)
    assert b.next(1000, 250) == [(0, 250)]
    assert b.next(1000, 1000) == [(250, 900)]


def test_what_arrives_while_there_is_no_room_is_not_sent_a_third_time() -> None:
    """A retransmission got lost, and the guest's window is full: it waits, and meanwhile a part of it arrives."""
    b = board()
    b.add(900, 1000)
    b.update(0, MSS, True)
    assert b.next(1000, 300) == [(0, 300)]
    b.add(1000, 1100)
    b.update(0, MSS, True)
    assert b.next(1100, 300, room=0) == []
    b.update(100, MSS, True)
    assert b.next(1100, 300) == [(100, 300)]


def test_a_retransmission_behind_one_that_arrived_is_still_watched() -> None:
    b = board()
    b.add(100, 200)
    b.add(300, 400)
    b.update(0, MSS, True)
    assert b.next(1000, 1000) == [(0, 100), (200, 300)]
    b.update(200, MSS, True)
    assert b.next(1000, 1000) == []
    b.add(1000, 1100)
    b.update(200, MSS, True)
    assert sorted(b.next(1100, 1100)) == [(200, 300), (400, 1000)], "lost again: data beyond its mark arrived"


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (0, []),
        (1, [(300, 400)]),  # what got lost goes whole, as it went before
        (100, [(300, 400)]),
        (101, [(300, 400), (100, 200)]),
        (200, [(300, 400), (100, 200)]),
        (201, [(300, 400), (100, 200), (500, 501)]),
        (250, [(300, 400), (100, 200), (500, 550)]),
    ],
)
def test_room_is_for_what_got_lost_again_first(room: int, expected: list[tuple[int, int]]) -> None:
    b = board(100)
    for left in (200, 400):
        b.add(left, left + 100)
    b.update(100, MSS, True)
    assert b.next(500, 500) == [(100, 200), (300, 400)]
    b.add(900, 1000)
    b.update(100, MSS, True)
    assert b.next(1000, 1000, room) == expected


def test_what_is_on_its_way_counts_towards_the_allowance() -> None:
    b = board(100, 1100)
    b.timeout(100, 1100, 300, forget=False)
    assert b.next(1100, 1100) == [(100, 400)]
    assert b.next(1100, 1100) == []
    b.allowance = 400
    assert b.next(1100, 1100) == [(400, 500)]
