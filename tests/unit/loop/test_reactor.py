"""The loop, on a real epoll set with pipes and sockets."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from passt.loop import reactor as r
from passt.loop.busy_poll import MOST, BusyPoll
from passt.loop.reactor import EPOLLIN, EPOLLOUT, TYPE_NAMES, TYPE_TAP, TYPE_TCP, TYPE_UDP, Reactor

Seen = list[tuple[int, int]]


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def readable() -> socket.socket:
    """A socket with something to read, for ever."""
    a, b = socket.socketpair()
    b.send(b"x")
    b.close()
    return a


def no_handler(ref: int, events: int, now: float) -> None:
    pytest.fail("called")


# References --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fd", "data"), [(1, 0, 0), (255, 0xFFFFFF, 0xFFFFFFFF), (3, 7, 131070)])
def test_reference(kind: int, fd: int, data: int) -> None:
    ref = r.make_ref(kind, fd, data)
    assert (ref >> 56, r.ref_fd(ref), r.ref_data(ref)) == (kind, fd, data)
    assert ref < 1 << 64


def test_types_have_names() -> None:
    kinds = {name: value for name, value in vars(r).items() if name.startswith("TYPE_") and name != "TYPE_NAMES"}
    assert sorted(kinds.values()) == list(range(len(TYPE_NAMES)))
    assert TYPE_NAMES[TYPE_TCP] == "tcp"


# Events ------------------------------------------------------------------------------------------------------------


def test_event_reaches_its_handler(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    a, b = pair
    calls: list[tuple[int, int, float]] = []
    reactor.handle(TYPE_TCP, lambda *call: calls.append(call))
    reactor.handle(TYPE_UDP, no_handler)
    ref = reactor.watch(a.fileno(), TYPE_TCP, 42, EPOLLIN)
    assert ref == r.make_ref(TYPE_TCP, a.fileno(), 42)
    reactor.turn(0)
    assert calls == []
    b.send(b"x")
    before = time.monotonic()
    reactor.turn(5)
    ((got, events, now),) = calls
    assert (got, events) == (ref, EPOLLIN)
    assert before <= now <= time.monotonic()
    assert (reactor.wakeups, reactor.events) == (2, 1)


def test_change_and_retarget(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    a, _ = pair
    seen: Seen = []
    reactor.handle(TYPE_TCP, lambda ref, events, now: seen.append((r.ref_data(ref), events)))
    reactor.watch(a.fileno(), TYPE_TCP, 1, EPOLLIN)
    reactor.turn(0)
    reactor.change(a.fileno(), EPOLLOUT)
    reactor.retarget(a.fileno(), 0xFFFFFFFF)
    reactor.turn(5)
    assert seen == [(0xFFFFFFFF, EPOLLOUT)]


def test_forget_leaves_it_open(reactor: Reactor) -> None:
    a = readable()
    reactor.handle(TYPE_TCP, no_handler)
    reactor.watch(a.fileno(), TYPE_TCP, 1, EPOLLIN)
    reactor.forget(a.fileno())
    reactor.turn(0)
    assert a.recv(1) == b"x"
    reactor.watch(a.fileno(), TYPE_TCP, 1, EPOLLIN)  # and it may be watched again
    a.close()


@pytest.mark.parametrize("doomed", [0, 1])
def test_who_gets_a_forgotten_number_in_the_same_turn_gets_no_event_of_its_former_owner(
    reactor: Reactor, doomed: int
) -> None:
    """The first of two handlers forgets the other descriptor; a socket without events gets its number at once."""
    socks = [readable(), readable()]
    fresh: list[socket.socket] = []
    handled: Seen = []

    def handler(ref: int, events: int, now: float) -> None:
        handled.append((r.ref_data(ref), events))
        victim = socks[1 - r.ref_data(ref)]
        fd = victim.fileno()
        a, b = socket.socketpair()
        reactor.forget(fd)
        victim.close()
        os.dup2(a.fileno(), fd)  # as the next socket() would get it, but for certain
        fresh.extend((a, b, socket.socket(fileno=fd)))
        reactor.watch(fd, TYPE_UDP, 7, EPOLLIN)

    reactor.handle(TYPE_TCP, handler)
    reactor.handle(TYPE_UDP, no_handler)
    for i in (doomed, 1 - doomed):
        reactor.watch(socks[i].fileno(), TYPE_TCP, i, EPOLLIN)
    reactor.turn(5)
    assert len(handled) == 1
    for s in (*socks, *fresh):
        s.close()


def test_descriptor_beyond_the_table(reactor: Reactor) -> None:
    a = readable()
    seen: Seen = []
    del reactor._refs[:]  # as if the number were high
    reactor.handle(TYPE_TCP, lambda ref, events, now: seen.append((r.ref_fd(ref), r.ref_data(ref))))
    reactor.watch(a.fileno(), TYPE_TCP, 5, EPOLLIN)
    reactor.turn(5)
    assert seen == [(a.fileno(), 5)]
    a.close()


# Retiring ----------------------------------------------------------------------------------------------------------


def test_retire_closes_at_the_end_of_the_turn(reactor: Reactor) -> None:
    a = readable()
    fd = a.fileno()
    open_in_turn: list[bool] = []

    def handler(ref: int, events: int, now: float) -> None:
        reactor.retire(fd, a)
        open_in_turn.append(a.fileno() == fd)

    reactor.handle(TYPE_TCP, handler)
    reactor.watch(fd, TYPE_TCP, 1, EPOLLIN)
    reactor.at_turn_end.append(lambda now: open_in_turn.append(a.fileno() == fd))
    reactor.turn(5)
    assert open_in_turn == [True, True]
    assert a.fileno() == -1
    reactor.turn(0)
    assert open_in_turn == [True, True, False]


def test_descriptor_number_is_not_reused_within_a_turn(reactor: Reactor) -> None:
    """The first handler retires all others, whose events wait in the same turn, and opens new sockets."""
    old = [readable() for _ in range(5)]
    numbers = {s.fileno() for s in old}
    new: list[socket.socket] = []
    seen: list[int] = []

    def handler(ref: int, events: int, now: float) -> None:
        seen.append(r.ref_data(ref))
        if len(seen) > 1:
            return
        for s in old:
            reactor.retire(s.fileno(), s)
        for i in range(5):
            new.append(readable())
            reactor.watch(new[-1].fileno(), TYPE_TCP, 100 + i, EPOLLIN)

    reactor.handle(TYPE_TCP, handler)
    for i, s in enumerate(old):
        reactor.watch(s.fileno(), TYPE_TCP, i, EPOLLIN)
    reactor.turn(5)
    assert len(seen) == 1
    assert seen[0] < 100
    assert not numbers & {s.fileno() for s in new}
    reactor.turn(5)
    assert sorted(seen[1:]) == [100, 101, 102, 103, 104]
    again = readable()  # now the number of a retired one is free, and has no owner
    assert again.fileno() in numbers
    for s in (*new, again):
        s.close()


def test_retire_what_was_never_watched(reactor: Reactor) -> None:
    class Owner:
        closed = False

        def close(self) -> None:
            self.closed = True

    near, far = Owner(), Owner()
    reactor.retire(20, near)
    reactor.retire(1 << 20, far)
    reactor.turn(0)
    assert near.closed
    assert far.closed


# The end of a turn, faults, stopping -------------------------------------------------------------------------------


def test_turn_end_comes_after_events(reactor: Reactor) -> None:
    order: list[str] = []
    nows: set[float] = set()

    def note(what: str, now: float) -> None:
        order.append(what)
        nows.add(now)

    sockets = [readable(), readable()]
    reactor.handle(TYPE_TCP, lambda ref, events, now: note("event", now))
    for s in sockets:
        reactor.watch(s.fileno(), TYPE_TCP, 0, EPOLLIN)
    reactor.at_turn_end += [lambda now: note("first", now), lambda now: note("second", now)]
    reactor.turn(5)
    assert order == ["event", "event", "first", "second"]
    assert len(nows) == 1, "one clock reading per turn"
    for s in sockets:
        s.close()


def test_fault_goes_to_its_owner_and_the_turn_goes_on(reactor: Reactor) -> None:
    sockets = [readable() for _ in range(3)]
    handled: list[int] = []
    faults: list[tuple[int, str]] = []

    def handler(ref: int, events: int, now: float) -> None:
        if r.ref_data(ref) == 1:
            raise ValueError("bug")
        handled.append(r.ref_data(ref))

    reactor.handle(TYPE_TCP, handler)
    for i, s in enumerate(sockets):
        reactor.watch(s.fileno(), TYPE_TCP, i, EPOLLIN)
    with pytest.raises(ValueError, match="bug"):
        reactor.turn(5)
    handled.clear()
    reactor.on_fault = lambda ref, e, now: faults.append((r.ref_data(ref), str(e)))
    reactor.turn(5)
    assert sorted(handled) == [0, 2]
    assert faults == [(1, "bug")]
    for s in sockets:
        s.close()


def test_run_until_stopped(reactor: Reactor) -> None:
    a = readable()
    turns: list[float] = []

    def handler(ref: int, events: int, now: float) -> None:
        turns.append(now)
        if len(turns) == 3:
            reactor.stop()

    reactor.handle(TYPE_TAP, handler)
    reactor.watch(a.fileno(), TYPE_TAP, 0, EPOLLIN)
    reactor.run()
    assert len(turns) == 3
    a.close()


# Between turns -----------------------------------------------------------------------------------------------------


def test_between_turns_descriptors_are_closed_already(
    reactor: Reactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Descriptors retired in the turn are closed then; those retired by the callback can be closed at once."""
    near, far = pair
    seen: list[bool] = []

    def handler(ref: int, events: int, now: float) -> None:
        reactor.between_turns(later)
        reactor.retire(near.fileno(), near)

    def later(now: float) -> None:
        seen.append(near.fileno() < 0)
        reactor.retire(far.fileno(), far)
        reactor.close_retired()
        seen.append(far.fileno() < 0)

    reactor.handle(TYPE_TCP, handler)
    reactor.watch(near.fileno(), TYPE_TCP, 0, EPOLLOUT)
    reactor.turn(5)
    assert seen == [True, True]


