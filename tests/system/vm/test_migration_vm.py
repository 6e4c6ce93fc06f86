"""Live migration between two QEMUs, with connections that are busy all the time. Each has its passt on a host of its
own; the two hosts have the same addresses. The download is by IPv6.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ..support import User
from ..traffic.support import PEER, PEER6, in_thread
from .image import Image
from .machine import VirtualMachine
from .newer import netdev, through
from .support import passt
from .test_vm import TRANSFER_DEADLINE, configure, wait_for_slaac
from .two_hosts import TwoHosts, helper, two_hosts

pytestmark = [
    pytest.mark.alone,  # two machines at a time are under emulation
    pytest.mark.timeout(800),  # the first test downloads QEMU
    pytest.mark.skipif(os.geteuid() != 0, reason="passt-repair needs CAP_NET_ADMIN on the hosts"),
]
MEMORY = 256
PIECE = 1 << 16


def feed(listener: socket.socket, moved: threading.Event) -> str:
    """Send random bytes to the client until the machine has moved, and a megabyte more; their digest."""
    sock, _ = listener.accept()
    digest, left, source = hashlib.sha256(), 16, random.Random(1)
    with sock:
        while left:
            data = source.randbytes(PIECE)
            sock.sendall(data)
            digest.update(data)
            if moved.is_set():
                left -= 1
            else:
                time.sleep(0.02)
    return digest.hexdigest()


def drain(listener: socket.socket, moved: threading.Event) -> str:
    """Read slowly until the machine has moved, and then the rest; its digest."""
    sock, _ = listener.accept()
    digest = hashlib.sha256()
    with sock:
        while data := sock.recv(PIECE):
            digest.update(data)
            if not moved.is_set():
                time.sleep(0.05)
    return digest.hexdigest()


@contextlib.contextmanager
def told(hosts: TwoHosts) -> Iterator[None]:
    """Beside a failure, the state of all connections."""
    try:
        yield
    except AssertionError:
        for place, where in (("second host", hosts.second.host), ("peer", hosts.peer)):
            print(place, where.run("ss", "-tnmiOe").stdout)
        raise


def test_connections_survive(ordinary_user: User, machine_image: Image) -> None:
    qemu = through()
    machine = VirtualMachine(machine_image, memory=MEMORY)
    moved = threading.Event()
    with (
        two_hosts() as hosts,
        passt(hosts.first, ordinary_user, "--vhost-user") as source,
        passt(hosts.second, ordinary_user, "--vhost-user") as target,
    ):
        try:
            machine.start(*netdev(source.path, MEMORY), through=qemu)
            configure(machine)
            wait_for_slaac(machine)
            down, up, echo = (hosts.peer.listen(address) for address in (PEER6, PEER, PEER))
            ports = [listener.getsockname()[1] for listener in (down, up, echo)]
            machine.run("for i in $(seq 16); do cat /bin/busybox; done >/tmp/up")
            with in_thread(feed, down, moved) as fed, in_thread(drain, up, moved) as drained:
                machine.run(f"nc {PEER6} {ports[0]} >/tmp/down & echo $! >/tmp/down.pid")
                machine.run(f"nc {PEER} {ports[1]} </tmp/up & echo $! >/tmp/up.pid")
                machine.run(f"nc {PEER} {ports[2]} -e cat &")
                typed, _ = echo.accept()
                typed.sendall(b"before\n")
                assert typed.recv(7) == b"before\n"
                with helper(hosts.first, source), helper(hosts.second, target):
                    machine.migrate(*netdev(target.path, MEMORY), through=qemu)
                    hosts.switch()
                moved.set()
                typed.sendall(b"after\n")
                assert typed.recv(6) == b"after\n"
                wait = "while kill -0 $(cat /tmp/{}.pid) 2>/dev/null; do usleep 100000; done"
                for name in ("down", "up"):
                    with told(hosts):
                        machine.run(wait.format(name), deadline=TRANSFER_DEADLINE)
                assert machine.run("sha256sum /tmp/down").split()[0] == fed()
                assert machine.run("sha256sum /tmp/up").split()[0] == drained()
            typed.close()
            assert "3 of 3 TCP connections can go on here" in target.said(), target.said()
        finally:
            moved.set()
            machine.close()
