"""TCP: a guest and host sockets that do anything in any order. A step is a segment of the guest (any flags, numbers on
or near those that are valid, alone or many in a batch), data, end or error of a host socket, a full or emptied send
buffer, frames that are lost or find the link full, a new connection of either side, or time that passes.

Invariants: nothing is raised; what a host socket is given is the guest's stream, each byte once and in order; what the
guest is sent are the host peer's bytes at their places, none beyond the window that it told; nothing is acknowledged
that the socket did not take; the window's edge never moves left. When, after all steps, both sides behave, every
connection ends in time, and either every byte arrived or it was reset. Then nothing is left: no flow, no socket, no
watched descriptor, no timer, no half-open connection.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence
from struct import Struct
from types import SimpleNamespace
from typing import Any, cast

from fuzz.steps import Steps
from passt import addr
from passt.link.backend import Buffer
from passt.linux import tcpinfo
from passt.linux.sockopt import SO_MEMINFO, SO_PEEK_OFF
from passt.linux.tcpinfo import Features
from passt.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from passt.loop.timers import NO_OWNER
from passt.policy.guest import Guest
from passt.policy.rules import Listener, Rule
from passt.tcp import Tcp
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import RTO_MAX
from passt.tcp_engine.window import POLL_MAX
from passt.wire.checksum import PROTO_TCP
from passt.wire.tcp import ACK, FIN, HEADER, PSH, RST, SYN, URG, SynOptions, emit_sack, parse_sack
from tests.unit.support import GATEWAY4, GUEST4, GUEST6, GUEST_LL, GUEST_MAC, T0, FakeReactor, FakeTimers, make_context

MASK = 0xFFFFFFFF
HALF = 1 << 31
STREAM_MAX = 60_000  # bytes in either direction of a connection
GUEST_DATA = bytes(i * 167 + (i >> 8) * 3 & 0xFF for i in range(1 << 17))
HOST_DATA = bytes(i * 41 + (i >> 8) * 5 & 0xFF for i in range(1 << 17))
GUEST_ISNS = 0xFFFFFF00, 0x7FFFFF00
PEER = addr.packed("198.51.100.7")
PEER_PORT = 50000
SNDBUF = 1 << 20
FLAGS = (ACK, PSH | ACK, FIN | ACK, SYN, SYN | ACK, RST, RST | ACK, 0, FIN | PSH | ACK, SYN | FIN, PSH | URG | ACK, FIN)
WINDOWS = 65535, 0, 1, 200, 5000, 65535, 30, 1000
TIMES = 0.004, 0.011, 0.2, 1.0, 3.0, 10.0, 120.0, 8000.0
ERRORS = errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH
CONNECTS = 0, errno.EINPROGRESS, errno.ECONNREFUSED, errno.ENETUNREACH
ROUNDS = 80
_WORD, _LONG = Struct("=I"), Struct("=Q")
_RESET = Struct("=ii").pack(1, 0)


class Sock:
    """A host socket. `avail` bytes came from its peer, `base` of them were taken out; `sent` bytes were given to it."""

    def __init__(self, world: World, fd: int) -> None:
        self.world, self.fd = world, fd
        self.avail = self.base = self.sent = self.acked = 0
        self.peek: int | None = None
        self.mark = -1  # of urgent data: a peek stops there
        self.room = SNDBUF
        self.error = self.failed = 0  # SO_ERROR, and what it was when it was asked for
        self.hold = False  # its peer acknowledges nothing
        self.told = 0  # of `avail`, when epoll last reported
        self.ended = self.end_told = self.shut = self.closed = self.reset = False

    def fileno(self) -> int:
        return self.fd

    def connect_ex(self, peer: object) -> int:
        if self.world.connect == errno.EINPROGRESS:
            self.world.connecting.append(self)
        return self.world.connect

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        if option == SO_PEEK_OFF and level == socket.SOL_SOCKET:
            assert value >= 0, "the peek offset became negative"
            self.peek = value
        elif option == socket.SO_LINGER and level == socket.SOL_SOCKET:
            self.reset = value == _RESET

    def getsockopt(self, level: int, option: int, length: int = 0) -> Any:
        if level == socket.SOL_SOCKET:
            if option == socket.SO_ERROR:
                return self.take_error()
            if option == SO_MEMINFO:
                info = bytearray(36)
                _WORD.pack_into(info, 12, SNDBUF)
                _WORD.pack_into(info, 20, max(SNDBUF - self.room, 0))
                return bytes(info)
            return SNDBUF
        assert option == socket.TCP_INFO
        if not self.hold:
            self.acked = self.sent + self.shut
        info = bytearray(tcpinfo.TCP_INFO_LEN)
        _LONG.pack_into(info, tcpinfo.BYTES_ACKED, self.acked + self.world.first(self))
        _WORD.pack_into(info, tcpinfo.MIN_RTT, 10_000)
        _WORD.pack_into(info, tcpinfo.SND_WND, 1 << 20)
        info[0] = 7 if self.closed else 2 if self in self.world.connecting else 1
        return bytes(info)

    def take_error(self) -> int:
        error, self.error = self.error, 0
        self.failed = error or self.failed
        return error

    def recv_into(self, buf: memoryview, n: int, flags: int) -> int:
        if flags == socket.MSG_TRUNC:
            n = min(n, self.avail - self.base)
            self.base += n
            if self.peek is not None:
                self.peek = max(self.peek - n, 0)
            return n
        assert flags == socket.MSG_PEEK and self.peek is not None
        data = self._peek(self.base + self.peek, n)
        buf[: len(data)] = data
        self.peek += len(data)
        return len(data)

    def recvmsg_into(
        self, buffers: tuple[memoryview, ...], ancillary: int, flags: int
    ) -> tuple[int, list[Any], int, Any]:
        assert flags == socket.MSG_PEEK and self.peek is None
        data = self._peek(self.base, sum(map(len, buffers)))
        at = 0
        for b in buffers:
            part = data[at : at + len(b)]
            b[: len(part)] = part
            at += len(part)
        return len(data), [], 0, None

    def _peek(self, at: int, n: int) -> bytes:
        end = min(at + n, self.avail)
        if at < self.mark < end:
            end = self.mark
        if end <= at and not self.ended:
            if self.error:
                raise OSError(self.take_error(), "socket error")
            if self.failed:
                return b""
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        return HOST_DATA[at:end]

    def send(self, data: memoryview, flags: int = 0) -> int:
        return self.sendmsg((data,))

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        assert not self.shut, "sent after shutdown"
        assert not self.closed
        if self.error:
            raise OSError(self.take_error(), "socket error")
        data = b"".join(parts)[: self.room]
        if not data:
            raise BlockingIOError(errno.EAGAIN, "full")
        assert data == GUEST_DATA[self.sent : self.sent + len(data)], "not the guest's stream"
        self.room -= len(data)
        self.sent += len(data)
        return len(data)

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR and not self.shut
        self.shut = True

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class Talk:
    """The guest's state of a connection, and its data: GUEST_DATA from its initial sequence number on."""

    def __init__(self, number: int) -> None:
        self.port = 40000 + number
        self.theirs = number >= 2  # begun by a host client
        self.key = GUEST4 + (GATEWAY4 if number & 1 else PEER) + Struct("!HH").pack(self.port, 80)
        self.begin(None, GUEST_ISNS[0])

    def begin(self, sock: Sock | None, isn: int) -> None:
        self.sock = sock
        self.isn = isn
        self.ours = 0  # the initial sequence number of the other side
        self.began = False  # it is known
        self.high = 0  # bytes that the guest has sent
        self.fin = -1  # how many there are, once it has said so
        self.fins: set[int] = set()  # wherever it has said so
        self.wild = False  # it has said contradictory things, or RST: nothing can be promised
        self.reset = False  # it got RST
        self.got = 0  # bytes received
        self.most = 0  # bytes sent to it, and FIN as one more
        self.ended = False  # FIN received
        self.edge = 0  # the most that it told to take
        self.acked = 0  # bytes acknowledged to it
        self.window = -1  # the edge that it was promised


