"""The measurements: the rows of the table, and how one sample of each is taken.

A row has a server and a client. Every sample starts its own, lasts `seconds`, and notes the daemon's processor time
around the client's life. Directions are named from the guest: "out" is guest to host, "in" is host to guest. The row's
`Route` says which end connects:

    route     client   server   to
    --------  -------  -------  -----------------------------------------------
    to-host   guest    host     the host's loopback, by the gateway's address
    to-host6  guest    host     the same by IPv6
    to-peer   guest    peer     another host
    loopback  host     guest    a forwarded port, on the host's loopback
    inbound   peer     guest    a forwarded port, at the host's address
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import programs
from .contenders import LOAD_PORTS, Contender, Seat, wait_for_route
from .lab import HOST, Lab, LabError, Namespace, Placement, Used, resident_kib, share_kib, used_by, wait_for
from .vm import MACHINE, RELAY, VHOST

LOAD = [sys.executable, "-S", "-E", str(Path(__file__).with_name("load.py"))]
IPERF_PORT = 5201
MANY = 30  # containers that start at once
GRACE = 8.0  # seconds beyond its own time after which a client is given up

BIG, SMALL = 65520, 1500


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: `value` in the row's unit, and daemon seconds for each unit of work (None: no daemon).

    `p50` and `p99` are the microseconds that an operation took, where there are operations. `program` is the part of
    `cpu` in user mode: the rest is work of the kernel on the daemon's account.
    """

    value: float
    cpu: float | None = None
    p50: float | None = None
    p99: float | None = None
    program: float | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """The parameters of a measurement: laboratory, contender, processors, duration."""

    lab: Lab
    contender: Contender
    seat: Seat
    place: Placement
    seconds: float


@dataclass(frozen=True, slots=True)
class Route:
    """Where client and server are, what the client connects to, and what the server listens on."""

    client: Namespace
    server: Namespace
    to: str
    listen: str


def _route(bench: Bench, name: str) -> Route:
    lab, seat = bench.lab, bench.seat
    return {
        "to-host": Route(seat.guest, lab.host, seat.to_host, "127.0.0.1"),
        "to-host6": Route(seat.guest, lab.host, seat.to_host6, "::1"),
        "to-peer": Route(seat.guest, lab.peer, seat.to_peer, seat.to_peer),
        "loopback": Route(lab.host, seat.guest, "127.0.0.1", "0.0.0.0"),
        "inbound": Route(lab.peer, seat.guest, HOST, "0.0.0.0"),
    }[name]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    `unit` is that of the value, `work` what the daemon's processor time is given for, `placement` a key of
    `lab.placements`, `target` what is asked of us: against the best C figure unless it says otherwise. `ports` are the
    TCP ports that daemons forward.
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
    starts: bool = False  # what is measured is starting
    inbound: bool = False  # needs a daemon that forwards ports
    ports: str = "none"
    vm: str = ""  # behind which of the seats of vm.py the guest is
    ipv6: bool = False
    slow: bool = False  # a sample takes many seconds, whatever is asked for


@contextmanager
def _server(bench: Bench, where: Namespace, command: list[str], word: str) -> Iterator[None]:
    server = bench.lab.spawn([*Placement.argv(bench.place.server), *command], where)
    try:
        wait_for(server, word)
        yield
    finally:
        bench.lab.stop(server)


def _cpu(seat: Seat) -> Used:
    return used_by(seat.daemon.pid) if seat.daemon else Used(0.0, 0.0)


def _client(bench: Bench, where: Namespace, command: list[str]) -> tuple[str, Used]:
    """The client's output, and the daemon's processor time meanwhile."""
    before = _cpu(bench.seat)
    printed = where.run([*Placement.argv(bench.place.client), *command], timeout=bench.seconds + GRACE)
    return printed, _cpu(bench.seat).since(before)


def _sample(
    bench: Bench, value: float, used: Used, work: float, p50: float | None = None, p99: float | None = None
) -> Sample:
    """The daemon `used` so much for `work`."""
    if not bench.seat.daemon or not work:
        return Sample(value, None, p50, p99)
    return Sample(value, used.total / work, p50, p99, used.program / work)


def stream(reverse: bool, route: str, streams: int = 1) -> Callable[[Bench], Sample]:
    """TCP streams by iperf3: Gbit/s in all, daemon seconds for each gigabyte."""

    def measure(bench: Bench) -> Sample:
        way = _route(bench, route)
        command = ["iperf3", "-J", "-c", way.to, "-p", str(IPERF_PORT), "-t", f"{bench.seconds:g}", "-P", str(streams)]
        command += ["-R"] if reverse else []
        listen = ["iperf3", "-s", "-p", str(IPERF_PORT), "--forceflush"]
        with _server(bench, way.server, listen, "listening"):
            printed, used = _client(bench, way.client, command)
        result = json.loads(printed)["end"]["sum_received"]
        return _sample(bench, result["bits_per_second"] / 1e9, used, result["bytes"] / 1e9)

    return measure


