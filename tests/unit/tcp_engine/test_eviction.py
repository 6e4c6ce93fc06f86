"""TCP connections that end to make room for others, and those that do not."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from passt import log
from passt.flow.room import DESCRIPTORS, TABLE
from passt.flow.table import FREE
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import ESTABLISHED, SOCK_FAILED
from passt.tcp_engine.eviction import Eviction, to_guest, to_peer
from passt.wire.tcp import ACK, PSH, RST, SYN
from tests.unit.support import link, reactor
from tests.unit.tcp_support import FakeSocket, Talk, fake_sockets, open_connection

__all__ = ["fake_sockets"]


def connect(talk: Talk, port: int, *, answered: bool) -> FakeSocket:
    """The guest sends SYN from a port; the host's connect(2) is done at once, or waits."""
    FakeSocket.connect_results = [0 if answered else errno.EINPROGRESS]
    talk.key = talk.key[:-4] + port.to_bytes(2, "big") + talk.key[-2:]
    talk.seq = talk.ack = 0
    talk.syn()
    return talk.sock


def established(talk: Talk, port: int) -> FakeSocket:
    sock = connect(talk, port, answered=True)
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    return sock


def flags(talk: Talk) -> list[int]:
    """Of all segments to the guest, whichever connection they are of."""
    return [frame[34 + 13] for frame in link(talk.ctx).take()]


def test_a_guest_whose_connect_was_evicted_begins_again() -> None:
    talk = Talk()
    talk.tcp._table.outbound.limit = 1
    connect(talk, 41000, answered=False)
    connect(talk, 41001, answered=False)
    assert flags(talk) == []
    connect(talk, 41000, answered=True)  # its SYN once more
    assert flags(talk) == [SYN | ACK]


def test_a_guest_that_does_not_answer_syn_ack_is_reset() -> None:
    talk = Talk()
    talk.tcp._table.outbound.limit = 1
    first = connect(talk, 41000, answered=True)
    assert flags(talk) == [SYN | ACK]
    connect(talk, 41001, answered=True)
    assert flags(talk) == [RST | ACK, SYN | ACK]
    talk.end_turn()
    assert first.closed and first.resets_on_close


def test_a_full_table_ends_the_oldest_half_open_and_no_established() -> None:
    talk = Talk()
    kept = [established(talk, port) for port in (41000, 41001)]
    half_open = [connect(talk, port, answered=False) for port in (41002, 41003)]
    talk.ctx.flows.limit = 4
    new = connect(talk, 41004, answered=True)
    assert flags(talk) == [SYN | ACK]
    talk.end_turn()
    assert [s.closed for s in (*kept, *half_open, new)] == [False, False, True, False, False]
    assert talk.ctx.drops == {"tcp: half open: closed to make room": 1}
    assert talk.ctx.flows.closed == {("tcp", "evicted"): 1}


def test_a_full_table_ends_a_connection_that_was_reset_first() -> None:
    talk = Talk()
    connect(talk, 41001, answered=False)
    reset = established(talk, 41000)
    talk.guest(ACK, window=0)
    reset.incoming += b"not taken"
    reset.error, reset.failed = errno.ECONNRESET, True
    reactor(talk.ctx).fire(reset.fd, 0x2019, talk.now)
    assert flags(talk) == [] and talk.tcp._conns[talk.key].events & SOCK_FAILED
    talk.ctx.flows.limit = 2
    connect(talk, 41002, answered=False)
    assert flags(talk) == [RST | ACK] and talk.ctx.flows.count == 2 and not talk.tcp._table.failed
    assert talk.ctx.drops == {"tcp: reset, not delivered: closed to make room": 1}


