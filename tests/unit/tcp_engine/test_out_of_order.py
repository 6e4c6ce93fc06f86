"""Segments behind a hole are queued, within limits, and given to the host when the hole is filled."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.tcp_engine import out_of_order
from passt.tcp_engine.out_of_order import OVERHEAD
from passt.wire.tcp import ACK, FIN, PSH, RST

from ..support import lines_of
from ..tcp_support import Segment, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]

Put = tuple[int, int, int, bytes, int, bytes]


def talk_of(*pieces: bytes, fin: bool = False) -> tuple[Talk, list[Put]]:
    """A connection to a near peer, and segments in their order."""
    talk = open_connection()
    (conn,) = talk.tcp._conns.values()
    conn.near = True
    segments = [talk.segment(ACK | PSH, piece) for piece in pieces]
    if fin:
        segments.append(talk.segment(FIN | ACK))
    return talk, segments


def kept(talk: Talk) -> int:
    total = talk.tcp._table.out_of_order.total
    queues = [c.out_of_order for c in talk.tcp._conns.values()]
    assert total == sum(len(data) + OVERHEAD for queue in queues for _, data, _ in queue)
    assert total == sum(queue.cost for queue in queues)
    for queue in queues:
        ends = [seq + len(data) + fin for seq, data, fin in queue]
        assert sorted({*ends}) == ends and queue == sorted(queue, key=lambda piece: piece[0])
    return total


def acks(segments: list[Segment]) -> list[int]:
    return [s.ack for s in segments]


def test_only_what_is_missing_is_sent_again() -> None:
    talk, (a, b, c) = talk_of(b"aaa", b"bb", b"c")
    talk.put(b)
    talk.expect(ACK, ack=1)
    talk.put(c)
    talk.expect(ACK, ack=1)
    assert talk.sock.sent == b"" and kept(talk) == 3 + 2 * OVERHEAD
    talk.put(a)
    assert talk.sock.sent == b"aaabbc" and kept(talk) == 0
    talk.expect(ACK, ack=7)


def test_holes_are_filled_one_by_one() -> None:
    talk, (a, b, c, d, e) = talk_of(b"a", b"b", b"c", b"d", b"e")
    talk.put(b)
    talk.put(d)
    talk.put(a)
    assert talk.sock.sent == b"ab" and kept(talk) == 1 + OVERHEAD
    talk.put(e)
    talk.put(c)
    assert talk.sock.sent == b"abcde" and kept(talk) == 0
    assert acks(talk.taken()) == [1, 1, 3, 3, 6]


def test_the_end_waits_for_what_is_before_it() -> None:
    talk, (a, b, fin) = talk_of(b"a", b"b", fin=True)
    talk.put(fin)
    talk.put(b)
    assert not talk.sock.shut
    talk.put(a)
    assert talk.sock.sent == b"ab" and talk.sock.shut and kept(talk) == 0
    assert talk.taken()[-1].ack == 4


def test_a_batch_behind_a_hole_is_three_duplicates_at_most() -> None:
    talk, (_, *rest) = talk_of(*(b"%d" % i for i in range(9)))
    talk.put(*rest)
    assert acks(talk.taken()) == [1, 1, 1]


def test_twice_the_same_is_kept_once() -> None:
    talk, (a, b) = talk_of(b"a", b"bbbb")
    for _ in range(3):
        talk.put(b)
    assert kept(talk) == 4 + OVERHEAD
    talk.put(a)
    assert talk.sock.sent == b"abbbb"


def test_a_copy_is_kept_not_a_view() -> None:
    talk, (a, b) = talk_of(b"a", b"bbbb")
    talk.put(b)
    talk.ctx.pool.buf[:4096] = b"\xff" * 4096  # the next frames
    talk.put(a)
    assert talk.sock.sent == b"abbbb"


@pytest.mark.parametrize("limit", ["OUT_OF_ORDER_MAX", "OUT_OF_ORDER_TOTAL"])
def test_beyond_the_limit_it_is_dropped_and_asked_for_again(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(out_of_order, limit, 2 * (OVERHEAD + 1))
    talk, (a, b, c, d) = talk_of(b"a", b"b", b"c", b"d")
    for early in b, c, d:
        talk.put(early)
    assert kept(talk) == 2 * (OVERHEAD + 1) and talk.ctx.drops == {"tcp early: no room": 1}
    talk.put(a)
    assert talk.sock.sent == b"abc"
    talk.put(d)
    assert talk.sock.sent == b"abcd" and kept(talk) == 0


def test_beyond_the_window_nothing_is_kept() -> None:
    talk, (a,) = talk_of(b"a")
    (conn,) = talk.tcp._conns.values()
    talk.guest(ACK, b"x", seq=1 + conn.rcv_edge - conn.rcv_nxt)
    assert kept(talk) == 0 and talk.ctx.drops == {"tcp early: no room": 1}
    talk.put(a)
    assert talk.sock.sent == b"a"


def test_up_to_the_edge_of_the_window_it_is_kept() -> None:
    talk, (_, b) = talk_of(b"a", b"b")
    (conn,) = talk.tcp._conns.values()
    conn.rcv_edge = conn.rcv_nxt + 2
    talk.put(b)
    assert kept(talk) == 1 + OVERHEAD and not talk.ctx.drops
    for times in 1, 2:
        talk.guest(ACK, b"c", seq=3)
        assert list(talk.ctx.drops.values()) == [times]


def test_pieces_that_overlap() -> None:
    talk, _ = talk_of()
    talk.put(talk.segment(ACK, b"cdef", seq=3))
    talk.put(talk.segment(ACK, b"efgh", seq=5))
    talk.put(talk.segment(ACK, b"abcd", seq=1))
    assert talk.sock.sent == b"abcdefgh" and kept(talk) == 0
    assert not talk.ctx.drops


def test_pieces_that_begin_alike() -> None:
    """A guest that sends again may join what it sent in two segments."""
    talk, _ = talk_of()
    talk.put(talk.segment(ACK, b"cd", seq=3), talk.segment(ACK, b"cdef", seq=3), talk.segment(ACK, b"c", seq=3))
    talk.put(talk.segment(ACK, b"ab", seq=1))
    assert talk.sock.sent == b"abcdef" and kept(talk) == 0


def test_bytes_that_the_host_has_are_not_sent_to_it_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment came early, and another one that brings its bytes as well follows in the same batch."""
    talk, _ = talk_of()
    sent: list[list[int]] = []
    sendmsg = talk.sock.sendmsg

    def noting(parts: list[memoryview]) -> int:
        sent.append([len(part) for part in parts])
        return sendmsg(parts)

    monkeypatch.setattr(talk.sock, "sendmsg", noting)
    talk.put(talk.segment(ACK, b"cd", seq=3), talk.segment(ACK, b"abcd", seq=1))
    assert sent == [[4]] and talk.sock.sent == b"abcd"


