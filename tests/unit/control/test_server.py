"""Control sockets: who may speak, what a client can do to others, with a dialect that says little."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passt.control import server as control_server
from passt.control.server import CLIENTS_MAX, IDLE_TIME, REQUEST_TIME, REQUESTS, Control, InvalidRequest, Users
from passt.flow import spare
from passt.flow.context import Context
from passt.linux import unix
from passt.loop.reactor import Reactor
from passt.loop.timers import TimerPool

from ..support import T0, make_context, no_descriptors, stage_faults, timers


class Echo:
    """Answers with the request, turned round; some words mean something."""

    request_max = 1000
    single = False

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def answer(self, request: bytes, now: float) -> Iterable[bytes]:
        self.asked.append(request)
        if request == b"garbage":
            raise InvalidRequest("that is garbage")
        if request == b"fault":
            raise ZeroDivisionError("oh")
        if request == b"much":
            return (b"%07d\n" % i for i in range(1 << 18))
        if request == b"broken":
            return self._broken()
        return (request[::-1], b"\n")

    def _broken(self) -> Iterator[bytes]:
        yield b"half "
        raise InvalidRequest("no more")

    def refusal(self, why: str) -> bytes:
        return f"refused: {why}\n".encode()


class Single(Echo):
    single = True


class Rig:
    """Two sockets, Echo and Single, in a real loop."""

    def __init__(self, directory: Path, users: Any = None) -> None:
        self.ctx: Context = make_context()
        self.reactor = Reactor()
        self.ctx.reactor = self.reactor
        self.services = timers(self.ctx).services
        self.paths = [str(directory / name) for name in ("echo", "single")]
        self.echo, self.single = Echo(), Single()
        listening = [control_server.listen(path) for path in self.paths]
        self.origin = unix.Origin()
        self.control = Control(
            self.ctx,
            list(zip(listening, (self.echo, self.single), strict=True)),
            users or Users((self.origin,), root=False),
        )
        self.clients: list[socket.socket] = []

    def connect(self, which: int = 0) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.paths[which])
        client.settimeout(5)
        self.clients.append(client)
        self.turn()
        return client

    def turn(self, count: int = 3) -> None:
        for _ in range(count):
            self.reactor.turn(0)

    def ask(self, request: bytes, which: int = 0) -> bytes:
        client = self.connect(which)
        client.sendall(request)
        self.turn(5)
        client.setblocking(False)
        found = bytearray()
        while True:
            self.turn(1)
            try:
                data = client.recv(1 << 20)
            except BlockingIOError:
                return bytes(found)
            if not data:
                return bytes(found) + b"<end>"
            found += data

    def expire(self, now: float) -> None:
        self.services.fire(1, now)
        self.turn(1)

    def close(self) -> None:
        self.control.close()
        self.reactor.turn(0)
        self.reactor.close()
        self.origin.close()
        for client in self.clients:
            client.close()


Make = Callable[..., Rig]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    rigs: list[Rig] = []

    def made(**how: Any) -> Rig:
        rigs.append(Rig(tmp_path, **how))
        return rigs[-1]

    yield made
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make: Make) -> Rig:
    return make()


def gone(client: socket.socket) -> bool:
    """Whether we have been cut off."""
    client.settimeout(0)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


# Conversations -------------------------------------------------------------------------------------------------------


def test_requests_are_lines(rig: Rig) -> None:
    assert rig.ask(b"abc\n\n  \ndef\n") == b"cba\nfed\n"
    assert rig.echo.asked == [b"abc", b"def"]


def test_a_request_may_come_in_pieces(rig: Rig) -> None:
    client = rig.connect()
    for byte in b"abc\nd":
        client.send(bytes((byte,)))
        rig.turn()
    assert client.recv(100) == b"cba\n"
    client.send(b"ef\n")
    rig.turn()
    assert client.recv(100) == b"fed\n"


def test_the_end_ends_a_request(rig: Rig) -> None:
    client = rig.connect()
    client.send(b"one\ntwo")
    client.shutdown(socket.SHUT_WR)
    rig.turn(5)
    assert client.recv(100) == b"eno\nowt\n"
    assert gone(client)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_one_answer_and_no_more(rig: Rig, end: bytes) -> None:
    client = rig.connect(1)
    client.send(b"abc" + end)
    if not end:
        rig.turn()
        assert rig.single.asked == []
        client.shutdown(socket.SHUT_WR)
    rig.turn()
    assert client.recv(100) == b"cba\n" and gone(client)


def test_who_says_nothing_costs_nothing(rig: Rig) -> None:
    client = rig.connect()
    before = rig.reactor.wakeups
    rig.turn()
    client.close()
    rig.turn()
    assert rig.echo.asked == [] and rig.reactor.wakeups > before
    assert rig.control._clients == [None] * CLIENTS_MAX


# Bad manners ---------------------------------------------------------------------------------------------------------


def test_garbage_is_told_and_cut_off(rig: Rig) -> None:
    assert rig.ask(b"abc\ngarbage\nabc\n") == b"cba\nrefused: that is garbage\n<end>"
    assert rig.ask(b"broken\nabc\n") == b"half refused: no more\n<end>"
    assert rig.ctx.drops["control: garbage"] == 2


def test_a_fault_ends_who_asked(rig: Rig) -> None:
    stage_faults(rig.ctx)
    other = rig.connect()
    assert rig.ask(b"fault\nabc\n").startswith(b"refused: internal error")
    other.send(b"abc\n")
    rig.turn()
    assert other.recv(10) == b"cba\n" and rig.ctx.drops["fault"] == 1


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_too_long(rig: Rig, end: bytes) -> None:
    whole = b"x" * rig.echo.request_max
    assert rig.ask(whole + b"\n") == whole + b"\n"
    answer = rig.ask(whole + b"x" + end)
    assert answer == b"refused: too large message: a request has at most 1000 bytes\n<end>"


def test_too_many(rig: Rig) -> None:
    clients = [rig.connect() for _ in range(CLIENTS_MAX)]
    late = rig.connect()
    assert late.recv(100) == b"refused: there are 16 clients already\n" and gone(late)
    clients[3].close()
    rig.turn()
    assert rig.ask(b"abc\n") == b"cba\n"
    assert rig.ctx.drops["control: too many clients"] == 1


def test_many_requests_take_turns(rig: Rig) -> None:
    """One client's million does not keep another one waiting."""
    greedy, other = rig.connect(), rig.connect()
    greedy.sendall(b"a\n" * 1000)
    rig.turn(1)
    other.send(b"abc\n")
    rig.turn(1)
    assert len(rig.echo.asked) <= 2 * REQUESTS + 1 and b"abc" in rig.echo.asked
    answered = bytearray()
    while len(answered) < 2000:
        rig.turn(1)
        answered += greedy.recv(65536)
    assert answered == b"a\n" * 1000


