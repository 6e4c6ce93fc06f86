"""Observations at both ends of a connection while the daemon between them is stopped for moments: `adverse_stopped`.

Each observation runs between `near`, in the guest, and `far`, beyond the host; on the bare kernel `near` is on the
host. It returns what both saw, which must be what they see on the bare kernel, and milliseconds, which are compared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

STOP = 0.05  # s that the daemon does nothing
STOPS = 3  # times in a transfer
SIZE = 512 << 10  # bytes of a transfer, each way
BLOCK = b"0123456789" * 100
LONG, MUCH = BLOCK * 200, BLOCK * 16000
SILENCE = 0.3  # s to wait for an answer that must not come
PART_TIME = 0.001  # s between the parts of an answer

Seen = list[Any]
Times = dict[str, float]
Observation = tuple[Seen, Times]


@dataclass(slots=True)
class Way:
    """Where a connection runs, in which direction it is made, and the daemon in between, if there is one."""

    make: Callable[[bool, int, int], socket.socket]  # near?, family, type
    outbound: bool
    server: str  # the address that the server binds
    port: int  # 0: any
    client: str  # the address that the client connects to
    refused: str  # addresses beyond the far end: routers refuse the one, and drop what is for the other
    dropped: str
    mtu: int
    spread: float  # s between stops, at most
    timeout: float  # s without a byte
    daemon: int | None = None
    stopped_for: float = 0.0  # s in all
    chance: random.Random = field(default_factory=random.Random)

    def new(self, near: bool, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A new one at that end."""
        made = self.make(near, socket.AF_INET6 if ":" in self.client else socket.AF_INET, kind)
        made.settimeout(self.timeout)
        return made

    def listener(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """The server's socket."""
        made = self.new(not self.outbound, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.server, self.port))
        if kind == socket.SOCK_STREAM:
            made.listen(64)
        return made

    @contextlib.contextmanager
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """(near, far), connected."""
        with self.listener() as listener:
            client = self.new(self.outbound)
            client.connect((self.client, listener.getsockname()[1]))
            server = listener.accept()[0]
        server.settimeout(self.timeout)
        with client, server:
            yield (client, server) if self.outbound else (server, client)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The daemon does nothing meanwhile, for STOP at least: what is sent arrives there, or waits before it."""
        begin = time.monotonic()
        self._signal(signal.SIGSTOP)
        try:
            yield
            time.sleep(max(begin + STOP - time.monotonic(), 0))
        finally:
            self._signal(signal.SIGCONT)
            if self.daemon:
                self.stopped_for += time.monotonic() - begin

    @contextlib.contextmanager
    def often_stopped(self) -> Iterator[None]:
        """The daemon is stopped at random moments meanwhile."""
        moments = [self.chance.uniform(0, self.spread) for _ in range(STOPS)]

        def run() -> None:
            for moment in moments:
                time.sleep(moment)
                with self.stopped():
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _signal(self, number: int) -> None:
        if self.daemon:
            os.kill(self.daemon, number)


class Reader(threading.Thread):
    """Reads everything up to the end: the digest, how it ended, and the longest time without a byte."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock, self.end, self.size, self.gap = sock, "", 0, 0.0
        self._digest = sha256()
        self.start()

    def run(self) -> None:
        """Until the end."""
        last = time.monotonic()
        try:
            while data := self.sock.recv(1 << 16):
                now = time.monotonic()
                self.gap, last = max(self.gap, now - last), now
                self._digest.update(data)
                self.size += len(data)
            self.end = "end"
        except OSError as e:
            self.end = name_of(e)

    def seen(self) -> Seen:
        """How many bytes, and how they ended."""
        self.join()
        return [self.size, self.end]

    def seen_of(self, data: bytes) -> Seen:
        """Whether all of `data` came, or nothing else than it, and how that ended."""
        self.join()
        right = sha256(data[: self.size]).digest() == self._digest.digest()
        return [("all" if self.size == len(data) else "its beginning") if right else "something else", self.end]


def name_of(e: OSError) -> str:
    """The errno; a time-out of ours has none."""
    return errno.errorcode[e.errno] if e.errno else "nothing"


def seen(sock: socket.socket) -> Seen:
    """Everything that a reader gets: how many bytes, and how they ended."""
    return Reader(sock).seen()


