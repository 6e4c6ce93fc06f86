"""Borders and counts of handshakes (`opening.py`), which conversations leave open."""

from __future__ import annotations

import errno
import hashlib
import os
from typing import Any

import pytest

from passt import addr, log
from passt.linux.tcpinfo import TCP_CLOSE
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import WINDOW_DEFAULT, TcpConn
from passt.wire import tcp
from passt.wire.tcp import ACK, FIN, HEADER, PSH, RST, SYN, SynOptions
from tests.unit.support import GUEST4, GUEST6, reactor
from tests.unit.tcp_support import GUEST_ISN, PEER_PORT, FakeSocket, Talk, accepted_socket, fake_sockets, listener

__all__ = ["fake_sockets"]

PEER4 = addr.packed("198.51.100.7")
BAD_OPTION = b"\x02\x09\x05\xb4"  # an MSS that is longer than the header


def conn_of(talk: Talk) -> TcpConn:
    (conn,) = talk.tcp._conns.values()
    return conn


def syn(talk: Talk, options: bytes = b"", seq: int = GUEST_ISN, window: int = 64240) -> None:
    talk.put((SYN, seq, 0, b"", window, options))


def asked() -> Talk:
    """SYN went to the guest for a host client."""
    talk = Talk()
    talk.accept("198.51.100.7")
    talk.expect(SYN)
    return talk


# Counts --------------------------------------------------------------------------------------------------------------


def test_segments_for_tcp_that_is_off_are_counted_one_by_one() -> None:
    talk = Talk(config={"no_tcp": True})
    for n in (1, 2):
        talk.put(*[(SYN, GUEST_ISN, 0, b"", 1000, b"")] * 3)
        assert talk.ctx.drops == {"tcp disabled": 3 * n} and type(talk.ctx.drops["tcp disabled"]) is int
    talk.expect_nothing()


def test_bad_headers_are_counted_and_those_behind_them_are_heard() -> None:
    talk = Talk()
    for n in (1, 2):
        buf = talk.ctx.pool.buf
        good = HEADER.pack(40000, 80, GUEST_ISN, 0, 5 << 12 | SYN, 1000, 0, 0)
        for at, words in ((64, 4), (84, 6), (104, 5)):
            buf[at : at + 20] = HEADER.pack(40000, 80, GUEST_ISN, 0, words << 12 | SYN, 1000, 0, 0)
        buf[104:124] = good
        talk.tcp.tap_handler(talk.key, [64, 84, 84, 104, 104, 124], talk.now)
        assert talk.ctx.drops == {"tcp header length": 2 * n}
        talk.expect(SYN | ACK)
        talk.tcp._table.forget()


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (GUEST4 + PEER4 + b"\0\0\0\x50", "tcp endpoint"),
        (GUEST4 + PEER4 + b"\x9c\x40\0\0", "tcp endpoint"),
        (GUEST4 + addr.packed("224.0.0.1") + b"\x9c\x40\0\x50", "tcp endpoint"),
        (addr.packed("127.0.0.1") + PEER4 + b"\x9c\x40\0\x50", "tcp endpoint"),
        (GUEST6 + addr.packed("ff02::1") + b"\x9c\x40\0\x50", "tcp endpoint"),
    ],
)
def test_ends_that_cannot_be_connected_are_counted(key: bytes, reason: str) -> None:
    talk = Talk()
    talk.key = key
    for n in (1, 2):
        syn(talk)
        assert talk.ctx.drops == {reason: n}
    talk.expect_nothing()


@pytest.mark.parametrize("accepted", [False, True])
def test_bad_options_are_counted_and_leave_nothing(accepted: bool) -> None:
    talk = asked() if accepted else Talk()
    for n in (1, 2):
        if accepted:
            talk.answer(options=BAD_OPTION)
        else:
            syn(talk, BAD_OPTION)
        assert talk.ctx.drops == {"tcp option length": n}
        talk.expect_nothing()
    if accepted:
        talk.answer()
        talk.expect(ACK)


def test_resets_that_do_not_answer_our_syn_are_counted() -> None:
    talk = asked()
    for n in (1, 2):
        talk.put((RST | ACK, 0, talk.isn + 2, b"", 0, b""))
        talk.put((RST, 0, 0, b"", 0, b""))
        assert talk.ctx.drops == {"tcp reset out of window": 2 * n}
    talk.answer()
    talk.expect(ACK)


def test_refused_connections_are_counted() -> None:
    talk = Talk()
    talk.ctx.flows.limit = 0
    for n in (1, 2):
        syn(talk)
        talk.expect(RST | ACK, seq=0, ack=1)
        assert talk.ctx.drops == {"flow table full": n}


