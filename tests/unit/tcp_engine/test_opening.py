"""Connections of host clients to the guest: opening, refusal, limits; and that they are like others from then on."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import addr, log
from passt.flow.neighbours import HELD_MAX, HOLD, SOLICIT_MAX
from passt.flow.table import FlowTable
from passt.linux.sockopt import SO_PEEK_OFF
from passt.linux.tcpinfo import BYTES_ACKED, TCP_CLOSE, probe, tcp_info, u64
from passt.loop.reactor import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, make_ref
from passt.loop.timers import NO_OWNER
from passt.policy.guest import Guest
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import SYN_TIMEOUT, WINDOW_DEFAULT, event_text
from passt.tcp_engine.table import HALF_OPEN_MAX, OPENING_MAX
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN, SynOptions
from tests.unit.oracle import recomputed
from tests.unit.support import (
    GATEWAY4,
    GATEWAY6,
    GUEST4,
    GUEST6,
    GUEST_LL,
    GUEST_MAC,
    IP4,
    IP6,
    T0,
    elapse,
    link,
    reactor,
    timers,
)
from tests.unit.tcp_engine.test_output import completed
from tests.unit.tcp_support import (
    ALL,
    GUEST_ISN,
    PEER_PORT,
    FakeSocket,
    Talk,
    accepted_connection,
    accepted_socket,
    fake_sockets,
    listener,
)

__all__ = ["fake_sockets"]
NO_PEEK_OFF = replace(ALL, peek_off=False)
PEER4, PEER6 = "198.51.100.7", "2001:db8:ffff::7"
PORTS = (80).to_bytes(2, "big") + PEER_PORT.to_bytes(2, "big")
BOTH = pytest.mark.parametrize("peer", [PEER4, PEER6])


def asked(peer: str = PEER4, **how: Any) -> Talk:
    """A conversation in which SYN went to the guest."""
    talk = Talk(**how)
    talk.accept(peer)
    talk.expect(SYN, seq=0)
    return talk


def refuse(talk: Talk) -> None:
    """The guest has no server there."""
    talk.put((RST | ACK, 0, talk.isn + 1, b"", 0, b""))


def ends(talk: Talk) -> tuple[str, str]:
    """(guest, peer) of the conversation."""
    n = (len(talk.key) - 4) // 2
    return addr.text(talk.key[:n]), addr.text(talk.key[n : 2 * n])


def turned_away(talk: Talk, reason: str) -> bool:
    """The last client was reset, that was counted, and nothing went to the guest."""
    talk.expect_nothing()
    talk.end_turn()
    return talk.sock.closed and talk.sock.resets_on_close and talk.ctx.drops == {reason: 1}


# The handshake -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peer", "guest", "mss"), [(PEER4, GUEST4, 1460), (PEER6, GUEST6, 1440)])
def test_handshake(peer: str, guest: bytes, mss: int) -> None:
    talk = Talk(config={"mtu": 1500})
    sock = talk.accept(peer)
    s = talk.expect(SYN, b"", seq=0, ack=0, window=WINDOW_DEFAULT)
    assert s.options == SynOptions(mss, 8, sack=True)
    assert talk.key == guest + addr.packed(peer) + PORTS
    talk.answer()
    talk.expect(ACK, b"", seq=1, ack=1, window=WINDOW_DEFAULT >> 8)
    assert not sock.closed and sock.sent == b"" and not talk.ctx.drops
    assert reactor(talk.ctx).events[sock.fd] == EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET


@BOTH
def test_syn_is_what_scapy_would_build(peer: str) -> None:
    talk = Talk()
    talk.accept(peer)
    raw = completed(link(talk.ctx).take()[0], 34 if peer == PEER4 else 54)
    assert recomputed(raw) == raw
    frame = Ether(raw)
    ip = frame[IP] if IP in frame else frame[IPv6]
    assert frame.dst == addr.mac_text(GUEST_MAC) and ip.src == peer
    assert frame[TCP].sport == PEER_PORT and frame[TCP].dport == 80
    assert frame[TCP].flags == "S" and frame[TCP].ack == 0


def test_client_of_a_listener_of_both_families() -> None:
    """The socket is one of IPv6, its peer is mapped: what the guest sees is IPv4."""
    talk = Talk()
    sock = talk.accept(PEER4, dual=True)
    assert sock.family == socket.AF_INET6
    talk.expect(SYN)
    assert talk.key == GUEST4 + addr.packed(PEER4) + PORTS


def test_no_option_is_set_for_each_connection() -> None:
    talk = Talk()
    sock = accepted_socket(addr.packed(PEER4))
    inherited = dict(sock.options)
    assert inherited == {
        (socket.SOL_SOCKET, SO_PEEK_OFF): 0,
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        (socket.SOL_SOCKET, socket.SO_OOBINLINE): 1,
    }
    talk.tcp.opening.accepted(listener(), sock, addr.packed(PEER4), PEER_PORT, talk.now)
    talk.expect(SYN)
    talk.answer()
    talk.expect(ACK)
    assert sock.options == inherited


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_accepted_sockets_inherit(family: socket.AddressFamily) -> None:
    """`prepare_listener` and `tcp_engine/window.py` rely on it: the test asks the running kernel."""
    features = probe()
    with socket.socket(family) as server, socket.socket(family) as client:
        tcp_sock.prepare_listener(server, features)
        server.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
            if features.peek_off:
                assert accepted.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == 0
            if features.bytes_acked:
                assert [u64(tcp_info(s), BYTES_ACKED) for s in (accepted, client)] == [0, 1]


def test_listener_without_peek_offset() -> None:
    assert (socket.SOL_SOCKET, SO_PEEK_OFF) not in accepted_socket(addr.packed(PEER4), NO_PEEK_OFF).options


def test_without_window_scale_nothing_is_scaled() -> None:
    talk = asked()
    talk.answer(ws=None)
    talk.expect(ACK, window=WINDOW_DEFAULT)
    talk.guest(ACK, window=1000)
    talk.host(bytes(5000))
    assert len(talk.expect(ACK | PSH).payload) == 1000


def test_window_of_the_syn_ack_is_not_scaled() -> None:
    talk = asked()
    talk.sock.incoming += bytes(200_000)
    talk.host(b"x")
    talk.answer(ws=7)
    assert sum(len(s.payload) for s in talk.taken()) == 64240
    talk.guest(ACK, ack=64241, window=100)
    assert sum(len(s.payload) for s in talk.taken()) == 12800


@pytest.mark.parametrize(("peer", "mss"), [(PEER4, 536), (PEER6, 1220)])
def test_without_options(peer: str, mss: int) -> None:
    talk = asked(peer)
    talk.answer(options=b"")
    talk.expect(ACK)
    talk.host(bytes(3000))
    assert talk.expect(ACK | PSH).gso_size == mss


@pytest.mark.parametrize(("told", "used"), [(1000, 1000), (1, 28), (65535, 1460)])
def test_segments_have_the_guests_size(told: int, used: int) -> None:
    talk = asked(config={"mtu": 1500})
    talk.answer(mss=told)
    talk.expect(ACK)
    talk.host(bytes(3000))
    assert talk.expect(ACK | PSH).gso_size == used


def test_malformed_options_are_no_answer() -> None:
    talk = asked()
    talk.answer(options=b"\x02\x00\x05\xb4")
    talk.expect_nothing()
    assert talk.ctx.drops == {"tcp option length": 1}
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)


def test_initial_sequence_number_depends_on_the_endpoints() -> None:
    first, second = asked(PEER4), asked("198.51.100.8")
    assert first.isn != second.isn


def test_syn_is_repeated_then_given_up_after_ten_seconds() -> None:
    talk = asked()
    delay = rto_min = talk.ctx.link.rto_min
    at = T0 + delay
    while at < T0 + SYN_TIMEOUT:
        talk.until(at)
        talk.expect(SYN, seq=0, window=WINDOW_DEFAULT)
        delay *= 2
        at += delay
    assert delay > rto_min * 64
    talk.until(T0 + SYN_TIMEOUT)
    talk.expect(RST, seq=1)  # without ACK: there is nothing yet to acknowledge
    assert talk.gone and talk.sock.resets_on_close
    assert talk.tcp._table.half_open == 0


def test_answer_after_a_while() -> None:
    talk = asked()
    talk.wait(3.5)
    talk.taken()
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)
    talk.wait(60)
    talk.expect_nothing()


def test_repeated_syn_ack_is_acknowledged_again() -> None:
    talk = accepted_connection()
    talk.answer()
    talk.expect(ACK, b"", seq=1, ack=1)
    talk.host(b"data")
    talk.expect(ACK | PSH, b"data", seq=1)
    talk.answer()
    talk.expect(ACK, b"", seq=5, ack=1)


def test_syn_ack_and_data_in_one_batch() -> None:
    talk = asked()
    syn_ack = (SYN | ACK, GUEST_ISN, talk.isn + 1, b"", 64240, SynOptions(1460, 7).emit())
    talk.ack = 1
    talk.put(syn_ack, talk.segment(ACK | PSH, b"banner", seq=1))
    assert talk.sock.sent == b"banner"
    assert [(s.flags, s.ack) for s in talk.taken()] == [(ACK, 1), (ACK, 7)]


def test_data_before_the_syn_ack_is_ignored() -> None:
    talk = asked()
    talk.guest(ACK | PSH, b"early", seq=1, ack=1)
    talk.expect_nothing()
    assert talk.sock.sent == b""
    talk.answer()
    talk.expect(ACK, ack=1)
    talk.guest(ACK | PSH, b"early", ack=1)
    assert talk.sock.sent == b"early"


@pytest.mark.parametrize("flags", [ACK, SYN | ACK, ACK | PSH])
def test_wrong_acknowledgement_is_reset_and_the_guest_asked_again(flags: int) -> None:
    """An old connection of the guest is in the way; RST ends it, so SYN may succeed now."""
    talk = asked()
    talk.put((flags, GUEST_ISN, talk.isn + 5000, b"", 1000, b""))
    reset, again = talk.taken()
    assert (reset.flags, reset.seq) == (RST, 5000) and (again.flags, again.seq) == (SYN, 0)
    talk.put((flags, GUEST_ISN, talk.isn + 5000, b"", 1000, b""))
    talk.expect(RST, seq=5000)  # once is enough
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)


@pytest.mark.parametrize("ack", [0, 2, 0x80000001])
def test_acknowledgement_must_be_exact(ack: int) -> None:
    talk = asked()
    talk.answer(ack=ack)
    assert [s.flags for s in talk.taken()] == [RST, SYN]


def test_both_connect_at_once() -> None:
    """RFC 9293, 3.5: the guest's own SYN is left alone, since it answers ours."""
    talk = asked()
    talk.put((SYN, GUEST_ISN, 0, b"", 64240, SynOptions(1460, 7).emit()))
    talk.expect_nothing()
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)
    talk.guest(ACK | PSH, b"both")
    assert talk.sock.sent == b"both"


