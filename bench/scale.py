"""`python -m bench.scale [--connections N,...] [--forwarded] [--machine]`: what connections cost when there are many.

A guest of pasta opens connections to another host, up to one number after another, and leaves them open. With
`--forwarded`, the other host opens them to ports of the guest. At each number, the table has what the daemon holds for
each connection, the processor time that the last ones have cost it, that of a round trip of one byte, which go through
all connections in turn, and that of some seconds in which nothing happens. At last all are closed.

The limit of descriptors must be higher than the number of connections. `--machine` runs it in an emulated machine,
where the limit is high, and a microsecond is a thousand instructions (`bench/scale_machine.py`). `--peer` adds another
checkout of this project, or a build of the original, with its libraries in a folder `lib` if it needs others.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
import time
from collections.abc import Sequence

from .contenders import CONTENDERS, Seat, peer, seated
from .lab import HOST, PEER, Lab, LabError, Used, enter, resident_kib, used_by, wait_for

PORTS = range(20000, 20010)  # of the server: a client has some 28000 ports for each of them
TCP, UDP = "tcp", "udp"
CLIENT_TIMEOUT = 10.0
EXPIRED = 600.0  # s, in which UDP flows have to end
ROUND_TRIPS = 5000  # at least, so that a tick of 10 ms is a small part of what they cost
ASK_TIMEOUT = 600.0
REST, REST_TIMEOUT = 0.5, 60.0  # s
LOST = 5.0  # s, in which the guest sends a FIN again that a full queue has dropped
COLUMNS = ("connections", "descriptors", "bytes", "us to open", "of it user", "us round trip", "of it user", "ms idle")
FORMATS = ("{:11}", "{:11.2f}", "{:5.0f}", "{:10.0f}", "{:10.0f}", "{:13.0f}", "{:10.0f}", "{:7.0f}")


def serve(kind: str, address: str) -> None:
    """Accept all, and echo. A datagram is answered from where it went to, so from the one address."""
    epoll = select.epoll()
    if kind == UDP:
        bound = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in PORTS]
        for sock, port in zip(bound, PORTS, strict=True):
            sock.bind((address, port))
        print("ready", flush=True)
        while True:
            for sock in select.select(bound, [], [])[0]:
                sock.sendto(*sock.recvfrom(64))
    listeners = {}
    for port in PORTS:
        listener = socket.create_server((address, port), backlog=4096)
        listener.setblocking(False)
        listeners[listener.fileno()] = listener
        epoll.register(listener, select.EPOLLIN)
    conns: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        for fd, _ in epoll.poll():
            if fd in listeners:
                sock, _ = listeners[fd].accept()
                conns[sock.fileno()] = sock
                epoll.register(sock, select.EPOLLIN)
            elif data := conns[fd].recv(64):
                conns[fd].send(data)
            else:
                conns.pop(fd).close()


def client(kind: str, server: str) -> None:
    """On each line "open N", "echo N" or "close N" of the standard input, do so, and say "done"."""
    conns: list[socket.socket] = []
    at = 0

    def echo(conn: socket.socket) -> None:
        conn.send(b"x")
        if conn.recv(64) != b"x":
            raise SystemExit("no echo")

    print("done", flush=True)
    for line in sys.stdin:
        what, number = line.split()
        for _ in range(int(number)):
            if what == "open":
                conn = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == UDP else socket.SOCK_STREAM)
                conn.settimeout(CLIENT_TIMEOUT)
                conn.connect((server, PORTS[len(conns) % len(PORTS)]))
                if kind == UDP:
                    echo(conn)  # a flow begins with a datagram
                conns.append(conn)
            elif what == "close":
                conns.pop().close()
            else:
                at = (at + 1) % len(conns)
                echo(conns[at])
        print("done", flush=True)


def descriptors(pid: int) -> int:
    """How many the process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def rest(pid: int, still: float = REST) -> None:
    """Return when the process has done what it had to: its end of a connection comes after the client's."""
    deadline = time.monotonic() + REST_TIMEOUT
    before, now = None, (used_by(pid), descriptors(pid))
    while now != before and time.monotonic() < deadline:
        time.sleep(still)
        before, now = now, (used_by(pid), descriptors(pid))


class Load:
    """A client and its server, at the two ends of a daemon."""

    def __init__(self, lab: Lab, seat: Seat, forwarded: bool, kind: str = TCP) -> None:
        assert seat.daemon is not None
        self.pid = seat.daemon.pid
        at_server, at_client, server = (seat.guest, lab.peer, HOST) if forwarded else (lab.peer, seat.guest, PEER)
        listening = lab.spawn([sys.executable, "-m", "bench.scale", "serve", kind, server], at_server)
        wait_for(listening, "ready")
        command = [sys.executable, "-m", "bench.scale", "client", kind, server]
        self._client = lab.spawn(command, at_client, talks=True)
        wait_for(self._client, "done")
        self._processes = (self._client, listening)
        self._lab = lab

    def ask(self, what: str, number: int) -> Used:
        """Let the client do something; returns the processor time of the daemon, of all together."""
        before = used_by(self.pid)
        assert self._client.stdin is not None
        self._client.stdin.write(f"{what} {number}\n")
        self._client.stdin.flush()
        wait_for(self._client, "done", timeout=ASK_TIMEOUT)
        rest(self.pid)
        return used_by(self.pid).since(before)

    def idle(self, seconds: float) -> float:
        """The processor time of the daemon in so many seconds without work, in seconds."""
        before = used_by(self.pid)
        time.sleep(seconds)
        return used_by(self.pid).since(before).total

    def stop(self) -> None:
        """End both."""
        for process in self._processes:
            self._lab.stop(process)


