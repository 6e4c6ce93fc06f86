"""`python -m bench`: run the benchmark, print its table, write its JSON."""

from __future__ import annotations

import argparse
import compileall
import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import passt

from . import lab as laboratory
from . import vm
from .contenders import COMPILED, CONTENDERS, Contender, Seat, peer, seated
from .lab import Lab, LabError, Placement, placements
from .report import SETTLED, Line, Report, markdown, read, save, show
from .rows import ROWS, Bench, Row

ROUNDS_AT_LEAST = 2  # of each row, whatever the time: one pair says nothing of how far pairs differ


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="pasta beside the C original and others")
    parser.add_argument("--quick", action="store_true", help="one round of one second for everything")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="samples of each cell (3)")
    parser.add_argument("--seconds", type=int, default=3, metavar="S", help="length of a sample (3)")
    parser.add_argument("--only", metavar="PATTERN", help="rows by name, e.g. 'tcp-out-*,udp-*'")
    parser.add_argument("--contenders", metavar="LIST", help="those only, by name, separated by commas, in all rows")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="two rounds of each row, and up to --rounds of those whose pairs differ most, until M minutes are over",
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="another checkout, or a build of the original"
    )
    parser.add_argument("--placement", choices=placements(), help="where processes run, instead of as each row says")
    parser.add_argument(
        "--congestion", default="cubic", metavar="NAME", help="congestion control of both ends (cubic, Linux's own)"
    )
    parser.add_argument("--list", action="store_true", help="list rows and contenders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of an earlier run, measure nothing")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.seconds = 1, 1
    if args.rounds < 1 or not 1 <= args.seconds <= 60:
        parser.error("at least one round, of 1 to 60 seconds")
    if args.minutes is not None and not 0 < args.minutes <= 24 * 60:
        parser.error("--minutes: more than none, at most those of a day")
    return args


def chosen(args: argparse.Namespace) -> tuple[list[Row], list[Contender]]:
    """Rows and contenders that the command line asks for; LabError names an unknown one."""
    patterns = args.only.split(",") if args.only else ["*"]
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, p) for p in patterns)]
    if not rows:
        raise LabError(f"no row is called {args.only}; --list names them")
    peers = [peer(argument) for argument in args.peer]
    contenders = [CONTENDERS[0], *peers, *CONTENDERS[1:]]  # peers beside ours: their samples are next to each other
    names = args.contenders.split(",") if args.contenders else [c.name for c in contenders]
    if unknown := set(names) - {c.name for c in contenders}:
        raise LabError(f"no contender is called {', '.join(sorted(unknown))}; --list names them")
    return rows, [c for c in contenders if c.name in names or c in peers]


def sample(lab: Lab, row: Row, contender: Contender, line: Line, place: Placement, seconds: float, turn: int) -> None:
    """Take the sample of a round into `line`; a failure is kept as such and does not end the run."""
    cell = line.cell(contender.name)
    try:
        unseated = nullcontext(Seat(lab.host, None, "", ""))  # another daemon would have the ports already
        if row.vm:
            at_work = vm.seated(lab, contender, row.vm, row.mtu, place.daemon)
        else:
            at_work = seated(lab, contender, row.mtu, row.ports, place.daemon)
        with unseated if row.starts else at_work as seat:
            result = row.measure(Bench(lab, contender, seat, place, seconds))
            if not seat.alive():
                raise LabError("the daemon ended meanwhile")
    except (LabError, OSError, json.JSONDecodeError, KeyError) as e:
        cell.error = f"{type(e).__name__}: {e}" if not isinstance(e, LabError) else str(e)
        return
    cell.add(turn, result)


def takes_part(row: Row, contender: Contender, named: bool = True) -> bool:
    """Whether the row means anything for the contender, and is measured if contenders are not `named`."""
    if not named and contender.rows is not None and row.name not in contender.rows:
        return False
    if row.vm:
        return contender.serve is not None and (row.vm != vm.VHOST or contender.shares_memory())
    if row.starts:
        return contender.start is not None
    if row.ipv6 and not contender.gateway6:
        return False
    if row.inbound and not contender.forwards:
        return False
    return not row.daemon_only or contender.command is not None