def test_between_turns_is_once(reactor: Reactor) -> None:
    seen: list[float] = []

    def again(now: float) -> None:
        seen.append(now)
        reactor.between_turns(seen.append)

    reactor.between_turns(again)
    reactor.turn(0)
    assert len(seen) == 1
    reactor.turn(0)
    reactor.turn(0)
    assert len(seen) == 2


# Signals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def restore() -> Iterator[None]:
    numbers = signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("restore")
def test_signals_are_handled_in_the_loop(reactor: Reactor) -> None:
    seen: list[tuple[str, float]] = []
    reactor.on_signal(signal.SIGUSR1, lambda now: seen.append(("one", now)))
    reactor.on_signal(signal.SIGUSR2, lambda now: seen.append(("two", now)))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert seen == [], "not from the interrupted code"
    reactor.turn(5)
    assert [what for what, _ in seen] == ["one"]
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    reactor.turn(5)
    assert sorted(what for what, _ in seen[1:]) == ["one", "two"], "several of one signal are one"
    reactor.turn(0)
    assert len(seen) == 3


@pytest.mark.usefixtures("restore")
def test_a_fault_for_one_signal_leaves_the_others(reactor: Reactor) -> None:
    """A signal for a report must not hide a signal that ends the process."""
    seen: list[int] = []
    faults: list[str] = []

    def fail(number: int, now: float) -> None:
        seen.append(number)
        raise ValueError(number)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        reactor.on_signal(number, partial(fail, number))
        os.kill(os.getpid(), number)
    reactor.on_fault = lambda ref, e, now: faults.append(f"{TYPE_NAMES[ref >> 56]} {e}")
    reactor.turn(5)
    assert sorted(seen) == [signal.SIGUSR1, signal.SIGUSR2]
    assert sorted(faults) == [f"callback {number:d}" for number in sorted(seen)]


