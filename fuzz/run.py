"""Run targets, each in a process of its own, and say what came of it.

    python -m fuzz                      each for a second, from the corpus on, one after the other
    python -m fuzz tcp udp --seconds 60 --jobs 2
    python -m fuzz --seed 1             the same choices each time; keys and addresses drawn at start still differ
    python -m fuzz --runs 10000000 --record

With --record, executions are added to those of earlier runs until each target has `--runs` of them; the corpus and
docs/fuzzing.md are written after each slice, so that an end at any time loses no more than that. An input that crashes
a target is left in build/fuzz/TARGET, and the run goes on with the next target.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from .table import BY_NAME, CORPUS, HERE, TARGETS, Target

ROOT = HERE.parent
RECORD = ROOT / "docs" / "fuzzing.md"
CRASHES = ROOT / "build" / "fuzz"
SLICE = 120  # s of a recorded run between two writings of the record
CORPUS_MAX = 250  # inputs that are kept of a target, the shortest ones
MEMORY = 1024  # MiB
PATIENCE = 30  # s for one execution, which may have to wait for a processor

_record_lock = threading.Lock()
_running: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()

_MARK = "<!-- written by scripts/fuzz: -->\n"
_HEADER = (
    "| target | executions | seconds | per second | inputs kept | branches, features | crashes | last run |",
    "|---|---:|---:|---:|---:|---:|---:|---|",
)


@dataclass
class Figures:
    """A line of the record."""

    name: str
    executions: int = 0
    seconds: int = 0
    corpus: int = 0
    coverage: int = 0
    features: int = 0
    crashes: int = 0
    date: str = ""

    def row(self) -> str:
        rate = self.executions // max(self.seconds, 1)
        cells = (f"`{self.name}`", f"{self.executions:,}", self.seconds, f"{rate:,}", self.corpus)
        coverage = f"{self.coverage}, {self.features}"
        return "| " + " | ".join(map(str, (*cells, coverage, self.crashes, self.date))) + " |"

    @classmethod
    def parse(cls, row: str) -> Figures:
        name, executions, seconds, _, corpus, coverage, crashes, date = (c.strip() for c in row.strip("|\n").split("|"))
        numbers = [int(n.replace(",", "")) for n in (executions, seconds, corpus, *coverage.split(", "), crashes)]
        found = cls(name.strip("`"), date=date)
        found.executions, found.seconds, found.corpus, found.coverage, found.features, found.crashes = numbers
        return found


# The record ----------------------------------------------------------------------------------------------------------


def read_record() -> dict[str, Figures]:
    text = RECORD.read_text() if RECORD.exists() else ""
    rows = [line for line in text.partition(_MARK)[2].split("\n") if line.startswith("| `")]
    return {f.name: f for f in map(Figures.parse, rows)}


def write_record(record: dict[str, Figures]) -> None:
    """The table at the end of the page; what stands before it is left alone."""
    text = RECORD.read_text() if RECORD.exists() else "# Fuzzing\n\n"
    rows = [record[t.name].row() for t in TARGETS if t.name in record]
    RECORD.write_text(text.partition(_MARK)[0] + _MARK + "\n" + "\n".join((*_HEADER, *rows)) + "\n")


def write_corpus(target: Target, found: Iterable[bytes]) -> int:
    """Keep the shortest inputs; returns how many."""
    keep = sorted(set(found), key=lambda data: (len(data), data))[:CORPUS_MAX]
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{target.name}.hex").write_text("".join(f"{data.hex()}\n" for data in keep if data))
    return len(keep)


# Running -------------------------------------------------------------------------------------------------------------


def _last(pattern: str, text: str, default: int) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else default


def run(target: Target, directory: Path, *, seconds: int, runs: int, seed: int = 0) -> tuple[Figures, str]:
    """One process; returns what it did, and what it said if it crashed. `directory` has the corpus, and gets more.

    Its choices follow from `seed`; with 0, they differ each time.
    """
    crashes = CRASHES / target.name
    crashes.mkdir(parents=True, exist_ok=True)
    limits = (f"-max_total_time={seconds}", f"-runs={runs}", f"-max_len={target.length}")
    chosen = (f"-seed={seed}",)
    memory = (f"-rss_limit_mb={MEMORY}", f"-timeout={PATIENCE}", "-print_final_stats=1", "-verbosity=1")
    command = ("nice", "-n", "19", sys.executable, "-m", "fuzz.guided", target.name, *limits, *chosen, *memory)
    status, said = _communicate([*command, f"-artifact_prefix={crashes}/", str(directory)])
    reported = _last(r"#(\d+)\s", said, 0)
    executions = _last(r"stat::number_of_executed_units:\s+(\d+)", said, _last(r"Done (\d+) ", said, reported))
    figures = Figures(
        target.name,
        executions,
        _last(r"in (\d+) second", said, seconds),
        len(list(directory.iterdir())),
        _last(r"cov: (\d+)", said, 0),
        _last(r"ft: (\d+)", said, 0),
        1 if status else 0,
        datetime.date.today().isoformat(),
    )
    return figures, said if status else ""


def _communicate(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output. Raises SystemExit if all is to end: what the process did does not count then."""
    if _stopped.is_set():
        sys.exit(1)
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    same = os.environ | {"PYTHONHASHSEED": "0"}  # the order of sets is a choice as well
    with subprocess.Popen(command, cwd=ROOT, env=same, stdin=subprocess.DEVNULL, stdout=pipe, stderr=merged) as process:
        _running.add(process)
        if _stopped.is_set():  # and did not see this one
            process.terminate()
        said, _ = process.communicate()
        _running.discard(process)
    if _stopped.is_set():
        sys.exit(1)
    return process.returncode, said.decode(errors="replace")


