"""Busy-polling (--busy-poll): a daemon that expects an event at once looks for it, and does not sleep.

To sleep and to be woken up takes longer than to handle the event of a round trip: the processor goes idle, and leaves
that state again. So the loop polls without waiting, for up to `limit`, when something is likely to come within it.

    a wait                              credit, at most MOST
    ----------------------------------  ---------------------------------------------------------------------------
    that ended within the limit         + 1, whether it slept or not
    that slept for longer               - LONG, to 0 at the least
    that polled in vain, and slept      VAIN, far below 0
    behind a turn that moved bulk       at most 0: the time is that of the processes which send and receive the bulk

The loop polls with more credit than LONG. An idle daemon has lost it after one limit. A request every millisecond, with
a few short waits in it, never has it: the long wait between two requests takes more than the short ones give. Where
polls are in vain again and again, as with a processor that the other end shares, they take 2 us of a short wait.

It is off on a machine with one processor, on which nothing comes as long as this process runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

MOST: Final = 16
LONG: Final = 8
VAIN: Final = -32
PROCESSORS: Final = os.cpu_count() or 1  # read while files can be: this is asked for again in the sandbox
BULK: Final = 32768  # bytes in a turn that are no requests or answers

Poll = Callable[[float, int], list[tuple[int, int]]]


class BusyPoll:
    """`limit` is in seconds."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.now = 0.0  # when the last wait ended
        self._credit = 0

    def wait(self, poll: Poll, timeout: float, most: int, moved: int) -> list[tuple[int, int]]:
        """The events that poll(timeout, most) gives. The turn before `moved` so many bytes."""
        clock, limit = time.monotonic, self.limit
        if moved >= BULK and self._credit > 0:
            self._credit = 0
        if timeout >= 0:  # the end of this wait says nothing of when events come
            ready = poll(timeout, most)
            self.now = clock()
            return ready
        began = clock()
        if self._credit > LONG:
            while True:
                ready = poll(0, most)
                self.now = clock()
                if ready:
                    if self._credit < MOST:
                        self._credit += 1
                    return ready
                if self.now - began >= limit:
                    self._credit = VAIN
                    break
        ready = poll(timeout, most)
        self.now = clock()
        if self.now - began >= limit:
            if self._credit > 0:
                self._credit = max(self._credit - LONG, 0)
        elif self._credit < MOST:
            self._credit += 1
        return ready


def chosen(microseconds: int) -> BusyPoll | None:
    """As --busy-poll says; None: off."""
    if microseconds == 0 or PROCESSORS == 1:
        return None
    return BusyPoll(microseconds * 1e-6)
