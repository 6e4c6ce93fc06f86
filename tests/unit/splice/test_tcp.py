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
from typing import Any, cast

import pytest

from passt import addr
from passt.flow.context import Context
from passt.flow.table import FlowTable
from passt.link.packet import PacketPool
from passt.linux.nspool import open_socket
from passt.loop.reactor import EPOLLIN, TYPE_LISTEN, TYPE_TCP_SPLICE, Reactor, make_ref
from passt.policy.forwarding import Forwarding
from passt.policy.guest import Guest
from passt.policy.resolvers import Resolvers
from passt.policy.rules import Listener, Rule
from passt.policy.settings import Settings
from passt.splice.tcp import BUFFER_SIZE, COPY_MAX, TUNED_MAX, TcpSplice
from passt.wire.checksum import PROTO_TCP

from ..support import CONFIG, FakeLink, FakeTimers

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
            self.reactor.turn(0.01)
            assert time.monotonic() < deadline, "nothing happens any more"
        return value

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
            self.reactor.turn(0.01)
        return sent

    def gone(self) -> None:
        """Wait until no connection is left."""
        self.until(lambda: self.ctx.flows.count == 0)

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
def test_reset_at_every_point(lab: Lab, point: Step, by_client: bool) -> None:
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


def test_a_server_that_closes_with_unread_data_resets_the_client(lab: Lab) -> None:
    client, server = lab.pair()
    lab.write(client, b"never read")
    lab.until(lambda: select.select([server], [], [], 0)[0])
    server.close()
    assert lab.outcome(client) == "reset"


def test_a_client_that_leaves_before_it_was_accepted(lab: Lab) -> None:
    reset(lab.client())
    lab.open.clear()
    for _ in range(5):
        lab.reactor.turn(0.01)
    lab.gone()


# Connecting --------------------------------------------------------------------------------------------------------


def test_refused(lab: Lab) -> None:
    lab.server.close()
    client = lab.client()
    assert lab.outcome(client) == "reset"
    assert lab.ctx.drops["splice: ECONNREFUSED"] == 1
    assert lab.sockets.taken == 2, "both families were tried"


def test_the_other_family_is_tried(make_lab: MakeLab) -> None:
    lab = make_lab(v6_server=True)
    client, server = lab.pair()
    lab.write(client, b"by IPv4")
    assert lab.read(server, 7) == b"by IPv4"


def test_outbound_rules_use_sockets_of_the_host(make_lab: MakeLab) -> None:
    lab = make_lab(outbound=True)
    client, server = lab.pair()
    lab.write(client, b"hello")
    assert lab.read(server, 5) == b"hello"
    assert lab.sockets.taken == 0


def test_no_socket_in_the_namespace(lab: Lab) -> None:
    lab.sockets.error = OSError(errno.EMFILE, "Too many open files")
    assert lab.outcome(lab.client()) == "reset"
    assert lab.ctx.drops["splice: EMFILE"] == 1


def test_a_full_table_refuses_and_harms_nobody(make_lab: MakeLab) -> None:
    lab = make_lab(flows=1)
    client, server = lab.pair()
    assert lab.outcome(lab.client()) == "reset"
    assert lab.ctx.drops["splice: table full"] == 1
    lab.write(client, b"still here")
    assert lab.read(server, 10) == b"still here"


def test_a_loopback_address_of_the_client_is_kept(lab: Lab) -> None:
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

    def getsockopt(self, level: int, option: int) -> Any:
        return errno.ECONNREFUSED if self.refused else self.inner.getsockopt(level, option)


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


def test_the_client_gives_up_while_connecting_takes_a_while(lab: Lab) -> None:
    made = slowly(lab)
    client = lab.client()
    lab.until(lambda: made)
    reset(client)
    lab.gone()


def test_a_fault_ends_only_its_flow(lab: Lab) -> None:
    client, _ = lab.pair()
    other, server = lab.pair()
    lab.splice.fault(make_ref(TYPE_TCP_SPLICE, 0, 0 << 1 | 1))
    assert lab.outcome(client) == "reset"
    lab.write(other, b"unharmed")
    assert lab.read(server, 8) == b"unharmed"
