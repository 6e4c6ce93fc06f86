"""Ends, answers and datagrams while the daemon is stopped for moments, beside the bare kernel and C.

    guest ==tap, UNIX socket or shared memory== daemon --sockets-- host ==veth== peer
                                                                   host ==taps, 5 ms each way== another peer

A cell is a kind of guest, an MTU of its link, a family, the side that connects, and a path. In each of them all of
`adverse_ends.OBSERVATIONS` are made. The bare kernel has cells without a guest: its near end is on the host. All
must see what it shows; times are for the table of docs/reliability.md.
"""

from __future__ import annotations

import itertools
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from passt.linux import netns

from . import vm
from .adverse_ends import OBSERVATIONS, Observation, Way
from .adverse_progress import Progress
from .adverse_seats import DIRECT, PASST, PASTA, Programs, _link, _running, _wait_for_port
from .contenders import READY_TIMEOUT
from .faulty_link import control
from .lab import HOST, HOST6, PEER, PEER6, Lab, LabError, Namespace, set_sysctl, wait_for

PORT = 5500
VHOST = "vhost-user"
SEATS = (PASTA, PASST, VHOST)
MTUS, FAMILIES = (65520, 1500, 1280), ("IPv4", "IPv6")
OUT, IN = "out", "in"
NEAR, DELAYED = "near", "delayed"
DELAY = 0.005  # s each way
SPREADS = {
    NEAR: 0.004,
    DELAYED: 0.04,
}  # s between stops of the daemon, at most: a transfer takes two or three times that
TIMEOUT, OTHERS = 10.0, 2.0  # s; some releases of C stall, and would take hours
HERE, BEYOND = "path0", "path1"  # interfaces of the delayed path

# Of the host, of the far end, and networks behind the far end: it refuses the one, and drops what is for the other
PATHS = {
    (NEAR, "IPv4"): (HOST, PEER, "198.19.0.9", "198.18.0.9"),
    (NEAR, "IPv6"): (HOST6, PEER6, "2001:db8:19::9", "2001:db8:18::9"),
    (DELAYED, "IPv4"): ("192.0.2.2", "192.0.2.3", "198.19.1.9", "198.18.1.9"),
    (DELAYED, "IPv6"): ("2001:db8:2::2", "2001:db8:2::3", "2001:db8:1901::9", "2001:db8:1801::9"),
}
Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """Where observations are made, and which of them."""

    seat: str
    mtu: int
    family: str
    way: str
    path: str
    observations: tuple[str, ...] = tuple(OBSERVATIONS)

    def __str__(self) -> str:
        return f"{self.seat} {self.mtu} {self.family} {self.way} {self.path}"


def cells(words: list[str]) -> list[Cell]:
    """All of them, with those observations that have one of `words` in their name, or in that of their cell."""
    every = [Cell(*one) for one in itertools.product(SEATS, MTUS, FAMILIES, (OUT, IN), (NEAR, DELAYED))]
    found = []
    for cell in every:
        if names := tuple(name for name in OBSERVATIONS if any(word in f"{cell} {name}" for word in words)):
            found.append(_with(cell, names))
    return found


def _with(cell: Cell, names: tuple[str, ...]) -> Cell:
    return Cell(cell.seat, cell.mtu, cell.family, cell.way, cell.path, names)