@pytest.mark.parametrize("flags", [FIN, FIN | ACK, PSH, 0])
def test_what_else_may_come_is_ignored(flags: int) -> None:
    talk = asked()
    talk.put((flags, GUEST_ISN, talk.isn + 1, b"x", 1000, b""))
    talk.expect_nothing()
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)


@pytest.mark.parametrize("flags", [SYN | ACK, SYN | ACK | RST])
def test_lying_data_offset_is_counted(flags: int) -> None:
    talk = asked()
    raw = bytearray(20)
    raw[12:14] = (0x4000 | flags).to_bytes(2, "big")
    talk.ctx.pool.buf[64:84] = raw
    talk.tcp.tap_handler(talk.key, [64, 84], talk.now)
    assert talk.ctx.drops == {"tcp header length": 1}
    talk.expect_nothing()


# Actions of the client meanwhile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
def test_early_data_waits_and_rides_on_the_acknowledgement(features: Any) -> None:
    talk = asked(features=features)
    talk.host(b"GET / HTTP/1.0\r\n\r\n")
    talk.expect_nothing()
    assert talk.sock.peeks == 0
    talk.answer()
    talk.expect(ACK | PSH, b"GET / HTTP/1.0\r\n\r\n", seq=1, ack=1)
    talk.guest(ACK)
    talk.wait(0.02)
    assert talk.sock.incoming == b""


