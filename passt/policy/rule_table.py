"""The rules in force, by number; adding and deleting rules.

A new rule gets a number and keeps it. The treatment of a connection, that is, all fields except the range, is the
rule's meaning: two rules of one meaning are one rule in two parts. So

    a new rule exists already        if rules of its meaning have all of its ports
    a rule can be deleted            if rules of its meaning have all of its ports; these lose them. A rule with ports
                                     on both sides of the gap becomes two: the first part keeps the number

`Rule.weak` (a failure to bind is not an error) is not part of the meaning. Rules of different meanings must not use the
same port (`rules.py`), except that an `auto` rule gives way to any other.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator

from ..lean.records import replace
from .rules import Rule, conflict

Meaning = tuple[object, ...]


def meaning(rule: Rule) -> Meaning:
    """The treatment of a connection: all fields of a rule except the range."""
    return rule.proto, rule.outbound, rule.addr, rule.ifname, rule.target, rule.to - rule.first, rule.auto


class Missing(Exception):
    """No rule in force has `port` of a rule to be deleted."""

    def __init__(self, rule: Rule, port: int) -> None:
        super().__init__(rule, port)
        self.rule = rule
        self.port = port


class RuleTable:
    """Rules by number, in no particular order."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules: dict[int, Rule] = {}
        self._parts: dict[Meaning, list[tuple[int, int]]] = {}  # (first port, number), ascending
        self._next = 1
        for rule in rules:
            self.add(rule)

    def copy(self) -> RuleTable:
        """An independent copy."""
        other = RuleTable()
        other.rules = dict(self.rules)
        other._parts = {m: list(parts) for m, parts in self._parts.items()}
        other._next = self._next
        return other

    def add(self, rule: Rule) -> int:
        """Add a rule; returns its number."""
        number, self._next = self._next, self._next + 1
        self._put(number, rule)
        return number

    def _put(self, number: int, rule: Rule) -> None:
        self.rules[number] = rule
        insort(self._parts.setdefault(meaning(rule), []), (rule.first, number))

    def _take(self, number: int) -> Rule:
        rule = self.rules.pop(number)
        parts = self._parts[meaning(rule)]
        del parts[bisect_left(parts, (rule.first, number))]
        return rule

    def covering(self, rule: Rule) -> list[int]:
        """The numbers of the rules of its meaning that have all of its ports, ascending by port. Raises Missing."""
        found, port = [], rule.first
        for number in self._from(rule):
            part = self.rules[number]
            if part.first > port:
                break
            found.append(number)
            port = part.last + 1
            if port > rule.last:
                return found
        raise Missing(rule, port)

    def _from(self, rule: Rule) -> Iterator[int]:
        """Rules of its meaning, beginning with the one that has its first port."""
        parts = self._parts.get(meaning(rule), [])
        at = bisect_right(parts, (rule.first, self._next)) - 1
        if at >= 0 and self.rules[parts[at][1]].last < rule.first:
            at += 1
        for i in range(max(at, 0), len(parts)):
            yield parts[i][1]

    def delete(self, rule: Rule) -> None:
        """Remove its ports from the rules that have them. Raises Missing, without any change."""
        for number in self.covering(rule):
            part = self._take(number)
            left = []
            if part.first < rule.first:
                left.append(_cut(part, part.first, rule.first - 1))
            if part.last > rule.last:
                left.append(_cut(part, rule.last + 1, part.last))
            if left:
                self._put(number, left[0])
            for rest in left[1:]:
                self.add(rest)

    def delete_number(self, number: int) -> None:
        """Raises KeyError."""
        self._take(number)

    def delete_all(self, which: Callable[[Rule], bool]) -> None:
        """Delete all rules that which(rule) holds of."""
        for number in [n for n, rule in self.rules.items() if which(rule)]:
            self._take(number)

    def conflict(self) -> tuple[Rule, Rule] | None:
        """Two rules with a common port, if there are any."""
        rules = self.rules.values()
        return conflict(r for r in rules if not r.auto) or conflict(r for r in rules if r.auto)


def _cut(rule: Rule, first: int, last: int) -> Rule:
    """A part of a rule; its `option` is that of the part."""
    part = replace(rule, first=first, last=last, to=rule.target_port(first))
    return replace(part, option=part.spec)
