"""UDP and DNS flows: datagrams of the guest in runs of any size, sockets that refuse, congest and report errors,
answers in runs, time, and descriptors that run out. A step is one of these.

Invariants: nothing is raised; every datagram of the guest is given to a socket once, whole, in order, or counted as a
drop; every answer goes to the guest once, whole, in order; flows and queries stay within their limits; when all have
been idle for long enough, no flow, no query, no socket and no watched descriptor is left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import Any, cast

from fuzz.steps import Steps
from passt import addr, udp
from passt.drops import Reason
from passt.linux.sockopt import SOL_UDP, UDP_GRO, UDP_SEGMENT
from passt.loop.reactor import EPOLLERR, EPOLLIN
from passt.udp_engine import dns
from tests.unit.hostile import harmless
from tests.unit.offload import received
from tests.unit.support import GUEST4, GUEST6, T0, elapse, link, make_context, reactor

SLOT = 1 << 16
DNS4, DNS6 = addr.packed("192.0.2.53"), addr.packed("2001:db8::53")
HOSTS = tuple(map(addr.packed, ("198.51.100.1", "2001:db8:ffff::1", "198.51.100.2")))
PEERS = (addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7"), DNS4, DNS6)
PORTS = 6000, 53, 5353, 0
SIZES = 4, 12, 100, 1400, 0, 3, 30, 1
ERRNOS = errno.EAGAIN, errno.ECONNREFUSED, errno.EMSGSIZE, errno.EINVAL, errno.ENOBUFS, errno.EHOSTUNREACH, errno.EPERM
OPENING = errno.EMFILE, errno.ENETUNREACH, errno.EACCES
TIMES = 0.0002, 0.5, 1.6, 5.0, 13.0, 31.0, 181.0
DATA = bytes(i * 113 + (i >> 8) & 0x7F for i in range(1 << 16))  # no byte has the bit that makes a message an answer
FLOWS_MAX = 6

_EXTENDED = Struct("=IBBBBII")


class Sock:
    """A connected datagram socket."""

    def __init__(self, world: World, key: tuple[Any, ...]) -> None:
        self.world, self.key = world, key
        self.fd = world.next_fd
        world.next_fd += 1
        world.socks[self.fd] = self
        self.gso_size = 0
        self.gro = False
        self.failing: list[int] = []
        self.errors: list[int] = []
        self.incoming: list[tuple[bytes, int]] = []
        self.closed = False

    def fileno(self) -> int:
        return self.fd

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        if (level, option) == (SOL_UDP, UDP_SEGMENT):
            self.gso_size = value
        elif (level, option) == (SOL_UDP, UDP_GRO):
            self.gro = bool(value)

    def getsockopt(self, *_: Any) -> int:
        return 0

    def send(self, data: bytes | memoryview) -> int:
        if self.failing:
            error = self.failing.pop()
            raise OSError(error, os.strerror(error))
        whole, size = bytes(data), self.gso_size
        pieces = [whole]
        if size and len(whole) > size:
            assert len(whole) <= 65535 and -(-len(whole) // size) <= 64, "more than a kernel cuts"
            pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        self.world.given.setdefault(self.key, []).extend(pieces)
        return len(whole)

    def recv_into(self, buf: memoryview, n: int = 0) -> int:
        if not self.incoming:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        data, _ = self.incoming.pop(0)
        buf[: len(data)] = data
        return len(data)

    def recvmsg_into(self, buffers: tuple[memoryview], space: int) -> tuple[int, list[Any], int, None]:
        return self.recv_into(buffers[0]), [], 0, None

    def recvmsg(self, *_: Any) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        if not self.errors:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        error = self.errors.pop(0)
        extended = _EXTENDED.pack(error, 2, 3, error & 15, 0, 1400, 0) + bytes(16)
        return DATA[:20], [(0, 11, extended)], 0, None

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        del self.world.socks[self.fd]


class Receiver:
    """recvmmsg."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mv = memoryview(bytearray(SLOT * 8))
        self.classes: list[int] = []

    def receive(self, fd: int) -> tuple[list[int], list[int]]:
        sock = self.world.socks[fd]
        if not sock.incoming:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        some, sock.incoming = sock.incoming[:8], sock.incoming[8:]
        for i, (data, _) in enumerate(some):
            self.mv[i * SLOT : i * SLOT + len(data)] = data
        self.classes = [len(data) & 0xB9 for data, _ in some] if len(some) & 1 else []
        return [len(data) for data, _ in some], [size for _, size in some]


