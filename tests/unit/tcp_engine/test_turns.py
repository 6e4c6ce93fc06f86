"""The order of those that send: an answer does not wait for a bulk flow, and bulk flows share the link."""

from __future__ import annotations

from typing import Any, cast

import pytest

from passt.loop.reactor import EPOLLIN
from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.output import PEEK_MAX
from passt.tcp_engine.turns import (
    BULKS_MAX,
    CREDIT_RATE,
    CUT_TURN,
    LIGHT,
    LIGHT_TURN,
    OVERDUE,
    PACED,
    PAUSE_MAX,
    PAUSES,
    SPARSE,
    TURN_MAX,
)
from passt.wire.tcp import ACK, RST, SYN

from ..support import link, reactor
from ..tcp_support import FakeSocket, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]

MSS = 1460
PEEK = PEEK_MAX - PEEK_MAX % (65535 // MSS * MSS)  # bytes in one peek: whole super-frames
TURN = 2 * PEEK  # bytes that a turn sends
LARGE = 8 * TURN  # bytes that the host peer has sent


class Party:
    """Connections of one guest, by number, each with a window of some megabytes."""

    def __init__(self, count: int) -> None:
        self.talk = open_connection(mss=MSS)
        self.socks = [self.talk.sock]
        base = self.talk.key
        keys = [base]
        for i in range(1, count):
            talk = self.talk
            keys.append(base[:-4] + (40000 + i).to_bytes(2, "big") + base[-2:])
            talk.key, talk.seq, talk.ack = keys[-1], 0, 0
            talk.syn()
            talk.expect(SYN | ACK, seq=0, ack=1)
            talk.guest(ACK)
            self.socks.append(talk.sock)
        conns = self.talk.tcp._conns
        self.conns = [conns[key] for key in keys]
        for conn in self.conns:
            conn.snd_wnd = conn.snd_wnd_max = 16 * TURN
        self.link = link(self.talk.ctx)
        self.room = 1 << 30  # bytes that the link takes until it is full
        send = self.link.send_payload

        def limited(parts: Any) -> None:
            send(parts)
            self.room -= sum(map(len, parts))
            self.link.full = self.room <= 0

        cast(Any, self.link).send_payload = limited

    def arrive(self, number: int, size: int) -> None:
        """The host peer of a connection sends, and epoll says so."""
        sock: FakeSocket = self.socks[number]
        sock.incoming += bytes(size)
        reactor(self.talk.ctx).fire(sock.fd, EPOLLIN, self.talk.now)

    def opens(self, room: int) -> None:
        """The link takes some more, in another turn."""
        reactor(self.talk.ctx).wakeups += 1
        self.room, self.link.full = room, False
        self.talk.tcp.resume(self.talk.now)

    def next_turn(self) -> None:
        reactor(self.talk.ctx).go_on(self.talk.now)

    def sent(self) -> list[int]:
        """Bytes in flight of each."""
        return [conn.snd_nxt - conn.snd_una for conn in self.conns]

    def order(self) -> list[TcpConn]:
        return list(self.talk.tcp._out.turns.waiting.values())


def test_a_bulk_flow_does_not_fill_the_link_in_front_of_an_answer() -> None:
    party = Party(2)
    party.room = 100_000
    party.arrive(0, LARGE)
    assert party.link.full
    party.arrive(1, 1)
    assert party.sent()[1] == 0, "the link is full"
    party.opens(100_000)
    assert party.sent()[1] == 1, "the answer goes first"
    assert party.link.full, "and then the bulk flow"


def test_bulk_flows_take_turns_at_a_link_that_is_full() -> None:
    party = Party(3)
    party.room = 1
    for number in range(3):
        party.arrive(number, LARGE)
    for _ in range(9):  # the link takes one peek each time
        before = party.sent()
        party.opens(1)
        assert sum(party.sent()) - sum(before) == PEEK
    assert max(party.sent()) - min(party.sent()) <= PEEK_MAX


def test_a_turn_has_an_end() -> None:
    party = Party(2)
    party.arrive(0, LARGE)
    assert party.sent()[0] == TURN, "the guest's window is larger, and the link takes more"
    party.arrive(1, LARGE)
    assert party.sent()[1] == SPARSE, "the turn is used up, but for an answer"
    party.next_turn()
    party.next_turn()
    assert party.sent() == [2 * TURN, SPARSE + TURN], "in the order in which they began to wait"


def test_an_answer_does_not_wait_for_a_turn() -> None:
    party = Party(3)
    party.arrive(0, LARGE)
    party.arrive(1, 1)
    assert party.sent() == [TURN, 1, 0]
    party.conns[2].snd_wnd = 0
    party.arrive(2, 100)
    party.next_turn()
    party.conns[2].snd_wnd = 1 << 20
    party.talk.key = party.conns[2].key
    party.talk.tcp._out.send_data(party.conns[2])
    assert party.sent() == [TURN + PEEK, 1, 100]


def test_a_turn_is_no_longer_for_those_that_waited_for_it() -> None:
    """A bulk flow's acknowledgement, and what it waits for, are one turn: it was two, with twice the bytes."""
    party = Party(2)
    party.arrive(0, LARGE)
    party.arrive(1, LARGE)
    for _ in range(4):
        before = sum(party.sent())
        reactor(party.talk.ctx).wakeups += 1
        for conn in party.conns:  # acknowledgements, which open the window
            party.talk.tcp._out.send_data(conn)
        reactor(party.talk.ctx).wakeups -= 1
        party.next_turn()
        assert sum(party.sent()) - before == TURN
    assert party.sent() == [3 * TURN, SPARSE + 2 * TURN], "and each of them has had its share"


def test_a_turn_is_not_charged_with_what_earlier_ones_have_sent() -> None:
    """A bulk flow sends as much as is acknowledged, and needs no other turn for that."""
    party = Party(1)
    turns = reactor(party.talk.ctx)
    party.arrive(0, TURN - 1000)
    turns.wakeups += 1
    party.arrive(0, 2000)
    assert party.sent() == [TURN + 1000] and not turns.more
    party.arrive(0, TURN)
    assert turns.more, "this turn has sent enough"


def test_an_acknowledgement_does_not_prolong_the_turn() -> None:
    party = Party(1)
    talk = party.talk
    party.arrive(0, LARGE)
    talk.guest(ACK, ack=1 + TURN, window=65535)
    assert party.conns[0].snd_nxt - party.conns[0].snd_una == SPARSE
    party.next_turn()
    assert party.sent()[0] == SPARSE + TURN


def test_what_fits_into_a_turn_needs_no_other() -> None:
    party = Party(1)
    party.arrive(0, TURN - 1)
    assert party.sent()[0] == TURN - 1
    assert reactor(party.talk.ctx).more == [] and party.order() == []


def test_turns_come_until_all_is_sent() -> None:
    party = Party(3)
    for number in range(3):
        party.arrive(number, 2 * TURN + 1)
    turns = 0
    while reactor(party.talk.ctx).more:
        assert len(reactor(party.talk.ctx).more) == 1
        party.next_turn()
        turns += 1
    assert party.sent() == [2 * TURN + 1] * 3
    assert turns == 5 and party.order() == []


def test_a_link_that_is_full_is_not_asked_again_and_again() -> None:
    party = Party(2)
    party.arrive(0, LARGE)  # its turn is over
    party.arrive(1, LARGE)
    party.link.full = True
    party.next_turn()
    assert reactor(party.talk.ctx).more == [], "the back end says when there is room"
    assert len(party.order()) == 2


def test_a_link_without_room() -> None:
    party = Party(1)
    party.link.room = 0
    party.arrive(0, 10)
    party.talk.tcp.resume(party.talk.now)
    assert party.sent() == [0] and party.order() == party.conns
    party.link.room = 1 << 20
    party.talk.tcp.resume(party.talk.now)
    assert party.sent() == [10] and party.order() == []


def test_few_bytes_in_flight_are_no_bulk() -> None:
    """An answer in two writes: the second one waits for the link while the first is in flight."""
    party = Party(2)
    party.arrive(1, SPARSE - 1)
    party.room = 1
    party.arrive(0, LARGE)
    party.arrive(1, 1)
    party.opens(1)
    assert party.sent()[1] == SPARSE
    party.opens(1)
    party.arrive(1, 1)
    assert party.order() == [party.conns[0], party.conns[1]]
    party.opens(1)
    assert party.order()[0] is party.conns[1], "more in flight are: it is the other's turn"


def test_a_connection_that_ends_while_it_waits_for_its_turn() -> None:
    party = Party(1)
    party.arrive(0, LARGE)
    party.talk.guest(RST)
    party.link.take()
    party.next_turn()
    assert party.link.take() == [] and party.order() == [] and reactor(party.talk.ctx).more == []


def test_what_a_reset_leaves_takes_its_turn() -> None:
    """The socket holds it, and RST follows."""
    party = Party(1)
    talk: Talk = party.talk
    party.arrive(0, TURN)
    talk.host(b"x" * 100, error=104)
    before = talk.taken()
    assert not any(s.flags & RST for s in before)
    party.next_turn()
    frames = [s for s in (*before, *talk.taken()) if s.payload or s.flags & RST]
    assert sum(len(s.payload) for s in frames) == TURN + 100 and frames[-1].flags & RST


# Beside a light flow -------------------------------------------------------------------------------------------------


class Beside(Party):
    """A download, 0, and a flow of requests and answers, 1. The first answer was sent."""

    def __init__(self) -> None:
        super().__init__(2)
        self.arrive(0, LARGE)
        self.arrive(1, 1)
        assert self.sent() == [TURN, 1]
        services = self.talk.timers.services
        self.timer = next(i for i, c in enumerate(services.callbacks) if c == self.talk.tcp._out.turns._pause_over)

    def request(self) -> None:
        self.talk.key, self.talk.seq = self.conns[1].key, self.conns[1].rcv_nxt - self.conns[1].irs
        self.talk.guest(ACK, b"q", ack=1 + self.sent()[1], window=65535)

    def moved(self) -> int:
        """Bytes that the download moves in the next turn."""
        before = self.sent()[0]
        self.next_turn()
        return self.sent()[0] - before

    def pause(self) -> float:
        """Seconds for which the download pauses, from the next turn on."""
        assert self.moved() == 0 and not self.waits()
        deadline = self.talk.timers.services.deadlines[self.timer]
        assert deadline is not None
        return deadline - self.talk.now

    def waits(self) -> bool:
        """Whether a next turn was asked for."""
        return bool(reactor(self.talk.ctx).more)

    def over(self) -> None:
        """The pause ends with its time."""
        services = self.talk.timers.services
        self.talk.now = services.deadlines[self.timer] or 0.0
        services.fire(self.timer)


def test_bulk_beside_a_light_flow_is_sent_behind_events_and_in_short_turns() -> None:
    party = Beside()
    party.next_turn()
    before = party.sent()[0]
    assert before == TURN + PEEK
    reactor(party.talk.ctx).wakeups += 1
    waiting, party.talk.tcp._out.turns.waiting = party.talk.tcp._out.turns.waiting, {}
    party.talk.tcp._out.send_data(party.conns[0])
    assert party.sent()[0] == before, "an acknowledgement, in front of other events"
    assert party.talk.tcp._out.turns.waiting == waiting
    assert party.moved() == PEEK


def test_what_has_nothing_in_flight_is_bulk_still() -> None:
    """Behind a pause everything was acknowledged."""
    party = Beside()
    party.next_turn()
    conn = party.conns[0]
    conn.snd_una = conn.snd_nxt
    party.talk.tcp._out.send_data(conn)
    assert party.sent()[0] == 0 and party.moved() == PEEK


def test_bulk_pauses_for_a_message_without_an_answer() -> None:
    party = Beside()
    party.talk.now += OVERDUE
    assert party.moved() == PEEK, "not yet overdue"
    party.talk.now += OVERDUE / 10
    assert party.pause() == pytest.approx(PAUSE_MAX)
    party.over()
    assert party.moved() == PEEK and party.moved() == PEEK, "one for each message"


def test_the_next_message_ends_the_pause() -> None:
    party = Beside()
    party.talk.now += 2 * OVERDUE
    party.pause()
    party.talk.now += OVERDUE
    party.conns[1].pingpong = 1
    party.request()
    assert party.waits() and party.moved() == PEEK
    before = party.sent()[0]
    party.over()
    assert party.sent()[0] == before, "the timer is that of a pause which is over"
    party.arrive(1, 1)
    assert party.sent()[1] == 1


def test_pauses_take_their_share_of_the_time() -> None:
    party = Beside()
    began, paused = party.talk.now, 0.0
    for _ in range(200):
        party.conns[1].pingpong = 1
        party.request()
        party.talk.now += 2 * OVERDUE
        party.socks[0].incoming += bytes(PEEK)
        if not party.moved():
            start = party.talk.now
            party.over()
            paused += party.talk.now - start
            party.next_turn()
        party.conns[0].snd_una = party.conns[0].snd_nxt
    other = party.talk.now - began - paused
    assert paused <= other * CREDIT_RATE + PAUSES
    assert paused >= other * CREDIT_RATE - PAUSES


def test_light_flows_are_forgotten() -> None:
    party = Beside()
    party.next_turn()
    party.talk.now += LIGHT * 1.01
    assert party.moved() == TURN and not party.talk.tcp._out.turns.light


def test_a_message_without_bulk_changes_nothing() -> None:
    party = Party(2)
    party.arrive(1, 1)
    party.talk.now += LIGHT
    party.arrive(0, LARGE)
    assert party.sent() == [TURN, 1] and not party.talk.tcp._out.turns.light
    party.talk.now += LIGHT * 1.01
    party.arrive(1, 1)
    assert not party.talk.tcp._out.turns.light, "the download has stopped"


def test_turns_are_shortest_where_the_program_cuts_frames() -> None:
    """The request of the first light flow was handed on before the link was one that cuts."""
    party = Beside()
    party.link.cuts = True
    party.request()
    turns = party.talk.tcp._out.turns
    reactor(party.talk.ctx).wakeups += 1
    assert turns.light and turns.renewed() == CUT_TURN < LIGHT_TURN


def test_a_link_queues_little_beside_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once, and again when bulk goes on without."""
    party, told = Beside(), list[bool]()
    turns = party.talk.tcp._out.turns
    monkeypatch.setattr(party.link, "queue_little", told.append)

    def later(seconds: float) -> None:
        party.talk.now += seconds
        turns.bulk(party.conns[0].index, party.talk.now)

    later(PACED * 1.1)
    assert told == [False], "no more messages"
    for _ in range(2):
        party.request()
        assert told == [False, True]
        later(PACED * 0.9)
    later(PACED * 0.2)
    assert told == [False, True, False]


def test_a_download_in_small_parts_is_no_light_flow() -> None:
    """The guest has sent nothing that they answer."""
    party = Party(2)
    party.arrive(0, LARGE)
    party.talk.now += LIGHT / 2  # and more than a delayed acknowledgement
    party.talk.now += 0.005
    party.arrive(1, 1000)
    assert not party.talk.tcp._out.turns.light


def test_an_answer_in_the_stream_of_a_download_is_none_beside_it() -> None:
    party = Party(1)
    party.arrive(0, 2 * SPARSE)
    conn = party.conns[0]
    party.talk.now += LIGHT / 2
    conn.snd_una, conn.ack_due = conn.snd_nxt, True
    party.arrive(0, 1)
    assert party.sent() == [1] and not party.talk.tcp._out.turns.light
    party.talk.now += LIGHT * 0.6
    party.talk.tcp._out.turns.bulk(7, party.talk.now)
    conn.snd_una, conn.ack_due = conn.snd_nxt, True
    party.arrive(0, 1)
    assert party.talk.tcp._out.turns.light, "the download has been over for a while, and another flow is bulk"


def test_no_more_bulk_flows_are_known_than_there_is_room_for() -> None:
    turns = Party(1).talk.tcp._out.turns
    for index in range(3 * BULKS_MAX):
        turns.bulk(index, 100.0)
        assert len(turns._bulk_at) <= BULKS_MAX
    turns.handed_on(3 * BULKS_MAX - 1, 100.0)
    assert not turns.light


# Borders -------------------------------------------------------------------------------------------------------------


def waiting(*sizes: int) -> Party:
    """Connections that have so much to send each, and wait for the link."""
    party = Party(len(sizes))
    party.link.full = True
    for number, size in enumerate(sizes):
        party.arrive(number, size)
    assert party.sent() == [0] * len(sizes)
    return party


def test_the_last_byte_of_a_turn_lets_another_one_send() -> None:
    party = waiting(TURN_MAX - 1, 10)
    party.opens(1 << 30)
    assert party.sent() == [TURN_MAX - 1, 10]


def test_a_link_that_gets_full_with_the_last_byte_is_waited_for() -> None:
    party = waiting(TURN_MAX - 1, 10)
    party.opens(TURN_MAX - 1)
    assert party.sent() == [TURN_MAX - 1, 0] and party.order() == [party.conns[1]]
    assert reactor(party.talk.ctx).more == []


def test_a_turn_that_is_used_up_to_the_byte_goes_on_in_the_next() -> None:
    party = waiting(TURN_MAX - 100, 100, SPARSE + 10)
    party.opens(1 << 30)
    assert party.sent() == [TURN_MAX - 100, 100, SPARSE] and len(reactor(party.talk.ctx).more) == 1
    party.next_turn()
    assert party.sent() == [TURN_MAX - 100, 100, SPARSE + 10]


def test_a_new_turn_is_open_where_the_last_one_was_used_up() -> None:
    party = Party(2)
    party.arrive(0, TURN_MAX - 100)
    party.arrive(1, 100)
    reactor(party.talk.ctx).wakeups += 1
    party.arrive(1, 1000)
    assert party.sent() == [TURN_MAX - 100, 1100] and not reactor(party.talk.ctx).more


def test_a_link_with_room_for_a_byte_takes_it() -> None:
    party = Party(1)
    party.link.room = 0
    party.arrive(0, 10)
    party.link.room = 1
    party.talk.tcp.resume(party.talk.now)
    assert party.sent() == [10], "a byte each time"


def test_one_that_finds_no_room_is_in_front_of_one_that_has_sent() -> None:
    party = waiting(LARGE, LARGE)
    send = party.link.send_payload

    def last(parts: Any) -> None:
        send(parts)
        party.link.room = 0

    cast(Any, party.link).send_payload = last
    party.opens(1 << 30)
    assert party.sent()[0] > 0 and party.order() == [party.conns[1], party.conns[0]]
