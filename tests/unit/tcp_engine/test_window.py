"""Acknowledgements and windows: what waits, what follows the host peer, what is promised, and each missing field."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from passt.linux.tcpinfo import BYTES_ACKED, MIN_RTT, RTT, SND_WND
from passt.loop.reactor import EPOLLHUP, EPOLLOUT
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.window import BULK_MIN, GROWN_MAX
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN
from tests.unit.support import GATEWAY4, reactor
from tests.unit.tcp_support import ALL, FakeSocket, Talk, accepted_connection, fake_sockets, open_connection

__all__ = ["fake_sockets"]


def near() -> Talk:
    return open_connection(peer=GATEWAY4)


def round_trip(talk: Talk, n: int = 1) -> None:
    """A request and its answer, 1 ms later."""
    for _ in range(n):
        talk.guest(ACK | PSH, b"q")
        talk.now += 0.001
        talk.host(b"a")
        talk.taken()
        talk.ack += 1


# Riding on an answer ---------------------------------------------------------------------------------------------


def test_first_request_is_acknowledged_at_once() -> None:
    talk = near()
    talk.guest(ACK | PSH, b"q")
    talk.expect(ACK, ack=2)


def test_after_two_answers_in_time_an_acknowledgement_rides() -> None:
    talk = near()
    round_trip(talk, 2)
    talk.guest(ACK | PSH, b"q")
    talk.expect_nothing()
    talk.now += 0.001
    talk.host(b"a")
    talk.expect(ACK | PSH, b"a", ack=4)
    talk.wait(1.0)
    assert all(s.payload == b"a" for s in talk.taken())  # nothing but the answer is ever repeated


def test_a_wait_in_vain_ends_the_habit() -> None:
    talk = near()
    round_trip(talk, 2)
    talk.guest(ACK | PSH, b"q")
    talk.wait(0.0049)
    talk.expect_nothing()
    talk.wait(0.0102)
    talk.expect(ACK, ack=4)
    talk.guest(ACK | PSH, b"q")
    talk.expect(ACK, ack=5)


def test_bulk_does_not_wait() -> None:
    talk = near()
    round_trip(talk, 3)
    talk.guest(ACK, bytes(10000))
    talk.expect(ACK, ack=10004)


def test_one_timer_serves_many_waits() -> None:
    talk = near()
    round_trip(talk, 2)
    armed = list(talk.timers.services.deadlines)
    for _ in range(5):
        round_trip(talk)
    assert sum(d is not None for d in talk.timers.services.deadlines) <= 1 + sum(d is not None for d in armed)
    talk.wait(1.0)
    talk.guest(ACK)
    talk.taken()


def test_another_connections_timer_does_not_end_the_habit() -> None:
    talk = near()
    round_trip(talk, 2)
    talk.wait(0.0079)
    talk.guest(ACK | PSH, b"q")
    talk.wait(0.001)
    talk.expect_nothing()
    talk.host(b"a")
    talk.expect(ACK | PSH, b"a", ack=4)


def test_reset_connection_leaves_the_waiting_list() -> None:
    talk = near()
    round_trip(talk, 2)
    talk.guest(ACK | PSH, b"q")
    talk.guest(0x04)  # RST
    talk.wait(0.1)
    talk.expect_nothing()


# A peer elsewhere: the tail waits for it -----------------------------------------------------------------------------


def far(**how: Any) -> Talk:
    """A connection whose host peer has acknowledged SYN, and nothing since."""
    talk = open_connection(**how)
    talk.sock.info |= {BYTES_ACKED: 1, RTT: 20_000}
    return talk


def test_few_bytes_are_acknowledged_when_the_peer_has_them() -> None:
    talk = far()
    talk.guest(ACK | PSH, b"hello")
    talk.wait(0.1)
    talk.expect_nothing()
    talk.sock.info[BYTES_ACKED] = 1 + 5
    talk.wait(0.02)
    talk.expect(ACK, ack=6)
    talk.wait(10)
    talk.expect_nothing()
    assert not any(talk.timers.services.deadlines)


def test_a_path_that_is_cut_leaves_the_guest_waiting() -> None:
    """So that its own time-out fires. Looking costs little meanwhile: at most once a second, after 8 s."""
    talk = far()
    talk.guest(ACK | PSH, b"lost")
    talk.wait(600)
    talk.expect_nothing()
    looked = talk.sock.looks
    talk.wait(60)
    talk.expect_nothing()
    assert 58 <= talk.sock.looks - looked <= 62


def test_an_answer_carries_the_acknowledgement_of_what_it_answers() -> None:
    talk = far()
    talk.guest(ACK | PSH, b"question")
    talk.expect_nothing()
    talk.sock.info[BYTES_ACKED] = 1 + 8
    talk.now += 0.0005
    talk.host(b"answer")
    talk.expect(ACK | PSH, b"answer", ack=9)
    talk.wait(10)
    assert all(s.payload == b"answer" for s in talk.taken())


def test_an_event_without_data_tells_as_well() -> None:
    talk = far()
    talk.window = 0
    talk.guest(ACK | PSH, b"question")
    talk.sock.info[BYTES_ACKED] = 1 + 8
    talk.host(b"answer")  # for which there is no window
    talk.expect(ACK, ack=9)


def test_all_but_the_tail_is_acknowledged_at_once() -> None:
    talk = far()
    talk.tcp._conns[talk.key].mss = 65480
    talk.guest(ACK, bytes(60_000))
    talk.expect_nothing()
    talk.guest(ACK, bytes(60_000))
    talk.expect(ACK, ack=1 + 120_000 - 32_768)
    talk.guest(ACK, bytes(30_000))
    talk.expect_nothing()
    talk.guest(ACK, bytes(30_000))
    talk.expect(ACK, ack=1 + 180_000 - 32_768)
    talk.wait(1)
    talk.expect_nothing()
    talk.sock.info[BYTES_ACKED] = 1 + 170_000
    talk.wait(1)
    talk.expect(ACK, ack=170_001)
    talk.sock.info[BYTES_ACKED] = 1 + 180_000
    talk.wait(1)
    talk.expect(ACK, ack=180_001)
    talk.wait(10)
    talk.expect_nothing()


def test_looks_come_with_the_round_trip() -> None:
    """A guest that waits for its acknowledgement (RFC 896) must not wait for our next look as well."""
    talk = open_connection()
    talk.sock.info |= {BYTES_ACKED: 1, RTT: 1500}
    talk.host(b"x")
    talk.taken()
    talk.guest(ACK | PSH, b"a", ack=2)
    talk.wait(0.011)
    talk.expect_nothing()
    talk.guest(ACK | PSH, b"b", ack=2)
    talk.sock.info[BYTES_ACKED] = 1 + 2
    talk.wait(0.0021)
    talk.expect(ACK, ack=3)


def test_a_longer_delay_does_not_keep_the_acknowledgement_of_the_peer_waiting() -> None:
    """The guest has acknowledged an answer, which is consumed within 10 ms. Then it sends its next request."""
    talk = open_connection()
    talk.sock.info |= {BYTES_ACKED: 1, RTT: 800}
    talk.guest(ACK | PSH, b"a")
    talk.sock.info[BYTES_ACKED] = 1 + 1
    talk.host(b"answer")
    talk.expect(ACK | PSH, b"answer", ack=2)
    talk.wait(0.008)
    talk.guest(ACK)
    talk.now += 0.0002
    talk.guest(ACK | PSH, b"b")
    talk.sock.info[BYTES_ACKED] = 1 + 2
    talk.wait(0.0011)
    talk.expect(ACK, ack=3)
    talk.wait(1)
    talk.expect_nothing()
    assert not any(talk.timers.services.deadlines)


def test_a_look_that_another_connections_is_near_to_is_not_repeated_for_ever() -> None:
    """Waits that end together are handled together, once."""
    talk = open_connection()
    talk.sock.info |= {BYTES_ACKED: 1, RTT: 10}
    looked = talk.sock.looks
    talk.guest(ACK | PSH, b"a")
    talk.wait(0.0205)
    assert talk.sock.looks - looked < 25


@pytest.mark.parametrize("how", ["room", "answer", "repeated"])
def test_what_is_said_meanwhile_does_not_end_the_following(how: str) -> None:
    """Other segments carry what was acknowledged so far; the rest is not forgotten for that."""
    talk = far()
    talk.guest(ACK, bytes(60_000))
    talk.guest(ACK, bytes(60_000))
    talk.taken()
    talk.now += 0.001
    if how == "room":
        talk.tcp._conns[talk.key].wait_writable = True
        talk.writable()
    elif how == "answer":
        talk.host(b"so far so good")
    else:
        talk.guest(ACK, bytes(1000), seq=1)
    assert [s.ack for s in talk.taken()] == [1 + 120_000 - 5_840]
    conn = talk.tcp._conns[talk.key]
    talk.guest(ACK, ack=conn.snd_nxt - conn.iss)
    talk.wait(0.05)
    talk.expect_nothing()
    talk.sock.info[BYTES_ACKED] = 1 + 120000
    talk.wait(0.02)
    talk.expect(ACK, ack=120001)


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("data", [b"", b"farewell"])
def test_fin_is_acknowledged_when_the_peer_has_it(data: bytes, accepted: bool) -> None:
    """So that close() with SO_LINGER waits inside, and a path that is cut is noticed."""
    talk = accepted_connection() if accepted else open_connection()
    syn = 0 if accepted else 1
    talk.sock.info |= {BYTES_ACKED: syn, RTT: 20_000}
    talk.guest(FIN | ACK, data)
    assert talk.sock.shut and talk.sock.sent == data
    assert all(s.ack == 1 for s in talk.taken())
    talk.sock.info[BYTES_ACKED] = syn + len(data)
    talk.wait(1)
    if data:
        talk.expect(ACK, ack=1 + len(data))
    talk.expect_nothing()
    talk.sock.info[BYTES_ACKED] = syn + len(data) + 1
    talk.wait(1)
    talk.expect(ACK, ack=2 + len(data))
    talk.host(end=True)
    talk.expect(FIN | ACK)
    talk.guest(ACK)
    assert talk.gone


@pytest.mark.parametrize("peer", [GATEWAY4, None])
def test_the_fin_of_the_host_peer_carries_the_acknowledgement(peer: bytes | None) -> None:
    """As the kernel's does (tcp_fin())."""
    talk = open_connection(peer=peer)
    talk.guest(FIN | ACK, b"farewell")
    talk.expect_nothing()
    talk.now += 0.001
    talk.host(end=True)
    talk.expect(FIN | ACK, ack=10)
    talk.guest(ACK)
    assert talk.gone


