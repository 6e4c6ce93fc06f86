"""The table of system calls that the sandbox allows, for `--print-seccomp` and for docs/seccomp.md.

This module imports every module that either mode can load, so the table is that of a process with all options.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import passt, pasta, seccomp
from ..conf import resolv_conf
from ..control import json_api, slirp
from ..link import choose
from ..migration import steps
from ..policy.config import PASST, PASTA
from . import following, wiring
from . import passt as daemon_passt
from . import pasta as daemon_pasta

# Modules imported for their CALLS, or for those of modules that they import
LOADED = (
    json_api, daemon_passt, daemon_pasta, following, passt, pasta,
    resolv_conf, slirp, steps, wiring, *choose.load_all(),
)  # fmt: skip
WIDTH = 100  # of a row's arguments


def lines(mode: str) -> Iterator[str]:
    """The system calls allowed in a mode."""
    rows = seccomp.table(mode)
    yield f"{mode} may make {len(rows)} system calls once it runs; any other ends it (x86-64 names):"
    for name, tests, modules in rows:
        yield f"  {name:<16} {modules}"
        for test in tests.split("; ") if tests else ():
            yield f"  {'':<16}   if {test}"


def markdown() -> str:
    """Both modes in one table."""
    rows = {mode: {name: (tests, modules) for name, tests, modules in seccomp.table(mode)} for mode in (PASTA, PASST)}
    text = [
        "# System calls in the sandbox",
        "",
        "Made from the code (`make docs-seccomp`), and compared with it by a test. A call that is not in this table",
        "ends the process. Arguments are counted from 0; several alternatives are separated by semicolons.",
        "",
        f"pasta: {len(rows[PASTA])} calls. passt: {len(rows[PASST])} calls.",
        "",
        "| call | pasta | passt | only with | declared in |",
        "|---|---|---|---|---|",
    ]
    for name in sorted({*rows[PASTA], *rows[PASST]}):
        tests, modules = rows[PASTA].get(name) or rows[PASST][name]
        marks = " | ".join("yes" if name in rows[mode] else "" for mode in (PASTA, PASST))
        text.append(f"| {name} | {marks} | {tests.replace(' & ', ' &amp; ')} | {modules} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