def test_early_data_and_no_window_for_it() -> None:
    talk = asked()
    talk.host(b"data")
    talk.put((SYN | ACK, GUEST_ISN, talk.isn + 1, b"", 0, SynOptions(1460, 7).emit()))
    talk.expect(ACK, b"", seq=1, ack=1)
    talk.seq = 1
    talk.guest(ACK)
    talk.expect(ACK | PSH, b"data", seq=1)


def test_early_event_without_data() -> None:
    talk = asked()
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN, talk.now)
    talk.answer()
    talk.expect(ACK, b"", seq=1, ack=1)


@pytest.mark.parametrize("data", [b"", b"question"])
def test_early_fin_comes_after_the_data(data: bytes) -> None:
    talk = asked()
    talk.host(data, end=True)
    talk.expect_nothing()
    talk.answer()
    talk.expect(FIN | ACK | (PSH if data else 0), data, seq=1, ack=1)
    talk.guest(ACK)
    talk.guest(ACK | PSH, b"answer")
    assert talk.sock.sent == b"answer"
    talk.guest(FIN | ACK)
    assert talk.taken()[-1].ack == 8
    assert talk.gone and not talk.sock.resets_on_close and talk.sock.incoming == b""


def test_early_reset_reaches_the_guest_behind_the_data_before_it() -> None:
    """As on the bare kernel, where a server accepts the connection, reads the data, and gets ECONNRESET then."""
    talk = asked()
    talk.host(b"data", error=errno.ECONNRESET)
    talk.expect_nothing()
    talk.answer()
    ack, data, rst = talk.taken()
    assert (ack.flags, ack.ack) == (ACK, 1)
    assert (data.flags, data.payload, rst.flags, rst.seq) == (ACK | PSH, b"data", RST | ACK, 5)
    assert talk.gone and talk.tcp._table.half_open == 0 and not talk.tcp._table.failed


def test_a_client_that_only_resets_is_accepted_first() -> None:
    talk = asked()
    talk.host(error=errno.ECONNRESET)
    talk.answer()
    ack, rst = talk.taken()
    assert (ack.flags, rst.flags, rst.seq) == (ACK, RST | ACK, 1)
    assert talk.gone


def test_a_client_that_resets_is_forgotten_when_the_guest_does_not_answer() -> None:
    talk = asked()
    talk.host(b"data", error=errno.ECONNRESET)
    talk.wait(11)
    assert talk.taken()[-1].flags == RST and talk.gone and not talk.tcp._table.failed


def test_urgent_data_comes_early() -> None:
    talk = asked()
    talk.sock.incoming += b"ab"
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLIN | EPOLLPRI, talk.now)
    talk.answer()
    talk.expect(ACK | PSH, b"ab", seq=1)
    talk.host(b"c")
    talk.expect(ACK | PSH, b"c")


