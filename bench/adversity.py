"""Transfers through a guest's link with faults, and with adverse peers; and latency beside a bulk flow.

    python -m bench.adversity --json RESULTS [--contenders ours pasta] [--peer NAME=PATH]    all transfers (minutes)
    python -m bench.adversity --sample 8 --seed 7                                            8 transfers at each seat
    python -m bench.adversity --seed 7 --only "passt 1500 IPv6 up corrupted"                 one of them again

    matrix     modes x MTU x families x directions x faults: each transfer is checked by SHA-256
    curves     throughput against loss, and against the round trip time of the link
    latency    exchanges of a few bytes beside a bulk flow, beside those without a daemon
    stopped    ends, answers and datagrams while the daemon is stopped for moments, beside the bare kernel, which is
               a contender of its own (loopback)

With `--resume`, what RESULTS has is left out; with `--most`, nothing new begins after so many seconds, and the status
is 3 where that left something. The same command again goes on from there, so that all of it can be run in parts.

Chances come from the seed of the run and the name of the transfer: either is on each line. The exit status is 1 if a
transfer of this project did not arrive whole, or an end was not that of the bare kernel. `bench.reliability` writes the
tables and pictures of docs/reliability.md from the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import adverse_stopped, vm
from .adverse_latency import BULKS, ROUNDS, Plan, latencies
from .adverse_progress import Progress
from .adverse_seats import DIRECT, PASST, PASTA, Place, Programs, placed, programs
from .contenders import CONTENDERS, Contender, peer
from .lab import HOST, HOST6, PEER, PEER6, ROOT, Lab, LabError, enter, wait_for

MODES, MTUS, FAMILIES = (PASST, PASTA), (65520, 1500, 1280), ("IPv4", "IPv6")
MEBI = 1 << 20
LIMIT = 40.0  # s for one transfer: more than it takes, so that what is slow is told from what stalls
PARTS = ("matrix", "curves", "latency", "stopped")
LOAD = [sys.executable, "-m", "bench.adverse_load"]
MORE_IS_LEFT = 3  # exit status

# Directions of a transfer: bytes up and down as shares of its size, and whether the peer connects to the guest
WAYS = {"up": (1, 0, False), "down": (0, 1, False), "both": (1, 1, False), "forwarded": (1, 1, True)}

# The rules of both directions. A rule of "peer" is that of adverse_load.
FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "loss 1 %": {"drop": 0.01},
    "loss 5 %": {"drop": 0.05},
    "bursts of loss": {"burst": 0.002},
    "duplicated": {"duplicate": 0.05},
    "reordered": {"reorder": 0.05},
    "jitter": {"delay": 0.001, "jitter": 0.004},
    "delay 20 ms": {"delay": 0.02},
    "pausing link": {"pause": [0.2, 1.0]},
    "corrupted": {"corrupt": 0.01},
    "truncated": {"truncate": 0.01},
    "first SYN, data, FIN lost": {"lose": {"syn": 1, "data": 1, "fin": 1}},
    "all at once": {
        **dict.fromkeys(("drop", "duplicate", "reorder", "corrupt", "truncate"), 0.003),
        "delay": 0.002,
        "jitter": 0.001,
    },
    "delayed peer": {"peer": "delayed"},
    "bursty peer": {"peer": "bursty"},
    "pausing peer": {"peer": "pausing"},
}
LOSSES = (0.0, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0)  # %
ROUND_TRIPS = (0, 2, 10, 20, 50, 100, 200)  # ms


@dataclass(frozen=True, slots=True)
class Case:
    """One transfer: where, how much each way at most, and with which faults."""

    mode: str
    mtu: int
    family: str
    way: str
    fault: str
    size: int
    rule: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.mode} {self.mtu} {self.family} {self.way} {self.fault}"

    def seed(self, run: int) -> int:
        """The seed of its chances and of its data, in the run with that seed."""
        return zlib.crc32(f"{run} {self}".encode())


def matrix() -> list[Case]:
    """Every combination."""
    return [
        Case(mode, mtu, family, way, fault, (8 if mtu > 9000 else 2) * MEBI, rule)
        for mode, mtu, family, way, (fault, rule) in itertools.product(MODES, MTUS, FAMILIES, WAYS, FAULTS.items())
    ]


def curves() -> list[Case]:
    """Throughput against loss, and against the round trip time."""
    rules = {f"loss {p:g} %": {"drop": p / 100} for p in LOSSES}
    rules |= {f"round trip {ms} ms": {"delay": ms / 2e3} if ms else {} for ms in ROUND_TRIPS}
    ways = ("up", "down")
    return [
        Case(m, 1500, "IPv4", w, f"curve: {f}", 8 * MEBI, r)
        for m, w, (f, r) in itertools.product(MODES, ways, rules.items())
    ]


def sampled(cases: list[Case], count: int, seed: int) -> list[Case]:
    """`count` of the cases at each seat, by the seed: each fault as often as the others."""
    chance = random.Random(f"{seed} {cases[0]}")  # so that the modes differ
    chosen, faults = [], itertools.cycle(chance.sample(sorted(FAULTS), len(FAULTS)))
    for _, _, those in by_seat(cases):
        for fault in itertools.islice(faults, count):
            chosen.append(chance.choice([c for c in those if c.fault == fault]))
    return chosen


def by_seat(cases: list[Case]) -> Iterator[tuple[str, int, list[Case]]]:
    """The cases of each mode and MTU."""
    for mode, mtu in itertools.product(MODES, MTUS):
        if chosen := [c for c in cases if (c.mode, c.mtu) == (mode, mtu)]:
            yield mode, mtu, chosen


def transfer(place: Place, case: Case, run: int, limit: float = LIMIT) -> dict[str, Any]:
    """The outcome, with its figures."""
    seed = case.seed(run)
    up, down, forwarded = WAYS[case.way]
    rule = {key: value for key, value in case.rule.items() if key != "peer"}
    place.faults({**rule, "seed": seed}, {**rule, "seed": seed + 1})
    v6 = case.family == "IPv6"
    client, address = (place.peer, HOST6 if v6 else HOST) if forwarded else (place.guest, PEER6 if v6 else PEER)
    request = {"up": case.size * up, "down": case.size * down, "seed": seed, "peer": case.rule.get("peer", "")}
    cpu = place.cpu()
    try:
        result = json.loads(client.run([*LOAD, "transfer", address, json.dumps(request)], timeout=limit))
    except LabError as e:
        result = {"outcome": f"failed: {e}" if "no end" not in str(e) else "stalled", "time": limit}
    place.faults({}, {})
    return {"gap": None, **result, "cpu": place.cpu() - cpu, "seed": seed}


def measure(
    lab: Lab, chosen: Programs, cases: list[Case], run: int, limit: float, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The results of all cases. Behind one that fails, the next has a new daemon. The bare kernel has one mode."""
    names = ("mode", "mtu", "family", "way", "fault")
    done = [line for line in progress.done("transfers") if line["contender"] == chosen.name]
    known = {(*(line[name] for name in names), line["seed"]) for line in done}
    for mode, mtu, those in by_seat(cases):
        if chosen.name == DIRECT and mode != cases[0].mode:
            continue
        left = (c for c in those if (c.mode, c.mtu, c.family, c.way, c.fault, c.seed(run)) not in known)
        while case := next(left, None):
            if progress.over():
                return
            with placed(lab, chosen, DIRECT if chosen.name == DIRECT else mode, mtu) as place:
                while case:
                    line = _measured(place, chosen, case, run, limit)
                    print(told(line, run), flush=True)
                    yield line
                    case = next(left, None) if line["outcome"] == "whole" else None
                    if case and progress.over():
                        return


