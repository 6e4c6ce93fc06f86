"""Port forwarding rules, without the sockets that carry them out.

A rule is a range of ports of one protocol to listen on, and the target that connections are forwarded to:

    rule             clients                           listening sockets         target
    ---------------  --------------------------------  ------------------------  ----------------------------------
    -t, -u           the host, and other hosts         the host: any address,    the guest, or an address beyond it
    (inbound)                                          one, an interface's
    -T, -U           processes in the namespace        the namespace: loopback   the host's loopback, or an address
    (outbound)                                                                   beyond it

An `auto` rule listens only on those of its ports that are currently bound at the target. A `weak` rule leaves out ports
that cannot be bound. A table is a tuple of rules, in the order of the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import addr
from ..lean.records import dataclass, replace
from ..wire.checksum import PROTO_TCP

PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class Rule:
    """Ports `first` to `last`, forwarded to port `to` and those that follow it."""

    option: str  # as given, "-t 8080:80": the name of the rule in messages
    proto: int  # PROTO_TCP or PROTO_UDP
    outbound: bool  # False: -t, -u; True: -T, -U
    first: int
    last: int
    to: int
    addr: bytes | None = None  # to listen on; None: any address (inbound), loopback (outbound), of both families
    ifname: str | None = None  # to listen on
    target: bytes | None = None  # None: the guest (inbound), the host's loopback (outbound)
    auto: bool = False
    weak: bool = False

    def target_port(self, port: int) -> int:
        """The target of `port`, one of first..last."""
        return self.to + port - self.first

    def overlaps(self, other: Rule) -> range:
        """Ports that both listen on, in a combination that the kernel does not allow."""
        if (self.proto, self.outbound) != (other.proto, other.outbound):
            return range(0)
        for mine, theirs in ((self.addr, other.addr), (self.ifname, other.ifname)):
            if mine != theirs and mine is not None and theirs is not None and any(mine) and any(theirs):
                return range(0)
        if self.addr is not None and other.addr is not None and len(self.addr) != len(other.addr):
            return range(0)
        return range(max(self.first, other.first), min(self.last, other.last) + 1)

    @property
    def ports(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def spec(self) -> str:
        """The rule in the syntax of the command line: "-t 127.0.0.1%eth0/80-82:8080-8082"."""
        letter = "t" if self.proto == PROTO_TCP else "u"
        bind = "" if self.addr is None else _bracketed(self.addr)
        bind += f"%{self.ifname}" if self.ifname else ""
        ports = _span(self.first, self.last)
        if self.auto:
            ports = "auto" if (self.first, self.last) == (1, PORT_MAX) else f"auto,{ports}"
        to = "" if self.to == self.first else _span(self.to, self.target_port(self.last))
        target = "" if self.target is None else _bracketed(self.target)
        where = "/".join(filter(None, (target, to)))
        option = letter.upper() if self.outbound else letter
        return f"-{option} {f'{bind}/' if bind else ''}{ports}{f':{where}' if where else ''}"

    def __str__(self) -> str:
        """TCP [127.0.0.1]%eth0 80-82 -> [192.0.2.20] 8080-8082, for logs and listings."""
        where = "*" if self.addr is None else f"[{addr.text(self.addr)}]"
        where += f"%{self.ifname}" if self.ifname else ""
        to = "" if self.target is None else f"[{addr.text(self.target)}] "
        last = f"-{self.last}" if self.last != self.first else ""
        to_last = f"-{self.target_port(self.last)}" if last else ""
        kind = " auto" if self.auto else ""
        return (
            f"{'TCP' if self.proto == PROTO_TCP else 'UDP'}{kind} {where} {self.first}{last} -> {to}{self.to}{to_last}"
        )


def _bracketed(address: bytes) -> str:
    text = addr.text(address)
    return f"[{text}]" if len(address) == 16 else text


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


# Conflicts ----------------------------------------------------------------------------------------------------------


def conflict(rules: Iterable[Rule]) -> tuple[Rule, Rule] | None:
    """Two rules that would listen on one port (`Rule.overlaps`), if there are any.

    The rules are sorted by first port. Each rule is compared with earlier rules that have the highest last port: there
    is one per address and interface. A flag in the key marks entries for wider addresses and interfaces, so that a rule
    looks up equal, wider and narrower ones, a dozen in all.
    """
    seen: dict[tuple[object, ...], Rule] = {}
    for rule in sorted(rules, key=lambda r: r.first):
        side = (rule.proto, rule.outbound)
        addresses, interfaces = _wider_addresses(rule.addr), [rule.ifname, None] if rule.ifname else [None]
        for a, below_a in _keys(addresses, rule.addr):
            for i, below_i in _keys(interfaces, rule.ifname):
                other = seen.get((*side, a, below_a, i, below_i))
                if other is not None and rule.overlaps(other):
                    return other, rule
        for a in addresses:
            for i in interfaces:
                key = (*side, a, a != rule.addr, i, i != rule.ifname)
                if key not in seen or seen[key].last < rule.last:
                    seen[key] = rule
    return None


def _wider_addresses(address: bytes | None) -> list[bytes | None]:
    """The address itself, any address of its family, any address."""
    if address is None:
        return [None]
    return [address, bytes(len(address)), None] if any(address) else [address, None]


def _keys(wider: Iterable[object], own: object) -> list[tuple[object, bool]]:
    return [*((key, False) for key in wider), (own, True)]


# Sockets -----------------------------------------------------------------------------------------------------------


class Listener:
    """A bound socket: `port` of `rule`, in the host, or in the namespace if the rule is outbound.

    `index` is the data of its epoll reference, `to` the target port.
    """

    __slots__ = ("fd", "index", "port", "rule", "sock", "to")

    def __init__(self, rule: Rule, port: int, sock: Any) -> None:
        self.rule = rule
        self.port = port
        self.to = rule.target_port(port)
        self.sock = sock
        self.fd: int = sock.fileno()
        self.index = -1


def with_names(rules: Iterable[Rule], altnames: Mapping[str, str]) -> tuple[Rule, ...]:
    """`rules` with the names of interfaces that are given by an alternative name (ip-link(8), `property add altname`).

    An alternative name may be longer than a socket option takes.
    """
    return tuple(replace(r, ifname=altnames.get(r.ifname, r.ifname)) if r.ifname else r for r in rules)