class World:
    """Everything around one `Udp`."""

    def __init__(self) -> None:
        self.start()
        self.ctx = make_context(pool_size=1 << 17, mtu=65520, dns_match=(DNS4, DNS6), dns_hosts=HOSTS)
        with harmless():
            self.udp = udp.Udp(self.ctx)
        self.udp._receiver = cast(Any, Receiver(self))
        self.udp._flows.limit = self.udp.dns._flows.limit = FLOWS_MAX
        cast(Any, self.udp.outbound).open = lambda host, sport, dport, now: self.open((host, sport, dport))
        self.now = T0

    def start(self) -> None:
        self.socks: dict[int, Sock] = {}
        self.next_fd = 1000
        self.refuse = 0
        self.sent: dict[tuple[Any, ...], list[bytes]] = {}
        self.given: dict[tuple[Any, ...], list[bytes]] = {}

    def open(self, key: tuple[Any, ...]) -> Sock:
        if self.refuse:
            error, self.refuse = self.refuse, 0
            raise OSError(error, os.strerror(error))
        return Sock(self, key)

    def writev(self, fd: int, views: Sequence[memoryview]) -> int:
        return self.socks[fd].send(b"".join(views))

    def later(self, seconds: float) -> None:
        self.now = elapse(self.ctx, self.now, seconds, most=100)


WORLD = World()


def seeds() -> Iterable[bytes]:
    plain = bytes((0, 0, 3, 2, 2, 2, 0, 4, 1))
    yield plain + bytes((1, 0, 3, 2, 1, 0, 9, 0x45)) + plain
    yield bytes((0, 0x0A, 4, 3, 0x82, 0x93, 3, 2)) + bytes((2, 0, 1)) + plain
    query = bytes((0, 0x06, 1, 2))
    yield query + bytes((1, 0, 1, 1)) + query + bytes((4, 2, 4, 2, 4, 4))
    yield query + bytes((3, 0, 1)) + query + bytes((2, 0, 3)) * 3 + query
    yield bytes((5, 0)) + plain + bytes((5, 1)) + bytes((0, 0x13, 2, 2, 2)) + bytes((4, 6))
    yield b"".join(bytes((0, n << 4 | (n & 1), 1, 2)) for n in range(12)) + bytes((4, 1))


def guest(world: World, steps: Steps) -> None:
    """Datagrams of one flow in one batch."""
    which, count = steps.byte(), steps.byte() & 7
    peer, port = PEERS[which & 3], PORTS[which >> 2 & 3]
    sport = 40000 + (which >> 4)
    key = (GUEST4 if len(peer) == 4 else GUEST6) + peer + Struct("!HH").pack(sport, port)
    frames: list[int] = []
    at, pool, drops = 64, world.ctx.pool, world.ctx.drops
    datagrams: list[bytes] = []
    for _ in range(count):
        what = steps.byte()
        size = SIZES[what & 7]
        many = 1 + (what >> 4) if what & 0x80 else 1
        total = size * many - (1 if what & 8 and size > 1 else 0)
        if at + total > 60_000:
            break
        data = DATA[what : what + total]
        pool.buf[at : at + total] = data
        frames += (at, at + total, size if many > 1 else 0)
        datagrams += [data[i : i + size] for i in range(0, total, size)] if many > 1 and size else [data]
        at += total
    if not frames:
        return
    label = (addr_of(world, peer), sport, port)
    before, had = counted(drops), len(world.given.get(label, ()))
    world.udp.tap_handler(key, frames, world.now, which & 64)
    if not world.ctx.resolvers.serve(peer, port):
        given = world.given.get(label, [])[had:]
        assert subsequence(given, datagrams), "not the guest's datagrams"
        # Where there is no flow, a super-frame counts as one
        least = len(datagrams) - len(given) if given else len(frames) // 3
        assert counted(drops) - before >= least, "lost, and not counted"
    reactor(world.ctx).end_turn(world.now)


