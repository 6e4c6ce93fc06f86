"""Busy-polling, with a clock and an epoll set of the test."""

from __future__ import annotations

import time

import pytest

from passt.loop import busy_poll
from passt.loop.busy_poll import BULK, LONG, MOST, VAIN, BusyPoll, chosen

LIMIT = 100e-6
STEP = 1e-6  # s that each look at the clock takes
EVENTS = [(3, 1)]


class World:
    """Events come at known times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self.due = 0.0
        self.slept = 0
        self.polled = 0
        monkeypatch.setattr(time, "monotonic", self.clock)

    def clock(self) -> float:
        self.time += STEP
        return self.time

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        if timeout == 0:
            self.polled += 1
            return EVENTS if self.time >= self.due else []
        self.slept += self.time < self.due
        self.time = max(self.time, self.due)
        return EVENTS

    def wait(self, wait: BusyPoll, gap: float, moved: int = 0) -> tuple[int, int]:
        """Wait for an event that comes after `gap`: how often that slept, and how often it polled without."""
        self.slept = self.polled = 0
        self.due = self.time + gap
        assert wait.wait(self.poll, -1, 256, moved) == EVENTS
        assert wait.now == self.time >= self.due
        return self.slept, self.polled


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def eager(world: World) -> BusyPoll:
    """One that has all of the credit."""
    wait = BusyPoll(LIMIT)
    for _ in range(MOST):
        world.wait(wait, 20e-6)
    return wait


def test_it_polls_after_short_waits_only(world: World) -> None:
    wait = BusyPoll(LIMIT)
    slept = [world.wait(wait, 20e-6)[0] for _ in range(LONG + 3)]
    assert slept == [1] * (LONG + 1) + [0] * 2


def test_an_idle_daemon_sleeps_after_one_limit(world: World) -> None:
    wait = eager(world)
    slept, polled = world.wait(wait, 10.0)
    assert slept == 1 and LIMIT / STEP / 2 < polled < 2 * LIMIT / STEP
    assert world.wait(wait, 10.0) == (1, 0)


def test_a_poll_in_vain_costs_many_short_waits(world: World) -> None:
    wait = eager(world)
    world.wait(wait, 1e-3)
    slept = [world.wait(wait, 20e-6)[0] for _ in range(LONG - VAIN + 3)]
    assert slept == [1] * (LONG - VAIN + 1) + [0] * 2


@pytest.mark.parametrize("short", range(1, LONG + 1))
def test_requests_with_pauses_never_poll(world: World, short: int) -> None:
    wait = BusyPoll(LIMIT)
    for _ in range(50):
        assert world.wait(wait, 1e-3) == (1, 0)
        assert [world.wait(wait, 20e-6) for _ in range(short)] == [(1, 0)] * short


def test_after_bulk_it_sleeps_until_waits_were_short_again(world: World) -> None:
    wait = eager(world)
    assert world.wait(wait, 20e-6, moved=BULK) == (1, 0)
    assert [world.wait(wait, 20e-6)[0] for _ in range(LONG + 1)] == [1] * LONG + [0]


def test_a_wait_with_an_end_does_not_poll(world: World) -> None:
    wait = eager(world)
    world.slept = world.polled = 0
    assert wait.wait(world.poll, 1.0, 256, 0) == EVENTS and world.polled == 0


def test_it_is_off_with_one_processor_or_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_poll, "PROCESSORS", 2)
    on = chosen(100)
    assert on is not None and on.limit == pytest.approx(LIMIT)
    assert chosen(0) is None
    monkeypatch.setattr(busy_poll, "PROCESSORS", 1)
    assert chosen(100) is None
