"""The steps of a migration, on both hosts, in the order of a front end that behaves, and in others.

The helper answers when the test says so; what is done to each connection is recorded, and may fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passt.link.device_state import DeviceState
from passt.linux.tcp_repair import OFF, ON
from passt.migration import steps
from passt.migration.steps import ADOPTING, ARRIVED, CONNECTING, FREEZING, HALTED, IDLE, LINGER, RESUMING, Migration
from passt.policy.guest import Guest
from passt.wire.migration import ConnectionState, State

from ..support import GUEST4, GUEST6, GUEST_LL, GUEST_MAC, T0, make_context, reactor, stage_faults
from ..wire.test_migration import CONNECTION, SOCKET


class Sock:
    def __init__(self, number: int) -> None:
        self.number, self.closed = number, False

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        self.closed = True


class Moving:
    """Records the steps: (name, number of the connection). `fails` has those that fail."""

    def __init__(self, count: int) -> None:
        self.conns = [SimpleNamespace(index=i) for i in range(count)]
        self.socks = [Sock(100 + i) for i in range(count)]
        self.did: list[tuple[str, int]] = []
        self.fails: set[tuple[str, int]] = set()
        self.new: list[Sock] = []

    def established(self) -> list[Any]:
        return self.conns

    def _do(self, what: str, number: int) -> None:
        if (what, number) in self.fails:
            raise OSError(1, "staged")
        self.did.append((what, number))

    def halt(self, conn: Any) -> Sock:
        self._do("halt", conn.index)
        return self.socks[conn.index]

    def describe(self, conn: Any, sock: Sock | None) -> ConnectionState:
        assert sock is None or not sock.closed
        ports = conn.index.to_bytes(4, "big")
        return replace(CONNECTION, key=bytes(8) + ports, socket=None if sock is None else SOCKET)

    def resume(self, conn: Any, sock: Sock, now: float) -> None:
        self._do("resume", conn.index)

    def end(self, conn: Any, sock: Sock | None) -> None:
        self._do("end" if sock is not None else "end without", conn.index)

    def let_in(self, sock: Sock) -> None:
        self._do("let in", sock.number % 100)

    def reset(self, sock: Sock) -> None:
        sock.close()
        self._do("reset", sock.number % 100)

    def open(self, state: Any) -> Sock:
        self._do("open", len(self.new))
        self.new.append(Sock(200 + len(self.new)))
        return self.new[-1]

    def make(self, sock: Sock, state: Any) -> int:
        self._do("make", sock.number % 100)
        return sock.number

    def adopt(self, state: ConnectionState, sock: Sock, queued: int, now: float) -> None:
        assert queued == sock.number
        self._do("adopt", sock.number % 100)

    def lose(self, state: ConnectionState, now: float) -> None:
        self._do("lose", int.from_bytes(state.key[-4:], "big"))


class Asked:
    """The helper, whose answers are the test's."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[Any], Callable[[int, float], None]]] = []
        self.released = 0

    def ask(self, command: int, sockets: list[Any], done: Callable[[int, float], None], now: float) -> None:
        self.asked.append((command, sockets, done))

    def answer(self, command: int, count: int = -1) -> None:
        got, sockets, done = self.asked.pop(0)
        assert got == command
        done(len(sockets) if count < 0 else count, T0)

    def release(self) -> None:
        self.released += 1


class Host:
    """One end of a migration."""

    def __init__(self, count: int = 0, **how: Any) -> None:
        self.ctx = make_context()
        self.moving, self.helper = Moving(count), Asked()
        self.resumed = self.proceeded = self.ends = 0
        self.link = SimpleNamespace(state=DeviceState(), full=False, proceed=self._proceed, on_start=None, on_room=None)
        self.tcp = SimpleNamespace(mover=lambda: self.moving, resume=self._resume)
        self.steps = Migration(self.ctx, cast(Any, self.tcp), cast(Any, self.link), cast(Any, self.helper), **how)
        self.states: list[bytes | None] = []
        self.loaded: list[bool] = []

    def _proceed(self, now: float) -> None:
        self.proceeded += 1

    def _resume(self, now: float) -> None:
        self.resumed += 1

    def _ended(self) -> None:
        self.ends += 1

    def save(self) -> None:
        self.link.state.on_save(self.states.append)

    def load(self, *connections: ConnectionState) -> None:
        state = State(GUEST_MAC, GUEST4, GUEST6, GUEST_LL, connections)
        self.link.state.on_load(state.emit(), self.loaded.append)

    def start(self) -> bool:
        """The rings are about to run; whether they wait."""
        waits = self.link.on_start(T0)
        reactor(self.ctx).end_turn(T0)
        return bool(waits)

    def end_turn(self) -> None:
        reactor(self.ctx).end_turn(T0)

    def forget(self) -> None:
        self.ctx.services.on_forget[-1]()

    def halted(self) -> None:
        """Everything is in repair mode, and was sent."""
        self.save()
        self.helper.answer(ON)
        assert self.steps.phase == HALTED
        self.link.state.on_sent(True)

    def did(self, what: str) -> list[int]:
        return [number for name, number in self.moving.did if name == what]


