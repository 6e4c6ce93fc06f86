"""Spliced connections that were reset, and the bytes that came before."""

from __future__ import annotations

import errno
import os
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from passt.linux import tcpinfo
from passt.splice import lingering
from passt.splice.lingering import GIVE_UP, POLL, Lingering

from ..support import T0, make_context, timers
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
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
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


# Progress, and the clock -------------------------------------------------------------------------------------------


class Rests:
    """Connections that linger, of which a test says how much is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = T0
        self.unsent = 0
        self.turns: list[bool] = []  # whether each was told that no event reports the end
        self.aborted: list[tuple[int, str]] = []
        self.shut: list[int] = []
        monkeypatch.setattr(tcpinfo, "unsent", lambda sock: self.unsent)
        ctx = make_context()
        self.services = timers(ctx).services
        self.made = Lingering(ctx, lambda half: self.turns.append(half.eof_announced), self._abort, self._fault_at)

    def _abort(self, conn: Any, why: str) -> None:
        self.aborted.append((conn.index, why))
        self.made.forget(conn)

    @staticmethod
    def _fault_at(conn: Any, e: Exception) -> None:
        raise e

    def end(self, index: int = 1, *, fin: bool = False, sent: bool = False, **left: Any) -> Any:
        """A connection of which this is left; FIN was sent to the reader, or not. Returns the half."""
        state = {"eof": True, "fin": sent, "held": 0, "pending": b"", "moved": 100} | left
        half: Any = SimpleNamespace(dst=SimpleNamespace(shutdown=self.shut.append), eof_announced=False, **state)
        self.made.end(self.conn(index), half, "reset by peer", fin=fin, now=self.now)
        return half

    @staticmethod
    def conn(index: int) -> Any:
        return SimpleNamespace(index=index)

    @property
    def due(self) -> float | None:
        return self.services.deadlines[self.made._timer]

    def look(self, after: float = POLL) -> bool:
        """Time passes, and the timer fires; returns whether something goes on."""
        self.now += after
        self.services.fire(self.made._timer, self.now)
        return bool(self.made.rests)


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> Rests:
    return Rests(monkeypatch)


@pytest.mark.parametrize("left", [{"eof": False}, {"held": 1}, {"pending": b"x"}, {"unsent": 1}])
def test_any_byte_that_is_left_is_waited_for(rests: Rests, left: dict[str, Any]) -> None:
    rests.unsent = left.get("unsent", 0)
    half = rests.end(**{name: value for name, value in left.items() if name != "unsent"})
    assert rests.turns == [True] and not rests.aborted and rests.due == T0 + POLL
    assert rests.look() and rests.due == rests.now + POLL
    half.eof, half.held, half.pending, rests.unsent = True, 0, b"", 0
    assert not rests.look() and rests.due is None
    assert rests.aborted == [(1, "reset by peer")] and not rests.shut


@pytest.mark.parametrize(("fin", "sent", "shut"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_an_end_is_told_once(rests: Rests, fin: bool, sent: bool, shut: int) -> None:
    half = rests.end(fin=fin, sent=sent)
    assert half.fin is (fin or sent)
    assert rests.shut == [socket.SHUT_WR] * shut
    assert rests.aborted == [(1, "reset by peer")] and rests.due is None


def test_the_next_one_does_not_put_off_the_first(rests: Rests) -> None:
    rests.end(1, held=1)
    rests.now += POLL / 2
    rests.end(2, held=1)
    rests.end(3)
    assert rests.due == T0 + POLL
    assert rests.aborted == [(3, "reset by peer")]


def test_one_that_does_not_linger_is_forgotten(rests: Rests) -> None:
    rests.end(1, held=1)
    rests.made.forget(rests.conn(2))
    assert rests.look()


@pytest.mark.parametrize(
    ("moves", "before"),
    [("held", 90), ("pending", bytes(90)), ("unsent", 90)],
)
def test_each_byte_that_goes_gives_more_time(rests: Rests, moves: str, before: Any) -> None:
    rests.unsent = before if moves == "unsent" else 0
    half = rests.end(**({moves: before} if moves != "unsent" else {}))
    for i in range(20):
        left = before[i:] if moves == "pending" else before - i
        if moves == "unsent":
            rests.unsent = left
        else:
            setattr(half, moves, left)
        assert rests.look(GIVE_UP - 1)
    assert rests.look(GIVE_UP - 1)
    assert not rests.look(1.0), "nothing has moved for as long as that"


@pytest.mark.parametrize("where", ["held", "pending"])
def test_what_only_comes_in_gives_none(rests: Rests, where: str) -> None:
    """The destination takes nothing, while the pipe still fills."""
    half = rests.end(eof=False, held=10, pending=bytes(10))
    half.moved += 5
    setattr(half, where, 15 if where == "held" else bytes(15))
    assert rests.look(GIVE_UP - 1)
    assert not rests.look(1.0)
    assert rests.aborted == [(1, "reset by peer")]
