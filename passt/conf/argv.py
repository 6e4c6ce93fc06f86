"""argv -> Options: the command line alone. `decide.py` combines it with the host's configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .. import log
from ..log import Fatal
from ..policy.config import PASST, PASTA
from .actions import PORT_SPECS, Done, Fields
from .getopt import Getopt
from .options import Options
from .table import named, table, without_effect
from .values import EPHEMERAL

__all__ = ["Done", "Options", "parse"]

PID_MAX = 2**31 - 1


def parse(argv: Sequence[str], program: str = PASTA, ephemeral: range | None = EPHEMERAL) -> Options:
    """Options from argv without the program's name. Raises Fatal (one line, status 1) or Done (--help, --version).

    `program` is the mode, PASTA or PASST, `ephemeral` the ports that the kernel gives to clients, None if unknown.
    """
    fields: Fields = {"mode": program, **(Options.PASST_DEFAULTS if program == PASST else {})}
    parsed = Getopt(program, table(program), argv)
    warnings = []
    for option, argument in parsed:
        option.action(fields, argument, option)
        if not option.is_in(program) and option.only.inert:
            warnings.append(without_effect(option))
        elif option.deprecated:
            warnings.append(f"--{option.name} will be dropped soon")
    if program == PASTA:
        _target(fields, parsed.operands)
        _check(fields)
    elif parsed.operands:
        raise Fatal(f"Extra non-option argument: {parsed.operands[0]} (passt takes options only)")
    prefix_len = fields["prefix_len"].v4 if "prefix_len" in fields else 0
    if prefix_len and fields.get("netmask"):
        raise Fatal(f"Redundant prefix length specification: --netmask and /{prefix_len} of --address: leave one out")
    from . import forwards  # not needed by --help and --version

    specs = fields.pop(PORT_SPECS, [])
    options = Options(**fields)
    _check_files(options)
    if options.mode == PASTA and options.fd is not None:
        _check_tap(options)
    rules = forwards.forwards(specs, options, program, EPHEMERAL if ephemeral is None else ephemeral)
    if ephemeral is None and any(rule.weak and not rule.auto for rule in rules):
        taken = f"{EPHEMERAL[0]}-{EPHEMERAL[-1]}"
        log.warn(f"Couldn't read the range of ephemeral ports, which are not forwarded: taking {taken}")
    for warning in warnings:
        log.warn(warning)
    return Options(**fields, forwards=rules)


def _check(fields: Fields) -> None:
    """Reject options that contradict each other. Raises Fatal."""
    if "nsrun_dir" in fields and "netns" not in fields:
        raise Fatal(f"{named('nsrun_dir')} needs --netns NAME")
    for field in ("copy_routes", "copy_addrs"):
        if not fields.get(field, True) and not fields.get("config_net"):
            raise Fatal(f"{named(field)} needs {named('config_net')}")
    for field in ("splice_only", "host_lo_to_ns_lo"):
        if fields.get(field) and fields.get("no_splice"):
            raise Fatal(f"Both {named(field)} and {named('no_splice')} given: leave one of them out")


def _target(fields: Fields, operands: list[str]) -> None:
    """Set the namespace: that of --netns, that of a PID, or a new one for a command (none given: a login shell).

    With --fd alone, the namespace is unknown.
    """
    if "netns" in fields:
        if operands:
            raise Fatal("Both --netns and PID or command given: leave one of them out")
    elif len(operands) == 1 and operands[0].isascii() and operands[0].isdecimal():
        fields["pid"] = int(operands[0])
        if not 0 < fields["pid"] <= PID_MAX:
            raise Fatal(f"Invalid PID {operands[0]} (1 to {PID_MAX})")
    else:
        fields["command"] = tuple(operands)


def _check_tap(options: Options) -> None:
    """Reject options that contradict an existing tap device (--fd): its namespace and name are fixed. Raises Fatal."""
    if options.command:
        raise Fatal("Both --fd and a command given: the command would not be in the namespace of that tap device")
    for field in ("ns_ifname", "splice_only"):
        if getattr(options, field):
            raise Fatal(f"Both --fd and {named(field)} given: leave one of them out")
    if options.no_namespace:
        for field in ("config_net", "ns_mac", "userns", "netns_only", "host_lo_to_ns_lo"):
            if getattr(options, field):
                needed = "the namespace of the tap device: give its PID or --netns beside --fd"
                raise Fatal(f"{named(field)} needs {needed}")


def _check_files(options: Options) -> None:
    """Reject a path that is given for a socket and for another file. Raises Fatal."""
    sockets = ("socket_path", "conf_path", "api_socket", "repair_path")
    files = ("pid_file", "log_file", "pcap")
    for i, field in enumerate(sockets):
        path = getattr(options, field)
        for other in (*sockets[i + 1 :], *files):
            its = getattr(options, other)
            if path is not None and its is not None and os.path.abspath(path) == os.path.abspath(its):
                raise Fatal(f"Both {named(field)} and {named(other)} are {path}: give each a path of its own")
