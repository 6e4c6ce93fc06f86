"""Results: medians, ratios, the table on the terminal, the table as Markdown, the JSON file.

The JSON is `{"made": {...}, "rows": [{"name", "title", "unit", "work", "target", "fewer_is_better", "results":
{contender: {"values": [...], "cpu": [...], "error": text or null}}}]}`: all samples are kept, medians made on reading.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from .rows import Row

C_NAMES = ("pasta", "pasta-wmem")
OUR_NAMES = ("ours", "ours-wmem")


@dataclass(slots=True)
class Cell:
    """The samples of one contender in one row."""

    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    error: str | None = None

    def value(self) -> float | None:
        """The median, or None without a sample."""
        return median(self.values) if self.values else None

    def processor(self) -> float | None:
        """Median of the daemon's processor time for each unit of work."""
        return median(self.cpu) if self.cpu else None


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

    def ratio(self, names: tuple[str, ...]) -> float | None:
        """Our default setting against the best of `names`: above 1 we are more (and for times and sizes: larger)."""
        ours, theirs = self.best(OUR_NAMES[:1]), self.best(names)
        return ours / theirs if ours is not None and theirs else None


@dataclass(slots=True)
class Report:
    """Everything a run found."""

    made: dict[str, str]
    lines: list[Line] = field(default_factory=list)

    @classmethod
    def new(cls, seconds: float, rounds: int) -> Report:
        """An empty report of now and here."""
        made = {
            "date": time.strftime("%Y-%m-%d"),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cores": str(os.cpu_count()),
            "samples": f"{rounds} rounds of {seconds:g} s",
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
            "results": {n: {"values": c.values, "cpu": c.cpu, "error": c.error} for n, c in line.cells.items()},
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
        cells = {name: Cell(c["values"], c["cpu"], c["error"]) for name, c in row.pop("results").items()}
        report.lines.append(Line(**row, cells=cells))
    return report


def number(value: float | None) -> str:
    """Three significant figures; a thousand and more in thousands."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value / 1000:.0f} k" if value >= 99_500 else f"{value / 1000:.1f} k"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _processor(line: Line, names: tuple[str, ...]) -> float | None:
    """Processor time of the one among `names` that has the best value."""
    best = line.best(names)
    return next((line.cells[n].processor() for n in names if n in line.cells and line.cells[n].value() == best), None)


def _columns(report: Report, line: Line) -> list[str]:
    texts = []
    for name in report.contenders():
        cell = line.cells.get(name, Cell())
        texts.append("failed" if cell.error and not cell.values else number(cell.value()))
    used = [_processor(line, OUR_NAMES[:1]), _processor(line, C_NAMES)]
    work = " / ".join("-" if u is None else f"{u:.2f}" for u in used) + f" {line.work}" if any(used) else ""
    return [*texts, _ratio(line.ratio(C_NAMES)), _ratio(line.ratio(("loopback",))), line.target, work]


_HEAD = ("ours / best C", "ours / bare", "asked", "daemon: ours / C")


def show(report: Report, console: Console) -> None:
    """The table, and below it what failed."""
    table = Table(title=", ".join(f"{k} {v}" for k, v in report.made.items()), title_style="dim")
    table.add_column("")
    for name in (*report.contenders(), *_HEAD):
        table.add_column(name, justify="right", overflow="fold")
    for line in report.lines:
        table.add_row(f"{line.title} [dim]{line.unit}[/dim]", *_columns(report, line))
    console.print(table)
    for line in report.lines:
        for name, cell in line.cells.items():
            if cell.error:
                console.print(f"[red]{name}[/red], {line.title}: {cell.error}", highlight=False)


def markdown(report: Report) -> str:
    """The same table as Markdown."""
    head = ["", *report.contenders(), *_HEAD]
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
    page.write_text(f"{before}{found}\n{markdown(report)}\nMade with: {made}.\n\n{end}{after}")
