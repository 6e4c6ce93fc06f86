"""Borders of conditions, counts and reasons in `tcp.py`: what a mutant of it changes and conversations leave open."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from passt.loop.reactor import EPOLLERR, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from passt.tcp import ACKS_UNCONSUMED_MAX, CONSUME_MIN
from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.window import ACK_DELAY, PINGPONG_MAX
from passt.wire.checksum import PROTO_ICMP
from passt.wire.tcp import ACK, FIN, HEADER, PSH, RST, SYN, emit_sack

from .support import link, reactor
from .tcp_support import FakeSocket, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]

HALF = 1 << 31


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._conns.values()
    return conn


def reasons(talk: Talk) -> list[str]:
    """Why connections ended."""
    return [why for (_, why), n in talk.ctx.flows.closed.items() for _ in range(n)]


def hear(talk: Talk) -> list[tuple[int, int, bytes]]:
    """Segments that went to the guest: flags, relative sequence number, payload."""
    return [(s.flags, s.seq, s.payload) for s in talk.taken()]


# Segments that are not plain -----------------------------------------------------------------------------------------


def test_reserved_bits_of_the_header_are_no_part_of_its_length() -> None:
    talk = open_connection()
    for bits in 0x400, 0x200, 0x100:
        talk.guest(ACK | bits, b"abcd")
        talk.put(talk.segment(ACK | bits, b"ef"), talk.segment(ACK | bits, b"gh"))
    assert talk.sock.sent == b"abcdefgh" * 3


def test_bad_segments_are_counted_one_by_one_and_those_behind_them_are_heard() -> None:
    talk = open_connection()
    buf = talk.ctx.pool.buf
    for _ in range(2):
        buf[64:84] = HEADER.pack(40000, 80, 3, 4, 4 << 12 | ACK, 5, 0, 0)
        flags, seq, ack, payload, window, _options = talk.segment(ACK, b"good")
        good = HEADER.pack(40000, 80, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 12 | flags, window, 0, 0) + payload
        buf[84 : 84 + len(good)] = good
        talk.tcp.tap_handler(talk.key, [64, 84, 84, 84 + len(good)], talk.now)
    assert talk.ctx.drops == {"tcp header length": 2}
    assert talk.sock.sent == b"goodgood"


def test_resets_out_of_window_are_counted_and_what_is_behind_them_is_heard() -> None:
    talk = open_connection()
    for _ in range(2):
        bad = RST | ACK, *talk.segment(ACK, seq=HALF)[1:]
        talk.put(bad, talk.segment(ACK, b"good"))
    assert talk.ctx.drops == {"tcp reset out of window": 2}
    assert talk.sock.sent == b"goodgood"
    talk.taken()


def test_a_syn_is_challenged_and_what_is_behind_it_is_heard() -> None:
    talk = open_connection()
    talk.put(talk.segment(SYN, seq=5), talk.segment(ACK, b"good"))
    assert talk.sock.sent == b"good"
    assert [f for f, _, _ in hear(talk)] == [ACK]


@pytest.mark.parametrize("flags", [0, FIN, PSH])
def test_segments_without_ack_are_ignored(flags: int) -> None:
    talk = open_connection()
    talk.guest(flags, b"x")
    talk.expect_nothing()
    assert not talk.sock.sent and not talk.sock.shut and not talk.ctx.drops


def test_a_reset_where_the_last_acknowledgement_points_is_believed() -> None:
    """The guest cannot know what we have taken since (RFC 5961, 3.2)."""
    talk = open_connection()
    conn = conn_of(talk)
    conn.poll_interval = 1.0  # the peer was looked at
    conn.pingpong = PINGPONG_MAX
    talk.guest(ACK | PSH, b"question")
    assert conn.rcv_acked == conn.rcv_nxt - 8, "not acknowledged yet"
    talk.guest(RST, seq=1)
    assert reasons(talk) == ["reset by guest"]
    assert talk.sock.resets_on_close


@pytest.mark.parametrize(("behind", "challenged"), [(0, True), (1, False)])
def test_resets_are_challenged_up_to_the_edge_of_the_window(behind: int, challenged: bool) -> None:
    talk = open_connection()
    conn = conn_of(talk)
    last = conn.rcv_edge - conn.irs - 1
    talk.guest(RST, seq=last + behind)
    assert [f for f, _, _ in hear(talk)] == [ACK] * challenged
    assert not reasons(talk)


def test_acknowledgements_of_what_was_never_sent_are_ignored() -> None:
    talk = open_connection()
    talk.host(b"x" * 100)
    talk.taken()
    conn = conn_of(talk)
    talk.guest(ACK, ack=102)
    assert conn.snd_una == conn.iss + 1
    talk.put(talk.segment(ACK, ack=51), talk.segment(ACK, ack=151))
    assert conn.snd_una == conn.iss + 51
    talk.put(talk.segment(ACK, ack=91), talk.segment(ACK, ack=131))
    assert conn.snd_una == conn.iss + 91
    assert conn.snd_wnd == talk.window << 7


def test_a_segment_half_the_space_away_is_old() -> None:
    talk = open_connection()
    talk.guest(ACK, b"x", seq=1 + HALF)
    talk.expect(ACK, b"", ack=1)
    assert not talk.ctx.drops


def test_a_bare_acknowledgement_from_ahead_asks_for_nothing() -> None:
    talk = open_connection()
    talk.put(talk.segment(ACK, seq=5), talk.segment(ACK, seq=6))
    talk.expect_nothing()


def test_what_was_sent_again_and_brings_nothing_new_does_not_reach_the_socket() -> None:
    talk = open_connection()
    talk.guest(ACK, b"abc")
    talk.taken()
    talk.sock.error = errno.ECONNRESET  # of the next call
    talk.put(talk.segment(ACK, b"bc", seq=2), talk.segment(ACK, seq=1))
    talk.expect(ACK, b"")


def test_a_retransmission_that_brings_something_new() -> None:
    talk = open_connection()
    talk.guest(ACK, b"abc")
    talk.put(talk.segment(ACK, b"bcde", seq=2), talk.segment(ACK, b"fg", seq=6))
    assert talk.sock.sent == b"abcdefg"


@pytest.mark.parametrize("again", [b"bc", b"bcde", b""])
def test_an_end_that_comes_with_a_retransmission(again: bytes) -> None:
    """Also if that has new data before it, as one has that joins segments."""
    talk = open_connection()
    talk.guest(ACK, b"abc")
    talk.guest(ACK | FIN, again, seq=2 if again else 4)
    assert talk.sock.sent == (b"abcde" if again == b"bcde" else b"abc") and talk.sock.shut
    before = conn_of(talk).rcv_nxt
    talk.guest(ACK | FIN, again, seq=2 if again else 4)
    assert conn_of(talk).rcv_nxt == before, "it counts once"


def test_an_end_in_a_segment_that_joins_what_came_and_what_is_missing() -> None:
    talk = open_connection()
    talk.guest(ACK, b"def", seq=4)
    talk.guest(ACK | FIN, b"abcdef", seq=1)
    assert talk.sock.sent == b"abcdef" and talk.sock.shut


def test_segments_that_change_places_are_no_loss() -> None:
    talk = open_connection()
    third, second, first = (talk.segment(ACK, data, seq=at) for at, data in ((7, b"ghi"), (4, b"def"), (1, b"abc")))
    talk.put(third, second, first)
    assert talk.sock.sent == b"abcdefghi"
    talk.expect_nothing()


def test_the_same_segment_twice_beyond_a_hole() -> None:
    talk = open_connection()
    later = talk.segment(ACK, b"def", seq=4)
    talk.put(later, later, later)
    talk.taken()
    talk.guest(ACK, b"abc")
    assert talk.sock.sent == b"abcdef"


def test_an_end_with_data_beyond_a_hole() -> None:
    talk = open_connection()
    talk.guest(ACK | FIN, b"def", seq=4)
    talk.taken()
    talk.guest(ACK, b"abc")
    assert talk.sock.sent == b"abcdef" and talk.sock.shut


# To the socket -------------------------------------------------------------------------------------------------------


def test_more_segments_than_one_call_takes() -> None:
    talk = open_connection()
    talk.put(*(talk.segment(ACK, b"%04d" % i) for i in range(2100)))
    assert talk.sock.sent == b"".join(b"%04d" % i for i in range(2100))
    assert not talk.ctx.drops and not conn_of(talk).rcv_refused


def test_what_the_socket_does_not_take_waits_for_room() -> None:
    talk = open_connection()
    talk.sock.room = 1
    talk.guest(ACK, b"abc")
    talk.guest(ACK, b"def")
    assert talk.sock.sent == b"a" and conn_of(talk).wait_writable
    for n in (3, 1000):
        talk.sock.room = n
        talk.writable()
    assert talk.sock.sent == b"abcdef" and not talk.ctx.drops and not conn_of(talk).out_of_order


def test_something_sent_again_is_acknowledged_at_once_in_a_dialogue() -> None:
    """Where an acknowledgement would wait for an answer otherwise."""
    talk = open_connection()
    conn = conn_of(talk)
    conn.near, conn.pingpong = True, PINGPONG_MAX
    talk.guest(ACK, b"abc")
    talk.expect_nothing()
    talk.put(talk.segment(ACK, b"abc", seq=1), talk.segment(ACK, b"def"))
    talk.expect(ACK, b"", ack=7)


def send_fails(talk: Talk) -> None:
    talk.sock.error = errno.EHOSTUNREACH
    talk.guest(ACK, b"abc")


def shutdown_fails(talk: Talk) -> None:
    def fail(how: int) -> None:
        raise OSError(errno.EHOSTUNREACH, "no route")

    talk.sock.shutdown = fail  # type: ignore[method-assign]
    talk.guest(ACK | FIN)


def peek_fails(talk: Talk) -> None:
    talk.sock.error = errno.EHOSTUNREACH
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN, talk.now)


def event_says_so(talk: Talk) -> None:
    talk.sock.error = errno.EHOSTUNREACH
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLERR, talk.now)


@pytest.mark.parametrize("fail", [send_fails, shutdown_fails, peek_fails, event_says_so])
def test_the_socket_fails(fail: Callable[[Talk], None]) -> None:
    talk = open_connection()
    fail(talk)
    if fail is shutdown_fails:  # FIN waits for the peer, and is never acknowledged: a timeout (`timed_out.py`)
        assert [frame[23] for frame in link(talk.ctx).take()] == [PROTO_ICMP]
    else:
        assert talk.taken()[-1].flags == RST | ACK
    assert reasons(talk) == ["no route"]
    assert talk.gone


# Reasons -------------------------------------------------------------------------------------------------------------


def silent_guest(talk: Talk) -> None:
    talk.accept("198.51.100.7")
    talk.wait(20)


def no_acknowledgement(talk: Talk) -> None:
    _open(talk)
    talk.host(b"x")
    talk.wait(300)


def no_answer_to_keepalive(talk: Talk) -> None:
    _open(talk)
    talk.wait(9000)


def fault_of_the_socket(talk: Talk) -> None:
    _open(talk)
    talk.tcp.fault(reactor(talk.ctx).refs[talk.sock.fd])


def fault_of_segments(talk: Talk) -> None:
    _open(talk)
    talk.tcp.fault_key(talk.key)


def guest_gone(talk: Talk) -> None:
    _open(talk)
    talk.tcp._table.forget()


def _open(talk: Talk) -> None:
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (silent_guest, "no answer of the guest"),
        (no_acknowledgement, "no acknowledgement"),
        (no_answer_to_keepalive, "no answer to keep-alive"),
        (fault_of_the_socket, "fault"),
        (fault_of_segments, "fault"),
        (guest_gone, "guest gone"),
    ],
)
def test_reasons(end: Callable[[Talk], None], reason: str) -> None:
    talk = Talk()
    end(talk)
    assert reasons(talk) == [reason]
    assert talk.gone and talk.sock.resets_on_close


# Events of the socket ------------------------------------------------------------------------------------------------


def test_a_peer_that_connects_speaks_and_ends_in_one_event() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    talk.expect_nothing()
    talk.sock.incoming += b"greeting"
    talk.sock.ended = True
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLOUT | EPOLLIN | EPOLLRDHUP, talk.now)
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    talk.expect(FIN | PSH | ACK, b"greeting")


def test_an_event_that_tells_of_no_data_is_no_reason_to_look() -> None:
    talk = open_connection()
    before = talk.sock.peeks
    talk.writable()
    assert talk.sock.peeks == before and conn_of(talk).drained


def test_data_does_not_open_the_window_of_a_full_buffer() -> None:
    talk = open_connection()
    talk.sock.wmem = talk.sock.sndbuf * 3 // 4
    conn = conn_of(talk)
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.wait_writable
    talk.sock.wmem = 0
    talk.host(b"x")
    assert conn.wait_writable, "only EPOLLOUT says so"
    talk.taken()
    talk.writable()
    assert talk.taken()[-1].flags == ACK


def test_a_small_buffer_is_looked_at_again() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    talk.sock.sndbuf, talk.sock.wmem = 2000, 1000
    conn.wait_writable, conn.rcv_edge = True, conn.rcv_nxt
    talk.writable()
    assert conn.delack_at and not conn.wait_writable
    talk.sock.wmem = 0
    before = conn.rcv_edge
    talk.wait(ACK_DELAY)
    assert conn.rcv_edge > before


def test_nothing_goes_to_the_guest_before_it_is_there() -> None:
    talk = Talk()
    talk.accept("198.51.100.7")
    talk.expect(SYN)
    talk.host(b"early")
    talk.host(error=errno.ECONNRESET)
    talk.expect_nothing()


def test_a_link_that_takes_frames_again_gets_what_waits() -> None:
    talk = open_connection()
    link(talk.ctx).full = True
    talk.host(b"waits")
    talk.expect_nothing()
    link(talk.ctx).full = False
    talk.tcp.resume(talk.now)
    talk.expect(PSH | ACK, b"waits")


def test_a_connection_that_ends_while_it_waits_for_the_link() -> None:
    talk = open_connection()
    link(talk.ctx).full = True
    talk.host(b"waits")
    talk.guest(RST)
    link(talk.ctx).full = False
    talk.tcp.resume(talk.now)
    talk.expect_nothing()


# Dialogues, dropping, recovery ---------------------------------------------------------------------------------------


def test_answers_in_time_make_a_dialogue_and_late_ones_do_not() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    conn.near = True
    for _ in range(PINGPONG_MAX + 2):
        talk.guest(ACK, b"question")
        talk.wait(2 * ACK_DELAY)
        talk.host(b"late")
        assert conn.pingpong == 0
        _all_acknowledged(talk)
    for i in range(PINGPONG_MAX + 2):
        talk.guest(ACK, b"question")
        reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN, talk.now)  # and nothing there
        assert conn.pingpong == min(i, PINGPONG_MAX)
        talk.host(b"answer")
        assert conn.pingpong == min(i + 1, PINGPONG_MAX)
        _all_acknowledged(talk)


def test_an_answer_in_time_is_one_that_carries_the_acknowledgement() -> None:
    """However late the timer is, which should have sent that before."""
    talk = open_connection()
    conn = conn_of(talk)
    conn.near, conn.pingpong = True, PINGPONG_MAX - 1
    talk.guest(ACK, b"question")
    assert conn.ack_due
    talk.now += 3 * ACK_DELAY
    talk.host(b"answer")
    assert conn.pingpong == PINGPONG_MAX
    _all_acknowledged(talk)
    conn.pingpong, conn.t_rx, talk.now = 0, 0.0, ACK_DELAY  # to the point
    talk.host(b"late")
    assert conn.pingpong == 0


def _all_acknowledged(talk: Talk) -> None:
    conn = conn_of(talk)
    talk.ack = conn.snd_nxt - conn.iss
    talk.taken()
    talk.guest(ACK)


@pytest.mark.parametrize(("n", "dropped"), [(CONSUME_MIN, True), (CONSUME_MIN - 2, False)])
def test_much_is_dropped_from_the_socket_at_once_and_what_follows_it(n: int, dropped: bool) -> None:
    talk = open_connection()
    talk.host(b"x" * (n + 1))
    talk.taken()
    talk.guest(ACK, ack=1 + n)
    assert len(talk.sock.incoming) == (1 if dropped else n + 1)
    talk.guest(ACK, ack=2 + n)
    assert bool(talk.sock.incoming) != dropped


def test_few_bytes_are_dropped_after_so_many_acknowledgements() -> None:
    talk = open_connection()
    talk.host(b"x" * 100)
    talk.taken()
    for i in range(1, 2 * (ACKS_UNCONSUMED_MAX + 1) + 1):
        talk.guest(ACK, ack=1 + i)
        assert len(talk.sock.incoming) == 100 - i // (ACKS_UNCONSUMED_MAX + 1) * (ACKS_UNCONSUMED_MAX + 1)


def lost_and_repaired(talk: Talk) -> None:
    """Two segments, the first of which gets lost; a duplicate has it sent again, and then all is acknowledged."""
    conn = conn_of(talk)
    una = conn.snd_una - conn.iss
    talk.host(b"a" * 10)
    talk.host(b"b" * 10)
    talk.taken()
    talk.guest(ACK, ack=una)
    assert [(seq, len(data)) for _, seq, data in hear(talk)] == [(una, 20)]
    talk.guest(ACK, ack=una + 20)
    talk.expect_nothing()


def test_one_loss_after_another_is_repaired() -> None:
    talk = open_connection()
    for _ in range(3):
        lost_and_repaired(talk)


def test_a_loss_after_a_timeout_is_repaired() -> None:
    talk = open_connection()
    conn = conn_of(talk)
    talk.host(b"x")
    talk.wait(0.052)
    talk.taken()
    talk.guest(ACK, ack=2)
    assert conn.scoreboard is None
    lost_and_repaired(talk)


def test_a_duplicate_after_a_timeout_is_none_of_a_new_loss() -> None:
    """It may be the answer to what was sent again (RFC 6582, 4)."""
    talk = open_connection()
    talk.host(b"x" * 10)
    talk.taken()
    talk.wait(talk.ctx.link.rto_min)
    talk.expect(ACK | PSH, b"x" * 10)
    talk.guest(ACK, ack=1)
    talk.expect_nothing()


def test_recovery_ends_with_what_was_in_flight_when_it_began() -> None:
    talk = open_connection()
    talk.host(b"a" * 10)
    talk.taken()
    talk.guest(ACK, ack=1)
    talk.taken()
    talk.host(b"b" * 10)
    talk.taken()
    talk.guest(ACK, ack=11)
    talk.expect_nothing()


def test_an_acknowledgement_restarts_the_timer_while_more_waits() -> None:
    talk = open_connection()
    talk.window = 2
    talk.guest(ACK)
    talk.host(b"x" * 1000)
    talk.taken()
    conn = conn_of(talk)
    assert conn.snd_nxt - conn.snd_una == 256 and not conn.drained
    rto = talk.ctx.link.rto_min
    talk.wait(0.9 * rto)
    talk.guest(ACK, ack=2)
    assert conn.deadline == pytest.approx(talk.now + conn.rto)
    talk.taken()
    talk.wait(0.9 * rto)
    talk.expect_nothing()


# Time ----------------------------------------------------------------------------------------------------------------


def test_timers_of_what_is_not_there() -> None:
    """A timer may fire in the turn in which its connection ends, and its index may be another flow's by then."""
    talk = open_connection()
    conn = conn_of(talk)
    talk.guest(RST)
    deadlines = talk.tcp._table.deadlines
    deadlines.timer_handler(conn.index, talk.now)
    other: Any = object()
    talk.ctx.flows.by_index[conn.index] = other
    deadlines.timer_handler(conn.index, talk.now)
    talk.wait(1.0)
    talk.expect_nothing()


