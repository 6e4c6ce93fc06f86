"""TCP: opening, data both ways, loss, windows, closing, time; see tcp_support.py for how to read a conversation."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import IP, TCP, Ether, IPv6

from passt import addr
from passt.flow.table import FlowTable
from passt.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from passt.tcp_engine.conn import GIVE_UP, RTO_MAX, SYN_TIMEOUT
from passt.tcp_engine.output import CUTS_MAX
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN
from tests.unit.support import GATEWAY4, link, reactor, reconfigure
from tests.unit.tcp_support import ALL, GUEST_ISN, FakeSocket, Talk, accepted_connection, fake_sockets, open_connection

__all__ = ["fake_sockets"]
NO_PEEK_OFF = replace(ALL, peek_off=False)


def near(**how: Any) -> Talk:
    """A connection to the host's own loopback, through the gateway address."""
    return open_connection(peer=GATEWAY4, **how)


# Opening ---------------------------------------------------------------------------------------------------------


def test_handshake_offers_what_the_link_can_carry() -> None:
    talk = Talk(config={"mtu": 1500})
    talk.syn(mss=1460, ws=7)
    s = talk.expect(SYN | ACK, b"", seq=0, ack=1)
    assert s.options.mss == 1460 and s.options.ws == 8
    assert talk.sock.peer == ("198.51.100.7", 80)
    assert s.window == 65535  # never scaled in a SYN


@pytest.mark.parametrize("begins", ["guest", "host"])
def test_new_connections_follow_the_mtu(begins: str) -> None:
    """Both the MSS that is offered and the length of segments do. A connection that is there keeps what was agreed."""
    make = open_connection if begins == "guest" else accepted_connection
    talk = make(config={"mtu": 1500})
    former = talk.sock
    reconfigure(talk.ctx, mtu=1280)
    talk.host(b"x" * 1400)
    assert sum(len(s.payload) for s in talk.taken()) == 1400 and max(c.mss for c in talk.tcp._conns.values()) == 1460

    talk.key = talk.key[:-4] + (40001).to_bytes(2, "big") + talk.key[-2:]
    if begins == "guest":
        talk.syn(mss=1460)
        assert talk.expect(SYN | ACK).options.mss == 1240
        talk.ack = 1
        talk.guest(ACK)
        talk.expect_nothing()
    else:
        talk.accept("198.51.100.8")
        assert talk.expect(SYN).options.mss == 1240
        talk.answer(mss=1460)
        talk.expect(ACK)
    assert talk.sock is not former
    assert talk.tcp._conns[talk.key].mss == 1240


def test_tcp_is_switched_off_and_on() -> None:
    talk = Talk()
    reconfigure(talk.ctx, no_tcp=True)
    talk.syn()
    talk.expect_nothing()
    assert talk.ctx.drops == {"tcp disabled": 1}
    reconfigure(talk.ctx, no_tcp=False)
    talk.syn()
    talk.expect(SYN | ACK)


def test_no_window_scale_without_the_guests() -> None:
    talk = Talk(peer=GATEWAY4)
    talk.syn(ws=None)
    assert talk.expect(SYN | ACK).options.ws is None
    talk.guest(ACK)
    talk.guest(ACK | PSH, b"x")
    assert talk.expect(ACK).window == 65535


def test_gateway_address_is_the_hosts_loopback() -> None:
    assert near().sock.peer == ("127.0.0.1", 80)


def test_connection_over_loopback_is_complete_at_once() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS, 0]
    talk = Talk(peer=GATEWAY4)
    talk.syn()
    talk.expect(SYN | ACK)


def test_the_guest_hears_nothing_before_the_host_is_connected() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    talk.expect_nothing()
    talk.syn()  # sent again: the attempt goes on
    talk.expect_nothing()
    assert len(FakeSocket.made) == 1
    talk.writable()
    talk.expect(SYN | ACK, seq=0, ack=1)


