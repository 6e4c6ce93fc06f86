"""The rules that are in force, by number, and what adding and deleting means.

A rule is numbered when it comes, and keeps its number. What it does to a port that somebody connects to, all but the
range itself, is its meaning: two rules of one meaning are one rule in two parts. So

    a rule that is added is there already   if rules of its meaning have all of its ports
    a rule that is deleted is there         if rules of its meaning have all of its ports; these lose them, and are cut
                                            in two where it is amidst: the first part keeps the number

Whether a failure to bind matters (`Rule.weak`) is no part of the meaning. Rules of different meanings must not want the
same port (`rules.py`), but for `auto` ones, which leave to others what these ask for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from .rules import Rule, conflict

Meaning = tuple[object, ...]


def meaning(rule: Rule) -> Meaning:
    """All that a rule says of a port."""
    return rule.proto, rule.outbound, rule.addr, rule.ifname, rule.target, rule.to - rule.first, rule.auto


class Missing(Exception):
    """`port` of a rule that is to be deleted is not there."""

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
        """Another one, to be changed in its place."""
        other = RuleTable()
        other.rules = dict(self.rules)
        other._parts = {m: list(parts) for m, parts in self._parts.items()}
        other._next = self._next
        return other

    def add(self, rule: Rule) -> int:
        """Its number."""
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
        """Rules of its meaning from the one that has its first port on."""
        parts = self._parts.get(meaning(rule), [])
        at = bisect_right(parts, (rule.first, self._next)) - 1
        if at >= 0 and self.rules[parts[at][1]].last < rule.first:
            at += 1
        for i in range(max(at, 0), len(parts)):
            yield parts[i][1]

    def delete(self, rule: Rule) -> None:
        """Take its ports away from those who have them. Raises Missing, and nothing is changed then."""
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
        """Two rules that want the same port, if there are any."""
        rules = self.rules.values()
        return conflict(r for r in rules if not r.auto) or conflict(r for r in rules if r.auto)


def _cut(rule: Rule, first: int, last: int) -> Rule:
    """A part of it, called after what it is."""
    part = replace(rule, first=first, last=last, to=rule.target_port(first))
    return replace(part, option=part.spec)
