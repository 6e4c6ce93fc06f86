"""Changes of forwarding rules at run time: all changes of a request take effect, or none.

The rules of the configuration are the first content of a table (`policy/rule_table.py`), which clients of the control
sockets change. A request is a list of changes, applied in order to a copy of the table. Then ports are compared, not
changes: a port that is wanted before and after stays open. The rules of the table, by number, are the `forwards` of the
configuration, and only this module replaces them (`policy/settings.py`).

    port, before and after                                 its socket
    -----------------------------------------------------  ----------------------------------------------------------
    of the same rule, or of one that listens likewise      stays; UDP flows end if its target changes
    no longer wanted                                       is closed: connections go on, UDP flows end
    wanted                                                 is opened
    wanted, where a port no longer wanted conflicts        that one is closed first
    wanted, where an automatic rule listens                the same; the automatic rule leaves the port alone

Everything else is opened before anything is closed. If a port cannot be opened, what was opened is closed, what was
closed first is opened again, and the request fails with a line for each range of ports, in the words of start-up. A
port in use is not waited for, because the loop would stand still. Opening takes some 15 us per port, so a request that
needs more descriptors than there may be is refused before anything is opened, and so is one with more than OPENED_MAX
sockets.

All of this happens between two turns of the loop, when descriptors can be closed at once, so a port is free when the
request is answered.

Other errors of rules are found where they are parsed (`control/json_api.py`, with the parser of the command line).
"""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from .. import log
from ..flow.context import Context
from ..flow.room import NO_DESCRIPTORS
from ..lean.records import dataclass, field, replace
from ..loop.each import each, record
from ..policy.rule_table import Missing, RuleTable
from ..policy.rules import Listener, Rule
from .listen import Listeners, close_socket
from .scan import Scanner
from .sockets import Failure, Wanted, describe, reserve, sockets

OPENED_MAX = 16384  # sockets of one request: a quarter of a second

# Requests and their outcomes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Add:
    rule: Rule


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the ports of `rule`, whatever rules they belong to."""

    rule: Rule


@dataclass(frozen=True, slots=True)
class DeleteNumber:
    number: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Delete all rules of a direction and of a protocol; None is any."""

    outbound: bool | None = None
    proto: int | None = None

    def means(self, rule: Rule) -> bool:
        return self.outbound in (None, rule.outbound) and self.proto in (None, rule.proto)


Change = Add | Delete | DeleteNumber | Clear


class Refused(Exception):
    """A request that fails and changes nothing: lines with the reasons, and the ports that could not be opened."""

    def __init__(self, lines: Sequence[str], failures: Sequence[Failure] = ()) -> None:
        super().__init__(lines, failures)
        self.lines = list(lines)
        self.failures = list(failures)

    def __str__(self) -> str:
        return "\n".join(self.lines)


@dataclass(slots=True)
class Outcome:
    """Changed rules by number, and rules that existed already."""

    added: dict[int, Rule] = field(default_factory=dict)
    removed: dict[int, Rule] = field(default_factory=dict)
    present: list[Rule] = field(default_factory=list)


# The table and its sockets -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Plan:
    """Ports to close, to hand over and to open."""

    close: list[Wanted]
    hand_over: list[tuple[Rule, int, Rule]]
    open: list[Wanted]