@pytest.mark.parametrize("immediately", [True, False])
def test_refused_connection_is_reset_with_ack(immediately: bool) -> None:
    FakeSocket.connect_results = [errno.ECONNREFUSED if immediately else errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    if not immediately:
        talk.host(error=errno.ECONNREFUSED)
    talk.expect(RST | ACK, ack=1)
    assert talk.gone


@pytest.mark.parametrize(
    ("error", "v6", "kind", "code"),
    [
        (errno.ENETUNREACH, False, 3, 0),
        (errno.EHOSTUNREACH, False, 3, 1),
        (errno.EACCES, False, 3, 13),
        (errno.ENETUNREACH, True, 1, 0),
        (errno.EHOSTUNREACH, True, 1, 3),
        (errno.EPERM, True, 1, 1),
    ],
)
def test_unreachable_peer_is_told_by_icmp(error: int, v6: bool, kind: int, code: int) -> None:
    FakeSocket.connect_results = [error]
    talk = Talk(v6=v6)
    talk.syn()
    (frame,) = link(talk.ctx).take()
    at = 14 + (40 if v6 else 20)
    assert (frame[at], frame[at + 1]) == (kind, code)
    quoted = (IPv6 if v6 else IP)(frame[at + 8 :])
    assert quoted[TCP].sport == 40000 and quoted[TCP].dport == 80 and quoted[TCP].seq == GUEST_ISN
    assert talk.gone


def test_connect_time_out_stays_silence() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    talk.host(error=errno.ETIMEDOUT)
    talk.expect_nothing()
    assert talk.gone


def test_guest_gives_up_while_connecting() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.syn()
    talk.guest(RST)
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close


def test_syn_ack_is_repeated_then_given_up() -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    delay = talk.ctx.link.rto_min
    for _ in range(6):
        talk.wait(delay)
        talk.expect(SYN | ACK, seq=0, ack=1)
        delay *= 2
    talk.wait(SYN_TIMEOUT)
    assert talk.taken()[-1].flags == RST | ACK
    assert talk.gone and talk.sock.resets_on_close


def test_repeated_syn_gets_the_syn_ack_again() -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.syn()
    talk.expect(SYN | ACK, seq=0, ack=1)


def test_another_syn_on_a_half_open_connection_starts_over() -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.put((SYN, GUEST_ISN + 5000, 0, b"", 1000, b""))
    flags = [s.flags for s in talk.taken()]
    assert flags == [RST | ACK, SYN | ACK] and len(FakeSocket.made) == 2


def test_syn_on_an_established_connection_is_challenged() -> None:
    talk = open_connection()
    talk.guest(SYN, seq=5000)
    talk.expect(ACK, seq=1, ack=1)


def test_wrong_acknowledgement_in_the_handshake_is_reset() -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK, ack=77)
    s = talk.taken()
    assert [x.flags for x in s] == [RST] and s[0].seq == 77


@pytest.mark.parametrize("flags", [ACK, ACK | PSH, FIN | ACK, SYN | ACK])
def test_segment_without_connection_is_reset(flags: int) -> None:
    talk = Talk()
    talk.guest(flags, ack=1234)
    (s,) = talk.taken()
    assert s.flags == RST and s.seq == 1234


def test_fin_without_ack_and_connection_is_reset_behind_it() -> None:
    talk = Talk()
    talk.guest(FIN, b"abc", seq=10)
    (s,) = talk.taken()
    assert s.flags == RST | ACK and s.seq == 0 and s.ack == 14


def test_reset_without_connection_is_ignored() -> None:
    talk = Talk()
    talk.guest(RST)
    talk.expect_nothing()


@pytest.mark.parametrize(
    "peer",
    ["224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.1", "127.8.9.10", "ff02::1", "::", "::1", "::ffff:127.0.0.1",
     "::ffff:0.0.0.0", "::ffff:198.51.100.7"],
)  # fmt: skip
def test_endpoints_that_cannot_have_a_connection(peer: str) -> None:
    talk = Talk(peer=addr.packed(peer), v6=":" in peer)
    talk.syn()
    talk.expect_nothing()
    assert talk.ctx.drops["tcp endpoint"] == 1 and not FakeSocket.made


