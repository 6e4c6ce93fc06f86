"""How TCP connections end, by either side, by both, by a reset or a fault."""

from __future__ import annotations

import errno

import pytest

from passt import addr
from passt.linux.tcpinfo import BYTES_ACKED, TCP_CLOSE
from passt.loop.reactor import EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, make_ref
from passt.loop.timers import NO_OWNER
from passt.tcp_engine.conn import FAILED_PROBES, SOCK_ACCEPTED
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN
from tests.unit.support import GUEST4, T0, link, reactor
from tests.unit.tcp_support import FakeSocket, Talk, accepted_connection, fake_sockets, open_connection
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
    talk.wait(0.02)
    talk.expect(ACK, ack=9)
    for i in range(3):
        talk.host(b"answer")
        talk.expect(ACK | PSH, b"answer", seq=1 + 6 * i)
        talk.guest(ACK)
    talk.host(end=True)
    talk.expect(FIN | ACK, b"", seq=19)
    talk.guest(ACK)
    assert talk.gone and talk.sock.incoming == b""
    talk.expect(RST, b"", seq=20)


@pytest.mark.parametrize("together", [False, True])
def test_a_guest_that_connected_and_ended_first_is_released_from_time_wait(together: bool) -> None:
    """RFC 9293, 3.10.7.4: it may connect from the same port at once."""
    talk = near()
    if together:
        talk.host(end=True)
        talk.taken()
        talk.guest(FIN | ACK, ack=1)
    else:
        talk.guest(FIN | ACK)
        talk.taken()
        talk.host(end=True)
    talk.taken()
    talk.guest(ACK, ack=2)
    talk.expect(RST, b"", seq=2)
    assert talk.gone and not talk.sock.resets_on_close
    talk.seq = talk.ack = 0
    talk.syn()
    talk.expect(SYN | ACK)


def test_a_guest_that_ended_last_has_no_time_wait() -> None:
    talk = near()
    talk.host(end=True)
    talk.taken()
    talk.guest(FIN | ACK, ack=2)
    talk.expect(ACK, ack=2)
    assert talk.gone


def test_a_guest_that_accepted_takes_syn_in_time_wait() -> None:
    talk = accepted_connection("127.0.0.1")
    talk.guest(FIN | ACK)
    talk.taken()
    talk.host(end=True)
    talk.expect(FIN | ACK)
    talk.guest(ACK, ack=2)
    talk.expect_nothing()
    assert talk.gone


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
    rto = talk.ctx.link.rto_min
    talk.wait(rto)
    talk.expect(FIN | ACK | PSH, b"abc", seq=1)
    talk.guest(ACK, ack=4)  # the data, not the FIN
    talk.wait(2 * rto)
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
    talk.sock.room, talk.sock.wmem = 100, 0
    talk.writable()
    assert talk.sock.shut and talk.sock.sent == b"abcdef"
    talk.expect(ACK, ack=8)


def test_repeated_fin_is_acknowledged_and_data_behind_it_ignored() -> None:
    talk = near()
    talk.guest(FIN | ACK)
    talk.expect_nothing()
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


def test_reset_where_the_last_acknowledgement_was() -> None:
    """The guest answers a challenge ACK there (RFC 9293, 3.10.7.4), although more of it has come."""
    talk = open_connection()
    talk.sock.info[BYTES_ACKED] = 1  # the host peer has SYN
    talk.guest(ACK | PSH, b"0123456789")
    talk.taken()
    talk.guest(RST, seq=5)
    talk.expect(ACK, ack=1)
    assert talk.ctx.drops["tcp reset out of window"] == 1
    talk.guest(RST, seq=1)
    assert talk.gone and talk.sock.resets_on_close


def test_reset_behind_data_of_the_same_batch() -> None:
    """The daemon was busy: RST does not overtake the data."""
    talk = near()
    talk.put(talk.segment(ACK, b"da"), talk.segment(ACK, b"ta"), talk.segment(RST | ACK))
    assert talk.gone and talk.sock.resets_on_close and talk.sock.sent == b"data" and not talk.sock.shut


