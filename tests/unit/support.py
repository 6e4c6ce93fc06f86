"""Common parts of unit tests: a context with a link, a reactor and timers that record calls, and never wait.

A test begins with `ctx = make_context(mtu=1500)`, naming what differs from the configuration below; it calls a
handler with T0 or later as `now`, and finds in `link(ctx).take()` what went to the guest, vnet headers taken off.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from passt import NEVER, addr
from passt.drops import Reason
from passt.flow.context import Context
from passt.flow.table import FlowTable
from passt.link.backend import Buffer, Link, Receiver
from passt.link.packet import PacketPool
from passt.loop.reactor import TYPE_NAMES, Closable, Handler, make_ref
from passt.loop.timers import NO_OWNER, NO_TIMER
from passt.policy.config import Config, Ip4, Ip6
from passt.policy.forwarding import Forwarding
from passt.policy.guest import Guest
from passt.policy.resolvers import Resolvers
from passt.policy.settings import Settings
from passt.wire.virtio import VNET, VNET_LEN

T0 = 1000.0  # the time at which conversations begin

OUR_MAC = bytes.fromhex("9a559a559a55")
GUEST_MAC = bytes.fromhex("525400123456")
GUEST4 = addr.packed("192.0.2.2")
GATEWAY4 = addr.packed("192.0.2.1")
GUEST6 = addr.packed("2001:db8::2")
GATEWAY6 = addr.packed("fe80::1")
GUEST_LL = addr.packed("fe80::5054:ff:fe12:3456")

IP4 = Ip4(addr=GUEST4, prefix_len=24, gateway=GATEWAY4, our_addr=GATEWAY4, map_host_loopback=GATEWAY4)
IP6 = Ip6(addr=GUEST6, prefix_len=64, gateway=GATEWAY6, our_ll=GATEWAY6, map_host_loopback=GATEWAY6)
CONFIG = Config(ip4=IP4, ip6=IP6, our_mac=OUR_MAC)


class FakeLink(Link):
    """Records frames. `vnet[i]` is the vnet header that `frames[i]` was sent with, b"" for a finished frame."""

    def __init__(self, *, tso: bool = True, uso: bool = True) -> None:
        super().__init__(Counter(), tso=tso, uso=uso)
        self.octets = 0
        self.frames: list[bytes] = []
        self.vnet: list[bytes] = []

    @property
    def sent_bytes(self) -> int:
        return self.octets

    def send(self, hdr: bytearray) -> None:
        self.send_payload((hdr,))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        whole = b"".join(bytes(p) for p in parts)
        self.vnet.append(whole[: VNET.size])
        self.frames.append(whole[VNET.size :])

    def send_segments(self, hdr: bytearray, payload: memoryview, size: int) -> None:
        l4 = VNET.size + VNET.unpack_from(hdr)[4]
        assert self.cuts and not hdr[1] and payload and not len(payload) % size
        for at in range(0, len(payload), size):
            segment = bytearray(hdr)
            seq = int.from_bytes(hdr[l4 + 4 : l4 + 8], "big") + at & 0xFFFFFFFF
            segment[l4 + 4 : l4 + 8] = seq.to_bytes(4, "big")
            self.send_payload((segment, payload[at : at + size]))

    def send_frame(self, frame: bytes) -> None:
        self.vnet.append(b"")
        self.frames.append(bytes(frame))

    def take(self) -> list[bytes]:
        """The frames since the last call."""
        frames, self.frames, self.vnet = self.frames, [], []
        return frames

    def take_one(self) -> bytes:
        """The only frame since the last call."""
        (frame,) = self.take()
        return frame


class FakeReactor:
    """The reactor's surface without epoll: `fire` delivers an event, `end_turn` ends the turn and begins another."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}
        self.refs: dict[int, int] = {}
        self.events: dict[int, int] = {}
        self.retired: list[Closable] = []
        self.put_off: list[Callable[[float], None]] = []
        self.more: list[Callable[[float], None]] = []
        self.at_turn_end: list[Callable[[float], None]] = []
        self.signals: dict[int, Callable[[float], None]] = {}
        self.on_fault: Callable[[int, Exception, float], None] | None = None
        self.moved = 0
        self.wakeups = 0  # a test that is about turns counts them
        self.stopped = False

    def handle(self, kind: int, handler: Handler) -> None:
        assert 0 < kind < len(TYPE_NAMES)
        self.handlers[kind] = handler

    def watch(self, fd: int, kind: int, data: int, events: int) -> int:
        assert fd not in self.refs, f"descriptor {fd} is watched already"
        assert 0 <= data <= 0xFFFFFFFF
        self.refs[fd] = make_ref(kind, fd, data)
        self.events[fd] = events
        return self.refs[fd]

    def change(self, fd: int, events: int) -> None:
        assert fd in self.refs, f"descriptor {fd} is not watched"
        self.events[fd] = events

    def retarget(self, fd: int, data: int) -> None:
        self.refs[fd] = self.refs[fd] & ~0xFFFFFFFF | data

    def retire(self, fd: int, owner: Closable) -> None:
        self.refs.pop(fd, None)  # watched or not
        self.events.pop(fd, None)
        self.retired.append(owner)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def forget(self, fd: int) -> None:
        del self.refs[fd], self.events[fd]

    def between_turns(self, callback: Callable[[float], None]) -> None:
        self.put_off.append(callback)

    def next_turn(self, callback: Callable[[float], None]) -> None:
        self.more.append(callback)

    def go_on(self, now: float) -> None:
        """The next turn begins."""
        self.wakeups += 1
        more, self.more = self.more, []
        for callback in more:
            callback(now)

    def close_retired(self) -> None:
        for owner in self.retired:
            owner.close()
        self.retired.clear()

    def fault_at(self, what: object, e: Exception) -> None:
        if self.on_fault is None:
            raise e
        self.on_fault(0, e, T0)

    def on_signal(
        self, number: int, callback: Callable[[float], None], interrupt: Callable[[], None] | None = None
    ) -> None:
        self.signals[number] = callback

    def stop(self) -> None:
        self.stopped = True

    def fire(self, fd: int, events: int, now: float) -> None:
        """As if epoll had reported `events` on `fd`."""
        ref = self.refs[fd]
        self.handlers[ref >> 56](ref, events, now)

    def end_turn(self, now: float) -> None:
        for callback in self.at_turn_end:
            callback(now)
        self.close_retired()
        put_off, self.put_off = self.put_off, []
        for callback in put_off:
            callback(now)
        self.close_retired()
        self.go_on(now)


