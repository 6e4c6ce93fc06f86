"""A peer that has vanished: an application in the guest finds out when it would on the host, with the same error.

`direct` is a socket on the host itself, under the bare kernel; what it does is what a guest has to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from ..support import User, wait_for
from .support import HOST, HOST6, PEER, PEER6, Guest, Lan, Namespace, in_thread

SLACK = 0.8  # s
FAMILIES = {"ipv4": (PEER, HOST, "-4"), "ipv6": (PEER6, HOST6, "-6")}


@pytest.fixture(scope="module")
def standing_guest(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """One user, since each test waits for seconds. No peer is near: data for one closer than 25 us counts as delivered
    when the host's socket has it, and here the peer is as close.
    """
    far = "from passt.tcp_engine import window\nwindow.NEAR_US = 0"
    with lan.pasta(ordinary_user, "-q", "--config-net", before=far) as made:
        yield made


@pytest.fixture(params=["direct", "guest"])
def where(request: pytest.FixtureRequest, guest: Guest, lan: Lan) -> Namespace:
    """Where the application runs."""
    return guest if request.param == "guest" else lan.host


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """The peer's address, the host's, and an option of ip(8)."""
    return FAMILIES[request.param]


@contextlib.contextmanager
def connection(where: Namespace, lan: Lan, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends, after a byte each way."""
    with lan.peer.listen(address) as listener:
        client = where.connect(address, listener.getsockname()[1])
        server, _ = listener.accept()
    with client, server:
        client.sendall(b"?")
        server.settimeout(5)
        assert server.recv(1) == b"?"
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        yield client, server


@contextlib.contextmanager
def vanished(lan: Lan, host: str, option: str) -> Iterator[None]:
    """The peer's answers to the host get lost."""
    lan.peer.run("ip", option, "route", "add", "blackhole", host)
    try:
        yield
    finally:
        lan.peer.run("ip", option, "route", "del", "blackhole", host)


def keep_alive(sock: socket.socket, idle: int, interval: int, count: int) -> None:
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def seconds_to_error(sock: socket.socket, number: int) -> float:
    """How long it takes until a read fails with that error."""
    sock.settimeout(15)
    began = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(number)):
        sock.recv(1)
    return time.monotonic() - began


def test_keep_alive(where: Namespace, lan: Lan, family: tuple[str, str, str]) -> None:
    """1 s idle, and then two probes a second apart: the bare kernel ends it after 3 s, and so does the guest's."""
    address, host, option = family
    with connection(where, lan, address) as (client, server), vanished(lan, host, option):
        keep_alive(client, 1, 1, 2)
        assert 3 - SLACK < seconds_to_error(client, errno.ETIMEDOUT) < 3 + SLACK
        server.close()


def test_keep_alive_of_a_live_peer(where: Namespace, lan: Lan, family: tuple[str, str, str]) -> None:
    """It answers each probe."""
    with connection(where, lan, family[0]) as (client, server):
        keep_alive(client, 1, 1, 1)
        client.settimeout(3.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        server.sendall(b"x")
        assert client.recv(1) == b"x"


def test_user_timeout(where: Namespace, lan: Lan, family: tuple[str, str, str]) -> None:
    """2 s for data without acknowledgement. The kernel looks when it retransmits: after 3.3 s at the latest."""
    address, host, option = family
    with connection(where, lan, address) as (client, server), vanished(lan, host, option):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000)
        client.sendall(b"lost")
        assert 1.5 < seconds_to_error(client, errno.ETIMEDOUT) < 3.3 + SLACK
        server.close()


@pytest.mark.parametrize("cut", [False, True], ids=["live", "vanished"])
def test_linger(where: Namespace, lan: Lan, cut: bool) -> None:
    """close(2) waits until the peer has everything, or the time is over: a second."""
    with connection(where, lan, PEER) as (client, _), contextlib.ExitStack() as stack:
        if cut:
            stack.enter_context(vanished(lan, HOST, "-4"))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
        client.settimeout(None)
        client.sendall(b"last")
        began = time.monotonic()
        client.close()
        took = time.monotonic() - began
        assert (0.9 < took < 1 + SLACK) if cut else took < 0.5


@pytest.mark.parametrize("family", [("0.0.0.0", HOST, "-4"), ("::", HOST6, "-6")], ids=["ipv4", "ipv6"])
def test_a_server_whose_client_vanishes(where: Namespace, lan: Lan, family: tuple[str, str, str]) -> None:
    """The same at the other end: data that is lost is not acknowledged, and each time is that of the application."""
    any_address, host, option = family
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(where.listen(any_address))
        port = listener.getsockname()[1]
        wait_for(lambda: f":{port} " in lan.host.run("ss", "-Hltn").stdout, "the port is forwarded")
        servers = []
        for _ in range(3):
            client = stack.enter_context(lan.peer.connect(host, port))
            servers.append(stack.enter_context(listener.accept()[0]))
            servers[-1].sendall(b"!")
            assert client.recv(1) == b"!"
        asking, sending, lingering = servers
        wait_for(lambda: not unsent(sending), "the first byte is acknowledged")
        stack.enter_context(vanished(lan, host, option))
        keep_alive(asking, 1, 1, 2)
        sending.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000)
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
        lingering.settimeout(None)
        began = time.monotonic()
        sending.sendall(b"lost")
        lingering.close()
        assert 0.9 < time.monotonic() - began < 1 + SLACK
        assert unsent(sending) == 4
        assert seconds_to_error(sending, errno.ETIMEDOUT) < 3.3 - 1 + SLACK
        seconds_to_error(asking, errno.ETIMEDOUT)
        assert 3 - SLACK < time.monotonic() - began < 3.3 + SLACK


def unsent(sock: socket.socket) -> int:
    """Bytes without acknowledgement, as the application sees them: SIOCOUTQ."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def test_user_timeout_in_the_middle_of_a_transfer(where: Namespace, lan: Lan) -> None:
    """One peer vanishes while it reads, and one with a closed window: all buffers on the way to it are full then."""
    with connection(where, lan, PEER) as (client, server), connection(where, lan, PEER) as (blocked, _):
        for sock in client, blocked:
            sock.settimeout(0.3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000)
        with contextlib.suppress(TimeoutError):
            send_for_ever(blocked)
        with in_thread(read_for, server, 0.5), vanished_after(lan, 0.25):
            began = time.monotonic()
            for sock in client, blocked:
                sock.settimeout(8)
                with pytest.raises(OSError, match=os.strerror(errno.ETIMEDOUT)):
                    send_for_ever(sock)
                assert 1.5 < time.monotonic() - began < 3.3 + SLACK


def send_for_ever(sock: socket.socket) -> None:
    while True:
        sock.send(bytes(1 << 16))


def read_for(sock: socket.socket, seconds: float) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        while time.monotonic() < end:
            sock.settimeout(0.2)
            sock.recv(1 << 20)


@contextlib.contextmanager
def vanished_after(lan: Lan, seconds: float) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        timer = threading.Timer(seconds, lambda: stack.enter_context(vanished(lan, HOST, "-4")))
        timer.start()
        try:
            yield
        finally:
            timer.join()
