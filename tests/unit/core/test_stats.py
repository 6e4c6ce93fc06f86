"""What the kernel tells of this process, and what others can tell."""

from __future__ import annotations

import resource

import pytest

from passt.core.stats import Stats

MIB = 1 << 20


def test_memory_is_that_of_now() -> None:
    stats = Stats()
    stats.open_memory()
    try:
        before = stats.resident()
        block = bytearray(64 * MIB)
        block[:: resource.getpagesize()] = b"x" * len(range(0, len(block), resource.getpagesize()))
        during = stats.resident()
        del block
        after = stats.resident()
    finally:
        stats.close()
    assert during - before > 60 * MIB
    assert after < during - 60 * MIB


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    monkeypatch.setattr("passt.core.stats._STATM", "/nowhere/statm")
    stats.open_memory()
    assert stats.resident() > MIB


def test_processor_time() -> None:
    user, system = Stats.cpu()
    for _ in range(100_000):
        pass
    again = Stats.cpu()
    assert sum(again) > user + system > 0


def test_gauges() -> None:
    stats = Stats()
    assert (stats.gauge("listeners"), stats.gauge("guests", 1)) == (0, 1)
    stats.gauges["listeners"] = lambda: 7
    assert stats.gauge("listeners", 3) == 7
