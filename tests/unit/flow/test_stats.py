"""Statistics of this process from the kernel, and those from other modules."""

from __future__ import annotations

import resource
import time

import pytest

from passt.flow.stats import Stats

MIB = 1 << 20


def test_memory_is_that_of_now() -> None:
    stats = Stats()
    stats.open_process()
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


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    monkeypatch.setattr("passt.flow.stats._STAT", "/nowhere/stat")
    stats.open_process()
    assert stats.resident() == 0
    user, system = stats.cpu()
    assert 0 < user < stats.cpu()[0] and system == 0


def test_processor_time() -> None:
    stats = Stats()
    stats.open_process()
    try:
        before = stats.cpu()
        ends = time.process_time() + 0.05  # several ticks of the kernel's clock
        while time.process_time() < ends:
            pass
        after = stats.cpu()
    finally:
        stats.close()
    assert sum(after) > sum(before) >= 0


def test_gauges() -> None:
    stats = Stats()
    assert (stats.gauge("listeners"), stats.gauge("guests", 1)) == (0, 1)
    stats.gauges["listeners"] = lambda: 7
    assert stats.gauge("listeners", 3) == 7