class World:
    """Everything around one `Tcp`, which serves all executions."""

    cuts = False
    full = False
    rto_min = 0.010
    room = 1 << 30
    tso = uso = True
    sent_frames = sent_bytes = 0

    def __init__(self, features: Features) -> None:
        guest = Guest(mac=GUEST_MAC, addr4=GUEST4, addr6=GUEST6, addr6_ll=GUEST_LL)
        self.ctx = ctx = make_context(pool_size=1 << 17, guest=guest, mtu=1500)
        ctx.link = cast(Any, self)
        self.reactor, self.timers = cast(FakeReactor, ctx.reactor), cast(FakeTimers, ctx.timers)
        self.tcp = Tcp(ctx, features)
        self.features = features
        self.replaced = 0
        self.tcp.opening.isn = lambda key, now: 0xFFFFFFF0 + (self.tcp.opening._replaced << 8) & MASK  # type: ignore
        self.start()

    def start(self) -> None:
        self.now = T0
        self.talks = [Talk(n) for n in range(4)]
        self.current = self.talks[0]
        self.isn = 0
        self.socks: list[Sock] = []
        self.connecting: list[Sock] = []
        self.connect = 0
        self.lose = 0
        self.full = False
        self.no_sockets = False

    # The link ----------------------------------------------------------------------------------------------------

    def catch_up(self, now: float) -> None:
        """Nothing waits in it."""

    def queue_little(self, little: bool) -> None:
        """It has no queue."""

    def send(self, hdr: bytearray) -> None:
        self.send_payload((hdr,))

    def send_frame(self, frame: bytes) -> None:
        """ICMP: of no consequence here."""

    def lay_out(self, header: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        """It has no place for payload."""
        return [], 0

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        hdr = parts[0]
        l4 = 44 if hdr[22] == 8 else 64
        _, to, seq, ack, bits, window, _, _ = HEADER.unpack_from(hdr, l4)
        if bits & RST:
            self.talk(to).reset = True
            return
        if bits & SYN:
            self._syn(to, seq, ack, bits, hdr, l4)
            return
        talk, n = self.talk(to), len(parts[1]) if len(parts) > 1 else 0
        if bits >> 12 > 5:
            self._check_sack(talk, parse_sack(bytes(parts[1])))
            n = 0
        assert talk.began, "data before SYN"
        self._check_ack(talk, ack, window)
        at = seq - talk.ours - 1 & MASK
        if at >= HALF:
            assert not n  # a probe
            return
        fin = 1 if bits & FIN else 0
        sock = talk.sock
        assert sock is not None
        if n:
            assert at + n <= sock.avail
            assert parts[1] == HOST_DATA[at : at + n], "not the host peer's bytes"
            assert at + n <= talk.edge, "beyond the window"
        if fin:
            assert (sock.ended or sock.failed == errno.EPIPE) and at + n == sock.avail
        talk.most = max(talk.most, at + n + fin)
        if self.lose:
            self.lose -= 1
            return
        if at <= talk.got <= at + n:
            talk.got = at + n
            talk.ended |= bool(fin)

    def _syn(self, to: int, seq: int, ack: int, bits: int, hdr: Buffer, l4: int) -> None:
        talk = self.talk(to)
        talk.ours, talk.began = seq, True
        n = 4 if l4 == 44 else 16
        ends = bytes(hdr[l4 - 2 * n : l4])
        talk.key = ends[n:] + ends[:n] + bytes(hdr[l4 + 2 : l4 + 4]) + bytes(hdr[l4 : l4 + 2])
        assert bool(bits & ACK) != talk.theirs
        if bits & ACK:
            assert ack == talk.isn + 1 & MASK

    def _check_sack(self, talk: Talk, blocks: Sequence[tuple[int, int]]) -> None:
        assert blocks
        for left, right in blocks:
            start, end = left - talk.isn & MASK, right - talk.isn & MASK  # a probe may be in the place of SYN
            assert talk.wild or start < end <= talk.high + 1, "a block of what the guest did not send"

    def _check_ack(self, talk: Talk, ack: int, window: int) -> None:
        sock = talk.sock
        if sock is None:
            return
        told = ack - talk.isn - 1 & MASK
        assert told <= sock.sent + (1 if talk.wild or sock.sent in talk.fins else 0), "acknowledged, but not taken"
        assert told >= talk.acked, "took an acknowledgement back"
        talk.acked = told
        scale = self.tcp._conns[talk.key].rcv_wscale
        edge = told + (window << scale)
        assert edge > talk.window - (1 << scale), "the window moved left"
        talk.window = max(talk.window, edge)

    def talk(self, port: int) -> Talk:
        return self.talks[port - 40000]

    # Sockets -----------------------------------------------------------------------------------------------------

    def new_socket(self, family: int, kind: int) -> Sock:
        if self.no_sockets:
            raise OSError(errno.EMFILE, "too many")
        sock = Sock(self, 1000 + len(self.socks))
        self.socks.append(sock)
        self.current.begin(sock, self.isn)
        return sock

    def first(self, sock: Sock) -> int:
        """The count of SYN in `tcpi_bytes_acked`."""
        return 0 if any(t.sock is sock and t.theirs for t in self.talks) else 1

    def fire(self, sock: Sock, events: int) -> None:
        if sock.fd in self.reactor.refs and not sock.closed:
            self.reactor.fire(sock.fd, events, self.now)

    def arrived(self, sock: Sock) -> None:
        """Tell of what came, once."""
        events = EPOLLIN if sock.told != sock.avail else 0
        if sock.ended and not sock.end_told:
            events |= EPOLLIN | EPOLLRDHUP
        if sock.fd in self.reactor.events and self.reactor.events[sock.fd] & EPOLLOUT and sock.room > SNDBUF // 3:
            events |= EPOLLOUT
        sock.told, sock.end_told = sock.avail, sock.ended
        if events:
            self.fire(sock, events)

    def accept(self, talk: Talk) -> None:
        if talk.key in self.tcp._conns or any(t is not talk and t.key == talk.key for t in self.talks):
            return
        sock = Sock(self, 1000 + len(self.socks))
        self.socks.append(sock)
        tcp_sock.prepare_listener(sock, self.features)
        talk.begin(sock, GUEST_ISNS[0])
        near = talk.port & 1
        rule = Rule(f"-t 80:{talk.port}", PROTO_TCP, False, 80, 80, talk.port)
        listener = Listener(rule, 80, cast(Any, SimpleNamespace(fileno=lambda: 900)))
        self.tcp.opening.accepted(listener, sock, addr.LOOPBACK4 if near else PEER, PEER_PORT + near, self.now)

    # Time --------------------------------------------------------------------------------------------------------

    def later(self, seconds: float) -> None:
        end = self.now + seconds
        services = self.timers.services
        for _ in range(200):  # a connection with a short timer and a long wait fires often
            due = min((d for d in services.deadlines if d is not None), default=end + 1)
            nxt = min(due, self.timers.next())
            if nxt > end:
                break
            self.now = max(self.now, nxt)
            if due <= nxt:
                services.fire(services.deadlines.index(due), self.now)
            else:
                self.timers.advance(nxt)
            self.reactor.end_turn(self.now)
        self.now = max(self.now, end)


Batch = list[tuple[int, int, int, bytes, int, bytes]]
OPTIONS = (
    SynOptions(1460, 7).emit(), SynOptions(536, None).emit(), b"", b"\2\3\0\0", SynOptions(100, 0).emit(),
    SynOptions(1460, 7, sack=True).emit(), SynOptions(100, None, sack=True).emit(),
)  # fmt: skip


def put(world: World, talk: Talk, batch: Batch) -> None:
    """Hand segments (flags, seq, ack, payload, window, options) over."""
    flat: list[int] = []
    at, buf = 64, world.ctx.pool.buf
    for flags, seq, ack, payload, window, options in batch:
        bits = (5 + len(options) // 4) << 12 | flags
        raw = HEADER.pack(talk.port, 80, seq & MASK, ack & MASK, bits, window, 0, 0) + options + payload
        buf[at : at + len(raw)] = raw
        flat += (at, at + len(raw))
        at += len(raw)
    world.current = talk
    world.tcp.tap_handler(talk.key, flat, world.now)


def segment(world: World, talk: Talk, steps: Steps, batch: Batch) -> bool:
    """Add a segment to the batch; whether more belong to it."""
    a, b, c = steps.byte(), steps.byte(), steps.byte()
    flags = FLAGS[(a & 15) % len(FLAGS)]
    n = min(b if b < 200 else (b - 199) * 25, STREAM_MAX - talk.high)
    at = (talk.high, talk.acked, talk.acked - 1, talk.acked)[a >> 4 & 3]
    ack = (talk.got + talk.ended, talk.most, talk.got, talk.got)[a >> 6]
    if a >> 4 & 3 == 3:
        at += steps.byte() - 100
    if a >> 6 == 3:
        ack += steps.byte() - 128
    options = b""
    if flags & SYN:
        n = 0
        options = OPTIONS[b % len(OPTIONS)]
        if not flags & ACK:
            world.isn = GUEST_ISNS[c >> 4 & 1]
            if not talk.theirs:
                batch.append((flags, world.isn, 0, b"", 5000, options))
            return False
        at, ack = -1, ack if c & 0x20 else 0
    elif c & 0x40:  # blocks that may be true, or not
        first, second = steps.byte(), steps.byte()
        left = talk.ours + 1 + ack + 100 * (first - 20)
        options = emit_sack([(left, left + 50 * second), (left + 9000, left + 9000 + first)][: 1 + (c >> 7)])
    at = min(max(at, -1), STREAM_MAX)
    payload = GUEST_DATA[at : at + n] if at >= 0 else b"\0" * min(n, 1)
    n = len(payload)
    window = WINDOWS[c & 7]
    _believe(talk, flags, at, n, ack, window)
    batch.append((flags, talk.isn + 1 + at, talk.ours + 1 + ack, payload, window, options))
    return bool(c & 8)


def _believe(talk: Talk, flags: int, at: int, n: int, ack: int, window: int) -> None:
    """Update the expectations after a segment."""
    if flags & RST:
        talk.wild = True
    talk.high = max(talk.high, at + n)
    if flags & FIN and not flags & SYN and at + n >= 0:
        talk.wild |= talk.fin not in (-1, at + n)
        talk.fin = at + n
        talk.fins.add(at + n)
    talk.wild |= 0 <= talk.fin < talk.high
    if flags & ACK and ack >= 0:
        talk.edge = max(talk.edge, min(ack, STREAM_MAX) + (window << 7))
    if flags & ACK and 0 <= ack <= talk.most:
        # It may acknowledge what it never got: then it will not get it again.
        sock = talk.sock
        if sock is not None and sock.ended and ack == sock.avail + 1:
            talk.got, talk.ended = ack - 1, True
        else:
            talk.got = max(talk.got, ack)


def host(world: World, talk: Talk, kind: int, steps: Steps) -> None:
    """Something happens to the host socket; nothing does while it connects, but for `connected`."""
    sock, value = talk.sock, steps.byte()
    if sock is None or sock in world.connecting:
        return
    over = sock.error or sock.failed  # its peer has reset it, or is silent for ever
    if kind == 4 and not sock.ended and not over:
        sock.avail = min(sock.avail + value * (1 if value < 128 else 100), STREAM_MAX)
        if value & 3:
            world.arrived(sock)
    elif kind == 5 and not over:
        sock.ended = True
        world.arrived(sock)
    elif kind == 6:
        sock.error = ERRORS[value & 3]
        talk.wild = True
        if value & 4:
            world.fire(sock, EPOLLERR | EPOLLHUP | EPOLLIN)
    elif kind == 7:
        sock.room = min(sock.room + value * 64, SNDBUF) if value < 128 else SNDBUF
        world.arrived(sock)
    elif kind == 8:
        sock.room = value & 7
    elif kind == 13:
        sock.hold = bool(value & 1)
        if value & 2:
            sock.mark = sock.avail
            world.fire(sock, EPOLLPRI)
        if value & 4:
            world.fire(sock, (EPOLLIN, EPOLLOUT, EPOLLHUP, EPOLLPRI)[value >> 3 & 3])


def around(world: World, talk: Talk, kind: int, steps: Steps) -> None:
    """Something happens around the connections."""
    value = steps.byte()
    if kind == 9:
        world.later(TIMES[value & 7])
    elif kind == 10:
        world.full = bool(value & 1)
        if not world.full:
            world.tcp.resume(world.now)
    elif kind == 11:
        world.reactor.end_turn(world.now)
    elif kind == 12:
        if talk.theirs:
            world.accept(talk)
    elif kind == 14:
        world.lose = value & 7
    else:
        world.connect = CONNECTS[value & 3]
        world.no_sockets = value & 0x1C == 0x1C
        connected(world, CONNECTS[value >> 5 & 3])


def connected(world: World, error: int) -> None:
    """Those that were connecting are connected, or not."""
    waiting, world.connecting = world.connecting, []
    for sock in waiting:
        sock.error = 0 if error == errno.EINPROGRESS else error
        world.fire(sock, EPOLLOUT | (EPOLLERR | EPOLLHUP if error else 0))


def program(world: World, steps: Steps) -> None:
    batch: Batch = []
    while steps.left > 0:
        what = steps.byte()
        talk = world.talks[what >> 4 & 3]
        kind = what & 15
        if kind < 4:
            more = segment(world, talk, steps, batch)
            while more and steps.left > 0 and len(batch) < 20:
                more = segment(world, talk, steps, batch)
            if batch:
                put(world, talk, batch)
            batch = []
        elif kind < 9 or kind == 13:
            host(world, talk, kind, steps)
        else:
            around(world, talk, kind, steps)


# Both sides behave ---------------------------------------------------------------------------------------------------


def behave(world: World) -> None:
    """Both ends close, and acknowledge everything."""
    world.lose, world.connect, world.no_sockets, world.full = 0, 0, False, False
    world.tcp.resume(world.now)
    connected(world, 0)
    for sock in world.socks:
        sock.hold, sock.error, sock.ended = False, 0, True
    for i in range(ROUNDS):
        open_talks = [t for t in world.talks if t.key in world.tcp._conns and t.sock is not None]
        if not open_talks:
            break
        for talk in open_talks:
            assert talk.sock is not None
            talk.sock.room = SNDBUF
            world.arrived(talk.sock)
            if talk.key in world.tcp._conns:
                answer(world, talk)
        world.reactor.end_turn(world.now)
        # A timer may have been doubled up to RTO_MAX before they began to behave
        world.later(0.02 if i % 4 else 2.0 if i < ROUNDS // 2 else RTO_MAX)
    else:
        raise AssertionError("it does not come to an end")


def answer(world: World, talk: Talk) -> None:
    """The guest sends again what was not acknowledged, and acknowledges what it has."""
    if not talk.began:
        return
    batch: Batch = []
    conn, sock = world.tcp._conns[talk.key], talk.sock
    assert sock is not None
    # In a batch it may have acknowledged what was sent while that was handled, and lost: it will not get that again.
    una = conn.snd_una - conn.iss - 1
    talk.got, talk.ended = max(talk.got, min(una, sock.avail)), talk.ended or (sock.ended and una > sock.avail)
    ack = talk.ours + 1 + talk.got + talk.ended
    talk.edge = max(talk.edge, talk.got + (65535 << 7))
    if talk.theirs and talk.window < 0:
        batch.append((SYN | ACK, talk.isn, talk.ours + 1, b"", 65535, OPTIONS[0]))
    if talk.fin < 0 or talk.wild:
        talk.fin = sock.sent if sock.shut else max(talk.high, *talk.fins, 0)
        talk.fins.add(talk.fin)
    at, end = min(talk.acked, talk.fin), talk.fin
    while True:
        n = min(end - at, 1400)
        flags = ACK | (FIN if at + n == end else 0)
        batch.append((flags, talk.isn + 1 + at, ack, GUEST_DATA[at : at + n], 65535, b""))
        at += n
        if at == end:
            break
    put(world, talk, batch)


def settle(world: World) -> None:
    """The result of the connection."""
    world.reactor.end_turn(world.now)
    for talk in world.talks:
        sock = talk.sock
        if sock is None or talk.wild or talk.reset or sock.reset or not talk.began or talk.window < 0:
            continue
        assert sock.sent == talk.fin, f"{sock.sent} of {talk.fin} bytes arrived at the host"
        assert talk.ended and talk.got == sock.avail, f"{talk.got} of {sock.avail} bytes arrived at the guest"
        assert sock.shut or sock.closed


def empty(world: World) -> None:
    """Nothing is left."""
    world.tcp._table.forget()
    world.reactor.end_turn(world.now)
    world.later(POLL_MAX + 0.1)
    world.tcp.resume(world.now)
    ctx, tcp = world.ctx, world.tcp
    assert ctx.flows.count == 0 and not any(ctx.flows.by_index)
    assert not tcp._conns and not tcp._table.half_open and not tcp._out.turns.waiting and not tcp._acks._waiting
    assert not world.reactor.refs, "a descriptor is still watched"
    assert all(sock.closed for sock in world.socks), "a socket is open"
    assert all(owner == NO_OWNER for owner in world.timers.owner.values())


WORLDS = [World(Features()), World(Features(peek_off=False, min_rtt=False, snd_wnd=False))]


def seeds() -> Iterable[bytes]:
    syn = bytes((0, 3, 0, 0))
    handshake = syn + bytes((0, 0, 0, 0))
    data = bytes((0, 1, 100, 0, 4, 50, 0, 0, 0, 0))
    close = bytes((0, 2, 0, 0, 5, 0, 0, 0, 0, 0))
    for flags in (0, 1):
        start = bytes((flags,))
        yield start + handshake + data + close
        yield start + handshake + bytes((0, 1, 220, 8, 1, 250, 0, 0x31, 100, 9, 0)) + bytes((8, 3)) + data
        yield start + handshake + bytes((4, 255, 4, 255, 0, 0, 0, 1, 9, 3, 0, 0, 0, 0))
        yield start + bytes((15, 1)) + syn + bytes((15, 0x40))
        for talk in (0x20, 0x30):
            accept = bytes((talk | 12, 0, talk, 4, 0, 0))
            yield start + accept + bytes((talk, 1, 60, 0, talk | 4, 90, talk, 0, 0, 0, 9, 2))
            yield start + bytes((talk | 12, 0, talk, 6, 0, 0, talk, 4, 0, 0))
        yield start + handshake + bytes((14, 1, 4, 127, 9, 3, 0, 0x80, 0, 0, 10, 1, 4, 127, 0, 0, 0, 0, 10, 0))
        yield start + handshake + bytes((13, 1, 0, 1, 250, 0, 9, 1, 9, 2, 13, 2, 4, 9, 6, 4))


def one(data: bytes) -> None:
    steps = Steps(data)
    world = WORLDS[steps.byte() & 1]
    world.start()
    module: Any = tcp_sock
    former, module.new_socket = module.new_socket, world.new_socket
    try:
        program(world, steps)
        behave(world)
        settle(world)
    finally:
        module.new_socket = former
        empty(world)
