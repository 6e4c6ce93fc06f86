"""Results: medians, ratios, the table on the terminal, the table as Markdown, the JSON file.

The JSON is `{"made": {...}, "rows": [{"name", "title", "unit", "work", "target", "fewer_is_better", "results":
{contender: {"values": [...], "rounds": [...], "cpu": [...], "program": [...], "p50": [...], "p99": [...],
"error": text or null}}}]}`: all samples are kept, medians made on reading.

Samples of one round are a pair: they were taken one after the other, so a machine that is slow for a while is slow for
both. A ratio is the median of those of the pairs. Where these differ by more than SPREAD_MAX of it, their range stands
in its place: the median would be that of the machine.
"""

from __future__ import annotations

import json
import os
import platform
import textwrap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from .rows import Row, Sample

SPREAD_MAX = 0.3
SETTLED = 0.1  # pairs that differ by no more of their median need no further round
C_NAMES = ("pasta", "pasta-wmem")
BUILDS = ("ours", "compiled")


@dataclass(slots=True)
class Cell:
    """The samples of one contender in one row: values, their rounds, and what else was measured."""

    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    error: str | None = None
    rounds: list[int] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    program: list[float] = field(default_factory=list)

    def add(self, turn: int, sample: Sample) -> None:
        """Take the sample of a round."""
        self.values.append(sample.value)
        self.rounds.append(turn)
        noted = (self.cpu, sample.cpu), (self.p50, sample.p50), (self.p99, sample.p99), (self.program, sample.program)
        for known, value in noted:
            if value is not None:
                known.append(value)

    def value(self) -> float | None:
        """The median, or None without a sample."""
        return median(self.values) if self.values else None

    def by_round(self) -> dict[int, float]:
        """The values of the rounds; results that were made before rounds were noted have all."""
        return dict(zip(self.rounds or range(len(self.values)), self.values, strict=False))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours against theirs, of all pairs: median and range. Above 1 we are more (and for times and sizes: larger)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Cell, theirs: Cell) -> Ratio | None:
        """The median of the pairs; None without a pair."""
        before = theirs.by_round()
        pairs = [value / before[turn] for turn, value in ours.by_round().items() if before.get(turn)]
        if not pairs:
            return None
        return cls(median(pairs), min(pairs), max(pairs))

    @property
    def wide(self) -> bool:
        """Whether the pairs differ too much for their median to mean something."""
        return self.high - self.low > SPREAD_MAX * self.value

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}" if self.wide else f"{self.value:.2f}"


@dataclass(slots=True)
class Line:
    """A row with its cells."""

    name: str
    title: str
    unit: str
    work: str
    target: str
    fewer_is_better: bool
    cells: dict[str, Cell] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row) -> Line:
        """An empty line for `row`."""
        return cls(row.name, row.title, row.unit, row.work, row.target, row.fewer_is_better)

    def cell(self, contender: str) -> Cell:
        """The cell of `contender`, made when it is new."""
        return self.cells.setdefault(contender, Cell())

    def best(self, names: tuple[str, ...]) -> float | None:
        """The best median among contenders."""
        values = [v for name in names if name in self.cells and (v := self.cells[name].value()) is not None]
        if not values:
            return None
        return min(values) if self.fewer_is_better else max(values)

    def best_name(self, names: tuple[str, ...]) -> str | None:
        """Which contender has the best median."""
        best = self.best(names)
        return next((n for n in names if n in self.cells and best is not None and self.cells[n].value() == best), None)

    def ratio(self, names: tuple[str, ...], build: str = BUILDS[0]) -> Ratio | None:
        """A build of ours against the best of `names`."""
        ours, theirs = self.cells.get(build), self.best_name(names)
        return Ratio.of(ours, self.cells[theirs]) if ours is not None and theirs is not None else None

    def apart(self) -> float:
        """How far the pairs with the original differ, by their median, for the worst build; 0 without two pairs."""
        theirs = self.cells.get(C_NAMES[0], Cell())
        ratios = [Ratio.of(self.cells[build], theirs) for build in BUILDS if build in self.cells]
        return max(((ratio.high - ratio.low) / ratio.value for ratio in ratios if ratio is not None), default=0.0)


@dataclass(slots=True)
class Report:
    """Everything a run found."""

    made: dict[str, str]
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def new(cls, samples: str, congestion: str) -> Report:
        """An empty report of now and here, with what a cell is made of, and the congestion control of its senders."""
        made = {
            "date": time.strftime("%Y-%m-%d"),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cores": str(os.cpu_count()),
            "congestion": congestion,
            "samples": samples,
        }
        return cls(made)

    def contenders(self) -> list[str]:
        """Names of those with a cell, in the order of their first one."""
        return list(dict.fromkeys(name for line in self.lines for name in line.cells))


