"""Flows without an end of their own: UDP and ping flows end when they are idle, or to make room.

    event                                    consequence                                          reason
    ---------------------------------------  ---------------------------------------------------  ---------
    nothing sent or received for `timeout`   the next sweep closes it                             idle
    more than `limit` flows                  the longest idle sixteenth is closed                 evicted
    table full                               the flow of least use ends (`room.py`), or the same  evicted
    no descriptor left (EMFILE, ENFILE)      likewise, and the socket is opened again             evicted
    a fault in handling a flow               that flow is closed                                  fault

Where peers can begin flows as well (`foreign`), a new one makes room at the cost of other foreign flows, as long as
there are any, and not of the guest's. A new flow of the guest makes room at the cost of any.

Per batch, a protocol writes `flow.last = now` and adds to a count of bytes. One timer serves all flows of a protocol.
It is armed only while there are flows, for the earliest time at which one can be due, and each sweep arms it again. A
flow has one socket, unless its class overrides `watch` and `sockets`, or shares the socket of a listener (fd -1).
"""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .. import NEVER
from ..drops import Reason
from ..loop.each import each, record
from ..loop.reactor import EPOLLERR, EPOLLIN, Reactor
from .context import Context
from .room import DESCRIPTORS, EVICT_SHARE, IDLE, NO_DESCRIPTORS, TABLE
from .table import FREE, RECENT, Flow, FlowInfo, TableFull, reason_of

SWEEP_MIN = 1.0  # s between sweeps, at least
SWEEP_COST = 0.25e-3  # s between sweeps for each flow: a sweep looks at all, and takes a thousandth of that
SOON = 1e-6  # s from now: in the next turn
SWEEP_MAX = 512  # flows that a turn closes


class IdleFlow(Flow):
    """A flow with the time of its last packet, its idle timeout, both in seconds, and its bytes of payload."""

    __slots__ = ("last", "timeout", "to_guest", "to_host")
    protocol = "udp"
    path = "tap"
    evicted: Reason  # counted where one is closed to make room

    def __init__(self, key: bytes, timeout: float, now: float) -> None:
        super().__init__(key)
        self.timeout = timeout
        self.last = now
        self.to_guest = self.to_host = 0

    def traffic(self) -> tuple[int, int]:
        return self.to_guest, self.to_host

    def info(self, now: float) -> FlowInfo:
        idle = now - self.last
        state = "active" if idle < RECENT else "idle"
        times = now - self.opened, idle
        return FlowInfo(self.index, self.protocol, self.path, self.endpoints(), state, *self.traffic(), *times)

    @property
    def foreign(self) -> bool:
        """Whether a peer, and not the guest, began it."""
        return False

    def watch(self, reactor: Reactor, kind: int) -> None:
        """Watch its sockets. Raises OSError, with none of them watched."""
        if self.fd >= 0:
            reactor.watch(self.fd, kind, self.index, EPOLLIN | EPOLLERR)

    def sockets(self) -> tuple[tuple[int, Any], ...]:
        """(descriptor, owner) of all that closes with the flow."""
        return ((self.fd, self.sock),) if self.fd >= 0 else ()


F = TypeVar("F", bound=IdleFlow)