def test_nothing_is_kept_behind_the_end() -> None:
    talk, (a, end) = talk_of(b"a", fin=True)
    talk.put(a, end, talk.segment(ACK, b"nonsense", seq=9))
    assert talk.sock.sent == b"a" and talk.sock.shut and kept(talk) == 0
    assert not talk.ctx.drops
    talk.put(talk.segment(ACK, b"nonsense", seq=9))
    assert kept(talk) == 0 and not talk.ctx.drops


def test_the_end_twice_is_kept_once() -> None:
    talk, _ = talk_of()
    for _ in range(2):
        talk.put(*[talk.segment(ACK | FIN, b"b", seq=2)] * 2)
        assert kept(talk) == 1 + OVERHEAD


def test_what_others_have_counts() -> None:
    talk, (_, b) = talk_of(b"a", b"b")
    queue = talk.tcp._table.out_of_order
    queue.total = 5  # of another connection
    talk.put(b)
    assert queue.total == 5 + 1 + OVERHEAD
    queue.total = out_of_order.OUT_OF_ORDER_TOTAL
    talk.put(talk.segment(ACK, b"d", seq=4))
    assert talk.ctx.drops


def test_what_is_needed_earlier_takes_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_order, "OUT_OF_ORDER_MAX", 2 * (OVERHEAD + 1))
    talk, (a, b, c, d) = talk_of(b"a", b"b", b"c", b"d")
    for early in d, c, b:
        talk.put(early)
    assert kept(talk) == 2 * (OVERHEAD + 1) and talk.ctx.drops == {"tcp early: no room": 1}
    talk.put(a)
    assert talk.sock.sent == b"abc"


def test_a_piece_that_covers_others_takes_their_place() -> None:
    talk, _ = talk_of()
    for at in 3, 5, 7, 20:
        talk.guest(ACK, b"cd", seq=at)
    talk.guest(ACK, b"bcdcdcd", seq=2)
    assert kept(talk) == 7 + 2 + 2 * OVERHEAD
    talk.guest(ACK, b"a", seq=1)
    assert talk.sock.sent == b"abcdcdcd"


@pytest.mark.parametrize("place", ["last", "first", "middle", "again", "filled"])
def test_the_price_of_a_segment_does_not_depend_on_the_queue(place: str) -> None:
    """Behind 2000 pieces with a hole before each: no more steps than behind 20, as the interpreter counts lines."""
    few, many = (_steps(n, place) for n in (20, 2000))
    assert many <= few + 100


def _steps(pieces: int, place: str) -> int:
    talk, _ = talk_of()
    for i in range(pieces):
        talk.guest(ACK, b"x", seq=11 + 4 * i)
    middle = 11 + 4 * (pieces // 2)
    at = {"last": 12 + 4 * pieces, "first": 5, "middle": middle + 2, "again": middle, "filled": 1}[place]
    lines = lines_of(lambda: talk.guest(ACK, b"y", seq=at))
    kept(talk)
    assert len(next(iter(talk.tcp._conns.values())).out_of_order) == pieces + (place not in ("again", "filled"))
    return lines


def test_nothing_is_left_of_a_connection_that_ends() -> None:
    talk, (_, b) = talk_of(b"a", b"b")
    talk.put(b)
    assert kept(talk)
    talk.guest(RST, seq=1)
    assert talk.gone and talk.tcp._table.out_of_order.total == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(1, 40), min_size=1, max_size=12), st.booleans())
def test_any_order_any_loss_any_repetition(seed: int, sizes: list[int], cut: bool) -> None:
    """In any order of arrival, the host gets every byte once and in order when all segments have come."""
    rng = random.Random(seed)
    talk, segments = talk_of(*(rng.randbytes(n) for n in sizes), fin=True)
    whole = b"".join(s[3] for s in segments)
    batch: list[Put] = [segment for segment in segments for _ in range(rng.randrange(1, 3))]
    if cut:  # pieces of them, too
        for flags, seq, ack, data, window, options in segments[:-1]:
            at = rng.randrange(len(data))
            batch.append((flags, seq + at, ack, data[at:], window, options))
    rng.shuffle(batch)
    while batch:
        n = rng.randrange(1, 4)
        talk.put(*batch[:n])
        del batch[:n]
        assert whole.startswith(bytes(talk.sock.sent))
    assert talk.sock.sent == whole and talk.sock.shut and kept(talk) == 0
