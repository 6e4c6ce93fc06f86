"""The walk that goes on, and what is said of a fault. tests/unit/test_walks.py has all walks that use it."""

from __future__ import annotations

from collections import Counter

import pytest

from passt import log
from passt.loop.each import each, record


def test_a_fault_of_one_is_that_ones() -> None:
    seen: list[tuple[int, str]] = []
    faults: list[tuple[int, str]] = []

    def go(number: int, text: str) -> None:
        if number % 2:
            raise ValueError(number)
        seen.append((number, text))

    each(range(5), go, lambda number, e: faults.append((number, repr(e))), "x")
    assert seen == [(0, "x"), (2, "x"), (4, "x")]
    assert faults == [(1, "ValueError(1)"), (3, "ValueError(3)")]


def test_what_is_walked_over_may_change() -> None:
    things = {1: "a", 2: "b", 3: "c"}
    each(things, things.pop, lambda key, e: pytest.fail("no fault"))
    assert things == {}


def test_a_consequence_that_fails_is_raised_at_the_end() -> None:
    seen: list[int] = []

    def fault(number: int, e: Exception) -> None:
        seen.append(number)
        raise RuntimeError(number) from e

    with pytest.raises(RuntimeError, match="7"):
        each([7], lambda number: 1 // 0, fault)
    with pytest.raises(ExceptionGroup) as caught:
        each([1, 2], lambda number: 1 // 0, fault)
    assert seen == [7, 1, 2] and len(caught.value.exceptions) == 2


def test_what_is_no_fault_ends_the_walk() -> None:
    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        each([1, 2], stop, lambda number, e: pytest.fail("no fault"))


def test_a_fault_is_counted_and_told_at_a_limited_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_write", lambda level, text: lines.append(text))
    drops = Counter[str]()
    for _ in range(3):
        record(drops, "a frame", ValueError("odd"))
    assert drops == {"fault": 3} and lines == ["Handling a frame failed: ValueError('odd')"]
