"""Frames to the guest: what is written into the header, what is peeked, sent again, dropped from the socket."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from passt import addr
from passt.linux.tcpinfo import Features
from passt.tcp_engine import output as tcp_output
from passt.tcp_engine.conn import SOCK_FIN_RCVD, TAP_FIN_ACKED, TAP_FIN_SENT, TcpConn, set_event
from passt.tcp_engine.output import DISCARD_MAX, PEEK_MAX, ROWS_MIN, TcpOut
from passt.wire.checksum import ones_sum
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN
from passt.wire.virtio import VNET
from tests.unit import support
from tests.unit.machine_link import LayingLink
from tests.unit.oracle import recomputed
from tests.unit.support import GUEST4, GUEST6, FakeLink, link, make_context
from tests.unit.tcp_support import ALL, FakeSocket, Segment, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]
PEER4, PEER6 = addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7")
KEYS = {True: GUEST4 + PEER4 + bytes.fromhex("9c40 0050"), False: GUEST6 + PEER6 + bytes.fromhex("9c40 0050")}
NO_PEEK_OFF = replace(ALL, peek_off=False)


def out_and_conn(v4: bool = True, **config: Any) -> tuple[TcpOut, TcpConn, Any]:
    ctx = make_context(**config)
    out = TcpOut(ctx, ALL)
    conn = TcpConn(KEYS[v4])
    conn.index = 0
    out.build_header(conn)
    return out, conn, link(ctx)


def completed(frame: bytes, l4: int) -> bytes:
    """The frame with its partial checksum completed, as the guest's kernel would."""
    c = 0xFFFF - ones_sum(frame[l4:])
    return frame[: l4 + 16] + c.to_bytes(2, "big") + frame[l4 + 18 :]


# The header -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.booleans(),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 24),
    st.binary(max_size=300),
    st.sampled_from([ACK, ACK | PSH, ACK | FIN]),
)
def test_header_is_what_scapy_computes(v4: bool, seq: int, ack: int, window: int, data: bytes, flags: int) -> None:
    out, conn, fake = out_and_conn(v4)
    conn.rcv_acked, conn.rcv_edge, conn.rcv_wscale = ack, ack + window, 8
    out.header(conn, seq, flags, len(data))
    fake.send_payload((conn.hdr, data))
    frame = completed(fake.take_one(), 34 if v4 else 54)
    assert recomputed(frame) == frame
    segment = Ether(frame)[TCP]
    assert (segment.seq, segment.ack, int(segment.flags)) == (seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, flags)
    assert segment.window == min(window >> 8, 65535)
    assert bytes(segment.payload) == data


def test_header_of_the_longest_frames() -> None:
    for v4, longest in ((True, 65495), (False, 65515)):
        out, conn, fake = out_and_conn(v4)
        out.header(conn, 1, ACK, longest)
        fake.send_payload((conn.hdr, b"\xff" * longest))
        frame = completed(fake.take_one(), 34 if v4 else 54)
        assert recomputed(frame) == frame


@pytest.mark.parametrize(("mtu", "mss4", "mss6"), [(1500, 1460, 1440), (65520, 65480, 65460), (0, 1460, 1440)])
def test_syn_ack_offers_what_the_link_carries(mtu: int, mss4: int, mss6: int) -> None:
    for v4, mss in ((True, mss4), (False, mss6)):
        out, conn, fake = out_and_conn(v4, mtu=mtu)
        conn.rcv_wscale, conn.rcv_edge = 8, 40000
        out.syn_ack(conn, True)
        assert conn.rcv_wscale == 8
        frame = completed(fake.take_one(), 34 if v4 else 54)
        assert recomputed(frame) == frame
        segment = Ether(frame)[TCP]
        assert segment.flags == "SA" and segment.window == 40000  # not scaled in a SYN
        permitted = [("NOP", None), ("NOP", None), ("SAckOK", b"")]
        assert segment.options == [("MSS", mss), ("NOP", None), ("WScale", 8), *permitted]
        out.syn_ack(conn, False)
        assert Ether(fake.take_one())[TCP].options == [("MSS", mss), *permitted]
        conn.sack = False
        out.syn_ack(conn, False)
        assert Ether(fake.take_one())[TCP].options == [("MSS", mss)]


@pytest.mark.parametrize("v4", [True, False])
def test_refusal(v4: bool) -> None:
    out, conn, fake = out_and_conn(v4)
    out.refuse(conn.key, 1000, 2000, ACK, 7)
    out.refuse(conn.key, 1000, 2000, SYN, 1)
    first, second = (Ether(f)[TCP] for f in fake.take())
    assert (int(first.flags), first.seq) == (RST, 2000)
    assert (int(second.flags), second.seq, second.ack) == (RST | ACK, 0, 1001)
    assert (first.sport, first.dport, first.window) == (80, 40000, 0)


