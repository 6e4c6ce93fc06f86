"""Everything together: a wired Context, a guest's batches, sockets of the host that do as they are told, and time. A
step is a batch of frames, an event of a socket, a client of a forwarded port, or time that passes.

Invariants: nothing is raised, nothing is counted as a fault; all that can be seen from outside, frames, sockets and
counters, is the same whatever lies in memory around the frames; when the guest is gone, no flow, no socket, no watched
descriptor but the tap's and no timer of a connection is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

from fuzz import frames
from fuzz.steps import Steps
from passt import icmp
from passt.drops import Drop
from passt.flow import neighbours
from passt.link.packet import FRAME_ROOM
from passt.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from passt.loop.timers import NO_OWNER
from passt.tcp_engine import sock as tcp_sock
from passt.udp_engine import group_sender, outbound
from tests.unit import hostile
from tests.unit.hostile import INBOUND, TAP_FD, Datagrams, Stack, harmless
from tests.unit.support import GUEST4, GUEST6, GUEST_LL, GUEST_MAC, T0, link, reactor, timers
from tests.unit.tcp_support import PEER_PORT, FakeSocket, accepted_socket, listener

POOL = hostile.POOL_SIZE
FILLS = bytes(POOL + FRAME_ROOM), (b"\xff\x11\x45\x86\xdd" * (POOL + FRAME_ROOM))[: POOL + FRAME_ROOM]
EVENTS = EPOLLIN, EPOLLIN | EPOLLRDHUP, EPOLLERR | EPOLLHUP, EPOLLOUT
TIMES = 0.004, 0.02, 1.1, 31.0, 61.0, 200.0
BATCH_MAX = 60_000  # bytes

with harmless():
    STACKS = [Stack(fill, mtu=1500) for fill in FILLS]


def fix_numbers(stack: Stack) -> None:
    """Initial sequence numbers stay those of the beginning, so that the numbers in valid frames stay right."""
    isn = cache(partial(stack.tcp.opening.isn, now=T0))
    cast(Any, stack.tcp.opening).isn = lambda key, now: isn(key)


for _stack in STACKS:
    fix_numbers(_stack)
WRITEV = hostile._writev


def seeds() -> Iterable[bytes]:
    count = len(frames.VALID)
    yield bytes((0, 4)) + frames.program(*range(4)) + bytes((0, 3)) + frames.program(6, 8, 9)
    for i in range(len(INBOUND)):
        yield bytes((3, i, 0, 2)) + frames.program(*range(4, 6)) + bytes((1, 0, 40, 1, 0, 1, 2, 2))
    for first in range(6, count, 6):
        some = [w for w in range(first, first + 6) if w < count]
        yield bytes((0, 4)) + frames.program(*range(4)) + bytes((0, len(some))) + frames.program(*some) + b"\2\4"


def begin(stack: Stack) -> None:
    """As it was at the beginning, but for the time."""
    ctx, guest = stack.ctx, stack.ctx.guest
    link(ctx).take()
    ctx.drops.clear()
    stack.datagrams.clear()
    FakeSocket.made.clear()
    guest.mac, guest.addr4, guest.addr6, guest.addr6_ll = GUEST_MAC, GUEST4, GUEST6, GUEST_LL
    stack.icmp._ident = stack.udp._ident = 0
    ctx.pool.buf[:] = stack.fill
    cast(Any, neighbours).time = SimpleNamespace(monotonic=lambda: stack.now)
    for module in (outbound, icmp):
        cast(Any, module).open_socket = lambda fwd, *where, **_: Datagrams(stack.datagrams, *where)
    cast(Any, group_sender).open_sender = lambda *where: Datagrams(stack.datagrams, *where[:3])


def batch(stack: Stack, some: list[bytes]) -> None:
    flat: list[int] = []
    at = 16
    for frame in some:
        stack.ctx.pool.buf[at : at + len(frame)] = frame
        flat += (at, at + len(frame))
        at += len(frame)
    stack.tap.batch(flat, stack.now)
    stack.ctx.pool.buf[:at] = stack.fill[:at]
    reactor(stack.ctx).end_turn(stack.now)


def event(stack: Stack, steps: Steps) -> None:
    """Something happens to a TCP socket."""
    watched = [s for s in FakeSocket.made if s.fd in reactor(stack.ctx).refs and not s.closed]
    which, what = steps.byte(), steps.byte()
    if not watched:
        return
    sock = watched[which % len(watched)]
    events = EVENTS[what & 3]
    if events & EPOLLIN:
        sock.incoming += frames.VALID[0] * (what >> 4)
    sock.ended |= bool(events & EPOLLRDHUP)
    if events & EPOLLHUP:
        sock.error = 104
    sock.room = 1 << 30 if events & EPOLLOUT else sock.room if what & 4 else what >> 3
    reactor(stack.ctx).fire(sock.fd, events, stack.now)
    reactor(stack.ctx).end_turn(stack.now)


def program(stack: Stack, data: bytes) -> None:
    steps = Steps(data)
    while steps.left > 0:
        kind = steps.byte() & 3
        if kind == 0:
            some: list[bytes] = []
            for _ in range(steps.byte() & 15):
                if steps.left > 0 and sum(map(len, some)) < BATCH_MAX:
                    some.append(frames.frame(steps))
            if some:
                batch(stack, some)
        elif kind == 1:
            event(stack, steps)
        elif kind == 2:
            stack.later(TIMES[steps.byte() % len(TIMES)])
        else:
            to, peer = INBOUND[steps.byte() % len(INBOUND)]
            stack.tcp.opening.accepted(listener(to=to), cast(Any, accepted_socket(peer)), peer, PEER_PORT, stack.now)
            reactor(stack.ctx).end_turn(stack.now)


def end(stack: Stack) -> None:
    """The guest goes, and nothing is left."""
    ctx = stack.ctx
    stack.tap.forget()
    reactor(ctx).end_turn(stack.now)
    stack.later(13.0)
    assert not ctx.flows.count and not any(ctx.flows.by_index)
    assert not stack.tcp._conns and not stack.tcp._table.half_open and not stack.udp._by_key
    assert not stack.icmp._flows.by_key and not stack.udp.dns._waiting
    assert not Datagrams.by_fd and all(s.closed for s in FakeSocket.made), "a socket is open"
    assert set(reactor(ctx).refs) == {TAP_FD}, "a descriptor is watched"
    assert all(owner == NO_OWNER for owner in timers(ctx).owner.values())
    assert not ctx.drops[Drop.FAULT]


def run(stack: Stack, data: bytes) -> tuple[Any, ...]:
    begin(stack)
    try:
        program(stack, data)
        found = stack.outcome()
        return found[0][:], found[1][:], found[2], found[3][:], *found[4:5], repr(found[5]), found[6]
    finally:
        end(stack)


def one(data: bytes) -> None:
    patched = (
        (tcp_sock, "new_socket"),
        (outbound, "open_socket"),
        (group_sender, "open_sender"),
        (icmp, "open_socket"),
        (os, "writev"),
    )
    former = [getattr(module, name) for module, name in patched]
    cast(Any, tcp_sock).new_socket, cast(Any, os).writev = FakeSocket, WRITEV
    try:
        Datagrams.numbers = iter(range(10_000, 20_000))
        found = run(STACKS[0], data)
        Datagrams.numbers = iter(range(10_000, 20_000))
        assert found == run(STACKS[1], data), "what lies outside the frames made a difference"
    finally:
        for (module, name), value in zip(patched, former, strict=True):
            setattr(module, name, value)


def _clear() -> None:
    """The connections that a stack begins with."""
    Datagrams.by_fd.clear()
    for stack in STACKS:
        stack.tap.forget()
        reactor(stack.ctx).end_turn(stack.now)


_clear()
