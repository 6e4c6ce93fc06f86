"""Keep-alive probes of the guest are answered by its peer; window probes and retransmissions are answered by us."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from passt import addr
from passt.flow.context import Context
from passt.linux.tcpinfo import BYTES_ACKED, LAST_ACK_RECV, LAST_DATA_RECV
from passt.tcp_engine import keepalive
from passt.tcp_engine.keepalive import COALESCE, COUNT, INTERVAL, LOOK_FIRST, LOOK_MAX, LOOKS_TOTAL
from passt.wire.tcp import ACK, FIN, PSH, RST
from tests.unit.support import T0, stage_faults, timers
from tests.unit.tcp_support import Talk, accepted_connection, fake_sockets, open_connection

__all__ = ["fake_sockets"]

KEEPALIVE = socket.SOL_SOCKET, socket.SO_KEEPALIVE
KEEPIDLE = socket.IPPROTO_TCP, socket.TCP_KEEPIDLE


def heard(talk: Talk, ago: float, data: float | None = None) -> None:
    """The host socket received its last acknowledgement so many seconds ago, and data."""
    talk.sock.info[LAST_ACK_RECV] = int(ago * 1000)
    talk.sock.info[LAST_DATA_RECV] = int((ago if data is None else data) * 1000)


def idle(seconds: float = 45, *, accepted: bool = False, v6: bool = False) -> Talk:
    """A connection on which the guest has sent 4 bytes, and then nothing for so long."""
    if accepted:
        talk = accepted_connection("2001:db8:ffff::9" if v6 else "198.51.100.7", v6=v6)
    else:
        talk = open_connection(v6=v6)
    talk.guest(ACK | PSH, b"data")
    talk.wait(0.1)
    talk.taken()
    talk.now += seconds - 0.1
    heard(talk, seconds)
    return talk


def asked(talk: Talk) -> bool:
    """Whether the kernel was told to probe the host peer, since the last call."""
    return talk.sock.options.pop(KEEPIDLE, None) is not None


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("probe", [b"", b"a"])
def test_the_guest_gets_the_answer_of_its_peer(accepted: bool, probe: bytes) -> None:
    talk = idle(accepted=accepted)
    assert KEEPALIVE not in talk.sock.options
    talk.guest(ACK, probe, seq=4)
    talk.expect_nothing()
    assert talk.sock.options[KEEPALIVE] == 1
    assert talk.sock.options[socket.IPPROTO_TCP, socket.TCP_KEEPINTVL] == INTERVAL
    assert talk.sock.options[socket.IPPROTO_TCP, socket.TCP_KEEPCNT] == COUNT
    assert asked(talk)
    talk.wait(LOOK_FIRST)
    talk.expect_nothing()
    heard(talk, 0.002)
    talk.wait(2 * LOOK_FIRST)
    talk.expect(ACK, b"", ack=5)
    talk.wait(30)
    talk.expect_nothing()
    assert talk.sock.sent == b"data"


@pytest.mark.parametrize("data", [True, False], ids=["data", "acknowledgement"])
def test_a_peer_heard_of_just_now_needs_no_probe(data: bool) -> None:
    talk = idle()
    heard(talk, 45 if data else 0.5, 0.5 if data else 45)
    talk.guest(ACK, seq=4)
    talk.expect(ACK, b"", ack=5)
    assert not asked(talk) and KEEPALIVE not in talk.sock.options


def test_a_dead_peer_does_not_answer_and_each_probe_of_the_guest_asks_it() -> None:
    """The guest counts: it gives up after its own interval and count, and its RST ends the connection."""
    talk = idle()
    for i in range(3):
        talk.guest(ACK, seq=4)
        assert asked(talk)
        heard(talk, 45 + i)
        talk.wait(1.0)
        talk.expect_nothing()
    talk.guest(RST | ACK, seq=5)
    assert talk.gone and talk.sock.resets_on_close


def test_the_options_are_set_once() -> None:
    talk = idle()
    talk.guest(ACK, seq=4)
    heard(talk, 0.0)
    talk.wait(1)
    talk.expect(ACK)
    talk.sock.options.clear()
    talk.now += 45
    heard(talk, 45)
    talk.guest(ACK, seq=4)
    assert asked(talk)
    assert not talk.sock.options


def test_a_peer_that_has_just_answered_is_not_asked_again() -> None:
    talk = idle()
    talk.guest(ACK, seq=4)
    heard(talk, 0.0)
    talk.wait(0.5)
    talk.expect(ACK)
    assert asked(talk)
    heard(talk, 0.5)
    talk.guest(ACK, seq=4)
    talk.expect(ACK, b"", ack=5)
    assert not asked(talk)


def test_what_the_peer_sent_before_the_probe_is_no_answer() -> None:
    """It was silent for little longer than is needed to be asked."""
    talk = idle(1.0)
    talk.guest(ACK, seq=4)
    assert asked(talk)
    for _ in range(10):
        heard(talk, 1.0 + LOOK_FIRST)
        talk.wait(LOOK_FIRST)
    talk.expect_nothing()


def test_connections_share_a_timer(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that are close together are one expiration; the others have their own times."""
    looked: list[int] = []
    monkeypatch.setattr(keepalive, "_silence", lambda conn: looked.append(conn.index) or 99.0)
    none: Any = None
    kept = keepalive.KeepAlive(ctx, none, none)
    sock = SimpleNamespace(setsockopt=lambda *_: None)
    conns: list[Any] = [SimpleNamespace(index=n, sock=sock, asked_at=0.0) for n in range(3)]
    for conn, after in zip(conns, (0.0, 0.8 * COALESCE, 3 * COALESCE), strict=True):
        kept._ask(conn, T0 + after)
    services = timers(ctx).services
    late = 3 * COALESCE
    for expected, at in (([0, 1], 1), ([2], 1 + late / LOOK_FIRST), ([0, 1], 3), ([2], 3 + late / LOOK_FIRST)):
        assert services.deadlines[-1] == pytest.approx(T0 + at * LOOK_FIRST)
        services.fire(-1)
        assert looked == expected
        looked.clear()
    kept._ask(conns[1], T0 + 4 * LOOK_FIRST)
    assert services.deadlines[-1] == pytest.approx(T0 + 5 * LOOK_FIRST), "sooner than those that wait already"


