"""Datagrams between a socket and memory, many for one system call: what all UDP flows do alike.

    receive     one recvmmsg for up to 64 messages; a socket that gets several at once has UDP_GRO turned on, and then
                each message may itself be a run of datagrams
    transmit    one write for a run, with UDP_SEGMENT: an option of the socket, set only when the size must change

A kernel or a path that refuses segmentation (no UDP_SEGMENT, datagrams above the path's MTU, IPsec) gets single
datagrams from then on, through that socket. A failed send is tried once more, since the errno may have been that of
an earlier datagram (`send_again`). There are no send queues: a full socket buffer is a drop, as on any link.

A stream whose receives bring few datagrams costs a wake-up for each handful, and the receiver at the other side, too.
It is left to gather for a moment (`Pauses`); one that brings many at once, and single datagrams, are read as they come.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..calls import calls
from ..flow.context import Context
from ..flow.table import ACTIVE, Flow
from ..linux.mmsg import SLOT, Receiver
from ..linux.sockopt import SOL_UDP, UDP_GRO, UDP_SEGMENT, setting
from ..loop.each import each
from ..loop.reactor import EPOLLERR, EPOLLIN
from .gso_batch import Run, runs

GRO_WORTH = 4  # datagrams in one receive that make a socket worth a system call to have them joined
BATCH_WORTH = 32  # datagrams in one receive that are enough: a stream that brings them is read as it comes
PAUSE = 100e-6  # s; at 350 k datagrams per second a super-frame of 1400-byte ones gathers

CONGESTED = frozenset((errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM))
# What a kernel says to a segmented send that it cannot do: sizes, transformations, checksums
_NO_SEGMENTS = frozenset((errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENOPROTOOPT, errno.EOPNOTSUPP))

Failure = tuple[OSError, int, memoryview]  # why, how many datagrams, the first of them

CALLS = (*setting((SOL_UDP, UDP_GRO), (SOL_UDP, UDP_SEGMENT)), *calls("writev", "sendto"))


class End(Protocol):
    """A connected socket, and what we know of its options."""

    fd: int  # -1: `sock` is a `Shared`
    sock: Any
    gro: bool  # it joins datagrams
    segment: int  # its UDP_SEGMENT, 0 is off
    segments: int  # how many datagrams a send may hold


def receive(receiver: Receiver, end: End, gro: bool, segments: int) -> list[Run]:
    """What waits at `end`, a batch, in runs of up to `segments` datagrams. Raises BlockingIOError, OSError."""
    lengths, sizes = receiver.receive(end.fd)
    if gro and not end.gro and len(lengths) >= GRO_WORTH:
        end.sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        end.gro = True
    frames: list[int] = []
    start = 0
    for length, size in zip(lengths, sizes, strict=True):
        frames += (start, start + length, size)
        start += SLOT
    return runs(receiver.mv, frames, segments)


class Pauses:
    """Ends that are not read for PAUSE seconds, then by `take(flow, end, now)`. Their errors are still reported.

    `fault_at(flow, exception)` ends a flow whose turn has failed.
    """

    def __init__(
        self,
        ctx: Context,
        take: Callable[[Any, Any, float], None],
        fault_at: Callable[[Any, Exception], None],
    ) -> None:
        self._reactor = ctx.reactor
        self._timers = ctx.timers.services
        self._take = take
        self._fault_at = fault_at
        self._paused: list[tuple[Flow, End]] = []
        self._timer = self._timers.new(self._resume)

    def after(self, count: int, flow: Flow, end: End, now: float) -> None:
        """A receive brought `count` datagrams: pause if that makes a stream, and one that should gather."""
        if GRO_WORTH <= count < BATCH_WORTH:
            self._reactor.change(end.fd, EPOLLERR)
            if not self._paused:
                self._timers.arm(self._timer, now + PAUSE)
            self._paused.append((flow, end))

    def _resume(self, now: float) -> None:
        paused, self._paused = self._paused, []
        each(paused, self._go_on, lambda one, e: self._fault_at(one[0], e), now)

    def _go_on(self, paused: tuple[Flow, End], now: float) -> None:
        flow, end = paused
        if flow.state == ACTIVE:
            self._reactor.change(end.fd, EPOLLIN | EPOLLERR)
            self._take(flow, end, now)


def datagrams(size: int, total: int) -> int:
    """How many datagrams a run has."""
    return -(-total // size) if size else 1


def set_segment(end: End, size: int) -> None:
    """Let the kernel cut what is sent into datagrams of `size` bytes; 0: not at all. Raises OSError."""
    end.sock.setsockopt(SOL_UDP, UDP_SEGMENT, size)
    end.segment = size


def transmit(end: End, size: int, total: int, views: list[memoryview]) -> None:
    """Send `total` bytes as datagrams of `size`. The option does not cut what is not longer. Raises OSError."""
    if total > size:
        if size != end.segment:
            set_segment(end, size)
    elif size > end.segment and end.segment:
        set_segment(end, 0)
    if not total:
        end.sock.send(b"")  # writev of nothing does nothing
    elif end.fd >= 0:
        os.writev(end.fd, views)
    else:
        end.sock.write(views)


def send_again(
    end: End, size: int, total: int, views: list[memoryview], e: OSError, report: Callable[[], object]
) -> Iterator[Failure]:
    """`transmit` failed with `e`: because of its buffer, of an earlier datagram, of segmentation, or for good.

    `report` sees to the socket's error queue. What cannot be sent is yielded.
    """
    if e.errno not in CONGESTED:
        report()
        try:
            transmit(end, size, total, views)
            return
        except OSError as again:
            e = again
    if e.errno in _NO_SEGMENTS and (end.segment or total > size):
        end.segments = 1
        set_segment(end, 0)
        joined = memoryview(b"".join(views))
        for start in range(0, max(total, 1), size or 1):
            one = joined[start : start + size]
            try:
                transmit(end, len(one), len(one), [one])
            except OSError as failed:
                yield from send_again(end, len(one), len(one), [one], failed, report)
        return
    yield e, datagrams(size, total), views[0]


def reason(e: OSError) -> str:
    """EPERM, for the name of a drop."""
    return errno.errorcode.get(e.errno or 0, str(e.errno))
