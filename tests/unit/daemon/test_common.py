"""From a wired context to the end: files, captures, what stops the loop and with which status."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passt import log
from passt.conf.options import Options
from passt.daemon import common as daemon_common
from passt.daemon import detach
from passt.daemon.common import FROM_TERMINAL, End
from passt.flow.context import Context
from passt.log import Fatal
from passt.loop.reactor import EPOLLHUP, EPOLLIN, TYPE_CHILD, TYPE_EXIT, TYPE_NETNS
from passt.wire.virtio import VNET

from ..support import T0, reactor, timers
from .test_detach import in_child

SPAWN_SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT}


@dataclass
class FakeInit:
    """The command's first process."""

    pidfd: int = 900
    told: list[int] = field(default_factory=list)

    def signal(self, number: int) -> None:
        self.told.append(number)

    def wait(self) -> int:
        return 42


@dataclass
class FakeTerminal:
    """Whether what is typed reaches us."""

    ours: bool = True
    restored: int = 0

    def is_ours(self) -> bool:
        return self.ours

    def restore(self) -> None:
        self.restored += 1


@dataclass
class FakeWatch:
    """A namespace that may be gone."""

    pidfds: tuple[int, ...] = ()
    in_directory: bool = False
    poll: bool = False
    name: str = "blue"
    is_gone: bool = False
    taker: Callable[[list[str], float], None] | None = None

    @property
    def changes(self) -> FakeWatch:
        return self

    def tell(self, reactor: object, taker: Callable[[list[str], float], None]) -> None:
        self.taker = taker

    def deleted(self, found: list[str]) -> bool:
        return self.name in found

    def ended(self) -> bool:
        return self.is_gone

    def gone(self) -> bool:
        return self.is_gone


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    fake = FakeTerminal()
    monkeypatch.setattr(daemon_common, "Terminal", lambda: fake)
    return fake


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Signals of a terminal are not ignored, as for pasta, even if a shell has started the tests with `&`."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in FROM_TERMINAL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def spawned(ctx: Context) -> tuple[End, FakeInit]:
    init = FakeInit()
    end = End(ctx, cast(Any, init))
    end.start(None)
    return end, init


def attached(ctx: Context, watch: FakeWatch | None = None) -> End:
    end = End(ctx, None)
    end.start(cast(Any, watch))
    return end


# A command ---------------------------------------------------------------------------------------------------------


def test_end_of_the_command_is_ours(ctx: Context, terminal: FakeTerminal) -> None:
    end, init = spawned(ctx)
    assert reactor(ctx).refs[init.pidfd] >> 56 == TYPE_CHILD
    reactor(ctx).fire(init.pidfd, EPOLLIN, T0)
    assert (end.status, reactor(ctx).stopped, terminal.restored) == (42, True, 1)


@pytest.mark.usefixtures("terminal")
def test_signals_are_for_the_command(ctx: Context) -> None:
    _, init = spawned(ctx)
    assert set(reactor(ctx).signals) == SPAWN_SIGNALS
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        reactor(ctx).signals[number](T0)
    assert init.told == [15, 1, 12]
    assert not reactor(ctx).stopped


def test_typed_interrupt_has_reached_the_command_already(ctx: Context, terminal: FakeTerminal) -> None:
    _, init = spawned(ctx)
    reactor(ctx).signals[signal.SIGINT](T0)
    assert init.told == []
    terminal.ours = False
    reactor(ctx).signals[signal.SIGINT](T0)
    reactor(ctx).signals[signal.SIGQUIT](T0)
    assert init.told == [2, 3]


@pytest.mark.usefixtures("terminal")
def test_ignored_signals_stay_ignored(ctx: Context) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spawned(ctx)
    assert set(reactor(ctx).signals) == SPAWN_SIGNALS - {signal.SIGINT}


