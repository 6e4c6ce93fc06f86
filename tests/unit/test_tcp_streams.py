"""Both directions of a connection at once, under everything that may happen to them: what was written arrives.

A guest and a host peer, each a small model of TCP or of a socket, write, read, acknowledge, stop reading and end in any
order. Frames to the guest get lost and late, segments of the guest get lost, late and doubled, the socket takes less
than it is given, the link is full, timers fire. Half of the guests permit SACK, and some of them renege. All the while
nothing may be said that is not so: no byte that was not written, at no other place, beyond no window, no
acknowledgement of what the socket did not take, no SACK of what did not come. In the end both sides behave: then both
streams are whole, the connection has ended, and nothing is left of it.

Offsets count the bytes of a stream from 0; sequence numbers relative to the initial ones are 1 more.
"""

from __future__ import annotations

import random
import socket
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from passt import addr
from passt.loop.reactor import EPOLLIN, EPOLLOUT, EPOLLRDHUP
from passt.loop.timers import NO_OWNER
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import RTO_MAX, TAP_FIN_RCVD, TcpConn
from passt.tcp_engine.out_of_order import OVERHEAD
from passt.tcp_engine.window import POLL_MAX, tail_of
from passt.wire.tcp import ACK, FIN, PSH, RST, SACK_BLOCKS_MAX, SYN

from . import support
from .machine_link import LayingLink, MachineLink
from .support import FakeLink, link, reactor
from .tcp_support import ALL, BYTES_ACKED, MIN_RTT, PEER_PORT, SND_WND, FakeSocket, Features, Segment, Talk, listener

STREAM_MAX = 1 << 20
GUEST_DATA = random.Random(1).randbytes(STREAM_MAX)
HOST_DATA = random.Random(2).randbytes(STREAM_MAX)
ROUNDS = 120  # in which both sides behave
SENT, LOST, LATE, TWICE = "sent", "lost", "late", "twice"


class Buffer(FakeSocket):
    """A host socket with a send buffer that its peer empties, and events that are told once."""

    def __init__(self, family: int, kind: int) -> None:
        super().__init__(family, kind)
        self.sndbuf = 100_000
        self.most = 1 << 30  # that one call takes
        self.info[BYTES_ACKED] = 1
        self.told, self.end_told = 0, False
        self.written = 0  # by the peer
        self.fin_acked = False
        self.short = 0  # calls that took less than all

    def sendmsg(self, parts: list[memoryview]) -> int:
        self.room = min(self.sndbuf - self.wmem, self.most)
        try:
            n = super().sendmsg(parts)
        except BlockingIOError:
            self.short += 1
            raise
        self.short += n < sum(map(len, parts))
        self.wmem += n
        return n

    def send(self, data: memoryview, flags: int = 0) -> int:
        return self.sendmsg([data])

    def empty(self, n: int) -> None:
        """The peer acknowledges `n` bytes."""
        n = min(n, self.wmem)
        self.wmem -= n
        self.info[BYTES_ACKED] += n + (self.shut and not self.wmem and not self.fin_acked)
        self.fin_acked |= self.shut and not self.wmem

    def news(self, asked: int) -> int:
        """The events that epoll reports."""
        events = EPOLLIN if self.told != self.written else 0
        if self.ended and not self.end_told:
            events |= EPOLLIN | EPOLLRDHUP
        if asked & EPOLLOUT and self.wmem * 3 <= self.sndbuf * 2 and self.most > 1000:
            events |= EPOLLOUT
        self.told, self.end_told = self.written, self.ended
        return events


