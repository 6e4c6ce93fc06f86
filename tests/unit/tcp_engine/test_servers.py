"""Experience with connections of the guest to a server (`window.py`): first windows, first requests."""

from __future__ import annotations

import pytest

from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.window import FIRST_KEPT, HABIT, SERVERS_MAX, VAIN
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN
from tests.unit.support import GATEWAY4
from tests.unit.tcp_support import FakeSocket, Segment, Talk, fake_sockets

__all__ = ["fake_sockets"]


class Guest(Talk):
    """A guest that connects to one server again and again, from one port after the other."""

    def connect(self, *, peer: bytes | None = None, ws: int | None = 7) -> Segment:
        port = int.from_bytes(self.key[8:10], "big") + 1
        self.key = self.key[:4] + (peer or self.key[4:8]) + port.to_bytes(2, "big") + self.key[10:]
        self.seq = self.ack = 0
        self.syn(ws=ws)
        answer = self.expect(SYN | ACK, seq=0, ack=1)
        self.guest(ACK)
        self.expect_nothing()
        return answer

    def request(self) -> list[Segment]:
        self.guest(ACK | PSH, b"q")
        return self.taken()

    def respond(self) -> None:
        """The host peer answers, and ends the connection."""
        self.host(b"a", end=True)
        self.expect(FIN | ACK | PSH, b"a", ack=2)
        self.guest(FIN | ACK)
        self.expect(ACK, ack=3)
        assert self.gone


def guest() -> Guest:
    return Guest(peer=GATEWAY4)


# The first window ----------------------------------------------------------------------------------------------------


def buffers(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Sockets have send buffers of this size from now on."""

    def make(family: int, kind: int) -> FakeSocket:
        sock = FakeSocket(family, kind)
        sock.sndbuf = size
        return sock

    monkeypatch.setattr(tcp_sock, "new_socket", make)


def test_the_first_window_is_that_of_the_connection_before(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = guest()
    buffers(monkeypatch, 40_000)
    assert talk.connect().window == 30_000 and talk.sock.looks == 1
    buffers(monkeypatch, 60_000)
    talk.now += FIRST_KEPT / 2
    assert talk.connect().window == 30_000 and talk.sock.looks == 0
    talk.now += FIRST_KEPT / 2
    assert talk.connect().window == 45_000 and talk.sock.looks == 1


@pytest.mark.parametrize("ws", [7, None])
def test_what_follows_from_a_window_is_the_same(ws: int | None) -> None:
    talk = guest()
    records = []
    for _ in range(2):
        talk.connect(ws=ws)
        conn = talk.tcp._conns[talk.key]
        records.append((conn.rcv_edge, conn.rcv_wnd_max, conn.rcv_wnd_low, conn.rcv_mark, conn.rcv_grown))
    assert records[0] == records[1]


def test_another_server_has_a_window_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = guest()
    buffers(monkeypatch, 40_000)
    talk.connect()
    buffers(monkeypatch, 60_000)
    assert talk.connect(peer=b"\xc6\x33\x64\x07").window == 45_000


def test_servers_are_few() -> None:
    talk = guest()
    for i in range(SERVERS_MAX + 2):
        talk.connect(peer=bytes((198, 51, 100 + (i >> 8), i & 0xFF)))
        assert len(talk.tcp._acks._servers) <= SERVERS_MAX


# The first request ---------------------------------------------------------------------------------------------------


def used_to(talk: Guest) -> None:
    """Requests to this server are answered in time."""
    for _ in range(HABIT):
        talk.connect()
        assert [s.ack for s in talk.request()] == [2]
        talk.respond()


def test_the_acknowledgement_of_a_first_request_rides_where_answers_come_in_time() -> None:
    talk = guest()
    used_to(talk)
    for _ in range(20):
        talk.connect()
        assert talk.request() == []
        talk.respond()
    talk.wait(1.0)
    talk.expect_nothing()


def test_a_long_request_is_acknowledged_as_it_comes() -> None:
    """RFC 9293, 3.8.6.3: at least every second full-sized segment. Its guest may have no more of it in flight."""
    talk = guest()
    used_to(talk)
    talk.connect()
    for end, acknowledged in ((1461, []), (2921, [2921]), (4381, []), (4400, []), (5860, [5860])):
        talk.guest(ACK | PSH, bytes(end - talk.seq))
        assert [s.ack for s in talk.taken()] == acknowledged


def test_a_wait_in_vain_ends_the_habit_of_all_to_this_server() -> None:
    """A guest that waits for an acknowledgement before it goes on waits once."""
    talk = guest()
    used_to(talk)
    talk.connect()
    assert talk.request() == []
    talk.wait(0.02)
    talk.expect(ACK, ack=2)
    talk.guest(ACK | PSH, b"rest")
    talk.expect(ACK, ack=6)
    talk.host(b"a", end=True)
    talk.guest(RST | ACK)
    talk.taken()
    for _ in range(2 * HABIT):
        talk.connect()
        assert [s.ack for s in talk.request()] == [2]
        talk.respond()
    talk.now += VAIN
    used_to(talk)
    talk.connect()
    assert talk.request() == []


@pytest.mark.parametrize("later", [0.015, 1.0])
def test_an_answer_that_is_late_leaves_the_habit(later: float) -> None:
    """The guest has not waited for the acknowledgement, or it would have gone on."""
    talk = guest()
    used_to(talk)
    for _ in range(2):
        talk.connect()
        assert talk.request() == []
        talk.wait(later)
        talk.expect(ACK, ack=2)
        talk.host(b"a")
        talk.expect(ACK | PSH, b"a", ack=2)
        talk.guest(ACK | PSH, b"next")
        talk.taken()
        talk.host(b"a")
        talk.taken()
        talk.guest(RST | ACK)


def test_another_server_is_another_one() -> None:
    talk = guest()
    used_to(talk)
    talk.connect(peer=b"\xc6\x33\x64\x07")
    assert talk.tcp._conns[talk.key].pingpong == 0
