"""`python -m bench.scale [--connections N] [--step N] [--peer NAME=PATH]`: what connections cost when there are many.

A guest of pasta opens connections to another host, step by step, and leaves them open. After each step the table has
what the daemon holds, what the step has cost it in user time, and what round trips of one byte cost that go through
all connections in turn. The limit of descriptors must be higher than the number of connections. `--peer` adds another
checkout of this project, or a build of the original.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
from pathlib import Path

from .contenders import CONTENDERS, Contender, peer, seated
from .lab import PEER, Lab, LabError, enter, resident_kib, wait_for

PORTS = range(20000, 20010)  # of the server: a client has some 28000 ports for each of them
ROUND_TRIPS = 5000  # so that a tick of 10 ms is a small part of what they cost


def serve() -> None:
    """Accept all, and echo."""
    epoll = select.epoll()
    listeners = {}
    for port in PORTS:
        listener = socket.create_server((PEER, port), backlog=4096)
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


def client() -> None:
    """On each line "open N" or "echo N" of the standard input, do so, and say "done"."""
    conns: list[socket.socket] = []
    at = 0
    print("done", flush=True)
    for line in sys.stdin:
        what, number = line.split()
        for _ in range(int(number)):
            if what == "open":
                conns.append(socket.create_connection((PEER, PORTS[len(conns) % len(PORTS)]), timeout=10))
            else:
                at = (at + 1) % len(conns)
                conns[at].send(b"x")
                if conns[at].recv(64) != b"x":
                    raise SystemExit("no echo")
        print("done", flush=True)


def user_seconds(pid: int) -> float:
    """Time of `pid` in user mode, in ticks of the kernel."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")


def figures(pid: int) -> tuple[int, int, float]:
    """Descriptors, resident KiB, seconds in user mode."""
    return len(os.listdir(f"/proc/{pid}/fd")), resident_kib(pid), user_seconds(pid)


def measure(lab: Lab, contender: Contender, connections: int, step: int) -> None:
    """Print the table of one daemon."""
    with seated(lab, contender, 65520) as seat:
        assert seat.daemon is not None
        pid = seat.daemon.pid
        load = lab.spawn([sys.executable, "-m", "bench.scale", "client"], seat.guest, talks=True)
        wait_for(load, "done")

        def ask(what: str, number: int) -> float:
            """Let the client do something; returns user time of the daemon."""
            before = user_seconds(pid)
            assert load.stdin is not None
            load.stdin.write(f"{what} {number}\n")
            load.stdin.flush()
            wait_for(load, "done", timeout=300)
            return user_seconds(pid) - before

        ask("open", 1)
        ask("echo", ROUND_TRIPS)  # what is loaded and grown at the first use is no cost of many
        fds, resident, _ = figures(pid)
        print("connections  descriptors each  bytes resident each  us user to open one  us user for a round trip")
        for total in range(step, connections + 1, step):
            opened = ask("open", step)
            echoed = ask("echo", ROUND_TRIPS)
            now_fds, now_resident, _ = figures(pid)
            each = (now_fds - fds) / total, 1024 * (now_resident - resident) / total
            costs = 1e6 * opened / step, 1e6 * echoed / ROUND_TRIPS
            print(f"{total:11}  {each[0]:16.2f}  {each[1]:19.0f}  {costs[0]:19.0f}  {costs[1]:24.0f}", flush=True)
        lab.stop(load)


def main() -> None:
    roles = {"serve": serve, "client": client}
    if sys.argv[1:2] and sys.argv[1] in roles:
        roles[sys.argv[1]]()
        return
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--step", type=int, default=1000)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="another daemon")
    arguments = parser.parse_args()
    enter("bench.scale", sys.argv[1:])
    contenders = [CONTENDERS[0], *map(peer, arguments.peer)]
    with Lab() as lab:
        server = lab.spawn([sys.executable, "-m", "bench.scale", "serve"], lab.peer)
        wait_for(server, "ready")
        for contender in contenders:
            print(f"\n{contender.label}:")
            measure(lab, contender, arguments.connections, arguments.step)


if __name__ == "__main__":
    try:
        main()
    except LabError as e:
        raise SystemExit(f"bench: {e}") from None
