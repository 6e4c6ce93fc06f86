"""The host's resolvers: which of them a query of the guest goes to, and which one next.

The guest writes to an address that we forward (`match`): each of these stands for all of the host's resolvers, of both
address families, whichever it is of itself.

    rank    resolvers
    ------  ------------------------------------------------------------------------------------------
    first   those that are well: of the address's family, then of the other, each as they are listed
    then    those that are held, because they failed, in the same order

    event                                 consequence
    ------------------------------------  ----------------------------------------------------------------
    an error, or silence                  held for HOLD seconds
    HOLD seconds later                    one query goes to it in its rank again; it is held for the others
    an answer, or a TCP connection        well at once

So a resolver that is dead for long costs one query in HOLD seconds a delay, and none at all if it refuses. Silence is
no failure of a resolver that has answered anything since the query was sent: names differ in how long they take.

Nothing here has a socket or a clock: who asks says what came of it (`udp_engine/dns.py` by UDP, `tcp_engine/opening.py`
by TCP).
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
    """A resolver, and what became of what it was asked."""

    __slots__ = ("addr", "heard", "held", "why")

    def __init__(self, address: bytes) -> None:
        self.addr = address
        self.held = 0.0  # until when; 0: it is well
        self.heard = 0.0  # when its last answer came
        self.why = ""  # of its last failure

    def __str__(self) -> str:
        return f"{addr.text(self.addr)} ({self.why})" if self.why else addr.text(self.addr)


class Resolvers:
    """All of them, in the order in which they are listed, and the guest's addresses for them."""

    def __init__(self, settings: Settings) -> None:
        self.hosts: tuple[Resolver, ...] = ()
        settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        """Resolvers that stay keep their health."""
        known = {r.addr: r for r in self.hosts}
        self.match = frozenset(config.dns_match)
        self.hosts = tuple(known.get(a) or Resolver(a) for a in dict.fromkeys(config.dns_hosts))

    def serve(self, dst: bytes, port: int) -> bool:
        """Whether what the guest sends there is for a resolver."""
        return dst in self.match and port in DNS_PORTS and bool(self.hosts)

    def pick(self, v6: bool, now: float, tried: Tried = ()) -> Resolver | None:
        """The best one that was not tried yet, for a query to an address of that family; None: all were."""
        left = [r for r in self.hosts if r not in tried]
        if not left:
            return None
        best = min(left, key=lambda r: (r.held > now, (len(r.addr) == 16) != v6))
        if best.held and best.held <= now:
            best.held = now + HOLD  # one query is enough to see whether it is well
        return best

    def failed(self, resolver: Resolver, why: str, now: float) -> None:
        """It refused, could not be reached, or kept silent."""
        if log.debug_on:
            log.debug(f"Resolver {addr.text(resolver.addr)}: {why}: behind the others for {HOLD:.0f} s")
        resolver.held, resolver.why = now + HOLD, why

    def silent(self, resolver: Resolver, since: float, now: float) -> bool:
        """What it was asked at `since` has no answer yet; returns whether that counts as a failure."""
        if resolver.heard >= since:
            return False
        self.failed(resolver, NO_ANSWER, now)
        return True

    def answered(self, resolver: Resolver, now: float) -> None:
        """It is there."""
        resolver.heard, resolver.held, resolver.why = now, 0.0, ""

    def exhausted(self, since: float, now: float) -> None:
        """A query, sent at `since`, was answered by none of them: say so, unless others were."""
        if self.hosts and all(r.heard < since and r.why for r in self.hosts):
            names = ", ".join(map(str, self.hosts))
            text = f"No resolver of the host answers: {names}; names cannot be looked up"
            log.warn_ratelimited("resolvers", text, now, WARN_INTERVAL)