def test_fin_behind_much_data_is_acknowledged_at_once() -> None:
    talk = near()
    talk.guest(FIN | ACK, bytes(BULK_MIN))
    talk.expect(ACK, ack=2 + BULK_MIN)


@pytest.mark.parametrize("more", [0, 1])
def test_fin_behind_more_than_a_segment_is_acknowledged_at_once(more: int) -> None:
    """The guest has two in flight then, and probes for a loss long before its time-out (RFC 8985, 7.2)."""
    talk = near()
    (conn,) = talk.tcp._conns.values()
    assert conn.mss + 1 < BULK_MIN
    talk.guest(FIN | ACK, bytes(conn.mss + more))
    if more:
        talk.expect(ACK, ack=2 + conn.mss + more)
    talk.expect_nothing()


@pytest.mark.parametrize("half_closed", [False, True])
def test_the_last_bytes_and_fin_make_one_segment(half_closed: bool) -> None:
    """Where close(2) is what sends FIN, they would wait for the end of the turn."""
    talk = near()
    if half_closed:
        talk.host(end=True)
        talk.expect(FIN | ACK)
        talk.guest(ACK)
    talk.guest(ACK | PSH, b"before")
    talk.guest(FIN | ACK, b"last")
    assert talk.sock.sent == b"beforelast"
    assert talk.sock.sent_more == ([] if half_closed else [b"last"])