def _measured(place: Place, chosen: Programs, case: Case, run: int, limit: float) -> dict[str, Any]:
    try:
        result = transfer(place, case, run, limit)
    except OSError as e:  # of the daemon's /proc, or of the link's socket
        failed = f"failed: the daemon or the link is gone ({e})"
        result = {"outcome": failed, "time": 0.0, "gap": None, "cpu": 0.0, "seed": case.seed(run)}
    line = {"contender": chosen.name, **asdict(case), **result}
    del line["rule"]
    return line


def told(line: dict[str, Any], run: int) -> str:
    """One line of the report."""
    name = f"{line['mode']} {line['mtu']} {line['family']} {line['way']} {line['fault']}"
    gap = "-" if line.get("gap") is None else f"{line['gap']:.3f}"
    figures = f"{line['time']:7.3f} s  gap {gap:>6} s  cpu {line['cpu']:6.2f} s"
    return f"{line['contender']:6} {name:52} {figures}  {line['outcome']}  --seed {run}"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.adversity", description=__doc__)
    parser.add_argument("--contenders", nargs="+", default=["ours"], help="ours, pasta, loopback (the kernel alone)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--congestion", default="", metavar="NAME", help="congestion control; the machine's by default")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="random if not given")
    parser.add_argument("--sample", type=int, metavar="N", help="only N transfers or cells at each seat")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a transfer may take; %(default)s")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    seats = adverse_stopped.SEATS
    parser.add_argument("--seats", nargs="+", default=list(seats), choices=seats, help="of latency and stopped")
    parser.add_argument("--mtus", nargs="+", type=int, default=list(MTUS), help="of latency")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="of latency")
    parser.add_argument("--only", nargs="+", default=[""], help="only transfers with one of these in their name")
    parser.add_argument("--parts", nargs="+", default=["matrix"], choices=PARTS)
    parser.add_argument("--bulks", nargs="+", default=list(BULKS), choices=BULKS, help="flows beside exchanges")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of latency; %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what FILE has of this seed")
    parser.add_argument("--most", type=float, default=float("inf"), metavar="S", help="seconds until nothing begins")
    return parser.parse_args(argv)