# Refusal -------------------------------------------------------------------------------------------------------------


@BOTH
def test_refused_client_is_reset(peer: str) -> None:
    talk = asked(peer)
    refuse(talk)
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close and talk.tcp._table.half_open == 0


@pytest.mark.parametrize(("flags", "ack"), [(RST, 1), (RST, 0), (RST | ACK, 0), (RST | ACK, 2)])
def test_reset_that_any_host_could_have_sent_is_ignored(flags: int, ack: int) -> None:
    talk = asked()
    talk.put((flags, 0, talk.isn + ack, b"", 0, b""))
    talk.expect_nothing()
    assert talk.ctx.drops == {"tcp reset out of window": 1} and not talk.sock.closed
    talk.answer()
    talk.expect(ACK, seq=1)


@pytest.mark.parametrize(
    ("client", "first", "second"),
    [
        ("127.0.0.1", ("192.0.2.2", "192.0.2.1"), ("fe80::5054:ff:fe12:3456", "fe80::1")),
        ("127.9.9.9", ("192.0.2.2", "192.0.2.1"), ("fe80::5054:ff:fe12:3456", "fe80::1")),
        ("::1", ("fe80::5054:ff:fe12:3456", "fe80::1"), ("192.0.2.2", "192.0.2.1")),
    ],
)
def test_loopback_client_is_tried_by_the_other_family(
    client: str, first: tuple[str, str], second: tuple[str, str]
) -> None:
    talk = asked(client)
    assert ends(talk) == first
    talk.host(b"hello")
    refuse(talk)
    s = talk.expect(SYN, seq=0, window=WINDOW_DEFAULT)
    assert ends(talk) == second and s.options.mss == 65520 - (40 if len(talk.key) == 12 else 60)
    assert len(FakeSocket.made) == 1 and not talk.sock.closed
    talk.wait(talk.ctx.link.rto_min)
    talk.expect(SYN, seq=0)
    talk.answer()
    talk.expect(ACK | PSH, b"hello", seq=1, ack=1)
    talk.guest(ACK | PSH, b"answer")
    assert talk.sock.sent == b"answer"
    assert talk.tcp._table.half_open == 0


@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
def test_other_family_is_tried_once(client: str) -> None:
    talk = asked(client)
    refuse(talk)
    talk.expect(SYN)
    refuse(talk)
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close and talk.tcp._table.half_open == 0


def test_silence_does_not_lead_to_the_other_family() -> None:
    talk = asked("127.0.0.1")
    talk.wait(10)
    *syns, last = [s.flags for s in talk.taken()]
    assert set(syns) == {SYN} and last == RST
    assert talk.gone


@pytest.mark.parametrize(
    "how",
    [
        {"config": {"ip6": None}},
        {"config": {"ip6": replace(IP6, map_host_loopback=None, our_ll=GUEST_LL)}},  # the guest's own: no source
    ],
)
def test_no_other_family_to_try(how: dict[str, Any]) -> None:
    talk = asked("127.0.0.1", **how)
    refuse(talk)
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close


def test_other_family_whose_endpoints_are_in_use() -> None:
    talk = asked("::1")
    talk.answer()
    talk.expect(ACK)
    v6 = talk.key
    talk.accept("127.0.0.1")
    talk.expect(SYN)
    assert talk.key != v6
    refuse(talk)
    talk.expect_nothing()
    talk.end_turn()
    first, second = FakeSocket.made
    assert second.closed and second.resets_on_close and not first.closed


def test_segment_for_the_family_that_refused_is_of_no_connection() -> None:
    talk = asked("127.0.0.1")
    rst = RST | ACK, 0, talk.isn + 1, b"", 0, b""
    talk.put(rst, (SYN | ACK, GUEST_ISN, talk.isn + 1, b"", 1000, b""))
    syn, stray = sorted(Ether(f)[TCP].flags.value for f in link(talk.ctx).take())
    assert (syn, stray) == (SYN, RST)


# Clients that cannot be served ---------------------------------------------------------------------------------------


def test_silence_when_disabled() -> None:
    talk = Talk(config={"no_tcp": True})
    talk.accept(PEER4)
    assert turned_away(talk, "tcp disabled")


@pytest.mark.parametrize(("peer", "off"), [(PEER4, "ip4"), (PEER6, "ip6")])
def test_family_that_is_off(peer: str, off: str) -> None:
    talk = Talk(config={off: None})
    talk.accept(peer)
    assert turned_away(talk, "tcp inbound: no address")


@BOTH
def test_guest_that_was_never_seen(peer: str) -> None:
    talk = Talk()
    talk.ctx.guest = Guest(mac=GUEST_MAC)
    talk.accept(peer)
    assert turned_away(talk, "tcp inbound: no address")
    talk.tcp.opening.accepted(listener(), accepted_socket(addr.packed("::1")), addr.packed("::1"), PEER_PORT, talk.now)
    assert talk.ctx.drops == {"tcp inbound: no address": 2}


