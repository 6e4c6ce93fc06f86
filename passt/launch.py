"""The start of every installed command: the file in `commands` finds this package, and the name selects the program."""

from __future__ import annotations

import sys

from .__main__ import quicken_imports
from .namespace import pin

COMM = "/proc/self/comm"


def main() -> int:
    """Run the command that sys.argv names, return the exit status."""
    pin.hold(sys.argv)  # before modules are loaded: a namespace may end meanwhile
    quicken_imports()
    from .linux.inherited import program_name

    name = program_name(sys.argv[0])
    _show(name)
    if "pesto" in name:
        from .pesto.command import main as run
    elif "qrap" in name:
        from .qrap import main as run
    elif "repair" in name:
        from .repair import main as run
    else:
        from .__main__ import main as run
    return run([name, *sys.argv[1:]])


def _show(name: str) -> None:
    """Let ps(1) and pidof(8) show the command's name, which is that of the interpreter otherwise."""
    try:
        with open(COMM, "wb", buffering=0) as f:
            f.write(name.encode(errors="surrogateescape"))
    except OSError:
        pass  # there is no /proc, and with it no ps(1)