class StrictDrops(Counter[Reason]):
    """Raises where a fault of ours is counted, or tests and fuzzing would pass over it, unless a test stages one.

    Counts are whole numbers.
    """

    staged = False

    def __setitem__(self, reason: Reason, count: int) -> None:
        assert reason != "fault" or self.staged, "a fault of ours"
        assert isinstance(count, int)
        super().__setitem__(reason, count)


def stage_faults(ctx: Context) -> None:
    """From now on faults are counted, as they are outside of tests."""
    assert isinstance(ctx.drops, StrictDrops)
    ctx.drops.staged = True


class FakeServiceTimers:
    """Single timers. `deadlines[timer]` is when it fires, None while it is disarmed."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[float], None]] = []
        self.deadlines: list[float | None] = []

    def new(self, callback: Callable[[float], None]) -> int:
        self.callbacks.append(callback)
        self.deadlines.append(None)
        return len(self.callbacks) - 1

    def arm(self, timer: int, deadline: float) -> None:
        assert deadline > 0
        self.deadlines[timer] = deadline

    def disarm(self, timer: int) -> None:
        self.deadlines[timer] = None

    def fire(self, timer: int, now: float | None = None) -> None:
        """Let the timer expire, at its deadline unless `now` is given."""
        deadline = self.deadlines[timer]
        assert deadline is not None, "the timer is not armed"
        self.deadlines[timer] = None
        self.callbacks[timer](deadline if now is None else now)


class FakeTimers:
    """The pool of connection timers, with its rules: there are `most`, and an armed one is only ever moved earlier."""

    def __init__(self, most: int = 1 << 20) -> None:
        self.services = FakeServiceTimers()
        self.most = most
        self.callback: Callable[[int, float], None] = lambda index, now: None
        self.owner: dict[int, int] = {}
        self.expiry: dict[int, float] = {}
        self.free: list[int] = []

    def take(self, index: int) -> int:
        if not self.free and len(self.owner) >= self.most:
            return NO_TIMER
        fd = self.free.pop() if self.free else 100_000 + len(self.owner)
        self.owner[fd] = index
        self.expiry.setdefault(fd, NEVER)
        return fd

    def give_back(self, fd: int) -> None:
        assert self.owner[fd] != NO_OWNER, "given back twice"
        self.owner[fd] = NO_OWNER
        self.free.append(fd)

    def at(self, fd: int, deadline: float) -> None:
        self.expiry[fd] = min(self.expiry[fd], deadline)

    def next(self) -> float:
        """When the next timer of the pool fires; NEVER if none is armed."""
        return min(self.expiry.values(), default=NEVER)

    def advance(self, now: float) -> None:
        """Fire, in order, whatever is due up to `now`, each at its own time."""
        while (due := self.next()) <= now:
            fd = min(f for f, t in self.expiry.items() if t == due)
            self.expiry[fd] = NEVER
            if self.owner[fd] != NO_OWNER:
                self.callback(self.owner[fd], due)


class FakeReceiver(Receiver):
    """Stands for the tap: keeps the frames that it is handed, as bytes, and how many there were."""

    def __init__(self, mv: memoryview) -> None:
        self.mv = mv
        self.frames: list[bytes] = []
        self.batches = self.count = self.octets = 0

    def received(self, frames: list[int], octets: int, now: float) -> None:
        self.count += len(frames) // 2
        self.octets += octets
        self.batches += 1
        for start, end in zip(frames[::2], frames[1::2], strict=True):
            assert start >= 0
            self.frames.append(bytes(self.mv[start + VNET_LEN : end]))


new_link: Callable[[], FakeLink] = FakeLink  # what a context's link is made by; conversations have others, too


def make_context(
    config: Config = CONFIG, *, guest: Guest | None = None, pool_size: int = 1 << 17, **overrides: Any
) -> Context:
    """A context of fakes around `config`, with fields of it replaced by `overrides`."""
    drops = StrictDrops()
    settings = Settings(replace(config, **overrides), drops)
    return Context(
        settings=settings,
        reactor=cast(Any, FakeReactor()),
        timers=cast(Any, FakeTimers()),
        pool=PacketPool(pool_size),
        link=new_link(),
        flows=FlowTable(),
        fwd=Forwarding(settings),
        resolvers=Resolvers(settings),
        guest=guest or Guest(mac=GUEST_MAC, addr4=GUEST4, addr6=GUEST6, addr6_ll=GUEST_LL),
        drops=drops,
    )


def reconfigure(ctx: Context, now: float = T0, **fields: Any) -> None:
    """Another configuration is in force, which differs in these fields."""
    ctx.settings.replace(replace(ctx.config, **fields), now)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """None is left for this process, for real, but for numbers that are given back meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def free_ports(count: int = 1) -> int:
    """The first of `count` consecutive free ports, outside the range of ephemeral ports. Tests that run beside these
    look for theirs in another range.
    """
    for first in range(10000 + os.getpid() % 200 * 100, 32000, count):
        found = []
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    s = socket.socket(socket.AF_INET6, kind)
                    found.append(s)
                    s.bind(("::", port))
        except OSError:
            continue
        else:
            return first
        finally:
            for s in found:
                s.close()
    raise AssertionError("no free ports")


