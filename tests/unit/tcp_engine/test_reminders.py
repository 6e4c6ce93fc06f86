"""Acknowledgements that the link may have lost are sent again, on a link that loses frames, and on no other."""

from __future__ import annotations

from typing import Any

import pytest

from passt.tcp_engine import reminders
from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.reminders import INTERVAL, LOSSY, REMINDERS
from passt.wire.tcp import ACK, RST, SYN

from ..support import stage_faults
from ..tcp_support import Segment, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]


def behind_a_hole(*, sack: bool = True) -> Talk:
    """The guest's bytes 1 to 10 got lost, 11 to 20 came, and were reported."""
    talk = open_connection(sack=sack)
    conn_of(talk).near = True
    talk.guest(ACK, b"x" * 10, seq=11)
    talk.taken()
    return talk


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._conns.values()
    return conn


def lossy(talk: Talk) -> int:
    return len(talk.tcp._reminders.lossy)


def reminded(talk: Talk, seconds: float) -> list[Segment]:
    talk.wait(seconds)
    return talk.taken()


def test_an_acknowledgement_of_what_is_behind_a_hole_is_repeated() -> None:
    talk = behind_a_hole()
    assert reminded(talk, INTERVAL * 0.9) == []
    (again,) = reminded(talk, INTERVAL * 0.2)
    assert (again.flags, again.seq, again.ack, again.payload, again.sack) == (ACK, 1, 1, b"", [(11, 21)])


def test_it_is_repeated_a_few_times_at_doubled_intervals() -> None:
    talk = behind_a_hole()
    times = []
    begin = talk.now
    for _ in range(400):
        times += [talk.now - begin] * len(reminded(talk, 0.001))
    assert [round(t, 2) for t in times] == [0.01, 0.03, 0.07, 0.15] and len(times) == REMINDERS
    assert times[-1] < 0.2, "in front of the guest's timeout"
    assert lossy(talk) == 0


def test_a_guest_that_goes_on_needs_no_reminder() -> None:
    talk = behind_a_hole()
    talk.guest(ACK, b"x" * 10, seq=1)  # fills the hole
    talk.expect(ACK, ack=21)
    talk.seq = 21
    for _ in range(20):
        talk.wait(INTERVAL / 2)
        talk.guest(ACK, b"y" * 10)
        assert [s.ack for s in talk.taken()] == [talk.seq], "one for each, and no other"


def test_a_guest_that_went_on_and_is_silent_is_reminded_from_the_start() -> None:
    talk = open_connection(sack=True)
    conn = conn_of(talk)
    conn.near, conn.min_rtt = True, INTERVAL
    talk.guest(ACK, b"x" * 10, seq=11)
    talk.guest(ACK, b"x" * 10, seq=1)
    talk.taken()
    begin, times = talk.now, list[float]()
    for _ in range(900):
        times += [talk.now - begin] * len(reminded(talk, 0.001))
    assert [round(t, 2) for t in times] == [0.04, 0.08, 0.16, 0.32], "from the look that found it"


def test_the_acknowledgement_that_ends_a_recovery_is_repeated() -> None:
    talk = behind_a_hole()
    talk.guest(ACK, b"x" * 10, seq=1)
    talk.expect(ACK, ack=21)
    again = reminded(talk, 2.5 * INTERVAL)
    assert [(s.ack, s.sack) for s in again] == [(21, [])]


def test_what_came_twice_is_a_sign_of_a_lost_acknowledgement() -> None:
    talk = open_connection(sack=True)
    conn_of(talk).near = True
    talk.guest(ACK, b"x" * 10)
    talk.guest(ACK, b"x" * 10, seq=1)
    talk.taken()
    assert [s.ack for s in reminded(talk, 2.5 * INTERVAL)] == [11]