def two(*, lost: bool = False) -> list[ConnectionState]:
    """Two connections, and one without a socket."""
    made = [replace(CONNECTION, key=bytes(11) + bytes((i,))) for i in range(3 if lost else 2)]
    return [*made[:2], *(replace(one, socket=None) for one in made[2:])]


def test_a_machine_leaves() -> None:
    host = Host(2)
    assert not host.start(), "nothing is in progress"
    host.save()
    assert (host.steps.phase, host.states) == (FREEZING, [])
    host.helper.answer(ON)
    (state,) = host.states
    assert state is not None
    parsed = State.parse(state)
    assert (parsed.mac, parsed.addr4, parsed.addr6, parsed.addr6_ll) == (GUEST_MAC, GUEST4, GUEST6, GUEST_LL)
    assert [c.socket for c in parsed.connections] == [SOCKET, SOCKET]
    host.link.state.on_sent(True)
    host.forget()
    assert (host.steps.phase, host.helper.released) == (IDLE, 1)
    assert not any(sock.closed for sock in host.moving.socks), "they stay behind"
    assert host.ctx.timers.services.deadlines[host.steps._timer] >= LINGER  # type: ignore[attr-defined]
    host.ctx.timers.services.fire(host.steps._timer)  # type: ignore[attr-defined]
    assert all(sock.closed for sock in host.moving.socks)
    assert host.did("reset") == []


def test_a_guest_that_has_not_spoken_has_no_mac() -> None:
    host = Host()
    host.ctx.guest.mac = Guest().mac
    host.halted()
    assert host.states[0] is not None
    assert State.parse(host.states[0]).mac == bytes(6)


def test_a_machine_that_has_left_ends_the_program_if_asked_to() -> None:
    ends: list[int] = []
    host = Host(1, on_end=lambda: ends.append(1))
    host.forget()
    assert not ends
    host.save()
    host.helper.answer(ON)
    host.forget()  # it did not have the state
    host.helper.answer(OFF)
    assert not ends
    host.moving.socks = [Sock(100)]
    host.halted()
    host.forget()
    assert ends == [1]


def test_sockets_that_do_not_linger() -> None:
    host = Host(2, linger=False)
    host.save()
    host.helper.answer(ON, 1)
    host.link.state.on_sent(False)
    host.end_turn()
    assert not any(sock.closed for sock in host.moving.socks)
    host.link.state.on_sent(True)
    host.end_turn()
    assert [sock.closed for sock in host.moving.socks] == [True, False], "the other one was not described"
    assert host.start()
    host.helper.answer(OFF)
    host.end_turn()
    assert (host.did("resume"), host.did("end without")) == ([1], [0])


def test_a_machine_goes_on_at_its_source() -> None:
    host = Host(3)
    host.moving.fails = {("halt", 1)}
    host.halted()
    assert host.did("halt") == [0, 2]
    assert host.start()
    assert (host.steps.phase, host.did("let in"), host.proceeded) == (RESUMING, [0, 2], 0)
    host.helper.answer(OFF)
    host.end_turn()
    assert (host.did("resume"), host.proceeded, host.resumed, host.helper.released) == ([0, 2], 1, 1, 1)
    assert host.steps.phase == IDLE
    host.halted()  # and again
    assert len(host.states) == 2


def test_sockets_that_do_not_leave_repair_mode_end() -> None:
    host = Host(2)
    host.halted()
    host.link.full = True
    host.start()
    host.helper.answer(OFF, 1)
    host.end_turn()
    assert (host.did("resume"), host.did("end")) == ([0], [])
    host.link.on_room(T0)  # RST can be sent now
    assert host.did("end") == [1]


def test_without_a_helper_nothing_moves_and_all_goes_on() -> None:
    host = Host(2)
    host.save()
    host.helper.answer(ON, 0)
    assert host.states[0] is not None
    assert [c.socket for c in State.parse(host.states[0]).connections] == [None, None]
    host.start()
    host.helper.answer(OFF)
    host.end_turn()
    assert host.did("resume") == [0, 1]


def test_without_a_helper_peers_are_reset_when_the_machine_has_left() -> None:
    host = Host(2)
    host.save()
    host.helper.answer(ON, 1)
    host.link.state.on_sent(True)
    host.forget()
    assert host.did("reset") == [1]
    assert [sock.closed for sock in host.moving.socks] == [False, True]


def test_rings_that_start_while_the_helper_is_at_work() -> None:
    host = Host(1)
    host.save()
    assert host.start()
    host.helper.answer(ON)
    assert host.steps.phase == RESUMING
    host.helper.answer(OFF)
    host.end_turn()
    assert (host.did("resume"), host.proceeded) == ([0], 1)


