"""The daemon sleeps, as with the whole machine, and wakes up in another network.

A machine cannot be suspended here: the daemon is stopped (SIGSTOP) while the host moves. That is the harder case in one
respect, since CLOCK_MONOTONIC goes on, and with it all deadlines; while a machine is suspended, it stands still. The
kernel's messages overflow their queues, which are made as short as the kernel lets them be.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .support import User, wait_for
from .test_follow import (
    HOME,
    HOME6,
    QUIET,
    SERVER,
    SERVER6,
    TRAIN,
    TRAIN6,
    Site,
    addresses,
    connect,
    made_site,
    network_of,
    seen_as,
)
from .test_follow_programs import QUICK, WEB_PORT, Ping, web_socket
from .traffic.support import Guest, Namespace
from .traffic.test_names import FORWARD, resolver, who
from .websocket import serve

SYS_PIDFD_GETFD = 438
ARP, IPV6 = 0x806, 0x86DD
ROUTER_ADVERTISEMENT = 134
PORT = 7012
ASLEEP = 4.0  # s
FLAPS = 500
CONNECTIONS = 32
FEW = 2
NEIGHBOURS = 150


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """With a resolver in each network, and an /etc of its own."""
    for site in made_site():
        with contextlib.ExitStack() as servers, tempfile.TemporaryDirectory() as etc:
            os.chmod(etc, 0o755)
            subprocess.run(["cp", "-a", "/etc/.", etc], check=False, stderr=subprocess.DEVNULL)
            (Path(etc) / "resolv.conf").unlink(missing_ok=True)
            site.lan.host.run("mount", "--bind", etc, "/etc")
            for network, name in ((HOME, "home"), (TRAIN, "train")):
                servers.enter_context(resolver(site.lan.peer, f"{network}.1", name))
            listener = site.lan.peer.make_socket()
            listener.bind((SERVER, WEB_PORT))
            listener.listen(8)
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            yield site


@pytest.fixture(autouse=True)
def at_home(site: Site) -> None:
    goes_to(site, HOME, HOME6)


def goes_to(site: Site, network: str, prefix: str) -> None:
    """Another subnet, prefix and resolver; nothing of the former network is left."""
    site.leave()
    site.join(network)
    site.join6(prefix)
    site.lan.host.run("sh", "-c", f"echo nameserver {network}.1 >/etc/resolv.conf.new")
    site.lan.host.run("mv", "/etc/resolv.conf.new", "/etc/resolv.conf")


def shorten_queues(pid: int) -> None:
    """The netlink sockets of a process receive as little as the kernel allows. Only root may change those of others."""
    if os.geteuid() != 0:
        return
    libc, process, found = ctypes.CDLL(None, use_errno=True), os.pidfd_open(pid), 0
    for number in map(int, os.listdir(f"/proc/{pid}/fd")):
        fd = libc.syscall(SYS_PIDFD_GETFD, process, number, 0)
        if fd < 0:
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=fd) as sock:
            fd = -1
            if sock.family == socket.AF_NETLINK:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                found += 1
        if fd >= 0:
            os.close(fd)
    os.close(process)
    assert found >= 3, "the monitor, requests, neighbours"


@contextlib.contextmanager
def asleep(guest: Guest) -> Iterator[None]:
    """The daemon does nothing meanwhile."""
    began = time.monotonic()
    os.kill(guest.daemon, signal.SIGSTOP)
    try:
        yield
        time.sleep(max(0.0, began + ASLEEP - time.monotonic()))
    finally:
        os.kill(guest.daemon, signal.SIGCONT)


def flaps(site: Site) -> None:
    """More changes than there is room for messages about them."""
    batch = "".join(f"address add 10.250.{i >> 8}.{i & 255}/32 dev lo\n" for i in range(FLAPS))
    site.lan.host.run("ip", "-batch", "-", input=batch)
    site.lan.host.run("ip", "-batch", "-", input=batch.replace(" add ", " del "))
    near = "".join(
        f"neighbour replace {TRAIN}.{i} lladdr 52:54:0:0:1:{i:x} dev eth0\n" for i in range(100, 100 + NEIGHBOURS)
    )
    site.lan.host.run("ip", "-batch", "-", input=near)


class Announcements:
    """ARP packets and router advertisements that the guest gets."""

    def __init__(self, guest: Namespace) -> None:
        made = [guest.make_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind)) for kind in (ARP, IPV6)]
        self._arp, self._ipv6 = made

    def count(self) -> tuple[int, int]:
        """Those since the last call."""
        routers = [f for f in _waiting(self._ipv6) if f[20] == socket.IPPROTO_ICMPV6 and f[54] == ROUTER_ADVERTISEMENT]
        return len(_waiting(self._arp)), len(routers)


def _waiting(sock: socket.socket) -> list[bytes]:
    """The frames that can be read."""
    found = []
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(2048))
    return found


@contextlib.contextmanager
def watched_pasta(site: Site, user: User, *options: str) -> Iterator[tuple[Guest, Callable[[], Any]]]:
    """A guest whose daemon has short queues, and what that tells of the host's network."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, user.uid, user.gid)
        os.chmod(name, 0o711)
        path = f"{name}/control"
        with site.lan.pasta(user, *options, "-c", path) as guest:
            shorten_queues(guest.daemon)
            yield guest, partial(network_of, user, path)


