"""The packet pool: one preallocated buffer that frames are read into, and bounds-checked access to it.

A packet is a pair of offsets (start, end) into the pool. Parsers read a packet by `unpack` and `view`, which refuse
any range that is not inside [start, end). So a wrong length field never leads to a read beyond the packet, let alone
beyond the pool.

    +---------------------------------------------------------------------------+
    | vnet header + frame 0 | vnet header + frame 1 | ...   at least FRAME_ROOM |
    +---------------------------------------------------------------------------+

A back end may give another pool (`link/backend.py`), whose `buf` has the headers of frames and whose `mv` finds payload
where it lies. Its `whole` is None, and `gather` finds the pieces. Of any other pool `whole` is `mv`: a slice of it is
all that `gather` would find, without a call and a list for each segment.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, Final

from ..drops import Drop
from ..linux.memory import zeros
from ..wire import ether, ip
from ..wire.cursor import Malformed
from ..wire.virtio import VNET_LEN

FRAME_MAX: Final = ether.HEADER_LEN + ip.HEADER6.size + 65535  # IPv6's length field is without header
FRAME_ROOM: Final = VNET_LEN + FRAME_MAX + 1  # one byte more than is valid, so that an oversized frame shows
POOL_SIZE: Final = 1 << 20

# Source MAC, EtherType, version and header length, TOS, total length, id, fragment, TTL, protocol
_EthIp4 = tuple[bytes, int, int, int, int, int, int, int, int]
ETH_IP4_UNPACK: Final[Callable[[bytearray, int], _EthIp4]] = Struct("!6sHBBHHHBB").unpack_from


class PacketPool:
    """`buf` is the memory, `mv` a view of all of it. Frames are appended at increasing offsets, batch by batch."""

    __slots__ = ("buf", "mv", "size", "whole")

    def __init__(self, size: int = POOL_SIZE) -> None:
        self.size = size + FRAME_ROOM
        self.buf = zeros(self.size)
        self.mv = memoryview(self.buf)
        self.whole: memoryview | None = self.mv

    def unpack(self, layout: Struct, offset: int, end: int) -> tuple[Any, ...]:
        """Values of `layout` at `offset` of a packet that ends at `end`; raises Malformed("truncated")."""
        if offset < 0 or offset + layout.size > end or end > self.size:
            raise Malformed(Drop.TRUNCATED)
        return layout.unpack_from(self.buf, offset)

    def gather(self, parts: list[memoryview], offset: int, end: int) -> None:
        """Append views of the bytes [offset, end) to `parts`: one, unless payload lies elsewhere."""
        parts.append(self.mv[offset:end])

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

    def pair(self, offset: int, end: int) -> tuple[bytes, bytes]:
        """The two halves of the bytes [offset, end), copied: source and destination."""
        both = self.copy(offset, end)
        n = len(both) // 2
        return both[:n], both[n:]
