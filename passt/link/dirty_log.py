"""The log of written pages: while a machine migrates, its front end copies again what was written meanwhile.

    SET_LOG_BASE     a bitmap in a file that is shared: one bit for each page of the machine's memory, from address 0 on
    F_LOG_ALL        acknowledged: buffers of the machine that are written are logged
    RING_LOGGED      of a ring: so is its used ring, at an address of the machine that the front end gives
    SET_LOG_FD       an eventfd that tells the front end of new bits

A bit is set after the write, and before the front end learns of it: a page that is copied in between is copied again.

The front end clears bits, and other back ends set bits, at the same time, so a bit would have to be set by an atomic
operation, which CPython has not. But a plain store of a byte is atomic, and a byte with all bits set has every bit that
another could have set. So the eight pages of a byte (GROUP) are logged together: too many pages are copied again, never
too few. At an end of a region, where some of the eight are no memory of the machine, only those that are get their bit;
such a group is written by no other back end but through the same pages.
"""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_right

from ..wire.vhost import Invalid, LogArea
from .guest_memory import GuestMemory, keep_size

PAGE_BITS = 12  # VHOST_LOG_PAGE
GROUP_BITS = 15  # the pages of a byte
GROUP = 1 << GROUP_BITS


class DirtyLog:
    """The bitmap, and what memory it is of."""

    def __init__(self, area: LogArea, fd: int) -> None:
        """Map it; `fd` stays the caller's. Raises Invalid or OSError."""
        end = area.offset + area.size
        if end > (size := os.fstat(fd).st_size):
            raise Invalid(f"a log up to {end:#x} of a file of {size:#x} bytes")
        keep_size(fd)
        self._map = memoryview(mmap.mmap(fd, end, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))[area.offset :]
        self._edges: list[int] = []  # of runs of groups that are all memory: first, behind the last, ...
        self.fd = -1  # eventfd

    def use(self, memory: GuestMemory) -> None:
        """The machine has this memory."""
        spans: list[int] = []
        for start, end in sorted((r.guest, r.guest + r.size) for r in memory.regions):
            if spans and spans[-1] == start:
                spans[-1] = end
            elif not spans or start > spans[-1]:
                spans += (start, end)
        self._edges = []
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            first, behind = start + GROUP - 1 >> GROUP_BITS, end >> GROUP_BITS
            if first < behind:
                self._edges += (first, behind)

    def mark(self, address: int, length: int) -> None:
        """`length` bytes at an address of the machine were written. Raises OSError: the log is too small for it."""
        if not length:
            return
        last = address + length - 1
        if last >> GROUP_BITS >= len(self._map):
            raise OSError(errno.EFAULT, f"a log of {len(self._map)} bytes, without a bit for {last:#x}")
        for group in range(address >> GROUP_BITS, (last >> GROUP_BITS) + 1):
            if bisect_right(self._edges, group) & 1:
                self._map[group] = 0xFF
            else:
                self._map[group] |= _pages(max(address, group << GROUP_BITS), min(last, (group + 1 << GROUP_BITS) - 1))

    def notify(self) -> None:
        """Tell the front end, if it wants to hear. Raises OSError."""
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Let go of the descriptor of `notify`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _pages(first: int, last: int) -> int:
    """The bits of the pages from one address to another of the same group."""
    low, high = first >> PAGE_BITS & 7, last >> PAGE_BITS & 7
    return (2 << high) - (1 << low)
