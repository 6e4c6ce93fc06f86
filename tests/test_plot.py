"""The pictures of the benchmark: every label can be read, every finding is that of the figures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench import plot
from bench.report import C_NAMES, MARKERS, Cell, Line, Ratio, Report, markdown, read, save
from bench.rows import Sample

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "bench" / "results" / "latest.json"


@pytest.fixture
def report() -> Report:
    return read(RESULTS)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No figure outlives its test."""
    yield
    plt.close("all")


def labels(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text of a figure that is visible, with the place that it takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text()]
    found = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    return [(text, box) for text, box in found if box.width > 1]


@pytest.mark.parametrize("draw", [plot.draw, plot.summarize])
def test_no_label_lies_on_another_or_leaves_the_picture(draw: object, report: Report) -> None:
    assert callable(draw)
    figure = draw(report)
    found = labels(figure)
    assert len(found) > 20
    page = figure.bbox
    for text, box in found:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
    for (one, a), (other, b) in combinations(found, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 1 or height <= 1, f"{one!r} and {other!r} overlap"


def test_every_row_of_the_pictures_was_measured(report: Report) -> None:
    names = {line.name for line in report.lines}
    assert {name for _, rows, _ in plot.PANELS for name in rows} <= names
    assert {name for name, _, _ in plot.SUMMARY} <= names


def test_the_summary_has_a_row_in_which_the_original_is_ahead(report: Report) -> None:
    ratios = {line.name: line.ratio(C_NAMES) for line in report.lines}
    assert any(ratio.value < 1 for name, _, _ in plot.SUMMARY if (ratio := ratios[name]) is not None)


@pytest.mark.parametrize(
    ("ours", "pasta", "wmem", "said"),
    [
        (30.0, 1.0, 0.5, "30 times C pasta"),
        (3.0, 1.0, 0.5, "3.0 times C pasta"),
        (3.0, 1.0, 2.0, "50% more than C pasta"),
        (90.0, 100.0, 80.0, "10% less than C pasta"),
    ],
)
def test_findings(ours: float, pasta: float, wmem: float, said: str) -> None:
    """The original counts with the better of its settings."""
    line = Line("x", "x", "1/s", "", "", False)
    line.cells = {"ours": Cell([ours]), "pasta": Cell([pasta]), "pasta-wmem": Cell([wmem])}
    assert plot.finding(line) == said


@pytest.mark.parametrize(
    ("ours", "pasta", "said"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "0% more than C pasta"),  # the machine was slow, for both
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], "1.0 to 3.0 times C pasta"),
        ([30.0, 20.0], [1.0, 1.0], "20 to 30 times C pasta"),
        ([2.0, 2.2], [1.0, 1.0], "2.1 times C pasta"),
    ],
)
def test_findings_of_pairs(ours: list[float], pasta: list[float], said: str) -> None:
    line = Line("x", "x", "1/s", "", "", False)
    line.cells = {"ours": Cell(ours), "pasta": Cell(pasta)}
    assert plot.finding(line) == said


def test_a_round_that_failed_for_one_has_no_pair() -> None:
    ours, theirs = Cell(), Cell()
    for turn, value in ((0, 4.0), (1, 8.0), (2, 12.0)):
        ours.add(turn, Sample(value, p50=value, p99=2 * value))
    for turn, value in ((1, 4.0), (2, 6.0)):
        theirs.add(turn, Sample(value))
    assert Ratio.of(ours, theirs) == Ratio(2.0, 2.0, 2.0)
    assert Ratio.of(ours, Cell()) is None
    line = Line("x", "x", "1/s", "us", "", False, {"ours": ours, "pasta": theirs})
    assert markdown(Report({}, [line])).splitlines()[-1].endswith("| 8.00, 16.0 / - |")


def test_both_builds_stand_beside_the_original() -> None:
    cells = {"ours": Cell([1.0], [4.0], program=[2.5]), "compiled": Cell([3.0], [2.0]), "pasta": Cell([2.0], [3.0])}
    lines = [Line("x", "x", "1/s", "CPU us", "1 x C", False, cells), Line("y", "y", "ms", "", "", True)]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in markdown(Report({}, lines)).splitlines()] == [
        ["", "ours", "compiled", "pasta", "ours / C", "compiled / C", "ours / bare", "asked",
         "daemon: ours / compiled / C", "us p50, p99: ours / compiled / C"],
        ["---", *["--:"] * 9],
        ["x, 1/s", "1.00", "3.00", "2.00", "0.50", "1.50", "-", "1 x C", "4.00 (2.50) / 2.00 / 3.00 CPU us", ""],
        ["y, ms", *["-"] * 6, "", "", ""],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "compiled", "apart"),
    [
        ([1.0, 1.25], [], 0.222),
        ([1.0, 1.0], [], 0.0),
        ([1.0], [], 0.0),
        ([1.0, 1.1, 2.0], [], 0.909),
        ([1.0, 1.0], [2.0, 3.0], 0.4),
        ([1.0, 3.0], [2.0, 2.0], 1.0),
        ([], [], 0.0),
    ],
)
def test_the_worst_build_tells_how_far_pairs_differ(ours: list[float], compiled: list[float], apart: float) -> None:
    cells = {"ours": Cell(ours), "pasta": Cell([1.0] * 3)}
    if compiled:
        cells["compiled"] = Cell(compiled)
    assert Line("x", "x", "1/s", "", "", False, cells).apart() == pytest.approx(apart, abs=0.001)


def test_without_pairs_nothing_differs() -> None:
    for cells in ({}, {"ours": Cell([1.0, 2.0])}, {"pasta": Cell([1.0, 2.0])}):
        assert Line("x", "x", "1/s", "", "", False, cells).apart() == 0


def test_samples_survive_the_file(tmp_path: Path) -> None:
    cell = Cell()
    cell.add(3, Sample(1.0, 2.0, 3.0, 4.0, 1.5))
    report = Report({"cores": "2"}, [Line("x", "x", "1/s", "us", "", False, {"ours": cell})])
    save(report, tmp_path / "file")
    assert read(tmp_path / "file") == report


def test_the_page_has_the_table_of_the_results(report: Report) -> None:
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    table = page.partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    assert markdown(report) in table, "make bench-plot"


def test_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}old\n{MARKERS[1]}after\n")
    figure, summary = tmp_path / "new" / "all.png", tmp_path / "some.png"
    assert plot.main([str(RESULTS), str(figure), str(summary), str(page)]) == 0
    assert figure.stat().st_size and summary.stat().st_size
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| ours |" in text


def test_command_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