def test_source_that_the_guest_could_not_answer_to() -> None:
    talk = Talk(config={"ip4": replace(IP4, map_host_loopback=None, our_addr=None, gateway=None), "ip6": None})
    talk.accept("127.0.0.1")
    assert turned_away(talk, "tcp inbound: no address")


def test_loopback_client_of_a_family_that_is_off() -> None:
    talk = Talk(config={"ip6": None})
    talk.accept("::1")
    talk.expect(SYN)
    assert ends(talk) == ("192.0.2.2", "192.0.2.1")


def test_guest_itself_as_target_and_source() -> None:
    """Such a frame no guest would take."""
    talk = Talk()
    talk.accept(PEER4, target=addr.packed(PEER4))
    assert turned_away(talk, "tcp inbound: no address")


def test_endpoints_in_use() -> None:
    talk = accepted_connection()
    talk.accept(PEER4)
    assert turned_away(talk, "tcp inbound: endpoints in use")
    first, _ = FakeSocket.made
    talk.guest(ACK | PSH, b"alive")
    assert first.sent == b"alive" and not first.closed


def test_a_client_that_comes_back_before_we_heard_of_its_end() -> None:
    """Its kernel had the port free for it again, so the first connection is gone: the guest is told, and asked anew."""
    talk = accepted_connection()
    talk.sock.info[0] = TCP_CLOSE
    first = talk.sock
    talk.accept(PEER4)
    assert [s.flags for s in talk.taken()] == [RST | ACK, SYN]
    talk.end_turn()
    assert first.closed and not talk.ctx.drops


def test_a_client_that_comes_back_while_the_guest_still_reads() -> None:
    """Both directions have ended for the host, and the guest has not acknowledged everything: the client waits."""
    talk = over_for_the_host()
    first = talk.sock
    talk.accept(PEER4)
    talk.expect_nothing()
    assert not first.closed and not talk.ctx.drops
    talk.guest(ACK)
    talk.end_turn()
    assert first.closed
    talk.expect(SYN)
    talk.answer()
    talk.expect(ACK, seq=1, ack=1)
    assert not talk.ctx.drops and not talk.tcp._table.successors


def over_for_the_host() -> Talk:
    """The server closed first, then the client, whose last words and FIN the guest has not acknowledged."""
    talk = accepted_connection()
    talk.guest(ACK | FIN)
    talk.taken()
    talk.host(b"last words", end=True)
    talk.expect(ACK | PSH | FIN, b"last words")
    talk.sock.info[0] = TCP_CLOSE
    return talk


def test_a_client_does_not_wait_long_for_a_guest_that_does_not_acknowledge() -> None:
    talk = over_for_the_host()
    talk.accept(PEER4)
    talk.wait(2.9)
    assert all(s.payload == b"last words" for s in talk.taken())
    talk.wait(0.2)
    talk.expect(RST | ACK)
    talk.end_turn()
    talk.expect(SYN)


def test_a_second_client_that_comes_back_is_refused() -> None:
    talk = over_for_the_host()
    talk.accept(PEER4)
    talk.accept(PEER4)
    assert turned_away(talk, "tcp inbound: endpoints in use")
    assert not talk.tcp._conns[talk.key].sock.closed


def test_waiting_clients_are_half_open() -> None:
    talk = over_for_the_host()
    talk.tcp._table.inbound.limit = 1
    talk.accept(PEER4)
    talk.accept("198.51.100.8")
    assert turned_away(talk, "tcp inbound: too many half open")


def test_a_client_that_waits_when_the_guest_goes_is_reset() -> None:
    talk = over_for_the_host()
    talk.accept(PEER4)
    talk.ctx.guest.mac = addr.BROADCAST_MAC
    talk.tcp._table.forget()
    talk.end_turn()
    elapse(talk.ctx, T0, HOLD + SOLICIT_MAX)
    assert turned_away(talk, "tcp inbound: no guest")


def test_a_client_that_comes_back_in_the_turn_in_which_it_was_accepted() -> None:
    """An answer of the guest to the first SYN is none to the second."""
    talk = asked()
    first = talk.isn
    talk.sock.info[0] = TCP_CLOSE
    talk.accept(PEER4)
    rst, syn = talk.taken()
    assert (rst.flags, syn.flags) == (RST, SYN)
    assert talk.isn != first, "of the second, which was sent last"
    talk.put((SYN | ACK, GUEST_ISN + 99, first + 1, b"", 64240, b""))
    assert [s.flags for s in talk.taken()] == [RST, SYN]
    talk.answer()
    talk.expect(ACK, ack=1)


def test_endpoints_in_use_by_the_guests_connection() -> None:
    talk = Talk()
    talk.key = GUEST4 + addr.packed(PEER4) + PORTS
    talk.syn()
    talk.expect(SYN | ACK)
    talk.accept(PEER4)
    assert turned_away(talk, "tcp inbound: endpoints in use")


def test_loopback_client_whose_endpoints_are_in_use() -> None:
    """Two addresses of the loopback are one to the guest; by the other family there is room."""
    talk = asked("127.0.0.1")
    v4 = talk.key
    talk.accept("127.0.0.2")
    talk.expect(SYN)
    assert ends(talk) == (addr.text(GUEST_LL), "fe80::1") and v4 in talk.tcp._conns


