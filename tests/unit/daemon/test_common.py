"""From a wired context to the end: files, the background, what stops the loop and with which status."""

from __future__ import annotations

import os
import select
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
from passt.daemon.common import FROM_TERMINAL, End
from passt.flow.context import Context
from passt.log import Fatal
from passt.loop.reactor import EPOLLIN, TYPE_CHILD, TYPE_NETNS
from passt.wire.virtio import VNET

from ..support import T0, reactor, timers

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

    pidfd: int = -1
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
    assert timers(ctx).services.deadlines == [None]


def test_namespace_ends_with_its_process(ctx: Context) -> None:
    end = attached(ctx, FakeWatch(pidfd=7))
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
    attached(ctx, FakeWatch(pidfd=7, is_gone=True))
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
    daemon_common.write_pid(file, 1234)
    assert path.read_text() == "1234\n"
    assert file.closed
    fresh = daemon_common.create("PID", str(tmp_path / "new"))
    assert fresh is not None
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert not os.get_inheritable(fresh.fileno())
    fresh.close()
    assert daemon_common.create("PID", None) is None
    daemon_common.write_pid(None, 1234)


def test_file_that_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"^Couldn't open PID file .*/no/pid: No such file or directory$"):
        daemon_common.create("PID", str(tmp_path / "no" / "pid"))


def test_pid_file_that_cannot_be_written() -> None:
    with pytest.raises(Fatal, match="PID file write: No space left on device"):
        daemon_common.write_pid(FileIO("/dev/full", "w"), 1234)


# Background --------------------------------------------------------------------------------------------------------


def in_child(body: Callable[[], None]) -> tuple[int, bytes]:
    """body() in a forked process: exit code, and all that it and its children write before they close it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)
            body()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as f:
        text = f.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_background(tmp_path: Path) -> None:
    report = tmp_path / "report"

    def body() -> None:
        outer = os.getpid()
        pid_file = FileIO(tmp_path / "pid", "w")
        parent = daemon_common.go_background(pid_file, lambda: os.write(1, b"undone"))
        facts = [os.getpid() != outer, os.getsid(0) == os.getpid(), pid_file.closed]
        parent.release(os.open(os.devnull, os.O_RDWR))
        facts += [os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in range(3)]
        os.write(1, b"nobody reads this")
        facts.append((tmp_path / "pid").read_text() == "")
        (tmp_path / "new").write_text(f"{os.getpid()} {all(facts)}")
        (tmp_path / "new").rename(report)
        parent.ready()

    status, text = in_child(body)  # at the end of file no process has our standard output any more
    assert (status, text) == (0, b"")
    pid, ok = report.read_text().split()
    assert ok == "True"
    assert (tmp_path / "pid").read_text() == f"{pid}\n"


@pytest.fixture
def plain_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors go to descriptor 2, whatever the test runner made of sys.stderr."""
    monkeypatch.setattr(log, "err", lambda text: os.write(2, text.encode()))


@pytest.mark.usefixtures("plain_errors")
def test_pid_file_of_the_daemon_that_cannot_be_written() -> None:
    def body() -> None:
        parent = daemon_common.go_background(FileIO("/dev/full", "w"), lambda: os.write(2, b"; undone"))
        parent.release(os.open(os.devnull, os.O_RDWR))
        parent.ready()
        signal.pause()  # until it is killed

    assert in_child(body) == (1, b"PID file write: No space left on device; undone")


def test_who_started_it_is_gone() -> None:
    """Killed while it waited: it would never stop what it does not know of."""

    def body() -> None:
        parent = daemon_common.go_background(None, lambda: None)
        os.kill(os.getppid(), signal.SIGKILL)
        pipe = select.poll()
        pipe.register(parent._pipe, 0)  # POLLERR needs no request: there is no reader
        pipe.poll()
        with pytest.raises(Fatal, match="has not waited"):
            parent.ready()
        os.write(2, b"ends")

    assert in_child(body) == (-signal.SIGKILL, b"ends")


def test_daemon_that_fails_says_so_itself() -> None:
    def body() -> None:
        daemon_common.go_background(None, lambda: os.write(2, b"undone"))
        os.write(2, b"why\n")
        os._exit(3)

    assert in_child(body) == (1, b"why\nundone")


@pytest.mark.usefixtures("plain_errors")
def test_failed_daemon_after_release_is_reported_by_its_parent() -> None:
    def body() -> None:
        parent = daemon_common.go_background(None, lambda: None)
        parent.release(os.open(os.devnull, os.O_RDWR))
        parent.failed("why")
        os._exit(3)

    assert in_child(body) == (1, b"why")


def test_foreground(tmp_path: Path) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    starter = daemon_common.Starter(FileIO(tmp_path / "pid", "w"))
    starter.release(null)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(null)
    assert (tmp_path / "pid").read_text() == ""
    starter.ready()
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"


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
        daemon_common.run(
            cast(Any, ctx), cast(Any, SimpleNamespace(status=0)), fail if where == "last" else lambda: None
        )

    assert in_child(body) == (1, b"")
