"""Control sockets with both dialects (-c, --api-socket), and the rules behind them: clients that say anything in any
pieces, leave their answers lying, come too many, go at any time; ports that cannot be had. A step is one of these.

Invariants: nothing is raised, no answer is a fault; every answer is JSON, those of -c a line each; what waits for a
client or from it stays within its limits; whatever was asked for, every firm rule is listened on at each of its ports,
and nothing is listened on that no rule asks for; who is idle is cut off, and then only the listening sockets are left.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Container, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from fuzz.steps import Steps
from passt.conf.options import Options
from passt.control import server as control_server
from passt.control.json_api import Api, Specs
from passt.control.server import CLIENTS_MAX, OUTPUT_MAX, READ_MAX, Control, Listening
from passt.control.slirp import SlirpApi
from passt.drops import Drop
from passt.linux import unix
from passt.loop.reactor import EPOLLIN, EPOLLOUT, Closable, make_ref
from passt.policy.rules import Listener
from passt.ports import listen
from passt.ports.forwards import Clear, Forwards
from passt.ports.listen import Listeners
from passt.ports.scan import Scanner
from passt.ports.sockets import Failure, Wanted
from passt.wire.checksum import PROTO_UDP
from tests.unit.support import T0, FakeReactor, elapse, make_context, reactor

ENTRANCES = 900, 901
TAKEN = frozenset((7, 77, 61007))  # ports of other programs
KEPT = 61003  # a UDP port that a flow of the guest has, until it is asked to make way
WORDS = (
    *('{"command":"show"}\n', '{"command":"info"}\n', '{"command":"stats"}\n', '{"command":"flows"}\n'),
    *('{"command":"add","rules":["-t ', '{"command":"delete","rules":["-u ', '{"command":"replace","rules":["-t '),
    *('"]}\n', "80", "80-90:8080", "7", "~22", "auto", "64110-64119", "none", "127.0.0.1/61000-61007"),
    *('","-u ', '","-T ', ","),
    *('{"command":"clear","side":"host"}\n', '{"command":"delete","numbers":[1]}\n', '{"command":"metrics"}\n'),
    *('{"command":"change","changes":[{"add":"-t ', '"},{"delete":"-t ', '"},{"clear":"all"}]}\n', "\n", "x" * 300),
    '{"execute":"list_hostfwd"}',
    '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":',
    *(',"guest_addr":"10.0.2.100","guest_port":80}}', '{"execute":"remove_hostfwd","arguments":{"id":', "1}}", "2}}"),
    *('{"execute":"list_info"}', "[" * 200, '{"a":', "NaN", "1e999", "9" * 200),
)
EPHEMERAL = range(30, 65536)  # so that "all" is not much
SOCKETS_MAX = 120
TIMES = 0.2, 5.0, 11.0, 61.0


class Sock:
    """A listening socket of a rule, or that of a client."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.waiting = bytearray()
        self.said = bytearray()
        self.ended = self.closed = self.gone = False
        self.squeezed = False  # it took too little, once
        self.room = 1 << 30

    def fileno(self) -> int:
        return self.fd

    def recv(self, n: int) -> bytes:
        if self.gone:
            raise ConnectionResetError(errno.ECONNRESET, "gone")
        data = bytes(self.waiting[:n])
        del self.waiting[:n]
        if not data and not self.ended:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        return data

    def send(self, data: bytes | bytearray) -> int:
        if self.gone:
            raise BrokenPipeError(errno.EPIPE, "gone")
        n = min(len(data), self.room)
        if not n:
            raise BlockingIOError(errno.EAGAIN, "full")
        self.said += data[:n]
        self.room -= n
        return n

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        WORLD.open.pop(self.fd)


class Loop(FakeReactor):
    """One that counts, as the real one does: what is watched for is in `wanted`."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[int, int] = {}
        counters: Any = self
        counters.events = counters.wakeups = 0

    def watch(self, fd: int, kind: int, data: int, events: int) -> int:
        assert fd not in self.refs
        self.wanted[fd], self.refs[fd] = events, make_ref(kind, fd, data)
        return self.refs[fd]

    def change(self, fd: int, events: int) -> None:
        assert fd in self.refs
        self.wanted[fd] = events

    def retire(self, fd: int, owner: Closable) -> None:
        self.wanted.pop(fd, None)
        self.refs.pop(fd, None)
        self.retired.append(owner)


class Taker:
    """TCP, UDP, splicing: they are told of listeners, and bear it."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class UdpIn(Taker):
    """UDP from clients of the host, and the port that a flow of the guest has."""

    def __init__(self) -> None:
        self.kept = {KEPT}

    def ports_in_use(self, ports: Container[int]) -> set[int]:
        return {port for port in self.kept if port in ports}

    def free_ports(self, ports: Container[int]) -> None:
        self.kept = {port for port in self.kept if port not in ports}


