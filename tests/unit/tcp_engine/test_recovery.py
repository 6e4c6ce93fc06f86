"""Loss of segments to the guest, as conversations: RFC 2018, 6298, 6582, 6675, 8985."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from passt.linux.tcpinfo import Features
from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.rtt import PTO_DELAYED_ACK, PTO_MIN
from passt.wire.tcp import ACK, FIN, PSH, SYN

from ..support import link
from ..tcp_support import ALL, Segment, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]

NO_PEEK_OFF = Features(peek_off=False)
MSS = 1000


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._conns.values()
    return conn


def in_flight(n: int, *, sack: bool = True, features: Any = ALL, end: bool = False) -> tuple[Talk, bytes]:
    """`n` segments of 1000 bytes are in flight, from 1 on."""
    talk = open_connection(sack=sack, mss=MSS, features=features)
    talk.guest(ACK)
    data = os.urandom(n * MSS)
    talk.host(data, end=end)
    talk.taken()
    return talk, data


def sent(segments: list[Segment]) -> list[tuple[int, int]]:
    """The segments that were sent: (number, how many)."""
    return [((s.seq - 1) // MSS, -(-len(s.payload) // MSS)) for s in segments]


def block(first: int, last: int | None = None) -> tuple[int, int]:
    return 1 + first * MSS, 1 + ((first if last is None else last) + 1) * MSS


def ack(talk: Talk, number: int, *blocks: tuple[int, int]) -> list[tuple[int, int]]:
    """The guest has everything before segment `number`, and blocks; returns what is sent again."""
    talk.guest(ACK, ack=1 + number * MSS, sack=blocks)
    return sent(talk.taken())


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_only_holes_are_sent_again(features: Any) -> None:
    """RFC 6675, 5: and they have the bytes of the first time."""
    talk, data = in_flight(10, features=features)
    talk.guest(ACK, ack=1 + 2 * MSS, sack=[block(5, 6), block(3)])
    again = talk.taken()
    assert sent(again) == [(2, 1), (4, 1)]
    assert all(s.payload == data[s.seq - 1 : s.seq - 1 + MSS] for s in again)
    assert ack(talk, 2, block(5, 7), block(3)) == []  # they are on their way
    assert ack(talk, 10) == []
    assert conn_of(talk).scoreboard is None and talk.sock.incoming == b""
    talk.host(b"on")
    talk.expect(ACK | PSH, b"on", seq=1 + 10 * MSS)


def test_a_retransmission_that_gets_lost_is_repeated_without_a_timeout() -> None:
    talk, _ = in_flight(10)
    assert ack(talk, 2, block(3), block(5, 9)) == [(2, 1), (4, 1)]
    assert ack(talk, 2, block(3, 9)) == [(2, 1)]
    assert ack(talk, 10) == []


def test_new_data_shows_a_lost_retransmission() -> None:
    talk, _ = in_flight(4)
    assert ack(talk, 0, block(1)) == [(0, 1)]
    talk.host(bytes(MSS))
    talk.taken()
    assert ack(talk, 0, block(1, 3)) == []
    assert ack(talk, 0, block(1, 4)) == [(0, 1)]


def test_a_duplicate_without_a_block_is_no_loss() -> None:
    """RFC 6675, 2: a duplicate acknowledgement has new SACK information."""
    talk, _ = in_flight(4)
    assert ack(talk, 0) == []
    assert ack(talk, 0) == []


def test_blocks_outside_of_what_is_in_flight_are_ignored() -> None:
    talk, _ = in_flight(4)
    for blocks in ([block(7)], [(5, 5)], [(3000, 2000)], [(2001, 1 << 31)]):
        assert ack(talk, 0, *blocks) == []
    assert conn_of(talk).scoreboard is None


def test_a_malformed_option_is_counted() -> None:
    talk, _ = in_flight(4)
    flags, seq, number, data, window, _ = talk.segment(ACK, ack=1)
    talk.put((flags, seq, number, data, window, b"\1\1\5\xff"))
    assert talk.ctx.drops == {"tcp option length": 1}


def test_blocks_are_read_only_when_permitted() -> None:
    talk, _ = in_flight(4, sack=False)
    talk.guest(ACK, ack=1, sack=[block(2)])
    assert sent(talk.taken()) == [(0, 4)]  # a duplicate, as without the option: one frame


def test_newreno() -> None:
    """RFC 6582, 3.2: a partial acknowledgement has the next frame sent again, a full one ends the recovery."""
    talk, _ = in_flight(5, sack=False)
    conn_of(talk).chunk = MSS
    assert ack(talk, 1) == []
    assert ack(talk, 1) == [(1, 1)]
    assert ack(talk, 1) == []
    assert ack(talk, 3) == [(3, 1)]
    assert ack(talk, 5) == []
    assert conn_of(talk).scoreboard is None


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
@pytest.mark.parametrize("end", [False, True])
def test_a_tail_is_probed(features: Any, end: bool) -> None:
    """RFC 8985, 7: the last segment is sent again, before the timeout; its SACK shows what is missing."""
    talk, _ = in_flight(5, features=features, end=end)
    talk.until(talk.now + PTO_MIN)
    (probe,) = talk.taken()
    assert (probe.seq + len(probe.payload) + (probe.flags & FIN)) == 1 + 5 * MSS + end
    assert len(probe.payload) in (MSS, MSS - end) and bool(probe.flags & FIN) == end
    left = 1 + 5 * MSS + end - MSS
    talk.guest(ACK, ack=1 + MSS, sack=[(left, 1 + 5 * MSS + end)])
    (again,) = talk.taken()
    assert (again.seq, again.seq + len(again.payload)) == (1 + MSS, left)
    talk.guest(ACK, ack=1 + 5 * MSS + end)
    talk.wait(10.0)
    talk.expect_nothing()


def test_a_probe_is_followed_by_a_timeout() -> None:
    talk, _ = in_flight(3)
    rto = conn_of(talk).rto
    at = talk.now + PTO_MIN
    talk.until(at)
    assert sent(talk.taken()) == [(2, 1)]
    at += rto
    talk.until(at)
    assert sent(talk.taken()) == [(0, 3)]
    at += 2 * rto
    talk.until(at)
    assert sent(talk.taken()) == [(0, 3)]


def test_without_sack_the_first_expiry_is_a_timeout() -> None:
    talk, _ = in_flight(3, sack=False)
    talk.until(talk.now + talk.ctx.link.rto_min)
    assert sent(talk.taken()) == [(0, 3)]


def test_a_guest_that_delays_its_acknowledgements_is_probed_later() -> None:
    """RFC 8985, 7.4.2: a D-SACK says that nothing was lost."""
    talk, _ = in_flight(1)
    talk.until(talk.now + PTO_MIN)
    assert sent(talk.taken()) == [(0, 1)]
    assert ack(talk, 1, block(0)) == []
    talk.wait(0.002)
    talk.host(bytes(MSS))
    talk.taken()
    talk.wait(0.040)
    talk.expect_nothing()
    talk.wait(PTO_DELAYED_ACK - 0.039)
    assert sent(talk.taken()) == [(1, 1)]


def test_a_link_that_reorders_is_found_out() -> None:
    """A D-SACK after a fast retransmit: from then on three segments beyond a hole make it a loss."""
    talk, _ = in_flight(10)
    assert ack(talk, 1, block(2)) == [(1, 1)]
    assert ack(talk, 3) == []
    assert ack(talk, 3, block(1), block(5)) == []
    assert conn_of(talk).reorders
    assert ack(talk, 3, block(5, 6)) == []
    assert ack(talk, 3, block(5, 7)) == [(3, 2)]


def test_after_a_timeout_little_is_sent_and_then_more() -> None:
    talk = open_connection(sack=True, mss=MSS)
    conn = conn_of(talk)
    conn.chunk = MSS
    talk.guest(ACK)
    talk.host(bytes(40 * MSS))
    talk.taken()
    talk.wait(PTO_MIN + 1.5 * conn.rto)
    probe, *again = talk.taken()
    assert len(probe.payload) == MSS and sent(again) == [(n, 1) for n in range(4)]
    assert ack(talk, 4) == [(n, 1) for n in range(4, 12)]
    assert ack(talk, 12) == [(n, 1) for n in range(12, 28)]
    assert ack(talk, 40) == []
    assert conn.scoreboard is None


def test_a_guest_that_was_only_asleep_ends_the_recovery() -> None:
    talk, _ = in_flight(10)
    talk.wait(5.0)
    talk.taken()
    assert ack(talk, 10) == []
    assert conn_of(talk).scoreboard is None and conn_of(talk).retries == 0


def test_a_closed_window_does_not_end_the_connection() -> None:
    """RFC 9293, 3.8.6.1: as long as the guest answers."""
    talk, _ = in_flight(2)
    for _ in range(60):
        talk.wait(30.0)
        for s in talk.taken():
            assert len(s.payload) <= MSS or s.seq == 1
        talk.guest(ACK, ack=1, window=0)
        talk.taken()
    assert conn_of(talk).sock is not None
    talk.guest(ACK, ack=1, window=65535)
    talk.taken()
    talk.guest(ACK, ack=1 + 2 * MSS)
    assert conn_of(talk).scoreboard is None


def test_a_full_link_is_waited_for() -> None:
    talk, _ = in_flight(10)
    fake = link(talk.ctx)
    fake.full = True
    assert ack(talk, 2, block(5)) == []
    fake.full = False
    talk.tcp.resume(talk.now)
    assert sent(talk.taken()) == [(2, 3)]


def test_a_socket_that_fails_meanwhile_ends_the_connection() -> None:
    talk, _ = in_flight(10)
    talk.sock.incoming.clear()
    talk.sock.error = 104
    talk.guest(ACK, ack=1, sack=[block(5)])
    assert talk.taken()[-1].flags & 4 and talk.gone
    assert talk.ctx.flows.closed == {("tcp", "reset by peer"): 1}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sack", [True, False])
def test_a_stream_over_a_link_that_loses_frames(seed: int, sack: bool) -> None:
    """One frame in five gets lost, both ways, retransmissions as well; no timeout doubles for ever."""
    chance = random.Random(seed)
    talk = open_connection(sack=sack, mss=MSS)
    conn = conn_of(talk)
    conn.chunk = MSS
    data = chance.randbytes(100 * MSS)
    talk.host(data, end=True)
    got, behind = 0, dict[int, bytes]()
    begun = talk.now
    while got <= len(data) and conn.sock is not None:
        for s in talk.taken():
            if chance.random() < 0.2:
                continue
            behind[s.seq - 1] = max(s.payload + b"F" * (s.flags & FIN), behind.get(s.seq - 1, b""), key=len)
            while (start := next((at for at in behind if at <= got), None)) is not None:
                piece = behind.pop(start)
                got = max(got, start + len(piece))
            ranges: list[tuple[int, int]] = []
            for at in sorted(behind):
                if ranges and ranges[-1][1] == at + 1:
                    ranges[-1] = (ranges[-1][0], at + 1 + len(behind[at]))
                else:
                    ranges.append((at + 1, at + 1 + len(behind[at])))
            if chance.random() >= 0.2:
                talk.guest(ACK, ack=got + 1, sack=ranges[-3:][::-1] if sack else ())
        talk.wait(0.001)
        assert talk.now - begun < 60
    assert got == len(data) + 1


def test_a_malformed_option_does_not_hide_the_next_segment() -> None:
    """Both are in one batch."""
    talk, _ = in_flight(4)
    flags, seq, number, data, window, _ = talk.segment(ACK, ack=1)
    for count in (1, 2):
        good = talk.segment(ACK, ack=1, sack=[block(count)])
        talk.put((flags, seq, number, data, window, b"\1\1\5\xff"), good)
        assert talk.ctx.drops == {"tcp option length": count}
    assert sent(talk.taken()) == [(0, 1)]


def test_a_window_update_is_no_duplicate() -> None:
    """RFC 5681, 2: it says nothing about a loss."""
    talk, _ = in_flight(4, sack=False)
    talk.guest(ACK, ack=1, window=60000)
    talk.expect_nothing()
    assert conn_of(talk).scoreboard is None


def test_an_acknowledgement_beside_that_of_the_handshake_is_no_duplicate() -> None:
    """The greeting of the server was sent after both had left the guest."""
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.host(b"220 ready\r\n")
    talk.put(talk.segment(ACK), talk.segment(ACK), talk.segment(ACK))
    talk.expect(ACK | PSH, b"220 ready\r\n", seq=1)
    talk.expect_nothing()
    assert conn_of(talk).scoreboard is None and not conn_of(talk).retries


@pytest.mark.parametrize(("right", "tells"), [(1, False), (2, True)])
def test_a_duplicate_of_the_handshake_tells_nothing_about_a_probe(right: int, tells: bool) -> None:
    """A D-SACK of SYN may come at any time. One of the first byte tells."""
    talk = open_connection(sack=True, mss=MSS)
    talk.guest(ACK)
    talk.host(b"x")
    talk.taken()
    talk.until(talk.now + PTO_MIN)
    assert len(talk.taken()) == 1
    talk.guest(ACK, ack=2, sack=[(right - 1, right)])
    assert conn_of(talk).delays_acks is tells


def test_a_probe_is_found_needless_once() -> None:
    """Another duplicate tells nothing about its time."""
    talk, _ = in_flight(2)
    talk.until(talk.now + PTO_MIN)
    assert sent(talk.taken()) == [(1, 1)]
    for _ in range(2):
        assert ack(talk, 2, block(1)) == []
        assert conn_of(talk).delays_acks and conn_of(talk).pto == PTO_DELAYED_ACK


def test_a_probe_that_was_needed_tells_nothing_later() -> None:
    """Its data had got lost, since the guest acknowledges it without a D-SACK."""
    talk, _ = in_flight(2)
    talk.until(talk.now + PTO_MIN)
    talk.taken()
    assert ack(talk, 2) == []
    talk.wait(0.5)
    assert ack(talk, 2, block(1)) == []
    assert not conn_of(talk).delays_acks


def test_duplicates_without_a_retransmission_show_no_reordering() -> None:
    talk, _ = in_flight(4)
    assert ack(talk, 2, block(0)) == []
    assert not conn_of(talk).reorders


def test_duplicates_after_a_timeout_show_no_reordering() -> None:
    """They may be of what it sent again."""
    talk, _ = in_flight(3)
    talk.wait(PTO_MIN + 1.5 * conn_of(talk).rto)
    assert sent(talk.taken()) == [(2, 1), (0, 3)]
    assert ack(talk, 3, block(1)) == []
    assert not conn_of(talk).reorders


@pytest.mark.parametrize(
    ("sack", "partial", "again"), [(True, True, 1), (True, False, 1), (False, True, 1), (False, False, 2)]
)
def test_progress_ends_the_doubling(sack: bool, partial: bool, again: int) -> None:
    """Without SACK, an acknowledgement of everything may be that of either transmission (Karn's algorithm)."""
    talk, _ = in_flight(3, sack=sack)
    conn = conn_of(talk)
    conn.chunk = MSS
    rto = conn.rto
    talk.wait(PTO_MIN + 1.5 * rto if sack else 1.5 * rto)
    assert conn.rto == 2 * rto
    talk.taken()
    ack(talk, 1 if partial else 3)
    assert conn.rto == again * rto


def test_a_link_without_room_is_waited_for() -> None:
    """Or what is lost would be sent again by a timeout only."""
    talk, _ = in_flight(10)
    fake = link(talk.ctx)
    fake.room = 0
    assert ack(talk, 2, block(5)) == []
    fake.room = 1500
    talk.tcp.resume(talk.now)
    assert [(s.seq, len(s.payload)) for s in talk.taken()] == [(1 + 2 * MSS, 1500)]


@pytest.mark.parametrize("full", [False, True])
def test_a_retransmission_starts_the_timer_again(full: bool) -> None:
    """RFC 6298, 5.1: when it is sent, not when it has to wait."""
    talk, _ = in_flight(10)
    begun = talk.now
    link(talk.ctx).full = full
    talk.until(begun + 0.8 * PTO_MIN)
    assert ack(talk, 0, block(5)) == ([] if full else [(0, 5)])
    talk.until(begun + 1.2 * PTO_MIN)
    assert conn_of(talk).retries == (1 if full else 0)


@pytest.mark.parametrize(("end", "timed"), [(3, True), (4, False)])
def test_what_a_probe_sends_again_is_not_timed(end: int, timed: bool) -> None:
    """Karn's algorithm. `end` is that of the segment that is timed; the probe is the last segment."""
    talk, _ = in_flight(4)
    conn = conn_of(talk)
    conn.rtt_end = conn.snd_una + end * MSS
    talk.until(talk.now + PTO_MIN)
    assert sent(talk.taken()) == [(3, 1)]
    talk.wait(0.001)
    assert ack(talk, 4) == []
    assert (conn.srtt != 0) is timed


def test_without_sack_nothing_is_timed_during_a_recovery() -> None:
    """An acknowledgement that a retransmission brings may be of what is behind it, too."""
    talk, _ = in_flight(4, sack=False)
    conn = conn_of(talk)
    conn.chunk, conn.rtt_end = MSS, conn.snd_nxt
    assert ack(talk, 0) == [(0, 1)]
    assert ack(talk, 4) == []
    assert conn.srtt == 0


def test_a_block_below_what_is_timed_takes_no_time() -> None:
    talk, _ = in_flight(4)
    conn = conn_of(talk)
    conn.rtt_end = conn.snd_nxt
    talk.wait(0.005)
    assert ack(talk, 0, block(1)) == [(0, 1)]
    assert conn.rtt_end and conn.srtt == 0
    assert ack(talk, 0, block(1), block(3)) == [(2, 1)]
    assert not conn.rtt_end and conn.srtt == pytest.approx(0.005)


def test_a_probe_whose_answer_has_another_block_tells_nothing_later() -> None:
    """Such as one that was overtaken."""
    talk, _ = in_flight(2)
    talk.until(talk.now + PTO_MIN)
    talk.taken()
    assert ack(talk, 2, block(7)) == []
    talk.wait(0.5)
    assert ack(talk, 2, block(1)) == []
    assert not conn_of(talk).delays_acks


def test_without_sack_each_timeout_doubles_the_next() -> None:
    """RFC 6298, 5.5."""
    talk, _ = in_flight(3, sack=False)
    rto = conn_of(talk).rto
    for n in range(4):
        talk.wait(0.9 * 2**n * rto)
        talk.expect_nothing()
        talk.wait(0.1 * 2**n * rto)
        assert sent(talk.taken()) == [(0, 3)]


def test_timeouts_send_again_what_is_not_sacked_and_then_everything() -> None:
    """RFC 2018, 8: the guest may have reneged."""
    talk, _ = in_flight(4)
    assert ack(talk, 0, block(2)) == [(0, 2)]
    for n, again in enumerate(([(0, 2), (3, 1)], [(0, 2), (3, 1)], [(0, 4)])):
        while not (came := sent(talk.taken())):
            talk.wait(0.001)
        assert came == again, f"expiry {n + 1}"


def test_a_tail_behind_what_was_repaired_is_probed_again() -> None:
    """With SACK a recovery is over when all holes are acknowledged."""
    talk, _ = in_flight(4)
    assert ack(talk, 0, block(1)) == [(0, 1)]
    assert ack(talk, 2) == []
    assert conn_of(talk).scoreboard is None
    talk.until(talk.now + conn_of(talk).pto)
    assert sent(talk.taken()) == [(3, 1)]
