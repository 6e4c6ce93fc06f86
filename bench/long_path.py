"""`python -m bench.long_path`: streams and exchanges over a path that takes its time, beside the bare kernel and C.

    guest ==tap, UNIX socket or shared memory== daemon --sockets-- host ==tap-- this, RATE and a delay --tap== far end

The path passes on whole GSO packets, so that this program is not its limit. It loses nothing, and its queue has no end:
what a sender has in flight beyond the path's own capacity waits in there, and exchanges wait behind it. `direct` is the
host's own TCP. Each cell has a stream in one direction and, beside it, exchanges of 1 byte.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import itertools
import json
import os
import select
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from . import lab as laboratory
from . import vm
from .adverse_latency import LOAD, LOOPBACK, _seated
from .adverse_load import PING
from .adverse_seats import DIRECT, PASTA, SERVER, _running
from .adverse_stopped import SEATS, VHOST
from .contenders import CONTENDERS, Contender, Seat, peer
from .lab import Lab, LabError, Namespace, wait_for

RATE = 125e6  # bytes per second of the path
ROUND_TRIPS = (10, 40, 100)  # ms
SETTLED = 12  # round trips, and a second, until exchanges begin: slow start is over
EXCHANGES = 60
HERE, BEYOND = "long0", "long1"
ADDRESSES = {"IPv4": ("192.0.2.6", "192.0.2.7", 24), "IPv6": ("2001:db8:6::6", "2001:db8:6::7", 64)}

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 2, 0x1000, 0x4000
CSUM_TSO4_TSO6 = 7
PACKET_MAX = 70000
PR_SET_PDEATHSIG = 1


# The path -------------------------------------------------------------------------------------------------------------


def relay(delay: float) -> None:
    """Move packets between two new taps, each after `delay` seconds and its turn at RATE, until the parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    taps = [_tap(HERE), _tap(BEYOND)]
    other = dict(zip(taps, reversed(taps), strict=True))
    waiting: dict[int, deque[tuple[float, bytes]]] = {tap: deque() for tap in taps}
    free = dict.fromkeys(taps, 0.0)  # when the path has passed on all that came from a tap
    print("ready", flush=True)
    while True:
        due = [queue[0][0] for queue in waiting.values() if queue]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        for tap in select.select(taps, (), (), wait)[0]:
            try:
                while True:
                    packet = os.read(tap, PACKET_MAX)
                    free[tap] = max(free[tap], time.monotonic()) + len(packet) / RATE
                    waiting[tap].append((free[tap] + delay, packet))
            except BlockingIOError:
                pass
        now = time.monotonic()
        for tap, queue in waiting.items():
            while queue and queue[0][0] <= now:
                _write(other[tap], queue.popleft()[1])


def _write(tap: int, packet: bytes) -> None:
    """Write a packet. Packets before the interface is up, such as reports of multicast listeners, are lost."""
    try:
        os.write(tap, packet)
    except OSError as e:
        if e.errno != errno.EIO:
            raise


def _tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(tap, TUNSETOFFLOAD, CSUM_TSO4_TSO6)
    return tap


@contextmanager
def path(lab: Lab, round_trip: float) -> Iterator[None]:
    """A path of `round_trip` seconds from the host to a namespace with a server."""
    with ExitStack() as stack:
        link = [sys.executable, "-m", "bench.long_path", "relay", str(round_trip / 2)]
        wait_for(stack.enter_context(_running(lab, link)), "ready")
        holder = stack.enter_context(_running(lab, ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]))
        wait_for(holder, "ready")
        lab.host.run(["ip", "link", "set", BEYOND, "netns", str(holder.pid)])
        far = Namespace(holder.pid)
        far.run(["ip", "link", "set", "lo", "up"])
        for where, name, at in ((lab.host, HERE, 0), (far, BEYOND, 1)):
            where.run(["ip", "link", "set", name, "txqueuelen", "10000", "up"])
            for *ends, length in ADDRESSES.values():
                flags = ["nodad"] if ":" in ends[at] else []
                where.run(["ip", "address", "add", f"{ends[at]}/{length}", "dev", name, *flags])
        wait_for(stack.enter_context(_running(lab, SERVER, far)), "ready")
        yield


