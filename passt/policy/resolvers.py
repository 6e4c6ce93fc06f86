"""Resolver choice: the resolver of the host for a query of the guest, and the next one after a failure.

The guest sends queries to a forwarded address (`match`): each of these stands for all of the host's resolvers, of both
address families.

    rank    resolvers
    ------  ------------------------------------------------------------------------------------------
    first   healthy ones: of the address's family, then of the other, each in the order of the list
    then    those on hold after a failure, in the same order

    event                                 consequence
    ------------------------------------  ------------------------------------------------------------------
    an error, or a timeout                on hold for HOLD seconds
    HOLD seconds later                    one query goes to it in its rank again; on hold for other queries
    an answer, or a TCP connection        healthy at once

So a dead resolver delays one query in HOLD seconds, and none if it refuses. A timeout is not a failure of a resolver
that has answered another query in the meantime: the time to resolve a name varies.

There is no socket and no clock here: the callers report results (`udp_engine/dns.py` for UDP, `tcp_engine/opening.py`
for TCP).
"""

from __future__ import annotations

from .. import addr, log
from .config import Config
from .settings import Settings

DNS_PORT = 53
DNS_PORTS = frozenset((DNS_PORT, 853))  # RFC 1035; over TLS, DTLS and QUIC: RFC 7858, 8094, 9250
HOLD = 30.0  # s
WARN_INTERVAL = 60.0  # s
NO_ANSWER = "no answer"

Tried = tuple["Resolver", ...]


class Resolver:
    """A resolver and its state."""

    __slots__ = ("addr", "heard", "held", "why")

    def __init__(self, address: bytes) -> None:
        self.addr = address
        self.held = 0.0  # end of the hold; 0: healthy
        self.heard = 0.0  # time of its last answer
        self.why = ""  # reason of its last failure

    def __str__(self) -> str:
        return f"{addr.text(self.addr)} ({self.why})" if self.why else addr.text(self.addr)


class Resolvers:
    """All resolvers, in the order of the list, and the forwarded addresses."""

    def __init__(self, settings: Settings) -> None:
        self.hosts: tuple[Resolver, ...] = ()
        settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        """Resolvers that stay keep their state."""
        known = {r.addr: r for r in self.hosts}
        self.match = frozenset(config.dns_match)
        self.hosts = tuple(known.get(a) or Resolver(a) for a in dict.fromkeys(config.dns_hosts))

    def serve(self, dst: bytes, port: int) -> bool:
        """Whether packets of the guest to `dst` and `port` are for a resolver."""
        return dst in self.match and port in DNS_PORTS and bool(self.hosts)

    def pick(self, v6: bool, now: float, tried: Tried = ()) -> Resolver | None:
        """The best untried one for a query to an address of that family; None: all were tried."""
        left = [r for r in self.hosts if r not in tried]
        if not left:
            return None
        best = min(left, key=lambda r: (r.held > now, (len(r.addr) == 16) != v6))
        if best.held and best.held <= now:
            best.held = now + HOLD  # one query is enough to test it
        return best

    def failed(self, resolver: Resolver, why: str, now: float) -> None:
        """It refused, was unreachable, or did not answer."""
        if log.debug_on:
            log.debug(f"Resolver {addr.text(resolver.addr)}: {why}: on hold for {HOLD:.0f} s")
        resolver.held, resolver.why = now + HOLD, why

    def silent(self, resolver: Resolver, since: float, now: float) -> bool:
        """A query sent at `since` has timed out; returns whether that counts as a failure."""
        if resolver.heard >= since:
            return False
        self.failed(resolver, NO_ANSWER, now)
        return True

    def answered(self, resolver: Resolver, now: float) -> None:
        """It has answered: healthy at once."""
        resolver.heard, resolver.held, resolver.why = now, 0.0, ""

    def exhausted(self, since: float, now: float) -> None:
        """No resolver has answered a query sent at `since`: warn, unless one has answered another query since."""
        if self.hosts and all(r.heard < since and r.why for r in self.hosts):
            names = ", ".join(map(str, self.hosts))
            text = f"No resolver of the host answers: {names}; names cannot be looked up"
            log.warn_ratelimited("resolvers", text, now, WARN_INTERVAL)