def flow_limit(most: int, share: int) -> int:
    """`most`, or fewer: one in `share` of the descriptors that the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft // share))


class IdleFlows(Generic[F]):
    """The flows of one protocol, by key. `kind` is the type of their epoll references."""

    def __init__(self, ctx: Context, kind: int, limit: int) -> None:
        self._ctx = ctx
        self._kind = kind
        self.limit = limit
        self.by_key: dict[bytes, F] = {}
        self._foreign: dict[bytes, F] = {}
        self._timer = ctx.timers.services.new(self.sweep)
        self._due = NEVER
        ctx.room.offer(IDLE, self._give)

    def open(self, make: Callable[[], socket.socket], now: float, *, foreign: bool = False) -> socket.socket:
        """The socket that `make` opens; if descriptors ran out, at the cost of the flows of least use.

        `foreign` is that of the flow it is for. Raises what `make` raises.
        """
        try:
            return make()
        except OSError as e:
            if e.errno not in NO_DESCRIPTORS or not self._find_room(DESCRIPTORS, self.close_at_once, foreign, now):
                raise
        return make()

    def add(self, flow: F, sock: socket.socket, now: float) -> None:
        """Take `flow` into the tables and watch it; `sock` is its first socket.

        Raises TableFull or OSError, with the flow left out.
        """
        ctx = self._ctx
        if len(self.by_key) >= self.limit:
            self._close_oldest(self.close, flow.foreign)
        try:
            ctx.flows.insert(flow)
        except TableFull:
            self._find_room(TABLE, self.close, flow.foreign, now)
            ctx.flows.insert(flow)
        flow.sock, flow.fd = sock, sock.fileno()
        try:
            flow.watch(ctx.reactor, self._kind)
        except OSError as e:
            ctx.flows.free(flow, reason_of(e.errno or errno.EIO))
            raise
        self.by_key[flow.key] = flow
        if flow.foreign:
            self._foreign[flow.key] = flow
        ctx.flows.activate(flow)
        self._arm(now + flow.timeout)

    def close(self, flow: F, why: str) -> None:
        """Forget `flow`; its sockets close when the turn ends. Its place is free in any case."""
        self._remove(flow)
        try:
            for fd, owner in flow.sockets():
                self._ctx.reactor.retire(fd, owner)
        finally:
            self._ctx.flows.free(flow, why)

    def end(self, flow: Flow, why: str) -> None:
        """Close `flow`, if it is one of these: the next packet of the guest begins another one."""
        if (own := self.by_key.get(flow.key)) is flow:
            self.close(own, why)

    def close_all(self, why: str) -> None:
        """Close every flow."""
        each(self.by_key.values(), self.close, self.fault_at, why)

    def fault_at(self, flow: F, e: Exception) -> None:
        """A walk over flows met a fault at this one: it ends, unless it has, and the walk goes on (`each`)."""
        record(self._ctx.drops, f"a {flow.kind}", e)
        if flow.state != FREE:
            self.close(flow, "fault")

    def fault(self, index: int) -> None:
        """Close flow `index`, if it is one of these."""
        flow = self._ctx.flows.by_index[index]
        if flow is not None and (own := self.by_key.get(flow.key)) is flow:
            self.close(own, "fault")

    def fault_key(self, key: bytes) -> None:
        """Close the flow of `key`, if there is one."""
        flow = self.by_key.get(key)
        if flow is not None:
            self.close(flow, "fault")

    def close_at_once(self, flow: F, why: str) -> None:
        """Forget `flow` and give its descriptors back now: their numbers go to the sockets that are opened next."""
        self._remove(flow)
        try:
            for fd, owner in flow.sockets():
                self._ctx.reactor.forget(fd)
                owner.close()
        finally:
            self._ctx.flows.free(flow, why)

    def _remove(self, flow: F) -> None:
        del self.by_key[flow.key]
        self._foreign.pop(flow.key, None)

    def _find_room(self, short_of: str, close: Callable[[F, str], None], foreign: bool, now: float) -> bool:
        """Make room for a flow that is `foreign` or not: at the cost of what the process needs least, or of the
        longest idle flows of this protocol. Returns whether any has ended.
        """
        if not (foreign and self._foreign) and self._ctx.room.make(short_of, now, foreign=foreign):
            return True
        if not self.by_key:
            return False
        self._close_oldest(close, foreign)
        return True

    def _give(self, foreign: bool, now: float) -> int:
        """Close the longest idle sixteenth of those that carry nothing at the moment; returns how many these were."""
        flows = self._foreign if foreign else self.by_key
        idle = sorted((f for f in flows.values() if now - f.last >= RECENT), key=_last)
        oldest = idle[: len(idle) // EVICT_SHARE + 1]
        each(oldest, self._make_room, self.fault_at, self.close_at_once)
        return len(oldest)

    def _close_oldest(self, close: Callable[[F, str], None], foreign: bool) -> None:
        """Close the longest idle sixteenth, so that the sorting is paid for by many new flows."""
        by_age = sorted(((foreign and self._foreign) or self.by_key).values(), key=_last)
        oldest = by_age[: len(by_age) // EVICT_SHARE + 1]
        each(oldest, self._make_room, self.fault_at, close)

    def _make_room(self, flow: F, close: Callable[[F, str], None]) -> None:
        self._ctx.drops[flow.evicted] += 1
        close(flow, "evicted")

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long, and come back when the next flow may be due.

        Of many flows that are due at once, the others are closed in the next turns.
        """
        self._due = NEVER
        due = [f for f in self.by_key.values() if f.last + f.timeout <= now]
        each(due[:SWEEP_MAX], self.close, self.fault_at, "idle")
        if len(due) > SWEEP_MAX:
            self._arm(now + SOON)
        elif self.by_key:
            earliest = min(f.last + f.timeout for f in self.by_key.values())
            self._arm(max(earliest, now + SWEEP_MIN, now + len(self.by_key) * SWEEP_COST))

    def _arm(self, deadline: float) -> None:
        if deadline < self._due:
            self._due = deadline
            self._ctx.timers.services.arm(self._timer, deadline)


def _last(flow: IdleFlow) -> float:
    return flow.last
