from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.udp_engine.gso_batch import GSO_BATCH_MAX, SEGMENTS_MAX, GsoBatch, gso_batches

MEMORY = memoryview(bytes(i % 251 for i in range(1 << 18)))


def frames(*pieces: int | tuple[int, int]) -> list[int]:
    """Pieces one behind the other with a gap between: a length, or (length, size of the datagrams in it)."""
    flat: list[int] = []
    at = 0
    for piece in pieces:
        length, size = piece if isinstance(piece, tuple) else (piece, 0)
        flat += (at, at + length, size)
        at += length + 1
    return flat


def shape(found: list[GsoBatch]) -> list[tuple[int, int, int]]:
    return [(size, total, len(views)) for size, total, views in found]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((), []),
        ((100,), [(100, 100, 1)]),
        ((100, 100, 100), [(100, 300, 3)]),
        ((100, 100, 40), [(100, 240, 3)]),  # a shorter one ends a run, and belongs to it
        ((100, 40, 100), [(100, 140, 2), (100, 100, 1)]),
        ((40, 100), [(40, 40, 1), (100, 100, 1)]),
        ((0,), [(0, 0, 1)]),
        ((100, 0, 100), [(100, 100, 1), (0, 0, 1), (100, 100, 1)]),
        ((0, 0), [(0, 0, 1), (0, 0, 1)]),
        (((300, 100),), [(100, 300, 1)]),
        (((300, 100), (300, 100)), [(100, 600, 2)]),
        (((300, 100), 100, 40), [(100, 440, 3)]),
        (((250, 100), 100), [(100, 250, 1), (100, 100, 1)]),  # its last datagram is short already
        ((100, (300, 100)), [(100, 400, 2)]),
        ((100, (90, 30)), [(100, 100, 1), (30, 90, 1)]),  # shorter, but three datagrams
        ((100, (90, 90)), [(100, 190, 2)]),  # one datagram, whatever its frame was called
        ((100, (90, 95)), [(100, 190, 2)]),
    ],
)
def test_what_is_joined(pieces: tuple[int | tuple[int, int], ...], expected: list[tuple[int, int, int]]) -> None:
    assert shape(gso_batches(MEMORY, frames(*pieces))) == expected


def test_no_more_datagrams_than_a_kernel_cuts() -> None:
    assert shape(gso_batches(MEMORY, frames(*[10] * (SEGMENTS_MAX + 1)))) == [(10, 10 * SEGMENTS_MAX, 64), (10, 10, 1)]
    assert shape(gso_batches(MEMORY, frames((10 * 100 + 5, 10)))) == [(10, 640, 1), (10, 365, 1)]


def test_no_more_bytes_than_a_device_takes() -> None:
    n = GSO_BATCH_MAX // 1400
    assert shape(gso_batches(MEMORY, frames(*[1400] * (n + 1)))) == [(1400, 1400 * n, n), (1400, 1400, 1)]


def test_a_super_frame_is_not_cut_for_being_long() -> None:
    assert shape(gso_batches(MEMORY, frames((65507, 1400)))) == [(1400, 65507, 1)]


def test_without_segments_each_goes_alone() -> None:
    assert shape(gso_batches(MEMORY, frames(100, 100, (250, 100), 0), 1)) == [
        (100, 100, 1),
        (100, 100, 1),
        (100, 100, 1),
        (100, 100, 1),
        (50, 50, 1),
        (0, 0, 1),
    ]


def datagrams(size: int, data: bytes) -> list[bytes]:
    """The datagrams that a kernel cuts `data` into with UDP_SEGMENT `size`."""
    return [data[i : i + size] for i in range(0, len(data), size)] if data else [b""]


lengths = st.sampled_from((0, 1, 7, 100, 1400)) | st.integers(0, 3000)
piece = lengths | st.tuples(lengths, st.sampled_from((0, 1, 7, 100, 1400)))


@given(st.lists(piece, max_size=40), st.sampled_from((1, 2, SEGMENTS_MAX)))
def test_the_same_datagrams_in_the_same_order(pieces: list[int | tuple[int, int]], segments: int) -> None:
    flat = frames(*pieces)
    sent: list[bytes] = []
    for at in range(0, len(flat), 3):
        data = bytes(MEMORY[flat[at] : flat[at + 1]])
        sent += datagrams(flat[at + 2] or len(data), data)
    got: list[bytes] = []
    for size, total, views in gso_batches(MEMORY, flat, segments):
        data = b"".join(views)
        assert len(data) == total
        made = datagrams(size, data)
        assert len(made) <= segments
        assert total <= GSO_BATCH_MAX or len(views) == 1
        got += made
    assert got == sent