def test_a_connection_lasts_until_the_guests_fin_is_acknowledged() -> None:
    """Both directions have ended, the guest waits in LAST-ACK."""
    talk = far()
    talk.host(end=True)
    talk.expect(FIN | ACK)
    talk.guest(ACK)
    talk.guest(FIN | ACK)
    assert all(s.ack == 1 for s in talk.taken()) and not talk.sock.closed
    talk.wait(0.5)
    talk.expect_nothing()
    talk.sock.info[BYTES_ACKED] = 2
    talk.wait(0.1)
    talk.expect(ACK, ack=2)
    assert talk.gone


def test_a_fin_that_meets_the_hosts_is_told_by_its_event() -> None:
    """The host socket reports that its FIN was acknowledged, as EPOLLHUP."""
    talk = far()
    talk.guest(FIN | ACK)
    talk.taken()
    talk.host(end=True)
    talk.expect(FIN | ACK, ack=1)
    talk.guest(ACK)
    talk.sock.info[BYTES_ACKED] = 2
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLHUP, talk.now)
    acknowledged, released = talk.taken()
    assert (acknowledged.flags, acknowledged.ack) == (ACK, 2)
    assert (released.flags, released.seq) == (RST, 2), "from TIME-WAIT"
    assert talk.gone


def test_a_host_peer_that_vanishes_ends_a_waiting_fin() -> None:
    """The guest retransmits it until its own timeout."""
    talk = far()
    talk.guest(FIN | ACK)
    talk.taken()
    talk.host(error=errno.ETIMEDOUT)
    talk.expect_nothing()
    assert talk.gone and talk.tcp.opening._table.timed_out.ignores(talk.key, talk.now)


