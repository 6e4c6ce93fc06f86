"""A split virtqueue, seen from the device (virtio 1.2, 2.7): buffers that a machine gives, and gets back as used.

    part            who writes     layout (little-endian)
    --------------  -------------  ------------------------------------------------------------------------
    descriptors     the machine    address u64 | length u32 | flags u16 | next u16                 x num
    available ring  the machine    flags u16 | idx u16 | heads u16 x num | used_event u16
    used ring       this program   flags u16 | idx u16 | (head u32, length u32) x num | avail_event u16

    available    the machine has written up to `idx` of the available ring; `base` is the next entry to take
    used         `push` writes entries, `publish` moves `idx` of the used ring behind them
    kick         an eventfd: the machine has made buffers available. `want_kick` says from when on it shall tell.
                 It is watched by edges (EPOLLET), each write being one, and its counter is never read
    call         an eventfd: buffers were used. `publish` writes to it unless the machine does not want to know

While the machine migrates, what is written is logged (`dirty_log.py`): buffers when their chain is given back, which
happens in the order in which chains were taken, and the used ring when it is published or a kick is asked for.

All three parts are hostile. A descriptor is copied before it is looked at; a chain has at most `num` descriptors,
CHAIN_MAX of them, and SUM_MAX bytes; an index that is more than `num` ahead is refused. Each of these raises BadRing.

Order of memory accesses. The processor may let a later load pass an earlier store, and an Arm may reorder stores or
loads as well. `fence` is the one place that forbids it:

    where                                                   what must not be swapped
    ------------------------------------------------------  -------------------------------------------
    `available`: after `idx` of the available ring          load of idx, load of the entries
    `publish`: before `idx` of the used ring                stores of the entries, store of idx
    `publish`: after it                                     store of idx, load of used_event or flags
    `want_kick`: after avail_event or flags                 its store, the next load of idx (`available`)

The descriptors of eventfds are shared with the front end, and so are their flags: O_NONBLOCK is not set here, since the
other side may wait in read(2). A write waits if the counter stands at its maximum of 2**64 - 2, which only a front end
that harms its own device can reach.

16-bit values are read and written through views cast to "H", which is one access of that size; `struct` with "<" reads
bytes one by one, and would see half of an update. Casts are in the host's byte order: `check_byte_order`.
"""

from __future__ import annotations

import os
import sys
import threading
from array import array
from collections import deque
from struct import Struct
from typing import Final

from .. import PASST
from ..calls import calls
from ..log import Fatal
from ..wire.vhost import RING_LOGGED, Invalid, RingAddresses
from .dirty_log import DirtyLog
from .guest_memory import BadRing, GuestMemory

Run = tuple[list[memoryview], int, int]  # buffers, bytes of a chain, chains (`take_buffers`)

NUM_MAX: Final = 1024  # entries of a ring (VIRTQUEUE_MAX_SIZE of QEMU)
CHAIN_MAX: Final = 256  # descriptors of a chain: a frame of 64 KiB in pieces of 256 bytes
SUM_MAX: Final = 1 << 17  # bytes of a chain: a frame of 64 KiB, or all that a machine gives for one
NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor: another follows; the device writes; it is a table of them
_NO_CALL: Final = 1  # flag of the available ring
_NO_KICK: Final = 1  # flag of the used ring
_DESC: Final = Struct("<QIHH")
_LENGTH_AND_FLAGS: Final = (1 << 48) - 1  # of the second half of a descriptor
_PLAIN: Final = WRITE << 32  # the flags in it, of a chain of one buffer to be filled
_USED: Final = Struct("<II")
_LENGTH: Final = (1 << 32) - 1  # of the second half of a descriptor, and
_INDIRECT: Final = INDIRECT << 32  # a flag in it
_TOGETHER: Final = 6  # halves of three descriptors: a frame is rarely more
_SPARSE: Final = 8  # descriptors in the table for each that is taken, beyond which the table is not copied
_NO_MEMORY: Final = memoryview(b"")
_NO_RING: Final = memoryview(bytearray(8)).cast("H")
_NO_ENTRIES: Final = memoryview(bytearray(8)).cast("I")
_NO_WORDS: Final = memoryview(bytearray(16)).cast("Q")

CALLS = calls("write", mode=PASST)

_held = threading.Lock()
_held.acquire()


def fence() -> None:
    """Let no memory access pass this point, in either direction.

    CPython has no fence. Release and acquisition of a lock are one together: what is before the release stays before,
    what is after the acquisition stays after, and the acquisition sees the release (a locked instruction on x86; STLR,
    then LDAR on Arm, which are not swapped).
    """
    _held.release()
    _held.acquire()


def check_byte_order() -> None:
    """Raises Fatal on hosts whose byte order is not that of a ring."""
    if sys.byteorder != "little":
        raise Fatal("--vhost-user needs a little-endian host: use the stream socket (qemu -netdev stream)")