@pytest.mark.parametrize("flags", [SYN, ACK, FIN | ACK, RST])
def test_silence_when_disabled(flags: int) -> None:
    talk = Talk(config={"no_tcp": True})
    talk.guest(flags)
    talk.expect_nothing()
    assert talk.ctx.drops == {"tcp disabled": 1} and not FakeSocket.made


def test_absurd_mss_does_not_cost_a_frame_for_each_byte() -> None:
    talk = Talk()
    talk.syn(mss=1)
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    talk.host(bytes(280))
    assert talk.expect(ACK | PSH).gso_size == 28


def test_full_table_refuses() -> None:
    talk = Talk()
    talk.ctx.flows = FlowTable(limit=0)
    talk.syn()
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops["flow table full"] == 1


def test_no_descriptor_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from passt.tcp_engine import sock as tcp_sock

    def fail(*_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tcp_sock, "new_socket", fail)
    talk = Talk()
    talk.syn()
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops["tcp socket"] == 1 and talk.ctx.flows.count == 0


def test_initial_sequence_numbers_differ_by_endpoint_and_grow_with_time() -> None:
    talk = Talk()
    other = talk.key[:-1] + b"\x51"
    first = talk.tcp.opening.isn(talk.key, 1000.0)
    assert first != talk.tcp.opening.isn(other, 1000.0)
    assert talk.tcp.opening.isn(talk.key, 1000.1) - first & 0xFFFFFFFF == 25_000
    assert first != Talk().tcp.opening.isn(talk.key, 1000.0)  # another start, another secret


# Guest to host -----------------------------------------------------------------------------------------------------


def test_payload_reaches_the_socket_in_one_call_and_is_acknowledged() -> None:
    talk = near()
    talk.put(talk.segment(ACK, b"abc"), talk.segment(ACK, b"def"), talk.segment(ACK | PSH, b"g"))
    assert talk.sock.sent == b"abcdefg"
    talk.expect(ACK, b"", seq=1, ack=8)


def test_segments_out_of_order_in_one_batch_are_put_in_order() -> None:
    talk = near()
    a, b, c = talk.segment(ACK, b"aaa"), talk.segment(ACK, b"bb"), talk.segment(ACK, b"c")
    talk.put(c, a, b)
    assert talk.sock.sent == b"aaabbc"
    talk.expect(ACK, ack=7)


def test_a_hole_is_asked_for() -> None:
    talk = near()
    lost, later = talk.segment(ACK, b"lost"), talk.segment(ACK, b"later")
    talk.put(later)
    assert talk.sock.sent == b""
    talk.expect(ACK, ack=1)
    talk.put(lost, later)
    assert talk.sock.sent == b"lostlater"
    talk.expect(ACK, ack=10)


def test_overlap_is_taken_once() -> None:
    talk = near()
    talk.guest(ACK, b"abcd")
    talk.expect(ACK, ack=5)
    talk.guest(ACK, b"cdef", seq=3)
    assert talk.sock.sent == b"abcdef"
    talk.expect(ACK, ack=7)
    talk.guest(ACK, b"abcdef", seq=1)
    assert talk.sock.sent == b"abcdef"
    talk.expect(ACK, ack=7)


def test_keep_alive_and_window_probe_are_answered() -> None:
    talk = near()
    talk.guest(ACK, b"data")
    talk.expect(ACK)
    talk.guest(ACK, seq=4)
    talk.expect(ACK, ack=5)
    talk.guest(ACK, b"a", seq=4)
    talk.expect(ACK, ack=5)
    assert talk.sock.sent == b"data"


