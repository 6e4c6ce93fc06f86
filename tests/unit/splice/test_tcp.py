"""Spliced connections: real sockets on loopback, a real loop turned by hand, no namespace.

`Lab` has a server and a forwarded port before it; the sockets "of the namespace" are plain ones. Everything that a
test waits for is an event of this loop or of a local socket, and gives up after PATIENCE turns without one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from passt import addr
from passt.flow.context import Context
from passt.flow.table import FlowTable
from passt.link.packet import PacketPool
from passt.linux.nspool import open_socket
from passt.loop.reactor import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLRDHUP,
    TYPE_LISTEN,
    TYPE_TCP_SPLICE,
    Reactor,
    make_ref,
)
from passt.policy.forwarding import Forwarding
from passt.policy.guest import Guest
from passt.policy.resolvers import Resolvers
from passt.policy.rules import Listener, Rule
from passt.policy.settings import Settings
from passt.splice import lingering
from passt.splice.tcp import BUFFER_SIZE, COPY_MAX, ROUNDS_MAX, TUNED_MAX, TcpSplice
from passt.wire.checksum import PROTO_TCP

from ..support import CONFIG, IP4, FakeLink, FakeTimers

DEADLINE = 10.0  # seconds, after which what a test waits for has failed
RESET = struct.pack("=ii", 1, 0)
MIB = 1 << 20


class Sockets:
    """Stands for the namespace's pool."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.taken = 0

    def take(self, family: int, kind: int) -> Any:
        self.taken += 1
        if self.error is not None:
            raise self.error
        return open_socket(family, kind)


