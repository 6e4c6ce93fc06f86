"""Changes of directories, passed to all subscribers: one inotify(7) instance per process.

A user may have 128 instances (fs.inotify.max_user_instances), which other programs need as well, and each namespace has
a process.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..linux import inotify
from ..linux.inotify import Event
from .each import each
from .reactor import EPOLLIN, TYPE_INOTIFY, Reactor

Taker = Callable[[list[Event], float], None]


def _tell(taker: Taker, found: list[Event], now: float) -> None:
    taker(found, now)


class Changes:
    """The instance, made with the first watch; `fd` is -1 as long as there is none."""

    def __init__(self) -> None:
        self.fd = -1
        self._watches: set[int] = set()
        self._takers: list[Taker] = []

    def watch(self, path: str, mask: int) -> int:
        """Watch `path` for the events of `mask`; returns the watch, which others may share. Raises OSError."""
        if self.fd < 0:
            self.fd = inotify.new()
        try:
            watch = inotify.add(self.fd, path, mask)
        except OSError:
            if not self._watches:
                self.close()
            raise
        self._watches.add(watch)
        return watch

    def tell(self, reactor: Reactor, taker: Taker) -> None:
        """Call taker(events, now) from now on, with the events of all watches."""
        if not self._takers:
            self._fault_at = reactor.fault_at
            reactor.handle(TYPE_INOTIFY, self._event)
            reactor.watch(self.fd, TYPE_INOTIFY, 0, EPOLLIN)
        self._takers.append(taker)

    def _event(self, ref: int, events: int, now: float) -> None:
        found = inotify.read(self.fd)
        each(self._takers, _tell, self._fault_at, found, now)

    def close(self) -> None:
        """Close the instance, with all watches."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