def test_full_send_buffer_is_waited_for_and_the_rest_kept() -> None:
    talk = near()
    talk.sock.room = 4
    talk.sock.wmem = talk.sock.sndbuf
    talk.guest(ACK, b"abcdefgh")
    assert talk.sock.sent == b"abcd"
    talk.expect(ACK, ack=5)
    assert reactor(talk.ctx).events[talk.sock.fd] & EPOLLOUT
    talk.sock.room, talk.sock.wmem = 100, 0
    talk.writable()
    assert talk.sock.sent == b"abcdefgh"
    assert talk.expect(ACK, ack=9).window > 0


def test_peer_reset_while_sending_reaches_the_guest() -> None:
    talk = near()
    talk.sock.error = errno.ECONNRESET
    talk.guest(ACK, b"x")
    talk.expect(RST | ACK)
    assert talk.gone


def test_what_a_peer_sent_before_its_reset_goes_before_it() -> None:
    """Found by sending: the data is still in the socket, whose event comes later."""
    talk = near()
    talk.sock.incoming += b"last words"
    talk.sock.error, talk.sock.failed = errno.ECONNRESET, True
    talk.guest(ACK, b"x")
    assert [(s.flags, s.payload) for s in talk.taken()] == [(ACK | PSH, b"last words"), (RST | ACK, b"")]
    assert talk.gone


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
@pytest.mark.parametrize("data", [b"", b"an answer"])
def test_a_reset_that_comes_with_the_data_is_no_end(features: Any, data: bytes) -> None:
    """A daemon that was busy sees both at once, and EPOLLRDHUP, which says no more than EPOLLERR then."""
    talk = near(features=features)
    talk.host(data, error=errno.ECONNRESET)
    segments = talk.taken()
    assert b"".join(s.payload for s in segments) == data
    assert not any(s.flags & FIN for s in segments) and segments[-1].flags == RST | ACK
    assert talk.gone


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
@pytest.mark.parametrize("data", [b"", b"an answer"])
def test_an_end_before_the_reset_is_both(features: Any, data: bytes) -> None:
    """EPIPE: the peer had sent FIN when it reset the connection."""
    talk = near(features=features)
    talk.host(data, error=errno.EPIPE)
    segments = talk.taken()
    assert b"".join(s.payload for s in segments) == data
    assert [s.flags & (FIN | RST) for s in segments] == [FIN, RST]
    assert talk.gone


@pytest.mark.parametrize("bits", [0x4000, 0x0000, 0xF000])
def test_lying_data_offset_is_counted(bits: int) -> None:
    talk = near()
    start = 64
    raw = bytearray(20)
    raw[12:14] = (bits | ACK).to_bytes(2, "big")
    talk.ctx.pool.buf[start : start + 20] = raw
    talk.tcp.tap_handler(talk.key, [start, start + 20], talk.now)
    assert talk.ctx.drops["tcp header length"] == 1
    talk.expect_nothing()


# Host to guest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_data_is_peeked_sent_and_dropped_when_acknowledged(features: Any) -> None:
    talk = open_connection(features=features)
    data = os.urandom(20000)
    talk.host(data)
    s = talk.expect(ACK | PSH, data, seq=1)
    assert s.gso_size == 1460
    assert talk.sock.incoming == data  # still there: the guest may lose it
    talk.guest(ACK)
    assert talk.sock.incoming == b""
    talk.host(b"more")
    talk.expect(ACK | PSH, b"more", seq=20001)


