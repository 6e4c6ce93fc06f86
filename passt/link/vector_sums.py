"""Sums for `link/verify.py`, by NumPy: for back ends that bring bulk without offloads.

Frames of a bulk transfer are equally long and follow each other at equal distances, so a run of them is a matrix, and
one call sums all rows. The others are summed one by one: short ones by `int.from_bytes`.

Prices (us, CPython 3.11, NumPy 2.4): 3 for 64 KiB, 1.2 for 1500 bytes alone, 0.2 each in a run of 32.
"""

from __future__ import annotations

import os
from collections import Counter

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read on import, as in `gso`
import numpy as np

from ..drops import Reason
from ..wire.checksum import PROTO_TCP
from .packet import PacketPool
from .verify import HEADER4, Verifier

SCALAR_MAX = 768  # bytes
RUN_MIN = 3  # rows of a matrix
LIST_MAX = 32  # rows whose sums are looked at one by one

_LE16 = np.dtype("<u2")
_LE32 = np.dtype("<u4")
_SUM = np.dtype(np.uint64)  # that of any number of 32-bit words
_add = np.add.reduce


class VectorVerifier(Verifier):
    """Verifies packets in a pool whose `buf` has all of them."""

    def __init__(self, pool: PacketPool, drops: Counter[Reason]) -> None:
        super().__init__(pool, drops)
        size = len(pool.buf)
        self._words = [np.frombuffer(pool.buf, _LE32, (size - i) // 4, i) for i in range(4)]  # from each alignment on

    def segments(self, key: bytes, segments: list[int]) -> list[int]:
        """As `Verifier.segments`, with a short way for the most frequent group: one acknowledgement."""
        if len(segments) == 2:
            l4, end = segments
            at = l4 - HEADER4 if len(key) == 12 else l4
            if end - at <= SCALAR_MAX:
                total = int.from_bytes(self._buf[at:end], "little") + int.from_bytes(key[:-4], "little")
                if not (total + (PROTO_TCP + end - l4 << 8)) % 0xFFFF:
                    return segments
        return super().segments(key, segments)

    def _faulty(self, pieces: list[int], step: int, back: int, pseudo: int) -> list[int]:
        faulty: list[int] = []
        i, n, mv, words = 0, len(pieces), self._mv, self._words
        while i < n:
            start, end = pieces[i], pieces[i + 1]
            at = start - back
            width = end - at
            total = pseudo + (end - start << 8)
            if width <= SCALAR_MAX:
                if (int.from_bytes(mv[at:end], "little") + total) % 0xFFFF:
                    faulty.append(i)
                i += step
                continue
            rows, stride = _run(pieces, i, step)
            if rows >= RUN_MIN:
                faulty += [i + step * row for row in self._rows(at, width, rows, stride, total % 0xFFFF)]
                i += step * rows
                continue
            whole = width >> 2
            value = int(_add(words[at & 3][at >> 2 : (at >> 2) + whole], 0, _SUM))
            if width & 3:
                value += int.from_bytes(mv[at + 4 * whole : end], "little")
            if (value + total) % 0xFFFF:
                faulty.append(i)
            i += step
        return faulty

    def _rows(self, at: int, width: int, rows: int, stride: int, total: int) -> list[int]:
        """The rows of a run whose sum, with `total`, is not 0."""
        buf = self._buf
        sums = _add(np.ndarray((rows, width >> 2), _LE32, buf, at, (stride, 4)), 1, _SUM)
        if width & 2:
            sums += np.ndarray((rows,), _LE16, buf, at + (width & ~3), (stride,))
        if width & 1:
            sums += np.ndarray((rows,), np.uint8, buf, at + width - 1, (stride,))
        if rows <= LIST_MAX:
            return [row for row, value in enumerate(sums.tolist()) if (value + total) % 0xFFFF]
        wrong: list[int] = ((sums + total) % 0xFFFF).nonzero()[0].tolist()
        return wrong


def _run(pieces: list[int], i: int, step: int) -> tuple[int, int]:
    """How many pieces from place `i` on are as long and as far apart as the first two, and how far.

    Most often all pieces are a run, or all but the last: to compare lists costs less than to compare numbers.
    """
    start, end = pieces[i], pieces[i + 1]
    count = (len(pieces) - i) // step
    stride = pieces[i + step] - start if count > 1 else 0
    if stride <= 0:
        return 1, 0
    if not i:
        rows = count if pieces[1 - step] - pieces[-step] == end - start else count - 1
        starts = list(range(start, start + stride * rows, stride))
        ends = list(range(end, end + stride * rows, stride))
        if pieces[: step * rows : step] == starts and pieces[1 : step * rows : step] == ends:
            return rows, stride
    rows, j, n = 1, i + step, len(pieces)
    while j < n and pieces[j] == start + stride * rows and pieces[j + 1] == end + stride * rows:
        j += step
        rows += 1
    return rows, stride