@pytest.mark.parametrize(("less", "asks"), [(0, True), (1, False)])
def test_a_window_for_a_segment_is_open(less: int, asks: bool) -> None:
    """A smaller one makes the guest probe the window, which is not for its peer to answer."""
    talk = idle()
    (conn,) = talk.tcp._conns.values()
    conn.rcv_edge = conn.rcv_acked + conn.rcv_wnd_low - less
    talk.guest(ACK, seq=4)
    assert asked(talk) is asks
    assert len(talk.taken()) == (not asks)


def test_what_comes_again_at_once_is_no_keepalive() -> None:
    """Though the peer has been silent for long."""
    talk = idle(0.5)
    heard(talk, 45)
    talk.guest(ACK, seq=4)
    talk.expect(ACK, b"", ack=5)
    assert not asked(talk)


def test_silence_is_in_seconds() -> None:
    talk = idle()
    (conn,) = talk.tcp._conns.values()
    assert keepalive._silence(conn) == 45


def test_many_probes_ask_once_a_second() -> None:
    talk = idle()
    times = 0
    for _ in range(100):
        talk.guest(ACK, seq=4)
        times += asked(talk)
        heard(talk, 46)
        talk.wait(0.02)
    talk.expect_nothing()
    assert times == 3


def test_looks_become_rare_and_end() -> None:
    talk = idle()
    talk.guest(ACK, seq=4)
    heard(talk, 1000)
    before = talk.sock.looks
    talk.wait(LOOKS_TOTAL + 10)
    looks = talk.sock.looks - before
    assert LOOKS_TOTAL / LOOK_MAX < looks < LOOKS_TOTAL / LOOK_MAX + 10
    talk.expect_nothing()
    asked(talk)
    heard(talk, 0.5)
    talk.guest(ACK, seq=4)
    talk.expect(ACK, ack=5)
    assert not asked(talk)
    heard(talk, 1000)
    talk.guest(ACK, seq=4)
    assert asked(talk)  # a new question