def test_connections_without_a_descriptor_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()
    monkeypatch.setattr(log, "warn_ratelimited", lambda *_: None)

    def fail(*_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tcp_sock, "new_socket", fail)
    for n in (1, 2):
        syn(talk)
        talk.expect(RST | ACK, ack=1)
        assert talk.ctx.drops == {"tcp socket": n}
        assert talk.ctx.flows.closed == {("tcp", "no socket"): n}
        assert talk.tcp._table.opening == 0


def test_clients_that_cannot_be_served_are_counted() -> None:
    talk = Talk(config={"ip4": None})
    for n in (1, 2):
        sock = accepted_socket(PEER4)
        talk.tcp.opening.accepted(listener(), sock, PEER4, PEER_PORT, talk.now)
        assert talk.ctx.drops == {"tcp inbound: no address": n}
        talk.end_turn()
        assert sock.closed and not reactor(talk.ctx).refs


@pytest.mark.parametrize("accepted", [False, True])
def test_each_repeated_handshake_segment_is_counted(accepted: bool) -> None:
    """`pesto --flows` shows it."""
    talk = asked() if accepted else Talk()
    if not accepted:
        syn(talk)
    conn = conn_of(talk)
    for n in (1, 2, 3):
        talk.wait(conn.rto)
        assert conn.resent == n
    assert len(talk.taken()) == 3 + (not accepted)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_initial_sequence_numbers_are_those_of_rfc_6528(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = bytes(range(16))
    monkeypatch.setattr(os, "urandom", lambda n: secret[:n])
    talk = Talk()
    opening = talk.tcp.opening
    h = int(hashlib.blake2s(talk.key, key=secret, digest_size=4).hexdigest(), 16)
    for now in (0.0, 100.0, 20_000.0):  # 4 us
        assert opening.isn(talk.key, now) == (h + int(now * 250_000)) & 0xFFFFFFFF
    opening._replaced = 3
    assert opening.isn(talk.key, 0.0) == (h + 3) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("flags", "payload", "length"), [(SYN | FIN, b"", 2), (FIN, b"abc", 4), (PSH, b"abc", 3), (0, b"", 0)]
)
def test_a_reset_acknowledges_everything_in_a_stray_segment(flags: int, payload: bytes, length: int) -> None:
    """RFC 9293, 3.10.7.1: SYN and FIN count as a byte each."""
    talk = Talk()
    if flags & SYN:
        talk.tcp._table.forget()
        talk.ctx.flows.limit = 0
        length = 1  # SYN is refused as such
    talk.put((flags, GUEST_ISN, 0, payload, 1000, b""))
    talk.expect(RST | ACK, seq=0, ack=length)


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("accepted", [False, True])
def test_the_mss_of_a_guest_that_tells_none(v6: bool, accepted: bool) -> None:
    """RFC 9293, 3.7.1; and a small one is raised to what a frame is worth."""
    default = tcp.MSS_DEFAULT6 if v6 else tcp.MSS_DEFAULT
    for mss, expected in ((None, default), (1, tcp.MSS_MIN), (tcp.MSS_MIN + 1, tcp.MSS_MIN + 1)):
        options = SynOptions(mss, None).emit() if mss is not None else b""
        talk = Talk(v6=v6)
        if accepted:
            talk.accept("2001:db8:ffff::7" if v6 else "198.51.100.7")
            talk.expect(SYN)
            talk.answer(options=options)
        else:
            syn(talk, options)
        assert conn_of(talk).mss == expected


@pytest.mark.parametrize("accepted", [False, True])
def test_windows_before_and_after_the_handshake(accepted: bool) -> None:
    """The window of a segment with SYN is not scaled (RFC 7323, 2.2), that of any other one is."""
    talk = asked() if accepted else Talk()
    if accepted:
        talk.answer(ws=3)
        talk.expect(ACK)
        expected = 64240
    else:
        syn(talk, SynOptions(1460, 3).emit(), window=100)
        talk.expect(SYN | ACK)
        assert conn_of(talk).snd_wnd == 100
        talk.seq = 1
        talk.guest(ACK, window=500)
        expected = 500 << 3
    conn = conn_of(talk)
    assert conn.snd_wnd == conn.snd_wnd_max == expected
    assert (conn.snd_una, conn.snd_nxt, conn.base) == (conn.iss + 1, conn.iss + 1, conn.iss + 1)
    assert conn.t_rx == talk.now and conn.retries == 0


