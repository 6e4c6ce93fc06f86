"""What a guest or a peer can make us keep, and what happens when it is too much: the limits that have no test beside
the code that they are part of. docs/limits.md lists all of them.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from passt import tcp_sock
from passt.core.flow import ACTIVE, FREE
from passt.wire.tcp import ACK, RST, SYN
from tests.unit.support import timers
from tests.unit.tcp_support import FakeSocket, Talk, fake_sockets

__all__ = ["fake_sockets"]

PORTS = range(41000, 41100)


def connect(talk: Talk, port: int) -> None:
    """The guest sends SYN from another port."""
    talk.key = talk.key[:-4] + port.to_bytes(2, "big") + talk.key[-2:]
    talk.seq = talk.ack = 0
    talk.syn()


# TCP -----------------------------------------------------------------------------------------------------------------


def test_connections_that_wait_for_the_host_are_limited_and_the_next_ones_refused() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS] * 3
    talk = Talk()
    opening = talk.tcp._opening
    opening.opening_max = 3
    for port in PORTS[:3]:
        connect(talk, port)
    talk.expect_nothing()
    connect(talk, PORTS[3])
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops == {"tcp: too many half open": 1} and talk.ctx.flows.count == 3


@pytest.mark.parametrize("end", ["established", "refused", "reset by guest", "unanswered"])
def test_who_is_through_or_gone_makes_room(end: str) -> None:
    talk = Talk()
    opening = talk.tcp._opening
    opening.opening_max = 1
    if end == "refused":
        FakeSocket.connect_results = [errno.EINPROGRESS]
    talk.syn()
    if end == "established":
        talk.expect(SYN | ACK)
        talk.guest(ACK)
    elif end == "refused":
        talk.host(error=errno.ECONNREFUSED)
    elif end == "reset by guest":
        talk.guest(RST | ACK)
    else:
        talk.wait(11)
    talk.taken()
    assert opening._table.opening == 0
    FakeSocket.connect_results = [0]
    connect(talk, PORTS[0])
    talk.expect(SYN | ACK)
    assert opening._table.opening == 1 and not talk.ctx.drops


def test_established_connections_take_no_room() -> None:
    talk = Talk()
    talk.tcp._opening.opening_max = 1
    for port in PORTS:
        FakeSocket.connect_results = [0]
        connect(talk, port)
        talk.expect(SYN | ACK)
        talk.guest(ACK)
    assert talk.ctx.flows.count == len(PORTS) and not talk.ctx.drops
    assert all(flow is not None and flow.state == ACTIVE for flow in talk.ctx.flows.by_index)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_without_a_descriptor_a_connection_is_refused_and_others_stay(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    established, key = talk.sock, talk.key

    def fail(*_: int) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tcp_sock, "new_socket", fail)
    connect(talk, PORTS[0])
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops == {"tcp socket": 1} and talk.ctx.flows.count == 1
    talk.key, talk.seq, talk.ack = key, 1, 1
    talk.guest(ACK, b"goes on")
    assert bytes(established.sent) == b"goes on"


def test_without_a_descriptor_for_its_timer_a_connection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()

    def fail(index: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(timers(talk.ctx), "take", fail)
    talk.syn()
    talk.expect(RST | ACK, ack=1)
    assert talk.sock.resets_on_close, "the host peer must not take it for a connection"
    assert talk.gone and talk.ctx.drops == {"tcp socket": 1}
    assert talk.tcp._opening._table.opening == 0


def test_a_full_table_refuses_connections_and_harms_none() -> None:
    talk = Talk()
    talk.ctx.flows.limit = 1
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    (flow,) = talk.ctx.flows.by_index
    assert flow is not None
    connect(talk, PORTS[0])
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops == {"flow table full": 1} and flow.state != FREE
