"""Fragments of many packets, in any order, overlapping, late, too many. A step is a fragment.

Invariants: what comes out are the bytes that were put in at their places; memory and number of packets are what is
there and within their limits; after the time limit nothing is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fuzz.steps import Steps
from passt.link import reassembly
from passt.link.reassembly import LENGTH_MAX, TIMEOUT, Reassembly

LIMITS = reassembly.MEMORY, reassembly.PACKETS
MEMORY, PACKETS = 1 << 15, 12  # here, so that short inputs reach them
DATA = bytes(i * 31 + (i >> 8) & 0xFF for i in range(1 << 17))
LENGTHS = (8, 16, 24, 48, 1480, 8192, 1, 7, 13, 0)


def seeds() -> Iterable[bytes]:
    step = bytes
    yield step((1, 0, 0, 0, 0)) + step((1, 0, 0, 1, 1)) + step((1, 0, 0, 2, 8))  # in order; the last one is short
    yield step((1, 0, 0, 2, 8)) + step((1, 0, 0, 1, 0)) + step((1, 0, 0, 0, 0))  # backwards
    yield step((1, 0, 0, 0, 0x40)) * 3 + step((1, 0, 0, 0, 1))  # duplicate, overlap
    yield b"".join(step((k, 0, 0, 0, 0)) for k in range(14))
    yield step((1, 0, 0, 0, 4)) + step((0x81, 200, 0, 1, 8)) + step((1, 0, 0, 0, 8))


def one(data: bytes) -> None:
    module: Any = reassembly
    module.MEMORY, module.PACKETS = MEMORY, PACKETS
    try:
        program(data)
    finally:
        module.MEMORY, module.PACKETS = LIMITS


def program(data: bytes) -> None:
    steps, now = Steps(data), 0.0
    queue = Reassembly(Counter())
    while steps.left > 0:
        key, passed, block, what = steps.byte(), steps.byte(), steps.word(), steps.byte()
        if key & 0x80:
            now += passed / 8
        more = not what & 0x80
        offset = (block & 0x1FFF) * 8
        payload = DATA[offset : offset + LENGTHS[(what & 0x3F) % len(LENGTHS)]]
        if not more:
            payload = payload[: len(payload) - (what >> 6 & 1)]
        whole = queue.add(bytes((key & 0x7F,)), offset, more, payload, now)
        assert whole is None or (len(whole) <= LENGTH_MAX and whole == DATA[: len(whole)])
        assert len(queue) <= PACKETS and queue.memory <= MEMORY
    assert queue.memory == sum(p.cost() for p in queue._packets.values())
    assert all(p.have == sum(map(len, p.parts)) for p in queue._packets.values())
    queue.add(b"x", 8, True, DATA[:8], now + TIMEOUT)
    assert len(queue) == 1 and queue.memory == 8 + reassembly.OVERHEAD
