"""Output of statistics: JSON and Prometheus text for programs, a table for users.

All values come from counters that other modules keep (`flow/stats.py` lists them). `snapshot` reads them all, in a time
that does not depend on the number of flows; the other formats are made from snapshots, except `flows`.

    snapshot      a dictionary of dictionaries and numbers: for JSON, and to compare with a later one
    flows         a dictionary for each flow, one after the other: reading a TCP connection costs two system calls, so
                  a caller reads many flows in parts. Flows may begin and end between two parts
    prometheus    text exposition format 0.0.4: a family for each kind of figure, labels for reasons and directions
    table         lines of at most WIDTH columns: differences between two snapshots, and totals

A new figure is counted by its owner, or in `flow/stats.py`, and has a line each in `snapshot`, `_families` and `table`.
pesto draws the table on its side, maybe from the snapshot of an older daemon. A new reason of a drop needs nothing
here.

The table leaves out kinds of flows, paths and drops that never occurred. Its rates are averages over the time between
the two snapshots. Long numbers are in decimal multiples (k, M, G).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..flow.table import LABELS
from ..log import WIDTH
from ..loop.each import record

if TYPE_CHECKING:
    from ..flow.context import Context

Snapshot = dict[str, Any]
NETWORK = "changes", "reads", "failures", "ended"  # of the host's network (`daemon/following.py`)
_DIRECTIONS = ("to_guest", "to_host")
_CELL = 12  # columns of a number in the table


def snapshot(ctx: Context, now: float) -> Snapshot:
    """All counters, as values for JSON. Times are in seconds, sizes in bytes."""
    stats, flows, link = ctx.stats, ctx.flows, ctx.link
    user, system = stats.cpu()
    open_ = dict.fromkeys(LABELS, 0) | flows.opened
    closed: dict[str, dict[str, int]] = {label: {} for label in LABELS}
    for (label, why), count in flows.closed.items():
        closed[label][why] = count
        open_[label] -= count
    network = stats.network() if stats.network is not None else {}
    return {
        "version": __version__,
        "mode": ctx.config.mode,
        "time": round(time.time(), 3),
        "uptime": round(now - stats.started, 3),
        "guests": stats.gauge("guests", 1),
        "link": {
            "from_guest": {"frames": stats.frames_from_guest, "bytes": stats.bytes_from_guest},
            "to_guest": {"frames": link.sent_frames, "bytes": link.sent_bytes},
        },
        "spliced": {
            proto: {direction: tally.bytes for direction, tally in zip(_DIRECTIONS, tallies, strict=True)}
            for proto, tallies in stats.spliced.items()
        },
        "flows": {
            label: {"open": open_[label], "opened": flows.opened[label], "closed": closed[label]} for label in LABELS
        },
        "drops": dict(ctx.drops),
        "loop": {"wakeups": ctx.reactor.wakeups, "events": ctx.reactor.events},
        "cpu": {"user": round(user, 6), "system": round(system, 6)},
        "memory": stats.resident(),
        "listeners": stats.gauge("listeners"),
        "forwards": stats.gauge("forwards"),
        "groups": stats.gauge("groups"),
        "network": {name: network.get(name, 0) for name in NETWORK},
    }


def flows(ctx: Context, now: float, first: int = 0) -> Iterator[dict[str, object]]:
    """Flows by index, from `first` on. The iterator may be read in parts; flows that have ended are left out.

    So is a flow whose report fails: an internal error, which is recorded.
    """
    by_index = ctx.flows.by_index
    index = first
    while index < len(by_index):
        flow = by_index[index]
        if flow is not None:
            try:
                row = flow.info(now).row()
            except Exception as e:
                record(ctx.drops, f"the report of a {flow.kind}", e)
            else:
                yield row
        index += 1


# Prometheus ----------------------------------------------------------------------------------------------------------

Sample = tuple[dict[str, str], float]


def prometheus(ctx: Context, now: float) -> str:
    """Text exposition format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats)."""
    return "".join(_family(*family) for family in _families(snapshot(ctx, now)))


def _families(now: Snapshot) -> Iterator[tuple[str, str, str, list[Sample]]]:
    """Name, type, help, samples: of everything in a snapshot."""
    link, loop, cpu, by_label = now["link"], now["loop"], now["cpu"], now["flows"]
    yield "passt_info", "gauge", "Which program this is.", [({"version": now["version"], "mode": now["mode"]}, 1)]
    for noun, direction, verb in (("receive", "to_guest", "was"), ("transmit", "from_guest", "has")):
        for unit, value in link[direction].items():
            text = f"{unit.capitalize()} that the guest {verb} sent."
            yield f"passt_guest_{noun}_{unit}_total", "counter", text, [({}, value)]
    spliced = [
        ({"protocol": proto, "direction": direction}, value)
        for proto, directions in now["spliced"].items()
        for direction, value in directions.items()
    ]
    yield "passt_spliced_bytes_total", "counter", "Payload moved between loopbacks, without a frame.", spliced
    yield "passt_flows", "gauge", "Open flows.", [({"kind": k}, f["open"]) for k, f in by_label.items()]
    opened = [({"kind": k}, f["opened"]) for k, f in by_label.items()]
    yield "passt_flows_opened_total", "counter", "Flows that were opened.", opened
    closed = [({"kind": k, "reason": r}, n) for k, f in by_label.items() for r, n in sorted(f["closed"].items())]
    yield "passt_flows_closed_total", "counter", "Flows that were closed.", closed
    drops = [({"reason": reason}, n) for reason, n in sorted(now["drops"].items())]
    yield "passt_drops_total", "counter", "Frames, datagrams and connections that were dropped.", drops
    yield "passt_loop_wakeups_total", "counter", "How often the loop has waited.", [({}, loop["wakeups"])]
    yield "passt_loop_events_total", "counter", "Events that the loop has handled.", [({}, loop["events"])]
    yield "passt_guest_connected", "gauge", "Guests at the other end of the link.", [({}, now["guests"])]
    yield "passt_listeners", "gauge", "Sockets that wait for connections and datagrams.", [({}, now["listeners"])]
    yield "passt_forwards", "gauge", "Forwarding rules in force.", [({}, now["forwards"])]
    yield "passt_multicast_groups", "gauge", "Multicast groups that the guest is in.", [({}, now["groups"])]
    network = now["network"]
    texts = (
        ("changes", "Changes of the host's network that the guest's view has followed."),
        ("reads", "How often the host's addresses and routes were read after a change."),
        ("failures", "Readings, and changes in the namespace, that failed."),
        ("ended", "Flows that were ended as their address on the host was gone."),
    )
    for key, text in texts:
        yield f"passt_network_{key}_total", "counter", text, [({}, network[key])]
    modes: list[Sample] = [({"mode": mode}, seconds) for mode, seconds in cpu.items()]
    yield "passt_cpu_seconds_total", "counter", "Processor time by mode.", modes
    yield "process_cpu_seconds_total", "counter", "Processor time.", [({}, sum(cpu.values()))]
    yield "process_resident_memory_bytes", "gauge", "Resident memory.", [({}, now["memory"])]
    started = round(now["time"] - now["uptime"], 3)
    yield "process_start_time_seconds", "gauge", "When the program was started, since the epoch.", [({}, started)]


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"{name}{{{inner}}} {value!r}" if inner else f"{name} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# Table ---------------------------------------------------------------------------------------------------------------


def table(now: Snapshot, earlier: Snapshot | None = None) -> list[str]:
    """Differences to `earlier`, or to the start, and totals."""
    seconds = max(now["uptime"] - (earlier["uptime"] if earlier else 0.0), 1e-3)
    before = earlier or {}
    cpu = sum(now["cpu"].values())
    share = (cpu - sum(before.get("cpu", {}).values())) / seconds
    lines = [
        f"Statistics of the last {seconds:.1f} s, {now['uptime']:.1f} s after the start",
        f"  {_count(now['guests'], 'guest')}, {_count(now['forwards'], 'forward')}, "
        f"{_count(now['listeners'], 'listener')}; memory {_short(now['memory'])}B",
        _line("", "per second", "in all", "per second", "in all"),
        _line("", "frames", "frames", "bytes", "bytes"),
    ]
    for text, direction in (("guest -> host", "from_guest"), ("host -> guest", "to_guest")):
        lines.append(_rates(text, now, before, seconds, ("link", direction, "frames"), ("link", direction, "bytes")))
    for proto in ("tcp", "udp"):
        for text, direction in (("-> host", "to_host"), ("-> guest", "to_guest")):
            if now["spliced"][proto][direction]:
                name = f"{proto.upper()} spliced {text}"
                lines.append(_rates(name, now, before, seconds, None, ("spliced", proto, direction)))
    lines += _flow_lines(now, before, seconds)
    lines.append(_line("", "per second", "in all"))
    lines.append(_line("processor", f"{share:.1%}", f"{cpu:.2f} s"))
    for text, key in (("wake-ups", "wakeups"), ("events", "events")):
        lines.append(_rates(text, now, before, seconds, ("loop", key)))
    if _at(now, ("network", "changes")):
        lines.append(_rates("network changes", now, before, seconds, ("network", "changes")))
    for reason in sorted(now["drops"]):
        lines.append(_rates(f"drop: {reason}", now, before, seconds, ("drops", reason)))
    return lines


def _flow_lines(now: Snapshot, before: Snapshot, seconds: float) -> list[str]:
    """A line for each kind of flow that has occurred."""
    lines = [_line("flows", "open", "opened/s", "opened", "closed")]
    for label in LABELS:
        flow = now["flows"][label]
        if flow["opened"]:
            opened = flow["opened"]
            rate = (opened - _at(before, ("flows", label, "opened"))) / seconds
            values = flow["open"], rate, opened, opened - flow["open"]
            lines.append(_line(f"  {label.replace('_splice', ' spliced')}", *map(_short, values)))
    return lines if len(lines) > 1 else []


def _rates(text: str, now: Snapshot, before: Snapshot, seconds: float, *paths: tuple[str, ...] | None) -> str:
    """A line with the rate and the total of counters; None stands for one that does not exist."""
    cells: list[str] = []
    for path in paths:
        if path is None:
            cells += ["", ""]
        else:
            total = _at(now, path)
            cells += [_short((total - _at(before, path)) / seconds), _short(total)]
    return _line(text, *cells)


def _at(snap: Snapshot, path: tuple[str, ...]) -> float:
    """A number in a snapshot, 0 if it is not there (yet)."""
    value: Any = snap
    for key in path:
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return value if isinstance(value, int | float) else 0


def _line(text: str, *cells: str) -> str:
    """A line whose last columns are the cells; the text takes the rest of the width."""
    width = WIDTH - 2 - len(cells) * _CELL
    return (f"  {text:<{width}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)).rstrip()


def _short(value: float) -> str:
    """Five digits at most: 12345, 123.4 k, 1.234 G."""
    if isinstance(value, float) and value < 99.95:
        return f"{value:.1f}"
    if value < 99_999.5:
        return f"{value:.0f}"
    for unit in "kMGTP":
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value:.0f} P"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