def test_bare_segment_ends_segmentation() -> None:
    talk = open_connection()
    talk.guest(ACK)
    talk.host(os.urandom(20000))
    assert talk.expect(ACK | PSH).gso_size == 1460
    talk.guest(ACK, b"x", seq=0)
    assert talk.expect(ACK, b"").gso_size == 0
    assert VNET.unpack_from(talk.tcp._conns[talk.key].hdr)[1:4] == (0, 0, 0)


# Peeking --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_fin_rides_on_the_last_data(features: Any) -> None:
    talk = open_connection(features=features)
    talk.host(b"the end", end=True)
    s = talk.expect(FIN | ACK | PSH, b"the end")
    assert s.seq == 1
    talk.guest(ACK)
    assert talk.tcp._conns[talk.key].events & TAP_FIN_ACKED


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_fin_that_is_found_late_comes_by_itself(features: Any) -> None:
    talk = open_connection(features=features)
    talk.host(b"data")
    talk.expect(ACK | PSH, b"data")
    talk.host(end=True)
    talk.expect(FIN | ACK, b"", seq=5)


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_lost_fin_is_sent_again(features: Any) -> None:
    talk = open_connection(features=features)
    talk.host(b"data", end=True)
    talk.expect(FIN | ACK | PSH, b"data")
    talk.guest(ACK, ack=5)  # the data, not the FIN
    talk.taken()
    talk.wait(talk.ctx.link.rto_min)
    talk.expect(FIN | ACK, b"", seq=5)
    talk.guest(ACK, ack=6)
    assert talk.tcp._conns[talk.key].events & TAP_FIN_ACKED


def test_duplicate_acknowledgement_of_a_lost_fin() -> None:
    talk = open_connection()
    talk.host(end=True)
    talk.expect(FIN | ACK, b"", seq=1)
    talk.guest(ACK, ack=1)
    talk.expect(FIN | ACK, b"", seq=1)


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_ranges_in_flight_are_sent_again(features: Any) -> None:
    talk = open_connection(features=features)
    data = os.urandom(30_000)
    talk.host(data, end=True)
    talk.taken()
    conn = talk.tcp._conns[talk.key]
    una = conn.snd_una
    talk.tcp._out.resend(conn, [(una + 10, una + 25), (una + 29_000, una + 30_001), (una + 30_000, una + 30_001)])
    first, second, third = talk.taken()
    assert (first.seq, first.payload, first.flags) == (11, data[10:25], ACK | PSH)
    assert (second.seq, second.payload, second.flags) == (29_001, data[29_000:], ACK | PSH | FIN)
    assert (third.seq, third.payload, third.flags) == (30_001, b"", ACK | FIN)
    talk.guest(ACK, ack=30_002)
    assert talk.sock.incoming == b"" and conn.events & TAP_FIN_ACKED