def test_who_does_not_listen_is_not_answered(rig: Rig) -> None:
    client = rig.connect()
    client.sendall(b"much\n" * 3)
    rig.turn(50)
    (held,) = [c for c in rig.control._clients if c]
    assert len(held.output) < 2 * control_server.OUTPUT_MAX and rig.echo.asked == [b"much"]
    thread_read = bytearray()
    while len(thread_read) < 3 << 21:
        rig.turn(1)
        thread_read += client.recv(1 << 20)
    assert thread_read == b"".join(b"%07d\n" % i for i in range(1 << 18)) * 3


def test_idle_clients_go(rig: Rig) -> None:
    client = rig.connect()
    (held,) = [c for c in rig.control._clients if c]
    rig.expire(held.deadline - 1)
    assert not gone(client)
    rig.expire(held.deadline)
    assert gone(client) and rig.ctx.drops["control: too slow"] == 1


def test_half_a_request_has_little_time(rig: Rig) -> None:
    client = rig.connect()
    (held,) = [c for c in rig.control._clients if c]
    client.send(b"a")
    rig.turn()
    deadline = held.deadline
    assert deadline - held.began == REQUEST_TIME < IDLE_TIME
    client.send(b"b")
    rig.turn()
    assert held.deadline == deadline, "more of it gives no more time"
    client.send(b"\nabc")
    rig.turn()
    assert held.deadline > deadline and client.recv(10) == b"ba\n"
    client.send(b"\n")
    rig.turn()
    assert held.deadline - held.began > REQUEST_TIME, "it is idle now"


