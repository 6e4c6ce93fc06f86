"""Messages to a supervisor, on a real descriptor and a real socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from passt import log
from passt.conf.options import Options
from passt.daemon.supervisor import Supervisor
from passt.log import Fatal

from ..support import T0, make_context, timers

WATCHDOG = 0  # the first timer that is made


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def environ(listener: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": listener.getsockname(), **more}


def nothing_waits(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.recv(1000)
    except BlockingIOError:
        return True
    return False


def test_the_descriptor_gets_one_line_and_is_closed() -> None:
    reader, writer = os.pipe()
    supervisor = Supervisor(Options(ready_fd=writer), {})
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 10)
    supervisor.begin(make_context(), T0)
    assert os.read(reader, 10) == b"1\n"
    assert os.read(reader, 10) == b"", "somebody still has it open"
    os.close(reader)


def test_slirp4netns_writes_the_digit_alone() -> None:
    reader, writer = os.pipe()
    Supervisor(Options(ready_fd=writer, slirp4netns=True), {}).begin(make_context(), T0)
    assert os.read(reader, 10) == b"1"
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_a_reader_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "warn", lines.append)
    reader, writer = os.pipe()
    supervisor = Supervisor(Options(ready_fd=writer), {})
    os.close(reader)
    supervisor.begin(make_context(), T0)
    assert lines == ["Couldn't write to the descriptor of --ready-fd: Broken pipe"]


def test_a_descriptor_that_is_not_open() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(Fatal, match=rf"Invalid --ready-fd: {writer} \(it is not open\)"):
        Supervisor(Options(ready_fd=writer), {})


def test_ready_and_stopping(listener: socket.socket) -> None:
    ctx = make_context()
    supervisor = Supervisor(Options(), environ(listener))
    supervisor.begin(ctx, T0)
    assert listener.recv(1000) == b"READY=1\nSTATUS=Forwarding"
    assert not timers(ctx).services.deadlines, "no watchdog was asked for"
    supervisor.end()
    assert listener.recv(1000) == b"STOPPING=1"


def test_a_change_is_a_reload(listener: socket.socket) -> None:
    """sd_notify(3): RELOADING=1 with the time, and READY=1 when it is over."""
    ctx = make_context()
    supervisor = Supervisor(Options(), environ(listener))
    supervisor.begin(ctx, T0)
    assert listener.recv(1000) == b"READY=1\nSTATUS=Forwarding"
    ctx.settings.replace(replace(ctx.settings.current, mtu=1400), T0 + 1.5)
    assert listener.recv(1000) == b"RELOADING=1\nMONOTONIC_USEC=%d" % ((T0 + 1.5) * 1e6)
    assert listener.recv(1000) == b"READY=1\nSTATUS=Forwarding"
    ctx.settings.replace(ctx.settings.current, T0 + 2)
    assert nothing_waits(listener), "nothing has changed"
    supervisor.end()


def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # the kernel chooses an abstract name
        sock.settimeout(5)
        Supervisor(Options(), {"NOTIFY_SOCKET": "@" + sock.getsockname()[1:].decode()}).end()
        assert sock.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize("pid", ["", str(os.getpid())], ids=["any", "ours"])  # the same on all workers
def test_signs_of_life(listener: socket.socket, pid: str) -> None:
    ctx = make_context()
    services = timers(ctx).services
    supervisor = Supervisor(Options(), environ(listener, WATCHDOG_USEC="3000000", WATCHDOG_PID=pid))
    supervisor.begin(ctx, T0)
    listener.recv(1000)
    for n in (1, 2):
        assert services.deadlines[WATCHDOG] == T0 + n * 1.5
        services.fire(WATCHDOG)
        assert listener.recv(1000) == b"WATCHDOG=1"
    supervisor.end()


@pytest.mark.parametrize(
    "asked", [{"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}], ids=str
)
def test_no_watchdog_of_ours(listener: socket.socket, asked: dict[str, str]) -> None:
    ctx = make_context()
    supervisor = Supervisor(Options(), environ(listener, **asked))
    supervisor.begin(ctx, T0)
    assert not timers(ctx).services.deadlines
    supervisor.end()


def test_a_command_speaks_for_itself(listener: socket.socket) -> None:
    supervisor = Supervisor(Options(), environ(listener, WATCHDOG_USEC="3000000"), command=True)
    ctx = make_context()
    supervisor.begin(ctx, T0)
    supervisor.end()
    assert nothing_waits(listener)
    assert not timers(ctx).services.deadlines


def test_a_socket_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "warn", lines.append)
    Supervisor(Options(), {"NOTIFY_SOCKET": f"{tmp_path}/none"}).begin(make_context(), T0)
    Supervisor(Options(), {"NOTIFY_SOCKET": "vsock:2:1"}).begin(make_context(), T0)
    assert lines == [f"Couldn't connect to $NOTIFY_SOCKET: {tmp_path}/none: No such file or directory"]


def test_a_socket_that_goes_away(listener: socket.socket) -> None:
    supervisor = Supervisor(Options(), environ(listener))
    listener.close()
    supervisor.begin(make_context(), T0)
    supervisor.end()
