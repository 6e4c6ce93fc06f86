"""Timers, on real timerfds. Deadlines in the past fire at once, so that no test waits for time to go by."""

from __future__ import annotations

import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from passt import NEVER
from passt.linux.syscall import timerfd_settime
from passt.loop import timers as module
from passt.loop.reactor import EPOLLIN, TYPE_TCP, Reactor
from passt.loop.timers import NO_TIMER, POOL_MAX, TimerPool

SOON = 0.001
LATER = 3600.0


class Clock:
    """A pool on a real reactor. `turn` waits for what is due; `settings` are the system calls that armed timers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reactor = Reactor()
        self.pool = TimerPool(self.reactor)
        self.fired: list[int] = []
        self.settings: list[tuple[int, float]] = []
        self.pool.callback = lambda index, now: self.fired.append(index)
        real: Callable[[int, float], None] = timerfd_settime

        def settime(fd: int, deadline: float) -> None:
            self.settings.append((fd, deadline))
            real(fd, deadline)

        monkeypatch.setattr(module, "timerfd_settime", settime)

    def turn(self, timeout: float = 5) -> None:
        self.reactor.turn(timeout)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock(monkeypatch)
    yield clock
    clock.reactor.close()
    for fd, expiry in enumerate(clock.pool._expiry):
        if expiry:
            os.close(fd)


# Single timers -----------------------------------------------------------------------------------------------------


def test_single_timer(clock: Clock) -> None:
    fired: list[float] = []
    services = clock.pool.services
    one = services.new(fired.append)
    other = services.new(lambda now: pytest.fail("fired"))
    clock.turn(0)
    assert fired == []
    deadline = time.monotonic() + SOON
    services.arm(one, deadline)
    services.arm(other, deadline + LATER)
    clock.turn()
    assert len(fired) == 1
    assert fired[0] >= deadline - 1e-6
    clock.turn(0)
    assert len(fired) == 1, "it fires once"
    services.arm(one, time.monotonic())
    clock.turn()
    assert len(fired) == 2
    for fd in (one, other):
        os.close(fd)


def test_disarm(clock: Clock) -> None:
    services = clock.pool.services
    timer = services.new(lambda now: pytest.fail("fired"))
    services.arm(timer, time.monotonic() - 1)
    services.disarm(timer)
    clock.turn(0)
    os.close(timer)


def test_a_service_goes_on_after_a_fault(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", SOON)
    services = clock.pool.services
    fired: list[float] = []

    def fire(now: float) -> None:
        fired.append(now)
        if len(fired) == 1:
            raise ValueError("a fault")

    timer = services.new(fire)
    services.arm(timer, time.monotonic())
    with pytest.raises(ValueError, match="a fault"):
        clock.turn()
    clock.turn()
    assert len(fired) == 2
    assert fired[1] >= fired[0] + SOON - 1e-6
    clock.turn(0)
    assert len(fired) == 2, "and no more often than it asks for"
    os.close(timer)


@pytest.mark.parametrize("change", ["arm", "disarm"])
def test_no_longer_due_when_its_turn_comes(clock: Clock, change: str) -> None:
    """Two timers are due in one turn; the first to be handled puts the other off."""
    services = clock.pool.services
    fired: list[int] = []
    timers: list[int] = []

    def callback(me: int) -> Callable[[float], None]:
        def fire(now: float) -> None:
            fired.append(me)
            other = timers[1 - me]
            if change == "arm":
                services.arm(other, now + LATER)
            else:
                services.disarm(other)

        return fire

    timers += [services.new(callback(0)), services.new(callback(1))]
    for timer in timers:
        services.arm(timer, time.monotonic() - 1)
    clock.turn()
    assert len(fired) == 1
    for fd in timers:
        os.close(fd)


# The pool ----------------------------------------------------------------------------------------------------------


def test_fires_for_its_flow(clock: Clock) -> None:
    one, two = clock.pool.take(7), clock.pool.take(8)
    assert one != two
    clock.pool.at(two, time.monotonic() + SOON)
    clock.turn()
    assert clock.fired == [8]
    clock.turn(0)
    assert clock.fired == [8]


def test_earlier_re_arms_later_does_not(clock: Clock) -> None:
    now = time.monotonic()
    fd = clock.pool.take(1)
    for deadline in (now + 100, now + 200, now + 100, now + 50, now + 60):
        clock.pool.at(fd, deadline)
    assert clock.settings == [(fd, now + 100), (fd, now + 50)]


def test_after_firing_it_is_armed_again(clock: Clock) -> None:
    fd = clock.pool.take(1)
    clock.pool.at(fd, time.monotonic())
    clock.turn()
    clock.pool.at(fd, time.monotonic() + SOON)
    clock.turn()
    assert clock.fired == [1, 1]
    assert len(clock.settings) == 2


def test_given_back_fires_for_nobody(clock: Clock) -> None:
    fd = clock.pool.take(1)
    clock.pool.at(fd, time.monotonic())
    clock.pool.give_back(fd)
    clock.turn()
    assert clock.fired == []
    clock.turn(0)
    assert clock.pool._expiry[fd] == NEVER
    assert clock.pool.take(2) == fd, "it is used again"
    clock.pool.at(fd, time.monotonic())
    clock.turn()
    assert clock.fired == [2]


def test_pending_expiry_serves_the_next_owner(clock: Clock) -> None:
    """No system call for a deadline behind the one that is pending; the wake-up in between is the new owner's."""
    now = time.monotonic()
    fd = clock.pool.take(1)
    clock.pool.at(fd, now + SOON)
    clock.pool.give_back(fd)
    assert clock.pool.take(2) == fd
    clock.pool.at(fd, now + LATER)
    assert len(clock.settings) == 1
    clock.turn()
    assert clock.fired == [2], "spurious: the owner compares with its own deadline"
    clock.pool.at(fd, now + LATER)
    assert clock.settings[1:] == [(fd, now + LATER)]


