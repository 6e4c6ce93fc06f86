"""A pool whose payload lies elsewhere: any range is found, in as few views as there are places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.link.scattered import ScatteredPool
from passt.wire.cursor import Malformed

SIZE = 400
HOLES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=5)  # (bytes before, bytes in a piece)


def pool_with(pieces: list[tuple[int, int]]) -> tuple[ScatteredPool, bytes]:
    """A pool with such pieces, and all of its first bytes as they should be found."""
    pool = ScatteredPool()
    truth = bytearray(i % 251 for i in range(SIZE))
    pool.buf[:SIZE] = truth
    at = 0
    for before, length in pieces:
        at += before
        content = bytes((200 + i) % 256 for i in range(length))
        pool.add(at, memoryview(content))
        truth[at : at + length] = content
        at += length
    return pool, bytes(truth)


@given(HOLES, st.integers(0, SIZE), st.integers(0, SIZE))
def test_any_range_is_found(pieces: list[tuple[int, int]], a: int, b: int) -> None:
    pool, truth = pool_with(pieces)
    start, end = min(a, b), max(a, b)
    parts: list[memoryview] = []
    pool.gather(parts, start, end)
    assert b"".join(parts) == truth[start:end]
    assert len(parts) <= 2 * len(pieces) + 1
    assert pool.copy(start, end) == truth[start:end] == pool.view(start, end)


def test_a_piece_is_not_copied() -> None:
    pool, _ = pool_with([(10, 50), (0, 50)])
    content = memoryview(bytearray(20))
    pool.add(200, content)
    view = pool.view(205, 215)
    content[5] = 77
    assert view[0] == 77


def test_a_range_beyond_the_pool_is_refused() -> None:
    pool, _ = pool_with([])
    for start, end in ((-1, 5), (5, 4), (0, pool.size + 1)):
        with pytest.raises(Malformed):
            pool.view(start, end)
        with pytest.raises(Malformed):
            pool.copy(start, end)


def test_clear_lets_go() -> None:
    memory = bytearray(100)
    pool = ScatteredPool()
    pool.add(0, memoryview(memory))
    pool.clear()
    memory.append(1)  # BufferError if a view were left
    assert pool.copy(0, 4) == bytes(4)