class Forwards:
    """The rules in force. `listeners` has their sockets; `scanner` opens those of automatic rules."""

    def __init__(self, ctx: Context, listeners: Listeners, scanner: Scanner) -> None:
        self._ctx = ctx
        self._listeners = listeners
        self._scanner = scanner
        self._table = RuleTable(ctx.config.forwards)
        ctx.stats.gauges["forwards"] = lambda: len(self.rules)
        self._limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    @property
    def rules(self) -> dict[int, Rule]:
        """By number. Callers must not change it."""
        return self._table.rules

    def ports(self, rule: Rule) -> set[int]:
        """Ports of a rule with a listener."""
        return self._listeners.ports(rule)

    def change(self, changes: Iterable[Change], now: float) -> Outcome:
        """Make all changes, or raise Refused and make none. Only between turns of the loop."""
        table, outcome = self._table.copy(), Outcome()
        for change in changes:
            self._apply(change, table, outcome)
        self._check(table)
        before, after = self._table.rules, table.rules
        outcome.removed = {n: rule for n, rule in before.items() if after.get(n) != rule}
        outcome.added = {n: rule for n, rule in after.items() if before.get(n) != rule}
        if outcome.removed or outcome.added:
            self._check_descriptors(after.values())
            plan = self._plan(list(outcome.removed.values()), list(outcome.added.values()))
            self._check_work(plan.open)
            closed_first = self._conflicting(plan, after.values())
            self._open(plan.open, closed_first)
            gone = set(closed_first)
            self._listeners.remove_all(w for w in plan.close if w not in gone)
            self._listeners.hand_over([h for h in plan.hand_over if h[:2] not in gone])
            self._table = table
            self._ctx.reactor.close_retired()
            config = self._ctx.config
            self._ctx.settings.replace(replace(config, forwards=tuple(after.values())), now)
            self._ctx.reactor.close_retired()
        return outcome

    # The rules that are wanted -----------------------------------------------------------------------------------

    def _apply(self, change: Change, table: RuleTable, outcome: Outcome) -> None:
        if isinstance(change, Clear):
            table.delete_all(change.means)
        elif isinstance(change, DeleteNumber):
            if change.number not in table.rules:
                raise Refused([f"There is no rule with the number {change.number}"])
            table.delete_number(change.number)
        elif isinstance(change, Delete):
            try:
                table.delete(change.rule)
            except Missing as e:
                raise Refused([_missing(e, table)]) from None
        elif self._is_there(change.rule, table):
            outcome.present.append(change.rule)
        else:
            self._check_rule(change.rule)
            table.add(change.rule)

    def _is_there(self, rule: Rule, table: RuleTable) -> bool:
        """Whether an added rule changes nothing.

        Ports that a weak rule could not open do not count: a rule that is not weak takes them from it.
        """
        try:
            parts = [table.rules[number] for number in table.covering(rule)]
        except Missing:
            return False
        weak = [part for part in parts if part.weak and not part.auto]
        have = set[int]().union(*(self._listeners.ports(part) for part in weak))
        if rule.weak or all(have.issuperset(_common(part, rule)) for part in weak):
            return True
        table.delete(rule)
        return False

    def _check_rule(self, rule: Rule) -> None:
        if rule.outbound and not self._listeners.has_namespace:
            raise Refused([f"'{rule.option}' needs a namespace to listen in, and there is none"])
        if rule.auto and not self._scanner.can_follow(rule.outbound):
            where = "host" if rule.outbound else "namespace"
            raise Refused([f"'{rule.option}': which ports are bound in the {where} cannot be found out"])

    def _check(self, table: RuleTable) -> None:
        """Raises Refused if two rules want the same port."""
        both = table.conflict()
        if both is None:
            return
        old = set(self._table.rules.values())
        first, second = both[::-1] if both[1] in old else both
        port = max(first.first, second.first)
        if first in old:
            raise Refused(
                [
                    f"Port {port} is forwarded already, by '{first.option}', and asked for by '{second.option}': "
                    f"delete the former, or leave the port out (~{port} excludes it)"
                ]
            )
        names = f"'{first.option}' and by '{second.option}'"
        raise Refused([f"Port {port} is asked for twice, by {names}: leave it out of one of them"])

    def _check_descriptors(self, rules: Iterable[Rule]) -> None:
        """Raises Refused if the rules need more descriptors than the process may have, as at start."""
        if self._limit == resource.RLIM_INFINITY:
            return
        sizes = [(len(rule.ports) * sockets(self._ctx.config, rule), rule.option) for rule in rules if not rule.auto]
        needed = sum(n for n, _ in sizes) + reserve(self._limit)
        if sizes and needed > self._limit:
            raise Refused([self._too_many(max(sizes)[1], f"needs {needed} descriptors, the limit is {self._limit}")])

    def _check_work(self, wanted: Sequence[Wanted]) -> None:
        """Raises Refused if the loop would stand still for too long."""
        opened = sum(sockets(self._ctx.config, rule) for rule, _ in wanted)
        if opened > OPENED_MAX:
            raise Refused(
                [
                    f"Ports with {opened} sockets are too many for one request, as traffic would have to wait: "
                    f"divide it into requests with {OPENED_MAX} at most"
                ]
            )

    @staticmethod
    def _too_many(option: str, why: str) -> str:
        return f"Can't open enough sockets for port specifier: {option} ({why}: start with a higher one, ulimit -Hn)"

    # Sockets -----------------------------------------------------------------------------------------------------

    def _plan(self, removed: Sequence[Rule], added: Sequence[Rule]) -> _Plan:
        successors = _Successors(added)
        plan = _Plan([], [], [])
        handed = set[Wanted]()
        for rule in removed:
            for port in sorted(self._listeners.ports(rule)):
                successor = successors.find(rule, port)
                if successor is None:
                    plan.close.append((rule, port))
                else:
                    plan.hand_over.append((rule, port, successor))
                    handed.add((successor, port))
        left_out = _Successors(rule for rule in removed if rule.weak)
        plan.open = [
            (rule, port)
            for rule in added
            if not rule.auto
            for port in rule.ports
            if (rule, port) not in handed and not (rule.weak and left_out.find(rule, port))
        ]
        return plan

    def _conflicting(self, plan: _Plan, rules: Iterable[Rule]) -> list[Wanted]:
        """Ports about to be closed that conflict with ports to open."""
        wanted: dict[tuple[int, bool, int], list[Rule]] = {}
        for rule, port in plan.open:
            wanted.setdefault((rule.proto, rule.outbound, port), []).append(rule)
        given_up = plan.close + [(rule, port) for rule, port, _ in plan.hand_over if rule.auto]
        given_up += [(rule, port) for rule in rules if rule.auto for port in self._listeners.ports(rule)]
        return [
            (rule, port)
            for rule, port in dict.fromkeys(given_up)  # an automatic rule may be deleted and added in one request
            if any(rule.overlaps(other) for other in wanted.get((rule.proto, rule.outbound, port), ()))
        ]

    def _open(self, wanted: Sequence[Wanted], closed_first: Sequence[Wanted]) -> None:
        """Close `closed_first`, then listen on `wanted`. Raises Refused, with everything as it was."""
        self._listeners.remove_all(closed_first)
        self._ctx.reactor.close_retired()
        opened: list[Listener] = []
        try:
            failures = []
            for outbound in (False, True):
                listeners, failed = self._listeners.open([w for w in wanted if w[0].outbound == outbound])
                opened += listeners
                failures += failed
            self._check_opened(opened, failures)
            self._watch(opened)
        except BaseException as e:
            each(opened, close_socket, lambda _, fault: record(self._ctx.drops, "the end of a listener", fault))
            lost = self._restore(closed_first)
            if isinstance(e, Refused):
                e.lines += lost
            raise

    def _watch(self, opened: Sequence[Listener]) -> None:
        try:
            self._listeners.watch(opened)
        except OSError as e:
            raise Refused([f"Couldn't watch new ports: {e.strerror}"]) from None

    def _check_opened(self, opened: Sequence[Listener], failures: Sequence[Failure]) -> None:
        """Raises Refused if a port failed that is not of a weak rule, if no port of a rule was opened, or if too few
        descriptors are left for traffic.
        """
        firm = [f for f in failures if not f.rule.weak]
        full = next((f for f in failures if f.errno in NO_DESCRIPTORS), None)
        last = max(opened, key=lambda listener: listener.fd, default=None)
        if full is None and last is not None and last.fd >= self._limit - reserve(self._limit) > 0:
            full = Failure(last.rule, last.port, 0)
        if full is not None:
            line = self._too_many(full.rule.option, f"the limit of descriptors is {self._limit}")
            raise Refused([line], failures)
        if firm:
            raise Refused(describe(firm), firm)
        had = {listener.rule.option for listener in opened}
        none = [option for option in dict.fromkeys(f.rule.option for f in failures) if option not in had]
        if none:
            raise Refused([f"Failed to bind any port for '{option}'" for option in none], failures)

    def _restore(self, closed_first: Iterable[Wanted]) -> list[str]:
        """Listen again on ports closed before, and report those that are lost; automatic rules open theirs."""
        fixed = [(rule, port) for rule, port in closed_first if not rule.auto]
        lost: list[Failure] = []
        for outbound in (False, True):
            lost += self._listeners.add_all([w for w in fixed if w[0].outbound == outbound])
        for failure in lost:
            log.warn(f"Port {failure.port} of '{failure.rule.option}' was closed for a moment, and is lost")
        return [f"Meanwhile another program took port {f.port} of '{f.rule.option}': {f.reason}" for f in lost]


