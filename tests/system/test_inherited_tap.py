"""pasta -F: a tap device of another program, with and without vnet header, with and without its namespace."""

from __future__ import annotations

import fcntl
import os
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from passt.linux import netns, tun

from .support import REPOSITORY, Host, Runner, alive, new_host, wait_for

NAME = "theirs0"
SERVER = "203.0.113.1"
DATA = os.urandom(300_000)


class Sender(socketserver.BaseRequestHandler):
    """Sends everything at once, and ends."""

    def handle(self) -> None:
        self.request.sendall(DATA)


@pytest.fixture
def host() -> Iterator[Host]:
    """One with an address beyond what the namespace takes for its own."""
    commands = ("veth eth0", "link set eth0 up", "addr add 192.0.2.2/24 dev eth0", "route add default via 192.0.2.1")
    with new_host(*commands, f"addr add {SERVER}/32 dev lo") as made:
        yield made


@pytest.fixture
def port(host: Host) -> Iterator[int]:
    """A server on the host."""
    with closing(open(host.path)) as there:
        server = netns.run_in(there.fileno(), lambda: socketserver.ThreadingTCPServer((SERVER, 0), Sender))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def tap_in(guest: Host, flags: int) -> Iterator[int]:
    """A descriptor of a new tap device in `guest`."""

    def create() -> int:
        fd = os.open(tun.TUN_DEVICE, os.O_RDWR)
        fcntl.ioctl(fd, tun.TUNSETIFF, tun._IFREQ.pack(NAME.encode(), flags))
        return fd

    with closing(open(guest.path)) as there:
        fd = netns.run_in(there.fileno(), create)
    try:
        yield fd
    finally:
        os.close(fd)


PLAIN = tun.IFF_TAP | tun.IFF_NO_PI


@pytest.fixture(params=[PLAIN | tun.IFF_VNET_HDR, PLAIN], ids=["vnet", "plain"])
def flags(request: pytest.FixtureRequest) -> int:
    given: int = request.param
    return given


def fetch(guest: Host, port: int) -> bytes:
    """All that the server sends to a client in the namespace."""
    command = ["ip", "netns", "exec", guest.name, "bash", "-c", f"exec cat </dev/tcp/{SERVER}/{port}"]
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout


def test_with_its_namespace(root_pasta: Runner, host: Host, port: int, flags: int) -> None:
    with new_host() as guest, tap_in(guest, flags) as fd:
        pid = root_pasta.daemon(
            "--config-net", "-F", str(fd), "--netns", guest.path, "-T", "none", "-U", "none", host=host, pass_fds=(fd,)
        )
        assert f"Namespace interface: {NAME}\n" in root_pasta.said
        assert fetch(guest, port) == DATA
        guest.ip("link", "del", NAME)
        wait_for(lambda: not alive(pid), "the end, with the tap device")


@pytest.mark.usefixtures("root")
def test_alone(user_pasta: Runner, host: Host, port: int, flags: int) -> None:
    """For an ordinary user who has no right to the namespace, only to the descriptor."""
    with new_host() as guest, tap_in(guest, flags) as fd:
        pid = user_pasta.daemon("-F", str(fd), host=host, pass_fds=(fd,))
        for command in ("addr add 192.0.2.2/24 dev", "link set", "route add default via 192.0.2.1 dev"):
            guest.ip(*command.split(), NAME, *(["up"] if command == "link set" else []))
        assert fetch(guest, port) == DATA
        guest.ip("link", "del", NAME)
        wait_for(lambda: not alive(pid), "the end, with the tap device")


@pytest.mark.usefixtures("root")
def test_as_standard_input(user_pasta: Runner, host: Host, port: int) -> None:
    with new_host() as guest, tap_in(guest, PLAIN) as fd:
        pid = user_pasta.daemon("--fd", "0", host=host, stdin=fd)
        guest.ip("addr", "add", "192.0.2.2/24", "dev", NAME)
        guest.ip("link", "set", NAME, "up")
        guest.ip("route", "add", "default", "via", "192.0.2.1", "dev", NAME)
        assert fetch(guest, port) == DATA
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"


def test_standard_input_that_is_something_else(pasta: Runner) -> None:
    done = pasta.run("--fd", "0")
    assert (done.returncode, done.stderr) == (1, "Invalid --fd: 0 (it is not a tap device)\n")


@pytest.mark.usefixtures("root")
def test_device_of_another_kind(user_pasta: Runner) -> None:
    with new_host() as guest, tap_in(guest, 0x0001 | tun.IFF_NO_PI) as fd:
        done = user_pasta.run("-F", str(fd), pass_fds=(fd,))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Invalid --fd: {fd} (a tun device has no Ethernet frames: make it with IFF_TAP)\n"


def test_descriptors_of_something_else(pasta: Runner) -> None:
    with open(REPOSITORY / "README.md") as file:
        fd = file.fileno()
        done = pasta.run("-F", str(fd), pass_fds=(fd,))
    assert (done.returncode, done.stderr) == (1, f"Invalid --fd: {fd} (it is not a tap device)\n")
    done = pasta.run("-F", "200")
    assert (done.returncode, done.stderr) == (1, "Invalid --fd: 200 (it is not open)\n")


def test_in_another_namespace(root_pasta: Runner, host: Host) -> None:
    with new_host() as guest, new_host() as wrong, tap_in(guest, PLAIN) as fd:
        done = root_pasta.run("-F", str(fd), "--netns", wrong.path, host=host, pass_fds=(fd,))
    assert done.returncode == 1
    assert done.stderr == f"Invalid --fd: {fd} (its interface {NAME} is not in {wrong.path})\n"
