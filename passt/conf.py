"""argv -> Options: the command line alone, before the host is looked at (`conf_net.py` does that)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import conf_ports, log
from .conf_parse import Getopt
from .conf_table import DEFAULTS, PORT_SPECS, Done, Fields, Options, table
from .core.config import PASTA
from .log import Fatal

__all__ = ["Done", "Options", "parse"]

PID_MAX = 2**31 - 1


def parse(argv: Sequence[str], program: str = PASTA, ephemeral: range | None = conf_ports.EPHEMERAL) -> Options:
    """Options from argv without the program's name. Raises Fatal (one line, status 1) or Done (--help, --version).

    `program` is the mode, PASTA or PASST, `ephemeral` the ports that the kernel gives to clients, None if unknown.
    """
    fields: Fields = {"mode": program, **DEFAULTS[program]}
    words = Getopt(program, table(program), argv)
    for option, argument in words:
        option.action(fields, argument)
    if program == PASTA:
        _target(fields, words.operands)
        _check(fields)
    elif words.operands:
        raise Fatal(f"Extra non-option argument: {words.operands[0]}")
    specs = fields.pop(PORT_SPECS, [])
    options = Options(**fields)
    rules = conf_ports.forwards(specs, options, program, conf_ports.EPHEMERAL if ephemeral is None else ephemeral)
    if ephemeral is None and any(rule.weak and not rule.auto for rule in rules):
        low, high = conf_ports.EPHEMERAL[0], conf_ports.EPHEMERAL[-1]
        log.warn(f"Couldn't read the range of ephemeral ports, which are not forwarded: taking {low}-{high}")
    return replace(options, forwards=rules)


def _check(fields: Fields) -> None:
    """Options that make no sense together."""
    for field, name in (("copy_routes", "no-copy-routes"), ("copy_addrs", "no-copy-addrs")):
        if not fields.get(field, True) and not fields.get("config_net"):
            raise Fatal(f"--{name} needs --config-net")
    for field, name in (("splice_only", "splice-only"), ("host_lo_to_ns_lo", "host-lo-to-ns-lo")):
        if fields.get(field) and fields.get("no_splice"):
            raise Fatal(f"Both --{name} and --no-splice given: leave one of them out")


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
