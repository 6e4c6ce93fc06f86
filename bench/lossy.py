"""Transfers over a guest's link that loses or delays frames: the rows of docs/reliability.md.

    python -m bench.lossy [--contenders ours pasta] [--peer NAME=PATH] [--seeds N] [--only WORD ...]

The guest is a namespace behind `bench.faulty_link`, at passt's socket; the server is on the peer. A transfer counts if
its SHA-256 is right. Each row gives the time of all seeds (median and worst) and the longest gap between two arrivals.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .contenders import CONTENDERS, Contender, peer
from .faulty_link import control
from .lab import GATEWAY, HOST, PEER, ROOT, Lab, LabError, Namespace, enter, wait_for
from .vm import _wait_for_socket

PORT = 5500
MTU = 1500
LIMIT = 30.0  # s for one transfer
SIZE = 16 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of transfer, and the rules of both directions."""

    name: str
    way: str  # "up", "down"
    size: int = SIZE
    up: dict[str, Any] = field(default_factory=dict)
    down: dict[str, Any] = field(default_factory=dict)


ROWS = [
    Row("no loss up", "up"),
    Row("no loss down", "down"),
    *(
        Row(f"loss {p} % {way}", way, up={"drop": p / 100}, down={"drop": p / 100})
        for p in (0.1, 1, 5)
        for way in ("up", "down")
    ),
    *(
        Row(f"delay {ms} ms {way}", way, up={"delay": ms / 1e3}, down={"delay": ms / 1e3})
        for ms in (5, 25, 50)
        for way in ("up", "down")
    ),
    *(
        Row(f"delay 25 ms, loss 1 % {way}", way, up={"delay": 0.025, "drop": 0.01}, down={"delay": 0.025, "drop": 0.01})
        for way in ("up", "down")
    ),
    *(
        Row(f"first {n} {kind} to the guest lost", "down", 100, down={"lose": {kind: n}})
        for kind in ("syn", "data", "fin")
        for n in (1, 2)
    ),
    *(Row(f"first {kind} of the guest lost", "up", 100, up={"lose": {kind: 1}}) for kind in ("syn", "data")),
]


def serve() -> None:
    """For each client: `up` takes bytes, and answers by their digest and gap; `down` sends what is asked for."""
    listener = socket.create_server(("0.0.0.0", PORT), backlog=64)
    print("ready", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_served, args=(sock,), daemon=True).start()


def _served(sock: socket.socket) -> None:
    with sock:
        way, size = sock.recv(64).split()
        if way == b"down":
            sock.sendall(os.urandom(1 << 20) * (int(size) >> 20) or b"x" * int(size))
            return
        sock.sendall(b"go\n")
        digest, gap = _received(sock, int(size))
        sock.sendall(json.dumps({"digest": digest, "gap": gap}).encode())


def _received(sock: socket.socket, size: int = 1 << 62) -> tuple[str, float]:
    """Digest of `size` bytes, or of everything up to the end, and the longest gap."""
    total, gap, last, got = hashlib.sha256(), 0.0, time.monotonic(), 0
    while got < size and (data := sock.recv(1 << 18)):
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        total.update(data)
        got += len(data)
    return total.hexdigest(), max(gap, time.monotonic() - last)


def transfer(way: str, size: int, address: str) -> None:
    """One transfer, in the guest; the result is printed."""
    begin = time.monotonic()
    with socket.create_connection((address, PORT), timeout=LIMIT) as sock:
        connected = time.monotonic() - begin
        sock.sendall(f"{way} {size}".encode().ljust(64))
        if way == "up":
            sock.recv(3)
            data = os.urandom(size)
            sock.sendall(data)
            answer = json.loads(b"".join(iter(lambda: sock.recv(4096), b"")))
            gap, right = answer["gap"], answer["digest"] == hashlib.sha256(data).hexdigest()
        else:
            _, gap = _received(sock)
            right = True
        print(json.dumps({"time": time.monotonic() - begin, "gap": gap, "connect": connected, "right": right}))


@contextmanager
def seated(lab: Lab, contender: Contender, mtu: int) -> Iterator[tuple[Namespace, str]]:
    """A guest behind the link, and where its rules are set."""
    assert contender.serve is not None
    with tempfile.TemporaryDirectory() as directory, lab.guest() as guest:
        os.chmod(directory, 0o755)
        path = f"{directory}/socket"
        daemon = lab.spawn(contender.serve(path, mtu))
        try:
            _wait_for_socket(path, contender.name, daemon)
            relay = [sys.executable, "-m", "bench.faulty_link", path, "tap0", str(mtu), f"{directory}/rule"]
            link = lab.spawn(relay, guest)
            try:
                wait_for(link, "ready")
                guest.run(["ip", "address", "add", f"{HOST}/24", "dev", "tap0"])
                guest.run(["ip", "route", "add", "default", "via", GATEWAY])
                yield guest, f"{directory}/rule"
            finally:
                lab.stop(link)
        finally:
            lab.stop(daemon)


def measure(lab: Lab, contender: Contender, row: Row, seeds: int, mtu: int) -> str:
    """The figures of one row, on a line."""
    times, gaps, failed = [], [], 0
    with seated(lab, contender, mtu) as (guest, rule):
        for seed in range(1, seeds + 1):
            for way, faults in (("up", row.up), ("down", row.down)):
                control(rule, way, {**faults, "seed": seed})
            command = [sys.executable, "-m", "bench.lossy", "--transfer", row.way, str(row.size), PEER]
            try:
                done = json.loads(guest.run(command, timeout=LIMIT))
            except LabError as e:
                failed += 1
                print(f"    seed {seed}: {e}")
                continue
            failed += not done["right"]
            times.append(done["time"])
            gaps.append(done["gap"])
    if not times:
        return f"failed {failed}"
    rate = f"{row.size / statistics.median(times) / 1e6:6.1f} MB/s" if row.size >= 1 << 20 else ""
    return (
        f"median {statistics.median(times):7.3f} s  worst {max(times):7.3f} s  longest gap {max(gaps):6.3f} s  {rate}"
        f"  failed {failed} of {seeds}"
    )


def main() -> None:
    """Measure, or be the server or the client of a measurement."""
    if sys.argv[1:2] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--transfer"]:
        transfer(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        _main()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lossy", description=__doc__)
    parser.add_argument("--contenders", nargs="+", default=["ours", "pasta"])
    parser.add_argument("--peer", action="append", default=[], type=peer)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--mtu", type=int, default=MTU)
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    enter("bench.lossy", sys.argv[1:])
    known = {c.name: c for c in CONTENDERS} | {c.name: c for c in args.peer}
    chosen = [known[name] for name in args.contenders] + args.peer
    with Lab() as lab:
        server = lab.spawn([sys.executable, "-m", "bench.lossy", "--serve"], lab.peer)
        wait_for(server, "ready")
        for row in ROWS:
            if any(word in row.name for word in args.only):
                for contender in chosen:
                    figures = measure(lab, contender, row, args.seeds, args.mtu)
                    print(f"{row.name:32} {contender.name:10} {figures}", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
