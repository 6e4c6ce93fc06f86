"""What is measured: the rows of the table, and how one sample of each comes about.

A row has a server (in the host namespace on its loopback, or in the peer) and a client in the guest. Every sample
starts its own server and client, lasts `seconds`, and notes the daemon's processor time around the client's life.
Directions are named from the guest: "out" is guest to host, "in" is host to guest; the guest always opens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .contenders import Contender, Seat
from .lab import Lab, LabError, Namespace, Placement, cpu_seconds, resident_kib, wait_for

LOAD = [sys.executable, "-S", "-E", str(Path(__file__).with_name("load.py"))]
IPERF_PORT = 5201
GRACE = 8.0  # seconds beyond its own time after which a client is given up

BIG, SMALL = 65520, 1500


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: `value` in the row's unit, and daemon seconds for each unit of work (None: no daemon)."""

    value: float
    cpu: float | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What a measurement needs: the laboratory, who is measured, on which processors, and for how long."""

    lab: Lab
    contender: Contender
    seat: Seat
    place: Placement
    seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    `unit` is that of the value, `work` what the daemon's processor time is given for, `placement` a key of
    `lab.placements`, `target` what is asked of us: against the best C figure unless it says otherwise.
    """

    name: str
    title: str
    unit: str
    work: str
    mtu: int
    placement: str
    measure: Callable[[Bench], Sample]
    target: str = ""
    fewer_is_better: bool = False
    daemon_only: bool = False


@contextmanager
def _server(bench: Bench, where: Namespace, command: list[str], word: str) -> Iterator[None]:
    server = bench.lab.spawn([*Placement.argv(bench.place.server), *command], where)
    try:
        wait_for(server, word)
        yield
    finally:
        bench.lab.stop(server)


def _cpu(seat: Seat) -> float:
    return cpu_seconds(seat.daemon.pid) if seat.daemon else 0.0


def _client(bench: Bench, command: list[str]) -> tuple[str, float]:
    """What the client printed, and the daemon's processor time meanwhile."""
    before = _cpu(bench.seat)
    printed = bench.seat.guest.run([*Placement.argv(bench.place.client), *command], timeout=bench.seconds + GRACE)
    return printed, _cpu(bench.seat) - before


def _per(cpu: float, work: float, seat: Seat) -> float | None:
    return cpu / work if seat.daemon and work else None


def stream(reverse: bool, peer: bool) -> Callable[[Bench], Sample]:
    """One TCP stream by iperf3: Gbit/s, daemon seconds for each gigabyte."""

    def measure(bench: Bench) -> Sample:
        address = bench.seat.to_peer if peer else bench.seat.to_host
        where = bench.lab.peer if peer else bench.lab.host
        command = ["iperf3", "-J", "-c", address, "-p", str(IPERF_PORT), "-t", f"{bench.seconds:g}"]
        command += ["-R"] if reverse else []
        listen = ["iperf3", "-s", "-p", str(IPERF_PORT), "--forceflush"]
        with _server(bench, where, listen, "listening"):
            printed, cpu = _client(bench, command)
        result = json.loads(printed)["end"]["sum_received"]
        return Sample(result["bits_per_second"] / 1e9, _per(cpu, result["bytes"] / 1e9, bench.seat))

    return measure


def load(server: str, client: str, flows: int = 1, peer: bool = False) -> Callable[[Bench], Sample]:
    """A pair of our load generators: operations a second, daemon microseconds for each."""

    def measure(bench: Bench) -> Sample:
        address = bench.seat.to_peer if peer else bench.seat.to_host
        where, listen = (bench.lab.peer, address) if peer else (bench.lab.host, "127.0.0.1")
        command = [*LOAD, client, address, "--seconds", f"{bench.seconds:g}", "--flows", str(flows)]
        with _server(bench, where, [*LOAD, server, listen], "ready"):
            printed, cpu = _client(bench, command)
        result = json.loads(printed)
        return Sample(result["count"] / result["seconds"], _per(cpu * 1e6, result["count"], bench.seat))

    return measure


def start_to_ready(bench: Bench) -> Sample:
    """Milliseconds for a namespace to come up, run true(1) and go."""
    if not bench.contender.start:
        raise LabError("not measured")
    before = time.monotonic()
    bench.lab.host.run(list(bench.contender.start))
    return Sample((time.monotonic() - before) * 1e3)


def resident(bench: Bench) -> Sample:
    """Resident MiB of the daemon of a fresh seat."""
    if bench.seat.daemon is None:
        raise LabError("no daemon")
    return Sample(resident_kib(bench.seat.daemon.pid) / 1024)


def _streams() -> list[Row]:
    rows = []
    for mtu in (BIG, SMALL):
        for far in ("host", "peer"):
            for reverse in (False, True):
                name = f"tcp-{'in' if reverse else 'out'}-{far}-{mtu}"
                title = f"TCP {far} → namespace, MTU {mtu}" if reverse else f"TCP namespace → {far}, MTU {mtu}"
                target = "1.2 x C, 0.5 x bare" if mtu == BIG else "8 x C" if reverse else "2 x C"
                measure = stream(reverse, far == "peer")
                rows.append(
                    Row(name, title, "Gbit/s", "CPU s/GB", mtu, "spread", measure, target if far == "host" else "")
                )
    return rows


def _loads() -> list[Row]:
    crr = "connect-request-response"
    plan = (
        ("udp-out", "UDP 1400 B namespace → host", "udp-sink", "udp-send", 1, "1.2 x C"),
        ("udp-in", "UDP 1400 B host → namespace", "udp-source", "udp-receive", 1, "1.2 x C"),
        ("tcp-rr-1", "TCP round trips, 1 flow", "tcp-echo", "tcp-rr", 1, "0.8 x C"),
        ("tcp-rr-16", "TCP round trips, 16 flows", "tcp-echo", "tcp-rr", 16, "0.8 x C"),
        ("udp-rr", "UDP round trips", "udp-echo", "udp-rr", 1, "0.8 x C"),
        ("tcp-crr-1", f"{crr}, 1 flow", "tcp-answer", "tcp-crr", 1, "0.6 x C"),
        ("tcp-crr-16", f"{crr}, 16 flows", "tcp-answer", "tcp-crr", 16, "0.6 x C"),
    )
    return [
        Row(name, title, "1/s", "CPU us", BIG, "apart", load(server, client, flows), target)
        for name, title, server, client, flows, target in plan
    ]


def _cost(name: str, title: str, unit: str, measure: Callable[[Bench], Sample], target: str) -> Row:
    return Row(name, title, unit, "", BIG, "free", measure, target, fewer_is_better=True, daemon_only=True)


ROWS = (
    _cost("start", "start to ready", "ms", start_to_ready, "300 ms"),
    _cost("memory", "resident after start", "MiB", resident, "60 MiB"),
    *_streams(),
    *_loads(),
)