def measure(load: Load, numbers: Sequence[int], idle: float) -> tuple[int, int]:
    """Print the table of one daemon. Returns what it held before, for `end` and `expire`: descriptors, KiB."""
    pid = load.pid
    load.ask("open", 1)
    load.ask("echo", ROUND_TRIPS)  # what is loaded and grown at the first use is no cost of many
    fds, resident = descriptors(pid), resident_kib(pid)
    print("  ".join(COLUMNS))
    total = 0
    for number in numbers:
        opened = load.ask("open", number - total)
        step, total = number - total, number
        exchanges = max(ROUND_TRIPS, total)
        echoed = load.ask("echo", exchanges)
        held = ((descriptors(pid) - fds) / total, 1024 * (resident_kib(pid) - resident) / total)
        costs = (*(1e6 * used / step for used in opened), *(1e6 * used / exchanges for used in echoed))
        row = (total, *held, *costs, 1e3 * load.idle(idle))
        print("  ".join(map(str.format, FORMATS, row)), flush=True)
    return fds, resident


def end(load: Load, total: int, fds: int, resident: int) -> None:
    """Close all connections, and print what that has cost and left."""
    closed = (1e6 * used / total for used in load.ask("close", total))
    rest(load.pid, LOST)
    left = descriptors(load.pid) - fds, 1024 * (resident_kib(load.pid) - resident) / total
    print(
        "all are closed: {:.0f} us for each, {:.0f} of it user, {:+} descriptors, {:.0f} bytes each".format(
            *closed, *left
        )
    )


def expire(load: Load, total: int, fds: int) -> None:
    """Print when UDP flows have ended by themselves."""
    begun = time.monotonic()
    load.ask("echo", total)
    full, before = descriptors(load.pid), used_by(load.pid)
    first = last = exchanged = time.monotonic()
    while (now := descriptors(load.pid)) > fds and time.monotonic() < exchanged + EXPIRED:
        time.sleep(1)
        first = time.monotonic() if now == full else first
        last = time.monotonic()
    each = 1e6 * used_by(load.pid).since(before).total / total
    print(f"flows begin to end {first - begun:.0f} s after the first datagram of the last exchange, and all have ended")
    print(f"{last - exchanged:.0f} s after the last one: {now - fds:+} descriptors, {each:.0f} us for each")


def numbers_of(text: str) -> list[int]:
    """Rising numbers with commas between them."""
    numbers = [int(number) for number in text.split(",")]
    if not numbers or numbers[0] < 1 or numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{text}: give rising numbers")
    return numbers


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=numbers_of, default=[1000, 5000, 10_000], metavar="N,...")
    parser.add_argument("--forwarded", action="store_true", help="from the other host to the guest")
    parser.add_argument("--udp", action="store_true", help="UDP flows; they end when their time is over")
    parser.add_argument("--idle", type=float, default=10.0, metavar="S", help="seconds without work at each number")
    parser.add_argument("--machine", action="store_true", help="in an emulated machine with high limits")
    parser.add_argument("--contenders", default="ours", metavar="NAME,...")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="another daemon")
    return parser.parse_args(argv)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["client"]:
        client(*sys.argv[2:])
        return
    asked = arguments(sys.argv[1:])
    names = asked.contenders.split(",")
    contenders = [*(c for c in CONTENDERS if c.name in names), *map(peer, asked.peer)]
    if asked.machine:
        from . import scale_machine

        sys.exit(scale_machine.run([a for a in sys.argv[1:] if a != "--machine"], contenders))
    enter("bench.scale", sys.argv[1:])
    ports = f"{PORTS[0]}-{PORTS[-1]}" if asked.forwarded else "none"
    with Lab() as lab:
        for contender in contenders:
            print(f"\n{contender.label}:")
            with seated(lab, contender, 65520, ports) as seat:
                load = Load(lab, seat, asked.forwarded, UDP if asked.udp else TCP)
                fds, resident = measure(load, asked.connections, asked.idle)
                if asked.udp:
                    expire(load, asked.connections[-1], fds)
                else:
                    end(load, asked.connections[-1], fds, resident)
                load.stop()


if __name__ == "__main__":
    try:
        main()
    except LabError as e:
        raise SystemExit(f"bench: {e}") from None