class Namespace:
    """One that is this one, too."""

    def run(self, function: Any) -> Any:
        return function()


class Tables:
    """Ports that are bound on one side."""

    def bound(self, proto: int) -> set[int]:
        return {22, 8081}

    def pinned(self, proto: int) -> set[tuple[bytes, int]]:
        return set()


class World:
    """Everything around one `Control`."""

    def __init__(self) -> None:
        self.open: dict[int, Sock] = {}
        self.clients: list[tuple[Sock, int]] = []
        self.knocking: Sock | None = None
        self.fd = 1000
        self.now = T0
        self.ctx = ctx = make_context(forwards=())
        ctx.reactor = cast(Any, Loop())
        taker: Any = Taker()
        self.udp_in = UdpIn()
        self.listeners = Listeners(
            ctx,
            tcp=taker,
            tcp_splice=taker,
            udp_in=cast(Any, self.udp_in),
            namespace=cast(Any, Namespace()),
            opened=(),
        )
        tables: Any = Tables()
        self.scanner = Scanner(ctx, self.listeners, tables, tables)
        self.forwards = Forwards(ctx, self.listeners, self.scanner)
        specs = Specs(Options(), ctx, EPHEMERAL)
        dialects = Api(ctx, self.forwards, specs, "pasta"), SlirpApi(ctx, self.forwards, specs)
        entrances = [Listening(cast(Any, SimpleNamespace(fileno=lambda fd=fd: fd)), "") for fd in ENTRANCES]
        self.control = Control(ctx, list(zip(entrances, dialects, strict=True)), {0})

    def new(self) -> Sock:
        self.fd += 1
        sock = self.open[self.fd] = Sock(self.fd)
        return sock

    def open_ports(self, config: Any, wanted: Sequence[Wanted], opened: list[Listener]) -> list[Failure]:
        """Stands for that of ports/sockets.py."""
        failed = []
        for rule, port in wanted:
            if len(self.open) >= SOCKETS_MAX:
                failed.append(Failure(rule, port, errno.EMFILE))
            elif port in TAKEN or (rule.proto == PROTO_UDP and port in self.udp_in.kept):
                failed.append(Failure(rule, port, errno.EADDRINUSE))
            else:
                opened.append(Listener(rule, port, cast(Any, self.new())))
        return failed

    def turn(self) -> None:
        """Events of clients, as epoll would report them, and the end of the turn."""
        r = cast(Loop, self.ctx.reactor)
        for sock, _ in self.clients:
            wanted = r.wanted.get(sock.fd, 0) if not sock.closed else 0
            readable = sock.waiting or sock.ended or sock.gone
            events = (EPOLLIN if readable else 0) | (EPOLLOUT if sock.room or sock.gone else 0)
            if wanted & events:
                r.fire(sock.fd, wanted & events, self.now)
        r.end_turn(self.now)
        for client in self.control._clients:
            if client is not None:
                assert len(client.input) <= client.protocol.request_max + READ_MAX
                assert len(client.output) <= OUTPUT_MAX + (1 << 20), "answers are made faster than they are taken"

    def connect(self, which: int) -> None:
        if len(self.clients) > 3 * CLIENTS_MAX:
            return
        self.knocking = sock = self.new()
        self.clients.append((sock, which))
        reactor(self.ctx).fire(ENTRANCES[which], EPOLLIN, self.now)

    def later(self, seconds: float) -> None:
        self.now = elapse(self.ctx, self.now, seconds)


WORLD = World()


def word(*words: str) -> bytes:
    return b"".join(bytes((2, WORDS.index(w))) for w in words)