def test_a_late_answer_is_one() -> None:
    talk = idle()
    talk.guest(ACK, seq=4)
    heard(talk, 49)
    talk.wait(3.5)
    talk.expect_nothing()
    heard(talk, 0.4)
    talk.wait(LOOK_MAX)
    talk.expect(ACK, b"", ack=5)


def test_an_answer_to_a_connection_that_is_over() -> None:
    talk = idle()
    talk.guest(ACK, seq=4)
    talk.guest(RST | ACK, seq=5)
    talk.wait(1)
    talk.expect_nothing()
    assert talk.gone


def test_the_end_of_the_guests_stream_changes_nothing() -> None:
    """It waits for the end of the other stream, and asks whether its peer lives."""
    talk = idle()
    talk.guest(FIN | ACK)
    talk.wait(0.05)
    talk.expect(ACK, ack=6)
    talk.now += 45
    heard(talk, 45)
    talk.guest(ACK, seq=5)
    talk.expect_nothing()
    assert asked(talk)


def test_fin_sent_again_is_no_keepalive() -> None:
    talk = idle()
    talk.guest(FIN | ACK)
    talk.wait(0.05)
    talk.expect(ACK, ack=6)
    talk.now += 45
    heard(talk, 45)
    talk.guest(FIN | ACK, seq=5)
    talk.expect(ACK, ack=6)
    assert not asked(talk)


@pytest.mark.parametrize("probe", [b"", b"a"])
def test_a_window_probe_is_no_keepalive(probe: bytes) -> None:
    """A guest with data to send, and a peer that does not read, probes for as long as that takes."""
    talk = open_connection()
    talk.sock.room = 4
    talk.sock.wmem = talk.sock.sndbuf
    talk.guest(ACK | PSH, b"data" + bytes(400_000))
    talk.wait(5)
    talk.taken()
    conn = next(iter(talk.tcp._conns.values()))
    conn.rcv_edge = conn.rcv_nxt  # the window is closed
    heard(talk, 5)
    talk.guest(ACK, probe, seq=4)
    talk.expect(ACK, b"", ack=5, window=0)
    assert not asked(talk) and KEEPALIVE not in talk.sock.options


def test_a_byte_sent_again_with_a_new_one_is_data() -> None:
    talk = idle(8000)
    talk.guest(ACK | PSH, b"a")
    talk.taken()
    talk.guest(ACK | PSH, b"ab", seq=talk.seq - 1)
    assert bytes(talk.sock.sent)[-2:] == b"ab"


def test_a_byte_sent_again_is_no_keepalive() -> None:
    """It comes within the retransmission timeout, or when the peer has not acknowledged it."""
    talk = idle(0.3)
    talk.guest(ACK, b"a", seq=4)
    talk.expect(ACK, b"", ack=5)
    talk.sock.info[BYTES_ACKED] = 5
    talk.guest(ACK | PSH, b"b")
    talk.wait(3)
    talk.taken()
    heard(talk, 3)
    talk.guest(ACK, b"b", seq=5)
    talk.expect(ACK, b"", ack=5)
    assert not asked(talk) and KEEPALIVE not in talk.sock.options


@pytest.mark.parametrize("old", [b"ab", b"b"])
def test_what_is_older_is_no_keepalive(old: bytes) -> None:
    talk = idle()
    talk.guest(ACK, old, seq=3)
    talk.expect(ACK, b"", ack=5)
    assert not asked(talk)


def test_a_fault_is_that_of_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = idle()
    stage_faults(talk.ctx)
    talk.guest(ACK, seq=4)
    monkeypatch.setattr(keepalive, "_silence", lambda conn: 1 / 0)
    talk.wait(1)
    talk.expect(RST | ACK)
    assert talk.gone


def test_ipv6() -> None:
    talk = idle(v6=True)
    assert len(talk.key) == 2 * len(addr.ANY6) + 4
    talk.guest(ACK, seq=4)
    talk.expect_nothing()
    assert asked(talk)