# Cells ----------------------------------------------------------------------------------------------------------------


def measured(lab: Lab, seat: Seat, way: str, address: str, round_trip: float) -> tuple[float, list[float]]:
    """Bytes per second of a stream, and the seconds of each of the exchanges beside it."""
    flow = lab.spawn([*LOAD, "bulk", address, way], seat.guest)
    try:
        wait_for(flow, "ready")
        time.sleep(1 + SETTLED * round_trip)
        command = [*LOAD, "latency", address, PING, str(EXCHANGES)]
        delays = json.loads(seat.guest.run(command, timeout=60.0))
        flow.terminate()
        said, _ = flow.communicate(timeout=5)
        return float(json.loads(said)["rate"]), sorted(delays)
    finally:
        lab.stop(flow)


def cells(lab: Lab, chosen: list[Contender], args: argparse.Namespace) -> Iterator[str]:
    """A line of Markdown for each cell: contenders side by side, next to each other in time."""
    names = [DIRECT, *(f"{c.name}, {seat}" for seat in args.seats for c in chosen if _takes_part(c, seat))]
    yield f"| ms | family | MTU | stream | {' | '.join(names)} |"
    yield f"|--:|---|--:|---|{'---|' * len(names)}"
    for ms in args.round_trips:
        with path(lab, ms / 1e3):
            for family, mtu, way in itertools.product(args.families, args.mtus, args.ways):
                found = [cell(lab, LOOPBACK, DIRECT, mtu, family, way, ms / 1e3)]
                for seat in args.seats:
                    those = [c for c in chosen if _takes_part(c, seat)]
                    found += [cell(lab, c, seat, mtu, family, way, ms / 1e3) for c in those]
                yield f"| {ms} | {family} | {mtu} | {way} | {' | '.join(found)} |"


def _takes_part(contender: Contender, seat: str) -> bool:
    return seat != VHOST or contender.shares_memory()


def cell(lab: Lab, contender: Contender, mode: str, mtu: int, family: str, way: str, round_trip: float) -> str:
    """Mbit/s, and p50 and p90 of the exchanges in ms; or what went wrong."""
    try:
        with _seated(lab, contender, mode, mtu) as seat:
            rate, delays = measured(lab, seat, way, ADDRESSES[family][1], round_trip)
    except LabError as e:
        print(f"{contender.name} {mode} {mtu} {family} {way}: {e}", file=sys.stderr, flush=True)
        return "failed"
    p50, p90 = (1e3 * delays[len(delays) * q // 100] for q in (50, 90))
    return f"{rate * 8e-6:.0f}: {p50:.1f}, {p90:.1f}"


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_path", description=__doc__)
    parser.add_argument("--contenders", nargs="+", default=["ours", "pasta"], choices=["ours", "compiled", "pasta"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--round-trips", nargs="+", type=int, default=list(ROUND_TRIPS), metavar="MS")
    parser.add_argument("--families", nargs="+", default=list(ADDRESSES), choices=ADDRESSES)
    parser.add_argument("--mtus", nargs="+", type=int, default=[65520, 1500, 1280])
    parser.add_argument("--ways", nargs="+", default=["up", "down"], choices=["up", "down"])
    parser.add_argument("--seats", nargs="+", default=[PASTA], choices=SEATS)
    parser.add_argument("--congestion", default="cubic", metavar="NAME", help="congestion control of both ends")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure, print; or be the relay."""
    if argv[:1] == ["relay"]:
        relay(float(argv[1]))
    args = arguments(argv)
    chosen = [c for c in CONTENDERS if c.name in args.contenders] + [peer(argument) for argument in args.peer]
    vm.prepare({vm.VHOST if seat == VHOST else vm.RELAY for seat in args.seats if seat != PASTA})
    laboratory.enter("bench.long_path", argv)
    with laboratory.Lab(args.congestion) as lab:
        for line in cells(lab, chosen, args):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as e:
        raise SystemExit(f"bench: {e}") from None