def test_event_that_waits_when_the_timer_passes_on(clock: Clock) -> None:
    """In one turn the first handler closes the flow whose timer is due, and the timer passes to a new flow."""
    a, b = socket.socketpair()
    fd = clock.pool.take(1)

    def handler(ref: int, events: int, now: float) -> None:
        clock.pool.give_back(fd)
        assert clock.pool.take(2) == fd
        clock.pool.at(fd, now + LATER)
        clock.reactor.retire(a.fileno(), a)

    clock.reactor.handle(TYPE_TCP, handler)
    b.send(b"x")
    clock.reactor.watch(a.fileno(), TYPE_TCP, 1, EPOLLIN)
    clock.pool.at(fd, time.monotonic() - 1)
    clock.turn()  # epoll reports in the order of becoming ready: the socket, then the timer
    assert clock.fired == [2]
    assert clock.pool._expiry[fd] == NEVER
    b.close()


def test_still_armed_is_not_forgotten(clock: Clock) -> None:
    """A wake-up without an expiration leaves what is known of the pending one."""
    fd = clock.pool.take(1)
    deadline = time.monotonic() + LATER
    clock.pool.at(fd, deadline)
    clock.pool._fired(clock.reactor._refs[fd], EPOLLIN, time.monotonic())
    assert clock.fired == []
    clock.pool.at(fd, deadline + 1)
    assert len(clock.settings) == 1


def test_ten_thousand_deadlines_few_calls(clock: Clock) -> None:
    """A deadline that only moves on, as with every segment of a busy connection, costs one system call."""
    fd = clock.pool.take(1)
    now = time.monotonic() + LATER
    for i in range(10_000):
        clock.pool.at(fd, now + i)
    assert len(clock.settings) == 1


@pytest.mark.parametrize("what", ["timerfd", "epoll"])
def test_out_of_descriptors(clock: Clock, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(24, "Too many open files")

    before = len(os.listdir("/proc/self/fd"))
    if what == "timerfd":
        monkeypatch.setattr(module, "timerfd_create", fail)
    else:
        monkeypatch.setattr(clock.reactor, "watch", fail)
    assert clock.pool.take(1) == NO_TIMER
    assert clock.pool._count == 0 and len(os.listdir("/proc/self/fd")) == before


def test_there_are_so_many_and_no_more(clock: Clock) -> None:
    clock.pool.most = 2
    one, two = clock.pool.take(1), clock.pool.take(2)
    assert NO_TIMER not in (one, two)
    assert clock.pool.take(3) == NO_TIMER
    clock.pool.give_back(one)
    assert clock.pool.take(3) == one


@pytest.mark.parametrize(
    ("limit", "most"), [(1024, 128), (20_000, 2500), (1 << 20, POOL_MAX), (resource.RLIM_INFINITY, POOL_MAX)]
)
def test_a_share_of_the_descriptors(limit: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    reactor = Reactor()
    assert TimerPool(reactor).most == most
    reactor.close()


def test_descriptors_do_not_block(clock: Clock) -> None:
    fd = clock.pool.take(1)
    assert select.select([fd], [], [], 0)[0] == []
    with pytest.raises(BlockingIOError):
        os.read(fd, 8)


def test_timers_beyond_those_kept_are_closed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a closed one that is due in the same turn does not fire."""
    monkeypatch.setattr("passt.loop.timers.IDLE_MAX", 2)
    fds = [clock.pool.take(i) for i in range(5)]
    for fd in fds:
        clock.pool.at(fd, time.monotonic())
        clock.pool.give_back(fd)
    clock.turn()
    assert clock.fired == []
    for fd in fds[2:]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert {clock.pool.take(1), clock.pool.take(2)} == set(fds[:2])
    clock.pool.at(clock.pool.take(3), time.monotonic())  # a new one, which may have an old number
    clock.turn()
    assert 3 in clock.fired