def test_the_ports_and_host_of_a_client() -> None:
    talk = Talk()
    talk.accept("198.51.100.7", to=81)
    talk.expect(SYN)
    conn = conn_of(talk)
    assert conn.host == (PEER4, PEER_PORT)
    assert conn.key[-4:] == (81).to_bytes(2, "big") + PEER_PORT.to_bytes(2, "big")


def test_an_unreachable_host_is_told_and_a_silent_one_is_not() -> None:
    for error, flags in ((errno.ECONNREFUSED, True), (errno.ECONNRESET, True), (errno.ETIMEDOUT, None)):
        FakeSocket.connect_results = [error]
        talk = Talk()
        syn(talk)
        if flags:
            talk.expect(RST | ACK, ack=1)
        else:
            talk.expect_nothing()
        assert talk.gone


@pytest.mark.parametrize("ws", [None, 0, 7])
def test_a_repeated_syn_ack_is_the_same(ws: int | None) -> None:
    """It offers a window scale if the guest has (RFC 7323, 2.2)."""
    talk = Talk()
    syn(talk, SynOptions(1460, ws).emit())
    first = talk.expect(SYN | ACK)
    assert (first.options.ws is None) is (ws is None)
    talk.wait(conn_of(talk).rto)
    assert talk.expect(SYN | ACK) == first
    syn(talk, SynOptions(1460, ws).emit())
    assert talk.expect(SYN | ACK) == first


def test_a_connection_that_gives_way_has_its_reason() -> None:
    talk = asked()
    talk.sock.info[0] = TCP_CLOSE  # its client is gone, and comes back from the same port
    talk.accept("198.51.100.7")
    assert talk.ctx.flows.closed == {("tcp", "replaced"): 1}
    talk = Talk()
    syn(talk)
    syn(talk, seq=GUEST_ISN + 5000)
    assert talk.ctx.flows.closed == {("tcp", "replaced"): 1} and talk.ctx.flows.count == 1


def test_the_window_after_a_clients_handshake_is_that_of_our_syn() -> None:
    talk = asked()
    talk.answer()
    conn = conn_of(talk)
    assert (conn.rcv_wnd_max, conn.rcv_wnd_low) == (WINDOW_DEFAULT, WINDOW_DEFAULT // 2)
    assert conn.rcv_edge - conn.rcv_nxt == WINDOW_DEFAULT and isinstance(conn.rcv_wnd_low, int)


def test_an_acknowledgement_of_something_else_repeats_syn_once() -> None:
    """RST removes the old connection that was in the way; each further one is answered by RST alone."""
    talk = asked()
    conn = conn_of(talk)
    for n in range(2):
        talk.put((ACK, GUEST_ISN, talk.isn + 77, b"", 1000, b""))
        assert [s.flags for s in talk.taken()] == ([RST, SYN] if not n else [RST])
        assert conn.retries == conn.resent == 1
    assert conn.deadline == talk.now + conn.rto


def test_each_successor_of_one_turn_has_its_own_number() -> None:
    talk = asked()
    numbers = [talk.isn]
    for _ in range(3):
        talk.sock.info[0] = TCP_CLOSE
        talk.accept("198.51.100.7")
        talk.taken()
        numbers.append(talk.isn)
    assert len(set(numbers)) == 4


def test_clients_without_a_descriptor_are_counted_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()
    monkeypatch.setattr(log, "warn_ratelimited", lambda *_: None)

    def fail(*_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(reactor(talk.ctx), "watch", fail)
    for n in (1, 2):
        talk.accept("198.51.100.7")
        talk.expect_nothing()
        assert talk.ctx.drops == {"tcp inbound: no descriptor": n}
        assert talk.ctx.flows.closed == {("tcp", "no descriptor"): n}
        assert talk.tcp._table.half_open == 0


def test_a_window_that_is_small_from_the_beginning_is_computed_again_soon() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    syn(talk, SynOptions(1460, 7).emit())
    talk.sock.sndbuf, talk.sock.wmem = 400, 100
    talk.writable()
    talk.expect(SYN | ACK)
    assert talk.now < conn_of(talk).delack_at < talk.now + 0.1


def test_a_resolver_that_is_connected_has_answered_by_now() -> None:
    forwarded = addr.packed("169.254.1.1")
    talk = Talk(peer=forwarded, config={"dns_match": (forwarded,), "dns_hosts": (PEER4,)})
    talk.key = talk.key[:-2] + (53).to_bytes(2, "big")
    (resolver,) = talk.ctx.resolvers.hosts
    resolver.held = talk.now + 1
    syn(talk)
    assert (resolver.heard, resolver.held) == (talk.now, 0)
