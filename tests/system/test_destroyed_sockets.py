"""Root of the host destroys sockets of pasta (`ss -K`): it does not spin, and what was lost comes back."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .support import Host, Runner, User, alive, new_host, wait_for
from .test_forward_start import Place, guest, options, talk

PORT = 4000
FAR = "192.0.2.9"


class Scene:
    """A guest behind pasta on a host, with a peer beyond it."""

    def __init__(self, pasta: Runner, host: Host, stack: ExitStack) -> None:
        self.host = host
        self.peer_host = stack.enter_context(new_host())
        host.ip("link", "add", "nic", "type", "veth", "peer", "name", "far", "netns", self.peer_host.name)
        host.ip("address", "add", "192.0.2.2/24", "dev", "nic")
        host.ip("link", "set", "nic", "up")
        self.peer_host.ip("link", "set", "far", "up")
        self.peer_host.ip("address", "add", f"{FAR}/24", "dev", "far")
        host.ip("route", "add", "default", "via", "192.0.2.1")
        target = pasta.namespace()
        given = options(t=f"{PORT}", u=f"{PORT}", T="5000", U="5000")
        self.daemon = pasta.daemon("--config-net", *given, str(target))
        self.on_host = stack.enter_context(Place(host.path))
        self.inside = stack.enter_context(guest(target))
        self.beyond = stack.enter_context(Place(self.peer_host.path))

    def destroy(self, *which: str) -> None:
        command = ["ip", "netns", "exec", self.host.name, "ss", "-HK", *which]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout, f"no socket was found: {done.stderr}"

    def assert_calm(self) -> None:
        assert_calm(self.daemon)


def ticks(pid: int) -> int:
    """Its processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def assert_calm(pid: int) -> None:
    """It lives, and uses next to no processor time."""
    time.sleep(0.2)
    before = ticks(pid)
    time.sleep(0.5)
    assert alive(pid)
    assert ticks(pid) - before < 0.15 * os.sysconf("SC_CLK_TCK")


@pytest.fixture
def scene(anyone: User, root: User) -> Iterator[Scene]:
    with ExitStack() as stack:
        host = stack.enter_context(new_host())
        pasta = Runner(anyone, host)
        stack.callback(pasta.close)
        yield Scene(pasta, host, stack)


def connect(place: Place, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = place.sock(kind=kind)
    sock.connect((address, port))
    return sock


def exchange(server: socket.socket, client: socket.socket) -> None:
    client.send(b"question")
    question, sender = server.recvfrom(100)
    server.sendto(b"answer", sender)
    assert (question, client.recv(100)) == (b"question", b"answer")


def test_listeners_of_the_host(scene: Scene) -> None:
    server = scene.inside.server(PORT)
    for client, address in ((scene.beyond, "192.0.2.2"), (scene.on_host, "127.0.0.1")):
        talk(server, connect(client, address, PORT))
        scene.destroy("-lt", "sport", "=", f":{PORT}")
        scene.assert_calm()
        wait_for(lambda: scene.on_host.listening(PORT), "the port is open again")
        server.accept()[0].close()
        talk(server, connect(client, address, PORT))


def test_udp_on_the_host(scene: Scene) -> None:
    """The listener's socket and those of the clients, through the tap and spliced."""
    server = scene.inside.server(PORT, socket.SOCK_DGRAM)
    for client, address in ((scene.beyond, "192.0.2.2"), (scene.on_host, "127.0.0.1")):
        sock = connect(client, address, PORT, socket.SOCK_DGRAM)
        for _ in range(2):
            exchange(server, sock)
            scene.destroy("-au", "src", f":{PORT}")
            scene.assert_calm()
        exchange(server, sock)


def test_udp_flows_of_the_guest(scene: Scene) -> None:
    """After a destruction, the socket would receive from any peer."""
    server = scene.beyond.server(6000, socket.SOCK_DGRAM)
    client = connect(scene.inside, FAR, 6000, socket.SOCK_DGRAM)
    exchange(server, client)
    scene.destroy("-au", "dst", FAR)
    scene.assert_calm()
    exchange(server, client)
    here = scene.on_host.server(5000, socket.SOCK_DGRAM, "127.0.0.1")
    spliced = connect(scene.inside, "127.0.0.1", 5000, socket.SOCK_DGRAM)
    exchange(here, spliced)
    scene.destroy("-au", "dport", "=", ":5000")
    scene.assert_calm()
    exchange(here, spliced)


def test_connections(scene: Scene) -> None:
    """Both ends are told, and other connections go on."""
    server = scene.beyond.server(6000)
    here = scene.on_host.server(5000, address="127.0.0.1")
    for listening, address, port in ((server, FAR, 6000), (here, "127.0.0.1", 5000)):
        client = connect(scene.inside, address, port)
        accepted = listening.accept()[0]
        with accepted:
            client.send(b"x")
            assert accepted.recv(10) == b"x"
            scene.destroy("-t", "dport", "=", f":{port}")
            scene.assert_calm()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        talk(listening, connect(scene.inside, address, port))
