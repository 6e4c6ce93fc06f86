"""The packet pool: one preallocated buffer that frames are read into, and bounds-checked access to it.

A packet is a pair of offsets (start, end) into the pool. Parsers read a packet by `unpack` and `view`, which refuse
any range that is not inside [start, end). So a wrong length field never leads to a read beyond the packet, let alone
beyond the pool.

    +---------------------------------------------------------------------------+
    | vnet header + frame 0 | vnet header + frame 1 | ...   at least FRAME_ROOM |
    +---------------------------------------------------------------------------+

A back end may give another pool (`link/backend.py`), whose `buf` has the headers of frames and whose `mv` finds payload
where it lies.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from ..drops import Drop
from ..wire import ether, ip
from ..wire.cursor import Malformed
from ..wire.virtio import VNET_LEN

FRAME_MAX = ether.HEADER_LEN + ip.HEADER6.size + 65535  # the longest packet: the length field of IPv6 is without header
FRAME_ROOM = VNET_LEN + FRAME_MAX + 1  # one byte more than is valid, so that an oversized frame shows
POOL_SIZE = 1 << 20


class PacketPool:
    """`buf` is the memory, `mv` a view of all of it. Frames are appended at increasing offsets, batch by batch."""

    __slots__ = ("buf", "mv", "size")

    def __init__(self, size: int = POOL_SIZE) -> None:
        self.size = size + FRAME_ROOM
        self.buf = bytearray(self.size)
        self.mv = memoryview(self.buf)

    def unpack(self, layout: Struct, offset: int, end: int) -> tuple[Any, ...]:
        """Values of `layout` at `offset` of a packet that ends at `end`; raises Malformed("truncated")."""
        if offset < 0 or offset + layout.size > end or end > self.size:
            raise Malformed(Drop.TRUNCATED)
        return layout.unpack_from(self.buf, offset)

    def view(self, offset: int, end: int) -> memoryview:
        """The bytes [offset, end), without a copy; valid until the next batch is read."""
        if not 0 <= offset <= end <= self.size:
            raise Malformed(Drop.TRUNCATED)
        return self.mv[offset:end]

    def copy(self, offset: int, end: int) -> bytes:
        """The bytes [offset, end), copied: for keys and for services that keep what they got."""
        if not 0 <= offset <= end <= self.size:
            raise Malformed(Drop.TRUNCATED)
        return self.mv[offset:end].tobytes()
