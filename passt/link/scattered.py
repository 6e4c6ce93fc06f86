"""A packet pool whose payload may lie elsewhere: in buffers of a machine that shares its memory.

Offsets are those of any pool (`packet.py`): a frame is [start, end), frames one after the other. The
bytes are in several places:

    offsets     start        l4 + header             end
                | headers    | payload               |
    `buf`       | copied     | not written           |
    pieces                   | view of guest | view  |      as many as the machine's buffers

A frame is copied whole unless it is a plain TCP segment with much payload, the one kind whose payload a program moves
without looking at it. So `buf`, `unpack` and `mv` serve everything but payload of TCP, which `gather` finds; `view` and
`copy` find both.

Headers were copied once, and only copies are looked at. Payload may change until it was sent, which is the machine's
own affair: it goes to a socket, and nothing here depends on it.
"""

from __future__ import annotations

from bisect import bisect_right

from ..drops import Drop
from ..wire.cursor import Malformed
from .packet import PacketPool


class ScatteredPool(PacketPool):
    """`pieces` begin at offsets in ascending order; the back end clears them before each batch."""

    __slots__ = ("starts", "views")

    def __init__(self) -> None:
        super().__init__()
        self.whole = None
        self.starts: list[int] = []
        self.views: list[memoryview] = []

    def clear(self) -> None:
        """Let go of all views of the machine's memory."""
        self.starts.clear()
        self.views.clear()

    def add(self, start: int, view: memoryview) -> None:
        """The bytes from offset `start` on, behind all pieces so far, are those of `view`."""
        self.starts.append(start)
        self.views.append(view)

    def gather(self, parts: list[memoryview], offset: int, end: int) -> None:
        """Append views of the bytes [offset, end) to `parts`, without a copy."""
        starts = self.starts
        i = bisect_right(starts, offset) - 1
        while offset < end:
            if i >= 0:
                piece = self.views[i]
                at = offset - starts[i]
                if at < len(piece):
                    stop = min(len(piece), end - starts[i])
                    parts.append(piece[at:stop])
                    offset = starts[i] + stop
                    i += 1
                    if i == len(starts) or starts[i] != offset:
                        i -= 1
                    continue
            following = starts[i + 1] if i + 1 < len(starts) else end
            parts.append(self.mv[offset : min(end, following)])
            offset = min(end, following)
            i += 1

    def view(self, offset: int, end: int) -> memoryview:
        """The bytes [offset, end), copied only if they lie in several places."""
        if not 0 <= offset <= end <= self.size:
            raise Malformed(Drop.TRUNCATED)
        parts: list[memoryview] = []
        self.gather(parts, offset, end)
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def copy(self, offset: int, end: int) -> bytes:
        """The bytes [offset, end), copied."""
        return self.view(offset, end).tobytes()
