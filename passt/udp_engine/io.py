"""Datagrams between a socket and memory, many per system call: common to all UDP flows.

    receive     one recvmmsg for up to 64 messages. A socket that gets several at once has UDP_GRO turned on; then each
                message may itself hold several datagrams
    transmit    one write per GSO batch, with UDP_SEGMENT: an option of the socket, set only when the size changes

The kernel tells the traffic class of each datagram by a control message, as long as the socket is asked for it by a
system call that takes such messages. A single reply is likely after each send (`reply_expected`); the call with control
messages costs 1 us more there. Where the class was zero in both directions, the next PLAIN ones are received without.

A kernel or a path may refuse segmentation (no UDP_SEGMENT, datagrams above the path's MTU, IPsec). If single datagrams
can be sent then, that socket goes on with single ones. A failed send is tried once more, since its errno may be that of
an earlier datagram (`retry_send`). There are no send queues: a full socket buffer is a drop, as on any link.

A stream whose receives bring few datagrams costs a wake-up for each handful, here and at the receiver. Such a stream
gathers for a moment (`Pauses`). A stream with many datagrams per receive, and single datagrams, are read at once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, Final, Protocol

from ..calls import calls
from ..flow.context import Context
from ..flow.table import ACTIVE, Flow
from ..linux.mmsg import CLASS_SPACE, SLOT, Receiver, class_in
from ..linux.sockopt import SOL_UDP, UDP_GRO, UDP_SEGMENT, setting
from ..loop.each import each
from ..loop.reactor import EPOLLERR, EPOLLIN
from .gso_batch import GsoBatch, gso_batches

GRO_MIN: Final = 4  # datagrams in one receive for which UDP_GRO is worth a system call
BATCH_FULL: Final = 32  # datagrams in one receive from which on a stream is read without pauses
PLAIN: Final = 15  # single replies that are received without asking for their traffic class
PAUSE: Final = 100e-6  # s; at 350 k datagrams per second a super-frame of 1400-byte ones gathers

CONGESTED: Final = frozenset((errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM))
# Errors of segmented sends that the kernel cannot do: sizes, transformations, checksums
_NO_SEGMENTS: Final = frozenset((errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENOPROTOOPT, errno.EOPNOTSUPP))

Failure = tuple[OSError, int, memoryview]  # error, number of datagrams, the first of them

CALLS = (*setting((SOL_UDP, UDP_GRO), (SOL_UDP, UDP_SEGMENT)), *calls("writev", "sendto", "recvmsg"))


class End(Protocol):
    """A connected socket, and the state of its options."""

    fd: int  # -1: `sock` is a `SharedSocket`
    sock: Any
    gro: bool  # UDP_GRO is on
    gso_size: int  # of UDP_SEGMENT; 0: off
    gso_max_segs: int  # most datagrams in a send


def receive_one(receiver: Receiver, sock: Any) -> tuple[int, int]:
    """Receive one datagram, into the first slot: its length and its traffic class. Raises BlockingIOError, OSError."""
    n, control, _, _ = sock.recvmsg_into((receiver.mv[:SLOT],), CLASS_SPACE)
    return n, class_in(control) if control else 0


def receive(receiver: Receiver, end: End, gro: bool, segments: int) -> list[tuple[int, list[GsoBatch]]]:
    """Receive at `end`: traffic classes, each with GSO batches of up to `segments` datagrams that have it.

    Raises BlockingIOError, OSError.
    """
    lengths, sizes = receiver.receive(end.fd)
    if gro and not end.gro and len(lengths) >= GRO_MIN:
        end.sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        end.gro = True
    frames: list[int] = []
    start = 0
    for length, size in zip(lengths, sizes, strict=True):
        frames += (start, start + length, size)
        start += SLOT
    classes = receiver.classes
    if not classes:
        return [(0, gso_batches(receiver.mv, frames, segments))]
    found, at = [], 0
    for tos, alike in groupby(classes):
        end_at = at + 3 * len(list(alike))
        found.append((tos, gso_batches(receiver.mv, frames[at:end_at], segments)))
        at = end_at
    return found


class Pauses:
    """Ends that are left alone for PAUSE seconds, then read by `take(flow, end, now)`. Errors are still reported.

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
        """A receive brought `count` datagrams: pause if that is a stream that should gather."""
        if GRO_MIN <= count < BATCH_FULL:
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


def datagram_count(size: int, total: int) -> int:
    """Number of datagrams in a GSO batch."""
    return -(-total // size) if size else 1


def set_gso_size(end: End, size: int) -> None:
    """Let the kernel segment sends into datagrams of `size` bytes; 0: not at all. Raises OSError."""
    end.sock.setsockopt(SOL_UDP, UDP_SEGMENT, size)
    end.gso_size = size


def transmit(end: End, size: int, total: int, views: list[memoryview]) -> None:
    """Send `total` bytes as datagrams of `size`. The option leaves alone what is no longer than it. Raises OSError."""
    if total > size:
        if size != end.gso_size:
            set_gso_size(end, size)
    elif size > end.gso_size and end.gso_size:
        set_gso_size(end, 0)
    if not total:
        end.sock.send(b"")  # writev(2) without bytes sends nothing
    elif end.fd >= 0:
        os.writev(end.fd, views)
    else:
        end.sock.write(views)


def retry_send(
    end: End, size: int, total: int, views: list[memoryview], e: OSError, report: Callable[[], object]
) -> Iterator[Failure]:
    """`transmit` failed with `e`, which may be about the buffer, an earlier datagram, segmentation, or this datagram.

    `report` reads the socket's error queue. Yields what cannot be sent.
    """
    if e.errno not in CONGESTED:
        report()
        try:
            transmit(end, size, total, views)
            return
        except OSError as again:
            e = again
    if e.errno in _NO_SEGMENTS and (end.gso_size or total > size):
        yield from _send_singly(end, size, total, views, report)
        return
    yield e, datagram_count(size, total), views[0]


def _send_singly(
    end: End, size: int, total: int, views: list[memoryview], report: Callable[[], object]
) -> Iterator[Failure]:
    """Send the datagrams of a GSO batch one by one, also from now on unless they fail just the same."""
    set_gso_size(end, 0)
    joined = memoryview(b"".join(views))
    for start in range(0, max(total, 1), size or 1):
        one = joined[start : start + size]
        try:
            transmit(end, len(one), len(one), [one])
        except OSError as failed:
            yield from retry_send(end, len(one), len(one), [one], failed, report)
        else:
            end.gso_max_segs = 1
