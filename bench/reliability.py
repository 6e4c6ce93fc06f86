"""`python -m bench.reliability RESULTS.json PAGE PICTURE`: the tables of PAGE between two markers, and the picture.

The results are those of `bench.adversity`, in one file for all contenders. The picture has throughput against loss, and
against the round trip time, for each mode and direction.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import adverse_stopped
from .adverse_latency import BULKS, COUNTS, merged
from .adversity import FAMILIES, FAULTS, LOSSES, MODES, MTUS, ROUND_TRIPS, WAYS

MARKERS = ("<!-- adversity: made by `make adversity` -->", "<!-- end of adversity -->")
NEWER, NEWER_NAME = "newer", "newer C"  # a peer in the part `latency`
NAMES = {"direct": "direct", "ours": "ours", "pasta": "C"}  # contenders, and their names in tables
COLOURS = {"direct": "#777777", "ours": "#1f77b4", "pasta": "#d62728"}
LOSS, ROUND_TRIP = "curve: loss ", "curve: round trip "
NONE = "-"
STOPPED = """
Stopped daemons. The daemon is stopped for 50 ms at a time: at three random moments of a transfer of 512 KiB each way,
and while either end sends, ends or resets. Observations that saw what the bare kernel shows, of all that were made: at
each MTU, in both families and directions, to a peer that is near, and to one with a round trip of 10 ms. The figures
are medians in ms, for the near peer and for the other: of an exchange, of all connections or datagrams with the stops,
and of a transfer less the stops.

"""
LATENCY = """
Milliseconds of an exchange: p50, p99, and the rate of the flow beside it in Gbit/s. *direct* has no link, so no MTU. A
key press is an exchange of 36 bytes, as of ssh, each 50 ms after the last. Both ends have cubic for congestion control.

"""
DIRECTIONS = ("up", "down")

Result = dict[str, Any]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def outcome(results: list[Result]) -> str:
    """How many arrived whole, the median time, the longest gap; and what became of the others."""
    if not results:
        return NONE
    whole = [r for r in results if r["outcome"] == "whole"]
    bad = [r["outcome"].partition(":")[0] for r in results if r["outcome"] != "whole"]
    text = f"{len(whole)} of {len(results)}"
    if whole:
        text += f", {statistics.median(r['time'] for r in whole):.2f} s, {max(r['gap'] for r in whole):.2f} s"
    return text + "".join(f"; {bad.count(kind)} {kind}" for kind in sorted(set(bad)))


def cost(results: list[Result]) -> str:
    """Processor time of the daemon for each MiB, in milliseconds."""
    moved = sum(r["size"] * sum(WAYS[r["way"]][:2]) for r in results) / (1 << 20)
    return f"{1e3 * sum(r['cpu'] for r in results) / moved:.1f}" if moved else NONE


def matrix_table(transfers: list[Result]) -> str:
    """A row for each fault, with both modes and all contenders, at what all of them did."""
    columns = [(name, mode) for mode in MODES for name in ("ours", "pasta")]
    head = ["fault", *(f"{NAMES[name]}, {mode}" for name, mode in columns), "direct"]
    rows = []
    for fault in FAULTS:
        those = [r for r in transfers if (r["fault"], r["mtu"], r["family"]) == (fault, 1500, "IPv4")]
        cells = [outcome([r for r in those if (r["contender"], r["mode"]) == column]) for column in columns]
        rows.append([fault, *cells, outcome([r for r in those if r["contender"] == "direct"])])
    return table(head, rows)


def own_table(transfers: list[Result]) -> str:
    """All of this project's transfers: a row for each fault, a column for each MTU."""
    seats = [(mode, mtu) for mode in MODES for mtu in MTUS]
    own: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for r in transfers:
        if r["contender"] == "ours":
            own[r["fault"], r["mode"], r["mtu"]].append(r)
    rows = [[fault, *(outcome(own[fault, mode, mtu]) for mode, mtu in seats)] for fault in FAULTS]
    costs = ["processor, ms per MiB, no fault", *(cost(own["none", mode, mtu]) for mode, mtu in seats)]
    return table(["fault", *(f"{mode}, {mtu}" for mode, mtu in seats)], [*rows, costs])


def rate(results: list[Result]) -> float | None:
    """MB/s of the median, a transfer that failed counting as none."""
    if not results:
        return None
    return statistics.median(r["size"] / r["time"] / 1e6 if r["outcome"] == "whole" else 0.0 for r in results)


def series(transfers: list[Result], name: str, mode: str, way: str, begin: str) -> list[tuple[float, float]]:
    """Points of a curve: loss or round trip, and MB/s. The bare kernel has no mode."""
    points: dict[float, list[Result]] = defaultdict(list)
    for r in transfers:
        of_curve = (r["contender"], r["way"]) == (name, way) and r["fault"].startswith(begin)
        if of_curve and (name == "direct" or r["mode"] == mode):
            points[float(r["fault"].removeprefix(begin).split()[0])].append(r)
    return [(x, found) for x, those in sorted(points.items()) if (found := rate(those)) is not None]