@pytest.mark.parametrize("accepted", [False, True])
def test_peer_found_to_be_near_is_not_followed(accepted: bool) -> None:
    """By the round trip of the handshake; that of a client is looked at with the first data."""
    talk = Talk()
    if accepted:
        talk.accept("198.51.100.7").info |= {MIN_RTT: 10, BYTES_ACKED: 0}
        talk.expect(SYN)
        talk.answer()
    else:
        FakeSocket.connect_results = [errno.EINPROGRESS]
        talk.syn()
        talk.sock.info |= {MIN_RTT: 10, BYTES_ACKED: 1}
        talk.writable()
        talk.expect(SYN | ACK)
        talk.guest(ACK)
    talk.taken()
    talk.guest(ACK | PSH, b"a")
    talk.expect(ACK, ack=2)
    talk.guest(FIN | ACK)
    talk.wait(0.02)
    talk.expect(ACK, ack=3)


def test_a_peer_behind_a_network_card_is_followed() -> None:
    """Data for another machine gets lost with its cable, however short that is."""
    talk = far()
    talk.sock.info[MIN_RTT] = 40
    talk.guest(ACK | PSH, b"lost")
    talk.wait(1)
    talk.expect_nothing()


def test_without_bytes_acked_everything_taken_is_acknowledged() -> None:
    talk = far(features=replace(ALL, bytes_acked=False))
    talk.guest(ACK, bytes(60000))
    talk.guest(ACK, bytes(60000))
    assert talk.taken()[-1].ack == 120001


def test_without_min_rtt_the_peer_is_followed() -> None:
    talk = far(features=replace(ALL, min_rtt=False))
    talk.sock.info[MIN_RTT] = 1
    talk.guest(ACK, bytes(10_000))
    talk.expect_nothing()
    talk.wait(1)
    talk.expect_nothing()


# The window --------------------------------------------------------------------------------------------------------


def edge(talk: Talk) -> int:
    """Right edge of the window in the last segment, relative, as the guest computes it."""
    s = talk.taken()[-1]
    return s.ack + (s.window << 8)


def test_window_is_what_the_send_buffer_can_take() -> None:
    talk = near()
    talk.sock.sndbuf, talk.sock.wmem = 400_000, 200_000
    talk.guest(ACK, bytes(60000))
    talk.guest(ACK, bytes(60000))  # more than half of what SYN,ACK promised is used
    assert edge(talk) > 120_000


def test_window_respects_the_peers_and_has_a_floor() -> None:
    talk = Talk(peer=GATEWAY4)
    talk.syn()
    talk.taken()
    talk.sock.info[SND_WND] = 10
    conn = talk.tcp._conns[talk.key]
    conn.rcv_edge = conn.rcv_nxt
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.rcv_edge - conn.rcv_nxt == 65536
    talk.sock.info[SND_WND] = 300_000
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.rcv_edge - conn.rcv_nxt == 300_000