def reset(sock: socket.socket) -> None:
    """Close it by RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def written(sock: socket.socket) -> str:
    """The errno of a writer that goes on until it gets one."""
    end = time.monotonic() + (sock.gettimeout() or 0)
    while time.monotonic() < end:
        try:
            sock.send(b"more")
        except OSError as e:
            return name_of(e)
        time.sleep(0.005)
    return "nothing"


def _sent(sock: socket.socket, data: bytes, then: Callable[[socket.socket], None]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)
            then(sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _finish(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


# Streams --------------------------------------------------------------------------------------------------------------


def bulk(way: Way) -> Observation:
    """SIZE bytes each way at once; each side ends its own."""
    up, down = way.chance.randbytes(SIZE), way.chance.randbytes(SIZE)
    with way.pair() as (near, far):
        begin, before = time.monotonic(), way.stopped_for
        with way.often_stopped():
            threads = [_sent(near, up, _finish), _sent(far, down, _finish)]
            readers = [Reader(near), Reader(far)]
            found = [readers[0].seen_of(down), readers[1].seen_of(up)]
            took, stops = time.monotonic() - begin, way.stopped_for - before
        for thread in threads:
            thread.join()
    return found, {"time": 1e3 * (took - stops), "stopped": 1e3 * stops, "gap": 1e3 * max(r.gap for r in readers)}


def two_parts(way: Way) -> Observation:
    """Answers in two writes, without Nagle's algorithm: the median."""
    return _exchanges(way, 15, b"?" * 64, [b"a" * 100, b"b" * 100], hurry=True)


def two_parts_nagle(way: Way) -> Observation:
    """The same, where the second part waits for an acknowledgement of the first."""
    return _exchanges(way, 5, b"?" * 64, [b"a" * 100, b"b" * 100], hurry=False)


def small(way: Way) -> Observation:
    """A byte there and back: the median."""
    return _exchanges(way, 30, b"?", [b"!"], hurry=True)


def _exchanges(way: Way, count: int, question: bytes, answer: list[bytes], *, hurry: bool) -> Observation:
    size, times, got = sum(map(len, answer)), [], 0
    with way.pair() as pair:
        client, server = pair if way.outbound else pair[::-1]
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, hurry)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while server.recv(4096):
                    for n, part in enumerate(answer):
                        time.sleep(PART_TIME if n else 0)
                        server.sendall(part)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for _ in range(count):
            begin = time.monotonic()
            client.sendall(question)
            had = got
            while got < had + size and (data := client.recv(4096)):
                got += len(data)
            times.append(time.monotonic() - begin)
        client.close()
        thread.join()
    return [got], {"median": 1e3 * statistics.median(times)}


def half_closes(way: Way) -> Observation:
    """Either side ends first; the other one sends everything after that."""
    found: Seen = []
    for near_first in (True, False):
        with way.pair() as pair:
            first, second = pair if near_first else pair[::-1]
            with way.stopped():
                first.sendall(BLOCK)
                _finish(first)
            found += seen(second)
            with way.stopped():
                _sent(second, LONG, _finish)
            found += Reader(first).seen_of(LONG)
    return found, {}


def many(way: Way) -> Observation:
    """Connections that come all at once, and are closed behind their answer: those that had one."""
    found = 0
    with way.listener() as listener:
        clients = [way.new(way.outbound) for _ in range(20)]
        begin = time.monotonic()
        with way.stopped():
            for client in clients:
                client.setblocking(False)
                client.connect_ex((way.client, listener.getsockname()[1]))
        for _ in clients:
            accepted = listener.accept()[0]
            accepted.sendall(BLOCK)
            accepted.close()
        for client in clients:
            client.settimeout(way.timeout)
            found += seen(client) == [len(BLOCK), "end"]
            client.close()
    return [found], {"time": 1e3 * (time.monotonic() - begin)}


# Ends -----------------------------------------------------------------------------------------------------------------


def _acting(way: Way, act: Callable[[Way, socket.socket, socket.socket], Seen]) -> Observation:
    """`act` by the near end, then by the far one."""
    found: Seen = []
    for near_acts in (True, False):
        with way.pair() as pair:
            found.append(act(way, *(pair if near_acts else pair[::-1])))
    return found, {}


