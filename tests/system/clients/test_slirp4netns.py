"""slirp4netns by its own command line: what podman 4, rootlesskit and user-mode Linux ask of it.

Nearly all of it is asked of the program in C, too, which shows that the test says what clients know.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from passt.wire import arp
from passt.wire.ether import HEADER, TYPE_ARP

from ..support import DEADLINE, wait_for
from ..traffic.support import HOST, Lan, read_all
from .checks import NAME, NAME_ADDRESS, exchange, has, link_has, listen, loopback_at, outward, resolves_at
from .support import Bound, Client, Daemon, Site, sandbox

pytestmark = pytest.mark.usefixtures("resolver")

IN_C = "/usr/bin/slirp4netns"
PUBLISHED = 8080


@pytest.fixture(params=["slirp4netns", IN_C], ids=["ours", "C"])
def program(request: pytest.FixtureRequest) -> str:
    made: str = request.param
    return made


@dataclass
class Running:
    """A running one, with the ends of its two pipes, as podman has them."""

    daemon: Daemon
    exit: int
    ready: bytes

    @classmethod
    def start(cls, site: Site, line: str, **kw: Any) -> Running:
        """Start it, and read its descriptor of readiness to the end."""
        exit_reader, exit_writer = os.pipe()
        ready_reader, ready_writer = os.pipe()
        names = {"exit": exit_reader, "ready": ready_writer, **kw}
        daemon = site.stay(line, pass_fds=(exit_reader, ready_writer), **names)
        os.close(exit_reader)
        os.close(ready_writer)
        with open(ready_reader, "rb") as file:
            ready, _, _ = select.select([file], [], [], DEADLINE)
            assert ready, "it never gets ready"
            return cls(daemon, exit_writer, file.read())

    def end(self) -> int | None:
        """The end of all writers of the pipe, as of conmon, is its end."""
        os.close(self.exit)
        self.daemon.expect_end("the descriptor of --exit-fd has an event")
        assert self.daemon.process is not None
        return self.daemon.process.returncode


@dataclass
class Api:
    """Its API, as port drivers speak it: a connection for each request."""

    client: Client
    path: str

    def call(self, execute: str, **arguments: Any) -> Any:
        """In a process of the client: its credentials count, and its file system has the path."""
        request = json.dumps({"execute": execute, "arguments": arguments})
        done = subprocess.run(
            self.client.argv(["socat", "-t10", "-", f"UNIX-CONNECT:{self.path}"]),
            input=request, capture_output=True, text=True, timeout=DEADLINE, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)


def test_podman(engine: Client, lan: Lan, program: str) -> None:
    """Its line, its pipes, its port handler `slirp4netns`, and the end of the container."""
    site = Bound(engine, f"/run/user/{engine.user.uid}/netns/netns-{uuid.uuid4()}")
    line = (
        f"{program} --disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp --enable-ipv6 -c "
        "-e {exit} -r {ready} --api-socket {dir}/api.sock --netns-type=path {netns} tap0"
    )
    running = Running.start(site, line)
    assert running.ready == b"1"
    wait_for(lambda: len(site.addresses()) == 2, "both addresses")
    assert "10.0.2.100/24" in site.addresses()
    for check in (link_has(ifname="tap0", mtu=65520), resolves_at("10.0.2.3")):
        check(site, running.daemon, lan)
    routes = {route["dst"]: route.get("gateway") for route in site.guest.show("route")}
    assert routes == {"default": "10.0.2.2", "10.0.2.0/24": None}

    api = Api(engine, f"{engine.dir}/api.sock")
    ports = {"host_addr": "0.0.0.0", "host_port": PUBLISHED, "guest_addr": "10.0.2.100", "guest_port": 80}
    assert api.call("add_hostfwd", proto="tcp", **ports) == {"return": {"id": 1}}
    with listen(site.guest, "0.0.0.0", 80) as server:
        exchange(lan.peer, HOST, PUBLISHED, server)
        exchange(lan.host, "127.0.0.1", PUBLISHED, server)
    (entry,) = api.call("list_hostfwd")["entries"]
    assert {name: entry[name] for name in ("id", "proto", *ports)} == {"id": 1, "proto": "tcp", **ports}
    said = api.call("add_hostfwd", proto="tcp", **ports)["error"]["desc"]
    assert said.startswith("bad request: add_hostfwd: ")
    assert api.call("remove_hostfwd", id=1) == {"return": {}}
    wrong = {"error": {"desc": "bad request: remove_hostfwd: bad arguments.id"}}
    assert api.call("remove_hostfwd", id=1) == wrong
    assert api.call("no_such") == {"error": {"desc": "bad request: unknown execute"}}

    assert running.end() == 0
    site.close()


def test_rootlesskit(client: Client, lan: Lan, program: str) -> None:
    """Its line for a tap that it has made: rootlesskit gives the addresses itself, and ends the program by a signal."""
    site = sandbox(client)
    for command in ("tuntap add name tap0 mode tap", "link set tap0 up"):
        site.guest.run("ip", *command.split())
    running = Running.start(site, f"{program} --mtu 65520 -r {{ready}} --api-socket {{dir}}/.s4nn.sock {{pid}} tap0")
    assert running.ready == b"1"
    for command in ("link set tap0 mtu 65520", "address add 10.0.2.100/24 dev tap0", "route add default via 10.0.2.2"):
        site.guest.run("ip", *command.split())
    for check in (has("10.0.2.100/24"), outward, loopback_at("10.0.2.2"), resolves_at("10.0.2.3")):
        check(site, running.daemon, lan)
    assert Api(client, f"{client.dir}/.s4nn.sock").call("list_hostfwd")["entries"] == []
    os.close(running.exit)
    running.daemon.end(signal.SIGKILL)
    site.close()


def test_it_stays_when_the_process_ends(client: Client) -> None:
    """Its life is that of the client's descriptor: the network may have other users."""
    site = sandbox(client)
    running = Running.start(site, "slirp4netns -c -e {exit} -r {ready} {pid} tap0")
    site.close()
    running.daemon.stays()
    assert running.end() == 0


