"""`python -m bench.plot RESULTS.json FIGURE SUMMARY [PAGE]`: two pictures, and the table of PAGE between two markers.

    FIGURE      every kind of row, one panel for each, with all contenders (docs/performance.md)
    SUMMARY     four rows, each with its finding in words and a scale of its own (README.md)

Bars are medians. In FIGURE, whiskers go from the smallest to the largest sample. Contenders keep their order and colour
in all panels; one that did not take part in a panel's rows has no place in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .contenders import CONTENDERS
from .report import C_NAMES, Cell, Line, Report, fill, number, read

GBIT, THOUSANDS = (1.0, "Gbit/s"), (1e3, "1000/s")

# Title, rows by name with their tick, divisor and label of the axis.
PANELS: tuple[tuple[str, dict[str, str], tuple[float, str]], ...] = (
    (
        "TCP stream, MTU 65520",
        {"tcp-out-host-65520": "namespace → host", "tcp-in-host-65520": "host → namespace"},
        GBIT,
    ),
    (
        "TCP stream, MTU 1500",
        {"tcp-out-host-1500": "namespace → host", "tcp-in-host-1500": "host → namespace"},
        GBIT,
    ),
    (
        "UDP datagrams of 1400 bytes, delivered",
        {"udp-out": "namespace → host", "udp-in": "host → namespace"},
        THOUSANDS,
    ),
    ("TCP round trips, 16 flows", {"tcp-rr-16": "namespace → host"}, THOUSANDS),
    ("round trips, 1 flow", {"tcp-rr-1": "TCP", "udp-rr": "UDP"}, THOUSANDS),
    ("connect, request, response", {"tcp-crr-1": "1 flow", "tcp-crr-16": "16 flows"}, THOUSANDS),
    (
        "forwarded port, TCP between loopbacks",
        {"lo-tcp-in-1": "host → namespace", "lo-tcp-out-1": "namespace → host", "lo-tcp-in-8": "the first, 8 streams"},
        GBIT,
    ),
    (
        "forwarded port, UDP of 1400 bytes between loopbacks",
        {"lo-udp-in": "host → namespace", "lo-udp-out": "namespace → host"},
        THOUSANDS,
    ),
    (
        "forwarded port, connect, request, response",
        {"lo-tcp-crr-1": "loopback, 1 flow", "lo-tcp-crr-16": "loopback, 16 flows", "fwd-tcp-crr-16": "peer, 16 flows"},
        THOUSANDS,
    ),
    (
        "forwarded port, TCP with another host",
        {
            "fwd-tcp-in-65520": "peer → namespace",
            "fwd-tcp-out-65520": "namespace → peer",
            "fwd-tcp-in-1500": "the first, MTU 1500",
        },
        GBIT,
    ),
    (
        "virtual machine (relay), TCP stream",
        {
            "vm-tcp-out-65520": "out, MTU 65520",
            "vm-tcp-in-65520": "in, MTU 65520",
            "vm-tcp-out-1500": "out, MTU 1500",
            "vm-tcp-in-1500": "in, MTU 1500",
        },
        GBIT,
    ),
    (
        "virtual machine (relay), UDP datagrams of 1400 bytes",
        {"vm-udp-out": "machine → host", "vm-udp-in": "host → machine"},
        THOUSANDS,
    ),
)
COLUMNS = 2
COLOURS = {
    "ours": "#1f6f4a",
    "compiled": "#3f9a6c",
    "ours-wmem": "#79b89a",
    "pasta": "#8a5a2b",
    "pasta-wmem": "#cfa77a",
    "slirp4netns": "#9a9a9a",
    "loopback": "#d9d9d9",
}
GREY = "#444"

# Row by name, what was done, unit as in `number`.
SUMMARY = (
    ("tcp-out-host-1500", "TCP out of the namespace, MTU 1500", "Gbit/s"),
    ("tcp-in-host-1500", "TCP into the namespace, MTU 1500", "Gbit/s"),
    ("udp-out", "UDP out of the namespace, datagrams of 1400 bytes", "datagrams/s"),
    ("tcp-rr-16", "TCP round trips of one byte, 16 connections at once", "round trips/s"),
)
SUMMARY_BARS = (
    ("this project", ("ours",)),
    ("compiled", ("compiled",)),
    ("C pasta", C_NAMES),
    ("slirp4netns", ("slirp4netns",)),
    ("no daemon", ("loopback",)),
)


def panel(axes: Axes, report: Report, title: str, names: dict[str, str], scale: tuple[float, str]) -> None:
    """Grouped bars: one group for each row, one bar for each contender in it."""
    divisor, unit = scale
    lines = {line.name: line for line in report.lines}
    rows = [lines[name] for name in names if name in lines]
    shown = [c.name for c in CONTENDERS if any(line.cells.get(c.name, Cell()).values for line in rows)]
    width = 0.84 / max(1, len(shown))
    for i, name in enumerate(shown):
        for at, line in enumerate(rows):
            values = [v / divisor for v in line.cell(name).values]
            middle = line.cell(name).value()
            if middle is None:
                continue
            middle /= divisor
            x = at + (i - (len(shown) - 1) / 2) * width
            spread = [[middle - min(values)], [max(values) - middle]]
            axes.bar(x, middle, width * 0.92, color=COLOURS[name], yerr=spread, error_kw={"lw": 0.8, "ecolor": GREY})
            label = axes.annotate(f"{middle:.3g}", (x, max(values)), (0, 2), textcoords="offset points", fontsize=7.5)
            label.set(ha="center", va="bottom", rotation=90 if len(rows) > 2 else 0)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit, fontsize=8)
    axes.set_xticks(range(len(rows)), [names[line.name] for line in rows], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.17)
    axes.spines[["top", "right"]].set_visible(False)


def draw(report: Report) -> Figure:
    """All panels."""
    count = -(-len(PANELS) // COLUMNS)
    figure, grid = plt.subplots(count, COLUMNS, figsize=(11, 2.9 * count))
    for axes, (title, names, scale) in zip(grid.flat, PANELS, strict=True):
        panel(axes, report, title, names, scale)
    shown = [c for c in CONTENDERS if c.name in report.contenders()]
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[c.name]) for c in shown]
    legend = figure.legend(handles, [c.label for c in shown], loc="upper center", ncols=len(shown), frameon=False)
    legend.set_bbox_to_anchor((0.5, 0.985))
    note = ", ".join(f"{key} {value}" for key, value in report.made.items())
    figure.suptitle(f"More is better; medians, whiskers from least to most. {note}", fontsize=9, color=GREY, y=0.995)
    figure.tight_layout(rect=(0, 0, 1, 0.975), h_pad=1.6)
    return figure


def finding(line: Line) -> str:
    """The comparison with the original at its best, in words."""
    ratio = line.ratio(C_NAMES)
    if ratio is None:
        return "not measured beside C pasta"
    value = ratio.value
    if ratio.wide:
        figures = (f"{number:.0f}" if value >= 9.95 else f"{number:.1f}" for number in (ratio.low, ratio.high))
        return f"{' to '.join(figures)} times C pasta"
    if value >= 1.95:
        return f"{value:.0f} times C pasta" if value >= 9.95 else f"{value:.1f} times C pasta"
    return f"{abs(value - 1):.0%} {'more' if value >= 1 else 'less'} than C pasta"


def strip(axes: Axes, line: Line, title: str, unit: str) -> None:
    """One row of the summary: its finding as the title, a bar and a number for each contender."""
    for at, (_, names) in enumerate(SUMMARY_BARS):
        value = line.best(names)
        if value is not None:
            axes.barh(at, value, 0.78, color=COLOURS[names[0]])
            text = f"{number(value)} {unit}"
            axes.annotate(text, (value, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_title(f"{title}: {finding(line)}", fontsize=10.5, fontweight="bold", loc="left", x=-0.118)
    axes.set_yticks(range(len(SUMMARY_BARS)), [label for label, _ in SUMMARY_BARS], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def summarize(report: Report) -> Figure:
    """The rows of the summary, one below the other."""
    lines = {line.name: line for line in report.lines}
    figure, grid = plt.subplots(len(SUMMARY), 1, figsize=(8.4, 6.2))
    for axes, (name, title, unit) in zip(grid.flat, SUMMARY, strict=True):
        strip(axes, lines[name], title, unit)
    made = report.made
    note = "Longer is better. Each row has a scale of its own."
    where = f"{made['cores']} cores, Linux {made['kernel'].partition('-')[0]}"
    figure.text(0.01, 0.008, f"{note} {where}.", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.025, 1, 1), h_pad=1.2)
    return figure


def main(argv: list[str]) -> int:
    """Exit status: 0, or 2 for wrong arguments."""
    if len(argv) not in (3, 4):
        print("usage: python -m bench.plot RESULTS.json FIGURE SUMMARY [PAGE]", file=sys.stderr)
        return 2
    report = read(Path(argv[0]))
    for name, figure in ((argv[1], draw(report)), (argv[2], summarize(report))):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    if len(argv) == 4:
        fill(Path(argv[3]), report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