def test_what_is_left_in_the_socket_behind_fin_is_consumed_at_the_end() -> None:
    """Nothing follows that it could keep out, so that no timer is needed for it."""
    talk = open_connection()
    talk.host(b"bye", end=True)
    talk.expect(FIN | ACK | PSH, b"bye")
    talk.guest(ACK)
    assert not talk.tcp._acks._waiting and talk.sock.incoming == b"bye"
    talk.guest(FIN | ACK)
    assert talk.gone and not talk.sock.incoming


# Segments of a batch -------------------------------------------------------------------------------------------------


def test_an_option_that_stands_first() -> None:
    """Most guests put two NOPs before the blocks of SACK, and none need to (RFC 2018, 3)."""
    talk = open_connection(sack=True)
    talk.host(bytes(4 * 1460))
    talk.taken()
    start = talk.isn + 1 + 1460
    block = emit_sack([(start, start + 3 * 1460)])
    flags, seq, ack, data, window, _ = talk.segment(ACK, ack=1)
    talk.put((flags, seq, ack, data, window, block.lstrip(b"\1") + b"\1\1"))
    assert [(s.seq, len(s.payload)) for s in talk.taken()] == [(1, 1460)]


def test_payload_that_lies_elsewhere() -> None:
    """A pool that finds the pieces of payload has no view of all of it."""
    talk = Talk()
    talk.tcp._whole = None
    talk.syn()
    talk.expect(SYN | ACK, seq=0, ack=1)
    talk.guest(ACK)
    talk.put(talk.segment(ACK, b"one "), talk.segment(ACK | PSH, b"two"))
    assert talk.sock.sent == b"one two" and not talk.ctx.drops


def test_the_end_of_a_connection_within_a_batch() -> None:
    """The socket turns out to have failed when the handshake is done; data stands behind the acknowledgement."""
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK, seq=0, ack=1)
    conn_of(talk).drained = False
    talk.sock.error = errno.ECONNRESET
    talk.put(talk.segment(ACK), talk.segment(ACK | PSH, b"late"))
    assert hear(talk) == [(RST | ACK, 1, b"")] and talk.gone and not talk.ctx.drops