class Vring:
    """One ring. It `runs` when the front end has said everything about it, and enabled it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick = self.call = -1  # descriptors of eventfds
        self._full = array("I", (0,))  # lengths of filled chains, all the same
        self.watched = False  # whether epoll looks at the kick
        self.log: DirtyLog | None = None  # of what is written to buffers
        self._places: deque[list[tuple[int, int]]] = deque()  # with a log: addresses of the chains that were taken
        self.clear()

    def clear(self) -> None:
        """Forget all that was said, descriptors excepted."""
        self.num = 0
        self.base = 0
        self.enabled = False
        self.broken = False
        self.event_idx = False
        self.addresses: RingAddresses | None = None
        self.unbind()

    @property
    def runs(self) -> bool:
        """Whether buffers may be taken."""
        return self.bound and self.enabled and self.kick >= 0 and not self.broken

    # Where it is -----------------------------------------------------------------------------------------------------

    def resize(self, num: int) -> None:
        """Set the number of entries. Raises Invalid."""
        if not 0 < num <= NUM_MAX or num & num - 1:
            raise Invalid(f"a ring of {num} entries (a power of two up to {NUM_MAX} is possible)")
        self.num = num

    def bind(self, memory: GuestMemory) -> None:
        """Find the parts in memory, where their addresses are known. Raises Invalid."""
        at, num = self.addresses, self.num
        if at is None or not num:
            return
        self._memory = memory
        self._desc = memory.of_front_end(at.desc, _DESC.size * num, 16)
        self._words = self._desc.cast("Q")
        self._avail = memory.of_front_end(at.avail, 6 + 2 * num, 2).cast("H")
        self._used = memory.of_front_end(at.used, 6 + _USED.size * num, 4)
        self._used16 = self._used.cast("H")
        self._entries = self._used[4 : 4 + _USED.size * num].cast("I")
        self._mask = num - 1
        self.use_log(self.log)
        self.used_idx = self._published = self._used16[1]
        self.bound = True

    def unbind(self) -> None:
        """Let go of the memory."""
        self.bound = False
        self._memory = GuestMemory()
        self._places.clear()
        self._desc = self._used = _NO_MEMORY
        self._avail = self._used16 = _NO_RING
        self._entries = _NO_ENTRIES
        self._words = _NO_WORDS
        self._mask = 0
        self.used_idx = self._published = 0

    # Available buffers -----------------------------------------------------------------------------------------------

    def available(self) -> int:
        """Chains that the machine has made available, and that were not taken. Raises BadRing."""
        count = self._avail[1] - self.base & 0xFFFF
        if count > self.num:
            raise BadRing(f"{count} buffers available in a ring of {self.num}")
        if count:
            fence()
        return count

    def take(self, out: list[memoryview], write: int) -> tuple[int, int]:
        """Take the next available chain, and add its buffers to `out`: (its head, the sum of their lengths).

        `write` is WRITE for buffers that this program fills, 0 for those that it reads. Raises BadRing.
        """
        head = lowest = self._avail[2 + (self.base & self._mask)]
        limit = self.num
        if head >= limit:
            raise BadRing(f"descriptor {head} of {limit}")
        words: list[int] = self._words[2 * head : 2 * head + _TOGETHER].tolist()
        address, second = words[0], words[1]
        if second & _INDIRECT:
            length, flags = second & _LENGTH, second >> 32 & 0xFFFF
            limit = length >> 4
            if length & 15 or not 0 < limit <= self.num or flags & (NEXT | WRITE):
                raise BadRing(f"an indirect table of {length} bytes, flags {flags:#x}")
            words = memoryview(self._memory.table(address, length)).cast("Q").tolist()
            lowest, address, second = 0, words[0], words[1]
        memory, logged = self._memory, self.log is not None
        if logged:
            self._places.append([])
        total = seen = 0
        while True:
            length, flags = second & _LENGTH, second >> 32 & 0xFFFF
            if flags & (WRITE | INDIRECT) != write:
                raise BadRing(f"a descriptor with flags {flags:#x} in the wrong place")
            if length:
                memory.append(out, address, length)
                if logged:
                    self._places[-1].append((address, length))
                total += length
                if total > SUM_MAX:
                    raise BadRing(f"a chain of more than {SUM_MAX} bytes")
            if not flags & NEXT:
                break
            seen += 1
            following = second >> 48
            if seen >= limit or seen >= CHAIN_MAX or following >= limit:
                raise BadRing(f"a chain of {seen} descriptors goes on at {following} of {limit}")
            at = 2 * (following - lowest)
            if not 0 <= at < len(words):  # no indirect table, which is there to its end
                lowest, at = following, 0
                words = self._words[2 * following : 2 * following + _TOGETHER].tolist()
            address, second = words[at], words[at + 1]
        self.base = self.base + 1 & 0xFFFF
        return head, total

    def take_buffers(self, count: int, heads: array[int], runs: deque[Run]) -> int:
        """Take `count` chains to be filled, at least one; the sum of their bytes. Raises BadRing.

        Adds their heads to `heads`, and what they have to `runs`. Most drivers give chains of one buffer, and cut
        buffers from larger pieces of memory. So chains of one length that lie one behind the other are a run: one view
        has all of them. A chain of several buffers is a run by itself, with a view of each.
        """
        base, num, avail = self.base, self.num, self._avail
        begin = base & self._mask
        taken: list[int] = avail[2 + begin : 2 + min(begin + count, num)].tolist()
        if begin + count > num:
            taken += avail[2 : 2 + begin + count - num].tolist()
        first, behind, shift, view = self._memory.region_of(0)
        lowest, behind_all = min(taken), max(taken) + 1
        plain = self.log is None and behind_all <= num and behind_all - lowest <= _SPARSE * count
        words: list[int] = self._words[2 * lowest : 2 * behind_all].tolist() if plain else []
        total = at = 0
        while at < count:
            if plain:
                i = 2 * (taken[at] - lowest)
                address, second = words[i], words[i + 1]
                length = (second & _LENGTH_AND_FLAGS) - _PLAIN
                if 0 < length <= SUM_MAX:
                    if not first <= address < behind:
                        first, behind, shift, view = self._memory.region_of(address)
                    end = address + length
                    if first <= address and end <= behind:
                        begin, at = at, at + 1
                        for head in taken[at : at + (behind - end) // length]:
                            i = 2 * (head - lowest)
                            if words[i] != end:
                                break
                            if words[i + 1] != second and (words[i + 1] ^ second) & _LENGTH_AND_FLAGS:
                                break
                            end += length
                            at += 1
                        heads.fromlist(taken[begin:at])
                        runs.append(([view[address + shift : end + shift]], length, at - begin))
                        total, self.base = total + end - address, base + at & 0xFFFF
                        continue
            buffers: list[memoryview] = []
            head, length = self.take(buffers, WRITE)
            if not buffers:
                raise BadRing("a chain without a buffer")
            heads.append(head)
            runs.append((buffers, length, 1))
            total += length
            at += 1
        return total

    def want_kick(self, on: bool) -> None:
        """Whether the machine shall tell of the buffers that it makes available from now on."""
        if self.event_idx:
            if on:
                self._used16[2 + 4 * self.num] = self.base
        else:
            self._used16[0] = 0 if on else _NO_KICK
        if self.log is not None:
            self._log_used(self.log)
        if on:
            fence()

    # Used buffers ----------------------------------------------------------------------------------------------------

    def push(self, head: int, length: int) -> None:
        """Give a chain back, of which `length` bytes were written. It is seen when `publish` was called.

        Raises OSError.
        """
        if self.log is not None:
            self._log_chain(self.log, length)
        _USED.pack_into(self._used, 4 + ((self.used_idx & self._mask) << 3), head, length)
        self.used_idx = self.used_idx + 1 & 0xFFFF

    def push_run(self, heads: array[int], size: int, written: int) -> None:
        """`push` for the chains of `heads`, of `size` bytes each, that got `written` bytes in all. Raises OSError."""
        count = len(heads)
        at = self.used_idx & self._mask
        last = written - (count - 1) * size
        if self.log is not None or at + count > self.num:
            for head in heads[:-1]:
                self.push(head, size)
            self.push(heads[-1], last)
            return
        if size != self._full[0]:
            self._full = array("I", (size,)) * NUM_MAX
        at, end = 2 * at, 2 * (at + count)
        self._entries[at:end:2] = heads
        self._entries[at + 1 : end : 2] = self._full[:count]
        self._entries[end - 1] = last
        self.used_idx = self.used_idx + count & 0xFFFF

    def publish(self) -> None:
        """Show the machine what was given back, and call it if it wants that. Raises OSError."""
        old, new = self._published, self.used_idx
        if old == new:
            return
        fence()
        self._used16[1] = new
        self._published = new
        if self.log is not None:
            self._log_used(self.log)
        fence()
        if self.event_idx:  # virtio 1.2, 2.7.7.2
            wanted = (new - self._avail[2 + self.num] - 1 & 0xFFFF) < (new - old & 0xFFFF)
        else:
            wanted = not self._avail[0] & _NO_CALL
        if wanted and self.call >= 0:
            os.eventfd_write(self.call, 1)

    # The log of what was written -------------------------------------------------------------------------------------

    def use_log(self, log: DirtyLog | None) -> None:
        """Log what is written from now on, or do not. No chain is taken."""
        self.log = log
        self._places.clear()

    def give_back(self, chains: int) -> None:
        """The last chains that were taken are available again."""
        self.base = self.base - chains & 0xFFFF
        self._places.clear()

    def _log_chain(self, log: DirtyLog, length: int) -> None:
        """`length` bytes of the chain that was taken longest ago were written. Raises OSError."""
        for address, size in self._places.popleft():
            written = min(size, length)
            log.mark(address, written)
            length -= written

    def _log_used(self, log: DirtyLog) -> None:
        """The used ring was written. Raises OSError."""
        if self.addresses is not None and self.addresses.flags & RING_LOGGED:
            log.mark(self.addresses.log, 6 + _USED.size * self.num)
        log.notify()
