"""Exchanges of a few bytes beside a bulk flow: what a person at a terminal, or a client of a small service, notices.

The guest of passt is behind `bench/relay.c`, or with shared memory `bench/vhost_relay.c`, which add as little as
possible; that of pasta has pasta's own tap. The server is on the peer. `direct` is a client on the host, with no daemon
between, and no MTU but that of the host's interface.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import contenders, vm
from .adverse_load import GET, KEY, PING, TWO_PARTS
from .adverse_progress import Progress
from .adverse_seats import DIRECT, PASTA
from .adverse_stopped import VHOST
from .contenders import Contender, Seat
from .lab import PEER, PEER6, Lab, LabError, wait_for

LOAD = [sys.executable, "-m", "bench.adverse_load"]
COUNTS = {PING: 500, TWO_PARTS: 100, GET: 100, KEY: 20}
ROUNDS = 5
BULKS = ("none", "up", "down")
LOOPBACK = next(c for c in contenders.CONTENDERS if c.command is None)
Line = dict[str, Any]
ROW = ("contender", "mode", "mtu", "family", "kind", "bulk")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is combined: kinds of guest, MTUs of their link, families, bulk flows; and how often."""

    seats: Sequence[str]
    mtus: Sequence[int]
    families: Sequence[str]
    bulks: Sequence[str] = BULKS
    rounds: int = ROUNDS


def latencies(lab: Lab, chosen: list[Contender], plan: Plan, progress: Progress) -> Iterator[Line]:
    """A line for each round of a contender, seat, kind of exchange and bulk flow, contenders taking turns.

    Each comes with the rate of the bulk flow: a program that starves the flow has an easy time.
    """
    found: list[Line] = []
    known = Counter(tuple(line[key] for key in ROW if key != "kind") for line in progress.done("latencies"))
    for turn in range(1, plan.rounds + 1):
        for contender, mode, mtu, family in _places(chosen, plan):
            bulks = [b for b in plan.bulks if known[contender.name, mode, mtu, family, b] < turn * len(COUNTS)]
            if not bulks:
                continue
            if progress.over():
                break
            print(f"latency, round {turn} of {plan.rounds}: {contender.name} {mode} {mtu} {family}", flush=True)
            with _seated(lab, contender, mode, mtu) as seat:
                for bulk in bulks:
                    try:
                        values, rate = _measured(lab, seat, bulk, PEER6 if family == "IPv6" else PEER)
                    except LabError as e:
                        print(f"{contender.name} {mode} beside {bulk}: {e}", flush=True)
                        continue
                    for kind, seconds in values.items():
                        row = dict(zip(ROW, (contender.name, mode, mtu, family, kind, bulk), strict=True))
                        found.append(row | {"delays": counted(seconds), "rate": rate})
                        yield found[-1]
    for line in merged(found):
        print(json.dumps(line), flush=True)


def _places(chosen: list[Contender], plan: Plan) -> Iterator[tuple[Contender, str, int, str]]:
    """Where exchanges are made. Contenders take turns at each of the places; some C has no shared memory."""
    for family in plan.families:
        yield LOOPBACK, DIRECT, 0, family
        for mtu in plan.mtus:
            for mode in plan.seats:
                for contender in chosen:
                    if contender.command and (mode != VHOST or contender.shares_memory()):
                        yield contender, mode, mtu, family


@contextmanager
def _seated(lab: Lab, contender: Contender, mode: str, mtu: int) -> Iterator[Seat]:
    if mode in (PASTA, DIRECT):
        with contenders.seated(lab, contender, mtu) as seat:
            yield seat
    else:
        with vm.seated(lab, contender, vm.VHOST if mode == VHOST else vm.RELAY, mtu) as seat:
            yield seat


def _measured(lab: Lab, seat: Seat, bulk: str, address: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of the exchanges of each kind, and the rate of the bulk flow in bytes per second."""
    flow = lab.spawn([*LOAD, "bulk", address, bulk], seat.guest) if bulk != "none" else None
    found = {}
    try:
        if flow:
            wait_for(flow, "ready")
            time.sleep(0.3)
        for kind, count in COUNTS.items():
            command = [*LOAD, "latency", address, kind, str(count)]
            found[kind] = json.loads(seat.guest.run(command, timeout=60.0))
        if not flow:
            return found, 0.0
        flow.terminate()
        said, _ = flow.communicate(timeout=5)
        return found, float(json.loads(said)["rate"])
    finally:
        if flow:
            lab.stop(flow)


# Reports --------------------------------------------------------------------------------------------------------------


def counted(seconds: Iterable[float]) -> dict[str, int]:
    """How often each delay was seen, in milliseconds of three digits: enough for quantiles of several runs together."""
    return dict(Counter(f"{1e3 * value:.3g}" for value in sorted(seconds)))


def merged(lines: Iterable[Line]) -> Iterator[Line]:
    """Quantiles in milliseconds of all lines of a row, and the median rate of their bulk flows."""
    rows: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        rows[tuple(line[key] for key in ROW)].append(line)
    for row, those in rows.items():
        delays = sorted(float(ms) for line in those for ms, count in line["delays"].items() for _ in range(count))
        quantiles = {f"p{q:g}": delays[min(int(len(delays) * q / 100), len(delays) - 1)] for q in (50, 99, 99.9)}
        rate = statistics.median(line["rate"] for line in those)
        yield dict(zip(ROW, row, strict=True)) | {"samples": len(delays), **quantiles, "rate": rate}
