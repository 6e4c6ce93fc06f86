"""The packet pool: nothing outside a packet is seen."""

from __future__ import annotations

from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.link.packet import FRAME_MAX, FRAME_ROOM, PacketPool
from passt.wire.cursor import Malformed
from passt.wire.virtio import VNET_LEN

LAYOUT = Struct("!HH")


@pytest.fixture
def pool() -> PacketPool:
    pool = PacketPool(64)
    pool.buf[:] = bytes(i & 0xFF for i in range(pool.size))
    return pool


def test_room_for_one_more_frame() -> None:
    """A frame may begin anywhere up to the nominal size, and an oversized one still shows."""
    assert PacketPool(64).size == 64 + FRAME_ROOM
    assert FRAME_ROOM > VNET_LEN + FRAME_MAX


def test_reads(pool: PacketPool) -> None:
    assert pool.unpack(LAYOUT, 10, 14) == (0x0A0B, 0x0C0D)
    assert pool.copy(10, 14) == bytes((10, 11, 12, 13))
    assert pool.view(10, 14) == bytes((10, 11, 12, 13))
    assert pool.copy(10, 10) == b""
    assert pool.copy(0, pool.size) == bytes(pool.buf)


def test_a_view_is_no_copy(pool: PacketPool) -> None:
    view, copy = pool.view(10, 12), pool.copy(10, 12)
    pool.buf[10] = 99
    assert view[0] == 99
    assert copy[0] == 10
    assert isinstance(copy, bytes)


def test_last_bytes(pool: PacketPool) -> None:
    pool.unpack(LAYOUT, pool.size - 4, pool.size)
    for offset, end in ((pool.size - 3, pool.size), (pool.size - 4, pool.size - 1), (pool.size, pool.size + 4)):
        with pytest.raises(Malformed, match="truncated"):
            pool.unpack(LAYOUT, offset, end)


POOL = PacketPool(0)
PLACES = st.integers(-20, 20) | st.integers(POOL.size - 20, POOL.size + 20)


@given(PLACES, PLACES)
def test_inside_or_malformed(offset: int, end: int) -> None:
    fits = 0 <= offset <= end <= POOL.size
    for read in (POOL.view, POOL.copy):
        if fits:
            assert len(read(offset, end)) == end - offset
        else:
            with pytest.raises(Malformed):
                read(offset, end)
    if fits and end - offset >= LAYOUT.size:
        assert POOL.unpack(LAYOUT, offset, end) == (0, 0)
    else:
        with pytest.raises(Malformed):
            POOL.unpack(LAYOUT, offset, end)