def test_reset_behind_data_and_fin_of_the_same_batch() -> None:
    talk = near()
    talk.put(talk.segment(ACK, b"data"), talk.segment(FIN | ACK), talk.segment(RST | ACK))
    assert talk.gone and talk.sock.resets_on_close and talk.sock.sent == b"data" and talk.sock.shut
    assert not talk.ctx.drops


@pytest.mark.parametrize("how", ["full", "failed"])
def test_reset_behind_data_that_the_socket_does_not_take(how: str) -> None:
    talk = near()
    if how == "full":
        talk.sock.room = 0
    else:
        talk.sock.error = errno.ECONNRESET
    talk.put(talk.segment(ACK, b"data"), talk.segment(RST | ACK))
    assert talk.gone and talk.sock.resets_on_close and not talk.sock.sent


def test_reset_behind_data_that_follows_refused_data() -> None:
    """Or there would be a gap."""
    talk = near()
    talk.sock.room = 0
    talk.guest(ACK, b"refused")
    talk.sock.room = 100
    talk.put(talk.segment(ACK, b"more"), talk.segment(RST | ACK))
    assert not talk.sock.sent


# A reset of the host peer waits for the data before it ---------------------------------------------------------------


def reset_beyond_the_window() -> Talk:
    """The host peer has reset, and of 3000 bytes the guest takes 1000 at a time."""
    talk = open_connection()
    talk.guest(ACK, window=7)  # times 128
    talk.host(bytes(3000))
    assert len(talk.expect(ACK | PSH).payload) == 896
    talk.host(error=errno.ECONNRESET)
    talk.expect_nothing()
    return talk


def test_a_reset_waits_for_the_window() -> None:
    talk = reset_beyond_the_window()
    for size in (896, 896):
        talk.guest(ACK, window=7)
        assert len(talk.expect(ACK | PSH).payload) == size
    talk.guest(ACK, window=7)
    last, rst = talk.taken()
    assert (len(last.payload), rst.flags, rst.seq) == (312, RST | ACK, 3001)
    assert talk.gone and talk.ctx.flows.closed == {("tcp", "reset by peer"): 1} and not talk.tcp._table.failed


def test_a_reset_waits_for_segments_that_were_lost() -> None:
    """Behind a hole it would not count (RFC 5961, 3.2), and the guest would never get the data."""
    talk = open_connection(sack=True)
    talk.host(b"abc")
    talk.expect(ACK | PSH, b"abc")
    talk.wait(talk.ctx.link.rto_min)  # a probe
    talk.expect(ACK | PSH, b"abc", seq=1)
    talk.host(b"def", error=errno.ECONNRESET)
    talk.expect(ACK | PSH, b"def", seq=4)
    talk.guest(ACK, ack=7)
    talk.expect(RST | ACK, seq=7)
    assert talk.gone


def test_a_guest_that_never_opens_its_window_is_reset() -> None:
    talk = open_connection()
    talk.guest(ACK, window=0)
    talk.host(b"data", error=errno.ECONNRESET)
    for _ in range(FAILED_PROBES):
        talk.wait(0.05)
        while not (probe := talk.taken()):
            talk.wait(0.1)
        assert [s.flags for s in probe] == [ACK]
        talk.guest(ACK, window=0)
    talk.wait(20)
    talk.expect(RST | ACK, seq=1)
    assert talk.gone and talk.now - T0 < 60


def test_a_guest_that_sends_without_taking_the_rest_is_reset() -> None:
    """On the bare kernel a writer learns of RST at once."""
    talk = open_connection()
    talk.guest(ACK, window=0)
    talk.host(b"data", error=errno.ECONNRESET)
    talk.guest(ACK, b"upload", window=0)
    talk.expect_nothing()  # it may only be about to read
    talk.guest(ACK, b"more", seq=100, window=0)
    talk.expect_nothing()
    talk.wait(0.06)
    talk.taken()
    talk.guest(ACK, b"upload", seq=1, window=0)
    talk.expect(RST | ACK, seq=1)
    assert talk.gone and not talk.sock.sent


