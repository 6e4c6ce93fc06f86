"""Specifications of ports together: what adds up, what contradicts, what cannot be reached."""

from __future__ import annotations

import contextlib
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.conf.forwards import _check_conflicts, check_families, forwards
from passt.conf.options import Options
from passt.log import Fatal
from passt.policy.config import PASST
from passt.policy.rules import PORT_MAX, Rule

from .test_ports import EPHEMERAL, INVALID, PROTOCOLS, RANGES

OPTIONS = Options()
MODES = "Specific ports cannot be specified together with all/none/auto: "


def together(line: str, options: Options = OPTIONS, mode: str = "pasta") -> tuple[Rule, ...]:
    words = line.split()
    specs = [(option[1], text) for option, text in zip(words[::2], words[1::2], strict=True)]
    return forwards(specs, options, mode, EPHEMERAL)


def test_default_is_auto_for_each_letter_by_itself() -> None:
    assert [rule.option for rule in together("")] == ["-t auto", "-u auto", "-T auto", "-U auto"]
    assert [rule.option for rule in together("-u 53")] == ["-u 53", "-t auto", "-T auto", "-U auto"]
    assert [rule.option for rule in together("-t none -U none")] == ["-u auto", "-T auto"]
    assert [rule.option for rule in together("", Options(no_tcp=True))] == ["-u auto", "-U auto"]
    assert together("", Options(no_tcp=True, no_udp=True)) == ()


def test_virtual_machines_get_what_was_asked_for() -> None:
    assert together("", mode=PASST) == ()
    assert [rule.option for rule in together("-t 80", mode=PASST)] == ["-t 80"]
    assert len(together("-t all", mode=PASST)) == 2
    with pytest.raises(Fatal) as e:
        together("-t auto", mode=PASST)
    assert str(e.value) == (
        "'auto' port forwarding is only allowed for pasta: -t auto: 'auto' at character 1: give ports, or 'all'"
    )


ADD_UP = [
    "-t 22 -t 80",
    "-t 22 -u 22 -T 22 -U 22",
    "-t none -u none -T 22 -U none",
    "-t none -t 22",
    "-t none -t none -t 22 -t 80",
    "-T none -T auto",
    "-u none -u all,~53",
    "-t 20-30 -t 31-40",
    "-t 20-30,~25 -t 25:2025",
    "-t ~22 -t 22:2022",
    "-t ~22 -t 40000",
    "-t auto,~22 -t 22:2022",
    "-t auto,8000-9000 -t 80",
    "-t 127.0.0.1/80 -t 127.0.0.2/80",
    "-t 127.0.0.1/80 -t ::1/80",
    "-t 0.0.0.0/80 -t ::/80",
    "-t 0.0.0.0/80 -t ::1/80",
    "-t 127.0.0.1/all -t ::1/all",
    "-t 127.0.0.1/auto -t 192.0.2.1/auto",
    "-t %eth0/80 -t %eth1/80",
    "-t 192.0.2.1%eth0/80 -t 192.0.2.1%eth1/80",
    "-t 192.0.2.1%eth0/80 -t 192.0.2.2%eth0/80",
]


@pytest.mark.parametrize("line", ADD_UP)
def test_options_add_up(line: str) -> None:
    given = [f"{line.split()[i]} {line.split()[i + 1]}" for i in range(0, len(line.split()), 2)]
    assert {option for option in given if "none" not in option} <= {rule.option for rule in together(line)}


CONFLICTS = [
    ("-t 22 -t none", "Port forwarding mode 'none' conflicts with previous mode: "
     "'-t 22' and '-t none': leave one out"),
    ("-t 22 -t 23 -t auto", "Port forwarding mode 'auto' conflicts with previous mode: "
     "'-t 22' and '-t auto': leave one out"),
    ("-T all -T auto", "Port forwarding mode 'auto' conflicts with previous mode: "
     "'-T all' and '-T auto': leave one out"),
    ("-u none -u 53 -u none", "Port forwarding mode 'none' conflicts with previous mode: "
     "'-u 53' and '-u none': leave one out"),
    ("-t auto -t none", "Port forwarding mode 'none' conflicts with previous mode: "
     "'-t auto' and '-t none': leave one out"),
    ("-t auto -t auto", "Port forwarding mode 'auto' conflicts with previous mode: "
     "'-t auto' and '-t auto': leave one out"),
    ("-t all -t 22:2022", f"{MODES}'-t all' and '-t 22:2022': leave one out"),
    ("-t auto -t 40000", f"{MODES}'-t auto' and '-t 40000': leave one out"),
    ("-t 80 -t 80", "Port 80 is asked for twice by '-t 80': give it once"),
    ("-t 80 -t 80:8080", "Port 80 is asked for twice, by '-t 80' and by '-t 80:8080': "
     "leave it out of one of them (~80 excludes it)"),
    ("-t 70-90 -t 80", "Port 80 is asked for twice, by '-t 70-90' and by '-t 80': "
     "leave it out of one of them (~80 excludes it)"),
    ("-t 80 -t 127.0.0.1/80", "Port 80 is asked for twice, by '-t 80' and by '-t 127.0.0.1/80': "
     "leave it out of one of them (~80 excludes it)"),
    ("-t 0.0.0.0/80 -t 127.0.0.1/70-90", "Port 80 is asked for twice, by '-t 127.0.0.1/70-90' and by '-t 0.0.0.0/80': "
     "leave it out of one of them (~80 excludes it)"),
    ("-t ::/80 -t */80", "Port 80 is asked for twice, by '-t ::/80' and by '-t */80': "
     "leave it out of one of them (~80 excludes it)"),
    ("-t %eth0/80 -t 127.0.0.1/80", "Port 80 is asked for twice, by '-t %eth0/80' and by '-t 127.0.0.1/80': "
     "leave it out of one of them (~80 excludes it)"),
    ("-t ~80 -t ~81", "Port 1 is asked for twice, by '-t ~80' and by '-t ~81': "
     "leave it out of one of them (~1 excludes it)"),
    ("-t auto,~80 -t 81", "Port 81 is asked for twice, by '-t auto,~80' and by '-t 81': "
     "leave it out of one of them (~81 excludes it)"),
]  # fmt: skip