def _data_and_end(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        actor.close()
    return seen(other)


def _data_and_reset(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        reset(actor)
    return seen(other)


def _end_and_reset(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        _finish(actor)
        reset(actor)
    return [*seen(other), written(other)]


def _reset_while_reading(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    """Much is on its way. How much of it arrives is a matter of moments."""
    reader = Reader(other)
    actor.setblocking(False)
    end, data = time.monotonic() + way.chance.uniform(0, 0.02), MUCH
    while data and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            data = data[actor.send(data[: 1 << 16]) :]
    with way.stopped():
        reset(actor)
    came, how = reader.seen_of(MUCH)
    return [came != "something else", how]


def _reset_while_writing(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    """The other end writes more than fits; its window has closed."""
    other.settimeout(way.chance.uniform(0, 0.02))
    with contextlib.suppress(TimeoutError):
        other.sendall(MUCH)
    other.settimeout(way.timeout)
    with way.stopped():
        reset(actor)
    try:
        other.sendall(MUCH)
    except OSError as e:
        return [name_of(e)]
    return ["sent"]


def _close_with_unread_data(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    other.sendall(BLOCK)
    actor.recv(1, socket.MSG_PEEK)
    with way.stopped():
        actor.sendall(BLOCK)
        actor.close()
    return seen(other)


def _close_with_much_to_send(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    _sent(actor, LONG, socket.socket.close)
    with way.stopped():
        pass
    return Reader(other).seen_of(LONG)


def _write_after_a_reset(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    """The other end writes to what was closed long ago. It gets the error once, then EPIPE."""
    with way.stopped():
        reset(actor)
    return [written(other), written(other)]


# Connecting -----------------------------------------------------------------------------------------------------------


def connect_errors(way: Way) -> Observation:
    """A closed port, a router that refuses, and one that says nothing."""
    found: Seen = []
    times: Times = {}
    addresses = {"closed": way.client, "refused": way.refused, "dropped": way.dropped} if way.outbound else {}
    for what, address in addresses.items():
        with way.new(True) as client:
            client.settimeout(SILENCE if what == "dropped" else way.timeout)
            begin = time.monotonic()
            try:
                client.connect((address, 9))
                found.append("connected")
            except OSError as e:
                found.append(name_of(e))
            times[what] = 1e3 * (time.monotonic() - begin)
    return found, times


# Datagrams ------------------------------------------------------------------------------------------------------------


def datagrams(way: Way) -> Observation:
    """Of 1 byte, one MTU of the guest, and 8 KiB, sent at once while the daemon is stopped, and answered in order."""
    found: Seen = []
    with way.listener(socket.SOCK_DGRAM) as server, way.new(way.outbound, socket.SOCK_DGRAM) as client:
        client.connect((way.client, server.getsockname()[1]))
        begin = time.monotonic()
        for size in (1, way.mtu - (48 if ":" in way.client else 28), 8192):
            batch = [bytes([n]) * size for n in range(max(2, min(8, (64 << 10) // size)))]
            with way.stopped():
                for data in batch:
                    client.send(data)
            came, at = _received(server, len(batch), way.timeout)
            with way.stopped():
                for data in came:
                    if at:
                        server.sendto(data, at)
            back, _ = _received(client, len(came), way.timeout)
            found += [came == batch, back == batch]
        return found, {"time": 1e3 * (time.monotonic() - begin)}


def _received(sock: socket.socket, count: int, timeout: float) -> tuple[list[bytes], Any]:
    came, at = [], None
    sock.settimeout(timeout / 3)
    with contextlib.suppress(TimeoutError):
        for _ in range(count):
            data, at = sock.recvfrom(1 << 16)
            came.append(data)
    return came, at


ACTS = (
    *(_data_and_end, _data_and_reset, _end_and_reset, _reset_while_reading, _reset_while_writing),
    *(_close_with_unread_data, _close_with_much_to_send, _write_after_a_reset),
)
OBSERVATIONS: dict[str, Callable[[Way], Observation]] = {
    "small": small,  # the first: a cell without it is given up
    "two parts": two_parts,
    "two parts, Nagle": two_parts_nagle,
    "bulk": bulk,
    "half closes": half_closes,
    "many": many,
    **{act.__name__.strip("_").replace("_", " "): partial(_acting, act=act) for act in ACTS},
    "connect errors": connect_errors,
    "datagrams": datagrams,
}