def test_a_daemon_ends_by_sigterm_in_any_case(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    attached(ctx)
    assert set(reactor(ctx).signals) == {signal.SIGTERM}


def test_terminal_is_not_opened_without_a_command(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_common, "Terminal", lambda: pytest.fail("opened"))
    attached(ctx)


# A namespace -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_signals_end_us(ctx: Context, number: int) -> None:
    end = attached(ctx)
    assert set(reactor(ctx).signals) == {signal.SIGTERM, signal.SIGQUIT, signal.SIGINT}
    reactor(ctx).signals[number](T0)
    assert (end.status, reactor(ctx).stopped) == (0, True)


def test_the_event_of_a_descriptor_ends_us(ctx: Context) -> None:
    end = End(ctx, None, 9)
    end.start()
    assert reactor(ctx).refs[9] >> 56 == TYPE_EXIT
    reactor(ctx).fire(9, EPOLLHUP, T0)
    assert (end.status, reactor(ctx).stopped) == (0, True)


def test_a_descriptor_without_events_is_an_error(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(reactor(ctx), "watch", refuse)
    with pytest.raises(Fatal, match=r"^Invalid --exit-fd: 9 \(Operation not permitted\)$"):
        End(ctx, None, 9).start()


def test_namespace_is_gone(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    watch = FakeWatch(in_directory=True)
    end = attached(ctx, watch)
    assert watch.taker is not None and not reactor(ctx).refs
    watch.taker(["green"], T0)
    assert not reactor(ctx).stopped
    watch.taker(["green", "blue"], T0)
    assert (end.status, reactor(ctx).stopped, said) == (0, True, ["Namespace blue is gone, exiting"])
    assert timers(ctx).services.deadlines == [], "nothing is looked at in vain"


def test_namespace_ends_with_its_process(ctx: Context) -> None:
    end = attached(ctx, FakeWatch(pidfds=(7,)))
    assert {ref >> 56 for ref in reactor(ctx).refs.values()} == {TYPE_NETNS}
    assert not reactor(ctx).stopped
    reactor(ctx).fire(7, EPOLLIN, T0)
    assert (end.status, reactor(ctx).stopped) == (0, True)


def test_namespace_that_must_be_looked_at(ctx: Context) -> None:
    watch = FakeWatch(poll=True)
    attached(ctx, watch)
    services = timers(ctx).services
    for _ in range(3):
        assert services.deadlines[0] is not None
        services.fire(0)
        assert not reactor(ctx).stopped
    watch.is_gone = True
    services.fire(0)
    assert reactor(ctx).stopped
    assert services.deadlines == [None]


def test_namespace_that_was_gone_before_we_looked(ctx: Context) -> None:
    attached(ctx, FakeWatch(pidfds=(7,), is_gone=True))
    assert reactor(ctx).stopped


def test_failure(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "err", said.append)
    end = attached(ctx)
    end.failed("no more")
    assert (end.status, reactor(ctx).stopped, said) == (1, True, ["no more"])


# Files -------------------------------------------------------------------------------------------------------------


def test_files_are_created_empty_and_private(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("old")
    before = path.stat().st_ino
    file = daemon_common.create("PID", str(path))
    assert file is not None
    assert (path.read_text(), path.stat().st_ino) == ("", before)
    detach.write_pid(file, 1234)
    assert path.read_text() == "1234\n"
    assert file.closed
    fresh = daemon_common.create("PID", str(tmp_path / "new"))
    assert fresh is not None
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert not os.get_inheritable(fresh.fileno())
    fresh.close()
    assert daemon_common.create("PID", None) is None
    detach.write_pid(None, 1234)


def test_file_that_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"^Couldn't open PID file .*/no/pid: No such file or directory$"):
        daemon_common.create("PID", str(tmp_path / "no" / "pid"))


# Captures ----------------------------------------------------------------------------------------------------------


def test_capture_of_both_directions(ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "info", lambda text: None)
    with FileIO(tmp_path / "pcap", "w") as file:
        daemon_common.attach_capture(ctx, Options(pcap="pcap"), file)
        assert ctx.link.capture is not None
        ctx.link.capture(True, bytes(VNET.size) + b"out")
        ctx.link.capture(False, bytes(VNET.size) + b"in")
        reactor(ctx).end_turn(T0)
    data = (tmp_path / "pcap").read_bytes()
    assert data[24:].endswith(b"in")
    assert b"out" in data


def test_no_capture_costs_nothing(ctx: Context) -> None:
    daemon_common.attach_capture(ctx, Options(), None)
    assert ctx.link.capture is None
    assert reactor(ctx).at_turn_end == []


# The very end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["run", "last", "abandon"])
def test_nothing_keeps_it_from_its_end(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory even messages fail; the interpreter's own end is not allowed."""

    def fail(*_: object) -> None:
        raise MemoryError

    def body() -> None:
        monkeypatch.setattr(log, "err", fail)
        steps = {name: fail if name == where else lambda: None for name in ("run", "abandon")}
        ctx = SimpleNamespace(reactor=SimpleNamespace(**steps))
        last = fail if where == "last" else lambda: None
        daemon_common.run(cast(Any, ctx), cast(Any, SimpleNamespace(status=0)), last)

    assert in_child(body) == (1, b"")
