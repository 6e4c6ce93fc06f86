"""Ports that are changed while passt runs, before there is a guest and while it is connected."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from ..support import DEADLINE, User
from ..traffic.support import HOST, Lan, refused
from ..traffic.test_control import DATAGRAM, is_free
from .client import ACK, Client
from .support import ACCEPTED, Passt, passt


class Controlled:
    """A passt with a control socket."""

    def __init__(self, server: Passt, user: User, path: str) -> None:
        self.server = server
        self._user = user
        self._path = path

    def pesto(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = self._user.command([self._user.python, "-m", "passt.pesto", *args, self._path])
        return subprocess.run(
            command, cwd="/", env=self._user.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=DEADLINE, check=False,
        )  # fmt: skip

    def change(self, *args: str) -> None:
        done = self.pesto(*args)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def controlled(lan: Lan, anyone: User) -> Iterator[Controlled]:
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, anyone.uid, anyone.gid)
        path = f"{name}/control"
        with passt(lan, anyone, "-c", path) as server:
            yield Controlled(server, anyone, path)
    lan.host.close_sockets()
    lan.peer.close_sockets()


def test_ports(controlled: Controlled, lan: Lan) -> None:
    assert refused(lambda: lan.peer.connect(HOST, 8080))
    controlled.change("-A", "-t", "8080:80", "-u", "5353:53")
    assert not is_free(lan.host, 8080)
    with Client.at(str(controlled.server.path)) as guest:
        controlled.server.expect(ACCEPTED)
        guest.configure()
        sock = lan.peer.make_socket()
        sock.setblocking(False)
        sock.connect_ex((HOST, 8080))
        connection = guest.accept(80)
        connection.expect(lambda tcp: True if tcp.flags & ACK else None)
        sock.settimeout(DEADLINE)
        controlled.change("-D", "-t", "8080:80")
        assert is_free(lan.host, 8080)
        sock.sendall(b"question")
        assert connection.receive(8) == b"question"
        connection.send(b"answer")
        assert sock.recv(100) == b"answer", "who was connected still is"
        (line,) = controlled.pesto("--flows").stdout.splitlines()[1:]
        assert line.split()[0] == "tcp"
        controlled.change("--clear")
        assert is_free(lan.host, 5353, DATAGRAM)


def test_what_a_machine_does_not_have(controlled: Controlled) -> None:
    done = controlled.pesto("-A", "-T", "8080")
    assert (done.returncode, done.stderr) == (1, "'-T 8080' needs a namespace to listen in, and there is none\n")
    done = controlled.pesto("-A", "-t", "auto")
    assert done.returncode == 1 and "'auto' port forwarding is only allowed for pasta" in done.stderr
    assert "mode:        passt" in controlled.pesto("--info").stdout
