"""argv -> Options: the command line alone, before the host is looked at (`conf_net.py` does that)."""

from __future__ import annotations

from collections.abc import Sequence

from .conf_parse import Getopt
from .conf_table import TABLE, Done, Fields, Options
from .log import Fatal

__all__ = ["Done", "Options", "parse"]

PID_MAX = 2**31 - 1


def parse(argv: Sequence[str], program: str = "pasta") -> Options:
    """Options from argv without the program's name. Raises Fatal (one line, status 1) or Done (--help, --version)."""
    fields: Fields = {}
    words = Getopt(program, TABLE, argv)
    for option, argument in words:
        option.action(fields, argument)
    _target(fields, words.operands)
    for field, name in (("copy_routes", "no-copy-routes"), ("copy_addrs", "no-copy-addrs")):
        if not fields.get(field, True) and not fields.get("config_net"):
            raise Fatal(f"--{name} needs --config-net")
    return Options(**fields)


def _target(fields: Fields, operands: list[str]) -> None:
    """What the namespace is: that of --netns, that of a PID, or a new one for a command (none: a login shell)."""
    if "netns" in fields:
        if operands:
            raise Fatal("Both --netns and PID or command given: leave one of them out")
        if fields.get("userns") is None:
            fields["netns_only"] = True
    elif len(operands) == 1 and operands[0].isascii() and operands[0].isdecimal():
        fields["pid"] = int(operands[0])
        if not 0 < fields["pid"] <= PID_MAX:
            raise Fatal(f"Invalid PID {operands[0]} (1 to {PID_MAX})")
    else:
        fields["command"] = tuple(operands)