def test_without_peek_offset_no_more_is_in_flight_than_the_discard_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_output, "DISCARD_MAX", 5000)
    talk = open_connection(features=NO_PEEK_OFF)
    talk.window = 65535
    talk.guest(ACK)
    talk.host(bytes(20000))
    assert sum(len(s.payload) for s in talk.taken()) == 5000
    talk.guest(ACK, ack=5001)
    talk.wait(0.02)  # what was acknowledged may lie there for a while
    talk.guest(ACK, ack=5001, window=65534)
    assert sum(len(s.payload) for s in talk.taken()) >= 5000


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF], ids=["offset", "no offset"])
def test_payload_is_received_where_the_link_wants_it(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second large peek on, until a small one."""
    monkeypatch.setattr(support, "new_link", LayingLink)
    talk = open_connection(features=features)
    fake = link(talk.ctx)
    assert isinstance(fake, LayingLink)
    data = os.urandom(500_000)
    talk.host(data)
    segments = talk.taken()
    assert b"".join(s.payload for s in segments) == data
    assert [s.seq for s in segments] == [1 + sum(len(s.payload) for s in segments[:i]) for i in range(len(segments))]
    assert fake.direct == 4, "those of the second peek"
    talk.guest(ACK, ack=500_001)
    talk.host(b"little")
    assert fake.direct == 5, "it could have been much"
    talk.host(b"more", end=True)
    assert [s.payload for s in talk.taken()] == [b"little", b"more"]
    assert fake.direct == 5


def test_guest_that_is_found_gone_when_the_link_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections have ended then, this one as well."""
    monkeypatch.setattr(support, "new_link", LayingLink)
    talk = open_connection()
    fake, (conn,) = link(talk.ctx), talk.tcp._conns.values()
    assert isinstance(fake, LayingLink)

    def lay_out(header: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        talk.tcp._table.forget()
        return [], 0

    monkeypatch.setattr(fake, "lay_out", lay_out)
    talk.host(os.urandom(500_000))
    assert conn.sock is None and conn.timer < 0 and conn.slot is None and not talk.tcp._conns
    talk.wait(1.0)
    assert not any(talk.ctx.drops.values())


@pytest.mark.parametrize(("mtu", "direct"), [(65520, 4), (1500, 0)])
def test_link_that_cuts_super_frames_has_no_place_for_their_payload(
    mtu: int, direct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment lies behind a header of its own; those of one piece go where the link wants them."""
    monkeypatch.setattr(support, "new_link", LayingLink)
    talk = open_connection(config={"mtu": mtu}, mss=mtu - 40)
    fake = link(talk.ctx)
    assert isinstance(fake, LayingLink)
    fake.cuts = True
    talk.host(data := os.urandom(500_000))
    assert b"".join(s.payload for s in talk.taken()) == data
    assert fake.direct == direct


@pytest.mark.parametrize("length", [1461, 1460 * ROWS_MIN, 1460 * ROWS_MIN + 1, 1460 * 7, 200_000, 1460 * 200, 400_001])
def test_link_that_cuts_gets_segments_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last of a peek: PSH and FIN are on that."""
    monkeypatch.setattr(support, "new_link", FakeLink)
    talk = open_connection(config={"mtu": 1500}, mss=1460)
    fake, calls = link(talk.ctx), list[int]()
    fake.cuts = True
    send_segments = fake.send_segments

    def counted(hdr: bytearray, payload: memoryview, size: int) -> None:
        calls.append(len(payload) // size)
        send_segments(hdr, payload, size)

    monkeypatch.setattr(fake, "send_segments", counted)
    talk.host(data := os.urandom(length), end=True)
    segments = talk.taken()
    assert b"".join(s.payload for s in segments) == data
    assert [s.seq for s in segments] == list(range(1, 1 + length, 1460))
    assert {len(s.payload) for s in segments[:-1]} == {1460}
    assert segments[-1].flags == ACK | PSH | FIN
    peeks = -(-length // (PEEK_MAX - PEEK_MAX % (44 * 1460)))
    assert [s.flags for s in segments].count(ACK) == len(segments) - peeks
    assert sum(calls) == (len(segments) - peeks if length > 1460 * ROWS_MIN else 0) and len(calls) <= peeks


# Dropping what was acknowledged ---------------------------------------------------------------------------------------


class Receives:
    """A socket that gives what MSG_TRUNC asks for in pieces of at most `step`; 0 ends, None fails."""

    def __init__(self, *steps: int | None) -> None:
        self.steps = list(steps)
        self.asked: list[int] = []

    def recv_into(self, buffer: memoryview, n: int, flags: int) -> int:
        assert flags == tcp_output.MSG_TRUNC and len(buffer) >= n
        self.asked.append(n)
        step = self.steps.pop(0)
        if step is None:
            raise ConnectionResetError
        return min(step, n)


def consumed(acknowledged: int, events: int, *steps: int | None) -> tuple[list[int], int]:
    out, conn, _ = out_and_conn()
    conn.base, conn.snd_una = 1000, 1000 + acknowledged
    set_event(conn, events)
    conn.sock = sock = Receives(*steps)
    out.consume(conn)
    return sock.asked, conn.base - 1000


def test_consume() -> None:
    assert consumed(0, 0) == ([], 0)
    assert consumed(500, 0, 500) == ([500], 500)
    assert consumed(500, 0, 200, 300) == ([500, 300], 500)
    assert consumed(501, TAP_FIN_SENT | TAP_FIN_ACKED, 500) == ([500], 500)  # FIN is no byte of the stream
    assert consumed(DISCARD_MAX + 7, 0, 1 << 30, 1 << 30) == ([DISCARD_MAX, 7], DISCARD_MAX + 7)
    assert consumed(500, SOCK_FIN_RCVD, 200, 0) == ([500, 300], 200)  # reset underneath
    assert consumed(500, 0, 200, None) == ([500, 300], 200)


def test_segments_as_the_conversation_sees_them() -> None:
    """tcp_support.py reads frames by itself; here by scapy, once."""
    talk = Talk()
    talk.syn()
    frame = link(talk.ctx).frames[0]
    (mine,) = talk.taken()
    theirs = Ether(frame)[TCP]
    assert isinstance(mine, Segment) and FakeSocket.made
    assert (mine.flags, mine.window, mine.options.mss) == (int(theirs.flags), theirs.window, theirs.options[0][1])