@pytest.mark.parametrize("what", ["exit", "ready"])
def test_a_descriptor_that_is_not_open(client: Client, what: str) -> None:
    site = sandbox(client)
    said = client.run(f"slirp4netns -c --{what}-fd 77 {{pid}} tap0", **site.names)
    assert said.returncode == 1 and said.stderr.startswith(f"Invalid --{what}-fd: 77")
    site.close()


def test_a_file_has_no_events(client: Client) -> None:
    site = sandbox(client)
    with open(__file__, "rb") as file:
        fd = file.fileno()
        daemon = site.stay(f"slirp4netns -c --exit-fd {fd} {{pid}} tap0", pass_fds=(fd,))
        daemon.expect_end("a file cannot be waited for")
    assert daemon.said() == f"Invalid --exit-fd: {fd} (Operation not permitted)\n"
    site.close()


# A machine ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(client: Client, program: str) -> Iterator[tuple[socket.socket, Daemon]]:
    """The socket of user-mode Linux, connected."""
    path = client.dir / "bess"
    daemon = client.stay(f"{program} --target-type=bess {path}")
    wait_for(lambda: not daemon.alive() or path.is_socket(), "the socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(DEADLINE)
        wait_for(lambda: sock.connect_ex(str(path)) == 0, "it listens")
        yield sock, daemon


def test_machine(machine: tuple[socket.socket, Daemon], program: str) -> None:
    """Each frame is a packet; the end of the machine is ours."""
    sock, daemon = machine
    mac, own = bytes.fromhex("020000000001"), bytes((10, 0, 2, 100))
    request = arp.Packet(arp.REQUEST, mac, own, bytes(6), bytes((10, 0, 2, 2)))
    sock.send(HEADER.pack(b"\xff" * 6, mac, TYPE_ARP) + request.emit())
    while (frame := sock.recv(1 << 16))[12:14] != TYPE_ARP.to_bytes(2, "big") or frame[20:22] != b"\0\2":
        pass  # announcements
    assert frame[:6] == mac and frame[28:32] == bytes((10, 0, 2, 2))
    if program != IN_C:  # which stays
        sock.close()
        daemon.expect_end("the machine is gone")
        assert daemon.process is not None and daemon.process.returncode == 0


# The real rootlesskit -----------------------------------------------------------------------------------------------


def _may_map_ids(name: str) -> bool:
    return shutil.which("newuidmap") is not None and f"{name}:" in Path("/etc/subuid").read_text()


def test_the_real_rootlesskit(client: Client, lan: Lan) -> None:
    """With its own port driver, and nothing but the path of the program changed."""
    if os.geteuid() != 0 and not _may_map_ids(client.user.name):
        pytest.skip("needs subordinate IDs (subuid(5))")
    script = f"ip -br -4 address show tap0; dig +short @10.0.2.3 {NAME}; exec socat TCP-LISTEN:80,fork EXEC:cat"
    line = [
        *("rootlesskit", "--net=slirp4netns", f"--slirp4netns-binary={client.bin}/slirp4netns", "--mtu=1500"),
        *("--disable-host-loopback", "--port-driver=slirp4netns", f"--publish=0.0.0.0:{PUBLISHED}:80/tcp"),
        *(f"--state-dir={client.dir}/state", "--copy-up=/etc", "sh", "-c", script),
    ]
    with subprocess.Popen(
        client.argv(line),
        cwd="/",
        env=client.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().split() == ["tap0", "UP", "10.0.2.100/24"]
            assert process.stdout.readline() == f"{NAME_ADDRESS}\n"

            def answers() -> bool:
                """The port is published, and the server listens, some time after the script begins."""
                with lan.peer.make_socket() as sock:
                    if sock.connect_ex((HOST, PUBLISHED)):
                        return False
                    try:
                        sock.sendall(b"to and fro")
                        sock.shutdown(socket.SHUT_WR)
                        return read_all(sock) == b"to and fro"
                    except ConnectionError:
                        return False

            wait_for(answers, "the published port answers")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE)
