"""The table of rules: what is there already, what is deleted in part, compared with a table of single ports."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.policy.rule_table import Missing, RuleTable
from passt.policy.rules import Rule
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

T = Rule("-t 80-89:8080-8089", PROTO_TCP, False, 80, 89, 8080)


def part(first: int, last: int, rule: Rule = T) -> Rule:
    return replace(rule, first=first, last=last, to=rule.target_port(first))


def shown(table: RuleTable) -> dict[int, str]:
    return {number: rule.spec for number, rule in table.rules.items()}


def test_numbers_stay() -> None:
    table = RuleTable([T, replace(T, proto=PROTO_UDP)])
    table.delete_number(1)
    assert table.add(T) == 3
    assert list(table.rules) == [2, 3]
    with pytest.raises(KeyError):
        table.delete_number(1)


def test_a_part_is_deleted() -> None:
    table = RuleTable([T])
    table.delete(part(83, 84))
    assert shown(table) == {1: "-t 80-82:8080-8082", 2: "-t 85-89:8085-8089"}
    assert table.rules[1].option == "-t 80-82:8080-8082"
    table.delete(part(80, 80))
    table.delete(part(89, 89))
    assert shown(table) == {1: "-t 81-82:8081-8082", 2: "-t 85-88:8085-8088"}
    table.delete(part(85, 88))
    assert shown(table) == {1: "-t 81-82:8081-8082"}


def test_what_is_whole_keeps_its_name() -> None:
    table = RuleTable([replace(T, option="-t 80-89:8080-8089,443")])
    assert table.rules[1].option == "-t 80-89:8080-8089,443"


def test_deleting_across_parts() -> None:
    table = RuleTable([part(80, 84), part(85, 89)])
    assert table.covering(part(83, 86)) == [1, 2]
    table.delete(part(83, 86))
    assert shown(table) == {1: "-t 80-82:8080-8082", 2: "-t 87-89:8087-8089"}


@pytest.mark.parametrize(
    ("rule", "port"),
    [
        (part(79, 80), 79),
        (part(88, 90), 90),
        (replace(T, to=80), 80),
        (replace(T, addr=addr.ANY4), 80),
        (replace(T, ifname="eth0"), 80),
        (replace(T, target=addr.LOOPBACK4), 80),
        (replace(T, outbound=True), 80),
        (replace(T, proto=PROTO_UDP), 80),
        (replace(T, auto=True), 80),
    ],
)
def test_what_is_not_there(rule: Rule, port: int) -> None:
    table = RuleTable([T])
    with pytest.raises(Missing) as e:
        table.delete(rule)
    assert (e.value.rule, e.value.port) == (rule, port)
    assert list(table.rules.values()) == [T]


def test_weakness_does_not_matter() -> None:
    table = RuleTable([replace(T, weak=True)])
    table.delete(part(80, 80))
    assert table.rules[1].weak


def test_a_copy_is_another_one() -> None:
    table = RuleTable([T])
    other = table.copy()
    other.delete(part(84, 84))
    assert list(table.rules.values()) == [T] and len(other.rules) == 2
    assert table.covering(T) == [1]


def test_conflicts() -> None:
    assert RuleTable([T, replace(T, to=1)]).conflict() is not None
    assert RuleTable([T, replace(T, auto=True, first=1, last=65535)]).conflict() is None
    assert RuleTable([replace(T, auto=True), replace(T, auto=True, to=1)]).conflict() is not None


RANGES = st.tuples(st.integers(1, 40), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1]))


@given(st.lists(st.tuples(st.booleans(), RANGES), max_size=20))
def test_as_if_ports_were_single(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    table, ports = RuleTable(), set[int]()
    for add, (first, last) in steps:
        rule, those = part(first, last, replace(T, first=1, to=1001)), set(range(first, last + 1))
        if add:
            if not ports & those:
                table.add(rule)
                ports |= those
        elif those <= ports:
            table.delete(rule)
            ports -= those
        else:
            with pytest.raises(Missing) as e:
                table.delete(rule)
            assert e.value.port == min(those - ports)
    found = [port for rule in table.rules.values() for port in rule.ports]
    assert sorted(found) == sorted(ports)
    assert all(rule.target_port(port) == port + 1000 for rule in table.rules.values() for port in rule.ports)
