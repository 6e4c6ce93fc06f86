"""Frames to a machine, written into the chains of its receive ring.

    taken ahead of time    `room`   what TCP may send now
    little is left         `full`   TCP waits; kicks are wanted, and the next one ends it
    filled, until the turn ends, or the ring runs dry         `publish`: the machine sees them

Payload of TCP need not be copied. Frames of a known length are laid out in chains; their payload is received there.
The headers follow when it is known how many bytes have come. Chains that were not filled are laid out anew.

    lay_out(54, 3000, 4500)   | vnet, headers | payload | payload |  | vnet, headers | payload |
    recvmsg: 3500 bytes                       |#########|#########|                  |###......|
    fill(3000), fill(500)     |###############|#########|#########|  |###############|###|

With MRG_RXBUF a frame fills as many chains as it needs; the first says how many (num_buffers). Without it a frame fills
one chain, and what does not fit does not get through. A driver that takes super-frames has chains for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from struct import Struct
from typing import Final

from ..wire.virtio import VNET_LEN
from .backend import Buffer
from .gso import FRAME_MIN, PADDING
from .guest_memory import BadRing
from .vring import Chain, Vring

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
        self._chains: deque[Chain] = deque()  # taken, and not filled
        self._free = 0  # bytes in them
        self._capacity = 0  # bytes that the ring has when all of it is available
        self.filled = False  # whether there is something to publish
        self.full = False
        self.room = 0
        # Frames that were laid out: start of the first buffer, (head, bytes written) of each chain, bytes of payload
        self._laid: deque[tuple[memoryview, list[int], int]] = deque()

    def start(self) -> None:
        """The ring runs: take what there is, and hear of more when it is needed. Raises BadRing or OSError."""
        self.full = False
        self._refill()

    def stop(self) -> None:
        """The ring is about to stop: give back what was taken. Raises OSError."""
        ring = self.ring
        if self.filled and ring.bound and not ring.broken:
            self.publish()
        ring.give_back(len(self._chains))
        self._chains.clear()
        self._laid.clear()
        self.filled = False
        self._free = self.room = 0

    def put(self, vnet: Buffer, front: Buffer, rest: Sequence[Buffer], length: int) -> bool:
        """Write a frame of `length` bytes, Ethernet header in `front`; whether it fits. Raises BadRing or OSError."""
        need = self._header + length
        chains = self._chains
        if self._free < need + ROOM_MIN:
            self._refill()
        if not chains or need > (self._free if self._mergeable else chains[0][2]):
            return False
        parts = (vnet, front) if self._header == VNET_LEN else (vnet, _ONE_BUFFER, front)
        if need <= len(chains[0][1][0]):
            head, buffers, size = chains.popleft()
            buffers[0][:need] = b"".join((*parts, *rest))
            self._free -= size
            self.ring.push(head, need)
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
        total = left = 0
        used: list[int] = []
        for head, buffers, size in self._chains:
            buffer = buffers[0]
            if not left:
                if total == want:
                    break
                if size <= skip or size < shortest or len(buffers) > 1:
                    return [], 0
                left = payload = min(chunk, want - total)
                used = []
                laid.append((buffer, used, payload))
                total += payload
                written = skip + left if skip + left < size else size
                views.append(buffer[skip:written])
                left -= written - skip
            else:
                if len(buffers) > 1:
                    return [], 0
                written = left if left < size else size
                views.append(buffer if written == size else buffer[:written])
                left -= written
            used.append(head)
            used.append(written)
        return ([], 0) if left else (views, total)

    def fill(self, vnet: Buffer, front: Buffer, length: int) -> None:
        """`length` bytes of payload lie where `lay_out` has put the next frame: send it. Raises BadRing or OSError."""
        start, used, payload = self._laid.popleft()
        header = self._header
        need = len(front) + length
        if need < FRAME_MIN:
            start[header + need : header + FRAME_MIN] = PADDING[need:]
            used = [used[0], header + FRAME_MIN]
        elif length < payload:
            used = _cut(used, header + need)
        count = len(used) >> 1
        parts = (vnet, front) if header == VNET_LEN else (vnet, _NUM_BUFFERS.pack(count), front)
        start[: header + len(front)] = b"".join(parts)
        chains = self._chains
        for _ in range(count):
            self._free -= chains.popleft()[2]
        self.ring.push_all(used)
        self.filled = True
        if self._free < ROOM_MIN:
            self._refill()
        else:
            self._measure()

    def could_fit(self, length: int) -> bool:
        """Whether a frame of `length` bytes fits when everything is available."""
        if self._mergeable:
            return self._header + length <= self._capacity >> 1
        return bool(self._chains) and self._header + length <= self._chains[0][2]

    def publish(self) -> None:
        """Show the machine what was filled. Raises OSError."""
        self.filled = False
        self.ring.publish()

    def kicked(self) -> None:
        """The machine has made chains available. Raises BadRing or OSError."""
        self.ring.kicked()
        self._refill()

    def _scatter(self, parts: Sequence[Buffer], need: int) -> None:
        """Copy `need` bytes of `parts` into as many buffers as they take. Raises BadRing."""
        chains = self._chains
        start = chains[0][1][0]
        if len(start) < self._header:
            raise BadRing(f"a first buffer of {len(start)} bytes, without room for the header")
        count = part = at = 0
        source = memoryview(parts[0])
        while need:
            head, buffers, size = chains.popleft()
            self._free -= size
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
            self.ring.push(head, written)
            count += 1
        if self._header != VNET_LEN:
            _NUM_BUFFERS.pack_into(start, VNET_LEN, count)

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
        return self._free < min(ROOM_MIN, self._capacity >> 1) or not self._chains

    def _take(self, count: int) -> None:
        """Take chains ahead of time."""
        ring, chains = self.ring, self._chains
        if count:
            self._free += ring.take_buffers(count, chains)
            self._capacity = chains[-1][2] * ring.num

    def _measure(self) -> None:
        """Tell TCP how much it may send: frames do not fill all chains to their ends."""
        self.room = len(self._chains) * SEGMENT if self._cut else self._free - (self._free >> 3)


def _cut(used: list[int], need: int) -> list[int]:
    """The chains of a frame that has only `need` bytes."""
    short: list[int] = []
    for i in range(0, len(used), 2):
        written = min(need, used[i + 1])
        short += (used[i], written)
        need -= written
        if not need:
            break
    return short