def _chosen_cases(args: argparse.Namespace) -> list[Case]:
    cases = (matrix() if "matrix" in args.parts else []) + (curves() if "curves" in args.parts else [])
    cases = [case for case in cases if case.mode in args.modes and any(word in str(case) for word in args.only)]
    return sampled(cases, args.sample, args.seed) if args.sample and cases else cases


def _observed(
    lab: Lab, args: argparse.Namespace, contenders: list[Contender], progress: Progress
) -> Iterator[dict[str, Any]]:
    """The lines of the part `stopped`, printed as well."""
    cells = adverse_stopped.cells(args.only)
    if args.sample:
        cells = adverse_stopped.sampled(cells, args.sample, args.seed)
    cells = [cell for cell in cells if cell.seat in args.seats]
    for line in adverse_stopped.observe(lab, [programs(c) for c in contenders], cells, args.seed, progress):
        print(adverse_stopped.told(line, args.seed), flush=True)
        yield line


def _measure_all(lab: Lab, args: argparse.Namespace, contenders: list[Contender], progress: Progress) -> None:
    """All parts that are asked for."""
    for contender in contenders:
        for line in measure(lab, programs(contender), _chosen_cases(args), args.seed, args.limit, progress):
            progress.found["transfers"].append(line)
    if "latency" in args.parts:
        server = lab.spawn([*LOAD, "serve"], lab.peer)
        wait_for(server, "ready")
        plan = Plan(args.seats, args.mtus, args.families, args.bulks, args.rounds)
        for line in latencies(lab, contenders, plan, progress):
            progress.found["latencies"].append(line)
        lab.stop(server)
    if "stopped" in args.parts:
        for line in _observed(lab, args, contenders, progress):
            progress.found["stopped"].append(line)


def main(argv: list[str]) -> int:
    """Measure; the exit status."""
    args = _parse(argv)
    peers = [peer(argument) for argument in args.peer]
    if {"stopped", "latency"} & set(args.parts):
        vm.prepare({vm.RELAY, vm.VHOST})
    enter("bench.adversity", [*argv, "--seed", str(args.seed)])
    contenders: list[Contender] = []
    for contender in [c for c in CONTENDERS if c.name in args.contenders] + peers:
        if why := contender.missing():
            print(f"{contender.name} is left out: {why}")
        else:
            contenders.append(contender)
    progress = Progress(args.json, resumes=args.resume, most=args.most)
    print(f"seed {args.seed}", flush=True)
    begin = time.monotonic()
    found = progress.found
    try:
        with Lab(args.congestion) as lab:
            _measure_all(lab, args, contenders, progress)
    finally:
        ends = found["stopped"]
        found["stopped"] = [adverse_stopped.kept(line) for line in ends]
        progress.save(args.seed)
    transfers = found["transfers"]
    bad = [line for line in transfers if line["outcome"] != "whole"]
    others = [line for line in ends if not line["same"]]
    print(f"{len(transfers)} transfers in {time.monotonic() - begin:.0f} s, {len(bad)} not whole; --seed {args.seed}")
    print(f"{len(ends)} observations, {len(others)} not as on the bare kernel; --seed {args.seed}")
    for line in bad:
        print(told(line, args.seed))
    for line in others:
        print(adverse_stopped.told(line, args.seed))
    if any(line["contender"] == "ours" for line in bad + others):
        return 1
    return MORE_IS_LEFT if progress.stopped else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as e:
        raise SystemExit(f"bench: {e}") from None