class _Successors:
    """Rules by protocol, side, address and interface, each with its range of ports."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules: dict[tuple[object, ...], list[Rule]] = {}
        for rule in sorted(rules, key=lambda r: r.first):
            self._rules.setdefault(_listening_key(rule), []).append(rule)
        self._firsts = {key: [rule.first for rule in rules] for key, rules in self._rules.items()}

    def find(self, rule: Rule, port: int) -> Rule | None:
        """The rule that listens on `port` in the same way as `rule`."""
        key = _listening_key(rule)
        at = bisect_right(self._firsts.get(key, ()), port) - 1
        successor = self._rules[key][at] if at >= 0 else None
        return successor if successor is not None and port <= successor.last else None


def _listening_key(rule: Rule) -> tuple[object, ...]:
    return rule.proto, rule.outbound, rule.addr, rule.ifname, rule.auto


def _common(a: Rule, b: Rule) -> range:
    return range(max(a.first, b.first), min(a.last, b.last) + 1)


def _missing(e: Missing, table: RuleTable) -> str:
    """The message for a port without that rule, with the rule that has the port."""
    line = f"Port {e.port} of '{e.rule.option}' is not forwarded"
    there = next(_similar(e.rule, e.port, table.rules.values()), None)
    return line if there is None else f"{line} so: there is '{there.spec}'"


def _similar(rule: Rule, port: int, rules: Iterable[Rule]) -> Iterator[Rule]:
    """Rules of the same kind that have the port; automatic ones come last."""
    alike = [r for r in rules if (r.proto, r.outbound) == (rule.proto, rule.outbound) and port in r.ports]
    yield from sorted(alike, key=lambda r: r.auto)
