"""Ping flows: echo requests of the guest, ping sockets that refuse, congest and report errors, replies of any host,
time, and descriptors that run out. A step is one of these.

Invariants: nothing is raised; a request is given to a socket once, as it is, or is counted; a reply that goes to the
guest is one of the destination with the guest's identifier, or an error that quotes the guest's own request, and its
checksum is right; flows stay within their limit; when all have been idle, no flow, no socket and no watched descriptor
is left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from struct import Struct
from typing import Any, cast

from fuzz.steps import Steps
from passt import addr, icmp
from passt.flow.ip_fields import DF
from passt.link.reassembly import Reassembly
from passt.linux.sockopt import TRAFFIC_CLASS
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.wire.checksum import checksum, fold, ones_sum, pseudo_sum
from tests.unit.support import GUEST4, GUEST6, GUEST_MAC, T0, link, make_context, reactor, timers

PEERS = tuple(map(addr.packed, ("198.51.100.7", "2001:db8:ffff::7", "224.0.0.1", "ff02::1", "0.0.0.0", "192.0.2.1")))
SIZES = 8, 64, 0, 4, 1472, 3000, 7, 40
ERRNOS = errno.EAGAIN, errno.EHOSTUNREACH, errno.EMSGSIZE, errno.EACCES, errno.ENETUNREACH, errno.EINVAL, errno.ENOBUFS
OPENING = errno.EMFILE, errno.ENETUNREACH, errno.EACCES, errno.EPERM
TIMES = 0.5, 2.0, 61.0
DATA = bytes(i * 71 + (i >> 8) & 0xFF for i in range(1 << 13))
FLOWS_MAX = 5
Control = list[tuple[int, int, bytes]]
_EXTENDED = Struct("=IBBBBII")


class Sock:
    """A connected ping socket."""

    def __init__(self, world: World, host: bytes) -> None:
        self.world, self.host = world, host
        self.fd = 1000 + world.made
        world.made += 1
        world.socks[self.fd] = self
        self.failing: list[int] = []
        self.errors: list[tuple[int, bytes]] = []
        self.incoming: list[tuple[bytes, bytes]] = []

    def fileno(self) -> int:
        return self.fd

    def setsockopt(self, *_: Any) -> None:
        """A field of the IP header."""

    def getsockopt(self, *_: Any) -> int:
        return 0

    def send(self, data: memoryview) -> int:
        if self.failing:
            error = self.failing.pop()
            raise OSError(error, os.strerror(error)) if error != errno.EAGAIN else BlockingIOError(error, "full")
        self.world.given.append(bytes(data))
        return len(data)

    def recvmsg_into(self, buffers: tuple[bytearray], _: int) -> tuple[int, Control, int, tuple[str, int]]:
        if not self.incoming:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        data, sender = self.incoming.pop(0)
        buffers[0][: len(data)] = data
        kind = TRAFFIC_CLASS[len(self.host) == 16]
        return len(data), [(*kind, bytes((len(data) & 0xFF, 0, 0, 0)))], 0, (addr.text(sender), 0)

    def recvmsg(self, *_: Any) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        if not self.errors:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        error, offender = self.errors.pop(0)
        v4 = len(self.host) == 4
        name = Struct("=HH4s" if v4 else "=HHI16s").pack(2 if v4 else 10, 0, *(() if v4 else (0,)), offender)
        kind = (3, 11, 12, 3)[error & 3] if v4 else 1 + (error & 3)
        extended = _EXTENDED.pack(error, 2 if v4 else 3, kind, error >> 4 & 3, 0, 1400, 0) + name
        return DATA[:16], [(0, 11, extended) if v4 else (41, 25, extended)], 0, None

    def close(self) -> None:
        del self.world.socks[self.fd]


class World:
    """Everything around one `Icmp`."""

    def __init__(self) -> None:
        self.start()
        self.ctx = make_context(pool_size=1 << 14, mtu=1500)
        self.icmp = icmp.Icmp(self.ctx)
        self.icmp._flows.limit = FLOWS_MAX
        self.now = T0

    def start(self) -> None:
        self.socks: dict[int, Sock] = {}
        self.made = self.refuse = 0
        self.given: list[bytes] = []
        self.asked: set[tuple[bytes, bytes, bytes]] = set()  # guest, destination, identifier

    def open(self, fwd: Any, host: bytes, ident: int) -> Sock:
        if self.refuse:
            error, self.refuse = self.refuse, 0
            raise icmp.PingNotAllowed if error == errno.EPERM else OSError(error, os.strerror(error))
        return Sock(self, host)

    def later(self, seconds: float) -> None:
        self.now += seconds
        services = timers(self.ctx).services
        for timer, due in enumerate(services.deadlines):
            if due is not None and due <= self.now:
                services.fire(timer, self.now)
        reactor(self.ctx).end_turn(self.now)


WORLD = World()


def seeds() -> Iterable[bytes]:
    for peer in range(len(PEERS)):
        ping = bytes((0, peer, 0x11, 1))
        yield ping + bytes((1, 0, 1, 0x10)) + ping + bytes((1, 0, 0x85, 0)) + bytes((4, 2))
    ping = bytes((0, 0, 0x11, 1))
    yield bytes((5, 0)) + ping + bytes((5, 3)) + ping + ping + bytes((2, 0, 0x13)) + ping + bytes((3, 0, 0x21, 3, 0, 2))
    yield b"".join(bytes((0, n & 1, n << 4, 1)) for n in range(9)) + bytes((4, 2))


def request(world: World, steps: Steps) -> None:
    which, how, what = steps.byte(), steps.byte(), steps.byte()
    dst = PEERS[which % len(PEERS)]
    src = GUEST4 if len(dst) == 4 else GUEST6
    kind = (8 if len(dst) == 4 else 128) ^ (1 if how & 15 == 15 else 0)
    ident = bytes((0, how >> 4))
    data = DATA[: SIZES[what & 7]]
    echo = bytes((kind, 0, 1, 2)) + ident + bytes((0, what >> 4)) + data
    echo = echo[:7] if what & 8 and how & 8 else echo
    pool, ctx = world.ctx.pool, world.ctx
    pool.buf[64 : 64 + len(echo)] = echo
    before, drops = len(world.given), sum(ctx.drops.values())
    fields = which & 0x40 | how << 8 | (DF if what & 1 else 0)
    world.icmp.tap_handler(GUEST_MAC, src, dst, pool.view(64, 64 + len(echo)), world.now, fields)
    given = world.given[before:]
    assert given in ([echo], []), "not the guest's request"
    assert given or sum(ctx.drops.values()) > drops, "lost, and not counted"
    world.asked.add((src, dst, ident))


def pick(world: World, steps: Steps) -> Sock | None:
    socks = list(world.socks.values())
    which = steps.byte()
    return socks[which % len(socks)] if socks else None


def reply(world: World, steps: Steps) -> None:
    sock, what, how = pick(world, steps), steps.byte(), steps.byte()
    if sock is None:
        return
    v4 = len(sock.host) == 4
    sender = sock.host if what & 0x40 == 0 else PEERS[what & 1] if v4 == (not what & 1) else sock.host
    kind = (0 if v4 else 129) if what & 0x30 != 0x30 else how & 0xFF
    data = bytes((kind, 0, 9, 9, 0x77, 0x77, 0, how >> 4)) + DATA[: SIZES[what & 7]]
    sock.incoming.append((data if what & 0x80 == 0 else data[: how & 15], sender))
    reactor(world.ctx).fire(sock.fd, EPOLLIN, world.now)


def step(world: World, steps: Steps) -> None:
    kind = steps.byte() % 6
    if kind == 0:
        request(world, steps)
    elif kind == 1:
        reply(world, steps)
    elif kind == 4:
        world.later(TIMES[steps.byte() % 3])
    elif kind == 5:
        world.refuse = OPENING[steps.byte() & 3]
    else:
        sock, what = pick(world, steps), steps.byte()
        if sock is None:
            return
        if kind == 2:
            sock.failing += [ERRNOS[(what & 15) % len(ERRNOS)]] * (what >> 4)
        else:
            offenders = (sock.host, PEERS[0] if len(sock.host) == 4 else PEERS[1], bytes(len(sock.host)))
            sock.errors += [(what, offenders[what % 3])] * (what >> 5)
            reactor(world.ctx).fire(sock.fd, EPOLLERR, world.now)
    reactor(world.ctx).end_turn(world.now)


def check(world: World) -> None:
    """Frames that were sent to the guest."""
    fake = link(world.ctx)
    queue = Reassembly(world.ctx.drops)
    assert not any(map(any, fake.vnet)), "something is left to the guest's kernel"
    for frame in fake.take():
        v4 = frame[12:14] == b"\x08\0"
        n, l4 = (4, 34) if v4 else (16, 54)
        src, dst = frame[l4 - 2 * n : l4 - n], frame[l4 - n : l4]
        assert dst in (GUEST4, GUEST6)
        message: bytes | None = frame[l4:]
        assert message is not None
        proto = frame[23] if v4 else frame[20]
        if v4:
            where = int.from_bytes(frame[20:22], "big")
            message = queue.add(src + frame[18:20], (where & 0x1FFF) * 8, bool(where & 0x2000), message, world.now)
        elif proto == 44:
            where, ident = int.from_bytes(message[2:4], "big"), message[4:8]
            message = queue.add(src + ident, where & 0xFFF8, bool(where & 1), message[8:], world.now)
        if message is not None:
            check_message(world, src, dst, message)
    assert not len(queue), "fragments of nothing"


def check_message(world: World, src: bytes, dst: bytes, message: bytes) -> None:
    v4 = len(src) == 4
    if v4:
        assert checksum(message) == 0
    else:
        assert fold(pseudo_sum(src, dst, 58, len(message)) + ones_sum(message)) == 0xFFFF
    if message[0] == (0 if v4 else 129):
        assert any(a[0] == dst and a[2] == message[4:6] for a in world.asked), "a reply without a request"
        return
    quoted = message[8:]
    n, l4 = (4, 20) if v4 else (16, 40)
    ends = quoted[l4 - 2 * n : l4 - n], quoted[l4 - n : l4]
    assert (*ends, quoted[l4 + 4 : l4 + 6]) in world.asked, "an error about nothing that the guest sent"


def one(data: bytes) -> None:
    world, steps = WORLD, Steps(data)
    world.start()
    former, cast(Any, icmp).open_socket = icmp.open_socket, world.open
    try:
        while steps.left > 0:
            step(world, steps)
            check(world)
            assert len(world.icmp._flows.by_key) <= FLOWS_MAX
        world.later(70.0)
        world.later(70.0)
        assert not world.ctx.flows.count and not world.socks, "a flow that is idle is still there"
    finally:
        cast(Any, icmp).open_socket = former
        world.icmp.forget()
        world.later(1.0)
        link(world.ctx).take()
        world.ctx.drops.clear()
    assert not world.socks and not reactor(world.ctx).refs and not any(world.ctx.flows.by_index)
