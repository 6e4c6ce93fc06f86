"""Migration of a machine that the test plays, from a passt on one host to a passt on another with the same address.

The peer may send at any time: to the host that the machine has left, which must be silent, and then to the other one.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from passt.linux.tcp_repair import TCP_REPAIR
from passt.wire import vhost
from passt.wire.migration import State

from ..support import User, wait_for
from ..traffic.support import HOST, PEER, read_all
from .client import ACK, FIN, RST, Connection
from .support import Passt, passt
from .two_hosts import TwoHosts, helper, two_hosts
from .vhost import VhostClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="passt-repair needs CAP_NET_ADMIN on the hosts")
FORWARDED = 18080
BIG = random.Random(1).randbytes(300_000)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as made:
        yield made


@dataclass
class Pair:
    """A machine at the source, and a target. Each has its helper during `moving`."""

    hosts: TwoHosts
    source: Passt
    target: Passt
    machine: VhostClient
    sockets: list[socket.socket] = field(default_factory=list)

    @contextlib.contextmanager
    def helpers(self) -> Iterator[None]:
        with helper(self.hosts.first, self.source), helper(self.hosts.second, self.target):
            yield

    def move(self) -> None:
        """Everything up to the start at the target, which may still be out of reach of the peer."""
        state = self.machine.stop()
        assert self.machine.machine.check_state(), self.source.said()
        assert self.machine.move_to(str(self.target.path), state), self.target.said()
        self.machine.go_on()
        self.machine.former.close()

    def close(self) -> None:
        """Close the sockets of the peer."""
        for sock in self.sockets:
            sock.close()
        self.hosts.peer.close_sockets()

    def opened(self) -> tuple[Connection, socket.socket]:
        """A connection of the machine to the peer, and its other end."""
        with self.hosts.peer.listen(PEER) as listener:
            connection = self.machine.connect(PEER, listener.getsockname()[1])
            sock, _ = listener.accept()
        self.sockets.append(sock)
        sock.settimeout(20)
        return connection, sock

    def accepted(self) -> tuple[Connection, socket.socket]:
        """A connection of the peer to the machine."""
        sock = self.hosts.peer.connect(HOST, FORWARDED)
        return self.machine.accept(80), sock


@pytest.fixture
def pair(hosts: TwoHosts, ordinary_user: User) -> Iterator[Pair]:
    options = "--vhost-user", "-t", f"{FORWARDED}:80"
    with (
        passt(hosts.first, ordinary_user, *options) as source,
        passt(hosts.second, ordinary_user, *options) as target,
        VhostClient.at(str(source.path)) as client,
    ):
        client.configure()
        made = Pair(hosts, source, target, client)
        try:
            yield made
        finally:
            made.close()
            hosts.switch_back()


def fill(sock: socket.socket) -> bytes:
    """Send as much of BIG as is taken: what was taken."""
    sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(BIG):
            sent += sock.send(BIG[sent:])
    sock.settimeout(20)
    return BIG[:sent]


def test_connections_move_with_data_both_ways(pair: Pair) -> None:
    """Bytes that wait on the host, bytes in flight, bytes that come meanwhile: none is lost or repeated."""
    out, server = pair.opened()
    into, client = pair.accepted()
    out.send(b"before")
    assert server.recv(100) == b"before"
    waiting = fill(server)
    out.send(b"unread")
    with pair.helpers():
        pair.move()
        client.sendall(b"meanwhile")  # to the host that the machine has left
        pair.hosts.switch()
    assert "2 of 2 TCP connections can go on here" in pair.target.said()
    assert set(re.findall(r" mss:(\d+)", pair.hosts.second.host.run("ss", "-tniH").stdout)) == {"1448"}
    assert out.receive(len(waiting)) == waiting
    assert server.recv(100) == b"unread"
    assert into.receive(9) == b"meanwhile"
    for connection, sock in ((out, server), (into, client)):
        connection.send(b"after")
        assert sock.recv(100) == b"after"
        sock.sendall(b"down")
        assert connection.receive(4) == b"down"
        connection.send_segment(FIN | ACK)
        connection.sent += 1
        assert sock.recv(1) == b""
        sock.close()
        connection.expect(lambda tcp: True if tcp.flags & FIN else None)


def test_half_closed_connections_move(pair: Pair) -> None:
    """One whose guest has sent FIN, and one whose peer has."""
    out, server = pair.opened()
    out.send_segment(FIN | ACK)
    out.sent += 1
    assert server.recv(1) == b""
    into, client = pair.accepted()
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    with pair.helpers():
        pair.move()
        pair.hosts.switch()
    server.sendall(b"answer")
    assert out.receive(6) == b"answer"
    server.close()
    out.expect(lambda tcp: True if tcp.flags & FIN else None)
    assert into.receive(10) == b"last words"
    into.send(b"reply")
    assert client.recv(100) == b"reply"
    into.send_segment(FIN | ACK)
    assert client.recv(1) == b""


def test_the_end_of_an_upload_waits_behind_its_data(pair: Pair) -> None:
    """The guest has sent everything and FIN; the host peer's window is full, so that most of it is still to be sent."""
    data = random.Random(3).randbytes(30_000)  # which passt takes: this client sends nothing twice
    with pair.hosts.peer.listen(PEER) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        out = pair.machine.connect(PEER, listener.getsockname()[1])
        server, _ = listener.accept()
    pair.sockets.append(server)
    server.settimeout(20)
    out.send(data)
    out.send_segment(FIN | ACK)
    out.sent += 1
    time.sleep(0.2)
    with pair.helpers():
        pair.move()
        pair.hosts.switch()
    assert read_all(server) == data
    server.close()
    out.expect(lambda tcp: True if tcp.flags & FIN else None)


