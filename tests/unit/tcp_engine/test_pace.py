"""Bulk of the guest beside requests and answers: its window is small, and its acknowledgements are held."""

from __future__ import annotations

import pytest

from passt.tcp_engine.conn import TcpConn
from passt.tcp_engine.pace import HOLD, PACED_WINDOW
from passt.tcp_engine.turns import LIGHT, PACED, SPARSE
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN

from ..tcp_support import fake_sockets, open_connection

__all__ = ["fake_sockets"]

BATCH = bytes(SPARSE)


class Upload:
    """An upload to a near host peer with much room, and a flow of requests and answers if it is `beside` one."""

    def __init__(self, *, beside: bool = True) -> None:
        self.talk = talk = open_connection()
        talk.sock.size = 1 << 22
        (self.conn,) = talk.tcp._conns.values()
        self.conn.near = True
        self.conn.rcv_rtt = 0.0001  # so it has seen that the link is short
        self.bulk = talk.key, talk.seq, talk.ack
        talk.key, talk.seq, talk.ack = talk.key[:-4] + b"\x9c\x41" + talk.key[-2:], 0, 0
        talk.syn()
        talk.expect(SYN | ACK, seq=0, ack=1)
        talk.guest(ACK)
        self.light: TcpConn = talk.tcp._conns[talk.key]
        self.light.near = True
        self.requests = talk.key, talk.seq, talk.ack
        self.bytes_come()
        talk.taken()
        if beside:
            self.request()

    def request(self) -> None:
        """A flow with an answer before it makes one."""
        talk = self.talk
        self.bulk = self.bulk[0], talk.seq if talk.key == self.bulk[0] else self.bulk[1], self.bulk[2]
        talk.key, talk.seq, talk.ack = self.requests
        self.light.pingpong = 1
        talk.guest(ACK | PSH, b"q")
        self.requests = talk.key, talk.seq, talk.ack
        talk.taken()

    def bytes_come(self, data: bytes = BATCH, flags: int = ACK) -> None:
        talk = self.talk
        if talk.key != self.bulk[0]:
            talk.key, talk.seq, talk.ack = self.bulk
        talk.guest(flags, data)

    def window(self) -> int:
        return self.conn.rcv_edge - self.conn.rcv_nxt


def test_without_messages_bulk_is_acknowledged_at_once() -> None:
    upload = Upload(beside=False)
    upload.bytes_come()
    upload.talk.expect(ACK, ack=1 + 2 * SPARSE)


def test_beside_a_message_bulk_is_acknowledged_later() -> None:
    upload = Upload()
    upload.bytes_come()
    upload.talk.expect_nothing()
    upload.talk.wait(HOLD * 0.9)
    upload.talk.expect_nothing()
    upload.talk.wait(HOLD * 0.2)
    upload.talk.expect(ACK, ack=1 + 2 * SPARSE)
    upload.talk.wait(0.1)
    upload.talk.expect_nothing()


def test_the_rest_of_an_answer_does_not_slow_the_answer_down() -> None:
    """A server in the guest answers a request by much, some of it in batches that its window has cut short."""
    upload = Upload(beside=False)
    upload.conn.pingpong = 1
    for _ in range(4):
        upload.bytes_come(BATCH[:4000])
        upload.bytes_come()
    assert upload.talk.tcp._out.turns.paced_until == 0.0
    assert upload.talk.taken()[-1].ack == 1 + 5 * SPARSE + 4 * 4000
    assert upload.window() > PACED_WINDOW
    upload.talk.wait(LIGHT * 1.1)
    upload.bytes_come(BATCH[:1])
    upload.talk.taken()
    upload.request()
    assert upload.talk.tcp._out.turns.paced_until == 0.0, "neither is beside bulk"
    upload.bytes_come()
    upload.talk.taken()
    upload.request()
    assert upload.talk.tcp._out.turns.paced_until > upload.talk.now, "this one is"


def test_all_that_comes_meanwhile_has_one_acknowledgement() -> None:
    upload = Upload()
    for _ in range(3):
        upload.bytes_come()
    upload.talk.wait(HOLD * 1.1)
    upload.talk.expect(ACK, ack=1 + 4 * SPARSE)
    upload.talk.expect_nothing()


def test_beside_a_message_the_window_is_small() -> None:
    """The larger one is used up first: an edge never moves back."""
    upload = Upload()
    edges = [upload.conn.rcv_edge]
    assert upload.window() > 4 * PACED_WINDOW
    while upload.window() > PACED_WINDOW and len(edges) < 100:
        upload.bytes_come(4 * BATCH)
        upload.talk.wait(HOLD * 1.1)
        edges.append(upload.conn.rcv_edge)
    for _ in range(20):
        upload.bytes_come()
        upload.talk.wait(HOLD * 1.1)
        edges.append(upload.conn.rcv_edge)
        assert PACED_WINDOW // 2 <= upload.window() <= PACED_WINDOW
    assert edges == sorted(edges)


def test_the_pace_is_forgotten() -> None:
    upload = Upload()
    upload.talk.wait(PACED * 0.9)
    upload.bytes_come()
    upload.talk.taken()
    upload.talk.wait(PACED * 0.2)
    upload.talk.taken()
    acked = upload.conn.rcv_nxt - upload.conn.irs
    upload.bytes_come()
    upload.talk.expect(ACK, ack=acked + SPARSE)


def test_a_message_without_bulk_changes_nothing() -> None:
    upload = Upload(beside=False)
    upload.talk.wait(LIGHT * 1.1)
    upload.request()
    upload.bytes_come()
    upload.talk.expect(ACK, ack=1 + 2 * SPARSE)


def test_what_the_guest_depends_on_is_acknowledged_at_once() -> None:
    upload = Upload()
    upload.bytes_come(flags=ACK | FIN)
    upload.talk.expect(ACK, ack=1 + 2 * SPARSE + 1)
    hole = Upload()
    hole.talk.key = hole.bulk[0]
    hole.talk.guest(ACK, BATCH, seq=hole.bulk[1] + 100)
    assert {segment.ack for segment in hole.talk.taken()} == {1 + SPARSE}


def test_data_for_the_guest_carries_it() -> None:
    upload = Upload()
    upload.bytes_come()
    upload.conn.rcv_acked = upload.conn.rcv_nxt  # as a look at the host peer has it
    upload.talk.tcp._out.ack(upload.conn)
    upload.talk.taken()
    upload.talk.wait(HOLD * 1.1)
    upload.talk.expect_nothing()


def test_a_window_that_is_used_up_opens() -> None:
    """Also if data for the guest has acknowledged all: it may be too small for its next segment."""
    upload = Upload()
    while upload.window() > PACED_WINDOW:
        upload.bytes_come(4 * BATCH)
        upload.talk.wait(HOLD * 1.1)
    while upload.window() >= upload.conn.rcv_wnd_low:
        upload.bytes_come()
    upload.conn.rcv_acked = upload.conn.rcv_nxt
    upload.talk.tcp._out.ack(upload.conn)
    upload.talk.taken()
    before = upload.window()
    upload.talk.wait(HOLD * 1.1)
    assert upload.window() > before and len(upload.talk.taken()) == 1


@pytest.mark.parametrize("ends", [True, False])
def test_a_connection_that_ends_meanwhile(ends: bool) -> None:
    upload = Upload()
    upload.bytes_come()
    if ends:
        upload.talk.guest(RST)
    upload.talk.taken()
    upload.talk.wait(HOLD * 1.1)
    assert len(upload.talk.taken()) == (not ends)
    assert not upload.talk.tcp._in._pace._held