def machine_stream(reverse: bool) -> Callable[[Bench], Sample]:
    """A TCP stream whose client is iperf3 in a virtual machine: Gbit/s, daemon seconds for each gigabyte."""

    def measure(bench: Bench) -> Sample:
        machine = bench.seat.machine
        if machine is None:
            raise LabError("no machine")
        command = f"iperf3 -J -c {bench.seat.to_host} -p {IPERF_PORT} -t {bench.seconds:g} {'-R' if reverse else ''}"
        listen = ["iperf3", "-s", "-p", str(IPERF_PORT), "--forceflush"]
        with _server(bench, bench.lab.host, listen, "listening"):
            before = _cpu(bench.seat)
            status, printed = machine.call(command, bench.seconds + GRACE)
            used = _cpu(bench.seat).since(before)
        if status:
            raise LabError(f"iperf3 in the machine: status {status}: {printed.strip()[-200:]}")
        result = json.loads(printed)["end"]["sum_received"]
        return _sample(bench, result["bits_per_second"] / 1e9, used, result["bytes"] / 1e9)

    return measure


def load(server: str, client: str, flows: int = 1, route: str = "to-host") -> Callable[[Bench], Sample]:
    """A pair of our load generators: operations a second, daemon microseconds for each."""

    def measure(bench: Bench) -> Sample:
        way = _route(bench, route)
        command = [*LOAD, client, way.to, "--seconds", f"{bench.seconds:g}", "--flows", str(flows)]
        with _server(bench, way.server, [*LOAD, server, way.listen], "ready"):
            printed, used = _client(bench, way.client, command)
        result = json.loads(printed)
        times = [result[name] * 1e6 for name in ("p50", "p99") if name in result]
        return _sample(bench, result["count"] / result["seconds"], used, result["count"] / 1e6, *times)

    return measure


def program(
    server: programs.Server, client: programs.Client, read: Callable[[str], programs.Counted], flows: int
) -> Callable[[Bench], Sample]:
    """A server and a client that others wrote: operations a second, daemon microseconds for each."""

    def measure(bench: Bench) -> Sample:
        with server(bench.lab, Placement.argv(bench.place.server)):
            command = client(bench.seat, bench.seconds, flows)
            printed, used = _client(bench, bench.seat.guest, command)
        rate, p50, p99 = read(printed)
        return _sample(bench, rate, used, rate * bench.seconds / 1e6, p50, p99)

    return measure


def start_to_ready(ports: str) -> Callable[[Bench], Sample]:
    """Milliseconds for a namespace with forwarded `ports` to come up, run true(1) and go."""

    def measure(bench: Bench) -> Sample:
        if bench.contender.start is None:
            raise LabError("not measured")
        before, used = time.monotonic(), _children()
        bench.lab.host.run(bench.contender.start(ports))
        return _started(time.monotonic() - before, _children().since(used), 1)

    return measure


