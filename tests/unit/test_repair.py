"""passt-repair: what it is asked for, and nothing else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt import repair
from passt.linux.tcp_repair import TCP_REPAIR
from passt.log import Fatal

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="TCP_REPAIR needs CAP_NET_ADMIN")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """passt's end, and the helper's."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as made:
        yield made


def mode(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR)


@needs_root
def test_commands(ends: tuple[socket.socket, socket.socket], sock: socket.socket) -> None:
    ours, theirs = ends
    others = [socket.socket() for _ in range(252)]
    before = len(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=repair.serve, args=(theirs,))
    thread.start()
    for command, expected in ((b"\1", 1), (b"\0", 0), (b"\1", 1), (b"\xff", 0)):
        socket.send_fds(ours, [command], [s.fileno() for s in (sock, *others)])
        assert ours.recv(2) == command
        assert {mode(s) for s in (sock, *others)} == {expected}
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before - 1, "descriptors are left open"
    for one in others:
        one.close()


@pytest.mark.parametrize("command", [b"\2", b"\x80", b"\xfe"])
def test_what_is_no_command(ends: tuple[socket.socket, socket.socket], sock: socket.socket, command: bytes) -> None:
    ours, theirs = ends
    socket.send_fds(ours, [command], [sock.fileno()])
    with pytest.raises(Fatal, match=f"passt sent {command.hex()} with 1 sockets: no command that is known"):
        repair.serve(theirs)
    ours.sendall(b"\1")
    with pytest.raises(Fatal, match="passt sent 01 with 0 sockets"):
        repair.serve(theirs)


def test_what_is_no_tcp_socket(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    with open("/dev/null") as file:
        for fd in (file.fileno(), ours.fileno()):
            before = len(os.listdir("/proc/self/fd"))
            socket.send_fds(ours, [b"\1"], [fd])
            with pytest.raises(Fatal, match="Couldn't set TCP_REPAIR to 1"):
                repair.serve(theirs)
            assert len(os.listdir("/proc/self/fd")) == before


def test_a_passt_that_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.close()
    repair.serve(theirs)
    theirs.close()
    with pytest.raises(Fatal, match="Couldn't read from passt"):
        repair.serve(theirs)


@pytest.mark.parametrize("args", [[], ["a", "b"], ["--unknown"]])
def test_wrong_arguments(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert repair.main(["passt-repair", *args]) == 1
    assert capfd.readouterr().err.startswith("Usage: passt-repair PATH|DIR")


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert repair.main(["passt-repair", "--help"]) == 0
    assert capfd.readouterr().out == f"{repair.USAGE}\n"


def test_nothing_listens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert repair.main(["passt-repair", str(tmp_path / "missing")]) == 1
    assert "passt-repair: Couldn't look for the socket of passt at " in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert repair.main(["passt-repair", str(tmp_path / "file")]) == 1
    assert "passt-repair: Couldn't connect to " in capfd.readouterr().err


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_socket_in_a_directory(tmp_path: Path, when: str) -> None:
    (tmp_path / "other.repair").write_text("")
    listener = socket.socket(socket.AF_UNIX)
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(repair.main(["passt-repair", str(tmp_path)])))
    if when == "later":
        thread.start()
    (tmp_path / "noise").write_text("")
    listener.bind(str(tmp_path / "made"))
    listener.listen()
    os.rename(tmp_path / "made", tmp_path / "a.socket.repair")
    if when == "before":
        thread.start()
    listener.settimeout(10)
    accepted, _ = listener.accept()
    accepted.close()
    thread.join(10)
    assert statuses == [0]
    listener.close()
