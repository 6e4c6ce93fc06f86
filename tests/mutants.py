"""Mutants: change one thing in a module at a time, and see whether a test notices.

    python -m tests.mutants                        the modules of the data plane (hours)
    python -m tests.mutants tcp tcp_engine.window  some modules, or folders of them
    python -m tests.mutants tcp --only '*_plain_segment*'
    python -m tests.mutants ports.scan --tests tests/unit/ports/test_scan.py

mutmut makes the mutants, in a copy of the tree below build/mutants, and runs for each the tests that reach the changed
function, out of the unit tests that are about the module, and those of limits: the files whose name or imports have
its family, which is the first word of its name, or of its folder's. Constants at the top of a module are not changed,
nor are messages of the log. With --tests it runs only the files named, which is quicker; the survivors then are those
of these files.

The survivors, which no test noticed, are in build/mutants/MODULE.txt, as differences. Equivalent ones, which no test
can notice, are listed in docs/testing.md with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "passt"
WORK = ROOT / "build" / "mutants"
DATA_PLANE = (
    "tcp",
    "tcp_engine",
    "udp",
    "udp_engine",
    "splice",
    "ports",
    "policy.forwarding",
    "policy.rules",
    "policy.rule_table",
)
COPIED = ("passt", "tests", "fuzz", "bench", "docs")  # a test of ends compares docs/ends.md

# -s: mutmut runs pytest several times in one process; the standard error that the first captured would stay in `log`
CONFIG = """\
[tool.mutmut]
source_paths = ["passt"]
only_mutate = ["{module}"]
also_copy = ["fuzz", "bench", "docs"]
do_not_mutate_patterns = ['\\blog\\.\\w+\\(', '\\brecord\\(']
use_git_change_detection = false
timeout_multiplier = 3.0
timeout_constant = 5.0
pytest_add_cli_args = ["-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
pytest_add_cli_args_test_selection = [{tests}]

[tool.pytest.ini_options]
addopts = "-ra --strict-markers"
markers = ["alone: see pyproject.toml"]
filterwarnings = ["error"]
timeout = 180
"""


def modules(names: Sequence[str]) -> list[Path]:
    """Those of these names, or of the data plane; a folder is all of its modules."""
    every = [p.relative_to(ROOT) for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]
    found = []
    for name in names or DATA_PLANE:
        dotted = name.removesuffix(".py").replace("/", ".").removeprefix("passt.")
        named = [p for p in every if f"{name_of(p)}.".startswith(f"{dotted}.")]
        if not named:
            sys.exit(f"no such module: {name}")
        found += named
    return list(dict.fromkeys(found))


def name_of(module: Path) -> str:
    """As in `import`, below the package."""
    return ".".join(module.with_suffix("").parts[1:])


def family(module: Path) -> str:
    """The first word of its name, or of the folder that it is in."""
    return re.split(r"[_.]", module.parts[1])[0]


def tests_of(module: Path) -> list[str]:
    """Files of tests that are about a module."""
    word = family(module)
    splice = "splice" in name_of(module)  # from socket to socket: another state machine, of the same family
    named = re.compile(rf"(^|[/_]){word}([_./]|$)")
    imported = re.compile(rf"^(?:from|import)\b[^\n]*[ ._]{word}(?:[_. ,\n]|$)", re.M)
    found = []
    for path in (*sorted((ROOT / "tests" / "unit").rglob("test_*.py")), ROOT / "tests/security/test_limits.py"):
        below = str(path.relative_to(ROOT / "tests")).removeprefix("unit/")
        other = ("splice" in below) != splice and named.search(below)
        related = named.search(below) or imported.search(path.read_text())
        if related and not other:
            found.append(str(path.relative_to(ROOT)))
    return found


def mutate(module: Path, only: Sequence[str], tests: Sequence[str], children: int) -> Counter[str]:
    """Run all mutants of a module; returns how many there are of each fate. Raises RuntimeError."""
    place = WORK / name_of(module)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    listed = ", ".join(f'"{test}"' for test in tests or tests_of(module))
    (place / "pyproject.toml").write_text(CONFIG.format(module=module, tests=listed))
    mutmut = [str(Path(sys.executable).with_name("mutmut"))]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MUTANTS_OF": str(ROOT)}
    with open(place / "log", "wb") as log:
        command = ["nice", "-n", "19", *mutmut, "run", "--max-children", str(children), *only]
        done = subprocess.run(
            command, cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        raise RuntimeError(f"mutmut ended with {done.returncode}, see {place / 'log'}")

    def ask(*words: str) -> str:
        return subprocess.run([*mutmut, *words], cwd=place, env=env, check=True, capture_output=True, text=True).stdout

    fates: Counter[str] = Counter()
    survivors = []
    for line in ask("results", "--all", "true").splitlines():
        name, fate = line.strip().split(": ", 1)
        fates[fate] += 1
        if fate not in ("killed", "not checked"):
            survivors.append(ask("show", name))
    (WORK / f"{place.name}.txt").write_text("\n".join(survivors))
    return fates


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description="Change one thing at a time; do tests notice?")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="as `tcp`, `ports.scan`; all of the data plane")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="mutants of such names only")
    parser.add_argument("--tests", action="append", default=[], metavar="PATH", help="these tests, not the family's")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at the same time")
    asked = parser.parse_args(argv)
    failed = 0
    for module in modules(asked.modules):
        try:
            fates = mutate(module, asked.only, asked.tests, asked.jobs)
            said = ", ".join(f"{n} {fate}" for fate, n in sorted(fates.items()) if fate != "not checked")
        except RuntimeError as e:  # the next one may be better
            failed, said = 1, str(e)
        print(f"{module}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