@pytest.mark.parametrize("most", [1, reminders.LOSSY_MAX])
def test_each_new_sign_starts_the_silence_again(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(reminders, "LOSSY_MAX", most)
    talk = behind_a_hole()
    assert talk.timers.services.deadlines[talk.tcp._reminders._timer] == talk.now + INTERVAL
    for i in range(5):
        talk.wait(INTERVAL * 0.8)
        talk.expect_nothing()
        talk.guest(ACK, b"x" * 10, seq=21 + 10 * i)
        talk.expect(ACK, ack=1)


def test_a_connection_without_a_loss_has_no_part_in_it() -> None:
    talk = open_connection(sack=True)
    talk.guest(ACK, b"x" * 10)
    talk.taken()
    talk.host(b"answer")
    assert lossy(talk) == 0


def test_a_challenge_is_no_sign_of_a_loss() -> None:
    """Its acknowledgement is asked for by a SYN, not by a segment that came twice (RFC 5961, 4.2)."""
    talk = open_connection(sack=True)
    conn_of(talk).near = True
    talk.guest(SYN, seq=1)
    talk.expect(ACK, b"", seq=1)
    assert lossy(talk) == 0


def test_it_ends_some_time_after_the_last_sign() -> None:
    talk = behind_a_hole()
    talk.guest(ACK, b"x" * 10, seq=1)
    talk.seq = 21
    for _ in range(int(LOSSY / INTERVAL) + 2):
        talk.wait(INTERVAL)
        talk.guest(ACK, b"y" * 10)
    talk.taken()
    assert lossy(talk) == 0
    assert reminded(talk, 1.0) == []


def test_a_guest_without_sack_is_reminded_of_holes_only() -> None:
    """It counts duplicates, and takes the third for a loss (RFC 5681, 3.2)."""
    talk = behind_a_hole(sack=False)
    assert [s.ack for s in reminded(talk, 1.5 * INTERVAL)] == [1]
    talk.guest(ACK, b"x" * 10, seq=1)
    talk.expect(ACK, ack=21)
    assert reminded(talk, 0.5) == []


def test_a_long_link_is_given_its_time() -> None:
    talk = open_connection(sack=True)
    conn = conn_of(talk)
    conn.near, conn.min_rtt = True, 0.05
    talk.guest(ACK, b"x" * 10, seq=11)
    talk.taken()
    assert reminded(talk, 0.099) == []
    assert len(reminded(talk, 0.02)) == 1


def test_a_batch_behind_a_hole_is_acknowledged_twice() -> None:
    talk = open_connection(sack=True)
    conn_of(talk).near = True
    talk.put(talk.segment(ACK, b"x" * 10, seq=11), talk.segment(ACK, b"x" * 10, seq=21))
    assert [(s.ack, s.sack) for s in talk.taken()] == [(1, [(11, 31)])] * 2
    talk.put(talk.segment(ACK, b"x" * 10, seq=1), talk.segment(ACK, b"x" * 10, seq=31))
    assert [(s.ack, s.sack) for s in talk.taken()] == [(41, [])] * 2, "and so is the one that fills it"
    talk.put(talk.segment(ACK, b"x" * 10, seq=41), talk.segment(ACK, b"x" * 10, seq=51))
    assert [s.ack for s in talk.taken()] == [61], "no other one"


def test_a_connection_that_has_ended_is_forgotten() -> None:
    talk = behind_a_hole()
    talk.guest(RST, seq=1)
    talk.taken()
    assert reminded(talk, 1.0) == [] and lossy(talk) == 0
    timer = talk.tcp._reminders._timer
    assert talk.timers.services.deadlines[timer] is None, "nothing wakes the process up"


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reminders, "LOSSY_MAX", 0)
    talk = behind_a_hole()
    assert lossy(talk) == 0 and reminded(talk, 1.0) == []


def test_the_next_owner_of_an_index_is_another_connection() -> None:
    talk = behind_a_hole()
    old = conn_of(talk)
    talk.guest(RST, seq=1)
    talk.end_turn()
    talk.taken()
    talk.key = talk.key[:-4] + b"\x9c\x41" + talk.key[-2:]
    talk.seq = talk.ack = 0
    talk.syn(sack=True)
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    conn = conn_of(talk)
    assert conn.index == old.index and conn is not old
    conn.near = True
    talk.guest(ACK, b"x" * 10, seq=11)
    talk.taken()
    assert [s.sack for s in reminded(talk, 2.5 * INTERVAL)] == [[(11, 21)]]


def test_a_fault_ends_the_one_connection() -> None:
    talk = behind_a_hole()
    stage_faults(talk.ctx)

    def fails(conn: Any) -> None:
        raise RuntimeError("staged")

    reminder = talk.tcp._reminders
    reminder._out.ack, good = fails, reminder._out.ack  # type: ignore[method-assign]
    talk.wait(2 * INTERVAL)
    reminder._out.ack = good  # type: ignore[method-assign]
    assert talk.ctx.drops["fault"] == 1 and lossy(talk) == 0 and talk.gone
