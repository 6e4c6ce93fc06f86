"""The descriptor in reserve: whose accept(2) fails is not left waiting, and does not make the loop spin."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from passt.flow import spare
from passt.flow.context import Context
from passt.flow.spare import REST, Spare
from passt.loop.reactor import EPOLLIN

from ..support import T0, reactor, timers


class Rig:
    """A listener of the host that is watched, and the reserve of its kind."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.fd = self.server.fileno()
        self.spare = Spare(ctx)
        self.turned_away: list[int] = []
        ctx.reactor.watch(self.fd, 1, 0, EPOLLIN)

    def fails(self, number: int) -> bool:
        return self.spare.accept_failed(self.fd, OSError(number, os.strerror(number)), T0, self._turn_away)

    def _turn_away(self, fd: int) -> None:
        self.turned_away.append(fd)
        os.close(fd)

    def resting(self) -> bool:
        return reactor(self.ctx).events[self.fd] == 0

    def close(self) -> None:
        self.spare.close()
        self.server.close()


@pytest.fixture
def rig(ctx: Context) -> Iterator[Rig]:
    made = Rig(ctx)
    yield made
    made.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_the_reserve_is_given_up_to_turn_a_client_away(rig: Rig, number: int) -> None:
    with socket.create_connection(rig.server.getsockname()) as client:
        reserve = rig.spare._fd
        assert rig.fails(number)
        assert rig.turned_away == [reserve], "the lowest number that is free"
        assert client.recv(1) == b""
    assert not rig.resting() and rig.spare._fd >= 0, "there is a reserve again"


def test_nobody_waits_any_more(rig: Rig) -> None:
    assert not rig.fails(errno.EMFILE)
    assert rig.resting() and not rig.turned_away and rig.spare._fd >= 0


def test_the_reserve_cannot_be_had_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise OSError(errno.EMFILE, "none left")

    monkeypatch.setattr(spare, "timerfd_create", none)
    with socket.create_connection(rig.server.getsockname()):
        assert rig.fails(errno.EMFILE), "it was there for this one"
    assert rig.spare._fd == -1
    monkeypatch.undo()
    with socket.create_connection(rig.server.getsockname()):
        assert rig.fails(errno.EMFILE) and rig.spare._fd >= 0


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
def test_without_memory_it_rests_for_a_moment(rig: Rig, number: int) -> None:
    assert not rig.fails(number)
    assert rig.resting() and timers(rig.ctx).services.deadlines == [T0 + REST]
    timers(rig.ctx).services.fire(0)
    assert not rig.resting()


def test_what_is_about_one_client_costs_that_one(rig: Rig) -> None:
    assert rig.fails(errno.ECONNABORTED)
    assert not rig.resting()


@pytest.mark.parametrize("number", [errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK])
def test_defects_are_raised(rig: Rig, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        rig.fails(number)


def test_who_closes_while_resting_is_not_touched(rig: Rig) -> None:
    rig.spare.rest(rig.fd, T0)
    rig.spare.forget(rig.fd)
    timers(rig.ctx).services.fire(0)
    assert rig.resting()


def test_a_rest_is_timed_once_for_all(rig: Rig) -> None:
    with socket.socket() as other:
        rig.ctx.reactor.watch(other.fileno(), 1, 1, EPOLLIN)
        rig.spare.rest(rig.fd, T0)
        rig.spare.rest(other.fileno(), T0 + REST / 2)
        assert timers(rig.ctx).services.deadlines == [T0 + REST]
        timers(rig.ctx).services.fire(0)
        assert reactor(rig.ctx).events[other.fileno()] == EPOLLIN and not rig.resting()