class Guest:
    """The guest's side of the connection."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.high = 0  # bytes of ours that were sent at least once
        self.una = 0  # that were acknowledged
        self.end: int | None = None  # where our FIN is
        self.edge = 0  # how far we may send
        self.got = 0  # bytes that came, without a hole
        self.behind: dict[int, int] = {}  # pieces behind a hole: offset -> end
        self.their_end: int | None = None  # where their FIN is
        self.told = 64240  # the farthest edge that we ever told
        self.twice: tuple[int, int] | tuple[()] = ()  # what came twice and is to be reported

    def blocks(self) -> list[tuple[int, int]]:
        """The blocks of a SACK option, as offsets (RFC 2018; RFC 2883)."""
        ranges: list[list[int]] = []
        for start, end in sorted(self.behind.items()):
            if ranges and start <= ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], end)
            else:
                ranges.append([start, end])
        blocks = [self.twice] if self.twice else []
        self.twice = ()
        return [*blocks, *((start, end) for start, end in reversed(ranges))][:SACK_BLOCKS_MAX]

    @property
    def ended(self) -> bool:
        """All of the other stream came, and its end."""
        return self.their_end == self.got

    @property
    def ack(self) -> int:
        return self.got + 1 + self.ended

    def window(self, n: int) -> int:
        """The field for a window of `n` bytes."""
        field = min(n >> self.scale, 65535)
        self.told = max(self.told, self.got + (field << self.scale))
        return field

    def take(self, at: int, n: int, fin: int) -> None:
        """A segment came."""
        if fin:
            self.their_end = at + n
        if n and at + n <= self.got:
            self.twice = at, at + n
        elif n:
            self.behind[at] = max(self.behind.get(at, 0), at + n)
        for start in sorted(self.behind):
            if start > self.got:
                break
            self.got = max(self.got, self.behind.pop(start))


FATES = st.lists(st.sampled_from([SENT, LOST, LATE]), max_size=6)
PIECES = st.tuples(st.sampled_from([0, 1, 100, 1448, 9000]), st.sampled_from([SENT, SENT, SENT, LOST, LATE, TWICE]))
WINDOWS = st.sampled_from([0, 1, 200, 1460, 5000, 65535, 1 << 23])
WRITES = st.sampled_from([1, 10, 1460, 20_000, 150_000])


class Streams(RuleBasedStateMachine):
    """One connection."""

    guest: Guest
    conn: TcpConn
    talk: Talk

    @initialize(
        features=st.sampled_from([ALL, Features(peek_off=False), Features(min_rtt=False, snd_wnd=False)]),
        kind=st.sampled_from([FakeLink, LayingLink, MachineLink]),
        accepted=st.booleans(),
        near=st.booleans(),
        mss=st.sampled_from([536, 1460]),
        ws=st.sampled_from([7, 7, 0, None]),
        v6=st.booleans(),
        sack=st.booleans(),
    )
    def open(
        self,
        features: Features,
        kind: type[FakeLink],
        accepted: bool,
        near: bool,
        mss: int,
        ws: int | None,
        v6: bool,
        sack: bool,
    ) -> None:
        self._patches = [
            mock.patch.object(tcp_sock, "new_socket", Buffer),
            mock.patch.object(support, "new_link", kind),
        ]
        for patch in self._patches:
            patch.start()
        FakeSocket.made.clear()
        FakeSocket.connect_results = [0]
        self.talk = talk = Talk(features, v6=v6)
        self.guest = Guest(ws or 0)
        self.fates: list[str] = []  # of the next frames to the guest; then they arrive
        self.acked = self.edge = 0  # the farthest that we said to the guest, whether it heard or not
        self.sack = sack
        self.arrived = bytearray(STREAM_MAX)  # 1: a byte of the guest came
        self.before_a_hole = 0  # bytes that were acknowledged because of a hole behind them
        if accepted:
            peer = addr.packed("2001:db8::9" if v6 else "198.51.100.7")
            sock = Buffer(addr.family(peer), socket.SOCK_STREAM)
            tcp_sock.prepare_listener(sock, features)
            sock.syn = sock.info[BYTES_ACKED] = 0
            talk.tcp.opening.accepted(listener(), sock, peer, PEER_PORT, talk.now)
            talk.expect(SYN, seq=0)
            talk.answer(mss, ws, sack=sack)
            first = talk.expect(ACK, b"", seq=1, ack=1)
        else:
            talk.syn(mss, ws, sack=sack)
            first = talk.expect(SYN | ACK, seq=0, ack=1)
            talk.guest(ACK, window=self.guest.window(64240))
        self.sock.info[MIN_RTT] = 10 if near else 10_000
        (self.conn,) = talk.tcp._conns.values()
        self.scale = self.conn.rcv_wscale
        self.guest.edge = self.edge = first.window << (0 if first.flags & SYN else self.scale)
        self.hear()

    @property
    def sock(self) -> Buffer:
        sock = self.talk.sock
        assert isinstance(sock, Buffer)
        return sock

    # Frames that the guest hears -----------------------------------------------------------------------------------

    def hear(self) -> None:
        """Frames came, or got lost on their way."""
        heard, late = [], []
        for s in self.talk.taken():
            self.check(s)
            fate = self.fates.pop(0) if self.fates else SENT
            if fate != LOST:
                (late if fate == LATE else heard).append(s)
        for s in heard + late:
            guest = self.guest
            guest.una = max(guest.una, min(s.ack - 1, guest.high if guest.end is None else guest.end + 1))
            guest.edge = max(guest.edge, s.ack - 1 + (s.window << self.scale))
            if s.payload or s.flags & FIN:
                guest.take(s.seq - 1, len(s.payload), s.flags & FIN)

    def check(self, s: Segment) -> None:
        """All of it is true."""
        if s.flags == RST:  # out of TIME-WAIT
            assert self.conn.sock is None and self.guest.end is not None
            assert s.seq == self.conn.snd_nxt - self.conn.iss and self.conn.snd_una == self.conn.snd_nxt
            return
        assert s.flags & ACK and not s.flags & (SYN | RST), str(s)
        told, at = s.ack - 1, s.seq - 1
        ours = len(self.sock.sent) + (1 if self.conn.events & TAP_FIN_RCVD else 0)
        assert self.acked <= told <= ours, f"{s}, and the socket has {ours}"
        if not self.conn.near:
            arrived = self.sock.info[BYTES_ACKED] - self.sock.syn
            if self.conn.out_of_order:
                self.before_a_hole = len(self.sock.sent)
            known = max(arrived, len(self.sock.sent) - tail_of(self.conn.mss) // 2, self.before_a_hole)
            assert told <= known, f"{s}: the peer has {arrived}"
        edge = told + (s.window << self.scale)
        assert edge > self.edge - (1 << self.scale), f"{s}: the window moved left"
        self.acked, self.edge = told, max(self.edge, edge)
        assert self.sack or not s.sack
        for i, (left, right) in enumerate(s.sack):
            assert s.ack < left < right or (i == 0 and left < right <= s.ack), f"{s}: {s.sack}"
            assert all(self.arrived[left - 1 : right - 1]), f"{s}: {s.sack}"
        end = at + len(s.payload)
        if s.payload:
            assert s.payload == HOST_DATA[at:end], str(s)
            assert end <= self.sock.written, str(s)
            assert end <= self.guest.told, f"{s}: beyond the window"
        if s.flags & FIN:
            assert self.sock.ended and end == self.sock.written, str(s)

    def put(self, *segments: tuple[int, int, bytes, int]) -> None:
        """The guest sends (flags, offset, payload, window field)."""
        talk, ack = self.talk, self.guest.ack
        sack = [(left + 1, right + 1) for left, right in self.guest.blocks()] if self.sack else []
        for _, at, data, _ in segments:
            self.arrived[at : at + len(data)] = b"\1" * len(data)
        talk.put(*(talk.segment(f, data, seq=at + 1, ack=ack, window=win, sack=sack) for f, at, data, win in segments))
        self.hear()

    # Actions of the guest ------------------------------------------------------------------------------------------

    def open_(self) -> bool:
        return self.conn.sock is not None

    def piece(self, at: int, n: int, window: int) -> tuple[int, int, bytes, int]:
        """A segment as long as the window and the stream have it."""
        guest = self.guest
        n = max(min(n, guest.edge - at, (STREAM_MAX if guest.end is None else guest.end) - at), 0)
        fin = FIN if at + n == guest.end else 0
        guest.high = max(guest.high, at + n)
        return ACK | fin | (PSH if n else 0), at, GUEST_DATA[at : at + n], window

    @precondition(open_)
    @rule(pieces=st.lists(PIECES, min_size=1, max_size=5), again=st.booleans(), window=WINDOWS)
    def guest_sends(self, pieces: list[tuple[int, str]], again: bool, window: int) -> None:
        """New data, or all that was not acknowledged, in segments some of which have no luck."""
        guest = self.guest
        at = min(guest.una, guest.high) if again else guest.high
        field = guest.window(window)
        batch, late = [], []
        for n, fate in pieces:
            segment = self.piece(at, n, field)
            at += len(segment[2])
            if fate == LATE:
                late.append(segment)
            elif fate != LOST:
                batch += [segment] * (2 if fate == TWICE else 1)
        if batch or late:
            self.put(*batch, *late)

    @precondition(open_)
    @rule(window=WINDOWS, times=st.sampled_from([1, 1, 3]))
    def guest_acknowledges(self, window: int, times: int) -> None:
        field = self.guest.window(window)
        self.put(*[(ACK, self.guest.high + (self.guest.una > self.guest.high), b"", field)] * times)

    @precondition(lambda self: self.open_() and self.guest.una > 0)
    @rule(n=st.integers(0, 1))
    def guest_probes(self, n: int) -> None:
        """A keep-alive: what was acknowledged before, or nothing at its place."""
        at = min(self.guest.una, self.guest.high) - 1
        self.put((ACK, at, GUEST_DATA[at : at + n], self.guest.window(65535)))

    @precondition(lambda self: self.open_() and self.guest.end is None)
    @rule(send=st.booleans())
    def guest_ends(self, send: bool) -> None:
        self.guest.end = self.guest.high
        if send:
            self.put(self.piece(self.guest.end, 0, self.guest.window(65535)))

    # Actions of the host peer and its kernel -----------------------------------------------------------------------

    @precondition(lambda self: self.open_() and not self.sock.ended)
    @rule(n=WRITES, tell=st.booleans())
    def host_writes(self, n: int, tell: bool) -> None:
        sock = self.sock
        data = HOST_DATA[sock.written : sock.written + n]
        sock.incoming += data
        sock.written += len(data)
        if tell:
            self.tell()

    @precondition(lambda self: self.open_() and not self.sock.ended)
    @rule(tell=st.booleans())
    def host_ends(self, tell: bool) -> None:
        self.sock.ended = True
        if tell:
            self.tell()

    @precondition(open_)
    @rule(n=st.sampled_from([1, 3000, 40_000, 1 << 30]))
    def host_reads(self, n: int) -> None:
        self.sock.empty(n)

    @precondition(open_)
    @rule(most=st.sampled_from([0, 1, 1000, 1 << 30]), window=st.sampled_from([0, 1000, 1 << 20]))
    def kernel_takes(self, most: int, window: int) -> None:
        """No more than `most` in one call: memory is short."""
        self.sock.most = most
        self.sock.info[SND_WND] = window

    @precondition(open_)
    @rule()
    def tell(self) -> None:
        """epoll reports what there is."""
        fd = self.sock.fd
        fake = reactor(self.talk.ctx)
        if fd in fake.events:
            events = self.sock.news(fake.events[fd])
            if events:
                fake.fire(fd, events, self.talk.now)
        self.hear()

    # Faults and time -----------------------------------------------------------------------------------------------

    @rule(fates=FATES)
    def frames_get_lost(self, fates: list[str]) -> None:
        self.fates = fates

    @rule()
    def guest_reneges(self) -> None:
        """It needs the memory of what came behind a hole (RFC 2018, 8)."""
        self.guest.behind.clear()

    @rule()
    def link_fills_up(self) -> None:
        link(self.talk.ctx).full = True

    @rule()
    def link_goes_on(self) -> None:
        link(self.talk.ctx).full = False
        self.talk.tcp.resume(self.talk.now)
        self.hear()

    @rule(seconds=st.sampled_from([0.004, 0.012, 0.25, 1.1]))
    def time_passes(self, seconds: float) -> None:
        self.tell()
        self.talk.wait(seconds)
        self.talk.end_turn()
        self.hear()

    # Invariants ----------------------------------------------------------------------------------------------------

    @invariant()
    def numbers_are_in_order(self) -> None:
        conn = self.conn
        assert conn.base <= conn.snd_una <= conn.snd_nxt
        assert conn.rcv_acked <= conn.rcv_nxt
        assert self.talk.tcp._table.out_of_order.total == sum(len(data) + OVERHEAD for _, data, _ in conn.out_of_order)
        if conn.sock is None:
            assert self.guest.ended and self.guest.end == len(self.sock.sent), "it ended before both streams did"

    @invariant()
    def the_socket_has_the_stream(self) -> None:
        sent = self.sock.sent
        assert sent == GUEST_DATA[: len(sent)]
        if self.sock.shut:
            assert self.guest.end == len(sent)

    # The end -------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if hasattr(self, "conn"):
                self.behave()
        finally:
            for patch in self._patches:
                patch.stop()

    def behave(self) -> None:
        """Both sides do what leads to an end, and there it is."""
        self.fates = []
        sock, guest = self.sock, self.guest
        sock.most, sock.ended = 1 << 30, True
        if guest.end is None:
            guest.end = guest.high
        self.link_goes_on()
        for i in range(ROUNDS):
            if not self.open_():
                break
            sock.empty(1 << 30)
            self.tell()
            at, batch = min(guest.una, guest.end), []
            while at < guest.end and at < guest.edge:
                batch.append(self.piece(at, 1448, guest.window(1 << 20)))
                at += len(batch[-1][2])
            batch.append(self.piece(at, 0, guest.window(1 << 20)))
            if self.open_():
                self.put(*batch)
            # A timer may have been doubled before they began to behave
            self.time_passes(0.02 if i % 4 else 2.0 if i < ROUNDS // 2 else RTO_MAX)
        self.settle()

    def settle(self) -> None:
        """Both streams are whole, and nothing is left."""
        talk, sock, guest = self.talk, self.sock, self.guest
        assert not self.open_(), "it does not come to an end"
        talk.wait(POLL_MAX)
        talk.end_turn()
        assert sock.sent == GUEST_DATA[: guest.end] and guest.end is not None
        assert guest.got == sock.written and guest.ended
        assert talk.gone and not sock.resets_on_close
        tcp, ctx = talk.tcp, talk.ctx
        assert not tcp._out.turns.waiting or all(conn.sock is None for conn in tcp._out.turns.waiting.values())
        assert not tcp._acks._waiting and not tcp._table.out_of_order.total
        assert not tcp._table.half_open and not tcp._table.opening
        assert not reactor(ctx).refs
        assert all(owner == NO_OWNER for owner in talk.timers.owner.values())


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