def test_leaving_in_the_midst(rig: Rig) -> None:
    client = rig.connect()
    client.sendall(b"much\n" * 10)
    rig.turn(2)
    client.close()
    rig.turn(10)
    assert rig.control._clients == [None] * CLIENTS_MAX


def test_who_comes_when_there_is_no_descriptor_is_told_so(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX) as client, no_descriptors():
        client.connect(rig.paths[0])
        rig.turn()
        client.settimeout(5)
        assert client.recv(100) == b"refused: there is no descriptor left\n" and gone(client)
        assert rig.ctx.drops == {"control: no descriptor": 1}
    assert rig.ask(b"abc\n") == b"cba\n"


def test_no_descriptors(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as m:
        m.setattr(control_server, "accept", fail)
        m.setattr(spare, "accept", fail)
        client = rig.connect()
        rig.turn()
        before = rig.reactor.events
        rig.reactor.turn(0)
        assert rig.reactor.events == before, "the listener rests"
    rig.services.fire(0, T0 * 1000)
    rig.turn()
    client.send(b"abc\n")
    rig.turn()
    assert client.recv(10) == b"cba\n"


# Access --------------------------------------------------------------------------------------------------------------


def test_others_are_cut_off(make: Make) -> None:
    rig = make(users=frozenset({os.geteuid() + 1}))
    client = rig.connect()
    assert client.recv(200).startswith(f"refused: user {os.geteuid()} is not allowed".encode()) and gone(client)
    assert rig.ctx.drops["control: peer not allowed"] == 1 and rig.echo.asked == []


def test_users() -> None:
    class As(unix.Origin):
        def __init__(self, uid: int) -> None:
            self._uid = uid

        def uid(self) -> int:
            return self._uid

    users = Users((As(1000), As(65534)), root=False)
    assert [uid in users for uid in (1000, 65534, 0, 1001)] == [True, True, False, False]
    assert 0 in Users((As(1000),), root=True)


def test_who_cannot_be_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sock: Any) -> Any:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))

    monkeypatch.setattr(unix, "credentials", fail)
    assert b"Protocol not available" in rig.connect().recv(200)


# Anything at all -----------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([b"abc", b"\n", b"garbage", b"fault", b"x" * 999, b"\0\xff", b"much", b" "]), max_size=12)
)
def test_nothing_hurts(rig: Rig, pieces: list[bytes]) -> None:
    stage_faults(rig.ctx)
    client = rig.connect()
    for piece in pieces:
        try:
            client.send(piece)
        except OSError:
            break
        rig.turn(1)
    client.close()
    rig.turn(8)
    assert rig.control._clients == [None] * CLIENTS_MAX
    assert rig.ask(b"abc\n") == b"cba\n"
    rig.clients[-1].close()
    rig.turn()


def test_real_timers(tmp_path: Path) -> None:
    """With real ones, as in the program: the loop wakes up for the deadline."""
    reactor, origin = Reactor(), unix.Origin()
    ctx = make_context()
    ctx.reactor, ctx.timers = reactor, TimerPool(reactor)
    path = str(tmp_path / "socket")
    server = Control(ctx, [(control_server.listen(path), Echo())], Users((origin,), root=False))
    answers: list[bytes] = []

    def ask() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"abc\n")
            answers.append(client.recv(10))

    thread = threading.Thread(target=ask)
    thread.start()
    while not answers:
        reactor.turn(0.1)
    thread.join()
    assert answers == [b"cba\n"]
    server.close()
    reactor.turn(0)
    reactor.close()
    origin.close()