def seeds() -> Iterable[bytes]:
    first, second = bytes((0, 0)), bytes((0, 1))
    for start in ('{"command":"add","rules":["-t ', '{"command":"replace","rules":["-t '):
        for spec in ("80-90:8080", "7", "auto", "127.0.0.1/61000-61007", "~22"):
            yield first + word(start, spec, '"]}\n') + b"\5" + word('{"command":"show"}\n') + b"\5\5"
    yield (
        first
        + word('{"command":"add","rules":["-t ', "80", '","-u ', "80", '","-T ', "80", '"]}\n')
        + b"\5"
        + word('{"command":"delete","numbers":[1]}\n', '{"command":"clear","side":"host"}\n')
        + b"\5\5"
    )
    add = '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":'
    yield second + word(add, "80", ',"guest_addr":"10.0.2.100","guest_port":80}}') + b"\3\0\5\5"
    yield second + word('{"execute":"list_hostfwd"}') + b"\3\0\5" + second + word('{"execute":"list_info"}') + b"\3\0\5"
    yield first * 20 + b"\5" + bytes((4, 3)) + word('{"command":"stats"}\n', '{"command":"metrics"}\n') + b"\5\6\3"
    yield first + word("[" * 200, "\n") + b"\5" + first + bytes((1, 5)) + b"\xff\xfe{}\n\5"


def step(world: World, steps: Steps) -> None:
    kind = steps.byte() % 8
    if kind == 0:
        world.connect(steps.byte() & 1)
    elif kind == 5:
        world.turn()
    elif kind == 6:
        world.turn()
        world.later(TIMES[steps.byte() & 3])
    else:
        value = steps.byte()
        if not world.clients:
            return
        sock = world.clients[-1 - (value >> 6) % len(world.clients)][0]
        if kind == 1:
            sock.waiting += steps.take(value & 31)
        elif kind == 2:
            world.clients[-1][0].waiting += WORDS[value % len(WORDS)].encode()
        elif kind == 3:
            sock.ended = True
        elif kind == 4:
            sock.room = (0, 10, 1000, 1 << 30)[value & 3]
            sock.squeezed = True
        else:
            sock.gone = True


def check_rules(world: World) -> None:
    held = 0
    for rule in world.forwards.rules.values():
        ports = world.listeners.ports(rule)
        held += len(ports)
        assert ports <= set(rule.ports)
        assert rule.weak or rule.auto or ports == set(rule.ports), "a rule without its port"
    clients = sum(not sock.closed for sock, _ in world.clients)
    assert len(world.open) == held + clients, "something is listened on for no rule"


def check_said(world: World) -> None:
    for sock, which in world.clients:
        said = bytes(sock.said)
        if which == 0:
            lines = said.split(b"\n")
            if not sock.squeezed and not sock.gone:
                assert lines[-1] == b"" or not sock.closed
            for line in lines[:-1]:
                assert isinstance(json.loads(line), dict)
        elif said and sock.closed and not sock.squeezed and not sock.gone:
            assert json.loads(said).keys() & {"return", "error"}


def one(data: bytes) -> None:
    world, steps = WORLD, Steps(data)
    with (  # plain functions: mocks keep what they were called with
        mock.patch.object(control_server, "accept", lambda fd: (world.fd, None, None)),
        mock.patch.object(control_server, "new_socket", lambda *_: world.knocking),
        mock.patch.object(unix, "credentials", lambda sock: (1, 0, 0)),
        mock.patch.object(listen, "open_ports", world.open_ports),
        mock.patch.object(listen, "held_by_us", lambda config, rule, port: port in world.udp_in.kept),
    ):
        try:
            while steps.left > 0:
                step(world, steps)
            for _ in range(6):
                world.turn()
            check_rules(world)
            check_said(world)
            assert not world.ctx.drops[Drop.FAULT], "a fault"
        finally:
            end(world)


def end(world: World) -> None:
    """All clients are cut off in time; rules go."""
    for _ in range(3):
        world.later(61.0)
    assert not any(world.control._clients), "an idle client is still there"
    world.forwards.change([Clear(None)], world.now)
    reactor(world.ctx).end_turn(world.now)
    assert not world.open, "a socket is open"
    assert set(reactor(world.ctx).refs) == set(ENTRANCES)
    world.clients.clear()
    world.udp_in.kept = {KEPT}
    world.ctx.drops.clear()
    world.fd = 1000