def test_a_front_end_that_goes_while_the_helper_is_at_work() -> None:
    host = Host(2)
    host.save()
    host.forget()
    host.save()  # another front end, at a bad time
    assert host.states == [None]
    assert not host.start()
    host.helper.answer(ON)
    host.helper.answer(OFF, 1)
    assert host.did("reset") == [0]
    assert [sock.closed for sock in host.moving.socks] == [True, True]
    assert host.steps.phase == IDLE
    host = Host(2)
    host.halted()
    host.start()
    host.forget()
    host.helper.answer(OFF, 1)
    assert (host.did("reset"), host.did("resume"), host.proceeded) == ([0], [], 0)
    assert host.moving.socks[1].closed
    assert host.steps.phase == IDLE


def test_a_second_attempt_while_the_machine_is_stopped() -> None:
    host = Host(1)
    host.halted()
    host.save()
    assert len(host.states) == 2
    assert host.states[0] == host.states[1]
    host.load()
    assert host.loaded == [False]


def test_a_machine_arrives() -> None:
    host = Host()
    host.ctx.guest.mac = Guest().mac
    host.load(*two(lost=True))
    assert host.steps.phase == CONNECTING
    host.helper.answer(ON)
    assert (host.steps.phase, host.loaded, host.did("make")) == (ARRIVED, [True], [0, 1])
    assert host.ctx.guest.mac == GUEST_MAC
    assert host.start()
    assert (host.steps.phase, host.did("let in")) == (ADOPTING, [0, 1])
    host.helper.answer(OFF)
    assert host.did("adopt") == [0, 1]
    host.end_turn()
    assert (host.did("lose"), host.proceeded, host.resumed, host.helper.released) == ([2], 1, 1, 1)


@pytest.mark.parametrize("fails", ["open", "make", "adopt"])
def test_a_connection_that_cannot_go_on_is_one_alone(fails: str) -> None:
    host = Host()
    host.moving.fails = {(fails, 0)}
    host.load(*two())
    host.helper.answer(ON)
    assert host.loaded == [True]
    host.start()
    host.helper.answer(OFF)
    host.end_turn()
    assert host.did("adopt") == ([1] if fails != "open" else [])
    assert host.did("lose") == ({"make": [0], "open": [0, 1], "adopt": []}[fails])


def test_a_fault_at_one_connection_is_counted() -> None:
    host = Host(2)
    stage_faults(host.ctx)
    host.halted()

    def faulty(conn: Any, sock: Any, now: float) -> None:
        host.moving.did.append(("resume", conn.index))
        raise ZeroDivisionError

    host.moving.resume = faulty  # type: ignore[method-assign]
    host.start()
    host.helper.answer(OFF)
    assert host.did("resume") == [0, 1]
    assert sum(host.ctx.drops.values()) == 2


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_helper_the_guest_learns_of_it(count: int) -> None:
    host = Host()
    host.load(*two())
    host.helper.answer(ON, count)
    assert host.loaded == [True]
    assert all(sock.closed for sock in host.moving.new[count:])
    host.start()
    host.helper.answer(OFF, 0)
    host.end_turn()
    assert host.did("lose") == ([0, 1] if not count else [1, 0])
    assert all(sock.closed for sock in host.moving.new)


def test_a_state_of_another_program() -> None:
    host = Host()
    host.link.state.on_load(b"anything", host.loaded.append)
    assert host.loaded == [False]
    assert not host.start()


def test_a_target_that_never_runs_is_silent() -> None:
    """The machine goes on at its source."""
    host = Host()
    host.load(*two())
    host.helper.answer(ON)
    host.forget()
    assert all(sock.closed for sock in host.moving.new)
    assert (host.did("reset"), host.did("lose"), host.steps.phase) == ([], [], IDLE)
    host.load(*two())
    host.forget()
    host.helper.answer(ON)
    assert all(sock.closed for sock in host.moving.new)
    assert (host.did("make"), host.steps.phase, host.loaded) == ([0, 1], IDLE, [True])


def test_a_second_state_replaces_the_first() -> None:
    host = Host()
    host.load(*two())
    host.helper.answer(ON)
    host.load()
    host.helper.answer(ON)
    assert all(sock.closed for sock in host.moving.new)
    host.save()  # a machine that has not run leaves
    host.helper.answer(ON)
    assert host.states[0] is not None
    assert State.parse(host.states[0]).connections == ()


def test_a_front_end_that_goes_when_its_machine_has_just_started() -> None:
    host = Host()
    host.load(*two())
    host.helper.answer(ON)
    host.start()
    host.forget()
    host.helper.answer(OFF, 1)
    assert (host.did("reset"), host.did("adopt"), host.proceeded) == ([0], [], 0)
    assert host.moving.new[1].closed
    host.end_turn()
    assert host.did("lose") == []


def test_rings_that_start_while_sockets_are_connected() -> None:
    host = Host()
    host.load(*two())
    assert host.start()
    host.helper.answer(ON)
    host.helper.answer(OFF)
    host.end_turn()
    assert (host.did("adopt"), host.proceeded) == ([0, 1], 1)


def test_names_of_phases_are_all_there() -> None:
    text = steps.__doc__ or ""
    for name in ("IDLE", "FREEZING", "HALTED", "RESUMING", "CONNECTING", "ARRIVED", "ADOPTING"):
        assert f"    {name} " in text
