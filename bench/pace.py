"""`python -m bench.pace`: what busy-polling costs and gives at known rates of round trips (docs/performance.md).

One connection has 10, 100, 1000 and 10 000 round trips a second, and as many as it can. For each rate, daemons with
--busy-poll 0 and with the default take turns. The table has the medians of the daemon's processor time, as a share of
processor, and of the round trips that were made. `--peer NAME=PATH` measures another build (the compiled one) instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from statistics import median

from .contenders import CONTENDERS, Contender, peer, seated
from .lab import Lab, LabError, cpu_seconds, enter, placements, wait_for
from .rows import LOAD

RATES = (10, 100, 1000, 10_000, 1_000_000)
SETTINGS = (0, 100)  # us
MTU = 65520


def with_setting(contender: Contender, microseconds: int) -> Contender:
    """The same program with an option. The last argument is the PID of the guest."""
    command = contender.command
    assert command is not None

    def with_option(pid: int, mtu: int, ports: str) -> list[str]:
        *words, last = command(pid, mtu, ports)
        return [*words, "--busy-poll", str(microseconds), last]

    return replace(contender, command=with_option)


def sample(lab: Lab, contender: Contender, rate: int, seconds: float) -> tuple[float, float]:
    """Round trips a second, and the daemon's share of a processor."""
    place = placements()["apart"]
    with seated(lab, contender, MTU, "none", place.daemon) as seat:
        assert seat.daemon is not None
        server = lab.spawn([*place.argv(place.server), *LOAD, "tcp-echo", "127.0.0.1"])
        try:
            wait_for(server, "ready")
            command = [*place.argv(place.client), *LOAD, "tcp-pace", seat.to_host, "--seconds", f"{seconds:g}"]
            before = cpu_seconds(seat.daemon.pid)
            printed = seat.guest.run([*command, "--flows", str(rate)], timeout=seconds + 10)
            used = cpu_seconds(seat.daemon.pid) - before
        finally:
            lab.stop(server)
    result = json.loads(printed)
    return result["count"] / result["seconds"], used / result["seconds"]


def main(argv: list[str]) -> int:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.pace", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--peer", metavar="NAME=PATH", help="the build to measure, instead of this tree")
    args = parser.parse_args(argv)
    enter("bench.pace", argv)
    contender = peer(args.peer) if args.peer else CONTENDERS[0]
    print("| asked for | with 0: made, processor | with 100: made, processor |\n| --: | --: | --: |", flush=True)
    with Lab() as lab:
        for rate in RATES:
            found: dict[int, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
            for _ in range(args.rounds):
                for setting in SETTINGS:
                    found[setting].append(sample(lab, with_setting(contender, setting), rate, args.seconds))
            cells = [
                f"{median(made for made, _ in samples):,.0f}, {median(used for _, used in samples):.1%}"
                for samples in found.values()
            ]
            print(f"| {rate if rate < RATES[-1] else 'all'} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as e:
        sys.exit(f"bench.pace: {e}")
