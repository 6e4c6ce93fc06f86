"""Sums by NumPy are those of `int.from_bytes`, whatever lies between the pieces; runs are found."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.link import vector_sums
from passt.link.packet import PacketPool
from passt.link.vector_sums import SCALAR_MAX, VectorVerifier, _run
from passt.link.verify import Verifier


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 2 * SCALAR_MAX) | st.integers(1, 6000), st.integers(1, 40)),
        max_size=4,
    ),
    pseudo=st.integers(0, 1 << 40),
    step=st.sampled_from([2, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_as_the_plain_one(pieces: list[tuple[int, int, int]], pseudo: int, step: int, seed: int) -> None:
    pool = PacketPool(1 << 20)
    rng = random.Random(seed)
    flat: list[int] = []
    at = 100
    mv = memoryview(pool.buf)
    for gap, length, count in pieces:
        for _ in range(count):
            start, end = at + gap, at + gap + length
            pool.buf[start - 20 : end] = rng.randbytes(length + 20)
            if rng.random() < 0.5 and length >= 2:  # make it sound: the last word in step with the start takes the rest
                place = end - 2 - (length & 1)
                pool.buf[place : place + 2] = bytes(2)
                total = int.from_bytes(mv[start - 20 : end], "little") + pseudo + (length << 8)
                pool.buf[place : place + 2] = (-total % 0xFFFF).to_bytes(2, "little")
            flat += [start, end, 0][:step]
            at = end + 20
    plain, vector = (make(pool, Counter())._faulty(flat, step, 20, pseudo) for make in (Verifier, VectorVerifier))
    assert vector == plain


@pytest.mark.parametrize(
    ("pieces", "run"),
    [
        ([0, 10], (1, 0)),
        ([0, 10, 20, 30], (2, 20)),
        ([0, 10, 20, 30, 40, 45], (2, 20)),
        ([0, 10, 20, 30, 40, 45, 60, 70], (2, 20)),
        ([0, 10, 20, 30, 40, 50, 61, 71], (3, 20)),
        ([0, 10, 20, 31], (1, 20)),
        ([20, 30, 0, 10], (1, 0)),
        ([0, 10, 0, 10], (1, 0)),
        ([0, 10, 20, 30, 40, 50, 61, 66], (3, 20)),
        ([0, 10, 21, 30, 40, 50], (1, 21)),
    ],
)
def test_runs(pieces: list[int], run: tuple[int, int]) -> None:
    assert _run(pieces, 0, 2) == run
    assert _run([*range(90, 94), *(n + 99 for n in pieces)], 4, 2) == run, "not from the first place on"


def test_a_run_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of equal frames costs one sum, not one for each."""
    calls: list[int] = []
    real = VectorVerifier._rows

    def sums(self: VectorVerifier, at: int, width: int, rows: int, stride: int, total: int) -> list[int]:
        calls.append(rows)
        return real(self, at, width, rows, stride, total)

    monkeypatch.setattr(vector_sums.VectorVerifier, "_rows", sums)
    pool = PacketPool(1 << 18)
    flat = [n for i in range(100) for n in (100 + 1518 * i, 100 + 1518 * i + 1480)]
    VectorVerifier(pool, Counter())._faulty(flat, 2, 20, 0)
    assert calls == [100]
