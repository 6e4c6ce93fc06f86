"""argv -> Options: the command line alone, before the host is looked at (`conf_net.py` does that)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from . import log
from .conf_options import DEFAULTS, DEPRECATED, PORT_SPECS, Done, Fields, Options
from .conf_parse import Getopt
from .conf_table import table
from .conf_values import EPHEMERAL
from .core.config import PASTA
from .log import Fatal

__all__ = ["Done", "Options", "parse"]

PID_MAX = 2**31 - 1


def parse(argv: Sequence[str], program: str = PASTA, ephemeral: range | None = EPHEMERAL) -> Options:
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
    from . import conf_ports  # --help and --version do without

    specs, deprecated = fields.pop(PORT_SPECS, []), fields.pop(DEPRECATED, [])
    options = Options(**fields)
    _check_files(options)
    if options.mode == PASTA and options.fd is not None:
        _check_tap(options)
    rules = conf_ports.forwards(specs, options, program, EPHEMERAL if ephemeral is None else ephemeral)
    if ephemeral is None and any(rule.weak and not rule.auto for rule in rules):
        taken = f"{EPHEMERAL[0]}-{EPHEMERAL[-1]}"
        log.warn(f"Couldn't read the range of ephemeral ports, which are not forwarded: taking {taken}")
    for name in deprecated:
        log.warn(f"--{name} will be dropped soon")
    return replace(options, forwards=rules)


def _check(fields: Fields) -> None:
    """Options that make no sense together."""
    if "nsrun_dir" in fields and "netns" not in fields:
        raise Fatal("--nsrun-dir needs --netns NAME")
    for field, name in (("copy_routes", "no-copy-routes"), ("copy_addrs", "no-copy-addrs")):
        if not fields.get(field, True) and not fields.get("config_net"):
            raise Fatal(f"--{name} needs --config-net")
    for field, name in (("splice_only", "splice-only"), ("host_lo_to_ns_lo", "host-lo-to-ns-lo")):
        if fields.get(field) and fields.get("no_splice"):
            raise Fatal(f"Both --{name} and --no-splice given: leave one of them out")


def _target(fields: Fields, operands: list[str]) -> None:
    """What the namespace is: that of --netns, that of a PID, or a new one for a command (none: a login shell).

    With --fd and neither of the former, there is none that we would know.
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
    """What goes with a tap device that exists already (--fd): where it is, and what it is called, is settled."""
    if options.command:
        raise Fatal("Both --fd and a command given: the command would not be in the namespace of that tap device")
    for given, name in ((options.ns_ifname, "ns-ifname"), (options.splice_only, "splice-only")):
        if given:
            raise Fatal(f"Both --fd and --{name} given: leave one of them out")
    if options.no_namespace:
        wanted = (("config_net", "config-net"), ("ns_mac", "ns-mac-addr"), ("userns", "userns"),
                  ("netns_only", "netns-only"), ("host_lo_to_ns_lo", "host-lo-to-ns-lo"))  # fmt: skip
        for field, name in wanted:
            if getattr(options, field):
                raise Fatal(f"--{name} needs the namespace of the tap device: give its PID or --netns beside --fd")


def _check_files(options: Options) -> None:
    """A socket takes its path for itself."""
    sockets = (
        ("socket", options.socket_path),
        ("conf-path", options.conf_path),
        ("api-socket", options.api_socket),
    )
    files = (("pid", options.pid_file), ("log-file", options.log_file), ("pcap", options.pcap))
    for i, (name, path) in enumerate(sockets):
        for other, its in (*sockets[i + 1 :], *files):
            if path is not None and its is not None and os.path.abspath(path) == os.path.abspath(its):
                raise Fatal(f"Both --{name} and --{other} are {path}: give each a path of its own")
