"""TCP as timed conversations: a guest that speaks in segments, a host socket that does what it is told, a fake clock.

    talk = open_connection()                   SYN, SYN,ACK and ACK are behind us
    talk.guest(ACK | PSH, b"GET /")            the guest sends; `seq` and `ack` follow by themselves
    talk.expect(ACK, ack=6)                    what we answered, numbers relative to the initial ones
    talk.sock.arrive(b"answer")                the host peer sends
    talk.expect(ACK | PSH, b"answer")
    talk.wait(1.0)                             time passes, timers fire

    talk = Talk()
    talk.accept("198.51.100.7")                a host client connected to a forwarded port
    talk.expect(SYN, seq=0)
    talk.answer()                              the guest's SYN,ACK
    talk.expect(ACK, seq=1, ack=1)             `accepted_connection()` is these four

Numbers are relative to the initial sequence numbers of either side.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import Struct
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from passt import addr
from passt.linux.sockopt import SO_MEMINFO, SO_PEEK_OFF
from passt.linux.tcpinfo import BYTES_ACKED, BYTES_RECEIVED, MIN_RTT, SND_WND, TCP_INFO_LEN, TCP_SYN_SENT, Features
from passt.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from passt.policy.rules import Listener, Rule
from passt.tcp import Tcp
from passt.tcp_engine import sock as tcp_sock
from passt.wire.checksum import PROTO_TCP
from passt.wire.tcp import ACK, HEADER, SYN, SynOptions, emit_sack, flag_names, parse_sack
from tests.unit.support import T0, FakeTimers, link, make_context, reactor, timers

GUEST_ISN = 0xFFFFFF00  # so that every conversation wraps
ALL = Features()
MASK = 0xFFFFFFFF
TCP_ESTABLISHED = 1
PORTS = (40000).to_bytes(2, "big") + (80).to_bytes(2, "big")
PEER_PORT = 50000  # of a host client


class FakeSocket:
    """A host TCP socket. `incoming` is what the peer sent, `sent` what we gave it.

    The peer acknowledges everything at once, FIN as well, unless `info[BYTES_ACKED]` says how much.
    """

    made: ClassVar[list[FakeSocket]] = []
    connect_results: ClassVar[list[int]] = [0]  # of successive connect_ex() calls; the last one repeats

    def __init__(self, family: int, kind: int) -> None:
        self.family = family
        self.fd = 1000 + len(FakeSocket.made)
        FakeSocket.made.append(self)
        self.options: dict[tuple[int, int], Any] = {}
        self.peer: tuple[Any, ...] = ()
        self.bound: tuple[Any, ...] = ()
        self.incoming = bytearray()
        self.ended = False
        self.peek_off: int | None = None
        self.peeks = self.looks = 0  # at the data, at TCP_INFO
        self.sent = bytearray()
        self.sent_more: list[bytes] = []  # what was sent with MSG_MORE
        self.room = 1 << 30  # bytes that send() takes
        self.sndbuf, self.wmem = 4 << 20, 0
        self.info = {MIN_RTT: 10_000, SND_WND: 1 << 20}
        self.syn = 1  # a connecting socket counts it as acknowledged, an accepted one does not
        self.error = 0
        self.failed = False  # it had an error: what is left can be read, and then the end, as from the kernel's
        self.shut = self.closed = False
        self._connects = list(FakeSocket.connect_results)

    def fileno(self) -> int:
        return self.fd

    def connect_ex(self, peer: tuple[Any, ...]) -> int:
        self.peer = peer
        return self._connects.pop(0) if len(self._connects) > 1 else self._connects[0]

    def bind(self, address: tuple[Any, ...]) -> None:
        self.bound = address

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self.options[level, option] = value
        if (level, option) == (socket.SOL_SOCKET, SO_PEEK_OFF):
            assert value >= 0, "the peek offset became negative"
            self.peek_off = value

    def getsockopt(self, level: int, option: int, length: int = 0) -> Any:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            error, self.error = self.error, 0
            return error
        if (level, option) == (socket.SOL_SOCKET, SO_MEMINFO):
            return Struct("=9I").pack(0, 0, 0, self.sndbuf, 0, self.wmem, 0, 0, 0)
        if (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF):
            return self.sndbuf
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        if length == 1 and self.peer and 0 not in self.info:
            return bytes([TCP_ESTABLISHED if not self._connects[0] else TCP_SYN_SENT])
        self.looks += 1
        info = bytearray(TCP_INFO_LEN)
        for offset, value in ({BYTES_ACKED: self.syn + len(self.sent) + self.shut} | self.info).items():
            Struct("=Q" if offset in (BYTES_ACKED, BYTES_RECEIVED) else "=I").pack_into(info, offset, value)
        return bytes(info)

    def recv_into(self, buf: memoryview, n: int, flags: int) -> int:
        if flags == socket.MSG_TRUNC:
            n = min(n, len(self.incoming))
            del self.incoming[:n]
            if self.peek_off is not None:
                self.peek_off = max(self.peek_off - n, 0)
            return n
        assert flags == socket.MSG_PEEK
        assert self.peek_off is not None
        data = self._peek(self.peek_off, n)
        buf[: len(data)] = data
        self.peek_off += len(data)
        return len(data)

    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary: int, flags: int
    ) -> tuple[int, list[Any], int, Any]:
        assert ancillary == 0 and flags == socket.MSG_PEEK
        data = self._peek(self.peek_off or 0, sum(map(len, buffers)))
        if self.peek_off is not None:
            self.peek_off += len(data)
        at = 0
        for b in buffers:
            part = data[at : at + len(b)]
            b[: len(part)] = part
            at += len(part)
        return len(data), [], 0, None

    def _peek(self, offset: int, n: int) -> bytes:
        self.peeks += 1
        data = bytes(self.incoming[offset : offset + n])
        if not data and self.error:
            error, self.error = self.error, 0
            raise OSError(error, "socket error")
        if not data and not self.ended and not self.failed:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        return data

    def send(self, data: memoryview, flags: int = 0) -> int:
        assert flags in (0, socket.MSG_MORE)
        if flags:
            self.sent_more.append(bytes(data))
        return self.sendmsg([data])

    def sendmsg(self, parts: list[memoryview]) -> int:
        assert not self.shut, "sent after shutdown"
        if self.error:
            error, self.error = self.error, 0
            raise OSError(error, "socket error")
        data = b"".join(parts)[: self.room]
        if not data:
            raise BlockingIOError(errno.EAGAIN, "full")
        self.room -= len(data)
        self.sent += data
        return len(data)

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        self.shut = True

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    @property
    def resets_on_close(self) -> bool:
        return self.options.get((socket.SOL_SOCKET, socket.SO_LINGER)) == Struct("=ii").pack(1, 0)


def listener(port: int = 8080, to: int = 80, **rule: Any) -> Listener:
    """A port that leads to port `to` of the guest."""
    sock = SimpleNamespace(fileno=lambda: 900)
    return Listener(Rule(f"-t {port}:{to}", PROTO_TCP, False, port, port, to, **rule), port, sock)


def accepted_socket(peer: bytes, features: Features = ALL, *, dual: bool = False) -> FakeSocket:
    """The socket that a prepared listener accepts for a client; `dual`: the listener is one of both families."""
    sock = FakeSocket(socket.AF_INET6 if dual else addr.family(peer), socket.SOCK_STREAM)
    tcp_sock.prepare_listener(sock, features)
    sock.syn = 0
    return sock


@dataclass(frozen=True)
class Segment:
    """A segment to the guest, numbers relative to the initial sequence numbers."""

    flags: int
    seq: int
    ack: int
    window: int
    payload: bytes
    options: SynOptions
    gso_size: int
    sack: list[tuple[int, int]]

    def __str__(self) -> str:
        return f"{flag_names(self.flags)} seq {self.seq} ack {self.ack} window {self.window} length {len(self.payload)}"


@dataclass
class Talk:
    """One conversation."""

    features: Features = ALL
    v6: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    peer: bytes | None = None

    def __post_init__(self) -> None:
        self.ctx = make_context(pool_size=1 << 20, **self.config)
        self.tcp = Tcp(self.ctx, self.features)
        self.now = T0
        guest = self.ctx.guest.addr6 if self.v6 else self.ctx.guest.addr4
        peer = self.peer or addr.packed("2001:db8:ffff::7" if self.v6 else "198.51.100.7")
        self.key = guest + peer + PORTS
        self.seq = 0  # next from the guest
        self.ack = 0  # what the guest acknowledges
        self.isn = 0
        self.window = 65535

    @property
    def sock(self) -> FakeSocket:
        return FakeSocket.made[-1]

    @property
    def timers(self) -> FakeTimers:
        return timers(self.ctx)

    def put(self, *segments: tuple[int, int, int, bytes, int, bytes]) -> None:
        """Hand segments (flags, seq, ack, payload, window, options) over as one batch, absolute numbers."""
        flat: list[int] = []
        offset = 64
        for flags, seq, ack, payload, window, options in segments:
            bits = (5 + len(options) // 4) << 12 | flags
            raw = HEADER.pack(40000, 80, seq & MASK, ack & MASK, bits, window, 0, 0) + options + payload
            self.ctx.pool.buf[offset : offset + len(raw)] = raw
            flat += (offset, offset + len(raw))
            offset += len(raw)
        self.tcp.tap_handler(self.key, flat, self.now)

    def segment(
        self,
        flags: int,
        payload: bytes = b"",
        *,
        seq: int | None = None,
        ack: int | None = None,
        window: int | None = None,
        sack: Sequence[tuple[int, int]] = (),
    ) -> tuple[int, int, int, bytes, int, bytes]:
        """A segment of the guest with numbers relative to the initial ones; without `seq` it is the next in order.

        `sack` has the blocks that it reports.
        """
        at = self.seq if seq is None else seq
        if seq is None:
            self.seq += len(payload) + (1 if flags & 3 else 0)
        acked = self.ack if ack is None else ack
        options = emit_sack((self.isn + left, self.isn + right) for left, right in sack) if sack else b""
        return flags, GUEST_ISN + at, self.isn + acked, payload, self.window if window is None else window, options

    def guest(self, flags: int, payload: bytes = b"", **numbers: Any) -> None:
        """The guest sends one segment."""
        self.put(self.segment(flags, payload, **numbers))

    def syn(self, mss: int = 1460, ws: int | None = 7, *, sack: bool = False) -> None:
        self.put((SYN, GUEST_ISN, 0, b"", 64240, SynOptions(mss, ws, sack).emit()))
        self.seq = 1

    def accept(self, peer: str, *, dual: bool = False, to: int = 80, **rule: Any) -> FakeSocket:
        """A host client connects to a forwarded port."""
        packed = addr.packed(peer)
        sock = accepted_socket(packed, self.features, dual=dual)
        self.tcp.opening.accepted(listener(to=to, **rule), sock, packed, PEER_PORT, self.now)
        return sock

    def answer(
        self, mss: int = 1460, ws: int | None = 7, *, ack: int = 1, options: bytes | None = None, sack: bool = False
    ) -> None:
        """The guest answers our SYN by SYN,ACK."""
        raw = SynOptions(mss, ws, sack).emit() if options is None else options
        self.put((SYN | ACK, GUEST_ISN, self.isn + ack, b"", 64240, raw))
        self.seq = 1

    def taken(self) -> list[Segment]:
        """The segments sent to the guest since the last call."""
        fake = link(self.ctx)
        vnet = list(fake.vnet)
        return [self._parse(frame, v) for frame, v in zip(fake.take(), vnet, strict=True)]

    def _parse(self, frame: bytes, vnet: bytes) -> Segment:
        v6 = frame[14 - 2 : 14] == b"\x86\xdd"
        n, l4 = (16, 54) if v6 else (4, 34)
        source, destination, ports = frame[l4 - 2 * n : l4 - n], frame[l4 - n : l4], frame[l4 : l4 + 4]
        _, _, seq, ack, bits, window, _, _ = HEADER.unpack_from(frame, l4)
        data = l4 + (bits >> 12) * 4
        flags = bits & 0x3F
        if flags & SYN:
            self.isn = seq
        key = destination + source + ports[2:] + ports[:2]
        if flags & SYN and not flags & ACK:
            self.key = key  # our SYN says between which endpoints the conversation goes on
        assert key == self.key
        gso_size = Struct("=BBHHHH").unpack(vnet)[3]
        return Segment(
            flags,
            seq - self.isn & MASK,
            ack - GUEST_ISN & MASK if flags & ACK else 0,
            window,
            frame[data:],
            SynOptions.parse(frame[l4 + 20 : data]),
            gso_size,
            [(left - GUEST_ISN & MASK, right - GUEST_ISN & MASK) for left, right in parse_sack(frame[l4 + 20 : data])],
        )

    def expect(self, flags: int, payload: bytes | None = None, **numbers: int) -> Segment:
        """Exactly one segment went to the guest, with these flags, payload and numbers; the guest notes its end."""
        segments = self.taken()
        assert len(segments) == 1, [str(s) for s in segments]
        (s,) = segments
        assert flag_names(s.flags) == flag_names(flags), str(s)
        if payload is not None:
            assert s.payload == payload
        for name, value in numbers.items():
            assert getattr(s, name) == value, str(s)
        self.ack = max(self.ack, s.seq + len(s.payload) + (1 if flags & 3 else 0))
        return s

    def expect_nothing(self) -> None:
        assert [str(s) for s in self.taken()] == []

    def host(self, data: bytes = b"", *, end: bool = False, error: int = 0) -> None:
        """The host peer sends, ends its direction, or the socket fails; epoll says so."""
        sock = self.sock
        sock.incoming += data
        sock.ended |= end
        sock.error = error
        sock.failed |= error != 0
        over = EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP if error else 0
        events = (EPOLLIN if data or end else 0) | (EPOLLRDHUP if end else 0) | over
        reactor(self.ctx).fire(sock.fd, events, self.now)

    def writable(self) -> None:
        reactor(self.ctx).fire(self.sock.fd, EPOLLOUT, self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass; every timer fires when it is due."""
        reactor(self.ctx).go_on(self.now)
        end = self.now + seconds
        services = self.timers.services
        while True:
            due = [(d, i) for i, d in enumerate(services.deadlines) if d is not None and d <= end]
            nxt = min(min(due)[0] if due else end + 1, self.timers.next())
            if nxt > end:
                break
            self.now = nxt
            if due and min(due)[0] == nxt:
                services.fire(min(due)[1], nxt)
            else:
                self.timers.advance(nxt)
        self.now = end

    def until(self, at: float) -> None:
        """Let time pass until just after `at`; nothing goes to the guest before that."""
        self.wait(at - self.now - 0.0001)
        self.expect_nothing()
        self.wait(0.0002)

    def end_turn(self) -> None:
        reactor(self.ctx).end_turn(self.now)

    @property
    def gone(self) -> bool:
        """Nothing of the connection is left."""
        self.end_turn()
        return self.ctx.flows.count == 0 and self.sock.closed and not self.tcp._conns


@pytest.fixture(autouse=True)
def fake_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host sockets are fakes; connect() succeeds at once."""
    FakeSocket.made.clear()
    FakeSocket.connect_results = [0]
    monkeypatch.setattr(tcp_sock, "new_socket", FakeSocket)


def open_connection(*, sack: bool = False, mss: int = 1460, **how: Any) -> Talk:
    """A conversation with the handshake done: relative numbers are 1 on both sides."""
    talk = Talk(**how)
    talk.syn(mss, sack=sack)
    talk.expect(SYN | ACK, seq=0, ack=1)
    talk.guest(ACK)
    talk.expect_nothing()
    return talk


def accepted_connection(peer: str = "198.51.100.7", **how: Any) -> Talk:
    """Likewise, begun by a host client."""
    talk = Talk(**how)
    talk.accept(peer)
    talk.expect(SYN, seq=0)
    talk.answer()
    talk.expect(ACK, b"", seq=1, ack=1)
    return talk
