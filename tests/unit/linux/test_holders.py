"""Holders of ports: real sockets of real processes, and what may not be known."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from passt import addr
from passt.linux import holders
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

V4, V6 = addr.LOOPBACK4, addr.LOOPBACK6
COMM = "a port\x1b holder"  # the name of the process, with a byte for terminals
HOLDER = """
import os, socket, sys
kind, address, listening, forks = sys.argv[1:]
open("/proc/self/comm", "w").write({comm!r})
family = socket.AF_INET6 if ":" in address else socket.AF_INET
sock = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
sock.bind((address, 0))
if listening == "yes":
    sock.listen()
child = os.fork() if forks == "yes" else 1
if child:
    print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(
    kind: str = "tcp", address: str = "127.0.0.1", *, listening: bool = True, forks: bool = False
) -> Iterator[tuple[int, int]]:
    """A process that has a port: its PID, the port."""
    words = [kind, address, "yes" if listening and kind == "tcp" else "no", "yes" if forks else "no"]
    argv = [sys.executable, "-c", HOLDER.format(comm=COMM), *words]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.communicate()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
@pytest.mark.parametrize(("kind", "proto"), [("tcp", PROTO_TCP), ("udp", PROTO_UDP)])
def test_holder(kind: str, proto: int, address: str) -> None:
    other = PROTO_UDP if proto == PROTO_TCP else PROTO_TCP
    with holder(kind, address) as (pid, port):
        assert holders.describe(proto, port) == f"a port? holder (PID {pid})"
        assert str(pid) not in holders.describe(other, port)


def test_bound_port_that_nobody_listens_on() -> None:
    """The kernel tells of it since 6.8."""
    with holder(listening=False) as (pid, port):
        assert holders.describe(PROTO_TCP, port) in (f"a port? holder (PID {pid})", "")


def test_address_decides() -> None:
    other = addr.packed("127.0.0.2")
    with holder(address="127.0.0.2") as (pid, port):
        for conflicting in ((), (other,), (addr.ANY4,), (addr.ANY6,), (V6, other)):
            assert str(pid) in holders.describe(PROTO_TCP, port, conflicting)
        assert holders.describe(PROTO_TCP, port, (V4, V6)) == ""


def test_listening_socket_counts_and_not_its_connections() -> None:
    with holder() as (pid, port), socket.create_connection(("127.0.0.1", port)):
        assert holders.describe(PROTO_TCP, port) == f"a port? holder (PID {pid})"


def test_connection_from_the_port() -> None:
    """An outgoing connection has the port, too."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert f"(PID {os.getpid()})" in holders.describe(PROTO_TCP, client.getsockname()[1])


def test_several_processes_with_one_socket() -> None:
    with holder(forks=True) as (pid, port):
        assert holders.describe(PROTO_TCP, port).endswith(" and 1 more)")
        assert f"(PID {pid}" in holders.describe(PROTO_TCP, port)


def test_free_port() -> None:
    with holder() as (_, port):
        pass
    assert holders.describe(PROTO_TCP, port) == ""


def test_processes_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user learns whose socket it is."""
    real = os.listdir

    def listdir(path: str) -> list[str]:
        if path.endswith("/fd"):
            raise PermissionError
        return real(path)

    user = pwd.getpwuid(os.geteuid()).pw_name
    with holder() as (_, port):
        monkeypatch.setattr(os, "listdir", listdir)
        monkeypatch.setattr(os, "geteuid", lambda: 1)
        assert holders.describe(PROTO_TCP, port) == f"a process of {user}"
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert holders.describe(PROTO_TCP, port) == f"the kernel, or a process of {user} in another PID namespace"
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
        assert holders.describe(PROTO_TCP, port).startswith("the kernel, or a process of UID ")


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many processes there are."""
    with holder() as (_, port):
        monkeypatch.setattr(holders, "_sockets", lambda *_: [holders.Socket(holders.LISTEN, V4, os.geteuid(), 1)])
        monkeypatch.setattr(holders, "TIME_MAX", -1)
        assert holders.describe(PROTO_TCP, port).startswith("a process of ")


def test_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(socket, "socket", refuse)
    assert holders.describe(PROTO_TCP, 1) == ""


@pytest.mark.parametrize("data", [b"", bytes(15), bytes(16), bytes(200), b"\xff" * 64, b"\x11\0\0\0\x14\0" + bytes(60)])
def test_answers_that_are_none(data: bytes) -> None:
    found: list[holders.Socket] = []
    holders._parse(data, found)
    assert found == []
