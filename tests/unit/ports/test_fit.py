"""Rules that ask for more sockets than there are descriptors: refused, followed, or opened by priority."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr, log
from passt.log import Fatal
from passt.policy.config import Config
from passt.policy.rules import PORT_MAX, Rule, conflict
from passt.ports import fit as module
from passt.ports.fit import WELL_KNOWN, by_priority, fit, named_ports
from passt.ports.sockets import RESERVE
from passt.wire.checksum import PROTO_TCP, PROTO_UDP
from tests.unit.support import CONFIG

TAKEN = RESERVE + 3  # of the rules of a test, beside their sockets
NAMED = frozenset({(PROTO_TCP, 8080), (PROTO_UDP, 5353)})


def rule(first: int, last: int | None = None, option: str = "-t all", **more: Any) -> Rule:
    last = first if last is None else last
    outbound = option[1].isupper()
    proto = PROTO_TCP if option[1] in "tT" else PROTO_UDP
    return Rule(option, proto, outbound, first, last, **{"to": first, **more})


NOT_EPHEMERAL = ((1, 32767), (61000, PORT_MAX))
ALL = tuple(rule(*ports, f"-{letter} all", weak=True) for letter in "tu" for ports in NOT_EPHEMERAL)
ALL_PORTS = sum(len(r.ports) for r in ALL)


class Limits:
    """The limit of descriptors, and the warnings."""

    limit = 20_000
    warned: list[str]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Limits:
    """Three descriptors are open; services(5) has two lines."""
    limits = Limits()
    limits.warned = []
    (tmp_path / "services").write_bytes(b"http-alt 8080/tcp webcache # \xff\nmdns 5353/udp\n")
    monkeypatch.setattr(module, "SERVICES", str(tmp_path / "services"))
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: {resource.RLIMIT_NOFILE: (limits.limit, limits.limit)}[which]
    )
    monkeypatch.setattr(os, "listdir", lambda path: ["0", "1", "2"])
    monkeypatch.setattr(log, "warn", limits.warned.append)
    return limits


def with_rules(*rules: Rule) -> Config:
    return replace(CONFIG, forwards=rules)


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize(("outbound", "needed"), [(False, 65535), (True, 131070)])
def test_ports_by_name_are_refused_at_once(limits: Limits, outbound: bool, needed: int, follows: bool) -> None:
    letter = "T" if outbound else "t"
    big = rule(1, PORT_MAX, f"-{letter} 1-65535")
    config = with_rules(rule(5, option="-u 5"), big, rule(6, option="-u 6"))
    needed += 2 + TAKEN
    for limits.limit in (4096, needed - 1):
        with pytest.raises(Fatal) as e:
            fit(config, follows=follows)
        assert str(e.value) == (
            f"Can't open enough sockets for port specifier: -{letter} 1-65535 "
            f"(needs {needed} descriptors, the limit is {limits.limit}: raise ulimit -Hn)"
        )
    for limits.limit in (needed, resource.RLIM_INFINITY):
        assert fit(config, follows=follows) is config
    assert limits.warned == []


@pytest.mark.parametrize("follows", [False, True])
def test_names_that_leave_no_room_are_refused_for_all(limits: Limits, follows: bool) -> None:
    for limits.limit in (4096, 5000 + TAKEN):
        with pytest.raises(Fatal, match=r"specifier: -t 1-5000 \(needs"):
            fit(with_rules(rule(1, 5000, "-t 1-5000"), *ALL[2:]), follows=follows)


def test_a_machine_with_hardly_any_descriptors(limits: Limits) -> None:
    assert 2 * TAKEN > 2 * RESERVE
    for limits.limit in (2 * TAKEN, 2 * TAKEN + 1):
        said = rf"specifier: -t all \(needs \d+ descriptors, the limit is {limits.limit}: raise ulimit"
        with pytest.raises(Fatal, match=said):
            fit(with_rules(*ALL), follows=False)
    limits.limit = 2 * TAKEN + 2
    assert [(r.option, r.first, r.last) for r in fit(with_rules(*ALL), follows=False).forwards] == [("-t all", 1, 1)]


def test_no_room_for_both_sockets_of_a_port(limits: Limits) -> None:
    limits.limit = 2 * TAKEN + 2
    beyond = rule(1, PORT_MAX, "-T all:192.0.2.9", weak=True, target=addr.packed("192.0.2.9"))
    with pytest.raises(Fatal, match=r"specifier: -T all:192.0.2.9 \(needs"):
        fit(with_rules(beyond), follows=True)
    assert limits.warned == []


def test_automatic_ports_need_nothing_in_advance(limits: Limits) -> None:
    config = with_rules(rule(1, PORT_MAX, "-t auto", auto=True, weak=True))
    for limits.limit in (1, 64, 128, TAKEN, TAKEN + 1):
        assert fit(config, follows=True) is config


def test_few_descriptors_are_enough_for_a_port(limits: Limits) -> None:
    automatic = rule(1, PORT_MAX, "-t auto", auto=True)
    config = with_rules(automatic, rule(8080, option="-u 8080"))
    for limits.limit in (8, 64, 128):
        assert fit(config, follows=True) is config
    limits.limit = 7
    with pytest.raises(Fatal, match=r"specifier: -u 8080 \(needs 8 descriptors, the limit is 7"):
        fit(with_rules(automatic, rule(8080, option="-u 8080"), rule(8081, option="-t 8081")), follows=True)


# Followed ------------------------------------------------------------------------------------------------------------


def test_all_ports_of_a_namespace_are_followed_where_they_are_too_many(limits: Limits) -> None:
    named = rule(80, option="-t 80")
    config = fit(with_rules(named, *ALL), follows=True)
    assert config.forwards == (named, *(replace(r, auto=True) for r in ALL))
    assert limits.warned == [
        f"-t all, -u all: {ALL_PORTS + 1 + TAKEN} descriptors are needed, and the limit is 20000 (ulimit -Hn): "
        "ports are listened on while a server on the other side has them, as with 'auto'"
    ]


def test_where_they_fit_all_are_opened(limits: Limits) -> None:
    limits.limit = ALL_PORTS + TAKEN
    config = with_rules(*ALL)
    assert fit(config, follows=True) is config and fit(config, follows=False) is config
    assert limits.warned == []


def test_ports_of_another_address_cannot_be_followed(limits: Limits) -> None:
    """Those of the namespace are; the others are opened if they fit then, or by priority."""
    beyond = rule(1, 15_000, "-T all:192.0.2.9", weak=True, target=addr.packed("192.0.2.9"))
    limits.limit = 40_000
    config = fit(with_rules(*ALL, beyond), follows=True)
    assert config.forwards[-1] == beyond and len(limits.warned) == 1
    limits.warned.clear()
    limits.limit = 20_000
    config = fit(with_rules(*ALL, beyond), follows=True)
    assert len(limits.warned) == 2 and "-T all:192.0.2.9: " in limits.warned[1]
    *followed, low, named = config.forwards
    assert all(r.auto for r in followed)
    assert (low.first, low.last) == (1, (20_000 // 2 - TAKEN) // 2 - 1) and low.target == beyond.target
    assert (named.first, named.last) == (8080, 8080)


# By priority ---------------------------------------------------------------------------------------------------------


def test_a_machine_gets_the_most_important_ports(limits: Limits) -> None:
    config = fit(with_rules(*ALL), follows=False)
    room = 10_000 - TAKEN
    assert sum(len(r.ports) for r in config.forwards) == room
    last = (room - 2) // 2
    assert [(r.proto, r.first, r.last, r.to) for r in config.forwards] == [
        (PROTO_TCP, 1, last + 1, 1),
        (PROTO_TCP, 8080, 8080, 8080),
        (PROTO_UDP, 1, last, 1),
        (PROTO_UDP, 5353, 5353, 5353),
    ]
    assert limits.warned == [
        f"-t all, -u all: {ALL_PORTS + TAKEN} descriptors are needed, and the limit is 20000 (ulimit -Hn): "
        f"{ALL_PORTS - room} of {ALL_PORTS} ports are left out. Listened on are "
        f"those below 1024, those of /etc/services, and the others up to {last + 1}"
    ]


def test_named_ports_take_their_part_first(limits: Limits) -> None:
    named = rule(1, 9000, "-t 1-9000")
    config = fit(with_rules(named, rule(9001, PORT_MAX, weak=True)), follows=False)
    assert config.forwards == (named, rule(9001, 9000 + 1000 - TAKEN, weak=True))


@pytest.mark.parametrize(
    ("room", "words"),
    [
        (10, "those up to 10"),
        (1024, "those below 1024, and those of /etc/services up to 8080"),
        (1025, "those below 1024, those of /etc/services, and the others up to 1024"),
    ],
)
def test_what_is_left_in_words(room: int, words: str) -> None:
    assert by_priority(CONFIG, ALL[:1], room, NAMED)[1] == words


@given(
    st.integers(0, 3000),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 900), st.integers(0, 30000)), min_size=1, max_size=4),
    st.sampled_from(["t", "u", "T", "U"]),
)
def test_parts_are_of_their_rules(room: int, ranges: list[tuple[int, int, int]], letter: str) -> None:
    rules, first = [], 0
    for gap, length, to in ranges:
        first += gap
        rules.append(rule(first, first + length, f"-{letter} all", to=first + to, weak=True))
        first += length
    parts, _ = by_priority(CONFIG, rules, room, NAMED)
    assert list(parts) == rules
    opened = set()
    for whole, pieces in parts.items():
        for piece in pieces:
            for port in piece.ports:
                assert port in whole.ports and piece.target_port(port) == whole.target_port(port)
                opened.add(port)
    assert conflict(piece for pieces in parts.values() for piece in pieces) is None
    sockets = 2 if letter.isupper() else 1
    every = sorted(port for whole in rules for port in whole.ports)
    assert len(opened) == min(room // sockets, len(every))
    low = [port for port in every if port < WELL_KNOWN]
    assert opened.issuperset(low[: len(opened)])


# services(5) ---------------------------------------------------------------------------------------------------------


def test_services() -> None:
    text = "# comment\nhttp\t80/tcp\twww # WorldWideWeb\n\nmdns 5353/udp\nx 1/sctp\ny\nz 70000/tcp9\n"
    text += "#w 7/tcp\nv 54321/udp\n"
    assert named_ports(text) == {(PROTO_TCP, 80), (PROTO_UDP, 5353), (PROTO_UDP, 54321)}


LINES = st.sampled_from(["a 80/tcp", "b 123456/udp", "c \u0663/tcp", "d -1/tcp", "# 7/tcp"])


@given(st.text() | st.lists(LINES).map("\n".join))
def test_any_text_is_read(text: str) -> None:
    assert all(proto in (PROTO_TCP, PROTO_UDP) and port < 100_000 for proto, port in named_ports(text))


def test_without_the_file_the_lowest_ports_come_first(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERVICES", "/nowhere")
    config = fit(with_rules(*ALL), follows=False)
    assert [(r.first, r.last) for r in config.forwards if r.proto == PROTO_UDP] == [(1, (10_000 - TAKEN) // 2)]
