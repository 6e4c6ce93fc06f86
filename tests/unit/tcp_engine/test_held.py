"""SACK to the guest, RFC 2018 and RFC 2883: each MUST of a data receiver is a conversation."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from passt.linux.tcpinfo import BYTES_ACKED, LAST_ACK_RECV, LAST_DATA_RECV, MIN_RTT
from passt.tcp_engine import held, out_of_order
from passt.tcp_engine.held import HELD_MAX
from passt.tcp_engine.window import tail_of
from passt.wire.tcp import ACK, FIN, PSH, SACK_BLOCKS_MAX, SYN

from ..tcp_support import Segment, Talk, accepted_connection, fake_sockets, open_connection

__all__ = ["fake_sockets"]

STEP = 100


def talk_with_sack() -> Talk:
    talk = open_connection(sack=True)
    (conn,) = talk.tcp._conns.values()
    conn.near = True
    return talk


def send(talk: Talk, *numbers: int) -> list[Segment]:
    """Segments of 100 bytes, number 0 the first one, in a batch each; returns what was answered."""
    for n in numbers:
        talk.guest(ACK | PSH, bytes(STEP), seq=1 + n * STEP)
    return talk.taken()


def block(first: int, last: int | None = None) -> tuple[int, int]:
    """The block of segments `first` to `last`."""
    return 1 + first * STEP, 1 + ((first if last is None else last) + 1) * STEP


@pytest.mark.parametrize("sack", [True, False])
def test_permitted_if_the_guest_permits_it(sack: bool) -> None:
    """RFC 2018, 2: the option is for SYN segments only."""
    talk = Talk()
    talk.syn(sack=sack)
    assert talk.expect(SYN | ACK).options.sack == sack
    talk.guest(ACK)
    talk.guest(ACK | PSH, b"x", seq=5)
    assert talk.expect(ACK).sack == ([(5, 6)] if sack else [])


@pytest.mark.parametrize("sack", [True, False])
def test_offered_to_a_guest_that_is_called(sack: bool) -> None:
    talk = Talk()
    talk.accept("198.51.100.7")
    assert talk.expect(SYN, seq=0).options.sack
    talk.answer(sack=sack)
    talk.expect(ACK)
    talk.guest(ACK | PSH, b"x", seq=5)
    assert talk.expect(ACK).sack == ([(5, 6)] if sack else [])


def test_the_first_block_has_the_segment_that_caused_the_acknowledgement() -> None:
    """RFC 2018, 4: and the others repeat what was reported last."""
    talk = talk_with_sack()
    assert [s.sack for s in send(talk, 2)] == [[block(2)]]
    assert [s.sack for s in send(talk, 6)] == [[block(6), block(2)]]
    assert [s.sack for s in send(talk, 4)] == [[block(4), block(6), block(2)]]
    assert [s.sack for s in send(talk, 3)] == [[block(2, 4), block(6)]]
    assert [s.sack for s in send(talk, 7)] == [[block(6, 7), block(2, 4)]]


def test_a_segment_without_room_in_the_queue_does_not_hide_the_next() -> None:
    """Both come in one batch, and the queue has kept one of them."""
    conn: Any = SimpleNamespace(rcv_nxt=1, out_of_order=[(block(6)[0], bytes(STEP))], held=())
    held.note(conn, [block(2), block(6)])
    assert conn.held == (block(6),)


def test_no_more_blocks_than_fit() -> None:
    talk = talk_with_sack()
    answers = send(talk, *range(2, 20, 2))
    assert all(len(s.sack) == min(i + 1, SACK_BLOCKS_MAX) for i, s in enumerate(answers))
    assert answers[-1].sack == [block(18), block(16), block(14), block(12)]


def test_a_hole_that_is_filled_takes_its_block_along() -> None:
    talk = talk_with_sack()
    send(talk, 1, 3)
    (s,) = send(talk, 0)
    assert (s.ack, s.sack) == (1 + 2 * STEP, [block(3)])
    (s,) = send(talk, 2)
    assert (s.ack, s.sack) == (1 + 4 * STEP, [])
    assert send(talk, 4)[0].sack == []


def test_a_batch_is_reported_as_one() -> None:
    """Twice, because the link loses frames (`test_reminders.py`)."""
    talk = talk_with_sack()
    talk.put(*(talk.segment(ACK | PSH, bytes(STEP), seq=1 + n * STEP) for n in (2, 3, 5)))
    assert [(s.ack, s.sack) for s in talk.taken()] == [(1, [block(5), block(2, 3)])] * 2


def test_without_sack_duplicates_start_the_fast_retransmit() -> None:
    talk = open_connection()
    talk.put(*(talk.segment(ACK | PSH, bytes(STEP), seq=1 + n * STEP) for n in (2, 3, 5)))
    assert [(s.ack, s.sack) for s in talk.taken()] == [(1, [])] * 3


def test_an_end_behind_a_hole_is_no_block() -> None:
    talk = talk_with_sack()
    talk.guest(ACK | FIN, seq=1 + STEP)
    assert talk.expect(ACK, ack=1).sack == []
    (s,) = send(talk, 0)
    assert s.ack == 2 + STEP and talk.sock.shut


def test_what_is_not_kept_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_order, "OUT_OF_ORDER_MAX", 2 * (STEP + out_of_order.OVERHEAD))
    talk = talk_with_sack()
    assert [s.sack for s in send(talk, 4, 6, 8)][1:] == [[block(6), block(4)]] * 2
    # The guest sends what is missing first; what is farther off has to go (RFC 2018, 8)
    assert send(talk, 2)[0].sack == [block(2), block(4)]


def test_a_segment_that_came_twice_is_reported_once() -> None:
    """RFC 2883, 4: below the acknowledgement."""
    talk = talk_with_sack()
    talk.put(talk.segment(ACK, bytes(STEP), seq=1), talk.segment(ACK, bytes(STEP), seq=1 + STEP))
    talk.taken()
    (s,) = send(talk, 0)
    assert (s.ack, s.sack) == (1 + 2 * STEP, [block(0)])
    assert [s.sack for s in send(talk, 5)] == [[block(5)]]
    assert [s.sack for s in send(talk, 1)] == [[block(1), block(5)]]


def test_a_part_that_came_twice() -> None:
    talk = talk_with_sack()
    talk.guest(ACK, bytes(STEP))
    talk.taken()
    talk.guest(ACK, bytes(STEP), seq=51)
    assert talk.expect(ACK, ack=151).sack == [(51, 101)]


@pytest.mark.parametrize("idle", [0.0, 45.0])
@pytest.mark.parametrize("probe", [b"", b"a"])
def test_a_keepalive_probe_is_no_duplicate(probe: bytes, idle: float) -> None:
    """Neither in the answer, which the host peer may have to give first, nor in a later segment."""
    talk = talk_with_sack()
    talk.guest(ACK, bytes(STEP))
    talk.taken()
    talk.now += idle
    talk.sock.info |= {LAST_ACK_RECV: int(idle * 1000), LAST_DATA_RECV: int(idle * 1000)}
    talk.guest(ACK, probe, seq=STEP)
    assert [(s.ack, s.sack) for s in talk.taken()] == ([] if idle else [(1 + STEP, [])])
    (s,) = send(talk, 2)
    assert s.sack == [block(2)]


def test_a_longer_segment_that_is_not_kept_is_not_reported() -> None:
    """It begins like one that is kept, and ends beyond the window."""
    talk = talk_with_sack()
    (conn,) = talk.tcp._conns.values()
    conn.rcv_edge = conn.rcv_nxt + 3 * STEP
    assert send(talk, 2)[0].sack == [block(2)]
    talk.guest(ACK | PSH, bytes(2 * STEP), seq=1 + 2 * STEP)
    assert talk.expect(ACK).sack == [block(2)] and talk.ctx.drops == {"tcp early: no room": 1}


def test_everything_before_a_hole_is_acknowledged() -> None:
    """Otherwise what waits for the host peer's acknowledgement would look lost."""
    talk = open_connection(sack=True)
    talk.sock.info |= {BYTES_ACKED: 1, MIN_RTT: 10_000}
    for _ in range(2):
        talk.guest(ACK, bytes(60_000))
    assert talk.taken()[-1].ack == 1 + 120_000 - tail_of(1460) // 2
    talk.guest(ACK, bytes(10), seq=120_011)
    s = talk.expect(ACK, ack=120_001)
    assert s.sack == [(120_011, 120_021)]


