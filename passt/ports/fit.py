"""Rules that ask for more sockets than there are descriptors: what is opened instead, decided before the start.

`-t all -u all` stands for some 75 000 sockets. Where the hard limit of descriptors is lower, ports by name are refused,
since they were asked for one by one, and weak rules (`all`, or only exclusions) give way:

    rules                                       become
    ------------------------------------------  ----------------------------------------------------------------------
    all together fit, and leave some            themselves
    (`sockets.reserve`), or need none
    ports by name alone do not fit              an error that names the largest one, the number and the limit
    weak, in front of a namespace               automatic: a port is listened on while it is bound at the other side
                                                (`scan.py`, with its limits). A server there is as reachable as before
    weak, in front of a machine, to another     fewer ports. It cannot be seen what a machine has bound, so ports are
    address, or of an unknown namespace         opened by priority: those below 1024, those that /etc/services names,
                                                all others from the lowest on, TCP and UDP alike. Half of the
                                                descriptors stay for connections

A line of the log says what became of them. Where rules are added at run time (`forwards.py`), nothing is replaced.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence

from .. import log
from ..lean.records import replace
from ..log import Fatal
from ..policy.config import Config
from ..policy.rules import PORT_MAX, Rule
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from .sockets import reserve, sockets

SERVICES = "/etc/services"  # services(5)
WELL_KNOWN = 1024  # ports below it are system ports (RFC 6335, 6)
SHARE = 2  # listeners by priority take at most one in so many of the descriptors

_DIGITS = len(str(PORT_MAX))
_PROTOCOLS = {"tcp": PROTO_TCP, "udp": PROTO_UDP}
_LEFT = (
    "those up to {}",
    "those below 1024, and those of /etc/services up to {}",
    "those below 1024, those of /etc/services, and the others up to {}",
)

Named = frozenset[tuple[int, int]]  # protocol and port


def fit(config: Config, *, follows: bool) -> Config:
    """The configuration with rules that the limit of descriptors allows; `follows`: bound ports of a namespace can be.

    Warns of what is replaced. Raises Fatal.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return config
    asked = _count(config, config.forwards)
    taken = len(os.listdir("/proc/self/fd")) + reserve(limit)
    needed = taken + asked
    if not asked or needed <= limit:
        return config
    firm = taken + _count(config, [rule for rule in config.forwards if not rule.weak])
    weak = [rule for rule in config.forwards if rule.weak and not rule.auto]
    if firm >= limit or not weak:
        named = [rule for rule in config.forwards if not rule.weak and not rule.auto]
        raise _too_many(config, named or weak, max(firm, needed), limit)
    options = ", ".join(dict.fromkeys(rule.option for rule in weak))
    why = f"{options}: {needed} descriptors are needed, and the limit is {limit} (ulimit -Hn)"
    if follows and (followed := [rule for rule in weak if rule.target is None]):
        log.warn(f"{why}: ports are listened on while a server on the other side has them, as with 'auto'")
        config = _replaced(config, {rule: [replace(rule, auto=True)] for rule in followed})
        return fit(config, follows=False)
    parts, last = by_priority(config, weak, limit // SHARE - firm, named_ports(_read_services()))
    if not any(parts.values()):
        raise _too_many(config, weak, needed, limit)
    left = _ports(weak) - _ports(rule for rules in parts.values() for rule in rules)
    log.warn(f"{why}: {left} of {_ports(weak)} ports are left out. Listened on are {last}")
    return _replaced(config, parts)


def by_priority(config: Config, rules: Sequence[Rule], room: int, named: Named) -> tuple[dict[Rule, list[Rule]], str]:
    """For each of `rules` its parts that `room` sockets in all are enough for, and what these are in words."""

    def rank(proto: int, port: int) -> int:
        return 0 if port < WELL_KNOWN else 1 if (proto, port) in named else 2

    wanted = sorted((rank(rule.proto, port), port, i) for i, rule in enumerate(rules) for port in rule.ports)
    chosen: list[list[int]] = [[] for _ in rules]
    last = 0, 0
    for at, port, i in wanted:
        room -= sockets(config, rules[i])
        if room < 0:
            break
        chosen[i].append(port)
        last = at, port
    parts = {rule: list(_parts(rule, ports)) for rule, ports in zip(rules, chosen, strict=True)}
    return parts, _LEFT[last[0]].format(last[1])


def _parts(rule: Rule, ports: Iterable[int]) -> Iterable[Rule]:
    """`rule`, cut down to `ports`."""
    runs: list[list[int]] = []
    for port in sorted(ports):
        if runs and runs[-1][1] == port - 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return [replace(rule, first=first, last=last, to=rule.target_port(first)) for first, last in runs]


def named_ports(text: str) -> Named:
    """The ports of services(5): lines of NAME PORT/PROTOCOL ALIASES, with comments behind a hash."""
    found = set()
    for line in text.splitlines():
        fields = line.partition("#")[0].split()
        port, _, protocol = fields[1].partition("/") if len(fields) > 1 else ("", "", "")
        if protocol in _PROTOCOLS and len(port) <= _DIGITS and port.isascii() and port.isdecimal():
            found.add((_PROTOCOLS[protocol], int(port)))
    return frozenset(found)


def _read_services() -> str:
    try:
        with open(SERVICES, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # no priority among the ports from 1024 on


def _replaced(config: Config, parts: dict[Rule, list[Rule]]) -> Config:
    """`config` with other rules in the place of some."""
    return replace(config, forwards=tuple(new for rule in config.forwards for new in parts.get(rule, [rule])))


def _count(config: Config, rules: Iterable[Rule]) -> int:
    """Sockets of `rules`. Automatic ones have none in advance."""
    return sum(len(rule.ports) * sockets(config, rule) for rule in rules if not rule.auto)


def _ports(rules: Iterable[Rule]) -> int:
    return sum(len(rule.ports) for rule in rules)


def _too_many(config: Config, rules: Sequence[Rule], needed: int, limit: int) -> Fatal:
    largest = max(rules, key=lambda rule: _count(config, [rule]))
    return Fatal(
        f"Can't open enough sockets for port specifier: {largest.option} "
        f"(needs {needed} descriptors, the limit is {limit}: raise ulimit -Hn)"
    )
