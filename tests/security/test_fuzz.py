"""Parsers of untrusted input: inputs found by fuzzing are replayed, and a short run looks for more.

The invariants are those of `fuzz/targets/`. How far it went is recorded in docs/fuzzing.md.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fuzz.run import read_record
from fuzz.table import CORPUS, REGRESSIONS, TARGETS, Target
from tests.system.support import wait_for

ROOT = Path(__file__).parents[2]
GOAL = 10_000_000  # executions
SLOW = {"vhost": 20_000}  # memory and descriptors are real there: some hundreds in a second


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_replay(target: Target) -> None:
    """The seeds, the corpus, and every input that found a bug."""
    module = target.load()
    inputs = [*module.seeds(), *target.corpus()]
    assert inputs
    for data in inputs:
        try:
            module.one(data)
        except Exception as e:
            e.add_note(f"input: {data.hex()}")
            raise


def test_any_input_is_a_program() -> None:
    for target in TARGETS:
        one = target.load().one
        for data in (b"", b"\0", b"\xff", bytes(target.length), b"\xff" * target.length, bytes(range(40))):
            one(data)


def test_there_is_a_target_for_whatever_is_kept() -> None:
    names = {t.name for t in TARGETS}
    modules = {p.stem for p in (ROOT / "fuzz" / "targets").glob("*.py")} - {"__init__"}
    assert modules == names
    assert {p.stem for p in CORPUS.glob("*.hex")} <= names
    assert {p.name for p in REGRESSIONS.iterdir()} <= names
    assert read_record().keys() <= names


def test_how_far_it_went() -> None:
    """A new target, or a row that begins again, needs a run of `make fuzz-long`."""
    record = read_record()
    executions = {t.name: record[t.name].executions for t in TARGETS}
    assert {name: n for name, n in executions.items() if n < SLOW.get(name, GOAL)} == {}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_guiding_modules_are_there(target: Target) -> None:
    for name in target.modules:
        assert importlib.util.find_spec(name) is not None, name


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is missing, which has wheels for Linux x86-64 and CPython up to 3.13: scripts/setup test",
)


@needs_atheris
def test_a_short_run() -> None:
    """The runner, with one target of each kind; scripts/test runs all of them for a minute each."""
    some = ["ip", "ports", "tcp"]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *some, "--seconds", "1", "--jobs", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == some


@needs_atheris
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_runner_is_that_of_what_it_runs(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "fuzz", "ip", "ports", "udp", "--seconds", "60", "--jobs", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as runner:
        process = psutil.Process(runner.pid)
        wait_for(lambda: len(process.children()) == 2, "two targets")
        running = process.children()
        runner.send_signal(number)
        said, _ = runner.communicate(timeout=20)
        assert runner.returncode == 1
        assert not said, "what was broken off is no result"
        assert not any(p.is_running() for p in running)