def save(report: Report, path: Path) -> None:
    """Write the JSON file."""
    rows = [
        {
            "name": line.name,
            "title": line.title,
            "unit": line.unit,
            "work": line.work,
            "target": line.target,
            "fewer_is_better": line.fewer_is_better,
            "results": {name: asdict(cell) for name, cell in line.cells.items()},
        }
        for line in report.lines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made": report.made, "rows": rows}, indent=1) + "\n")


def read(path: Path) -> Report:
    """Read what `save` wrote."""
    data = json.loads(path.read_text())
    report = Report(data["made"])
    for row in data["rows"]:
        cells = {name: Cell(**cell) for name, cell in row.pop("results").items()}
        report.lines.append(Line(**row, cells=cells))
    return report


def number(value: float | None) -> str:
    """Three significant figures; a thousand and more in thousands."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value / 1000:.0f} k" if value >= 99_500 else f"{value / 1000:.1f} k"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _ratio(value: Ratio | None) -> str:
    return "-" if value is None else str(value)


def _processor(line: Line, name: str | None) -> str:
    """Processor time of a contender for each unit of work, and in brackets the part of the program itself."""
    cell = Cell() if name is None else line.cells.get(name, Cell())
    program = f" ({number(median(cell.program))})" if cell.program else ""
    return f"{number(median(cell.cpu))}{program}" if cell.cpu else "-"


def _times(line: Line, name: str | None) -> str:
    """Microseconds of an operation, likewise: p50 and p99."""
    cell = Cell() if name is None else line.cells.get(name, Cell())
    return f"{number(median(cell.p50))}, {number(median(cell.p99))}" if cell.p50 else "-"


def _joined(texts: list[str], unit: str = "") -> str:
    return " / ".join(texts) + unit if set(texts) != {"-"} else ""


def _columns(report: Report, line: Line) -> list[str]:
    texts = []
    for name in report.contenders():
        cell = line.cells.get(name, Cell())
        texts.append("failed" if cell.error and not cell.values else number(cell.value()))
    builds = _builds(report)
    compared = [*builds, line.best_name(C_NAMES)]
    return [
        *texts,
        *(_ratio(line.ratio(C_NAMES, build)) for build in builds),
        _ratio(line.ratio(("loopback",))),
        line.target,
        _joined([_processor(line, name) for name in compared], f" {line.work}"),
        _joined([_times(line, name) for name in compared]),
    ]


def _builds(report: Report) -> list[str]:
    return [name for name in BUILDS if name in report.contenders()]


def _head(report: Report) -> list[str]:
    builds = _builds(report)
    compared = " / ".join((*builds, "C"))
    ratios = [f"{build} / C" for build in builds]
    return [
        "",
        *report.contenders(),
        *ratios,
        "ours / bare",
        "asked",
        f"daemon: {compared}",
        f"us p50, p99: {compared}",
    ]


def show(report: Report, console: Console) -> None:
    """The table, and below it what failed."""
    table = Table(title=", ".join(f"{k} {v}" for k, v in report.made.items()), title_style="dim")
    for i, name in enumerate(_head(report)):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for line in report.lines:
        table.add_row(f"{line.title} [dim]{line.unit}[/dim]", *_columns(report, line))
    console.print(table)
    for line in report.lines:
        for name, cell in line.cells.items():
            if cell.error:
                console.print(f"[red]{name}[/red], {line.title}: {cell.error}", highlight=False)


def markdown(report: Report) -> str:
    """The same table as Markdown."""
    head = _head(report)
    rows = [[f"{line.title}, {line.unit}", *_columns(report, line)] for line in report.lines]
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


MARKERS = ("<!-- figures: made by `make bench-plot` -->\n", "<!-- end of figures -->\n")


def fill(page: Path, report: Report) -> None:
    """Replace what stands between the markers of `page` by the table and what it was made with."""
    text = page.read_text()
    before, found, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not found or not end:
        raise ValueError(f"{page} has no place for figures")
    made = ", ".join(f"{key} {value}" for key, value in report.made.items())
    made = textwrap.fill(f"Made with: {made}.", 120)
    page.write_text(f"{before}{found}\n{markdown(report)}\n{made}\n\n{end}{after}")