def _children() -> Used:
    """Processor time of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_utime)


def _started(seconds: float, used: Used, count: int) -> Sample:
    return Sample(seconds * 1e3, used.total * 1e3 / count, program=used.program * 1e3 / count)


def start_many(bench: Bench) -> Sample:
    """Milliseconds until MANY namespaces that start at once have run true(1); processor milliseconds of each."""
    start = bench.contender.start
    if start is None:
        raise LabError("not measured")
    before, used = time.monotonic(), _children()
    started = [bench.lab.spawn(start("none")) for _ in range(MANY)]
    for process in started:
        _, said = process.communicate(timeout=GRACE)
        if process.returncode:
            raise LabError(f"status {process.returncode}: {said.strip()[-200:]}")
    return _started(time.monotonic() - before, _children().since(used), MANY)


def shared(bench: Bench) -> Sample:
    """MiB for each of MANY daemons that run beside each other (PSS)."""
    command = bench.contender.command
    assert command is not None
    with ExitStack() as stack:
        guests = [stack.enter_context(bench.lab.guest()) for _ in range(MANY)]
        daemons = [bench.lab.spawn(command(guest.pid or 0, BIG, "none")) for guest in guests]
        for daemon in daemons:
            stack.callback(bench.lab.stop, daemon)
        for guest, daemon in zip(guests, daemons, strict=True):
            wait_for_route(bench.contender, guest, daemon)
        return Sample(sum(share_kib(daemon.pid) for daemon in daemons) / MANY / 1024)


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
                target = ("1.2 x C" if reverse else "1.1 x C") if mtu == BIG else "8 x C" if reverse else "2 x C"
                measure = stream(reverse, f"to-{far}")
                rows.append(
                    Row(name, title, "Gbit/s", "CPU s/GB", mtu, "spread", measure, target if far == "host" else "")
                )
    for reverse in (False, True):
        title = f"IPv6 TCP {'host → namespace' if reverse else 'namespace → host'}, MTU {BIG}"
        name, measure = f"tcp6-{'in' if reverse else 'out'}-host-{BIG}", stream(reverse, "to-host6")
        rows.append(Row(name, title, "Gbit/s", "CPU s/GB", BIG, "spread", measure, ipv6=True))
    return rows


# Title, server, client, flows of what is measured in exchanges per second
LOADS = {
    "udp-out": ("UDP 1400 B namespace → host", "udp-sink", "udp-send", 1),
    "udp-in": ("UDP 1400 B host → namespace", "udp-source", "udp-receive", 1),
    "tcp-rr-1": ("TCP round trips, 1 flow", "tcp-echo", "tcp-rr", 1),
    "tcp-rr-16": ("TCP round trips, 16 flows", "tcp-echo", "tcp-rr", 16),
    "tcp-rr-64": ("TCP round trips, 64 flows", "tcp-echo", "tcp-rr", 64),
    "udp-rr": ("UDP round trips", "udp-echo", "udp-rr", 1),
    "udp-rr-16": ("UDP round trips, 16 flows", "udp-echo", "udp-rr", 16),
    "udp-rr-64": ("UDP round trips, 64 flows", "udp-echo", "udp-rr", 64),
    "tcp-crr-1": ("connect-request-response, 1 flow", "tcp-answer", "tcp-crr", 1),
    "tcp-crr-16": ("connect-request-response, 16 flows", "tcp-answer", "tcp-crr", 16),
    "tcp-crr-64": ("connect-request-response, 64 flows", "tcp-answer", "tcp-crr", 64),
}
LOADS_OF_CONNECTIONS = [name for name in LOADS if name.startswith("tcp-crr")]
BY_IPV6 = "tcp-rr-16", "udp-rr-16", "tcp-crr-16"


def _loads() -> list[Row]:
    targets = {"udp-out": "1.3 x C", "udp-in": "1.3 x C", **dict.fromkeys(LOADS_OF_CONNECTIONS, "1 x C")}
    rows = [
        Row(name, title, "1/s", "CPU us", BIG, "apart", load(server, client, flows), targets.get(name, "1.2 x C"))
        for name, (title, server, client, flows) in LOADS.items()
    ]
    for name in BY_IPV6:
        title, server, client, flows = LOADS[name]
        protocol, _, rest = name.partition("-")
        measure = load(server, client, flows, "to-host6")
        rows.append(Row(f"{protocol}6-{rest}", f"IPv6 {title}", "1/s", "CPU us", BIG, "apart", measure, ipv6=True))
    return rows


def _programs() -> list[Row]:
    http = program(programs.nginx, programs.wrk, programs.requests, 16)
    rows = [Row("http", "HTTP requests on 16 kept connections (wrk)", "1/s", "CPU us", BIG, "apart", http, "1 x C")]
    for flows in (8, 50):
        measure = program(programs.postgres, programs.pgbench, programs.queries, flows)
        title = f"queries, {flows} clients (pgbench)"
        rows.append(Row(f"pgbench-{flows}", title, "1/s", "CPU us", BIG, "apart", measure, "1 x C"))
    return rows


def _forwarded_streams() -> list[Row]:
    """Connections to forwarded ports: over loopback, and from another host through the tap."""
    rows = []
    for reverse in (False, True):
        way = "namespace → host" if reverse else "host → namespace"
        name = "out" if reverse else "in"
        for streams in (1, 8):
            title = f"forwarded loopback TCP {way}" + (f", {streams} streams" if streams > 1 else "")
            measure = stream(reverse, "loopback", streams)
            rows.append((f"lo-tcp-{name}-{streams}", title, BIG, measure, "1 x C"))
        for mtu in (BIG, SMALL):
            title = f"forwarded TCP {way.replace('host', 'peer')}, MTU {mtu}"
            rows.append((f"fwd-tcp-{name}-{mtu}", title, mtu, stream(reverse, "inbound"), "as outbound"))
    return [
        Row(name, title, "Gbit/s", "CPU s/GB", mtu, "spread", measure, target, inbound=True, ports=LOAD_PORTS)
        for name, title, mtu, measure, target in rows
    ]


def _forwarded_loads() -> list[Row]:
    """Clients are on the other side here: who sends to a sink in the namespace sends into it."""
    way = {"lo-udp-in": "udp-out", "lo-udp-out": "udp-in"}
    targets = {"lo-udp-in": "1.3 x C", "lo-udp-out": "1.3 x C"}
    rows = []
    for name in ("lo-udp-in", "lo-udp-out", "lo-tcp-rr-16", "lo-tcp-crr-1", "lo-tcp-crr-16"):
        title = LOADS[name.removeprefix("lo-")][0]
        _, server, client, flows = LOADS[way.get(name, name.removeprefix("lo-"))]
        measure = load(server, client, flows, "loopback")
        rows.append(_forwarded(name, f"forwarded loopback {title}", measure, targets.get(name, "1 x C")))
    title, server, client, flows = LOADS["tcp-crr-16"]
    title = f"forwarded {title.replace(',', ' from peer,')}"
    rows.append(_forwarded("fwd-tcp-crr-16", title, load(server, client, flows, "inbound"), "1 x C"))
    return rows


def _forwarded(name: str, title: str, measure: Callable[[Bench], Sample], target: str) -> Row:
    return Row(name, title, "1/s", "CPU us", BIG, "apart", measure, target, inbound=True, ports=LOAD_PORTS)


def _cost(name: str, title: str, unit: str, measure: Callable[[Bench], Sample], target: str, ports: str) -> Row:
    starts = name not in ("memory", "memory-1000")
    return Row(
        name, title, unit, "CPU ms" if unit == "ms" else "", BIG, "free", measure, target,
        fewer_is_better=True, daemon_only=True, starts=starts, inbound=ports != "none", ports=ports,
        slow=name.endswith(f"-{MANY}"),
    )  # fmt: skip


def _costs() -> list[Row]:
    rows = []
    thousand = "6000-6999"  # below the ports that clients of the laboratory use
    for suffix, what, ports, targets in (
        ("", "", "none", ("1.5 x C", "20 MiB")),
        ("-1000", ", 1000 ports forwarded", thousand, ("1.5 x C", "20 MiB")),
    ):
        rows.append(_cost(f"start{suffix}", f"start to ready{what}", "ms", start_to_ready(ports), targets[0], ports))
        rows.append(_cost(f"memory{suffix}", f"resident after start{what}", "MiB", resident, targets[1], ports))
    rows.append(_cost(f"start-{MANY}", f"start to ready, {MANY} at once", "ms", start_many, "1.6 x C", "none"))
    rows.append(_cost(f"memory-{MANY}", f"share of memory, each of {MANY} (PSS)", "MiB", shared, "13 MiB", "none"))
    return rows


def _machines() -> list[Row]:
    """Rows with a guest on a UNIX socket: relays for a fast machine, and an emulated one."""
    rows = []
    targets = {RELAY: ("1 x C", "0.85 x C", "1 x C", "1 x C"), VHOST: ("1 x C", "5 x C", "1.2 x C", "1 x C")}
    for kind, prefix, what in ((RELAY, "vm", "relay"), (VHOST, "vhost", "shared memory")):
        big, small, udp, trips = targets[kind]
        trip = f"TCP round trips through {'the ' if kind == RELAY else ''}{what}"
        for mtu, target in ((BIG, big), (SMALL, small)):
            for reverse in (False, True):
                title = f"TCP {f'host → {what}' if reverse else f'{what} → host'}, MTU {mtu}"
                name = f"{prefix}-tcp-{'in' if reverse else 'out'}-{mtu}"
                measure = stream(reverse, "to-host")
                rows.append(Row(name, title, "Gbit/s", "CPU s/GB", mtu, "spread", measure, target, vm=kind))
        plan = (
            (f"{prefix}-udp-out", f"UDP 1400 B {what} → host", "udp-sink", "udp-send", 1, udp),
            (f"{prefix}-udp-in", f"UDP 1400 B host → {what}", "udp-source", "udp-receive", 1, udp),
            (f"{prefix}-tcp-rr-1", f"{trip}, 1 flow", "tcp-echo", "tcp-rr", 1, trips),
            (f"{prefix}-tcp-rr-16", f"{trip}, 16 flows", "tcp-echo", "tcp-rr", 16, trips),
        )
        for name, title, server, client, flows, target in plan:
            measure = load(server, client, flows)
            rows.append(Row(name, title, "1/s", "CPU us", BIG, "apart", measure, target, vm=kind))
    for reverse in (False, True):
        title = f"TCP {'host → emulated machine' if reverse else 'emulated machine → host'}"
        name, measure = f"vm-qemu-{'in' if reverse else 'out'}", machine_stream(reverse)
        rows.append(Row(name, title, "Gbit/s", "CPU s/GB", BIG, "free", measure, "1 x C", vm=MACHINE, slow=True))
    return rows


ROWS = (*_costs(), *_streams(), *_loads(), *_programs(), *_forwarded_streams(), *_forwarded_loads(), *_machines())