@pytest.mark.usefixtures("restore")
def test_other_peoples_signals_are_not_ours(reactor: Reactor) -> None:
    theirs: list[int] = []
    reactor.on_signal(signal.SIGUSR1, lambda now: pytest.fail("called"))
    signal.signal(signal.SIGWINCH, lambda number, frame: theirs.append(number))
    os.kill(os.getpid(), signal.SIGWINCH)
    reactor.turn(5)
    assert theirs == [signal.SIGWINCH]


@pytest.mark.usefixtures("restore")
def test_signal_interrupts_the_wait(reactor: Reactor) -> None:
    """A signal that comes while epoll waits ends the wait, through the wake-up descriptor."""
    seen: list[float] = []
    reactor.on_signal(signal.SIGALRM, seen.append)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    reactor.turn(30)
    assert len(seen) == 1


def waits(reactor: Reactor, call: str) -> None:
    """A call that waits for the other end of a pipe."""
    ours, theirs = os.pipe()
    try:
        if call == "read":
            reactor.read(ours, 1)
        else:
            os.write(theirs, bytes(1 << 16))  # all that it takes
            reactor.write(theirs, b"x")
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize("call", ["read", "write"])
def test_a_call_that_others_hold_up_ends_with_the_process(reactor: Reactor, call: str) -> None:
    reactor.on_signal(signal.SIGUSR1, lambda now: None)  # not one of those
    reactor.on_signal(signal.SIGALRM, lambda now: None, lambda: None)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    threading.Timer(0.03, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1)).start()
    with pytest.raises(InterruptedError):
        waits(reactor, call)
    assert 0.09 < time.monotonic() - began < 5
    with pytest.raises(InterruptedError):
        waits(reactor, call)  # the signal has come: nothing is waited for any more


