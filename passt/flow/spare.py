"""Listeners whose accept(2) fails: the client gets an answer, and the loop does not spin.

A connection that is not accepted stays in the backlog, and epoll would report it for ever.

    accept(2) lacks                consequence
    -----------------------------  -------------------------------------------------------------------------------------
    a descriptor (EMFILE, ENFILE)  a spare one is closed for as long as it takes to accept the client and turn it away
    that one, too, or memory       the listener rests: it is watched again after 100 ms

A listener that cannot be watched again rests for another second; the others do not wait for it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..calls import calls
from ..linux.accepting import accept
from ..linux.syscall import timerfd_create
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN
from ..loop.timers import RETRY
from .context import Context
from .room import NO_DESCRIPTORS

REST = 0.1  # s

# The backlog is unchanged, and the next attempt fails as well; other errors are about one connection, which is gone
_STUCK = NO_DESCRIPTORS | {errno.ENOMEM, errno.ENOBUFS}
_DEFECTS = frozenset((errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK))

CALLS = calls("accept4", "timerfd_create", "close")


class Spare:
    """The spare descriptor of all listeners of a kind, and the listeners that rest."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._timer = ctx.timers.services.new(self._resume)
        self._resting: set[int] = set()
        self._fd = _descriptor()

    def accept_failed(self, listener: int, e: OSError, now: float, turn_away: Callable[[int], None]) -> bool:
        """accept(2) failed with `e`. turn_away(fd) gets the next client, if it can be accepted, and closes it.

        Returns False if the listener rests. Raises `e` if the errno is that of a defect.
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
        except OSError:  # another thread took the descriptor, or the client is gone
            return False
        finally:
            self._fd = _descriptor()
        return True

    def rest(self, listener: int, now: float) -> None:
        """Leave a listener alone for a moment."""
        if not self._resting:
            self._ctx.timers.services.arm(self._timer, now + REST)
        self._resting.add(listener)  # first, so that it is watched again in any case
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
        """A listener closes: its descriptor may have another owner when the rest is over."""
        self._resting.discard(listener)

    def close(self) -> None:
        """Close the spare descriptor: there are no listeners any more."""
        self._resting.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _descriptor() -> int:
    """A cheap descriptor, or -1 if none is free."""
    try:
        return timerfd_create()
    except OSError:
        return -1