def test_events_of_a_socket_that_has_failed_are_no_end() -> None:
    """EPOLLRDHUP is reported with them, and is no FIN."""
    talk = reset_beyond_the_window()
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN | EPOLLRDHUP | EPOLLOUT | EPOLLHUP, talk.now)
    talk.expect_nothing()


def test_a_link_that_is_full_when_the_host_peer_resets() -> None:
    talk = open_connection()
    link(talk.ctx).full = True
    talk.host(b"data", error=errno.ECONNRESET)
    talk.expect_nothing()
    link(talk.ctx).full = False
    talk.tcp.resume(talk.now)
    data, rst = talk.taken()
    assert (data.payload, rst.flags) == (b"data", RST | ACK) and talk.gone


def test_a_reset_before_connect_was_reported_is_no_refusal() -> None:
    """RST in SYN-SENT is ECONNREFUSED; this peer was connected, and has said something."""
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    talk.host(b"greeting", error=errno.ECONNRESET)
    talk.expect(SYN | ACK)
    talk.guest(ACK, ack=1)
    data, rst = talk.taken()
    assert (data.payload, rst.flags, rst.seq) == (b"greeting", RST | ACK, 9) and talk.gone


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
    talk.ctx.neighbours.sender(b"\x02abcde")
    talk.ctx.neighbours.learn(GUEST4, b"\x02abcde")
    talk.host(b"x")
    assert link(talk.ctx).take()[0][:6] == b"\x02abcde"


def test_a_guest_that_is_gone_resets_all_host_peers() -> None:
    talk = near()
    for forget in talk.ctx.services.on_forget:
        forget()
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close
    assert talk.ctx.flows.closed == {("tcp", "guest gone"): 1}


@pytest.mark.parametrize("by_guest", [True, False])
def test_the_end_of_a_handshake_counts_for_its_own_side(by_guest: bool) -> None:
    """Of two connections that each side opens, the first one ends: one is left of that side, and two of the other."""
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    for port in (41000, 41001):
        talk.accept(f"198.51.100.{port - 41000 + 50}")
        talk.key = GUEST4 + addr.packed("198.51.100.7") + port.to_bytes(2, "big") + (80).to_bytes(2, "big")
        talk.syn()
    table = talk.tcp._table
    assert (table.opening, table.half_open) == (2, 2)
    first = next(c for c in table.by_key.values() if bool(c.events & SOCK_ACCEPTED) != by_guest)
    table.abort(first, "no answer of the guest")
    assert (table.opening, table.half_open) == ((1, 2) if by_guest else (2, 1))
    table.forget()
    assert (table.opening, table.half_open) == (0, 0)


def test_an_end_that_no_successor_waits_for() -> None:
    """A client waits for the end of one connection, and another one ends."""
    talk = accepted_connection()
    talk.guest(ACK | FIN)
    talk.host(b"last words", end=True)
    talk.sock.info[0] = TCP_CLOSE
    talk.accept("198.51.100.7")
    talk.accept("198.51.100.8")
    assert len(talk.tcp._table.successors) == 1
    talk.taken()
    talk.guest(RST | ACK, seq=0, ack=1)
    assert talk.ctx.flows.closed == {("tcp", "refused by guest"): 1}
    assert len(talk.tcp._table.successors) == 1, "it waits for the other one"


def test_a_host_peer_that_resets_during_the_handshake_is_heard_first() -> None:
    """Data before the guest's ACK of SYN,ACK would be data before the connection, and so would RST."""
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.sock.incoming += b"greeting"
    talk.host(error=errno.ECONNRESET)
    talk.expect_nothing()
    talk.guest(ACK, ack=1)
    data, rst = talk.taken()
    assert (data.payload, rst.flags, rst.seq) == (b"greeting", RST | ACK, 9)
    assert talk.gone and not talk.tcp._table.failed
