"""Spliced connections that were reset, and the bytes that came before."""

from __future__ import annotations

import errno
import os
import socket
import time

import pytest

from passt.linux import tcpinfo
from passt.splice import lingering

from .test_tcp import DEADLINE, Lab, MakeLab, lab, make_lab, reset

__all__ = ["lab", "make_lab"]
SIZE = 200_000
BY_CLIENT = pytest.mark.parametrize("by_client", [True, False])


def ends(lab: Lab, by_client: bool) -> tuple[socket.socket, socket.socket]:
    """The end that resets, and the other one, after two bytes."""
    me, other = lab.pair()[:: 1 if by_client else -1]
    lab.write(me, b"..")
    assert lab.read(other, 2) == b".."
    return me, other


@BY_CLIENT
def test_an_end_before_a_reset_is_told_as_well(lab: Lab, by_client: bool) -> None:
    """FIN and RST come in one turn: a reader gets the end, and only a writer an error."""
    me, other = ends(lab, by_client)
    me.send(b"data")
    me.shutdown(socket.SHUT_WR)
    reset(me)
    lab.gone()
    assert other.recv(100) == b"data"
    assert other.recv(100) == b""
    with pytest.raises(BrokenPipeError):
        other.send(b"x")


@BY_CLIENT
def test_a_reset_waits_for_a_slow_reader(lab: Lab, by_client: bool) -> None:
    """More than the reader's kernel has room for, and all of it delivered as far as the sender can know."""
    me, other = ends(lab, by_client)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = os.urandom(SIZE)
    lab.write(me, data)
    lab.until(lambda: not tcpinfo.send_buffer(me, tcpinfo.Features())[1])
    reset(me)
    for _ in range(5):
        lab.turn()
    assert lab.ctx.flows.count == 1
    assert lab.read(other, SIZE) == data
    assert lab.outcome(other) == "reset"
    lab.gone()


@BY_CLIENT
def test_a_reader_that_stops_is_given_up(lab: Lab, by_client: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "GIVE_UP", 0.2)
    me, other = ends(lab, by_client)
    lab.fill(me)
    reset(me)
    began = time.monotonic()
    lab.gone()
    assert 0.1 < time.monotonic() - began < DEADLINE and not lab.splice._rests
    assert lab.outcome(other) == "reset"


@BY_CLIENT
def test_the_reader_resets_as_well(lab: Lab, by_client: bool) -> None:
    me, other = ends(lab, by_client)
    lab.fill(me)
    reset(me)
    lab.turn()
    assert lab.splice._rests
    reset(other)
    lab.gone()
    assert not lab.splice._rests


def test_several_at_once_share_a_timer(make_lab: MakeLab) -> None:
    made = make_lab()
    pairs = [ends(made, True) for _ in range(3)]
    for me, _ in pairs:
        made.fill(me)
        reset(me)
    made.until(lambda: len(made.splice._rests) == 3)
    assert sum(d is not None for d in made.ctx.timers.services.deadlines) == 1  # type: ignore[attr-defined]
    for _, other in pairs:
        assert made.outcome(other) == "reset"
    made.gone()


def test_a_fault_ends_one_that_lingers(lab: Lab) -> None:
    me, _ = ends(lab, True)
    lab.fill(me)
    reset(me)
    lab.until(lambda: lab.splice._rests)
    (rest,) = lab.splice._rests.values()
    lab.splice._fault_at(rest.conn, OSError(errno.EIO, "staged"))
    lab.turn()
    assert not lab.splice._rests and lab.ctx.flows.count == 0 and lab.ctx.drops["fault"] == 1