def link(ctx: Context) -> FakeLink:
    """The context's link, as what it is."""
    assert isinstance(ctx.link, FakeLink)
    return ctx.link


def reactor(ctx: Context) -> FakeReactor:
    """The context's reactor, as what it is."""
    return cast(FakeReactor, ctx.reactor)


def timers(ctx: Context) -> FakeTimers:
    """The context's timers, as what they are."""
    return cast(FakeTimers, ctx.timers)


def elapse(ctx: Context, now: float, seconds: float, most: int = 300) -> float:
    """Let time pass: timers of services fire when they are due, `most` of them at most. Returns the time then."""
    end = now + seconds
    services = timers(ctx).services
    for _ in range(most):
        due = min((d for d in services.deadlines if d is not None), default=end + 1)
        if due > end:
            break
        now = max(now, due)
        services.fire(services.deadlines.index(due), now)
        reactor(ctx).end_turn(now)
    return max(now, end)


def pool_put(ctx: Context, data: bytes, offset: int = 64) -> tuple[int, int]:
    """Copy `data` into the packet pool; returns its (start, end)."""
    ctx.pool.buf[offset : offset + len(data)] = data
    return offset, offset + len(data)


def lines_of(call: Callable[[], object]) -> int:
    """How many lines of code `call` takes, as the interpreter counts them: a price without a clock."""
    lines = 0

    def trace(frame: object, event: str, arg: object) -> Any:
        nonlocal lines
        lines += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines
