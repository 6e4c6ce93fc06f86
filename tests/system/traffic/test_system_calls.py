"""System calls of the daemon for a transaction: a number, no time. docs/performance.md has them in a table.

One call more costs about a microsecond of each transaction, which no other test would notice. strace(1) counts, for one
transaction at a time and without busy-polling, so that each wait for an event is one call.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from ..support import REPOSITORY, User
from .support import GATEWAY, PASTA, Guest, Lan

pytestmark = pytest.mark.alone  # where an answer is late, its acknowledgement goes alone
COUNT = 100  # transactions of a sample
PORT = 7301
TABLE = REPOSITORY / "docs" / "performance.md"
COUNTED = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.M)  # of strace -c: calls, name
IGNORED = "total", "futex"  # the latter is of threads that wait for each other, and not of a transaction
ROW = re.compile(r"^\| (\w[\w ]+) \| ([\d.]+) \|$", re.M)
SAMPLES = 10  # at most, and the least counts: on a busy machine there are more timers and acknowledgements
TOLERANCE = 0.15  # of the number: less than one call of a round trip
CONNECTION_TOLERANCE = 0.25  # on a slow machine a connection waits more often, and for other things: 4 to 5 calls more

Transaction = Callable[[], None]


@contextlib.contextmanager
def counted(pid: int) -> Iterator[Counter[str]]:
    """The system calls that a process makes meanwhile."""
    calls: Counter[str] = Counter()
    command = ["strace", "-f", "-c", "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in (first := strace.stderr.readline()), first
        try:
            yield calls
        finally:
            strace.send_signal(signal.SIGINT)
            said = strace.stderr.read()
    calls.update({name: int(number) for number, name in COUNTED.findall(said) if name not in IGNORED})
    assert calls, said


@contextlib.contextmanager
def round_trips(lan: Lan, guest: Guest) -> Iterator[Transaction]:
    """One byte there and back on a standing connection."""
    listening = lan.host.listen("127.0.0.1")
    client = guest.connect(GATEWAY, listening.getsockname()[1])
    server = listening.accept()[0]
    for sock in (client, server):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def once() -> None:
        client.sendall(b"x")
        server.recv(64)
        server.sendall(b"x")
        client.recv(64)

    with listening, client, server:
        yield once


@contextlib.contextmanager
def datagrams(lan: Lan, guest: Guest) -> Iterator[Transaction]:
    """One datagram there and back."""
    server = lan.host.listen("127.0.0.1", socket.SOCK_DGRAM)
    client = guest.connect(GATEWAY, server.getsockname()[1], socket.SOCK_DGRAM)

    def once() -> None:
        client.send(b"x")
        data, sender = server.recvfrom(64)
        server.sendto(data, sender)
        client.recv(64)

    with server, client:
        yield once


@contextlib.contextmanager
def connections(lan: Lan, guest: Guest) -> Iterator[Transaction]:
    """Connect, one byte there and back, and the end, from the server first."""
    listening = lan.host.listen("127.0.0.1")
    port = listening.getsockname()[1]

    def once() -> None:
        with guest.connect(GATEWAY, port) as client:
            client.sendall(b"x")
            with listening.accept()[0] as server:
                server.recv(64)
                server.sendall(b"x")
            assert client.recv(64) == b"x" and client.recv(64) == b""

    with listening:
        yield once


@contextlib.contextmanager
def spliced_connections(lan: Lan, guest: Guest) -> Iterator[Transaction]:
    """The same from loopback to loopback."""
    listening = guest.make_socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("0.0.0.0", PORT))
    listening.listen(16)

    def once() -> None:
        with lan.host.connect("127.0.0.1", PORT) as client:
            client.sendall(b"x")
            with listening.accept()[0] as server:
                server.recv(64)
                server.sendall(b"x")
            assert client.recv(64) == b"x" and client.recv(64) == b""

    with listening:
        yield once


KINDS = {
    "TCP round trip": round_trips,
    "UDP round trip": datagrams,
    "TCP connection": connections,
    "spliced TCP connection": spliced_connections,
}


@pytest.fixture(scope="module")
def measured(lan: Lan, root: User) -> Iterator[Guest]:
    """A guest whose daemon root may trace."""
    options = ("-q", "--config-net", "-t", str(PORT), "-u", "none", "-T", "none", "-U", "none")
    with lan.pasta(root, *options, *(() if PASTA else ("--busy-poll", "0"))) as guest:
        yield guest


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_a_transaction(lan: Lan, measured: Guest, kind: str) -> None:
    tolerance = CONNECTION_TOLERANCE if "connection" in kind else TOLERANCE
    expected = pytest.approx(float(dict(ROW.findall(TABLE.read_text()))[kind]), rel=tolerance)
    with KINDS[kind](lan, measured) as once:
        for _ in range(8):
            once()
        samples = []
        for _ in range(SAMPLES):
            with counted(measured.daemon) as calls:
                for _ in range(COUNT):
                    once()
            samples.append(calls)
            if calls.total() / COUNT == expected:
                break
    least = min(samples, key=Counter.total)
    each = {name: round(number / COUNT, 1) for name, number in least.most_common()}
    print(f"{kind}: {least.total() / COUNT:.1f}")
    assert least.total() / COUNT == expected, each