def sampled(chosen: list[Cell], count: int, seed: int) -> list[Cell]:
    """`count` of the cells of each seat, each with a third of its observations."""
    chance = random.Random(f"{seed} stopped")
    found = []
    for seat in SEATS:
        those = [cell for cell in chosen if cell.seat == seat]
        for cell in chance.sample(those, min(count, len(those))):
            third = set(chance.sample(cell.observations, (len(cell.observations) + 2) // 3))
            found.append(_with(cell, tuple(name for name in cell.observations if name in third)))
    return sorted(found, key=lambda cell: (SEATS.index(cell.seat), MTUS.index(cell.mtu)))


# Places ---------------------------------------------------------------------------------------------------------------


def made(where: Namespace, family: int, kind: int) -> socket.socket:
    """A socket in that network namespace, by a thread that enters it."""
    with open(f"/proc/{where.pid or 'self'}/ns/net", "rb") as file:
        return netns.run_in(file.fileno(), lambda: socket.socket(family, kind), settle=False)


@contextmanager
def paths(lab: Lab) -> Iterator[dict[str, Namespace]]:
    """The far ends: the peer, and one at a path that takes its time. Both refuse, or drop, what is beyond them."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        link = stack.enter_context(_running(lab, _link(f"tap:{BEYOND}", 1500, folder, HERE)))
        wait_for(link, "ready")
        holder = stack.enter_context(_running(lab, ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]))
        wait_for(holder, "ready")
        lab.host.run(["ip", "link", "set", BEYOND, "netns", str(holder.pid)])
        ends = {NEAR: lab.peer, DELAYED: Namespace(holder.pid)}
        for where, name, at in ((lab.host, HERE, 0), (ends[DELAYED], BEYOND, 1)):
            where.run(["ip", "link", "set", "lo", "up"])
            where.run(["ip", "link", "set", name, "up"])
            where.run(["ip", "address", "add", f"{PATHS[DELAYED, 'IPv4'][at]}/24", "dev", name])
            where.run(["ip", "address", "add", f"{PATHS[DELAYED, 'IPv6'][at]}/64", "dev", name, "nodad"])
        for (path, family), (_, far, refused, dropped) in PATHS.items():
            flag = "-6" if family == "IPv6" else "-4"
            for address, kind in ((refused, "unreachable"), (dropped, "blackhole")):
                lab.host.run(["ip", flag, "route", "add", address, "via", far])
                ends[path].run(["ip", flag, "route", "add", kind, address])
        for end in ends.values():
            switches = {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1, "ipv4/icmp_ratelimit": 0}
            for switch, value in switches.items():
                end.run(["sh", "-c", f"echo {value} >/proc/sys/net/{switch}"])
        for direction in ("up", "down"):
            control(f"{folder}/rule", direction, {"delay": DELAY})
        yield ends


@contextmanager
def seated(lab: Lab, chosen: Programs, seat: str, mtu: int) -> Iterator[tuple[Namespace, int | None]]:
    """A guest, and the process of its daemon."""
    if chosen.name == DIRECT:
        yield lab.host, None
        return
    options = ["-q", "-f", "-t", str(PORT), "-u", str(PORT), "-m", str(mtu)]
    with lab.guest() as guest, ExitStack() as stack:
        if seat == PASTA:
            command = [*chosen.pasta, *options, "-T", "none", "-U", "none", "--config-net", str(guest.pid)]
            daemon = stack.enter_context(_running(lab, command))
            _wait_for_routes(guest, chosen.name, daemon)
        else:
            path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/socket"
            command = [*chosen.passt, *options, *(["--vhost-user"] if seat == VHOST else []), "-s", path]
            daemon = stack.enter_context(_running(lab, command))
            vm._wait_for_socket(path, chosen.name, daemon)
            relay = vm.relay(vm.VHOST if seat == VHOST else vm.RELAY)
            wait_for(stack.enter_context(_running(lab, [str(relay), vm.TAP, path], guest)), "ready")
            vm.configure(guest, mtu)
        _wait_for_port(chosen.name)
        yield guest, daemon.pid


def _wait_for_routes(guest: Namespace, name: str, daemon: Any) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while not all("default" in guest.run(["ip", family, "route"]) for family in ("-4", "-6")):
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"{name} did not configure its namespace")
        time.sleep(0.02)


# Observations ---------------------------------------------------------------------------------------------------------


def name_of(line: Line) -> tuple[str, str]:
    """The cell and the observation of a line, those of the bare kernel for all seats and MTUs."""
    return f"{line['family']} {line['way']} {line['path']}", line["observation"]


def observe(lab: Lab, contenders: list[Programs], chosen: list[Cell], seed: int, progress: Progress) -> Iterator[Line]:
    """A line for each contender, cell and observation. Those of the bare kernel come first, and judge the others."""
    set_sysctl("ipv4/tcp_syn_retries", "1")
    done = progress.done("stopped")
    known = {name_of(line): line["seen"] for line in done if line["contender"] == DIRECT}
    with ExitStack() as stack:
        ends = stack.enter_context(paths(lab))
        for contender in sorted(contenders, key=lambda c: c.name != DIRECT):
            those = _left(contender, _cells_of(contender, chosen), done)
            for (seat, mtu), group in itertools.groupby(those, lambda cell: (cell.seat, cell.mtu)):
                if progress.over():
                    return
                with seated(lab, contender, seat, mtu) as (guest, daemon):
                    _speak(guest)
                    for cell in group:
                        if progress.over():
                            return
                        way = _way(guest, ends[cell.path], cell, daemon)
                        way.timeout = TIMEOUT if contender.name in (DIRECT, "ours") else OTHERS
                        for line in list(_observed(cell, way, seed)):  # all of the cell, or none, are results
                            bare = name_of(line)
                            if contender.name == DIRECT:
                                known[bare] = line["seen"]
                            line |= {"contender": contender.name, "same": line["seen"] == known.get(bare)}
                            yield line | {"direct": known.get(bare)}


def _observed(cell: Cell, way: Way, seed: int) -> Iterator[Line]:
    """A line for each observation; one, if no byte passes."""
    for name in cell.observations:
        way.chance = random.Random(f"{seed} {cell} {name}")
        seen, times = _tried(OBSERVATIONS[name], way)
        line = {"seat": cell.seat, "mtu": cell.mtu, "family": cell.family, "way": cell.way, "path": cell.path}
        yield line | {"observation": name, "seen": seen, "ms": {k: round(v, 2) for k, v in times.items()}}
        if name == "small" and not times:
            return


def _tried(observation: Callable[[Way], Observation], way: Way) -> Observation:
    try:
        return observation(way)
    except OSError as e:
        return [f"failed: {e}"], {}


def _speak(guest: Namespace) -> None:
    """C forwards nothing to a guest that it has heard nothing of."""
    for family, address in ((socket.AF_INET, PEER), (socket.AF_INET6, PEER6)):
        with made(guest, family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", (address, 9))
    time.sleep(0.1)


def _cells_of(contender: Programs, chosen: list[Cell]) -> list[Cell]:
    """The bare kernel has no seat and no link: each family, way and path once. vhost-user is newer than some C."""
    if contender.name == DIRECT:
        wanted: dict[Cell, set[str]] = {}
        for c in chosen:
            bare = Cell(DIRECT, 1500, c.family, c.way, c.path)
            wanted.setdefault(bare, set()).update(c.observations)
        return [_with(c, tuple(name for name in OBSERVATIONS if name in names)) for c, names in wanted.items()]
    return [c for c in chosen if c.seat != VHOST or contender.name == "ours"]


def _left(contender: Programs, chosen: list[Cell], done: list[Line]) -> list[Cell]:
    """The cells of which nothing is known."""
    keys = ("contender", "seat", "mtu", "family", "way", "path")
    known = {tuple(line[key] for key in keys) for line in done}
    return [c for c in chosen if (contender.name, c.seat, c.mtu, c.family, c.way, c.path) not in known]


def _way(guest: Namespace, far: Namespace, cell: Cell, daemon: int | None) -> Way:
    host, beyond, refused, dropped = PATHS[cell.path, cell.family]
    outbound = cell.way == OUT
    return Way(
        make=lambda near, family, kind: made(guest if near else far, family, kind),
        outbound=outbound,
        server=beyond if outbound else "::" if cell.family == "IPv6" else "0.0.0.0",
        port=0 if outbound else PORT,
        client=beyond if outbound else host,
        refused=refused,
        dropped=dropped,
        mtu=cell.mtu,
        spread=SPREADS[cell.path],
        timeout=TIMEOUT,
        daemon=daemon,
    )


# Reports --------------------------------------------------------------------------------------------------------------


def told(line: Line, seed: int) -> str:
    """One line of the report."""
    name = f"{line['seat']} {line['mtu']} {line['family']} {line['way']} {line['path']} {line['observation']}"
    figures = " ".join(f"{key} {value:.1f}" for key, value in line["ms"].items())
    found = "as direct" if line["same"] else f"{line['seen']}, direct: {line['direct']}"
    return f"{line['contender']:6} {name:62} {figures:44} {found}  --seed {seed}"


def kept(line: Line) -> Line:
    """The same for the file of results: without what was seen, unless that differs, or judges the others."""
    whole = not line["same"] or line["contender"] == DIRECT
    return {key: value for key, value in line.items() if key not in ("seen", "direct") or whole}


def outcome(lines: list[Line]) -> str:
    """How many of them saw what the bare kernel saw, and the median of the first figure: near, then delayed."""
    if not lines:
        return "-"
    text = f"{sum(line['same'] for line in lines)} of {len(lines)}"
    figures = []
    for path in (NEAR, DELAYED):
        values = [next(iter(line["ms"].values())) for line in lines if line["path"] == path and line["ms"]]
        if values:
            figures.append(f"{statistics.median(values):.1f}")
    return f"{text}; {', '.join(figures)} ms" if figures else text


def rows(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: a row for each observation, a column for each contender and seat."""
    columns = [(DIRECT, DIRECT), *(("ours", seat) for seat in SEATS), ("pasta", PASTA), ("pasta", PASST)]
    names = {"ours": "ours, ", "pasta": "C, ", DIRECT: ""}
    head = ["observation", *(f"{names[name]}{seat}" for name, seat in columns)]
    found = []
    for observation in OBSERVATIONS:
        of = [line for line in lines if line["observation"] == observation]
        cells_of = [[line for line in of if (line["contender"], line["seat"]) == column] for column in columns]
        found.append([observation, *map(outcome, cells_of)])
    return head, found
