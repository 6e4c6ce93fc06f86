"""Room for new flows: what ends first, and what never does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from passt import log
from passt.flow.room import CLOSING, DESCRIPTORS, HALF_OPEN, IDLE, NOTHING, TABLE, Room

from ..support import T0


def room(**has: int) -> tuple[Room, list[tuple[str, bool]]]:
    """A room where each rank has so many flows, and the ends that were asked for."""
    asked: list[tuple[str, bool]] = []
    made = Room()

    def give(name: str) -> Callable[[bool, float], int]:
        def ended(foreign: bool, now: float) -> int:
            asked.append((name, foreign))
            return has.get(name, 0)

        return ended

    for rank, name in ((IDLE, "idle"), (CLOSING, "closing"), (HALF_OPEN, "half_open"), (IDLE, "other")):
        made.offer(rank, give(name))
    return made, asked


@pytest.mark.parametrize(
    ("has", "asked", "found"),
    [
        ({"closing": 1, "half_open": 1}, ["closing"], True),
        ({"half_open": 3, "idle": 1}, ["closing", "half_open"], True),
        ({"other": 1}, ["closing", "half_open", "idle", "other"], True),
        ({}, ["closing", "half_open", "idle", "other"], False),
    ],
)
@pytest.mark.parametrize("foreign", [True, False])
def test_the_least_useful_end_first(has: dict[str, int], asked: list[str], found: bool, foreign: bool) -> None:
    made, order = room(**has)
    assert made.make(TABLE, T0, foreign=foreign) == found
    assert order == [(name, foreign) for name in asked]


def test_where_there_was_nothing_nobody_looks_for_a_while() -> None:
    made, asked = room()
    assert not made.make(TABLE, T0)
    assert not made.make(TABLE, T0 + NOTHING / 2) and len(asked) == 4
    assert not made.make(DESCRIPTORS, T0 + NOTHING / 2) and len(asked) == 8, "another shortage"
    assert not made.make(TABLE, T0 + NOTHING * 1.5) and len(asked) == 12


@pytest.mark.parametrize(
    ("short_of", "has", "text"),
    [
        (DESCRIPTORS, {"half_open": 3}, ["No descriptor is left: closed 3 half-open TCP connections"]),
        (TABLE, {"idle": 2, "other": 1}, ["The table of flows is full: closed 3 idle UDP, query or ping flows"]),
        (TABLE, {}, ["The table of flows is full: refusing new flows"]),
        (DESCRIPTORS, {}, []),
    ],
)
def test_the_log_has_a_line(
    short_of: str, has: dict[str, int], text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: lines.append(text))
    room(**has)[0].make(short_of, T0)
    assert lines == text


@pytest.mark.parametrize(
    ("number", "has", "looked", "found"),
    [
        (errno.EMFILE, 1, 2, True),
        (errno.ENFILE, 1, 2, True),
        (errno.EMFILE, 0, 4, False),
        (errno.EACCES, 1, 0, False),
    ],
)
def test_a_descriptor(number: int, has: int, looked: int, found: bool) -> None:
    made, asked = room(half_open=has)
    assert made.descriptor(OSError(number, os.strerror(number)), T0, foreign=True) == found
    assert len(asked) == looked and all(foreign for _, foreign in asked)
