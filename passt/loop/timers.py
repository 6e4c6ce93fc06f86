"""Timers on timerfds in the same epoll set: single ones for services, a pool for TCP connections.

A pooled timer is not armed more often than needed. It keeps the time at which its descriptor will fire
(`expiry`); a later deadline leaves the descriptor alone and is only compared when it fires, an earlier one re-arms
it. A timer returned to the pool stays armed: a spurious wake-up finds no owner, and the next connection that wants a
later deadline than the pending expiry needs no system call at all. IDLE_MAX of them wait for connections; those
beyond, after a flood, are closed.

The pool has POOL_MAX timers, or one for POOL_SHARE of the descriptors that the process may have. Connections beyond get
none: their deadlines share a timer (`tcp_engine/wheel.py`), and descriptors are left for their sockets.

A service re-arms its timer in the callback, so a fault of the callback would end the service: therefore the timer fires
again after RETRY. A fault in a connection ends the connection, which then needs no timer.
"""

from __future__ import annotations

import os
import resource
from array import array
from collections.abc import Callable
from typing import Final

from .. import NEVER
from ..calls import calls
from ..linux.syscall import timerfd_create, timerfd_settime
from .reactor import EPOLLIN, TYPE_TCP_TIMER, TYPE_TIMER, Reactor, ref_data, ref_fd

NO_OWNER: Final = 0xFFFFFFFF
NO_TIMER: Final = -1
POOL_MAX: Final = 4096
POOL_SHARE: Final = 8
IDLE_MAX: Final = 128
SPARE: Final = 256  # descriptors that the table of expirations has room for beyond the last one
RETRY: Final = 1.0  # s, from a fault of a service to its next attempt

CALLS = calls("timerfd_create", "timerfd_settime", "read", "close")


def _drain(fd: int) -> bool:
    """Read the expiration count, so that the descriptor stops being readable.

    False if there is none: an earlier handler of the same turn has re-armed or disarmed the timer.
    """
    try:
        os.read(fd, 8)
    except BlockingIOError:
        return False
    return True


class _Descriptor:
    """Owns `fd`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


class Timers:
    """Single timers: `new(callback)` gives one, `arm(timer, deadline)` sets it."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._callbacks: list[Callable[[float], None]] = []
        reactor.handle(TYPE_TIMER, self._fired)

    def new(self, callback: Callable[[float], None]) -> int:
        """A disarmed timer that will call callback(now)."""
        fd = timerfd_create()
        self._reactor.watch(fd, TYPE_TIMER, len(self._callbacks), EPOLLIN)
        self._callbacks.append(callback)
        return fd

    def arm(self, timer: int, deadline: float) -> None:
        """Fire once at `deadline` (monotonic seconds, must be positive)."""
        timerfd_settime(timer, deadline)

    def disarm(self, timer: int) -> None:
        timerfd_settime(timer, 0)

    def _fired(self, ref: int, events: int, now: float) -> None:
        timer = ref_fd(ref)
        if not _drain(timer):
            return
        try:
            self._callbacks[ref_data(ref)](now)
        except Exception:
            timerfd_settime(timer, now + RETRY)
            raise


class TimerPool:
    """Timers of TCP connections, by flow index. `callback(index, now)` is called when a deadline may have passed."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._free: list[int] = []
        self._expiry = array("d")  # by descriptor: when it fires, 0: it is no timer; 8 bytes each, where a dict has 70
        self._count = 0
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = POOL_MAX if soft == resource.RLIM_INFINITY else min(POOL_MAX, soft // POOL_SHARE)
        self.callback: Callable[[int, float], None] = lambda index, now: None
        self.services = Timers(reactor)
        reactor.handle(TYPE_TCP_TIMER, self._fired)

    def take(self, index: int) -> int:
        """A timer for flow `index`; NO_TIMER if the pool has given away all, or no descriptor or memory is left."""
        if self._free:
            fd = self._free.pop()
            self._reactor.retarget(fd, index)
            return fd
        if self._count >= self.most:
            return NO_TIMER
        try:
            fd = timerfd_create()
        except OSError:
            return NO_TIMER
        try:
            self._reactor.watch(fd, TYPE_TCP_TIMER, index, EPOLLIN)
        except OSError:
            os.close(fd)
            return NO_TIMER
        expiry = self._expiry
        if fd >= len(expiry):
            expiry.extend([0.0] * (fd + 1 - len(expiry) + SPARE))
        expiry[fd] = NEVER
        self._count += 1
        return fd

    def give_back(self, fd: int) -> None:
        """Return a timer; it may stay armed, and then fires without an owner."""
        if len(self._free) < IDLE_MAX:
            self._reactor.retarget(fd, NO_OWNER)
            self._free.append(fd)
        else:
            self._expiry[fd] = 0.0
            self._count -= 1
            self._reactor.retire(fd, _Descriptor(fd))

    def at(self, fd: int, deadline: float) -> None:
        """Make timer `fd` fire at `deadline` or before."""
        if deadline < self._expiry[fd]:
            self._expiry[fd] = deadline
            timerfd_settime(fd, deadline)

    def _fired(self, ref: int, events: int, now: float) -> None:
        fd = ref_fd(ref)
        if not _drain(fd):
            return  # still armed, for `_expiry`
        self._expiry[fd] = NEVER
        index = ref_data(ref)
        if index != NO_OWNER:
            self.callback(index, now)
