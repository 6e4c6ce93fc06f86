"""The fast path of one segment does what the loop does, whatever the segment and the connection.

Two conversations hear the same. In one of them `Tcp._plain_segment` always says that it is not a plain segment. After
each step both must be the same in every slot of the connection, every timer and counter, in what went to the guest, and
in what the host socket was told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.tcp_engine.conn import KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, TcpConn
from passt.tcp_engine.opening import TcpOpen
from passt.wire.tcp import ACK, FIN, HEADER, PSH, RST, SYN

from .support import reactor
from .tcp_support import (
    ALL,
    BYTES_ACKED,
    MASK,
    MIN_RTT,
    SND_WND,
    FakeSocket,
    Features,
    Segment,
    Talk,
    fake_sockets,
)

__all__ = ["fake_sockets"]

URG, ECN = 0x20, 0xC0
# All but the socket, which is looked at from outside, and the time by the real clock
SLOTS = sorted({name for kind in TcpConn.__mro__ for name in getattr(kind, "__slots__", ())} - {"sock", "opened"})


class Twin(Talk):
    """A conversation whose host socket is its own, not the one that was made last."""

    own: FakeSocket
    conn: TcpConn
    heard: list[Segment]

    @property
    def sock(self) -> FakeSocket:
        return self.own

    def begin(self, mss: int, ws: int | None) -> None:
        FakeSocket.made.clear()  # so that the twins have the same descriptors
        with mock.patch.object(TcpOpen, "isn", return_value=0xFFFFFE00):  # and numbers, which wrap soon
            self.syn(mss, ws)
        self.own = FakeSocket.made[-1]
        (self.conn,) = self.tcp._conns.values()
        self.heard = self.taken()
        self.guest(ACK, ack=1)
        self.ack = 1

    def state(self) -> dict[str, Any]:
        """All that a handler may change."""
        conn, sock, ctx = self.conn, self.own, self.ctx
        slots = {name: getattr(conn, name) for name in SLOTS}
        services = self.timers.services
        outside = {
            "open": conn.sock is not None,
            "heard": self.taken(),
            "conns": len(self.tcp._conns),
            "stalled": list(self.tcp._out.turns.waiting),
            "waiting": [(at, c.index) for at, _, c in self.tcp._acks._waiting],
            "early": self.tcp._table.out_of_order.total,
            "drops": dict(ctx.drops),
            "watched": dict(reactor(ctx).events),
            "timers": (dict(self.timers.expiry), list(services.deadlines), dict(self.timers.owner)),
            "given": bytes(sock.sent),
            "left": bytes(sock.incoming),
            "socket": (
                sock.room,
                sock.peek_off,
                sock.peeks,
                sock.looks,
                sock.shut,
                sock.closed,
                sock.error,
                sock.options,
            ),
        }
        self.heard = outside["heard"]
        assert not slots.keys() & outside.keys() - {"early"}
        return {**slots, **{f"outside {name}": value for name, value in outside.items()}}


Step = Callable[[Twin], None]


def segment(
    length: int = 100, *, flags: int = ACK, at: int = 0, behind: int = 0, window: int = 65535, words: int = 5
) -> Step:
    """One segment: in order and with payload, acknowledging all, unless something else is said about it."""
    return segments([(flags, at, length, behind, window)], words)


def segments(parts: list[tuple[int, int, int, int, int]], words: int = 5) -> Step:
    """Segments (flags, bytes before or after what comes next, length, how much is not acknowledged, window) in one
    batch. `words` is what they say of the length of their header; what is missing of the options is payload.
    """

    def step(talk: Twin) -> None:
        flat: list[int] = []
        start, buf = 64, talk.ctx.pool.buf
        rcv_nxt, snd_nxt = talk.conn.rcv_nxt, talk.conn.snd_nxt
        for flags, at, length, behind, window in parts:
            seq = rcv_nxt + at
            bits = words << 12 | flags
            raw = HEADER.pack(40000, 80, seq & MASK, snd_nxt - behind & MASK, bits, window, 0, 0)
            raw += bytes((seq + i) * 7 & 0xFF for i in range(length))
            buf[start : start + len(raw)] = raw
            flat += (start, start + len(raw))
            start += len(raw)
        talk.tcp.tap_handler(talk.key, flat, talk.now)

    return step


def host(length: int, end: bool) -> Step:
    return lambda talk: talk.host(b"h" * length, end=end) if talk.conn.sock is not None and not talk.own.ended else None


def room(n: int) -> Step:
    """So much goes into the send buffer from now on."""

    def step(talk: Twin) -> None:
        talk.own.room = n
        talk.own.wmem = 0 if n > 100000 else 3 << 20
        if talk.conn.sock is not None and talk.conn.wait_writable and n > 100000:
            talk.writable()

    return step


def wait(seconds: float) -> Step:
    return lambda talk: talk.wait(seconds)


def peer(acked: int, rtt: int, window: int) -> Step:
    """TCP_INFO of the host's kernel about its peer."""

    def step(talk: Twin) -> None:
        talk.own.info = {BYTES_ACKED: 1 + len(talk.own.sent) * acked // 4, MIN_RTT: rtt, SND_WND: window}
        if acked == 4:
            del talk.own.info[BYTES_ACKED]  # all, from now on

    return step


def broken(error: int) -> Step:
    """The next call on the socket fails."""

    def step(talk: Twin) -> None:
        talk.own.error = error

    return step


def urgent(talk: Twin) -> None:
    talk.conn.urgent = True


# Values and steps for hypothesis to choose from

LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([1448, 8191, 8192, 8193, 20000]))
WINDOWS = st.sampled_from([0, 1, 7, 100, 512, 65535, 65535])
BEHIND = st.one_of(st.just(0), st.integers(0, 3000), st.integers(-3, 0), st.sampled_from([-(1 << 31), 1 << 31]))
FLAGS = st.sampled_from([ACK, ACK, PSH | ACK, FIN | ACK, RST | ACK, RST, SYN, SYN | ACK, FIN, 0, URG | ACK, ECN | ACK])
PLACES = st.one_of(st.just(0), st.integers(-5, 5), st.sampled_from([-1448, 1448, 1 << 31, (1 << 31) - 1]))
ANY_LENGTHS = st.one_of(st.just(0), LENGTHS)
PLAIN = st.builds(segment, LENGTHS, behind=BEHIND, window=WINDOWS)
STEPS = st.one_of(
    PLAIN,
    st.builds(
        segment, ANY_LENGTHS, flags=FLAGS, at=PLACES, behind=BEHIND, window=WINDOWS, words=st.sampled_from([5, 5, 4, 8])
    ),
    st.builds(segments, st.lists(st.tuples(FLAGS, PLACES, ANY_LENGTHS, BEHIND, WINDOWS), min_size=2, max_size=4)),
    st.builds(host, st.one_of(st.integers(1, 100), st.sampled_from([5000, 70000, 200000])), st.booleans()),
    st.builds(room, st.sampled_from([0, 1, 10, 1000, 1 << 30])),
    st.builds(wait, st.sampled_from([0.004, 0.012, 0.25, 1.1, 4.0, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL])),
    st.builds(peer, st.integers(0, 4), st.sampled_from([10, 10_000]), st.sampled_from([0, 1000, 1 << 20])),
    st.builds(broken, st.sampled_from([104, 110])),
    st.just(urgent),
)

