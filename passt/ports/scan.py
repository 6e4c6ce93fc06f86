"""`auto`: a port of a rule is listened on while a program has its target port bound at the other side.

    rule      ports bound in   TCP: listening     UDP: bound; also TCP listening, if TCP is automatic in this direction
    --------  ---------------  -----------------  ----------------------------------------------------------------------
    inbound   the namespace    then listened on   then received on the host
    outbound  the host         at the other side  ... in the namespace, on loopback

A port p of a rule that leads to t is listened on while t is bound. Sockets of this program do not count as bound:
where a rule of the other direction listens, the port is its own, and to follow it would be to follow an echo. New ports
are opened and vanished ports closed: connections through these go on; UDP flows, which would keep the port, end. A port
that cannot be bound is tried again at each scan, and logged once, in debug.

Inbound, UDP follows rules for given TCP ports, too: while port t of the namespace is listening, and a rule leads from p
to t, UDP port p counts as bound. Programs with a TCP connection for control bind UDP for a moment only (iperf3 -u).

Some servers of the host are bound to an address of 127/8 of their own (systemd-resolved: 127.0.0.53). Outbound rules,
automatic or not, listen on the same address in the namespace, and lead to that server, so what /etc/resolv.conf says
works there as well. Such a port counts for nothing else.

    time     condition                                     consequence
    -------  --------------------------------------------  --------------------------------------
    0.8 s    there are automatic rules, or outbound ones   the tables are read and compared again

so that ports appear and vanish within a second. At start inbound rules come first, so that a server in the namespace
gets its port on the host; later outbound rules do. Without such rules there is no timer, and nothing is read.

Limits. Each followed port costs descriptors, and a port of the host that other programs may want, also for connections.
So the sockets of automatic rules have a limit in each direction, a share of the descriptors, and leave some of them
(`sockets.reserve`). Ports beyond are left out, logged and counted once, and have their turn when other ports vanish.

Rules may change at run time (`forwards.py`); a scan follows at once. An automatic rule leaves a port alone that another
rule has.

Cost of a scan of both sides, both protocols, nothing new: 0.15 ms, and 0.6 us for each listening TCP socket and each
UDP socket (`linux/ports.py`; milliseconds where the kernel has no inet_diag). An outbound port that cannot be bound
costs a thread, 0.3 ms for all of them. Where that adds up, scans are less frequent than every 0.8 s, so that they take
a twentieth of a processor at most, by process time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from .. import log
from ..drops import Drop
from ..flow.context import Context
from ..flow.idle import flow_limit
from ..lean.records import replace
from ..linux.ports import Pinned, PortTables
from ..loop.each import each, record
from ..policy.config import Config
from ..policy.rules import Rule
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from .listen import Listeners
from .sockets import Wanted, reserve, sockets

INTERVAL = 0.8  # s
SHARE = 20  # scans take at most one part in so many of the time
Found = tuple[list[Rule], dict[int, set[int]], PortTables | None]  # rules of a direction, ports bound, their table

SOCKETS_MAX = 8192  # of automatic rules, in each direction
DESCRIPTOR_SHARE = 4  # at most one in so many of the descriptors that the process may have


class Scanner:
    """The automatic rules. `host` and `ns` are the port tables of both sides, where rules need them."""

    def __init__(self, ctx: Context, listeners: Listeners, host: PortTables | None, ns: PortTables | None) -> None:
        self._ctx = ctx
        self._listeners = listeners
        self._host, self._ns = host, ns
        self._failed: dict[bool, set[Wanted]] = {False: set(), True: set()}  # by direction, at the last scan
        self._left_out: dict[bool, set[Wanted]] = {False: set(), True: set()}  # likewise
        self._most = flow_limit(SOCKETS_MAX, DESCRIPTOR_SHARE)
        limit = flow_limit(sys.maxsize, 1)
        self._all = limit - reserve(limit)  # for all rules
        self._timer = -1
        self._armed = False
        self._own: set[Rule] = set()  # derived from outbound rules, one for each loopback address of a server
        ctx.settings.subscribe(self._adopt)
        ctx.settings.react(self._changed)

    def _adopt(self, config: Config) -> None:
        self._rules = rules = config.forwards
        self._inbound = [rule for rule in rules if rule.auto and not rule.outbound]
        self._outbound = [rule for rule in rules if rule.auto and rule.outbound]
        fixed = [rule for rule in rules if not rule.auto]
        self._others = {rule: _overlaps(rule, fixed) for rule in (*self._inbound, *self._outbound)}
        self._leading = [r for r in rules if r.outbound and r.addr is None and r.target is None]
        udp = any(rule.proto == PROTO_UDP for rule in self._inbound)
        led = [r for r in fixed if udp and r.proto == PROTO_TCP and not r.outbound and r.target is None]
        self._look_in = [*self._inbound, *led]
        self._look_out = [*self._outbound, *(rule for rule in self._leading if not rule.auto)]

    def can_follow(self, outbound: bool) -> bool:
        """Whether automatic rules of that direction are possible: the port table of the other side is known."""
        return (self._host if outbound else self._ns) is not None

    def _changed(self, former: Config, now: float) -> None:
        """Close ports of derived rules that have lost their rule; `forwards.py` closed the others."""
        if self._rules is former.forwards:
            return
        origins = {_pinned_at(rule, None) for rule in self._leading}
        gone = [own for own in self._own if _pinned_at(own, None) not in origins]
        each(gone, self._close_all, self._fault_at)
        self.start(now)

    def start(self, now: float) -> None:
        """Scan at once, and periodically from then on."""
        if not self._wanted:
            return
        if self._timer < 0:
            self._timer = self._ctx.timers.services.new(self._scan)
        self._follow_all(now, (self._look_in, self._ns), (self._look_out, self._host))
        if not self._armed:
            self._ctx.timers.services.arm(self._timer, now + INTERVAL)
            self._armed = True

    @property
    def _wanted(self) -> bool:
        """Whether there is anything to follow. Given outbound ports have no need of tables."""
        return bool(self._inbound or self._outbound or (self._look_out and self._host is not None))

    def _scan(self, now: float) -> None:
        self._armed = self._wanted
        if not self._armed:
            return
        begin = time.process_time()
        try:
            self._follow_all(now, (self._look_out, self._host), (self._look_in, self._ns))
        finally:  # a fault costs one scan
            cost = time.process_time() - begin
            self._ctx.timers.services.arm(self._timer, now + max(INTERVAL, SHARE * cost))

    def _follow_all(self, now: float, *directions: tuple[list[Rule], PortTables | None]) -> None:
        """Read all tables, then act: a port closed now stays bound for this turn, and no longer counts as own.

        A direction or a rule at which a fault occurs misses this scan.
        """
        found: list[Found] = []
        look = [(r, t) for r, t in directions if r and (t is not None or any(rule.auto for rule in r))]
        each(look, self._read, self._fault_at, found)
        each(found, self._follow_one, self._fault_at, now)

    def _read(self, direction: tuple[list[Rule], PortTables | None], found: list[Found]) -> None:
        rules, tables = direction
        found.append((rules, self._bound(rules, tables), tables))

    def _follow_one(self, found: Found, now: float) -> None:
        """Act for one direction."""
        rules, bound, tables = found
        new = self._follow(rules, bound)
        if rules[0].outbound and tables is not None:
            new += self._follow_pinned(self._leading, tables)
        self._add(rules[0].outbound, self._within_limit(rules[0].outbound, new, now))

    def _fault_at(self, what: object, e: Exception) -> None:
        """Its next turn is the next scan."""
        record(self._ctx.drops, "an automatic rule", e)

    def _follow(self, rules: list[Rule], bound: dict[int, set[int]]) -> list[Wanted]:
        """Follow the bound ports that `rules`, of one direction, lead to; returns new ports."""
        new: list[Wanted] = []
        each([rule for rule in rules if rule.auto], self._follow_rule, self._fault_at, bound, new)
        return new

    def _follow_rule(self, rule: Rule, bound: dict[int, set[int]], new: list[Wanted]) -> None:
        wanted = {p for t in bound[rule.proto] if (p := t - rule.to + rule.first) in rule.ports}
        wanted -= {port for port in wanted for others in self._others[rule] if port in others}
        self._close_but(rule, wanted, new)

    def _close_but(self, rule: Rule, wanted: set[int], new: list[Wanted]) -> None:
        """Close ports of a rule that are not wanted; append wanted ports without a listener to `new`."""
        have = self._listeners.ports(rule)
        self._close(rule, have - wanted)
        new += [(rule, p) for p in sorted(wanted - have)]

    def _follow_pinned(self, rules: list[Rule], tables: PortTables) -> list[Wanted]:
        """The same for servers of the host with a loopback address of their own."""
        wanted: dict[Rule, set[int]] = {}
        ours = self._listeners.has
        tcp: Pinned = set()
        if any(rule.proto == PROTO_TCP for rule in rules):
            tcp = {(a, port) for a, port in tables.pinned(PROTO_TCP) if not ours(PROTO_TCP, False, port)}
        if self._ctx.config.ip4 is not None:
            each(rules, self._find_pinned, self._fault_at, tables, tcp, wanted)
        new: list[Wanted] = []
        before, self._own = self._own, set(wanted)
        each(before | wanted.keys(), self._follow_own, self._fault_at_own, wanted, new)
        return new

    def _find_pinned(self, rule: Rule, tables: PortTables, tcp: Pinned, wanted: dict[Rule, set[int]]) -> None:
        """Add ports of servers that `rule` leads to to `wanted`, by the rule derived for their address."""
        follows_tcp = any(other.auto and other.proto == PROTO_TCP for other in self._leading)
        udp = tables.pinned(PROTO_UDP) | (tcp if follows_tcp else set()) if rule.proto == PROTO_UDP else set()
        for address, bound in tcp if rule.proto == PROTO_TCP else udp:
            port = bound - rule.to + rule.first
            ours = self._listeners.has(rule.proto, False, bound)
            taken = ours or any(port in others for others in self._others.get(rule, ()))
            if port in rule.ports and not taken:
                wanted.setdefault(_pinned_at(rule, address), set()).add(port)

    def _follow_own(self, own: Rule, wanted: dict[Rule, set[int]], new: list[Wanted]) -> None:
        self._close_but(own, wanted.get(own, set()), new)

    def _fault_at_own(self, own: Rule, e: Exception) -> None:
        """Keep the derived rule, which may still have ports."""
        self._own.add(own)
        self._fault_at(own, e)

    def _close_all(self, own: Rule) -> None:
        self._close(own, self._listeners.ports(own))

    def _close(self, rule: Rule, ports: set[int]) -> None:
        self._listeners.remove_all((rule, port) for port in ports)
        for port in ports:
            log.debug(f"{rule.option}: port {port} is no longer bound")

    def _bound(self, rules: Sequence[Rule], tables: PortTables | None) -> dict[int, set[int]]:
        """Ports by protocol that other programs have bound at the side where `rules` lead."""
        assert tables is not None, "opened where automatic rules are"
        echo = not rules[0].outbound
        ours = self._listeners.has
        protos = {rule.proto for rule in rules}
        tcp = set()
        if PROTO_TCP in protos:
            tcp = {port for port in tables.bound(PROTO_TCP) if not ours(PROTO_TCP, echo, port)}
        udp = tables.bound(PROTO_UDP) if PROTO_UDP in protos else set()
        udp |= _followed_by_udp(rules, tcp)
        return {PROTO_TCP: tcp, PROTO_UDP: {port for port in udp if not ours(PROTO_UDP, echo, port)}}

    def _within_limit(self, outbound: bool, new: list[Wanted], now: float) -> list[Wanted]:
        """New ports within the limit; those beyond are logged and counted once.

        Ports that failed at the last scan come last, so that they take no place of others.
        """
        failed = self._failed[outbound]
        new = sorted(new, key=failed.__contains__)
        rules = [*self._rules, *self._own]
        following = [rule for rule in rules if rule.auto and rule.outbound == outbound]
        room = min(self._most - self._sockets(following), self._all - self._sockets(rules))
        fitting = 0
        for rule, _ in new:
            room -= sockets(self._ctx.config, rule)
            if room < 0:
                break
            fitting += 1
        left_out = set(new[fitting:])
        if count := len(left_out - self._left_out[outbound] - failed):
            self._ctx.drops[Drop.AUTO_TOO_MANY] += count
            where = "on the host" if outbound else "in the namespace"
            text = f"{len(left_out)} more are bound {where} than may be followed, by {self._most} sockets at most"
            log.warn_ratelimited(f"auto {outbound}", f"Automatic ports: {text}", now)
        self._left_out[outbound] = left_out
        return new[:fitting]

    def _sockets(self, rules: Iterable[Rule]) -> int:
        return sum(len(self._listeners.ports(rule)) * sockets(self._ctx.config, rule) for rule in rules)

    def _add(self, outbound: bool, new: list[Wanted]) -> None:
        failures = self._listeners.add_all(new) if new else []
        failed = {(f.rule, f.port): f for f in failures}
        for wanted, failure in failed.items():
            if wanted not in self._failed[outbound]:
                log.debug(f"{failure.rule.option}: port {failure.port} cannot be opened now: {failure.reason}")
        if log.debug_on:
            for rule, port in new:
                if (rule, port) not in failed:
                    log.debug(f"{rule.option}: listening on port {port}")
        self._failed[outbound] = set(failed)


def _pinned_at(rule: Rule, address: bytes | None) -> Rule:
    """The rule derived from an outbound one for a loopback address of a server."""
    return replace(rule, addr=address, target=address, auto=True, weak=True)


def _followed_by_udp(rules: Iterable[Rule], tcp: set[int]) -> set[int]:
    """The UDP ports that follow the listening TCP ports `tcp`, where `rules` of one direction lead."""
    tcp_rules = [rule for rule in rules if rule.proto == PROTO_TCP]
    given = [rule for rule in tcp_rules if not rule.auto and not rule.outbound]
    found = {p for r in given for t in tcp if (p := t - r.to + r.first) in r.ports}
    return found | tcp if any(rule.auto for rule in tcp_rules) else found


def _overlaps(rule: Rule, fixed: Iterable[Rule]) -> list[range]:
    """Ports of an automatic rule that other rules have."""
    return [common for other in fixed if (common := rule.overlaps(other))]
