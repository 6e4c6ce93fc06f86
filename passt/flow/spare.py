"""Listening sockets whose accept(2) fails: nobody is left waiting, and no event makes us spin.

A connection that is not accepted stays in the queue, and would be reported for ever.

    what accept(2) lacks           consequence
    -----------------------------  -------------------------------------------------------------------------------------
    a descriptor (EMFILE, ENFILE)  a spare one is given up for as long as it takes to accept the client and turn it away
    that one, too, or memory       the listener rests: it is watched again after 100 ms

A listener that cannot be watched again then rests on, and has its next turn a second later; the others do not wait.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..calls import calls
from ..linux.syscall import accept, timerfd_create
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN
from ..loop.timers import RETRY
from .context import Context
from .idle import NO_DESCRIPTORS

REST = 0.1  # s

# The queue is as it was, and the next attempt will fail, too; all other errors are about one connection, now gone
_STUCK = NO_DESCRIPTORS | {errno.ENOMEM, errno.ENOBUFS}
_DEFECTS = frozenset((errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK))

CALLS = calls("accept4", "timerfd_create", "close")


class Spare:
    """The descriptor in reserve of listeners of one kind, and those of them that rest."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._timer = ctx.timers.services.new(self._resume)
        self._resting: set[int] = set()
        self._fd = _descriptor()

    def accept_failed(self, listener: int, e: OSError, now: float, turn_away: Callable[[int], None]) -> bool:
        """accept(2) has failed with `e` where somebody waits; turn_away(fd) is given who that is, and must close it.

        False if the listener rests now. Raises `e` if it says that we are wrong.
        """
        if e.errno in _DEFECTS:
            raise e
        if e.errno not in _STUCK or (e.errno in NO_DESCRIPTORS and self._turn_away(listener, turn_away)):
            return True
        self.rest(listener, now)
        return False

    def _turn_away(self, listener: int, turn_away: Callable[[int], None]) -> bool:
        if self._fd >= 0:
            os.close(self._fd)
        try:
            turn_away(accept(listener)[0])
        except OSError:  # the descriptor went to somebody else, or the client has gone
            return False
        finally:
            self._fd = _descriptor()
        return True

    def rest(self, listener: int, now: float) -> None:
        """Do not look at a listener for a moment."""
        if not self._resting:
            self._ctx.timers.services.arm(self._timer, now + REST)
        self._resting.add(listener)  # first: what is not watched any more is sure to be watched again
        self._ctx.reactor.change(listener, 0)

    def _resume(self, now: float) -> None:
        resting, self._resting = self._resting, set()
        each(resting, self._ctx.reactor.change, self._fault_at, EPOLLIN)
        if self._resting:
            self._ctx.timers.services.arm(self._timer, now + RETRY)

    def _fault_at(self, listener: int, e: Exception) -> None:
        record(self._ctx.drops, "a listener that has rested", e)
        self._resting.add(listener)

    def forget(self, listener: int) -> None:
        """A listener closes: its number may be somebody else's when the rest is over."""
        self._resting.discard(listener)

    def close(self) -> None:
        """There are no listeners any more."""
        self._resting.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _descriptor() -> int:
    """The cheapest descriptor that there is; -1 if none can be had."""
    try:
        return timerfd_create()
    except OSError:
        return -1