@pytest.mark.usefixtures("restore")
def test_close_gives_the_wake_up_descriptor_back() -> None:
    reactor = Reactor()
    reactor.on_signal(signal.SIGUSR1, lambda now: None)
    reactor.close()
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.usefixtures("restore")
def test_signal_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second SIGTERM finds the loop abandoned: what Python had to say about that would need its source files."""
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    reactor = Reactor()
    reactor.on_signal(signal.SIGUSR1, lambda _: None)
    reactor.abandon()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert complaints == []
    watched, writer = reactor._signal_pair
    watched.detach()  # it is closed
    writer.close()


def test_abandoned_descriptors_are_closed(reactor: Reactor) -> None:
    (ours, theirs), (other, unwatched) = os.pipe(), os.pipe()
    for fd in (ours, other):
        reactor.watch(fd, TYPE_TAP, 0, EPOLLIN)
    reactor.forget(other)
    reactor.abandon()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)
    for fd in (theirs, other, unwatched):
        os.close(fd)  # these were not


# The next turn -----------------------------------------------------------------------------------------------------


def test_more_is_called_in_the_next_turn_behind_its_events(reactor: Reactor) -> None:
    called: list[str] = []

    def more(now: float) -> None:
        called.append("more")

    def handler(ref: int, events: int, now: float) -> None:
        called.append("event")
        if len(called) == 1:
            reactor.next_turn(more)

    source = readable()
    with source:
        reactor.handle(TYPE_TCP, handler)
        reactor.watch(source.fileno(), TYPE_TCP, 0, EPOLLIN)
        reactor.turn(1)
        assert called == ["event"]
        reactor.turn(1)
        assert called == ["event", "event", "more"]
        reactor.turn(1)
        assert called[3:] == ["event"], "once"


def test_the_next_turn_does_not_wait(reactor: Reactor) -> None:
    called: list[float] = []
    reactor.next_turn(lambda now: reactor.next_turn(called.append))
    reactor.turn(60)
    assert called == [], "asked for within the turn: it is for the one after it"
    begin = time.monotonic()
    reactor.turn(60)
    assert len(called) == 1 and time.monotonic() - begin < 30
    reactor.turn(0.001)
    assert len(called) == 1


# Busy-polling ------------------------------------------------------------------------------------------------------


def test_a_turn_that_polls_handles_the_same_events(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    seen: Seen = []
    reactor.handle(TYPE_TCP, lambda ref, events, now: seen.append((ref, events)))
    ref = reactor.watch(pair[0].fileno(), TYPE_TCP, 5, EPOLLIN)
    pair[1].send(b"x")
    reactor.busy_poll = BusyPoll(1.0)
    for _ in range(MOST + 2):  # the first ones by sleeping
        reactor.moved = 1
        reactor.turn()
        assert reactor.moved == 0
    assert seen == [(ref, EPOLLIN)] * (MOST + 2)