@pytest.mark.parametrize("v6", [False, True])
def test_frames_are_what_scapy_would_build(v6: bool) -> None:
    talk = open_connection(v6=v6)
    talk.host(b"hello")
    frame = Ether(link(talk.ctx).take()[0])
    length = frame[TCP].chksum
    # The checksum is partial: the pseudo-header's. Completed over the segment it must be what scapy computes.
    segment = bytes(frame[TCP])
    total = sum(int.from_bytes(segment[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(segment), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    rebuilt = frame.copy()
    del rebuilt[TCP].chksum
    if v6:
        assert frame[IPv6].hlim == 255 and frame[IPv6].fl != 0 and frame[IPv6].plen == 25
    else:
        del rebuilt[IP].chksum
    rebuilt = Ether(bytes(rebuilt))
    assert rebuilt[TCP].chksum == 0xFFFF - total, length
    if not v6:
        assert rebuilt[IP].chksum == frame[IP].chksum and frame[IP].len == 45


def test_super_frames_are_cut_at_a_multiple_of_the_mss() -> None:
    talk = open_connection()
    talk.window = 65535
    talk.guest(ACK)
    data = os.urandom(200_000)
    talk.host(data)
    frames = talk.taken()
    assert b"".join(s.payload for s in frames) == data
    assert all(len(s.payload) % 1460 == 0 for s in frames[:-1])
    assert [bool(s.flags & PSH) for s in frames] == [False] * (len(frames) - 1) + [True]
    assert max(len(s.payload) for s in frames) <= 65495


def test_no_more_than_the_guests_window() -> None:
    talk = open_connection()
    talk.guest(ACK, window=16)  # scaled by 7
    talk.host(bytes(5000))
    s = talk.expect(ACK | PSH)
    assert len(s.payload) == 2048
    talk.guest(ACK, window=16)
    s = talk.expect(ACK | PSH, seq=2049)
    assert len(s.payload) == 2048


def test_an_answer_in_two_writes_does_not_wait() -> None:
    """The window is but a little more than one segment, as at MTU 65520: all that is queued fits, so it goes out."""
    talk = near()
    talk.guest(ACK, window=12)  # 1536 bytes
    talk.host(b"HTTP/1.0 200 OK")
    talk.expect(ACK | PSH, b"HTTP/1.0 200 OK")
    for part in (b"head" * 64, b"body" * 32):
        talk.host(part)
        talk.expect(ACK | PSH, part)


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_a_rest_that_does_not_fit_waits_for_the_window(features: Any) -> None:
    """Less than half the largest window, and more is queued: the bytes that were looked at are sent later, once."""
    talk = near(features=features)
    talk.guest(ACK, window=12)  # 1536 bytes
    talk.host(b"a" * 1000)
    talk.expect(ACK | PSH, b"a" * 1000)
    talk.host(b"b" * 600)
    talk.expect_nothing()
    talk.guest(ACK, ack=1001, window=12)
    talk.expect(ACK | PSH, b"b" * 600)


def test_half_of_the_largest_window_is_enough() -> None:
    talk = Talk(peer=GATEWAY4)
    talk.window = 12  # 1536 bytes
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    talk.host(b"a" * 700)
    talk.expect(ACK | PSH, b"a" * 700)
    talk.host(b"b" * 2000)
    talk.expect(ACK | PSH, b"b" * 836)


def test_the_socket_is_not_asked_while_an_acknowledgement_must_come() -> None:
    """With two segments in flight the guest acknowledges at once (RFC 9293, 3.8.6.3)."""
    talk = near()
    talk.guest(ACK, window=32)  # 4096 bytes
    talk.host(b"a" * 2920)
    talk.taken()
    peeks = talk.sock.peeks
    talk.guest(ACK, ack=1001, window=24)
    talk.host(b"b" * 100)
    assert talk.sock.peeks == peeks + 1  # 1080 of 4096 bytes are open
    talk.taken()


def test_a_silly_window_is_not_used_while_data_is_in_flight() -> None:
    talk = open_connection()
    talk.guest(ACK, window=12)  # 1536 bytes
    talk.host(bytes(5000))
    assert len(talk.expect(ACK | PSH).payload) == 1536
    talk.guest(ACK, ack=1001, window=12)  # opens by 1000 bytes, less than a segment
    talk.expect_nothing()
    talk.guest(ACK, ack=1537, window=12)
    assert len(talk.expect(ACK | PSH).payload) == 1536


def test_the_rest_of_a_large_amount_is_dropped_at_once() -> None:
    """It would pin the kernel's buffer, keep the receive window closed, and so the host peer silent."""
    talk = open_connection()
    talk.host(bytes(30000))
    talk.guest(ACK, ack=20001)
    talk.guest(ACK, ack=30001)
    assert talk.sock.incoming == b""


def test_small_amounts_are_dropped_together_and_soon() -> None:
    talk = open_connection()
    for i in range(10):
        talk.host(b"x")
        talk.guest(ACK, ack=2 + i)
    assert len(talk.sock.incoming) == 10
    talk.wait(0.011)
    assert talk.sock.incoming == b""
    for i in range(100):
        talk.host(b"x")
        talk.guest(ACK, ack=12 + i)
        assert len(talk.sock.incoming) <= 33


def test_a_short_peek_is_not_repeated() -> None:
    talk = open_connection()
    talk.host(b"x" * 100)
    talk.expect(ACK | PSH)
    peeks = talk.sock.peeks
    talk.guest(ACK)
    assert talk.sock.peeks == peeks


def test_urgent_data_is_part_of_the_stream() -> None:
    talk = open_connection()
    talk.sock.incoming += b"abc"
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN | EPOLLPRI, talk.now)
    talk.expect(ACK | PSH, b"abc")
    assert talk.sock.options[socket.SOL_SOCKET, socket.SO_OOBINLINE] == 1
    talk.sock.incoming += b"d"
    talk.sock.ended = True
    talk.host(end=True)
    frames = talk.taken()
    assert frames[0].payload == b"d" and frames[-1].flags & FIN


def test_urgent_data_in_one_event_with_a_reset_is_all_told() -> None:
    """A peek ends at the mark, and what is behind it goes to the guest before RST."""
    talk = open_connection()
    sock = talk.sock
    sock.incoming += b"before!behind"
    whole, marks = sock._peek, [7, 13]
    sock._peek = lambda offset, n: whole(offset, min(n, next(m for m in (*marks, 99) if m > offset) - offset))
    sock.error, sock.failed = errno.ECONNRESET, True
    reactor(talk.ctx).fire(sock.fd, EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLERR | EPOLLHUP, talk.now)
    segments = talk.taken()
    assert b"".join(s.payload for s in segments) == b"before!behind"
    assert segments[-1].flags & RST and talk.gone


def test_a_stream_of_urgent_data_lets_others_have_their_turn() -> None:
    """A peer that moves the mark on as fast as it is reached gets CUTS_MAX peeks, and then another event."""
    talk = open_connection()
    sock = talk.sock
    whole, peeks = sock._peek, 0

    def one_more(offset: int, n: int) -> bytes:
        nonlocal peeks
        peeks += 1
        assert peeks < 1000, "one turn has no end"
        sock.incoming += b"!"
        return whole(offset, 1)

    sock._peek = one_more
    sock.incoming += b"!"
    watched = reactor(talk.ctx).events.pop(sock.fd)
    reactor(talk.ctx).fire(sock.fd, EPOLLIN | EPOLLPRI, talk.now)
    assert len(talk.taken()) == CUTS_MAX
    assert reactor(talk.ctx).events[sock.fd] == watched, "the event is requested again"
    sock._peek = whole
    reactor(talk.ctx).fire(sock.fd, EPOLLIN, talk.now)
    talk.expect(ACK | PSH, b"!")
    assert next(iter(talk.tcp._conns.values())).drained


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_duplicate_acknowledgement_resends_one_frame_and_partial_ones_the_next(features: Any) -> None:
    talk = open_connection(features=features)
    talk.guest(ACK)
    data = os.urandom(150_000)
    talk.host(data)
    first, second, third = talk.taken()
    talk.guest(ACK, ack=1)
    again = talk.expect(ACK | PSH, first.payload, seq=1)
    talk.guest(ACK, ack=1)  # one repair at a time
    talk.expect_nothing()
    talk.guest(ACK, ack=1 + len(again.payload))
    talk.expect(ACK | PSH, second.payload, seq=second.seq)
    talk.guest(ACK, ack=150_001)
    talk.expect_nothing()
    assert talk.sock.incoming == b""
    talk.host(b"on")
    talk.expect(ACK | PSH, b"on", seq=150_001)
    assert third.seq > second.seq


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_unanswered_data_is_sent_again_with_backoff_then_given_up(features: Any) -> None:
    talk = open_connection(features=features)
    talk.host(b"lost")
    talk.expect(ACK | PSH, b"lost")
    delay = talk.ctx.link.rto_min
    at = talk.now + delay
    end = at + GIVE_UP
    while at < end:
        talk.until(at)
        talk.expect(ACK | PSH, b"lost", seq=1)
        delay = min(2 * delay, RTO_MAX)
        at += delay
    assert delay == RTO_MAX
    talk.until(end)
    talk.expect(RST | ACK)
    assert talk.gone and talk.sock.resets_on_close


@pytest.mark.parametrize("sack", [True, False])
def test_acknowledgement_ends_the_backoff(sack: bool) -> None:
    """Without SACK, only data that went through at the first attempt does (Karn; RFC 6298, 5.7)."""
    talk = open_connection(sack=sack)
    rto = talk.ctx.link.rto_min
    talk.host(b"a")
    talk.expect(ACK | PSH)
    talk.wait(3.0)
    talk.taken()
    talk.guest(ACK, ack=2)
    talk.host(b"b")
    talk.expect(ACK | PSH, b"b", seq=2)
    if not sack:
        talk.wait(rto)
        talk.expect_nothing()
        talk.guest(ACK, ack=3)
        talk.host(b"b")
        talk.expect(ACK | PSH, b"b", seq=3)
    talk.wait(4 * rto)
    assert talk.taken()


def test_zero_window_is_probed_without_end() -> None:
    talk = open_connection()
    talk.guest(ACK, window=0)
    talk.host(b"waiting")
    talk.expect_nothing()
    sent = 0
    for _ in range(40):
        talk.wait(60.0)
        for s in talk.taken():
            assert (s.flags, s.seq, s.payload) == (ACK, 0, b"")  # one before snd_una
            sent += 1
            talk.guest(ACK, window=0)
    assert 35 < sent < 60 and not talk.sock.closed
    talk.guest(ACK, window=100)
    talk.expect(ACK | PSH, b"waiting", seq=1)


def test_idle_connection_is_kept_while_the_guest_answers() -> None:
    talk = open_connection()
    talk.wait(7199)
    talk.expect_nothing()
    talk.wait(1)
    talk.expect(ACK, b"", seq=0)
    talk.guest(ACK)
    talk.wait(7199)
    talk.expect_nothing()
    talk.wait(1 + 75 * 8)
    s = talk.taken()
    assert [x.flags for x in s] == [ACK] * 8 + [RST | ACK]
    assert talk.gone


# Everything at once ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.binary(min_size=1, max_size=3000),
    st.lists(st.tuples(st.integers(0, 2999), st.integers(1, 700)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_order_of_segments_delivers_each_byte_once(data: bytes, extra: list[tuple[int, int]], random: Any) -> None:
    """The guest repeats, overlaps and reorders segments: the socket gets a prefix at any time, in the end all of it."""
    FakeSocket.made.clear()
    talk = near()
    pieces = [(i, data[i : i + 500]) for i in range(0, len(data), 500)]
    pieces += [(a, data[a : a + n]) for a, n in extra if a < len(data)]
    random.shuffle(pieces)
    for a, piece in pieces:
        talk.guest(ACK, piece, seq=1 + a)
        assert data.startswith(bytes(talk.sock.sent))
    for a in range(0, len(data), 500):
        talk.guest(ACK, data[a : a + 500], seq=1 + a)
    assert talk.sock.sent == data
    assert talk.taken()[-1].ack == 1 + len(data)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["host", "ack", "part", "dup", "time", "zero"]), max_size=40), st.booleans())
def test_any_acknowledgements_deliver_each_byte_once(steps: list[str], peek_off: bool) -> None:
    """The guest acknowledges and loses segments at will: it can only assemble a prefix of what the host sent."""
    FakeSocket.made.clear()
    talk = open_connection(features=ALL if peek_off else NO_PEEK_OFF)
    talk.guest(ACK)
    sent = b""
    got: set[int] = set()  # places of bytes
    acked = have = 0
    for i, step in enumerate([*steps, *["host", "ack", "time", "ack"] * 12]):
        if step == "host":
            data = bytes((i & 0xFF,)) * (700 * (i % 7) + 1)
            sent += data
            talk.host(data)
        elif step in ("ack", "part"):
            while have in got:
                have += 1
            acked = have if step == "ack" else max(acked, have // 2)
            talk.guest(ACK, ack=1 + acked)
        elif step == "dup":
            talk.guest(ACK, ack=1 + acked)
        elif step == "zero":
            talk.guest(ACK, ack=1 + acked, window=0)
            talk.guest(ACK, ack=1 + acked)
        else:
            talk.wait(1.0)
        for s in talk.taken():
            place = range(s.seq - 1, s.seq - 1 + len(s.payload))
            assert s.payload == sent[place.start : place.stop]
            got.update(place)
    assert acked == len(sent)


# Found by fuzzing ----------------------------------------------------------------------------------------------------


def test_data_that_waited_for_the_handshake_is_sent_once() -> None:
    """The segment that acknowledges our SYN, SYN does not acknowledge anything else twice."""
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK, seq=0, ack=1)
    talk.host(b"220 ready")
    talk.window = 1000
    talk.guest(ACK)
    talk.expect(ACK | PSH, b"220 ready")


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_retransmission_is_not_put_off_by_what_acknowledges_nothing(more: bytes) -> None:
    """RFC 6298, 5: the timer starts with the first byte in flight, and again when some are acknowledged."""
    talk = open_connection()
    talk.host(b"lost")
    talk.expect(ACK | PSH, b"lost")
    rto = talk.ctx.link.rto_min
    talk.wait(rto)
    talk.expect(ACK | PSH, b"lost")  # and that is lost, too
    for i in range(8):
        talk.wait(0.4 * rto)
        talk.guest(ACK, b"upload", ack=1, window=60000 + i)
        if more:
            talk.host(more)
    assert b"lost" in [s.payload[:4] for s in talk.taken()]


def test_end_behind_urgent_data_without_peek_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peek stops at the mark, however much lies behind it: that is not the end."""
    original = FakeSocket._peek

    def peek(sock: FakeSocket, offset: int, n: int) -> bytes:
        at = 8 - taken(sock)
        return original(sock, offset, at - offset if offset < at < offset + n else n)

    def taken(sock: FakeSocket) -> int:
        return 16 - len(sock.incoming)

    talk = open_connection(features=replace(ALL, peek_off=False))
    talk.sock.incoming += b"before--" + b"behind--"
    monkeypatch.setattr(FakeSocket, "_peek", peek)
    talk.sock.ended = True
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN | EPOLLPRI | EPOLLRDHUP, talk.now)
    talk.expect(ACK | PSH, b"before--")
    talk.guest(ACK, ack=9)
    talk.expect(ACK | PSH, b"behind--")
    talk.guest(ACK, ack=17)
    talk.expect(ACK | FIN, b"")


@pytest.mark.parametrize("end", [False, True])
def test_what_is_to_be_sent_again_is_acknowledged_after_all(end: bool) -> None:
    """The window closed, so nothing could be sent again; the guest has it all the same."""
    talk = open_connection()
    talk.host(b"arrived", end=end)
    talk.expect(ACK | PSH | (FIN if end else 0), b"arrived")
    talk.guest(ACK, ack=1, window=0)
    talk.wait(1.5)
    talk.taken()
    talk.guest(ACK, ack=9 if end else 8)
    if end:
        talk.guest(ACK | FIN, ack=9)
        talk.expect(ACK, b"")
        assert talk.gone
    else:
        talk.host(b"more")
        talk.expect(ACK | PSH, b"more", seq=8)