def _stop(*_: object) -> None:
    """Signals: end what runs."""
    _stopped.set()
    for process in tuple(_running):
        process.terminate()


def put_inputs(target: Target, directory: Path) -> None:
    """Files for what is known of a target."""
    for data in {*target.load().seeds(), *target.corpus()}:
        (directory / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


def short(target: Target, runs: int, seconds: int, seed: int) -> bool:
    """Run one target, without a record; whether it went well."""
    with tempfile.TemporaryDirectory() as name:
        put_inputs(target, Path(name))
        figures, said = run(target, Path(name), seconds=seconds or 1, runs=runs, seed=seed)
    _show(figures, said)
    return not said


def long(target: Target, runs: int, seconds: int, seed: int) -> bool:
    """Run one target until it has `runs` executions in all, or for `seconds` (0: for as long as it takes)."""
    spent = 0
    with tempfile.TemporaryDirectory() as name:
        put_inputs(target, Path(name))
        while True:
            with _record_lock:
                before = read_record().get(target.name) or Figures(target.name)
            left = runs - before.executions
            if left <= 0 or (seconds and spent >= seconds):
                return True
            slice_ = min(SLICE, seconds or SLICE)
            figures, said = run(target, Path(name), seconds=slice_, runs=left, seed=seed)
            spent += figures.seconds
            figures.executions += before.executions
            figures.seconds += before.seconds
            figures.crashes += before.crashes
            figures.corpus = write_corpus(target, (p.read_bytes() for p in Path(name).iterdir()))
            with _record_lock:
                write_record({**read_record(), target.name: figures})
            _show(figures, said)
            if said:
                return False


def _show(figures: Figures, said: str) -> None:
    if said:
        print("\n".join(line for line in said.split("\n")[-60:] if not line.startswith(("#", "INFO:", "WARNING:"))))
    what = f"{figures.executions:>11,} executions in {figures.seconds} s, {figures.corpus} inputs"
    how = f"CRASHED, see build/fuzz/{figures.name}" if said else "well"
    print(f"{figures.name:14} {what}, {figures.coverage} branches: {how}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Coverage-guided fuzzing of everything that reads input.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all, if none is named: {', '.join(BY_NAME)}")
    parser.add_argument("--seconds", type=int, default=0, help="for each target, at most (1; with --record: no limit)")
    parser.add_argument("--runs", type=int, default=-1, help="executions of each target, at most")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the choices that are made; another one each time (0)")
    parser.add_argument("--record", action="store_true", help="go on to --runs, write docs/fuzzing.md and fuzz/corpus")
    asked = parser.parse_args(argv)
    unknown = [name for name in asked.targets if name not in BY_NAME]
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)} (there are {', '.join(BY_NAME)})")
    if asked.record and asked.runs < 0:
        parser.error("--record goes on to a number of executions: --runs 10000000")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is missing: pip install -e .[fuzz,test] (Linux x86-64, CPython 3.11 to 3.13)")
    if asked.jobs < 1:
        parser.error(f"--jobs {asked.jobs}: at least one")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    targets = [BY_NAME[name] for name in asked.targets] or list(TARGETS)
    go = long if asked.record else short
    with ThreadPoolExecutor(asked.jobs) as pool:
        left = results = {pool.submit(go, t, asked.runs, asked.seconds, asked.seed) for t in targets}
        while left:  # now and then: a signal may have been delivered to a thread that does not call its handler
            left = wait(left, timeout=0.5).not_done
    return 0 if all(result.result() for result in results) else 1