def test_a_machine_goes_on_after_a_failure(pair: Pair) -> None:
    """The target refuses the state: the source goes on, with nothing lost, and may try again."""
    out, server = pair.opened()
    server.sendall(b"one ")
    assert out.receive(4) == b"one "
    with helper(pair.hosts.first, pair.source):
        state = pair.machine.stop()
        assert pair.machine.machine.check_state()
        server.sendall(b"two ")  # arrives while nothing is let in
        stopped = pair.machine.machine
        assert not pair.machine.move_to(str(pair.target.path), state[:-1])
        pair.machine.machine.close()
        pair.machine.machine, pair.machine.sock = stopped, stopped.sock
        pair.machine.go_on()
    pair.source.expect("the machine goes on here, with 1 TCP connections")
    assert "it ends after" in pair.target.said()
    assert out.receive(4) == b"two "
    out.send(b"three")
    assert server.recv(100) == b"three"


def test_without_a_helper_connections_are_reset_at_once(pair: Pair) -> None:
    """Both ways: the guest at the target, and the peer by the source, when the machine has left it."""
    out, server = pair.opened()
    pair.move()
    assert out.expect(lambda tcp: tcp if tcp.flags & RST else None).seq == out.received
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    assert pair.source.count("No helper for migration") == 1
    assert "0 of 1 TCP connections can go on here" in pair.target.said()


def obey(sock: socket.socket, command: bytes, *, answer: bool = True) -> None:
    """Be the helper for one command about one socket."""
    got, fds, _, _ = socket.recv_fds(sock, 2, 253)
    assert got == command
    assert len(fds) == 1
    with socket.socket(fileno=fds[0]) as its:
        its.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, int.from_bytes(command, "big", signed=True))
    if answer:
        sock.send(command)


def helper_socket(server: Passt) -> socket.socket:
    """A connection as the helper has it."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(f"{server.path}.repair")
    sock.settimeout(20)
    return sock


def test_a_helper_that_goes_leaves_no_connection_behind(pair: Pair) -> None:
    """It has turned repair mode on, and is not there to turn it off: the guest learns of it."""
    out, _ = pair.opened()
    ours = pair.machine.machine
    with helper_socket(pair.source) as sock:
        pair.machine.bases = ours.stop_rings()
        pipe = ours.ask_for_state(vhost.SAVE)
        obey(sock, b"\1")
        with open(pipe, "rb") as reading:
            State.parse(reading.read())
    assert ours.check_state()
    pair.machine.go_on()
    assert out.expect(lambda tcp: tcp if tcp.flags & RST else None).seq == out.received


def test_another_helper_is_turned_away(pair: Pair) -> None:
    """One at a time; what it says that was not asked for ends it."""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for sock in (first, second):
            sock.connect(f"{pair.source.path}.repair")
            sock.settimeout(10)
        assert second.recv(1) == b""
        first.send(b"?")
        assert first.recv(1) == b""


def test_a_front_end_that_dies_before_it_has_the_state(pair: Pair) -> None:
    """The helper is at work meanwhile; then it has to undo that, and the peers learn that the guest is gone."""
    _, server = pair.opened()
    ours = pair.machine.machine
    with helper_socket(pair.source) as sock:
        ours.stop_rings()
        os.close(ours.ask_for_state(vhost.SAVE))
        obey(sock, b"\1", answer=False)
        ours.sock.close()
        pair.source.expect("The guest closed the connection")
        sock.send(b"\1")
        obey(sock, b"\0")
        with pytest.raises(ConnectionResetError):
            server.recv(1)
        assert sock.recv(1) == b""


@pytest.mark.parametrize("option", ["--migrate-exit", "--one-off"])
def test_the_source_ends(hosts: TwoHosts, ordinary_user: User, option: str) -> None:
    """When its machine has moved, and not before."""
    with (
        passt(hosts.first, ordinary_user, "--vhost-user", "--repair-path", "none", option) as source,
        VhostClient.at(str(source.path)) as client,
    ):
        client.stop()
        assert client.machine.check_state()
        client.go_on()
        client.configure()
        assert not os.path.exists(f"{source.path}.repair")
        client.stop()
        assert client.machine.check_state()
        client.machine.sock.close()
        wait_for(lambda: not source.alive(), "passt ends")
        assert source.process.returncode == 0


def test_another_address(ordinary_user: User) -> None:
    """Connections cannot go on where the host has another address, and the guest learns of it at once."""
    with (
        two_hosts("198.51.100.9", "2001:db8:1::9") as hosts,
        passt(hosts.first, ordinary_user, "--vhost-user") as source,
        passt(hosts.second, ordinary_user, "--vhost-user") as target,
        VhostClient.at(str(source.path)) as client,
    ):
        client.configure()
        pair = Pair(hosts, source, target, client)
        out, _ = pair.opened()
        with pair.helpers():
            pair.move()
        assert out.expect(lambda tcp: tcp if tcp.flags & RST else None).seq == out.received
        assert "0 of 1 TCP connections can go on here" in target.said()
        pair.close()