def test_what_the_socket_refused_is_no_block() -> None:
    talk = talk_with_sack()
    talk.sock.room, talk.sock.wmem = 30, talk.sock.sndbuf
    talk.guest(ACK, bytes(STEP))
    assert talk.expect(ACK, ack=31).sack == []
    talk.guest(ACK, bytes(STEP), seq=301)
    assert talk.taken()[-1].sack == [(301, 401)]


def test_many_holes() -> None:
    """The blocks are always those of what was sent, and the stream is whole in the end."""
    talk = accepted_connection()
    (conn,) = talk.tcp._conns.values()
    conn.near = conn.sack = True
    numbers = list(range(1, 250))
    random.Random(1).shuffle(numbers)
    came: set[int] = set()
    for n in numbers:
        if n * STEP + STEP > 25_000:
            continue
        came.add(n)
        (s,) = send(talk, n)
        assert s.sack and s.sack[0][0] <= 1 + n * STEP < s.sack[0][1]
        for left, right in s.sack:
            assert {(at - 1) // STEP for at in range(left, right, STEP)} <= came
        assert all(a != b for a, b in pairwise(s.sack)) and len(conn.held) <= HELD_MAX
    send(talk, 0)
    assert len(talk.sock.sent) == (max(came) + 1) * STEP and not send(talk, max(came) + 1)[0].sack