def placed(args: argparse.Namespace, row: Row, contender: Contender) -> Placement:
    """Where the processes of a sample run: without a daemon its processor is the server's."""
    name = args.placement or row.placement
    return placements()["spread" if name == "apart" and contender.command is None else name]


def rounds(args: argparse.Namespace, rows: list[Row], lines: dict[str, Line], end: float) -> Iterator[tuple[int, Row]]:
    """The number of a round, and a row that is measured in it, until all rows have their rounds.

    In a limited time each row has two, so that contenders are compared at two times; the rest goes to the row whose
    pairs differ most, again and again. Rows whose samples take long have no more than the two.
    """
    limited = args.minutes is not None
    first = min(args.rounds, ROUNDS_AT_LEAST) if limited else args.rounds
    for turn in range(first):
        for row in rows:
            yield turn, row
    done = {row.name: first for row in rows if not row.slow} if limited else {}
    while time.monotonic() < end:
        open_rows = [row for row in rows if done.get(row.name, args.rounds) < args.rounds]
        worst = max(open_rows, key=lambda row: lines[row.name].apart(), default=None)
        if worst is None or lines[worst.name].apart() <= SETTLED:
            return
        yield done[worst.name], worst
        done[worst.name] += 1


def run(args: argparse.Namespace, console: Console) -> Report:
    """All rounds of all rows, contenders interleaved within a round."""
    rows, contenders = chosen(args)
    for contender in list(contenders):
        if reason := contender.missing():
            console.print(f"left out: {reason}", style="red")
            contenders.remove(contender)
    least = f"{ROUNDS_AT_LEAST} to " if args.minutes is not None and args.rounds > ROUNDS_AT_LEAST else ""
    report = Report.new(f"{least}{args.rounds} rounds of {args.seconds:g} s", args.congestion)
    lines = {row.name: Line.of(row) for row in rows}
    report.lines = list(lines.values())
    named = args.contenders is not None
    end = time.monotonic() + (args.minutes or 0) * 60
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Lab(args.congestion) as lab, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=(ROUNDS_AT_LEAST if args.minutes else args.rounds) * len(rows))
        try:
            for turn, row in rounds(args, rows, lines, end):
                for contender in contenders:
                    pairs = turn < ROUNDS_AT_LEAST or args.minutes is None or contender.rows is None
                    if pairs and takes_part(row, contender, named):
                        progress.update(task, description=f"{row.title}: {contender.label}")
                        place = placed(args, row, contender)
                        sample(lab, row, contender, lines[row.name], place, args.seconds, turn)
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("stopped: the table has what was measured so far", style="yellow")
    return report


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 when something could not be measured."""
    args = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.list:
        for row in ROWS:
            print(f"{row.name:22} {row.title}")
        for contender in CONTENDERS:
            print(f"{contender.name:22} {contender.label}")
        return 0
    began = time.monotonic()
    try:
        rows, _ = chosen(args)
        if args.show:
            report = read(args.show)
        else:
            peers = (Path(p.partition("=")[2]) / "passt" for p in args.peer)
            for tree in filter(Path.is_dir, [Path(passt.__file__).parent, COMPILED / "passt", *peers]):
                compileall.compile_dir(tree, quiet=1)  # as pip does, whatever Python writes here
            vm.prepare({row.vm for row in rows})
            laboratory.enter("bench", argv)
            report = run(args, console)
    except LabError as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    if args.markdown:
        print(markdown(report))
    else:
        show(report, console)
    if args.json:
        save(report, args.json)
    if not args.show:
        console.print(f"{time.monotonic() - began:.0f} s")
    return 1 if any(cell.error for line in report.lines for cell in line.cells.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
