"""Frames to a machine, written into the chains of its receive ring.

    taken ahead of time    `room`   what TCP may send now
    little is left         `full`   TCP waits; kicks are wanted, and the next one ends it
    filled, until the turn ends, or the ring runs dry         `publish`: the machine sees them

Payload of TCP need not be copied. Frames of a known length are laid out in chains; their payload is received there.
The headers follow when it is known how many bytes have come. Chains that were not filled are laid out anew.

    lay_out(54, 3000, 4500)   | vnet, headers | payload | payload |  | vnet, headers | payload |
    recvmsg: 3500 bytes                       |#########|#########|                  |###......|
    fill(3000), fill(500)     |###############|#########|#########|  |###############|###|

Chains are taken in runs (`Vring.take_buffers`), so that the work is one of runs and frames. A frame of 64 KiB in pages
that lie one behind the other is one view, and two slices of the used ring.

With MRG_RXBUF a frame fills as many chains as it needs; the first says how many (num_buffers). Without it a frame fills
one chain, and what does not fit does not get through. A driver that takes super-frames has chains for them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from struct import Struct
from typing import Final

from ..wire.virtio import VNET_LEN
from .backend import Buffer
from .gso import FRAME_MIN, PADDING
from .guest_memory import BadRing
from .vring import Run, Vring

ROOM_MIN: Final = 140_000  # bytes: two super-frames
SEGMENT: Final = 1024  # bytes of payload that a chain certainly holds where frames are cut
_NUM_BUFFERS: Final = Struct("<H")
_ONE_BUFFER: Final = _NUM_BUFFERS.pack(1)


class FrameWriter:
    """Writes frames into one ring."""

    def __init__(self, ring: Vring, header: int, *, mergeable: bool, cut: bool) -> None:
        self.ring = ring
        self._header = header  # bytes of the virtio-net header: 10 or 12
        self._mergeable, self._cut = mergeable, cut
        self._heads = array("I")  # of chains that were taken; those before `_next` are filled
        self._next = 0
        self._runs: deque[Run] = deque()  # the same chains, without those that are filled
        self._done = 0  # of the first run, so many chains are filled
        self._free = 0  # bytes in chains that are not filled
        self._capacity = 0  # bytes that the ring has when all of it is available
        self.filled = False  # whether there is something to publish
        self.full = False
        self.room = 0
        # Frames that were laid out: view of the first run, where the frame begins in it, pieces, bytes of payload. A
        # piece is what the frame has of a run: chains, bytes of a chain, bytes written.
        self._laid: deque[tuple[memoryview, int, list[int], int]] = deque()

    def start(self) -> None:
        """The ring runs: take what there is, and hear of more when it is needed. Raises BadRing or OSError."""
        self.full = False
        self._refill()

    def stop(self) -> None:
        """The ring is about to stop: give back what was taken. Raises OSError."""
        ring = self.ring
        if self.filled and ring.bound and not ring.broken:
            self.publish()
        ring.give_back(len(self._heads) - self._next)
        self._heads, self._next = array("I"), 0
        self._runs.clear()
        self._laid.clear()
        self.filled = False
        self._done = self._free = self.room = 0

    def put(self, vnet: Buffer, front: Buffer, rest: Sequence[Buffer], length: int) -> bool:
        """Write a frame of `length` bytes, Ethernet header in `front`; whether it fits. Raises BadRing or OSError."""
        need = self._header + length
        if self._free < need + ROOM_MIN:
            self._refill()
        runs = self._runs
        if not runs or need > (self._free if self._mergeable else runs[0][1]):
            return False
        parts = (vnet, front) if self._header == VNET_LEN else (vnet, _ONE_BUFFER, front)
        buffers, size, count = runs[0]
        if need <= (size if len(buffers) == 1 else len(buffers[0])):
            at = self._done * size
            buffers[0][at : at + need] = b"".join((*parts, *rest))
            self.ring.push(self._heads[self._next], need)
            self._next += 1
            self._free -= size
            self._done += 1
            if self._done == count:
                runs.popleft()
                self._done = 0
        else:
            self._scatter((b"".join(parts), *rest), need)
        self.filled = True
        self._measure()
        return True

    def lay_out(self, front: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        """Where up to `want` bytes of payload go, in frames of `chunk` bytes behind `front` bytes of headers.

        Returns views, and how many bytes they are; none if the machine's buffers cannot take frames so. It holds until
        `put` or `stop` is called. Raises BadRing or OSError.
        """
        if not self._mergeable:
            return [], 0
        if self._free < want + ROOM_MIN:
            self._refill()
        views: list[memoryview] = []
        laid = self._laid
        laid.clear()
        skip, shortest = self._header + front, self._header + FRAME_MIN
        total = left = payload = 0
        done = self._done
        pieces: list[int] = []
        for buffers, size, count in self._runs:
            if len(buffers) > 1:
                return [], 0
            view = buffers[0]
            while done < count and (left or total < want):
                offset = at = done * size
                if not left:
                    if size <= skip or size < shortest:
                        return [], 0
                    payload = min(chunk, want - total)
                    total += payload
                    left = skip + payload
                    pieces = []
                    laid.append((view, at, pieces, payload))
                    offset += skip
                n = min(count - done, -(-left // size))
                written = min(left, n * size)
                views.append(view[offset : at + written])
                pieces += (n, size, written)
                left -= written
                done += n
            if total == want and not left:
                break
            done = 0
        return ([], 0) if left else (views, total)

    def fill(self, vnet: Buffer, front: Buffer, length: int) -> None:
        """`length` bytes of payload lie where `lay_out` has put the next frame: send it. Raises BadRing or OSError."""
        view, at, pieces, payload = self._laid.popleft()
        header = self._header
        need = len(front) + length
        if need < FRAME_MIN:
            view[at + header + need : at + header + FRAME_MIN] = PADDING[need:]
            pieces = [1, pieces[1], header + FRAME_MIN]
        elif length < payload:
            pieces = _cut(pieces, header + need)
        count = 0
        for i in range(0, len(pieces), 3):
            n, size = pieces[i], pieces[i + 1]
            begin = self._next + count
            self.ring.push_run(self._heads[begin : begin + n], size, pieces[i + 2])
            self._free -= n * size
            self._done += n
            if self._done == self._runs[0][2]:
                self._runs.popleft()
                self._done = 0
            count += n
        parts = (vnet, front) if header == VNET_LEN else (vnet, _NUM_BUFFERS.pack(count), front)
        view[at : at + header + len(front)] = b"".join(parts)
        self._next += count
        self.filled = True
        if self._free < ROOM_MIN:
            self._refill()
        else:
            self._measure()

    def could_fit(self, length: int) -> bool:
        """Whether a frame of `length` bytes fits when everything is available."""
        if self._mergeable:
            return self._header + length <= self._capacity >> 1
        return bool(self._runs) and self._header + length <= self._runs[0][1]

    def publish(self) -> None:
        """Show the machine what was filled. Raises OSError."""
        self.filled = False
        self.ring.publish()

    def kicked(self) -> None:
        """The machine has made chains available. Raises BadRing or OSError."""
        self._refill()

    def _scatter(self, parts: Sequence[Buffer], need: int) -> None:
        """Copy `need` bytes of `parts` into as many buffers as they take. Raises BadRing."""
        start = self._first()[0]
        if len(start) < self._header:
            raise BadRing(f"a first buffer of {len(start)} bytes, without room for the header")
        count = part = at = 0
        source = memoryview(parts[0])
        while need:
            buffers = self._first()
            _, size, chains = self._runs[0]
            self._free -= size
            self._done += 1
            if self._done == chains:
                self._runs.popleft()
                self._done = 0
            written = 0
            for buffer in buffers:
                room, to = min(len(buffer), need), 0
                while to < room:
                    n = min(room - to, len(source) - at)
                    buffer[to : to + n] = source[at : at + n]
                    to += n
                    at += n
                    if at == len(source) and part + 1 < len(parts):
                        part += 1
                        source, at = memoryview(parts[part]), 0
                written += room
                need -= room
                if not need:
                    break
            self.ring.push(self._heads[self._next], written)
            self._next += 1
            count += 1
        if self._header != VNET_LEN:
            _NUM_BUFFERS.pack_into(start, VNET_LEN, count)

    def _first(self) -> list[memoryview]:
        """The buffers of the next chain."""
        buffers, size, count = self._runs[0]
        return buffers if count == 1 else [buffers[0][self._done * size : (self._done + 1) * size]]

    def _refill(self) -> None:
        """Take what the machine has made available; `full` if that is not much. Raises BadRing or OSError."""
        ring = self.ring
        if not ring.runs:
            return
        self._take(ring.available())
        if self._low():
            if self.filled:
                self.publish()  # the machine gives new chains when it gets these
            ring.want_kick(True)
            self._take(ring.available())
        full = self._low()
        if self.full and not full:
            ring.want_kick(False)
        self.full = full
        self._measure()

    def _low(self) -> bool:
        return self._free < min(ROOM_MIN, self._capacity >> 1) or not self._runs

    def _take(self, count: int) -> None:
        """Take chains ahead of time."""
        if count:
            if self._next:
                del self._heads[: self._next]
                self._next = 0
            self._free += self.ring.take_buffers(count, self._heads, self._runs)
            self._capacity = self._runs[-1][1] * self.ring.num

    def _measure(self) -> None:
        """Tell TCP how much it may send: frames do not fill all chains to their ends."""
        self.room = (len(self._heads) - self._next) * SEGMENT if self._cut else self._free - (self._free >> 3)


def _cut(pieces: list[int], need: int) -> list[int]:
    """The pieces of a frame that has only `need` bytes."""
    short: list[int] = []
    for i in range(0, len(pieces), 3):
        size, written = pieces[i + 1], min(need, pieces[i + 2])
        short += (-(-written // size), size, written)
        need -= written
        if not need:
            break
    return short