def test_without_a_descriptor_the_oldest_half_open_gives_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed before the next attempt, not at the end of the turn."""
    talk = Talk()
    first = connect(talk, 41000, answered=False)
    make = tcp_sock.new_socket

    def none_left(*arguments: Any) -> Any:
        if not first.closed:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return make(*arguments)

    monkeypatch.setattr(tcp_sock, "new_socket", none_left)
    connect(talk, 41001, answered=True)
    assert flags(talk) == [SYN | ACK] and first.closed and first.fd not in reactor(talk.ctx).refs
    assert not talk.ctx.drops["tcp socket"]


def test_a_host_client_makes_no_room_at_the_guests_cost() -> None:
    talk = Talk()
    guests = connect(talk, 41000, answered=False)
    talk.ctx.flows.limit = 1
    sock = talk.accept("198.51.100.9")
    talk.end_turn()
    assert sock.closed and not guests.closed and talk.ctx.drops == {"flow table full": 1}


def test_host_clients_make_room_among_themselves() -> None:
    talk = Talk()
    first = talk.accept("198.51.100.9")
    talk.ctx.flows.limit = 1
    second = talk.accept("198.51.100.10")
    assert flags(talk) == [SYN, RST, SYN]
    talk.end_turn()
    assert first.closed and first.resets_on_close and not second.closed


def test_a_sixteenth_ends_at_once() -> None:
    talk = Talk()
    talk.tcp._table.outbound.limit = 100
    for port in range(41000, 41033):
        connect(talk, port, answered=False)
    assert talk.ctx.room.make(TABLE, talk.now)
    assert talk.tcp._table.opening == 30 and [s.closed for s in FakeSocket.made[:4]] == [True, True, True, False]


def test_with_established_connections_only_there_is_no_room() -> None:
    talk = open_connection()
    assert not talk.ctx.room.make(DESCRIPTORS, talk.now) and not talk.gone
    (conn,) = talk.tcp._conns.values()
    assert conn.events & ESTABLISHED and conn.state != FREE
    talk.host(b"works")
    talk.expect(ACK | PSH, b"works")


@pytest.mark.parametrize("n", [4, 16])
def test_destinations(n: int) -> None:
    """A key is the guest's address, the peer's, and their ports."""
    guest, peer, port, other = bytes(range(n)), bytes(range(100, 100 + n)), b"\1\2", b"\3\4"
    assert to_peer(guest + peer + port + other) == peer
    assert to_guest(guest + peer + port + other) == guest + port


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings, and by what they are limited."""
    lines: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: lines.append(f"{key} {now:.0f}: {text}"))
    return lines


def test_no_destination_keeps_the_guest_from_others(warned: list[str]) -> None:
    """Half of the limit is for one peer."""
    talk = Talk()
    talk.tcp._table.outbound.limit = 6
    key = talk.key
    socks = [connect(talk, port, answered=False) for port in range(41000, 41005)]
    talk.end_turn()
    assert [s.closed for s in socks] == [True, True, False, False, False]
    assert talk.ctx.drops == {"tcp: half open: closed to make room": 2}
    text = "The host leaves 3 connections unanswered: new ones take the place of the oldest"
    assert warned == [f"half open: The host {talk.now:.0f}: {text}"] * 2
    talk.key = key[:4] + bytes([198, 51, 100, 77]) + key[8:]
    others = [connect(talk, port, answered=False) for port in range(41000, 41003)]
    talk.end_turn()
    assert not any(s.closed for s in (*socks[2:], *others))


def test_no_port_of_the_guest_keeps_host_clients_from_others(warned: list[str]) -> None:
    talk = Talk()
    talk.tcp._table.inbound.limit = 6
    socks = [talk.accept(f"198.51.100.{i}") for i in range(5)]
    talk.end_turn()
    assert [s.closed for s in socks] == [True, True, False, False, False]
    assert talk.ctx.drops == {"tcp inbound: half open: closed to make room": 2}
    text = "The guest leaves 3 connections unanswered: new ones take the place of the oldest"
    assert warned == [f"half open: The guest {talk.now:.0f}: {text}"] * 2
    others = [talk.accept(f"198.51.100.{i}", to=81) for i in range(10, 13)]
    talk.end_turn()
    assert not any(s.closed for s in (*socks[2:], *others))
    assert len(warned) == 2


def test_successors_have_places_of_the_limit() -> None:
    talk = Talk()
    table = talk.tcp._table
    table.inbound.limit = 3
    eviction = Eviction(talk.ctx, table)
    first = talk.accept("198.51.100.1", to=81)
    key = talk.key
    table.successors[b"1"] = lambda now: None
    assert eviction.inbound(key, talk.now) and not first.closed
    table.successors[b"2"] = lambda now: None
    assert eviction.inbound(key, talk.now)
    talk.end_turn()
    assert first.closed, "two wait, and one is here"
    table.successors[b"3"] = lambda now: None
    assert not eviction.inbound(key, talk.now), "nothing can make way"


def test_a_sixteenth_of_each_direction_ends() -> None:
    talk = Talk()
    table = talk.tcp._table
    table.inbound.limit = table.outbound.limit = 200
    inbound = [talk.accept(f"198.51.100.{i}") for i in range(33)]
    outbound = [connect(talk, 41000 + i, answered=False) for i in range(33)]
    assert talk.ctx.room.make(TABLE, talk.now)
    talk.end_turn()
    assert [sum(s.closed for s in socks) for socks in (inbound, outbound)] == [3, 3]
    assert talk.ctx.drops == {
        "tcp: half open: closed to make room": 3, "tcp inbound: half open: closed to make room": 3
    }  # fmt: skip


def test_all_that_were_reset_end_and_are_counted() -> None:
    talk = Talk()
    for port in (41000, 41001):
        sock = established(talk, port)
        talk.guest(ACK, window=0)
        sock.incoming += b"not taken"
        sock.error, sock.failed = errno.ECONNRESET, True
        reactor(talk.ctx).fire(sock.fd, 0x2019, talk.now)
    assert talk.ctx.room.make(TABLE, talk.now)
    assert talk.ctx.drops == {"tcp: reset, not delivered: closed to make room": 2}