def curve_table(transfers: list[Result], begin: str, values: Iterable[float], unit: str) -> str:
    """MB/s at each value."""
    columns = [(name, mode, way) for mode in MODES for way in DIRECTIONS for name in ("ours", "pasta")]
    head = [unit, *(f"{NAMES[n]}, {mode} {way}" for n, mode, way in columns), *(f"direct, {way}" for way in DIRECTIONS)]
    found = [dict(series(transfers, *column, begin)) for column in columns]
    found += [dict(series(transfers, "direct", "", way, begin)) for way in DIRECTIONS]
    rows = [[f"{x:g}", *(f"{one[x]:.1f}" if x in one else NONE for one in found)] for x in map(float, values)]
    return table(head, rows)


def latency_table(latencies: list[Result], mtu: int, family: str) -> str:
    """p50 and p99 in milliseconds of each exchange beside each bulk flow."""
    seats = [("ours", "pasta"), ("pasta", "pasta"), ("ours", "passt"), ("pasta", "passt"), ("ours", "vhost-user")]
    those = [r for r in latencies if r["family"] == family and r["mtu"] in (0, mtu)]
    if any(r["contender"] == NEWER for r in those):
        seats += [(NEWER, mode) for mode in ("pasta", "passt", "vhost-user")]
    head = ["exchange", "bulk flow", "direct", *(f"{NAMES.get(name, NEWER_NAME)}, {mode}" for name, mode in seats)]
    found = {(r["kind"], r["bulk"], r["contender"], r["mode"]): r for r in merged(those)}
    rows = []
    measured = {(r["kind"], r["bulk"]) for r in those}
    for kind, bulk in itertools.product(COUNTS, BULKS):
        if (kind, bulk) not in measured:
            continue
        cells = []
        for seat in [("loopback", "direct"), *seats]:
            r = found.get((kind, bulk, *seat))
            beside = f" ({r['rate'] * 8e-9:.1f})" if r and r["rate"] else ""
            cells.append(f"{r['p50']:.2f}, {r['p99']:.2f}{beside}" if r else NONE)
        rows.append([kind, bulk, *cells])
    return table(head, rows)


def page(results: dict[str, Any]) -> str:
    """The text between the markers."""
    transfers = results["transfers"]
    bad = [r for r in transfers if r["contender"] == "ours" and r["outcome"] != "whole"]
    own = sum(r["contender"] == "ours" for r in transfers)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(results["seeds"]))
    parts = [
        f"{own} transfers of this project, {own - len(bad)} of them whole. Seeds of the runs: {seeds}.\n",
        *(f"- not whole: {r['mode']} {r['mtu']} {r['family']} {r['way']} {r['fault']}: {r['outcome']}\n" for r in bad),
        "\nMTU 1500, IPv4: transfers that arrived whole, their median time, longest gap; what became of the rest.\n",
        matrix_table(transfers),
        f"\nThis project with {' and '.join(FAMILIES)} at each MTU:\n",
        own_table(transfers),
        "\nMB/s against loss in each direction, in percent of frames:\n",
        curve_table(transfers, LOSS, LOSSES, "loss, %"),
        "\nMB/s against the round trip time of the link:\n",
        curve_table(transfers, ROUND_TRIP, ROUND_TRIPS, "ms"),
    ]
    if results.get("stopped"):
        head, rows = adverse_stopped.rows(results["stopped"])
        parts += [STOPPED, table(head, rows)]
    if results["latencies"]:
        parts.append(LATENCY)
        for mtu, family in itertools.product(MTUS, FAMILIES):
            if any((r["mtu"], r["family"]) == (mtu, family) for r in results["latencies"]):
                parts += [f"MTU {mtu}, {family}:\n", latency_table(results["latencies"], mtu, family)]
    return "\n".join(part if part.startswith("|") else part.rstrip("\n") + "\n" for part in parts)


def _panel(axes: Axes, transfers: list[Result], mode: str, way: str, begin: str) -> None:
    for name in NAMES:
        points = series(transfers, name, mode, way, begin)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.3, color=COLOURS[name], label=NAMES[name])
    axes.set_xscale("symlog", linthresh=0.1 if begin == LOSS else 2)
    ticks = LOSSES if begin == LOSS else ROUND_TRIPS
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7)
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(f"{mode}, {way}", fontsize=9)
    axes.grid(lw=0.3)


def draw(results: dict[str, Any]) -> Figure:
    """Rows: loss, round trip. Columns: modes and directions."""
    figure, panels = plt.subplots(2, 4, figsize=(11, 5.4), layout="constrained")
    for row, (begin, label) in enumerate(((LOSS, "loss each way, %"), (ROUND_TRIP, "round trip of the link, ms"))):
        for axes, (mode, way) in zip(panels[row], [(m, w) for m in MODES for w in DIRECTIONS], strict=True):
            _panel(axes, results["transfers"], mode, way, begin)
            axes.set_xlabel(label, fontsize=8)
        panels[row][0].set_ylabel("MB/s", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def fill(path: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the markers of a page."""
    before, begun, rest = path.read_text().partition(MARKERS[0])
    _, ended, after = rest.partition(MARKERS[1])
    if not begun or not ended:
        raise ValueError(f"{path} has no place for tables: {MARKERS[0]}")
    path.write_text(f"{before}{begun}\n\n{page(results)}\n{ended}{after}")


def main(argv: list[str]) -> None:
    """Write both."""
    results = json.loads(Path(argv[0]).read_text())
    fill(Path(argv[1]), results)
    draw(results).savefig(argv[2], dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
