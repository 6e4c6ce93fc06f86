"""Round trips of the link and timeouts: RFC 6298, and the probe of RFC 8985."""

from __future__ import annotations

import pytest

from passt.tcp_engine import rtt
from passt.tcp_engine.conn import RTO_MAX, TcpConn
from passt.tcp_engine.rtt import LOCAL, PTO_DELAYED_ACK, PTO_MIN, needless_probe, sample
from passt.wire.tcp import ACK, PSH, RST, SYN

from ..tcp_support import Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._conns.values()
    return conn


def test_the_first_measurement() -> None:
    """RFC 6298, 2.2: SRTT is R, RTTVAR R/2, RTO is SRTT + 4 RTTVAR."""
    conn = TcpConn(bytes(12))
    sample(conn, 0.1, 0.01)
    assert (conn.srtt, conn.rttvar, conn.rto) == pytest.approx((0.1, 0.05, 0.3))
    assert conn.pto == pytest.approx(0.2)


def test_later_measurements() -> None:
    """RFC 6298, 2.3: RTTVAR first, by the SRTT before; alpha is 1/8, beta 1/4."""
    conn = TcpConn(bytes(12))
    sample(conn, 0.1, 0.01)
    sample(conn, 0.2, 0.01)
    assert conn.rttvar == pytest.approx(0.75 * 0.05 + 0.25 * 0.1)
    assert conn.srtt == pytest.approx(0.875 * 0.1 + 0.125 * 0.2)
    assert conn.rto == pytest.approx(conn.srtt + 4 * conn.rttvar)
    assert conn.min_rtt == 0.1


def test_limits() -> None:
    conn = TcpConn(bytes(12))
    sample(conn, 0.0001, 0.05)
    assert (conn.rto, conn.pto) == (0.05, PTO_MIN)
    conn = TcpConn(bytes(12))
    sample(conn, 100.0, 0.05)
    assert conn.rto == RTO_MAX


@pytest.mark.parametrize("samples", [(0.0,), (1e-5, 9e-4), (LOCAL,), (LOCAL, LOCAL), (0.0, 2e-3), (LOCAL, 0.05, 1e-4)])
@pytest.mark.parametrize("sack", [False, True])
@pytest.mark.parametrize("rto_min", [0.01, 0.05])
def test_estimates_of_a_local_link_need_no_computation(
    samples: tuple[float, ...], sack: bool, rto_min: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for local in (LOCAL, -1.0):
        monkeypatch.setattr(rtt, "LOCAL", local)
        conn = TcpConn(bytes(12))
        conn.sack = sack
        for one in samples:
            sample(conn, one, rto_min)
        results.append((max(conn.srtt, LOCAL), max(conn.rttvar, LOCAL / 2), conn.rto, conn.pto))
    assert results[0] == results[1]


def test_without_sack_there_is_no_probe() -> None:
    """RFC 8985, 7.1."""
    conn = TcpConn(bytes(12))
    conn.sack = False
    sample(conn, 0.0001, 0.05)
    assert conn.pto == conn.rto == 0.05


def test_a_needless_probe_makes_the_next_one_wait() -> None:
    conn = TcpConn(bytes(12))
    sample(conn, 0.0001, 0.01)
    needless_probe(conn, 0.0002)
    assert conn.pto == PTO_DELAYED_ACK < 0.05 and conn.delays_acks
    conn.sack = True
    sample(conn, 0.0001, 0.01)
    assert conn.pto == PTO_DELAYED_ACK, "whatever is measured"
    needless_probe(conn, 0.2)
    assert conn.pto == pytest.approx(0.4)


def test_the_handshake_is_measured() -> None:
    talk = Talk()
    talk.syn(sack=True)
    talk.expect(SYN | ACK)
    talk.wait(0.008)
    talk.guest(ACK)
    assert conn_of(talk).srtt == pytest.approx(0.008)


def test_a_handshake_that_was_repeated_is_measured_from_its_last_segment() -> None:
    """One loss does not make the next one wait for longer."""
    talk = Talk()
    talk.syn(sack=True)
    talk.wait(3 * talk.ctx.link.rto_min + 0.004)
    assert len(talk.taken()) == 3
    talk.guest(ACK, ack=1)
    assert conn_of(talk).srtt == pytest.approx(0.004)


def test_the_next_handshake_waits_as_the_link_needs() -> None:
    """RFC 9040: round trips are shared by all connections of a link."""
    talk = Talk()
    answers = []
    for _ in range(40):
        talk.syn(sack=True)
        talk.wait(0.1)
        answers.append(len(talk.taken()))
        talk.guest(ACK, ack=1)
        talk.guest(RST, seq=1)
        assert not talk.tcp._conns
    assert answers[0] > 1 and answers[-1] == 1


@pytest.mark.parametrize("sack", [True, False])
def test_data_is_measured_once_in_a_flight(sack: bool) -> None:
    talk = open_connection(sack=sack)
    for wait in (0.008, 0.004):
        talk.host(b"x" * 10)
        talk.host(b"y" * 10)
        talk.taken()
        talk.wait(wait)
        talk.guest(ACK, ack=1 + len(talk.sock.incoming))
        talk.now += 0.001
        talk.guest(ACK, ack=1 + len(talk.sock.incoming))
    conn = conn_of(talk)
    assert conn.srtt == pytest.approx(0.008 * 0.875 + 0.004 * 0.125)


@pytest.mark.parametrize("sack", [True, False])
def test_what_was_sent_again_is_not_measured(sack: bool) -> None:
    """RFC 6298, 3 (Karn)."""
    talk = open_connection(sack=sack)
    talk.host(b"x" * 10)
    talk.wait(1.0)
    talk.taken()
    talk.guest(ACK, ack=11)
    assert conn_of(talk).srtt == 0.0


def test_a_doubled_timeout_stays_until_the_next_measurement() -> None:
    """RFC 6298, 5: after a retransmission the doubled value holds, until an acknowledgement at the first attempt."""
    talk = open_connection()
    rto = talk.ctx.link.rto_min
    talk.host(b"x" * 10)
    talk.taken()
    talk.until(talk.now + rto)
    talk.expect(ACK | PSH, b"x" * 10)
    talk.guest(ACK, ack=11)
    talk.wait(0.002)
    talk.host(b"y")
    talk.expect(ACK | PSH, b"y")
    talk.until(talk.now + 2 * rto)
    talk.expect(ACK | PSH, b"y")
    assert conn_of(talk).rto == 4 * rto
    talk.guest(ACK, ack=12)
    talk.host(b"z")
    talk.expect(ACK | PSH, b"z")
    talk.wait(0.002)
    talk.guest(ACK, ack=13)
    assert conn_of(talk).rto == rto


def test_a_sack_is_a_measurement() -> None:
    talk = open_connection(sack=True)
    talk.host(b"x" * 3000)
    talk.taken()
    talk.wait(0.004)
    talk.guest(ACK, ack=1, sack=[(1461, 3001)])
    assert conn_of(talk).srtt == pytest.approx(0.004)