def listening(family: int = socket.AF_INET, host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((host, port))
    sock.listen(64)
    return sock


class Lab:
    """A server, a port that leads to it, and the machine between."""

    def __init__(self, v6_server: bool = False, outbound: bool = False, flows: int = 1000) -> None:
        self.reactor = Reactor()
        self.sockets = Sockets()
        settings = Settings(CONFIG)
        fwd, resolvers = Forwarding(settings), Resolvers(settings)
        guest = Guest(addr4=addr.LOOPBACK4, addr6=addr.LOOPBACK6)
        self.ctx = Context(
            settings, self.reactor, cast(Any, FakeTimers()), PacketPool(4096), FakeLink(), FlowTable(flows), fwd,
            resolvers, guest, ns=cast(Any, self.sockets),
        )  # fmt: skip
        self.splice = TcpSplice(self.ctx)
        self.server = listening(socket.AF_INET6, "::1") if v6_server else listening()
        self.door = listening()
        self.door.setblocking(False)
        port, to = self.door.getsockname()[1], self.server.getsockname()[1]
        self.listener = Listener(Rule(f"-t {port}", PROTO_TCP, outbound, port, port, to), port, self.door)
        self.reactor.handle(TYPE_LISTEN, self._accept)
        self.reactor.watch(self.door.fileno(), TYPE_LISTEN, 0, EPOLLIN)
        self.faults: list[Exception] = []
        self.reactor.on_fault = lambda ref, e, now: self.faults.append(e)
        self.open: list[socket.socket] = []

    def _accept(self, ref: int, events: int, now: float) -> None:
        sock, peer = self.door.accept()
        sock.setblocking(False)
        inner = socket.SocketType(sock.family, sock.type, 0, sock.detach())
        self.splice.accepted(self.listener, inner, addr.packed(peer[0]), peer[1], now)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Turn until the condition is true; returns its value."""
        deadline = time.monotonic() + DEADLINE
        while not (value := condition()):
            self.turn()
            assert time.monotonic() < deadline, "nothing happens any more"
        return value

    def turn(self) -> None:
        """A turn of the loop; timers that are due have expired."""
        self.reactor.turn(0.01)
        services = self.ctx.timers.services
        for timer, deadline in enumerate(services.deadlines):  # type: ignore[attr-defined]
            if deadline is not None and deadline <= time.monotonic():
                services.fire(timer)  # type: ignore[attr-defined]
        self.reactor.close_retired()

    def client(self) -> socket.socket:
        sock = socket.create_connection(self.door.getsockname())
        sock.setblocking(False)
        self.open.append(sock)
        return sock

    def accepted(self) -> socket.socket:
        """The next connection that the server accepts."""
        self.until(lambda: select.select([self.server], [], [], 0)[0])
        sock = self.server.accept()[0]
        sock.setblocking(False)
        self.open.append(sock)
        return sock

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A client and what the server has of it."""
        client = self.client()
        return client, self.accepted()

    def read(self, sock: socket.socket, n: int) -> bytes:
        """Exactly `n` bytes."""
        data = bytearray()

        def step() -> bool:
            try:
                chunk = sock.recv(n - len(data))
            except BlockingIOError:
                return False
            assert chunk, f"ended after {len(data)} of {n} bytes"
            data.extend(chunk)
            return len(data) == n

        self.until(step)
        return bytes(data)

    def outcome(self, sock: socket.socket) -> str:
        """How the stream ends, whatever came before: "end" or "reset"."""

        def step() -> str:
            try:
                return "" if sock.recv(MIB) else "end"
            except BlockingIOError:
                return ""
            except ConnectionError:
                return "reset"

        return cast(str, self.until(step))

    def write(self, sock: socket.socket, data: bytes) -> None:
        """All of `data`, however slowly the other end reads."""
        view = memoryview(data)

        def step() -> bool:
            nonlocal view
            try:
                view = view[sock.send(view) :]
            except BlockingIOError:
                return False
            return not view

        self.until(step)

    def fill(self, sock: socket.socket, limit: int = 1 << 30) -> int:
        """Write zeros until everything on the way is full; returns how many went."""
        sent = idle = 0
        block = bytes(MIB)
        while idle < 5 and sent < limit:
            try:
                sent += sock.send(block)
                idle = 0
            except BlockingIOError:
                idle += 1
            self.turn()
        return sent

    def gone(self) -> None:
        """Wait until no connection is left."""
        self.until(lambda: self.ctx.flows.count == 0)

    @property
    def conn(self) -> Any:
        """The only connection."""
        (conn,) = [f for f in self.ctx.flows.by_index if f is not None]
        return conn

    def closed(self) -> dict[str, int]:
        """How many connections have ended, by reason."""
        return {why: n for (label, why), n in self.ctx.flows.closed.items() if label == "tcp_splice"}

    def close(self) -> None:
        for sock in (*self.open, self.server, self.door):
            sock.close()
        self.splice._pipes.close()
        self.reactor.close()
        assert not self.faults


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


MakeLab = Callable[..., Lab]


@pytest.fixture
def make_lab() -> Iterator[MakeLab]:
    """Makes one `Lab`, and checks at the end that nothing of it is left."""
    before = len(os.listdir("/proc/self/fd"))
    labs: list[Lab] = []

    def make(**how: Any) -> Lab:
        labs.append(Lab(**how))
        return labs[-1]

    yield make
    (lab,) = labs
    try:
        for sock in lab.open:
            sock.close()
        lab.gone()
    finally:
        lab.close()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    return make_lab()


# Data --------------------------------------------------------------------------------------------------------------


def test_a_dialogue(lab: Lab) -> None:
    client, server = lab.pair()
    for i in range(20):
        question = b"%d?" % i
        lab.write(client, question)
        assert lab.read(server, len(question)) == question
        lab.write(server, question * 2)
        assert lab.read(client, 2 * len(question)) == question * 2
    assert not lab.splice._pipes._idle, "small messages need no pipe"


def test_what_was_sent_before_the_connection_was_there(lab: Lab) -> None:
    client = lab.client()
    client.send(b"early")
    client.shutdown(socket.SHUT_WR)
    server = lab.accepted()
    assert lab.read(server, 5) == b"early"
    assert lab.outcome(server) == "end"


def test_the_server_speaks_first(lab: Lab) -> None:
    client, server = lab.pair()
    lab.write(server, b"220 ready")
    assert lab.read(client, 9) == b"220 ready"


@pytest.mark.parametrize("size", [1, COPY_MAX - 1, COPY_MAX, COPY_MAX + 1, 3 * MIB])
@pytest.mark.parametrize("upwards", [True, False])
def test_sizes(lab: Lab, size: int, upwards: bool) -> None:
    pair = lab.pair()
    source, sink = pair if upwards else pair[::-1]
    data = random.Random(size).randbytes(size)
    got = bytearray()
    view = memoryview(data)

    def step() -> bool:
        nonlocal view
        try:
            if view:
                view = view[source.send(view) :]
        except BlockingIOError:
            pass
        try:
            got.extend(sink.recv(MIB))
        except BlockingIOError:
            pass
        return len(got) == size

    lab.until(step)
    assert bytes(got) == data


def test_a_slow_reader_gets_everything(lab: Lab) -> None:
    """With pauses in which all buffers are full, in pieces of odd sizes."""
    client, server = lab.pair()
    rng = random.Random(5)
    data = rng.randbytes(24 * MIB)
    sent, got = 0, hashlib.sha256()
    taken = 0
    while taken < len(data):
        try:
            while sent < len(data):
                sent += client.send(data[sent : sent + 77_777])
        except BlockingIOError:
            pass
        for _ in range(3):
            lab.reactor.turn(0)
        try:
            chunk = server.recv(rng.randrange(1, 500_000))
            taken += len(chunk)
            got.update(chunk)
        except BlockingIOError:
            lab.reactor.turn(0.01)
    assert got.digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("upwards", [True, False])
def test_small_pieces_wait_for_a_slow_reader(lab: Lab, upwards: bool) -> None:
    """Each is received at once, but the other side takes a part of it, or nothing."""
    pair = lab.pair()
    source, sink = pair if upwards else pair[::-1]
    half = lab.conn.halves[not upwards]
    half.dst.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    changes: list[int] = []
    change = lab.reactor.change
    lab.reactor.change = lambda fd, mask: (changes.append(fd), change(fd, mask))[1]  # type: ignore[method-assign]
    rng = random.Random(6)
    sent, got = bytearray(), bytearray()
    waits = 0
    while waits < 50:
        if half.pending:
            waits += 1
            lab.until(lambda: select.select([sink], [], [], 0)[0])
            got += sink.recv(rng.randrange(1, 100_000))
        else:
            piece = rng.randbytes(rng.randrange(1, 5000))
            sent += piece[: source.send(piece)]
        lab.reactor.turn(0)
    assert not half.bulk and half.pipe is None
    assert changes == [half.dst_fd], "it is asked for room once"
    assert half.moved == half.tally.bytes == lab.splice._tallies[not upwards].bytes
    source.shutdown(socket.SHUT_WR)
    assert got + lab.read(sink, len(sent) - len(got)) == sent
    assert half.moved == half.tally.bytes == len(sent)
    assert lab.outcome(sink) == "end"


@pytest.mark.parametrize("gone", [False, True])
def test_an_event_of_both_kinds_moves_both_directions(lab: Lab, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has room for what is pending, and has sent something itself. Events come once."""
    monkeypatch.setattr(lingering, "GIVE_UP", 0.1)
    client, server = lab.pair()
    there, back = lab.conn.halves
    there.pending = b"question"
    server.send(b"answer")
    assert select.select([lab.conn.server_sock], [], [], DEADLINE)[0]
    if gone:
        there.dst = Broken(there.dst, errno.EPIPE)
    event(lab, 1, EPOLLIN | EPOLLOUT)
    if gone:
        lab.gone()
        assert lab.closed() == {"reset by guest": 1} and lab.outcome(client) == "reset"
        return
    assert lab.read(server, 8) == b"question"
    assert back.moved == 6 and not there.pending
    assert lab.read(client, 6) == b"answer"


def test_an_event_of_room_that_is_gone_again(lab: Lab) -> None:
    """Nothing is received meanwhile, which would have to wait behind what is pending."""
    client, server = lab.pair()
    half = lab.conn.halves[0]
    real, half.pending = half.dst, b"first"
    half.dst = Broken(real, errno.EAGAIN)
    client.send(b"second")
    assert select.select([lab.conn.sock], [], [], DEADLINE)[0]
    event(lab, 1, EPOLLOUT)
    half.dst = real
    event(lab, 1, EPOLLOUT)
    event(lab, 0, EPOLLIN)
    assert lab.read(server, 11) == b"firstsecond"


def test_blocked_connections_cost_nothing(lab: Lab) -> None:
    """With both directions full and no reader, no event comes any more."""
    client, server = lab.pair()
    lab.fill(client)
    lab.fill(server)
    events: list[int] = []
    handler = lab.splice.sock_handler
    lab.reactor.handle(TYPE_TCP_SPLICE, lambda ref, e, now: (events.append(e), handler(ref, e, now))[1])
    for _ in range(50):
        lab.reactor.turn(0)
    assert not events


def test_both_directions_at_once_in_bulk(lab: Lab) -> None:
    client, server = lab.pair()
    data = random.Random(1).randbytes(8 * MIB)
    ends = {client: [memoryview(data), bytearray()], server: [memoryview(data[::-1]), bytearray()]}

    def step() -> bool:
        for sock, end in ends.items():
            try:
                if end[0]:
                    end[0] = end[0][sock.send(end[0]) :]
            except BlockingIOError:
                pass
            try:
                end[1].extend(sock.recv(MIB))  # type: ignore[union-attr]
            except BlockingIOError:
                pass
        return all(len(end[1]) == len(data) for end in ends.values())

    lab.until(step)
    assert ends[server][1] == data
    assert ends[client][1] == data[::-1]


def test_a_bulk_half_becomes_small_again_and_gives_its_pipe_back(lab: Lab) -> None:
    client, server = lab.pair()
    lab.write(client, bytes(COPY_MAX * 4))
    lab.read(server, COPY_MAX * 4)
    for _ in range(3):
        lab.write(client, b"x")
        assert lab.read(server, 1) == b"x"
    (conn,) = [f for f in lab.ctx.flows.by_index if f is not None]
    assert [h.bulk for h in cast(Any, conn).halves] == [False, False]
    assert [h.pipe for h in cast(Any, conn).halves] == [None, None]


@pytest.mark.parametrize("many", [False, True])
def test_one_transfer_gets_small_buffers_and_many_do_not(lab: Lab, many: bool) -> None:
    pairs = [lab.pair() for _ in range(TUNED_MAX + 1 if many else TUNED_MAX)]
    client, server = pairs[0]
    lab.write(client, bytes(COPY_MAX * 3))
    lab.read(server, COPY_MAX * 3)
    conn = cast(Any, lab.ctx.flows.by_index[0])
    assert [half.tuned for half in conn.halves] == [not many, False]
    assert (conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * BUFFER_SIZE) == (not many)
    for pair in pairs:
        for sock in pair:
            sock.close()
    lab.gone()
    assert lab.splice._count == 0


def test_a_fast_stream_lets_others_have_their_turn(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passt.splice.tcp.ROUNDS_MAX", 1)
    client, server = lab.pair()
    data = random.Random(2).randbytes(6 * MIB)
    got = bytearray()
    view = memoryview(data)

    def step() -> bool:
        nonlocal view
        try:
            while view:
                view = view[client.send(view) :]
        except BlockingIOError:
            pass
        try:
            while True:
                got.extend(server.recv(MIB))
        except BlockingIOError:
            return len(got) == len(data)

    lab.until(step)
    assert got == data


def bulk_pair(lab: Lab) -> tuple[socket.socket, socket.socket]:
    """A client whose half is bulk, and the server that has read everything. Much may wait in each buffer."""
    lab.door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    lab.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    client, server = lab.pair()
    lab.write(client, bytes(COPY_MAX * 3))
    lab.read(server, COPY_MAX * 3)
    lab.conn.halves[0].bulk = True
    lab.conn.halves[0].src.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    return client, server


def has_come(lab: Lab, n: int) -> None:
    """Wait until `n` bytes are in the client's socket. No event is handled."""
    sock = lab.conn.sock
    deadline = time.monotonic() + DEADLINE
    while len(sock.recv(n, socket.MSG_PEEK)) < n if select.select([sock], [], [], DEADLINE)[0] else True:
        assert time.monotonic() < deadline, "the rest does not come"


def event(lab: Lab, side: int, events: int) -> None:
    lab.splice.sock_handler(make_ref(TYPE_TCP_SPLICE, 0, lab.conn.index << 1 | side), events, 1.0)


def test_a_turn_of_a_bulk_half_is_bounded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it requests another one. In the last one it finds that nothing is left, and waits for bytes."""
    client, server = bulk_pair(lab)
    monkeypatch.setattr("passt.splice.tcp.ROUNDS_MAX", 2)
    monkeypatch.setattr("passt.splice.tcp.PIPE_SIZE", 4096)
    first, second = lab.conn.halves
    client.send(bytes(5 * 4096))
    has_come(lab, 5 * 4096)
    before = first.moved
    for rounds in (2, 4):
        event(lab, 0, EPOLLIN)
        assert first.moved == before + rounds * 4096
        assert first.bulk and second.epollout, "more is left, though less than a wake-up of a bulk half brings"
        assert first.pipe is None and len(lab.splice._pipes._idle) == 1, "and somebody else may use the pipe"
    second.epollout = False
    event(lab, 0, EPOLLIN)
    assert first.moved == before + 5 * 4096
    assert not second.epollout and not first.bulk
    lab.read(server, 5 * 4096)


@pytest.mark.parametrize(("size", "bulk"), [(16383, False), (16384, True), (20000, True)])
def test_a_half_is_bulk_as_long_as_wake_ups_bring_much(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, size: int, bulk: bool
) -> None:
    """All that a wake-up brings counts, in however many pieces it moves."""
    client, server = bulk_pair(lab)
    monkeypatch.setattr("passt.splice.tcp.PIPE_SIZE", 8192)
    client.send(bytes(size))
    has_come(lab, size)
    event(lab, 0, EPOLLIN)
    assert lab.conn.halves[0].bulk == bulk
    assert not lab.conn.halves[1].epollout, "it waits for bytes"
    lab.read(server, size)


def test_an_end_behind_bulk_data_is_passed_on_in_the_same_turn(lab: Lab) -> None:
    client, server = bulk_pair(lab)
    client.send(bytes(50_000))
    has_come(lab, 50_000)
    client.shutdown(socket.SHUT_WR)
    event(lab, 0, EPOLLIN | EPOLLRDHUP)
    half = lab.conn.halves[0]
    assert half.fin and not half.urgent
    lab.read(server, 50_000)
    assert lab.outcome(server) == "end"


def test_bytes_behind_an_urgent_mark_do_not_overtake(lab: Lab) -> None:
    """Mark and end come after the event that makes the half move; what is behind finds the server's buffer full."""
    lab.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    lab.door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
    client, server = lab.pair()
    half = lab.conn.halves[0]
    half.dst.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    half.bulk = True
    data = random.Random(8).randbytes(300_000)
    client.send(data[:1], socket.MSG_OOB)
    assert client.send(data[1:]) == len(data) - 1
    client.shutdown(socket.SHUT_WR)
    poll = select.poll()
    poll.register(lab.conn.sock, select.POLLRDHUP)
    assert poll.poll(1000 * DEADLINE)
    event(lab, 0, EPOLLIN)
    assert half.pending and not half.urgent
    lab.reactor.change(lab.conn.fd, 0)  # neither is announced
    got = b""
    while len(got) < len(data):
        lab.until(lambda: select.select([server], [], [], 0)[0])
        got += server.recv(MIB)
    assert got == data
    assert lab.outcome(server) == "end"


def test_order_is_kept_when_the_end_is_far_behind(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is announced while more is left than one turn moves, and the reader is slow."""
    monkeypatch.setattr("passt.splice.tcp.ROUNDS_MAX", 1)
    monkeypatch.setattr("passt.splice.tcp.PIPE_SIZE", 16 * 4096)
    lab.door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
    client, server = lab.pair()
    (conn,) = [f for f in lab.ctx.flows.by_index if f is not None]
    cast(Any, conn).server_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
    rng = random.Random(4)
    data = rng.randbytes(2 * MIB)
    left = memoryview(data)
    got = bytearray()
    while len(got) < len(data):
        try:
            while left:
                left = left[client.send(left) :]
                if not left:
                    client.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        lab.reactor.turn(0)
        try:
            got += server.recv(rng.randrange(1, 100_000))
        except BlockingIOError:
            lab.reactor.turn(0.01)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert lab.outcome(server) == "end"


@pytest.mark.parametrize("size", [10, 4 * COPY_MAX])
def test_urgent_data_stays_in_line(lab: Lab, size: int) -> None:
    client, server = lab.pair()
    lab.write(client, b"a" * size)
    client.send(b"!", socket.MSG_OOB)
    lab.write(client, b"b" * size)
    client.shutdown(socket.SHUT_WR)
    assert lab.read(server, 2 * size + 1) == b"a" * size + b"!" + b"b" * size
    assert lab.outcome(server) == "end"


def test_a_stream_of_urgent_data_lets_others_have_their_turn(lab: Lab) -> None:
    """A client that moves the mark on as fast as it is reached takes a turn for ROUNDS_MAX receives."""
    client, server = lab.pair()
    (conn,) = [f for f in lab.ctx.flows.by_index if f is not None]
    half = cast(Any, conn).halves[0]
    sent = bytearray()

    class Endless:
        """The client's socket as the half sees it: after each receive there is another urgent byte."""

        receives = 0

        def recv_into(self, buf: memoryview) -> int:
            self.receives += 1
            assert self.receives < 1000, "one turn has no end"
            n = half_src.recv_into(buf)
            if more:
                sent.extend(b"!")
                client.send(b"!", socket.MSG_OOB)
            return n

    half_src, more, half.src = half.src, True, Endless()
    client.send(b"!", socket.MSG_OOB)
    sent += b"!"
    lab.reactor.turn(0.2)
    assert 0 < half.src.receives <= ROUNDS_MAX
    lab.reactor.turn(0.2)
    assert ROUNDS_MAX < half.src.receives <= 2 * ROUNDS_MAX, "it goes on by itself"
    more = False
    client.send(b"end")
    assert lab.read(server, len(sent) + 3) == sent + b"end"


@pytest.mark.parametrize("by_client", [True, False])
def test_what_is_behind_urgent_data_before_a_reset_goes_on(lab: Lab, by_client: bool) -> None:
    """Both come in one turn, and a receive ends at the mark."""
    me, other = lab.pair()[:: 1 if by_client else -1]
    me.send(b"before")
    me.send(b"!", socket.MSG_OOB)
    me.send(b"behind")
    reset(me)
    assert lab.read(other, 13) == b"before!behind"
    assert lab.outcome(other) == "reset"


def test_without_descriptors_for_pipes_it_copies(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    client, server = lab.pair()
    monkeypatch.setattr(lab.splice._pipes, "take", none_left)
    data = random.Random(3).randbytes(COPY_MAX * 9)
    client.send(data)
    assert lab.read(server, len(data)) == data


# Ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_first", [True, False])
@pytest.mark.parametrize("size", [0, 100, 2 * MIB])
def test_half_close_in_each_order(lab: Lab, client_first: bool, size: int) -> None:
    pair = lab.pair()
    first, second = pair if client_first else pair[::-1]
    lab.write(first, b"last words")
    first.shutdown(socket.SHUT_WR)
    assert lab.read(second, 10) == b"last words"
    assert lab.outcome(second) == "end"
    assert lab.ctx.flows.count == 1, "the other direction lives on"
    if size:
        lab.write(second, b"z" * (size // 2))
        lab.read(first, size // 2)
        lab.write(second, b"y" * (size // 2))
        assert lab.read(first, size // 2) == b"y" * (size // 2)
    second.shutdown(socket.SHUT_WR)
    assert lab.outcome(first) == "end"
    lab.gone()


def test_end_behind_a_full_pipe(lab: Lab) -> None:
    """The end waits until everything before it was delivered."""
    client, server = lab.pair()
    sent = lab.fill(client)
    client.shutdown(socket.SHUT_WR)
    for _ in range(10):
        lab.reactor.turn(0)
    lab.read(server, sent)
    assert lab.outcome(server) == "end"
    server.close()
    assert lab.outcome(client) == "end"
    lab.gone()


def test_both_close_at_once(lab: Lab) -> None:
    client, server = lab.pair()
    client.close()
    server.close()
    lab.gone()


Step = Callable[[Lab, socket.socket, socket.socket], None]


def _nothing(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    pass


def _after_words(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    lab.write(me, b"hello")
    lab.read(other, 5)


def _with_unread(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    lab.write(other, b"unread")
    lab.reactor.turn(0)


def _while_blocked(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    lab.fill(me)


def _while_the_other_is_blocked(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    lab.fill(other)


def _after_my_end(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    me.shutdown(socket.SHUT_WR)
    assert lab.outcome(other) == "end"


def _after_the_others_end(lab: Lab, me: socket.socket, other: socket.socket) -> None:
    other.shutdown(socket.SHUT_WR)
    assert lab.outcome(me) == "end"


POINTS = [
    _nothing,
    _after_words,
    _with_unread,
    _while_blocked,
    _while_the_other_is_blocked,
    _after_my_end,
    _after_the_others_end,
]


@pytest.mark.parametrize("by_client", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_reset_at_every_point(lab: Lab, point: Step, by_client: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "GIVE_UP", 0.1)
    pair = lab.pair()
    me, other = pair if by_client else pair[::-1]
    point(lab, me, other)
    reset(me)
    lab.gone()
    if point is _after_my_end:
        assert select.select([other], [], [], 0)[0]  # the end was read already; only writing tells
        with pytest.raises(ConnectionError):
            other.send(b"x")
    else:
        assert lab.outcome(other) == "reset"
    assert lab.closed() == {"reset by peer" if by_client else "reset by guest": 1}
    pipes = lab.splice._pipes._idle
    assert all(not select.select([reader], [], [], 0)[0] for reader, _ in pipes), "bytes were left in a pipe"


@pytest.mark.parametrize("size", [5, 100_000])
@pytest.mark.parametrize("by_client", [True, False])
def test_what_was_sent_before_a_reset_goes_on(lab: Lab, by_client: bool, size: int) -> None:
    """Both come in one turn, as after a moment in which the daemon was busy."""
    me, other = lab.pair()[:: 1 if by_client else -1]
    data = os.urandom(size)
    lab.write(me, data[:2])
    assert lab.read(other, 2) == data[:2]
    me.setblocking(True)
    me.sendall(data[2:])
    reset(me)
    assert lab.read(other, size - 2) == data[2:]
    assert lab.outcome(other) == "reset"
    lab.gone()


def test_much_that_was_sent_before_a_reset_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a turn moves."""
    monkeypatch.setattr("passt.splice.tcp.ROUNDS_MAX", 4)
    monkeypatch.setattr("passt.splice.tcp.PIPE_SIZE", 4096)
    client, server = bulk_pair(lab)
    data = os.urandom(4 * 4 * 4096)
    client.send(data)
    reset(client)
    assert lab.read(server, len(data)) == data
    assert lab.outcome(server) == "reset"


def test_a_server_that_closes_with_unread_data_resets_the_client(lab: Lab) -> None:
    client, server = lab.pair()
    lab.write(client, b"never read")
    lab.until(lambda: select.select([server], [], [], 0)[0])
    server.close()
    assert lab.outcome(client) == "reset"


@pytest.mark.parametrize("outbound", [True, False])
@pytest.mark.parametrize("by_client", [True, False])
def test_who_has_reset_is_told(make_lab: MakeLab, outbound: bool, by_client: bool) -> None:
    """The client of an outbound rule is the guest."""
    lab = make_lab(outbound=outbound)
    reset(lab.pair()[not by_client])
    lab.gone()
    assert lab.closed() == {"reset by guest" if by_client == outbound else "reset by peer": 1}


@pytest.mark.parametrize(("error", "ended"), [(0, "reset by peer"), (errno.ETIMEDOUT, "timed out")])
def test_why_a_connection_broke_is_told(lab: Lab, error: int, ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error may have been read before, by a receive."""
    monkeypatch.setattr(lingering, "GIVE_UP", 0.1)
    client, _ = lab.pair()
    lab.conn.halves[0].src = Failed(lab.conn.halves[0].src, error)
    lab.splice.sock_handler(make_ref(TYPE_TCP_SPLICE, 0, lab.conn.index << 1), EPOLLERR, time.monotonic())
    lab.gone()
    assert lab.closed() == {ended: 1}
    assert lab.outcome(client) == "reset"


@pytest.mark.parametrize(
    ("half", "failing", "error", "ended"),
    [
        (0, "src", errno.ECONNRESET, "reset by peer"),
        (0, "dst", errno.EPIPE, "reset by guest"),
        (1, "src", errno.ECONNRESET, "reset by guest"),
        (1, "dst", errno.EPIPE, "reset by peer"),
        (0, "src", errno.ETIMEDOUT, "timed out"),
    ],
)
def test_which_side_broke_is_told(
    lab: Lab, half: int, failing: str, error: int, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that moves bytes fails before an event tells: a receive at its own side, a send at the other."""
    monkeypatch.setattr(lingering, "GIVE_UP", 0.1)
    pair = lab.pair()
    moving = lab.conn.halves[half]
    setattr(moving, failing, Broken(getattr(moving, failing), error))
    pair[half].send(b"x")
    lab.gone()
    assert lab.closed() == {ended: 1}
    assert lab.outcome(pair[0]) == lab.outcome(pair[1]) == "reset"


class Broken:
    """A socket whose next receive or send fails."""

    def __init__(self, inner: Any, error: int) -> None:
        self.inner, self.error = inner, error

    def recv_into(self, buf: memoryview) -> int:
        raise OSError(self.error, os.strerror(self.error))

    def send(self, data: memoryview) -> int:
        raise OSError(self.error, os.strerror(self.error))


def test_a_client_that_leaves_before_it_was_accepted(lab: Lab) -> None:
    reset(lab.client())
    lab.open.clear()
    for _ in range(5):
        lab.reactor.turn(0.01)
    lab.gone()


# Connecting --------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings with the time from which on they are not repeated for a while."""
    said: list[str] = []

    def warn(key: str, text: str, now: float) -> None:
        assert now > 0
        said.append(text)

    monkeypatch.setattr("passt.splice.tcp.log.warn_ratelimited", warn)
    return said


def test_refused(lab: Lab, warnings: list[str]) -> None:
    """A port without a server is usual: it is counted, and worth no warning."""
    lab.server.close()
    for count in (1, 2):
        assert lab.outcome(lab.client()) == "reset"
        assert lab.ctx.drops["splice: ECONNREFUSED"] == count
        assert lab.sockets.taken == 2 * count, "both families were tried"
    assert lab.closed() == {"refused": 2} and not warnings


def test_the_other_family_is_tried(make_lab: MakeLab) -> None:
    lab = make_lab(v6_server=True)
    client, server = lab.pair()
    lab.write(client, b"by IPv4")
    assert lab.read(server, 7) == b"by IPv4"


def test_the_family_of_the_client_is_tried_first(lab: Lab) -> None:
    """Different servers may be at the same port of either loopback."""
    server6 = listening(socket.AF_INET6, "::1", lab.server.getsockname()[1])
    door = listening(socket.AF_INET6, "::1")
    client = socket.create_connection(door.getsockname()[:2])
    lab.open += [server6, door, client]
    sock, peer = door.accept()
    sock.setblocking(False)
    inner = socket.SocketType(sock.family, sock.type, 0, sock.detach())
    lab.splice.accepted(lab.listener, inner, addr.LOOPBACK6, peer[1], 1.0)
    assert select.select([server6], [], [], DEADLINE)[0]
    assert not select.select([lab.server], [], [], 0)[0]


def test_the_namespace_has_no_address(lab: Lab, warnings: list[str]) -> None:
    lab.ctx.guest.addr4, lab.ctx.guest.addr6 = addr.ANY4, addr.ANY6
    assert lab.outcome(lab.client()) == "reset"
    assert lab.closed() == {"no route": 1} and lab.sockets.taken == 0
    assert warnings == [f"Cannot connect to forwarded port {lab.listener.to}: No route to host"]


def test_outbound_rules_use_sockets_of_the_host(make_lab: MakeLab) -> None:
    lab = make_lab(outbound=True)
    client, server = lab.pair()
    lab.write(client, b"hello")
    assert lab.read(server, 5) == b"hello"
    assert lab.sockets.taken == 0


class Noted:
    """A socket that notes its options and its address, and is not connected."""

    def __init__(self, error: int = 0) -> None:
        self.options: dict[tuple[int, int], Any] = {}
        self.bound: Any = None
        self.error = error

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self.options[level, option] = value

    def bind(self, address: Any) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.bound = address

    def connect_ex(self, address: Any) -> int:
        return errno.ENETUNREACH

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [0, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize("target", ["198.51.100.7", "127.0.0.1"])
def test_a_target_elsewhere_is_reached_from_the_outbound_address(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch, target: str, error: int
) -> None:
    """As by all other sockets; and its end may vanish without a sign, so the kernel looks after it."""
    lab = make_lab(outbound=True)
    out = addr.packed("203.0.113.5")
    lab.ctx.settings.replace(replace(CONFIG, ip4=replace(IP4, addr_out=out, if_out="eth7")), 0.0)
    lab.listener.rule = replace(lab.listener.rule, target=addr.packed(target))
    sock = Noted(error)
    monkeypatch.setattr("passt.splice.tcp.open_socket", lambda family, kind: sock)
    assert lab.outcome(lab.client()) == "reset"
    elsewhere = target != "127.0.0.1"
    assert (sock.options.get((socket.SOL_SOCKET, socket.SO_BINDTODEVICE)) == b"eth7\0") == elsewhere
    if not error:
        assert sock.bound == (("203.0.113.5", 0) if elsewhere else None)
        assert (sock.options.get((socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == 1) == elsewhere
    elif elsewhere:
        assert lab.ctx.drops == {"splice: EADDRNOTAVAIL": 1}
    lab.gone()


def test_no_socket_in_the_namespace(lab: Lab, warnings: list[str]) -> None:
    lab.sockets.error = OSError(errno.EMFILE, "Too many open files")
    assert lab.outcome(lab.client()) == "reset"
    assert lab.ctx.drops["splice: EMFILE"] == 1
    assert lab.closed() == {"no descriptor": 1}
    assert warnings == [f"Cannot connect to forwarded port {lab.listener.to}: Too many open files"]


def test_a_full_table_refuses_and_harms_nobody(make_lab: MakeLab) -> None:
    lab = make_lab(flows=1)
    client, server = lab.pair()
    for count in (1, 2):
        assert lab.outcome(lab.client()) == "reset"
        assert lab.ctx.drops["splice: table full"] == count
    lab.write(client, b"still here")
    assert lab.read(server, 10) == b"still here"


def test_a_loopback_address_of_the_client_is_kept(lab: Lab) -> None:
    for _ in range(2):  # two connections differ in their ports
        sock = socket.socket()
        lab.open.append(sock)
        sock.bind(("127.0.0.7", 0))
        sock.connect(lab.door.getsockname())
        server = lab.accepted()
        assert server.getpeername()[0] == "127.0.0.7"


class Slow:
    """A socket whose connect() takes a while, and ends as told: by `finish`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.refused = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def connect_ex(self, sockaddr: Any) -> int:
        return errno.EINPROGRESS if self.refused is False else errno.ECONNREFUSED

    def getsockopt(self, level: int, option: int, *length: int) -> Any:
        return errno.ECONNREFUSED if self.refused else self.inner.getsockopt(level, option, *length)


def slowly(lab: Lab) -> list[Slow]:
    """Make connecting in the namespace slow; returns the sockets as they are taken."""
    made: list[Slow] = []

    def take(family: int, kind: int) -> Any:
        made.append(Slow(open_socket(family, kind)))
        return made[-1]

    lab.sockets.take = take  # type: ignore[method-assign]
    return made


def now_connected(lab: Lab, made: list[Slow]) -> socket.socket:
    """The server's end of the connection that took a while."""
    made[0].inner.setblocking(True)
    made[0].inner.connect(lab.server.getsockname())
    made[0].inner.setblocking(False)
    return lab.accepted()


def test_connecting_takes_a_while(lab: Lab) -> None:
    """Data that the client sent meanwhile, and its end, are delivered."""
    made = slowly(lab)
    client = lab.client()
    client.send(b"question")
    client.shutdown(socket.SHUT_WR)
    lab.until(lambda: made)
    server = now_connected(lab, made)
    assert lab.read(server, 8) == b"question"
    assert [half.urgent for half in lab.conn.halves] == [False, False], "or it could not become bulk"
    assert lab.outcome(server) == "end"


def test_urgent_data_while_connecting_takes_a_while(lab: Lab) -> None:
    """The mark is announced once, and bulk would stop at it."""
    lab.door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)  # all of it arrives at once
    made = slowly(lab)
    client = lab.client()
    for data, flags in ((bytes(COPY_MAX + 1000), 0), (b"!", socket.MSG_OOB), (bytes(1000), 0)):
        assert client.send(data, flags) == len(data)
    lab.until(lambda: made)
    server = now_connected(lab, made)
    assert lab.read(server, COPY_MAX + 2001) == bytes(COPY_MAX + 1000) + b"!" + bytes(1000)


def test_connecting_takes_a_while_and_fails(lab: Lab) -> None:
    made = slowly(lab)
    client = lab.client()
    lab.until(lambda: made)
    for slow in made:
        slow.refused = True
    fd = made[0].fileno()
    lab.splice.sock_handler(make_ref(TYPE_TCP_SPLICE, fd, 1), EPOLLIN, 0.0)
    lab.until(lambda: len(made) == 2)
    made[1].refused = True
    lab.splice.sock_handler(make_ref(TYPE_TCP_SPLICE, made[1].fileno(), 1), EPOLLIN, 0.0)
    assert lab.outcome(client) == "reset"
    lab.gone()


def waiting(lab: Lab) -> socket.socket:
    """A client whose server has a full backlog: its SYN is not answered."""
    lab.server.listen(0)
    for _ in range(2):
        sock = socket.socket()
        lab.open.append(sock)
        sock.setblocking(False)
        sock.connect_ex(lab.server.getsockname())
    client = lab.client()
    lab.until(lambda: lab.ctx.flows.count)
    assert lab.conn.server_sock is not None and not lab.conn.halves
    return client


class Failed:
    """The socket of a connection that fails with `error`."""

    def __init__(self, inner: Any, error: int) -> None:
        self.inner, self.error = inner, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def getsockopt(self, level: int, option: int) -> int:
        return self.error


def fail_late(lab: Lab, error: int) -> None:
    """Connecting to the server, which took a while, has failed."""
    lab.conn.server_sock = Failed(lab.conn.server_sock, error)
    events = EPOLLERR | EPOLLHUP | EPOLLIN | EPOLLRDHUP | EPOLLOUT
    lab.splice.sock_handler(make_ref(TYPE_TCP_SPLICE, 0, lab.conn.index << 1 | 1), events, 1.0)


def test_the_next_target_is_asked_when_one_fails_late(lab: Lab) -> None:
    """The server is there by IPv6. Its socket has none of the events of the other."""
    client = waiting(lab)
    server6 = listening(socket.AF_INET6, "::1", lab.server.getsockname()[1])
    lab.open.append(server6)
    fail_late(lab, errno.ETIMEDOUT)
    server, _ = server6.accept()
    lab.open.append(server)
    server.setblocking(False)
    assert not any(half.urgent or half.eof_announced for half in lab.conn.halves)
    lab.write(client, b"by IPv6")
    assert lab.read(server, 7) == b"by IPv6"


@pytest.mark.parametrize(("error", "ended"), [(errno.ENETUNREACH, "no route"), (errno.EMFILE, "no descriptor")])
def test_the_last_target_fails_when_one_has_failed_late(lab: Lab, warnings: list[str], error: int, ended: str) -> None:
    client = waiting(lab)
    if error == errno.EMFILE:
        lab.sockets.error = OSError(error, os.strerror(error))
    else:
        lab.sockets.take = lambda family, kind: Noted()  # type: ignore[method-assign]
    fail_late(lab, errno.ETIMEDOUT)
    assert lab.outcome(client) == "reset"
    assert lab.ctx.drops == {f"splice: {errno.errorcode[error]}": 1} and lab.closed() == {ended: 1}
    assert warnings == [f"Cannot connect to forwarded port {lab.listener.to}: {os.strerror(error)}"]


def test_the_client_gives_up_while_the_server_is_busy(lab: Lab) -> None:
    """Neither its data nor its end is a reason to give up; its reset is."""
    client = waiting(lab)
    client.send(b"question")
    client.shutdown(socket.SHUT_WR)
    lab.until(lambda: lab.conn.events_before & EPOLLRDHUP)
    assert not lab.conn.halves
    reset(client)
    lab.gone()
    assert lab.closed() == {"client gone": 1}


@pytest.mark.parametrize("data", [b"", b"question"])
def test_the_client_gives_up_while_connecting_takes_a_while(lab: Lab, data: bytes) -> None:
    """As without this program: the server accepts the connection, and it was reset."""
    made = slowly(lab)
    client = lab.client()
    client.send(data)
    lab.until(lambda: made)
    reset(client)
    server = now_connected(lab, made)
    assert lab.read(server, len(data)) == data if data else True
    assert lab.outcome(server) == "reset"
    lab.gone()


def test_the_server_resets_before_it_was_seen_to_be_connected(lab: Lab) -> None:
    made = slowly(lab)
    client = lab.client()
    lab.until(lambda: made)
    made[0].inner.setblocking(True)
    made[0].inner.connect(lab.server.getsockname())
    server = lab.server.accept()[0]
    server.send(b"greeting")
    reset(server)
    assert lab.read(client, 8) == b"greeting"
    assert lab.outcome(client) == "reset"
    lab.gone()


def test_a_fault_ends_only_its_flow(lab: Lab) -> None:
    others = [lab.pair()]
    client, _ = lab.pair()
    others.append(lab.pair())
    lab.splice.fault(make_ref(TYPE_TCP_SPLICE, 0, 1 << 1 | 1))
    assert lab.outcome(client) == "reset"
    assert lab.closed() == {"fault": 1}
    for other, server in others:
        lab.write(other, b"unharmed")
        assert lab.read(server, 8) == b"unharmed"
