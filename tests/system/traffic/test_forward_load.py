"""Forwarded ports under load: short connections that end in every way while others carry bulk, and what is left then.

The first byte of a connection selects its kind. Clients of the tap come back at once on the port that they were just
reset on, as a busy client's kernel lets them.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.content import content, digest

from ..support import User, wait_for
from .support import HOST, PEER, Guest, Lan, Namespace, in_thread, read_all

PORT = 7201
BULK = 1 << 27
SIZES = (1, 100, 65_536, 70_000, 500_000)
THREADS = 12
EACH = 25  # conversations of a thread
RESET = b"\1\0\0\0\0\0\0\0"
POOLS = 2 * 128 + 128 + 2 * 32  # descriptors kept for later: sockets of both families, timers, pipes


def close_with_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def serve_one(sock: socket.socket) -> None:
    """Echo, hash, reset in the middle of an answer, or say nothing to the end."""
    with sock, contextlib.suppress(OSError):
        sock.settimeout(30)
        kind = sock.recv(1)
        if kind == b"e":
            while data := sock.recv(100_000):
                sock.sendall(data)
        elif kind == b"h":
            sha = hashlib.sha256()
            while data := sock.recv(1 << 20):
                sha.update(data)
            sock.sendall(sha.digest())
        elif kind == b"r":
            sock.recv(1000)
            sock.sendall(bytes(100_000))
            close_with_reset(sock)
        else:
            read_all(sock)


@contextlib.contextmanager
def served_by(guest: Guest) -> Iterator[None]:
    """A server in the guest, a thread for each connection."""
    server = guest.make_socket()
    server.bind(("0.0.0.0", PORT))
    server.listen(256)
    server.settimeout(None)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve_one, args=(server.accept()[0],), daemon=True).start()

    with in_thread(accept):
        yield
        server.shutdown(socket.SHUT_RDWR)


def echo(client: socket.socket, data: bytes) -> str:
    def write() -> None:
        client.sendall(b"e" + data)
        client.shutdown(socket.SHUT_WR)

    with in_thread(write):
        return "echo" if read_all(client) == data else "wrong echo"


def hashed(client: socket.socket, data: bytes) -> str:
    client.sendall(b"h" + data)
    client.shutdown(socket.SHUT_WR)
    return "hash" if read_all(client) == hashlib.sha256(data).digest() else "wrong hash"


def reset_by_server(client: socket.socket, data: bytes) -> str:
    client.sendall(b"r" + data[:1])
    try:
        read_all(client)
    except ConnectionResetError:
        return "reset"
    return "no reset"


def reset_by_client(client: socket.socket, data: bytes) -> str:
    client.sendall(b"e" + data[:30_000])
    close_with_reset(client)
    return "gone"


def silent(client: socket.socket, data: bytes) -> str:
    client.shutdown(socket.SHUT_WR)
    return "end" if not read_all(client) else "answer to nothing"


MANNERS: tuple[Callable[[socket.socket, bytes], str], ...] = (echo, hashed, reset_by_server, reset_by_client, silent)


def talk(lan: Lan, seed: int) -> collections.Counter[str]:
    """Conversations one after the other: through the tap from one port, or spliced, in any manner."""
    rng = random.Random(seed)
    port = 0
    results = collections.Counter[str]()
    for _ in range(EACH):
        tap = seed % 2
        client = (lan.peer if tap else lan.host).make_socket()
        if tap:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((PEER, port))
        client.connect((HOST if tap else "127.0.0.1", PORT))
        manner = rng.choice(MANNERS)
        port = client.getsockname()[1] if tap and manner in (reset_by_client, reset_by_server) else 0
        results[manner(client, rng.randbytes(rng.choice(SIZES)))] += 1
        client.close()
    return results


def bulk(lan: Lan, path: str) -> bool:
    client = lan.host.connect("127.0.0.1", PORT) if path == "loopback" else lan.peer.connect(HOST, PORT)
    client.sendall(b"h")
    for chunk in content(BULK):
        client.sendall(chunk)
    client.shutdown(socket.SHUT_WR)
    return client.recv(100).hex() == digest(BULK)


def status(pid: int, name: str) -> int:
    """A number of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def loaded_guest(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest of its own: what is left of others is not counted."""
    with lan.pasta(ordinary_user, "-q", "--config-net", "-t", str(PORT), "-u", "none", "-T", "none", "-U", "none") as g:
        yield g
        lan.host.close_sockets()
        lan.peer.close_sockets()


def test_short_connections_of_all_manners_beside_bulk(loaded_guest: Guest, lan: Lan) -> None:
    """Everything arrives as it was sent, and nothing of a conversation is kept when it is over."""
    daemon = loaded_guest.daemon
    before = descriptors(daemon)
    with served_by(loaded_guest):
        with in_thread(bulk, lan, "loopback") as spliced, in_thread(bulk, lan, "tap") as through_tap:
            with ThreadPoolExecutor(THREADS) as threads:
                results = sum(threads.map(lambda seed: talk(lan, seed), range(THREADS)), collections.Counter())
            assert spliced() and through_tap()
        assert set(results) == {"echo", "hash", "reset", "gone", "end"}, results
        assert sum(results.values()) == THREADS * EACH
        resident = status(daemon, "VmRSS")
        wait_for(lambda: descriptors(daemon) <= before + POOLS, "sockets to be closed")
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda seed: talk(lan, seed), range(THREADS, 2 * THREADS)))
        wait_for(lambda: descriptors(daemon) <= before + POOLS, "sockets to be closed again")
        assert status(daemon, "Threads") == 2  # the loop, and the one that opens sockets in the namespace
        assert status(daemon, "VmRSS") < resident + 4096, "KiB: as much again would be the sign of a leak"


def test_clients_killed_in_the_middle(loaded_guest: Guest, lan: Lan) -> None:
    """Their connections end on both sides, and all others go on."""

    def established(where: Namespace) -> int:
        """Connections to PORT, at the server's side of them."""
        return where.run("ss", "-Htn", "state", "established", "sport", "=", f":{PORT}").stdout.count("\n")

    flood = f"for i in 1 2 3 4 5 6 7 8; do (printf e; cat /dev/zero) | socat -u - TCP:$0:{PORT} & done; wait"
    with served_by(loaded_guest):
        other = lan.host.connect("127.0.0.1", PORT)
        other.sendall(b"e1")
        assert other.recv(1) == b"1"
        for where, address in ((lan.host, "127.0.0.1"), (lan.peer, HOST)):
            with where.popen("sh", "-c", flood, address, start_new_session=True) as process:
                wait_for(lambda: established(loaded_guest) == 9, "connections")
                os.killpg(process.pid, signal.SIGKILL)
            wait_for(lambda: established(lan.host) == established(loaded_guest) == 1, "the end of the connections")
        other.sendall(b"2")
        assert other.recv(1) == b"2"