@pytest.mark.parametrize("hidden", ["snd_wnd", "meminfo"])
def test_window_without_a_field(hidden: str) -> None:
    talk = open_connection(peer=GATEWAY4, features=replace(ALL, **{hidden: False}))
    conn = talk.tcp._conns[talk.key]
    conn.rcv_edge = conn.rcv_nxt
    talk.sock.info[SND_WND] = 1 << 20
    talk.tcp._acks.open_window(conn, talk.now)
    # All of the free buffer; or half of the buffer is taken as used, and the peer's window is smaller than the rest.
    assert conn.rcv_edge - conn.rcv_nxt == ((4 << 20) * 3 // 4 if hidden == "snd_wnd" else 1 << 20)


def test_right_edge_never_moves_left() -> None:
    talk = near()
    conn = talk.tcp._conns[talk.key]
    before = conn.rcv_edge
    talk.sock.wmem = talk.sock.sndbuf
    talk.tcp._acks.open_window(conn, talk.now)
    assert conn.rcv_edge == before


def test_low_buffer_is_waited_for_and_then_promised() -> None:
    talk = near()
    conn = talk.tcp._conns[talk.key]
    talk.sock.wmem = talk.sock.sndbuf * 3 // 4
    promised = conn.rcv_edge - conn.rcv_nxt
    talk.window = 65535
    talk.guest(ACK, bytes(60000))
    while conn.rcv_edge - conn.rcv_nxt > promised // 2:
        talk.guest(ACK, bytes(60000))
    talk.taken()
    talk.guest(ACK, bytes(60000))
    talk.taken()
    assert conn.wait_writable
    assert reactor(talk.ctx).events[talk.sock.fd] & EPOLLOUT
    talk.sock.wmem = 0
    talk.writable()
    assert not conn.wait_writable
    assert edge(talk) == 1 + len(talk.sock.sent) + (1 << 20)


def test_what_is_left_is_never_less_than_the_guest_would_send() -> None:
    """Half of the largest window so far: with less, the guest waits until its timer makes it probe."""
    talk = Talk(peer=GATEWAY4)
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk.syn()
    talk.sock.info[SND_WND] = 104_448
    talk.writable()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    talk.sock.info[SND_WND] = 62_464
    talk.guest(ACK, bytes(72_960))
    assert edge(talk) == 1 + 72_960 + 65_536
    talk.guest(ACK, bytes(29_184))  # less than half of the window, but what is left is less than half of the largest
    assert edge(talk) == 1 + 72_960 + 29_184 + 65_536


def test_the_guest_sees_a_window_that_begins_where_the_peer_is() -> None:
    """Bytes not acknowledged by the peer yet are window to the guest: so it is larger, and so is the half of it."""
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    talk.sock.info[SND_WND] = 0
    talk.writable()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    talk.tcp._conns[talk.key].mss = 65480
    talk.guest(ACK, bytes(60_000))
    talk.sock.info[BYTES_ACKED] = 1 + 60_000
    talk.guest(ACK, bytes(40_000))
    s = talk.taken()[-1]
    assert s.ack == 100_001 - 32_768 and s.window << 8 == 98_304
    talk.guest(ACK, bytes(20_000))  # 45,536 are left
    assert edge(talk) == 100_001 - 32_768 + 118_272


def small_window() -> Talk:
    """The send buffer has room for less than the guest would send, but is not so full that EPOLLOUT would tell more."""
    talk = near()
    talk.sock.sndbuf, talk.sock.wmem = 100_000, 60_000
    conn = talk.tcp._conns[talk.key]
    while conn.rcv_edge - conn.rcv_nxt > 40_000:
        talk.guest(ACK, bytes(10_000))
    assert edge(talk) - conn.rcv_nxt + conn.irs <= 40_000 and not conn.wait_writable
    return talk


def test_small_window_is_looked_at_until_it_is_not() -> None:
    talk = small_window()
    talk.wait(0.05)
    talk.expect_nothing()  # as small as it was: nothing that would help the guest
    talk.sock.sndbuf, talk.sock.wmem = 1_000_000, 0
    talk.wait(0.02)
    assert talk.expect(ACK).window << 8 > 65_000
    talk.wait(1.0)
    talk.expect_nothing()
    assert not any(talk.timers.services.deadlines)


def test_no_window_that_only_scaling_makes_too_small() -> None:
    """The guest waits for half of the largest window it saw, and a scaled window has lost up to 255 bytes."""
    talk = near()
    talk.sock.sndbuf, talk.sock.wmem = 69_120, 0
    conn = talk.tcp._conns[talk.key]
    conn.rcv_wnd_max, conn.rcv_edge = 0, conn.rcv_nxt  # as if the buffer had never been larger
    talk.tcp._acks.open_window(conn, talk.now)
    seen: list[int] = []
    for _ in range(20):
        talk.guest(ACK, bytes(25_920))
        seen.append(talk.taken()[-1].window << 8)
    assert min(seen) >= 51_840 // 2


def test_an_empty_buffer_takes_what_the_guest_would_send() -> None:
    """Although it is smaller: nothing will make it larger, and the guest would send by its probe timer only."""
    talk = near()
    conn = talk.tcp._conns[talk.key]
    talk.sock.sndbuf, talk.sock.wmem = 69_120, 0
    conn.rcv_wnd_max, conn.rcv_edge = 103_680, conn.rcv_nxt
    talk.tcp._acks.open_window(conn, talk.now)
    for _ in range(20):
        talk.guest(ACK, bytes(25_920))
        assert talk.taken()[-1].window << 8 >= 51_840
    talk.wait(1.0)
    talk.expect_nothing()
    assert not any(talk.timers.services.deadlines)  # an idle connection costs nothing


def test_a_small_window_of_a_buffer_that_has_emptied_is_enlarged_once() -> None:
    talk = small_window()
    talk.sock.sndbuf, talk.sock.wmem = 50_000, 0
    talk.wait(1.0)
    assert talk.expect(ACK).window << 8 == 65_536  # the guest's longest segment
    assert not any(talk.timers.services.deadlines)


def test_small_window_does_not_matter_behind_fin() -> None:
    talk = small_window()
    talk.guest(FIN | ACK)
    talk.wait(0.02)
    talk.taken()
    talk.sock.sndbuf, talk.sock.wmem = 1_000_000, 0
    talk.wait(1.0)
    talk.expect_nothing()
    assert not any(talk.timers.services.deadlines)


def test_window_is_not_computed_for_every_segment() -> None:
    talk = near()
    asked = 0
    original = talk.sock.getsockopt

    def counting(*args: int) -> object:
        nonlocal asked
        asked += 1
        return original(*args)

    talk.sock.getsockopt = counting  # type: ignore[method-assign]
    for _ in range(100):
        round_trip(talk)
    assert asked == 0


# A long link ---------------------------------------------------------------------------------------------------------


class SmallBuffer(FakeSocket):
    """A socket as small as the kernel makes it."""

    def __init__(self, family: int, kind: int) -> None:
        super().__init__(family, kind)
        self.sndbuf = 100_000


def rounds(handshake: float, round_trip: float, n: int = 40, *, losses: int = 0) -> list[int]:
    """The guest fills the window once in each round trip, and the socket drains; returns the windows.

    In the first `losses` of them every other segment gets lost, and comes again.
    """
    with mock.patch.object(tcp_sock, "new_socket", SmallBuffer):
        talk = Talk()
        talk.syn()
    edge = 1 + talk.expect(SYN | ACK).window
    talk.now += handshake
    talk.guest(ACK)
    windows = []
    for turn in range(n):
        talk.wait(round_trip)
        at = range(talk.seq, edge, 20_000)
        for seq in [*at[1::2], *at[::2]] if turn < losses else at:
            talk.guest(ACK, bytes(min(edge - seq, 20_000)), seq=seq)
        talk.seq = edge
        for s in talk.taken():
            edge = max(edge, s.ack + (s.window << 8))
        windows.append(edge - talk.seq)
    return windows


def test_behind_a_long_link_the_window_outgrows_the_buffer() -> None:
    windows = rounds(0.05, 0.05)
    assert windows[0] < 200_000 and max(windows) > 1_200_000
    assert max(windows) <= GROWN_MAX + 32_768


def test_on_a_short_link_the_buffer_is_the_limit() -> None:
    assert max(rounds(0.0001, 0.0001)) <= 75_000


def test_on_a_short_link_that_loses_segments_the_window_outgrows_the_buffer_meanwhile() -> None:
    """At the edge of a small one the guest would have nothing to send that shows it the loss of a retransmission."""
    windows = rounds(0.0001, 0.0001, losses=20)
    assert max(windows[:20]) > 1_200_000
    assert max(windows) <= GROWN_MAX + 32_768
    assert windows[-1] <= 75_000


def test_a_link_that_turns_out_to_be_long() -> None:
    assert max(rounds(0.0001, 0.05)) > 1_000_000


def test_a_link_that_turns_out_to_be_short() -> None:
    assert rounds(0.05, 0.0001)[-1] <= 75_000


def test_a_socket_that_does_not_drain_is_the_limit_again() -> None:
    with mock.patch.object(tcp_sock, "new_socket", SmallBuffer):
        talk = Talk()
        talk.syn()
    talk.expect(SYN | ACK)
    talk.now += 0.05
    talk.guest(ACK)
    talk.sock.wmem = 60_000
    talk.guest(ACK, bytes(60_000))
    s = talk.taken()[-1]
    assert s.ack + (s.window << 8) - talk.seq <= 30_000