# States and segments; each pair of them is tested

STATES: dict[str, list[Step]] = {
    "open": [],
    "in flight": [host(3000, False)],
    "early": [segment(at=1448)],
    "both": [host(3000, False), segment(at=1448)],
    "probed": [wait(KEEPALIVE_IDLE)],
    "sent again": [host(3000, False), wait(1.1)],
    "sent again, and nothing since": [host(3000, False), segment(behind=3000, window=0), wait(1.1)],
    "window closed": [segment(window=0), host(100, False)],
    "window probed": [segment(window=0), host(100, False), wait(0.25)],
    "host ended": [host(100, True)],
    "host ended, and its end is acknowledged": [host(100, True), segment(0)],
    "guest ended": [segment(flags=FIN | ACK)],
    "both ended": [segment(flags=FIN | ACK), host(100, True)],
    "full": [room(10), segment()],
    "failed": [broken(104)],
    "answers": [step for _ in range(3) for step in (segment(), host(10, False))],
}
NEARLY_PLAIN: dict[str, Step] = {
    "plain": segment(),
    "long": segment(20000),
    "empty": segment(0),
    "a byte": segment(1),
    "push": segment(flags=PSH | ACK),
    "urgent": segment(flags=URG | ACK),
    "ECN": segment(flags=ECN | ACK),
    "FIN": segment(flags=FIN | ACK),
    "RST": segment(flags=RST | ACK),
    "SYN": segment(flags=SYN | ACK),
    "no ACK": segment(flags=0),
    "next but one": segment(at=1),
    "last again": segment(at=-1),
    "old": segment(at=-100),
    "on the other side": segment(at=1 << 31),
    "fills the hole": segment(1448),
    "acknowledges nothing": segment(behind=3000),
    "acknowledges a part": segment(behind=1000),
    "acknowledges all but one": segment(behind=1),
    "acknowledges what was not sent": segment(behind=-1),
    "acknowledges what is long gone": segment(behind=1 << 20),
    "another window": segment(window=1000),
    "no window": segment(window=0),
    "short header": segment(words=4),
    "options": segment(words=8),
    "only options": segment(12, words=8),
    "header longer than the segment": segment(11, words=8),
    "no header": segment(words=0),
}


def twins(features: Features, mss: int, ws: int | None) -> tuple[Twin, Twin]:
    fast, slow = (Twin(features=features) for _ in range(2))
    slow.tcp._plain_segment = lambda *_: False  # type: ignore[method-assign]
    for talk in fast, slow:
        talk.begin(mss, ws)
    assert fast.state() == slow.state()
    return fast, slow


def check(fast: Twin, slow: Twin, steps: list[Step]) -> None:
    for step in steps:
        for talk in fast, slow:
            step(talk)
        ours, theirs = fast.state(), slow.state()
        assert ours == theirs, {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        if fast.conn.sock is None:
            break


@given(
    st.sampled_from([ALL, Features(peek_off=False), Features(min_rtt=False, snd_wnd=False)]),
    st.sampled_from([536, 1460]),
    st.sampled_from([7, 0, None]),
    st.lists(STEPS, max_size=10),
    PLAIN,
)
def test_the_fast_path_equals_the_loop(
    features: Features, mss: int, ws: int | None, before: list[Step], last: Step
) -> None:
    check(*twins(features, mss, ws), [*before, last])


@pytest.mark.parametrize("state", STATES)
def test_of_segments_that_are_nearly_plain(state: str) -> None:
    """Each, on a connection in each state."""
    for name, nearly in NEARLY_PLAIN.items():
        for last in [], [segment()]:  # and what came of it, which may show with the next one only
            try:
                check(*twins(ALL, 1460, 7), [*STATES[state], nearly, *last])
            except AssertionError as e:
                e.add_note(f"segment: {name}")
                raise
