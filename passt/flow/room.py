"""Room for new flows when the table of flows is full, or the process has no descriptor left.

The flows that are of the least use end first. As soon as any have ended, the new flow has its place, and the rest is
left alone:

    rank       flows                                                                            ended
    ---------  -------------------------------------------------------------------------------  ----------------------
    CLOSING    TCP connections whose host peer has reset them, and which only have to deliver   all
               what it sent before
    HALF_OPEN  TCP connections that one side has not answered (`half_open.py`)                  the oldest sixteenth
    IDLE       UDP, query and ping flows without a packet for RECENT (`idle.py`)                the oldest sixteenth
                                                                                                of each protocol

A protocol registers with `offer` what it can do. An established TCP connection never ends for another one, nor does a
flow that carries packets: when there is nothing else, the new flow is refused. A flow that a peer begins (`foreign`)
ends none that the guest has begun.

Descriptors of flows that end here are closed at once, so that the new flow can have them. Each end is a counted drop.
The log has one line for each kind of shortage in an interval. Where there was nothing to end, there is no other look
for NOTHING: looking costs more than a refusal.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from .. import log

NO_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE))
EVICT_SHARE = 16  # one in so many ends, so that looking for them is paid for by many new flows
TABLE, DESCRIPTORS = "The table of flows is full", "No descriptor is left"
NOTHING = 0.1  # s
CLOSING, HALF_OPEN, IDLE = range(3)

Give = Callable[[bool, float], int]  # give(foreign, now) ends some flows, and returns how many

_ENDED = "TCP connections that were reset", "half-open TCP connections", "idle UDP, query or ping flows"


class Room:
    """One per process."""

    def __init__(self) -> None:
        self._ways: tuple[list[Give], ...] = [], [], []
        self._nothing: dict[tuple[str, bool], float] = {}  # when there was nothing to end

    def offer(self, rank: int, give: Give) -> None:
        """`give` ends flows of this rank."""
        self._ways[rank].append(give)

    def make(self, short_of: str, now: float, *, foreign: bool = False) -> bool:
        """End what is of the least use; returns False if there was nothing. `short_of`: TABLE or DESCRIPTORS."""
        if now < self._nothing.get((short_of, foreign), now - NOTHING) + NOTHING:
            return False
        for ways, what in zip(self._ways, _ENDED, strict=True):
            count = sum([give(foreign, now) for give in ways])
            if count:
                log.warn_ratelimited(f"room {short_of}", f"{short_of}: closed {count} {what}", now)
                return True
        if short_of == TABLE:  # for want of a descriptor, the caller has a message of its own
            log.warn_ratelimited("no room", f"{TABLE}: refusing new flows", now)
        self._nothing[short_of, foreign] = now
        return False

    def descriptor(self, e: OSError, now: float, *, foreign: bool = False) -> bool:
        """A system call has failed with `e`: whether it was for want of a descriptor, and there is one now."""
        return e.errno in NO_DESCRIPTORS and self.make(DESCRIPTORS, now, foreign=foreign)
