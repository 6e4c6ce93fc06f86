"""Port forwarding rules: what was asked for, apart from the sockets that carry it out.

A rule is a range of ports of one protocol that somebody connects to on one side, and where that leads on the other:

    rule             who connects                      listens where             leads to
    ---------------  --------------------------------  ------------------------  ----------------------------------
    -t, -u           the host, and other hosts         the host: any address,    the guest, or an address beyond it
    (inbound)                                          one, an interface's
    -T, -U           processes in the namespace        the namespace: loopback   the host's loopback, or an address
    (outbound)                                                                   beyond it

`auto` rules listen only on those of their ports that somebody has bound at the other side at the moment; `weak` ones
leave out ports that cannot be had. A table is a tuple of rules, in the order of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import addr
from ..wire.checksum import PROTO_TCP


@dataclass(frozen=True, slots=True)
class Rule:
    """Ports `first` to `last`, which lead to `to` and those that follow it."""

    option: str  # as it was given, "-t 8080:80": what messages call the rule
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
        """Where `port`, one of first..last, leads."""
        return self.to + port - self.first

    def overlaps(self, other: Rule) -> range:
        """Ports that both would listen on, in a way that the kernel does not allow."""
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


class Listener:
    """A bound socket: `port` of `rule`, in the host, or in the namespace if the rule is outbound.

    `index` is the data of its epoll reference, `to` the port that it leads to.
    """

    __slots__ = ("fd", "index", "port", "rule", "sock", "to")

    def __init__(self, rule: Rule, port: int, sock: Any) -> None:
        self.rule = rule
        self.port = port
        self.to = rule.target_port(port)
        self.sock = sock
        self.fd: int = sock.fileno()
        self.index = -1