def addr_of(world: World, peer: bytes) -> bytes:
    return world.ctx.fwd.outbound(peer)


def counted(drops: Mapping[Reason, int]) -> int:
    return sum(n for reason, n in drops.items() if reason.startswith("udp: "))


def subsequence(some: list[bytes], of: list[bytes]) -> bool:
    rest = iter(of)
    return all(any(a == b for b in rest) for a in some)


def pick(world: World, steps: Steps) -> Sock | None:
    which = steps.byte()
    watched = [s for s in world.socks.values() if s.fd in reactor(world.ctx).refs]
    return watched[which % len(watched)] if watched else None


def answers(world: World, steps: Steps) -> None:
    """The host peer sends: batches of datagrams, or answers to queries."""
    sock, count = pick(world, steps), steps.byte() & 15
    if sock is None:
        return
    is_dns = sock.key[-1] == "dns"
    expected: list[bytes] = []
    for _ in range(count):
        what = steps.byte()
        size = SIZES[what & 7]
        many = 1 + (what >> 4) if what & 0x80 and size and sock.gro else 1
        data = DATA[what : what + size * many]
        if is_dns and size >= 12:
            data = data[:2] + b"\x80" + data[3:]
        sock.incoming.append((data, size if many > 1 else 0))
    for data, size in sock.incoming:
        expected += [data[i : i + size] for i in range(0, len(data), size)] if size else [data]
    if reactor(world.ctx).events[sock.fd] & EPOLLIN:
        link(world.ctx).take()
        reactor(world.ctx).fire(sock.fd, EPOLLIN, world.now)
        got = [payload(f) for f in received(link(world.ctx)) if is_udp(f)]
        waiting = sum(-(-len(d) // s) if s else 1 for d, s in sock.incoming) if not sock.closed else 0
        if not is_dns:
            assert got == expected[: len(got)], "not the answers"
            assert len(got) + waiting == len(expected)
    reactor(world.ctx).end_turn(world.now)


def is_udp(frame: bytes) -> bool:
    return frame[23] == 17 if frame[12:14] == b"\x08\0" else frame[20] == 17


def payload(frame: bytes) -> bytes:
    return frame[42:] if frame[12:14] == b"\x08\0" else frame[62:]


def one(data: bytes) -> None:
    world, steps = WORLD, Steps(data)
    world.start()
    former, cast(Any, os).writev = os.writev, world.writev
    open_socket, cast(Any, dns).open_socket = dns.open_socket, lambda fwd, host: world.open((host, "dns"))
    try:
        while steps.left > 0:
            step(world, steps)
            assert len(world.udp._by_key) <= FLOWS_MAX and len(world.udp.dns._by_key) <= FLOWS_MAX
        world.later(400.0)
        world.later(400.0)
    finally:
        cast(Any, os).writev, cast(Any, dns).open_socket = former, open_socket
        world.udp.forget()
        world.later(20.0)
        reactor(world.ctx).end_turn(world.now)
    ctx = world.ctx
    assert not ctx.flows.count and not any(ctx.flows.by_index) and not world.udp.dns._waiting
    assert not world.socks, "a socket is open"
    assert not reactor(ctx).refs, "a descriptor is watched"
    link(ctx).take()
    ctx.drops.clear()


def step(world: World, steps: Steps) -> None:
    kind = steps.byte() % 6
    if kind == 0:
        guest(world, steps)
    elif kind == 1:
        answers(world, steps)
    elif kind == 4:
        world.later(TIMES[steps.byte() % len(TIMES)])
    elif kind == 5:
        world.refuse = OPENING[steps.byte() % len(OPENING)]
    else:
        sock, what = pick(world, steps), steps.byte()
        if sock is None:
            return
        error = ERRNOS[what % len(ERRNOS)]
        if kind == 2:
            sock.failing += [error] * (1 + (what >> 4))
        else:
            sock.errors += [error] * (what >> 4)
            reactor(world.ctx).fire(sock.fd, EPOLLERR, world.now)
            reactor(world.ctx).end_turn(world.now)
    link(world.ctx).take()