def test_none_twice_is_none() -> None:
    assert [rule.option for rule in together("-t none -t none -u none")] == ["-T auto", "-U auto"]


@pytest.mark.parametrize(("line", "message"), CONFLICTS)
def test_conflicts_name_both_options(line: str, message: str) -> None:
    with pytest.raises(Fatal) as e:
        together(line)
    assert str(e.value) == message


def test_protocol_that_is_off() -> None:
    assert together("-t none -T none", Options(no_tcp=True))
    with pytest.raises(Fatal, match=r"TCP port forwarding requested but TCP is disabled: -T auto \(and --no-tcp\)"):
        together("-T auto", Options(no_tcp=True))
    with pytest.raises(Fatal, match=r"UDP port forwarding requested but UDP is disabled: -u 53 \(and --no-udp\)"):
        together("-u 53", Options(no_udp=True))


TARGETS = [
    ("-t 80:192.0.2.1 -u 80:[2001:db8::1]", Options(), ""),
    ("-t 0.0.0.0/80:192.0.2.1 -u ::1/80:[2001:db8::1]", Options(), ""),
    ("-t 0.0.0.0/80:[2001:db8::1]", Options(), "'2001:db8::1' is not of the family of '0.0.0.0', which is listened on"),
    ("-t ::1/80:192.0.2.1", Options(), ""),  # from socket to socket
    ("-t ::1/80:192.0.2.1", Options(no_splice=True),
     "'192.0.2.1' is not of the family of '::1', which is listened on"),
    ("-t 127.0.0.1/80:127.0.0.2", Options(), ""),
    ("-t 127.0.0.1/80:[::1]", Options(), ""),
    ("-t 80:127.0.0.1", Options(splice_only=True), ""),
    ("-t 80:127.0.0.1", Options(),
     "'127.0.0.1' is a loopback address, which only connections from the host's loopback reach: "
     "listen on 127.0.0.1 or ::1, or leave out the target address"),
    ("-t 127.0.0.1/80:127.0.0.1", Options(no_splice=True),
     "'127.0.0.1' is a loopback address, which cannot be reached"),
    ("-T 80:127.0.0.2 -U 80:[::1]", Options(no_splice=True), ""),
]  # fmt: skip


@pytest.mark.parametrize(("line", "options", "message"), TARGETS)
def test_targets_that_can_be_reached(line: str, options: Options, message: str) -> None:
    if not message:
        assert together(line, options)
        return
    with pytest.raises(Fatal) as e:
        together(line, options)
    assert str(e.value) == f"{INVALID}{line}: {message}"


def test_families() -> None:
    rules = together("-t 127.0.0.1/80 -u 80")
    check_families(rules, v4=True, v6=False)
    with pytest.raises(Fatal, match=r"Invalid port specifier -t 127.0.0.1/80: 127.0.0.1, but IPv4 is off"):
        check_families(rules, v4=False, v6=True)


RULES = st.builds(
    lambda letter, r, address, ifname: Rule(
        f"-{letter}", *PROTOCOLS[letter], r[0], r[1], r[0], address, None if letter in "TU" else ifname
    ),
    st.sampled_from("tuT"),
    RANGES,
    st.sampled_from([None, bytes(4), bytes(16), addr.LOOPBACK4, addr.packed("192.0.2.1"), addr.LOOPBACK6]),
    st.sampled_from([None, "eth0", "eth1"]),
)


@given(st.lists(RULES, max_size=7))
def test_conflicts_are_those_of_any_two_rules(rules: list[Rule]) -> None:
    expected = any(a.overlaps(b) for a, b in combinations(rules, 2))
    with pytest.raises(Fatal) if expected else contextlib.nullcontext():
        _check_conflicts(rules)


def test_many_options() -> None:
    """As many as there can be: no step may be quadratic, which would take minutes."""
    assert len(together(" ".join(f"-t {port}" for port in range(1, PORT_MAX + 1)))) == PORT_MAX + 3
    addresses = [f"127.{i >> 8}.{i & 255}.1" for i in range(5000)]
    assert len(together(" ".join(f"-t {address}/1-65535" for address in addresses))) == len(addresses) + 3
