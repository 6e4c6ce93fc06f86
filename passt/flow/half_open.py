"""Half-open connections: those that one side has asked for, and the other one has not answered.

Each costs an index, a socket and perhaps a timer for as long as the other side is silent: two minutes where a packet
filter drops SYN. So there is a limit. The connections that reach it are not refused: the one that has waited longest
makes way. It is the one that is least likely to be answered, and new ones, most of which are answered within a round
trip, go on as if nothing was.

    condition                                           makes way for a new connection
    --------------------------------------------------  ------------------------------------------------------
    its destination has one in SHARE of the limit       the oldest half-open connection to that destination
    all of them together are at the limit               the oldest of all
    table of flows, or descriptors of the process, are  the oldest of all, one in EVICT_SHARE (`flow/room.py`)
    used up

The share keeps many connections to a destination that is silent from those to another one, which is only slow. A
destination is whatever the owner of the register takes for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from .table import Flow

SHARE = 2

F = TypeVar("F", bound=Flow)


class HalfOpen(Generic[F]):
    """The half-open connections of one direction, by index, the oldest first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._by_age: dict[int, tuple[F, bytes]] = {}
        self._by_destination: dict[bytes, dict[int, F]] = {}

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, flow: F, destination: bytes) -> None:
        """`flow`, which has an index, waits for an answer from `destination`."""
        index = flow.index
        self._by_age[index] = flow, destination
        others = self._by_destination.get(destination)
        if others is None:
            self._by_destination[destination] = {index: flow}
        else:
            others[index] = flow

    def discard(self, flow: F) -> None:
        """`flow` was answered, or has ended."""
        found = self._by_age.pop(flow.index, None)
        if found is None:
            return
        others = self._by_destination[found[1]]
        if len(others) == 1:
            del self._by_destination[found[1]]
        else:
            del others[flow.index]

    def in_the_way(self, destination: bytes, taken: int = 0) -> F | None:
        """The connection that makes way for a new one to `destination`; None if there is room, or nothing to end.

        `taken` places of the limit are not in the register.
        """
        if (len(self._by_age) + taken) * SHARE < self.limit:
            return None
        others = self._by_destination.get(destination)
        if others is not None and len(others) * SHARE >= self.limit:
            return next(iter(others.values()))
        if len(self._by_age) + taken >= self.limit:
            return self.oldest()
        return None

    def oldest(self) -> F | None:
        """The connection that has waited longest."""
        return next(self.all(), None)

    def all(self) -> Iterator[F]:
        """All of them, the oldest first."""
        return (flow for flow, _ in self._by_age.values())
