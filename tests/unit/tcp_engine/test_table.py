"""How TCP connections end, by either side, by both, by a reset or a fault."""

from __future__ import annotations

import errno

from passt.loop.reactor import EPOLLIN, make_ref
from passt.loop.timers import NO_OWNER
from passt.wire.tcp import ACK, FIN, PSH, RST
from tests.unit.support import link, reactor
from tests.unit.tcp_support import fake_sockets, open_connection
from tests.unit.test_tcp import near

__all__ = ["fake_sockets"]


def test_host_ends_first_and_data_still_flows_the_other_way() -> None:
    talk = near()
    talk.host(b"bye", end=True)
    talk.expect(FIN | ACK | PSH, b"bye", seq=1)
    talk.guest(ACK)
    for _ in range(3):
        talk.guest(ACK | PSH, b"still here")
        talk.expect(ACK, seq=5)
    assert talk.sock.sent == b"still here" * 3
    talk.guest(FIN | ACK)
    talk.expect(ACK, ack=32)
    assert talk.gone and talk.sock.incoming == b"" and not talk.sock.resets_on_close


def test_guest_ends_first_and_data_still_flows_the_other_way() -> None:
    talk = near()
    talk.guest(FIN | ACK, b"request")
    assert talk.sock.sent == b"request" and talk.sock.shut
    talk.expect(ACK, ack=9)
    for i in range(3):
        talk.host(b"answer")
        talk.expect(ACK | PSH, b"answer", seq=1 + 6 * i)
        talk.guest(ACK)
    talk.host(end=True)
    talk.expect(FIN | ACK, b"", seq=19)
    talk.guest(ACK)
    assert talk.gone and talk.sock.incoming == b""


def test_both_end_at_once() -> None:
    talk = near()
    talk.host(end=True)
    talk.expect(FIN | ACK)
    talk.guest(FIN | ACK, ack=1)
    talk.expect(ACK, ack=2)
    assert not talk.sock.closed
    talk.guest(ACK, ack=2)
    assert talk.gone


def test_fin_is_sent_again_and_only_after_all_data() -> None:
    talk = open_connection()
    talk.host(b"abc", end=True)
    talk.expect(FIN | ACK | PSH, b"abc")
    talk.wait(1.0)
    talk.expect(FIN | ACK | PSH, b"abc", seq=1)
    talk.guest(ACK, ack=4)  # the data, not the FIN
    talk.wait(1.0)
    talk.expect(FIN | ACK, b"", seq=4)


def test_fin_waits_for_the_window() -> None:
    talk = open_connection()
    talk.guest(ACK, window=16)
    talk.host(bytes(3000), end=True)
    assert not talk.expect(ACK | PSH).flags & FIN
    talk.guest(ACK, window=16)
    s = talk.expect(FIN | ACK | PSH)
    assert len(s.payload) == 952


def test_fin_of_the_guest_is_not_taken_before_its_data() -> None:
    talk = near()
    talk.sock.room, talk.sock.wmem = 3, talk.sock.sndbuf
    talk.guest(FIN | ACK, b"abcdef")
    assert not talk.sock.shut
    talk.expect(ACK, ack=4)
    talk.sock.room = 100
    talk.guest(FIN | ACK, b"def", seq=4)
    assert talk.sock.shut and talk.sock.sent == b"abcdef"
    talk.expect(ACK, ack=8)


def test_repeated_fin_is_acknowledged_and_data_behind_it_ignored() -> None:
    talk = near()
    talk.guest(FIN | ACK)
    talk.expect(ACK, ack=2)
    talk.guest(FIN | ACK, seq=1)
    talk.expect(ACK, ack=2)
    talk.guest(ACK, b"nonsense")
    talk.expect(ACK, ack=2)
    assert talk.sock.sent == b""


def test_reset_by_the_guest_resets_the_host_peer() -> None:
    talk = near()
    talk.guest(RST | ACK)
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close


def test_reset_out_of_the_window_is_ignored() -> None:
    talk = near()
    talk.guest(RST, seq=0x40000000)
    assert talk.ctx.drops["tcp reset out of window"] == 1 and not talk.sock.closed
    talk.guest(ACK, b"alive")
    talk.expect(ACK, ack=6)


def test_reset_in_the_window_is_asked_to_prove_itself() -> None:
    """RFC 5961, 3.2: a blind guess is not enough, and who means it knows the number from our answer."""
    talk = near()
    talk.guest(RST, seq=100)
    talk.expect(ACK, seq=1, ack=1)
    assert talk.ctx.drops["tcp reset out of window"] == 1 and not talk.sock.closed
    talk.guest(RST, seq=1)
    assert talk.gone and talk.sock.resets_on_close


def test_reset_behind_data_of_the_same_batch() -> None:
    talk = near()
    talk.put(talk.segment(ACK, b"data"), talk.segment(RST | ACK))
    assert talk.gone and talk.sock.resets_on_close


def test_reset_by_the_host_peer_comes_after_its_last_data() -> None:
    talk = open_connection()
    talk.sock.incoming += b"last words"
    talk.host(b"", end=True, error=errno.ECONNRESET)
    frames = talk.taken()
    assert frames[0].payload == b"last words" and frames[-1].flags == RST | ACK
    assert talk.gone


def test_late_event_of_a_closed_connection_is_harmless() -> None:
    talk = near()
    fd = talk.sock.fd
    talk.guest(RST | ACK)
    reactor(talk.ctx).handlers[2](make_ref(2, fd, 0), EPOLLIN, talk.now)
    talk.expect_nothing()


def test_a_fault_ends_one_flow() -> None:
    talk = near()
    talk.tcp.fault_key(talk.key)
    talk.expect(RST | ACK)
    assert talk.gone
    talk.tcp.fault_key(talk.key)  # gone already
    other = near()
    other.tcp.fault(make_ref(3, 1, NO_OWNER))  # a timer that waits for a connection
    assert not other.gone
    other.tcp.fault(make_ref(2, other.sock.fd, 0))
    assert other.gone


def test_guest_moves_to_another_mac() -> None:
    talk = near()
    talk.tcp._table.set_guest_mac(b"\x02abcde")
    talk.host(b"x")
    assert link(talk.ctx).take()[0][:6] == b"\x02abcde"