def test_endpoints_can_be_used_again() -> None:
    talk = asked()
    refuse(talk)
    talk.accept(PEER4)
    talk.expect(SYN, seq=0)
    talk.answer()
    talk.expect(ACK)


def test_full_table() -> None:
    talk = Talk()
    talk.ctx.flows = FlowTable(limit=0)
    talk.accept(PEER4)
    assert turned_away(talk, "flow table full")
    assert not talk.tcp._conns and talk.tcp._table.half_open == 0


def test_too_many_wait_for_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest makes way; those that the guest has answered do not count, and nothing happens to them."""
    warnings: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: warnings.append(text))
    talk = accepted_connection()
    talk.tcp._table.inbound.limit = 3
    established = talk.sock
    socks = []
    for i in range(3):
        socks.append(talk.accept(f"198.51.100.{10 + i}", to=80 + i))
        talk.expect(SYN)
    third = talk.key
    talk.accept("198.51.100.20", to=83)
    assert [frame[34 + 13] for frame in link(talk.ctx).take()] == [RST, SYN]
    talk.end_turn()
    assert [s.closed for s in socks] == [True, False, False] and socks[0].resets_on_close
    assert talk.ctx.drops == {"tcp inbound: half open: closed to make room": 1}
    assert warnings == ["The guest leaves 3 connections unanswered: new ones take the place of the oldest"]
    talk.wait(10)
    assert third not in talk.tcp._conns
    assert talk.tcp._table.half_open == 0 and talk.ctx.flows.count == 1 and not established.closed


def test_limit_follows_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    from passt.flow import idle

    monkeypatch.setattr(idle.resource, "getrlimit", lambda _: (1024, 4096))
    table = Talk().tcp._table
    assert (table.inbound.limit, table.outbound.limit) == (128, 256)
    monkeypatch.setattr(idle.resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    table = Talk().tcp._table
    assert (table.inbound.limit, table.outbound.limit) == (HALF_OPEN_MAX, OPENING_MAX)


def test_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    talk = Talk()
    monkeypatch.setattr(reactor(talk.ctx), "watch", fail)
    monkeypatch.setattr(log, "warn_ratelimited", lambda *_: None)
    talk.accept(PEER4)
    assert turned_away(talk, "tcp inbound: no descriptor")
    assert talk.gone and talk.tcp._table.half_open == 0 and not reactor(talk.ctx).refs


# The endpoints that the guest and the client see ---------------------------------------------------------------------

OTHER = replace(IP4, map_host_loopback=addr.packed("192.0.2.77"), map_guest_addr=addr.packed("192.0.2.88"))


@pytest.mark.parametrize(
    ("client", "config", "source"),
    [
        (PEER4, {}, PEER4),
        ("127.0.0.1", {}, "192.0.2.1"),
        ("127.0.0.1", {"ip4": OTHER}, "192.0.2.77"),
        ("127.0.0.5", {"ip4": OTHER}, "192.0.2.1"),
        ("192.0.2.2", {}, "192.0.2.1"),  # the host, by the address that the guest has, too
        ("192.0.2.2", {"ip4": OTHER}, "192.0.2.88"),
        (PEER6, {}, PEER6),
        ("2001:db8::2", {}, "fe80::1"),
        ("::1", {}, "fe80::1"),
        ("fe80::99", {}, "fe80::99"),
    ],
)
def test_source(client: str, config: dict[str, Any], source: str) -> None:
    assert ends(asked(client, config=config))[1] == source


@pytest.mark.parametrize(
    ("client", "target"),
    [(PEER4, GUEST4), (PEER6, GUEST6), ("fe80::99", GUEST_LL), ("::1", GUEST_LL), ("127.0.0.1", GUEST4)],
)
def test_target_is_the_address_that_was_seen(client: str, target: bytes) -> None:
    talk = asked(client)
    assert talk.key.startswith(target)
    talk.ctx.guest = Guest(mac=GUEST_MAC, addr4=addr.packed("192.0.2.9"))
    talk.accept("198.51.100.50")
    talk.expect(SYN)
    assert ends(talk)[0] == "192.0.2.9"


def test_target_of_the_rule() -> None:
    talk = Talk()
    talk.accept(PEER4, to=6443, target=addr.packed("192.0.2.20"))
    talk.expect(SYN)
    assert talk.key == addr.packed("192.0.2.20") + addr.packed(PEER4) + (6443).to_bytes(2, "big") + PORTS[2:]
    talk.accept(PEER6, target=addr.packed("192.0.2.20"))
    assert turned_away(talk, "tcp inbound: no address")


@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
def test_target_of_the_rule_and_a_loopback_client_of_either_family(client: str) -> None:
    talk = Talk()
    talk.accept(client, target=addr.packed("192.0.2.20"))
    talk.expect(SYN)
    assert ends(talk) == ("192.0.2.20", addr.text(GATEWAY4))
    refuse(talk)
    assert talk.gone
    talk.accept(client, target=addr.packed("fe80::20"))
    talk.expect(SYN)
    assert ends(talk) == ("fe80::20", addr.text(GATEWAY6))


# From then on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [ALL, NO_PEEK_OFF])
@BOTH
def test_much_data_both_ways(features: Any, peer: str) -> None:
    talk = accepted_connection(peer, features=features)
    talk.guest(ACK)
    down, up = os.urandom(300_000), os.urandom(300_000)
    got = bytearray()
    talk.host(down)
    while len(got) < len(down):
        for s in talk.taken():
            assert s.seq == 1 + len(got)
            got += s.payload
        talk.ack = 1 + len(got)
        talk.guest(ACK)
    assert got == down
    for i in range(0, len(up), 1400):
        talk.guest(ACK, up[i : i + 1400])
    assert talk.sock.sent == up and talk.sock.incoming == b""
    talk.wait(0.05)
    assert talk.taken()[-1].ack == 1 + len(up)


def test_what_the_peer_acknowledged_is_counted_without_syn() -> None:
    talk = accepted_connection()
    talk.sock.info[BYTES_ACKED] = 3000
    talk.guest(ACK, bytes(9000))
    talk.expect(ACK, ack=3001)
    talk.sock.info[BYTES_ACKED] = 9000
    talk.wait(0.02)
    talk.expect(ACK, ack=9001)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "192.0.2.2", "2001:db8::2"])
def test_client_on_this_host_is_near(peer: str) -> None:
    talk = accepted_connection(peer)
    talk.guest(ACK, bytes(80000))
    talk.expect(ACK, ack=80001)


def test_window_grows_with_use() -> None:
    talk = accepted_connection("127.0.0.1")
    talk.guest(ACK, bytes(1000))
    assert talk.expect(ACK).window << 8 < WINDOW_DEFAULT
    talk.guest(ACK, bytes(20000))
    assert talk.expect(ACK).window << 8 > 500_000


def test_loss_is_repaired() -> None:
    talk = accepted_connection()
    talk.host(b"lost")
    talk.expect(ACK | PSH, b"lost", seq=1)
    talk.wait(talk.ctx.link.rto_min)
    talk.expect(ACK | PSH, b"lost", seq=1)
    talk.guest(ACK)
    talk.host(b"more")
    talk.expect(ACK | PSH, b"more", seq=5)


def test_lost_acknowledgement_of_the_handshake() -> None:
    """The guest repeats SYN,ACK, or finds the acknowledgement in our data."""
    talk = asked()
    talk.answer()
    link(talk.ctx).take()  # lost
    talk.answer()
    talk.expect(ACK, b"", seq=1, ack=1)


@pytest.mark.parametrize("guest_first", [True, False])
def test_closing(guest_first: bool) -> None:
    talk = accepted_connection("127.0.0.1")
    steps = [lambda: talk.guest(FIN | ACK), lambda: talk.host(end=True)]
    for step in steps if guest_first else reversed(steps):
        step()
        for s in talk.taken():
            talk.ack = max(talk.ack, s.seq + (1 if s.flags & FIN else 0))
    talk.guest(ACK)
    assert talk.gone and not talk.sock.resets_on_close and talk.sock.shut is guest_first


def test_reset_by_the_guest() -> None:
    talk = accepted_connection()
    talk.guest(RST | ACK)
    talk.expect_nothing()
    assert talk.gone and talk.sock.resets_on_close


def test_reset_by_the_client() -> None:
    talk = accepted_connection()
    talk.host(error=errno.ECONNRESET)
    talk.expect(RST | ACK, seq=1, ack=1)
    assert talk.gone


def test_idle_connection_is_kept_while_the_guest_answers() -> None:
    talk = accepted_connection()
    talk.wait(7199)
    talk.expect_nothing()
    talk.wait(1)
    talk.expect(ACK, b"", seq=0)
    talk.guest(ACK)
    assert not talk.gone


@pytest.mark.parametrize("half_open", [True, False])
@pytest.mark.parametrize("by_key", [True, False])
def test_a_fault_ends_one_flow(half_open: bool, by_key: bool) -> None:
    talk = asked() if half_open else accepted_connection()
    if by_key:
        talk.tcp.fault_key(talk.key)
    else:
        talk.tcp.fault(make_ref(2, talk.sock.fd, 0))
    talk.expect(RST if half_open else RST | ACK)
    assert talk.gone and talk.sock.resets_on_close and talk.tcp._table.half_open == 0


def silent(client: str = "198.51.100.7") -> tuple[Talk, list[bytes]]:
    """A client of a guest that has not spoken yet, and the solicitations."""
    talk = Talk()
    asked: list[bytes] = []
    talk.ctx.services.solicit4 = talk.ctx.services.solicit6 = asked.append
    talk.ctx.guest.mac = addr.BROADCAST_MAC
    talk.accept(client)
    assert not talk.sock.resets_on_close
    talk.expect_nothing()
    return talk, asked


@pytest.mark.parametrize("client", ["198.51.100.7", "2001:db8:ffff::7"])
def test_client_of_a_guest_that_has_not_spoken(client: str) -> None:
    """The guest is solicited, and gets SYN when its MAC address is known."""
    talk, asked = silent(client)
    assert asked == [GUEST6 if ":" in client else GUEST4]
    talk.ctx.neighbours.sender(b"\x02abcde")
    talk.end_turn()
    (frame,) = link(talk.ctx).take()
    assert frame[:6] == b"\x02abcde"
    assert Ether(frame)[TCP].flags == "S"
    assert not talk.ctx.drops


def test_client_of_a_guest_that_never_speaks() -> None:
    talk, asked = silent()
    elapse(talk.ctx, T0, HOLD + SOLICIT_MAX)
    assert turned_away(talk, "tcp inbound: no guest")
    assert 5 <= len(asked) <= 12 and set(asked) == {GUEST4}


def test_clients_that_wait_for_the_guest_are_few() -> None:
    talk, _ = silent()
    first = talk.sock
    for _ in range(HELD_MAX):
        talk.accept("198.51.100.7")
    assert turned_away(talk, "tcp inbound: no guest")
    assert not first.resets_on_close


def test_syn_that_is_sent_again_asks_where_the_guest_is() -> None:
    """It may have another MAC address, and say nothing unless it is asked."""
    talk = asked()
    solicited: list[bytes] = []
    talk.ctx.services.solicit4 = solicited.append
    talk.taken()
    talk.wait(1.0)
    syns = talk.taken()
    assert syns and solicited == [GUEST4] * len(syns)


def test_guest_moves_to_another_mac_before_it_answers() -> None:
    talk = asked()
    talk.ctx.neighbours.sender(b"\x02abcde")
    talk.ctx.neighbours.learn(GUEST4, b"\x02abcde")
    talk.wait(1.0)
    assert link(talk.ctx).take()[0][:6] == b"\x02abcde"


def test_full_send_buffer_is_waited_for() -> None:
    talk = accepted_connection("127.0.0.1")
    talk.sock.room, talk.sock.wmem = 4, talk.sock.sndbuf
    talk.guest(ACK, b"abcdefgh")
    talk.expect(ACK, ack=5)
    assert reactor(talk.ctx).events[talk.sock.fd] & EPOLLOUT
    talk.sock.room, talk.sock.wmem = 100, 0
    talk.writable()
    assert talk.taken()
    talk.guest(ACK, b"efgh", seq=5)
    assert talk.sock.sent == b"abcdefgh"


def test_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "debug_on", True)
    monkeypatch.setattr(log, "debug", lines.append)
    talk = asked("::1")
    refuse(talk)
    talk.expect(SYN)
    client, flow = f"[::1]:{PEER_PORT}", "Flow 0 (TCP connection)"
    assert lines == [
        f"{flow}: {client} (seen as [fe80::1]:{PEER_PORT}) -> [fe80::5054:ff:fe12:3456]:80 opened",
        f"{flow}: refused, now {client} (seen as 192.0.2.1:{PEER_PORT}) -> 192.0.2.2:80",
    ]
    assert event_text(talk.tcp._conns[talk.key].events) == "SOCK_ACCEPTED|TAP_SYN_SENT"


# Everything at once --------------------------------------------------------------------------------------------------

SEGMENTS = st.tuples(
    st.integers(0, 0x3F),
    st.sampled_from([0, 1, 2, 0x7FFFFFFF]),
    st.sampled_from([0, 1, 2, 0x80000000]),
    st.sampled_from([b"", b"x"]),
    st.sampled_from([b"", SynOptions(1460, 7).emit(), b"\x02\x00\x05\xb4"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([PEER4, PEER6, "127.0.0.1", "::1"]),
    st.lists(st.one_of(SEGMENTS, st.sampled_from(["data", "end", "reset", "second", "refuse"])), max_size=8),
)
def test_any_answer_leaves_nothing_behind(peer: str, steps: list[Any]) -> None:
    """After any steps of the guest and the client, either the connection works or nothing of it is left."""
    FakeSocket.made.clear()
    talk = Talk()
    sock = talk.accept(peer)
    for step in steps:
        talk.taken()
        if sock.closed or talk.gone:
            break
        if step == "data":
            talk.host(b"abc")
        elif step == "end":
            talk.host(end=True)
        elif step == "reset":
            talk.host(error=errno.ECONNRESET)
        elif step == "second":
            talk.wait(1.0)
        elif step == "refuse":
            refuse(talk)
        else:
            flags, seq, ack, payload, options = step
            talk.put((flags, GUEST_ISN + seq, talk.isn + ack, payload, 1000, options))
    established = not talk.gone and talk.tcp._table.half_open == 0
    assert talk.tcp._table.half_open == (0 if established or talk.gone else 1)
    if not established:
        talk.wait(30.0)
        assert talk.gone
        assert talk.tcp._table.half_open == 0 and not reactor(talk.ctx).refs
        assert set(timers(talk.ctx).owner.values()) <= {NO_OWNER}
    else:
        talk.tcp.fault_key(talk.key)
        assert talk.gone
