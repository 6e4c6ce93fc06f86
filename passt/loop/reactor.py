"""The loop: one `select.epoll`, 64-bit references, one clock reading per turn.

Reference of a watched descriptor:

    63      56 55             32 31                              0
    +---------+-----------------+--------------------------------+
    |  type   |  descriptor     |  data, opaque to the reactor   |
    +---------+-----------------+--------------------------------+

`epoll.poll` returns (descriptor, events), so references live in a table indexed by descriptor, and the handler is
`handlers[ref >> 56]`, called as handler(ref, events, now). The data is a flow index for sockets and timers.

A descriptor that is closed while events of the same turn are pending could be reused by the next `socket()`, and the
new owner would get the old one's event. Therefore a descriptor is not closed at once: `retire` forgets the reference,
so that pending events are skipped, and closes the descriptor when the turn ends. A caller that needs the descriptor
back within the turn, because no other is left, calls `forget`: it removes its events of this turn. No other code closes
a descriptor that is or was watched.

A handler that has more to do than is good for the others asks for `next_turn`: the rest is called behind the events of
the next turn, which does not wait.

A turn ends with the `at_turn_end` callbacks (acknowledgements without data, batches of frames). The callbacks of
`between_turns` run last, after descriptors were closed: no event is pending then, so that a descriptor retired there
may be closed before the callback goes on (`close_retired`).

A fault of a handler, a callback or a close goes to `on_fault(ref, exception, now)`, with the reference 0 where there is
none, and the turn goes on with the others. If `on_fault` fails as well, the descriptor is not watched any more: an
event that is neither handled nor ended would come again for ever.

Nothing waits but the loop, with one exception: another process that has a descriptor, too, may empty or fill a pipe
between the event and the call, or may have cleared O_NONBLOCK. Such a call goes through `read` or `write`, and a signal
that ends the process ends it.

`now` is `time.monotonic()`, read once after the wait. `busy_poll.py` has the wait that does not sleep.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from .. import log
from ..calls import calls
from .busy_poll import BusyPoll
from .each import FAULT_INTERVAL, each

Handler = Callable[[int, int, float], None]

EPOLLIN: Final = select.EPOLLIN
EPOLLOUT: Final = select.EPOLLOUT
EPOLLERR: Final = select.EPOLLERR
EPOLLHUP: Final = select.EPOLLHUP
EPOLLRDHUP: Final = select.EPOLLRDHUP
EPOLLPRI: Final = select.EPOLLPRI
EPOLLET: Final = select.EPOLLET
INTEREST: Final = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET  # in a connected TCP socket with room in its send buffer

# Reference types, one per kind of watched descriptor; TYPE_NAMES are their names in messages
TYPE_NAMES: Final = (
    "callback", "tap", "tcp", "tcp timer", "udp", "ping", "timer", "signal", "netns", "child",
    "listen", "tcp splice", "udp splice", "guest", "guest listen", "control", "control listen",
    "dns", "inotify", "vring", "group", "group flow", "host", "device state", "repair", "repair listen", "neighbour",
    "exit",
)  # fmt: skip
TYPE_NONE, TYPE_TAP, TYPE_TCP, TYPE_TCP_TIMER, TYPE_UDP, TYPE_PING, TYPE_TIMER = range(7)
TYPE_SIGNAL, TYPE_NETNS, TYPE_CHILD, TYPE_LISTEN, TYPE_TCP_SPLICE, TYPE_UDP_SPLICE = range(7, 13)
TYPE_GUEST, TYPE_GUEST_LISTEN, TYPE_CONTROL, TYPE_CONTROL_LISTEN = range(13, 17)
TYPE_DNS, TYPE_INOTIFY, TYPE_VRING, TYPE_GROUP, TYPE_GROUP_FLOW, TYPE_HOST = range(17, 23)
TYPE_DEVICE_STATE, TYPE_REPAIR, TYPE_REPAIR_LISTEN, TYPE_NEIGHBOUR, TYPE_EXIT = range(23, len(TYPE_NAMES))

MAX_EVENTS: Final = 256  # per wait; more stay in the kernel until the next turn

CALLS = calls("epoll_wait", "epoll_pwait", "epoll_ctl", "read", "close")  # the second is musl's epoll_wait(3)


class Closable(Protocol):
    """A socket or file that owns a descriptor."""

    def close(self) -> None: ...


def make_ref(kind: int, fd: int, data: int) -> int:
    """The reference of descriptor `fd` (24 bits) of type `kind` (8 bits) with `data` (32 bits)."""
    return kind << 56 | fd << 32 | data


def ref_fd(ref: int) -> int:
    return ref >> 32 & 0xFFFFFF


def ref_data(ref: int) -> int:
    return ref & 0xFFFFFFFF


def _unhandled(ref: int, events: int, now: float) -> None:
    """Type 0: a descriptor that was retired earlier in this turn."""


def _call(callback: Callable[[float], None], now: float) -> None:
    callback(now)


def _close(owner: Closable) -> None:
    owner.close()


class Reactor:
    """Owns the epoll set and the table of references."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._refs = array("Q", bytes(8 * (self._epoll.fileno() + 1024)))  # 8 bytes each, where a list has 44
        self._handlers: list[Handler] = [_unhandled] * len(TYPE_NAMES)
        self._ready: list[tuple[int, int]] = []  # the events of this turn
        self._retired: list[Closable] = []
        self._put_off: list[Callable[[float], None]] = []
        self._next_turn: list[Callable[[float], None]] = []
        self._signals: dict[int, Callable[[float], None]] = {}
        self._stop = False
        self._may_wait = False  # in `read` or `write`
        self._ending = False  # a signal that ends the process has come
        self.at_turn_end: list[Callable[[float], None]] = []
        self.wakeups = 0
        self.events = 0
        self.on_fault: Callable[[int, Exception, float], None] | None = None
        self.busy_poll: BusyPoll | None = None
        self.moved = 0  # bytes of payload in this turn, for `busy_poll`

    def handle(self, kind: int, handler: Handler) -> None:
        """Events of references of type `kind` go to `handler`."""
        self._handlers[kind] = handler

    def watch(self, fd: int, kind: int, data: int, events: int) -> int:
        """Add `fd` to the set; returns its reference. Raises OSError."""
        ref = kind << 56 | fd << 32 | data
        refs = self._refs
        if fd >= len(refs):
            refs.extend([0] * (fd + 1 - len(refs) + 1024))
        self._epoll.register(fd, events)
        refs[fd] = ref
        return ref

    def change(self, fd: int, events: int) -> None:
        """Watch `fd` for other events; the reference stays."""
        self._epoll.modify(fd, events)

    def retarget(self, fd: int, data: int) -> None:
        """Give a watched descriptor other data (a timer that passes to another flow)."""
        self._refs[fd] = self._refs[fd] & ~0xFFFFFFFF | data

    def retire(self, fd: int, owner: Closable) -> None:
        """Forget `fd`, watched or not, and close `owner` when this turn ends; closing also leaves the epoll set."""
        if fd < len(self._refs):
            self._refs[fd] = 0
        self._retired.append(owner)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`, which stays open and belongs to the caller again.

        Its pending events of this turn are removed: the next owner of the number gets only its own events.
        """
        self._refs[fd] = 0
        self._epoll.unregister(fd)
        nobody = self._epoll.fileno(), 0  # is never watched itself
        self._ready[:] = [nobody if event[0] == fd else event for event in self._ready]

    def between_turns(self, callback: Callable[[float], None]) -> None:
        """Call callback(now) once, when all events of this turn are handled."""
        self._put_off.append(callback)

    def next_turn(self, callback: Callable[[float], None]) -> None:
        """Call callback(now) once, in the next turn, behind the events of that turn, for which it does not wait."""
        self._next_turn.append(callback)

    def close_retired(self) -> None:
        """Close retired descriptors. Only for callbacks of `between_turns`."""
        retired, self._retired = self._retired, []
        each(retired, _close, self.fault_at)

    def on_signal(
        self, number: int, callback: Callable[[float], None], interrupt: Callable[[], None] | None = None
    ) -> None:
        """Call callback(now) from the loop, not from the interrupted code, when signal `number` arrives.

        interrupt() is called in the interrupted code at once, and may raise an exception that this code expects. It is
        for signals that end the process: they also end a call of `read` or `write`.
        """
        if not self._signals:
            reader, writer = socket.socketpair()
            reader.setblocking(False)
            writer.setblocking(False)
            signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            self._signal_pair = reader, writer
            self.handle(TYPE_SIGNAL, self._signal_handler)
            self.watch(reader.fileno(), TYPE_SIGNAL, 0, EPOLLIN)
        self._signals[number] = callback

        def interrupted(number: int, frame: object) -> None:  # the wake-up descriptor does the work
            if interrupt:
                self._ending = True
                interrupt()
                if self._may_wait:
                    self._interrupt()

        signal.signal(number, interrupted)

    def read(self, fd: int, size: int) -> bytes:
        """read(2) from a descriptor that others have, too. Raises OSError: InterruptedError, the process is to end."""
        self._may_wait = True
        try:
            self._interrupt()
            return os.read(fd, size)
        finally:
            self._may_wait = False

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Likewise write(2)."""
        self._may_wait = True
        try:
            self._interrupt()
            return os.write(fd, data)
        finally:
            self._may_wait = False

    def _interrupt(self) -> None:
        if self._ending:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    def _signal_handler(self, ref: int, events: int, now: float) -> None:
        # Any signal with a handler in Python writes here, also one that is not in `_signals`
        came = os.read(ref_fd(ref), 512)
        each([callback for number, callback in self._signals.items() if number in came], _call, self.fault_at, now)

    def stop(self) -> None:
        """Leave `run` after the current turn."""
        self._stop = True

    def run(self) -> None:
        """Run turns until `stop`."""
        while not self._stop:
            self.turn()

    def turn(self, timeout: float = -1) -> None:
        """Wait at most `timeout` seconds (-1: for ever), handle events, close retired descriptors."""
        more: Sequence[Callable[[float], None]] = ()
        if self._next_turn:
            more, self._next_turn, timeout = self._next_turn, [], 0.0
        if self.busy_poll is None:
            ready = self._epoll.poll(timeout, MAX_EVENTS)
            now = time.monotonic()
        else:
            ready = self.busy_poll.wait(self._epoll.poll, timeout, MAX_EVENTS, self.moved)
            now = self.busy_poll.now
            self.moved = 0
        self._ready = ready
        self.wakeups += 1
        self.events += len(ready)
        refs, handlers = self._refs, self._handlers
        for fd, events in ready:
            ref = refs[fd]
            try:
                handlers[ref >> 56](ref, events, now)
            except Exception as e:
                self._failed(ref, e, now)
        if more:
            each(more, _call, self.fault_at, now)
        if self.at_turn_end:
            each(self.at_turn_end, _call, self.fault_at, now)
        if self._retired:
            self.close_retired()
        if self._put_off:
            put_off, self._put_off = self._put_off, []
            each(put_off, _call, self.fault_at, now)
            self.close_retired()

    def _failed(self, ref: int, e: Exception, now: float) -> None:
        """A fault in one flow ends that flow, never the process; the owner of the reference decides."""
        if self.on_fault is None:
            raise e
        try:
            self.on_fault(ref, e, now)
        except Exception as again:
            text = f"Ending what failed was not possible, it is left alone: {again!r}"
            log.warn_ratelimited(f"fault {ref >> 56} again", text, now, FAULT_INTERVAL)
            if self._refs[ref_fd(ref)] == ref:
                self.forget(ref_fd(ref))

    def fault_at(self, what: object, e: Exception) -> None:
        """A callback failed, or a close: the others go on (`each`)."""
        if self.on_fault is None:
            raise e
        self.on_fault(0, e, time.monotonic())

    def abandon(self) -> None:
        """Close all watched descriptors, without notice to their owners: the process ends.

        The kernel does so as well, but only after the end of the last thread, when the first one already is a zombie.
        Signals that arrive later are ignored: the missing wake-up descriptor must not be an error.
        """
        signal.set_wakeup_fd(-1)
        for fd, ref in enumerate(self._refs):
            if ref:
                try:
                    os.close(fd)
                except OSError:
                    pass  # already closed

    def close(self) -> None:
        """Close the epoll set; for tests and for the end of the program."""
        self._epoll.close()
        if self._signals:
            signal.set_wakeup_fd(-1)
            for s in self._signal_pair:
                s.close()
