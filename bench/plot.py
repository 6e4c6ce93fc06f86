"""`python -m bench.plot RESULTS.json FIGURE [README]`: the README's figure, and its table between two markers.

The figure has one panel for each kind of row. Bars are medians, whiskers the smallest and the largest sample.
Contenders keep their order and colour in all panels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .contenders import CONTENDERS
from .report import Line, Report, fill, read

# Title, rows by name, divisor, label of the axis.
PANELS = (
    ("TCP stream, MTU 65520", ("tcp-out-host-65520", "tcp-in-host-65520"), 1.0, "Gbit/s"),
    ("TCP stream, MTU 1500", ("tcp-out-host-1500", "tcp-in-host-1500"), 1.0, "Gbit/s"),
    ("UDP, 1400 bytes, delivered", ("udp-out", "udp-in"), 1e3, "1000 datagrams/s"),
    ("round trips, 16 flows", ("tcp-rr-16",), 1e3, "1000/s"),
    ("round trips, 1 flow", ("tcp-rr-1", "udp-rr"), 1e3, "1000/s"),
    ("connect, request, response", ("tcp-crr-1", "tcp-crr-16"), 1e3, "1000/s"),
    ("forwarded port, loopback", ("lo-tcp-in-1", "lo-tcp-out-1", "lo-tcp-in-8"), 1.0, "Gbit/s"),
    ("forwarded port, loopback", ("lo-udp-in", "lo-udp-out", "lo-tcp-crr-16"), 1e3, "1000/s"),
    ("forwarded port, from another host", ("fwd-tcp-in-65520", "fwd-tcp-out-65520", "fwd-tcp-in-1500"), 1.0, "Gbit/s"),
)
TICKS = {
    "tcp-out-host-65520": "namespace → host",
    "tcp-in-host-65520": "host → namespace",
    "tcp-out-host-1500": "namespace → host",
    "tcp-in-host-1500": "host → namespace",
    "udp-out": "namespace → host",
    "udp-in": "host → namespace",
    "tcp-rr-1": "TCP",
    "tcp-rr-16": "TCP",
    "udp-rr": "UDP",
    "tcp-crr-1": "1 flow",
    "tcp-crr-16": "16 flows",
    "lo-tcp-in-1": "host → namespace",
    "lo-tcp-out-1": "namespace → host",
    "lo-tcp-in-8": "8 streams →",
    "lo-udp-in": "UDP 1400 B →",
    "lo-udp-out": "UDP 1400 B ←",
    "lo-tcp-crr-16": "connections, 16 flows",
    "fwd-tcp-in-65520": "→ namespace",
    "fwd-tcp-out-65520": "namespace →",
    "fwd-tcp-in-1500": "→, MTU 1500",
}
COLOURS = {
    "ours": "#1f6f4a",
    "ours-wmem": "#79b89a",
    "pasta": "#8a5a2b",
    "pasta-wmem": "#cfa77a",
    "slirp4netns": "#9a9a9a",
    "loopback": "#d9d9d9",
}


def panel(axes: Axes, report: Report, title: str, names: tuple[str, ...], divisor: float, unit: str) -> None:
    """Grouped bars: one group for each row, one bar for each contender in it."""
    lines: dict[str, Line] = {line.name: line for line in report.lines}
    rows = [lines[name] for name in names if name in lines]
    shown = [c.name for c in CONTENDERS if c.name in report.contenders()]
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
            axes.bar(x, middle, width * 0.92, color=COLOURS[name], yerr=spread, error_kw={"lw": 0.8, "ecolor": "#444"})
            axes.annotate(f"{middle:.3g}", (x, max(values)), ha="center", va="bottom", fontsize=6.5)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit, fontsize=8)
    axes.set_xticks(range(len(rows)), [TICKS[line.name] for line in rows], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def plot(report: Report, path: Path) -> None:
    """Draw all panels to `path`; its suffix gives the format."""
    figure, grid = plt.subplots(3, 3, figsize=(13, 10))
    for axes, (title, names, divisor, unit) in zip(grid.flat, PANELS, strict=True):
        panel(axes, report, title, names, divisor, unit)
    shown = [c for c in CONTENDERS if c.name in report.contenders()]
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[c.name]) for c in shown]
    figure.legend(handles, [c.label for c in shown], loc="lower center", ncols=len(shown), fontsize=9, frameon=False)
    note = ", ".join(f"{key} {value}" for key, value in report.made.items())
    figure.suptitle(f"More is better; medians, whiskers from least to most. {note}", fontsize=9, color="#444")
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    """Exit status: 0, or 2 for wrong arguments."""
    if len(argv) not in (2, 3):
        print("usage: python -m bench.plot RESULTS.json FIGURE [README]", file=sys.stderr)
        return 2
    report = read(Path(argv[0]))
    plot(report, Path(argv[1]))
    if len(argv) == 3:
        fill(Path(argv[2]), report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