def moves_asleep(site: Site, guest: Guest) -> None:
    with asleep(guest):
        goes_to(site, TRAIN, TRAIN6)
        flaps(site)


def reached(peer: Namespace, address: str) -> bool:
    with peer.make_socket() as client:
        return client.connect_ex((address, PORT)) == 0


def test_all_works_at_once(site: Site, ordinary_user: User, tmp_path: Path) -> None:
    names = "--no-map-gw", "--dns-forward", FORWARD
    options = "-q", "--config-net", "-t", f"{HOME}.20/{PORT}", "-u", "none", "-T", "none", "-U", "none", *names
    with watched_pasta(site, ordinary_user, *options) as (guest, network), Ping(guest, tmp_path / "ping") as ping:
        server = guest.make_socket()
        server.bind(("0.0.0.0", PORT))
        server.listen(8)
        web = web_socket(guest)
        assert web.echo() and who(guest, FORWARD) == "home"
        ping.goes_on("before")
        moves_asleep(site, guest)
        wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "the server by IPv4", QUICK)
        wait_for(lambda: seen_as(guest, SERVER6) == f"{TRAIN6}::20", "the server by IPv6", QUICK)
        wait_for(lambda: who(guest, FORWARD) == "train", "the other resolver", QUICK)
        wait_for(lambda: reached(site.lan.peer, f"{TRAIN}.20"), "the port at the other address", QUICK)
        ping.goes_on("afterwards")
        with pytest.raises((ConnectionResetError, EOFError)):
            web.echo()
        assert web_socket(guest).echo()
        assert sorted(addresses(guest)) == [f"{TRAIN}.20/24", f"{TRAIN6}::20/64"]
        found = network()
        assert (found["changes"], found["failures"]) == (1, 0)
        assert found["neighbours"] >= NEIGHBOURS, "those of messages that the kernel had to discard, too"


def test_what_is_due_is_done_once(site: Site, anyone: User) -> None:
    """A guest that configures itself, with many connections whose timers have expired."""
    with watched_pasta(site, anyone, *QUIET) as (guest, network):
        guest.run("ip", "link", "set", "eth0", "up")
        guest.run("ip", "address", "add", f"{HOME}.20/24", "dev", "eth0")
        guest.run("ip", "route", "add", "default", "via", f"{HOME}.1")
        wait_for(lambda: any(a.startswith(HOME6) for a in addresses(guest)), "an address by IPv6")
        connections = [connect(guest) for _ in range(CONNECTIONS)]
        announcements = Announcements(guest)
        with asleep(guest):
            for connection in connections:
                connection.send(b"unanswered")
            goes_to(site, TRAIN, TRAIN6)
            flaps(site)
        wait_for(lambda: any(a.startswith(TRAIN6) for a in addresses(guest)), "the other prefix", QUICK)
        assert not any(a.startswith(HOME6) for a in addresses(guest)), "the former one is deprecated"
        wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "the server, from the former address", QUICK)
        for connection in connections:
            with pytest.raises(ConnectionResetError):
                connection.recv(1 << 10)
        arp, advertisements = announcements.count()
        assert arp <= FEW and 1 <= advertisements <= FEW
        found = network()
        assert (found["changes"], found["failures"], found["ended"]) == (1, 0, CONNECTIONS)
        assert found["reads"] <= FEW
