"""A host peer that has become silent: the guest's own timeout ends the connection."""

from __future__ import annotations

import errno

import pytest

from passt.linux.tcpinfo import BYTES_ACKED
from passt.tcp_engine import timed_out
from passt.tcp_engine.conn import ESTABLISHED, TAP_SYN_RCVD, TcpConn
from passt.tcp_engine.timed_out import SILENCE
from passt.wire import icmp
from passt.wire.checksum import PROTO_ICMP, PROTO_TCP
from passt.wire.tcp import ACK, PSH, RST, SYN
from tests.unit.support import T0, link
from tests.unit.tcp_support import GUEST_ISN, MASK, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]


def unacknowledged(*, v6: bool = False) -> Talk:
    """Data of the guest that the host peer has not acknowledged."""
    talk = open_connection(v6=v6)
    talk.sock.info[BYTES_ACKED] = 1
    talk.guest(ACK | PSH, b"lost")
    talk.taken()
    return talk


def test_a_guest_that_waits_is_not_reset() -> None:
    talk = unacknowledged()
    talk.host(error=errno.ETIMEDOUT)
    talk.expect_nothing()
    assert talk.gone and talk.ctx.flows.closed == {("tcp", "timed out"): 1}
    for n in (1, 2):
        talk.guest(ACK | PSH, b"lost", seq=1)
        talk.expect_nothing()
        assert talk.ctx.drops == {"tcp: connection has timed out": n}


def test_what_the_peer_sent_before_comes_first() -> None:
    talk = unacknowledged()
    talk.host(b"before", error=errno.ETIMEDOUT)
    talk.expect(ACK | PSH, b"before")
    assert talk.gone


def test_the_silence_ends() -> None:
    talk = unacknowledged()
    talk.host(error=errno.ETIMEDOUT)
    talk.now += SILENCE
    talk.guest(ACK | PSH, b"lost", seq=1)
    talk.expect(RST)
    assert not talk.tcp._table.timed_out._until


def test_the_guest_may_connect_again() -> None:
    talk = unacknowledged()
    talk.host(error=errno.ETIMEDOUT)
    talk.seq = talk.ack = 0
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(RST | ACK)
    talk.guest(ACK, b"stray")
    talk.expect(RST)


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETUNREACH])
def test_the_reason_of_a_router_is_told(v6: bool, number: int) -> None:
    """The error quotes the guest's oldest segment, or its kernel would not believe it (RFC 5927, 4.1)."""
    talk = unacknowledged(v6=v6)
    talk.host(error=number)
    frame = link(talk.ctx).take_one()
    message = frame[14 + (40 if v6 else 20) :]
    net = number == errno.ENETUNREACH
    assert frame[20 if v6 else 23] == (58 if v6 else PROTO_ICMP)
    if v6:
        assert tuple(message[:2]) == (icmp.UNREACHABLE6, icmp.UNREACHABLE6_ROUTE if net else icmp.UNREACHABLE6_ADDRESS)
    else:
        assert tuple(message[:2]) == (icmp.UNREACHABLE, icmp.UNREACHABLE_NET if net else icmp.UNREACHABLE_HOST)
    quoted = message[8:]
    l4 = 40 if v6 else 20
    assert quoted[6 if v6 else 9] == PROTO_TCP
    assert int.from_bytes(quoted[l4 + 4 : l4 + 8], "big") == GUEST_ISN + 1 & MASK and len(quoted) == l4 + 20
    talk.guest(ACK | PSH, b"lost", seq=1)
    talk.expect_nothing()


def test_a_guest_that_waits_for_nothing_is_reset() -> None:
    """It would never know."""
    talk = open_connection()
    talk.host(error=errno.ETIMEDOUT)
    talk.expect(RST | ACK)
    assert talk.gone and not talk.tcp._table.timed_out._until


def test_a_guest_that_probes_finds_out_by_itself() -> None:
    talk = open_connection()
    (conn,) = talk.tcp._conns.values()
    conn.keepalive = True
    talk.host(error=errno.ETIMEDOUT)
    talk.expect_nothing()
    assert talk.gone
    talk.guest(ACK, seq=0)
    talk.expect_nothing()


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED])
def test_a_reset_is_no_timeout(number: int) -> None:
    talk = unacknowledged()
    talk.host(error=number)
    assert talk.taken()[-1].flags == RST | ACK


def test_the_number_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_out, "SILENT_MAX", 2)
    talk = unacknowledged()
    silent = talk.tcp._table.timed_out
    keys = [b"1", b"2", talk.key]
    silent._until = dict.fromkeys(keys[:2], talk.now + 1)
    talk.host(error=errno.ETIMEDOUT)
    assert list(silent._until) == keys[1:]


def test_a_guest_that_is_gone_is_forgotten() -> None:
    talk = unacknowledged()
    talk.host(error=errno.ETIMEDOUT)
    for forget in talk.ctx.services.on_forget:
        forget()
    talk.guest(ACK | PSH, b"lost", seq=1)
    talk.expect(RST)


def test_one_that_is_silent_again_is_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_out, "SILENT_MAX", 2)
    silent = unacknowledged().tcp._table.timed_out
    conns = [TcpConn(bytes([i]) * 12) for i in range(3)]
    for conn in conns:
        conn.events, conn.keepalive = ESTABLISHED, True
    for i in (0, 1, 0):
        assert silent.takes(conns[i], errno.ETIMEDOUT, T0)
    assert list(silent._until) == [conns[1].key, conns[0].key], "and takes the place of no other"
    assert silent.takes(conns[2], errno.ETIMEDOUT, T0)
    assert list(silent._until) == [conns[0].key, conns[2].key]
    silent.forget(conns[1].key)  # it was not there
    assert len(silent._until) == 2


def test_a_connection_that_is_being_opened_is_not_silent() -> None:
    silent = unacknowledged().tcp._table.timed_out
    conn = TcpConn(bytes(12))
    conn.events, conn.keepalive = TAP_SYN_RCVD, True
    assert not silent.takes(conn, errno.ETIMEDOUT, T0) and not silent._until
