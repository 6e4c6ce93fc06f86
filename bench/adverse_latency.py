"""Exchanges of a few bytes beside a bulk flow: what a person at a terminal, or a client of a small service, notices.

The guest of passt is behind `bench/relay.c`, which adds as little as possible; that of pasta has pasta's own tap. The
server is on the peer. `direct` is a client on the host, with no daemon between.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import contenders, vm
from .adverse_load import GET, PING, TWO_PARTS
from .adverse_seats import PASST, PASTA
from .contenders import Contender, Seat
from .lab import PEER, Lab, LabError, wait_for

LOAD = [sys.executable, "-m", "bench.adverse_load"]
COUNTS = {PING: 500, TWO_PARTS: 100, GET: 100}
ROUNDS = 5
BULKS = ("none", "up", "down")
MTU = 65520
Row = tuple[str, str, str, str]  # contender, mode, kind of exchange, bulk flow
DIRECT = next(c for c in contenders.CONTENDERS if c.command is None)


def latencies(
    lab: Lab,
    chosen: list[Contender],
    modes: Sequence[str] = (PASST, PASTA),
    bulks: Sequence[str] = BULKS,
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Quantiles in milliseconds of each contender, mode, kind of exchange and bulk flow, contenders taking turns.

    Each comes with the median rate of the bulk flow: a program that starves the flow has an easy time.
    """
    samples: dict[Row, list[float]] = {}
    rates: dict[Row, list[float]] = {}
    for turn in range(1, rounds + 1):
        for contender in (DIRECT, *chosen):
            for mode in (PASTA,) if contender is DIRECT else modes:
                print(f"latency, round {turn} of {rounds}: {contender.name} {mode}", flush=True)
                with _seated(lab, contender, mode) as seat:
                    for bulk in bulks:
                        try:
                            found, rate = _measured(lab, seat, bulk)
                        except LabError as e:
                            print(f"{contender.name} {mode} beside {bulk}: {e}", flush=True)
                            continue
                        for kind, values in found.items():
                            row = (contender.name, mode, kind, bulk)
                            samples.setdefault(row, []).extend(values)
                            rates.setdefault(row, []).append(rate)
    lines = [_line(row, values, statistics.median(rates[row])) for row, values in samples.items()]
    for line in lines:
        print(json.dumps(line), flush=True)
    return lines


@contextmanager
def _seated(lab: Lab, contender: Contender, mode: str) -> Iterator[Seat]:
    if mode == PASTA:
        with contenders.seated(lab, contender, MTU) as seat:
            yield seat
    else:
        with vm.seated(lab, contender, vm.RELAY, MTU) as seat:
            yield seat


def _measured(lab: Lab, seat: Seat, bulk: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of the exchanges of each kind, and the rate of the bulk flow in bytes per second."""
    flow = lab.spawn([*LOAD, "bulk", PEER, bulk], seat.guest) if bulk != "none" else None
    found = {}
    try:
        if flow:
            wait_for(flow, "ready")
            time.sleep(0.3)
        for kind, count in COUNTS.items():
            command = [*LOAD, "latency", PEER, kind, str(count)]
            found[kind] = json.loads(seat.guest.run(command, timeout=60.0))
        if not flow:
            return found, 0.0
        flow.terminate()
        said, _ = flow.communicate(timeout=5)
        return found, float(json.loads(said)["rate"])
    finally:
        if flow:
            lab.stop(flow)


def _line(row: Row, values: list[float], rate: float) -> dict[str, Any]:
    contender, mode, kind, bulk = row
    ordered = sorted(values)
    quantiles = {f"p{q:g}": 1e3 * ordered[min(int(len(ordered) * q / 100), len(ordered) - 1)] for q in (50, 99, 99.9)}
    begin = {"contender": contender, "mode": mode, "kind": kind, "bulk": bulk, "samples": len(ordered)}
    return {**begin, **quantiles, "rate": rate}
