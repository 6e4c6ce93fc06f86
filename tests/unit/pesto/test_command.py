"""The client: its command line, what it asks, what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import __version__
from passt.log import Fatal
from passt.pesto import command as pesto
from passt.pesto.command import Request, parse

from .support import Json, Server, call

RULE: Json = {
    "number": 1,
    "rule": "-t 8080:80",
    "first": 8080,
    "last": 8080,
    "auto": False,
    "listening": [[8080, 8080]],
}


# The command line ----------------------------------------------------------------------------------------------------


def asked(*argv: str) -> tuple[list[Json], list[str], list[str]]:
    what, operands = parse(argv)
    return what.changes, what.queries, operands


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["-A", "--tcp-ports=0.0.0.0/8080:80"], [{"add": "-t 0.0.0.0/8080:80"}]),
        (["-D", "--tcp-ports=0.0.0.0/8080:80"], [{"delete": "-t 0.0.0.0/8080:80"}]),
        (["-A", "--udp-ports=::/8080:80"], [{"add": "-u ::/8080:80"}]),
        (
            ["--add", "-t", "0.0.0.0/8080", "-t", "[::]/8080", "-u", "0.0.0.0/53"],
            [{"add": "-t 0.0.0.0/8080"}, {"add": "-t [::]/8080"}, {"add": "-u 0.0.0.0/53"}],
        ),
        (["-D", "-t1", "-A", "-T2", "-U", "3"], [{"delete": "-t 1"}, {"add": "-T 2"}, {"add": "-U 3"}]),
        (["-t", "80", "-u", "none"], [{"replace": "-t 80"}, {"replace": "-u none"}]),
        (["--clear"], [{"clear": "all"}]),
        (["-C", "HOST"], [{"clear": "host"}]),
        (["-Csplice"], [{"clear": "splice"}]),
        (["--cl", "SPLICE", "-A", "-t", "1"], [{"clear": "splice"}, {"add": "-t 1"}]),
        (["--clear=HOST", "--del", "--tcp-p", "1"], [{"clear": "host"}, {"delete": "-t 1"}]),
        (["-AC", "all"], [{"clear": "all"}]),
    ],
)
def test_changes(argv: list[str], changes: list[Json]) -> None:
    assert asked(*argv, "SOCK") == (changes, [], ["SOCK"])


def test_operands_may_come_first() -> None:
    assert asked("SOCK", "-A", "-t", "80", "--show") == ([{"add": "-t 80"}], ["show"], ["SOCK"])
    assert asked("--clear", "SOCK")[0] == [{"clear": "all"}]
    assert asked("--show", "--", "-SOCK", "--flows") == ([], ["show"], ["-SOCK", "--flows"])


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--nonsense", "S"], "pesto: unrecognized option '--nonsense': see pesto --help"),
        (["--flow-s", "S"], "pesto: unrecognized option '--flow-s': did you mean --flows? See pesto --help"),
        (["-x", "S"], "pesto: invalid option -- 'x': see pesto --help"),
        (["-t"], "pesto: option requires an argument -- 't'"),
        (["--tcp", "80", "S"], "pesto: option '--tcp' is ambiguous; possibilities: '--tcp-ports' '--tcp-ns'"),
        (["--show=1", "S"], "pesto: option '--show' doesn't allow an argument"),
        (["--clear=TAP", "S"], "pesto: there are no rules of TAP (give HOST, SPLICE, ALL, or nothing)"),
        (
            ["--clear=splise", "S"],
            "pesto: there are no rules of splise (give HOST, SPLICE, ALL, or nothing): did you mean 'SPLICE'?",
        ),
        ([], "pesto: which control socket? Give the path that pasta or passt was started with: pesto ... SOCKET"),
        (["-A", "-t", "80"], "pesto: which control socket? Give"),
        (["S", "T"], "pesto: too many operands"),
    ],
)
def test_mistakes(argv: list[str], error: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 1
    out, err = capfd.readouterr()
    assert (out, err.startswith(error), err.count("\n")) == ("", True, 1)


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capfd.readouterr().out.startswith(f"pesto {__version__}\n")
    assert call("--help") == call("-h") == 0
    text, err = capfd.readouterr()
    assert not err and all(f"--{option.name}" in text for option in pesto.TABLE)
    assert max(map(len, text.splitlines())) <= 80


@given(st.lists(st.sampled_from(["-A", "-D", "-C", "HOST", "-t", "80", "--", "-", "--cl", "--show", "x", "-tx"])))
def test_any_words(words: list[str]) -> None:
    try:
        what, operands = parse(words)
    except Fatal:
        return
    assert isinstance(what, Request) and all(isinstance(operand, str) for operand in operands)


# Conversations -------------------------------------------------------------------------------------------------------


def test_success_is_silent(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": True, "added": [RULE], "removed": [], "present": []})
    assert call("-A", "-t", "8080:80", server.path) == 0
    assert server.asked == [{"command": "change", "changes": [{"add": "-t 8080:80"}]}]
    assert capfd.readouterr() == ("", "")


def test_there_already(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": True, "added": [], "removed": [], "present": [RULE]})
    assert call("-A", "-t", "8080:80", server.path) == 0
    assert capfd.readouterr().err == "'-t 8080:80' is there already\n"


def test_before_and_after(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": True, "rules": []}, {"ok": True, "present": []}, {"ok": True, "rules": [RULE]})
    assert call("-s", "-A", "-t", "8080:80", server.path) == 0
    assert [a["command"] for a in server.asked] == ["show", "change", "show"]
    assert capfd.readouterr().out.splitlines() == [
        "   #  RULE                      LISTENING",
        "   #  RULE                      LISTENING",
        "   1  -t 8080:80                yes",
    ]


def test_the_rules_are_what_is_asked_for_by_default(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    auto = {"number": 12, "rule": "-T auto", "first": 1, "last": 65535, "auto": True, "listening": [[22, 23], [80, 80]]}
    none = {**auto, "listening": []}
    many = {**auto, "listening": [[p, p] for p in range(1, 30, 2)]}
    weak = {"number": 13, "rule": "-t 1-10", "first": 1, "last": 10, "auto": False, "listening": [[2, 4]]}
    server.will({"ok": True, "rules": [auto, none, many, weak]})
    assert call(server.path) == 0
    listening = [line[32:] for line in capfd.readouterr().out.splitlines()[1:]]
    assert listening == ["22-23, 80", "nothing now", "1, 3, 5, 7, 9, 11, 13, 15, ...", "3 of 10 ports"]


def test_every_line_of_an_error(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": False, "error": "a", "errors": ["a", "b"]})
    assert call("-A", "-t", "1-2", server.path) == 1
    assert capfd.readouterr() == ("", "a\nb\n")


def test_json_and_debug(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    answer = {"ok": True, "rules": [RULE]}
    server.will(answer)
    assert call("--json", "-d", server.path) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == answer
    assert err.splitlines() == ['> {"command": "show"}', f"< {json.dumps(answer)}"]


def test_other_questions(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    info = {"version": "1", "assigned": ["192.0.2.1"], "guest": {"mac": None}}
    server.will({"ok": True, "metrics": "# x\ny 1\n"}, {"ok": True, "info": info}, {"ok": True, "flows": []})
    assert call("--metrics", "--info", "--flows", server.path) == 0
    assert capfd.readouterr().out.splitlines() == [
        "# x",
        "y 1",
        "version:     1",
        "assigned:    192.0.2.1",
        "guest:",
        "    mac:         -",
        "PROTO  FROM  TO  STATE  ->GUEST  ->HOST  AGE  RTT  WINDOW",
    ]


def test_the_table_has_each_option_once() -> None:
    shorts: Sequence[str] = [option.short for option in pesto.TABLE if option.short]
    names = [option.name for option in pesto.TABLE]
    assert len(set(shorts)) == len(shorts) and len(set(names)) == len(names)
    actions: list[Callable[..., None]] = [option.action for option in pesto.TABLE]
    assert len(set(map(id, actions))) == len(actions), "the same action would make two names of one option"


def test_the_view_of_the_network_has_a_line_for_each_family(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    view = "IPv4 192.0.2.2/24 via 192.0.2.1 (eth0: the default route); IPv6 is withdrawn (no route)"
    network = {"follow": "all", "view": view, "changes": 2}
    server.will({"ok": True, "rules": [], "network": network})
    assert call(server.path) == 0
    assert capfd.readouterr().out.splitlines()[1:] == [
        "network: --follow all, 2 changes",
        "    IPv4 192.0.2.2/24 via 192.0.2.1 (eth0: the default route)",
        "    IPv6 is withdrawn (no route)",
    ]
