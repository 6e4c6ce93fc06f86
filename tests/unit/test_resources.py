"""Cost of a connection, and its complete release: memory, reference cycles, tables."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from passt.loop.timers import NO_OWNER
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.deadlines import SOON
from passt.wire.tcp import ACK, FIN, HEADER, PSH, RST, SYN, SynOptions
from tests.unit.support import T0, reactor, timers
from tests.unit.tcp_support import FakeSocket, Talk, fake_sockets

__all__ = ["fake_sockets"]
CONNECTION_MAX = 2048  # bytes of Python objects
COUNT = 500


class ReadySocket:
    """A host socket that answers from constants: it allocates nothing on behalf of a connection."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.template = FakeSocket(0, 0)
        self.answers: dict[tuple[int, ...], Any] = {}

    def fileno(self) -> int:
        return self.fd

    def connect_ex(self, peer: tuple[Any, ...]) -> int:
        return 0

    def setsockopt(self, *option: Any) -> None:
        pass

    def getsockopt(self, *option: int) -> Any:
        if option not in self.answers:
            self.answers[option] = self.template.getsockopt(*option)
        return self.answers[option]


@pytest.mark.parametrize("v6", [False, True])
def test_idle_connection_is_small(monkeypatch: pytest.MonkeyPatch, v6: bool) -> None:
    """Everything that 500 connections need, the entries in the tables of the fakes included."""
    talk = Talk(v6=v6)
    sockets = [ReadySocket(1000 + i) for i in range(COUNT + 1)]
    for s in sockets:
        for option in ((1, 55, 36), (6, 11, 232)):  # SO_MEMINFO, TCP_INFO
            s.getsockopt(*option)
    monkeypatch.setattr(tcp_sock, "new_socket", lambda *_: sockets.pop())
    fake = talk.ctx.link
    monkeypatch.setattr(fake, "send", lambda hdr: None)
    monkeypatch.setattr(fake, "send_payload", lambda parts: None)
    ends = talk.key[:-4]

    def establish(port: int) -> None:
        key = ends + port.to_bytes(2, "big") + b"\0\x50"
        options = SynOptions(1460, 7).emit()
        syn = HEADER.pack(port, 80, 1, 0, (5 + len(options) // 4) << 12 | SYN, 65535, 0, 0) + options
        talk.ctx.pool.buf[: len(syn)] = syn
        talk.tcp.tap_handler(key, [0, len(syn)], T0)
        ack = HEADER.pack(port, 80, 2, talk.tcp._conns[key].snd_nxt & 0xFFFFFFFF, 5 << 12 | ACK, 512, 0, 0)
        talk.ctx.pool.buf[: len(ack)] = ack
        talk.tcp.tap_handler(key, [0, len(ack)], T0)

    establish(9999)  # what is made once is made now
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for port in range(10000, 10000 + COUNT):
        establish(port)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert talk.ctx.flows.count == COUNT + 1
    assert (after - before) / COUNT <= CONNECTION_MAX


def reset_by_guest(talk: Talk) -> None:
    talk.guest(RST | ACK)


def reset_by_host(talk: Talk) -> None:
    talk.host(error=104)


def closed_by_both(talk: Talk) -> None:
    talk.guest(FIN | ACK)
    talk.host(end=True)
    talk.ack = talk.taken()[-1].seq + 1
    talk.guest(ACK)


def given_up(talk: Talk) -> None:
    talk.host(b"never acknowledged")
    talk.wait(300)


def fault(talk: Talk) -> None:
    talk.tcp.fault_key(talk.key)


ENDS = [reset_by_guest, reset_by_host, closed_by_both, given_up, fault]


def life(talk: Talk, end: Callable[[Talk], None], lasts: float = 2 * SOON) -> None:
    """A connection that carries data both ways, lasts for some seconds, and ends by `end`."""
    talk.seq = talk.ack = 0
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    talk.guest(ACK | PSH, b"question")
    talk.host(b"answer")
    talk.ack = talk.taken()[-1].seq + len(b"answer")
    talk.guest(ACK)
    talk.wait(lasts)
    end(talk)
    talk.taken()
    talk.wait(0.1)
    assert talk.gone
    FakeSocket.made.clear()


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_of_a_connection(end: Callable[[Talk], None]) -> None:
    """Without help of the cycle collector, which would stop traffic while it runs."""
    talk = Talk()
    life(talk, end)
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            life(talk, end)
        assert gc.collect() == 0
    finally:
        gc.enable()
    ctx = talk.ctx
    assert ctx.flows.count == 0 and not any(ctx.flows.by_index) and len(ctx.flows.by_index) == 1
    assert not talk.tcp._conns and not talk.tcp._acks._waiting
    assert not reactor(ctx).refs and not reactor(ctx).retired
    assert set(timers(ctx).owner.values()) == {NO_OWNER} and len(timers(ctx).owner) == 1


def test_indices_and_timers_are_used_again() -> None:
    talk = Talk()
    for _ in range(3):
        life(talk, reset_by_guest)
    assert len(talk.ctx.flows.by_index) == len(timers(talk.ctx).owner) == 1


def test_a_short_connection_takes_no_timer() -> None:
    talk = Talk()
    life(talk, closed_by_both, lasts=0.0)
    assert not timers(talk.ctx).owner
